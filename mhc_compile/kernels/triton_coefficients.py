"""The coefficients of a site and the input of its branch, forward.

Two passes over the streams: :mod:`triton_project` reads them for z and the sum of squares; then one launch adds
up the shares, computes pre, post and res, Sinkhorn included, and reads the streams once more for
``u = sum_i pre_i X_i``.  In that launch the first programs have one token a thread and do the coefficients; all
others have a tile of the streams each and need no more than its pre, which they compute themselves.  So the
iterations of Sinkhorn run beside the memory traffic and not before it.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.convention import Coefficients, Convention
from mhc_compile.kernels.triton_aggregate import aggregate_tile
from mhc_compile.kernels.triton_launch import Constants, cdiv, check, check_streams, jit, lanes, launch
from mhc_compile.kernels.triton_project import project
from mhc_compile.kernels.triton_sinkhorn import matrix_tile, sinkhorn_of, store_matrix
from mhc_compile.kernels.triton_tiles import load_streams, nothing, store_rows, store_vector, weighted_sum


@jit
def summed(
    shares: tl.tensor,
    splits: tl.tensor,
    first: tl.constexpr,
    count: tl.constexpr,
    rows: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
    K: tl.constexpr,
) -> tl.tensor:
    """Some columns of z, as a tuple of [BLOCK_T]: the shares [splits, K, T] added in order."""
    total = z_columns(shares, 0, first, count, rows, valid, tokens, K)
    for s in range(1, splits):
        total = _added(total, z_columns(shares, s, first, count, rows, valid, tokens, K))
    return total


@jit
def z_columns(
    shares: tl.tensor,
    s: tl.tensor,
    first: tl.constexpr,
    count: tl.constexpr,
    rows: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
    K: tl.constexpr,
) -> tl.tensor:
    """Columns first to first + count of the s-th array [K, T], as a tuple of [BLOCK_T]."""
    values = nothing()
    for k in tl.static_range(count):
        place = (tl.cast(s, tl.int64) * K + (first + k)) * tokens + rows
        values += (tl.load(shares + place, mask=valid, other=0.0),)
    return values


@jit
def _added(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    out = nothing()
    for e in tl.static_range(len(a)):
        out += (a[e] + b[e],)
    return out


@jit
def matrix_places(
    rows: tl.tensor, tokens: tl.tensor, first: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, TRANSPOSED: tl.constexpr
) -> tl.tensor:
    """Where column ``first + entry`` of a [K, T] array is, for each entry of a matrix; and what is not padding."""
    i = tl.arange(0, NP)[None, :, None]
    j = tl.arange(0, NP)[None, None, :]
    entry = j * N + i if TRANSPOSED else i * N + j
    return (first + entry).to(tl.int64) * tokens + rows[:, None, None], (i < N) & (j < N)


@jit
def inverse_rms(
    square_shares: tl.tensor,
    splits: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
    WIDTH: tl.constexpr,
    RMS_EPS: tl.constexpr,
) -> tl.tensor:
    """r and 1 / r.  Tokens beyond the last are as good as any."""
    squares = summed(square_shares, splits, 0, 1, rows, valid, tokens, 1)[0]
    r = tl.sqrt(squares / WIDTH + RMS_EPS)
    return r, 1.0 / r


@jit
def gate(
    z: tl.tensor, inverse: tl.tensor, scale: tl.tensor, bias: tl.tensor, first: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    """``sigmoid(scale z / r + b)`` for each stream."""
    values = nothing()
    for i in tl.static_range(N):
        values += (tl.sigmoid(z[i] * inverse * scale + tl.load(bias + first + i)),)
    return values


@jit
def affine(values: tl.tensor, scale: tl.constexpr, shift: tl.constexpr) -> tl.tensor:
    out = nothing()
    for e in tl.static_range(len(values)):
        out += (values[e] * scale + shift,)
    return out


@jit
def _logit(
    z: tl.tensor, inverse: tl.tensor, scale: tl.tensor, bias: tl.tensor, first: tl.constexpr, e: tl.constexpr
) -> tl.tensor:
    return z[e] * inverse * scale + tl.load(bias + first + e)


@jit
def logits_of(
    z: tl.tensor,
    inverse: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    first: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> tl.tensor:
    """The logits of res, in the form of ``triton_sinkhorn``."""
    if N <= 4:
        logits = nothing()
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                logits += (_logit(z, inverse, scale, bias, first, j * N + i if TRANSPOSED else i * N + j),)
        return logits
    else:
        i = tl.arange(0, NP)[None, :, None]
        j = tl.arange(0, NP)[None, None, :]
        inside = (i < N) & (j < N)
        b = tl.load(bias + first + (j * N + i if TRANSPOSED else i * N + j), mask=inside, other=0.0)
        return (tl.where(inside, z[0] * inverse[:, None, None] * scale + b, float("-inf")),)


@jit
def summed_matrix(
    shares: tl.tensor,
    splits: tl.tensor,
    first: tl.constexpr,
    rows: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
    K: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> tl.tensor:
    """The columns of z that belong to res: as :func:`summed` up to four streams, else a matrix."""
    if N <= 4:
        return summed(shares, splits, first, N * N, rows, valid, tokens, K)
    else:
        places, inside = matrix_places(rows, tokens, first, N, NP, TRANSPOSED)
        mask = valid[:, None, None] & inside
        total = tl.load(shares + places, mask=mask, other=0.0)
        for s in range(1, splits):
            total += tl.load(shares + tl.cast(s, tl.int64) * K * tokens + places, mask=mask, other=0.0)
        return (total,)


@jit
def _keep_columns(
    z: tl.tensor, values: tl.tensor, first: tl.constexpr, rows: tl.tensor, valid: tl.tensor, tokens: tl.tensor
) -> None:
    """Write some columns of z [K, T]."""
    for k in tl.static_range(len(values)):
        tl.store(z + tl.cast(first + k, tl.int64) * tokens + rows, values[k], mask=valid)


@jit
def _keep_matrix(
    z: tl.tensor,
    values: tl.tensor,
    first: tl.constexpr,
    rows: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> None:
    if N <= 4:
        _keep_columns(z, values, first, rows, valid, tokens)
    else:
        places, inside = matrix_places(rows, tokens, first, N, NP, TRANSPOSED)
        tl.store(z + places, values[0], mask=valid[:, None, None] & inside)


@jit
def _coefficients_of(
    rows: tl.tensor,
    z_shares: tl.tensor,
    square_shares: tl.tensor,
    alpha: tl.tensor,
    bias: tl.tensor,
    pre: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    z: tl.tensor,
    r: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    iterations: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    RES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    E: tl.constexpr,
    RMS_EPS: tl.constexpr,
    PRE_EPS: tl.constexpr,
    POST_SCALE: tl.constexpr,
    POST_EPS: tl.constexpr,
) -> None:
    """All coefficients of the tokens ``rows``, and z and r for the backward."""
    valid = rows < tokens
    root, inverse = inverse_rms(square_shares, splits, rows, valid, tokens, N * C, RMS_EPS)
    tl.store(r + rows, root, mask=valid)
    z_pre = summed(z_shares, splits, 0, N, rows, valid, tokens, K)
    store_vector(pre, affine(gate(z_pre, inverse, tl.load(alpha), bias, 0, N), 1.0, PRE_EPS), rows, valid, N)
    if z is not None:
        _keep_columns(z, z_pre, 0, rows, valid, tokens)
    if post is not None:
        z_post = summed(z_shares, splits, N, N, rows, valid, tokens, K)
        opened = gate(z_post, inverse, tl.load(alpha + 1), bias, N, N)
        store_vector(post, affine(opened, POST_SCALE, POST_EPS), rows, valid, N)
        if z is not None:
            _keep_columns(z, z_post, N, rows, valid, tokens)
    if res is not None:
        z_res = summed_matrix(z_shares, splits, 2 * N, rows, valid, tokens, K, N, NP, TRANSPOSED)
        if z is not None:
            _keep_matrix(z, z_res, 2 * N, rows, valid, tokens, N, NP, TRANSPOSED)
        logits = logits_of(z_res, inverse, tl.load(alpha + 2), bias, 2 * N, N, NP, TRANSPOSED)
        if RES == "sinkhorn":
            logits = sinkhorn_of(logits, iterations, E, N)
        store_matrix(res, logits, rows, valid, N, NP, N * N, TRANSPOSED)


@jit
def _aggregate_of(
    tile: tl.tensor,
    z_shares: tl.tensor,
    square_shares: tl.tensor,
    alpha: tl.tensor,
    bias: tl.tensor,
    streams: tl.tensor,
    u: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    RMS_EPS: tl.constexpr,
    PRE_EPS: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_C: tl.constexpr,
) -> None:
    """One tile of u, with the pre of its tokens computed anew."""
    strips: tl.constexpr = (C + TILE_C - 1) // TILE_C
    rows = (tile // strips).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    columns = (tile % strips) * TILE_C + tl.arange(0, TILE_C)
    valid = rows < tokens
    mask = valid[:, None] & (columns < C)[None, :]
    tiles = load_streams(streams, rows, columns, mask, N, C)
    _, inverse = inverse_rms(square_shares, splits, rows, valid, tokens, N * C, RMS_EPS)
    z_pre = summed(z_shares, splits, 0, N, rows, valid, tokens, K)
    weights = affine(gate(z_pre, inverse, tl.load(alpha), bias, 0, N), 1.0, PRE_EPS)
    store_rows(u, weighted_sum(weights, tiles, N), rows, columns, mask, C)


@jit
def _finish(
    z_shares: tl.tensor,
    square_shares: tl.tensor,
    alpha: tl.tensor,
    bias: tl.tensor,
    streams: tl.tensor,
    pre: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    z: tl.tensor,
    r: tl.tensor,
    u: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    iterations: tl.tensor,
    coefficient_programs: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    RES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    E: tl.constexpr,
    RMS_EPS: tl.constexpr,
    PRE_EPS: tl.constexpr,
    POST_SCALE: tl.constexpr,
    POST_EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_C: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if program < coefficient_programs:
        _coefficients_of(
            program.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T),
            z_shares,
            square_shares,
            alpha,
            bias,
            pre,
            post,
            res,
            z,
            r,
            tokens,
            splits,
            iterations,
            N,
            C,
            NP,
            K,
            RES,
            TRANSPOSED,
            E,
            RMS_EPS,
            PRE_EPS,
            POST_SCALE,
            POST_EPS,
        )
    elif u is not None:
        _aggregate_of(
            program - coefficient_programs,
            z_shares,
            square_shares,
            alpha,
            bias,
            streams,
            u,
            tokens,
            splits,
            N,
            C,
            K,
            RMS_EPS,
            PRE_EPS,
            TILE_T,
            TILE_C,
        )


def read(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    convention: Convention,
    packed: Tensor | None = None,
) -> tuple[Tensor, Coefficients]:
    """The input of the branch, u [..., C] in streams' dtype, and the coefficients.

    streams [..., n, C]; phi [n C, columns] (or the transpose of such a matrix), alpha [groups] and bias [columns],
    float32, with ``convention.columns(n)`` columns and ``convention.groups`` scales.  Who calls more than once
    with the same phi may pass ``packed``, from :func:`~mhc_compile.kernels.triton_project.pack`.
    """
    coefficients, u = _launch(streams, phi, alpha, bias, convention, packed, True)
    assert u is not None
    return u, coefficients


def coefficients(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    convention: Convention,
    packed: Tensor | None = None,
) -> Coefficients:
    """The coefficients alone; arguments as for :func:`read`."""
    return _launch(streams, phi, alpha, bias, convention, packed, False)[0]


def check_parameters(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, convention: Convention
) -> tuple[Tensor, Tensor]:
    """alpha and bias, contiguous; phi may be a transpose and stays as it is."""
    n, features = streams.shape[-2:]
    columns = convention.columns(n)
    check("phi", phi, "[n C, columns]", (n * features, columns), streams, torch.float32)
    return (
        check("alpha", alpha, "[groups]", (convention.groups,), streams, torch.float32),
        check("bias", bias, "[columns]", (columns,), streams, torch.float32),
    )


def _launch(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    convention: Convention,
    packed: Tensor | None,
    aggregate: bool,
) -> tuple[Coefficients, Tensor | None]:
    tokens, n, features = check_streams(streams)
    alpha, bias = check_parameters(streams, phi, alpha, bias, convention)
    streams = streams.contiguous()
    shares = project(streams.view(tokens, n * features), phi, packed)
    return finish(streams, shares, alpha, bias, convention, aggregate)


def finish(
    streams: Tensor,
    shares: tuple[Tensor, Tensor],
    alpha: Tensor,
    bias: Tensor,
    convention: Convention,
    aggregate: bool = True,
) -> tuple[Coefficients, Tensor | None]:
    """The second launch: from the shares of z and of the sum of squares to the coefficients, and u if asked for.

    streams are contiguous, alpha and bias from :func:`check_parameters`.
    """
    tokens, n, features = check_streams(streams)
    lead, columns = streams.shape[:-2], convention.columns(n)
    z_shares, square_shares = shares

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=streams.device)

    kept = Coefficients(
        pre=new(*lead, n),
        post=new(*lead, n) if convention.post else None,
        res=None if convention.res == "none" else new(*lead, n, n),
        z=z_shares[0] if len(z_shares) == 1 else new(columns, tokens),
        r=new(tokens),
    )
    u = new(*lead, features, dtype=streams.dtype) if aggregate else None
    writes = {"pre": kept.pre, "post": kept.post, "res": kept.res, "r": kept.r, "u": u}
    _launch_finish(
        reads={
            "z_shares": z_shares,
            "square_shares": square_shares,
            "alpha": alpha,
            "bias": bias,
            "streams": streams if aggregate else None,
        },
        writes={**writes, "z": None if len(z_shares) == 1 else kept.z},
        shape=(tokens, n, features),
        size=streams.element_size(),
        convention=convention,
    )
    return kept, u


def _launch_finish(
    reads: dict[str, Tensor | None],
    writes: dict[str, Tensor | None],
    shape: tuple[int, int, int],
    size: int,
    convention: Convention,
) -> None:
    tokens, n, features = shape
    width, block_t = matrix_tile(n, 4 * lanes())
    tile_t, tile_c = aggregate_tile(n, features, size)
    tiles = cdiv(tokens, tile_t) * cdiv(features, tile_c) if writes["u"] is not None else 0
    shares = reads["z_shares"]
    assert shares is not None
    constants: Constants = {
        "tokens": tokens,
        "splits": len(shares),
        "iterations": convention.iterations,
        "coefficient_programs": cdiv(tokens, block_t),
        "N": n,
        "C": features,
        "NP": width,
        "K": convention.columns(n),
        "RES": convention.res,
        "TRANSPOSED": convention.rows_first,
        "E": convention.divisor_eps,
        "RMS_EPS": convention.rms_eps,
        "PRE_EPS": convention.pre_eps,
        "POST_SCALE": convention.post_scale,
        "POST_EPS": convention.post_eps,
        "BLOCK_T": block_t,
        "TILE_T": tile_t,
        "TILE_C": tile_c,
    }
    launch(_finish, (cdiv(tokens, block_t) + tiles,), reads=reads, writes=writes, constants=constants)
