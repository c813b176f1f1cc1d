"""The backward that goes over the border of two sites, as Triton kernels, against autograd over the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_oracles as oracles
from kernel_lanes import (
    CASES,
    DEVICE,
    INTERPRETED,
    assert_near,
    assert_same_again,
    double,
    numeric,
    scattered,
    to_device,
)
from mhc_compile.errors import ConfigError, ShapeError
from mhc_compile.kernels import cross_site_ops, ops, reference, site_ops
from mhc_compile.kernels.convention import HUNYUAN_V4, PAPER, Before, Convention
from mhc_compile.kernels.triton_coefficients import read
from mhc_compile.kernels.triton_launch import Launch, record
from mhc_compile.kernels.triton_merge_backward import merge_backward
from mhc_compile.kernels.triton_products import products
from mhc_compile.kernels.triton_site_backward import crosses, site_backward
from mhc_compile.kernels.triton_traffic import traffic
from test_conventions import MERGE, VARIANTS, chosen
from test_kernels_site import CONVENTIONS, inputs

pytestmark = numeric

mhc = torch.ops.mhc
EPS, ITERATIONS, C = 0.1, 5, 24


def chain_inputs(t: int, n: int, c: int, dtype: torch.dtype, convention: Convention) -> tuple[Tensor, ...]:
    """As for a site by itself, and post of the merge before and what a tap sends to the streams."""
    torch.manual_seed(7)
    return (*inputs(t, n, c, dtype, convention), *to_device(torch.randn(t, n), torch.randn(t, n, c).to(dtype)))


def backward(arguments: tuple[Tensor, ...], convention: Convention, tapped: bool = True) -> dict[str, Tensor]:
    """Everything that one site of a chain gets in its backward, by the kernels."""
    streams, f, phi, alpha, bias, grad, du, gains, tap = arguments
    _, site = read(streams, phi, alpha, bias, convention)
    merges = {} if convention.mix == "none" else {"grad": grad, "f": f}
    if convention.mix == "identity":
        assert site.post is not None
        merges = {"grad": grad, "grad_post": merge_backward(grad, None, f, site.post, "identity")[1]}
    got = site_backward(
        streams,
        (phi, alpha, bias),
        site,
        convention,
        **merges,
        du=du,
        tap=tap if tapped else None,
        before=Before(gains, False, f.dtype),
    )
    assert got.f is not None
    return {"df before": got.f, "dX": got.streams, "dphi": got.phi, "dalpha": got.alpha, "dbias": got.bias}


def expected(arguments: tuple[Tensor, ...], convention: Convention, tapped: bool = True) -> dict[str, Tensor]:
    """The same by autograd over the oracle."""
    *leaves, grad, du, _, tap = double(*arguments)
    streams, f, phi, alpha, bias = leaves
    pre, post, res = oracles.coefficients(streams, phi, alpha, bias, convention)
    outputs, grads = [reference.aggregate(streams, pre)], [du]
    if post is not None:
        outputs, grads = [*outputs, oracles.merge(streams, f, post, res, convention)], [*grads, grad]
    if tapped:
        outputs, grads = [*outputs, streams * 1], [*grads, tap]
    dx, *rest = torch.autograd.grad(outputs, [streams, phi, alpha, bias], grads)
    return {"dX": dx, **dict(zip(("dphi", "dalpha", "dbias"), rest, strict=True))}


def check(arguments: tuple[Tensor, ...], convention: Convention, tapped: bool = True) -> None:
    right, found = expected(arguments, convention, tapped), backward(arguments, convention, tapped)
    # Of dX as it is in memory, rounded.
    gains, dx = double(arguments[-2], found["dX"])
    right["df before"] = (gains.unsqueeze(-1) * dx).sum(-2)
    for name, value in found.items():
        assert_near(name, value, right[name], arguments[0].dtype)


@pytest.mark.parametrize(("n", "t", "c", "dtype"), [case for case in CASES if case[0] <= 4])
def test_paper(n: int, t: int, c: int, dtype: torch.dtype) -> None:
    check(chain_inputs(t, n, c, dtype, CONVENTIONS["paper"]), CONVENTIONS["paper"], tapped=c > 1)


@pytest.mark.parametrize("name", [name for name in CONVENTIONS if name != "paper"])
@pytest.mark.parametrize(("n", "dtype"), [(1, torch.float32), (3, torch.float16), (4, torch.bfloat16)])
def test_other_conventions(n: int, dtype: torch.dtype, name: str) -> None:
    check(chain_inputs(9, n, 20, dtype, CONVENTIONS[name]), CONVENTIONS[name], tapped=n == 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_several_shares_and_strips(dtype: torch.dtype) -> None:
    convention = CONVENTIONS["deepseek_v4"]
    with record() as launches:
        check(chain_inputs(300, 4, 80, dtype, convention), convention)
    entry = next(entry for entry in launches if entry.name == "streams_backward")
    assert entry.grid[0] > len(entry.writes["phi_shares"]) > 1


def test_a_branch_that_is_narrower_than_the_streams() -> None:
    arguments = chain_inputs(9, 4, 20, torch.float32, PAPER)
    f = arguments[1].bfloat16()
    got, same = (backward((arguments[0], given, *arguments[2:]), PAPER) for given in (f, f.float()))
    assert got["df before"].dtype == torch.bfloat16 and torch.equal(got["df before"], same["df before"].bfloat16())
    assert all(torch.equal(got[name], same[name]) for name in got if name != "df before")


def test_rounded_gains() -> None:
    streams, f, phi, alpha, bias, grad, du, gains, _ = chain_inputs(9, 4, 20, torch.bfloat16, PAPER)
    _, site = read(streams, phi, alpha, bias, PAPER)

    def df(gains: Tensor, rounded: bool) -> Tensor | None:
        before = Before(gains, rounded, torch.bfloat16)
        return site_backward(streams, (phi, alpha, bias), site, PAPER, grad=grad, f=f, du=du, before=before).f

    rounded, exact = df(gains, True), df(gains, False)
    assert rounded is not None and exact is not None and not torch.equal(rounded, exact)
    assert torch.equal(rounded, df(gains.bfloat16().float(), False))


def test_one_stream_is_the_plain_residual() -> None:
    """n = 1 with coefficients of 1 and no dynamic part: dX is G + du, and df that, bit for bit."""
    convention = replace(PAPER, post_scale=1.0)
    streams, f, phi, alpha, bias, grad, du, gains, tap = chain_inputs(50, 1, 33, torch.float32, convention)
    grad[0, 0, 0] = du[0, 0] = -0.0
    ones = torch.full_like(bias, 100.0)
    arguments = (streams, f, phi * 0, alpha, ones, grad, du, torch.ones_like(gains), tap)
    got = backward(arguments, convention, tapped=False)
    assert torch.equal(got["dX"][:, 0], grad[:, 0] + du) and torch.equal(got["df before"], grad[:, 0] + du)


def test_no_tokens() -> None:
    got = backward(chain_inputs(0, 4, 6, torch.bfloat16, PAPER), PAPER)
    assert got["df before"].shape == (0, 6) and not any(got[name].any() for name in ("dphi", "dalpha", "dbias"))


def test_layout_of_the_inputs_does_not_matter() -> None:
    arguments = chain_inputs(9, 4, 20, torch.bfloat16, PAPER)
    plain, odd = (backward(given, PAPER) for given in (arguments, tuple(map(scattered, arguments))))
    for name, value in plain.items():
        assert torch.equal(value, odd[name]), name


def test_a_bad_token_stays_alone() -> None:
    arguments = chain_inputs(70, 4, 20, torch.bfloat16, PAPER)
    clean = backward(arguments, PAPER)
    arguments[1][40, 3] = float("nan")
    dirty = backward(arguments, PAPER)
    others = [i for i in range(70) if i != 40]
    for name in ("df before", "dX"):
        assert torch.equal(clean[name][others], dirty[name][others]), name
    assert not dirty["df before"][40].isfinite().all()


def test_runs_are_bitwise_equal() -> None:
    arguments = chain_inputs(*((40, 4, 70) if INTERPRETED else (5000, 4, 1280)), torch.bfloat16, PAPER)
    assert_same_again(lambda: backward(arguments, PAPER))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter sees single addresses")
@pytest.mark.parametrize("name", ["paper", "head"])
def test_each_element_is_moved_once(name: str) -> None:
    from kernel_interpreter import watched

    with watched() as memories:
        backward(chain_inputs(41, 4, 129, torch.bfloat16, CONVENTIONS[name]), CONVENTIONS[name])
    firsts = ["products"] if name == "paper" else []
    backwards = [*firsts, "coefficients_backward", "pack", "streams_backward", "add_shares"]
    assert [m.launch.name for m in memories] == ["pack", "project", "finish", *backwards]
    wide = ("streams", "f", "grad", "du", "tap")
    for memory in memories:
        moved = {key: count for key, count in memory.reads.items() if key in wide}
        for key, count in {**moved, **memory.writes}.items():
            assert (count == 1).all(), (memory.launch.name, key)


def wrong_calls() -> dict[str, Any]:
    streams, f, phi, alpha, bias, grad, du, gains, tap = chain_inputs(5, 4, 6, torch.float32, PAPER)
    _, site = read(streams, phi, alpha, bias, PAPER)
    p, before = (phi, alpha, bias), Before(gains[1:], False, torch.float32)
    return {
        "tap": (lambda: site_backward(streams, p, site, PAPER, du=du, tap=tap[1:]), r"tap is \[4, 4, 6\]; legal"),
        "post": (
            lambda: site_backward(streams, p, site, PAPER, du=du, before=before),
            r"post of the merge before is \[4, 4\]; legal: .* = \[5, 4\]",
        ),
        "f": (lambda: products(grad, du, streams, f[1:], False), r"f is \[4, 6\]; legal"),
        "grad": (lambda: products(grad.half(), du, streams, f, False), r"dtype of grad is torch.float16"),
        "du": (lambda: products(grad, du[1:], streams, f, False), r"du is \[4, 6\]; legal"),
    }


@pytest.mark.parametrize("case", ["tap", "post", "f", "grad", "du"])
def test_wrong_arguments(case: str) -> None:
    call, message = wrong_calls()[case]
    with pytest.raises(ShapeError, match=message):
        call()


def test_more_than_four_streams_do_not_cross() -> None:
    streams, f, phi, alpha, bias, grad, du, *_ = chain_inputs(3, 5, 6, torch.float32, PAPER)
    _, site = read(streams, phi, alpha, bias, PAPER)
    assert not crosses(streams, "given") and not crosses(streams[:, :4], "identity")
    assert crosses(streams[:, :4], "given") and crosses(streams[:, :4], "transposed")
    with pytest.raises(ConfigError, match="f is a tensor; legal: None, as this convention has no res"):
        site_backward(streams, (phi, alpha, bias), site, HUNYUAN_V4, grad=grad, du=du, f=f)
    with pytest.raises(ConfigError, match="f, tap or before with 5 streams; legal: up to 4 streams"):
        site_backward(streams, (phi, alpha, bias), site, PAPER, grad=grad, du=du, f=f)


# --- through the ops --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _on_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On whatever device the lane has."""
    for module in (ops, site_ops):
        monkeypatch.setattr(module, "has_kernel", lambda tensor, n: True)
    yield
    torch._dynamo.reset()


