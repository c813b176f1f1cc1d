"""The input of a branch, ``u = sum_i pre_i X_i``: X is read once, u written once."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.triton_launch import cdiv, check, check_streams, column_block, jit, lanes, launch
from mhc_compile.kernels.triton_tiles import load_streams, load_vector, store_rows, weighted_sum


@jit
def _aggregate(
    streams: tl.tensor,
    pre: tl.tensor,
    u: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    strips: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    rows = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (tl.program_id(0) % strips) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = rows < tokens
    mask = valid[:, None] & (columns < C)[None, :]
    weights = load_vector(pre, rows, valid, N)
    tiles = load_streams(streams, rows, columns, mask, N, C)
    store_rows(u, weighted_sum(weights, tiles, N), rows, columns, mask, C)


def aggregate(streams: Tensor, pre: Tensor) -> Tensor:
    """``u = sum_i pre_i X_i``: streams [..., n, C], pre [..., n] in float32 -> [..., C] in streams' dtype."""
    tokens, n, features = check_streams(streams)
    lead = tuple(streams.shape[:-2])
    u = torch.empty((*lead, features), dtype=streams.dtype, device=streams.device)
    block_t, block_c = aggregate_tile(n, features, streams.element_size())
    launch(
        _aggregate,
        (cdiv(tokens, block_t) * cdiv(features, block_c),),
        reads={
            "streams": streams.contiguous(),
            "pre": check("pre", pre, "[..., n]", (*lead, n), streams, torch.float32),
        },
        writes={"u": u},
        constants={"tokens": tokens, "N": n, "C": features, "BLOCK_T": block_t, "BLOCK_C": block_c},
    )
    return u


def aggregate_tile(n: int, features: int, size: int) -> tuple[int, int]:
    """BLOCK_T and BLOCK_C for four warps: 32 bytes a thread of each stream, 16 from n = 5 on."""
    elements = 4 * lanes() * (32 if n <= 4 else 16) // size
    block_c = column_block(features, min(elements, 512))
    return max(1, elements // block_c), block_c
