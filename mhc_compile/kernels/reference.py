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
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    eps: float,
    pre_eps: float = 0.0,
    post_scale: float = 2.0,
    post_eps: float = 0.0,
    groups: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients of one site (eq. 14 to 18), res still as logits.

    ::

        r     = sqrt(mean(X^2) + eps)
        z     = vec(X) @ phi
        pre   = sigmoid(alpha_0 z_pre / r + b_pre)              (+ pre_eps)
        post  = 2 sigmoid(alpha_1 z_post / r + b_post)          (any factor, + post_eps)
        res~  = alpha_2 z_res / r + b_res

    streams [..., n, C]; phi [n C, n n + 2 n], its columns pre (n), post (n), res (n n, row-major); alpha [3];
    bias [n n + 2 n].  Returns pre [..., n], post [..., n] and the logits of res [..., n, n] in phi's dtype.
    With 2 ``groups`` there is no res, with 1 no post either: empty, and without columns in phi and bias.
    """
    n = streams.shape[-2]
    x = streams.to(phi.dtype).flatten(-2)
    r = torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    z, sizes = x @ phi, (n, n, n * n)[:groups]
    a = [
        scale * part / r + b
        for scale, part, b in zip(alpha, z.split_with_sizes(sizes, -1), bias.split_with_sizes(sizes), strict=True)
    ]
    pre = torch.sigmoid(a[0]) + pre_eps
    post = post_scale * torch.sigmoid(a[1]) + post_eps if groups > 1 else z[..., :0]
    logits = a[2] if groups > 2 else z[..., :0]
    entries = n if groups > 2 else 0
    return pre, post, logits.reshape(*logits.shape[:-1], entries, entries)


def gates(
    streams: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    eps: float,
    logits: int,
    pre: bool = True,
    post: bool = True,
    bounded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients of a site in any other form than that of `coefficients`.

    ``logits``: how many numbers res is made from; ``pre`` and ``post`` False: fixed at 1/n and at ones, without columns
    and without an entry in alpha.  phi and alpha None: constants, ``a = b``.  ``bounded`` False is Hyper-Connections
    (2409.19606), with x~ each stream over its own root mean square, and phi [C, 1 + 1 + n]::

        pre_j = alpha_0 tanh(x~_j phi_pre) + b    post_j alike    res_ij = alpha_2 tanh(x~_j phi_i) + b_ij

    streams [..., n, C].  Returns pre [..., n], post [..., n], and the logits of res: [..., n, n] where there are n n,
    [..., logits] otherwise.
    """
    *lead, n, _ = streams.shape
    sizes = [size for size, learned in ((n, pre), (n, post), (logits, logits > 0)) if learned]
    parts = [part.expand(*lead, -1) for part in bias.split_with_sizes(sizes)]
    if phi is not None and alpha is not None:
        x = streams.to(phi.dtype)
        if bounded:
            x = x.flatten(-2)
        normed = (x @ phi) / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
        if not bounded:  # [..., stream j, columns]: res is row-major in (i, j)
            each = [size // n for size in sizes]
            normed = torch.cat([part.mT.flatten(-2) for part in normed.tanh().split_with_sizes(each, -1)], -1)
        dynamic = normed.split_with_sizes(sizes, -1)
        parts = [scale * part + b for scale, part, b in zip(alpha, dynamic, parts, strict=True)]
    rest = iter(parts)
    one = bias.new_ones(()).expand(*lead, n)
    pre_a = next(rest) if pre else None
    post_a = next(rest) if post else None
    res = next(rest) if logits else bias.new_empty((*lead, 0))
    return (
        one / n if pre_a is None else pre_a.sigmoid() if bounded else pre_a,
        one.clone() if post_a is None else 2 * post_a.sigmoid() if bounded else post_a,
        res.reshape(*lead, n, n) if logits == n * n else res,
    )


def sinkhorn(
    logits: Tensor, iterations: int, divisor_eps: float = 0.0, rows_first: bool = False, implicit: bool = False
) -> Tensor:
    """``M0 = exp(logits)``, then ``iterations`` times: columns by their sums, rows by theirs (eq. 9 and 19).

    ``M[..., i, j]``: row i is the output stream, column j the input stream; rows sum to 1.  [..., n, n] both.
    ``rows_first`` turns the order round.  With ``divisor_eps`` e the first column step is ``softmax + e``, and all
    divisors are sums + e (DeepSeek-V4).  ``implicit`` changes the gradient alone, and not here.
    """
    first, second = (-1, -2) if rows_first else (-2, -1)
    if divisor_eps:
        m = logits.softmax(first) + divisor_eps
        m = m / (m.sum(second, keepdim=True) + divisor_eps)
    else:
        # The first shift has to be the maximum of the axis that is normalised first: there it cancels, whereas a
        # shift of the other would change the result.  After one iteration in log space every divisor is in
        # [1 / n^2, n], and exp is safe.
        for axis in (first, second):
            logits = logits - logits.amax(axis, keepdim=True)
            logits = logits - logits.exp().sum(axis, keepdim=True).log()
        m = logits.exp()
    for _ in range(iterations - 1):
        m = m / (m.sum(first, keepdim=True) + divisor_eps)
        m = m / (m.sum(second, keepdim=True) + divisor_eps)
    return m


def aggregate(streams: Tensor, pre: Tensor) -> Tensor:
    """The input of the branch: ``u = sum_i pre_i X_i``.

    [..., n, C], [..., n] -> [..., C] in streams' dtype.
    """
    return (pre.unsqueeze(-1) * streams.to(pre.dtype)).sum(-2).to(streams.dtype)


def merge(
    streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None, transposed: bool = False, rounded: bool = False
) -> Tensor:
    """The residual update (eq. 7): ``X'_i = sum_j res_ij X_j + post_i f``.

    streams [..., n, C], f [..., C], post [..., n], res [..., n, n] -> [..., n, C] in streams' dtype.  res None is the
    identity; ``transposed``: res is [in, out]; ``rounded``: post and res are first rounded to streams' dtype.
    """
    dtype = post.dtype
    if rounded:
        post = post.to(streams.dtype).to(dtype)
        res = None if res is None else res.to(streams.dtype).to(dtype)
    x = streams.to(dtype)
    mixed = x if res is None else (res.mT if transposed else res) @ x
    return (mixed + post.unsqueeze(-1) * f.to(dtype).unsqueeze(-2)).to(streams.dtype)
