"""``z = vec(X) @ phi`` and the sum of squares of X in one pass over X: the first half of the coefficients.

phi is float32, and its products have to be better than bfloat16's.  It is packed once a call: turned to
[columns, n C], so that both operands of the product are read along n C, and, for 16-bit streams, split into two
bfloat16 halves, ``phi = high + low`` up to 2^-17.  The tensor cores then multiply what is in memory: bfloat16
streams by both halves; float16 streams are themselves split (exactly) and take three products; float32 streams
take "tf32x3".

The sum over n C is cut into splits, and a program writes its share.  Whoever reads the shares adds them in
order, so that results do not depend on which program was first.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.triton_launch import cdiv, jit, launch, multiprocessors, on_amd, power_of_two
from mhc_compile.kernels.triton_tiles import split


@jit
def _pack(
    phi: tl.tensor,
    packed: tl.tensor,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    TURNED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < WIDTH)[:, None] & (columns < K)[None, :]
    turned = columns[None, :] * WIDTH + rows[:, None]
    values = tl.load(phi + (turned if TURNED else rows[:, None] * K + columns[None, :]), mask=mask, other=0.0)
    if SPLIT:
        high, low = split(values)
        tl.store(packed + turned, high, mask=mask)
        tl.store(packed + K * WIDTH + turned, low, mask=mask)
    else:
        tl.store(packed + turned, values, mask=mask)


def pack(phi: Tensor, streams: Tensor) -> Tensor:
    """phi [n C, columns] as :func:`project` reads it: [parts, columns, n C], for streams of this dtype."""
    turned = phi.t().is_contiguous()
    width, columns = phi.shape
    halves = streams.dtype != torch.float32
    dtype = torch.bfloat16 if halves else torch.float32
    packed = torch.empty((1 + halves, columns, width), dtype=dtype, device=phi.device)
    block_k = min(64, power_of_two(columns))
    launch(
        _pack,
        (cdiv(width, 64), cdiv(columns, block_k)),
        reads={"phi": phi if turned else phi.contiguous()},
        writes={"packed": packed},
        constants={"WIDTH": width, "K": columns, "TURNED": turned, "SPLIT": halves, "BLOCK_W": 64, "BLOCK_K": block_k},
    )
    return packed


@jit
def add_product(
    z: tl.tensor,
    x: tl.tensor,
    phi: tl.tensor,
    columns: tl.tensor,
    w: tl.tensor,
    inside: tl.tensor,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    PACKED: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """``z + x @ phi`` for a tile x [T, w] of the streams as it is in memory; ``inside`` says which w there are."""
    mask = (columns < K)[:, None] & inside[None, :]
    turned = columns[:, None] * WIDTH + w[None, :]
    if PACKED or TURNED:
        high = tl.load(phi + turned, mask=mask, other=0.0)
    else:
        high = tl.load(phi + w[None, :] * K + columns[:, None], mask=mask, other=0.0)
    if x.dtype == tl.float32:
        return tl.dot(x, tl.trans(high), z, input_precision=PRECISION)
    else:
        if PACKED:
            low = tl.load(phi + K * WIDTH + turned, mask=mask, other=0.0)
        else:
            high, low = split(high)
        if x.dtype == tl.bfloat16:
            z = tl.dot(x, tl.trans(high), z)
            return tl.dot(x, tl.trans(low), z)
        else:
            x_high, x_low = split(x.to(tl.float32))
            z = tl.dot(x_high, tl.trans(high), z)
            z = tl.dot(x_high, tl.trans(low), z)
            return tl.dot(x_low, tl.trans(high), z)


@jit
def store_shares(
    z: tl.tensor,
    squares: tl.tensor,
    z_shares: tl.tensor,
    square_shares: tl.tensor,
    share: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
    K: tl.constexpr,
) -> None:
    share = share.to(tl.int64)
    places = z_shares + (share * K + columns[None, :]) * tokens + rows[:, None]
    tl.store(places, z, mask=valid[:, None] & (columns < K)[None, :])
    first = tl.program_id(2) == 0
    tl.store(square_shares + share * tokens + rows, tl.sum(squares, 1), mask=valid & first)


@jit
def _project(
    streams: tl.tensor,
    phi: tl.tensor,
    z_shares: tl.tensor,
    square_shares: tl.tensor,
    tokens: tl.tensor,
    chunk: tl.tensor,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    PACKED: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    share = tl.program_id(1)
    columns = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = rows < tokens
    z = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)  # summed over the tile at the end, once
    for start in range(share * chunk, tl.minimum((share + 1) * chunk, WIDTH), BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = w < WIDTH
        x = tl.load(streams + rows[:, None] * WIDTH + w[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        wide = x.to(tl.float32)
        squares += wide * wide
        z = add_product(z, x, phi, columns, w, inside, WIDTH, K, PACKED, TURNED, PRECISION)
    store_shares(z, squares, z_shares, square_shares, share, rows, columns, valid, tokens, K)


def operand(phi: Tensor, streams: Tensor, packed: Tensor | None) -> tuple[Tensor, bool, bool]:
    """phi as the product reads it, whether it is packed, and whether it is turned.

    It is packed, unless the tokens are so few that the launch for it would take longer than it saves.
    """
    tokens = streams.numel() // len(phi)
    if packed is not None or tokens > FEW:
        return pack(phi, streams) if packed is None else packed, True, False
    turned = phi.t().is_contiguous()
    return phi if turned else phi.contiguous(), False, turned


FEW = 16  # tokens, as in decoding


def project(streams: Tensor, phi: Tensor, packed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shares of z [splits, columns, T] and of the sum of squares [splits, T], both float32.

    streams [T, n C], contiguous; phi [n C, columns] or its transpose; packed from :func:`pack`, if it is at hand.
    """
    tokens, width = streams.shape
    columns = phi.shape[1]
    block_t, block_w, block_k, warps, stages = project_tile(tokens, columns, streams.dtype)
    tiles = cdiv(tokens, block_t) * cdiv(columns, block_k)
    # One wave of two programs a multiprocessor, but none with less than 8 steps: shares have traffic of their own.
    splits = max(1, min(2 * multiprocessors(streams.device) // max(1, tiles), width // (8 * block_w)))
    chunk = cdiv(cdiv(width, splits), block_w) * block_w
    splits = cdiv(width, chunk)
    z = torch.empty((splits, columns, tokens), dtype=torch.float32, device=streams.device)
    squares = torch.empty((splits, tokens), dtype=torch.float32, device=streams.device)
    weights, is_packed, turned = operand(phi, streams, packed)
    launch(
        _project,
        (cdiv(tokens, block_t), splits, cdiv(columns, block_k)),
        reads={"streams": streams, "phi": weights},
        writes={"z_shares": z, "square_shares": squares},
        constants={
            "tokens": tokens,
            "chunk": chunk,
            "WIDTH": width,
            "K": columns,
            "PACKED": is_packed,
            "TURNED": turned,
            "PRECISION": float32_precision(),
            "BLOCK_T": block_t,
            "BLOCK_W": block_w,
            "BLOCK_K": block_k,
        },
        warps=warps,
        stages=stages,
    )
    return z, squares


def float32_precision() -> str:
    """Of products of float32 operands: three TF32 products on NVIDIA, float32 itself on AMD."""
    return "ieee" if on_amd() else "tf32x3"


def project_tile(tokens: int, columns: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """BLOCK_T, BLOCK_W, BLOCK_K, warps and stages.

    Many tokens a program, as every program reads all of phi; few when there are few.
    """
    block_k = min(64, max(16, power_of_two(columns)))
    block_t, warps = (16, 4) if tokens <= FEW else (128, 8) if tokens >= 4096 and dtype == torch.bfloat16 else (64, 4)
    return block_t, 32 if dtype == torch.float32 else 64, block_k, warps, 2 if on_amd() else 4
