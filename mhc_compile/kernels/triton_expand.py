"""Entry and exit of the trunk: one kernel writes the same tile to every stream, one reads and sums all streams.

Each is the other's backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.errors import ShapeError, wrong
from mhc_compile.kernels.triton_launch import MAX_STREAMS, cdiv, check_streams, column_block, jit, lanes, launch
from mhc_compile.kernels.triton_tiles import load_rows, load_streams, store_rows


@jit
def _tile(tokens: tl.tensor, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr) -> tl.tensor:
    strips: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    rows = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (tl.program_id(0) % strips) * BLOCK_C + tl.arange(0, BLOCK_C)
    return rows, columns, (rows < tokens)[:, None] & (columns < C)[None, :]


@jit
def _broadcast(
    x: tl.tensor,
    streams: tl.tensor,
    tokens: tl.tensor,
    DIVISOR: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    rows, columns, mask = _tile(tokens, C, BLOCK_T, BLOCK_C)
    value = load_rows(x, rows, columns, mask, C)
    if DIVISOR > 1:
        value = tl.div_rn(value, DIVISOR * 1.0)
    for i in tl.static_range(N):
        store_rows(streams + i * C, value, rows, columns, mask, N * C)


@jit
def _sum(
    streams: tl.tensor,
    x: tl.tensor,
    tokens: tl.tensor,
    DIVISOR: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    rows, columns, mask = _tile(tokens, C, BLOCK_T, BLOCK_C)
    tiles = load_streams(streams, rows, columns, mask, N, C)
    total = tiles[0]  # not a sum from zero: with one stream the sign of a zero has to stay
    for i in tl.static_range(1, N):
        total += tiles[i]
    if DIVISOR > 1:
        total = tl.div_rn(total, DIVISOR * 1.0)
    store_rows(x, total, rows, columns, mask, C)


def expand(x: Tensor, n: int) -> Tensor:
    """[..., C] -> [..., n, C]: every stream a copy of x."""
    return _to_streams(x, n, 1)


def expand_backward(grad: Tensor) -> Tensor:
    """[..., n, C] -> [..., C]: the sum over streams."""
    return _to_one(grad, 1)


def readout(streams: Tensor) -> Tensor:
    """[..., n, C] -> [..., C]: the mean over streams, rounded once."""
    return _to_one(streams, streams.shape[-2] if streams.dim() > 1 else 1)


def readout_backward(grad: Tensor, n: int) -> Tensor:
    """[..., C] -> [..., n, C]: an n-th of grad for every stream."""
    return _to_streams(grad, n, n)


def _to_streams(x: Tensor, n: int, divisor: int) -> Tensor:
    if not 1 <= n <= MAX_STREAMS:
        raise ShapeError(wrong("n", n, f"an integer in 1..{MAX_STREAMS}", "every published model has n=4"))
    if x.dim() < 1:
        raise ShapeError(wrong("x", "[]", "[..., C]", "give x a dimension of features"))
    tokens, _, features = check_streams(x.unsqueeze(-2), "x with one stream")
    streams = torch.empty((*x.shape[:-1], n, features), dtype=x.dtype, device=x.device)
    _launch(_broadcast, {"x": x.contiguous()}, {"streams": streams}, tokens, n, features, divisor)
    return streams


def _to_one(streams: Tensor, divisor: int) -> Tensor:
    tokens, n, features = check_streams(streams)
    x = torch.empty((*streams.shape[:-2], features), dtype=streams.dtype, device=streams.device)
    _launch(_sum, {"streams": streams.contiguous()}, {"x": x}, tokens, n, features, divisor)
    return x


def _launch(
    kernel: Any, reads: dict[str, Tensor], writes: dict[str, Tensor], tokens: int, n: int, features: int, divisor: int
) -> None:
    size = next(iter(reads.values())).element_size()
    elements = 4 * lanes() * (32 if n <= 4 else 16) // size
    block_c = column_block(features, min(elements, 512))
    block_t = max(1, elements // block_c)
    constants = {"DIVISOR": divisor, "N": n, "C": features, "BLOCK_T": block_t, "BLOCK_C": block_c}
    grid = (cdiv(tokens, block_t) * cdiv(features, block_c),)
    launch(kernel, grid, reads=reads, writes=writes, constants={"tokens": tokens, **constants})
