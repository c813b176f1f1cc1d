"""Sinkhorn as Triton kernels, forward and backward, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_lanes import DEVICE, INTERPRETED, STREAMS, assert_same_again, numeric, scattered
from kernel_oracles import sinkhorn as oracle
from mhc_compile.errors import ConfigError, ShapeError
from mhc_compile.kernels import triton_sinkhorn
from mhc_compile.kernels.triton_implicit import sinkhorn_implicit_backward
from mhc_compile.kernels.triton_sinkhorn import sinkhorn, sinkhorn_backward
from tolerances import assert_close

pytestmark = numeric


def inputs(t: int, n: int, std: float = 2.0) -> tuple[Tensor, Tensor]:
    """logits and a gradient of the result."""
    torch.manual_seed(0)
    return torch.randn(t, n, n, device=DEVICE) * std, torch.randn(t, n, n, device=DEVICE)


def expected(logits: Tensor, grad: Tensor, iterations: int, e: float, transposed: bool) -> tuple[Tensor, Tensor]:
    leaf = logits.cpu().double().requires_grad_()
    result = oracle(leaf, iterations, e, transposed)
    result.backward(grad.cpu().double())
    assert leaf.grad is not None
    return result.detach(), leaf.grad


@pytest.mark.parametrize(("e", "transposed"), [(0.0, False), (1e-6, True)])
@pytest.mark.parametrize("iterations", [1, 2, 6, 20])
@pytest.mark.parametrize("n", STREAMS)
def test_against_the_oracle(n: int, iterations: int, e: float, transposed: bool) -> None:
    check(n, iterations, e, transposed)


@pytest.mark.parametrize(("e", "transposed"), [(0.0, True), (1e-2, False)])
@pytest.mark.parametrize("n", [3, 5, 16])
def test_other_conventions(n: int, e: float, transposed: bool) -> None:
    check(n, 7, e, transposed)


def check(n: int, iterations: int, e: float, transposed: bool) -> None:
    logits, grad = inputs(19 if n <= 8 else 5, n)
    result, gradient = expected(logits, grad, iterations, e, transposed)
    assert_close("sinkhorn", sinkhorn(logits, iterations, e, transposed).cpu(), result)
    assert_close("gradient", sinkhorn_backward(grad, logits, iterations, e, transposed).cpu(), gradient)


@pytest.mark.parametrize("t", [0, 1, 7, 129])
@pytest.mark.parametrize("n", [4, 8])
def test_ragged_numbers_of_tokens(n: int, t: int) -> None:
    logits, grad = inputs(t, n)
    result, gradient = expected(logits, grad, 4, 0.0, False)
    assert_close("sinkhorn", sinkhorn(logits, 4).cpu(), result)
    assert_close("gradient", sinkhorn_backward(grad, logits, 4).cpu(), gradient)


@pytest.mark.parametrize(("e", "transposed"), [(0.0, False), (1e-6, True)])
@pytest.mark.parametrize("std", [10.0, 1000.0])
@pytest.mark.parametrize("n", [4, 8])
def test_extreme_logits(n: int, std: float, e: float, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # its time goes by programs, not by tokens
        monkeypatch.setattr(triton_sinkhorn, "matrix_tile", lambda n, threads: (n, 2048))
    logits, grad = inputs(2000, n, std)
    result, gradient = (
        sinkhorn(logits, 20, e, transposed).cpu(),
        sinkhorn_backward(grad, logits, 20, e, transposed).cpu(),
    )
    assert result.isfinite().all() and gradient.isfinite().all()
    last = -2 if transposed else -1
    assert (result.sum(last) - 1).abs().max() < (1e-6 if e == 0 else 1e-5)
    right, right_gradient = expected(logits, grad, 20, e, transposed)
    assert (result - right).abs().max() < 1e-4
    # Where two logits of a thousand nearly tie, float32 logits themselves are off by 1e-4 of the gradient.
    assert ((gradient - right_gradient).abs().amax((-1, -2)) < 1e-3).double().mean() > 0.999


@pytest.mark.parametrize("n", [3, 4, 8])
def test_one_way_streams(n: int) -> None:
    """-inf where a matrix may not mix: those entries stay 0, and their logits get no gradient."""
    logits, grad = inputs(9, n)
    logits[:, 0, 1] = float("-inf")
    logits[4, 2, :2] = float("-inf")
    closed = (logits == float("-inf")).cpu()
    result, gradient = sinkhorn(logits, 20).cpu(), sinkhorn_backward(grad, logits, 20).cpu()
    near = logits.clamp(min=-80.0)  # an entry of 1e-35, which is none
    right, right_gradient = expected(near, grad, 20, 0.0, False)
    assert (result[closed] == 0).all() and (gradient[closed] == 0).all()
    assert_close("sinkhorn", result, right)
    assert_close("gradient", gradient, right_gradient)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, for a maximum in the interpreter
@pytest.mark.parametrize("bad", ["nan", "inf", "row"])
@pytest.mark.parametrize("n", [1, 4, 8])
def test_what_has_no_result_is_nan_and_stays_alone(n: int, bad: str) -> None:
    logits, grad = inputs(70, n)
    clean = sinkhorn(logits, 3), sinkhorn_backward(grad, logits, 3)
    if bad == "row":
        logits[40, 0] = float("-inf")
    else:
        logits[40, 0, 0] = float(bad)
    others = [i for i in range(70) if i != 40]
    for a, b in zip(clean, (sinkhorn(logits, 3), sinkhorn_backward(grad, logits, 3)), strict=True):
        assert torch.equal(a[others], b[others])
        assert b[40].isnan().all()
    assert oracle(logits.cpu().double(), 3, 0.0, False)[40].isnan().all()


def test_one_stream_is_exactly_one() -> None:
    logits, grad = inputs(50, 1, 100.0)
    assert torch.equal(sinkhorn(logits, 20), torch.ones_like(logits))
    assert not sinkhorn_backward(grad, logits, 20).any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 16])
def test_implicit_gradient(n: int, transposed: bool) -> None:
    """Against the unrolled gradient where it has converged, and the solution of the whole system."""
    logits, grad = inputs(5, n, 0.5)
    gradient = sinkhorn_implicit_backward(grad, logits, 60, transposed).cpu()
    _, unrolled = expected(logits, grad, 60, 0.0, transposed)
    assert_close("implicit gradient", gradient, unrolled)
    p = oracle(logits.cpu().double(), 60, 0.0, transposed)
    g = grad.cpu().double() * p
    eye = torch.eye(n, dtype=torch.float64).expand_as(p)
    system = torch.cat([torch.cat([eye, p], -1), torch.cat([p.mT, eye], -1)], -2)
    right = torch.cat([g.sum(-1), g.sum(-2)], -1)
    u, v = torch.linalg.lstsq(system, right.unsqueeze(-1), driver="gelsd").solution.squeeze(-1).split(n, -1)
    assert_close("solution", gradient, g - p * (u.unsqueeze(-1) + v.unsqueeze(-2)))


def test_layout_and_leading_dimensions() -> None:
    logits, grad = inputs(12, 3)
    shaped = scattered(logits).view(2, 3, 2, 3, 3)
    assert torch.equal(sinkhorn(shaped, 5).view(12, 3, 3), sinkhorn(logits, 5))
    other = sinkhorn_backward(grad.view(2, 3, 2, 3, 3), shaped, 5)
    assert torch.equal(other.view(12, 3, 3), sinkhorn_backward(grad, logits, 5))
    assert sinkhorn(logits[0], 5).shape == (3, 3)


def test_wrong_arguments() -> None:
    logits, grad = inputs(5, 4)
    with pytest.raises(ShapeError, match=r"logits is \[5, 4, 3\]; legal: \[..., n, n\]"):
        sinkhorn(logits[..., :3], 20)
    with pytest.raises(ShapeError, match=r"logits is .* n in 1..16"):
        sinkhorn(logits.new_zeros(2, 17, 17), 20)
    with pytest.raises(ShapeError, match=r"dtype of logits is torch.float64; legal: float32"):
        sinkhorn(logits.double(), 20)
    with pytest.raises(ShapeError, match=r"grad is \[4, 4, 4\]; legal: .* = \[5, 4, 4\]"):
        sinkhorn_backward(grad[1:], logits, 20)
    with pytest.raises(ShapeError, match="device of grad is meta"):
        sinkhorn_backward(grad.to("meta"), logits, 20)
    with pytest.raises(ConfigError, match="iterations is 0; legal: an integer >= 1"):
        sinkhorn(logits, 0)


def test_runs_are_bitwise_equal() -> None:
    logits, grad = inputs(40 if INTERPRETED else 20000, 4)
    assert_same_again(lambda: sinkhorn(logits, 6))
    assert_same_again(lambda: sinkhorn_backward(grad, logits, 6))
