"""The oracle: manifold-constrained hyper-connections (arXiv 2512.24880, eq. 7 to 19), formula by formula.

Plain differentiable torch, in whatever floating dtype the arguments have; written to be compared with the
paper, not to be fast.  In float64, with torch's own autograd, it is what every other implementation is
tested against.

Symbols: ``...`` token dimensions, ``n`` streams, ``C`` features of a stream.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(x: Tensor, n: int) -> Tensor:
    """Entry of the trunk: ``X_i = x`` for each of the ``n`` streams.  [..., C] -> [..., n, C]."""
    return x.unsqueeze(-2).repeat_interleave(n, dim=-2)


def readout(streams: Tensor) -> Tensor:
    """Exit of the trunk: the mean over streams.

    [..., n, C] -> [..., C], same dtype, summed in fp32 or wider.
    """
    return streams.to(torch.promote_types(streams.dtype, torch.float32)).mean(-2).to(streams.dtype)


def coefficients(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients of one site (eq. 14 to 18), res still as logits.

    ::

        r     = sqrt(mean(X^2) + eps)
        z     = vec(X) @ phi
        pre   = sigmoid(alpha_0 z_pre / r + b_pre)
        post  = 2 sigmoid(alpha_1 z_post / r + b_post)
        res~  = alpha_2 z_res / r + b_res

    streams [..., n, C]; phi [n C, n n + 2 n], its columns pre (n), post (n), res (n n, row-major); alpha [3];
    bias [n n + 2 n].  Returns pre [..., n], post [..., n] and the logits of res [..., n, n] in phi's dtype.
    """
    n = streams.shape[-2]
    x = streams.to(phi.dtype).flatten(-2)
    r = torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    z = x @ phi
    z_pre, z_post, z_res = z[..., :n], z[..., n : 2 * n], z[..., 2 * n :]
    b_pre, b_post, b_res = bias[:n], bias[n : 2 * n], bias[2 * n :]
    pre = torch.sigmoid(alpha[0] * z_pre / r + b_pre)
    post = 2 * torch.sigmoid(alpha[1] * z_post / r + b_post)
    logits = alpha[2] * z_res / r + b_res
    return pre, post, logits.reshape(*logits.shape[:-1], n, n)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """``M0 = exp(logits)``, then ``iterations`` times: columns by their sums, rows by theirs (eq. 9 and 19).

    ``M[..., i, j]``: row i is the output stream, column j the input stream; rows sum to 1.  [..., n, n] both.
    """
    # The first shift has to be the maximum of the axis that is normalised first: there it cancels, whereas a
    # shift of rows would change the result.  After one iteration in log space every divisor is in
    # [1 / n^2, n], and exp is safe.
    for axis in (-2, -1):
        logits = logits - logits.amax(axis, keepdim=True)
        logits = logits - logits.exp().sum(axis, keepdim=True).log()
    m = logits.exp()
    for _ in range(iterations - 1):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def aggregate(streams: Tensor, pre: Tensor) -> Tensor:
    """The input of the branch: ``u = sum_i pre_i X_i``.

    [..., n, C], [..., n] -> [..., C] in streams' dtype.
    """
    return (pre.unsqueeze(-1) * streams.to(pre.dtype)).sum(-2).to(streams.dtype)


def merge(streams: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """The residual update (eq. 7): ``X'_i = sum_j res_ij X_j + post_i f``.

    streams [..., n, C], f [..., C], post [..., n], res [..., n, n] -> [..., n, C] in streams' dtype.
    """
    mixed = res @ streams.to(res.dtype)
    return (mixed + post.unsqueeze(-1) * f.to(res.dtype).unsqueeze(-2)).to(streams.dtype)
