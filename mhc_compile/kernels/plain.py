"""The ops in plain torch, forward and backward by formula: what runs on a CPU, and on CUDA without triton.

Nothing here is differentiable by autograd (outputs are written in place); ``ops`` wires the pairs together.
Arithmetic is in float32, or in float64 when the streams are float64; a 16-bit result is rounded once, at
the end. Tokens are flattened to one dimension T.  Symbols: ``T`` tokens, ``n`` streams, ``C`` features of a
stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mhc_compile.kernels import plain_sinkhorn
from mhc_compile.kernels.convention import Convention


def coefficient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the coefficients, and of all sums, for streams of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expand(x: Tensor, n: int) -> Tensor:
    """[..., C] -> [..., n, C], a copy for each stream."""
    shape = (*x.shape[:-1], n, x.shape[-1])
    return x.unsqueeze(-2).expand(shape).clone(memory_format=torch.contiguous_format)


def expand_backward(grad: Tensor) -> Tensor:
    """[..., n, C] -> [..., C], the sum over streams."""
    return grad.squeeze(-2).clone(memory_format=torch.contiguous_format) if grad.shape[-2] == 1 else grad.sum(-2)


def readout_backward(grad: Tensor, n: int) -> Tensor:
    """[..., C] -> [..., n, C], an n-th for every stream."""
    return expand(grad / n, n)


def readout(streams: Tensor) -> Tensor:
    """[..., n, C] -> [..., C], the mean over streams."""
    out = streams.new_empty((*streams.shape[:-2], streams.shape[-1]))
    if streams.shape[-2] == 1:
        return out.copy_(streams.squeeze(-2))  # a sum starts from +0 and would lose the sign of a zero
    # A 16-bit mean would be rounded twice, and then n equal streams need not give back what they hold.
    return out.copy_(streams.to(coefficient_dtype(streams.dtype)).mean(-2))


def coefficients(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, convention: Convention
) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and the logits of res; what the convention lacks is empty."""
    *lead, n, features = streams.shape
    tokens = math.prod(lead)
    x = streams.reshape(tokens, n * features)
    scale = per_column(alpha, n)
    pre, post, logits = empty_coefficients(phi, lead, n, convention.groups)
    pre_t, post_t, logits_t = (_per_token(one, tokens) for one in (pre, post, logits))
    for t in _tiles(tokens, streams):
        z, r = _project(x[t].to(phi.dtype), phi, convention.rms_eps)
        a = torch.addcmul(bias, z.div_(r), scale)
        torch.sigmoid(a[:, :n], out=pre_t[t]).add_(convention.pre_eps)
        if convention.post:
            torch.sigmoid(a[:, n : 2 * n], out=post_t[t]).mul_(convention.post_scale).add_(convention.post_eps)
            logits_t[t].copy_(a[:, 2 * n :])
    return pre, post, logits


