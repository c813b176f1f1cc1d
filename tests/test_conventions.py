"""The ops in the conventions of other models, against autograd over the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_compile.errors import ConfigError, ShapeError
from mhc_compile.kernels import ops, reference, site_ops
from opcheck import opcheck

mhc = torch.ops.mhc

EPS, C = 0.1, 5
GATES = {"pre_eps": 0.0, "post_scale": 2.0, "post_eps": 0.0, "groups": 3}
BALANCE = {"divisor_eps": 0.0, "rows_first": False}
MERGE = {"transposed": False, "rounded": False}

# What differs from the paper, by the arguments of the ops.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "deepseek_v4": {"pre_eps": 1e-2, "divisor_eps": 1e-2, "rows_first": True, "transposed": True},
    "hunyuan_v4": {"pre_eps": 1e-2, "post_scale": 1.5, "post_eps": 1e-2, "groups": 2},
    "head": {"pre_eps": 1e-2, "groups": 1},
    "megatron": {"rows_first": True},
    "columns first, [in, out]": {"transposed": True},
    "softmax over columns": {"divisor_eps": 1e-2},
}


def chosen(variant: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    return {name: variant.get(name, default) for name, default in names.items()}


def inputs(t: int, n: int, groups: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """streams, f, phi, alpha and bias; leaves."""
    torch.manual_seed(0)
    columns = (n, 2 * n, n * n + 2 * n)[groups - 1]
    wide = [torch.randn(t, n, C).to(dtype), torch.randn(t, C).to(dtype)]
    parameters = [torch.randn(n * C, columns), torch.tensor([0.5, 1.5, -2.0])[:groups], torch.randn(columns)]
    small = torch.float64 if dtype == torch.float64 else torch.float32
    return tuple(a.requires_grad_() for a in (*wide, *(p.to(small) for p in parameters)))


def expected(arguments: tuple[Tensor, ...], variant: dict[str, Any], iterations: int) -> list[Tensor]:
    streams, f, phi, alpha, bias = arguments
    pre, post, logits = reference.coefficients(streams, phi, alpha, bias, EPS, **chosen(variant, GATES))
    u = reference.aggregate(streams, pre)
    if variant.get("groups") == 1:
        return [u, pre]
    res = reference.sinkhorn(logits, iterations, **chosen(variant, BALANCE)) if logits.numel() else None
    return [u, pre, post, reference.merge(streams, f * torch.tanh(u), post, res, **chosen(variant, MERGE))]


def level_1(arguments: tuple[Tensor, ...], variant: dict[str, Any], iterations: int) -> list[Tensor]:
    streams, f, phi, alpha, bias = arguments
    pre, post, logits = ops.coefficients(streams, phi, alpha, bias, EPS, **chosen(variant, GATES))
    u = ops.aggregate(streams, pre)
    if variant.get("groups") == 1:
        return [u, pre]
    res = ops.sinkhorn(logits, iterations, **chosen(variant, BALANCE)) if logits.numel() else None
    return [u, pre, post, ops.merge(streams, f * torch.tanh(u), post, res, **chosen(variant, MERGE))]


def level_2(arguments: tuple[Tensor, ...], variant: dict[str, Any], iterations: int) -> list[Tensor]:
    streams, f, phi, alpha, bias = arguments
    u, pre, post, res, carrier = site_ops.read(streams, phi, alpha, bias, EPS, iterations, **variant)
    if variant.get("groups") == 1:
        return [u, pre]
    mixing = res if res.numel() else None
    merge = chosen(variant, MERGE)
    return [u, pre, post, site_ops.merge_carried(streams, f * torch.tanh(u), carrier, post, mixing, **merge)]


def gradients(outputs: list[Tensor], arguments: tuple[Tensor, ...]) -> list[Tensor | None]:
    torch.manual_seed(1)
    total = sum((output * torch.randn(output.shape).to(output.dtype)).sum() for output in outputs)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, arguments, allow_unused=True))


@pytest.mark.parametrize("n", [1, 2, 4, 5])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("level", [level_1, level_2])
def test_values_and_gradients(level: Any, name: str, n: int) -> None:
    variant = VARIANTS[name]
    arguments = inputs(7, n, variant.get("groups", 3))
    right, found = expected(arguments, variant, 4), level(arguments, variant, 4)
    for a, b in zip(right, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(right, arguments), gradients(found, arguments), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_rounded_coefficients() -> None:
    """bfloat16 streams with post and res rounded to bfloat16: not what float32 coefficients give."""
    variant = {**VARIANTS["deepseek_v4"], "rounded": True}
    streams, f, phi, alpha, bias = inputs(33, 4, 3, torch.bfloat16)
    _, _, post, res, carrier = site_ops.read(streams, phi, alpha, bias, EPS, 4, **variant)
    wide = (streams.double(), f.double())
    right = reference.merge(*wide, post.bfloat16().double(), res.bfloat16().double(), transposed=True)
    exact = reference.merge(*wide, post.double(), res.double(), transposed=True)
    grad = torch.randn(33, C).to(f.dtype)
    for merged in (
        ops.merge(streams, f, post, res, True, True),
        site_ops.merge_carried(streams, f, carrier, post, res, True, True),
    ):
        torch.testing.assert_close(merged.double(), right, rtol=2**-8, atol=1e-6)  # half a step of bfloat16
        assert (merged - right).abs().mean() < 0.8 * (merged - exact).abs().mean()
        (df,) = torch.autograd.grad(merged, f, grad.unsqueeze(1).expand(merged.shape), retain_graph=True)
        expected = (post.bfloat16().double().sum(1, keepdim=True) * grad.double()).to(f.dtype)
        torch.testing.assert_close(df, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("rows_first", [False, True])
def test_implicit_gradient(rows_first: bool) -> None:
    """Once the iterations have converged, the gradient of the fixed point is that of the iterations."""
    torch.manual_seed(0)
    logits = torch.randn(7, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, 4, 4, dtype=torch.float64)
    grads = []
    for implicit in (False, True):
        balanced = ops.sinkhorn(logits, 200, rows_first=rows_first, implicit=implicit)
        grads += torch.autograd.grad((balanced * weights).sum(), logits)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)
    short = ops.sinkhorn(logits, 1, rows_first=rows_first, implicit=True)
    unrolled = ops.sinkhorn(logits, 1, rows_first=rows_first)
    (a,), (b,) = (torch.autograd.grad((one * weights).sum(), logits) for one in (short, unrolled))
    assert not torch.allclose(a, b, rtol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck(name: str) -> None:
    variant = VARIANTS[name]
    streams, f, phi, alpha, bias = inputs(3, 2, variant.get("groups", 3), torch.float32)
    gates = tuple(chosen(variant, GATES).values())
    opcheck(mhc.coefficients.default, (streams, phi, alpha, bias, EPS, *gates))
    tail = (*gates, *chosen(variant, BALANCE).values(), *chosen(variant, MERGE).values())
    opcheck(mhc.read.default, (streams, phi, alpha, bias, EPS, 4, *tail))
    with torch.no_grad():
        _, _, post, res, carrier, *_ = mhc.read(streams, phi, alpha, bias, EPS, 4, *tail)
    if variant.get("groups") != 1:
        post, mixing = post.requires_grad_(), res.requires_grad_() if res.numel() else None
        flags = tuple(chosen(variant, MERGE).values())
        opcheck(mhc.merge.default, (streams, f, post, mixing, *flags))
        opcheck(mhc.merge_carried.default, (streams, f, carrier, post, mixing, *flags))
    opcheck(mhc.sinkhorn.default, (torch.randn(3, 2, 2, requires_grad=True), 3, 0.0, False, True))


def test_without_tokens() -> None:
    for name, variant in VARIANTS.items():
        arguments = inputs(0, 3, variant.get("groups", 3))
        for level in (level_1, level_2):
            outputs = level(arguments, variant, 4)
            assert outputs[0].shape == (0, C), name
            assert all(grad is None or not grad.abs().sum() for grad in gradients(outputs, arguments))


def test_illegal_variants() -> None:
    streams, _, phi, alpha, bias = inputs(3, 2, 2)
    with pytest.raises(ConfigError, match=r"groups is 4; legal: 1 \(pre\), 2 \(and post\), 3"):
        ops.coefficients(streams, phi, alpha, bias, EPS, groups=4)
    with pytest.raises(ShapeError, match=r"phi is \[10, 4\]; legal: \[n C, n n \+ 2 n\] = \[10, 8\]"):
        ops.coefficients(streams, phi, alpha, bias, EPS)
    with pytest.raises(ShapeError, match=r"alpha is \[2\]; legal: \[1\] = \[1\]"):
        site_ops.read(streams, phi[:, :2], alpha, bias, EPS, 4, groups=1)
    with pytest.raises(ConfigError, match=r"implicit is True with divisor_eps=0.1; legal: True with divisor_eps=0"):
        ops.sinkhorn(torch.zeros(3, 2, 2), 4, divisor_eps=0.1, implicit=True)
