"""Bring the many spellings of a residual add to one: `aten.add.Tensor` of two tensors, out of place.

In-place ops become their functional twins where nothing else sees the written storage; `sub`, `alpha=`, `addcmul`,
`addcdiv`, `lerp`, `baddbmm` and a full-size `addmm` become a sum of what they add; casts that change nothing go, and
`view` becomes `reshape`. The function stays; a fused multiply-add may round its last bit differently as two ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from mhc_compile import _torch
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.emit import Emitter
from mhc_compile.passes.op_kinds import (
    CASTS,
    argument,
    aten,
    is_float_tensor,
    is_mutating,
    packet,
    same_shape,
    schema_of,
    tensor_of,
)


def canonicalize(gm: fx.GraphModule) -> list[str]:
    """Rewrite `gm` in place; gives a note for every in-place op that had to stay."""
    notes = _functionalize(gm)
    emitter = Emitter(gm.graph)
    written = Dataflow(gm.graph).mutated
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        spell = _SPELLINGS.get(node.target)
        if spell is not None and is_float_tensor(node):
            with gm.graph.inserting_before(node):
                replacement = spell(emitter, node)
            if replacement is not None:
                _replace(gm.graph, node, replacement)
        elif node.target is aten.view.default and _torch.storage_key(tensor_of(node)) not in written:
            node.target = aten.reshape.default  # a rewritten value may lie in memory otherwise
        elif packet(node) in CASTS and _changes_nothing(node):
            _replace(gm.graph, node, node.args[0])
    return notes


def _replace(graph: fx.Graph, node: fx.Node, replacement: Any) -> None:
    node.replace_all_uses_with(replacement)
    graph.erase_node(node)


def _changes_nothing(node: fx.Node) -> bool:
    source, result = tensor_of(node.args[0]), tensor_of(node)
    if source is None or result is None:
        return False
    return _torch.storage_key(source) == _torch.storage_key(result) and source.dtype == result.dtype


# ---------------------------------------------------------------------------------------------- in-place ops


def _functionalize(gm: fx.GraphModule) -> list[str]:
    notes = []
    flow = Dataflow(gm.graph)
    sharing: dict[int, list[fx.Node]] = {}
    for node in flow.nodes:
        key = _torch.storage_key(tensor_of(node))
        if key is not None:
            sharing.setdefault(key, []).append(node)
    emitter = Emitter(gm.graph)
    for node in flow.nodes:
        if not is_mutating(node):
            continue
        twin = _functional_twin(node)
        if twin is None or _seen_elsewhere(node, sharing, flow):
            if is_float_tensor(node.args[0]):
                notes.append(f"{node.target} stays in place: another value shares the storage that it writes")
            continue
        target = tensor_of(node.args[0])
        assert target is not None
        with gm.graph.inserting_before(node):
            result = emitter.call(twin, *node.args, like=node, **node.kwargs)
            result = emitter.cast(result, target.dtype)
        _replace(gm.graph, node, result)
    return notes


def _functional_twin(node: fx.Node) -> Any:
    """`aten.add.Tensor` for `aten.add_.Tensor`; None for what writes elsewhere than into its first argument."""
    schema = schema_of(node)
    name, overload = schema.name.removeprefix("aten::"), schema.overload_name or "default"
    if not name.endswith("_") or name.endswith("__") or not is_float_tensor(node.args[0]):
        return None
    twin = getattr(getattr(aten, name[:-1], None), overload, None)
    # an op whose result would not have the shape of what it writes (a broadcasting copy_) is no twin
    return twin if name != "copy_" and same_shape(node, argument(node, 0)) else None


def _seen_elsewhere(node: fx.Node, sharing: dict[int, list[fx.Node]], flow: Dataflow) -> bool:
    """Some other tensor of this storage is read after the write, or belongs to the caller."""
    key = _torch.storage_key(tensor_of(node.args[0]))
    here = flow.index[node]
    for other in sharing.get(key, []) if key is not None else [node]:
        if other.op in ("placeholder", "get_attr"):
            return True
        if flow.index.get(other, len(flow.nodes)) >= here:
            continue  # made from the result of the write, which the rewrite renames
        if any(flow.index.get(user, here) > here for user in other.users):
            return True
    return False


# ---------------------------------------------------------------------------------------------- spellings of a sum


def _sum(emitter: Emitter, node: fx.Node, left: Any, right: Any, scale: Any = 1) -> fx.Node | None:
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    if isinstance(scale, (int, float)) and scale == -1:
        right = emitter.call(aten.neg.default, right, like=node)
    elif not (isinstance(scale, (int, float)) and scale == 1):
        right = emitter.call(aten.mul.Tensor, right, scale, like=node)
    return emitter.call(aten.add.Tensor, left, right, like=node)


def _add(emitter: Emitter, node: fx.Node) -> fx.Node | None:
    alpha: Any = node.kwargs.get("alpha", 1)
    return None if alpha == 1 else _sum(emitter, node, node.args[0], node.args[1], alpha)


def _sub(emitter: Emitter, node: fx.Node) -> fx.Node | None:
    alpha: Any = node.kwargs.get("alpha", 1)
    return _sum(emitter, node, node.args[0], node.args[1], -alpha)


def _rsub(emitter: Emitter, node: fx.Node) -> fx.Node | None:
    alpha: Any = node.kwargs.get("alpha", 1)
    return _sum(emitter, node, node.args[1], node.args[0], -alpha)


def _addc(inner: Any) -> Callable[[Emitter, fx.Node], fx.Node | None]:
    def spell(emitter: Emitter, node: fx.Node) -> fx.Node | None:
        base, left, right = node.args[:3]
        return _sum(emitter, node, base, emitter.call(inner, left, right, like=node), node.kwargs.get("value", 1))

    return spell


def _lerp(emitter: Emitter, node: fx.Node) -> fx.Node | None:
    start, end, weight = (argument(node, place) for place in range(3))
    rest: Any = emitter.call(aten.rsub.Scalar, weight, 1, like=node) if isinstance(weight, fx.Node) else 1 - weight
    left = emitter.call(aten.mul.Tensor, start, rest, like=node)
    return _sum(emitter, node, left, emitter.call(aten.mul.Tensor, end, weight, like=node))


def _added_product(product: Any) -> Callable[[Emitter, fx.Node], fx.Node | None]:
    def spell(emitter: Emitter, node: fx.Node) -> fx.Node | None:
        base, left, right = (argument(node, place) for place in range(3))
        if not same_shape(base, node):
            return None  # a bias: the op stays whole
        beta: Any = node.kwargs.get("beta", 1)
        alpha: Any = node.kwargs.get("alpha", 1)
        scaled = base if beta == 1 else emitter.call(aten.mul.Tensor, base, beta, like=node)
        return _sum(emitter, node, scaled, emitter.call(product, left, right, like=node), alpha)

    return spell


_SPELLINGS: dict[Any, Callable[[Emitter, fx.Node], fx.Node | None]] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.rsub.Tensor: _rsub,
    aten.addcmul.default: _addc(aten.mul.Tensor),
    aten.addcdiv.default: _addc(aten.div.Tensor),
    aten.lerp.Tensor: _lerp,
    aten.lerp.Scalar: _lerp,
    aten.baddbmm.default: _added_product(aten.bmm.default),
    aten.addmm.default: _added_product(aten.mm.default),
}
