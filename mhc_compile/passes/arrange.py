"""Put a leaf of a form into a wanted layout: the views, permutations and casts between a model's layout and ours."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import fx

from mhc_compile.passes.emit import Emitter
from mhc_compile.passes.forms import Axes, Axis, Factor, Slot, Unreadable, extent, same, volume
from mhc_compile.passes.op_kinds import VIEWS, aten, packet, tensor_of


class Arranger:
    """Emits layouts; `sizes` knows the nodes that hold symbolic sizes."""

    def __init__(self, emitter: Emitter) -> None:
        self.emit = emitter
        self._holders: dict[Axis, tuple[fx.Node, int]] = {}
        self._made: set[fx.Node] = set()
        self._known: dict[Any, fx.Node] = {}
        self.region: Any = None  # layouts are shared within one grad mode

    def learn(self, node: fx.Node, slots: Sequence[Slot]) -> None:
        """Remember where the size of each axis can be read."""
        for place, slot in enumerate(slots):
            if len(slot.axes) == 1 and not slot.start:
                self._holders.setdefault(slot.axes[0], (node, place))

    def arranged(self, node: fx.Node, slots: Sequence[Slot], wanted: Sequence[Axes]) -> fx.Node:
        """`node`, indexed by `slots`, as a tensor whose dimensions are `wanted`; repeated along axes it lacks.

        What was arranged so before is used again: the ops of a site are to read one node.
        """
        self.learn(node, slots)
        key = (self.region, node, *_structure(slots, wanted))
        if key not in self._known:
            self._known[key] = self._arranged(node, slots, wanted)
        return self._known[key]

    def forget(self, nodes: Container[fx.Node]) -> None:
        """These nodes are no longer in the graph."""
        self._known = {key: node for key, node in self._known.items() if node not in nodes}

    def _arranged(self, node: fx.Node, slots: Sequence[Slot], wanted: Sequence[Axes]) -> fx.Node:
        have, wanted = _coalesced([slot.axes for slot in slots], wanted)
        for place, slot in enumerate(slots):
            value = tensor_of(node)
            assert value is not None
            length = volume(slot.axes)
            if slot.start or not same(length, extent(value.shape[place])):
                node = self.emit.call(aten.slice.Tensor, node, place, slot.start, slot.start + length, like=node)
        flat = [axis for dim in have for axis in dim]
        order = [axis for dim in wanted for axis in dim]
        if set(flat) - set(order):
            raise Unreadable
        present = [axis for axis in order if axis in flat]
        if present != flat:
            node = self._viewed(node, [(axis,) for axis in flat])
            node = self._permuted(node, [flat.index(axis) for axis in present])
            have = [(axis,) for axis in present]
        if len(present) == len(order):
            return self._viewed(node, wanted)
        node = self._viewed(node, [(axis,) if axis in flat else () for axis in order])
        sizes = [self._size((axis,)) for axis in order]
        node = self.emit.call(aten.expand.default, node, sizes, like=node)
        return self._viewed(node, wanted)

    def factor(self, one: Factor, node: fx.Node, wanted: Sequence[Axes], dtype: torch.dtype | None) -> fx.Node:
        """A factor's leaf, which the graph holds as `node` now, in a layout and a dtype."""
        result = self.arranged(node, one.slots, wanted)
        return result if dtype is None else self.emit.cast(result, dtype)

    def _viewed(self, node: fx.Node, dims: Sequence[Axes]) -> fx.Node:
        value = tensor_of(node)
        assert value is not None
        sizes = [volume(dim) for dim in dims]
        if _is_shape(value, sizes):
            return node
        source = node.args[0] if node in self._made and packet(node) in VIEWS else None
        before = tensor_of(source)
        if before is not None and _is_shape(before, sizes):
            return source  # type: ignore[return-value]
        return self._layout(aten.reshape.default, node, self._shape(dims))

    def _permuted(self, node: fx.Node, order: list[int]) -> fx.Node:
        if order == sorted(order):
            return node
        if node in self._made and node.target is aten.permute.default:
            source, inner = node.args
            if [inner[place] for place in order] == sorted(order):  # type: ignore[index]
                return source  # type: ignore[return-value]
        return self._layout(aten.permute.default, node, order)

    def _layout(self, op: Any, node: fx.Node, argument: list[Any]) -> fx.Node:
        made = self.emit.call(op, node, argument, like=node)
        self._made.add(made)
        return made

    def _shape(self, dims: Sequence[Axes]) -> list[Any]:
        """The sizes of dimensions; one that no node holds is left for reshape to infer."""
        sizes: list[Any] = []
        for dim in dims:
            try:
                sizes.append(self._size(dim))
            except Unreadable:
                if -1 in sizes:
                    raise
                sizes.append(-1)
        return sizes

    def _size(self, dim: Axes) -> Any:
        known = volume(dim)
        if isinstance(known, int):
            return known
        if len(dim) != 1 or dim[0] not in self._holders:
            raise Unreadable
        node, place = self._holders[dim[0]]
        return self.emit.size(node, place)


def _is_shape(value: torch.Tensor, sizes: Sequence[Any]) -> bool:
    return value.dim() == len(sizes) and all(
        same(extent(have), want) for have, want in zip(value.shape, sizes, strict=True)
    )


def _structure(slots: Sequence[Slot], wanted: Sequence[Axes]) -> tuple[Any, ...]:
    """A layout without the identity of its axes: what two uses of a leaf have in common."""
    number = {axis: place for place, axis in enumerate(axis for slot in slots for axis in slot.axes)}
    cut = tuple((slot.start, tuple(axis.size for axis in slot.axes)) for slot in slots)
    return cut, tuple(tuple(number.get(axis, str(axis.size)) for axis in dim) for dim in wanted)


def _coalesced(have: Sequence[Axes], wanted: Sequence[Axes]) -> tuple[list[Axes], list[Axes]]:
    """The same layouts with axes that stay side by side made one, so that no view has to part them."""
    together = {pair for dim in wanted for pair in itertools.pairwise(dim)}
    heads: dict[Axis, Axis] = {}
    followers: set[Axis] = set()
    for dim in have:
        run: list[Axis] = []
        for axis in (*dim, None):
            if run and axis is not None and (run[-1], axis) in together:
                run.append(axis)
                continue
            if len(run) > 1:
                heads[run[0]] = Axis(volume(run))
                followers.update(run[1:])
            run = [axis] if axis is not None else []

    def made_one(dim: Axes) -> Axes:
        return tuple(heads.get(axis, axis) for axis in dim if axis not in followers)

    return [made_one(dim) for dim in have], [made_one(dim) for dim in wanted]