def empty_coefficients(phi: Tensor, lead: Sequence[int], n: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """pre [..., n], post [..., n] and res [..., n, n], not yet written; those beyond ``groups`` have no elements."""
    posts, entries = (n if groups > 1 else 0), (n if groups > 2 else 0)
    return (
        phi.new_empty((*lead, n)),
        phi.new_empty((*lead, posts)),
        phi.new_empty((*lead, entries, entries)),
    )


def coefficients_backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_logits: Tensor,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    convention: Convention,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, phi, alpha and bias.

    With ``d~`` the gradients of the pre-activations side by side::

        dz    = alpha d~ / r
        dX    = dz @ phi^T - X <dz, z> / (r^2 n C)
        dphi  = vec(X)^T dz,   dalpha = sum d~ z / r,   db = sum d~      (sums over tokens, in order)

    z and r are computed again from streams: one product more, and nothing kept between forward and backward.
    """
    *lead, n, features = streams.shape
    tokens, width = math.prod(lead), n * features
    x = streams.reshape(tokens, width)
    scale = per_column(alpha, n)
    grads = [_per_token(g, tokens) for g in (grad_pre, grad_post, grad_logits)]
    gates = convention.groups * n if convention.groups < 3 else 2 * n
    gain = phi.new_ones(gates)
    gain[n:] = convention.post_scale
    dx = streams.new_empty(streams.shape)
    dx_t = dx.view(tokens, width)
    dphi_t = phi.new_zeros((phi.shape[1], width))  # transposed: the product is twice as fast this way round
    dscale, dbias = torch.zeros_like(scale), torch.zeros_like(scale)
    for t in _tiles(tokens, streams):
        xt = x[t].to(phi.dtype)
        z, r = _project(xt, phi, convention.rms_eps)
        normed = z / r
        s = torch.sigmoid(torch.addcmul(bias, normed, scale)[:, :gates])
        d = torch.cat([g[t] for g in grads], dim=1)
        d[:, :gates] *= s * (1 - s) * gain
        dscale += (d * normed).sum(0)
        dbias += d.sum(0)
        dz = d * scale / r
        pull = (dz * z).sum(1, keepdim=True) / (r * r * width)
        dxt = dx_t[t] if dx.dtype == phi.dtype else torch.empty_like(xt)
        _product(dz, phi.t(), out=dxt).addcmul_(xt, pull, value=-1)
        if dx.dtype != phi.dtype:
            dx_t[t].copy_(dxt)
        dphi_t += _product(dz.t(), xt)
    dphi = phi.new_empty(phi.shape).copy_(dphi_t.t())
    return dx, dphi, per_group(dscale, n, convention.groups), dbias


def sinkhorn(logits: Tensor, convention: Convention) -> Tensor:
    """See :func:`mhc_compile.kernels.reference.sinkhorn`."""
    *lead, n, _ = logits.shape
    tokens = math.prod(lead)
    a = logits.reshape(tokens, n * n)
    out = logits.new_empty(logits.shape)
    out_t = out.view(tokens, n * n)
    for t in _tiles(tokens, logits, iterated=True):
        m = plain_sinkhorn.sinkhorn(_tokens_last(a[t], n), convention)
        out_t[t].copy_(m.reshape(n * n, -1).t())
    return out


def sinkhorn_backward(grad: Tensor, logits: Tensor, convention: Convention) -> Tensor:
    """The gradient of the logits, a cache-sized tile of tokens at a time: no half-step outlives its tile."""
    *lead, n, _ = logits.shape
    tokens = math.prod(lead)
    a, dp = logits.reshape(tokens, n * n), grad.reshape(tokens, n * n)
    out = logits.new_empty(logits.shape)
    out_t = out.view(tokens, n * n)
    for t in _tiles(tokens, logits, iterated=True):
        g = _tokens_last(dp[t], n)
        if g.data_ptr() == dp[t].data_ptr():
            g = g.clone()  # the transpose of one token, or with one stream, is the gradient itself
        plain_sinkhorn.sinkhorn_backward(g, _tokens_last(a[t], n), convention)
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


def merge(
    streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None, transposed: bool = False, rounded: bool = False
) -> Tensor:
    """``X'_i = sum_j res_ij X_j + post_i f``; ``res`` None is the identity.

    With n = 1 and post = res = 1 this is ``X + f``, bit for bit.
    """
    *lead, n, features = streams.shape
    tokens = math.prod(lead)
    x, ft = streams.reshape(tokens, n, features), f.reshape(tokens, 1, features)
    p, m = merge_weights(streams, post, res, transposed, rounded)
    out = streams.new_empty(streams.shape)
    out_t = out.view(tokens, n, features)
    for t in _tiles(tokens, streams):
        if m is None:
            y = out_t[t] if out.dtype == p.dtype else x[t].to(p.dtype)
            torch.addcmul(x[t].to(p.dtype), p[t], ft[t].to(p.dtype), out=y)
            if y.dtype != out.dtype:
                out_t[t].copy_(y)
        else:
            _mix(m[t], x[t].to(p.dtype), out_t[t], p[t], ft[t].to(p.dtype))
    return out


def replay_block(
    streams: Tensor,
    f: Sequence[Tensor],
    post: Sequence[Tensor],
    res: Sequence[Tensor | None],
    pre: Sequence[Tensor | None],
    transposed: bool,
    rounded: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The state behind each merge of a chain, and the aggregate of each state, the first one's too, that has a pre."""
    states = [streams]
    for site in zip(f, post, res, strict=True):
        states.append(merge(states[-1], *site, transposed, rounded))
    return states[1:], [None if one is None else aggregate(x, one) for x, one in zip(states, pre, strict=True)]


def merge_weights(
    streams: Tensor, post: Tensor, res: Tensor | None, transposed: bool, rounded: bool
) -> tuple[Tensor, Tensor | None]:
    """post [T, n, 1] and res [T, n, n], [out, in], as they multiply streams."""
    n = streams.shape[-2]
    p = post.reshape(-1, n, 1) if post.numel() else post.new_empty((0, n, 1))
    m = None if res is None else res.reshape(len(p), n, n)
    if rounded and streams.dtype != post.dtype:
        p = p.to(streams.dtype).to(post.dtype)
        m = None if m is None else m.to(streams.dtype).to(m.dtype)
    return p, m.transpose(1, 2) if m is not None and transposed else m


def merge_backward(
    grad: Tensor,
    streams: Tensor,
    f: Tensor,
    post: Tensor,
    res: Tensor | None,
    transposed: bool = False,
    rounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With ``G = dX'``: ``dX_j = sum_i res_ij G_i``, ``df = sum_i post_i G_i``, ``dpost_i = <G_i, f>``,
    ``dres_ij = <G_i, X_j>`` (turned where res is; empty without a res)."""
    n, features = streams.shape[-2:]
    _, m = merge_weights(streams, post, res, transposed, rounded)
    dx = streams.new_empty(streams.shape)
    g, dx_t = grad.reshape(-1, n, features), dx.view(-1, n, features)
    for t in _tiles(len(g), streams):
        if m is None:
            dx_t[t].copy_(g[t])
        else:
            _mix(m[t].transpose(1, 2), g[t].to(m.dtype), dx_t[t])
    mix = "identity" if res is None else "transposed" if transposed else "given"
    return dx, *branch_backward(grad, streams, f, post, mix, rounded)


def branch_backward(
    grad: Tensor, streams: Tensor, f: Tensor, post: Tensor, mix: str, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """df, dpost and dres: what the backward of a merge gives besides the streams' part."""
    *lead, n, features = streams.shape
    tokens = math.prod(lead)
    x, ft = streams.reshape(tokens, n, features), f.reshape(tokens, features, 1)
    g = grad.reshape(tokens, n, features)
    p = merge_weights(streams, post, None, False, rounded)[0].transpose(1, 2)
    entries = 0 if mix == "identity" else n
    df, dpost, dres = f.new_empty(f.shape), post.new_empty(post.shape), post.new_empty((*lead, entries, entries))
    df_t, dpost_t, dres_t = df.view(tokens, 1, features), dpost.view(tokens, n, 1), dres.view(tokens, entries, entries)
    for t in _tiles(tokens, streams):
        gt = g[t].to(post.dtype)
        _mix(p[t], gt, df_t[t])
        dpost_t[t].copy_(_batched_product(gt, ft[t].to(post.dtype)))
        if mix == "given":
            dres_t[t].copy_(_batched_product(gt, x[t].to(post.dtype).transpose(1, 2)))
        elif mix == "transposed":
            dres_t[t].copy_(_batched_product(x[t].to(post.dtype), gt.transpose(1, 2)))
    return df, dpost, dres


def _per_token(x: Tensor, tokens: int) -> Tensor:
    """[..., a, b] -> [T, a b], a view where there is one."""
    return x.reshape(tokens, x.numel() // max(1, tokens))


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


def per_column(alpha: Tensor, n: int) -> Tensor:
    """alpha [groups] -> [columns], one factor for each column of phi."""
    return torch.cat([one.expand(size) for one, size in zip(alpha.unbind(), (n, n, n * n), strict=False)])


def per_group(dscale: Tensor, n: int, groups: int) -> Tensor:
    """The other way round: sums over the columns of a group, [groups]."""
    return torch.stack([part.sum() for part in dscale.split_with_sizes((n, n, n * n)[:groups])])


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
