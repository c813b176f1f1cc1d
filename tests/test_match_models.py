"""The models of `transformers` that are mHC: every site and exit is found, and they compute what they did."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from benchmarks.fusion import cache_name
from graphs import zoo_model
from mhc_compile.passes.capture import normalize
from mhc_compile.passes.history import run_passes
from mhc_compile.passes.match import match_passes
from mhc_compile.passes.match_report import MatchedSite, Matches
from mhc_compile.passes.op_kinds import aten, packet

pytestmark = [
    # Dynamo looks at the gradient of what it hands over at a graph break
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

LAYERS = 2  # of DeepSeek, all of one kind
# An exit that is a mean over streams (GLM) is one op of a graph of its own, behind graph breaks.
EXPECTED = {
    "deepseek_v4": dict(coefficients=5, sinkhorn=4, aggregate=5, merge=4),
    "glm5_next": dict(coefficients=4, sinkhorn=4, aggregate=4, merge=4),
    "hy_v4": dict(coefficients=7, aggregate=7, merge=6),
}
MODELS = list(EXPECTED)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Compiled frames of one test must not steer another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass
class Backend:
    """Matches each graph and runs it by eager ops; keeps the graphs and what was found in them."""

    graphs: list[fx.GraphModule] = field(default_factory=list)
    found: list[Matches] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        values = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
        if not any(isinstance(value, Tensor) for value in values):
            return gm.forward
        graph = normalize(gm, values)
        run_passes(graph, match_passes(self.found))
        graph.recompile()
        self.graphs.append(graph)
        return graph

    @property
    def ops(self) -> dict[str, int]:
        return dict(sum((Counter(one.ops) for one in self.found), Counter()))

    def sites(self, kind: str = "sites") -> list[MatchedSite]:
        return [site for one in self.found for site in getattr(one, kind)]


def model_of(name: str, *, train: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose coefficients depend on its streams: at their own initialisation they hardly do."""
    torch.manual_seed(0)
    model, inputs = zoo_model(name)
    if name == "glm5_next":
        model = shorter_glm(model)
    if name == "deepseek_v4":
        del model.model.layers[LAYERS:]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "hc" in key:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.train(train), inputs


