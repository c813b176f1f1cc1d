"""What kernels share: reading and writing streams and coefficients, a tile of tokens at a time.

Everything here is inlined into kernels.  A tile of the streams is a tuple of n two-dimensional tensors,
[BLOCK_T, BLOCK_C] each; a coefficient is a tuple of [BLOCK_T] tensors, one for each stream.  All arithmetic is
in float32: 16-bit values are widened where they are loaded.
"""

from __future__ import annotations

import triton.language as tl

from mhc_compile.kernels.triton_launch import jit


@jit
def nothing() -> tl.tensor:
    """The empty tuple, to collect in."""
    return ()


@jit
def rounded(x: tl.tensor, like: tl.tensor, ROUND: tl.constexpr) -> tl.tensor:
    """``x``, as it would be after a cast to the dtype of the pointer ``like``; x itself unless ROUND."""
    if ROUND:
        return x.to(like.dtype.element_ty).to(tl.float32)
    else:
        return x


@jit
def load_rows(x: tl.tensor, rows: tl.tensor, columns: tl.tensor, mask: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """A tile of the matrix x [T, WIDTH], in float32."""
    return tl.load(x + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def store_rows(
    x: tl.tensor, value: tl.tensor, rows: tl.tensor, columns: tl.tensor, mask: tl.tensor, WIDTH: tl.constexpr
) -> None:
    tl.store(x + rows[:, None] * WIDTH + columns[None, :], value.to(x.dtype.element_ty), mask=mask)


@jit
def load_streams(
    x: tl.tensor, rows: tl.tensor, columns: tl.tensor, mask: tl.tensor, N: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """A tile of each of the N streams of x [T, N, C]."""
    tiles = nothing()
    for i in tl.static_range(N):
        tiles += (load_rows(x + i * C, rows, columns, mask, N * C),)
    return tiles


@jit
def load_vector(w: tl.tensor, rows: tl.tensor, valid: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """The N coefficients of each token, from w [T, N]."""
    values = nothing()
    for i in tl.static_range(N):
        values += (tl.load(w + rows * N + i, mask=valid, other=0.0),)
    return values


@jit
def store_vector(w: tl.tensor, values: tl.tensor, rows: tl.tensor, valid: tl.tensor, N: tl.constexpr) -> None:
    for i in tl.static_range(N):
        tl.store(w + rows * N + i, values[i], mask=valid)


@jit
def weighted_sum(weights: tl.tensor, tiles: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """``sum_i weights_i tiles_i``.  The sum starts from its first term, and so keeps the sign of a zero."""
    total = weights[0][:, None] * tiles[0]
    for i in tl.static_range(1, N):
        total += weights[i][:, None] * tiles[i]
    return total


@jit
def split(x: tl.tensor) -> tl.tensor:
    """float32 as the sum of two bfloat16: right to 2^-17, and exact for what has 16 bits or fewer."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@jit
def partial_products(a: tl.tensor, b: tl.tensor, VECTOR: tl.constexpr) -> tl.tensor:
    """``a * b`` [T, C], summed over VECTOR neighbouring columns: [T, C / VECTOR].

    A thread holds such neighbours, so this takes no traffic between threads, and an eighth of the registers
    that an accumulator of the size of the tile would take.
    """
    rows: tl.constexpr = a.shape[0]
    groups: tl.constexpr = a.shape[1] // VECTOR
    return tl.sum(tl.reshape(a * b, (rows, groups, VECTOR)), 2)


@jit
def zeros(count: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr) -> tl.tensor:
    """Accumulators for :func:`partial_products`."""
    values = nothing()
    for _ in tl.static_range(count):
        values += (tl.zeros((rows, columns), tl.float32),)
    return values


@jit
def row_sums(values: tl.tensor) -> tl.tensor:
    sums = nothing()
    for e in tl.static_range(len(values)):
        sums += (tl.sum(values[e], 1),)
    return sums
