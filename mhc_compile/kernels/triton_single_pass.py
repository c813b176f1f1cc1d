"""The merge of one site and the read of the next with weights that are known before: one launch, 10 units of C.

    X'_i = sum_j res_ij X_j + post_i f          rounded to the streams' dtype
    u'   = sum_i w_i X'_i                       with what is on chip, rounded
    pre', post', res'                           of X', Sinkhorn included; for the sites behind this one

Nothing waits for a sum over n C but the coefficients, so that a program that walks over all of C has read X, written X'
and u', and ends with the sums of its tokens in registers.  That takes a program for every few dozen tokens, and all
multiprocessors: with fewer tokens the sum is cut into splits, and a second launch adds them up
(:mod:`triton_merge_read`); the units are the same.  phi is read as it is, in float32: its halves are made where they
are multiplied, which is little beside the tokens that a program has, and saves the launch that packs it.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.convention import Coefficients, Convention
from mhc_compile.kernels.triton_aggregate import aggregate
from mhc_compile.kernels.triton_coefficients import affine, check_parameters, coefficients, finish, gate, logits_of
from mhc_compile.kernels.triton_launch import (
    cdiv,
    check,
    check_streams,
    jit,
    launch,
    multiprocessors,
    on_amd,
    power_of_two,
)
from mhc_compile.kernels.triton_merge import merge
from mhc_compile.kernels.triton_merge_read import check_merging, merged_tiles, project_merged
from mhc_compile.kernels.triton_project import float32_precision
from mhc_compile.kernels.triton_sinkhorn import sinkhorn_of, store_matrix
from mhc_compile.kernels.triton_tiles import nothing, store_vector


@jit
def _columns(
    z: tl.tensor,
    kept: tl.tensor,
    k: tl.tensor,
    first: tl.constexpr,
    count: tl.constexpr,
    rows: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
) -> tl.tensor:
    """Some columns of the tile z [T, K], as a tuple of [T]; written to ``kept`` [K, tokens] if that is there."""
    values = nothing()
    for e in tl.static_range(count):
        value = tl.sum(tl.where((k == first + e)[None, :], z, 0.0), 1)
        if kept is not None:
            tl.store(kept + tl.cast(first + e, tl.int64) * tokens + rows, value, mask=valid)
        values += (value,)
    return values


@jit
def _merge_read_early(
    streams: tl.tensor,
    f: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    weights: tl.tensor,
    phi: tl.tensor,
    alpha: tl.tensor,
    bias: tl.tensor,
    merged: tl.tensor,
    u: tl.tensor,
    next_pre: tl.tensor,
    next_post: tl.tensor,
    next_res: tl.tensor,
    z: tl.tensor,
    r: tl.tensor,
    tokens: tl.tensor,
    iterations: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    MIX: tl.constexpr,
    ROUND: tl.constexpr,
    TURNED: tl.constexpr,
    RES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    E: tl.constexpr,
    RMS_EPS: tl.constexpr,
    PRE_EPS: tl.constexpr,
    POST_SCALE: tl.constexpr,
    POST_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)
    valid = rows < tokens - start
    k = tl.arange(0, BLOCK_K)
    total, squares = merged_tiles(
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
        0,
        C,
        N,
        C,
        K,
        MIX,
        ROUND,
        False,
        TURNED,
        PRECISION,
        BLOCK_T,
        BLOCK_C,
        BLOCK_K,
    )
    places = start + rows
    root = tl.sqrt(tl.sum(squares, 1) / (N * C) + RMS_EPS)
    inverse = 1.0 / root
    tl.store(r + places, root, mask=valid)
    z_pre = _columns(total, z, k, 0, N, places, valid, tokens)
    store_vector(next_pre, affine(gate(z_pre, inverse, tl.load(alpha), bias, 0, N), 1.0, PRE_EPS), places, valid, N)
    if next_post is not None:
        z_post = _columns(total, z, k, N, N, places, valid, tokens)
        opened = gate(z_post, inverse, tl.load(alpha + 1), bias, N, N)
        store_vector(next_post, affine(opened, POST_SCALE, POST_EPS), places, valid, N)
    if next_res is not None:
        z_res = _columns(total, z, k, 2 * N, N * N, places, valid, tokens)
        logits = logits_of(z_res, inverse, tl.load(alpha + 2), bias, 2 * N, N, N, TRANSPOSED)
        if RES == "sinkhorn":
            logits = sinkhorn_of(logits, iterations, E, N)
        store_matrix(next_res, logits, places, valid, N, N, N * N, TRANSPOSED)


def merge_read_early(
    merging: tuple[Tensor, Tensor, Tensor, Tensor | None],
    weights: Tensor | None,
    parameters: tuple[Tensor, Tensor, Tensor],
    mix: str,
    rounds: bool,
    convention: Convention,
) -> tuple[Tensor, Tensor | None, Coefficients]:
    """X' [..., n, C], u' [..., C], and the coefficients of the next site.

    ``weights`` [..., n], float32, are what u' is read with; without them nobody reads X', and there is no u'.  All else
    as for ``triton_merge_read.merge_read``.  With more than four streams, a merge, coefficients and an aggregate.
    """
    streams, phi = merging[0], parameters[0]
    tokens, n, features = check_streams(streams)
    lead = streams.shape[:-2]
    if weights is not None:
        weights = check("weights", weights, "[..., n]", (*lead, n), streams, torch.float32)
    if n > 4:
        merged = merge(*merging, mix, rounds)
        u = None if weights is None else aggregate(merged, weights)
        return merged, u, coefficients(merged, *parameters, convention)
    alpha, bias = check_parameters(streams, *parameters, convention)
    merged = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    u = None if weights is None else streams.new_empty((*lead, features))
    reads = check_merging(*merging, mix)
    manner: dict[str, str | bool] = {"MIX": mix, "ROUND": rounds and streams.dtype != torch.float32}
    if not in_one_launch(tokens, streams):
        shares = project_merged(reads, merged, phi, manner, weights, u)
        return merged, u, finish(merged, shares, alpha, bias, convention, aggregate=False)[0]
    reads |= {"weights": weights, "phi": phi, "alpha": alpha, "bias": bias}
    return merged, u, _launch(reads, {"merged": merged, "u": u}, manner, convention)


def in_one_launch(tokens: int, streams: Tensor) -> bool:
    """Whether tiles of tokens alone keep seven tenths of the device busy, so that no split of C would gain much."""
    tiles = cdiv(tokens, one_launch_tile(streams.dtype)[0])
    return 10 * tiles >= 7 * multiprocessors(streams.device)


def _launch(
    reads: dict[str, Tensor | None],
    writes: dict[str, Tensor | None],
    manner: dict[str, str | bool],
    convention: Convention,
) -> Coefficients:
    merged, phi = writes["merged"], reads["phi"]
    assert merged is not None and phi is not None
    tokens, n, features = check_streams(merged, "merged")
    lead, columns = merged.shape[:-2], convention.columns(n)
    turned = phi.t().is_contiguous()

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=merged.device)

    site = Coefficients(
        pre=new(*lead, n),
        post=new(*lead, n) if convention.post else None,
        res=None if convention.res == "none" else new(*lead, n, n),
        z=new(columns, tokens),
        r=new(tokens),
    )
    block_t, block_c, warps, stages = one_launch_tile(merged.dtype)
    launch(
        _merge_read_early,
        (cdiv(tokens, block_t),),
        reads={**reads, "phi": phi if turned else phi.contiguous()},
        writes={**writes, "next_pre": site.pre, "next_post": site.post, "next_res": site.res, "z": site.z, "r": site.r},
        constants={
            **manner,
            "tokens": tokens,
            "iterations": convention.iterations,
            "N": n,
            "C": features,
            "K": columns,
            "TURNED": turned,
            "RES": convention.res,
            "TRANSPOSED": convention.rows_first,
            "E": convention.divisor_eps,
            "RMS_EPS": convention.rms_eps,
            "PRE_EPS": convention.pre_eps,
            "POST_SCALE": convention.post_scale,
            "POST_EPS": convention.post_eps,
            "PRECISION": float32_precision(),
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
            "BLOCK_K": max(16, power_of_two(columns)),
        },
        warps=warps,
        stages=stages,
    )
    return site


def one_launch_tile(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """BLOCK_T, BLOCK_C, warps and stages."""
    warps, stages = (4, 2) if on_amd() else (8, 3)
    return (64, 16, warps, 2) if dtype == torch.float32 else (64, 32, warps, stages)
