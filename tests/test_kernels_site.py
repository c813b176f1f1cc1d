"""The backward of a whole site as Triton kernels, against autograd over the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_oracles as oracles
from kernel_lanes import (
    CASES,
    DTYPES,
    INTERPRETED,
    assert_near,
    assert_same_again,
    double,
    numeric,
    scattered,
    to_device,
)
from mhc_compile.errors import ConfigError, ShapeError
from mhc_compile.kernels import reference
from mhc_compile.kernels.convention import DEEPSEEK_V4, HEAD, HUNYUAN_V4, PAPER, Convention
from mhc_compile.kernels.triton_coefficients import read
from mhc_compile.kernels.triton_launch import record
from mhc_compile.kernels.triton_merge import merge
from mhc_compile.kernels.triton_merge_backward import merge_backward
from mhc_compile.kernels.triton_site_backward import site_backward

pytestmark = numeric

EPS = 0.1
CONVENTIONS = {
    "paper": replace(PAPER, rms_eps=EPS, iterations=6),
    "deepseek_v4": replace(DEEPSEEK_V4, rms_eps=EPS, iterations=6, divisor_eps=1e-2, rounded=False),
    "hunyuan_v4": replace(HUNYUAN_V4, rms_eps=EPS, post_scale=1.5),
    "head": replace(HEAD, rms_eps=EPS),
    "megatron": replace(PAPER, rms_eps=EPS, iterations=6, rows_first=True),
    "logits": replace(PAPER, rms_eps=EPS, res="logits"),
}


def inputs(t: int, n: int, c: int, dtype: torch.dtype, convention: Convention) -> tuple[Tensor, ...]:
    """streams, f, phi, alpha, bias, and the gradients of X' and u."""
    torch.manual_seed(0)
    k = convention.columns(n)
    wide = [torch.randn(t, n, c), torch.randn(t, c)]
    parameters = (
        torch.randn(n * c, k) / (n * c) ** 0.5,
        torch.tensor([0.5, 1.5, -2.0])[: convention.groups],
        torch.randn(k),
    )
    grads = [torch.randn(t, n, c), torch.randn(t, c)]
    return to_device(*(a.to(dtype) for a in wide), *parameters, *(a.to(dtype) for a in grads))


def backward(arguments: tuple[Tensor, ...], convention: Convention) -> dict[str, Tensor]:
    """u, X' and all gradients, by the kernels."""
    streams, f, phi, alpha, bias, grad, du = arguments
    u, site = read(streams, phi, alpha, bias, convention)
    mix, rounds = convention.mix, convention.rounded
    if mix == "none":
        got = site_backward(streams, (phi, alpha, bias), site, convention, du=du)
        return {"u": u, "dX": got.streams, "dphi": got.phi, "dalpha": got.alpha, "dbias": got.bias}
    assert site.post is not None
    merged = merge(streams, f, site.post, site.res, mix, rounds)
    df, dpost, dres = merge_backward(grad, streams, f, site.post, mix, rounds)
    got = site_backward(streams, (phi, alpha, bias), site, convention, grad=grad, du=du, grad_post=dpost, grad_res=dres)
    gradients = {"df": df, "dX": got.streams, "dphi": got.phi, "dalpha": got.alpha, "dbias": got.bias}
    return {"u": u, "merged": merged, **gradients}


def expected(arguments: tuple[Tensor, ...], convention: Convention) -> dict[str, Tensor]:
    """The same by autograd over the oracle."""
    *leaves, grad, du = double(*arguments)
    streams, f, phi, alpha, bias = leaves
    pre, post, res = oracles.coefficients(streams, phi, alpha, bias, convention)
    u = reference.aggregate(streams, pre)
    if post is None:
        dx, *rest = torch.autograd.grad(u, [streams, phi, alpha, bias], du)
        return {"u": u, "dX": dx, "dphi": rest[0], "dalpha": rest[1], "dbias": rest[2]}
    merged = oracles.merge(streams, f, post, res, convention)
    dx, df, *rest = torch.autograd.grad([merged, u], leaves, [grad, du])
    return {"u": u, "merged": merged, "df": df, "dX": dx, "dphi": rest[0], "dalpha": rest[1], "dbias": rest[2]}


def check(arguments: tuple[Tensor, ...], convention: Convention) -> None:
    right = expected(arguments, convention)
    for name, value in backward(arguments, convention).items():
        assert_near(name, value, right[name], arguments[0].dtype)


@pytest.mark.parametrize(("n", "t", "c", "dtype"), CASES)
def test_paper(n: int, t: int, c: int, dtype: torch.dtype) -> None:
    convention = CONVENTIONS["paper"]
    check(inputs(t, n, c, dtype, convention), convention)


