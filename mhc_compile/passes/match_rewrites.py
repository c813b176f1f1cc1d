"""What the rules of the matcher share: a match, what lies inside it, and how it is put into the graph."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from mhc_compile.passes.arrange import Arranger
from mhc_compile.passes.dataflow import value_inputs
from mhc_compile.passes.forms import Form, Slot, Table, Unreadable, fresh, substitute, unify
from mhc_compile.passes.op_kinds import CASTS, PERMUTES, VIEWS, is_float_tensor, packet, tensor_of
from mhc_compile.passes.provenance import source_line

PARALLEL_STREAMS = 64  # no published model has more than 4; products of larger matrices are attention


@dataclass(frozen=True)
class Refusal:
    """A place that looks like mHC and is left as it is: the nearest rule, the reason, the source line."""

    rule: str
    reason: str
    line: str

    def __str__(self) -> str:
        return f"not matched as {self.rule} ({self.line}): {self.reason}"


def refusal(rule: str, reason: str, node: fx.Node) -> Refusal:
    """A refusal at the line that made `node`."""
    return Refusal(rule, reason, source_line(node) or node.name)


Build = Callable[["Placer"], tuple[fx.Node, ...]]


@dataclass(eq=False)
class Match:
    """Nodes that an op of ours computes.

    rule: the op's name; roots: the nodes it stands for; inputs: what it is computed from; build: emits it and gives
    one node a root; remarks: what the user should know of it.
    """

    rule: str
    roots: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    build: Build
    remarks: tuple[str, ...] = ()

    def inside(self, borders: Container[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
        """The nodes between roots and borders, the roots included; and the borders that they read."""
        found: set[fx.Node] = set()
        reached: dict[fx.Node, None] = {}
        pending = list(self.roots)
        while pending:
            node = pending.pop()
            if node in found:
                continue
            found.add(node)
            for source in value_inputs(node):
                if source in borders:
                    reached[source] = None
                elif source.op == "call_function" and not _is_scalar(source):
                    pending.append(source)
        return found, list(reached)


def _is_scalar(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))


class Placer:
    """Emits the ops of matches into one graph; knows what stands for a node that an earlier match replaced."""

    def __init__(self, arranger: Arranger) -> None:
        self.arranger, self.emit = arranger, arranger.emit
        self._stands_for: dict[fx.Node, fx.Node] = {}
        self._behind: dict[fx.Node, fx.Node] = {}

    def now(self, node: fx.Node) -> fx.Node:
        """The node that holds this value in the graph as it is now."""
        while node in self._stands_for:
            node = self._stands_for[node]
        return node

    def replace(self, old: fx.Node, new: fx.Node, made: Container[fx.Node]) -> None:
        """Let every reader of `old` read `new`, the last of the nodes `made` for it."""
        old.replace_all_uses_with(new)
        self._stands_for[old] = source = new
        while source in made and packet(source) in (*VIEWS, *PERMUTES):
            source = source.args[0]  # type: ignore[assignment]
        self._behind[new] = source

    def behind(self, node: fx.Node) -> fx.Node:
        """What a replaced value is a view of: the op's own result, which later matches may read as it is."""
        node = self.now(node)
        return self._behind.get(node, node)


def bound_to(form: Form, slots: tuple[Slot, ...]) -> Form:
    """The form of a leaf with its dimensions named as the leaf's slots are."""
    if any(slot.start for slot in slots) or len(slots) != len(form.dims):
        raise Unreadable
    form = fresh(form)
    table: Table = {}
    for slot, dim in zip(slots, form.dims, strict=True):
        unify(slot.axes, dim, table)
    if any(axis in table for slot in slots for axis in slot.axes):
        raise Unreadable
    return substitute(form, table)


def narrowed_root(node: fx.Node) -> fx.Node:
    """The node, or the cast to a narrower dtype that alone reads it."""
    while len(node.users) == 1:
        (user,) = node.users
        value, source = tensor_of(user), tensor_of(node)
        if packet(user) not in CASTS or value is None or source is None or not is_float_tensor(user):
            break
        if value.dtype.itemsize > source.dtype.itemsize or value.device != source.device:
            break
        node = user
    return node


def coefficient_dtype(node: fx.Node) -> torch.dtype:
    """The dtype of the coefficients for streams held by `node`."""
    value = tensor_of(node)
    return torch.float64 if value is not None and value.dtype == torch.float64 else torch.float32


def unique(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes, each once, in order."""
    return tuple(dict.fromkeys(nodes))
