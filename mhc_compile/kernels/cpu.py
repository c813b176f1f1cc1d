"""A whole site on a CPU with compiled bodies: functions of ``site_plain`` and ``plain``, faster, of the same values.

What is elementwise, a small sum or an iteration over n x n matrices is compiled by inductor, once for each (n, dtype,
convention) and for any number of tokens and features; products of matrices stay torch's. Sinkhorn gains most: tokens
come in blocks of ``LANES``, innermost, [blocks, n, n, LANES], so that inductor keeps a block in cache through all
iterations.

The graphs are traced here and handed to inductor, not to ``torch.compile``: no guard of Dynamo, no recompilation limit
and no stance can reach a compiled body, and ``torch._dynamo.reset()`` does not throw it away. Runs below autograd, in
the bodies of ops. Calls may come from several threads; whoever comes first compiles while the others wait.

``site_plain`` and ``plain`` compute what is left: float64, n = 1 or n > 8, conventions without Sinkhorn or with more
than 64 iterations, and everything where compilation is switched off (``TORCHDYNAMO_DISABLE=1``) or fails, as it does
without a C++ compiler. A failure is warned of once.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from mhc_compile import _torch
from mhc_compile.errors import wrong
from mhc_compile.kernels import plain, site_plain
from mhc_compile.kernels.convention import Convention

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LANES = 64  # tokens of a block: 4 KB a matrix at n = 4
MAX_STREAMS = 8  # inductor unrolls sums of up to 8
MAX_ITERATIONS = 64  # they are unrolled in the graph

Body = Callable[..., Any]


# --- what ops call ----------------------------------------------------------------------------------------


def read(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, convention: Convention, aggregates: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mhc_compile.kernels.site_plain.read`."""
    *lead, n, features = streams.shape
    body = _compiled(_Coefficients(n, convention), phi.dtype) if _iterates(streams, convention) else None
    if body is None:
        return site_plain.read(streams, phi, alpha, bias, convention, aggregates)
    tokens, (width, columns) = math.prod(lead), phi.shape
    x, u = streams.reshape(tokens, width), streams.new_empty((*lead, features) if aggregates else 0)
    tiles = []
    for t in plain._tiles(tokens, streams):
        xt = x[t].to(phi.dtype)
        norm = torch.linalg.vector_norm(xt, dim=1).mul_(width**-0.5)
        made = body(_blocks(plain._product(xt, phi)), _blocks(norm, 1.0), alpha, bias)
        tiles.append([_tokens(one, axis, len(xt)) for one, axis in zip(made, _TOKEN_AXES, strict=True)])
        if aggregates:
            plain._mix(tiles[-1][0].unsqueeze(1), xt.view(-1, n, features), u.view(tokens, 1, features)[t])
    pre, post, res, z, r = (
        (one[0] if len(one) == 1 else torch.cat(one, axis)).contiguous()
        for one, axis in zip(zip(*tiles, strict=True), _TOKEN_AXES, strict=True)
    )
    coefficients = pre.view(*lead, n), post.view(*lead, n), res.view(*lead, n, n)
    return u, *coefficients, z.view(columns, *lead), r.view(lead)


_TOKEN_AXES = 0, 0, 0, 1, 0  # of pre, post, res, z and r


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
    grads = (grad_u, grad_pre, grad_post, grad_res, grad_merged)
    n, features = streams.shape[-2:]
    body = _compiled(_CoefficientsBackward(n, convention), phi.dtype) if _iterates(streams, convention) else None
    if body is None:
        kept = (streams, phi, alpha, bias, pre, post, res, z, r)
        return site_plain.read_backward(*grads, *kept, convention, wants_streams)
    x = streams.reshape(-1, n, features)
    tokens, columns = len(x), phi.shape[1]
    du = None if grad_u is None else grad_u.reshape(tokens, features)
    g = None if grad_merged is None else grad_merged.reshape(tokens, n, features)
    d = [_blocks(one) for one in _coefficient_grads(x, du, grads[1:4])]
    z_b, r_b = _blocks(z.reshape(columns, tokens).t()), _blocks(r.reshape(tokens), 1.0)
    dz, pull, dscale, dbias = body(*d, z_b, r_b, alpha, bias)
    dz, pull = dz.flatten(0, 1)[:tokens], pull.flatten()[:tokens].div_(n * features)
    dx = streams.new_empty(streams.shape if wants_streams else (0,))
    if wants_streams:
        _, mix = plain.merge_weights(streams, pre, res, convention.transposed, convention.rounded)
        assert mix is not None
        weights = pre.reshape(tokens, n, 1), mix.transpose(1, 2)
        _write_streams(dx.view(tokens, n, features), x, du, g, weights, dz, pull, phi)
    dphi = site_plain._projected(x, dz.t(), phi)
    return dx, dphi, plain.per_group(dscale.sum(0), n, convention.groups), dbias.sum(0)


