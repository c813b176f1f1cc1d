"""The bodies of ``cpu`` as ops of their own: what code of inductor calls in the place of those of ``site_ops``.

Behind autograd, carriers have done their work, arguments are checked and autocast is off. What is left of a call is the
dispatcher's way to a Python function, some 3 microseconds; that of an op with a backward is ten times as long, which
for few tokens is more than the computation. Only ``passes.cpu_calls`` puts these ops into a graph.

Shapes and dtypes are those of :mod:`~mhc_compile.kernels.site_ops`. There is no rule for autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from mhc_compile.kernels import cpu, plain, site_ops
from mhc_compile.kernels.convention import of_site

_VARIANT = site_ops._VARIANT.removesuffix(", bool compiled=False")
_convention = cache(of_site)


def _op(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    qualified = f"mhc::{name}"
    # Not custom_op: that would look for aliases among what comes in and goes out, at each call.
    torch.library.define(qualified, schema, tags=(torch.Tag.flexible_layout,))

    def run(*args: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):  # a backward may be called under one that the forward has not seen
            with torch.autocast("cpu", enabled=False):
                return body(*args)
        return body(*args)

    torch.library.impl(qualified, "CPU", run)
    torch.library.register_fake(qualified, fake)


def _read(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *variant: Any) -> tuple[Tensor, ...]:
    return cpu.read(streams, phi, alpha, bias, _convention(*variant))


def _fake_read(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *variant: Any) -> tuple[Tensor, ...]:
    *lead, n, features = streams.shape
    coefficients = plain.empty_coefficients(phi, lead, n, _convention(*variant).groups)
    u, z = streams.new_empty((*lead, features)), phi.new_empty((phi.shape[1], *lead))
    return u, *coefficients, z, phi.new_empty(lead)


def _merge_read(
    streams: Tensor,
    f: Tensor,
    post: Tensor,
    res: Tensor | None,
    transposed: bool,
    rounded: bool,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *variant: Any,
) -> tuple[Tensor, ...]:
    merged = cpu.merge(streams, f, post, res, transposed, rounded)
    return merged, *cpu.read(merged, phi, alpha, bias, _convention(*variant))


def _fake_merge_read(*args: Any) -> tuple[Tensor, ...]:
    return args[0].new_empty(args[0].shape), *_fake_read(args[0], *args[6:])


def _read_backward(*args: Any) -> tuple[Tensor, ...]:
    run: Callable[..., tuple[Tensor, ...]] = cpu.read_backward
    return run(*args[:14], _convention(*args[15:]), args[14])


def _fake_read_backward(*args: Any) -> tuple[Tensor, ...]:
    streams, phi, alpha, bias = args[5:9]
    dx = streams.new_empty(streams.shape if args[14] else (0,))
    return dx, *(one.new_empty(one.shape) for one in (phi, alpha, bias))


def _fake_merge(streams: Tensor, *rest: Any) -> Tensor:
    return streams.new_empty(streams.shape)


def _fake_merge_backward(
    grad: Tensor, streams: Tensor, f: Tensor, post: Tensor, mix: str, rounded: bool
) -> tuple[Tensor, ...]:
    entries = 0 if mix == "identity" else post.shape[-1]
    return f.new_empty(f.shape), post.new_empty(post.shape), post.new_empty((*post.shape[:-1], entries, entries))


_op(
    "cpu_read",
    f"(Tensor streams, Tensor phi, Tensor alpha, Tensor bias, {_VARIANT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _read,
    _fake_read,
)
_op(
    "cpu_read_backward",
    "(Tensor? grad_u, Tensor? grad_pre, Tensor? grad_post, Tensor? grad_res, Tensor? grad_merged,"
    " Tensor streams, Tensor phi, Tensor alpha, Tensor bias, Tensor pre, Tensor post, Tensor res, Tensor z, Tensor r,"
    f" bool wants_streams, {_VARIANT}) -> (Tensor, Tensor, Tensor, Tensor)",
    _read_backward,
    _fake_read_backward,
)
_op(
    "cpu_merge",
    "(Tensor streams, Tensor f, Tensor post, Tensor? res, bool transposed, bool rounded) -> Tensor",
    cpu.merge,
    _fake_merge,
)
_op(
    "cpu_merge_read",
    "(Tensor streams, Tensor f, Tensor post, Tensor? res, bool res_transposed, bool res_rounded, Tensor phi,"
    f" Tensor alpha, Tensor bias, {_VARIANT}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _merge_read,
    _fake_merge_read,
)
_op(
    "cpu_merge_backward",
    "(Tensor grad, Tensor streams, Tensor f, Tensor post, str mix, bool rounded) -> (Tensor, Tensor, Tensor)",
    cpu.branch_backward,
    _fake_merge_backward,
)

_FLOPS: dict[str, Callable[..., int]] = {
    "cpu_read": site_ops._read_flops,
    "cpu_read_backward": lambda *args, **kwargs: site_ops._read_backward_flops(*args[:5], None, *args[5:], **kwargs),
    "cpu_merge": site_ops._merge_carried_flops,
    "cpu_merge_read": lambda x, f, post, res, transposed, rounded, phi, *args, **kwargs: (
        site_ops._merge_carried_flops(x) + site_ops._read_flops(x, phi)
    ),
    "cpu_merge_backward": site_ops._merge_carried_backward_flops,
}
for _name, _formula in _FLOPS.items():
    flop_counter.register_flop_formula(getattr(torch.ops.mhc, _name))(_formula)