def op_inputs(n: int, sites: int, exit: str, variant: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """streams, and of each site phi, alpha, bias and f; of the exit the parameters alone."""
    torch.manual_seed(0)

    def site(groups: int) -> list[Tensor]:
        columns = (n, 2 * n, n * n + 2 * n)[groups - 1]
        return [
            torch.randn(n * C, columns) / (n * C) ** 0.5,
            torch.tensor([0.5, 1.5, -2.0])[:groups],
            torch.randn(columns),
        ]

    values = [torch.randn(5, n, C).to(dtype)]
    for _ in range(sites):
        values += [*site(variant.get("groups", 3)), torch.randn(5, C).to(dtype)]
    values += site(1) if exit == "head" else []
    return [value.to(DEVICE).requires_grad_() for value in values]


def chain(arguments: list[Tensor], variant: dict[str, Any], crossing: bool, tap: bool) -> list[Tensor]:
    """Sites in a row, and a head where parameters are left for one; a branch is its f and its u."""
    streams, *rest = arguments
    flags = chosen(variant, MERGE)
    manner = flags.get("transposed", False), flags.get("rounded", False)
    u, pre, post, res, carrier, branch, _, _ = mhc.read(streams, *rest[:3], EPS, ITERATIONS, **variant)
    taps = []
    while len(rest) > 3:
        f = rest[3] + u
        merging = streams, f, carrier, branch if crossing else None, post, res if res.numel() else None
        rest = rest[4:]
        if not rest:
            without = *merging[:3], *merging[4:]
            return [*taps, mhc.merge_carried(*without, *manner)]
        given = variant if len(rest) > 3 else {"pre_eps": 1e-6, "groups": 1}
        result = mhc.merge_read(*merging, *manner, *rest[:3], EPS, ITERATIONS, **given)
        streams, u, pre, post, res, carrier, branch, _, _ = result
        taps += [pre * 2.0, ops.readout(streams)] if tap else []
    return [*taps, u]


def firsts(found: list[Launch]) -> list[str]:
    """The first pass of each site's backward."""
    return [launch.name for launch in found if launch.name.startswith(("merge_backward", "products"))]


def gradients(outputs: list[Tensor], arguments: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(outputs, arguments, [torch.randn(output.shape).to(output) for output in outputs])


@pytest.mark.parametrize(
    ("name", "n", "dtype", "exit", "tap"),
    [
        ("paper", 4, torch.bfloat16, "merge", True),
        ("paper", 4, torch.bfloat16, "head", False),
        ("paper", 2, torch.float32, "head", True),
        ("paper", 1, torch.float16, "merge", False),
        ("deepseek_v4", 4, torch.float16, "merge", False),
        ("deepseek_v4", 3, torch.bfloat16, "head", True),
        ("hunyuan_v4", 3, torch.float32, "merge", True),
        ("paper", 5, torch.float32, "head", True),
    ],
)
def test_crossing_changes_no_gradient(name: str, n: int, dtype: torch.dtype, exit: str, tap: bool) -> None:
    variant = {**VARIANTS[name], **({"rounded": True} if name == "deepseek_v4" else {})}
    arguments = op_inputs(n, 3, exit, variant, dtype)
    found = []
    for crossing in (True, False):
        with record() as launches:
            found.append(gradients(chain(arguments, variant, crossing, tap), arguments))
        left, own = ["products"] * 3, ["merge_backward" if n <= 4 else "merge_backward_wide"] * 3
        if exit == "merge":
            left[0] = own[0]  # the last one has no read behind it
        assert firsts(launches) == (left if crossing and n <= 4 and name != "hunyuan_v4" else own)
    step = 2e-5 if dtype == torch.float32 else 2**-6
    for a, b in zip(*found, strict=True):
        error = (a - b).abs().max().item()
        assert error <= step * b.abs().max().clamp(min=1e-3).item(), (name, tuple(a.shape), error)


@pytest.mark.parametrize("crossing", [True, False])
def test_units_of_one_more_site(crossing: bool) -> None:
    """What a chain moves in backward grows by 24 units a site, or by 28."""
    units = []
    for sites in (2, 3):
        arguments = op_inputs(4, sites, "merge", {}, torch.bfloat16)
        outputs = chain(arguments, {}, crossing, False)
        with record() as launches:
            gradients(outputs, arguments)
        units.append(traffic(launches, 5, C)[-1].units)
    assert units[1] - units[0] == (24 if crossing else 28)


def test_compiled_ahead_of_time() -> None:
    """The graph of a backward, too, has the op that crosses, and gives the same bits."""
    arguments = op_inputs(4, 3, "head", {}, torch.bfloat16)

    def function(*values: Tensor) -> list[Tensor]:
        return chain(list(values), {}, True, True)

    right = gradients(function(*arguments), arguments)
    with record() as launches:
        found = gradients(torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments), arguments)
    assert firsts(launches) == ["products"] * 3
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a, b)


def test_only_the_branches_are_trained() -> None:
    """Nothing is left to a read that nobody goes back to."""
    arguments = op_inputs(4, 2, "merge", {}, torch.float32)
    for i, argument in enumerate(arguments):
        argument.requires_grad_(i == 4)
    first = arguments[4]
    (found,) = gradients(chain(arguments, {}, True, False), [first])
    (right,) = gradients(chain(arguments, {}, False, False), [first])
    torch.testing.assert_close(found, right)
    assert cross_site_ops.leaves_products(arguments[0], "given", False)
