"""Which axis goes where in an op that permutes axes: one reader of `permute`, `transpose`, `movedim` and the like."""

from __future__ import annotations

from typing import Any

from torch import fx

from mhc_compile.passes.op_kinds import aten, packet, schema_of, tensor_of


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """For each axis of the result of a call of `op_kinds.PERMUTES`, the axis of its argument.

    None for what computes too: the adjoint of a complex tensor.
    """
    value, kind = tensor_of(node), packet(node)
    assert value is not None
    count = value.dim()
    axes = list(range(count))
    first, second = _given(node)
    if kind is aten.permute:
        return tuple(axis % count for axis in first)
    if kind in (aten.transpose, aten.swapaxes, aten.swapdims):
        return _swapped(axes, first, second)
    if kind in (aten.movedim, aten.moveaxis):
        return _moved(axes, first, second)
    if kind in (aten.t, aten.numpy_T):
        return tuple(reversed(axes))
    if kind is aten.adjoint and value.is_complex():
        return None
    assert kind in (aten.mT, aten.adjoint), f"{kind} is none of PERMUTES"
    return _swapped(axes, -2, -1)


def _given(node: fx.Node) -> tuple[Any, Any]:
    """The two arguments behind the tensor, by place or by name; None for one that the op does not have."""
    names = [argument.name for argument in schema_of(node).arguments]
    values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    first, second, *_ = (*(values[name] for name in names[1:]), None, None)
    return first, second


def _swapped(axes: list[int], left: int, right: int) -> tuple[int, ...]:
    if axes:  # a tensor of no axes takes 0 and -1
        axes[left], axes[right] = axes[right], axes[left]
    return tuple(axes)


def _moved(axes: list[int], sources: Any, targets: Any) -> tuple[int, ...]:
    """Those that are moved go to their targets, the others keep their order in what is left."""
    count = len(axes)
    moved, places = (
        [axis % count for axis in ([given] if isinstance(given, int) else given)] if count else []
        for given in (sources, targets)
    )
    rest = iter([axis for axis in axes if axis not in moved])
    return tuple(moved[places.index(place)] if place in places else next(rest) for place in axes)
