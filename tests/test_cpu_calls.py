"""The pass that calls the bodies of sites on a CPU from inductor's code, and the warning of a model without sites."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.flop_counter import FlopCounterMode

from mhc_compile import _torch, backend, mhc_compile
from mhc_compile.backend import inductor_settings
from mhc_compile.kernels import cpu, cross_site_ops, ops, site_ops
from mhc_compile.kernels.convention import DEEPSEEK_V4, HUNYUAN_V4, PAPER, Convention
from mhc_compile.passes.cpu_calls import CpuCalls
from opcheck import opcheck
from tolerances import assert_close

N, C = 4, 6


@pytest.fixture(autouse=True)
def _reset() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def variant(convention: Convention) -> dict[str, Any]:
    names = ("pre_eps", "post_scale", "post_eps", "groups", "divisor_eps", "rows_first", "transposed", "rounded")
    return {name: getattr(convention, name) for name in names}


def trunk(x: Tensor, *parameters: Tensor, convention: Convention, compiled: bool) -> tuple[Tensor, Tensor]:
    """Two sites, between the ends of a trunk: all ops that the pass knows."""
    options, manner = {**variant(convention), "compiled": compiled}, (convention.transposed, convention.rounded)
    first, second = parameters[:3], parameters[3:]
    streams = ops.expand(x, N) * (1 + torch.arange(N * C, device=x.device).view(N, C) / 10).to(x.dtype)
    u, _, post, res, carrier = site_ops.read(streams, *first, 1e-3, 3, **options)
    mixing = res if convention.res != "none" else None
    merged, u, pre, post, res, carrier = cross_site_ops.merge_read(
        streams, torch.tanh(u), carrier, post, mixing, second, 1e-3, 3,
        res_transposed=manner[0], res_rounded=manner[1], **options,
    )  # fmt: skip
    mixing = res if convention.res != "none" else None
    merged = site_ops.merge_carried(merged, torch.sin(u), carrier, post, mixing, *manner, compiled)
    return ops.readout(merged), pre


def inputs(tokens: int, convention: Convention, dtype: torch.dtype) -> list[Tensor]:
    generator, columns = torch.Generator().manual_seed(0), convention.columns(N)
    made = [torch.randn(tokens, C, generator=generator).to(dtype)]
    for _ in range(2):
        alpha = torch.tensor([0.5, 1.5, -2.0])[: convention.groups]
        made += [torch.randn(N * C, columns, generator=generator), alpha, torch.randn(columns, generator=generator)]
    return [one.requires_grad_() for one in made]


def results(function: Any, given: list[Tensor]) -> list[Tensor]:
    leaves = [one.detach().clone().requires_grad_() for one in given]
    outputs = function(*leaves)
    weights = [torch.linspace(-1, 1, one.numel()).view(one.shape).to(one.dtype) for one in outputs]
    grads = torch.autograd.grad(outputs, leaves, weights)
    return [*(one.detach() for one in outputs), *grads]


class Noted:
    """A backend that runs the graphs behind autograd as the pass has left them, and notes which ops they have."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, gm: fx.GraphModule, examples: Any) -> Any:
        return aot_autograd(fw_compiler=self.compile, bw_compiler=self.compile)(gm, examples)

    def compile(self, gm: fx.GraphModule, examples: Any) -> Any:
        CpuCalls()(gm.graph)
        gm.graph.lint()
        gm.recompile()
        own = [node.target for node in gm.graph.nodes if getattr(node.target, "namespace", "") == "mhc"]
        self.graphs.append([target._schema.name.removeprefix("mhc::") for target in own])
        return make_boxed_func(gm.forward)


