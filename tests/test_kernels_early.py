"""Reads with weights that are known before their state, as Triton kernels, against the float64 oracle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
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
from mhc_compile import mhc_compile
from mhc_compile.conversion import conversion
from mhc_compile.errors import ShapeError
from mhc_compile.kernels import ops, reference, site_ops, triton_single_pass
from mhc_compile.kernels.convention import PAPER, Before, Coefficients, Convention
from mhc_compile.kernels.triton_aggregate import aggregate
from mhc_compile.kernels.triton_aggregate_backward import aggregate_backward, weights_backward
from mhc_compile.kernels.triton_coefficients import coefficients
from mhc_compile.kernels.triton_launch import record
from mhc_compile.kernels.triton_merge import merge
from mhc_compile.kernels.triton_merge_backward import merge_backward
from mhc_compile.kernels.triton_single_pass import merge_read_early
from mhc_compile.kernels.triton_site_backward import crosses, site_backward
from mhc_compile.kernels.triton_traffic import traffic
from test_conventions import BALANCE, GATES, MERGE, VARIANTS, chosen
from test_kernels_chain import EPS, ITERATIONS, C, chain_inputs, firsts, gradients, op_inputs
from test_kernels_site import CONVENTIONS

pytestmark = numeric

mhc = torch.ops.mhc
Merging = tuple[Tensor, Tensor, Tensor, Tensor | None]


@pytest.fixture(params=["one launch", "two launches"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As with many tokens, or with few: how many launches a merge and its read are, up to four streams."""
    one = request.param == "one launch"
    monkeypatch.setattr(triton_single_pass, "in_one_launch", lambda tokens, streams: one)
    return 1 if one else 2


