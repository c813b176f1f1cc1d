"""Where a rewritten graph may be cut into pipeline stages, and what would have to be sent there.

A cut splits the nodes of a graph in their order: what the later ones need of the earlier is sent (`passes.boundary`).
It is legal where no site is open, that is, not between the read of a site's streams and its merge, and not inside a
region of grad mode or autocast. Candidates are the states of trunks, what a trunk starts from, its readouts, and the
values that every path to the output passes (its dominators), which divide what comes before the first trunk and behind
the last. The first value is the one cut at; all others that cross are *skips*, to be threaded through every stage in
between: padding masks, a readout that later branches attend to, long skips.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import fx

from mhc_compile import _torch
from mhc_compile.passes.boundary import ENTER, EXIT, GRAD, Boundaries, is_state
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.op_kinds import NORMS, REDUCTIONS, is_local, packet, tensor_of
from mhc_compile.passes.replay import MERGES, READS, depends_on_parameters

mhc = torch.ops.mhc

_AUTOCAST: dict[object, int] = {ENTER: 1, EXIT: -1}


@dataclass(frozen=True)
class SiteSpan:
    """The nodes of one application of a site: its read of the streams, and its last merge (of a head: its read-out)."""

    name: str
    read: fx.Node
    merge: fx.Node

    @property
    def streams(self) -> fx.Node:
        """The streams that it reads."""
        node = self.read.args[0]
        assert isinstance(node, fx.Node)
        return node


@dataclass(frozen=True)
class Cut:
    """A legal cut in front of node number `place`, right behind `value`.

    crossing: the values to be sent, `value` first where it is among them.
    """

    place: int
    value: fx.Node
    crossing: tuple[fx.Node, ...]

    @property
    def bytes(self) -> int:
        """Sent forward, for one microbatch."""
        return sum(map(bytes_of, self.crossing))

    @property
    def skips(self) -> tuple[fx.Node, ...]:
        """What crosses beside the value that is cut at."""
        return tuple(node for node in self.crossing if node is not self.value)


def bytes_of(node: fx.Node) -> int:
    """Bytes of a node's tensor, or of all tensors it gives."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return sum(tensor_bytes(one) for one in values if isinstance(one, torch.Tensor))


def tensor_bytes(value: torch.Tensor) -> int:
    """Bytes of a tensor of its shape, whatever it shares its storage with; sizes as they were captured.

    Of one that wraps others, as quantised weights do, what those take.
    """
    if _torch.is_wrapper(value):
        return sum(map(tensor_bytes, _torch.inner_tensors(value)))
    count = value.element_size()
    for size in value.shape:
        count *= _torch.size_hint(size)
    return count


