"""The custom ops against the float64 oracle, and their behaviour as torch ops."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mhc_compile.errors import ConfigError, RewriteError, ShapeError
from mhc_compile.kernels import ops, plain, reference
from opcheck import opcheck
from tolerances import assert_close

EPS = 0.1  # large: at n C = 1 the gradient of the streams is proportional to it
NAMES = ["expand", "readout", "coefficients", "sinkhorn", "aggregate", "merge"]
BACKWARDS = ["coefficients_backward", "sinkhorn_backward", "aggregate_backward", "merge_backward"]


def inputs(name: str, lead: tuple[int, ...], n: int, c: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of an op: streams and f in ``dtype``, coefficients in the dtype that belongs to it."""
    torch.manual_seed(0)
    wide = plain.coefficient_dtype(dtype)
    streams, x = torch.randn(*lead, n, c).to(dtype), torch.randn(*lead, c).to(dtype)
    k = n * n + 2 * n
    if name == "expand":
        return x, n
    if name == "readout":
        return (streams,)
    if name == "coefficients":
        phi = torch.randn(n * c, k).to(wide) / (n * c) ** 0.5
        return streams, phi, torch.tensor([0.5, 1.5, -2.0], dtype=wide), torch.randn(k).to(wide), EPS
    if name == "sinkhorn":
        return torch.randn(*lead, n, n).to(wide) * 2, 20
    if name == "aggregate":
        return streams, torch.rand(*lead, n).to(wide)
    return streams, x, torch.rand(*lead, n).to(wide) * 2, torch.rand(*lead, n, n).to(wide)


def backward_inputs(name: str, n: int = 3, c: int = 5, lead: tuple[int, ...] = (4,)) -> tuple[Any, ...]:
    forward = name.removesuffix("_backward")
    args = inputs(forward, lead, n, c, torch.float32)
    outputs = as_tuple(getattr(ops, forward)(*args))
    return *(torch.randn_like(o) for o in outputs), *args


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def run(function: Callable[..., Any], args: tuple[Any, ...], grads: Any = None) -> tuple[Any, Any, Any]:
    """Outputs, the gradients that were sent in, and the gradients that came out."""
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    outputs = as_tuple(function(*leaves))
    if grads is None:
        torch.manual_seed(1)
        grads = [torch.randn(o.shape).to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, grads)
    return outputs, grads, [leaf.grad for leaf in leaves if isinstance(leaf, Tensor)]


