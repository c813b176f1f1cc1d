"""Second pass of a site's backward: from the gradients of the coefficients to those of their pre-activations.

dpost and dres come from the first pass; ``dpre_i = <du, X_i>`` is summed here, X and du being read once.  What is
written is d [T, columns], the gradient of the three pre-activations side by side, and the factor
``pull = <dz, z> / (r^2 n C)`` of the term ``- pull X`` of dX.

As in the forward, the first programs of the launch have one token a thread and take dpost and dres back through
the sigmoid and Sinkhorn; the others read streams for dpre.  So Sinkhorn's iterations run beside the memory traffic.
Each kind writes its own share of pull.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.errors import ConfigError, wrong
from mhc_compile.kernels.convention import Coefficients, Convention
from mhc_compile.kernels.triton_coefficients import (
    check_parameters,
    gate,
    logits_of,
    summed_matrix,
    z_columns,
)
from mhc_compile.kernels.triton_launch import cdiv, check, check_streams, column_block, jit, lanes, launch
from mhc_compile.kernels.triton_sinkhorn import load_matrix, matrix_tile, sinkhorn_gradient, store_matrix
from mhc_compile.kernels.triton_tiles import load_rows, load_vector, nothing, partial_products, row_sums, zeros


@jit
def _gate_backward(
    upstream: tl.tensor,
    z: tl.tensor,
    inverse: tl.tensor,
    alpha: tl.tensor,
    bias: tl.tensor,
    d: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
    GROUP: tl.constexpr,
    FACTOR: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """Through ``FACTOR sigmoid(...)``: writes N columns of d and returns their part of <dz, z> r."""
    scale = tl.load(alpha + GROUP)
    z_gate = z_columns(z, 0, GROUP * N, N, rows, valid, tokens, K)
    opened = gate(z_gate, inverse, scale, bias, GROUP * N, N)
    product = tl.zeros_like(inverse)
    for i in tl.static_range(N):
        d_i = upstream[i] * (opened[i] * (1.0 - opened[i]) * FACTOR)
        product += d_i * z_gate[i]
        tl.store(d + rows * K + (GROUP * N + i), d_i, mask=valid)
    return product * scale


@jit
def _res_backward(
    dres: tl.tensor,
    z: tl.tensor,
    inverse: tl.tensor,
    alpha: tl.tensor,
    bias: tl.tensor,
    d: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
    iterations: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    RES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    E: tl.constexpr,
) -> tl.tensor:
    """The same for res, through Sinkhorn unless res is the logits themselves."""
    scale = tl.load(alpha + 2)
    z_res = summed_matrix(z, 1, 2 * N, rows, valid, tokens, K, N, NP, TRANSPOSED)
    if RES == "sinkhorn":
        logits = logits_of(z_res, inverse, scale, bias, 2 * N, N, NP, TRANSPOSED)
        dres = sinkhorn_gradient(dres, logits, iterations, E, N)
    store_matrix(d + 2 * N, dres, rows, valid, N, NP, K, TRANSPOSED)
    if N <= 4:
        product = tl.zeros_like(inverse)
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                product += dres[i * N + j] * z_res[j * N + i if TRANSPOSED else i * N + j]
        return product * scale
    else:
        return tl.sum(tl.sum(dres[0] * z_res[0], 2), 1) * scale  # both are 0 in padding


@jit
def _given_backward(
    rows: tl.tensor,
    grad_pre: tl.tensor,
    grad_post: tl.tensor,
    grad_res: tl.tensor,
    z: tl.tensor,
    r: tl.tensor,
    alpha: tl.tensor,
    bias: tl.tensor,
    d: tl.tensor,
    pull: tl.tensor,
    tokens: tl.tensor,
    iterations: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    RES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    E: tl.constexpr,
    POST_SCALE: tl.constexpr,
) -> None:
    """The columns of d whose gradients of coefficients are given, a token a thread."""
    valid = rows < tokens
    inverse = 1.0 / tl.load(r + rows, mask=valid, other=1.0)
    product = tl.zeros_like(inverse)
    if grad_pre is not None:
        dpre = load_vector(grad_pre, rows, valid, N)
        product += _gate_backward(dpre, z, inverse, alpha, bias, d, rows, valid, tokens, 0, 1.0, N, K)
    if grad_post is not None:
        dpost = load_vector(grad_post, rows, valid, N)
        product += _gate_backward(dpost, z, inverse, alpha, bias, d, rows, valid, tokens, 1, POST_SCALE, N, K)
    if grad_res is not None:
        dres = load_matrix(grad_res, rows, valid, 0.0, N, NP, N * N, TRANSPOSED)
        product += _res_backward(
            dres, z, inverse, alpha, bias, d, rows, valid, tokens, iterations, N, NP, K, RES, TRANSPOSED, E
        )
    tl.store(pull + rows, product * inverse * inverse * inverse / (N * C), mask=valid)


@jit
def _pre_backward(
    rows: tl.tensor,
    du: tl.tensor,
    streams: tl.tensor,
    grad_pre: tl.tensor,
    z: tl.tensor,
    r: tl.tensor,
    alpha: tl.tensor,
    bias: tl.tensor,
    d: tl.tensor,
    pull: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_C: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """The columns of d that belong to pre, from du and the streams."""
    valid = rows < tokens
    sums = zeros(N, TILE_T, TILE_C // VECTOR)
    for start in range(0, C, TILE_C):
        columns = start + tl.arange(0, TILE_C)
        mask = valid[:, None] & (columns < C)[None, :]
        g = load_rows(du, rows, columns, mask, C)
        more = nothing()
        for i in tl.static_range(N):
            x = load_rows(streams + i * C, rows, columns, mask, N * C)
            more += (sums[i] + partial_products(g, x, VECTOR),)
        sums = more
    dpre = row_sums(sums)
    if grad_pre is not None:
        given = load_vector(grad_pre, rows, valid, N)
        both = nothing()
        for i in tl.static_range(N):
            both += (dpre[i] + given[i],)
        dpre = both
    inverse = 1.0 / tl.load(r + rows, mask=valid, other=1.0)
    product = _gate_backward(dpre, z, inverse, alpha, bias, d, rows, valid, tokens, 0, 1.0, N, K)
    tl.store(pull + rows, product * inverse * inverse * inverse / (N * C), mask=valid)


@jit
def _coefficients_backward(
    du: tl.tensor,
    streams: tl.tensor,
    grad_pre: tl.tensor,
    grad_post: tl.tensor,
    grad_res: tl.tensor,
    z: tl.tensor,
    r: tl.tensor,
    alpha: tl.tensor,
    bias: tl.tensor,
    d: tl.tensor,
    pull: tl.tensor,
    tokens: tl.tensor,
    iterations: tl.tensor,
    given_programs: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    RES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    E: tl.constexpr,
    POST_SCALE: tl.constexpr,
    PRE_SHARE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_C: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if program < given_programs:
        _given_backward(
            program.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T),
            grad_pre if du is None else None,
            grad_post,
            grad_res,
            z,
            r,
            alpha,
            bias,
            d,
            pull,
            tokens,
            iterations,
            N,
            C,
            NP,
            K,
            RES,
            TRANSPOSED,
            E,
            POST_SCALE,
        )
    elif du is not None:
        _pre_backward(
            (program - given_programs).to(tl.int64) * TILE_T + tl.arange(0, TILE_T),
            du,
            streams,
            grad_pre,
            z,
            r,
            alpha,
            bias,
            d,
            pull + PRE_SHARE * tokens,
            tokens,
            N,
            C,
            K,
            TILE_T,
            TILE_C,
            VECTOR,
        )


def coefficients_backward(
    streams: Tensor,
    du: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    parameters: tuple[Tensor, Tensor, Tensor],
    site: Coefficients,
    convention: Convention,
) -> tuple[Tensor, Tensor]:
    """d [T, columns], the gradient of the pre-activations, and shares of pull [1 or 2, T]; both float32.

    ``du`` [..., C] is the gradient of the branch's input.  ``grad_pre``, ``grad_post`` [..., n] and ``grad_res``
    [..., n, n] are those of the coefficients: grad_post and grad_res as ``merge_backward`` gives them, grad_pre from
    whatever else reads pre (it is added to what du gives).  Any of them may be None, which is zero.
    ``parameters`` are phi, alpha and bias; ``site`` is what ``read`` kept.
    """
    tokens, n, features = check_streams(streams)
    lead, columns = tuple(streams.shape[:-2]), convention.columns(n)
    alpha, bias = check_parameters(streams, *parameters, convention)
    _check_present("grad_post", grad_post, convention.post)
    _check_present("grad_res", grad_res, convention.res != "none")

    def optional(name: str, tensor: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        if tensor is None:
            return None
        return check(name, tensor, "the shape of what it is the gradient of", (*lead, *shape), streams, dtype)

    reads = {
        "du": optional("du", du, features, dtype=streams.dtype),
        "streams": None if du is None else streams.contiguous(),
        "grad_pre": optional("grad_pre", grad_pre, n),
        "grad_post": optional("grad_post", grad_post, n),
        "grad_res": optional("grad_res", grad_res, n, n),
    }
    given = grad_post is not None or grad_res is not None or du is None
    complete = du is not None or grad_pre is not None
    complete &= (grad_post is not None or not convention.post) and (grad_res is not None or convention.res == "none")
    # The kernel leaves out the columns that no gradient reaches.
    d = (torch.empty if complete else torch.zeros)((tokens, columns), dtype=torch.float32, device=streams.device)
    pull = torch.empty((given + (du is not None), tokens), dtype=torch.float32, device=streams.device)
    width, block_t = matrix_tile(n, 4 * lanes())
    tile_t, tile_c, vector = pre_backward_tile(features, streams.element_size())
    given_programs = cdiv(tokens, block_t) if given else 0
    launch(
        _coefficients_backward,
        (given_programs + (0 if du is None else cdiv(tokens, tile_t)),),
        reads={**reads, "z": site.z, "r": site.r, "alpha": alpha, "bias": bias},
        writes={"d": d, "pull": pull},
        constants={
            "tokens": tokens,
            "iterations": convention.iterations,
            "given_programs": given_programs,
            "N": n,
            "C": features,
            "NP": width,
            "K": columns,
            "RES": convention.res,
            "TRANSPOSED": convention.rows_first,
            "E": convention.divisor_eps,
            "POST_SCALE": convention.post_scale,
            "PRE_SHARE": int(given),
            "BLOCK_T": block_t,
            "TILE_T": tile_t,
            "TILE_C": tile_c,
            "VECTOR": vector,
        },
    )
    return d, pull


def _check_present(name: str, grad: Tensor | None, legal: bool) -> None:
    if grad is not None and not legal:
        raise ConfigError(wrong(name, "a tensor", "None, as this convention has no such coefficient", "pass None"))


def pre_backward_tile(features: int, size: int) -> tuple[int, int, int]:
    """TILE_T, TILE_C and VECTOR for four warps: 32 bytes a thread of each stream.

    Twice what the forward takes: the registers of Sinkhorn's backward leave room for few programs at a time.
    """
    vector = 16 // size
    tile_c = column_block(features, lanes() * vector)
    return 8 * lanes() * vector // tile_c, tile_c, vector
