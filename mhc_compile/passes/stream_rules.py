"""How an op on a trunk value acts on its n streams.

A trunk value with feature axis `a` is kept as `[positions..., n, C]`: the other axes in their order, then the
streams, then the features. Elementwise ops, casts and layer norms act on that tensor at once; layout ops permute
or reshape its positions; dropout draws one mask for all streams; every other op runs once a stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mhc_compile.passes import feature_axis
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.emit import Emitter
from mhc_compile.passes.op_kinds import (
    CASTS,
    COPIES,
    PERMUTES,
    VIEWS,
    argument,
    aten,
    is_elementwise,
    packet,
    tensor_of,
)
from mhc_compile.passes.permutation import permutation

_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)


@dataclass(frozen=True)
class Streams:
    """The n streams of one trunk value: `node` gives `[positions..., n, C]`, `axis` is the value's feature axis."""

    node: fx.Node
    axis: int


def to_tokens(emitter: Emitter, node: fx.Node, axis: int) -> fx.Node:
    """A plain value with its feature axis moved last."""
    count = feature_axis.rank(node)
    if axis == count - 1:
        return node
    order = [place for place in range(count) if place != axis] + [axis]
    return emitter.call(aten.permute.default, node, order, like=node)


def from_tokens(emitter: Emitter, node: fx.Node, axis: int, *, of: fx.Node) -> fx.Node:
    """A value whose features are last, with them moved back to `axis` and laid out in memory like `of`."""
    count = feature_axis.rank(node)
    if axis == count - 1:
        return node
    order = list(range(count - 1))
    order.insert(axis, count - 1)
    moved = emitter.call(aten.permute.default, node, order, like=node)
    value = tensor_of(of)
    if value is not None and value.is_contiguous():
        # the model's own ops may rely on it, as `view` does
        moved = emitter.call(aten.clone.default, moved, memory_format=torch.contiguous_format, like=node)
    return moved


def apply_to_streams(
    emitter: Emitter,
    flow: Dataflow,
    node: fx.Node,
    source: fx.Node,
    streams: Streams,
    axis: int,
    readout: fx.Node | None = None,
) -> Streams:
    """Emit what `node`, an op on the trunk value `source`, does to the streams of that value.

    `axis` is the feature axis of the result; `readout` the node, if any, that other readers of the value have got.
    """
    kind = packet(node)
    if kind in COPIES and kind is not aten.detach:
        return Streams(streams.node, axis)
    if kind in PERMUTES:
        result = _permute(emitter, node, streams, axis)
    elif kind in VIEWS:
        result = _view(emitter, node, streams, axis)
    elif node.target is aten.dropout.default:
        result = _dropout(emitter, node, streams)
    elif kind in CASTS or kind is aten.detach:
        result = emitter.call(node.target, streams.node, *node.args[1:], like=node, **node.kwargs)
    elif is_elementwise(node):
        known = {source: streams} if readout is None else {source: streams, readout: streams}
        for operand in node.all_input_nodes:
            _follow_side(emitter, flow, operand, source, streams.axis, known)
        result = _elementwise(emitter, node, known, axis)
    elif _norm_of_features(node, axis):
        result = emitter.call(node.target, streams.node, *node.args[1:], like=node, **node.kwargs)
    else:
        result = _each_stream(emitter, node, streams, axis)
    return Streams(result, axis)


# ---------------------------------------------------------------------------------------------- elementwise


