"""A whole site on a CPU in C++: functions of ``site_plain`` and ``plain``, faster, of the same values.

Everything but the products of matrices, which stay torch's, is in ``cpu_site.cpp``: the coefficients, Sinkhorn forward
and backward, the aggregate, the merge, and what the streams get back. ``cpu_library`` compiles it once for each (n,
dtype of streams); conventions and sizes are arguments. A call costs what its arguments cost, some microseconds, so that
few tokens are no reason to go without it.

Runs below autograd, in the bodies of ops. ``site_plain`` and ``plain`` compute what is left: float64, n = 1 or n > 8,
and everything where compilation is switched off (``TORCHDYNAMO_DISABLE=1``) or has failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from ctypes import CDLL
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels import cpu_library, plain, site_plain
from mhc_compile.kernels.convention import Convention

MAX_STREAMS = 8  # n x n matrices of vectors: beyond, they are in no register and hardly in the first cache
CHUNK = 64  # tokens, as in cpu_site.cpp
FEW = 1 << 18  # multiplications with phi up to which a call of torch.mm is not worth it
ALONE = 1 << 15  # elements up to which threads are not worth their start; torch has the same number


def read(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, convention: Convention, aggregates: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mhc_compile.kernels.site_plain.read`."""
    bodies = _bodies(streams)
    if bodies is None:
        return site_plain.read(streams, phi, alpha, bias, convention, aggregates)
    *lead, n, features = streams.shape
    tokens, (width, columns) = math.prod(lead), phi.shape
    x = streams.contiguous()
    phi, few = phi.contiguous(), tokens * phi.numel() <= FEW
    made = None if few else _product_with_phi(x.view(tokens, width), phi)
    u = x.new_empty((*lead, features) if aggregates else 0)
    coefficients = plain.empty_coefficients(phi, lead, n, convention.groups)
    z, r = phi.new_empty((columns, *lead)), phi.new_empty(lead)
    given = (x, phi, made, alpha.contiguous(), bias.contiguous())
    tensors = (*given, u if aggregates else None, *coefficients, z, r)
    _run(bodies.mhc_read, tensors, _settings(convention), tokens, features, _threads(x))
    return u, *coefficients, z, r


