"""The op that crosses from one site to the next: the merge of a site and the read of what it merged, in one.

    X', u', pre', post', res', carrier' = merge_read(X, f, carrier, post, res, phi', alpha', bias', ...)

is ``merge_carried`` of a site and ``read`` of the next, with the same values: X' is rounded to the streams' dtype
before its logits, so that the backward sees the state that the forward saw.  X is read once and X' written once, and
the product with phi' is made of what is on chip: 9 + 5 units of C instead of 9 + 4 + 5 (n = 4).

Its backward is that of the two ops, one after the other, or crosses the border too.  For that both ``read`` and
``merge_read`` have one output more, the *carrier of f*: a tensor of f's shape that holds nothing, as the carrier of
streams does.  A merge that gets the carrier of f of the read before leaves dpost and dres to the backward of that
read: it sends f to the carrier, G to the other one, and nothing to post and res.  What is left of it is df, which
needs nothing but G and post, and so is written by the pass that makes G, the last one of the site that it reads for::

    backward of merge_read    G', du', X', f'  -> dpre', dpost', dres'
                              G', du', X'      -> G, df                 df for the merge before

10 + 14 units of C instead of 10 + 5 + 13.  The argument ``branch`` is that carrier.  It has to come from the read whose
carrier, post and res the merge has, and no other merge may have it, as what it is sent is not added up.  Only
``passes.fuse``, which sees all of this, gives it.  Where no kernel crosses (``triton_site_backward.crosses``), it is
sent nothing, and the backward is that of the two ops.

``high_priority``, last, has the launches of this op and of its backward run on a stream of high priority, as that of
``merge_carried`` does (:mod:`~mhc_compile.kernels.priority`).

Shapes, dtypes and errors are those of :mod:`~mhc_compile.kernels.site_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from mhc_compile.kernels import arguments, plain
from mhc_compile.kernels.convention import Before
from mhc_compile.kernels.ops import _fake, _like, _no_autocast, _op, _refuse_double_backward
from mhc_compile.kernels.priority import on_high_priority
from mhc_compile.kernels.site_ops import (
    _VARIANT,
    _carriers,
    _check_merge_carried,
    _merge_carried_backward,
    _merge_carried_flops,
    _read_backward,
    _read_backward_flops,
    _read_flops,
    convention_of,
    crosses,
    is_compiled,
    kernels,
    with_products,
)


def merge_read(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    post: Tensor,
    res: Tensor | None,
    parameters: tuple[Tensor, Tensor, Tensor],
    eps: float,
    iterations: int,
    *,
    res_transposed: bool = False,
    res_rounded: bool = False,
    **variant: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """X', and u, pre, post, res and carrier of the site that reads it.

    streams, f, carrier, post and res as for ``site_ops.merge_carried``, with its flags as ``res_transposed`` and
    ``res_rounded``; ``parameters`` are phi, alpha and bias of the next site; all else as for ``site_ops.read``.
    """
    merging = (streams, f, carrier, None, post, res, res_transposed, res_rounded)
    result: tuple[Tensor, ...] = _merge_read(*merging, *parameters, eps, iterations, **variant)
    merged, u, pre, post, res, carrier, _, _, _ = result
    return merged, u, pre, post, res, carrier


_HIGH = 11  # where `high_priority` stands, behind the arguments of a read


def is_high(variant: Sequence[Any]) -> bool:
    return len(variant) > _HIGH and bool(variant[_HIGH])


def _check_merge(
    streams: Tensor, f: Tensor, carrier: Tensor, branch: Tensor | None, post: Tensor, res: Tensor | None
) -> None:
    _check_merge_carried(streams, f, carrier, post, res)
    if branch is not None:
        shape = (*streams.shape[:-2], streams.shape[-1])
        arguments.check_one("carrier of f", branch, shape, streams.dtype, "[..., C]")


@_op(
    "merge_read",
    "(Tensor streams, Tensor f, Tensor carrier, Tensor? branch, Tensor post, Tensor? res, bool res_transposed,"
    f" bool res_rounded, Tensor phi, Tensor alpha, Tensor bias, {_VARIANT}, bool high_priority=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _merge_read(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    branch: Tensor | None,
    post: Tensor,
    res: Tensor | None,
    res_transposed: bool,
    res_rounded: bool,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *variant: Any,
) -> Any:
    _check_merge(streams, f, carrier, branch, post, res)
    convention = convention_of(variant)
    arguments.check_coefficients(streams, phi, alpha, bias, convention)
    merging, parameters = (streams, f, post, res, res_transposed, res_rounded), (phi, alpha, bias)
    chosen = kernels(streams, is_compiled(variant))
    with _no_autocast(streams), on_high_priority(is_high(variant)):
        if hasattr(chosen, "merge_read"):
            merged, *coefficients, z, r = chosen.merge_read(*merging, parameters, convention)
        else:  # on a CPU nothing is saved by crossing
            merged = chosen.merge(*merging)
            *coefficients, z, r = chosen.read(merged, *parameters, convention)
    return merged, *coefficients, *_carriers(streams), z, r


@_fake(_merge_read)
def _(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    branch: Tensor | None,
    post: Tensor,
    res: Tensor | None,
    res_transposed: bool,
    res_rounded: bool,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *variant: Any,
) -> Any:
    _check_merge(streams, f, carrier, branch, post, res)
    convention = convention_of(variant)
    arguments.check_coefficients(streams, phi, alpha, bias, convention)
    *lead, n, features = streams.shape
    return (
        _like(streams),
        streams.new_empty((*lead, features)),
        *plain.empty_coefficients(phi, lead, n, convention.groups),
        *_carriers(streams),
        phi.new_empty((phi.shape[1], *lead)),
        phi.new_empty(lead),
    )


# Gradients that nobody sends are None, as in ``read_backward``; ``tap`` is what X' got from other readers.
@_op(
    "merge_read_backward",
    "(Tensor? grad_u, Tensor? grad_pre, Tensor? grad_post, Tensor? grad_res, Tensor? grad_merged, Tensor? f,"
    " Tensor? tap, Tensor streams, Tensor phi, Tensor alpha, Tensor bias, Tensor pre, Tensor post, Tensor res,"
    f" Tensor z, Tensor r, Tensor gains, bool gains_rounded, ScalarType branch_dtype, {_VARIANT},"
    " bool high_priority=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _merge_read_backward(
    grad_u: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    grad_merged: Tensor | None,
    f: Tensor | None,
    tap: Tensor | None,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    post: Tensor,
    res: Tensor,
    z: Tensor,
    r: Tensor,
    gains: Tensor,
    gains_rounded: bool,
    branch_dtype: torch.dtype,
    *variant: Any,
) -> Any:
    """The gradients of streams, phi, alpha and bias, and df of the merge before, whose post are the ``gains``."""
    grads = (grad_u, grad_pre, grad_post, grad_res, grad_merged)
    kept = (streams, phi, alpha, bias, pre, post, res, z, r)
    chosen, convention = kernels(streams, is_compiled(variant)), convention_of(variant)
    with _no_autocast(streams), on_high_priority(is_high(variant)):
        if crosses(chosen, streams, "given"):
            before = Before(gains, gains_rounded, branch_dtype)
            return chosen.chain_backward(grads, f, tap, before, kept, convention, True)[:5]
        grads = with_products(chosen, grads, f, streams, post, convention)
        grad, *parameters = chosen.read_backward(*grads, *kept, convention, True)
        grad = grad if tap is None else grad + tap
        weights, _ = plain.merge_weights(streams, gains, None, False, gains_rounded)
        return grad, *parameters, plain.aggregate(grad, weights).to(branch_dtype)


@_fake(_merge_read_backward)
def _(
    grad_u: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    grad_merged: Tensor | None,
    f: Tensor | None,
    tap: Tensor | None,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    post: Tensor,
    res: Tensor,
    z: Tensor,
    r: Tensor,
    gains: Tensor,
    gains_rounded: bool,
    branch_dtype: torch.dtype,
    *variant: Any,
) -> Any:
    *lead, _, features = streams.shape
    df = streams.new_empty((*lead, features), dtype=branch_dtype)
    return _like(streams), _like(phi), _like(alpha), _like(bias), df


_merge_read_backward.register_autograd(_refuse_double_backward)


def leaves_products(streams: Tensor, mix: str, compiled: bool) -> bool:
    """Whether a merge leaves dpost and dres to the read before; that is right wherever it runs, and fast in kernels."""
    return crosses(kernels(streams, compiled), streams, mix)


def _merge_read_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    streams, f, _, branch, post, res, transposed, ctx.rounded, phi, alpha, bias, *ctx.variant = inputs
    merged, _, *coefficients, _, _, z, r = output
    ctx.mix = "identity" if res is None else "transposed" if transposed else "given"
    ctx.leaves = branch is not None and leaves_products(streams, ctx.mix, is_compiled(ctx.variant))
    ctx.save_for_backward(streams, f, post, merged, phi, alpha, bias, *coefficients, z, r)
    ctx.mark_non_differentiable(z, r)
    ctx.set_materialize_grads(False)


def _merge_read_vjp(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tap, *upstream = grads[:7]
    streams, f, post, *kept = ctx.saved_tensors
    _, *wanted = ctx.needs_input_grad[:6]
    wants = any(wanted)
    flags = (None, None)
    rest = [None for _ in ctx.variant]
    if ctx.leaves and all(wanted):
        before = (post, ctx.rounded, f.dtype)
        grad, *parameters, df = _merge_read_backward(*upstream, tap, *kept, *before, *ctx.variant)
        return None, df, grad, f, None, None, *flags, *parameters, *rest
    of_read, how = ctx.variant[:_HIGH], (is_compiled(ctx.variant), is_high(ctx.variant))
    grad, *parameters = _read_backward(*upstream, *kept, wants, *of_read)
    if not wants:
        return *(None,) * 6, *flags, *parameters, *rest
    grad = grad if tap is None else grad + tap
    df, dpost, dres = _merge_carried_backward(grad, streams, f, post, ctx.mix, ctx.rounded, *how)
    return None, df, grad, None, dpost, None if ctx.mix == "identity" else dres, *flags, *parameters, *rest


_merge_read.register_autograd(_merge_read_vjp, setup_context=_merge_read_setup)


def _merge_read_flops(
    streams: Sequence[int],
    f: Any,
    carrier: Any,
    branch: Any,
    post: Any,
    res: Any,
    res_transposed: Any,
    res_rounded: Any,
    phi: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    return _merge_carried_flops(streams) + _read_flops(streams, phi)


def _merge_read_backward_flops(
    grad_u: Any,
    grad_pre: Any,
    grad_post: Any,
    grad_res: Any,
    grad_merged: Any,
    f: Any,
    tap: Any,
    streams: Sequence[int],
    phi: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    grads = (grad_u, grad_pre, grad_post, grad_res, grad_merged, f)
    of_read = _read_backward_flops(*grads, streams, phi, *args[:7], True)
    return of_read + 2 * prod(streams)


for _packet, _formula in (
    (torch.ops.mhc.merge_read, _merge_read_flops),
    (torch.ops.mhc.merge_read_backward, _merge_read_backward_flops),
):
    if _packet not in flop_counter.flop_registry:  # a reload finds the formula of the first import
        flop_counter.register_flop_formula(_packet)(_formula)
