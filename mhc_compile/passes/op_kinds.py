"""What kind of op a graph node is: the vocabulary that the finder and the rewriter share.

The finder asks two questions of an op. Does it *mix*, that is, does one output element depend on several
elements of an input (or on a learned parameter)? Only then can it make a residual branch. And can it stand
*on the trunk*, that is, does it act on every stream alike? Ops are told by schema and tag, never by module.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mhc_compile import _torch

aten = torch.ops.aten


def _packets(*names: str) -> frozenset[object]:
    return frozenset(packet for name in names if (packet := getattr(aten, name, None)) is not None)


# Elementwise ops that ATen does not tag as such.
_ELEMENTWISE = _packets(
    "where", "masked_fill", "rsub", "hardswish", "floor_divide", "multiply", "subtract", "negative",
    "true_divide", "divide", "special_expit", "log_sigmoid", "hardtanh", "clip", "square", "float_power",
)  # fmt: skip
CASTS = _packets("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double")
COPIES = _packets("clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy", "positive", "conj")
DROPOUTS = _packets("dropout", "native_dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
VIEWS = _packets(
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
)  # fmt: skip
PERMUTES = _packets(
    "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "adjoint", "numpy_T",
)  # fmt: skip
# Ops that pick, repeat or join elements without computing with them.
_SELECTS = _packets(
    "slice", "select", "narrow", "index", "index_select", "gather", "take", "take_along_dim", "cat", "concat",
    "stack", "hstack", "vstack", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "expand",
    "expand_as", "broadcast_to", "broadcast_tensors", "repeat", "repeat_interleave", "tile", "roll", "flip",
    "constant_pad_nd", "pad", "rot90", "diagonal", "unfold", "as_strided", "pixel_shuffle", "pixel_unshuffle",
    "tril", "triu", "meshgrid", "view_as_complex", "view_as_real", "real", "imag", "zeros_like", "ones_like",
    "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_empty", "new_full",
    "bernoulli", "sym_size", "index_put", "slice_scatter", "select_scatter", "masked_select", "argmax", "argmin",
)  # fmt: skip
NORMS = _packets("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "instance_norm")
STATEFUL_NORMS = _packets("batch_norm", "_batch_norm_impl_index", "cudnn_batch_norm", "native_batch_norm")
CONVOLUTIONS = _packets(
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "_convolution",
)  # fmt: skip
PRODUCTS = _packets("linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "bilinear", "_weight_int8pack_mm")
REDUCTIONS = _packets("mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm")


def packet(node: fx.Node) -> object:
    """The overload packet of an ATen call (`aten.add` for `aten.add.Tensor`), or the target itself.

    Of a torch function that stays whole, as an operand computes it by itself: the packet of its name.
    """
    target = node.target
    return target.overloadpacket if isinstance(target, _torch.OpOverload) else node.meta.get("mhc_like", target)


def packet_named(function: object) -> object:
    """The packet of ATen named like a function or method of torch (`F.linear`, `Tensor.matmul`); None without one."""
    return getattr(aten, getattr(function, "__name__", ""), None)


def is_elementwise(node: fx.Node) -> bool:
    """Each output element depends on one element of every tensor argument (after broadcasting)."""
    target = node.target
    if not isinstance(target, _torch.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in _ELEMENTWISE


def is_local(node: fx.Node) -> bool:
    """Computes nothing across positions or features: elementwise, casts, copies, views, selections, dropout."""
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr")
    if is_elementwise(node) or node.target is operator.getitem:
        return True
    return any(packet(node) in kind for kind in (CASTS, COPIES, DROPOUTS, VIEWS, PERMUTES, _SELECTS))


def is_random(node: fx.Node) -> bool:
    """An op that draws random numbers, though this call may be one that does not (`draws`)."""
    target = node.target
    tagged = isinstance(target, _torch.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    return tagged or packet(node) in DROPOUTS


def draws(node: fx.Node) -> bool:
    """Draws random numbers in this call: a dropout, or attention with one, that is not switched off."""
    if not is_random(node) or not isinstance(node.target, _torch.OpOverload):
        return is_random(node)
    for place, argument in enumerate(schema_of(node).arguments):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        if argument.name in ("train", "training") and value is False:
            return False
        if argument.name in ("p", "dropout_p") and value == 0:
            return False
    return True


def is_mutating(node: fx.Node) -> bool:
    """Writes into one of its arguments."""
    target = node.target
    return isinstance(target, _torch.OpOverload) and target._schema.is_mutable


def is_inner_tensor(node: fx.Node) -> bool:
    """A tensor that a parameter wraps (the data, or a scale, of a quantised one), as torch.export reads it."""
    target = node.target
    return isinstance(target, _torch.OpOverload) and target._schema.name == "export::access_subclass_inner_tensor"


def value_of(node: fx.Node) -> object:
    """The fake value the capture recorded for a node."""
    return node.meta.get("val")


def tensor_of(node: object) -> torch.Tensor | None:
    """The fake tensor of a node, or None if it is no node or no single tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def is_float_tensor(node: object) -> bool:
    """The node gives one floating-point tensor (complex ones do not count)."""
    value = tensor_of(node)
    return value is not None and value.is_floating_point()


def same_shape(left: fx.Node, right: fx.Node) -> bool:
    """Both give tensors, provably of one shape."""
    a, b = tensor_of(left), tensor_of(right)
    return (
        a is not None
        and b is not None
        and a.dim() == b.dim()
        and all(_same(x, y) for x, y in zip(a.shape, b.shape, strict=True))
    )


def _same(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Equality without a guard: two symbols are equal only when they are one expression."""
    return bool(left == right) if isinstance(left, int) and isinstance(right, int) else str(left) == str(right)


def schema_of(node: fx.Node) -> torch.FunctionSchema:
    """The schema of an ATen or custom op call."""
    assert isinstance(node.target, _torch.OpOverload)
    return node.target._schema


def argument(node: fx.Node, place: int) -> Any:
    """A positional argument, for ops whose schema says what it is."""
    return node.args[place]