CONVENTIONS = {"paper": PAPER, "deepseek": DEEPSEEK_V4, "hunyuan": HUNYUAN_V4}


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_from_fewer_and_shorter_calls(name: str, dtype: torch.dtype) -> None:
    convention, noted = CONVENTIONS[name], Noted()
    given = inputs(5, convention, dtype)

    def ours(*tensors: Tensor) -> Any:
        return trunk(*tensors, convention=convention, compiled=True)

    found = results(torch.compile(ours, backend=noted, fullgraph=True), given)
    forward, backward = noted.graphs
    assert forward == ["cpu_read", "cpu_merge_read", "cpu_merge"]
    # the readout's backward and the expansion's are torch's own
    assert backward == ["cpu_merge_backward", "cpu_read_backward", "cpu_merge_backward", "cpu_read_backward"]
    for one, expected in zip(found, results(ours, given), strict=True):
        assert_close("result", one, expected.double())


def test_sizes_stay_open() -> None:
    noted = Noted()

    def ours(*tensors: Tensor) -> Any:
        return trunk(*tensors, convention=PAPER, compiled=True)

    compiled = torch.compile(ours, backend=noted, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 70):
        given = inputs(tokens, PAPER, torch.float32)
        for one, expected in zip(results(compiled, given), results(ours, given), strict=True):
            assert_close(f"{tokens} tokens", one, expected.double())
    assert len(noted.graphs) == 2


def test_what_is_not_to_be_compiled_stays() -> None:
    noted = Noted()
    given = inputs(5, PAPER, torch.float32)

    def ours(*tensors: Tensor) -> Any:
        return trunk(*tensors, convention=PAPER, compiled=False)

    results(torch.compile(ours, backend=noted, fullgraph=True), given)
    assert noted.graphs[0] == ["read", "merge_read", "merge_carried"]


def test_one_stream_and_a_carrier_that_is_read() -> None:
    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        streams = ops.readout(ops.expand(x, 1)).unsqueeze(-2).repeat(1, N, 1)
        u, _, _, _, carrier = site_ops.read(streams, *parameters, 1e-3, 3, compiled=True)
        return u + carrier.sum(-2)

    noted = Noted()
    given = inputs(5, PAPER, torch.float32)[:4]
    with torch.no_grad():
        found = torch.compile(ours, backend=noted, fullgraph=True)(*given)
        assert_close("u", found, ours(*given).double())
    assert noted.graphs == [["readout", "read"]]


def test_the_schemas_and_fakes_of_the_ops() -> None:
    x, phi, alpha, bias, *_ = (one.detach() for one in inputs(5, PAPER, torch.float32))
    streams, f, gains = x.unsqueeze(1).repeat(1, N, 1), x.sin(), (1e-3, 3)
    u, pre, post, res, z, r = torch.ops.mhc.cpu_read(streams, phi, alpha, bias, *gains)
    kept = (streams, phi, alpha, bias, pre, post, res, z, r, True)
    calls = {
        "cpu_read": (streams, phi, alpha, bias, *gains),
        "cpu_merge": (streams, f, post, res, False, False),
        "cpu_merge_read": (streams, f, post, res, False, False, phi, alpha, bias, *gains),
        "cpu_merge_backward": (streams, streams, f, post, "given", False),
        "cpu_read_backward": (u, None, post, res, streams, *kept, *gains),
    }
    for name, args in calls.items():
        op = getattr(torch.ops.mhc, name).default
        opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        with FlopCounterMode(display=False) as counter:
            op(*args)
        assert counter.get_total_flops() > 0, name