def _elementwise(emitter: Emitter, node: fx.Node, known: dict[fx.Node, Streams], axis: int) -> fx.Node:
    count = feature_axis.rank(node)

    def operand(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        return known[value].node if value in known else beside_streams(emitter, value, axis, count)

    args, kwargs = fx.map_arg(node.args, operand), fx.map_arg(node.kwargs, operand)
    return emitter.call(node.target, *args, like=node, **kwargs)


def beside_streams(emitter: Emitter, node: fx.Node, axis: int, count: int) -> fx.Node:
    """A plain operand (of at most `count` axes), shaped to broadcast against streams."""
    value = tensor_of(node)
    if value is None or value.dim() == 0 or (value.dim() == 1 and axis == count - 1):
        return node
    for _ in range(count - value.dim()):
        node = emitter.call(aten.unsqueeze.default, node, 0, like=node)
    return emitter.call(aten.unsqueeze.default, to_tokens(emitter, node, axis), -2, like=node)


def _follow_side(
    emitter: Emitter,
    flow: Dataflow,
    operand: fx.Node,
    source: fx.Node,
    axis: int,
    known: dict[fx.Node, Streams],
) -> None:
    """If `operand` is itself a per-token function of the trunk value, compute it for each stream.

    That is what a norm written out by hand needs: its statistic belongs to the stream, not to the readout.
    """
    if operand in known or operand not in flow.index or not flow.depends(operand, source):
        return
    nodes = sorted(flow.members(flow.between(source, [operand])))
    if not all(_per_token(node, axis) for node in nodes):
        return
    for node in nodes:
        if _is_reduction(node):
            inner = known[argument(node, 0)].node
            result = emitter.call(node.target, inner, [-1], True, like=node, **node.kwargs)
        elif packet(node) in CASTS or packet(node) in COPIES:
            result = emitter.call(node.target, known[node.args[0]].node, *node.args[1:], like=node, **node.kwargs)  # type: ignore[index]
        else:
            result = _elementwise(emitter, node, known, axis)
        known[node] = Streams(result, axis)


def _per_token(node: fx.Node, axis: int) -> bool:
    if packet(node) in CASTS or packet(node) in COPIES or is_elementwise(node):
        return True
    return _is_reduction(node) and [int(dim) % feature_axis.rank(node) for dim in argument(node, 1)] == [axis]


def _is_reduction(node: fx.Node) -> bool:
    """A reduction over listed axes that keeps them."""
    args = node.args
    return node.target in _REDUCTIONS and len(args) > 2 and args[2] is True and isinstance(args[1], (list, tuple))


# ---------------------------------------------------------------------------------------------- layout


def _permute(emitter: Emitter, node: fx.Node, streams: Streams, axis: int) -> fx.Node:
    order = permutation(node)
    assert order is not None
    before = [place for place in range(len(order)) if place != streams.axis]
    moved = [before.index(place) for place in order if place != streams.axis]
    if moved == sorted(moved):
        return streams.node
    count = len(order)
    return emitter.call(aten.permute.default, streams.node, [*moved, count - 1, count], like=node)


def _view(emitter: Emitter, node: fx.Node, streams: Streams, axis: int) -> fx.Node:
    sizes = _written_sizes(node)
    if sizes is None:
        sizes = _sizes_from(emitter, node, streams)
    tail = [emitter.size(streams.node, -2), emitter.size(streams.node, -1)]
    positions = [size for place, size in enumerate(sizes) if place != axis]
    return emitter.call(aten.reshape.default, streams.node, positions + tail, like=node)


def _written_sizes(node: fx.Node) -> list[Any] | None:
    """The sizes that a `view` or `reshape` spells out."""
    if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return list(node.args[1])  # type: ignore[arg-type]
    return None


def _sizes_from(emitter: Emitter, node: fx.Node, streams: Streams) -> list[Any]:
    """The sizes of a view's result, read off the streams where they are symbolic; one may stay -1."""
    value = tensor_of(node)
    assert value is not None and isinstance(node.args[0], fx.Node)
    origin = feature_axis.axes_through(node, tuple(range(feature_axis.rank(node.args[0]))))
    assert origin is not None
    sizes: list[Any] = []
    for size, place in zip(value.shape, origin, strict=True):
        if isinstance(size, int):
            sizes.append(size)
        elif place is None:
            sizes.append(-1)
        else:
            sizes.append(emitter.size(streams.node, place - (place > streams.axis)))
    return sizes


# ---------------------------------------------------------------------------------------------- the others


def _dropout(emitter: Emitter, node: fx.Node, streams: Streams) -> fx.Node:
    """One mask for all streams, drawn from as many random numbers as the plain op draws."""
    _, probability, train = node.args
    if not train or probability == 0:
        return streams.node
    like_one = emitter.call(aten.select.int, streams.node, -2, 0, like=node)
    like_one = from_tokens(emitter, like_one, streams.axis, of=node)
    ones = emitter.call(aten.ones_like.default, like_one, like=node)
    mask = emitter.call(aten.dropout.default, ones, probability, train, like=node)
    beside = beside_streams(emitter, mask, streams.axis, feature_axis.rank(mask))
    return emitter.call(aten.mul.Tensor, streams.node, beside, like=node)


def _norm_of_features(node: fx.Node, axis: int) -> bool:
    return (
        packet(node) in (aten.layer_norm, aten.rms_norm)
        and axis == feature_axis.rank(node) - 1
        and len(node.args[1]) == 1  # type: ignore[arg-type]
    )


def _each_stream(emitter: Emitter, node: fx.Node, streams: Streams, axis: int) -> fx.Node:
    n = streams_of(streams.node)
    results = []
    for number in range(n):
        one = emitter.call(aten.select.int, streams.node, -2, number, like=node)
        one = from_tokens(emitter, one, streams.axis, of=node)
        result = emitter.call(node.target, one, *node.args[1:], like=node, **node.kwargs)
        results.append(to_tokens(emitter, result, axis))
    return emitter.call(aten.stack.default, results, -2, like=node)


def streams_of(node: fx.Node) -> int:
    """How many streams a widened value has."""
    value = tensor_of(node)
    assert value is not None
    return int(value.shape[-2])
