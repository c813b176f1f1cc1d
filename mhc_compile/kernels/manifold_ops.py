"""The ops of other sites than Sinkhorn's: `gates`, any form of the coefficients, and `constrain`, any kind of res.

    pre, post, logits = gates(X, phi, alpha, bias, eps, ...)           where `coefficients` has no such form
    res = constrain(logits, kind, n)                                   where `sinkhorn` is not the constraint

Both are plain torch on every device: their formulas are `reference.gates` and the `res` of the entry in
`mhc_compile.constraints`, and their backwards differentiate these formulas. Shapes, dtypes, errors and the refusal of
double backward are as in :mod:`~mhc_compile.kernels.ops`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from mhc_compile import _torch
from mhc_compile.constraints import CONSTRAINTS
from mhc_compile.errors import ConfigError, ShapeError, wrong
from mhc_compile.kernels import arguments, plain, reference
from mhc_compile.kernels.ops import _fake, _like, _no_autocast, _op, _refuse_double_backward, _refuse_transforms


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
    """pre, post and the logits of res of one site, see :func:`mhc_compile.kernels.reference.gates`.

    streams [..., n, C]; phi, alpha and bias float32 (float64 for float64 streams), and so are the results.
    """
    _refuse_transforms(streams, bias)
    result: tuple[Tensor, Tensor, Tensor] = _gates(streams, phi, alpha, bias, eps, logits, pre, post, bounded)
    return result


def constrain(logits: Tensor, kind: str, n: int) -> Tensor:
    """The matrix res [..., n, n] of logits, by the entry `kind` of `mhc_compile.constraints`.

    logits [..., n, n], or [..., count] for an entry whose count is not n n; float32 or float64. Raises ConfigError for
    a kind that is not in the table.
    """
    _refuse_transforms(logits)
    result: Tensor = _constrain(logits, kind, n)
    return result


# --- gates ------------------------------------------------------------------------------------------------

_FORM = "float eps, int logits, bool pre=True, bool post=True, bool bounded=True"
_PARAMETERS = "Tensor? phi, Tensor? alpha, Tensor bias"


def _check_gates(
    streams: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    eps: float,
    logits: int,
    pre: bool = True,
    post: bool = True,
    bounded: bool = True,
) -> tuple[int, ...]:
    """The shape of the logits."""
    arguments.check_streams(streams)
    *lead, n, features = streams.shape
    dtype = plain.coefficient_dtype(streams.dtype)
    columns = n * (int(pre) + int(post)) + logits
    arguments.check_one("bias", bias, (columns,), dtype, "[columns]", streams.device)
    if phi is not None and alpha is not None:
        shape = (n * features, columns) if bounded else (features, columns // n)
        named = "[n C, columns]" if bounded else "[C, columns / n]"
        arguments.check_one("phi", phi, shape, dtype, named, streams.device)
        arguments.check_one("alpha", alpha, (pre + post + (logits > 0),), dtype, "[groups]", streams.device)
    return (*lead, n, n) if logits == n * n else (*lead, logits)


@_op("gates", f"(Tensor streams, {_PARAMETERS}, {_FORM}) -> (Tensor, Tensor, Tensor)")
def _gates(streams: Tensor, phi: Tensor | None, alpha: Tensor | None, bias: Tensor, *form: Any) -> Any:
    shape = _check_gates(streams, phi, alpha, bias, *form)
    *lead, n, features = streams.shape
    x = streams.reshape(-1, n, features)
    with _no_autocast(streams):
        parts = [reference.gates(x[t], phi, alpha, bias, *form) for t in _tiles(x)]
    pre, post, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    return pre.view(*lead, n), post.view(*lead, n), logits.view(shape)


@_fake(_gates)
def _(streams: Tensor, phi: Tensor | None, alpha: Tensor | None, bias: Tensor, *form: Any) -> Any:
    shape = _check_gates(streams, phi, alpha, bias, *form)
    return bias.new_empty(streams.shape[:-1]), bias.new_empty(streams.shape[:-1]), bias.new_empty(shape)


@_op(
    "gates_backward",
    f"(Tensor grad_pre, Tensor grad_post, Tensor grad_logits, Tensor streams, {_PARAMETERS}, {_FORM}) -> Tensor[]",
)
def _gates_backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_logits: Tensor,
    streams: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    *form: Any,
) -> list[Tensor]:
    """Of the streams and the parameters, or of the bias alone where nothing depends on the streams.

    A slice of the tokens at a time; sums over tokens in their order.
    """
    *_, n, features = streams.shape
    x = streams.reshape(-1, n, features)
    tokens = len(x)
    grads = [one.reshape(tokens, *one.shape[streams.dim() - 2 :]) for one in (grad_pre, grad_post, grad_logits)]
    learned = [one for one in (phi, alpha, bias) if one is not None]
    totals, dx = [torch.zeros_like(one) for one in learned], torch.empty_like(x)

    def formula(part: Tensor, *values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = values if len(values) == 3 else (None, None, *values)
        return reference.gates(part, *given, *form)  # type: ignore[arg-type]

    with _no_autocast(streams):
        for t in _tiles(x):
            dx[t], *found = _torch.gradients_inside_op(formula, (x[t], *learned), [one[t] for one in grads])
            for total, one in zip(totals, found, strict=True):
                total += one
    return totals if phi is None else [dx.view(streams.shape), *totals]


@_fake(_gates_backward)
def _(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_logits: Tensor,
    streams: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    *form: Any,
) -> list[Tensor]:
    return [_like(bias)] if phi is None or alpha is None else [_like(streams), _like(phi), _like(alpha), _like(bias)]


def _gates_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    streams, phi, alpha, bias, *ctx.form = inputs
    ctx.static = phi is None
    ctx.save_for_backward(*((bias,) if ctx.static else (streams, phi, alpha, bias)))


def _gates_vjp(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.static:  # constants: the streams tell no more than how many tokens there are
        bias = _gates_backward(*grads, grads[0].unsqueeze(-1), None, None, *ctx.saved_tensors, *ctx.form)
        return None, None, None, *bias, *(None for _ in ctx.form)
    return *_gates_backward(*grads, *ctx.saved_tensors, *ctx.form), *(None for _ in ctx.form)


_gates.register_autograd(_gates_vjp, setup_context=_gates_setup)
_gates_backward.register_autograd(_refuse_double_backward)


def _tiles(x: Tensor) -> Iterator[slice]:
    """Slices of the tokens; one, though empty, where there are none."""
    return iter(list(plain._tiles(len(x), x)) or [slice(0, 0)])


# --- constrain --------------------------------------------------------------------------------------------


def _check_constrain(logits: Tensor, kind: str, n: int) -> tuple[int, ...]:
    """The shape of res."""
    if kind not in CONSTRAINTS:
        legal = "one of " + ", ".join(map(repr, CONSTRAINTS))
        raise ConfigError(wrong("kind", repr(kind), legal, "mhc_compile.constraints is the table"))
    count = CONSTRAINTS[kind].count(n)
    tail = (n, n) if count == n * n else (count,)
    if tuple(logits.shape[-len(tail) :]) != tail:
        legal = f"[..., {', '.join(map(str, tail))}] for {kind!r} with n = {n}"
        raise ShapeError(wrong("logits", arguments.shape_of(logits), legal, "take those of gates or coefficients"))
    if logits.dtype not in (torch.float32, torch.float64):
        step = "keep coefficients in float32"
        raise ShapeError(wrong("dtype of logits", logits.dtype, "float32, float64", step))
    return (*logits.shape[: -len(tail)], n, n)


@_op("constrain", "(Tensor logits, str kind, int n) -> Tensor")
def _constrain(logits: Tensor, kind: str, n: int) -> Tensor:
    shape = _check_constrain(logits, kind, n)
    with _no_autocast(logits):  # no tokens and no logits are [0, 0], as a matrix of none is
        return CONSTRAINTS[kind].res(logits, n).expand(shape).clone(memory_format=torch.contiguous_format)


@_fake(_constrain)
def _(logits: Tensor, kind: str, n: int) -> Tensor:
    return logits.new_empty(_check_constrain(logits, kind, n))


@_op("constrain_backward", "(Tensor grad, Tensor logits, str kind, int n) -> Tensor")
def _constrain_backward(grad: Tensor, logits: Tensor, kind: str, n: int) -> Tensor:
    entry = CONSTRAINTS[kind]
    with _no_autocast(logits):
        (found,) = _torch.gradients_inside_op(lambda one: entry.res(one, n), (logits,), grad)
    return found.clone(memory_format=torch.contiguous_format)


@_fake(_constrain_backward)
def _(grad: Tensor, logits: Tensor, kind: str, n: int) -> Tensor:
    return _like(logits)


def _constrain_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, ctx.kind, ctx.n = inputs
    ctx.save_for_backward(logits)


def _constrain_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _constrain_backward(grad, *ctx.saved_tensors, ctx.kind, ctx.n), None, None


_constrain.register_autograd(_constrain_vjp, setup_context=_constrain_setup)
_constrain_backward.register_autograd(_refuse_double_backward)


# --- floating point operations ----------------------------------------------------------------------------


def _gates_flops(streams: Sequence[int], phi: Sequence[int] | None, *args: Any, **kwargs: Any) -> int:
    if phi is None:
        return 0
    applied = prod(streams[:-2]) if phi[0] != streams[-1] else prod(streams[:-1])
    return 2 * applied * prod(phi)


def _gates_backward_flops(
    grad_pre: Any, grad_post: Any, grad_logits: Any, streams: Sequence[int], phi: Any, *args: Any, **kwargs: Any
) -> int:
    return 3 * _gates_flops(streams, phi)


for _packet, _formula in ((torch.ops.mhc.gates, _gates_flops), (torch.ops.mhc.gates_backward, _gates_backward_flops)):
    if _packet not in flop_counter.flop_registry:  # a reload finds the formula of the first import
        flop_counter.register_flop_formula(_packet)(_formula)
