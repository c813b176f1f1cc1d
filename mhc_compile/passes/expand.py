"""Rewrite trunks to n streams: one level-1 op of the mathematics for each term of a site.

With streams X of the base x, a site `x' = a x + s F(x)` becomes

    pre, post, logits = coefficients(X, phi, alpha, bias);  res = sinkhorn(logits)
    u = aggregate(X, pre);  f = s F(u);  X' = merge(a X, f, post, res)

The trunk is widened at its entry (`expand`); ops between sites act on every stream; whoever else reads a trunk
value gets `readout(X)`, the mean over streams (arXiv 2512.24880, eq. 7 to 19). Other forms of sites (`site_form`) have
`gates` in place of `coefficients`, `constrain` in place of `sinkhorn`, or no res.

With single-pass reads whoever reads a state, branches and others, reads it with the pre of the site that made it, and
before the first site, where streams are equal, by their mean:

    u_0 = readout(X_0)    u_l+1 = aggregate(X_l+1, pre_l)    y = aggregate(X_L, pre_L-1)

so that merge and reads of a state need one pass over it. An op on the trunk that changes how tokens lie leaves no such
pre: behind it a branch reads by its own, and others by the mean.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import fx

import mhc_compile.kernels.ops  # noqa: F401 - registers torch.ops.mhc
from mhc_compile.config import MHCConfig
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.emit import Emitter
from mhc_compile.passes.feature_axis import rank
from mhc_compile.passes.op_kinds import aten, tensor_of
from mhc_compile.passes.stream_rules import Streams, apply_to_streams, from_tokens, to_tokens
from mhc_compile.passes.trunks import Site, Trunk, carried_axis
from mhc_compile.site_form import SiteForm

mhc = torch.ops.mhc

Parameters = Callable[[Site], Mapping[str, fx.Node]]


def expand(
    gm: fx.GraphModule,
    trunks: list[Trunk],
    flow: Dataflow,
    parameters: Parameters,
    config: MHCConfig,
) -> None:
    """Rewrite the trunks of `gm` in place; `parameters` gives the nodes of each site's parameters by name.

    `flow` is the dataflow of the graph as the trunks were found in it.
    """
    dead = {node for node in gm.graph.nodes if not node.users}
    _Widening(gm.graph, trunks, flow, parameters, config).run()
    for node in reversed(gm.graph.nodes):
        if node.op == "call_function" and not node.users and node not in dead and not node.is_impure():
            gm.graph.erase_node(node)


class _Widening:
    """The rewrite of all trunks of a graph, in graph order, so that whatever a new node reads is settled."""

    def __init__(
        self,
        graph: fx.Graph,
        trunks: list[Trunk],
        flow: Dataflow,
        parameters: Parameters,
        config: MHCConfig,
    ) -> None:
        self.graph, self.emit, self.flow, self.parameters = graph, Emitter(graph), flow, parameters
        self.config, self.trunks = config, trunks
        self.streams: dict[fx.Node, Streams] = {}
        self.readouts: dict[fx.Node, fx.Node] = {}
        self.along: dict[Site, Streams] = {}  # the streams of a site's skip, as far as the sweep has come
        self.plain: dict[Site, fx.Node] = {}  # the same way, walked from the site's aggregate
        self.mixing: dict[Site, list[fx.Node | None]] = {}  # post and res
        self.pre: dict[Site, fx.Node] = {}
        # With single-pass reads, the pre that a trunk value is read with; None before the first site.
        self.weights: dict[fx.Node, fx.Node | None] = {}
        self.based: dict[fx.Node, list[Site]] = {}
        self.holder = {site: _skip_holder(site) for trunk in trunks for site in trunk.sites}
        self.carried: set[tuple[fx.Node, fx.Node]] = set()  # (reader, value) edges that the streams replace
        for trunk in trunks:
            self.carried.update(trunk.steps.items())
            for site in trunk.sites:
                self.based.setdefault(site.merge.base, []).append(site)
                self.carried.update(_skip_edges(site))

    def run(self) -> None:
        """Visit entries, trunk ops, path ops and merges in graph order."""
        events: list[tuple[fx.Node, Callable[[], None]]] = []
        for trunk in self.trunks:
            events.append((trunk.entry, partial(self._enter, trunk)))
            events += [(node, partial(self._step, trunk, node, source)) for node, source in trunk.steps.items()]
            for site in trunk.sites:
                events += [(op, partial(self._walk, site, op)) for op in site.merge.path]
                events.append((site.merge.root, partial(self._merge, site)))
        for _, visit in sorted(events, key=lambda event: self.flow.index[event[0]]):
            visit()

    # ------------------------------------------------------------------------------------------ trunk values

    def _enter(self, trunk: Trunk) -> None:
        entry, axis = trunk.entry, trunk.axis[trunk.entry]
        with self.graph.inserting_before(self._place_after(entry)):
            tokens = to_tokens(self.emit, entry, axis)
            self.streams[entry] = Streams(self.emit.call(mhc.expand.default, tokens, self.config.n, like=entry), axis)
        self.weights[entry] = None
        self._open_sites(entry)  # its other readers go on reading the narrow value, which is the readout

    def _step(self, trunk: Trunk, node: fx.Node, source: fx.Node) -> None:
        with self.graph.inserting_before(node):
            self.streams[node] = apply_to_streams(
                self.emit,
                self.flow,
                node,
                source,
                self.streams[source],
                trunk.axis[node],
                self.readouts.get(source),
            )
        self.weights[node] = self.weights[source]
        self._open_sites(node)
        self._read_out(node, self.streams[node])

    def _walk(self, site: Site, op: fx.Node) -> None:
        """One op of the skip's path: on the streams, and on the aggregate if the branch reads it too."""
        source = _operand_on_path(site, op)
        state = self.along[site]
        axis = carried_axis(op, state.axis)
        assert axis is not None
        with self.graph.inserting_before(op):
            self.along[site] = apply_to_streams(self.emit, self.flow, op, source, state, axis)
            if self._branch_reads_from(site, op):
                copy = self.graph.node_copy(op)
                copy.replace_input_with(source, self.plain[site])
                self.plain[site] = copy
                for user in self._branch_readers(site, op):
                    user.replace_input_with(op, copy)
        self.weights[op] = self.weights[site.merge.base]
        self._read_out(op, self.along[site])

    def _merge(self, site: Site) -> None:
        root, state = site.merge.root, self.along[site]
        dtype = tensor_of(root).dtype  # type: ignore[union-attr]
        with self.graph.inserting_before(root):
            kept = self.emit.cast(state.node, dtype)
            f = self.emit.cast(self._branch_sum(site), dtype)
            f = self._full_size(to_tokens(self.emit, _at_rank(self.emit, f, rank(root)), state.axis), kept)
            coefficients = torch.float64 if dtype == torch.float64 else torch.float32  # a cast may stand on the skip
            mixing = [one and self.emit.cast(one, coefficients) for one in self.mixing[site]]
            node = self.emit.call(mhc.merge.default, kept, f, *mixing, like=root)
        node.meta["mhc_site"] = site.name
        self.streams[root] = Streams(node, state.axis)
        self.weights[root] = self.pre[site]
        self._open_sites(root)
        self._read_out(root, self.streams[root])

    def _branch_sum(self, site: Site) -> fx.Node:
        """The sum of every leaf but the skip, in the order of the original sum."""
        leaves = _leaves_now(site, self.holder[site])
        total = leaves[0]
        for leaf in leaves[1:]:
            total = self.emit.call(aten.add.Tensor, total, leaf, like=site.merge.root)
        return total

    def _full_size(self, f: fx.Node, streams: fx.Node) -> fx.Node:
        """A branch that broadcasts (a gate per sequence, a bias) at the size of one stream."""
        state, value = tensor_of(streams), tensor_of(f)
        assert state is not None and value is not None
        wanted = (*state.shape[:-2], state.shape[-1])
        if tuple(map(str, value.shape)) == tuple(map(str, wanted)):
            return f
        sizes = [self.emit.size(streams, place) for place in range(state.dim()) if place != state.dim() - 2]
        return self.emit.call(aten.expand.default, f, sizes, like=f)

    # ------------------------------------------------------------------------------------------ readers

    def _open_sites(self, base: fx.Node) -> None:
        """Emit the read of every site based at a trunk value, and give its branch the aggregate."""
        place = self._place_after(base)
        for site in self.based.get(base, ()):
            state = self.streams[base]
            with self.graph.inserting_before(place):
                self.pre[site], *self.mixing[site] = self._coefficients(site, state.node)
                self.along[site] = state
                u = self._branch_input(site, state.node)
                u.meta["mhc_site"] = site.name
                self.plain[site] = u = from_tokens(self.emit, u, state.axis, of=base)
            for reader in sorted(site.readers):
                if self.flow.index[reader] >= self.flow.index[place] and (reader, base) not in self.carried:
                    reader.replace_input_with(base, u)

    def _coefficients(self, site: Site, streams: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """Its pre, its post, and its res, None where that is I."""
        form, given, like = SiteForm.of(self.config, site.constraint), self.parameters(site), site.merge.root
        (read, rest), mix = form.read, form.mix
        made = self.emit.call(read, streams, given.get("phi"), given.get("alpha"), given["bias"], *rest, like=like)
        made.meta["mhc_site"] = site.name
        pre, post, logits = (self.emit.call(operator.getitem, made, part, like=like) for part in range(3))
        if mix is None:
            return pre, post, None
        res = self.emit.call(mix[0], logits, *mix[1], like=like)
        res.meta["mhc_site"] = site.name
        return pre, post, res

    def _branch_readers(self, site: Site, op: fx.Node) -> list[fx.Node]:
        branch = self.flow.between(site.merge.base, site.merge.branches)
        users = [user for user in op.users if user in self.flow.index and (user, op) not in self.carried]
        return [user for user in users if self.flow.has(branch, user)]

    def _branch_reads_from(self, site: Site, op: fx.Node) -> bool:
        """The branch reads this op of the skip's path, or a later one."""
        path = site.merge.path
        return any(self._branch_readers(site, later) for later in path[path.index(op) :])

    def _read_out(self, value: fx.Node, state: Streams) -> None:
        """Give every reader that is left the mean over streams, or with single-pass reads their weighted sum."""
        readers = [user for user in value.users if user in self.flow.index and (user, value) not in self.carried]
        if not readers:
            return
        with self.graph.inserting_before(self._next_original(value)):
            mean = self._view(value, state.node, value)
            self.readouts[value] = mean = from_tokens(self.emit, mean, state.axis, of=value)
        for reader in readers:
            reader.replace_input_with(value, mean)

    def _branch_input(self, site: Site, streams: fx.Node) -> fx.Node:
        """What a site's branch reads of its base: by its own pre, or with single-pass reads by the one before."""
        base, like = site.merge.base, site.merge.root
        if self.config.single_pass and (self.weights[base] is None or self._before(base, streams) is not None):
            return self._view(base, streams, like)
        return self.emit.call(mhc.aggregate.default, streams, self.pre[site], like=like)

    def _view(self, value: fx.Node, streams: fx.Node, like: fx.Node) -> fx.Node:
        """What any other reader of a trunk value gets."""
        pre = self._before(value, streams) if self.config.single_pass else None
        if pre is None:
            return self.emit.call(mhc.readout.default, streams, like=like)
        return self.emit.call(mhc.aggregate.default, streams, pre, like=like)

    def _before(self, value: fx.Node, streams: fx.Node) -> fx.Node | None:
        """The pre of the last site before a trunk value, if tokens still lie as they did there."""
        pre, state = self.weights[value], tensor_of(streams)
        assert state is not None
        if pre is None or tuple(map(str, pre.meta["val"].shape)) != tuple(map(str, state.shape[:-1])):
            return None
        return pre

    # ------------------------------------------------------------------------------------------ places

    def _next_original(self, node: fx.Node) -> fx.Node:
        following = node.next
        while following not in self.flow.index or following.op == "placeholder":
            following = following.next
        return following

    def _place_after(self, node: fx.Node) -> fx.Node:
        """The first place behind a node where gradients are on: a read in a no-grad region could not train."""
        place = self._next_original(node)
        while self.flow.has(self.flow.without_grad, place):
            place = self._next_original(place)
        return place


def _skip_edges(site: Site) -> list[tuple[fx.Node, fx.Node]]:
    merge = site.merge
    edges = [(op, _operand_on_path(site, op)) for op in merge.path]
    return [*edges, (_skip_holder(site), merge.skip)]


def _operand_on_path(site: Site, op: fx.Node) -> fx.Node:
    place = site.merge.path.index(op)
    return site.merge.path[place - 1] if place else site.merge.base


def _skip_holder(site: Site) -> fx.Node:
    """The add of the tree that reads the skip."""
    tree = site.merge.tree
    return next(add for add in (tree.root, *tree.interior) if site.merge.skip in add.args[:2])


def _leaves_now(site: Site, holder: fx.Node) -> list[fx.Node]:
    """The leaves but the skip as the graph holds them now: the sweep may have replaced what they were found as."""
    tree, merge = site.merge.tree, site.merge
    leaves: list[fx.Node] = []
    pending: list[tuple[fx.Node, fx.Node | None]] = [(tree.root, None)]
    skipped = False
    while pending:
        node, reader = pending.pop()
        if node is tree.root or node in tree.interior:
            pending.extend((argument, node) for argument in reversed(node.args[:2]))  # type: ignore[misc]
        elif reader is holder and node is merge.skip and not skipped:
            skipped = True
        else:
            leaves.append(node)
    return leaves


def _at_rank(emitter: Emitter, node: fx.Node, count: int) -> fx.Node:
    for _ in range(count - rank(node)):
        node = emitter.call(aten.unsqueeze.default, node, 0, like=node)
    return node
