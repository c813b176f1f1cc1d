"""Find residual adds by dataflow: add-trees with a leaf, the skip, from which a branch is computed.

A merge has the form `x' = a * x + s * F(x)`. Its *skip* is the leaf `a * x`; the *base* is `x`, the nearest
value on the way back along the skip from which another leaf is computed through an op that mixes positions or
features, or through a learned parameter, on a way that leaves the skip at the base. Names and module classes
play no part. Which merges become sites is decided in `select`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from mhc_compile.passes.capture import graph_input
from mhc_compile.passes.dataflow import Dataflow, is_learned, mixes
from mhc_compile.passes.op_kinds import (
    CASTS,
    COPIES,
    PERMUTES,
    VIEWS,
    aten,
    is_elementwise,
    is_float_tensor,
    is_random,
    packet,
    same_shape,
)

_PEEL_DEPTH = 16  # longest chain of scales, casts and views looked through between a base and its add

NO_ANCESTRY = "no operand is computed from another: a position embedding, a bias, a mask or a sum of branches"
POINTWISE = "one operand is a pointwise function of the other: a local skip, not a residual branch"
PROJECTED = "the operands are computed from one value and none is that value: branches, or a projected shortcut"
FIXED = "the skip is a parameter or a constant, not a state of the model"
BROADCAST = "what could be its skip is broadcast at the add, as a mask or a bias is"


@dataclass(frozen=True)
class AddTree:
    """An add of float tensors with the adds that only feed it: `root`, `interior` adds, `leaves` in order."""

    root: fx.Node
    interior: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Merge:
    """`tree.root = skip + branches`: `path` leads from `base` (not in it) to `skip` (its last node, if any)."""

    tree: AddTree
    base: fx.Node
    skip: fx.Node
    path: tuple[fx.Node, ...]
    branches: tuple[fx.Node, ...]  # leaves that are computed from the base through an op that mixes

    @property
    def root(self) -> fx.Node:
        """The add whose value is the merged state."""
        return self.tree.root


@dataclass(frozen=True)
class Refusal:
    """An add of float tensors that does not become a site, and why."""

    node: fx.Node
    reason: str


def is_sum(node: object) -> bool:
    """The node adds two float tensors."""
    return (
        isinstance(node, fx.Node)
        and node.target is aten.add.Tensor
        and is_float_tensor(node)
        and all(is_float_tensor(argument) for argument in node.args[:2])
    )


def add_trees(graph: fx.Graph, flow: Dataflow) -> list[AddTree]:
    """Every add-tree of a canonical graph, in the order of its roots."""
    interior: set[fx.Node] = set()
    trees = []
    for node in reversed(graph.nodes):
        if is_sum(node) and node not in interior:
            tree = _without_older_states(node, flow)
            interior.update(tree.interior)
            trees.append(tree)
    return trees[::-1]


def _without_older_states(root: fx.Node, flow: Dataflow) -> AddTree:
    """The tree of `root`, where `(x + F(x)) + older` keeps its inner merge apart.

    `older` is a value that x is computed from: a long skip, which the branch of the inner merge does not own.
    """
    apart: set[fx.Node] = set()
    while True:
        tree = _grow(root, apart)
        split = next((add for add in tree.interior if _adds_older_state(add, tree, flow)), None)
        if split is None:
            return tree
        apart.add(split)


def _adds_older_state(add: fx.Node, tree: AddTree, flow: Dataflow) -> bool:
    inner = _grow(add, set())
    outside = [leaf for leaf in tree.leaves if leaf not in inner.leaves]
    if not any(flow.depends(leaf, older) for older in outside for leaf in inner.leaves):
        return False
    found, _ = candidates(inner, flow)
    return any(flow.depends(merge.base, older) for merge in found for older in outside)


def _grow(root: fx.Node, apart: set[fx.Node]) -> AddTree:
    interior: list[fx.Node] = []
    leaves: list[fx.Node] = []
    pending = [root]
    while pending:
        node = pending.pop()
        absorbed = is_sum(node) and len(node.users) == 1 and same_shape(node, root) and node not in apart
        if node is root or absorbed:
            if node is not root:
                interior.append(node)
            pending.extend(reversed([arg for arg in node.args[:2] if isinstance(arg, fx.Node)]))
        else:
            leaves.append(node)
    return AddTree(root, tuple(interior), tuple(leaves))


def candidates(tree: AddTree, flow: Dataflow) -> tuple[list[Merge], str]:
    """The ways to read a tree as a merge (one for each leaf that can be the skip), or none and the reason."""
    found, reason = [], NO_ANCESTRY
    for leaf in tree.leaves:
        others = [other for other in tree.leaves if other is not leaf]
        for base, path in _peel(leaf):
            computed = [other for other in others if flow.depends(other, base)]
            branches = tuple(
                other
                for other in computed
                if _branches_off(base, path, other, flow)
                and not (is_statistic(base, other, flow) and not same_shape(other, tree.root))
            )
            if branches and is_fixed(base):
                reason = FIXED if same_shape(leaf, tree.root) else reason
            elif branches and not same_shape(leaf, tree.root):
                reason = BROADCAST
            elif branches:
                found.append(Merge(tree, base, leaf, path, branches))
                break
            elif computed and reason is NO_ANCESTRY:
                reason = POINTWISE
    if not found and reason is NO_ANCESTRY and _common_source(tree, flow):
        reason = PROJECTED
    return found, reason


def is_fixed(node: fx.Node) -> bool:
    """The node is a parameter, a buffer or a constant: what every layer reads of it is no state of the model."""
    record = graph_input(node)
    return node.op == "get_attr" or (record is not None and record.kind != "input")


def _peel(leaf: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """Values that the leaf is a scaled, cast, masked or re-shaped copy of, nearest first, with the way to it."""
    pending: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(leaf, ())]
    seen = {leaf}
    while pending:
        node, path = pending.pop(0)
        yield node, path
        if len(path) >= _PEEL_DEPTH:
            continue
        for source in on_trunk_inputs(node, allow_sums=False):
            if source not in seen:
                seen.add(source)
                pending.append((source, (node, *path)))


def on_trunk_inputs(node: fx.Node, *, allow_sums: bool) -> list[fx.Node]:
    """The operands whose streams the op could carry on: those of full size of an elementwise op, or the one viewed.

    With `allow_sums`, also those of an add of two tensors.
    """
    if node.op != "call_function" or not is_float_tensor(node) or (is_sum(node) and not allow_sums):
        return []
    kind = packet(node)
    if any(kind in group for group in (CASTS, VIEWS, PERMUTES, COPIES)) or node.target is aten.dropout.default:
        first = node.args[0]
        return [first] if is_float_tensor(first) and isinstance(first, fx.Node) else []
    if is_elementwise(node) and not is_random(node):
        return [source for source in node.all_input_nodes if is_float_tensor(source) and same_shape(source, node)]
    return []


def _branches_off(base: fx.Node, path: tuple[fx.Node, ...], leaf: fx.Node, flow: Dataflow) -> bool:
    """Some way from base to leaf mixes, and runs past every node of the skip's own path."""
    upstream = flow.ancestors[flow.index[leaf]] | 1 << flow.index[leaf]
    for node in path:
        upstream &= ~(1 << flow.index[node])
    start, mixed = _mixing_frontier(base, upstream, flow)
    if not mixed:
        return False
    if not path:
        return True
    return _reaches_around(start, leaf, path, flow)


