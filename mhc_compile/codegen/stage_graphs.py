"""Cut a rewritten graph into one graph for each pipeline stage.

Each graph takes what the stage before it sends (the first one: the model's tensor inputs), then the parameters and
buffers that it reads, and gives what the next stage receives. A value that is read further on goes through every stage
in between. What depends on no input and no parameter (positions, masks without padding, rotary tables), and views and
casts of weights, are computed again in each stage that reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from mhc_compile.errors import PartitionError, wrong
from mhc_compile.passes.capture import GraphInput, graph_input
from mhc_compile.passes.dataflow import Dataflow, parameter_behind
from mhc_compile.passes.op_kinds import is_mutating, is_random, tensor_of
from mhc_compile.passes.provenance import source_line

_ENTER = torch.amp._enter_autocast  # type: ignore[attr-defined]
_EXIT = torch.amp._exit_autocast  # type: ignore[attr-defined]
_GRAD = torch._C._set_grad_enabled


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
        self.nodes, self.index = self.flow.nodes, self.flow.index
        self.last = len(places)
        starts = [number in set(places) for number in range(len(self.nodes))]
        self.stage = dict(zip(self.nodes, accumulate(starts), strict=True))
        for node in self.nodes:
            if node.op == "placeholder":
                self.stage[node] = 0
            elif node.target is operator.getitem:
                self.stage[node] = self.stage[node.all_input_nodes[0]]  # what crosses is a tensor, not a tuple
        self.regions = _Regions(self.nodes)
        self.repeated = self._repeated()

    def graphs(self) -> list[StageGraph]:
        return [self._graph(stage) for stage in range(self.last + 1)]

    # ------------------------------------------------------------------------------------------ what goes where

    def _repeated(self) -> set[fx.Node]:
        """The nodes that every stage which reads them computes by itself."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "get_attr" or (node.op == "placeholder" and _is_constant(node, self.flow)):
                found.add(node)
            elif node.op == "call_function" and not is_random(node) and not is_mutating(node) and not node.is_impure():
                constant = all(source in found for source in node.all_input_nodes)
                if (constant and not self.regions.is_marker(node)) or parameter_behind(node):
                    found.add(node)
        return found

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
        reach: dict[fx.Node, int] = {}
        for stage, seen in enumerate(self.read):
            reach |= dict.fromkeys((node for node in seen if not self._is_at_hand(node)), stage)
        for node, stage in reach.items():
            if stage > self.stage[node]:
                self._check_sendable(node)
        order = sorted(reach, key=self.index.__getitem__)
        return [
            tuple(node for node in order if self.stage[node] <= stage < reach[node]) for stage in range(self.last)
        ]

    def _is_at_hand(self, node: fx.Node) -> bool:
        """A stage that reads it needs no other stage for it: repeated nodes, the model's state, plain values."""
        return node in self.repeated or _is_state(node) or (node.op == "placeholder" and tensor_of(node) is None)

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
        inputs = [node for node in self.nodes if node.op == "placeholder" and not _is_state(node)]
        given = [node for node in inputs if tensor_of(node) is not None] if first else list(self.sent[stage - 1])
        state = [node for node in self.nodes if node in self.read[stage] and _is_state(node)]
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
            if node.target is _ENTER:
                casts.append(node)
            elif node.target is _EXIT:
                casts.remove(node.all_input_nodes[0])
                self._ends[node.all_input_nodes[0]] = node
            elif node.target is _GRAD:
                if grad is not None:
                    self._ends[grad] = node
                grad = None if node.args[0] else node
            elif casts or grad is not None:
                self._inside[node] = (*casts, *([grad] if grad is not None else []))

    def is_marker(self, node: fx.Node) -> bool:
        return node.target in (_ENTER, _EXIT, _GRAD)

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


def _is_state(node: fx.Node) -> bool:
    """A parameter, a buffer or a constant of the model."""
    record = graph_input(node)
    return record is not None and (record.kind != "input" or bool(record.path))


def _is_constant(node: fx.Node, flow: Dataflow) -> bool:
    record = graph_input(node)
    return record is not None and _is_state(node) and record.kind != "parameter" and not flow.is_mutated(node)


def _placeholder(graph: fx.Graph, node: fx.Node, *, received: bool) -> fx.Node:
    made = graph.placeholder(node.name)
    made.meta = {key: value for key, value in node.meta.items() if key != "recompute"}
    if received:
        made.meta["mhc_input"] = GraphInput("input", "")
    return made


def _kind(node: fx.Node) -> str:
    return type(node.meta.get("val")).__name__
