"""Sites with single-pass reads: a branch reads with weights that are known before its state, pre of the site before.

    u, pre, post, res, carrier = read_early(X, w, phi, alpha, bias, ...)            u = sum_i w_i X_i
    X', u', pre', post', res', carrier' = merge_read_early(X, f, carrier, post, res, w', phi', alpha', bias', ...)

are ``site_ops.read`` and ``cross_site_ops.merge_read`` but for u, which w makes in place of pre; without a w there is
no u (the first site of a trunk, whose branch reads the mean of equal streams by an op of its own).  pre is for the site
behind.  Values are those of the ops one by one, X' rounded to the streams' dtype before u' and the logits.

As u' needs nothing that follows from X', a kernel makes it of the tile of X' that it has just written: X and f are read
once, X' and u' written once, 10 units of C (n = 4) in place of 9 + 5, and one launch in place of two
(:mod:`~mhc_compile.kernels.triton_single_pass`).

The backward is that of ``read`` and ``merge_read``, over the border of two sites too, but for du::

    dw_i = <du, X_i>          dX_j = sum_i res_ij G_i + w_j du + (dz @ phi^T)_j - X_j <dz, z> / (r^2 n C)

pre gets its gradient from the dw' of the site behind.  Both ops have one backward op: that of ``merge_read_early``
writes df of the merge as well.

Carriers, ``high_priority``, shapes, dtypes, errors and the refusal of double backward are as in
:mod:`~mhc_compile.kernels.site_ops` and :mod:`~mhc_compile.kernels.cross_site_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from mhc_compile.kernels import arguments, cross_site_ops, plain
from mhc_compile.kernels.convention import Before, Convention
from mhc_compile.kernels.cross_site_ops import _check_merge, is_high
from mhc_compile.kernels.ops import _fake, _like, _no_autocast, _op, _refuse_double_backward
from mhc_compile.kernels.priority import on_high_priority
from mhc_compile.kernels.site_ops import (
    _VARIANT,
    Grads,
    _carriers,
    _check_read,
    _merge_carried_backward,
    _merge_carried_flops,
    _read_backward_flops,
    convention_of,
    crosses,
    is_compiled,
    kernels,
    with_products,
)

Parameters = tuple[Tensor, Tensor, Tensor]  # phi, alpha, bias


def read_early(
    streams: Tensor,
    weights: Tensor | None,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    eps: float,
    iterations: int,
    **variant: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, pre, post, res and the carrier of one site, whose branch reads with ``weights`` [..., n].

    Without weights u is empty.  All else as for ``site_ops.read``.
    """
    result: tuple[Tensor, ...] = _read_early(streams, weights, phi, alpha, bias, eps, iterations, **variant)
    u, pre, post, res, carrier, _, _, _ = result
    return u, pre, post, res, carrier


