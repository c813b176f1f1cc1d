"""First pass of a site's backward: df, dpost and dres from the gradient G of the merged streams.

    df = sum_i post_i G_i          dpost_i = <G_i, f>          dres_ij = <G_i, X_j>

G, X and f are read once.  The gradient of X through res is not written here: it is part of the one dX of the last
pass, which reads G again.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.triton_launch import Constants, cdiv, check, check_streams, column_block, jit, lanes, launch
from mhc_compile.kernels.triton_merge import MIXES, check_mix
from mhc_compile.kernels.triton_project import float32_precision
from mhc_compile.kernels.triton_sinkhorn import store_matrix
from mhc_compile.kernels.triton_tiles import (
    load_rows,
    load_streams,
    load_vector,
    nothing,
    partial_products,
    rounded,
    row_sums,
    store_rows,
    store_vector,
    zeros,
)


@jit
def _merge_backward(
    grad: tl.tensor,
    streams: tl.tensor,
    f: tl.tensor,
    post: tl.tensor,
    df: tl.tensor,
    dpost: tl.tensor,
    dres: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Up to four streams: all N N + N products in registers."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    gains = load_vector(post, rows, valid, N)
    to_post = zeros(N, BLOCK_T, BLOCK_C // VECTOR)
    to_res = zeros(N * N if dres is not None else 0, BLOCK_T, BLOCK_C // VECTOR)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (columns < C)[None, :]
        branch = load_rows(f, rows, columns, mask, C)
        x = nothing()
        if dres is not None:
            x = load_streams(streams, rows, columns, mask, N, C)
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        post_sums = nothing()
        res_sums = nothing()
        for i in tl.static_range(N):
            g = load_rows(grad + i * C, rows, columns, mask, N * C)
            weighted = rounded(gains[i], grad, ROUND)[:, None] * g
            total = weighted if i == 0 else total + weighted  # a sum from zero would lose the sign of a zero
            post_sums += (to_post[i] + partial_products(g, branch, VECTOR),)
            if dres is not None:
                for j in tl.static_range(N):
                    res_sums += (to_res[i * N + j] + partial_products(g, x[j], VECTOR),)
        to_post = post_sums
        to_res = res_sums
        store_rows(df, total, rows, columns, mask, C)
    store_vector(dpost, row_sums(to_post), rows, valid, N)
    if dres is not None:
        store_matrix(dres, row_sums(to_res), rows, valid, N, N, N * N, TRANSPOSED)


@jit
def _merge_backward_wide(
    grad: tl.tensor,
    streams: tl.tensor,
    f: tl.tensor,
    post: tl.tensor,
    df: tl.tensor,
    dpost: tl.tensor,
    dres: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    NP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROUND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """More than four: dres as a matrix product for each token, on the tensor cores."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    stream = tl.arange(0, NP)
    places = rows[:, None] * N + stream[None, :]
    inside = valid[:, None] & (stream < N)[None, :]
    gains = rounded(tl.load(post + places, mask=inside, other=0.0), grad, ROUND)
    to_post = tl.zeros((BLOCK_T, NP), tl.float32)
    to_res = tl.zeros((BLOCK_T, NP, NP), tl.float32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (columns < C)[None, :]
        mask_all = inside[:, :, None] & (columns < C)[None, None, :]
        all_places = places[:, :, None] * C + columns[None, None, :]
        g = tl.load(grad + all_places, mask=mask_all, other=0.0)
        wide = g.to(tl.float32)
        branch = load_rows(f, rows, columns, mask, C)
        to_post += tl.sum(wide * branch[:, None, :], 2)
        store_rows(df, tl.sum(gains[:, :, None] * wide, 1), rows, columns, mask, C)
        if dres is not None:
            x = tl.load(streams + all_places, mask=mask_all, other=0.0)
            to_res = tl.dot(g, tl.permute(x, (0, 2, 1)), to_res, input_precision=PRECISION)
    tl.store(dpost + places, to_post, mask=inside)
    if dres is not None:
        store_matrix(dres, (to_res,), rows, valid, N, NP, N * N, TRANSPOSED)


def merge_backward(
    grad: Tensor,
    streams: Tensor | None,
    f: Tensor,
    post: Tensor,
    mix: str = "given",
    rounds: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """df [..., C] in f's dtype, dpost [..., n] and dres [..., n, n], float32.

    ``grad`` [..., n, C] is the gradient of what ``merge`` with the same ``mix`` returned.  dres is as res was,
    [in, out] for "transposed"; for "identity" there is none, and ``streams`` are not read and may be None.
    """
    tokens, n, features = check_streams(grad, "grad")
    lead = tuple(grad.shape[:-2])
    check_mix(mix, MIXES[1:])
    if mix == "identity":
        streams = None
    elif streams is not None:
        streams = check("streams", streams, "[..., n, C]", tuple(grad.shape), grad, grad.dtype)
    f = check("f", f, "[..., C]", (*lead, features), grad, torch.float16, torch.bfloat16, torch.float32)
    df = torch.empty(f.shape, dtype=f.dtype, device=f.device)
    dpost = torch.empty((*lead, n), dtype=torch.float32, device=f.device)
    dres = None if streams is None else torch.empty((*lead, n, n), dtype=torch.float32, device=f.device)
    block_t, block_c, vector = merge_backward_tile(n, features, grad.element_size())
    constants: Constants = {
        "tokens": tokens,
        "N": n,
        "C": features,
        "TRANSPOSED": mix == "transposed",
        "ROUND": rounds and grad.dtype != torch.float32,
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
    }
    wide: Constants = {"NP": 16, "PRECISION": float32_precision()}
    launch(
        _merge_backward if n <= 4 else _merge_backward_wide,
        (cdiv(tokens, block_t),),
        reads={
            "grad": grad.contiguous(),
            "streams": streams,
            "f": f,
            "post": check("post", post, "[..., n]", (*lead, n), grad, torch.float32),
        },
        writes={"df": df, "dpost": dpost, "dres": dres},
        constants={**constants, "VECTOR": vector} if n <= 4 else {**constants, **wide},
    )
    return df, dpost, dres


def merge_backward_tile(n: int, features: int, size: int) -> tuple[int, int, int]:
    """BLOCK_T, BLOCK_C and VECTOR for four warps: 16 bytes a thread of each stream."""
    vector = 16 // size
    if n > 4:
        return 4, column_block(features, 64), vector
    block_c = column_block(features, lanes() * vector)
    return 4 * lanes() * vector // block_c, block_c, vector
