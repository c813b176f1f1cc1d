"""The ops of a whole site against the float64 oracle: values, gradients, what is kept, and what is allocated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mhc_compile.errors import ConfigError, RewriteError, ShapeError
from mhc_compile.kernels import ops, plain, reference, site_ops, site_plain
from mhc_compile.kernels.convention import PAPER
from opcheck import opcheck
from tolerances import assert_close

EPS = 0.1  # large: at n C = 1 the gradient of the streams is proportional to it
ITERATIONS = 20
INPUTS = ("streams", "phi", "alpha", "bias", "f")
OUTPUTS = ("u", "pre", "post", "res", "merged")
NAMES = ("read", "read_backward", "merge_carried", "merge_carried_backward")

mhc = torch.ops.mhc


@pytest.fixture(autouse=True)
def _fresh_compilations() -> Any:
    """Nothing from another test, nor from the caches on disk: their keys know nothing of the formulas tested here."""
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def inputs(lead: tuple[int, ...], n: int, c: int, dtype: torch.dtype) -> list[Tensor]:
    """streams, phi, alpha, bias and what the branch gives."""
    torch.manual_seed(0)
    wide = plain.coefficient_dtype(dtype)
    k = n * n + 2 * n
    streams, f = torch.randn(*lead, n, c).to(dtype), torch.randn(*lead, c).to(dtype)
    phi = torch.randn(n * c, k).to(wide) / (n * c) ** 0.5
    return [streams, phi, torch.tensor([0.5, 1.5, -2.0], dtype=wide), torch.randn(k).to(wide), f]


def site(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor) -> dict[str, Tensor]:
    """A site whose branch is cut open: f does not depend on u."""
    u, pre, post, res, carrier = site_ops.read(streams, phi, alpha, bias, EPS, ITERATIONS)
    merged = site_ops.merge_carried(streams, f, carrier, post, res)
    return {"u": u, "pre": pre, "post": post, "res": res, "merged": merged}


def oracle(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor) -> dict[str, Tensor]:
    pre, post, logits = reference.coefficients(streams, phi, alpha, bias, EPS)
    res = reference.sinkhorn(logits, ITERATIONS)
    merged = reference.merge(streams, f, post, res)
    return {"u": reference.aggregate(streams, pre), "pre": pre, "post": post, "res": res, "merged": merged}


def level_1(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor) -> dict[str, Tensor]:
    pre, post, logits = ops.coefficients(streams, phi, alpha, bias, EPS)
    res = ops.sinkhorn(logits, ITERATIONS)
    merged = ops.merge(streams, f, post, res)
    return {"u": ops.aggregate(streams, pre), "pre": pre, "post": post, "res": res, "merged": merged}


Site = Callable[..., dict[str, Tensor]]


def run(
    function: Site,
    args: list[Tensor],
    grads: dict[str, Tensor],
    frozen: tuple[str, ...] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Outputs, and the gradients of the inputs; ``grads`` are sent into the outputs that they name."""
    leaves = [a.detach().clone().requires_grad_(name not in frozen) for name, a in zip(INPUTS, args, strict=True)]
    outputs = function(*leaves)
    torch.autograd.backward([outputs[name] for name in grads], list(grads.values()))
    return outputs, {name: leaf.grad for name, leaf in zip(INPUTS, leaves, strict=True)}