def read_backward(
    grad_u: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    grad_merged: Tensor | None,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    post: Tensor,
    res: Tensor,
    z: Tensor,
    r: Tensor,
    convention: Convention,
    wants_streams: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mhc_compile.kernels.site_plain.read_backward`."""
    bodies = _bodies(streams)
    if bodies is None:
        grads = (grad_u, grad_pre, grad_post, grad_res, grad_merged)
        kept = (streams, phi, alpha, bias, pre, post, res, z, r)
        return site_plain.read_backward(*grads, *kept, convention, wants_streams)
    n, features = streams.shape[-2:]
    (width, columns), x = phi.shape, streams.contiguous()
    tokens = x.numel() // width
    du, dpre, dpost, dres, g = map(_dense, (grad_u, grad_pre, grad_post, grad_res, grad_merged))
    variant, sizes = (convention.transposed, convention.rounded), (tokens, features, _threads(x))
    matrix = None if convention.res == "none" else res
    dx = x.new_empty(streams.shape if wants_streams else (0,))
    dalpha, dbias = alpha.new_empty(alpha.shape), bias.new_empty(bias.shape)
    saved = (z.contiguous(), r.contiguous(), alpha.contiguous(), bias.contiguous())
    if tokens * phi.numel() <= FEW:
        dphi = phi.new_empty(phi.shape)
        results = (dx if wants_streams else None, dphi, dalpha, dbias)
        weights = (pre.contiguous(), _dense(matrix))
        tensors = (du, dpre, dpost, dres, g, x, phi.contiguous(), *saved, *weights, *results)
        _run(bodies.mhc_read_backward_few, tensors, _settings(convention), *variant, *sizes)
        return dx, dphi, dalpha, dbias
    dz, pull = phi.new_empty((tokens, columns)), phi.new_empty(tokens)
    shares = phi.new_empty((-(-tokens // CHUNK), 2, columns))
    through = (du, dpre, dpost, dres, x, *saved, dz, pull, dalpha, dbias, shares)
    _run(bodies.mhc_read_backward, through, _settings(convention), *sizes)
    rows = x.view(tokens, width)
    if wants_streams:
        given = (du, g, pre.contiguous(), _dense(matrix))
        per_token = [rows, *(None if one is None else one.view(tokens, -1) for one in given), pull]
        _write_streams(bodies, dx.view(tokens, width), per_token, dz, phi, (*variant, features))
    return dx, site_plain._projected(rows.view(tokens, n, features), dz.t(), phi), dalpha, dbias


def merge(
    streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None, transposed: bool = False, rounded: bool = False
) -> Tensor:
    """See :func:`mhc_compile.kernels.plain.merge`."""
    bodies = _bodies(streams)
    if bodies is None:
        return plain.merge(streams, f, post, res, transposed, rounded)
    x, branch = streams.contiguous(), f.to(streams.dtype).contiguous()
    merged = x.new_empty(x.shape)
    tensors = (x, branch, post.contiguous(), _dense(res), merged)
    _run(bodies.mhc_merge, tensors, transposed, rounded, *_sizes(x))
    return merged


def branch_backward(
    grad: Tensor, streams: Tensor, f: Tensor, post: Tensor, mix: str, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mhc_compile.kernels.plain.branch_backward`."""
    bodies = _bodies(streams)
    if bodies is None:
        return plain.branch_backward(grad, streams, f, post, mix, rounded)
    *lead, n, _features = streams.shape
    x, entries = streams.contiguous(), 0 if mix == "identity" else n
    df, dpost, dres = x.new_empty(f.shape), post.new_empty(post.shape), post.new_empty((*lead, entries, entries))
    given = (grad.contiguous(), x, f.to(x.dtype).contiguous(), post.contiguous())
    tensors = (*given, df, dpost, dres if entries else None)
    _run(bodies.mhc_branch_backward, tensors, mix == "transposed", rounded, *_sizes(x))
    return df.to(f.dtype), dpost, dres


def _bodies(streams: Tensor) -> CDLL | None:
    n = streams.shape[-2]
    if streams.dtype not in cpu_library.ELEMENTS or not 2 <= n <= MAX_STREAMS or not streams.numel():
        return None
    return cpu_library.library(n, streams.dtype)


_settings = cache(cpu_library.Settings.of)


def _run(body: Callable[..., None], tensors: Sequence[Tensor | None], *rest: Any) -> None:
    """Call with the addresses of tensors, which live until it returns: some are copies that nobody else holds."""
    body(*[None if one is None else one.data_ptr() for one in tensors], *rest)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _threads(x: Tensor) -> int:
    return 1 if x.numel() <= ALONE else torch.get_num_threads()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Tokens and features of streams [..., n, C], and the threads that go over them."""
    n, features = x.shape[-2:]
    return x.numel() // (n * features), features, _threads(x)


def _product_with_phi(x: Tensor, phi: Tensor) -> Tensor:
    """x [T, n C] times phi, in phi's dtype; of 16-bit streams only a tile is in memory in float32."""
    if x.dtype == phi.dtype:
        return plain._product(x, phi)
    z = phi.new_empty((len(x), phi.shape[1]))
    for t in plain._tiles(len(x), x):
        plain._product(x[t].to(phi.dtype), phi, out=z[t])
    return z


def _write_streams(
    bodies: CDLL,
    dx: Tensor,
    per_token: Sequence[Tensor | None],
    dz: Tensor,
    phi: Tensor,
    variant: tuple[bool, bool, int],
) -> None:
    """dX [T, n C]; ``per_token`` are x, du, G, pre, res and pull, each of T rows or None."""
    transposed, rounded, features = variant
    for t in plain._tiles(len(dx), dx):
        out = dx[t]
        wide = plain._product(dz[t], phi.t(), out=out if dx.dtype == phi.dtype else None)
        tensors = (out, wide, *(None if one is None else one[t] for one in per_token))
        _run(bodies.mhc_streams, tensors, transposed, rounded, len(out), features, _threads(out))