class Layout:
    """The sites of a rewritten graph in its order, and its legal cuts."""

    def __init__(self, graph: fx.Graph) -> None:
        self.flow = Dataflow(graph)
        self.nodes, self.index = self.flow.nodes, self.flow.index
        self.boundaries = Boundaries(self.flow)
        self.learned = depends_on_parameters(self.flow)
        self.sites = self._sites()

    def _sites(self) -> list[SiteSpan]:
        """The reads of streams, each with the last op that is given what it read; second calls are `name@1`."""
        found = []
        times: Counter[str] = Counter()
        for node in self.nodes:
            if node.target in READS:
                users = [user for output in node.users for user in output.users]
                merges = [user for user in users if user.target in MERGES]
                last = max(merges or users or [node], key=self.index.__getitem__)
                name = str(node.meta.get("mhc_site", node.name))
                found.append(SiteSpan(f"{name}@{times[name]}" if times[name] else name, node, last))
                times[name] += 1
        return found

    @cached_property
    def last_use(self) -> dict[fx.Node, int]:
        """The number of the last node that reads each node; its own if none does."""
        return {
            node: max((self.index[user] for user in node.users), default=self.index[node]) for node in self.nodes
        }

    @cached_property
    def cuts(self) -> list[Cut]:
        """All legal cuts, first to last; of those with nothing but cheap ops between them, the smallest."""
        forbidden = self._forbidden()
        first = next(number for number, node in enumerate(self.nodes) if node.op != "placeholder")
        places: dict[int, fx.Node] = {}
        for node in self._candidates():
            place = self.index[node] + 1
            if place > first and not forbidden[place] and self.nodes[place].op != "output":
                places[place] = node
        return self._without_neighbours([self._cut(place, places[place]) for place in sorted(places)])

    def _cut(self, place: int, value: fx.Node) -> Cut:
        crossing = self.crossing(place)
        if value in crossing:
            crossing.remove(value)
            crossing.insert(0, value)
        return Cut(place, value, tuple(crossing))

    def crossing(self, place: int) -> list[fx.Node]:
        """The values that a stage which ends in front of a place sends on."""
        return [node for node in self.boundaries.crossing(place) if bytes_of(node)]

    def _candidates(self) -> set[fx.Node]:
        found: set[fx.Node] = set(self.dominators)
        for node in self.nodes:
            if node.target is mhc.readout.default:
                found.add(node)
            elif node.target is mhc.expand.default:
                found.add(node.args[0])
        return found | {site.streams for site in self.sites if site.streams.target is not mhc.expand.default}

    @cached_property
    def dominators(self) -> list[fx.Node]:
        """The computed values that every path from a parameter's first use to the output passes, in order.

        What is made of parameters alone and read in several places (a table of all layers) is no way round them: it is
        sent beside.
        """
        graph: nx.DiGraph[Any] = nx.DiGraph()
        output = self.nodes[-1]
        start = "start"
        on_the_way = self.learned - self._tables()
        for node in self.nodes:
            if node.op == "placeholder" or (node not in on_the_way and node is not output):
                continue
            sources = [one for one in self.flow.sources[node] if one in on_the_way and one.op != "placeholder"]
            graph.add_edges_from((source, node) for source in sources)
            if not sources:
                graph.add_edge(start, node)
        if start not in graph or output not in graph:
            return []
        above: dict[Any, Any] = nx.immediate_dominators(graph, start)
        found: list[fx.Node] = []
        node = above[output]
        while node != start:
            if tensor_of(node) is not None:
                found.append(node)
            node = above[node]
        return found[::-1]

    def _tables(self) -> set[fx.Node]:
        """What is computed from parameters and no input of a call, and read by several ops that have one."""
        given = sum(1 << self.index[node] for node in self.nodes if node.op == "placeholder" and not is_state(node))
        readers: dict[fx.Node, set[fx.Node]] = {}
        for node in reversed(self.nodes):
            of_parameters = node in self.learned and not self.flow.ancestors[self.index[node]] & given
            if of_parameters and node.op == "call_function":
                readers[node] = set().union(*(readers.get(one, {one}) for one in self.flow.readers[node]))
        return {node for node, found in readers.items() if len(found) > 1}

    def _forbidden(self) -> list[bool]:
        """For each place whether a site or a region is open there."""
        change = [0] * (len(self.nodes) + 2)
        for site in self.sites:
            change[self.index[site.read] + 1] += 1
            change[self.index[site.merge] + 1] -= 1
        found, depth, frozen, cast = [], 0, False, 0
        for place in range(len(self.nodes) + 1):
            if place:
                node = self.nodes[place - 1]
                frozen = not node.args[0] if node.target is GRAD else frozen
                cast += _AUTOCAST.get(node.target, 0)
            depth += change[place]
            found.append(depth > 0 or frozen or cast > 0)
        return found

    def _without_neighbours(self, cuts: list[Cut]) -> list[Cut]:
        kept: list[Cut] = []
        for cut in cuts:
            if kept and not any(map(self._is_work, self.nodes[kept[-1].place : cut.place])):
                if cut.bytes < kept[-1].bytes:
                    kept[-1] = cut
            elif cut.place < len(self.nodes) - 1:
                kept.append(cut)
        if kept and not any(map(self._is_work, self.nodes[kept[-1].place :])):
            kept.pop()  # a last stage without work
        if kept and not any(map(self._is_work, self.nodes[: kept[0].place])):
            kept.pop(0)
        return kept

    def _is_work(self, node: fx.Node) -> bool:
        """Computes with a parameter and mixes: a stage of other nodes alone would be no stage."""
        if node.op != "call_function" or node not in self.learned or is_local(node):
            return False
        return packet(node) not in NORMS and packet(node) not in REDUCTIONS and node.target not in _TRUNK_ENDS

    def is_parameter(self, node: fx.Node) -> bool:
        """A parameter or buffer of the model."""
        return node.op == "placeholder" and is_state(node)

    def units(self) -> list[range]:
        """The numbers of the nodes between neighbouring cuts."""
        first = next(number for number, node in enumerate(self.nodes) if node.op != "placeholder")
        bounds = [first, *(cut.place for cut in self.cuts), len(self.nodes)]
        return [range(start, end) for start, end in pairwise(bounds)]


_TRUNK_ENDS = (mhc.expand.default, mhc.readout.default)

