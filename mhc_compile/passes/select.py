"""Decide which merges become sites: one reading for each add-tree, long skips apart, only the outermost.

Three things would make wrong sites of true merges. A *long skip* adds an older state of the same trunk to a newer
one, or runs around a whole trunk: it stays a plain add of what the trunk reads out. A *local skip* lies inside the
branch of another merge. And a side input that every layer adds (a shared position bias) looks like a skip around
all layers before: its chain is shorter than what lies inside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from mhc_compile import _torch
from mhc_compile.passes.dataflow import Dataflow, value_inputs
from mhc_compile.passes.feature_axis import infer
from mhc_compile.passes.op_kinds import NORMS, is_float_tensor, is_local, packet, tensor_of
from mhc_compile.passes.provenance import source_line
from mhc_compile.passes.residuals import (
    AddTree,
    Merge,
    Refusal,
    add_trees,
    candidates,
    is_statistic,
    is_sum,
    on_trunk_inputs,
)

LONG_SKIP = "a long skip: it adds an older state of the trunk, read out, to every stream"
AROUND = "a long skip around a trunk of {count} sites: the trunk is read out and added as it is"
INSIDE = "a local skip inside the branch of the add at {line}; only the outermost merges chain into a trunk"
WRITTEN = "an op writes in place into the storage of its skip or of its sum, through another view"
NO_GRAD = "it stands in a no-grad region, where the parameters of a site could not be trained"


@dataclass
class Selection:
    """The merges that become sites, in graph order, and the adds that do not, with reasons."""

    sites: list[Merge] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


def select(graph: fx.Graph, flow: Dataflow) -> Selection:
    """Read every add-tree of a canonical graph and choose the sites among them."""
    selection = Selection()
    readings = _read(graph, flow, selection.refused)
    chains = _Chains(readings, flow)
    remaining = [merge for merge in readings.merges if not _runs_around(merge, chains, selection.refused)]
    selection.sites = _outermost(remaining, chains, selection.refused)
    selection.refused.sort(key=lambda refusal: flow.index[refusal.node])
    return selection


# ---------------------------------------------------------------------------------------------- one reading each


@dataclass
class _Readings:
    merges: list[Merge] = field(default_factory=list)
    via: dict[fx.Node, fx.Node] = field(default_factory=dict)  # the operand that carries on a trunk value
    behind: dict[fx.Node, Merge] = field(default_factory=dict)  # the nearest merge on that way


def _read(graph: fx.Graph, flow: Dataflow, refused: list[Refusal]) -> _Readings:
    """One pass in graph order, so that the chain behind each leaf is known when its tree is read."""
    trees = {tree.root: tree for tree in add_trees(graph, flow)}
    readings = _Readings()
    for node in flow.nodes:
        if node in trees:
            merge = _choose(trees[node], flow, readings, refused)
            if merge is not None:
                readings.merges.append(merge)
                readings.via[node], readings.behind[node] = merge.skip, merge
                continue
        _carry_on(node, flow, readings)
    return readings


def _choose(tree: AddTree, flow: Dataflow, readings: _Readings, refused: list[Refusal]) -> Merge | None:
    found, reason = candidates(tree, flow)
    open_ones = []
    for merge in found:
        refusal = _unusable(merge, flow)
        if refusal is None and any(
            _same_trunk(other, merge.base, readings) for other in tree.leaves if other is not merge.skip
        ):
            refusal = LONG_SKIP
        if refusal is None:
            open_ones.append(merge)
        else:
            reason = refusal
    if not open_ones:
        refused.append(Refusal(tree.root, reason))
        return None
    return min(open_ones, key=lambda merge: _rank(merge, flow))


def _rank(merge: Merge, flow: Dataflow) -> tuple[bool, int, int]:
    """The reading with the least rank is taken.

    In `x + F(x) * gate`, with a gate that x itself is computed from, `F(x) * gate` could be the skip and x its branch;
    but that skip is computed from its branch, and x is not.
    """
    backwards = any(flow.depends(merge.skip, branch) for branch in merge.branches)
    return backwards, -len(merge.branches), flow.index[merge.base]


def _unusable(merge: Merge, flow: Dataflow) -> str | None:
    if any(flow.is_mutated(node) for node in (merge.base, *merge.path, merge.root)):
        return WRITTEN
    return NO_GRAD if flow.has(flow.without_grad, merge.root) else None


def _same_trunk(leaf: fx.Node, base: fx.Node, readings: _Readings) -> bool:
    """The leaf is a later state of the trunk that `base` is a state of."""
    if leaf not in readings.behind:
        return False
    node: fx.Node | None = leaf
    while node is not None:
        if node is base:
            return True
        merge = readings.behind.get(node)
        if merge is None:
            return _computed_locally(node, base)
        node = readings.via.get(node)
    return False


def _computed_locally(node: fx.Node, source: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is source:
            return True
        if is_local(current):
            fresh = [other for other in value_inputs(current) if other not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return False


def trunk_operand(node: fx.Node, flow: Dataflow, reached: dict[fx.Node, object]) -> fx.Node | None:
    """The operand whose streams an op between two merges carries on, or None if the trunk ends at the op.

    `reached` holds the nodes that lie on a trunk so far.
    """
    if node.op != "call_function" or not is_float_tensor(node):
        return None
    if packet(node) in NORMS:
        operands = [source for source in node.args[:1] if isinstance(source, fx.Node)]
    else:
        operands = on_trunk_inputs(node, allow_sums=True)
    live = [source for source in operands if source in reached]
    newest = [one for one in live if all(other is one or flow.depends(one, other) for other in live)]
    if not newest:
        return None
    operand = newest[0]
    if is_sum(node) and any(
        _adds_branch(other, operand, flow) for other in node.all_input_nodes if other is not operand
    ):
        return None
    return operand


def _adds_branch(other: fx.Node, operand: fx.Node, flow: Dataflow) -> bool:
    """`other` is computed from `operand` by more than pointwise ops: a demoted long skip ends the trunk."""
    if not flow.depends(other, operand) or (is_local(other) and _computed_locally(other, operand)):
        return False
    return not is_statistic(operand, other, flow)


def _carry_on(node: fx.Node, flow: Dataflow, readings: _Readings) -> None:
    operand = trunk_operand(node, flow, readings.behind)  # type: ignore[arg-type]
    if operand is not None:
        readings.via[node], readings.behind[node] = operand, readings.behind[operand]


# ---------------------------------------------------------------------------------------------- among the readings


class _Chains:
    """The merges as a forest: an edge leads from a merge to the next one on its trunk."""

    def __init__(self, readings: _Readings, flow: Dataflow) -> None:
        self.flow = flow
        self.forest: nx.DiGraph[Merge] = nx.DiGraph()
        self.forest.add_nodes_from(readings.merges)
        self.by_root = {merge.root: merge for merge in readings.merges}
        self.roots = sum(1 << flow.index[root] for root in self.by_root)
        self.branch = {merge: flow.between(merge.base, merge.branches) for merge in readings.merges}
        for merge in readings.merges:
            before = readings.behind.get(merge.base)
            if before is not None:
                self.forest.add_edge(before, merge)
        order = list(nx.topological_sort(self.forest))
        self.up: dict[Merge, int] = {}
        for merge in order:
            self.up[merge] = 1 + max((self.up[one] for one in self.forest.predecessors(merge)), default=0)
        down: dict[Merge, int] = {}
        for merge in reversed(order):
            down[merge] = 1 + max((down[one] for one in self.forest.successors(merge)), default=0)
        self.length = {merge: self.up[merge] + down[merge] - 1 for merge in order}

    def inside(self, merge: Merge) -> list[Merge]:
        """The merges that lie in the branch of one, skips included, in graph order."""
        branch = self.branch[merge]
        found = [self.by_root[root] for root in self.flow.members(branch & self.roots)]
        return [one for one in reversed(found) if one is not merge and self._starts_in(one, merge)]

    def _starts_in(self, inner: Merge, outer: Merge) -> bool:
        return inner.base is outer.base or self.flow.has(self.branch[outer], inner.base)

    def longest(self, merges: list[Merge]) -> int:
        """Number of merges in the longest chain among some."""
        best: dict[Merge, int] = {}
        for merge in merges:
            best[merge] = 1 + max((best.get(one, 0) for one in self.forest.predecessors(merge)), default=0)
        return max(best.values(), default=0)

    def before(self, merge: Merge) -> Merge | None:
        """The merge before one on its trunk."""
        return next(iter(self.forest.predecessors(merge)), None)

    def first_within(self, merge: Merge, nodes: int) -> Merge:
        """The first merge of the chain up to `merge` whose sums all lie in a set of nodes."""
        while (before := self.before(merge)) is not None and self.flow.has(nodes, before.root):
            merge = before
        return merge

    def last(self, merge: Merge) -> list[Merge]:
        """The last merges of the chain from `merge` on."""
        after = nx.descendants(self.forest, merge) | {merge}
        return [one for one in after if self.forest.out_degree(one) == 0]

    def behind_others(self, merge: Merge) -> bool:
        """Every way from the base of a merge to its branches passes the sum of another merge."""
        others = [self.by_root[root] for root in self.flow.members(self.branch[merge] & self.roots)]
        return bool(others) and self.cut_by(merge, others)

    def cut_by(self, merge: Merge, inner: list[Merge]) -> bool:
        """Every way from the base of a merge to its branches passes the sum of some merge of `inner`."""
        branch = self.branch[merge]
        for one in inner:
            branch &= ~(1 << self.flow.index[one.root])
        pending, seen = [merge.base], {merge.base}
        while pending:
            for reader in self.flow.readers[pending.pop()]:
                if reader not in seen and self.flow.has(branch, reader):
                    if reader in merge.branches:
                        return False
                    seen.add(reader)
                    pending.append(reader)
        return True


def _runs_around(merge: Merge, chains: _Chains, refused: list[Refusal]) -> bool:
    """The merge skips a whole trunk: one longer than its own, or of two sites and more on a coarser grid."""
    inner = chains.inside(merge)
    if len(inner) < 2:
        return False
    count = chains.longest(inner)
    if count < 2 or not chains.cut_by(merge, inner):
        return False
    if count > max(2, chains.length[merge]) or _on_coarser_grid(merge, inner, chains):
        refused.append(Refusal(merge.root, AROUND.format(count=count)))
        return True
    return False


def _on_coarser_grid(outer: Merge, inner: list[Merge], chains: _Chains) -> bool:
    here = _positions(outer)
    coarser = [merge for merge in inner if 0 < _positions(merge) < here]
    return chains.longest(coarser) > 1


def _positions(merge: Merge) -> int:
    """Number of positions (batch included) of a merge's state; 0 if its feature axis is not known."""
    axis = infer(merge.base, merge.branches)
    value = tensor_of(merge.base)
    if axis is None or value is None:
        return 0
    total = 1
    for place, size in enumerate(value.shape):
        total *= 1 if place == axis else _torch.size_hint(size)
    return total


