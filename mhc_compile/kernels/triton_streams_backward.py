"""Last pass of a site's backward, up to four streams: dX, dphi, and the gradients of alpha and bias, in one launch.

    dX_j = sum_i res_ij G_i + pre_j du + (dz @ phi^T)_j - pull X_j          dphi = vec(X)^T dz          dz = alpha d / r

In a chain of sites this is also the first pass of the site before, whose merge made X: its G is the dX that is on chip
here, and

    df = sum_i post_i G_i          from G as it is in memory, rounded

is written beside it.  G, du and X are read once and dX is written once.  A program has a strip of columns of all
streams, side by side in one tile, so that each of the two products is one for all streams.  It keeps its part of phi on
chip, goes over its share of the tokens, and adds up its part of dphi meanwhile.  :mod:`triton_phi_backward` adds the
shares, in order.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.convention import Before
from mhc_compile.kernels.triton_launch import (
    Constants,
    cdiv,
    check,
    column_block,
    jit,
    launch,
    multiprocessors,
    on_amd,
    power_of_two,
    shared_memory,
)
from mhc_compile.kernels.triton_project import float32_precision
from mhc_compile.kernels.triton_tiles import rounded, split


@jit
def load_dz(
    d: tl.tensor,
    r: tl.tensor,
    alpha: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    k: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """Columns k of ``dz = alpha d / r``, and of d: [T, len(k)] both."""
    value = tl.load(d + rows[:, None] * K + k[None, :], mask=valid[:, None] & (k < K)[None, :], other=0.0)
    group = (k >= N).to(tl.int32) + (k >= 2 * N).to(tl.int32)
    scale = tl.load(alpha + group, mask=k < K, other=0.0)
    inverse = 1.0 / tl.load(r + rows, mask=valid, other=1.0)
    return value * scale[None, :] * inverse[:, None], value


@jit
def load_pull(pull: tl.tensor, rows: tl.tensor, valid: tl.tensor, tokens: tl.tensor, PULLS: tl.constexpr) -> tl.tensor:
    factor = tl.load(pull + rows, mask=valid, other=0.0)
    if PULLS > 1:
        factor += tl.load(pull + tokens + rows, mask=valid, other=0.0)
    return factor


@jit
def times_phi(dz: tl.tensor, high: tl.tensor, low: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """``total + dz @ phi^T``, with phi in float32 or in two bfloat16 halves."""
    if high.dtype == tl.float32:
        return tl.dot(dz, high, total, input_precision=PRECISION)
    else:
        dz_high, dz_low = split(dz)
        return tl.dot(dz_high, low, tl.dot(dz_low, high, tl.dot(dz_high, high, total)))


@jit
def times_streams(dz: tl.tensor, x: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """``total + dz^T @ x``, with x as it is in memory."""
    if x.dtype == tl.float32:
        return tl.dot(tl.trans(dz), x, total, input_precision=PRECISION)
    else:
        high, low = split(dz)
        high = tl.trans(high)
        low = tl.trans(low)
        if x.dtype == tl.bfloat16:
            return tl.dot(low, x, tl.dot(high, x, total))
        else:
            x_high, x_low = split(x.to(tl.float32))
            return tl.dot(high, x_low, tl.dot(low, x_high, tl.dot(high, x_high, total)))


@jit
def for_each_stream(tile: tl.tensor, ROWS: tl.constexpr, NP: tl.constexpr, BLOCK_C: tl.constexpr) -> tl.tensor:
    """[T, C] -> [T, NP C]: the tile once for every stream."""
    return tl.reshape(tl.broadcast_to(tile[:, None, :], (ROWS, NP, BLOCK_C)), (ROWS, NP * BLOCK_C))


@jit
def for_each_column(weights: tl.tensor, ROWS: tl.constexpr, NP: tl.constexpr, BLOCK_C: tl.constexpr) -> tl.tensor:
    """[T, NP] -> [T, NP C]: a stream's weight for each of its columns."""
    return tl.reshape(tl.broadcast_to(weights[:, :, None], (ROWS, NP, BLOCK_C)), (ROWS, NP * BLOCK_C))


