"""The op that crosses from one site to the next: the merge of a site and the read of what it merged, in one.

    X', u', pre', post', res', carrier' = merge_read(X, f, carrier, post, res, phi', alpha', bias', ...)

is ``merge_carried`` of a site and ``read`` of the next, with the same values: X' is rounded to the streams' dtype
before its logits, so that the backward sees the state that the forward saw.  X is read once and X' written once, and
the product with phi' is made of what is on chip: 9 + 5 units of C instead of 9 + 4 + 5 (n = 4).

Its backward is that of the two ops, one after the other.  Shapes, dtypes and errors are those of
:mod:`~mhc_compile.kernels.site_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from mhc_compile.kernels import arguments, plain
from mhc_compile.kernels.ops import _fake, _like, _no_autocast, _op
from mhc_compile.kernels.site_ops import (
    _VARIANT,
    _carrier,
    _check_merge_carried,
    _merge_carried_backward,
    _merge_carried_flops,
    _read_backward,
    _read_flops,
    convention_of,
    is_compiled,
    kernels,
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
    merging = (streams, f, carrier, post, res, res_transposed, res_rounded)
    result: tuple[Tensor, ...] = _merge_read(*merging, *parameters, eps, iterations, **variant)
    merged, u, pre, post, res, carrier, _, _ = result
    return merged, u, pre, post, res, carrier


@_op(
    "merge_read",
    "(Tensor streams, Tensor f, Tensor carrier, Tensor post, Tensor? res, bool res_transposed, bool res_rounded,"
    f" Tensor phi, Tensor alpha, Tensor bias, {_VARIANT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _merge_read(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    post: Tensor,
    res: Tensor | None,
    res_transposed: bool,
    res_rounded: bool,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *variant: Any,
) -> Any:
    _check_merge_carried(streams, f, carrier, post, res)
    convention = convention_of(variant)
    arguments.check_coefficients(streams, phi, alpha, bias, convention)
    merging, parameters = (streams, f, post, res, res_transposed, res_rounded), (phi, alpha, bias)
    chosen = kernels(streams, is_compiled(variant))
    with _no_autocast(streams):
        if hasattr(chosen, "merge_read"):
            merged, *coefficients, z, r = chosen.merge_read(*merging, parameters, convention)
        else:  # on a CPU nothing is saved by crossing
            merged = chosen.merge(*merging)
            *coefficients, z, r = chosen.read(merged, *parameters, convention)
    return merged, *coefficients, _carrier(streams), z, r


@_fake(_merge_read)
def _(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    post: Tensor,
    res: Tensor | None,
    res_transposed: bool,
    res_rounded: bool,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *variant: Any,
) -> Any:
    _check_merge_carried(streams, f, carrier, post, res)
    convention = convention_of(variant)
    arguments.check_coefficients(streams, phi, alpha, bias, convention)
    *lead, n, features = streams.shape
    return (
        _like(streams),
        streams.new_empty((*lead, features)),
        *plain.empty_coefficients(phi, lead, n, convention.groups),
        _carrier(streams),
        phi.new_empty((phi.shape[1], *lead)),
        phi.new_empty(lead),
    )


def _merge_read_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    streams, f, _, post, res, transposed, ctx.rounded, phi, alpha, bias, *ctx.variant = inputs
    merged, _, *coefficients, _, z, r = output
    ctx.mix = "identity" if res is None else "transposed" if transposed else "given"
    ctx.save_for_backward(streams, f, post, merged, phi, alpha, bias, *coefficients, z, r)
    ctx.mark_non_differentiable(z, r)
    ctx.set_materialize_grads(False)


def _merge_read_vjp(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_merged, *upstream = grads[:6]
    streams, f, post, *kept = ctx.saved_tensors
    to_merge: tuple[Tensor | None, ...] = (None,) * 5
    wants = any(ctx.needs_input_grad[1:5])
    grad, *parameters = _read_backward(*upstream, *kept, wants, *ctx.variant)
    if wants:
        grad = grad if grad_merged is None else grad + grad_merged
        df, dpost, dres = _merge_carried_backward(
            grad, streams, f, post, ctx.mix, ctx.rounded, is_compiled(ctx.variant)
        )
        to_merge = None, df, grad, dpost, None if ctx.mix == "identity" else dres
    return *to_merge, None, None, *parameters, *(None for _ in ctx.variant)


_merge_read.register_autograd(_merge_read_vjp, setup_context=_merge_read_setup)


def _merge_read_flops(
    streams: Sequence[int],
    f: Any,
    carrier: Any,
    post: Any,
    res: Any,
    res_transposed: Any,
    res_rounded: Any,
    phi: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    return _merge_carried_flops(streams) + _read_flops(streams, phi)


if torch.ops.mhc.merge_read not in flop_counter.flop_registry:  # a reload finds the formula of the first import
    flop_counter.register_flop_formula(torch.ops.mhc.merge_read)(_merge_read_flops)
