"""Other constraints than Sinkhorn's, fixed and static coefficients, single-pass reads: the table and what it drives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphs import (
    as_double,
    assert_same,
    capture,
    divergence,
    fresh,
    own_parameters,
    randomize,
    result_of,
)
from mhc_compile import (
    Backend,
    ConfigError,
    HyperConnection,
    MHCConfig,
    RewriteError,
    composite_gains,
    explain,
    history,
    load,
    mhc_compile,
    observe,
    partition,
    set_iterations,
    stage_modules,
    trace,
    verify,
)
from mhc_compile.config import PARTS
from mhc_compile.constraints import CONSTRAINTS, PROMISES, markdown_table
from mhc_compile.conversion import connection
from mhc_compile.kernels import manifold_ops, reference
from mhc_compile.passes.bind import bind_parameters
from mhc_compile.passes.capture import Captured
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.rewrite import analyze, rewrite
from mhc_compile.record import Record, SiteRecord
from mhc_compile.site_form import SiteForm
from opcheck import opcheck

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

NAMES = list(CONSTRAINTS)
# Every constraint, every coefficient that may be fixed, and their combinations that need another way through the code.
FORMS: dict[str, dict[str, Any]] = {
    **{name: {"constraint": name} for name in CONSTRAINTS},
    "pre fixed": {"fixed": ("pre",)},
    "res fixed": {"fixed": ("res",)},
    "post fixed": {"fixed": ("post",), "constraint": "orthogonal"},
    "pre and res fixed": {"fixed": ("pre", "res")},
    "static": {"dynamic": False},
    "static lite": {"dynamic": False, "constraint": "lite"},
    "static unconstrained": {"dynamic": False, "constraint": "unconstrained"},
    "unconstrained, pre fixed": {"fixed": ("pre",), "constraint": "unconstrained"},
    "single pass": {"single_pass": True},
    "single pass, unconstrained": {"single_pass": True, "constraint": "unconstrained"},
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    """Compiled frames of one test must not steer another."""
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- the table


def logits_of(name: str, n: int, tokens: tuple[int, ...], dtype: torch.dtype, std: float = 1.0) -> Tensor:
    count = CONSTRAINTS[name].count(n)
    torch.manual_seed(0)
    return torch.randn(*tokens, *((n, n) if count == n * n else (count,)), dtype=dtype) * std


@pytest.mark.parametrize("std", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("n", [1, 2, 4, 5])
@pytest.mark.parametrize("name", NAMES)
def test_promises_hold_for_any_logits(name: str, n: int, std: float) -> None:
    entry = CONSTRAINTS[name]
    res = entry.res(logits_of(name, n, (200,), torch.float32, std), n)
    assert res.shape == (200, n, n) and res.isfinite().all()
    sizes = torch.linalg.svdvals(res.double())
    errors = {
        "positive": (-res).clamp_min(0).max(),
        "rows": (res.sum(-1) - 1).abs().max(),
        "columns": (res.sum(-2) - 1).abs().max(),
        "norm": (sizes - 1).clamp_min(0).max(),
        "orthogonal": (sizes - 1).abs().max(),
    }
    assert errors.keys() == PROMISES.keys()
    for promise in entry.promises:
        assert errors[promise] <= 1e-6, promise
    if name == "spectral":
        assert (sizes[:, 0] - 1).abs().max() <= 1e-6  # divided by no more than its largest singular value
    if name == "unconstrained" and std > 1 < n:
        assert all(error > 1 for promise, error in errors.items())  # the checks could have failed


def test_lite_mixes_every_permutation() -> None:
    """One hot logit gives one permutation matrix; n! different ones."""
    found = CONSTRAINTS["lite"].res(torch.eye(24) * 200, 4)
    assert len({tuple(one.flatten().round().int().tolist()) for one in found}) == 24
    assert all((one.sort().values == torch.tensor([0.0, 0, 0, 1])).all() for one in chain(found, found.mT))


def test_spectral_is_smooth_where_singular_values_meet() -> None:
    """At I every direction has the largest singular value; its gradient is shared, and nothing is nan."""
    logits = torch.eye(4, dtype=torch.float64).requires_grad_()
    CONSTRAINTS["spectral"].res(logits, 4)[0, 0].backward()
    expected = -torch.eye(4, dtype=torch.float64) / 4
    expected[0, 0] += 1
    assert logits.grad is not None and (logits.grad - expected).abs().max() < 1e-6
    zero = torch.zeros(2, 4, 4, requires_grad=True)
    CONSTRAINTS["spectral"].res(zero, 4).sum().backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_starts_near_the_identity(name: str, n: int) -> None:
    entry = CONSTRAINTS[name]
    start = entry.start(n)
    assert start.shape == (entry.count(n),) and start.dtype == torch.float64
    res = entry.res(start.view(n, n) if len(start) == n * n else start, n)
    assert (res.sum(-1) - 1).abs().max() < 1e-6
    assert res.diagonal().min() >= 0.9 - 1e-6


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[1] / "docs" / "manifolds.md").read_text()
    _, table, _ = page.replace("<!-- end of table -->", "<!-- table -->").split("<!-- table -->")
    assert table.strip() == markdown_table()
    assert all(f"- *{name}*: {words}.\n" in page for name, words in PROMISES.items())


# ---------------------------------------------------------------------------------------------- the ops


@pytest.mark.parametrize("name", [name for name in NAMES if name != "identity"])
def test_constrain_as_an_op(name: str) -> None:
    leaf = logits_of(name, 3, (2,), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: manifold_ops.constrain(one, name, 3), (leaf,))
    opcheck(torch.ops.mhc.constrain.default, (leaf, name, 3))
    grad = torch.randn(2, 3, 3, dtype=torch.float64)
    opcheck(torch.ops.mhc.constrain_backward.default, (grad, leaf.detach(), name, 3))
    for lead in ((), (0,), (2, 1, 3)):
        logits = logits_of(name, 3, lead, torch.float32).requires_grad_()
        res = manifold_ops.constrain(logits, name, 3)
        assert res.shape == (*lead, 3, 3) and res.is_contiguous()
        assert torch.equal(res, CONSTRAINTS[name].res(logits, 3))
        res.sum().backward()


def gates_case(options: dict[str, Any], n: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Tensors and other arguments of the op, and the streams' lead is (2, 3)."""
    torch.manual_seed(0)
    form = SiteForm(n, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = form.shapes(5)
    weights = [torch.randn(shapes[name], dtype=wide) if name in shapes else None for name in ("phi", "alpha", "bias")]
    learned = ("pre" not in form.fixed, "post" not in form.fixed)
    return (torch.randn(2, 3, n, 5, dtype=dtype), *weights), (0.1, form.logits, *learned, form.gating.bounded)


GATED = [name for name, options in FORMS.items() if "pass" not in name and not SiteForm(4, **options).has_kernel]


@pytest.mark.parametrize("name", GATED)
def test_gates_as_an_op(name: str) -> None:
    tensors, form = gates_case(FORMS[name], 3, torch.float64)
    leaves = tuple(one if one is None else one.requires_grad_() for one in tensors)
    assert torch.autograd.gradcheck(lambda *given: manifold_ops.gates(*given, *form), leaves)
    opcheck(torch.ops.mhc.gates.default, (*leaves, *form))
    grads = [torch.randn_like(one) for one in manifold_ops.gates(*leaves, *form)]
    detached = [one if one is None else one.detach() for one in tensors]
    opcheck(torch.ops.mhc.gates_backward.default, (*grads, *detached, *form))
    for dtype in (torch.float32, torch.bfloat16):
        tensors, form = gates_case(FORMS[name], 3, dtype)
        exact = reference.gates(*(one if one is None else one.double() for one in tensors), *form)
        for a, b in zip(manifold_ops.gates(*tensors, *form), exact, strict=True):
            assert a.dtype == torch.float32 and torch.allclose(a.double(), b, atol=1e-5)
        assert all(one.numel() == 0 for one in manifold_ops.gates(tensors[0][:0], *tensors[1:], *form))


def test_gates_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are taken a slice at a time; gradients of the parameters are sums over all of them."""

    def run() -> list[Tensor]:
        tensors, form = gates_case(FORMS["lite"], 3, torch.float64)
        leaves = [one.requires_grad_() for one in tensors]
        outputs = manifold_ops.gates(*leaves, *form)
        sum((one * one).sum() for one in outputs).backward()  # type: ignore[union-attr]
        return [*outputs, *(one.grad for one in leaves)]

    whole = run()
    monkeypatch.setattr(manifold_ops.plain, "_tiles", lambda tokens, x: [slice(s, s + 4) for s in range(0, tokens, 4)])
    for a, b in zip(whole, run(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_hyper_connections_formula() -> None:
    """The unconstrained form against 2409.19606 written out: each stream over its own root mean square."""
    site = HyperConnection(3, 4, constraint="unconstrained").double()
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    assert site.phi.shape == (4, 1 + 1 + 3) and site.bias.shape == (3 + 3 + 9,) and site.alpha.shape == (3,)
    x = torch.randn(3, 4, dtype=torch.float64)
    pre, post, res = site(x)
    for j in range(3):
        normed = x[j] / (x[j].square().mean() + 1e-6).sqrt()
        assert pre[j].item() == pytest.approx((site.alpha[0] * (normed @ site.phi[:, 0]).tanh() + site.bias[j]).item())
        dynamic = (normed @ site.phi[:, 1]).tanh()
        assert post[j].item() == pytest.approx((site.alpha[1] * dynamic + site.bias[3 + j]).item())
        for i in range(3):
            dynamic = (normed @ site.phi[:, 2 + i]).tanh()
            expected = site.alpha[2] * dynamic + site.bias[6 + 3 * i + j]
            assert res[i, j].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("name", [name for name in FORMS if "pass" not in name])
def test_parameters_are_those_that_are_learned(name: str) -> None:
    """No column for what is fixed, no phi and alpha for what is static; fixed values are what they are fixed at."""
    options = FORMS[name]
    site = HyperConnection(4, 6, stream=1, **options)
    fixed = options.get("fixed", ())
    sizes = dict(zip(PARTS, (4, 4, 0 if "res" in fixed else CONSTRAINTS[site.constraint].count(4)), strict=True))
    assert site.bias.numel() == sum(size for part, size in sizes.items() if part not in fixed)
    assert (site.phi is None) == (site.alpha is None) == (not options.get("dynamic", True))
    streams = torch.randn(2, 4, 6)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    pre, post, res = site(streams)
    static = not options.get("dynamic", True)
    for part, value, constant in (("pre", pre, 0.25), ("post", post, 1.0), ("res", res, torch.eye(4))):
        if part in fixed or (part == "res" and site.constraint == "identity"):
            assert ((value - constant).abs() < 1e-7).all()
        else:
            assert not ((value - constant).abs() < 1e-3).all()
            assert torch.equal(value[0], value[1]) == static


# ---------------------------------------------------------------------------------------------- conversion


@cache
def captured(name: str) -> tuple[nn.Module, Captured]:
    """A model in float64, captured once."""
    model, inputs = fresh(name)
    model = model.double()
    return model, capture(model, (), as_double(inputs))


def widened(name: str, options: dict[str, Any], change: Callable[[nn.Module], None] | None = None) -> tuple[Any, ...]:
    """The plain graph, the rewritten one, the arguments of the first, and what the second takes besides."""
    _, call = captured(name)
    plain, graph = copy_graph(call.graph), copy_graph(call.graph)
    config, analysis = MHCConfig(**options), analyze(graph)
    look_up, names = bind_parameters(graph, analysis.sites, config)
    torch.manual_seed(0)
    sites: dict[str, nn.Module] = {}
    for site in analysis.sites:
        record = SiteRecord(site.name, site.features, site.index, site.trunk, site.line)
        sites[site.name] = connection(record, config, torch.device("cpu")).double()
        sites[site.name].reset_parameters()  # in float64 now: rounded logits cost 1e-8
        if change is not None:
            change(sites[site.name])
    rewrite(analysis, config, look_up)
    graph.graph.lint()
    added = [sites[one.rpartition(".")[0]].get_parameter(one.rpartition(".")[2]) for one in names]
    return plain, graph, call.arguments, added


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("model", ["llama", "gpt2", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.cases(12)
def test_keeps_the_function(model: str, name: str) -> None:
    """At step 0, outputs and the gradient of every original parameter; with other weights it is another function."""
    plain, graph, arguments, added = widened(model, FORMS[name])
    parameters = own_parameters(captured(model)[0])
    expected = result_of(lambda: plain(*arguments), parameters)
    assert_same(expected, result_of(lambda: graph(*arguments, *added), parameters), outputs=1e-6, gradients=1e-6)
    with torch.no_grad():
        for parameter in added:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    other = result_of(lambda: graph(*arguments, *added), parameters)
    assert max((a - b).abs().max() for a, b in zip(expected.outputs, other.outputs, strict=True)) > 1e-3


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Tower(nn.Module):
    """Blocks on one trunk, read by a head."""

    def __init__(self, features: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(features) for _ in range(blocks)), nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tower(**options: Any) -> tuple[nn.Module, Tensor]:
    """A converted tower, and its input."""
    torch.manual_seed(0)
    model, x = Tower(), torch.randn(5, 8)
    return mhc_compile(model, **{"n": 4, "example_inputs": x, "backend": "eager", **options}), x


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.cases(2)
def test_streams_diverge(name: str) -> None:
    """Streams are equal at step 0 and must not stay so."""
    model, x = tower(**FORMS[name])
    assert divergence(model, {"x": x}) < 1e-6
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert divergence(model, {"x": x}) > 1e-4
    assert all(not torch.equal(one, before[name]) for name, one in model.named_parameters()), "one is not trained"


# ---------------------------------------------------------------------------------------------- single-pass reads


class Tapped(Tower):
    """A tower that shows what it has behind each block, too."""

    def forward(self, x: Tensor) -> Any:
        taps = [x := block(x) for block in self.blocks]
        return self.head(x), taps


def test_single_pass_equations() -> None:
    """u_0 = x, u_l+1 = sum_i pre_l,i X_l+1,i and y = sum_i pre_L-1,i X_L,i, as a loop over modules; a tap reads u."""
    torch.manual_seed(0)
    model, x = Tapped(), torch.randn(5, 8)
    mhc_compile(model, n=4, example_inputs=x, backend="eager", single_pass=True)
    randomize(model)
    output, taps = model(x)
    streams, u = x.unsqueeze(-2).expand(5, 4, 8), x
    for number, block in enumerate(model.blocks):
        pre, post, res = model.mhc.get_submodule(f"blocks.{number}.linear")(streams)
        f = torch.tanh(block.linear(block.norm(u)))
        streams = res @ streams + post.unsqueeze(-1) * f.unsqueeze(-2)
        u = (pre.unsqueeze(-1) * streams).sum(-2)
        assert torch.allclose(taps[number], u, atol=1e-5)
    assert torch.allclose(output, model.head(u), atol=1e-5)


# ---------------------------------------------------------------------------------------------- doors

# Forms that go another way through the code than Sinkhorn's, for tests that are too long for all.
FEW = ["lite", "spectral", "static", "unconstrained", "single pass"]


@pytest.mark.parametrize("name", [*FEW, "identity", "orthogonal", "pre fixed"])
@pytest.mark.cases(2)
def test_level_2_and_replay_compute_the_same(name: str) -> None:
    """Level-1 ops, what `lower` and `fuse` make of them, and recomputation, gradients of all parameters included."""
    model, x = tower(**FORMS[name])
    randomize(model)
    expected = result_of(lambda: model(x), dict(model.named_parameters()))
    torch.manual_seed(0)
    assert (expected.outputs[0] - Tower()(x)).abs().max() > 1e-3, "the test could not tell mHC from plain"
    for backend, options in (("eager", {"recompute": 2}), ("aot_eager", {}), ("aot_eager", {"recompute": 2})):
        other, _ = tower(**{**FORMS[name], "backend": backend, **options})
        other.load_state_dict(model.state_dict())
        actual = result_of(lambda: other(x), dict(other.named_parameters()))  # noqa: B023
        assert_same(expected, actual, outputs=1e-5, gradients=1e-4)


@pytest.mark.slow
def test_inductor() -> None:
    """Two sites of different forms under inductor."""
    model, x = tower(constraint="lite", single_pass=True, site_constraints={"blocks.1*": "unconstrained"})
    randomize(model)
    expected = result_of(lambda: model(x), dict(model.named_parameters()))
    same, _ = tower(
        constraint="lite", single_pass=True, site_constraints={"blocks.1*": "unconstrained"}, backend="inductor"
    )
    same.load_state_dict(model.state_dict())
    assert_same(expected, result_of(lambda: same(x), dict(same.named_parameters())), outputs=1e-5, gradients=1e-4)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.cases(1)
def test_export_and_verify(name: str) -> None:
    model, x = tower(**FORMS[name])
    randomize(model)
    report = verify(model, x)
    assert report.passed, str(report)
    assert torch.allclose(trace(model, x)(x), model(x), atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.cases(4)
def test_record_keeps_the_form(name: str) -> None:
    """A state_dict loads into a plain model as its record says, and not into another conversion."""
    model, x = tower(**FORMS[name])
    randomize(model)
    torch.manual_seed(0)
    loaded = load(model.state_dict(), Tower())
    assert loaded.mhc.record == model.mhc.record
    assert torch.equal(loaded(x), model(x))
    if name != "sinkhorn":
        with pytest.raises(ConfigError, match="of another conversion"):
            tower()[0].load_state_dict(model.state_dict())


def test_records_of_earlier_releases_are_sinkhorns() -> None:
    """A record without the new options is that of Sinkhorn; and such a conversion still writes it without them."""
    record = tower()[0].mhc.record
    written = record.as_dict()
    assert not {"constraint", "fixed", "dynamic", "single_pass"} & written["config"].keys()
    assert not any("constraint" in site for site in written["sites"])
    assert Record.from_dict(written) == record


def test_backend_owns_the_form() -> None:
    torch.manual_seed(0)
    model, x = Tower(), torch.randn(5, 8)
    expected = model(x)
    backend = Backend(n=4, constraint="orthogonal", site_constraints=lambda site: "lite" if "0" in site.name else None)
    fast = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.allclose(fast(x), expected, atol=1e-6)
    assert {tuple(one.shape) for name, one in backend.named_parameters() if "bias" in name} == {(24,), (32,)}


def test_explain_and_history_say_what_has_no_kernel() -> None:
    for name, words in (("lite", "coefficients in this form"), ("spectral", "whose res is spectral")):
        model, x = tower(**FORMS[name])
        model(x)
        notes = [note for record in history(model) for note in record.notes]
        assert any("4 sites are not fused" in note and words in note for note in notes), notes
        assert any(words in note for note in explain(model, x).notes)
    notes = explain(*tower(single_pass=True)).notes
    assert "3 sites read with the pre of the site before" in notes
    assert "3 merges are read with the pre of the site before in the same launch" in notes
    wide = explain(*tower(single_pass=True, n=5)).notes
    assert "3 reads with the pre of the site before are launches of their own: above 4 streams" in wide
    assert not any("not fused" in note for note in explain(*tower(constraint="identity")).notes)


def test_observe_gives_every_form() -> None:
    for options in FORMS.values():
        model, x = tower(**options)
        found = list(observe(model, x).values())
        assert [one.res.shape for one in found] == [(5, 4, 4)] * 4 and found[0].pre.shape == (5, 4)
        assert composite_gains([one.res for one in found])[-1].forward == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------------------------------- each site its own


def test_sites_of_one_model_differ() -> None:
    choice = {"blocks": "lite", "blocks.2*": "identity", "blocks.0.linear": "sinkhorn"}
    model, x = tower(site_constraints=choice)
    found = [site.form(model.mhc.record.config).constraint for site in model.mhc.record.sites]
    assert found == ["sinkhorn", "lite", "identity", "lite"]
    assert [model.mhc.get_submodule(f"blocks.{number}.linear").constraint for number in range(4)] == found
    assert verify(model, x)
    randomize(model)
    torch.manual_seed(0)
    assert torch.equal(load(model.state_dict(), Tower())(x), model(x))
    with pytest.raises(ConfigError, match="is 'identity', here 'lite'"):
        tower(site_constraints={"blocks": "lite", "blocks.0.linear": "sinkhorn"})[0].load_state_dict(model.state_dict())


def test_iterations_may_change_in_training() -> None:
    """Each number compiles once; the function is that of a model converted with it."""
    model, x = tower(n=3, iterations=1)
    randomize(model, scale=2.0)
    one = model(x)
    compiled = len(history(model))
    assert set_iterations(model, 7) is model
    seven = model(x)
    assert (seven - one).abs().max() > 1e-5 and model.mhc.record.config.iterations == 7
    assert len(history(model)) > compiled
    other, _ = tower(n=3, iterations=7)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), seven)
    compiled = len(history(model))
    assert torch.equal(set_iterations(model, 1)(x), one) and torch.equal(set_iterations(model, 7)(x), seven)
    assert len(history(model)) == compiled, "a number was compiled twice"
    with pytest.raises(RewriteError, match="converted with 'lite'"):
        set_iterations(tower(constraint="lite")[0], 3)


@pytest.mark.parametrize("name", ["lite", "static", "single pass"])
def test_stages_of_a_pipeline(name: str) -> None:
    """The cost model knows the ops, and the stages one after the other are the whole; a pre may cross a cut."""
    model, x = tower(**FORMS[name])
    randomize(model)
    plan = partition(model, x, stages=2, microbatches=2)
    value: Any = (x,)
    for stage in stage_modules(plan, model, x):
        value = stage(*value)
        value = value if isinstance(value, tuple) else (value,)
    assert torch.allclose(value[0], model(x), atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_logits_of_no_tokens(tokens: int) -> None:
    logits = torch.empty(tokens, 0)
    with FakeTensorMode() as mode:
        fake = manifold_ops.constrain(mode.from_tensor(logits), "identity", 3)
    assert manifold_ops.constrain(logits, "identity", 3).shape == fake.shape == (tokens, 3, 3)
