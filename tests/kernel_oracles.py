"""What the kernels compute beyond ``kernels.reference``, in plain differentiable torch, for float64."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.kernels import reference
from mhc_compile.kernels.convention import Convention


def sinkhorn(logits: Tensor, iterations: int, e: float, transposed: bool) -> Tensor:
    """exp, then columns and rows by their sums; with e > 0 softmax over columns + e, rows by (sum + e), and so on."""
    if transposed:
        return sinkhorn(logits.mT, iterations, e, False).mT
    if e == 0:
        return reference.sinkhorn(logits, iterations)
    m = logits.softmax(-2) + e
    m = m / (m.sum(-1, keepdim=True) + e)
    for _ in range(iterations - 1):
        m = m / (m.sum(-2, keepdim=True) + e)
        m = m / (m.sum(-1, keepdim=True) + e)
    return m


def coefficients(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, convention: Convention
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """pre, post and res of any convention."""
    n = streams.shape[-2]
    x = streams.flatten(-2)
    z = x @ phi / torch.sqrt(x.square().mean(-1, keepdim=True) + convention.rms_eps)
    pre = torch.sigmoid(alpha[0] * z[..., :n] + bias[:n]) + convention.pre_eps
    if not convention.post:
        return pre, None, None
    post = torch.sigmoid(alpha[1] * z[..., n : 2 * n] + bias[n : 2 * n]) * convention.post_scale + convention.post_eps
    if convention.res == "none":
        return pre, post, None
    res = (alpha[2] * z[..., 2 * n :] + bias[2 * n :]).unflatten(-1, (n, n))
    if convention.res == "sinkhorn":
        res = sinkhorn(res, convention.iterations, convention.divisor_eps, convention.rows_first)
    return pre, post, res


def merge(streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None, convention: Convention) -> Tensor:
    if res is None:
        return streams + post.unsqueeze(-1) * f.unsqueeze(-2)
    return reference.merge(streams, f, post, res.mT if convention.transposed else res)
