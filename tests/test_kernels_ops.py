"""The ops run by the Triton kernels, through the dispatcher and autograd, against the same ops in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_lanes import DEVICE, assert_near, numeric
from mhc_compile.kernels import cross_site_ops, ops, site_ops
from mhc_compile.kernels.triton_launch import record
from test_conventions import BALANCE, GATES, MERGE, VARIANTS, chosen

pytestmark = numeric

EPS, ITERATIONS, C = 0.1, 5, 24


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Sends the ops to the kernels or to plain torch, on whatever device the lane has."""

    def choose(kernels: bool) -> None:
        for module in (ops, site_ops):
            monkeypatch.setattr(module, "has_kernel", lambda tensor, n: kernels)

    yield choose


def inputs(t: int, n: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    columns = (n, 2 * n, n * n + 2 * n)[groups - 1]
    wide = [torch.randn(t, n, C).to(dtype), torch.randn(t, C).to(dtype)]
    parameters = [torch.randn(n * C, columns), torch.tensor([0.5, 1.5, -2.0])[:groups], torch.randn(columns)]
    return [a.to(DEVICE).requires_grad_() for a in (*wide, *parameters)]


def level_1(arguments: list[Tensor], variant: dict[str, Any]) -> list[Tensor]:
    streams, f, phi, alpha, bias = arguments
    pre, post, logits = ops.coefficients(streams, phi, alpha, bias, EPS, **chosen(variant, GATES))
    u = ops.aggregate(streams, pre)
    if variant.get("groups") == 1:
        return [u, pre]
    res = ops.sinkhorn(logits, ITERATIONS, **chosen(variant, BALANCE)) if logits.numel() else None
    return [u, post, ops.readout(ops.merge(streams, f, post, res, **chosen(variant, MERGE)))]


def level_2(arguments: list[Tensor], variant: dict[str, Any]) -> list[Tensor]:
    streams, f, phi, alpha, bias = arguments
    streams = ops.expand(streams[:, 0], streams.shape[1]) + streams
    u, pre, post, res, carrier = site_ops.read(streams, phi, alpha, bias, EPS, ITERATIONS, **variant)
    if variant.get("groups") == 1:
        return [u, pre]
    return [
        u,
        post,
        site_ops.merge_carried(streams, f, carrier, post, res if res.numel() else None, **chosen(variant, MERGE)),
    ]


def across(arguments: list[Tensor], variant: dict[str, Any]) -> list[Tensor]:
    """Two sites with the same parameters, or a site and a head; and a tap between them."""
    streams, f, *parameters = arguments
    before = {**variant, "groups": 2} if variant.get("groups") == 1 else variant
    more = [torch.cat([p, p], p.dim() - 1) if variant.get("groups") == 1 else p for p in parameters]
    u, _, post, res, carrier = site_ops.read(streams, *more, EPS, ITERATIONS, **before)
    manner = {f"res_{key}": value for key, value in chosen(before, MERGE).items()}
    mixing = res if res.numel() else None
    rest = (tuple(parameters), EPS, ITERATIONS)
    merged, v, pre, *_ = cross_site_ops.merge_read(streams, f, carrier, post, mixing, *rest, **manner, **variant)
    return [u, pre, v, ops.readout(merged)]


def gradients(outputs: list[Tensor], arguments: list[Tensor]) -> list[Any]:
    torch.manual_seed(1)
    seeds = [torch.randn(output.shape).to(output) for output in outputs]
    return list(torch.autograd.grad(outputs, arguments, seeds, allow_unused=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("level", [level_1, level_2, across])
def test_kernels_and_plain_torch_agree(level: Any, name: str, dtype: torch.dtype, on_kernels: Any) -> None:
    variant = {**VARIANTS[name], "rounded": name == "deepseek_v4"}
    arguments = inputs(5, 3, variant.get("groups", 3), dtype)
    on_kernels(False)
    wide = [a.detach().double().requires_grad_() for a in arguments]
    right = level(wide, {**variant, "rounded": False})
    # The gradients sent back are those of the narrow run, rounded as there.
    right += gradients([one if i == 1 else one.to(dtype) for i, one in enumerate(right)], wide)
    plain = level(arguments, variant)
    plain += gradients(plain, arguments)
    on_kernels(True)
    with record() as launches:
        found = level(arguments, variant)
        found += gradients(found, arguments)
    assert launches
    step = {torch.float32: 2e-5, torch.bfloat16: 3 * 2**-7}[dtype]
    for i, (a, b, c) in enumerate(zip(right, found, plain, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            error, other = ((a - one).detach().abs().max().item() for one in (b, c))
            # A second site sees a rounded state: there plain torch in this dtype is as far from float64.
            assert error <= max(step * a.detach().abs().max().clamp(min=1).item(), 2 * other), (name, i, error, other)


@pytest.mark.parametrize("tokens", [1, 16, 17, 129])
@pytest.mark.parametrize(
    ("n", "dtype"), [(4, torch.bfloat16), (4, torch.float16), (2, torch.float32), (8, torch.bfloat16)]
)
def test_crossing_gives_the_bits_of_the_two_ops(n: int, dtype: torch.dtype, tokens: int, on_kernels: Any) -> None:
    """The merged streams bit for bit; z to the order of its sums."""
    on_kernels(True)
    streams, f, *parameters = inputs(tokens, n, 3, dtype)
    _, _, post, res, carrier = site_ops.read(streams, *parameters, EPS, ITERATIONS)
    rest = (tuple(parameters), EPS, ITERATIONS)
    merged, u, pre, _, _, _ = cross_site_ops.merge_read(streams, f, carrier, post, res, *rest)
    right = site_ops.merge_carried(streams, f, carrier, post, res)
    assert torch.equal(merged, right)
    v, right_pre, *_ = site_ops.read(right, *parameters, EPS, ITERATIONS)
    torch.testing.assert_close(pre, right_pre, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(u, v, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)


def test_implicit_gradient_of_a_matrix(on_kernels: Any) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 4, 4).to(DEVICE).requires_grad_()
    weights = torch.randn(5, 4, 4).to(DEVICE)
    found = []
    for kernels in (False, True):
        on_kernels(kernels)
        found += torch.autograd.grad((ops.sinkhorn(logits, 60, implicit=True) * weights).sum(), logits)
    assert_near("implicit", found[1], found[0].cpu().double(), torch.float32)
