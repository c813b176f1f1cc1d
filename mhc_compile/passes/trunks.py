"""Chain sites into trunks, and settle each trunk's feature axis.

A trunk starts at the base of a merge that no trunk reaches and runs through merges and through ops that act on
every stream alike: elementwise ops, casts, norms, layout ops, dropout, sums with what is no branch. It ends where
the features change, at batch statistics, at a projection, and at the output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from mhc_compile.passes import feature_axis
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.op_kinds import NORMS, PERMUTES, VIEWS, aten, packet
from mhc_compile.passes.permutation import permutation
from mhc_compile.passes.provenance import module_path, source_line
from mhc_compile.passes.residuals import Merge, Refusal
from mhc_compile.passes.select import trunk_operand

NO_AXIS = "no op of its branch tells which axis holds the features"
SYMBOLIC = "its number of features is not a constant of the model"
SHARED = "its branch reads the trunk only where another site's branch does"


@dataclass(eq=False)
class Site:
    """One residual site: a merge, the feature axis of its base, and what in its branch reads the trunk."""

    merge: Merge
    axis: int
    features: int
    trunk: int
    index: int
    readers: frozenset[fx.Node]
    name: str = ""
    constraint: str = ""  # its own; '' is that of the conversion

    @property
    def line(self) -> str:
        """Source line of the add."""
        return source_line(self.merge.root)

    @property
    def module(self) -> str:
        """Path of the module whose forward adds."""
        return module_path(self.merge.root)


@dataclass
class Trunk:
    """A chain of sites: `entry` is the value that is widened, `steps` the ops it passes, each with its operand."""

    entry: fx.Node
    axis: dict[fx.Node, int]
    steps: dict[fx.Node, fx.Node]
    sites: list[Site] = field(default_factory=list)


def chain(merges: list[Merge], flow: Dataflow, refused: list[Refusal]) -> list[Trunk]:
    """Build the trunks through `merges` (graph order); merges that cannot be carried go to `refused`."""
    chained = list(merges)
    while True:
        trunks, dropped = _chain_all(chained, flow, refused)
        if not dropped:
            break
        chained = [merge for merge in chained if merge not in dropped]  # their sums become ops on the trunk
    trunks.sort(key=lambda trunk: flow.index[trunk.sites[0].merge.root])
    for number, trunk in enumerate(trunks):
        for index, site in enumerate(trunk.sites):
            site.trunk, site.index = number, index
    return trunks


def _chain_all(merges: list[Merge], flow: Dataflow, refused: list[Refusal]) -> tuple[list[Trunk], set[Merge]]:
    """Trunks through all merges; where an op loses the features, what follows starts a trunk of its own.

    Also gives the merges that must be left out, which asks for another round.
    """
    trunks: list[Trunk] = []
    open_merges = merges
    while open_merges:
        found, open_merges, dropped = _chain_once(open_merges, flow, refused)
        trunks.extend(found)
        if dropped:
            return [], dropped
    return trunks, set()


def _chain_once(
    merges: list[Merge], flow: Dataflow, refused: list[Refusal]
) -> tuple[list[Trunk], list[Merge], set[Merge]]:
    steps, entries = _sweep(merges, flow)
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    for merge in merges:
        graph.add_edge(merge.base, merge.root)
        graph.add_edges_from(_steps_behind(merge.base, steps, entries))
    trunks: list[Trunk] = []
    leftover: list[Merge] = []
    dropped: set[Merge] = set()
    for entry in entries:
        reached = nx.descendants(graph, entry) | {entry}
        members = [merge for merge in merges if merge.base in reached]
        trunk = _settle_axis(entry, members, {node: steps[node] for node in reached if node in steps}, refused)
        if trunk is None:
            dropped.update(members)
            continue
        carried = [merge for merge in members if merge.root in trunk.axis]
        leftover += [merge for merge in members if merge.root not in trunk.axis]
        dropped |= _add_sites(trunk, carried, flow, refused)
        trunks.append(trunk)
    order = {merge: number for number, merge in enumerate(merges)}
    return trunks, sorted(leftover, key=order.__getitem__), dropped


def _sweep(merges: list[Merge], flow: Dataflow) -> tuple[dict[fx.Node, fx.Node], list[fx.Node]]:
    """In graph order: which op carries a trunk on from which operand, and the bases that no trunk reaches."""
    roots = {merge.root for merge in merges}
    bases = {merge.base for merge in merges}
    reached: dict[fx.Node, object] = {}
    steps: dict[fx.Node, fx.Node] = {}
    entries = []
    for node in flow.nodes:
        if node in roots:
            reached[node] = True
            continue
        operand = trunk_operand(node, flow, reached)
        if operand is not None:
            reached[node], steps[node] = True, operand
        elif node in bases:
            reached[node] = True
            entries.append(node)
    return steps, entries


def _steps_behind(
    base: fx.Node, steps: dict[fx.Node, fx.Node], entries: Iterable[fx.Node]
) -> list[tuple[fx.Node, fx.Node]]:
    edges = []
    node = base
    while node in steps and node not in entries:
        edges.append((steps[node], node))
        node = steps[node]
    return edges


def _settle_axis(
    entry: fx.Node, members: list[Merge], steps: dict[fx.Node, fx.Node], refused: list[Refusal]
) -> Trunk | None:
    """The feature axis at the entry that most sites agree with, followed along the trunk."""
    told = {merge: feature_axis.infer(merge.base, merge.branches) for merge in members}
    best, votes = None, 0
    for axis in reversed(range(feature_axis.rank(entry))):  # of two with as many votes, the last axis
        followed = _follow(entry, axis, members, steps)
        agree = sum(told[merge] is not None and followed.get(merge.base) == told[merge] for merge in members)
        if agree > votes:
            best, votes = followed, agree
    reason = NO_AXIS if best is None else SYMBOLIC if feature_axis.features(entry, best[entry]) is None else None
    if best is None or reason is not None:
        refused.extend(Refusal(merge.root, reason or NO_AXIS) for merge in members)
        return None
    return Trunk(entry, best, {node: source for node, source in steps.items() if node in best})


def _follow(entry: fx.Node, axis: int, members: list[Merge], steps: dict[fx.Node, fx.Node]) -> dict[fx.Node, int]:
    """Where the feature axis of the entry is in every later trunk value; values where it is lost are left out."""
    known = {entry: axis}
    ends = {merge.root: merge for merge in members}
    for node in sorted({*steps, *ends}):  # fx nodes sort in graph order
        if node in ends:
            merge = ends[node]
            place: int | None = known.get(merge.base)
            for op in merge.path:
                place = None if place is None else carried_axis(op, place)
        else:
            source = known.get(steps[node])
            place = None if source is None else carried_axis(node, source)
        if place is not None:
            known[node] = place
    return known


def carried_axis(node: fx.Node, axis: int) -> int | None:
    """Where the feature axis is after an op that acts on a trunk value; None if the op does not keep it whole."""
    kind = packet(node)
    if kind in PERMUTES:
        order = permutation(node)
        return None if order is None else order.index(axis)
    if kind in VIEWS:
        origin = feature_axis.axes_through(node, tuple(range(feature_axis.rank(node.args[0]))))  # type: ignore[arg-type]
        return origin.index(axis) if origin is not None and axis in origin else None
    if kind in NORMS and kind is aten.instance_norm:
        return None  # may update running statistics
    return axis


def _add_sites(trunk: Trunk, merges: list[Merge], flow: Dataflow, refused: list[Refusal]) -> set[Merge]:
    """Append the trunk's sites; gives the merges whose branch has no read of the trunk to itself."""
    taken: set[tuple[fx.Node, fx.Node]] = set()
    dropped = set()
    for merge in merges:
        branch = flow.between(merge.base, merge.branches)
        inner = {merge.root, *merge.tree.interior, *merge.path}
        readers = {user for user in merge.base.users if flow.has(branch, user) and user not in inner}
        readers = {
            user for user in readers if (merge.base, user) not in taken and trunk.steps.get(user) is not merge.base
        }
        behind_path = any(flow.has(branch, user) and user not in inner for node in merge.path for user in node.users)
        if not readers and not behind_path:
            refused.append(Refusal(merge.root, SHARED))
            dropped.add(merge)
            continue
        taken |= {(merge.base, user) for user in readers}
        features = feature_axis.features(merge.base, trunk.axis[merge.base])
        assert features is not None
        trunk.sites.append(Site(merge, trunk.axis[merge.base], features, 0, 0, frozenset(readers)))
    return dropped