def test_autocast_of_a_backward_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEW", 0)  # torch's products
    x, *parameters = (one.detach() for one in inputs(5, PAPER, torch.float32)[:4])
    args = (x.unsqueeze(1).repeat(1, N, 1), *parameters, 1e-3, 3)
    expected = torch.ops.mhc.cpu_read(*args)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.ops.mhc.cpu_read(*args)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inductor_calls_the_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a conversion, forward and backward, for several numbers of tokens."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.tanh(self.first(x))
            return x + torch.tanh(self.second(x))

    x = torch.randn(5, C)
    made = {name: mhc_compile(Net(), N, example_inputs=(x,), backend=name) for name in ("inductor", "eager")}
    with torch.no_grad():
        for one in made["eager"].parameters():
            one.add_(0.3 * torch.randn(one.shape))
    made["inductor"].load_state_dict(made["eager"].state_dict())
    called, bodies = list[str](), dict(vars(cpu))
    for name in ("read", "merge", "read_backward", "branch_backward"):

        def noting(*args: Any, name: str = name, bodies: Any = bodies) -> Any:
            called.append(name)
            return bodies[name](*args)

        monkeypatch.setattr(cpu, name, noting)
    for tokens in (5, 7, 9):
        x, found = torch.randn(tokens, C), {}
        for kind, model in made.items():
            model.zero_grad()
            output = model(x)
            output.square().sum().backward()
            found[kind] = [output.detach(), *(one.grad for one in model.parameters())]
        for one, expected in zip(*found.values(), strict=True):
            assert_close(f"{tokens} tokens", one, expected.double())
    assert "read_backward" in called and "read" in called


def test_a_pass_of_the_user_has_its_place() -> None:
    assert isinstance(inductor_settings()["post_grad_custom_post_pass"], CpuCalls)
    with torch._inductor.config.patch(post_grad_custom_post_pass=CpuCalls()):
        assert inductor_settings() == {}


# --- the warning of a model without sites -----------------------------------------------------------------


class Broken(nn.Module):
    """A model that Dynamo cuts into four graphs, one of them in a function that it calls; `site` has the second."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.logits = nn.Parameter(torch.randn(3, 4, 4))

    def inner(self, x: Tensor) -> Tensor:
        x = self.mixed(x, "inner")
        torch._dynamo.graph_break()
        return x.cos()

    def mixed(self, x: Tensor, place: str) -> Tensor:
        if place != self.site:
            return x
        m = self.logits.exp()
        for _ in range(5):
            m = m / m.sum(-2, keepdim=True)
            m = m / m.sum(-1, keepdim=True)
        return m @ x

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(x + 1, "first")
        torch._dynamo.graph_break()
        x = self.inner(x * 2)
        return self.mixed(x - 1, "last")


def warned(model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.compile(model, backend=backend.mhc)(torch.ones(3, 4, 5))
    assert_close("output", found.detach(), model(torch.ones(3, 4, 5)).detach().double())
    return [str(one.message) for one in caught if "mHC sites" in str(one.message)]


@pytest.mark.parametrize(("site", "count"), [("first", 0), ("inner", 0), ("last", 0), ("nowhere", 1)])
def test_a_model_in_fragments_is_warned_of_once(site: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[fx.GraphModule] = []

    def uncompiled(gm: fx.GraphModule, examples: Any, options: Any) -> Any:
        compiled.append(gm)
        return gm.forward

    monkeypatch.setattr(_torch, "inductor_compile", uncompiled)
    monkeypatch.setattr(backend, "_with_mhc", WeakSet())
    messages = warned(Broken(site))
    assert len(messages) == count and len(compiled) >= 4
    found = [node for gm in compiled for node in gm.graph.nodes if getattr(node.target, "namespace", "") == "mhc"]
    assert bool(found) == (site != "nowhere")


def test_a_fragment_that_is_compiled_again_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other fragments, with the sites, are known by then."""
    monkeypatch.setattr(_torch, "inductor_compile", lambda gm, examples, options: gm.forward)
    monkeypatch.setattr(backend, "_with_mhc", WeakSet())
    model = Broken("first")
    assert warned(model) == []
    last = torch.compile(model, backend=backend.mhc)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message='backend="mhc" found 0')
        for size in (7, 9):
            last(torch.ones(3, 4, size))


def test_what_is_remembered_is_the_model_and_not_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "inductor_compile", lambda gm, examples, options: gm.forward)
    monkeypatch.setattr(backend, "_with_mhc", WeakSet())
    assert warned(Broken("first")) == []
    torch._dynamo.reset()
    assert len(warned(Broken("nowhere"))) == 1
