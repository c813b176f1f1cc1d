"""A whole site in plain torch, forward and backward by formula: what ``site_ops`` runs without kernels of its own.

Beside :mod:`~mhc_compile.kernels.plain`, which has one function for each term of the paper: here the streams are read
once for all that a branch needs, and everything that they get back from their site is written at once.  What is per
token has tokens innermost: ``z`` is [n n + 2 n, T], matrices are [n, n, T].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mhc_compile.kernels import plain, plain_sinkhorn
from mhc_compile.kernels.convention import Convention


def read(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, convention: Convention, aggregates: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, pre, post and res, and for the backward ``z = vec(X) @ phi`` [columns, ...] and r [...].

    Unless it ``aggregates``, u is empty.
    """
    *lead, n, features = streams.shape
    tokens, (width, columns) = math.prod(lead), phi.shape
    x = streams.reshape(tokens, width)
    u = streams.new_empty((*lead, features) if aggregates else 0)
    pre, post, res = plain.empty_coefficients(phi, lead, n, convention.groups)
    z, r = phi.new_empty((columns, *lead)), phi.new_empty(lead)
    z_t, r_t, pre_t, u_t = z.view(columns, tokens), r.view(tokens), pre.view(tokens, n), u.view(-1, 1, features)
    scale = plain.per_column(alpha, n)
    for t in plain._tiles(tokens, streams):
        xt = x[t].to(phi.dtype)
        zt, rt = plain._project(xt, phi, convention.rms_eps)
        z_t[:, t].copy_(zt.t())
        r_t[t].copy_(rt[:, 0])
        torch.sigmoid(torch.addcmul(bias[:n], zt[:, :n] / rt, scale[:n]), out=pre_t[t]).add_(convention.pre_eps)
        if aggregates:
            plain._mix(pre_t[t].unsqueeze(1), xt.view(-1, n, features), u_t[t])
    if convention.post:
        rest = _logits(z_t[n:], r_t, scale[n:], bias[n:])
        opened = rest[:n].sigmoid_().mul_(convention.post_scale).add_(convention.post_eps)
        post.view(tokens, n).copy_(opened.t())
        if convention.res != "none":
            _sinkhorn(rest[n:].view(n, n, tokens), convention, res.view(tokens, n * n))
    return u, pre, post, res, z, r


merge = plain.merge
branch_backward = plain.branch_backward


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
    """Gradients of streams (empty unless ``wants_streams``), phi, alpha and bias.

    ``grad_merged`` is G, the gradient of the merged streams.  With ``dpre_i = <du, X_i>`` beside what others send to
    pre, and dz as in ``plain.coefficients_backward``::

        dX_j = sum_i res_ij G_i + pre_j du + (dz @ phi^T)_j - X_j <dz, z> / (r^2 n C)      dphi = vec(X)^T dz
    """
    *lead, n, features = streams.shape
    tokens, columns = math.prod(lead), phi.shape[1]
    x = streams.reshape(tokens, n, features)
    du = None if grad_u is None else grad_u.reshape(tokens, 1, features)
    g = None if grad_merged is None else grad_merged.reshape(tokens, n, features)
    z, r = z.reshape(columns, tokens), r.reshape(tokens)
    d, sizes = z.new_zeros((columns, tokens)), (n, n, n * n)[: convention.groups]
    for part, grad in zip(d.split_with_sizes(sizes), (grad_pre, grad_post, grad_res), strict=False):
        if grad is not None:
            part.copy_(grad.reshape(tokens, -1 if tokens else len(part)).t())
    if du is not None:
        _add_products(d[:n], x, du)
    dalpha, dbias = _through_gates(d, z, r, alpha, bias, n, convention, grad_res is not None)
    dz = d.mul_(plain.per_column(alpha, n).unsqueeze(1))
    pull = (dz * z).sum(0).div_(r * r * (n * features))
    dx = streams.new_empty(streams.shape if wants_streams else (0,))
    if wants_streams:
        matrix = None if convention.res == "none" else res
        _, mix = plain.merge_weights(streams, pre, matrix, convention.transposed, convention.rounded)
        weights = pre.reshape(tokens, n, 1), None if mix is None else mix.transpose(1, 2)
        _write_streams(dx.view(tokens, n, features), x, du, g, weights, dz, pull, phi)
    return dx, _projected(x, dz, phi), dalpha, dbias


