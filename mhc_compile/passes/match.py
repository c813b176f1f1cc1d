"""Find the mHC that a model already has, and put our ops in its place.

Rules find Sinkhorn chains (`match_sinkhorn`), coefficients (`match_coefficients`), merges, aggregates and means over
streams (`match_merge`) by the forms of nodes. Here they are tied together: what a chain starts from are the logits
of a site, what reads the streams that a norm was taken of is an aggregate. Each match then has to be closed (nobody
else reads its inside), is emitted, and is run beside the nodes that it replaces; one that differs is taken back and
reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TypeVar

import torch
from torch import fx

import mhc_compile.kernels.ops  # noqa: F401 - registers torch.ops.mhc
from mhc_compile.passes.arrange import Arranger
from mhc_compile.passes.canonicalize import canonicalize
from mhc_compile.passes.dataflow import Dataflow, value_inputs
from mhc_compile.passes.emit import Emitter
from mhc_compile.passes.forms import Rms, Unreadable
from mhc_compile.passes.history import Outcome, Pass
from mhc_compile.passes.match_check import difference
from mhc_compile.passes.match_coefficients import RULE as COEFFICIENTS
from mhc_compile.passes.match_coefficients import Gate, Logits, Misfit, alike, coefficients_match, gate_at, logits_at
from mhc_compile.passes.match_merge import (
    Merge,
    Read,
    merge_at,
    merge_match,
    node_of,
    read_at,
    read_match,
)
from mhc_compile.passes.match_report import Matches, report
from mhc_compile.passes.match_rewrites import Match, Placer, Refusal, narrowed_root, refusal
from mhc_compile.passes.match_sinkhorn import find_sinkhorn
from mhc_compile.passes.op_kinds import aten, is_float_tensor, is_mutating, is_random, packet, tensor_of
from mhc_compile.passes.provenance import source_line
from mhc_compile.passes.read_forms import LAYOUT_OPS, Depth, Reader

mhc = torch.ops.mhc

_Found = TypeVar("_Found")


def match(gm: fx.GraphModule) -> Matches:
    """Replace the mHC of a canonical graph by our ops, in place."""
    session = _Session(gm)
    session.run_sinkhorn()
    session.run_sites()
    gm.recompile()
    return report(gm.graph, session.refused, session.remarks)


def match_passes(found: list[Matches]) -> list[Pass]:
    """The passes that bring a captured graph to canonical form and match it; `found` gets the result."""

    def canonical(gm: fx.GraphModule) -> Outcome:
        return Outcome(True, tuple(sorted(set(canonicalize(gm)))))

    def matched(gm: fx.GraphModule) -> Outcome:
        result = match(gm)
        found.append(result)
        return Outcome(bool(result.ops), result.notes)

    return [Pass("canonicalize", False, canonical), Pass("match", False, matched)]


class _Session:
    """One run over one graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = gm.graph
        self.place = Placer(Arranger(Emitter(gm.graph)))
        self.remarks: list[str] = []
        self.refused: list[Refusal] = []
        self._dead: set[fx.Node] = set()

    def run_sinkhorn(self) -> None:
        matches, refused = find_sinkhorn(self.graph)
        self.refused += refused
        self._rewrite(matches)

    def run_sites(self) -> None:
        finder = _Sites(self.graph)
        matches = finder.matches()
        self.refused += finder.refused
        self._rewrite(matches)

    # ------------------------------------------------------------------------------------------ rewriting

    def _rewrite(self, matches: Sequence[Match]) -> None:
        if not matches:
            return
        flow = Dataflow(self.graph)
        kept = self._closed(matches, flow)
        borders = _borders(kept)
        # all of it before any rewrite changes what the old nodes read
        extents = {one: one.inside(borders) for one in kept}
        places = {one: _place(one, inside, flow) for one, (inside, _) in extents.items()}
        for one in sorted(kept, key=lambda one: flow.index[places[one]]):
            inside, reached = extents[one]
            if self._put(one, places[one], reached, flow):
                self._dead |= inside
                _pin(inside)
        for node in sorted(self._dead, key=flow.index.__getitem__, reverse=True):
            if not node.users and node.op == "call_function":
                self.graph.erase_node(node)
                self._dead.discard(node)

    def _closed(self, matches: Sequence[Match], flow: Dataflow) -> Sequence[Match]:
        """The matches whose inside nobody reads but other matches."""
        live = _live(flow)
        while True:
            borders = _borders(matches)
            inside = {one: one.inside(borders)[0] for one in matches}
            everything = set().union(*inside.values()) | (set(flow.nodes) - live)
            leaking = {
                one: reason
                for one in matches
                if (reason := _misplaced(one, inside[one], flow) or _leak(one, inside[one], everything, flow))
            }
            if not leaking:
                return matches
            self.refused += [refusal(one.rule, reason, one.roots[-1]) for one, reason in leaking.items()]
            matches = [one for one in matches if one not in leaking]

    def _put(self, one: Match, first: fx.Node, reached: Sequence[fx.Node], flow: Dataflow) -> bool:
        """Emit one match before `first`, compare, and let the old nodes' readers read the new ones."""
        late = _later_inputs(one, first, flow)
        if late is None:
            return self._refuse(one, "an input of it is computed from its own result", first.prev, first)
        for node in late:
            first.prepend(node)
        last_before = first.prev
        self.place.arranger.region = flow.has(flow.without_grad, one.roots[0])
        try:
            with self.graph.inserting_before(first):
                news = one.build(self.place)
        except Unreadable:
            return self._refuse(one, "its layout has sizes that are not known", last_before, first)
        differs = difference([self.place.behind(node) for node in (*reached, *one.inputs)], one.roots, news)
        if differs is not None:
            warnings.warn(
                f"a rule of mhc_compile for {one.rule} is wrong ({differs}) at "
                f"{source_line(one.roots[0]) or one.roots[0].name}; the model's own ops stay. Please report it",
                stacklevel=2,
            )
            return self._refuse(one, f"the op would compute something else ({differs})", last_before, first)
        made = _between(last_before, first)
        self.remarks += one.remarks
        for old, new in zip(one.roots, news, strict=True):
            self.place.replace(old, new, made)
        return True

    def _refuse(self, one: Match, reason: str, before: fx.Node, until: fx.Node) -> bool:
        self.refused.append(refusal(one.rule, reason, one.roots[0]))
        made = _between(before, until)
        self.place.arranger.forget(made)
        for node in reversed(made):
            self.graph.erase_node(node)
        return False


