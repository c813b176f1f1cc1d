"""The ops in plain torch, forward and backward by formula: what runs on a CPU, and on CUDA without triton.

Nothing here is differentiable by autograd (outputs are written in place); ``ops`` wires the pairs together.
Arithmetic is in float32, or in float64 when the streams are float64; a 16-bit result is rounded once, at
the end. Tokens are flattened to one dimension T.  Symbols: ``T`` tokens, ``n`` streams, ``C`` features of a
stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def coefficient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the coefficients, and of all sums, for streams of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expand(x: Tensor, n: int) -> Tensor:
    """[..., C] -> [..., n, C], a copy for each stream."""
    shape = (*x.shape[:-1], n, x.shape[-1])
    return x.unsqueeze(-2).expand(shape).clone(memory_format=torch.contiguous_format)


def readout(streams: Tensor) -> Tensor:
    """[..., n, C] -> [..., C], the mean over streams."""
    out = streams.new_empty((*streams.shape[:-2], streams.shape[-1]))
    if streams.shape[-2] == 1:
        return out.copy_(streams.squeeze(-2))  # a sum starts from +0 and would lose the sign of a zero
    # A 16-bit mean would be rounded twice, and then n equal streams need not give back what they hold.
    return out.copy_(streams.to(coefficient_dtype(streams.dtype)).mean(-2))


def coefficients(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mhc_compile.kernels.reference.coefficients`."""
    *lead, n, features = streams.shape
    tokens = math.prod(lead)
    x = streams.reshape(tokens, n * features)
    scale = _per_column(alpha, n)
    pre, post, logits = phi.new_empty((*lead, n)), phi.new_empty((*lead, n)), phi.new_empty((*lead, n, n))
    pre_t, post_t, logits_t = pre.view(tokens, n), post.view(tokens, n), logits.view(tokens, n * n)
    for t in _tiles(tokens, streams):
        z, r = _project(x[t].to(phi.dtype), phi, eps)
        a = torch.addcmul(bias, z.div_(r), scale)
        torch.sigmoid(a[:, :n], out=pre_t[t])
        torch.sigmoid(a[:, n : 2 * n], out=post_t[t]).mul_(2)
        logits_t[t].copy_(a[:, 2 * n :])
    return pre, post, logits