@pytest.mark.parametrize("name", [name for name in CONVENTIONS if name != "paper"])
@pytest.mark.parametrize(
    ("n", "dtype"), [(1, torch.float32), (3, torch.float16), (4, torch.bfloat16), (5, torch.float32)]
)
def test_other_conventions(n: int, dtype: torch.dtype, name: str) -> None:
    check(inputs(9, n, 20, dtype, CONVENTIONS[name]), CONVENTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_shares_and_strips(dtype: torch.dtype) -> None:
    """dphi is a sum of shares of the tokens, and its columns are cut into strips."""
    convention = CONVENTIONS["deepseek_v4"]
    arguments = inputs(300, 4, 80, dtype, convention)
    with record() as launches:
        check(arguments, convention)
    entry = next(entry for entry in launches if entry.name == "streams_backward")
    assert entry.grid[0] > len(entry.writes["phi_shares"]) > 1


def test_sixteen_streams() -> None:
    check(inputs(5, 16, 40, torch.bfloat16, CONVENTIONS["deepseek_v4"]), CONVENTIONS["deepseek_v4"])


@pytest.mark.parametrize(("t", "n"), [(0, 4), (0, 8)])
def test_no_tokens(t: int, n: int) -> None:
    convention = CONVENTIONS["paper"]
    got = backward(inputs(t, n, 6, torch.bfloat16, convention), convention)
    assert got["dX"].shape == (0, n, 6) and not any(got[name].any() for name in ("dphi", "dalpha", "dbias"))


def test_rounded_coefficients() -> None:
    """post and res are rounded where they multiply streams; their own gradients pass as if they were not."""
    convention = replace(CONVENTIONS["deepseek_v4"], rounded=True)
    arguments = inputs(9, 4, 20, torch.bfloat16, convention)
    *leaves, grad, du = double(*arguments)
    streams, f, phi, alpha, bias = leaves
    pre, post, res = oracles.coefficients(streams, phi, alpha, bias, convention)
    assert post is not None and res is not None
    post, res = (a + (a.detach().bfloat16().double() - a.detach()) for a in (post, res))
    merged = oracles.merge(streams, f, post, res, convention)
    gradients = torch.autograd.grad([merged, reference.aggregate(streams, pre)], leaves, [grad, du])
    got = backward(arguments, convention)
    assert_near("merged", got["merged"], merged, torch.bfloat16)
    for name, gradient in zip(("dX", "df", "dphi", "dalpha", "dbias"), gradients, strict=True):
        assert_near(name, got[name], gradient, torch.bfloat16)
    exact = backward(arguments, replace(convention, rounded=False))
    assert not torch.equal(exact["df"], got["df"]) and not torch.equal(exact["dX"], got["dX"])


@pytest.mark.parametrize(
    "given", [("du",), ("grad_pre",), ("grad_post",), ("grad_res",), ("du", "grad_pre", "grad_res")]
)
@pytest.mark.parametrize("n", [3, 5])
def test_gradients_of_the_coefficients_alone(n: int, given: tuple[str, ...]) -> None:
    """What has no merge behind it: any of the gradients may be missing, and grad_pre adds to what du gives."""
    convention = CONVENTIONS["deepseek_v4"]
    streams, _, phi, alpha, bias, _, du = inputs(9, n, 7, torch.float32, convention)
    torch.manual_seed(1)
    random = [torch.randn(9, n), torch.randn(9, n), torch.randn(9, n, n), du.cpu()]
    grads = {k: g for k, g in zip(("grad_pre", "grad_post", "grad_res", "du"), random, strict=True) if k in given}
    _, site = read(streams, phi, alpha, bias, convention)
    sent = dict(zip(grads, to_device(*grads.values()), strict=True))
    got = site_backward(streams, (phi, alpha, bias), site, convention, **sent)
    leaves = double(streams, phi, alpha, bias)
    pre, post, res = oracles.coefficients(*leaves, convention)
    outputs = {"grad_pre": pre, "grad_post": post, "grad_res": res, "du": reference.aggregate(leaves[0], pre)}
    right = torch.autograd.grad([outputs[k] for k in grads], leaves, [g.double() for g in grads.values()])
    found = got.streams, got.phi, got.alpha, got.bias
    for name, value, gradient in zip(("dX", "dphi", "dalpha", "dbias"), found, right, strict=True):
        assert_near(name, value, gradient, torch.float32)


def test_layout_of_the_inputs_does_not_matter() -> None:
    convention = CONVENTIONS["paper"]
    arguments = inputs(9, 4, 20, torch.bfloat16, convention)
    plain = backward(arguments, convention)
    odd = backward(tuple(scattered(a) for a in arguments), convention)
    turned = backward((*arguments[:2], arguments[2].t().contiguous().t(), *arguments[3:]), convention)
    assert turned["dphi"].stride() == (1, 80) and plain["dphi"].is_contiguous()
    for name, value in plain.items():
        assert torch.equal(value, odd[name]) and torch.equal(value, turned[name]), name
    lead = backward(
        tuple(a.unflatten(0, (3, 3)) if i in (0, 1, 5, 6) else a for i, a in enumerate(arguments)), convention
    )
    assert torch.equal(lead["dX"].flatten(0, 1), plain["dX"]) and torch.equal(lead["dphi"], plain["dphi"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_stays_alone(bad: float) -> None:
    """In what belongs to tokens; the sums over tokens, dphi and the like, cannot but see it."""
    convention = CONVENTIONS["paper"]
    arguments = inputs(70, 4, 20, torch.bfloat16, convention)
    clean = backward(arguments, convention)
    arguments[0][40, 1, 3] = bad
    dirty = backward(arguments, convention)
    others = [i for i in range(70) if i != 40]
    for name in ("u", "merged", "df", "dX"):
        assert torch.equal(clean[name][others], dirty[name][others]), name
    assert not dirty["dX"][40].isfinite().all() and not dirty["dphi"].isfinite().all()


def test_one_stream_is_the_plain_residual() -> None:
    """n = 1 with pre, post and res of 1 and no dynamic part: dX is G + du, bit for bit."""
    convention = replace(PAPER, post_scale=1.0)
    streams, f, phi, alpha, bias, grad, du = inputs(50, 1, 33, torch.float32, convention)
    ones = torch.full_like(bias, 100.0)  # a sigmoid of 100 is 1 in float32
    got = backward((streams, f, phi * 0, alpha, ones, grad, du), convention)
    assert torch.equal(got["u"], streams[:, 0]) and torch.equal(got["merged"][:, 0], streams[:, 0] + f)
    assert torch.equal(got["df"], grad[:, 0]) and torch.equal(got["dX"][:, 0], grad[:, 0] + du)


def wrong_calls() -> dict[str, Any]:
    streams, f, phi, alpha, bias, grad, du = inputs(5, 4, 6, torch.float32, PAPER)
    _, site = read(streams, phi, alpha, bias, PAPER)
    p = phi, alpha, bias
    return {
        "grad": (
            lambda: site_backward(streams, p, site, PAPER, grad=grad[1:]),
            r"grad is \[4, 4, 6\]; legal: .* = \[5, 4, 6\]",
        ),
        "grad dtype": (
            lambda: site_backward(streams, p, site, PAPER, grad=grad.half()),
            r"dtype of grad is torch.float16",
        ),
        "du": (lambda: site_backward(streams, p, site, PAPER, du=du[:, :2]), r"du is \[5, 2\]; legal: .* = \[5, 6\]"),
        "grad_post": (lambda: site_backward(streams, p, site, PAPER, grad_post=du), r"grad_post is \[5, 6\]"),
        "device": (lambda: site_backward(streams, p, site, PAPER, du=du.to("meta")), r"device of du is meta"),
        "phi": (lambda: site_backward(streams, (phi[1:], alpha, bias), site, PAPER, du=du), r"phi is \[23, 24\]"),
        "f": (lambda: merge_backward(grad, streams, f[1:], site.post), r"f is \[4, 6\]; legal: .* = \[5, 6\]"),
        "post": (lambda: merge_backward(grad, streams, f, site.post.half()), r"dtype of post is torch.float16"),
        "streams": (lambda: merge_backward(grad, streams[1:], f, site.post), r"streams is \[4, 4, 6\]"),
    }


@pytest.mark.parametrize("case", ["grad", "grad dtype", "du", "grad_post", "device", "phi", "f", "post", "streams"])
def test_wrong_arguments(case: str) -> None:
    call, message = wrong_calls()[case]
    with pytest.raises(ShapeError, match=message):
        call()


def test_a_head_has_no_merge() -> None:
    streams, _, phi, alpha, bias, grad, du = inputs(5, 4, 6, torch.float32, HEAD)
    _, site = read(streams, phi, alpha, bias, HEAD)
    with pytest.raises(ConfigError, match="grad is a tensor; legal: None, as this convention has no merge"):
        site_backward(streams, (phi, alpha, bias), site, HEAD, grad=grad, du=du)
    with pytest.raises(ConfigError, match="grad_post is a tensor; legal: None"):
        site_backward(streams, (phi, alpha, bias), site, HEAD, du=du, grad_post=site.pre)


def test_runs_are_bitwise_equal() -> None:
    arguments = inputs(*((40, 4, 70) if INTERPRETED else (5000, 4, 1280)), torch.bfloat16, PAPER)
    assert_same_again(lambda: backward(arguments, PAPER))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter sees single addresses")
@pytest.mark.parametrize("name", ["paper", "hunyuan_v4", "head"])
def test_each_element_is_moved_once(name: str) -> None:
    from kernel_interpreter import watched

    with watched() as memories:
        backward(inputs(41, 4, 129, torch.bfloat16, CONVENTIONS[name]), CONVENTIONS[name])
    merges = ["merge", "merge_backward"] if name != "head" else []
    backwards = ["coefficients_backward", "pack", "streams_backward", "add_shares"]
    assert [m.launch.name for m in memories] == ["pack", "project", "finish", *merges, *backwards]
    for memory in memories:
        moved = {key: count for key, count in memory.reads.items() if key in ("streams", "f", "grad", "du")}
        for key, count in {**moved, **memory.writes}.items():
            assert (count == 1).all(), (memory.launch.name, key)