def check(name: str, args: tuple[Any, ...]) -> None:
    outputs, grads, ours = run(getattr(ops, name), args)
    wide = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    expected, _, theirs = run(getattr(reference, name), wide, [g.double() for g in grads])
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert a.is_contiguous()
        assert_close(f"{name} output {i}", a, b)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(f"{name} gradient {i}", a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("t", "c"), [(1, 129), (7, 1), (129, 7)])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_against_the_oracle(name: str, n: int, t: int, c: int, dtype: torch.dtype) -> None:
    check(name, inputs(name, (t,), n, c, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_leading_dimensions(name: str) -> None:
    check(name, inputs(name, (2, 3, 2), 4, 5, torch.float32))
    check(name, inputs(name, (), 4, 5, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["coefficients", "sinkhorn", "aggregate", "merge"])
def test_more_than_one_tile(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs(name, (50,), 4, 6, dtype)
    whole = run(getattr(ops, name), args)

    def tiles(tokens: int, x: Tensor, iterated: bool = False) -> Any:
        return (slice(s, min(s + 16, tokens)) for s in range(0, tokens, 16))

    monkeypatch.setattr(plain, "_tiles", tiles)
    parts = run(getattr(ops, name), args, whole[1])
    for a, b in zip((*whole[0], *whole[2]), (*parts[0], *parts[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_many_tokens_cross_the_tile_limit() -> None:
    logits = torch.randn(5000, 4, 4)
    both = ops.sinkhorn(logits, 20)
    assert torch.equal(both[:3], ops.sinkhorn(logits[:3], 20)) and torch.equal(
        both[-3:], ops.sinkhorn(logits[-3:], 20)
    )
    assert len(list(plain._tiles(5000, logits.view(5000, 16), iterated=True))) == 1
    assert len(list(plain._tiles(3000, logits[:3000].view(3000, 16), iterated=True))) == 2


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, n: int) -> None:
    args = inputs(name, (2,), n, 3, torch.float64)
    leaves = tuple(a.requires_grad_() if isinstance(a, Tensor) else a for a in args)
    assert torch.autograd.gradcheck(getattr(ops, name), leaves)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    args = inputs(name, (4,), 3, 5, torch.float32)
    leaves = tuple(a.requires_grad_() if isinstance(a, Tensor) else a for a in args)
    opcheck(getattr(torch.ops.mhc, name).default, leaves)


@pytest.mark.parametrize("name", BACKWARDS)
def test_opcheck_of_backwards(name: str) -> None:
    opcheck(getattr(torch.ops.mhc, name).default, backward_inputs(name))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("lead", [(), (1,), (3, 2), (0,)])
@pytest.mark.parametrize("name", NAMES + BACKWARDS)
def test_fake_has_the_real_strides(name: str, lead: tuple[int, ...], n: int) -> None:
    args = inputs(name, lead, n, 1, torch.float32) if name in NAMES else backward_inputs(name, n=n, c=1, lead=lead)
    op = getattr(torch.ops.mhc, name)
    real = as_tuple(op(*args))
    with FakeTensorMode() as mode:
        fake = as_tuple(op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
        assert all(
            r.untyped_storage()._cdata != a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_stream_is_bitwise_the_plain_residual(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, f = torch.randn(50, 33).to(dtype), torch.randn(50, 33).to(dtype)
    x[0], f[0] = -0.0, -0.0
    ones = torch.ones(50, 1)
    logits = torch.randn(50, 1, 1) * 100

    def site(x: Tensor, f: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        streams = ops.expand(x, 1)
        merged = ops.merge(streams, f, ones, ops.sinkhorn(logits, 20))
        return ops.readout(merged), ops.aggregate(streams, ones)

    (out, u), grads, (dx, df, dlogits) = run(site, (x, f, logits))
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(out.view(bits), (x + f).view(bits))
    assert torch.equal(u.view(bits), x.view(bits))
    assert torch.equal(df.view(bits), grads[0].view(bits))
    assert torch.equal(dx, grads[0] + grads[1])
    assert not dlogits.any()


def test_f_may_be_narrower_than_the_streams() -> None:
    streams, f, post, res = inputs("merge", (7,), 1, 33, torch.float32)
    f = f.bfloat16()
    merged = ops.merge(streams, f, torch.ones_like(post), torch.ones_like(res))
    assert torch.equal(merged[:, 0], streams[:, 0] + f)
    check(
        "merge",
        (*inputs("merge", (7,), 4, 9, torch.float32)[:1], f[:, :9], *inputs("merge", (7,), 4, 9, torch.float32)[2:]),
    )


@pytest.mark.parametrize("std", [10.0, 1000.0])
def test_extreme_logits(std: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(20000, 4, 4) * std
    (res,), _, (grad,) = run(lambda a: ops.sinkhorn(a, 20), (logits,))
    assert res.isfinite().all() and grad.isfinite().all()
    assert (res.sum(-1) - 1).abs().max() < 1e-6
    assert (res.double() - reference.sinkhorn(logits.double(), 20)).abs().max() < 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_stays_alone(bad: float) -> None:
    for name in NAMES:
        args = list(inputs(name, (9,), 4, 6, torch.float32))
        clean = run(getattr(ops, name), tuple(args))
        args[0] = args[0].clone()
        args[0].view(9, -1)[4, 1] = bad
        dirty = run(getattr(ops, name), tuple(args), clean[1])
        others = [i for i in range(9) if i != 4]
        for a, b in zip((*clean[0], clean[2][0]), (*dirty[0], dirty[2][0]), strict=True):
            assert torch.equal(a[others], b[others]), name


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(name: str) -> None:
    check(name, inputs(name, (0,), 4, 6, torch.float32))
    check(name, inputs(name, (3, 0), 2, 6, torch.bfloat16))


def scattered(tensor: Tensor) -> Tensor:
    """The same values in a layout that is neither contiguous nor dense."""
    wide = tensor.new_zeros((*tensor.shape, 2))
    wide[..., 0] = tensor
    return wide[..., 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_layout_of_the_inputs_does_not_matter(name: str, dtype: torch.dtype) -> None:
    args = inputs(name, (3, 7), 4, 6, dtype)
    odd = tuple(scattered(a) if isinstance(a, Tensor) else a for a in args)
    op = getattr(ops, name)
    outputs, grads, ours = run(op, args)
    leaves = [a.requires_grad_() if isinstance(a, Tensor) else a for a in odd]
    again = as_tuple(op(*leaves))
    torch.autograd.backward(again, [scattered(g) for g in grads])
    theirs = (*again, *(a.grad for a in leaves if isinstance(a, Tensor)))
    for a, b in zip((*outputs, *ours), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    transposed = inputs("readout", (5, 3), 4, 6, dtype)[0].transpose(0, 1)
    assert ops.readout(transposed).is_contiguous() and ops.expand(transposed, 2).is_contiguous()


def test_expanded_gradient() -> None:
    streams, f, post, res = inputs("merge", (7,), 4, 6, torch.float32)
    leaf = streams.clone().requires_grad_()
    ops.merge(leaf, f, post, res).sum().backward()  # autograd sends a gradient of stride 0
    assert_close("dX", leaf.grad, res.double().sum(-2).unsqueeze(-1).expand(7, 4, 6))


def test_only_what_is_used_needs_a_gradient() -> None:
    streams, phi, alpha, bias, eps = inputs("coefficients", (7,), 3, 5, torch.float32)
    phi.requires_grad_()
    ops.coefficients(streams, phi, alpha, bias, eps)[0].sum().backward()
    expected = phi.detach().double().requires_grad_()
    reference.coefficients(streams.double(), expected, alpha.double(), bias.double(), eps)[0].sum().backward()
    assert_close("dphi", phi.grad, expected.grad)


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("name", ["coefficients", "aggregate", "merge"])
def test_products_stay_fp32(name: str, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(name, inputs(name, (129,), 4, 65, torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)


def test_gradients_do_not_change_from_run_to_run() -> None:
    args = inputs("coefficients", (500,), 4, 16, torch.bfloat16)
    _first, grads, a = run(ops.coefficients, args)
    for _ in range(3):
        for x, y in zip(a, run(ops.coefficients, args, grads)[2], strict=True):
            assert torch.equal(x, y)


# --- compile, autocast ------------------------------------------------------------------------------------


def site(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    streams = ops.expand(x, 4)
    for _ in range(2):
        pre, post, logits = ops.coefficients(streams, phi, alpha, bias, EPS)
        f = torch.tanh(ops.aggregate(streams, pre) @ weight)
        streams = ops.merge(streams, f, post, ops.sinkhorn(logits, 20))
    return ops.readout(streams)


def site_inputs(t: int) -> tuple[Tensor, ...]:
    _, phi, alpha, bias, _ = inputs("coefficients", (t,), 4, 8, torch.float32)
    return torch.randn(t, 8), phi, alpha, bias, torch.randn(8, 8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor imports deprecated parts of torch
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(site, backend=backend, fullgraph=True)
    args = site_inputs(12)
    expected = run(site, args)
    actual = run(compiled, args, expected[1])
    for a, b in zip((*actual[0], *actual[2]), (*expected[0], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(site, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for t in (5, 12, 33):
        args = site_inputs(t)
        expected = run(site, args)
        actual = run(compiled, args, expected[1])
        frames.append(counter.frame_count)
        for a, b in zip((*actual[0], *actual[2]), (*expected[0], *expected[2]), strict=True):
            torch.testing.assert_close(a, b)
    assert frames[0] == frames[-1]  # one graph for all sizes


def test_graph_has_one_node_for_each_term() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, args: Any) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    compiled = torch.compile(site, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    run(compiled, site_inputs(12))
    targets = [str(node.target) for gm in graphs for node in gm.graph.nodes]
    for name in ("coefficients", "sinkhorn", "aggregate", "merge"):
        assert targets.count(f"mhc.{name}.default") == 2
        assert targets.count(f"mhc.{name}_backward.default") == 2
    assert not any("exp.default" in t or "sigmoid" in t for t in targets)


def test_autocast_leaves_the_coefficients_alone() -> None:
    for name in NAMES:
        args = inputs(name, (7,), 4, 6, torch.float32)
        expected = run(getattr(ops, name), args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = run(getattr(ops, name), args, expected[1])
        for a, b in zip((*actual[0], *actual[2]), (*expected[0], *expected[2]), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), name


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coefficients", "sinkhorn", "aggregate", "merge"])
def test_double_backward_is_refused(name: str) -> None:
    args = inputs(name, (3,), 2, 4, torch.float32)
    leaves = [a.requires_grad_() if isinstance(a, Tensor) else a for a in args]
    total = torch.stack([o.square().sum() for o in as_tuple(getattr(ops, name)(*leaves))]).sum()
    grads = torch.autograd.grad(total, [a for a in leaves if isinstance(a, Tensor)], create_graph=True)
    with pytest.raises(RewriteError, match="double backward through mHC sites is not supported"):
        torch.stack([g.square().sum() for g in grads]).sum().backward()


def wrong_calls() -> dict[str, tuple[Callable[[], Any], str]]:
    streams, phi, alpha, bias, eps = inputs("coefficients", (5,), 4, 6, torch.float32)
    _, f, post, res = inputs("merge", (5,), 4, 6, torch.float32)
    pre = post
    return {
        "n = 0": (lambda: ops.expand(f, 0), "n is 0; legal: an integer >= 1"),
        "integers": (lambda: ops.expand(f.long(), 4), "x is .* of torch.int64; legal"),
        "one dimension": (lambda: ops.readout(f[0]), r"streams is \[6\]; legal: \[..., n, C\]"),
        "complex": (lambda: ops.readout(streams.cfloat()), "dtype of streams is torch.complex64; legal"),
        "no features": (lambda: ops.readout(streams[..., :0]), r"streams is \[5, 4, 0\]; legal"),
        "phi": (
            lambda: ops.coefficients(streams[:, :3], phi, alpha, bias, eps),
            r"phi is \[24, 24\]; legal: \[n C, n n \+ 2 n\] = \[18, 15\]",
        ),
        "phi dtype": (
            lambda: ops.coefficients(streams, phi.bfloat16(), alpha, bias, eps),
            "dtype of phi is torch.bfl",
        ),
        "fp64 streams": (
            lambda: ops.coefficients(streams.double(), phi, alpha, bias, eps),
            "legal: torch.float64",
        ),
        "alpha": (
            lambda: ops.coefficients(streams, phi, alpha[:2], bias, eps),
            r"alpha is \[2\]; legal: \[3\]",
        ),
        "bias": (
            lambda: ops.coefficients(streams, phi, alpha, bias[1:], eps),
            r"bias is \[23\]; legal: .* = \[24\]",
        ),
        "logits": (lambda: ops.sinkhorn(res[:, :3], 20), r"logits is \[5, 3, 4\]; legal: \[..., n, n\]"),
        "logits dtype": (lambda: ops.sinkhorn(res.half(), 20), "dtype of logits is torch.float16"),
        "pre": (lambda: ops.aggregate(streams, pre[:, :3]), r"pre is \[5, 3\]; legal: \[..., n\] = \[5, 4\]"),
        "pre dtype": (lambda: ops.aggregate(streams, pre.bfloat16()), "dtype of pre is torch.bfloat16"),
        "f": (
            lambda: ops.merge(streams, f[:, 1:], post, res),
            r"f is \[5, 5\]; legal: \[..., C\] = \[5, 6\]",
        ),
        "f dtype": (lambda: ops.merge(streams.half(), f, post, res), "dtype of f is torch.float32; legal"),
        "post": (
            lambda: ops.merge(streams, f, post[1:], res),
            r"post is \[4, 4\]; legal: \[..., n\] = \[5, 4\]",
        ),
        "res": (lambda: ops.merge(streams, f, post, res[0]), r"res is \[4, 4\]; legal: .* = \[5, 4, 4\]"),
    }


@pytest.mark.parametrize("case", wrong_calls())
def test_wrong_arguments(case: str) -> None:
    call, message = wrong_calls()[case]
    with pytest.raises(ShapeError, match=message):
        call()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ShapeError, match=message):
        wrong_calls()[case][0]()


def test_no_iterations() -> None:
    with pytest.raises(ConfigError, match="iterations is 0; legal: an integer >= 1"):
        ops.sinkhorn(torch.zeros(2, 2), 0)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_anchor_raises_when_run(count: int, grad: bool) -> None:
    parameters = [torch.ones(2, requires_grad=grad) for _ in range(count)]
    with pytest.raises(RewriteError, match="this graph was not rewritten"):
        ops.anchor(parameters)
    with torch.inference_mode(), pytest.raises(RewriteError, match="this graph was not rewritten"):
        ops.anchor(parameters)


def test_anchor_traces() -> None:
    with FakeTensorMode():
        for parameters in ([], [torch.ones(2, requires_grad=True)]):
            token = ops.anchor(parameters)
            assert token.shape == (0,) and token.dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_anchor_survives_a_compiler_that_ignores_it(backend: str, grad: bool) -> None:
    torch._dynamo.reset()
    weight = torch.ones(2, requires_grad=grad)
    compiled = torch.compile(lambda x: (ops.anchor([weight]), x * weight), backend=backend, fullgraph=True)
    with pytest.raises(RewriteError, match="this graph was not rewritten"):
        compiled(torch.ones(2))


def test_flops() -> None:
    t, n, c = 6, 4, 5
    k = n * n + 2 * n
    expected = {
        "coefficients": (2 * t * n * c * k, 6 * t * n * c * k),
        "aggregate": (2 * t * n * c, 4 * t * n * c),
        "merge": (2 * t * n * c * (n + 1), 4 * t * n * c * (n + 1)),
    }
    for name, (forward, backward) in expected.items():
        leaves = [
            a.requires_grad_() if isinstance(a, Tensor) else a
            for a in inputs(name, (2, 3), n, c, torch.float32)
        ]
        with FlopCounterMode(display=False) as counter:
            outputs = as_tuple(getattr(ops, name)(*leaves))
        assert counter.get_total_flops() == forward, name
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        assert counter.get_total_flops() == backward, name


def test_import_is_idempotent() -> None:
    # In a process of its own: a reload makes new ops, and whatever holds the old ones would no longer match.
    program = (
        "import importlib, torch; from mhc_compile.kernels import ops; again = importlib.reload(ops);"
        "x = torch.ones(5, 4, requires_grad=True); again.readout(again.expand(x, 2)).sum().backward();"
        "assert torch.equal(x.grad, torch.ones(5, 4))"
    )
    root = str(Path(ops.__file__).parents[2])
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=root)