def _place(one: Match, inside: set[fx.Node], flow: Dataflow) -> fx.Node:
    """The node to emit a match before: its root; of several, the first reader of one, if gradients are as there."""
    first = min(one.roots, key=flow.index.__getitem__)
    readers = [user for root in one.roots for user in root.users if user not in inside and user in flow.index]
    if len(one.roots) == 1 or not readers:
        return first
    reader = min(readers, key=flow.index.__getitem__)
    return first if flow.has(flow.without_grad, reader) != flow.has(flow.without_grad, first) else reader


def _later_inputs(one: Match, first: fx.Node, flow: Dataflow) -> list[fx.Node] | None:
    """What a match is computed from and stands behind `first`, in order; None if it cannot be moved before it."""
    border = flow.index[first]
    late: set[fx.Node] = set()
    for node in one.inputs:
        if node in flow.index and flow.index[node] >= border:
            bits = flow.ancestors[flow.index[node]] | (1 << flow.index[node])
            late |= {each for each in flow.members(bits) if flow.index[each] >= border}
    for node in late:
        if node in one.roots or node.op != "call_function" or node.is_impure() or is_random(node) or is_mutating(node):
            return None
    return sorted(late, key=flow.index.__getitem__)


def _pin(inside: set[fx.Node]) -> None:
    """Guard the symbolic floats that a match took for literals: the graph holds for these values alone."""
    for node in inside:
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            if isinstance(value, torch.SymFloat):
                float(value)


