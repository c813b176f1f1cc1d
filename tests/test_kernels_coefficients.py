"""The coefficients of a site and the input of its branch as Triton kernels, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_oracles as oracles
from kernel_lanes import CASES, DTYPES, INTERPRETED, assert_same_again, numeric, scattered, to_device
from mhc_compile.errors import ConfigError, ShapeError
from mhc_compile.kernels import reference, triton_project
from mhc_compile.kernels.convention import DEEPSEEK_V4, HEAD, HUNYUAN_V4, PAPER, Convention
from mhc_compile.kernels.triton_coefficients import coefficients, read
from mhc_compile.kernels.triton_launch import record
from tolerances import assert_close

pytestmark = numeric

EPS = 0.1  # large, so that a single feature is not divided by itself
CONVENTIONS = {
    "paper": replace(PAPER, rms_eps=EPS),
    "deepseek_v4": replace(DEEPSEEK_V4, rms_eps=EPS, divisor_eps=1e-2, pre_eps=1e-2),  # large enough to be seen
    "hunyuan_v4": replace(HUNYUAN_V4, rms_eps=EPS, pre_eps=1e-2, post_eps=1e-2, post_scale=1.5),
    "head": replace(HEAD, rms_eps=EPS, pre_eps=1e-2),
    "logits": replace(PAPER, rms_eps=EPS, res="logits"),
}


def inputs(t: int, n: int, c: int, dtype: torch.dtype, convention: Convention) -> tuple[Tensor, ...]:
    """streams, phi, alpha, bias."""
    torch.manual_seed(0)
    k = convention.columns(n)
    streams, phi = torch.randn(t, n, c).to(dtype), torch.randn(n * c, k) / (n * c) ** 0.5
    return to_device(streams, phi, torch.tensor([0.5, 1.5, -2.0])[: convention.groups], torch.randn(k))


def check(arguments: tuple[Tensor, ...], convention: Convention) -> None:
    streams, *parameters = (a.cpu().double() for a in arguments)
    expected = oracles.coefficients(streams, *parameters, convention)
    u, site = read(*arguments, convention)
    for name, a, b in zip(("pre", "post", "res"), (site.pre, site.post, site.res), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_close(name, a.cpu(), b)
    assert_close("u", u.cpu(), reference.aggregate(streams, expected[0]))
    x = streams.reshape(-1, streams.shape[-2] * streams.shape[-1])
    assert_close("z", site.z.cpu(), (x @ parameters[0]).t())
    assert_close("r", site.r.cpu(), torch.sqrt(x.square().mean(-1) + convention.rms_eps))
    alone = coefficients(*arguments, convention)
    assert torch.equal(alone.pre, site.pre) and torch.equal(alone.z, site.z)
    if site.res is not None:
        assert torch.equal(alone.res, site.res)


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
def test_shares_are_added_up(dtype: torch.dtype) -> None:
    convention = CONVENTIONS["paper"]
    arguments = inputs(70, 4, 600, dtype, convention)
    with record() as launches:
        check(arguments, convention)
    assert {entry.constants["splits"] for entry in launches if entry.name == "finish"} <= {4, 9}


def test_sixteen_streams_take_several_blocks_of_columns() -> None:
    convention = CONVENTIONS["deepseek_v4"]
    check(inputs(5, 16, 40, torch.bfloat16, convention), convention)


def test_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile for many tokens, at a size that the interpreter can bear."""
    tile = triton_project.project_tile
    monkeypatch.setattr(triton_project, "project_tile", lambda tokens, *rest: tile(4096, *rest))
    convention = CONVENTIONS["paper"]
    check(inputs(130, 4, 20, torch.bfloat16, convention), convention)


def test_products_are_better_than_bfloat16() -> None:
    """phi has to be multiplied with more than the 8 bits of bfloat16, whatever streams are."""
    for dtype in DTYPES:
        streams, phi, alpha, bias = inputs(64, 4, 300, dtype, PAPER)
        exact = (streams.cpu().double().flatten(1) @ phi.cpu().double()).t()
        short = (streams.cpu().double().flatten(1) @ phi.cpu().bfloat16().double()).t()
        error = (coefficients(streams, phi, alpha, bias, PAPER).z.cpu() - exact).abs().max()
        assert error < 1e-5 * exact.abs().max() < 0.01 * (short - exact).abs().max()


def test_a_transposed_or_packed_phi_gives_the_same_bits() -> None:
    streams, phi, alpha, bias = inputs(20, 4, 33, torch.bfloat16, PAPER)
    _, plain = read(streams, phi, alpha, bias, PAPER)
    _, turned = read(streams, phi.t().contiguous().t(), alpha, bias, PAPER)
    _, packed = read(streams, phi, alpha, bias, PAPER, packed=triton_project.pack(phi, streams))
    _, odd = read(scattered(streams), scattered(phi), scattered(alpha), scattered(bias), PAPER)
    assert torch.equal(plain.z, turned.z) and torch.equal(plain.z, packed.z) and torch.equal(plain.z, odd.z)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (), (2, 3, 2)])