def coefficients_backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_logits: Tensor,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, phi, alpha and bias.

    With ``d~`` the gradients of the three pre-activations side by side::

        dz    = alpha d~ / r
        dX    = dz @ phi^T - X <dz, z> / (r^2 n C)
        dphi  = vec(X)^T dz,   dalpha = sum d~ z / r,   db = sum d~      (sums over tokens, in order)

    z and r are computed again from streams: one product more, and nothing kept between forward and backward.
    """
    *lead, n, features = streams.shape
    tokens, width = math.prod(lead), n * features
    x = streams.reshape(tokens, width)
    scale = _per_column(alpha, n)
    grads = (grad_pre.reshape(tokens, n), grad_post.reshape(tokens, n), grad_logits.reshape(tokens, n * n))
    dx = streams.new_empty(streams.shape)
    dx_t = dx.view(tokens, width)
    dphi_t = phi.new_zeros((phi.shape[1], width))  # transposed: the product is twice as fast this way round
    dscale, dbias = torch.zeros_like(scale), torch.zeros_like(scale)
    for t in _tiles(tokens, streams):
        xt = x[t].to(phi.dtype)
        z, r = _project(xt, phi, eps)
        normed = z / r
        s = torch.sigmoid(torch.addcmul(bias, normed, scale)[:, : 2 * n])
        slope = s * (1 - s)
        d = torch.cat([grads[0][t] * slope[:, :n], 2 * grads[1][t] * slope[:, n:], grads[2][t]], dim=1)
        dscale += (d * normed).sum(0)
        dbias += d.sum(0)
        dz = d * scale / r
        pull = (dz * z).sum(1, keepdim=True) / (r * r * width)
        dxt = dx_t[t] if dx.dtype == phi.dtype else torch.empty_like(xt)
        _product(dz, phi.t(), out=dxt).addcmul_(xt, pull, value=-1)
        if dx.dtype != phi.dtype:
            dx_t[t].copy_(dxt)
        dphi_t += _product(dz.t(), xt)
    dalpha = torch.stack([dscale[:n].sum(), dscale[n : 2 * n].sum(), dscale[2 * n :].sum()])
    dphi = phi.new_empty(phi.shape).copy_(dphi_t.t())
    return dx, dphi, dalpha, dbias


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """See :func:`mhc_compile.kernels.reference.sinkhorn`; with tokens innermost, ten times its speed."""
    *lead, n, _ = logits.shape
    tokens = math.prod(lead)
    a = logits.reshape(tokens, n * n)
    out = logits.new_empty(logits.shape)
    out_t = out.view(tokens, n * n)
    for t in _tiles(tokens, logits, iterated=True):
        m = _first_rows(_first_columns(_tokens_last(a[t], n))).exp_()
        for _ in range(iterations - 1):
            m.div_(m.sum(0))
            m.div_(m.sum(1, keepdim=True))
        out_t[t].copy_(m.reshape(n * n, -1).t())
    return out


def sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    """The gradient of the logits.

    With ``G = dP * P`` and P_r, P_c the matrix after each half-step, from the last iteration to the first:
    ``G -= P_r * rowsum(G)``, then ``G -= P_c * colsum(G)``.  The half-steps are computed again from the
    logits, a cache-sized tile of tokens at a time; none of them outlives its tile.
    """
    *lead, n, _ = logits.shape
    tokens = math.prod(lead)
    a, dp = logits.reshape(tokens, n * n), grad.reshape(tokens, n * n)
    out = logits.new_empty(logits.shape)
    out_t = out.view(tokens, n * n)
    for t in _tiles(tokens, logits, iterated=True):
        columns, rows = _half_steps(_tokens_last(a[t], n), iterations)
        g = _tokens_last(dp[t], n).mul(rows[-1])
        for k in reversed(range(iterations)):
            g.addcmul_(rows[k], g.sum(1, keepdim=True), value=-1)
            g.addcmul_(columns[k], g.sum(0), value=-1)
        out_t[t].copy_(g.reshape(n * n, -1).t())
    return out


def aggregate(streams: Tensor, pre: Tensor) -> Tensor:
    """``u = sum_i pre_i X_i``.  [..., n, C], [..., n] -> [..., C]."""
    *lead, n, features = streams.shape
    tokens = math.prod(lead)
    x, w = streams.reshape(tokens, n, features), pre.reshape(tokens, 1, n)
    out = streams.new_empty((*lead, features))
    out_t = out.view(tokens, 1, features)
    for t in _tiles(tokens, streams):
        _mix(w[t], x[t].to(pre.dtype), out_t[t])
    return out


def aggregate_backward(grad: Tensor, streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """``dX_i = pre_i du`` and ``dpre_i = <du, X_i>``."""
    *lead, n, features = streams.shape
    tokens = math.prod(lead)
    x, w, du = streams.reshape(tokens, n, features), pre.reshape(tokens, n), grad.reshape(tokens, features)
    dx, dpre = streams.new_empty(streams.shape), pre.new_empty(pre.shape)
    dx_t, dpre_t = dx.view(tokens, n, features), dpre.view(tokens, n, 1)
    for t in _tiles(tokens, streams):
        dut = du[t].to(pre.dtype)
        _mix(w[t].unsqueeze(2), dut.unsqueeze(1), dx_t[t])
        dpre_t[t].copy_(_batched_product(x[t].to(pre.dtype), dut.unsqueeze(2)))
    return dx, dpre


def merge(streams: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """``X'_i = sum_j res_ij X_j + post_i f``.

    With n = 1 and post = res = 1 this is ``X + f``, bit for bit.
    """
    *lead, n, features = streams.shape
    tokens = math.prod(lead)
    x, ft = streams.reshape(tokens, n, features), f.reshape(tokens, 1, features)
    p, m = post.reshape(tokens, n, 1), res.reshape(tokens, n, n)
    out = streams.new_empty(streams.shape)
    out_t = out.view(tokens, n, features)
    for t in _tiles(tokens, streams):
        _mix(m[t], x[t].to(res.dtype), out_t[t], p[t], ft[t].to(res.dtype))
    return out


def merge_backward(
    grad: Tensor, streams: Tensor, f: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With ``G = dX'``: ``dX_j = sum_i res_ij G_i``, ``df = sum_i post_i G_i``, ``dpost_i = <G_i, f>``,
    ``dres_ij = <G_i, X_j>``."""
    *lead, n, features = streams.shape
    tokens = math.prod(lead)
    x, ft = streams.reshape(tokens, n, features), f.reshape(tokens, features, 1)
    g, p, m = grad.reshape(tokens, n, features), post.reshape(tokens, 1, n), res.reshape(tokens, n, n)
    dx, df = streams.new_empty(streams.shape), f.new_empty(f.shape)
    dpost, dres = post.new_empty(post.shape), res.new_empty(res.shape)
    dx_t, df_t = dx.view(tokens, n, features), df.view(tokens, 1, features)
    dpost_t, dres_t = dpost.view(tokens, n, 1), dres.view(tokens, n, n)
    for t in _tiles(tokens, streams):
        gt = g[t].to(res.dtype)
        _mix(m[t].transpose(1, 2), gt, dx_t[t])
        _mix(p[t], gt, df_t[t])
        dpost_t[t].copy_(_batched_product(gt, ft[t].to(res.dtype)))
        dres_t[t].copy_(_batched_product(gt, x[t].to(res.dtype).transpose(1, 2)))
    return dx, df, dpost, dres