def _between(before: fx.Node, until: fx.Node) -> list[fx.Node]:
    """The nodes that stand between two, in order."""
    nodes = []
    node = before.next
    while node is not until:
        nodes.append(node)
        node = node.next
    return nodes


def _borders(matches: Sequence[Match]) -> set[fx.Node]:
    """Where the inside of a match ends: what a match is computed from, or stands for."""
    return {node for one in matches for node in (*one.inputs, *one.roots)}


def _live(flow: Dataflow) -> set[fx.Node]:
    """The nodes that an output, or an op with an effect, depends on."""
    ends = [node for node in flow.nodes if node.op == "output" or node.is_impure()]
    bits = 0
    for node in ends:
        bits |= flow.ancestors[flow.index[node]] | (1 << flow.index[node])
    return set(flow.members(bits))


def _misplaced(one: Match, inside: set[fx.Node], flow: Dataflow) -> str | None:
    """Why the op of a match could not stand where its last root stands; None when it can."""
    if any(flow.is_mutated(node) for node in (*inside, *one.inputs)):
        return "an op writes in place into a value that it reads"
    if len({flow.has(flow.without_grad, node) for node in inside if _computes(node)}) > 1:
        return "its ops stand in regions of different grad mode"
    return None


def _computes(node: fx.Node) -> bool:
    return is_float_tensor(node) and packet(node) not in LAYOUT_OPS


def _leak(one: Match, inside: set[fx.Node], everything: set[fx.Node], flow: Dataflow) -> str | None:
    """Why a node of a match is needed elsewhere; None when it is not."""
    harmless: set[fx.Node] = set(one.inputs)
    for node in sorted(inside - set(one.roots), key=flow.index.__getitem__):
        sources = value_inputs(node)
        if packet(node) in LAYOUT_OPS and all(source in harmless or _is_small(source) for source in sources):
            harmless.add(node)  # a view or a cast of an input may be anyone's
            continue
        others = [user for user in node.users if user not in everything and node in value_inputs(user)]
        if others:
            what = "its projection or norm" if one.rule == COEFFICIENTS else "a state inside it"
            return f"{what} is read elsewhere too ({source_line(others[0]) or others[0].name})"
    return None


def _is_small(node: fx.Node) -> bool:
    """A vector at most: weights that several sites may share."""
    value = tensor_of(node)
    return value is None or value.dim() <= 1


# ---------------------------------------------------------------------------------------------- sites


