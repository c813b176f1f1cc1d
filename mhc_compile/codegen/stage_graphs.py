"""Cut a rewritten graph into one graph for each pipeline stage.

Each graph takes what the stage before it sends (the first one: the model's tensor inputs), then the parameters and
buffers that it reads, and gives what the next stage receives. A value that is read further on goes through every stage
in between. What depends on no input and no parameter (positions, masks without padding, rotary tables), and views and
casts of weights, are computed again in each stage that reads them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from torch import fx

from mhc_compile.errors import PartitionError, wrong
from mhc_compile.passes.boundary import ENTER, EXIT, GRAD, Boundaries, is_state
from mhc_compile.passes.capture import GraphInput, graph_input
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.op_kinds import tensor_of
from mhc_compile.passes.provenance import source_line


@dataclass(frozen=True)
class StageGraph:
    """The graph of one stage; the other fields are nodes of the graph that was cut.

    given: what its first inputs stand for. state: what its other inputs stand for: parameters, buffers, constants.
    sent: what its outputs stand for; none for the last stage, which gives the outputs of the model.
    whole: why torch cannot compute the gradients of what is given before those of the parameters; "" if it can.
    """

    graph: fx.GraphModule
    given: tuple[fx.Node, ...]
    state: tuple[fx.Node, ...]
    sent: tuple[fx.Node, ...]
    whole: str


def split(gm: fx.GraphModule, places: Sequence[int], trained: Iterable[fx.Node] = ()) -> list[StageGraph]:
    """One graph for each stage of `gm`, which is cut in front of the nodes with these numbers.

    trained: the nodes whose values require grad. Raises PartitionError when a value that would have to be sent is no
    tensor, or is written into by a later stage.
    """
    return _Split(gm, places, set(trained)).graphs()


class _Split:
    def __init__(self, gm: fx.GraphModule, places: Sequence[int], trained: set[fx.Node]) -> None:
        self.gm, self.trained = gm, trained
        self.flow = Dataflow(gm.graph)
        self.nodes, self.places = self.flow.nodes, sorted(places)
        self.last = len(places)
        self.boundaries = Boundaries(self.flow)
        self.repeated = self.boundaries.repeated
        self.stage = {node: bisect_right(self.places, made) for node, made in self.boundaries.made.items()}
        self.regions = _Regions(self.nodes)

    def graphs(self) -> list[StageGraph]:
        return [self._graph(stage) for stage in range(self.last + 1)]

    # ------------------------------------------------------------------------------------------ what goes where

    @cached_property
    def read(self) -> list[set[fx.Node]]:
        """For each stage: all nodes that its own ones read, repeated nodes and what these read included."""
        found = []
        for stage in range(self.last + 1):
            seen: set[fx.Node] = set()
            pending = [node for node in self.nodes if self._is_own(node, stage)]
            while pending:
                for source in pending.pop().all_input_nodes:
                    if source not in seen:
                        seen.add(source)
                        pending += [source] if source in self.repeated else []
            found.append(seen)
        return found

    def _is_own(self, node: fx.Node, stage: int) -> bool:
        """Computed in this stage and in no other."""
        return self.stage[node] == stage and node.op != "placeholder" and node not in self.repeated

    @cached_property
    def sent(self) -> list[tuple[fx.Node, ...]]:
        """For each stage but the last: what it sends to the next, in the order of the graph."""
        found = [tuple(self.boundaries.crossing(place)) for place in self.places]
        for node in dict.fromkeys(chain.from_iterable(found)):
            self._check_sendable(node)
        return found

    def _check_sendable(self, node: fx.Node) -> None:
        if tensor_of(node) is None:
            found = f"computed in stage {self.stage[node]} and read in a later one, and is a {_kind(node)}"
            message = wrong(f"value {node.name}", found, "tensors between stages", _ELSEWHERE)
            raise PartitionError(message, line=source_line(node) or None)
        if self.flow.is_mutated(node):
            found = f"made in stage {self.stage[node]}, sent on, and written into by an op in place"
            message = wrong(f"value {node.name}", found, "values that are written only where they are made", _ELSEWHERE)
            raise PartitionError(message, line=source_line(node) or None)

    # ------------------------------------------------------------------------------------------ one stage

    def _graph(self, stage: int) -> StageGraph:
        first, last = stage == 0, stage == self.last
        inputs = [node for node in self.nodes if node.op == "placeholder" and not is_state(node)]
        given = [node for node in inputs if tensor_of(node) is not None] if first else list(self.sent[stage - 1])
        state = [node for node in self.nodes if node in self.read[stage] and is_state(node)]
        sent = () if last else self.sent[stage]
        computed = {node for node in self.nodes if self._is_own(node, stage)}
        computed |= {node for node in self.read[stage] & self.repeated if node.op != "placeholder"}
        computed |= self.regions.around(computed)
        graph, made = fx.Graph(), dict[fx.Node, Any]()
        for node in [*given, *state]:
            made[node] = _placeholder(graph, node, received=not first and node in given)
        for node in inputs:
            if tensor_of(node) is None:
                made[node] = node.meta.get("val")
        for node in self.nodes:
            if node in computed and node.op != "output":
                made[node] = graph.node_copy(node, made.__getitem__)
        outputs = fx.map_arg(self.nodes[-1].args[0], made.__getitem__) if last else tuple(made[node] for node in sent)
        graph.output(outputs)
        cut = fx.GraphModule(self.gm, graph)
        return StageGraph(cut, tuple(given), tuple(state), sent, self._why_whole(computed, given, state, sent))

    def _why_whole(
        self, computed: set[fx.Node], given: list[fx.Node], state: list[fx.Node], sent: Sequence[fx.Node]
    ) -> str:
        """See StageGraph. Torch finds a weight's gradient from where its influence first meets that of the inputs.

        It loses the gradient where they do not meet, and where they meet twice, one behind the other, it runs a part of
        the backward again whose values are gone.
        """
        order = [node for node in self.nodes if node in computed]
        joined = {node for node in given if node in self.trained}
        for node in order:
            if not joined.isdisjoint(self.flow.sources[node]):
                joined.add(node)
        for node in sent:
            if node in self.trained and node in computed and node not in joined:
                return f"{node.name}, which is sent on, depends on weights alone"
        for weight in (node for node in state if node in self.trained):
            reached, meets = {weight}, list[fx.Node]()
            for node in order:
                if not reached.isdisjoint(self.flow.sources[node]):
                    (meets.append if node in joined else reached.add)(node)
            if any(self.flow.depends(later, first) for first in meets for later in meets):
                record = graph_input(weight)
                return f"{record.path if record else weight.name} takes effect at several places, one behind another"
        return ""


_ELSEWHERE = "plan with another number of stages, so that the cut falls elsewhere"


class _Regions:
    """The pairs of nodes that switch autocast or gradients on and off, and what stands between them."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._inside: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._ends: dict[fx.Node, fx.Node] = {}
        casts: list[fx.Node] = []
        grad: fx.Node | None = None
        for node in nodes:
            if node.target is ENTER:
                casts.append(node)
            elif node.target is EXIT:
                casts.remove(node.all_input_nodes[0])
                self._ends[node.all_input_nodes[0]] = node
            elif node.target is GRAD:
                if grad is not None:
                    self._ends[grad] = node
                grad = None if node.args[0] else node
            elif casts or grad is not None:
                self._inside[node] = (*casts, *([grad] if grad is not None else []))

    def around(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The pairs around any of these nodes."""
        found: set[fx.Node] = set()
        for node in nodes:
            for marker in self._inside.get(node, ()):
                while marker in self._ends and marker not in found:
                    found.add(marker)
                    marker = self._ends[marker]
                found.add(marker)
        return found


def _placeholder(graph: fx.Graph, node: fx.Node, *, received: bool) -> fx.Node:
    made = graph.placeholder(node.name)
    made.meta = {key: value for key, value in node.meta.items() if key != "recompute"}
    if received:
        made.meta["mhc_input"] = GraphInput("input", "")
    return made


def _kind(node: fx.Node) -> str:
    return type(node.meta.get("val")).__name__
