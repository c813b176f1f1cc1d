"""Which axis of a trunk value holds the features: read off the ops that use and make it, never assumed.

Evidence is an op that knows: `linear`, `layer_norm` and an elementwise product with a vector of weights use the
last axis, convolutions and batch norms axis 1, an RMS statistic the axis it reduces. The nearest evidence on the
way into the branch counts first, then what makes the branch's result, then what makes the value itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import fx

from mhc_compile import _torch
from mhc_compile.passes.dataflow import is_trainable
from mhc_compile.passes.op_kinds import (
    CASTS,
    CONVOLUTIONS,
    COPIES,
    DROPOUTS,
    NORMS,
    PERMUTES,
    PRODUCTS,
    STATEFUL_NORMS,
    VIEWS,
    argument,
    aten,
    is_elementwise,
    packet,
    tensor_of,
)
from mhc_compile.passes.permutation import permutation

_SEARCH = 64  # ops looked at on each side before giving up

# Where each axis of a value came from: `(0, 2, 1)` after a transpose, None for an axis that is new or merged.
Origin = tuple[int | None, ...]


def rank(node: fx.Node) -> int:
    """Number of axes of a node's tensor."""
    value = tensor_of(node)
    assert value is not None
    return value.dim()


def features(node: fx.Node, axis: int) -> int | None:
    """Size of the feature axis; None if it is not a constant of the model."""
    value = tensor_of(node)
    assert value is not None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def infer(base: fx.Node, branches: tuple[fx.Node, ...]) -> int | None:
    """The feature axis of `base` (counted from 0), or None if no op tells."""
    forward = _search(base, _consumers, _read_axis)
    if forward is not None:
        return forward
    for branch in branches:
        made = _search(branch, _producers, _made_axis)
        if made is not None and rank(branch) == rank(base):
            return made
    return _search(base, _producers, _made_axis)


def _search(
    start: fx.Node,
    neighbours: Callable[[fx.Node], list[fx.Node]],
    evidence: Callable[[fx.Node, fx.Node], int | None],
) -> int | None:
    """Breadth-first over ops that keep or permute axes, to the nearest op that tells its feature axis."""
    pending: deque[tuple[fx.Node, Origin]] = deque([(start, tuple(range(rank(start))))])
    seen = {start}
    while pending and len(seen) < _SEARCH:
        node, origin = pending.popleft()
        if evidence is _made_axis:
            axis = evidence(node, node)
            if axis is not None and axis < len(origin) and origin[axis] is not None:
                return origin[axis]
        for other in neighbours(node):
            if other in seen:
                continue
            seen.add(other)
            if evidence is _read_axis:
                axis = evidence(other, node)
                if axis is not None and axis < len(origin) and origin[axis] is not None:
                    return origin[axis]
                moved = axes_through(other, origin) if other.args and other.args[0] is node else None
                if (
                    moved is None
                    and is_elementwise(other)
                    and tensor_of(other) is not None
                    and rank(other) == len(origin)
                ):
                    moved = origin
            else:
                moved = _axes_back(node, origin)
            if moved is not None:
                pending.append((other, moved))
    return None


def _consumers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if tensor_of(user) is not None]


def _producers(node: fx.Node) -> list[fx.Node]:
    if _keeps_axes(node):
        return [
            source for source in node.all_input_nodes if tensor_of(source) is not None and rank(source) == rank(node)
        ]
    first = node.args[0] if node.args else None
    movable = packet(node) in PERMUTES or packet(node) in VIEWS
    return [first] if movable and isinstance(first, fx.Node) and tensor_of(first) is not None else []


def _keeps_axes(node: fx.Node) -> bool:
    kind = packet(node)
    return is_elementwise(node) or any(kind in group for group in (CASTS, COPIES, DROPOUTS))


# ---------------------------------------------------------------------------------------------- evidence