def _through_gates(
    d: Tensor, z: Tensor, r: Tensor, alpha: Tensor, bias: Tensor, n: int, convention: Convention, has_res: bool
) -> tuple[Tensor, Tensor]:
    """Turn d [columns, T], the gradients of the coefficients, into dz / alpha in place; dalpha and dbias."""
    gates = min(convention.groups, 2) * n
    a = _logits(z, r, plain.per_column(alpha, n), bias)
    s = a[:gates].sigmoid_()
    d[:gates].mul_(s * (1 - s))
    d[n:gates].mul_(convention.post_scale)
    if has_res:
        _sinkhorn_backward(d[gates:].view(n, n, -1), a[gates:].view(n, n, -1), convention)
    dbias = d.sum(1)
    d.div_(r)
    return plain.per_group((d * z).sum(1), n, convention.groups), dbias


# --- the passes of read's backward ------------------------------------------------------------------------


def _add_products(dpre: Tensor, x: Tensor, du: Tensor) -> None:
    """Add ``<du, X_i>`` to dpre [n, T]."""
    for t in plain._tiles(len(x), x):
        products = plain._batched_product(x[t].to(dpre.dtype), du[t].to(dpre.dtype).transpose(1, 2))
        dpre[:, t].add_(products.squeeze(2).t())


def _write_streams(
    dx: Tensor,
    x: Tensor,
    du: Tensor | None,
    g: Tensor | None,
    weights: tuple[Tensor, Tensor | None],
    dz: Tensor,
    pull: Tensor,
    phi: Tensor,
) -> None:
    """dX [T, n, C] from all that has a part in it; ``weights`` are pre [T, n, 1] and res turned [T, n, n].

    Without a res the streams get G as it is."""
    pre, res_t = weights
    for t in plain._tiles(len(x), x):
        xt = x[t].to(phi.dtype)
        out = dx[t] if dx.dtype == phi.dtype else torch.empty_like(xt)
        plain._product(dz[:, t].t(), phi.t(), out=out.view(len(xt), -1))
        out.addcmul_(xt, pull[t].view(-1, 1, 1), value=-1)
        if g is not None and res_t is None:
            out.add_(g[t])
        elif g is not None and res_t is not None:
            _add_mix(out, res_t[t], g[t].to(phi.dtype))
        if du is not None:
            out.addcmul_(pre[t], du[t].to(phi.dtype))
        if dx.dtype != phi.dtype:
            dx[t].copy_(out)


def _projected(x: Tensor, dz: Tensor, phi: Tensor) -> Tensor:
    """``dphi = vec(X)^T dz``, summed over tokens in their order."""
    total = phi.new_zeros((len(dz), len(phi)))  # transposed: the product is twice as fast this way round
    for t in plain._tiles(len(x), x):
        total += plain._product(dz[:, t], x[t].to(phi.dtype).flatten(1))
    return phi.new_empty(phi.shape).copy_(total.t())


def _add_mix(out: Tensor, weights: Tensor, x: Tensor) -> None:
    """``out += weights @ x``, a token at a time: [T, n, n] @ [T, n, C], as `plain._mix` computes it."""
    n = x.shape[1]
    if x.device.type == "cpu" and n > 1 and not plain._rounds_products(x.device):
        out.baddbmm_(weights, x)
        return
    for j in range(n):
        out.addcmul_(weights[:, :, j : j + 1], x[:, j : j + 1])


# --- coefficients, tokens innermost -----------------------------------------------------------------------


def _logits(z: Tensor, r: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``scale z / r + bias`` for rows of z [columns, T]."""
    return torch.addcmul(bias.unsqueeze(1), z / r, scale.unsqueeze(1))


def _sinkhorn(logits: Tensor, convention: Convention, out: Tensor) -> None:
    """The matrices for logits [n, n, T], into out [T, n n]."""
    n, _, tokens = logits.shape
    for t in plain._tiles(tokens, out, iterated=True):
        m = plain_sinkhorn.sinkhorn(logits[:, :, t], convention)
        out[t].copy_(m.reshape(n * n, -1).t())


def _sinkhorn_backward(grad: Tensor, logits: Tensor, convention: Convention) -> None:
    """Turn the gradient of the matrices into that of their logits, [n, n, T] both, in place."""
    for t in plain._tiles(logits.shape[2], logits.permute(2, 0, 1), iterated=True):
        plain_sinkhorn.sinkhorn_backward(grad[:, :, t], logits[:, :, t], convention)