class _Sites:
    """The matches of a graph whose Sinkhorn chains are ops already."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.refused: list[Refusal] = []
        states = _normalised(graph)
        self.deep = Reader(Depth.DEEP, states)
        self.stops = states
        self.gates: dict[fx.Node, Gate] = {}
        for node in graph.nodes:
            if node.target is aten.sigmoid.default and (gate := gate_at(node, self.deep)) is not None:
                self.gates[gate.root] = gate

    def matches(self) -> list[Match]:
        merges = self._merges()
        self.stops = self.stops | {narrowed_root(one.root) for one in merges}
        reads = self._reads()
        sites, used = self._coefficients(merges, reads)
        merges = [one for one in merges if one.res is not None or node_of(one.post) in used]
        of_streams = {node_of(one.streams) for one in merges} | {narrowed_root(one.root) for one in merges}
        reads = [one for one in reads if node_of(one.streams) in of_streams or _reads_by(one, used)]
        for read in reads:
            if read.pre is not None and not _reads_by(read, used) and node_of(read.pre) not in self.gates:
                self.refused.append(refusal(COEFFICIENTS, _OTHER_GATE, node_of(read.pre)))
        return [*sites, *map(merge_match, merges), *map(read_match, reads)]

    # ------------------------------------------------------------------------------------------ candidates

    def _merges(self) -> list[Merge]:
        found, readers = [], self._readers()
        for node in self.graph.nodes:
            if node.target is aten.add.Tensor and is_float_tensor(node):
                one = _first(node, readers, merge_at)
                if one is not None and (one.res is not None or node_of(one.post) in self.gates):
                    found.append(one)
        return found

    def _reads(self) -> list[Read]:
        readers = self._readers()
        nodes = [node for node in self.graph.nodes if packet(node) in _READS and is_float_tensor(node)]
        return [one for node in nodes if (one := _first(node, readers, read_at)) is not None]

    def _readers(self) -> list[Reader]:
        """With what is repeated to streams looked through, and without: either may be the streams."""
        return [Reader(Depth.PRODUCT, self.stops), Reader(Depth.PRODUCT, self.stops | _widened(self.graph))]

    # ------------------------------------------------------------------------------------------ coefficients

    def _coefficients(self, merges: Iterable[Merge], reads: Iterable[Read]) -> tuple[list[Match], set[fx.Node]]:
        """The coefficients of each site, from the gate that its aggregate reads; and all gates that were used."""
        writes = {node_of(one.post) for one in merges}
        chains = [node for node in self.graph.nodes if node.target is mhc.sinkhorn.default]
        logits = [one for chain in chains if (one := self._logits(chain)) is not None]
        matches: list[Match] = []
        used: set[fx.Node] = set()
        for read in reads:
            gate = self.gates.get(node_of(read.pre)) if read.pre is not None else None
            if gate is None or gate.root in used or node_of(gate.logits.streams) is not node_of(read.streams):
                continue
            others = [
                one for one in self.gates.values() if one is not gate and alike(one.logits, gate.logits)
            ]
            written = [one for one in others if one.root in writes] or others
            res = [one for one in logits if alike(one, gate.logits)]
            try:
                matches.append(self._site(gate, written, res))
            except Misfit as reason:
                self.refused.append(refusal(COEFFICIENTS, str(reason), gate.root))
                continue
            used |= {gate.root, *(one.root for one in written)}
        return matches, used

    def _site(self, pre: Gate, posts: list[Gate], res: list[Logits]) -> Match:
        if len(posts) > 1 or len(res) > 1:
            raise Misfit(f"{len(posts)} write gates and {len(res)} matrices are read from one norm of its streams")
        return coefficients_match(pre, posts[0] if posts else None, res[0] if res else None)

    def _logits(self, chain: fx.Node) -> Logits | None:
        source = chain.args[0]
        return logits_at(source, self.deep) if isinstance(source, fx.Node) else None


_OTHER_GATE = "its read gate is not sigmoid(alpha z / r + b) + eps, with r = sqrt(mean(X^2) + eps) over all streams"


def _reads_by(read: Read, gates: Container[fx.Node]) -> bool:
    return read.pre is not None and node_of(read.pre) in gates


def _first(node: fx.Node, readers: Sequence[Reader], rule: Callable[[fx.Node, Reader], _Found | None]) -> _Found | None:
    for reader in readers:
        try:
            found = rule(node, reader)
        except Unreadable:
            continue
        if found is not None:
            return found
    return None


_READS = frozenset({aten.sum, aten.mean, aten.matmul, aten.bmm, aten.einsum, aten.mm, aten.select, aten.slice})
_ROOTS = frozenset({aten.rsqrt, aten.sqrt, aten.pow, aten.rms_norm})


def _normalised(graph: fx.Graph) -> set[fx.Node]:
    """What root mean squares are taken of: the streams are among them."""
    reader = Reader(Depth.PRODUCT, _widened(graph), narrowing=False)  # streams are what they were rounded to
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if packet(node) in _ROOTS and is_float_tensor(node):
            try:
                terms = reader.form(node).terms
            except Unreadable:
                continue
            found |= {one.leaf.source for term in terms for one in term.factors if isinstance(one.leaf, Rms)}
    return found


def _widened(graph: fx.Graph) -> set[fx.Node]:
    """Values repeated to streams at the entry of a trunk: an expand, and the copy that is made of it."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if packet(node) in (aten.expand, aten.repeat):
            readers = list(node.users)
            copied = len(readers) == 1 and packet(readers[0]) in (aten.contiguous, aten.clone, aten.reshape)
            found.add(readers[0] if copied else node)
    return found