def forward_inputs(
    t: int, n: int, c: int, dtype: torch.dtype, convention: Convention
) -> tuple[Merging, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """What a merge takes, the weights of its read, and the parameters of the site behind."""
    streams, f, phi, alpha, bias, _, _, post, _ = chain_inputs(t, n, c, dtype, convention)
    res, weights = to_device(torch.randn(t, n, n), torch.randn(t, n))
    return (streams, f, post, None if convention.mix == "identity" else res), weights, (phi, alpha, bias)


def run(
    merging: Merging, weights: Tensor | None, parameters: tuple[Tensor, Tensor, Tensor], convention: Convention
) -> tuple[Tensor, Tensor | None, Coefficients]:
    mix = "given" if convention.mix == "none" else convention.mix
    return merge_read_early(merging, weights, parameters, mix, convention.rounded, convention)


def check(merging: Merging, weights: Tensor, parameters: tuple[Tensor, Tensor, Tensor], convention: Convention) -> None:
    streams, mix = merging[0], "given" if convention.mix == "none" else convention.mix
    merged, u, site = run(merging, weights, parameters, convention)
    assert torch.equal(merged, merge(*merging, mix, convention.rounded))
    # What follows is of the merged streams as they are in memory, rounded.
    (x, w), (phi, alpha, bias) = double(merged, weights), double(*parameters)
    assert u is not None
    assert_near("u", u, reference.aggregate(x, w).detach(), streams.dtype)
    if INTERPRETED:
        assert torch.equal(u, aggregate(merged, weights))
    names = ("pre", "post", "res")
    for name, right in zip(names, oracles.coefficients(x, phi, alpha, bias, convention), strict=True):
        assert (getattr(site, name) is None) == (right is None)
        if right is not None:
            assert_near(name, getattr(site, name), right.detach(), streams.dtype)
    wide = x.flatten(-2).detach()
    assert_near("z", site.z.t(), wide @ phi.detach(), streams.dtype)
    assert_near("r", site.r, torch.sqrt(wide.square().mean(-1) + convention.rms_eps), streams.dtype)


@pytest.mark.parametrize(("n", "t", "c", "dtype"), CASES)
def test_paper(n: int, t: int, c: int, dtype: torch.dtype, launches: int) -> None:
    arguments = forward_inputs(t, n, c, dtype, CONVENTIONS["paper"])
    with record() as found:
        run(*arguments, CONVENTIONS["paper"])
    names = [launch.name for launch in found if launch.name != "pack"]
    if n <= 4:
        assert names == (["merge_read_early"] if launches == 1 else ["merge_project", "finish"])
        assert len(found) == launches + (launches == 2 and t > 16)
    else:
        assert names == ["merge", "aggregate", "project", "finish"]
    check(*arguments, CONVENTIONS["paper"])


@pytest.mark.parametrize("name", [name for name in CONVENTIONS if name != "paper"])
@pytest.mark.parametrize(("n", "dtype"), [(1, torch.float32), (3, torch.float16), (4, torch.bfloat16)])
def test_other_conventions(n: int, dtype: torch.dtype, name: str, launches: int) -> None:
    check(*forward_inputs(9, n, 20, dtype, CONVENTIONS[name]), CONVENTIONS[name])


def test_a_transposed_phi_and_several_tiles(launches: int) -> None:
    merging, weights, (phi, alpha, bias) = forward_inputs(150, 4, 80, torch.bfloat16, PAPER)
    turned = phi.t().contiguous().t()
    check(merging, weights, (turned, alpha, bias), PAPER)
    found, right = (run(merging, weights, (p, alpha, bias), PAPER)[2] for p in (turned, phi))
    assert found.res is not None and right.res is not None and torch.equal(found.res, right.res)


def test_no_weights_no_read(launches: int) -> None:
    merging, weights, parameters = forward_inputs(9, 4, 20, torch.bfloat16, PAPER)
    with record() as found:
        merged, u, site = run(merging, None, parameters, PAPER)
    assert u is None and all(launch.writes.get("u") is None for launch in found)
    right, _, same = run(merging, weights, parameters, PAPER)
    assert torch.equal(merged, right) and torch.equal(site.pre, same.pre)


def test_one_stream_is_the_plain_residual(launches: int) -> None:
    """n = 1 with coefficients of 1: X' is X + f and u' is X', bit for bit, a negative zero too."""
    (streams, f, post, res), weights, parameters = forward_inputs(50, 1, 33, torch.float32, PAPER)
    assert res is not None
    streams[0, 0, 0] = f[0, 0] = -0.0
    ones = (streams, f, torch.ones_like(post), torch.ones_like(res))
    merged, u, _ = run(ones, torch.ones_like(weights), parameters, PAPER)
    assert u is not None and torch.equal(merged[:, 0], streams[:, 0] + f) and torch.equal(u, merged[:, 0])
    assert torch.signbit(u[0, 0]) and torch.signbit(merged[0, 0, 0])


def test_no_tokens(launches: int) -> None:
    merged, u, site = run(*forward_inputs(0, 4, 6, torch.bfloat16, PAPER), PAPER)
    assert u is not None and merged.shape == (0, 4, 6) and u.shape == (0, 6) and site.pre.shape == (0, 4)


def test_layout_of_the_inputs_does_not_matter(launches: int) -> None:
    merging, weights, parameters = forward_inputs(9, 4, 20, torch.bfloat16, PAPER)
    odd = tuple(scattered(one) for one in merging if one is not None)
    found = run(odd, scattered(weights), tuple(map(scattered, parameters)), PAPER)  # type: ignore[arg-type]
    right = run(merging, weights, parameters, PAPER)
    assert found[1] is not None and right[1] is not None
    assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1]) and torch.equal(found[2].z, right[2].z)


def test_a_bad_token_stays_alone(launches: int) -> None:
    merging, weights, parameters = forward_inputs(70, 4, 20, torch.bfloat16, PAPER)
    clean = run(merging, weights, parameters, PAPER)
    merging[1][40, 3] = float("nan")
    dirty = run(merging, weights, parameters, PAPER)
    others = [i for i in range(70) if i != 40]
    for a, b in (
        (clean[0], dirty[0]),
        (clean[1], dirty[1]),
        (clean[2].pre, dirty[2].pre),
        (clean[2].res, dirty[2].res),
    ):
        assert a is not None and b is not None
        assert torch.equal(a[others], b[others]) and not b[40].isfinite().all()


def test_runs_are_bitwise_equal(launches: int) -> None:
    arguments = forward_inputs(*((40, 4, 70) if INTERPRETED else (9000, 4, 1280)), torch.bfloat16, PAPER)

    def once() -> list[Any]:
        merged, u, site = run(*arguments, PAPER)
        return [merged, u, *vars(site).values()]

    assert_same_again(once)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter sees single addresses")
def test_each_element_is_moved_once(launches: int) -> None:
    from kernel_interpreter import watched

    with watched() as memories:
        run(*forward_inputs(41, 4, 129, torch.bfloat16, PAPER), PAPER)
    for memory in memories:
        moved = {key: count for key, count in memory.reads.items() if key in ("streams", "f")}
        for key, count in {**moved, **memory.writes}.items():
            assert (count == 1).all(), (memory.launch.name, key)


