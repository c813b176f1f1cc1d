"""dphi and the gradients of alpha and bias: adding up shares in order, and, for many streams, the product itself.

Sums over tokens are never taken with atomics: each program of a launch writes the sum over its share of the tokens,
and one that follows adds the shares in their order.  So gradients are the same bits from run to run.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.triton_launch import cdiv, jit, launch, power_of_two
from mhc_compile.kernels.triton_project import float32_precision
from mhc_compile.kernels.triton_streams_backward import load_dz, share_tokens, times_streams


@jit
def _phi_shares(
    streams: tl.tensor,
    d: tl.tensor,
    z: tl.tensor,
    r: tl.tensor,
    alpha: tl.tensor,
    phi_shares: tl.tensor,
    sum_shares: tl.tensor,
    tokens: tl.tensor,
    chunk: tl.tensor,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A share of ``vec(X)^T dz``, for a block of its rows and a block of its columns."""
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    share = tl.program_id(2)
    leads = tl.program_id(0) == 0
    dphi = tl.zeros((BLOCK_K, BLOCK_W), tl.float32)
    bias_sum = tl.zeros((BLOCK_K,), tl.float32)
    scale_sum = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(share * chunk, tl.minimum((share + 1) * chunk, tokens), BLOCK_T):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)
        valid = rows < tokens
        dz, value = load_dz(d, r, alpha, rows, valid, k, N, K)
        mask = valid[:, None] & (w < WIDTH)[None, :]
        x = tl.load(streams + rows[:, None] * WIDTH + w[None, :], mask=mask, other=0.0)
        dphi = times_streams(dz, x, dphi, PRECISION)
        first = valid[:, None] & (k < K)[None, :] & leads
        z_tile = tl.load(z + k[None, :].to(tl.int64) * tokens + rows[:, None], mask=first, other=0.0)
        inverse = 1.0 / tl.load(r + rows, mask=valid, other=1.0)
        bias_sum += tl.sum(value, 0)
        scale_sum += tl.sum(value * z_tile * inverse[:, None], 0)
    out = phi_shares + share.to(tl.int64) * (K * WIDTH) + k[:, None] * WIDTH + w[None, :]
    tl.store(out, dphi, mask=(k < K)[:, None] & (w < WIDTH)[None, :])
    tl.store(sum_shares + share * (2 * K) + k, bias_sum, mask=(k < K) & leads)
    tl.store(sum_shares + share * (2 * K) + K + k, scale_sum, mask=(k < K) & leads)


def phi_shares(streams: Tensor, d: Tensor, z: Tensor, r: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of dphi [shares, K, n C] and of the sums for bias and alpha [shares, 2, K], from one more read of X."""
    n, features = streams.shape[-2:]
    tokens, columns = d.shape
    width = n * features
    block_t, block_w, block_k = 32, 64, min(64, max(16, power_of_two(columns)))
    blocks = cdiv(width, block_w) * cdiv(columns, block_k)
    shares, chunk = share_tokens(tokens, block_t, blocks, columns, streams.device)
    dphi = torch.empty((shares, columns, width), dtype=torch.float32, device=streams.device)
    sums = torch.empty((shares, 2, columns), dtype=torch.float32, device=streams.device)
    launch(
        _phi_shares,
        (cdiv(width, block_w), cdiv(columns, block_k), shares),
        reads={"streams": streams, "d": d, "z": z, "r": r, "alpha": alpha},
        writes={"phi_shares": dphi, "sum_shares": sums},
        constants={
            "tokens": tokens,
            "chunk": chunk,
            "N": n,
            "WIDTH": width,
            "K": columns,
            "PRECISION": float32_precision(),
            "BLOCK_T": block_t,
            "BLOCK_W": block_w,
            "BLOCK_K": block_k,
        },
        stages=3,
    )
    return dphi, sums


@jit
def _add_shares(
    phi_shares: tl.tensor,
    sum_shares: tl.tensor,
    dphi: tl.tensor,
    dalpha: tl.tensor,
    dbias: tl.tensor,
    shares: tl.tensor,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    GROUPS: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (k < K)[:, None] & (w < WIDTH)[None, :]
    places = k[:, None] * WIDTH + w[None, :]
    total = tl.zeros((BLOCK_K, BLOCK_W), tl.float32)
    for s in range(shares):
        total += tl.load(phi_shares + tl.cast(s, tl.int64) * (K * WIDTH) + places, mask=mask, other=0.0)
    tl.store(dphi + (places if TURNED else w[None, :] * K + k[:, None]), total, mask=mask)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        _add_sums(sum_shares, dalpha, dbias, shares, N, K, KP, GROUPS)


@jit
def _add_sums(
    sum_shares: tl.tensor,
    dalpha: tl.tensor,
    dbias: tl.tensor,
    shares: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    k = tl.arange(0, KP)
    bias_sum = tl.zeros((KP,), tl.float32)
    scale_sum = tl.zeros((KP,), tl.float32)
    for s in range(shares):
        bias_sum += tl.load(sum_shares + s * (2 * K) + k, mask=k < K, other=0.0)
        scale_sum += tl.load(sum_shares + s * (2 * K) + K + k, mask=k < K, other=0.0)
    tl.store(dbias + k, bias_sum, mask=k < K)
    group = (k >= N).to(tl.int32) + (k >= 2 * N).to(tl.int32)
    for g in tl.static_range(GROUPS):
        tl.store(dalpha + g, tl.sum(tl.where(group == g, scale_sum, 0.0), 0))


def add_shares(dphi: Tensor, sums: Tensor, n: int, groups: int, turned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dphi [n C, K], dalpha [groups] and dbias [K]; ``turned``: dphi is the transpose of a contiguous matrix."""
    shares, columns, width = dphi.shape

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=dphi.device)

    total = new(columns, width) if turned else new(width, columns)
    dalpha, dbias = new(groups), new(columns)
    block_k = min(64, max(16, power_of_two(columns)))
    launch(
        _add_shares,
        (cdiv(width, 64), cdiv(columns, block_k)),
        reads={"phi_shares": dphi, "sum_shares": sums},
        writes={"dphi": total, "dalpha": dalpha, "dbias": dbias},
        constants={
            "shares": shares,
            "N": n,
            "WIDTH": width,
            "K": columns,
            "KP": power_of_two(columns),
            "GROUPS": groups,
            "TURNED": turned,
            "BLOCK_W": 64,
            "BLOCK_K": block_k,
        },
    )
    return total.t() if turned else total, dalpha, dbias
