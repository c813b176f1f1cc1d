"""The merge of one site and the read of the next: X is read once, X' written once.

    X'_i = sum_j res_ij X_j + post_i f          rounded to the streams' dtype
    z'   = vec(X') @ phi'                       of the next site, with the sum of squares, from the rounded X'

The tile of X' that a program has just made goes to the tensor cores before it goes to memory: 9 units of C for the
merge, and none for the product that would read X' again.  The sum over n C is cut into splits, as in
:mod:`triton_project`; the second launch, of :mod:`triton_coefficients`, adds the shares up and makes the coefficients
and u', 5 units more.

With single-pass reads u' needs no coefficient of the state that it is read from::

    u' = sum_i w_i X'_i                         w: pre of the site that X' comes from, known before

so it is made of the tile that is on chip, too: 10 units in all.  Then, where there are programs enough without cutting
the sum, one launch does everything: each program walks over all of C and ends with the coefficients of its tokens.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.convention import Coefficients, Convention
from mhc_compile.kernels.triton_coefficients import check_parameters, finish, read
from mhc_compile.kernels.triton_launch import (
    STREAM_DTYPES,
    cdiv,
    check,
    check_streams,
    jit,
    launch,
    multiprocessors,
    on_amd,
    power_of_two,
)
from mhc_compile.kernels.triton_merge import check_res, merge, mixed_stream
from mhc_compile.kernels.triton_project import FEW, add_product, float32_precision, operand, store_shares
from mhc_compile.kernels.triton_tiles import load_rows, load_streams, rounded, store_rows


@jit
def merged_tiles(
    streams: tl.tensor,
    f: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    weights: tl.tensor,
    phi: tl.tensor,
    merged: tl.tensor,
    u: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    k: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    MIX: tl.constexpr,
    ROUND: tl.constexpr,
    PACKED: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Writes columns ``first`` to ``last`` of X' (and of u' with ``weights``); z and the squares of what it wrote."""
    z = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for column in range(first, last, BLOCK_C):
        columns = column + tl.arange(0, BLOCK_C)
        inside = columns < C
        mask = valid[:, None] & inside[None, :]
        tiles = load_streams(streams, rows, columns, mask, N, C)
        branch = load_rows(f, rows, columns, mask, C)
        read = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for i in tl.static_range(N):
            gain = rounded(tl.load(post + rows * N + i, mask=valid, other=0.0), streams, ROUND)
            total = mixed_stream(tiles, streams, res, rows, valid, i, N, MIX, ROUND) + gain[:, None] * branch
            x = total.to(merged.dtype.element_ty)
            tl.store(merged + rows[:, None] * (N * C) + (i * C + columns)[None, :], x, mask=mask)
            wide = x.to(tl.float32)
            squares += wide * wide
            if u is not None:
                part = tl.load(weights + rows * N + i, mask=valid, other=0.0)[:, None] * wide
                read = part if i == 0 else read + part  # a sum from zero would lose the sign of a zero
            z = add_product(z, x, phi, k, i * C + columns, inside, N * C, K, PACKED, TURNED, PRECISION)
        if u is not None:
            store_rows(u, read, rows, columns, mask, C)
    return z, squares


@jit
def _merge_project(
    streams: tl.tensor,
    f: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    weights: tl.tensor,
    phi: tl.tensor,
    merged: tl.tensor,
    u: tl.tensor,
    z_shares: tl.tensor,
    square_shares: tl.tensor,
    tokens: tl.tensor,
    chunk: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    MIX: tl.constexpr,
    ROUND: tl.constexpr,
    PACKED: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # Only the start of a tile takes 64 bits: offsets within it are the same for every tile, and take fewer registers.
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)
    valid = rows < tokens - start
    share = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    z, squares = merged_tiles(
        streams + start * (N * C),
        f + start * C,
        post + start * N,
        res + start * (N * N) if res is not None else None,
        weights + start * N if weights is not None else None,
        phi,
        merged + start * (N * C),
        u + start * C if u is not None else None,
        rows,
        valid,
        k,
        share * chunk,
        tl.minimum((share + 1) * chunk, C),
        N,
        C,
        K,
        MIX,
        ROUND,
        PACKED,
        TURNED,
        PRECISION,
        BLOCK_T,
        BLOCK_C,
        BLOCK_K,
    )
    store_shares(z, squares, z_shares, square_shares, share, start + rows, k, valid, tokens, K)


