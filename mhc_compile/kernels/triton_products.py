"""First pass of a site's backward in a chain of sites: dpre, dpost and dres, when df is there already.

    dpre_i = <du, X_i>          dpost_i = <G_i, f>          dres_ij = <G_i, X_j>

A branch needs df before it can give du, and dpost and dres nobody needs before du.  So where the last pass of the next
site has made df of its G (:mod:`triton_streams_backward`), all products with X wait for du, and X is read once.

dpre is the gradient of whatever u was read with: the site's own pre, or, with single-pass reads, that of the site
before.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.triton_launch import STREAM_DTYPES, cdiv, check, check_streams, jit, launch
from mhc_compile.kernels.triton_merge_backward import merge_backward_tile
from mhc_compile.kernels.triton_sinkhorn import store_matrix
from mhc_compile.kernels.triton_tiles import (
    load_rows,
    load_streams,
    nothing,
    partial_products,
    row_sums,
    store_vector,
    zeros,
)


@jit
def _products(
    grad: tl.tensor,
    du: tl.tensor,
    streams: tl.tensor,
    f: tl.tensor,
    dpre: tl.tensor,
    dpost: tl.tensor,
    dres: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    to_pre = zeros(N if du is not None else 0, BLOCK_T, BLOCK_C // VECTOR)
    to_post = zeros(N, BLOCK_T, BLOCK_C // VECTOR)
    to_res = zeros(N * N, BLOCK_T, BLOCK_C // VECTOR)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (columns < C)[None, :]
        x = load_streams(streams, rows, columns, mask, N, C)
        branch = load_rows(f, rows, columns, mask, C)
        pre_sums = nothing()
        if du is not None:
            input_grad = load_rows(du, rows, columns, mask, C)
            for j in tl.static_range(N):
                pre_sums += (to_pre[j] + partial_products(input_grad, x[j], VECTOR),)
        post_sums = nothing()
        res_sums = nothing()
        for i in tl.static_range(N):
            g = load_rows(grad + i * C, rows, columns, mask, N * C)
            post_sums += (to_post[i] + partial_products(g, branch, VECTOR),)
            for j in tl.static_range(N):
                res_sums += (to_res[i * N + j] + partial_products(g, x[j], VECTOR),)
        to_pre = pre_sums
        to_post = post_sums
        to_res = res_sums
    if du is not None:
        store_vector(dpre, row_sums(to_pre), rows, valid, N)
    store_vector(dpost, row_sums(to_post), rows, valid, N)
    store_matrix(dres, row_sums(to_res), rows, valid, N, N, N * N, TRANSPOSED)


def products(
    grad: Tensor, du: Tensor | None, streams: Tensor, f: Tensor, transposed: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dpre, dpost [..., n] and dres [..., n, n], float32; no dpre without ``du``.  n is at most 4.

    ``grad`` [..., n, C] is the gradient of the merged streams, ``du`` [..., C] that of the branch's input, ``f``
    [..., C] what the branch gave.  ``transposed``: res and dres are [in, out].
    """
    tokens, n, features = check_streams(streams)
    lead = tuple(streams.shape[:-2])
    if du is not None:
        du = check("du", du, "[..., C]", (*lead, features), streams, streams.dtype)

    def empty(*shape: int) -> Tensor:
        return torch.empty((*lead, *shape), dtype=torch.float32, device=streams.device)

    dpre, dpost, dres = None if du is None else empty(n), empty(n), empty(n, n)
    block_t, block_c, vector = merge_backward_tile(n, features, streams.element_size())
    launch(
        _products,
        (cdiv(tokens, block_t),),
        reads={
            "grad": check("grad", grad, "[..., n, C]", tuple(streams.shape), streams, streams.dtype),
            "du": du,
            "streams": streams.contiguous(),
            "f": check("f", f, "[..., C]", (*lead, features), streams, *STREAM_DTYPES),
        },
        writes={"dpre": dpre, "dpost": dpost, "dres": dres},
        constants={
            "tokens": tokens,
            "N": n,
            "C": features,
            "TRANSPOSED": transposed,
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
            "VECTOR": vector,
        },
    )
    return dpre, dpost, dres
