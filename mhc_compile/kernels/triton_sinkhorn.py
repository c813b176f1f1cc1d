"""Sinkhorn's iteration and its backward, on chip from the logits to the result.

The matrix of a token is held in one of two forms.  Up to four streams: a tuple of n n tensors [BLOCK_T], one
for each entry, so that a thread has whole tokens and no sum crosses threads.  Above: a tuple of one tensor
[BLOCK_T, NP, NP], NP the next power of two, with zeros where an index is not below n.  The functions that tell
the forms apart are at the top; everything else is written once.

Always ``M[i, j]`` with i the output stream: matrices in the other orientation (``TRANSPOSED``) are turned when
they are loaded and stored.  In this orientation both conventions are columns first, rows last::

    E = 0    exp, then R times: columns by their sums, rows by theirs                     (the paper)
    E > 0    softmax over columns + E, rows by (sum + E), then R - 1 times: columns by
             (sum + E), rows by (sum + E)                                                 (DeepSeek-V4, transposed)
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.errors import ShapeError, wrong
from mhc_compile.kernels.convention import check_iterations
from mhc_compile.kernels.triton_launch import MAX_STREAMS, cdiv, check, check_device, jit, lanes, launch, power_of_two
from mhc_compile.kernels.triton_tiles import nothing

COLUMNS = tl.constexpr(0)  # normalise columns: sum over i
ROWS = tl.constexpr(1)

# The backward replays the iterations from the nearest of this many states that the forward leaves in registers.
SEGMENTS = tl.constexpr(4)


# --- the two forms of a matrix ----------------------------------------------------------------------------


@jit
def load_matrix(
    a: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    outside: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> tl.tensor:
    """The matrices of some tokens, STRIDE apart in a; ``outside`` in what is padding."""
    if N <= 4:
        m = nothing()
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                m += (tl.load(a + rows * STRIDE + (j * N + i if TRANSPOSED else i * N + j), mask=valid, other=0.0),)
        return m
    else:
        offsets, inside = _entries(N, NP, TRANSPOSED)
        m = tl.load(a + rows[:, None, None] * STRIDE + offsets, mask=valid[:, None, None] & inside, other=0.0)
        return (tl.where(inside, m, outside),)


@jit
def store_matrix(
    a: tl.tensor,
    m: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> None:
    if N <= 4:
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                tl.store(a + rows * STRIDE + (j * N + i if TRANSPOSED else i * N + j), m[i * N + j], mask=valid)
    else:
        offsets, inside = _entries(N, NP, TRANSPOSED)
        tl.store(a + rows[:, None, None] * STRIDE + offsets, m[0], mask=valid[:, None, None] & inside)


@jit
def _entries(N: tl.constexpr, NP: tl.constexpr, TRANSPOSED: tl.constexpr) -> tl.tensor:
    """Where the entries of a matrix are in memory, and which of them are not padding: [1, NP, NP] both."""
    i = tl.arange(0, NP)[None, :, None]
    j = tl.arange(0, NP)[None, None, :]
    return j * N + i if TRANSPOSED else i * N + j, (i < N) & (j < N)


@jit
def _sums(m: tl.tensor, AXIS: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """The sums of columns or of rows: N tensors [BLOCK_T], or one that broadcasts against the matrix."""
    if N <= 4:
        sums = nothing()
        for a in tl.static_range(N):
            total = m[a if AXIS == COLUMNS else a * N]
            for b in tl.static_range(1, N):
                total += m[b * N + a if AXIS == COLUMNS else a * N + b]
            sums += (total,)
        return sums
    else:
        return (tl.sum(m[0], 1 + AXIS, keep_dims=True),)


@jit
def _largest(m: tl.tensor, AXIS: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """As _sums; 0 for a column or row of padding."""
    if N <= 4:
        maxima = nothing()
        for a in tl.static_range(N):
            most = m[a if AXIS == COLUMNS else a * N]
            for b in tl.static_range(1, N):
                most = tl.maximum(most, m[b * N + a if AXIS == COLUMNS else a * N + b])
            maxima += (most,)
        return maxima
    else:
        most = tl.max(m[0], 1 + AXIS, keep_dims=True)
        inside = tl.arange(0, m[0].shape[2 - AXIS]) < N
        return (tl.where(inside[None, None, :] if AXIS == COLUMNS else inside[None, :, None], most, 0.0),)


@jit
def _of(vector: tl.tensor, e: tl.constexpr, AXIS: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """What belongs to entry ``e`` of the matrix in one value a column, or a row."""
    if N <= 4:
        return vector[e % N if AXIS == COLUMNS else e // N]
    else:
        return vector[0]


# --- one step ---------------------------------------------------------------------------------------------


@jit
def _normalised(m: tl.tensor, AXIS: tl.constexpr, E: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Columns or rows divided by their sums plus E."""
    sums = _sums(m, AXIS, N)
    inverses = nothing()
    for a in tl.static_range(len(sums)):
        divisor = sums[a] + E
        # Zero in padding alone: after the first iteration a divisor is in [1 / n^2, n].
        inverses += (1.0 / (divisor if N <= 4 else tl.where(divisor == 0.0, 1.0, divisor)),)
    out = nothing()
    for e in tl.static_range(len(m)):
        out += (m[e] * _of(inverses, e, AXIS, N),)
    return out


