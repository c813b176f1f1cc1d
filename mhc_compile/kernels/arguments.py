"""What the ops accept: shapes, dtypes, layouts and devices, checked by the real kernels and by the fakes alike.

A wrong argument raises ShapeError with the value found, the legal form and the next step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.errors import ShapeError, wrong
from mhc_compile.kernels import plain
from mhc_compile.kernels.convention import Convention

STREAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATS = "float16, bfloat16, float32, float64"


def check_streams(streams: Tensor) -> None:
    check_dense("streams", streams)
    if streams.dim() < 2:
        raise ShapeError(wrong("streams", shape_of(streams), "[..., n, C]", "expand the trunk first"))
    if streams.dtype not in STREAM_DTYPES:
        raise ShapeError(wrong("dtype of streams", streams.dtype, FLOATS, "cast them before the expansion"))
    if streams.shape[-2] < 1 or streams.shape[-1] < 1:
        step = "expand the trunk to n streams of C features"
        raise ShapeError(wrong("streams", shape_of(streams), "[..., n, C] with n >= 1 and C >= 1", step))


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise ShapeError(wrong(f"layout of {name}", tensor.layout, "torch.strided", "call to_dense() before"))


def check_one(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    legal: str,
    device: torch.device | None = None,
) -> None:
    if tensor.dim() != len(shape) or any(a != b for a, b in zip(tensor.shape, shape, strict=True)):
        step = "n and C are the last two sizes of the streams; the others are the tokens"
        raise ShapeError(wrong(name, shape_of(tensor), f"{legal} = {shape_text(shape)} for these streams", step))
    if tensor.dtype != dtype:
        step = f"keep the coefficients and their parameters in {dtype}"
        raise ShapeError(wrong(f"dtype of {name}", tensor.dtype, f"{dtype} for these streams", step))
    if device is not None and tensor.device != device:
        step = "move the whole model or module, not parts of it"
        raise ShapeError(wrong(f"device of {name}", tensor.device, f"{device}, that of the streams", step))


def check_coefficients(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, convention: Convention) -> None:
    check_streams(streams)
    n, features = streams.shape[-2:]
    dtype, groups, columns = plain.coefficient_dtype(streams.dtype), convention.groups, convention.columns(n)
    named = ("n", "2 n", "n n + 2 n")[groups - 1]
    check_one("phi", phi, (n * features, columns), dtype, f"[n C, {named}]", streams.device)
    check_one("alpha", alpha, (groups,), dtype, f"[{groups}]", streams.device)
    check_one("bias", bias, (columns,), dtype, f"[{named}]", streams.device)


def check_sinkhorn(logits: Tensor) -> None:
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or logits.shape[-1] < 1:
        raise ShapeError(wrong("logits", shape_of(logits), "[..., n, n] with n >= 1", "one square matrix a token"))
    if logits.dtype not in (torch.float32, torch.float64):
        raise ShapeError(wrong("dtype of logits", logits.dtype, "float32, float64", "keep coefficients in float32"))


def check_aggregate(streams: Tensor, pre: Tensor) -> None:
    check_streams(streams)
    check_one("pre", pre, (*streams.shape[:-1],), plain.coefficient_dtype(streams.dtype), "[..., n]", streams.device)


def check_merge(streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None) -> None:
    check_streams(streams)
    *lead, n, features = streams.shape
    dtype = plain.coefficient_dtype(streams.dtype)
    check_one("f", f, (*lead, features), f.dtype, "[..., C]", streams.device)
    if f.dtype not in STREAM_DTYPES or torch.promote_types(streams.dtype, f.dtype) != streams.dtype:
        legal = f"a floating dtype that promotes to {streams.dtype}"
        raise ShapeError(wrong("dtype of f", f.dtype, legal, "cast f or the streams"))
    check_one("post", post, (*lead, n), dtype, "[..., n]", streams.device)
    if res is not None:
        check_one("res", res, (*lead, n, n), dtype, "[..., n, n]", streams.device)


def check_expand(x: Tensor, n: int) -> None:
    check_dense("x", x)
    if x.dim() < 1 or x.dtype not in STREAM_DTYPES:
        legal = "[..., C] of a floating dtype of 16 to 64 bits"
        raise ShapeError(wrong("x", f"{shape_of(x)} of {x.dtype}", legal, "cast it before the expansion"))
    if n < 1:
        raise ShapeError(wrong("n", n, "an integer >= 1", "every published model has n=4"))


def shape_of(tensor: Tensor) -> str:
    return shape_text(tuple(tensor.shape))


def shape_text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"