def test_the_launches_follow_the_tokens() -> None:
    """One where tiles of tokens alone fill the device."""
    streams = torch.empty(1, 4, 8, dtype=torch.bfloat16)  # on a CPU: as on an H200
    counts = [1, 16, 4096, 8192, 9000, 16384, 65536]
    assert [t for t in counts if triton_single_pass.in_one_launch(t, streams)] == [8192, 9000, 16384, 65536]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, w, p: (m, w[1:], p), r"weights is \[4, 4\]; legal: .* = \[5, 4\]"),
        (lambda m, w, p: (m, w.half(), p), "dtype of weights is torch.float16"),
        (lambda m, w, p: ((m[0], m[1][1:], *m[2:]), w, p), r"f is \[4, 6\]; legal"),
    ],
)
def test_wrong_arguments(change: Callable[..., Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        run(*change(*forward_inputs(5, 4, 6, torch.float32, PAPER)), PAPER)


# --- backward ---------------------------------------------------------------------------------------------


def backward(arguments: tuple[Tensor, ...], weights: Tensor, convention: Convention, own: bool) -> dict[str, Any]:
    """What one site gets in its backward; ``own``: its merge has made dpost and dres."""
    streams, f, phi, alpha, bias, grad, du, gains, tap = arguments
    site = coefficients(streams, phi, alpha, bias, convention)
    merges: dict[str, Any] = {} if convention.mix == "none" else {"grad": grad, "f": f}
    if convention.mix != "none" and (own or convention.mix == "identity"):
        assert site.post is not None
        _, dpost, dres = merge_backward(grad, streams, f, site.post, convention.mix, convention.rounded)
        merges = {"grad": grad, "grad_post": dpost, "grad_res": dres}
    more = {"tap": tap, "before": Before(gains, False, f.dtype)} if streams.shape[1] <= 4 else {}
    given = {**merges, **more, "du": du, "grad_pre": gains * 0.5, "weights": weights}
    got = site_backward(streams, (phi, alpha, bias), site, convention, **given)
    found = {"dX": got.streams, "dphi": got.phi, "dalpha": got.alpha, "dbias": got.bias, "dweights": got.weights}
    return {**found, "df before": got.f} if more else found


def expected(arguments: tuple[Tensor, ...], weights: Tensor, convention: Convention) -> dict[str, Tensor]:
    """The same by autograd over the oracle."""
    *leaves, grad, du, gains, tap = double(*arguments)
    (w,), (streams, f, phi, alpha, bias) = double(weights), leaves
    pre, post, res = oracles.coefficients(streams, phi, alpha, bias, convention)
    outputs, grads = [reference.aggregate(streams, w), pre], [du, gains * 0.5]
    if post is not None:
        outputs, grads = [*outputs, oracles.merge(streams, f, post, res, convention)], [*grads, grad]
    if streams.shape[1] <= 4:
        outputs, grads = [*outputs, streams * 1], [*grads, tap]
    names = ("dX", "dphi", "dalpha", "dbias", "dweights")
    found = dict(zip(names, torch.autograd.grad(outputs, [streams, phi, alpha, bias, w], grads), strict=True))
    if streams.shape[1] <= 4:
        found["df before"] = (gains.unsqueeze(-1) * found["dX"]).sum(-2)
    return {name: value.detach() for name, value in found.items()}


def check_backward(arguments: tuple[Tensor, ...], convention: Convention, own: bool) -> None:
    weights = to_device(torch.randn(arguments[7].shape))[0]
    right = expected(arguments, weights, convention)
    for name, value in backward(arguments, weights, convention, own).items():
        assert_near(name, value, right[name], arguments[0].dtype)


@pytest.mark.parametrize(("n", "t", "c", "dtype"), CASES)
def test_backward(n: int, t: int, c: int, dtype: torch.dtype) -> None:
    for own in [True] if n > 4 else [True, False]:
        check_backward(chain_inputs(t, n, c, dtype, CONVENTIONS["paper"]), CONVENTIONS["paper"], own)


# A head reads with its own pre.
@pytest.mark.parametrize("name", [name for name in CONVENTIONS if name not in ("paper", "head")])
@pytest.mark.parametrize(("n", "dtype"), [(1, torch.float32), (3, torch.float16), (4, torch.bfloat16)])
def test_backward_of_other_conventions(n: int, dtype: torch.dtype, name: str) -> None:
    check_backward(chain_inputs(9, n, 20, dtype, CONVENTIONS[name]), CONVENTIONS[name], False)


def test_backward_runs_are_bitwise_equal() -> None:
    arguments = chain_inputs(*((40, 4, 70) if INTERPRETED else (5000, 4, 1280)), torch.bfloat16, PAPER)
    weights = arguments[7] * 0.3
    assert_same_again(lambda: backward(arguments, weights, PAPER, False))


@pytest.mark.parametrize(("n", "t", "c", "dtype"), [*CASES, (16, 9, 20, torch.float32)])
def test_a_read_by_itself(n: int, t: int, c: int, dtype: torch.dtype) -> None:
    """As of the exit of a trunk: 5 units read and 4 written; 5 where dX comes with a site's."""
    torch.manual_seed(0)
    du, streams, weights = to_device(torch.randn(t, c).to(dtype), torch.randn(t, n, c).to(dtype), torch.randn(t, n))
    x, w = double(streams, weights)
    right = torch.autograd.grad(reference.aggregate(x, w), [x, w], double(du)[0])
    with record() as found:
        dx, dweights = aggregate_backward(scattered(du), streams, weights)
        alone = weights_backward(du, streams)
    assert_near("dX", dx, right[0], dtype)
    assert_near("dw", dweights, right[1], dtype)
    assert torch.equal(alone, dweights)
    assert [traffic([launch], t, c)[-1].units for launch in found] == [2 * n + 1, n + 1]


# --- through the ops --------------------------------------------------------------------------------------


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Sends the ops to the kernels or to plain torch, on whatever device the lane has."""

    def choose(kernels: bool) -> None:
        for module in (ops, site_ops):
            monkeypatch.setattr(module, "has_kernel", lambda tensor, n: kernels)

    yield choose
    torch._dynamo.reset()


def chain(arguments: list[Tensor], variant: dict[str, Any], crossing: bool, tap: bool) -> list[Tensor]:
    """Sites in a row, as `fuse` leaves them with single-pass reads: a branch is its f and its u."""
    streams, *rest = arguments
    flags = chosen(variant, MERGE)
    manner = flags.get("transposed", False), flags.get("rounded", False)
    _, pre, post, res, carrier, branch, _, _ = mhc.read_early(streams, None, *rest[:3], EPS, ITERATIONS, **variant)
    u, taps = ops.readout(streams), []
    while len(rest) > 3:
        merging = streams, rest[3] + u, carrier, branch if crossing else None, post, res if res.numel() else None
        rest = rest[4:]
        if not rest:
            merged = mhc.merge_carried(*merging[:3], *merging[4:], *manner)
            return [*taps, ops.aggregate(merged, pre), ops.readout(merged)]
        result = mhc.merge_read_early(*merging, *manner, pre, *rest[:3], EPS, ITERATIONS, **variant)
        streams, u, pre, post, res, carrier, branch, _, _ = result
        taps += [pre * 2.0, ops.readout(streams)] if tap else []
    raise AssertionError


def level_1(arguments: list[Tensor], variant: dict[str, Any], tap: bool) -> list[Tensor]:
    """The same, an op for each term."""
    streams, *rest = arguments
    u, before, taps = ops.readout(streams), None, []
    while rest:
        pre, post, logits = ops.coefficients(streams, *rest[:3], EPS, **chosen(variant, GATES))
        if before is not None:
            u = ops.aggregate(streams, before)
            taps += [pre * 2.0, ops.readout(streams)] if tap else []
        res = ops.sinkhorn(logits, ITERATIONS, **chosen(variant, BALANCE)) if logits.numel() else None
        streams, before = ops.merge(streams, rest[3] + u, post, res, **chosen(variant, MERGE)), pre
        rest = rest[4:]
    assert before is not None
    return [*taps, ops.aggregate(streams, before), ops.readout(streams)]


@pytest.mark.parametrize(
    ("name", "n", "dtype", "tap"),
    [
        ("paper", 4, torch.bfloat16, True),
        ("paper", 4, torch.float32, False),
        ("paper", 1, torch.float32, True),
        ("deepseek_v4", 3, torch.bfloat16, False),
        ("hunyuan_v4", 2, torch.float32, True),
        ("paper", 5, torch.float32, True),
    ],
)
def test_the_ops_are_those_of_level_1(
    name: str, n: int, dtype: torch.dtype, tap: bool, on_kernels: Any, launches: int
) -> None:
    """Values and gradients, on kernels, as far from float64 as level 1 in plain torch is."""
    variant = {**VARIANTS[name], "rounded": name == "deepseek_v4"}
    arguments = op_inputs(n, 3, "merge", variant, dtype)
    on_kernels(False)
    wide = [a.detach().double().requires_grad_() for a in arguments]
    right = level_1(wide, {**variant, "rounded": False}, tap)
    right += gradients(right, wide)
    plain = level_1(arguments, variant, tap)
    plain += gradients(plain, arguments)
    on_kernels(True)
    for crossing in (True, False):
        with record() as found_launches:
            found = chain(arguments, variant, crossing, tap)
            found += gradients(found, arguments)
        crossed = crossing and crosses(arguments[0], "identity" if name == "hunyuan_v4" else "given")
        own = "merge_backward" if n <= 4 else "merge_backward_wide"
        assert [one for one in firsts(found_launches) if one != "products"] == [own] * (1 if crossed else 3)
        step = {torch.float32: 2e-5, torch.bfloat16: 3 * 2**-7}[dtype]
        for i, (a, b, c) in enumerate(zip(right, found, plain, strict=True)):
            error, other = ((a - one).detach().abs().max().item() for one in (b, c))
            assert error <= max(step * a.detach().abs().max().clamp(min=1).item(), 2 * other), (name, i, error, other)


@pytest.mark.parametrize("crossing", [True, False])
def test_units_of_one_more_site(crossing: bool, on_kernels: Any, launches: int) -> None:
    """A site of the chain moves 10 units forward and 24 backward, or 28 where no merge leaves anything to a read."""
    on_kernels(True)
    forward, back = [], []
    for sites in (2, 3):
        arguments = op_inputs(4, sites, "merge", {}, torch.bfloat16)
        with record() as found:
            outputs = chain(arguments, {}, crossing, False)
        forward.append(traffic(found, 5, C)[-1].units)
        with record() as found:
            gradients(outputs, arguments)
        back.append(traffic(found, 5, C)[-1].units)
    assert forward[1] - forward[0] == 10
    assert back[1] - back[0] == (24 if crossing else 28)


def test_compiled_ahead_of_time(on_kernels: Any) -> None:
    """The graph has the same ops, forward and backward, and gives the same bits."""
    on_kernels(True)
    arguments = op_inputs(4, 3, "merge", {}, torch.bfloat16)

    def function(*values: Tensor) -> list[Tensor]:
        return chain(list(values), {}, True, True)

    right = gradients(function(*arguments), arguments)
    found = gradients(torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments), arguments)
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a, b)


def test_the_first_site_makes_no_input_for_its_branch(on_kernels: Any) -> None:
    on_kernels(True)
    streams, phi, alpha, bias, _ = op_inputs(4, 1, "merge", {}, torch.bfloat16)
    with record() as found:
        u, *_ = mhc.read_early(streams, None, phi, alpha, bias, EPS, ITERATIONS)
    assert u.shape == (0,) and traffic(found, 5, C)[-1].units == 4
    with record() as found:
        mhc.read_early(streams, torch.ones(5, 4, device=DEVICE), phi, alpha, bias, EPS, ITERATIONS)
    assert traffic(found, 5, C)[-1].units == 9


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("name", ["vit"] if INTERPRETED else ["llama", "vit", "t5"])
def test_a_model_on_kernels(name: str, on_kernels: Any) -> None:
    """A conversion with single-pass reads in training, compiled, against its level-1 ops in plain torch."""
    for library in ("transformers", "hypothesis"):  # not on every machine with a GPU
        pytest.importorskip(library)
    from graphs import assert_same, fresh, output_error, randomize, result_of

    on_kernels(False)
    model, inputs = fresh(name)
    model, inputs = model.to(DEVICE).train(), {key: to_device(value)[0] for key, value in inputs.items()}
    own = dict(model.named_parameters())
    plain = result_of(lambda: model(**inputs), own)
    mhc_compile(model, n=4, single_pass=True, backend="aot_eager", example_inputs=inputs)
    randomize(model)
    named = dict(model.named_parameters())
    op_by_op = conversion(model).compiled(model, "eager", level=1)
    expected = result_of(lambda: op_by_op(model, **inputs)[1], named)
    assert output_error(plain, expected) > 1e-3, "the test could not tell mHC from plain"
    on_kernels(True)
    with record() as found:
        assert_same(expected, result_of(lambda: model(**inputs), named), outputs=1e-5, gradients=1e-4)
    names = Counter(launch.name for launch in found)
    # The last site of a trunk has a merge of its own, and du by itself.
    assert names["merge_project"] > 2 and names["merge"] == names["merge_backward"] <= 2
    assert names["products"] == names["merge_project"] and names["aggregate_backward"] == 2 * names["merge"]