def merge_read_early(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    post: Tensor,
    res: Tensor | None,
    weights: Tensor | None,
    parameters: Parameters,
    eps: float,
    iterations: int,
    *,
    res_transposed: bool = False,
    res_rounded: bool = False,
    **variant: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """X', and u, pre, post, res and carrier of the site behind, whose branch reads X' with ``weights`` [..., n].

    All else as for ``cross_site_ops.merge_read``.
    """
    merging = (streams, f, carrier, None, post, res, res_transposed, res_rounded)
    result: tuple[Tensor, ...] = _merge_read_early(*merging, weights, *parameters, eps, iterations, **variant)
    merged, u, pre, post, res, carrier, _, _, _ = result
    return merged, u, pre, post, res, carrier


def _check_early(streams: Tensor, weights: Tensor | None, parameters: Parameters, variant: Sequence[Any]) -> Convention:
    convention = _check_read(streams, *parameters, *variant)
    if weights is not None:
        dtype = plain.coefficient_dtype(streams.dtype)
        arguments.check_one("weights", weights, (*streams.shape[:-1],), dtype, "[..., n]", streams.device)
    return convention


def _outputs(streams: Tensor, weights: Tensor | None, parameters: Parameters, convention: Convention) -> Any:
    """What ``read_early`` gives, empty."""
    (*lead, n, features), phi = streams.shape, parameters[0]
    return (
        streams.new_empty(0 if weights is None else (*lead, features)),
        *plain.empty_coefficients(phi, lead, n, convention.groups),
        *_carriers(streams),
        phi.new_empty((phi.shape[1], *lead)),
        phi.new_empty(lead),
    )


def _read_with(
    chosen: ModuleType, streams: Tensor, weights: Tensor | None, parameters: Parameters, convention: Convention
) -> tuple[Tensor, ...]:
    if hasattr(chosen, "read_early"):
        made: tuple[Tensor, ...] = chosen.read_early(streams, weights, *parameters, convention)
        return made
    _, *rest = chosen.read(streams, *parameters, convention, aggregates=False)
    return streams.new_empty(0) if weights is None else plain.aggregate(streams, weights), *rest


# --- read -------------------------------------------------------------------------------------------------


@_op(
    "read_early",
    f"(Tensor streams, Tensor? weights, Tensor phi, Tensor alpha, Tensor bias, {_VARIANT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read_early(
    streams: Tensor, weights: Tensor | None, phi: Tensor, alpha: Tensor, bias: Tensor, *variant: Any
) -> Any:
    parameters = (phi, alpha, bias)
    convention = _check_early(streams, weights, parameters, variant)
    with _no_autocast(streams):
        made = _read_with(kernels(streams, is_compiled(variant)), streams, weights, parameters, convention)
    *coefficients, z, r = made
    return *coefficients, *_carriers(streams), z, r


@_fake(_read_early)
def _(streams: Tensor, weights: Tensor | None, phi: Tensor, alpha: Tensor, bias: Tensor, *variant: Any) -> Any:
    convention = _check_early(streams, weights, (phi, alpha, bias), variant)
    return _outputs(streams, weights, (phi, alpha, bias), convention)


# --- merge and read ---------------------------------------------------------------------------------------


@_op(
    "merge_read_early",
    "(Tensor streams, Tensor f, Tensor carrier, Tensor? branch, Tensor post, Tensor? res, bool res_transposed,"
    f" bool res_rounded, Tensor? weights, Tensor phi, Tensor alpha, Tensor bias, {_VARIANT},"
    " bool high_priority=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _merge_read_early(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    branch: Tensor | None,
    post: Tensor,
    res: Tensor | None,
    res_transposed: bool,
    res_rounded: bool,
    weights: Tensor | None,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *variant: Any,
) -> Any:
    _check_merge(streams, f, carrier, branch, post, res)
    merging, parameters = (streams, f, post, res, res_transposed, res_rounded), (phi, alpha, bias)
    convention = _check_early(streams, weights, parameters, variant)
    chosen = kernels(streams, is_compiled(variant))
    with _no_autocast(streams), on_high_priority(is_high(variant)):
        if hasattr(chosen, "merge_read_early"):
            merged, *made = chosen.merge_read_early(*merging, weights, parameters, convention)
        else:  # on a CPU nothing is saved by crossing
            merged = chosen.merge(*merging)
            made = _read_with(chosen, merged, weights, parameters, convention)
    *coefficients, z, r = made
    return merged, *coefficients, *_carriers(streams), z, r


@_fake(_merge_read_early)
def _(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    branch: Tensor | None,
    post: Tensor,
    res: Tensor | None,
    res_transposed: bool,
    res_rounded: bool,
    weights: Tensor | None,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *variant: Any,
) -> Any:
    _check_merge(streams, f, carrier, branch, post, res)
    convention = _check_early(streams, weights, (phi, alpha, bias), variant)
    return _like(streams), *_outputs(streams, weights, (phi, alpha, bias), convention)


# --- backward ---------------------------------------------------------------------------------------------


# Gradients that nobody sends are None; ``tap`` is what the streams got from other readers, and ``gains`` are post of
# the merge that made them, where that wants its df from here.  What is not asked for is empty.
@_op(
    "read_early_backward",
    "(Tensor? grad_u, Tensor? grad_pre, Tensor? grad_post, Tensor? grad_res, Tensor? grad_merged, Tensor? f,"
    " Tensor? tap, Tensor streams, Tensor? weights, Tensor phi, Tensor alpha, Tensor bias, Tensor pre, Tensor post,"
    " Tensor res, Tensor z, Tensor r, bool wants_streams, Tensor? gains, bool gains_rounded,"
    f" ScalarType branch_dtype, {_VARIANT}, bool high_priority=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read_early_backward(
    grad_u: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    grad_merged: Tensor | None,
    f: Tensor | None,
    tap: Tensor | None,
    streams: Tensor,
    weights: Tensor | None,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    post: Tensor,
    res: Tensor,
    z: Tensor,
    r: Tensor,
    wants_streams: bool,
    gains: Tensor | None,
    gains_rounded: bool,
    branch_dtype: torch.dtype,
    *variant: Any,
) -> Any:
    """The gradients of streams, phi, alpha, bias and weights, and df of the merge before."""
    grads = (grad_u if weights is not None else None, grad_pre, grad_post, grad_res, grad_merged)
    kept = (streams, phi, alpha, bias, pre, post, res, z, r)
    before = None if gains is None else Before(gains, gains_rounded, branch_dtype)
    chosen, convention = kernels(streams, is_compiled(variant)), convention_of(variant)
    with _no_autocast(streams), on_high_priority(is_high(variant)):
        if crosses(chosen, streams, "given"):
            found = chosen.chain_backward(grads, f, tap, before, kept, convention, wants_streams, weights)
        else:
            grads = with_products(chosen, grads, f, streams, post, convention)
            found = _one_by_one(chosen, grads, tap, before, kept, convention, wants_streams, weights)
    dx, dphi, dalpha, dbias, df, dweights = found
    empty = streams.new_empty(0, dtype=branch_dtype), pre.new_empty(0)
    return (
        *(dx, dphi, dalpha, dbias),
        empty[1] if dweights is None else dweights,
        empty[0] if df is None else df,
    )


def _one_by_one(
    chosen: ModuleType,
    grads: Grads,
    tap: Tensor | None,
    before: Before | None,
    kept: tuple[Tensor, ...],
    convention: Convention,
    wants_streams: bool,
    weights: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """What ``chain_backward`` gives, where no kernel crosses."""
    (grad_u, *others), streams = grads, kept[0]
    dweights, df = None, None
    if hasattr(chosen, "chain_backward"):
        found = chosen.chain_backward(grads, None, None, None, kept, convention, wants_streams, weights)
        dx, *more, _, dweights = found
    else:
        dx, *more = chosen.read_backward(None, *others, *kept, convention, wants_streams)
        if weights is not None and grad_u is not None:
            read, dweights = plain.aggregate_backward(grad_u, streams, weights)
            dx = dx + read if wants_streams else dx
    if tap is not None and wants_streams:
        dx = dx + tap
    if before is not None:
        gains, _ = plain.merge_weights(streams, before.post, None, False, before.rounded)
        df = plain.aggregate(dx, gains).to(before.dtype)
    return dx, *more, df, dweights


@_fake(_read_early_backward)
def _(
    grad_u: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    grad_merged: Tensor | None,
    f: Tensor | None,
    tap: Tensor | None,
    streams: Tensor,
    weights: Tensor | None,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    post: Tensor,
    res: Tensor,
    z: Tensor,
    r: Tensor,
    wants_streams: bool,
    gains: Tensor | None,
    gains_rounded: bool,
    branch_dtype: torch.dtype,
    *variant: Any,
) -> Any:
    *lead, _, features = streams.shape
    return (
        _like(streams) if wants_streams else streams.new_empty(0),
        _like(phi),
        _like(alpha),
        _like(bias),
        pre.new_empty(0) if weights is None or grad_u is None else _like(weights),
        streams.new_empty(0 if gains is None else (*lead, features), dtype=branch_dtype),
    )


def _read_early_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.variant = inputs[:5], inputs[5:]
    _, pre, post, res, _, _, z, r = output
    ctx.save_for_backward(*tensors, pre, post, res, z, r)
    ctx.mark_non_differentiable(z, r)
    ctx.set_materialize_grads(False)


def _read_early_vjp(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    streams, weights, *kept = ctx.saved_tensors
    wants, wants_weights = ctx.needs_input_grad[:2]
    given = (*grads[:6], None, streams, weights, *kept, wants, None, False, streams.dtype)
    dx, dphi, dalpha, dbias, dweights, _ = _read_early_backward(*given, *ctx.variant)
    first = dx if wants else None, dweights if wants_weights and grads[0] is not None else None
    return *first, dphi, dalpha, dbias, *(None for _ in ctx.variant)


_read_early.register_autograd(_read_early_vjp, setup_context=_read_early_setup)
_read_early_backward.register_autograd(_refuse_double_backward)


def _merge_read_early_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    streams, f, _, branch, post, res, transposed, ctx.rounded, weights, phi, alpha, bias, *ctx.variant = inputs
    merged, _, *coefficients, _, _, z, r = output
    ctx.mix = "identity" if res is None else "transposed" if transposed else "given"
    leaves = cross_site_ops.leaves_products
    ctx.leaves = branch is not None and leaves(streams, ctx.mix, is_compiled(ctx.variant))
    ctx.save_for_backward(streams, f, post, merged, weights, phi, alpha, bias, *coefficients, z, r)
    ctx.mark_non_differentiable(z, r)
    ctx.set_materialize_grads(False)


def _merge_read_early_vjp(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tap, *upstream = grads[:7]
    streams, f, post, merged, weights, *kept = ctx.saved_tensors
    _, *wanted = ctx.needs_input_grad[:6]
    wants, over = any(wanted), ctx.leaves and all(wanted)
    given = (tap if wants else None, merged, weights, *kept, wants, post if over else None, ctx.rounded, f.dtype)
    grad, dphi, dalpha, dbias, dweights, df = _read_early_backward(*upstream, *given, *ctx.variant)
    reads = ctx.needs_input_grad[8] and upstream[0] is not None
    rest = (None, None, dweights if reads else None, dphi, dalpha, dbias, *(None for _ in ctx.variant))
    if over:
        return None, df, grad, f, None, None, *rest
    if not wants:
        return *(None,) * 6, *rest
    how = is_compiled(ctx.variant), is_high(ctx.variant)
    df, dpost, dres = _merge_carried_backward(grad, streams, f, post, ctx.mix, ctx.rounded, *how)
    return None, df, grad, None, dpost, None if ctx.mix == "identity" else dres, *rest


_merge_read_early.register_autograd(_merge_read_early_vjp, setup_context=_merge_read_early_setup)


# --- floating point operations ----------------------------------------------------------------------------


def _read_early_flops(streams: Sequence[int], weights: Any, phi: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(streams[:-2]) * prod(phi) + 2 * prod(streams) * (weights is not None)


def _merge_read_early_flops(streams: Sequence[int], *args: Any, **kwargs: Any) -> int:
    weights, phi = args[7:9]
    return _merge_carried_flops(streams) + _read_early_flops(streams, weights, phi)


def _backward_flops(*args: Any, **kwargs: Any) -> int:
    grads, streams, phi = args[:6], args[7], args[9]
    wants_streams, gains = args[17], args[18]
    of_read = _read_backward_flops(*grads, streams, phi, *(None,) * 7, wants_streams)
    return int(of_read + 2 * prod(streams) * (gains is not None))


for _packet, _formula in (
    (torch.ops.mhc.read_early, _read_early_flops),
    (torch.ops.mhc.merge_read_early, _merge_read_early_flops),
    (torch.ops.mhc.read_early_backward, _backward_flops),
):
    if _packet not in flop_counter.flop_registry:  # a reload finds the formula of the first import
        flop_counter.register_flop_formula(_packet)(_formula)