def _outermost(merges: list[Merge], chains: _Chains, refused: list[Refusal]) -> list[Merge]:
    """Drop the merges that lie in the branch of a later one that stays; the last add is outermost."""
    kept: list[Merge] = []
    for merge in reversed(merges):
        around = (one for one in reversed(kept) if _nested(merge, one, chains))
        outer = next((one for one in around if not _leads_to_a_trunk(merge, one, kept, chains)), None)
        if outer is None:
            kept.append(merge)
        else:
            refused.append(Refusal(merge.root, INSIDE.format(line=source_line(outer.root) or outer.root.name)))
    return kept[::-1]


def _nested(inner: Merge, outer: Merge, chains: _Chains) -> bool:
    """The chain of `inner` starts in the branch of `outer` and is seen nowhere outside it.

    A chain that goes on outside is a trunk of its own that the branch happens to read. A merge without a chain
    whose skip comes from outside, and whose branch comes from it only by way of other merges (a shared bias that
    looks like a skip), belongs to the branch that it ends in.
    """
    flow, branch = chains.flow, chains.branch[outer]
    if not flow.has(branch, inner.root):
        return False
    first = chains.first_within(inner, branch)
    last = chains.last(inner)
    alone = first is inner and last == [inner] and chains.before(inner) is None and chains.behind_others(inner)
    if not (alone or first.base is outer.base or flow.has(branch, first.base)):
        return False
    sums = {outer.root, *outer.tree.interior}
    return all(user in sums or flow.has(branch, user) for merge in last for user in merge.root.users)


def _leads_to_a_trunk(inner: Merge, outer: Merge, kept: list[Merge], chains: _Chains) -> bool:
    """A trunk that the branch of `outer` reads, and that goes on outside it, is computed from the sum of `inner`."""
    flow, branch = chains.flow, chains.branch[outer]
    return any(flow.has(branch, one.root) and flow.depends(one.base, inner.root) for one in kept)
