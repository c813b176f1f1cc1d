"""What crosses a cut of a graph: the values in front of it that what is behind cannot get by itself.

Parameters, buffers and constants stay where they are read. What depends on no input and no parameter (positions, rotary
tables, a mask without padding), and views and casts of weights, are computed again on each side that reads them.
Plans count, and stages send, what this file says.
"""

from __future__ import annotations

import operator

from torch import fx

from mhc_compile import _torch
from mhc_compile.passes.capture import graph_input
from mhc_compile.passes.dataflow import Dataflow, parameter_behind
from mhc_compile.passes.op_kinds import is_mutating, is_random, tensor_of

# The nodes that begin and end a region of autocast or grad mode.
ENTER = _torch.enter_autocast
EXIT = _torch.exit_autocast
GRAD = _torch.set_grad_enabled
MARKERS = (ENTER, EXIT, GRAD)


def is_state(node: fx.Node) -> bool:
    """A parameter, a buffer or a constant of the model."""
    record = graph_input(node)
    return record is not None and (record.kind != "input" or bool(record.path))


def repeated_nodes(flow: Dataflow) -> set[fx.Node]:
    """The nodes that every side of a cut which reads them computes by itself."""
    found: set[fx.Node] = set()
    for node in flow.nodes:
        if node.op == "get_attr" or (node.op == "placeholder" and _is_constant(node, flow)):
            found.add(node)
        elif node.op == "call_function" and not is_random(node) and not is_mutating(node) and not node.is_impure():
            constant = all(source in found for source in node.all_input_nodes)
            if (constant and node.target not in MARKERS) or parameter_behind(node):
                found.add(node)
    return found


def _is_constant(node: fx.Node, flow: Dataflow) -> bool:
    record = graph_input(node)
    return record is not None and is_state(node) and record.kind != "parameter" and not flow.is_mutated(node)


class Boundaries:
    """The values that cross each place of a graph; a cut at place k is in front of node number k.

    repeated: see `repeated_nodes`. made: for each node the number of the node that its value stands behind: for a part
    of a tuple that of the tuple, since what crosses is a tensor.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.repeated = repeated_nodes(flow)
        self.nodes = flow.nodes
        self.made: dict[fx.Node, int] = {}
        for number, node in enumerate(self.nodes):
            part = node.target is operator.getitem
            self.made[node] = -1 if node.op == "placeholder" else self.made[node.all_input_nodes[0]] if part else number
        self.needed = self._needed()

    def _needed(self) -> dict[fx.Node, int]:
        """The place of the last node that needs a node's value, through repeated nodes too; -1 if none does."""
        found = dict.fromkeys(self.nodes, -1)
        for node in reversed(self.nodes):
            place = found[node] if node in self.repeated else self.made[node]
            for source in node.all_input_nodes:
                found[source] = max(found[source], place)
        return found

    def is_at_hand(self, node: fx.Node) -> bool:
        """Whoever reads it needs no other side for it: repeated nodes, the model's state, plain values."""
        return node in self.repeated or is_state(node) or (node.op == "placeholder" and tensor_of(node) is None)

    def crossing(self, place: int) -> list[fx.Node]:
        """What crosses in front of node number `place`, in the order of the graph."""
        over = [node for node in self.nodes if self.made[node] < place <= self.needed[node]]
        return [node for node in over if not self.is_at_hand(node)]