def _tiles(tokens: int, x: Tensor, iterated: bool = False) -> Iterator[slice]:
    """Slices of the token dimension of x: all tokens, or as few as keep the temporaries small.

    16-bit streams are copied to fp32 a slice at a time; an ``iterated`` op goes over its slice many times.
    """
    per_token = max(1, x.numel() // max(1, tokens))
    if iterated:
        limit = 1 << 21
        if x.device.type == "cpu":
            # Below 2^15 elements torch does not start its threads, whose wake-up costs more than half of so
            # small an op; a total that is only just above it is faster in two single-threaded tiles.
            limit = 1 << 17 if x.numel() >= 1 << 16 else (1 << 15) - 1
    elif x.dtype == coefficient_dtype(x.dtype):
        limit = max(1, x.numel())
    else:
        limit = 1 << (22 if x.device.type == "cpu" else 26)
    size = max(1, limit // per_token)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _per_column(alpha: Tensor, n: int) -> Tensor:
    """alpha [3] -> [n n + 2 n], one factor for each column of phi."""
    return torch.cat([alpha[0:1].expand(n), alpha[1:2].expand(n), alpha[2:3].expand(n * n)])


def _project(x: Tensor, phi: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``z = x @ phi`` and ``r = sqrt(mean(x^2) + eps)``, [T, 1]."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # one pass, no squared copy of x
    return _product(x, phi), norm.square_().div_(x.shape[1]).add_(eps).sqrt_()


def _rounds_products(device: torch.device) -> bool:
    """Whether torch may round the fp32 operands of a CPU product to fewer bits.

    ``torch.set_float32_matmul_precision("medium")`` makes them bf16: too few for coefficients, let alone for
    a residual stream.
    """
    return device.type == "cpu" and _cpu_precision() in ("bf16", "tf32")


def _cpu_precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``.  TF32 on CUDA is precise enough here and stays the user's choice; bf16 operands are not."""
    if _rounds_products(a.device):
        wide = a.double() @ b.double()
        return wide.to(a.dtype) if out is None else out.copy_(wide)
    return torch.mm(a, b, out=out)


def _batched_product(a: Tensor, b: Tensor) -> Tensor:
    if _rounds_products(a.device):
        return torch.bmm(a.double(), b.double()).to(a.dtype)
    return torch.bmm(a, b)


def _mix(weights: Tensor, x: Tensor, out: Tensor, gain: Tensor | None = None, extra: Tensor | None = None) -> None:
    """``out = weights @ x + gain * extra``, a token at a time: [T, a, b] @ [T, b, C] + [T, a, 1] * [T, 1, C].

    A batched product on a CPU, where it is fastest.  Elementwise, hence exact for weights of 1, where a
    product may round its operands (TF32 on CUDA) and for n = 1, where it would lose the sign of a zero.
    """
    y = out if out.dtype == x.dtype else out.new_empty(out.shape, dtype=x.dtype)
    b = x.shape[1]
    if x.device.type == "cpu" and b > 1 and not _rounds_products(x.device):
        torch.bmm(weights, x, out=y)
    else:
        torch.mul(weights[:, :, :1], x[:, :1], out=y)
        for j in range(1, b):
            y.addcmul_(weights[:, :, j : j + 1], x[:, j : j + 1])
    if gain is not None and extra is not None:
        y.addcmul_(gain, extra)
    if y is not out:
        out.copy_(y)


def _tokens_last(a: Tensor, n: int) -> Tensor:
    """[T, n n] -> [n, n, T], contiguous."""
    return a.t().contiguous().view(n, n, a.shape[0])


def _first_columns(a: Tensor) -> Tensor:
    """Log of the column-normalised exp(a), [n, n, T]."""
    return _log_normalised(a, 0)


def _first_rows(a: Tensor) -> Tensor:
    return _log_normalised(a, 1)


def _log_normalised(a: Tensor, dim: int) -> Tensor:
    # Not a - logsumexp(a): that is rounded at the size of the maximum, 1e-4 for logits of a thousand.
    a = a - a.amax(dim, keepdim=True)
    return a.sub_(a.exp().sum(dim, keepdim=True).log_())


def _half_steps(a: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The matrices after each column step and after each row step, [iterations, n, n, T] each."""
    columns = a.new_empty((iterations, *a.shape))
    rows = torch.empty_like(columns)
    a = _first_columns(a)
    torch.exp(a, out=columns[0])
    torch.exp(_first_rows(a), out=rows[0])
    for k in range(1, iterations):
        torch.div(rows[k - 1], rows[k - 1].sum(0), out=columns[k])
        torch.div(columns[k], columns[k].sum(1, keepdim=True), out=rows[k])
    return columns, rows