@jit
def direct_gradient(
    grad: tl.tensor,
    du: tl.tensor,
    streams: tl.tensor,
    pre: tl.tensor,
    res: tl.tensor,
    rows: tl.tensor,
    strip: tl.tensor,
    valid: tl.tensor,
    total: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    C: tl.constexpr,
    MIX: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> tl.tensor:
    """``total + sum_i res_ij G_i + pre_j du`` for all streams j of a strip."""
    stream = tl.arange(0, NP)
    columns = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = valid[:, None] & (columns < C)[None, :]
    weight_mask = valid[:, None] & (stream < N)[None, :]
    if du is not None:
        weight = tl.load(pre + rows[:, None] * N + stream[None, :], mask=weight_mask, other=0.0)
        g = tl.load(du + rows[:, None] * C + columns[None, :], mask=mask, other=0.0)
        spread = for_each_stream(g, BLOCK_T, NP, BLOCK_C).to(tl.float32)
        total += for_each_column(weight, BLOCK_T, NP, BLOCK_C) * spread
    if MIX == "given" or MIX == "transposed":
        for i in tl.static_range(N):
            entry = stream * N + i if MIX == "transposed" else i * N + stream
            weight = tl.load(res + rows[:, None] * (N * N) + entry[None, :], mask=weight_mask, other=0.0)
            g = tl.load(grad + rows[:, None] * (N * C) + (i * C + columns)[None, :], mask=mask, other=0.0)
            spread = for_each_stream(g, BLOCK_T, NP, BLOCK_C).to(tl.float32)
            total += for_each_column(rounded(weight, streams, ROUND), BLOCK_T, NP, BLOCK_C) * spread
    return total


@jit
def branch_gradient(
    grad: tl.tensor,
    gains: tl.tensor,
    df: tl.tensor,
    streams: tl.tensor,
    rows: tl.tensor,
    strip: tl.tensor,
    valid: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    C: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Writes ``df = sum_i post_i G_i`` of a strip, from the tile [T, NP C] of G."""
    stream = tl.arange(0, NP)
    columns = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    weight_mask = valid[:, None] & (stream < N)[None, :]
    weight = tl.load(gains + rows[:, None] * N + stream[None, :], mask=weight_mask, other=0.0)
    weighted = for_each_column(rounded(weight, streams, ROUND), BLOCK_T, NP, BLOCK_C) * grad
    total = tl.sum(tl.reshape(weighted, (BLOCK_T, NP, BLOCK_C)), 1)
    mask = valid[:, None] & (columns < C)[None, :]
    tl.store(df + rows[:, None] * C + columns[None, :], total.to(df.dtype.element_ty), mask=mask)


@jit
def _streams_backward(
    grad: tl.tensor,
    du: tl.tensor,
    streams: tl.tensor,
    pre: tl.tensor,
    res: tl.tensor,
    d: tl.tensor,
    pull: tl.tensor,
    z: tl.tensor,
    r: tl.tensor,
    alpha: tl.tensor,
    packed: tl.tensor,
    tap: tl.tensor,
    gains: tl.tensor,
    dx: tl.tensor,
    df: tl.tensor,
    phi_shares: tl.tensor,
    sum_shares: tl.tensor,
    tokens: tl.tensor,
    chunk: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    PULLS: tl.constexpr,
    MIX: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_GAINS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    strips: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    strip = tl.program_id(0) % strips
    share = tl.program_id(0) // strips
    column = strip * BLOCK_C + tl.arange(0, NP * BLOCK_C) % BLOCK_C
    stream = tl.arange(0, NP * BLOCK_C) // BLOCK_C
    places = stream * C + column
    inside = (column < C) & (stream < N)
    k = tl.arange(0, KP)
    rows = tl.arange(0, BLOCK_T)
    phi_mask = (k < K)[:, None] & inside[None, :]
    phi = tl.load(packed + k[:, None] * (N * C) + places[None, :], mask=phi_mask, other=0.0)
    phi_low = phi
    if streams.dtype.element_ty != tl.float32:
        phi_low = tl.load(packed + K * N * C + k[:, None] * (N * C) + places[None, :], mask=phi_mask, other=0.0)
    dphi = tl.zeros((KP, NP * BLOCK_C), tl.float32)
    bias_sum = tl.zeros((KP,), tl.float32)
    scale_sum = tl.zeros((KP,), tl.float32)
    for start in tl.range(share * chunk, tl.minimum((share + 1) * chunk, tokens), BLOCK_T, num_stages=STAGES):
        # Only the start of a tile takes 64 bits: offsets within it are the same for every tile.
        t = tl.cast(start, tl.int64)
        valid = rows < tokens - start
        mask = valid[:, None] & inside[None, :]
        dz, value = load_dz(d + t * K, r + t, alpha, rows, valid, k, N, K)
        x = tl.load(streams + t * (N * C) + rows[:, None] * (N * C) + places[None, :], mask=mask, other=0.0)
        total = times_phi(dz, phi, phi_low, tl.zeros((BLOCK_T, NP * BLOCK_C), tl.float32), PRECISION)
        dphi = times_streams(dz, x, dphi, PRECISION)
        total -= load_pull(pull + t, rows, valid, tokens, PULLS)[:, None] * x.to(tl.float32)
        total = direct_gradient(
            grad + t * (N * C) if grad is not None else None,
            du + t * C if du is not None else None,
            streams,
            pre + t * N,
            res + t * (N * N) if res is not None else None,
            rows,
            strip,
            valid,
            total,
            N,
            NP,
            C,
            MIX,
            ROUND,
            BLOCK_T,
            BLOCK_C,
        )
        if MIX == "identity":
            g = tl.load(grad + t * (N * C) + rows[:, None] * (N * C) + places[None, :], mask=mask, other=0.0)
            total += g.to(tl.float32)
        if tap is not None:
            g = tl.load(tap + t * (N * C) + rows[:, None] * (N * C) + places[None, :], mask=mask, other=0.0)
            total += g.to(tl.float32)
        out = dx + t * (N * C) + rows[:, None] * (N * C) + places[None, :]
        g = total.to(dx.dtype.element_ty)
        tl.store(out, g, mask=mask)
        if df is not None:
            branch_gradient(
                g.to(tl.float32),
                gains + t * N,
                df + t * C,
                streams,
                rows,
                strip,
                valid,
                N,
                NP,
                C,
                ROUND_GAINS,
                BLOCK_T,
                BLOCK_C,
            )
        # The sums for bias and alpha: every strip has d at hand, the first one reads z and writes.
        first = valid[:, None] & (k < K)[None, :] & (strip == 0)
        z_tile = tl.load(z + t + k[None, :].to(tl.int64) * tokens + rows[:, None], mask=first, other=0.0)
        inverse = 1.0 / tl.load(r + t + rows, mask=valid, other=1.0)
        bias_sum += tl.sum(value, 0)
        scale_sum += tl.sum(value * z_tile * inverse[:, None], 0)
    out = phi_shares + share.to(tl.int64) * (K * N * C) + k[:, None] * (N * C) + places[None, :]
    tl.store(out, dphi, mask=phi_mask)
    first = (k < K) & (strip == 0)
    tl.store(sum_shares + share * (2 * K) + k, bias_sum, mask=first)
    tl.store(sum_shares + share * (2 * K) + K + k, scale_sum, mask=first)


def streams_backward(
    reads: dict[str, Tensor | None], mix: str, rounds: bool, before: Before | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """dX, df of the merge ``before``, shares of dphi [shares, K, n C] and of bias's and alpha's sums [shares, 2, K].

    ``reads`` are the arguments of the kernel of these names, checked and contiguous.  No ``before``, no df.
    """
    streams, d, pull = reads["streams"], reads["d"], reads["pull"]
    assert streams is not None and d is not None and pull is not None
    n, features = streams.shape[-2:]
    tokens, columns = d.shape
    block_t, block_c, warps, stages = streams_backward_tile(
        n, features, streams, before is not None, reads["tap"] is not None
    )
    shares, chunk = share_tokens(tokens, block_t, cdiv(features, block_c), columns, streams.device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=streams.device)

    dx = empty(*streams.shape, dtype=streams.dtype)
    df, gains = None, None
    if before is not None:
        lead = tuple(streams.shape[:-2])
        df = empty(*lead, features, dtype=before.dtype)
        gains = check("post of the merge before", before.post, "[..., n]", (*lead, n), streams, torch.float32)
    dphi, sums = empty(shares, columns, n * features), empty(shares, 2, columns)
    constants: Constants = {
        "tokens": tokens,
        "chunk": chunk,
        "N": n,
        "NP": power_of_two(n),
        "C": features,
        "K": columns,
        "KP": max(16, power_of_two(columns)),
        "PULLS": len(pull),
        "MIX": mix if reads["grad"] is not None else "none",
        "ROUND": rounds and streams.dtype != torch.float32,
        "ROUND_GAINS": before is not None and before.rounded and streams.dtype != torch.float32,
        "PRECISION": float32_precision(),
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
        "STAGES": stages,
    }
    launch(
        _streams_backward,
        (cdiv(features, block_c) * shares,),
        reads={**reads, "gains": gains},
        writes={"dx": dx, "df": df, "phi_shares": dphi, "sum_shares": sums},
        constants=constants,
        warps=warps,
        stages=stages,
    )
    return dx, df, dphi, sums


def streams_backward_tile(
    n: int, features: int, streams: Tensor, crossing: bool = False, tapped: bool = False
) -> tuple[int, int, int, int]:
    """BLOCK_T, BLOCK_C, warps and stages: the widest tile that fits into registers and, three stages of it, on chip.

    ``crossing``: df is written too; ``tapped``: one array more is read.  Either halves the tokens of a float32 tile.
    """
    wide = streams.dtype == torch.bfloat16
    if on_amd():
        return 16, column_block(features, (256 if wide else 128) // power_of_two(n)), 8, 2
    roomy = shared_memory(streams.device) >= 140 << 10  # not the case on consumer cards
    block_c = column_block(features, (256 if wide and roomy else 128) // power_of_two(n))
    few = streams.dtype == torch.float32 and (crossing or tapped or not roomy)
    return 16 if few else 32, block_c, 8, 2 if tapped else 3


def share_tokens(tokens: int, block_t: int, strips: int, columns: int, device: torch.device) -> tuple[int, int]:
    """How many shares the tokens are cut into, and how many tokens a share has.

    The number of shares, up to 16, for which whole waves of programs are fullest, against what shares cost: a
    write and a read of 8 bytes a column each.
    """
    width = multiprocessors(device)

    def time(shares: int) -> float:
        programs = strips * shares
        return cdiv(programs, width) * width / programs * (1 + shares * columns / max(1, tokens))

    most = max(1, min(16, cdiv(tokens, 4 * block_t)))
    shares = min(range(1, most + 1), key=time)
    chunk = max(1, cdiv(cdiv(tokens, shares), block_t)) * block_t
    return max(1, cdiv(tokens, chunk)), chunk