@jit
def _iterated(m: tl.tensor, E: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    return _normalised(_normalised(m, COLUMNS, E, N), ROWS, E, N)


@jit
def _log_normalised(a: tl.tensor, AXIS: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """The logarithm of exp(a) with its columns or rows divided by their sums, whatever the size of a."""
    most = _largest(a, AXIS, N)
    shifted = nothing()
    powers = nothing()
    for e in tl.static_range(len(a)):
        shifted += (a[e] - _of(most, e, AXIS, N),)
        powers += (tl.exp(shifted[e]),)
    sums = _sums(powers, AXIS, N)
    logs = nothing()
    for s in tl.static_range(len(sums)):
        logs += (tl.log(sums[s] if N <= 4 else tl.where(sums[s] == 0.0, 1.0, sums[s])),)
    out = nothing()
    for e in tl.static_range(len(a)):
        out += (shifted[e] - _of(logs, e, AXIS, N),)
    return out


@jit
def _exp(a: tl.tensor) -> tl.tensor:
    out = nothing()
    for e in tl.static_range(len(a)):
        out += (tl.exp(a[e]),)
    return out


@jit
def _first(a: tl.tensor, E: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """The matrices after the first half-step (columns) and the second (rows).

    The first shift has to be the maximum of the axis that is normalised first.  Without E both half-steps are
    taken in log space, where a row of tiny entries keeps its proportions.
    """
    logs = _log_normalised(a, COLUMNS, N)
    if E == 0.0:
        return _exp(logs), _exp(_log_normalised(logs, ROWS, N))
    else:
        softmax = _exp(logs)
        columns = nothing()
        for e in tl.static_range(len(softmax)):
            columns += ((softmax[e] + E if N <= 4 else tl.where(_inside(softmax[e], N), softmax[e] + E, 0.0)),)
        return columns, _normalised(columns, ROWS, E, N)


@jit
def _inside(m: tl.tensor, N: tl.constexpr) -> tl.tensor:
    index = tl.arange(0, m.shape[1]) < N
    return (index[:, None] & index[None, :])[None, :, :]


@jit
def _pulled(g: tl.tensor, p: tl.tensor, AXIS: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """``g - p * sum(g)``: from the gradient of log(p) to that of the log of what p was normalised from."""
    sums = _sums(g, AXIS, N)
    out = nothing()
    for e in tl.static_range(len(g)):
        out += (g[e] - p[e] * _of(sums, e, AXIS, N),)
    return out


# --- forward and backward ---------------------------------------------------------------------------------


@jit
def sinkhorn_of(a: tl.tensor, iterations: tl.tensor, E: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """The matrices that belong to the logits ``a``; ``iterations`` is at least 1."""
    m = _first(a, E, N)[1]
    for _ in range(iterations - 1):
        m = _iterated(m, E, N)
    return m


@jit
def sinkhorn_gradient(
    grad: tl.tensor, a: tl.tensor, iterations: tl.tensor, E: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    """The gradient of the logits ``a``.

    No matrix is kept but the states at the start of each segment.  Every other is computed again from the
    state before it, so that with 20 iterations each is computed three times on average.
    """
    columns, m = _first(a, E, N)
    first = m
    span = tl.maximum((iterations - 1 + SEGMENTS - 1) // SEGMENTS, 1)
    states = nothing()
    for s in tl.static_range(SEGMENTS):
        states += (m,)
        for _ in range(_length(s, span, iterations)):
            m = _iterated(m, E, N)
    g = nothing()
    for e in tl.static_range(len(m)):
        g += (grad[e] * m[e],)
    for back in range(iterations - 1):
        c = _normalised(_replayed(states, iterations - 2 - back, span, E, N), COLUMNS, E, N)
        g = _pulled(g, _normalised(c, ROWS, E, N), ROWS, N)
        g = _pulled(g, c, COLUMNS, N)
    g = _pulled(g, first, ROWS, N)
    return _softmax_gradient(g, columns, E, N)


@jit
def _chosen(condition: tl.tensor, a: tl.tensor, b: tl.tensor) -> tl.tensor:
    out = nothing()
    for e in tl.static_range(len(a)):
        out += (tl.where(condition, a[e], b[e]),)
    return out


@jit
def _replayed(states: tl.tensor, t: tl.tensor, span: tl.tensor, E: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """The matrix after t of the iterations that follow the first."""
    m = states[0]
    for s in tl.static_range(1, SEGMENTS):
        m = _chosen(t >= s * span, states[s], m)
    for _ in range(t % span):
        m = _iterated(m, E, N)
    return m


@jit
def _length(s: tl.constexpr, span: tl.tensor, iterations: tl.tensor) -> tl.tensor:
    """How many of the iterations after the first are in segment s."""
    return tl.minimum(span, tl.maximum(iterations - 1 - s * span, 0))


@jit
def _softmax_gradient(g: tl.tensor, columns: tl.tensor, E: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """From the gradient of log(columns) to that of the logits, where columns is their softmax + E."""
    if E == 0.0:
        return _pulled(g, columns, COLUMNS, N)
    else:
        softmax = nothing()
        scaled = nothing()
        for e in tl.static_range(len(g)):
            p = columns[e] - E
            share = p / (columns[e] if N <= 4 else tl.where(columns[e] == 0.0, 1.0, columns[e]))
            softmax += (p,)
            scaled += (g[e] * share,)
        return _pulled(scaled, softmax, COLUMNS, N)


@jit
def _sinkhorn(
    logits: tl.tensor,
    result: tl.tensor,
    tokens: tl.tensor,
    iterations: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    a = load_matrix(logits, rows, valid, float("-inf"), N, NP, N * N, TRANSPOSED)
    store_matrix(result, sinkhorn_of(a, iterations, E, N), rows, valid, N, NP, N * N, TRANSPOSED)


@jit
def _sinkhorn_backward(
    dresult: tl.tensor,
    logits: tl.tensor,
    dlogits: tl.tensor,
    tokens: tl.tensor,
    iterations: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    g = load_matrix(dresult, rows, valid, 0.0, N, NP, N * N, TRANSPOSED)
    a = load_matrix(logits, rows, valid, float("-inf"), N, NP, N * N, TRANSPOSED)
    store_matrix(dlogits, sinkhorn_gradient(g, a, iterations, E, N), rows, valid, N, NP, N * N, TRANSPOSED)


def sinkhorn(logits: Tensor, iterations: int, divisor_eps: float = 0.0, transposed: bool = False) -> Tensor:
    """Doubly stochastic matrices from logits [..., n, n], float32.

    With ``divisor_eps`` 0: exp, then ``iterations`` times columns and rows by their sums, where rows are the
    last but one axis (``transposed``: the last).  With ``divisor_eps`` e > 0: softmax over columns + e, rows by
    (sum + e), and so on; DeepSeek-V4 has ``transposed`` and e = 1e-6.  A token with a nan, with +inf, or with
    -inf in all of a row or column, is all nan; no other token is touched by it.
    """
    logits = check_logits(logits, iterations)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch(_sinkhorn, {"logits": logits}, {"result": out}, iterations, divisor_eps, transposed)
    return out


def sinkhorn_backward(
    grad: Tensor, logits: Tensor, iterations: int, divisor_eps: float = 0.0, transposed: bool = False
) -> Tensor:
    """The gradient of the logits, [..., n, n], from that of the result; the iterations are run again on chip."""
    logits = check_logits(logits, iterations)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad = check("grad", grad, "[..., n, n]", tuple(logits.shape), logits, torch.float32)
    _launch(
        _sinkhorn_backward, {"dresult": grad, "logits": logits}, {"dlogits": out}, iterations, divisor_eps, transposed
    )
    return out


def check_logits(logits: Tensor, iterations: int) -> Tensor:
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or not 1 <= logits.shape[-1] <= MAX_STREAMS:
        shape = list(logits.shape)
        step = "one square matrix a token"
        raise ShapeError(wrong("logits", shape, f"[..., n, n] with n in 1..{MAX_STREAMS}", step))
    check_iterations(iterations)
    check_device(logits, "logits")
    return check("logits", logits, "[..., n, n]", tuple(logits.shape), logits, torch.float32)


def matrix_tile(n: int, threads: int) -> tuple[int, int]:
    """NP, and how many tokens go to so many threads: one each up to n = 4, and 8 entries each above."""
    width = power_of_two(n)
    return width, threads if n <= 4 else max(1, threads * 8 // (width * width))


def _launch(
    kernel: object,
    reads: dict[str, Tensor],
    writes: dict[str, Tensor],
    iterations: int,
    divisor_eps: float,
    transposed: bool,
) -> None:
    logits = reads["logits"]
    n = logits.shape[-1]
    tokens = logits.numel() // (n * n)
    warps = 1 if n <= 4 else 4  # few tokens a program: the time is that of the iterations, not of the traffic
    width, block_t = matrix_tile(n, lanes() * warps)
    launch(
        kernel,
        (cdiv(tokens, block_t),),
        reads=reads,
        writes=writes,
        constants={
            "tokens": tokens,
            "iterations": iterations,
            "E": divisor_eps,
            "N": n,
            "NP": width,
            "TRANSPOSED": transposed,
            "BLOCK_T": block_t,
        },
        warps=warps,
    )
