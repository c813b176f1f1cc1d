"""Monitor: right numbers from asymmetric matrices, and training that goes on bit for bit as without it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphs import float_outputs, fresh, loss_of, randomize
from mhc_compile import Monitor, RewriteError, StabilityWarning, mhc_compile, observe, param_groups, recompute, restore
from mhc_compile.gains import Gain, products_to_end, stream_similarity
from mhc_compile.health import Health
from mhc_compile.monitor_sample import Sample, sample_of
from mhc_compile.observation import SiteCoefficients

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A residual block with everything that an extra forward could disturb: dropout, running statistics, a counter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(torch.tanh(self.linear(self.norm(x))), 0.2, self.training)


class Stack(nn.Module):
    """Residual blocks between a batch norm and a head; counts its calls, and keeps its last mean."""

    def __init__(self, depth: int = 2, width: int = 8, checkpointed: bool = False) -> None:
        super().__init__()
        self.entry, self.head = nn.BatchNorm1d(width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.register_buffer("average", torch.zeros(width))
        self.checkpointed, self.calls = checkpointed, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.entry(x)
        self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def stack(backend: str = "eager", n: int = 4, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Stack(**options)
    mhc_compile(model, n, backend=backend, example_inputs=torch.randn(6, 8))
    if n > 1:
        randomize(model, scale=0.5)
    return model.train()


def batch(step: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, steps: int, call: Callable[[Tensor], Tensor] | None = None) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    for step in range(steps):
        loss_of([(call or model)(batch(step))]).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------- numbers


def site(res: Tensor, name: str = "a", trunk: int = 0, similarity: float = 0.5) -> SiteCoefficients:
    tokens, n = res.shape[:2]
    pre = torch.arange(1.0, n + 1).expand(tokens, n)
    return SiteCoefficients(name, trunk, pre, 2 * pre, res, torch.full((tokens,), similarity), 20)


def test_rows_and_columns_are_not_swapped() -> None:
    """Rows sum to 1 and 3 (one entry negative), columns to 2.5 and 1.5: by hand."""
    first = torch.tensor([[1.5, -0.5], [1.0, 2.0]])
    second = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    (one,) = sample_of(7, [site(torch.stack([first, second]))]).sites
    assert one.single.gain == Gain((3 + 1) / 2, (2.5 + 1) / 2)
    assert one.single.mean == ((1.25, -0.25), (0.5, 1.5))
    assert one.single.gain_of_mean == Gain(2.0, 1.75)  # not the mean of the gains
    assert (one.single.row_error, one.single.column_error) == (2.0, 1.5)
    assert one.single.mean_column_error == 0.75
    assert one.single.peak == ((1.5 + 2) / 2 + 1) / 2
    assert one.pre == (1.0, 2.0) and one.post == (2.0, 4.0)


def test_the_composite_runs_from_a_site_to_the_end() -> None:
    a = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    b = torch.tensor([[[2.0, 0.0], [3.0, 0.0]]])  # b @ a = [[0, 2], [0, 3]], a @ b = [[3, 0], [0, 0]]
    first, last = sample_of(0, [site(a, "a"), site(b, "b")]).sites
    assert first.composite is not None and last.composite is not None
    assert first.composite.mean == ((0.0, 2.0), (0.0, 3.0))
    assert first.composite.gain == Gain(3.0, 5.0)
    assert last.composite == last.single


def test_trunks_are_apart_and_a_trunk_of_two_lengths_has_no_composite() -> None:
    matrices = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0))
    sample = sample_of(0, [site(matrices, "a"), site(matrices[:2], "b"), site(matrices, "c", trunk=1)])
    assert [one.composite is None for one in sample.sites] == [True, True, False]
    assert sample.sites[2].composite == sample.sites[2].single
    assert "mhc/composite_forward/trunk0" not in sample.flat() and "mhc/composite_forward/trunk1" in sample.flat()


def test_similarity_is_the_mean_cosine_of_pairs() -> None:
    streams = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    right = (0 + 2 * 0.5**0.5) / 3
    assert stream_similarity(streams).item() == pytest.approx(right, abs=1e-6)
    assert stream_similarity(torch.ones(2, 4, 8)).tolist() == pytest.approx([1, 1], abs=1e-6)


def oracle_res(streams: np.ndarray[Any, Any], hyper: Any) -> tuple[Any, Any, Any]:
    """Pre, post and res of one site, from the formulas of the paper, in numpy."""
    n = streams.shape[-2]
    flat = streams.reshape(len(streams), -1)
    z = flat @ hyper.phi.detach().numpy() / np.sqrt((flat**2).mean(-1, keepdims=True) + hyper.eps)
    alpha, bias = hyper.alpha.detach().numpy(), hyper.bias.detach().numpy()
    logits = z * np.repeat(alpha, [n, n, n * n]) + bias
    sigmoid = 1 / (1 + np.exp(-logits[:, : 2 * n]))
    res = np.exp(logits[:, 2 * n :]).reshape(-1, n, n)
    for _ in range(hyper.iterations):
        res = res / res.sum(-2, keepdims=True)
        res = res / res.sum(-1, keepdims=True)
    return sigmoid[:, :n], 2 * sigmoid[:, n:], res


def test_the_composite_of_thirty_sites_is_the_oracles_product() -> None:
    torch.manual_seed(0)
    model = Stack(depth=30).double()
    x = batch(3).double()
    mhc_compile(model.eval(), 4, backend="eager", example_inputs=x)
    randomize(model, scale=0.7)
    with Monitor(model, evaluation=True) as monitor, torch.no_grad():
        output = model(x)
    state = nn.functional.batch_norm(x, torch.zeros(8).double(), torch.ones(8).double(), eps=1e-5).numpy()
    streams = np.repeat(state[:, None], 4, 1)
    matrices = []
    for number, block in enumerate(model.blocks):
        hyper = model.get_submodule(f"mhc.blocks.{number}.linear")
        pre, post, res = oracle_res(streams, hyper)
        matrices.append(res)
        u = torch.from_numpy((pre[..., None] * streams).sum(1))
        f = torch.tanh(block.linear(block.norm(u))).detach().numpy()
        streams = res @ streams + post[..., None] * f[:, None]
    right = model.head(torch.from_numpy(streams.mean(1))).detach()
    assert float((right - output).abs().max()) < 1e-6, "the oracle computes the model"
    product = np.eye(4)
    for seen, res in zip(monitor.history[0].sites[::-1], matrices[::-1], strict=True):
        product = product @ res
        assert seen.composite is not None
        gains = np.abs(product).sum(-1).max(-1).mean(), np.abs(product).sum(-2).max(-1).mean()
        assert (seen.composite.gain.forward, seen.composite.gain.backward) == pytest.approx(gains, rel=1e-6)
        assert np.allclose(seen.composite.mean, product.mean(0), rtol=1e-6)
        assert seen.single.column_error == pytest.approx(np.abs(res.sum(-2) - 1).max(), rel=1e-6)
    assert monitor.history[0].sites[0].composite.gain.backward > 1.001  # type: ignore[union-attr]


def test_products_to_end_are_in_double() -> None:
    matrices = [torch.rand(2, 3, 3) for _ in range(4)]
    products = products_to_end(matrices)
    right = matrices[3].double() @ matrices[2].double() @ matrices[1].double()
    assert torch.allclose(products[1], right, rtol=1e-12) and products[1].dtype == torch.float64


def test_a_sample_is_what_observe_gives() -> None:
    model = stack().eval()
    with Monitor(model, evaluation=True) as monitor, torch.no_grad():
        model(batch(0))
    right = sample_of(0, observe(model, batch(0)).values())
    assert monitor.history[0] == right and [one.tokens for one in right.sites] == [6, 6]


def test_each_application_of_a_tied_layer_is_a_site() -> None:
    model, inputs = fresh("albert")
    mhc_compile(model, 4, backend="eager", example_inputs=inputs, tie_shared=True)
    randomize(model)
    seen = observe(model, inputs)
    first = next(iter(seen))
    assert {first, f"{first}_call1"} <= seen.keys() and not torch.equal(seen[first].res, seen[f"{first}_call1"].res)


# ---------------------------------------------------------------------------------------------- no trace


@pytest.mark.parametrize(("backend", "replay"), [("eager", None), ("eager", 2), ("aot_eager", 2)])
@pytest.mark.cases(1)
def test_training_is_bitwise_the_same(backend: str, replay: int | None) -> None:
    """Dropout draws the same masks; batch norm, a buffer and a Python counter move once a step."""
    watched, plain = (recompute(stack(backend), replay) for _ in range(2))
    with Monitor(watched, every=2) as monitor:
        train(watched, 3)
    train(plain, 3)
    assert [sample.step for sample in monitor.history] == [0, 2]
    assert_same_state(watched, plain)
    assert watched.calls == plain.calls == 3


@pytest.mark.sweep
def test_inductor_training_is_bitwise_the_same() -> None:
    watched, plain = (stack("inductor", depth=1) for _ in range(2))
    with Monitor(watched, every=2) as monitor:
        train(watched, 3)
    train(plain, 3)
    assert len(monitor.history) == 2
    assert_same_state(watched, plain)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.sweep
def test_hugging_face_model_with_outputs_and_autocast() -> None:
    model, inputs = fresh("llama")
    mhc_compile(model, 4, backend="eager", example_inputs=inputs)
    randomize(model)
    model.train()
    with Monitor(model, every=1) as monitor:
        loss_of(float_outputs(model(**inputs, output_hidden_states=True))).backward()
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
    first, second = monitor.history
    assert first.sites[0].single.gain.backward == pytest.approx(second.sites[0].single.gain.backward, rel=1e-2)
    assert first != second


# ---------------------------------------------------------------------------------------------- what counts


def test_what_a_checkpoint_runs_again_is_no_call() -> None:
    model, calls = stack(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with Monitor(model, every=1) as monitor:
        train(model, 2, lambda x: checkpoint(model, x, use_reentrant=False))
    assert len(calls) == 4, "the checkpoint does call it twice"
    assert [sample.step for sample in monitor.history] == [0, 1]


def test_checkpoints_within_the_model_and_recompute_count_each_site_once() -> None:
    model = recompute(stack("aot_eager", checkpointed=True), 1)
    with Monitor(model, every=2) as monitor:
        train(model, 3)
    assert [len(sample.sites) for sample in monitor.history] == [2, 2]


def test_evaluation_is_no_step_unless_asked_for() -> None:
    model = stack()
    with Monitor(model, every=1) as monitor:
        model.eval()(batch(0))
        with torch.no_grad():
            model.train()(batch(0))
        assert not monitor.sampled and monitor.log() == {}
        model(batch(0))
        assert monitor.sampled
    with Monitor(model, every=1, evaluation=True) as both, torch.no_grad():
        model.eval()(batch(0))
    assert len(monitor.history) == len(both.history) == 1


def test_under_an_outer_compilation_and_other_shapes() -> None:
    model = stack()
    outer = torch.compile(model, backend="aot_eager")
    with Monitor(outer, every=1) as monitor:
        outer(batch(0))
        outer(batch(1)[:4])
    assert [sample.sites[0].tokens for sample in monitor.history] == [6, 4]
    assert monitor.history[0] == _sampled(stack(), batch(0))


def _sampled(model: nn.Module, x: Tensor) -> Sample:
    with Monitor(model) as monitor:
        model(x)
    return monitor.history[0]


def test_a_part_called_alone_and_nested_monitors() -> None:
    """The part is the trunk below a head."""
    torch.manual_seed(0)
    whole = nn.Sequential()
    whole.trunk, whole.head = nn.Sequential(Block(8), Block(8)), nn.Linear(8, 2)
    model = mhc_compile(whole.eval(), 4, backend="eager", example_inputs=batch(0))
    randomize(model)
    model.train()
    with Monitor(model, every=1) as outer, Monitor(model, every=2) as inner:
        torch.manual_seed(0)
        model.trunk(batch(0))
        torch.manual_seed(0)
        model(batch(0))
    assert [len(outer.history), len(inner.history)] == [2, 1]
    assert outer.history[0].sites == outer.history[1].sites == inner.history[0].sites
    assert outer.history[0].sites[0].name == "trunk.0.linear"
    model(batch(0))
    assert [len(outer.history), len(inner.history)] == [2, 1], "a Monitor that was left samples no more"


def test_a_restored_model_is_said_at_the_next_step() -> None:
    model = stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model) as monitor:
        model(batch(0)).sum().backward()
        restore(model)
        with pytest.raises(RewriteError, match="restored since its Monitor was made"):
            optimizer.step()
    assert monitor.history[0].gradients is None


# ---------------------------------------------------------------------------------------------- gradients


def test_gradient_norms_are_those_at_the_step() -> None:
    model = stack()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with Monitor(model, every=2) as monitor:
        for step in range(2):  # two microbatches
            model(batch(step)).square().sum().backward()
        other.step()
        assert monitor.history[0].gradients is None
        grads = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        optimizer.step()
    found = monitor.history[0].gradients
    assert found is not None

    def right(start: str) -> float:
        return float(torch.cat([grad.flatten() for name, grad in grads.items() if name.startswith(start)]).norm())

    assert found.whole == pytest.approx(right(""), rel=1e-6)
    assert found.mhc == pytest.approx(right("mhc."), rel=1e-6)
    assert found.own == pytest.approx((right("") ** 2 - right("mhc.") ** 2) ** 0.5, rel=1e-5)
    assert list(found.sites) == [f"blocks.{number}.linear" for number in range(2)]
    for name, value in found.sites.items():
        assert value == pytest.approx(right(f"mhc.{name}."), rel=1e-6)
    flat, name = monitor.log(), "blocks.1.linear"
    assert flat["mhc/grad_norm"] == found.whole and flat[f"mhc/grad_norm/{name}"] == found.sites[name]


def test_gradients_can_be_taken_before_clipping() -> None:
    model = stack()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    with Monitor(model) as monitor:
        model(batch(0)).square().sum().backward()
        taken = monitor.gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        assert monitor.gradients() is None
    assert taken is not None and monitor.history[0].gradients is taken and taken.whole > 1e-2


# ---------------------------------------------------------------------------------------------- out


def test_log_is_flat_floats() -> None:
    model = stack()
    with Monitor(model) as monitor:
        model(batch(0))
    whole, short = monitor.log(), monitor.log(sites=False)
    assert all(type(value) is float for value in whole.values()) and short.items() < whole.items()
    name = "blocks.1.linear"
    assert whole[f"mhc/backward/{name}"] == monitor.history[0].sites[1].single.gain.backward
    assert whole[f"mhc/pre/{name}/3"] == monitor.history[0].sites[1].pre[3]
    assert len(short) == 7


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = stack()
    with Monitor(model, every=1) as monitor:
        train(model, 2)
    monitor.plot(tmp_path / "gains.png")
    monitor.plot(tmp_path / "gains.svg")
    assert (tmp_path / "gains.png").read_bytes()[1:4] == b"PNG"
    text = (tmp_path / "gains.svg").read_text()
    assert len(text) > 10_000


# ---------------------------------------------------------------------------------------------- warnings


def health(**options: Any) -> Health:
    return Health(**{"max_gain": 3.0, "warm_up": 10, **options})


def near(value: float) -> Tensor:
    """A doubly stochastic 3 x 3 matrix with `value` on its diagonal, for two tokens."""
    return (torch.full((3, 3), (1 - value) / 2) + torch.eye(3) * (value - (1 - value) / 2)).expand(2, 3, 3)


def test_a_gain_beyond_the_bound_is_told_once_for_a_trunk() -> None:
    steep = torch.tensor([[[2.0, -1.0], [-1.0, 2.0]]])  # sums to 1, gain 3; twice: gain 9
    unconstrained = [replace(site(steep, name), iterations=None) for name in "ab"]
    samples = [[replace(one, trunk=trunk) for one in unconstrained] for trunk in (0, 1)]
    one = health()
    (message,) = one.findings(sample_of(0, samples[0]))
    assert "from a to the end of trunk 0 at step 0 is 9; legal: up to 3" in message and "HC 3000" in message
    assert one.findings(sample_of(1, samples[0])) == []
    (message,) = one.findings(sample_of(1, samples[1]))
    assert "trunk 1" in message
    assert health(max_gain=9.0).findings(sample_of(0, samples[0])) == []


def test_equal_streams_are_no_alarm_at_the_start() -> None:
    equal = [site(near(0.8), "a", similarity=1.0), site(near(0.8), "b", similarity=1.0)]
    apart = [site(near(0.8), "a", similarity=1.0), site(near(0.8), "b", similarity=0.9)]
    assert health().findings(sample_of(0, equal)) == health().findings(sample_of(9, equal)) == []
    assert len(health().findings(sample_of(10, equal))) == 1  # never different
    one = health()
    assert one.findings(sample_of(1, apart)) == []
    assert "similarity of the streams of trunk 0 at step 2" in one.findings(sample_of(2, equal))[0]


def test_sinkhorn_that_saturates_or_has_not_converged() -> None:
    assert health().findings(sample_of(0, [site(near(0.998))])) == []
    (message,) = health().findings(sample_of(0, [site(near(0.9995), name) for name in "abc"]))
    assert "res of a at step 0 is 0.9995" in message and "2 more" in message
    rows_only = torch.tensor([[[0.6, 0.4], [0.7, 0.3]]])  # columns sum to 1.3 and 0.7
    (message,) = health().findings(sample_of(0, [site(rows_only)]))
    assert "column sums of res of a at step 0 is 0.3 in the mean" in message
    assert health().findings(sample_of(0, [site(rows_only.mT)])) == [], "rows are another matter"


def test_warnings_of_a_run() -> None:
    """At the identity start there are none; logits 12 apart saturate."""
    torch.manual_seed(0)
    model = mhc_compile(Stack(), 4, backend="eager", example_inputs=batch(0)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, every=1):
            train(model, 2)
    with torch.no_grad():
        model.get_submodule("mhc.blocks.1.linear").bias[8:].view(4, 4).fill_diagonal_(10.0)
    with Monitor(model, every=1), pytest.warns(StabilityWarning, match="blocks.1.linear") as caught:
        train(model, 3)
    assert len(caught) == 1


def test_leaving_by_an_error_takes_the_hooks_off() -> None:
    model = stack()
    with contextlib.suppress(ZeroDivisionError), Monitor(model, every=1) as monitor:
        model(batch(0))
        raise ZeroDivisionError
    model(batch(0))
    assert len(monitor.history) == 1