def _read_axis(node: fx.Node, operand: fx.Node) -> int | None:
    """The axis of `operand` that `node` treats as features."""
    kind, count = packet(node), rank(operand)
    first = bool(node.args) and node.args[0] is operand
    if kind in PRODUCTS:
        return count - 1 if first else None
    if kind in CONVOLUTIONS:
        return _channel_axis(node, count) if first else None
    if kind in STATEFUL_NORMS or kind in (aten.group_norm, aten.instance_norm):
        return 1 if first and count > 1 else None
    if kind in NORMS:
        return count - 1 if first else None
    if kind is aten.mean and first and len(node.args) > 2 and node.args[2] is True:
        dims: Any = node.args[1]
        return int(dims[0]) % count if isinstance(dims, (list, tuple)) and len(dims) == 1 else None
    if is_elementwise(node):
        return _weighted_axis(node, operand)
    return None


def _made_axis(node: fx.Node, _: fx.Node) -> int | None:
    """The axis of the result of `node` that holds features, if the op tells."""
    kind, count = packet(node), rank(node)
    if kind in PRODUCTS or kind is aten.embedding or kind in (aten.layer_norm, aten.rms_norm):
        return count - 1
    if kind in CONVOLUTIONS:
        return _channel_axis(node, count)
    if kind in STATEFUL_NORMS or kind in (aten.group_norm, aten.instance_norm):
        return 1 if count > 1 else None
    if is_elementwise(node):
        for source in node.all_input_nodes:
            if tensor_of(source) is not None and rank(source) == count:
                axis = _weighted_axis(node, source)
                if axis is not None:
                    return axis
    return None


def _channel_axis(node: fx.Node, count: int) -> int | None:
    weight = node.args[1] if len(node.args) > 1 else None
    if not isinstance(weight, fx.Node) or tensor_of(weight) is None:
        return None
    return count - rank(weight) + 1  # 1 with a batch axis, 0 without


def _weighted_axis(node: fx.Node, operand: fx.Node) -> int | None:
    """The axis along which an elementwise op applies one learned number a feature."""
    for source in node.all_input_nodes:
        value = tensor_of(source)
        if source is operand or value is None or not is_trainable(source) or value.dim() > rank(operand):
            continue
        wide = [i - value.dim() for i, size in enumerate(value.shape) if size != 1]
        if len(wide) == 1:
            return rank(operand) + wide[0]
    return None


# ---------------------------------------------------------------------------------------------- how axes move


def axes_through(node: fx.Node, origin: Origin) -> Origin | None:
    """The origin of each axis of `node`'s result, given those of its first argument; None if the op loses them."""
    if _keeps_axes(node) or packet(node) in NORMS:
        return origin if rank(node) == len(origin) else None
    if packet(node) in PERMUTES:
        order = permutation(node)
        return None if order is None else tuple(origin[axis] for axis in order)
    if packet(node) in VIEWS:
        mapping = _view_mapping(argument(node, 0), node)
        return tuple(None if axis is None else origin[axis] for axis in mapping)
    return None


def _axes_back(node: fx.Node, origin: Origin) -> Origin | None:
    """The origin of each axis of `node`'s first argument, given those of its result."""
    if _keeps_axes(node):
        return origin
    source = node.args[0]
    if not isinstance(source, fx.Node) or tensor_of(source) is None:
        return None
    back: list[int | None] = [None] * rank(source)
    mapping = permutation(node) if packet(node) in PERMUTES else _view_mapping(source, node)
    for axis, from_axis in enumerate(mapping or ()):
        if from_axis is not None:
            back[from_axis] = origin[axis]
    return tuple(back)


def _view_mapping(source: fx.Node, result: fx.Node) -> tuple[int | None, ...]:
    """For a view: the source axis that each result axis is, where it is one whole axis.

    An axis is itself when it has the same size and the same number of elements behind it.
    """
    before, after = tensor_of(source), tensor_of(result)
    assert before is not None and after is not None
    tails: dict[tuple[int, int], int] = {}
    behind = 1
    for axis in range(before.dim() - 1, -1, -1):
        size = _torch.size_hint(before.shape[axis])
        if size != 1:
            tails[(size, behind)] = axis
        behind *= size
    mapping: list[int | None] = [None] * after.dim()
    behind = 1
    for axis in range(after.dim() - 1, -1, -1):
        size = _torch.size_hint(after.shape[axis])
        mapping[axis] = tails.get((size, behind))
        behind *= size
    return tuple(mapping)


__all__ = ["axes_through", "features", "infer", "rank"]