def merge_read(
    merging: tuple[Tensor, Tensor, Tensor, Tensor | None],
    parameters: tuple[Tensor, Tensor, Tensor],
    mix: str,
    rounds: bool,
    convention: Convention,
) -> tuple[Tensor, Tensor, Coefficients]:
    """X' [..., n, C], u' [..., C], and the coefficients of the next site.

    ``merging`` are streams, f, post and res of ``merge``, with its ``mix`` and ``rounds``; ``parameters`` are phi,
    alpha and bias of the site that reads X', of whose ``convention`` they have the form.  With more than four streams,
    a merge and a read by themselves.
    """
    streams, phi = merging[0], parameters[0]
    _, n, _ = check_streams(streams)
    if n > 4:
        merged = merge(*merging, mix, rounds)
        u, site = read(merged, *parameters, convention)
        return merged, u, site
    alpha, bias = check_parameters(streams, *parameters, convention)
    merged = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    manner: dict[str, str | bool] = {"MIX": mix, "ROUND": rounds and streams.dtype != torch.float32}
    shares = project_merged(check_merging(*merging, mix), merged, phi, manner)
    site, aggregated = finish(merged, shares, alpha, bias, convention)
    assert aggregated is not None
    return merged, aggregated, site


def check_merging(streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None, mix: str) -> dict[str, Tensor | None]:
    """What a merge reads, contiguous, by the names that its kernels have for it."""
    *lead, n, features = streams.shape
    narrower = [d for d in STREAM_DTYPES if torch.promote_types(d, streams.dtype) == streams.dtype]
    return {
        "streams": streams.contiguous(),
        "f": check("f", f, "[..., C]", (*lead, features), streams, *narrower),
        "post": check("post", post, "[..., n]", (*lead, n), streams, torch.float32),
        "res": check_res(res, mix, tuple(lead), n, streams),
    }


def project_merged(
    reads: dict[str, Tensor | None],
    merged: Tensor,
    phi: Tensor,
    manner: dict[str, str | bool],
    weights: Tensor | None = None,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes ``merged``, and ``u`` with these ``weights``; gives the shares that ``finish`` adds up."""
    tokens, n, features = check_streams(merged, "merged")
    columns = phi.shape[1]
    block_t, block_c, warps, stages = merge_project_tile(tokens, merged.dtype)
    # As in `project`: one wave of two programs a multiprocessor, but none with less than 4 steps.
    splits = max(1, min(2 * multiprocessors(merged.device) // max(1, cdiv(tokens, block_t)), features // (4 * block_c)))
    chunk = cdiv(cdiv(features, splits), block_c) * block_c
    splits = cdiv(features, chunk)
    z = torch.empty((splits, columns, tokens), dtype=torch.float32, device=merged.device)
    squares = torch.empty((splits, tokens), dtype=torch.float32, device=merged.device)
    packed, is_packed, turned = operand(phi, merged, None)
    launch(
        _merge_project,
        (cdiv(tokens, block_t), splits),
        reads={**reads, "weights": weights, "phi": packed},
        writes={"merged": merged, "u": u, "z_shares": z, "square_shares": squares},
        constants={
            **manner,
            "tokens": tokens,
            "chunk": chunk,
            "N": n,
            "C": features,
            "K": columns,
            "PACKED": is_packed,
            "TURNED": turned,
            "PRECISION": float32_precision(),
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
            "BLOCK_K": max(16, power_of_two(columns)),
        },
        warps=warps,
        stages=stages,
    )
    return z, squares


def merge_project_tile(tokens: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """BLOCK_T, BLOCK_C, warps and stages: many tokens, as each program reads its part of phi; few if there are few."""
    warps, stages = (4, 2) if on_amd() else (8, 3)
    if tokens <= FEW:
        return 16, 32, 4, stages
    return (64, 16, warps, 2) if dtype == torch.float32 else (64, 32, warps, stages)
