"""The residual update of a site, ``X'_i = sum_j res_ij X_j + post_i f``: X and f are read once, X' written once."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.errors import ConfigError, wrong
from mhc_compile.kernels.triton_launch import (
    STREAM_DTYPES,
    cdiv,
    check,
    check_streams,
    column_block,
    jit,
    lanes,
    launch,
)
from mhc_compile.kernels.triton_tiles import load_rows, load_streams, rounded, store_rows

# How the streams are mixed: not at all, by the identity, by res[out, in], or by res[in, out].
MIXES = ("none", "identity", "given", "transposed")


@jit
def mixing_weight(
    res: tl.tensor, rows: tl.tensor, valid: tl.tensor, i: tl.tensor, j: tl.tensor, N: tl.constexpr, MIX: tl.constexpr
) -> tl.tensor:
    """What stream j gives to stream i of the result."""
    if MIX == "transposed":
        return tl.load(res + rows * (N * N) + (j * N + i), mask=valid, other=0.0)
    else:
        return tl.load(res + rows * (N * N) + (i * N + j), mask=valid, other=0.0)


@jit
def mixed_stream(
    tiles: tl.tensor,
    streams: tl.tensor,
    res: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    i: tl.tensor,
    N: tl.constexpr,
    MIX: tl.constexpr,
    ROUND: tl.constexpr,
) -> tl.tensor:
    """``sum_j res_ij X_j``."""
    if MIX == "identity":
        return tiles[i]
    else:
        mixed = rounded(mixing_weight(res, rows, valid, i, 0, N, MIX), streams, ROUND)[:, None] * tiles[0]
        for j in tl.static_range(1, N):
            mixed += rounded(mixing_weight(res, rows, valid, i, j, N, MIX), streams, ROUND)[:, None] * tiles[j]
        return mixed


@jit
def _merge(
    streams: tl.tensor,
    f: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    merged: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    MIX: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    # Neighbouring programs work on neighbouring columns of the same tokens.
    strips: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    rows = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (tl.program_id(0) % strips) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = rows < tokens
    mask = valid[:, None] & (columns < C)[None, :]
    tiles = load_streams(streams, rows, columns, mask, N, C)
    branch = load_rows(f, rows, columns, mask, C)
    if N <= 4 or MIX == "identity":
        for i in tl.static_range(N):
            gain = rounded(tl.load(post + rows * N + i, mask=valid, other=0.0), streams, ROUND)
            mixed = mixed_stream(tiles, streams, res, rows, valid, i, N, MIX, ROUND) + gain[:, None] * branch
            store_rows(merged + i * C, mixed, rows, columns, mask, N * C)
    else:  # n n unrolled products would take half a minute to compile at n = 16
        for i in range(N):
            gain = rounded(tl.load(post + rows * N + i, mask=valid, other=0.0), streams, ROUND)
            mixed = mixed_stream(tiles, streams, res, rows, valid, i, N, MIX, ROUND) + gain[:, None] * branch
            store_rows(merged + i * C, mixed, rows, columns, mask, N * C)


def check_mix(mix: str, legal: tuple[str, ...]) -> None:
    if mix not in legal:
        raise ConfigError(wrong("mix", repr(mix), ", ".join(map(repr, legal)), "Convention.mix says which"))


def check_res(res: Tensor | None, mix: str, lead: tuple[int, ...], n: int, streams: Tensor) -> Tensor | None:
    """res, contiguous, for a mix that needs one; None for the identity."""
    check_mix(mix, MIXES[1:])
    if mix == "identity":
        return None
    if res is None:
        raise ConfigError(wrong("res", None, "a tensor [..., n, n]", "pass mix='identity' to leave streams unmixed"))
    return check("res", res, "[..., n, n]", (*lead, n, n), streams, torch.float32)


def merge(
    streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None, mix: str = "given", rounds: bool = False
) -> Tensor:
    """``X'_i = sum_j res_ij X_j + post_i f``, rounded once, to streams' dtype.

    streams [..., n, C]; f [..., C], of streams' dtype or one that promotes to it; post [..., n] and
    res [..., n, n], float32.  ``mix`` says what res is: "given" [out, in], "transposed" [in, out], or "identity"
    (res is not read).  With ``rounds`` post and res are first rounded to streams' dtype.
    """
    tokens, n, features = check_streams(streams)
    lead = tuple(streams.shape[:-2])
    res = check_res(res, mix, lead, n, streams)
    narrower = [d for d in STREAM_DTYPES if torch.promote_types(d, streams.dtype) == streams.dtype]
    merged = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    block_t, block_c = merge_tile(n, features, streams.element_size())
    launch(
        _merge,
        (cdiv(tokens, block_t) * cdiv(features, block_c),),
        reads={
            "streams": streams.contiguous(),
            "f": check("f", f, "[..., C]", (*lead, features), streams, *narrower),
            "post": check("post", post, "[..., n]", (*lead, n), streams, torch.float32),
            "res": res,
        },
        writes={"merged": merged},
        constants={
            "tokens": tokens,
            "N": n,
            "C": features,
            "MIX": mix,
            "ROUND": rounds and streams.dtype != torch.float32,
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
        },
    )
    return merged


def merge_tile(n: int, features: int, size: int) -> tuple[int, int]:
    """BLOCK_T and BLOCK_C for four warps: 16 bytes a thread of each stream, 8 from n = 5 on."""
    elements = 4 * lanes() * (16 if n <= 4 else 8) // size
    block_c = column_block(features, min(elements, 256))
    return max(1, elements // block_c), block_c
