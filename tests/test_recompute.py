"""Compiled replay: what is kept against the prediction, gradients against those without it, and what is run twice."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn

from graphs import float_outputs, loss_of, randomize, randomize_parameters, zoo_model
from mhc_compile import Backend, ConfigError, RewriteError, history, mhc_compile
from mhc_compile.convert import recompute
from mhc_compile.partition import Pipeline, cost_model, planned
from mhc_compile.passes.cost import CostModel
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.fuse import fuse
from mhc_compile.passes.history import Outcome
from mhc_compile.passes.lower import lower
from mhc_compile.passes.plan_search import least_blocks
from mhc_compile.passes.recompute import Blocks, equal_blocks, fingerprint, tag
from mhc_compile.trace import Rewritten, rewritten
from test_cost import WIDTH as CHAIN_WIDTH
from test_cost import Chain

SITES, LENGTH, WIDTH = 10, 16, 32  # no length of a block below divides the sites, but 1
ODD = 61
TOLERANCE = 0.02


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def chain(sites: int = SITES) -> tuple[nn.Module, dict[str, Any]]:
    """A GPT-2 in training, with dropout everywhere, and its inputs; two sites a layer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = dict(n_positions=LENGTH, n_embd=WIDTH, n_layer=sites // 2, n_head=4)
    config = GPT2Config(vocab_size=50, bos_token_id=1, eos_token_id=2, attn_implementation="eager", **shape)
    ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 50
    return GPT2LMHeadModel(config).train(), dict(input_ids=ids, use_cache=False)


def odd_chain() -> tuple[nn.Module, tuple[Tensor]]:
    """Norm, product, activation and product 61 times."""
    torch.manual_seed(0)
    return Chain(ODD), (torch.randn(2, LENGTH, CHAIN_WIDTH),)


@cache
def graph_of(name: str) -> Rewritten:
    """The rewritten graph of a converted model with random mHC weights."""
    model, inputs = {"chain": chain, "odd chain": odd_chain}.get(name, partial(zoo_model, name))()
    mhc_compile(model.train(), 4, backend="aot_eager", example_inputs=inputs)
    randomize(model)
    return rewritten(model, inputs)


@dataclass
class Step:
    """One compiled forward and backward: bytes kept, gradients, and the ops of the backward."""

    kept: int
    gradients: list[Tensor | None]
    backward: Counter[str]

    def is_bitwise(self, other: Step) -> bool:
        pairs = zip(self.gradients, other.gradients, strict=True)
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def heavy(ops: Counter[str]) -> Counter[str]:
    """Products, attention and random numbers."""
    words = ("mm", "conv", "attention", "softmax", "dropout", "rand", "bernoulli")
    return Counter({op: count for op, count in ops.items() if any(word in op for word in words)})


def step(made: Rewritten, *passes: Callable[[fx.GraphModule], Outcome]) -> Step:
    """Compile a graph as "aot_eager" does, behind some passes, and run it under one seed."""
    graph = copy_graph(made.graph)
    for one in passes:
        assert one(graph).modified
    ops: Counter[str] = Counter()

    def backward(gm: fx.GraphModule, inputs: Any) -> Any:
        ops.update(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return make_boxed_func(gm)

    run = aot_module_simplified(
        graph,
        list(made.arguments),
        fw_compiler=lambda gm, inputs: make_boxed_func(gm),
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
    )
    trained = [one for one in made.arguments if isinstance(one, Tensor) and one.requires_grad]
    torch.manual_seed(7)
    kept, output = bytes_kept(lambda: run(*made.arguments), made.arguments)
    gradients = torch.autograd.grad(loss_of(float_outputs(output)), trained, allow_unused=True)
    return Step(kept, list(gradients), ops)


def bytes_kept(call: Callable[[], Any], given: Sequence[Any]) -> tuple[int, Any]:
    """Bytes of the storages that a call keeps for its backward, those of its inputs left out; and its output."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    own = {one.untyped_storage().data_ptr() for one in given if isinstance(one, Tensor)}
    return sum(size for key, size in sizes.items() if key not in own), output


@cache
def stored_step(name: str) -> Step:
    return step(graph_of(name))


@cache
def costs_of(name: str) -> CostModel:
    made = graph_of(name)
    return CostModel(made.graph, made.arguments, compiled=True)


def predicted(costs: CostModel, blocks: Blocks) -> int:
    """What the cost model says is kept with these blocks."""
    return costs.kept(blocks)


@pytest.mark.parametrize(
    "length", [1, pytest.param(2, marks=pytest.mark.sweep), 3, pytest.param(4, marks=pytest.mark.sweep), 8, SITES]
)
@pytest.mark.cases(1)
def test_a_chain_keeps_what_is_predicted_and_its_gradients_are_the_same_bits(length: int) -> None:
    made = graph_of("chain")
    blocks = equal_blocks(made.graph, length)
    assert [len(block) for block in blocks][:-1] == [length] * (-(-SITES // length) - 1)
    replayed, stored = step(made, partial(tag, blocks=blocks)), stored_step("chain")
    assert replayed.kept == pytest.approx(predicted(costs_of("chain"), blocks), rel=TOLERANCE)
    assert replayed.kept < 0.9 * stored.kept
    assert replayed.is_bitwise(stored)
    assert heavy(replayed.backward) == heavy(stored.backward)
    merges = replayed.backward["mhc.merge.default"]
    assert merges == SITES - len(blocks)  # all states but those kept, and the one that nothing needs


@pytest.mark.sweep
@pytest.mark.parametrize("length", [1, 2, 3, 4, 8, ODD])
def test_a_chain_of_61_sites_keeps_what_is_predicted(length: int) -> None:
    """An odd number, which most lengths do not divide: the last block is shorter."""
    made = graph_of("odd chain")
    blocks = equal_blocks(made.graph, length)
    assert [len(block) for block in blocks] == [length] * (ODD // length) + [ODD % length] * bool(ODD % length)
    replayed = step(made, partial(tag, blocks=blocks))
    assert replayed.kept == pytest.approx(predicted(costs_of("odd chain"), blocks), rel=TOLERANCE)
    assert replayed.kept < 0.9 * stored_step("odd chain").kept
    assert replayed.is_bitwise(stored_step("odd chain"))
    assert replayed.backward["mhc.merge.default"] == ODD - len(blocks)


def test_the_blocks_of_a_plan_keep_what_it_says() -> None:
    costs = costs_of("chain")
    starts, peak = least_blocks(costs.units)
    bounds = zip(starts, [*starts[1:], len(costs.units)], strict=True)
    runs = [[site.name for sites in costs.sites_of_units[start:end] for site in sites] for start, end in bounds]
    blocks = tuple(tuple(run) for run in runs if run)
    lengths = [len(block) for block in blocks]
    assert sum(lengths) == SITES and lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    replayed = step(graph_of("chain"), partial(tag, blocks=blocks))
    assert replayed.kept == pytest.approx(predicted(costs, blocks), rel=TOLERANCE)
    assert replayed.is_bitwise(stored_step("chain"))
    assert peak > replayed.kept


def test_what_is_stored_without_replay_is_predicted() -> None:
    costs = costs_of("chain")
    kept = sum(unit.kept + unit.saved for unit in costs.units)
    assert stored_step("chain").kept == pytest.approx(kept, rel=TOLERANCE)


@pytest.mark.sweep
def test_two_trunks_keep_what_is_predicted() -> None:
    """T5: the decoder attends to the encoder's readout, which is kept, and replayed from nothing."""
    made = graph_of("t5")
    blocks = equal_blocks(made.graph, 3)
    assert [len(block) for block in blocks] == [3, 1, 3, 3]
    replayed = step(made, partial(tag, blocks=blocks))
    assert replayed.kept == pytest.approx(predicted(costs_of("t5"), blocks), rel=TOLERANCE)
    assert replayed.is_bitwise(stored_step("t5"))
    assert heavy(replayed.backward) == heavy(stored_step("t5").backward)


def test_a_site_in_no_block_is_stored() -> None:
    made = graph_of("chain")
    every = equal_blocks(made.graph, 4)
    some, all_of_them = (step(made, partial(tag, blocks=blocks)) for blocks in (every[:2], every))
    assert all_of_them.kept < some.kept < stored_step("chain").kept
    assert some.is_bitwise(stored_step("chain"))


def test_tags_go_with_the_sites_to_level_2() -> None:
    """Blocks end where `fuse` may not join two sites; what is kept is what level 1 keeps."""
    made = graph_of("t5")
    blocks = equal_blocks(made.graph, 3)
    stored, replayed = step(made, lower, fuse), step(made, partial(tag, blocks=blocks), lower, fuse)
    assert replayed.kept == pytest.approx(predicted(costs_of("t5"), blocks), rel=TOLERANCE)
    assert replayed.is_bitwise(stored)
    assert heavy(replayed.backward) == heavy(stored.backward)
    assert sum(count for op, count in replayed.backward.items() if "mhc.merge_read." in op) > 0


# ---------------------------------------------------------------------------------------------- whole models


def converted(recompute: Any, how: str, sites: int = 4) -> tuple[nn.Module, dict[str, Any]]:
    """A converted chain with random mHC weights, and its inputs."""
    torch._dynamo.reset()
    model, inputs = chain(sites)
    mhc_compile(model, 4, backend=how, example_inputs=inputs, recompute=recompute)
    randomize(model)
    return model, inputs


def trained(model: nn.Module, inputs: dict[str, Any], around: AbstractContextManager[Any]) -> tuple[int, Tensor]:
    """Bytes that a call keeps, and all gradients."""
    torch.manual_seed(7)
    given = [*model.parameters(), *model.buffers(), *inputs.values()]
    with around:
        kept, output = bytes_kept(lambda: model(**inputs), given)
    model.zero_grad()
    loss_of(float_outputs(output)).backward()
    found = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
    return kept, torch.cat(found)


@pytest.mark.parametrize(
    ("autocast", "batches"), [(False, (2, 3)), (True, (2,)), pytest.param(True, (2, 3), marks=pytest.mark.sweep)]
)
@pytest.mark.cases(1)
def test_a_converted_model_replays_for_every_batch_size(autocast: bool, batches: tuple[int, ...]) -> None:
    """With dropout, under autocast, and in the second round with symbolic sizes."""
    results = []
    for length in (None, 2):
        model, inputs = converted(length, "aot_eager", sites=2)
        for batch in batches:
            ids = inputs["input_ids"][:1].repeat(batch, 1)
            around = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
            results.append(trained(model, {**inputs, "input_ids": ids}, around))
    stored, replayed = results[: len(batches)], results[len(batches) :]
    for (before, expected), (after, actual) in zip(stored, replayed, strict=True):
        assert torch.equal(expected, actual)
        assert after < 0.9 * before


class Dropped(nn.Module):
    """Two sites with dropout: as small as what inductor replays can be, as compiling each kernel takes a second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.dropout(layer(x).tanh(), 0.2, self.training)
        return x


@pytest.mark.slow
@pytest.mark.sweep
def test_inductor_replays_and_takes_no_plan_from_its_cache() -> None:
    kept, gradients = [], []
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch._inductor.config.patch(fallback_random=True):
        for length in (None, 2, 1):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = mhc_compile(Dropped().train(), 4, backend="inductor", example_inputs=x, recompute=length)
            randomize(model)
            found = trained(model, dict(x=x), nullcontext())
            kept.append(found[0]), gradients.append(found[1])
    state = 4 * WIDTH * 2 * LENGTH * 4
    assert kept[2] - kept[1] == state  # one block more
    assert kept[1] < kept[0] - state
    for other in gradients[1:]:
        assert float((gradients[0] - other).abs().max()) < 1e-5 * float(gradients[0].abs().max())


def test_a_converted_model_is_told_to_replay() -> None:
    """By a plan, and by "auto", which is the plan of how the model runs: another one in eager mode."""
    model, inputs = converted(None, "aot_eager", sites=6)
    stored, expected = trained(model, inputs, nullcontext())
    costs = cost_model(model, inputs)
    plans = [planned(one, Pipeline.of(), "chain", 4) for one in (costs, cost_model(model, inputs, compiled=False))]
    kept = [costs.kept(tuple(plan.blocks)) for plan in plans]
    assert kept[0] != kept[1]
    for choice in (plans[0], "auto"):
        assert recompute(model, choice) is model
        replayed, actual = trained(model, inputs, nullcontext())
        assert replayed < 0.9 * stored and torch.equal(actual, expected)
        assert replayed == pytest.approx(kept[0], rel=1e-3)
        assert abs(kept[1] - kept[0]) > 1e-2 * kept[0]
        assert [record.name for record in history(model)][-3:] == ["recompute", "lower", "fuse"]
    recompute(model, None)
    assert trained(model, inputs, nullcontext())[0] == stored


def test_copies_of_a_model_replay_as_it_does() -> None:
    model, inputs = converted(2, "aot_eager", sites=2)
    kept, expected = trained(model, inputs, nullcontext())
    again, actual = trained(copy.deepcopy(model), inputs, nullcontext())
    assert again == kept and torch.equal(actual, expected)
    assert kept < 0.9 * trained(*converted(None, "aot_eager", sites=2), nullcontext())[0]


@pytest.mark.parametrize("choice", [0, -1, True, 1.5, "all", [1], object()])
def test_other_choices_are_refused(choice: Any) -> None:
    model, inputs = zoo_model("llama")
    with pytest.raises(ConfigError, match=r"recompute is .*legal: None, 'auto', sites a block"):
        mhc_compile(model, 4, backend="aot_eager", example_inputs=inputs, recompute=choice)
    assert not hasattr(model, "mhc")
    with pytest.raises(ConfigError, match="recompute is "):
        recompute(model, choice)
    with pytest.raises(RewriteError, match="not converted"):
        recompute(model, "auto")


# ---------------------------------------------------------------------------------------------- refusals


def test_a_plan_of_another_model_is_refused() -> None:
    graph = copy_graph(graph_of("chain").graph)
    message = r"recompute plan is one of other sites \(a, b\); legal: a plan of this model"
    with pytest.raises(RewriteError, match=message):
        tag(graph, (("a", "b"),))
    assert not any("recompute" in node.meta for node in graph.graph.nodes)
    assert not tag(graph, ()).modified


def test_fingerprints_tell_blocks_apart() -> None:
    blocks = [(("a", "b"),), (("a",), ("b",)), (("ab",),), ()]
    assert len(set(map(fingerprint, blocks))) == len(blocks)
    assert fingerprint(blocks[1]) == fingerprint([["a"], ["b"]])


def test_a_backend_that_owns_its_parameters_replays() -> None:
    """`Backend(recompute=)`: less is kept, and the gradients are the same bits."""
    found = []
    for choice in (None, 2):
        torch._dynamo.reset()
        model, inputs = chain(4)
        owner = Backend(4, backend="aot_eager", recompute=choice)
        fast = torch.compile(model, backend=owner, fullgraph=True)
        torch.manual_seed(7)
        fast(**inputs)
        randomize_parameters(owner.parameters())
        torch.manual_seed(7)
        kept, output = bytes_kept(lambda call=fast, given=inputs: call(**given), list(model.parameters()))
        leaves = [*model.parameters(), *owner.parameters()]
        gradients = torch.autograd.grad(loss_of(float_outputs(output)), leaves, allow_unused=True)
        found.append((kept, [one for one in gradients if one is not None]))
    (stored, expected), (replayed, actual) = found
    assert replayed < 0.9 * stored
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    with pytest.raises(ConfigError, match="recompute is 0; legal: None, 'auto'"):
        Backend(4, recompute=0)


class Masked(nn.Module):
    """Two sites; gives out what a drop in the second branch made, by which one knows the numbers that it drew."""

    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.drop = drop

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.sin(self.first(x))
        dropped = self.drop(self.before(x))
        return x + torch.sin(dropped)[:, :32], dropped

    def before(self, x: Tensor) -> Tensor:
        return torch.sin(self.outer(torch.relu(self.inner(x))))


def _zeros(z: Tensor, y: Tensor) -> Tensor:
    return z * (y != 0) * 2


def _attention(z: Tensor, dropout: float = 0.5) -> Tensor:
    """Attention of z to itself; columns of ones in the values show the probabilities that are left."""
    shown = torch.cat((z, torch.eye(len(z), dtype=z.dtype)), -1)
    return F.scaled_dot_product_attention(z[None, None], z[None, None], shown[None, None], dropout_p=dropout)[0, 0]


def _attention_again(z: Tensor, y: Tensor) -> Tensor:
    probabilities = torch.softmax(z @ z.T / z.shape[-1] ** 0.5, -1) * (y[:, z.shape[-1] :] != 0) * 2
    return probabilities @ torch.cat((z, torch.eye(len(z), dtype=z.dtype)), -1)


def _alpha_again(z: Tensor, y: Tensor) -> Tensor:
    """What is dropped is one value; the rest is scaled and shifted (Klambauer et al., 2017)."""
    alpha = -1.7580993408473766
    scale = (0.5 * (1 + 0.5 * alpha**2)) ** -0.5
    kept = scale * (z - 0.5 * alpha)
    return torch.where((y - kept).abs() < 1e-4, kept, y.detach())


# A random function, and the same from what it is of and what it gave.
_DROPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "dropout": (lambda x: F.dropout(x, 0.5, True), _zeros),
    "native_dropout": (lambda x: torch.native_dropout(x, 0.5, True)[0], _zeros),
    "dropout1d": (lambda x: F.dropout1d(x, 0.5, True), _zeros),
    "bernoulli": (lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)) * 2, _zeros),
    "drop path": (lambda x: x * (torch.rand(len(x), 1) < 0.5) * 2, _zeros),
    "noise": (lambda x: x * (torch.randn_like(x) > 0) * 2, _zeros),
    "alpha dropout": (lambda x: F.alpha_dropout(x, 0.5, True), _alpha_again),
    "rrelu": (lambda x: F.rrelu(x, training=True), lambda z, y: torch.where(z >= 0, z, z * (y / z).detach())),
    "gumbel softmax": (F.gumbel_softmax, lambda z, y: torch.softmax(y.log().detach() + z - z.detach(), -1)),
    "attention": (_attention, _attention_again),
}


def off_by(model: Masked, again: Callable[[Tensor, Tensor], Tensor], budget: float) -> float:
    """How far the gradient of a bias is from that of the numbers that the output of the same call shows."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    with torch._functorch.config.patch(activation_memory_budget=budget):
        _, dropped = model(x)
        weight = torch.linspace(-1, 1, dropped.numel()).view(dropped.shape)
        (found,) = torch.autograd.grad((dropped * weight).sum(), model.outer.bias)
    z = model.before(x + torch.sin(model.first(x)))
    made = again(z, dropped.detach())
    torch.testing.assert_close(made, dropped, rtol=1e-3, atol=1e-4)
    (expected,) = torch.autograd.grad((made * weight).sum(), model.outer.bias)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("budget", [0.0, 0.1])
@pytest.mark.parametrize("drop", _DROPS)
def test_random_numbers_are_drawn_once_whatever_the_budget(drop: str, budget: float) -> None:
    model = Masked(_DROPS[drop][0])
    mhc_compile(model, n=4, example_inputs=torch.randn(16, 32), backend="aot_eager", recompute=1)
    assert off_by(model, _DROPS[drop][1], budget) < 1e-3


@pytest.mark.parametrize("drop", [*_DROPS][:1])
def test_random_numbers_are_drawn_once_under_inductor(drop: str) -> None:
    model = Masked(_DROPS[drop][0])
    mhc_compile(model, n=4, example_inputs=torch.randn(16, 32), backend="inductor", recompute=1)
    assert off_by(model, _DROPS[drop][1], 0.0) < 1e-3


def _converted(n: int) -> Callable[[Masked], nn.Module]:
    return lambda model: mhc_compile(model, n=n, example_inputs=torch.randn(16, 32), backend="aot_eager")


_UNTAGGED: dict[str, Callable[[Masked], Any]] = {
    "n = 1": _converted(1),
    "n = 4": _converted(4),
    "Backend, n = 1": lambda model: torch.compile(model, backend=Backend(n=1, backend="aot_eager")),
    "Backend, n = 4": lambda model: torch.compile(model, backend=Backend(n=4, backend="aot_eager")),
}


@pytest.mark.parametrize("compiled", _UNTAGGED)
def test_a_budget_that_draws_again_is_warned_of(compiled: str) -> None:
    model = _UNTAGGED[compiled](Masked(_DROPS["dropout"][0]))
    with (
        torch._functorch.config.patch(activation_memory_budget=0.1),
        pytest.warns(UserWarning, match="activation_memory_budget is 0.1"),
    ):
        model(torch.randn(16, 32))


def test_a_model_that_is_mhc_already_is_warned_of() -> None:
    """Its recomputation is not ours to choose: one warning beside the one that nothing was found."""
    model = torch.compile(Masked(_DROPS["dropout"][0]), backend="mhc")
    with torch._functorch.config.patch(activation_memory_budget=0.1), pytest.warns(UserWarning) as seen:
        model(torch.randn(16, 32))
    assert sum("activation_memory_budget is 0.1" in str(one.message) for one in seen) == 1