def shorter_glm(model: nn.Module) -> nn.Module:
    """One layer of each kind of attention: this model breaks the graph in every layer, and is slow to capture."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2
    config.layer_types = ["linear_attention", "indexed_attention"]
    config.mlp_layer_types, config.indexer_types = ["dense", "sparse"], ["full", "full"]
    return type(model)(config)


def run(
    model: nn.Module, forward: Callable[..., Any], inputs: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output and the gradients of a fixed function of it."""
    model.zero_grad()
    output = next(value for value in forward(**inputs).values() if torch.is_tensor(value) and value.is_floating_point())
    generator = torch.Generator().manual_seed(2)
    (output.float() * torch.randn(output.shape, generator=generator)).sum().backward()
    return output.detach().float(), {
        name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference, each tensor's of its own scale, or of a hundredth of the largest one."""
    assert ours.keys() == theirs.keys()
    scale = max(float(value.abs().max()) for value in theirs.values())
    return max(
        float((ours[name] - value).abs().max()) / max(float(value.abs().max()), 1e-2 * scale)
        for name, value in theirs.items()
    )


def spread(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The root mean square of the difference over all tensors, of that of `theirs`."""
    error = sum(float((ours[name] - value).norm()) ** 2 for name, value in theirs.items())
    return float((error / sum(float(value.norm()) ** 2 for value in theirs.values())) ** 0.5)


# GLM breaks the graph in every layer and is slow to capture: in eval mode it is left to the sweep.
MODES = [
    pytest.param(name, train, id=f"{name}-{mode}", marks=[pytest.mark.sweep] * (name == "glm5_next" and not train))
    for name in MODELS
    for train, mode in ((True, "train"), (False, "eval"))
]


@pytest.mark.parametrize(("name", "train"), MODES)
@pytest.mark.cases(2)
def test_every_site_and_exit_is_found_and_computes_the_same(name: str, train: bool) -> None:
    model, inputs = model_of(name, train=train)
    eager = run(model, model, inputs)
    backend = Backend()
    ours = run(model, torch.compile(model, backend=backend), inputs)
    assert backend.ops == EXPECTED[name]
    assert [site.kept for site in backend.sites()] == [()] * len(backend.sites())
    assert [note for one in backend.found for note in one.notes] == []
    assert distance({"output": ours[0]}, {"output": eager[0]}) < 1e-5
    assert distance(ours[1], eager[1]) < 1e-5
    assert not any(divides_matrices(node) for graph in backend.graphs for node in graph.graph.nodes)


@pytest.mark.slow
def test_decoding_with_a_cache_gives_the_logits_of_eager() -> None:
    """One layer: the first call joins its keys to a cache that is an empty tensor of one axis."""
    model, inputs = model_of("deepseek_v4", train=False)
    del model.model.layers[1:]
    ids, backend = inputs["input_ids"], Backend()
    results = []
    for call in (model, torch.compile(model, backend=backend, fullgraph=True)):
        cache, logits = None, []
        for tokens in (ids, ids[:, :1]):
            with torch.no_grad():
                output = call(input_ids=tokens, use_cache=True, **{cache_name(model): cache})
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
        results.append(torch.stack(logits))
    eager, ours = results
    assert len(backend.found) == 2 and backend.ops == dict(coefficients=6, sinkhorn=4, aggregate=6, merge=4)
    assert distance({"logits": ours}, {"logits": eager}) < 1e-5
    assert float((eager[0] - eager[1]).abs().max()) > 1e-2  # what is compared are not two times the same


def divides_matrices(node: fx.Node) -> bool:
    """A step of a Sinkhorn chain."""
    return packet(node) is aten.div and tuple(node.meta["val"].shape[-2:]) == (4, 4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.cases(1)
def test_bfloat16_is_as_near_the_exact_result_as_eager_is(name: str) -> None:
    model, inputs = model_of(name, train=True)
    exact = run(model, model, inputs)
    model.zero_grad()
    low = copy.deepcopy(model).bfloat16()
    eager = run(low, low, inputs)
    backend = Backend()
    ours = run(low, torch.compile(low, backend=backend), inputs)
    assert backend.ops == EXPECTED[name]
    # each model's own rounding of post and res is kept
    assert {site.options["rounded"] for site in backend.sites() if "merge" in site.ops} == {name != "hy_v4"}
    for mine, theirs, wanted in ((ours[0], eager[0], exact[0]), (ours[1], eager[1], exact[1])):
        error, bound = (spread(_named(one), _named(wanted)) for one in (mine, theirs))
        assert error <= 1.1 * bound


def _named(value: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"output": value} if isinstance(value, Tensor) else value


def test_the_report_names_the_modules_of_sites_and_exit() -> None:
    model, inputs = model_of("deepseek_v4", train=False)
    backend = Backend()
    torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    names = [f"model.layers.{layer}.{part}_hc" for layer in range(LAYERS) for part in ("attn", "ffn")]
    assert [site.module for site in backend.sites()] == names
    (head,) = backend.sites("heads")
    assert (head.module, head.ops, head.n, head.features) == ("model.hc_head", ("coefficients", "aggregate"), 4, 32)


def test_an_exit_by_the_mean_is_found_behind_its_sites() -> None:
    """GLM's own exit, in one graph with the sites before it."""
    model, _ = model_of("glm5_next", train=False)
    glm: Any = importlib.import_module("transformers.models.glm5_next.modeling_glm5_next")
    layer, head = model.layers[0], glm.Glm5NextTextHyperHead()

    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hc, self.norm, self.branch, self.head = layer.ffn_hc, layer.input_layernorm, layer.mlp, head

        def forward(self, streams: Tensor) -> Tensor:
            post, comb, u = self.hc(streams)
            f = self.branch(self.norm(u))
            streams = post.unsqueeze(-1) * f.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), streams)
            return self.head(streams)

    backend, tail, x = Backend(), Tail(), torch.randn(2, 5, 4, 32)
    with torch.no_grad():
        output = torch.compile(tail, backend=backend, fullgraph=True)(x)
        error = float((output - tail(x)).abs().max())
    assert backend.ops == dict(coefficients=1, sinkhorn=1, aggregate=1, merge=1, readout=1)
    assert error < 1e-6


@pytest.mark.parametrize("name", ["qwen4_exp", "llama", "vit"])
def test_other_models_are_not_touched(name: str) -> None:
    model, inputs = zoo_model(name)
    backend = Backend()
    with torch.no_grad():
        torch.compile(model.eval(), backend=backend)(**inputs)
    assert backend.graphs and backend.ops == {}
    assert not any("mhc" in str(node.target) for graph in backend.graphs for node in graph.graph.nodes)
