"""dX for more than four streams, whose phi is too wide to keep on chip: a tile of dX a program, and nothing else."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.triton_launch import cdiv, column_block, jit, launch, power_of_two
from mhc_compile.kernels.triton_project import float32_precision
from mhc_compile.kernels.triton_streams_backward import direct_gradient, load_dz, load_pull, times_phi


@jit
def _wide_backward(
    grad: tl.tensor,
    du: tl.tensor,
    streams: tl.tensor,
    pre: tl.tensor,
    res: tl.tensor,
    d: tl.tensor,
    pull: tl.tensor,
    r: tl.tensor,
    alpha: tl.tensor,
    packed: tl.tensor,
    dx: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    PULLS: tl.constexpr,
    MIX: tl.constexpr,
    ROUND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    strips: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    strip = tl.program_id(0) % strips
    rows = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    column = strip * BLOCK_C + tl.arange(0, NP * BLOCK_C) % BLOCK_C
    stream = tl.arange(0, NP * BLOCK_C) // BLOCK_C
    places = stream * C + column
    inside = (column < C) & (stream < N)
    mask = valid[:, None] & inside[None, :]
    total = tl.zeros((BLOCK_T, NP * BLOCK_C), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        dz, _ = load_dz(d, r, alpha, rows, valid, k, N, K)
        phi_mask = (k < K)[:, None] & inside[None, :]
        phi = tl.load(packed + k[:, None] * (N * C) + places[None, :], mask=phi_mask, other=0.0)
        phi_low = phi
        if streams.dtype.element_ty != tl.float32:
            phi_low = tl.load(packed + K * N * C + k[:, None] * (N * C) + places[None, :], mask=phi_mask, other=0.0)
        total = times_phi(dz, phi, phi_low, total, PRECISION)
    x = tl.load(streams + rows[:, None] * (N * C) + places[None, :], mask=mask, other=0.0)
    total -= load_pull(pull, rows, valid, tokens, PULLS)[:, None] * x.to(tl.float32)
    total = direct_gradient(
        grad, du, streams, pre, res, rows, strip, valid, total, N, NP, C, MIX, ROUND, BLOCK_T, BLOCK_C
    )
    if MIX == "identity":
        g = tl.load(grad + rows[:, None] * (N * C) + places[None, :], mask=mask, other=0.0)
        total += g.to(tl.float32)
    tl.store(dx + rows[:, None] * (N * C) + places[None, :], total.to(dx.dtype.element_ty), mask=mask)


def wide_backward(reads: dict[str, Tensor | None], mix: str, rounds: bool) -> Tensor:
    """dX; arguments as for :func:`~mhc_compile.kernels.triton_streams_backward.streams_backward`, without z."""
    streams, d, pull = reads["streams"], reads["d"], reads["pull"]
    assert streams is not None and d is not None and pull is not None
    n, features = streams.shape[-2:]
    tokens, columns = d.shape
    width = power_of_two(n)
    block_t, block_c = 32, column_block(features, max(16, 128 // width))
    dx = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    launch(
        _wide_backward,
        (cdiv(tokens, block_t) * cdiv(features, block_c),),
        reads=reads,
        writes={"dx": dx},
        constants={
            "tokens": tokens,
            "N": n,
            "NP": width,
            "C": features,
            "K": columns,
            "PULLS": len(pull),
            "MIX": mix if reads["grad"] is not None else "none",
            "ROUND": rounds and streams.dtype != torch.float32,
            "PRECISION": float32_precision(),
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
            "BLOCK_K": 32,
        },
        warps=8,
        stages=3,
    )
    return dx
