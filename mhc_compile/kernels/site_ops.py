"""The ops of a whole site: what ``lower`` makes of a site's ops in a graph, and what runs fast.

A site is two ops, one on each side of its branch::

    u, pre, post, res, carrier = read(X, phi, alpha, bias, eps, iterations)
    X' = merge_carried(X, F(u), carrier, post, res)

``read`` is coefficients, Sinkhorn and aggregate in one.  The *carrier* is how the backward of the site becomes one:
a tensor of X's shape that holds nothing (one element, expanded) and that ``merge_carried`` does not read.  The
backward of ``merge_carried`` gives it the gradient G of X', and X nothing; so ``read``'s backward meets du, G and X at
the same time, and writes all that X gets from this site in one pass::

    dX_j = sum_i res_ij G_i + pre_j du + (dz @ phi^T)_j - X_j <dz, z> / (r^2 n C)

``sum_i res_ij G_i`` is never in memory, and autograd has nothing to add.  The backward goes over G, X and f for df,
dpost and dres, over du and X for dpre, and over G, du and X for dX and dphi: 10 + 5 + 13 units of C with n = 4 (fewer
in a chain of sites: :mod:`~mhc_compile.kernels.cross_site_ops`).  Kept for it are X, once, and per token f, the
coefficients, z and r.

``high_priority`` of a merge, last of its arguments, has its launches and those of its backward run on a CUDA stream of
high priority (:mod:`~mhc_compile.kernels.priority`); the values are the same bits.

The gradients are right only if X and res of ``merge_carried`` are those of the ``read`` that its carrier comes from;
one carrier may serve any number of merges.

Shapes, dtypes, errors and the refusal of double backward are as in :mod:`~mhc_compile.kernels.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from mhc_compile.kernels import arguments, ops, plain, site_plain
from mhc_compile.kernels.convention import Convention, of_site
from mhc_compile.kernels.devices import has_kernel
from mhc_compile.kernels.ops import _fake, _like, _no_autocast, _op, _refuse_double_backward
from mhc_compile.kernels.priority import on_high_priority

_VARIANT = (
    "float eps, int iterations, float pre_eps=0.0, float post_scale=2.0, float post_eps=0.0, int groups=3,"
    " float divisor_eps=0.0, bool rows_first=False, bool transposed=False, bool rounded=False,"
    " bool compiled=False"
)
_COMPILED = 10  # its place among these

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def read(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, eps: float, iterations: int, **variant: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, pre, post, res and the carrier of one site.

    streams [..., n, C]; phi [n C, n n + 2 n], alpha [3], bias [n n + 2 n] as for ``ops.coefficients``.  Returns
    u [..., C] in streams' dtype; pre [..., n], post [..., n], res [..., n, n] in phi's; the carrier [..., n, C], for
    ``merge_carried`` alone.  The op itself has three outputs more: the carrier of f [..., C], for ``merge_read`` alone,
    and z [n n + 2 n, ...] and r [...], for its backward.

    ``variant``: pre_eps, post_scale, post_eps and groups as for ``ops.coefficients``; divisor_eps and rows_first as for
    ``ops.sinkhorn``; transposed and rounded as its merges have them; compiled: let inductor compile the bodies that
    run on a CPU, once a process (seconds).
    """
    result: tuple[Tensor, ...] = _read(streams, phi, alpha, bias, eps, iterations, **variant)
    u, pre, post, res, carrier, _, _, _ = result
    return u, pre, post, res, carrier


def merge_carried(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    post: Tensor,
    res: Tensor | None,
    transposed: bool = False,
    rounded: bool = False,
    compiled: bool = False,
) -> Tensor:
    """``X'_i = sum_j res_ij X_j + post_i f``, as ``ops.merge``; its gradient reaches X through the carrier.

    streams, carrier, post and res must be those of one ``read``; res is None where that has none.
    """
    result: Tensor = _merge_carried(streams, f, carrier, post, res, transposed, rounded, compiled)
    return result


def kernels(streams: Tensor, compiled: bool) -> ModuleType:
    """What computes a site: a module with read, read_backward, merge and branch_backward."""
    if has_kernel(streams, streams.shape[-2]):
        return ops.kernels(streams)
    if compiled and streams.device.type == "cpu":
        from mhc_compile.kernels import cpu

        return cpu
    return site_plain


def convention_of(variant: Sequence[Any]) -> Convention:
    return of_site(*variant[:_COMPILED])


def is_compiled(variant: Sequence[Any]) -> bool:
    return len(variant) > _COMPILED and bool(variant[_COMPILED])


# --- read -------------------------------------------------------------------------------------------------