@pytest.mark.parametrize("name", ["paper", "head"])
def test_leading_dimensions(lead: tuple[int, ...], name: str) -> None:
    convention = CONVENTIONS[name]
    streams, *parameters = inputs(12, 3, 5, torch.float32, convention)
    size = torch.Size(lead).numel()
    shaped = streams[:size].reshape(*lead, 3, 5)
    u, site = read(shaped, *parameters, convention)
    assert u.shape == (*lead, 5) and site.pre.shape == (*lead, 3)
    if size:
        check((shaped, *parameters), convention)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_stays_alone(bad: float) -> None:
    streams, *parameters = inputs(70, 4, 20, torch.bfloat16, PAPER)
    u, clean = read(streams, *parameters, PAPER)
    streams[40, 1, 3] = bad
    v, dirty = read(streams, *parameters, PAPER)
    others = [i for i in range(70) if i != 40]
    for a, b in ((u, v), (clean.pre, dirty.pre), (clean.post, dirty.post), (clean.res, dirty.res)):
        assert torch.equal(a[others], b[others]) and not b[40].isfinite().all()


def test_large_streams_and_logits() -> None:
    convention = CONVENTIONS["paper"]
    streams, phi, alpha, bias = inputs(30, 4, 20, torch.float32, convention)
    u, site = read(streams * 1e15, phi, alpha * 300, bias, convention)
    expected = oracles.coefficients(*(a.cpu().double() for a in (streams * 1e15, phi, alpha * 300, bias)), convention)
    assert u.isfinite().all()
    for a, b in zip((site.pre, site.post, site.res), expected, strict=True):
        assert (a.cpu() - b).abs().max() < 3e-3  # the logits reach 2000, in float32


def wrong_calls() -> dict[str, Any]:
    streams, phi, alpha, bias = inputs(5, 4, 6, torch.float32, PAPER)
    return {
        "phi": (lambda: read(streams, phi[1:], alpha, bias, PAPER), r"phi is \[23, 24\]; legal: .* = \[24, 24\] here"),
        "phi of a head": (lambda: read(streams, phi, alpha, bias, HEAD), r"phi is \[24, 24\]; legal: .* = \[24, 4\]"),
        "phi dtype": (lambda: read(streams, phi.bfloat16(), alpha, bias, PAPER), "dtype of phi is torch.bfloat16"),
        "alpha": (lambda: read(streams, phi, alpha[:2], bias, PAPER), r"alpha is \[2\]; legal: \[groups\] = \[3\]"),
        "bias": (lambda: read(streams, phi, alpha, bias[:4], PAPER), r"bias is \[4\]; legal: \[columns\] = \[24\]"),
        "device": (lambda: read(streams, phi.to("meta"), alpha, bias, PAPER), "device of phi is meta; legal: "),
        "streams": (lambda: read(streams.double(), phi, alpha, bias, PAPER), "dtype of streams is torch.float64"),
    }


@pytest.mark.parametrize("case", ["phi", "phi of a head", "phi dtype", "alpha", "bias", "device", "streams"])
def test_wrong_arguments(case: str) -> None:
    call, message = wrong_calls()[case]
    with pytest.raises(ShapeError, match=message):
        call()


def test_wrong_conventions() -> None:
    with pytest.raises(ConfigError, match="iterations is 0; legal: an integer >= 1"):
        Convention(iterations=0)
    with pytest.raises(ConfigError, match="res is 'lite'; legal: 'sinkhorn', 'logits', 'none'"):
        Convention(res="lite")
    with pytest.raises(ConfigError, match="post is False"):
        Convention(post=False)


def test_runs_are_bitwise_equal() -> None:
    arguments = inputs(*((20, 4, 300) if INTERPRETED else (5000, 4, 1280)), torch.bfloat16, PAPER)
    assert_same_again(lambda: read(*arguments, PAPER)[0])
    assert_same_again(lambda: list(vars(read(*arguments, PAPER)[1]).values()))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter sees single addresses")
def test_streams_are_read_twice_and_u_written_once() -> None:
    from kernel_interpreter import watched

    arguments = inputs(21, 4, 129, torch.bfloat16, PAPER)
    with watched() as memories:
        read(*arguments, PAPER)
    assert [m.launch.name for m in memories] == ["pack", "project", "finish"]
    for memory in memories[1:]:
        assert (memory.reads["streams"] == 1).all()
    for memory in memories:
        assert {name for name, count in memory.writes.items() if not (count == 1).all()} == set()
