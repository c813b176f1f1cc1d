"""The mHC ops as torch custom ops, one for each term of the paper (arXiv 2512.24880, eq. 7 to 19).

Each op has a schema, a fake (shapes only), a backward that is an op of its own, and a plain implementation; a
traced graph therefore reads like the paper, and Sinkhorn's iterations are never unrolled into it.

Symbols: ``...`` token dimensions, ``n`` streams, ``C`` features of a stream.  Streams and f are float16,
bfloat16, float32 or float64; all coefficients and their parameters are float32 (float64 for float64
streams), whatever autocast says.  Outputs are contiguous.  A wrong shape or dtype raises
:class:`~mhc_compile.errors.ShapeError`, also while tracing; differentiating a backward op raises
:class:`~mhc_compile.errors.RewriteError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils import flop_counter

from mhc_compile import _torch
from mhc_compile.errors import RewriteError, wrong
from mhc_compile.kernels import arguments, plain
from mhc_compile.kernels.convention import of_coefficients, of_sinkhorn
from mhc_compile.kernels.devices import has_kernel
from mhc_compile.kernels.priority import on_high_priority

__all__ = ["aggregate", "anchor", "coefficients", "expand", "merge", "readout", "sinkhorn"]


# --- public callables -------------------------------------------------------------------------------------


def expand(x: Tensor, n: int) -> Tensor:
    """Entry of the trunk: ``X_i = x`` for every stream i.

    x [..., C] -> [..., n, C], same dtype, a copy.  Raises ShapeError for n < 1 or an x without dimensions.
    """
    _refuse_transforms(x)
    result: Tensor = _expand(x, n)
    return result


def readout(streams: Tensor) -> Tensor:
    """Exit of the trunk: the mean over streams.

    streams [..., n, C] -> [..., C], same dtype, rounded once.
    """
    _refuse_transforms(streams)
    result: Tensor = _readout(streams)
    return result


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
    """The coefficients of one site, res as logits (eq. 14 to 18)::

        r    = sqrt(mean(X^2 over n C) + eps)          z = vec(X) @ phi
        pre  = sigmoid(alpha_0 z_pre / r + b_pre) + pre_eps
        post = post_scale sigmoid(alpha_1 z_post / r + b_post) + post_eps
        res~ = alpha_2 z_res / r + b_res               (feed to sinkhorn)

    streams [..., n, C]; phi [n C, n n + 2 n], columns pre (n), post (n), res (n n, row-major); alpha [3];
    bias [n n + 2 n].  Returns pre [..., n], post [..., n], logits [..., n, n].  phi, alpha, bias and the
    results are float32 (float64 for float64 streams).

    ``groups``: 3, or 2 without res (streams that are not mixed), or 1 with pre alone (a head): phi and bias have no
    columns and alpha no entry for the others, which are returned empty, [..., 0] and [..., 0, 0].
    """
    _refuse_transforms(streams, phi, alpha, bias)
    variant = (eps, pre_eps, post_scale, post_eps, groups)
    result: tuple[Tensor, Tensor, Tensor] = _coefficients(streams, phi, alpha, bias, *variant)
    return result


def sinkhorn(
    logits: Tensor, iterations: int, divisor_eps: float = 0.0, rows_first: bool = False, implicit: bool = False
) -> Tensor:
    """``exp(logits)`` made doubly stochastic: ``M_t = rows(columns(M_{t-1}))`` (eq. 9 and 19).

    logits [..., n, n], float32 or float64; row i is the output stream.  Rows of the result sum to 1,
    columns as nearly as the iterations have converged.  Finite for any finite logits.

    ``rows_first``: columns where it says rows, and the other way round.  ``divisor_eps`` e: begin with a softmax + e,
    and divide by sums + e (DeepSeek-V4: rows first, 1e-6).  ``implicit``: the gradient at the fixed point, near that
    of the iterations if they have converged.

    Raises ConfigError for iterations < 1, or implicit with a divisor_eps.
    """
    _refuse_transforms(logits)
    result: Tensor = _sinkhorn(logits, iterations, divisor_eps, rows_first, implicit)
    return result


def aggregate(streams: Tensor, pre: Tensor) -> Tensor:
    """The input of the branch, ``u = sum_i pre_i X_i``.

    streams [..., n, C], pre [..., n] -> [..., C] in streams' dtype.
    """
    _refuse_transforms(streams, pre)
    result: Tensor = _aggregate(streams, pre)
    return result


def merge(
    streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None, transposed: bool = False, rounded: bool = False
) -> Tensor:
    """The residual update of a site, ``X'_i = sum_j res_ij X_j + post_i f`` (eq. 7).

    streams [..., n, C], f [..., C], post [..., n], res [..., n, n] -> [..., n, C] in streams' dtype.  f may
    have a narrower dtype (as under autocast), as long as ``X + f`` would have streams' dtype.

    res None leaves the streams unmixed.  ``transposed``: res is [in, out].  ``rounded``: post and res are rounded to
    streams' dtype before they multiply (DeepSeek-V4).
    """
    _refuse_transforms(streams, f, post, *(() if res is None else (res,)))
    result: Tensor = _merge(streams, f, post, res, transposed, rounded)
    return result


def anchor(parameters: Sequence[Tensor]) -> Tensor:
    """Marks a traced forward that must be rewritten: empty float32 while tracing, an error when run.

    A forward that is to be converted returns ``(anchor(its mHC parameters), output)``.  The rewrite
    replaces the anchor; whatever skips the rewrite and runs the plain model instead raises RewriteError.
    """
    result: Tensor = _anchor(list(parameters))
    return result


# --- helpers ----------------------------------------------------------------------------------------------


def _op(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    return custom_op(f"mhc::{name}", mutates_args=(), schema=schema)


def _fake(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    register: Callable[[Callable[..., Any]], Callable[..., Any]] = op.register_fake
    return register


def kernels(tensor: Tensor, n: int | None = None) -> ModuleType:
    """What computes the ops of level 1 for a tensor: streams [..., n, C], or another one with n given."""
    if has_kernel(tensor, tensor.shape[-2] if n is None else n):
        from mhc_compile.kernels import triton_ops

        return triton_ops
    return plain


def _no_autocast(tensor: Tensor) -> torch.autocast:
    # The body of a custom op is still under the caller's autocast, which would make bf16 products of fp32
    # coefficients.
    return torch.autocast(tensor.device.type, enabled=False)


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> Any:
    found = "not supported: their backward ops have no derivative"
    step = "drop create_graph=True, or differentiate the original model"
    raise RewriteError(wrong("double backward through mHC sites", found, "first derivatives", step))


def _refuse_transforms(*tensors: Tensor) -> None:
    """The ops have no rule for a transform of torch.func that differentiates, and none for tangents.

    Forward mode would leave the tangents out without a word. (vmap runs them in a loop.)
    """
    if torch.compiler.is_compiling():
        return
    found = [name for name in _torch.function_transforms() if "vmap" not in name]
    if found or _torch.has_tangents(tensors):
        what = f"inside {found[0] if found else 'forward-mode differentiation'}"
        step = "differentiate mhc_compile.kernels.reference, which is plain torch"
        raise RewriteError(wrong("an mHC op", what, "backward() and torch.autograd.grad", step))


# --- trunk entry and exit ---------------------------------------------------------------------------------


@_op("expand", "(Tensor x, SymInt n) -> Tensor")
def _expand(x: Tensor, n: int) -> Any:
    arguments.check_expand(x, n)
    return kernels(x, n).expand(x, n)


@_fake(_expand)
def _(x: Tensor, n: int) -> Tensor:
    arguments.check_expand(x, n)
    return x.new_empty((*x.shape[:-1], n, x.shape[-1]))


@_op("expand_backward", "(Tensor grad) -> Tensor")
def _expand_backward(grad: Tensor) -> Any:
    return kernels(grad).expand_backward(grad)


@_fake(_expand_backward)
def _(grad: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-2], grad.shape[-1]))


def _expand_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _expand_backward(grad), None


_expand.register_autograd(_expand_vjp)
_expand_backward.register_autograd(_refuse_double_backward)


@_op("readout", "(Tensor streams) -> Tensor")
def _readout(streams: Tensor) -> Any:
    arguments.check_streams(streams)
    return kernels(streams).readout(streams)


@_fake(_readout)
def _(streams: Tensor) -> Tensor:
    arguments.check_streams(streams)
    return streams.new_empty((*streams.shape[:-2], streams.shape[-1]))


@_op("readout_backward", "(Tensor grad, SymInt n) -> Tensor")
def _readout_backward(grad: Tensor, n: int) -> Any:
    return kernels(grad, n).readout_backward(grad, n)


@_fake(_readout_backward)
def _(grad: Tensor, n: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], n, grad.shape[-1]))


def _readout_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.n = inputs[0].shape[-2]


def _readout_vjp(ctx: Any, grad: Tensor) -> Tensor:
    result: Tensor = _readout_backward(grad, ctx.n)
    return result


_readout.register_autograd(_readout_vjp, setup_context=_readout_setup)
_readout_backward.register_autograd(_refuse_double_backward)


# --- coefficients -----------------------------------------------------------------------------------------

_GATES = "float eps, float pre_eps=0.0, float post_scale=2.0, float post_eps=0.0, int groups=3"


@_op("coefficients", f"(Tensor streams, Tensor phi, Tensor alpha, Tensor bias, {_GATES}) -> (Tensor, Tensor, Tensor)")
def _coefficients(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *variant: Any) -> Any:
    convention = of_coefficients(*variant)
    arguments.check_coefficients(streams, phi, alpha, bias, convention)
    with _no_autocast(streams):
        return kernels(streams).coefficients(streams, phi, alpha, bias, convention)


@_fake(_coefficients)
def _(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *variant: Any) -> Any:
    convention = of_coefficients(*variant)
    arguments.check_coefficients(streams, phi, alpha, bias, convention)
    return plain.empty_coefficients(phi, streams.shape[:-2], streams.shape[-2], convention.groups)


@_op(
    "coefficients_backward",
    "(Tensor grad_pre, Tensor grad_post, Tensor grad_logits, Tensor streams, Tensor phi, Tensor alpha,"
    f" Tensor bias, {_GATES}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _coefficients_backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_logits: Tensor,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *variant: Any,
) -> Any:
    grads, convention = (grad_pre, grad_post, grad_logits), of_coefficients(*variant)
    with _no_autocast(streams):
        return kernels(streams).coefficients_backward(*grads, streams, phi, alpha, bias, convention)


@_fake(_coefficients_backward)
def _(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_logits: Tensor,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *variant: Any,
) -> Any:
    return _like(streams), _like(phi), _like(alpha), _like(bias)


def _coefficients_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.variant = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors)


def _coefficients_vjp(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    found = _coefficients_backward(*grads, *ctx.saved_tensors, *ctx.variant)
    return *found, *(None for _ in ctx.variant)


_coefficients.register_autograd(_coefficients_vjp, setup_context=_coefficients_setup)
_coefficients_backward.register_autograd(_refuse_double_backward)


# --- Sinkhorn ---------------------------------------------------------------------------------------------

_BALANCE = "int iterations, float divisor_eps=0.0, bool rows_first=False, bool implicit=False"


@_op("sinkhorn", f"(Tensor logits, {_BALANCE}) -> Tensor")
def _sinkhorn(logits: Tensor, *variant: Any) -> Tensor:
    arguments.check_sinkhorn(logits)
    result: Tensor = kernels(logits, logits.shape[-1]).sinkhorn(logits, of_sinkhorn(*variant))
    return result


@_fake(_sinkhorn)
def _(logits: Tensor, *variant: Any) -> Tensor:
    arguments.check_sinkhorn(logits)
    of_sinkhorn(*variant)
    return _like(logits)


@_op("sinkhorn_backward", f"(Tensor grad, Tensor logits, {_BALANCE}) -> Tensor")
def _sinkhorn_backward(grad: Tensor, logits: Tensor, *variant: Any) -> Tensor:
    with _no_autocast(logits):
        result: Tensor = kernels(logits, logits.shape[-1]).sinkhorn_backward(grad, logits, of_sinkhorn(*variant))
    return result


@_fake(_sinkhorn_backward)
def _(grad: Tensor, logits: Tensor, *variant: Any) -> Tensor:
    return _like(logits)


def _sinkhorn_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, *ctx.variant = inputs
    ctx.save_for_backward(logits)


def _sinkhorn_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _sinkhorn_backward(grad, *ctx.saved_tensors, *ctx.variant), *(None for _ in ctx.variant)


_sinkhorn.register_autograd(_sinkhorn_vjp, setup_context=_sinkhorn_setup)
_sinkhorn_backward.register_autograd(_refuse_double_backward)


# --- aggregate and merge ----------------------------------------------------------------------------------


@_op("aggregate", "(Tensor streams, Tensor pre) -> Tensor")
def _aggregate(streams: Tensor, pre: Tensor) -> Any:
    arguments.check_aggregate(streams, pre)
    with _no_autocast(streams):
        return kernels(streams).aggregate(streams, pre)


@_fake(_aggregate)
def _(streams: Tensor, pre: Tensor) -> Tensor:
    arguments.check_aggregate(streams, pre)
    return streams.new_empty((*streams.shape[:-2], streams.shape[-1]))


@_op("aggregate_backward", "(Tensor grad, Tensor streams, Tensor pre) -> (Tensor, Tensor)")
def _aggregate_backward(grad: Tensor, streams: Tensor, pre: Tensor) -> Any:
    with _no_autocast(streams):
        return kernels(streams).aggregate_backward(grad, streams, pre)


@_fake(_aggregate_backward)
def _(grad: Tensor, streams: Tensor, pre: Tensor) -> Any:
    return _like(streams), _like(pre)


def _aggregate_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _aggregate_vjp(ctx: Any, grad: Tensor) -> Any:
    return _aggregate_backward(grad, *ctx.saved_tensors)


_aggregate.register_autograd(_aggregate_vjp, setup_context=_aggregate_setup)
_aggregate_backward.register_autograd(_refuse_double_backward)


_MERGED = (
    "Tensor streams, Tensor f, Tensor post, Tensor? res, bool transposed=False, bool rounded=False,"
    " bool high_priority=False"
)


@_op("merge", f"({_MERGED}) -> Tensor")
def _merge(
    streams: Tensor,
    f: Tensor,
    post: Tensor,
    res: Tensor | None,
    transposed: bool = False,
    rounded: bool = False,
    high_priority: bool = False,
) -> Any:
    arguments.check_merge(streams, f, post, res)
    with _no_autocast(streams), on_high_priority(high_priority):
        return kernels(streams).merge(streams, f, post, res, transposed, rounded)


@_fake(_merge)
def _(streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None, *variant: bool) -> Tensor:
    arguments.check_merge(streams, f, post, res)
    return _like(streams)


@_op("merge_backward", f"(Tensor grad, {_MERGED}) -> (Tensor, Tensor, Tensor, Tensor)")
def _merge_backward(
    grad: Tensor,
    streams: Tensor,
    f: Tensor,
    post: Tensor,
    res: Tensor | None,
    transposed: bool = False,
    rounded: bool = False,
    high_priority: bool = False,
) -> Any:
    with _no_autocast(streams), on_high_priority(high_priority):
        return kernels(streams).merge_backward(grad, streams, f, post, res, transposed, rounded)


@_fake(_merge_backward)
def _(
    grad: Tensor,
    streams: Tensor,
    f: Tensor,
    post: Tensor,
    res: Tensor | None,
    *variant: bool,
) -> Any:
    dres = post.new_empty((*post.shape[:-1], 0, 0)) if res is None else _like(res)
    return _like(streams), _like(f), _like(post), dres


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.transposed, ctx.rounded, ctx.high_priority = inputs
    ctx.save_for_backward(*tensors)


def _merge_vjp(ctx: Any, grad: Tensor) -> Any:
    streams, f, post, res = ctx.saved_tensors
    *others, dres = _merge_backward(grad, streams, f, post, res, ctx.transposed, ctx.rounded, ctx.high_priority)
    return *others, None if res is None else dres, None, None, None


_merge.register_autograd(_merge_vjp, setup_context=_merge_setup)
_merge_backward.register_autograd(_refuse_double_backward)


# --- anchor -----------------------------------------------------------------------------------------------


@_op("anchor", "(Tensor[] parameters) -> Tensor")
def _anchor(parameters: list[Tensor]) -> Tensor:
    raise RewriteError(
        "this graph was not rewritten: it would have run the plain model instead of the converted one; legal: a call "
        "that the model compiles itself. Next: call the converted model itself, without an outer export or trace, "
        "set_stance('force_eager') or TORCHDYNAMO_DISABLE"
    )


@_fake(_anchor)
def _(parameters: list[Tensor]) -> Tensor:
    device = parameters[0].device if parameters else None
    return torch.empty(0, dtype=torch.float32, device=device)


def _anchor_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.count = len(inputs[0])


def _anchor_vjp(ctx: Any, grad: Tensor) -> list[None]:
    return [None] * ctx.count


# Without a formula, tracing the backward of an anchor would fail with torch's message instead of ours.
_anchor.register_autograd(_anchor_vjp, setup_context=_anchor_setup)


# --- floating point operations, for torch.utils.flop_counter ----------------------------------------------


def _coefficients_flops(streams: Sequence[int], phi: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(streams[:-2]) * prod(phi)


def _coefficients_backward_flops(
    grad_pre: Any,
    grad_post: Any,
    grad_logits: Any,
    streams: Sequence[int],
    phi: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    return 3 * _coefficients_flops(streams, phi)  # dX, dphi, and z again


def _aggregate_flops(streams: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(streams)


def _aggregate_backward_flops(grad: Any, streams: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 4 * prod(streams)


def _merge_flops(streams: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(streams) * (streams[-2] + 1)


def _merge_backward_flops(grad: Any, streams: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * _merge_flops(streams)


def _register_flops() -> None:
    formulas: dict[str, Callable[..., int]] = {
        "coefficients": _coefficients_flops,
        "coefficients_backward": _coefficients_backward_flops,
        "aggregate": _aggregate_flops,
        "aggregate_backward": _aggregate_backward_flops,
        "merge": _merge_flops,
        "merge_backward": _merge_backward_flops,
    }
    for name, formula in formulas.items():
        packet = getattr(torch.ops.mhc, name)
        if packet not in flop_counter.flop_registry:  # a reload finds the formula of the first import
            flop_counter.register_flop_formula(packet)(formula)


_register_flops()