def is_statistic(state: fx.Node, leaf: fx.Node, flow: Dataflow) -> bool:
    """A mean or the like that is broadcast back, with nothing learned: `x - mean(x)` is a norm, no residual."""
    if same_shape(leaf, state):
        return False
    return not any(is_learned(node) for node in flow.members(flow.between(state, [leaf])))


def _mixing_frontier(base: fx.Node, upstream: int, flow: Dataflow) -> tuple[set[fx.Node], bool]:
    """The first mixing ops on the ways from base, found without passing another mixing op."""
    frontier: set[fx.Node] = set()
    pending, seen = [base], {base}
    while pending:
        node = pending.pop()
        for user in flow.readers[node]:
            if user in seen or not flow.has(upstream, user):
                continue
            seen.add(user)
            if mixes(user):
                frontier.add(user)
            else:
                pending.append(user)
    return frontier, bool(frontier)


def _reaches_around(start: set[fx.Node], leaf: fx.Node, path: tuple[fx.Node, ...], flow: Dataflow) -> bool:
    """The leaf is computed from a node of `start` on some way that avoids the nodes of `path`."""
    first = min(flow.index[node] for node in start)
    pending, seen = [leaf], set(path) | {leaf}
    while pending:
        node = pending.pop()
        if node in start:
            return True
        for source in flow.sources[node]:
            if source not in seen and flow.index[source] >= first:
                seen.add(source)
                pending.append(source)
    return False


def _common_source(tree: AddTree, flow: Dataflow) -> bool:
    """Two leaves are computed from one float tensor that the graph computes (parameters and inputs aside)."""
    seen = 0
    for leaf in tree.leaves:
        upstream = flow.ancestors[flow.index[leaf]] & flow.computed_floats
        if upstream & seen:
            return True
        seen |= upstream
    return False