def random_grads(args: list[Tensor], names: tuple[str, ...] = OUTPUTS) -> dict[str, Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = site(*args)
    return {name: torch.randn(outputs[name].shape).to(outputs[name].dtype) for name in names}


def check(
    args: list[Tensor],
    names: tuple[str, ...] = OUTPUTS,
    frozen: tuple[str, ...] = (),
    function: Site = site,
    expected: Site = oracle,
) -> None:
    grads = random_grads(args, names)
    outputs, ours = run(function, args, grads, frozen)
    exact, theirs = run(expected, [a.double() for a in args], {k: g.double() for k, g in grads.items()}, frozen)
    for name in OUTPUTS:
        assert outputs[name].is_contiguous()
        assert_close(name, outputs[name], exact[name])
    for name in INPUTS:
        found, wanted = ours[name], theirs[name]
        if wanted is None or found is None:
            # what no gradient reaches may also have got zeros
            assert wanted is None and (found is None or not found.any()), name
        else:
            assert_close(f"gradient of {name}", found, wanted)


# --- values and gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("t", "c"), [(1, 129), (7, 1), (129, 7)])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_against_the_oracle(n: int, t: int, c: int, dtype: torch.dtype) -> None:
    check(inputs((t,), n, c, dtype))


@pytest.mark.parametrize("lead", [(), (2, 3, 2), (0,), (3, 0)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    check(inputs(lead, 4, 5, torch.float32))
    check(inputs(lead, 2, 5, torch.bfloat16))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gradcheck(n: int) -> None:
    args = [a.requires_grad_() for a in inputs((2,), n, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda *leaves: tuple(site(*leaves).values()), args)


PARTS = [("u",), ("pre",), ("post",), ("res",), ("merged",), ("u", "merged"), ("post", "merged"), ("res", "merged")]


@pytest.mark.parametrize("names", PARTS, ids="+".join)
def test_only_some_outputs_are_used(names: tuple[str, ...]) -> None:
    """A branch that is frozen sends no gradient to u; a monitor may send one to post or res."""
    check(inputs((7,), 4, 5, torch.float32), names)
    check(inputs((7,), 3, 5, torch.bfloat16), names)


@pytest.mark.parametrize("frozen", [("streams",), ("f",), ("phi", "alpha", "bias"), ("phi",), INPUTS[1:]], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_only_some_inputs_need_a_gradient(frozen: tuple[str, ...], dtype: torch.dtype) -> None:
    check(inputs((7,), 4, 5, dtype), frozen=frozen)


def test_nothing_is_kept_without_gradients() -> None:
    args = inputs((7,), 4, 5, torch.float32)
    outputs = site(*args)
    assert not any(output.requires_grad for output in outputs.values())
    only_f = site(*args[:4], args[4].requires_grad_())
    assert [name for name in OUTPUTS if only_f[name].requires_grad] == ["merged"]


def with_taps(of: Site) -> Site:
    """A site whose streams have other readers, before and behind it."""

    def function(streams: Tensor, *args: Tensor) -> dict[str, Tensor]:
        streams = 2 * streams
        outputs = of(streams, *args)
        u, merged = outputs["u"] + streams.mean(-2), outputs["merged"]
        return {**outputs, "u": u, "merged": merged * (1 + streams) + merged.mean(-2, True)}

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_streams_have_other_readers(dtype: torch.dtype) -> None:
    check(inputs((7,), 4, 5, dtype), function=with_taps(site), expected=with_taps(oracle))


def two_merges(of: str) -> Site:
    """One read, and two merges of the same streams with its post and res."""

    def function(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor) -> dict[str, Tensor]:
        if of == "site":
            u, pre, post, res, carrier = site_ops.read(streams, phi, alpha, bias, EPS, ITERATIONS)
            merged = [site_ops.merge_carried(streams, g, carrier, post, res) for g in (f, u)]
        else:
            outputs = oracle(streams, phi, alpha, bias, f)
            u, pre, post, res, first = (outputs[name] for name in OUTPUTS)
            merged = [first, reference.merge(streams, u, post, res)]
        return {"u": u, "pre": pre, "post": post, "res": res, "merged": merged[0] + merged[1].square()}

    return function


def test_one_carrier_serves_two_merges() -> None:
    check(inputs((7,), 4, 5, torch.float64), function=two_merges("site"), expected=two_merges("oracle"))


def chain(of: str) -> Site:
    """Three sites with the same parameters, whose branches do compute f from u."""

    def function(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        for _ in range(3):
            if of == "site":
                u, pre, post, res, carrier = site_ops.read(streams, phi, alpha, bias, EPS, ITERATIONS)
                streams = site_ops.merge_carried(streams, torch.tanh(u) * f, carrier, post, res)
            else:
                u, pre, post, res, _ = oracle(streams, phi, alpha, bias, f).values()
                streams = reference.merge(streams, torch.tanh(u) * f, post, res)
            outputs = {"u": u, "pre": pre, "post": post, "res": res, "merged": streams}
        return outputs

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_of_sites(dtype: torch.dtype) -> None:
    check(inputs((2, 9), 4, 17, dtype), function=chain("site"), expected=chain("oracle"))


def test_f_may_be_narrower_than_the_streams() -> None:
    *args, f = inputs((7,), 4, 9, torch.float32)
    check([*args, f.bfloat16()])


def test_more_than_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiles(tokens: int, x: Tensor, iterated: bool = False) -> Any:
        return (slice(s, min(s + 16, tokens)) for s in range(0, tokens, 16))

    monkeypatch.setattr(plain, "_tiles", tiles)
    for dtype in (torch.bfloat16, torch.float64):
        check(inputs((50,), 4, 6, dtype))


def scattered(tensor: Tensor) -> Tensor:
    """The same values in a layout that is neither contiguous nor dense."""
    wide = tensor.new_zeros((*tensor.shape, 2))
    wide[..., 0] = tensor
    return wide[..., 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_layout_does_not_matter(dtype: torch.dtype) -> None:
    args = inputs((3, 7), 4, 6, dtype)
    check(args, function=lambda *leaves: site(*map(scattered, leaves)))
    turned = [args[0].transpose(0, 1), *args[1:4], args[4].transpose(0, 1)]  # a channels-first trunk, as a view
    check(turned)


def test_gradients_may_come_in_any_layout() -> None:
    args = inputs((3, 7), 4, 6, torch.float64)
    leaves = [a.requires_grad_() for a in args]
    outputs = list(site(*leaves).values())
    expected = torch.autograd.grad([o.sum() + o.square().sum() for o in outputs], leaves, retain_graph=True)
    grads = [scattered(1 + 2 * o.detach()) for o in outputs]
    for a, b in zip(torch.autograd.grad(outputs, leaves, grads), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_expanded_gradient() -> None:
    args = [a.requires_grad_() for a in inputs((7,), 4, 6, torch.float64)]
    site(*args)["merged"].sum().backward()  # autograd sends a gradient of stride 0
    expected = [a.detach().clone().requires_grad_() for a in args]
    oracle(*expected)["merged"].sum().backward()
    for name, a, b in zip(INPUTS, args, expected, strict=True):
        assert_close(name, a.grad, b.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_stays_alone(bad: float) -> None:
    args = inputs((9,), 4, 6, torch.float32)
    grads = random_grads(args)
    clean = run(site, args, grads)
    args[0][4, 2, 1] = bad
    dirty = run(site, args, grads)
    others = [i for i in range(9) if i != 4]
    for a, b in zip((*clean[0].values(), clean[1]["streams"]), (*dirty[0].values(), dirty[1]["streams"]), strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_stay_fp32(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(inputs((129,), 4, 65, torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)


def test_gradients_do_not_change_from_run_to_run() -> None:
    args = inputs((500,), 4, 16, torch.bfloat16)
    grads = random_grads(args)
    first = run(site, args, grads)[1]
    for _ in range(3):
        for name, again in run(site, args, grads)[1].items():
            assert torch.equal(first[name], again), name


def test_autocast_changes_nothing() -> None:
    args = inputs((7,), 4, 6, torch.float32)
    grads = random_grads(args)
    expected, wanted = run(site, args, grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, found = run(site, args, grads)
    for a, b in zip((*actual.values(), *found.values()), (*expected.values(), *wanted.values()), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# --- as torch ops -----------------------------------------------------------------------------------------


def op_inputs(name: str, lead: tuple[int, ...] = (4,), n: int = 3, c: int = 5) -> tuple[Any, ...]:
    *read, f = inputs(lead, n, c, torch.float32)
    u, pre, post, res, carrier, _, z, r = mhc.read(*read, EPS, ITERATIONS)
    merged, grads = torch.randn_like(read[0]), [torch.randn_like(one) for one in (u, pre, post, res)]
    return {
        "read": (*read, EPS, ITERATIONS),
        "read_backward": (*grads, merged, f, *read, pre, post, res, z, r, True, EPS, ITERATIONS),
        "merge_carried": (read[0], f, carrier, post, res),
        "merge_carried_backward": (merged, read[0], f, post, "given", False),
    }[name]


def leaves_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    args = op_inputs(name)
    opcheck(getattr(mhc, name).default, args if "backward" in name else leaves_of(args))


@pytest.mark.parametrize("missing", [(0,), (1, 2, 3), (4,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("wants_streams", [True, False])
def test_opcheck_without_some_gradients(missing: tuple[int, ...], wants_streams: bool) -> None:
    args = op_inputs("read_backward")
    sparse = tuple(None if place in missing else value for place, value in enumerate(args))
    opcheck(mhc.read_backward.default, (*sparse[:-3], wants_streams, *sparse[-2:]))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("lead", [(), (1,), (3, 2), (0,)])
@pytest.mark.parametrize("name", NAMES)
def test_fake_has_the_real_strides(name: str, lead: tuple[int, ...], n: int) -> None:
    args = op_inputs(name, lead, n, 1)
    op = getattr(mhc, name)
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
    for r, f in zip(_as_tuple(real), _as_tuple(fake), strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
        assert r.untyped_storage()._cdata not in given


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def model(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    streams = ops.expand(x, 4)
    for _ in range(2):
        u, _, post, res, carrier = site_ops.read(streams, phi, alpha, bias, EPS, ITERATIONS)
        streams = site_ops.merge_carried(streams, torch.tanh(u @ weight), carrier, post, res)
    return ops.readout(streams) + streams[..., 1, :]


def model_inputs(t: int) -> list[Tensor]:
    _, phi, alpha, bias, _ = inputs((t,), 4, 8, torch.float32)
    return [torch.randn(t, 8), phi, alpha, bias, torch.randn(8, 8)]


def trained(function: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
    leaves = [a.clone().requires_grad_() for a in args]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for t in (5, 12) if dynamic else (12,):
        args = model_inputs(t)
        for a, b in zip(trained(compiled, args), trained(model, args), strict=True):
            assert_close("compiled", a, b.double())


@pytest.mark.slow
def test_inductor_never_makes_the_carrier_a_tensor_of_its_size() -> None:
    from torch._inductor.utils import run_and_get_code

    args = model_inputs(12)
    _, (forward, backward) = run_and_get_code(lambda: trained(torch.compile(model, fullgraph=True), args))
    calls = [line for line in forward.splitlines() if "mhc.merge_carried.default(" in line]
    carriers = [line.split("(")[1].split(",")[2].strip() for line in calls]
    assert len(carriers) == 2
    for name in carriers:  # handed on as `read` gave it
        assert re.search(rf"assert_\w+\({name}, \(12, 4, 8\), \(0, 0, 0\), .*'torch.ops.mhc.read.default'\)", forward)
    assert "mhc.merge_carried_backward.default(" in backward


# --- what is kept and allocated ---------------------------------------------------------------------------


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """The tensors that are kept for the backward, each storage once."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if all(tensor.untyped_storage()._cdata != other.untyped_storage()._cdata for other in found):
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


class Allocations(TorchDispatchMode):
    """Names the ops that give a new tensor that is ``counted``."""

    def __init__(self, counted: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.counted, self.ops = counted, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = pytree.tree_leaves((args, kwargs))
        known = {a.untyped_storage()._cdata for a in given if isinstance(a, Tensor)}
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known and self.counted(tensor):
                self.ops.append(func._schema.name.removeprefix("mhc::"))
        return result


def at_least(size: int) -> Callable[[Tensor], bool]:
    """Tensors of so many bytes, or of more."""
    return lambda tensor: tensor.untyped_storage().nbytes() >= size


SITES, TOKENS, N, C = 3, 64, 4, 32


def sites(of: Site, args: list[Tensor]) -> Tensor:
    """A chain of sites whose branches keep nothing themselves."""
    streams, *rest, f = args
    for _ in range(SITES):
        outputs = of(streams, *rest, f)
        streams = outputs["merged"] + 0 * outputs["u"].unsqueeze(-2)
    return streams


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kept_for_the_backward(dtype: torch.dtype) -> None:
    """Once per site its streams, and per token z, r and the coefficients; f and the parameters belong to others."""
    args = [a.requires_grad_() for a in inputs((TOKENS,), N, C, dtype)]
    with kept() as found:
        sites(site, args)
    shared = {a.untyped_storage()._cdata for a in args[1:]}
    own = [tensor for tensor in found if tensor.untyped_storage()._cdata not in shared]
    assert [tensor.shape for tensor in own if tensor.shape == args[0].shape] == SITES * [args[0].shape]
    per_site = sum(tensor.untyped_storage().nbytes() for tensor in own) / SITES
    per_token = 2 * (N * N + 2 * N) + 1  # z; pre, post, res; r
    assert per_site == TOKENS * (N * C * dtype.itemsize + per_token * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_backward_allocates_the_gradient_of_the_streams_once(dtype: torch.dtype) -> None:
    """dX, whole, is the only tensor of the streams' size: not ``res^T G``, not a part to be added to another."""
    args = [a.requires_grad_() for a in inputs((TOKENS,), N, C, dtype)]
    size = TOKENS * N * C * dtype.itemsize

    def backward(of: Site) -> list[str]:
        merged = of(*args)
        with Allocations(at_least(size)) as seen:
            torch.autograd.backward(
                [merged["u"], merged["merged"]], [torch.ones_like(merged["u"]), torch.ones_like(args[0])]
            )
        return [op for op in seen.ops if op not in ("aten::ones_like", "aten::detach", "aten::clone")]

    assert backward(site) == ["read_backward"]
    first = backward(level_1)  # the same count, where it is known to be more
    assert {"merge_backward", "aggregate_backward", "coefficients_backward"} <= set(first)


@pytest.mark.parametrize("name", ["u", "pre", "post", "res"])
def test_no_zeros_stand_in_for_a_gradient_that_nobody_sends(name: str) -> None:
    args = [a.requires_grad_() for a in inputs((TOKENS,), N, C, torch.float32)]
    output = site(*args)[name]
    with Allocations(at_least(TOKENS * N * C * 4)) as seen:
        output.backward(torch.ones_like(output))
    assert seen.ops == ["read_backward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_carrier_takes_no_memory(dtype: torch.dtype) -> None:
    *args, _ = inputs((2, TOKENS), N, C, dtype)
    carrier = site_ops.read(*args, EPS, ITERATIONS)[4]
    assert carrier.shape == args[0].shape and carrier.untyped_storage().nbytes() == dtype.itemsize


def test_what_is_kept_for_the_backward_cannot_be_differentiated() -> None:
    """A gradient sent to z or r would be lost."""
    *args, _ = inputs((2,), N, C, torch.float32)
    outputs = mhc.read(*(a.requires_grad_() for a in args), EPS, ITERATIONS)
    assert [output.requires_grad for output in outputs] == 6 * [True] + 2 * [False]


def test_inside_the_backward_nothing_else_of_that_size_is_allocated() -> None:
    """float32 on a CPU: not even a temporary."""
    args = op_inputs("read_backward", (TOKENS,), N, 10 * C)
    with Allocations(at_least(TOKENS * N * 10 * C * 4)) as seen:
        site_plain.read_backward(*args[:5], *args[6:-3], PAPER, True)  # without f, which the op has seen to
    assert len(seen.ops) == 1


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTPUTS)
def test_double_backward_is_refused(name: str) -> None:
    leaves = [a.requires_grad_() for a in inputs((3,), 2, 4, torch.float32)]
    total = site(*leaves)[name].square().sum()
    grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RewriteError, match="double backward through mHC sites is not supported"):
        torch.stack([g.square().sum() for g in grads if g is not None]).sum().backward()


def wrong_calls() -> dict[str, tuple[Callable[[], Any], str]]:
    streams, phi, alpha, bias, f = inputs((5,), 4, 6, torch.float32)
    _, _, post, res, carrier = site_ops.read(streams, phi, alpha, bias, EPS, ITERATIONS)
    read, merge = site_ops.read, site_ops.merge_carried
    return {
        "phi": (
            lambda: read(streams[:, :3], phi, alpha, bias, EPS, 20),
            r"phi is \[24, 24\]; legal: \[n C, n n \+ 2 n\] = \[18, 15\]",
        ),
        "phi dtype": (lambda: read(streams, phi.bfloat16(), alpha, bias, EPS, 20), "dtype of phi is torch.bfloat16"),
        "alpha": (lambda: read(streams, phi, alpha[:2], bias, EPS, 20), r"alpha is \[2\]; legal: \[3\]"),
        "bias": (lambda: read(streams, phi, alpha, bias[1:], EPS, 20), r"bias is \[23\]; legal: .* = \[24\]"),
        "carrier": (
            lambda: merge(streams, f, carrier[1:], post, res),
            r"carrier is \[4, 4, 6\]; legal: \[..., n, C\] = \[5, 4, 6\]",
        ),
        "carrier dtype": (lambda: merge(streams, f, carrier.half(), post, res), "dtype of carrier is torch.float16"),
        "f": (lambda: merge(streams, f[:, 1:], carrier, post, res), r"f is \[5, 5\]; legal: \[..., C\] = \[5, 6\]"),
        "post": (lambda: merge(streams, f, carrier, post[1:], res), r"post is \[4, 4\]; legal: \[..., n\] = \[5, 4\]"),
        "res": (lambda: merge(streams, f, carrier, post, res[0]), r"res is \[4, 4\]; legal: .* = \[5, 4, 4\]"),
    }


@pytest.mark.parametrize("case", wrong_calls())
def test_wrong_arguments(case: str) -> None:
    call, message = wrong_calls()[case]
    with pytest.raises(ShapeError, match=message):
        call()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ShapeError, match=message):
        wrong_calls()[case][0]()


def test_no_iterations() -> None:
    *args, _ = inputs((2,), 2, 3, torch.float32)
    with pytest.raises(ConfigError, match="iterations is 0; legal: an integer >= 1"):
        site_ops.read(*args, EPS, 0)


# --- flops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(), ("streams",)])
def test_flops(frozen: tuple[str, ...]) -> None:
    t, n, c = 6, 4, 5
    project, one = 2 * t * n * c * (n * n + 2 * n), 2 * t * n * c
    args = inputs((2, 3), n, c, torch.float32)
    leaves = [a.requires_grad_(name not in frozen) for name, a in zip(INPUTS, args, strict=True)]
    with FlopCounterMode(display=False) as counter:
        outputs = site(*leaves)
    assert counter.get_total_flops() == project + one + one * (n + 1)  # z; u; the merge
    used = [outputs["u"], outputs["merged"]]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(used, [torch.ones_like(one) for one in used])
    merge = one * (2 + n)  # df, dpost, dres
    to_streams = 0 if frozen else project + one + one * n
    assert counter.get_total_flops() == merge + project + one + to_streams  # dphi and dpre, and dX