def _check_read(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *variant: Any) -> Convention:
    convention = convention_of(variant)
    arguments.check_coefficients(streams, phi, alpha, bias, convention)
    return convention


def _carriers(streams: Tensor) -> tuple[Tensor, Tensor]:
    """Of G and of f: one element each, in the shape of what they stand for."""
    *lead, _, features = streams.shape
    return streams.new_zeros(1).expand(streams.shape), streams.new_zeros(1).expand((*lead, features))


@_op(
    "read",
    f"(Tensor streams, Tensor phi, Tensor alpha, Tensor bias, {_VARIANT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *variant: Any) -> Any:
    convention = _check_read(streams, phi, alpha, bias, *variant)
    with _no_autocast(streams):
        *coefficients, z, r = kernels(streams, is_compiled(variant)).read(streams, phi, alpha, bias, convention)
    return *coefficients, *_carriers(streams), z, r


@_fake(_read)
def _(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *variant: Any) -> Any:
    convention = _check_read(streams, phi, alpha, bias, *variant)
    *lead, n, features = streams.shape
    return (
        streams.new_empty((*lead, features)),
        *plain.empty_coefficients(phi, lead, n, convention.groups),
        *_carriers(streams),
        phi.new_empty((phi.shape[1], *lead)),
        phi.new_empty(lead),
    )


# A gradient that nobody sends is None, as grad_pre nearly always is.
@_op(
    "read_backward",
    "(Tensor? grad_u, Tensor? grad_pre, Tensor? grad_post, Tensor? grad_res, Tensor? grad_merged, Tensor? f,"
    " Tensor streams, Tensor phi, Tensor alpha, Tensor bias, Tensor pre, Tensor post, Tensor res, Tensor z, Tensor r,"
    f" bool wants_streams, {_VARIANT}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _read_backward(
    grad_u: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    grad_merged: Tensor | None,
    f: Tensor | None,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    post: Tensor,
    res: Tensor,
    z: Tensor,
    r: Tensor,
    wants_streams: bool,
    *variant: Any,
) -> Any:
    grads = (grad_u, grad_pre, grad_post, grad_res, grad_merged)
    kept = (streams, phi, alpha, bias, pre, post, res, z, r)
    chosen, convention = kernels(streams, is_compiled(variant)), convention_of(variant)
    with _no_autocast(streams):
        if f is not None and crosses(chosen, streams, convention.mix):
            return chosen.chain_backward(grads, f, None, None, kept, convention, wants_streams)[:4]
        grads = with_products(chosen, grads, f, streams, post, convention)
        return chosen.read_backward(*grads, *kept, convention, wants_streams)


def crosses(chosen: ModuleType, streams: Tensor, mix: str) -> bool:
    """Whether these kernels have a backward that goes over the border of two sites, for such streams and mix."""
    return hasattr(chosen, "crosses") and bool(chosen.crosses(streams, mix))


def with_products(
    chosen: ModuleType, grads: Grads, f: Tensor | None, streams: Tensor, post: Tensor, convention: Convention
) -> Grads:
    """``grads`` with dpost and dres that a merge of ``f`` has left to the read."""
    *others, grad_post, grad_res, grad_merged = grads
    if f is None or grad_merged is None or not convention.post:
        return grads
    _, dpost, dres = chosen.branch_backward(grad_merged, streams, f, post, convention.mix, convention.rounded)
    grad_post = dpost if grad_post is None else grad_post + dpost
    if convention.res != "none":
        grad_res = dres if grad_res is None else grad_res + dres
    return others[0], others[1], grad_post, grad_res, grad_merged


@_fake(_read_backward)
def _(
    grad_u: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    grad_merged: Tensor | None,
    f: Tensor | None,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    post: Tensor,
    res: Tensor,
    z: Tensor,
    r: Tensor,
    wants_streams: bool,
    *variant: Any,
) -> Any:
    dx = _like(streams) if wants_streams else streams.new_empty(0)
    return dx, _like(phi), _like(alpha), _like(bias)


def _read_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.variant = inputs[:4], inputs[4:]
    _, pre, post, res, _, _, z, r = output
    ctx.save_for_backward(*tensors, pre, post, res, z, r)
    ctx.mark_non_differentiable(z, r)
    ctx.set_materialize_grads(False)


def _read_vjp(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wants_streams = ctx.needs_input_grad[0]
    dx, *others = _read_backward(*grads[:6], *ctx.saved_tensors, wants_streams, *ctx.variant)
    return dx if wants_streams else None, *others, *(None for _ in ctx.variant)


_read.register_autograd(_read_vjp, setup_context=_read_setup)
_read_backward.register_autograd(_refuse_double_backward)


# --- merge ------------------------------------------------------------------------------------------------


def _check_merge_carried(streams: Tensor, f: Tensor, carrier: Tensor, post: Tensor, res: Tensor | None) -> None:
    arguments.check_merge(streams, f, post, res)
    arguments.check_one("carrier", carrier, tuple(streams.shape), streams.dtype, "[..., n, C]")


@_op(
    "merge_carried",
    "(Tensor streams, Tensor f, Tensor carrier, Tensor post, Tensor? res, bool transposed=False, bool rounded=False,"
    " bool compiled=False, bool high_priority=False) -> Tensor",
)
def _merge_carried(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    post: Tensor,
    res: Tensor | None,
    transposed: bool = False,
    rounded: bool = False,
    compiled: bool = False,
    high_priority: bool = False,
) -> Tensor:
    _check_merge_carried(streams, f, carrier, post, res)
    with _no_autocast(streams), on_high_priority(high_priority):
        merged: Tensor = kernels(streams, compiled).merge(streams, f, post, res, transposed, rounded)
    return merged


@_fake(_merge_carried)
def _(streams: Tensor, f: Tensor, carrier: Tensor, post: Tensor, res: Tensor | None, *variant: bool) -> Tensor:
    _check_merge_carried(streams, f, carrier, post, res)
    return _like(streams)


@_op(
    "merge_carried_backward",
    "(Tensor grad, Tensor streams, Tensor f, Tensor post, str mix, bool rounded, bool compiled=False,"
    " bool high_priority=False) -> (Tensor, Tensor, Tensor)",
)
def _merge_carried_backward(
    grad: Tensor,
    streams: Tensor,
    f: Tensor,
    post: Tensor,
    mix: str,
    rounded: bool,
    compiled: bool = False,
    high_priority: bool = False,
) -> Any:
    with _no_autocast(streams), on_high_priority(high_priority):
        return kernels(streams, compiled).branch_backward(grad, streams, f, post, mix, rounded)


@_fake(_merge_carried_backward)
def _(grad: Tensor, streams: Tensor, f: Tensor, post: Tensor, mix: str, *variant: bool) -> Any:
    entries = 0 if mix == "identity" else post.shape[-1]
    return _like(f), _like(post), post.new_empty((*post.shape[:-1], entries, entries))


def _merge_carried_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    streams, f, _, post, res, transposed, ctx.rounded, *ctx.how = inputs  # how: compiled, high_priority
    ctx.mix = "identity" if res is None else "transposed" if transposed else "given"
    ctx.save_for_backward(streams, f, post)


def _merge_carried_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    df, dpost, dres = _merge_carried_backward(grad, *ctx.saved_tensors, ctx.mix, ctx.rounded, *ctx.how)
    return None, df, grad, dpost, None if ctx.mix == "identity" else dres, *(None,) * 4


_merge_carried.register_autograd(_merge_carried_vjp, setup_context=_merge_carried_setup)
_merge_carried_backward.register_autograd(_refuse_double_backward)


# --- floating point operations, for torch.utils.flop_counter ----------------------------------------------


def _read_flops(streams: Sequence[int], phi: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(streams[:-2]) * prod(phi) + 2 * prod(streams)


def _read_backward_flops(
    grad_u: Sequence[int] | None,
    grad_pre: Any,
    grad_post: Any,
    grad_res: Any,
    grad_merged: Sequence[int] | None,
    f: Sequence[int] | None,
    streams: Sequence[int],
    phi: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    project, one = 2 * prod(streams[:-2]) * prod(phi), 2 * prod(streams)
    to_parameters = project + one * (grad_u is not None)
    to_streams = to_parameters + one * streams[-2] * (grad_merged is not None)
    products = one * (streams[-2] + 1) * (f is not None)  # dpost and dres, which the merge has left
    wants_streams = bool(args[7])
    return products + to_parameters + to_streams * wants_streams


def _merge_carried_flops(streams: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(streams) * (streams[-2] + 1)


def _merge_carried_backward_flops(grad: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(grad) * (grad[-2] + 2)


def _register_flops() -> None:
    formulas: dict[str, Callable[..., int]] = {
        "read": _read_flops,
        "read_backward": _read_backward_flops,
        "merge_carried": _merge_carried_flops,
        "merge_carried_backward": _merge_carried_backward_flops,
    }
    for name, formula in formulas.items():
        packet = getattr(torch.ops.mhc, name)
        if packet not in flop_counter.flop_registry:  # a reload finds the formula of the first import
            flop_counter.register_flop_formula(packet)(formula)


_register_flops()