def merge(
    streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None, transposed: bool = False, rounded: bool = False
) -> Tensor:
    """See :func:`mhc_compile.kernels.plain.merge`."""
    n, features = streams.shape[-2:]
    body = None
    if res is not None and _suits(streams):
        rounds = rounded and streams.dtype != post.dtype
        body = _compiled(_Merge(n, transposed, rounds), streams.dtype, f.dtype, post.dtype)
    if body is None or res is None:
        return plain.merge(streams, f, post, res, transposed, rounded)
    x, ft = streams.reshape(-1, n, features), f.reshape(-1, features)
    (merged,) = body(_dense(x), _dense(ft), _dense(post.reshape(-1, n)), _dense(res.reshape(-1, n, n)))
    result: Tensor = merged.view(streams.shape)
    return result


def branch_backward(
    grad: Tensor, streams: Tensor, f: Tensor, post: Tensor, mix: str, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mhc_compile.kernels.plain.branch_backward`."""
    *lead, n, features = streams.shape
    body = None
    if mix != "identity" and _suits(streams):
        rounds = rounded and streams.dtype != post.dtype
        body = _compiled(
            _BranchBackward(n, mix == "transposed", rounds), grad.dtype, streams.dtype, f.dtype, post.dtype
        )
    if body is None:
        return plain.branch_backward(grad, streams, f, post, mix, rounded)
    g, x, ft = grad.reshape(-1, n, features), streams.reshape(-1, n, features), f.reshape(-1, features)
    df, dpost, dres = body(_dense(g), _dense(x), _dense(ft), _dense(post.reshape(-1, n)))
    return df.view(f.shape), dpost.view(post.shape), dres.view(*lead, n, n)


def _suits(streams: Tensor) -> bool:
    return streams.dtype in DTYPES and 2 <= streams.shape[-2] <= MAX_STREAMS and streams.numel() > 0


def _iterates(streams: Tensor, convention: Convention) -> bool:
    return _suits(streams) and convention.res == "sinkhorn" and convention.iterations <= MAX_ITERATIONS


def _dense(x: Tensor) -> Tensor:
    return x.contiguous()


def _blocks(x: Tensor, fill: float = 0.0) -> Tensor:
    """[T, ...] -> [blocks, LANES, ...], contiguous; the last block is filled up."""
    missing = -len(x) % LANES
    if missing:
        x = torch.cat([x, x.new_full((missing, *x.shape[1:]), fill)])
    return x.contiguous().view(-1, LANES, *x.shape[1:])


def _tokens(x: Tensor, axis: int, tokens: int) -> Tensor:
    """[..., blocks, LANES, ...] -> [..., T, ...], the blocks at ``axis``."""
    return x.flatten(axis, axis + 1).narrow(axis, 0, tokens)


def _coefficient_grads(x: Tensor, du: Tensor | None, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """What reaches pre [T, n], post [T, n] and res [T, n, n] of the streams x [T, n, C], ``<du, X_i>`` included."""
    tokens, n, _ = x.shape
    wide = plain.coefficient_dtype(x.dtype)
    found = [
        x.new_zeros((tokens, *shape), dtype=wide) if grad is None else grad.reshape(tokens, *shape)
        for grad, shape in zip(grads, ((n,), (n,), (n, n)), strict=True)
    ]
    if du is not None:
        turned = du.unsqueeze(1).transpose(1, 2)  # not unsqueeze(2): other strides, and half the speed
        dots = [plain._batched_product(x[t].to(wide), turned[t].to(wide)) for t in plain._tiles(tokens, x)]
        found[0] = found[0] + torch.cat(dots).squeeze(2)
    return found


def _write_streams(
    dx: Tensor,
    x: Tensor,
    du: Tensor | None,
    g: Tensor | None,
    weights: tuple[Tensor, Tensor],
    dz: Tensor,
    pull: Tensor,
    phi: Tensor,
) -> None:
    """As ``site_plain._write_streams``; dz is [T, columns] here."""
    body = None
    if du is not None and g is not None:
        body = _compiled(_Streams(x.shape[1]), phi.dtype, x.dtype, du.dtype, g.dtype)
    if body is None or du is None or g is None:
        wide = None if du is None else du.unsqueeze(1)
        site_plain._write_streams(dx, x, wide, g, weights, dz.t(), pull, phi)
        return
    pre, mix = weights
    for t in plain._tiles(len(x), x):
        # Into dx where that is wide enough: a buffer of its size costs more in page faults than it holds.
        out = dx[t] if dx.dtype == phi.dtype else torch.empty_like(dx[t], dtype=phi.dtype)
        plain._product(dz[t], phi.t(), out=out.view(len(out), -1))
        small = pre[t].squeeze(2), mix[t], pull[t]
        narrow = () if dx.dtype == phi.dtype else (dx[t],)
        body(out, *map(_dense, (x[t], du[t], g[t], *small)), *narrow)


# --- the bodies -------------------------------------------------------------------------------------------

T, B, C = "T", "B", "C"  # the sizes that stay open: tokens, blocks of tokens, features
_HINTS = {T: 2039, B: 37, C: 641}  # traced with these, and compiled with sizes like these in mind

Shape = tuple[str | int, ...]


@dataclass(frozen=True)
class _Coefficients:
    """z [B, LANES, columns] and |X| / sqrt(n C) -> pre, post, res [B, LANES, ...], z turned, and r."""

    n: int
    convention: Convention

    def arguments(self, wide: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        columns = self.convention.columns(self.n)
        return [((B, LANES, columns), wide), ((B, LANES), wide), ((3,), wide), ((columns,), wide)]

    def __call__(self, z: Tensor, norm: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        n, convention = self.n, self.convention
        r = (norm * norm + convention.rms_eps).sqrt()
        a = _logits(z, r, alpha, bias, n)
        pre = torch.sigmoid(a[0]) + convention.pre_eps
        post = torch.sigmoid(a[1]) * convention.post_scale + convention.post_eps
        res = _sinkhorn_steps(_matrices(a[2], n), convention)[-1]
        coefficients = (one.movedim(-1, 1).contiguous() for one in (pre, post, res))
        return *coefficients, z.movedim(-1, 0).contiguous(), r


@dataclass(frozen=True)
class _CoefficientsBackward:
    """The gradients of pre, post, res [B, LANES, ...] -> dz, n C pull, and dscale and dbias of each block."""

    n: int
    convention: Convention

    def arguments(self, wide: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        n = self.n
        grads: list[Shape] = [(B, LANES, n), (B, LANES, n), (B, LANES, n, n)]
        return [*((grad, wide) for grad in grads), *_Coefficients(n, self.convention).arguments(wide)]

    def __call__(
        self, dpre: Tensor, dpost: Tensor, dres: Tensor, z: Tensor, r: Tensor, alpha: Tensor, bias: Tensor
    ) -> tuple[Tensor, ...]:
        n, convention = self.n, self.convention
        a = _logits(z, r, alpha, bias, n)
        pre, post = torch.sigmoid(a[0]), torch.sigmoid(a[1])
        steps = _sinkhorn_steps(_matrices(a[2], n), convention)
        d_res = _sinkhorn_backward(dres.movedim(1, -1), steps, convention)
        d = torch.cat(
            [
                dpre.movedim(1, -1) * pre * (1 - pre),
                dpost.movedim(1, -1) * post * (1 - post) * convention.post_scale,
                d_res.flatten(1, 2),
            ],
            1,
        )
        zt, r = z.movedim(1, -1), r.unsqueeze(1)
        over_r = d / r
        dz = over_r * plain.per_column(alpha, n).unsqueeze(1)
        pull = (dz * zt).sum(1) / (r * r).squeeze(1)
        return dz.movedim(-1, 1).contiguous(), pull, (over_r * zt).sum(-1), d.sum(-1)


@dataclass(frozen=True)
class _Merge:
    """x [T, n, C], f [T, C], post [T, n], res [T, n, n] -> the merged streams."""

    n: int
    transposed: bool
    rounds: bool

    def arguments(self, dtype: torch.dtype, f: torch.dtype, wide: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        n = self.n
        return [((T, n, C), dtype), ((T, C), f), ((T, n), wide), ((T, n, n), wide)]

    def __call__(self, x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor]:
        wide = post.dtype
        p, m = (one.to(x.dtype).to(wide) if self.rounds else one for one in (post, res))
        m = m.transpose(1, 2) if self.transposed else m
        mixed = _sum(m[:, :, j : j + 1] * x[:, j : j + 1].to(wide) for j in range(self.n))
        return ((mixed + p.unsqueeze(2) * f.to(wide).unsqueeze(1)).to(x.dtype),)


@dataclass(frozen=True)
class _BranchBackward:
    """G, x [T, n, C], f [T, C], post [T, n] -> df, dpost, dres, all in one pass."""

    n: int
    transposed: bool
    rounds: bool

    def arguments(
        self, grad: torch.dtype, dtype: torch.dtype, f: torch.dtype, wide: torch.dtype
    ) -> list[tuple[Shape, torch.dtype]]:
        n = self.n
        return [((T, n, C), grad), ((T, n, C), dtype), ((T, C), f), ((T, n), wide)]

    def __call__(self, g: Tensor, x: Tensor, f: Tensor, post: Tensor) -> tuple[Tensor, ...]:
        n, wide = self.n, post.dtype
        p = post.to(x.dtype).to(wide) if self.rounds else post
        gs = [one.to(wide) for one in g.unbind(1)]
        xs = [one.to(wide) for one in x.unbind(1)]
        df = _sum(p[:, i : i + 1] * gs[i] for i in range(n)).to(f.dtype)
        dpost = torch.stack([(one * f.to(wide)).sum(-1) for one in gs], 1)
        pairs = [(i, j) if not self.transposed else (j, i) for i in range(n) for j in range(n)]
        dres = torch.stack([(gs[i] * xs[j]).sum(-1) for i, j in pairs], 1)
        return df, dpost, dres


@dataclass(frozen=True)
class _Streams:
    """Adds ``- X pull + pre du + sum_i mix_ji G_i`` to ``dz @ phi^T``, in place or into a narrower tensor."""

    n: int

    def arguments(
        self, wide: torch.dtype, dtype: torch.dtype, du: torch.dtype, g: torch.dtype
    ) -> list[tuple[Shape, torch.dtype]]:
        n = self.n
        streams: Shape = (T, n, C)
        small: list[Shape] = [(T, n), (T, n, n), (T,)]
        narrow = [(streams, dtype)] if dtype != wide else []
        given = [(streams, wide), (streams, dtype), ((T, C), du), (streams, g)]
        return [*given, *((shape, wide) for shape in small), *narrow]

    def __call__(
        self,
        dx: Tensor,
        x: Tensor,
        du: Tensor,
        g: Tensor,
        pre: Tensor,
        mix: Tensor,
        pull: Tensor,
        narrow: Tensor | None = None,
    ) -> tuple[()]:
        wide = pre.dtype
        own = dx - x.to(wide) * pull.view(-1, 1, 1) + pre.unsqueeze(2) * du.to(wide).unsqueeze(1)
        mixed = _sum(mix[:, :, i : i + 1] * g[:, i : i + 1].to(wide) for i in range(self.n))
        (dx if narrow is None else narrow).copy_(own + mixed)
        return ()


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _matrices(logits: Tensor, n: int) -> Tensor:
    """[B, n n, LANES] -> [B, n, n, LANES]."""
    return logits.view(-1, n, n, LANES)


def _logits(z: Tensor, r: Tensor, alpha: Tensor, bias: Tensor, n: int) -> tuple[Tensor, ...]:
    """The three pre-activations, [B, columns, LANES]."""
    normed = z.movedim(1, -1) / r.unsqueeze(1)
    a = normed * plain.per_column(alpha, n).unsqueeze(1) + bias.unsqueeze(1)
    return a.split_with_sizes([n, n, n * n], 1)


def _axes(convention: Convention) -> tuple[int, int]:
    return (2, 1) if convention.rows_first else (1, 2)


def _sinkhorn_steps(logits: Tensor, convention: Convention) -> list[Tensor]:
    """[B, n, n, LANES] -> the matrices after each half-step, as ``plain_sinkhorn`` has them."""
    e, axes = convention.divisor_eps, _axes(convention)
    if e == 0:
        a = logits
        steps = []
        for axis in axes:
            a = a - a.amax(axis, keepdim=True)
            a = a - a.exp().sum(axis, keepdim=True).log()
            steps.append(a.exp())
    else:
        shifted = (logits - logits.amax(axes[0], keepdim=True)).exp()
        m = shifted / shifted.sum(axes[0], keepdim=True) + e
        steps = [m, m / (m.sum(axes[1], keepdim=True) + e)]
    for _ in range(convention.iterations - 1):
        for axis in axes:
            m = steps[-1]
            steps.append(m / (m.sum(axis, keepdim=True) + e))
    return steps


def _sinkhorn_backward(grad: Tensor, steps: list[Tensor], convention: Convention) -> Tensor:
    e, axes = convention.divisor_eps, _axes(convention)
    g = grad * steps[-1]
    for k in reversed(range(1, len(steps))):
        g = g - steps[k] * g.sum(axes[k % 2], keepdim=True)
    softmax = steps[0]
    if e != 0:
        softmax = softmax - e
        g = g * softmax / steps[0]
    return g - softmax * g.sum(axes[0], keepdim=True)


# --- compiling them ---------------------------------------------------------------------------------------

_bodies: dict[Any, Body] = {}
_failures: list[Exception] = []  # after one nothing more is compiled
_lock = threading.Lock()


def _compiled(body: Any, *dtypes: torch.dtype) -> Body | None:
    """The body, compiled for arguments of these dtypes; None where compilation is switched off or has failed."""
    key = (body, dtypes)
    found = _bodies.get(key)
    if found is None and not torch._dynamo.config.disable:
        with _lock:
            if key not in _bodies and not _failures:
                _try_to_compile(key, body.arguments(*dtypes))
        found = _bodies.get(key)
    return found


def _try_to_compile(key: tuple[Any, ...], arguments: list[tuple[Shape, torch.dtype]]) -> None:
    # In a thread of its own: no dispatch mode, no inference mode, no autocast and no graph of the caller is there.
    try:
        with ThreadPoolExecutor(1) as other:
            _bodies[key] = other.submit(_compile, key[0], arguments).result()
    except Exception as error:
        _failures.append(error)
        first = (str(error).strip() or "no message").splitlines()[0]
        found = f"not possible here ({type(error).__name__}: {first})"
        legal = "a C++ compiler that torch.compile can use"
        step = "install one (g++ or clang++), or go on: the same is computed in plain torch, more slowly"
        warnings.warn(wrong("compiling the CPU bodies of mHC", found, legal, step), stacklevel=2)


def _compile(body: Any, arguments: list[tuple[Shape, torch.dtype]]) -> Body:
    def traced(*tensors: Tensor) -> Any:
        for tensor, (shape, _) in zip(tensors, arguments, strict=True):
            for size, known in zip(tensor.shape, shape, strict=True):
                assert isinstance(known, str) or size == known  # makes a constant of the size
        return body(*tensors)

    examples = [
        torch.empty([_HINTS[size] if isinstance(size, str) else size for size in shape], dtype=dtype)
        for shape, dtype in arguments
    ]
    with torch.no_grad():
        graph = _torch.make_fx(traced, tracing_mode="symbolic")(*examples)
        inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        compiled: Body = torch._inductor.compile(graph, inputs, options={"cpp.dynamic_threads": True})
    return compiled
