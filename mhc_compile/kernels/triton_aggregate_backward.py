"""The backward of a read with given weights, ``u = sum_i w_i X_i``, by itself: du and X are read once, dX written once.

    dw_i = <du, X_i>          dX_i = w_i du

The last pass of a site's backward writes all that a site sends to X, and needs no dX from here: there it is dw alone.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.triton_coefficients_backward import pre_backward_tile
from mhc_compile.kernels.triton_launch import cdiv, check, check_streams, jit, launch
from mhc_compile.kernels.triton_tiles import (
    load_rows,
    load_vector,
    nothing,
    partial_products,
    row_sums,
    store_rows,
    store_vector,
    zeros,
)


@jit
def _aggregate_backward(
    du: tl.tensor,
    streams: tl.tensor,
    weights: tl.tensor,
    dx: tl.tensor,
    dweights: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    w = nothing()
    if dx is not None:
        w = load_vector(weights, rows, valid, N)
    sums = zeros(N, BLOCK_T, BLOCK_C // VECTOR)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (columns < C)[None, :]
        g = load_rows(du, rows, columns, mask, C)
        more = nothing()
        for i in tl.static_range(N):
            x = load_rows(streams + i * C, rows, columns, mask, N * C)
            more += (sums[i] + partial_products(g, x, VECTOR),)
            if dx is not None:
                store_rows(dx + i * C, w[i][:, None] * g, rows, columns, mask, N * C)
        sums = more
    store_vector(dweights, row_sums(sums), rows, valid, N)


def aggregate_backward(du: Tensor, streams: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """dX [..., n, C] in streams' dtype and dw [..., n], float32, from du [..., C]; weights [..., n], float32."""
    dx = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    weights = check("weights", weights, "[..., n]", tuple(streams.shape[:-1]), streams, torch.float32)
    return dx, _launch(du, streams, weights, dx)


def weights_backward(du: Tensor, streams: Tensor) -> Tensor:
    """dw alone."""
    return _launch(du, streams, None, None)


def _launch(du: Tensor, streams: Tensor, weights: Tensor | None, dx: Tensor | None) -> Tensor:
    tokens, n, features = check_streams(streams)
    lead = tuple(streams.shape[:-2])
    dweights = torch.empty((*lead, n), dtype=torch.float32, device=streams.device)
    block_t, block_c, vector = pre_backward_tile(features, streams.element_size())
    launch(
        _aggregate_backward,
        (cdiv(tokens, block_t),),
        reads={
            "du": check("du", du, "[..., C]", (*lead, features), streams, streams.dtype),
            "streams": streams.contiguous(),
            "weights": weights,
        },
        writes={"dx": dx, "dweights": dweights},
        constants={
            "tokens": tokens,
            "N": n,
            "C": features,
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
            "VECTOR": vector,
        },
    )
    return dweights
