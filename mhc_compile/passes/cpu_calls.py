"""Behind autograd and on a CPU, call the bodies of the ops of sites without what autograd and checks need of them.

    u, pre, post, res, carrier, ..., z, r = read(X, ...)       u, pre, post, res, z, r = cpu_read(X, ...)
    X' = merge_carried(X, f, carrier, post, res)               X' = cpu_merge(X, f, post, res)
    X', u', ... = merge_read(X, f, carrier, ..., phi', ...)    X', u', ... = cpu_merge_read(X, f, ..., phi', ...)
    readout(X), expand(x), and their backwards                 what inductor fuses with what is around

A pass of inductor, on the graph that it is about to make code of. What it does not know it leaves: any of these ops is
right as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

import mhc_compile.kernels.cpu_ops
import mhc_compile.kernels.cross_site_ops  # noqa: F401 - registers the ops
from mhc_compile import _torch
from mhc_compile.kernels import plain
from mhc_compile.passes.emit import Emitter
from mhc_compile.passes.op_kinds import aten

mhc = torch.ops.mhc
Values = dict[str, Any]

_VARIANT = tuple(one.name for one in mhc.cpu_read.default._schema.arguments[4:])
_READ = ("streams", "phi", "alpha", "bias", *_VARIANT)
_MERGE = ("streams", "f", "post", "res")


class CpuCalls(_torch.CustomGraphPass):
    """For inductor's ``post_grad_custom_post_pass``."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite in place."""
        emitter = Emitter(graph)
        for node in reversed(list(graph.nodes)):  # from the last on: a carrier is unused when its merges are gone
            rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
            if rewrite is not None and _on_cpu(node):
                with graph.inserting_before(node):
                    rewrite(emitter, node, _values(node))

    def uuid(self) -> Any:
        """What inductor's cache is to know of this pass; of the ops, their fingerprint says it."""
        return _torch.get_hash_for_files((__file__,))


def _on_cpu(node: fx.Node) -> bool:
    first = next(one for one in node.all_input_nodes if isinstance(one.meta.get("val"), torch.Tensor))
    return bool(first.meta["val"].device.type == "cpu")


def _values(node: fx.Node) -> Values:
    """The arguments of a call by name."""
    known = node.target._schema.arguments  # type: ignore[union-attr]
    given = {one.name: value for one, value in zip(known, node.args, strict=False)}
    return {one.name: one.default_value for one in known if one.has_default_value()} | given | node.kwargs


def _replace_outputs(emitter: Emitter, node: fx.Node, made: fx.Node, places: Sequence[int]) -> None:
    """Let the readers of a call's outputs read those of `made`, whose outputs are these of the call; then drop it."""
    for user in list(node.users):
        if user.users:
            place = places.index(int(str(user.args[1])))
            user.replace_all_uses_with(emitter.call(operator.getitem, made, place, like=user))
        emitter.graph.erase_node(user)
    emitter.graph.erase_node(node)


def _is_read(node: fx.Node, *places: int) -> bool:
    return any(user.users and user.args[1] in places for user in node.users)


# --- sites ------------------------------------------------------------------------------------------------


def _read(emitter: Emitter, node: fx.Node, values: Values) -> None:
    if not values["compiled"] or _is_read(node, 4, 5):
        return
    made = emitter.call(mhc.cpu_read.default, *(values[name] for name in _READ), like=node)
    _replace_outputs(emitter, node, made, (0, 1, 2, 3, 6, 7))


def _merge_carried(emitter: Emitter, node: fx.Node, values: Values) -> None:
    if values["compiled"]:
        flags = values["transposed"], values["rounded"]
        made = emitter.call(mhc.cpu_merge.default, *(values[name] for name in _MERGE), *flags, like=node)
        node.replace_all_uses_with(made)
        emitter.graph.erase_node(node)


def _merge_read(emitter: Emitter, node: fx.Node, values: Values) -> None:
    if not values["compiled"] or _is_read(node, 5, 6):
        return
    names = (*_MERGE, "res_transposed", "res_rounded", *_READ[1:])
    made = emitter.call(mhc.cpu_merge_read.default, *(values[name] for name in names), like=node)
    _replace_outputs(emitter, node, made, (0, 1, 2, 3, 4, 7, 8))


def _read_backward(emitter: Emitter, node: fx.Node, values: Values) -> None:
    if values["compiled"] and values["f"] is None:
        names = [one.name for one in mhc.cpu_read_backward.default._schema.arguments]
        made = emitter.call(mhc.cpu_read_backward.default, *(values[name] for name in names), like=node)
        _replace_outputs(emitter, node, made, range(4))


def _merge_backward(emitter: Emitter, node: fx.Node, values: Values) -> None:
    if values["compiled"]:
        names = [one.name for one in mhc.cpu_merge_backward.default._schema.arguments]
        made = emitter.call(mhc.cpu_merge_backward.default, *(values[name] for name in names), like=node)
        _replace_outputs(emitter, node, made, range(3))


# --- the ends of a trunk ----------------------------------------------------------------------------------


def _readout(emitter: Emitter, node: fx.Node, values: Values) -> None:
    x = values["streams"]
    value = x.meta["val"]
    if value.shape[-2] > 1:  # a mean of one would lose the sign of a zero
        wide = plain.coefficient_dtype(value.dtype)
        mean = emitter.call(aten.mean.dim, _cast(emitter, x, wide), [-2], like=node)
        _end(emitter, node, _cast(emitter, mean, value.dtype))


def _readout_backward(emitter: Emitter, node: fx.Node, values: Values) -> None:
    _end(emitter, node, _spread(emitter, node, emitter.call(aten.div.Tensor, values["grad"], values["n"], like=node)))


def _expand(emitter: Emitter, node: fx.Node, values: Values) -> None:
    _end(emitter, node, _spread(emitter, node, values["x"]))


def _expand_backward(emitter: Emitter, node: fx.Node, values: Values) -> None:
    if values["grad"].meta["val"].shape[-2] > 1:
        _end(emitter, node, emitter.call(aten.sum.dim_IntList, values["grad"], [-2], like=node))


def _spread(emitter: Emitter, node: fx.Node, x: fx.Node) -> fx.Node:
    """x [..., C] in each stream of the shape of `node`."""
    size = [-1] * node.meta["val"].dim()
    size[-2] = node.meta["val"].shape[-2]
    turned = emitter.call(aten.expand.default, emitter.call(aten.unsqueeze.default, x, -2, like=node), size, like=node)
    return emitter.call(aten.clone.default, turned, memory_format=torch.contiguous_format, like=node)


def _cast(emitter: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    return emitter.call(torch.ops.prims.convert_element_type.default, node, dtype, like=node)


def _end(emitter: Emitter, node: fx.Node, made: fx.Node) -> None:
    node.replace_all_uses_with(made)
    emitter.graph.erase_node(node)


_REWRITES = {
    mhc.read.default: _read,
    mhc.merge_carried.default: _merge_carried,
    mhc.merge_read.default: _merge_read,
    mhc.read_backward.default: _read_backward,
    mhc.merge_carried_backward.default: _merge_backward,
    mhc.readout.default: _readout,
    mhc.readout_backward.default: _readout_backward,
    mhc.expand.default: _expand,
    mhc.expand_backward.default: _expand_backward,
}
