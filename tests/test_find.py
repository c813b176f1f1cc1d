"""The finder on real and hand-written models: counts, names, and a reason for every add that is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import zoo
from graphs import counts, found, names, zoo_model
from mhc_compile import RewriteError, mhc_compile
from mhc_compile.passes.op_kinds import aten
from mhc_compile.passes.provenance import source_line
from mhc_compile.passes.rewrite import Analysis

pytestmark = [
    # transformers calls cached helpers and an autograd function's instance in forward; Dynamo warns of both
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

SLOW = {"mobilevit", "funnel", "rwkv", "falcon_h1", "zamba2", "swin"}  # more than 3 s each
# Their trunks are made as those of others in the list: llama, mixtral, phi, gemma2, wav2vec2, convnext, bart, swin.
SWEPT = {"qwen3", "qwen2_moe", "cohere", "gemma3", "sew", "convnextv2", "whisper", "pvt_v2"}
EXPORTED = ("llama", "bert", "t5", "albert", "resnet")
REFERENCE = [name for name, *_ in zoo.REFERENCE]


def _layers(pattern: str, layers: int, *parts: str) -> list[str]:
    return [f"{pattern.format(layer)}.{part}" for layer in range(layers) for part in parts]


_SHARED = "albert.encoder.albert_layer_groups.0.albert_layers.0"

NAMES = {
    "llama": _layers("model.layers.{}", 3, "self_attn", "mlp"),
    "gpt2": _layers("transformer.h.{}", 3, "attn", "mlp"),
    # post-norm: the module that adds holds the branch's last product
    "bert": _layers("bert.encoder.layer.{}", 3, "attention.output.dense", "output.dense"),
    "t5": [
        *_layers("encoder.block.{}.layer", 2, "0.SelfAttention", "1.DenseReluDense"),
        *_layers("decoder.block.{}.layer", 2, "0.SelfAttention", "1.EncDecAttention", "2.DenseReluDense"),
    ],
    # one layer applied three times: the name carries the number of the call
    "albert": [
        f"{_SHARED}.{part}{call}"
        for call in ("", "_call1", "_call2")
        for part in ("attention.dense", "ffn_output")
    ],
    # layer 0 of stage 1 has a projected shortcut, which stays a plain add
    "resnet": [
        "resnet.encoder.stages.0.layers.0.layer",
        "resnet.encoder.stages.0.layers.1.layer",
        "resnet.encoder.stages.1.layers.1.layer",
    ],
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    """Compiled frames of one test must not steer another; dropping them also keeps memory down."""
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", zoo.EXPECT)
@pytest.mark.cases(4)
def test_zoo_has_the_counted_sites_and_trunks(name: str) -> None:
    model, inputs = zoo_model(name)
    analysis = found(model, inputs)
    assert counts(analysis) == zoo.EXPECT[name]
    assert names(analysis) == NAMES.get(name, names(analysis))
    check_every_add(analysis)


@pytest.mark.parametrize("name", EXPORTED)
def test_the_export_door_finds_the_same_sites(name: str) -> None:
    model, inputs = zoo_model(name)
    analysis = found(model, inputs, door="export")
    assert counts(analysis) == zoo.EXPECT[name]
    assert names(analysis) == NAMES[name]


class Mixed(nn.Module):
    """A sum inside a branch, which only a cast reads: torch.export asserts the dtype of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.first, self.second = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + self.mix(x)
        x = x + self.first(torch.tanh(mixed.to(torch.float32)))
        return x + self.second(x)


@pytest.mark.parametrize("door", ["dynamo", "export"])
def test_an_assertion_is_no_reader_of_a_sum(door: str) -> None:
    assert names(found(Mixed(), {"x": torch.randn(2, 3, 4)}, door=door)) == ["first", "second"]


def _entries() -> list[Any]:
    kinds = dict.fromkeys(SLOW, pytest.mark.slow) | dict.fromkeys(SWEPT, pytest.mark.sweep)
    return [pytest.param(entry, id=entry.name, marks=kinds.get(entry.name, ())) for entry in models.MODELS]


@pytest.mark.parametrize("entry", _entries())
@pytest.mark.cases(16)
def test_models_have_the_counted_sites_and_trunks(entry: models.Entry) -> None:
    analysis = found(entry.build(), entry.inputs())
    assert counts(analysis) == (entry.sites, entry.trunks), f"{entry.why}\nfound: {names(analysis)}"
    assert analysis.foreign is None
    check_every_add(analysis)


# ----------------------------------------------------------------------------------------- mHC already


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.cases(1)
def test_a_model_that_is_mhc_already_is_refused(name: str) -> None:
    model, inputs = zoo_model(name)
    before = type(model), list(model.state_dict())
    with pytest.raises(RewriteError, match='backend="mhc"') as caught:
        mhc_compile(model, n=4, backend="eager", example_inputs=inputs)
    assert caught.value.line, "the refusal does not say where the mHC is"
    assert (type(model), list(model.state_dict())) == before


# -------------------------------------------------------------------------------------------- refusals


def _float_adds(analysis: Analysis) -> list[Any]:
    """Every add of two float tensors, told without the finder's own helpers."""

    def is_float(argument: object) -> bool:
        value = getattr(argument, "meta", {}).get("val")
        return isinstance(value, torch.Tensor) and value.is_floating_point()

    adds = analysis.graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    return [node for node in adds if is_float(node) and all(map(is_float, node.args[:2]))]


def check_every_add(analysis: Analysis) -> None:
    """Every add of two float tensors is a site's root or refused with a reason, or feeds only such an add."""
    ended = Counter([site.merge.root for site in analysis.sites] + [one.node for one in analysis.refused])
    assert set(ended.values()) <= {1}, "an add ended twice"
    adds = _float_adds(analysis)
    assert ended.keys() <= set(adds)
    for add in reversed(adds):  # users first
        if add not in ended:
            assert len(add.users) == 1 and ended.keys() >= set(add.users), f"{add} is not accounted for"
            ended[add] += 1  # inside the tree of its user
    for site in analysis.sites:
        assert ended.keys() >= set(site.merge.tree.interior), site.name
    for refusal in analysis.refused:
        assert refusal.reason, refusal.node
        assert source_line(refusal.node), f"{refusal.node}: {refusal.reason}"
    for site in analysis.sites:
        assert site.line, site.name


# ----------------------------------------------------------------------------------------------- names


def _other_shape(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs for another batch and another length (or another image size)."""
    made = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = torch.randn(3, value.shape[1], *[2 * size for size in value.shape[2:]])
        elif isinstance(value, torch.Tensor):
            value = torch.randint(3, zoo.VOCAB, (3, value.shape[1] + 4))
        made[name] = value
    return made


@pytest.mark.parametrize("name", NAMES)
def test_site_names_are_the_same_in_train_mode_and_for_other_shapes(name: str) -> None:
    model, inputs = zoo_model(name)
    assert names(found(model.train(), _other_shape(inputs))) == NAMES[name]


@pytest.mark.parametrize(("name", "stem"), [("gpt_neox", "gpt_neox.layers"), ("falcon", "transformer.h")])
def test_parallel_branches_are_named_after_the_module_that_adds_them(name: str, stem: str) -> None:
    """Falcon puts dropout around the sum of its branches: still two branches."""
    model, inputs = zoo_model(name)
    assert names(found(model, inputs)) == [f"{stem}.{layer}" for layer in range(3)]


def test_tied_sites_of_shared_layers_have_one_name() -> None:
    model, inputs = zoo_model("albert")
    tied = found(model, inputs, tie_shared=True)
    assert counts(tied) == (6, 1)
    assert names(tied) == [f"{_SHARED}.attention.dense", f"{_SHARED}.ffn_output"] * 3


def test_tied_conversion_has_one_site_a_layer() -> None:
    model, inputs = zoo_model("albert")
    converted = mhc_compile(model, n=4, backend="eager", tie_shared=True, example_inputs=inputs)
    kept = {name.rsplit(".", 1)[0] for name, _ in converted.mhc.named_parameters()}
    assert kept == {f"{_SHARED}.attention.dense", f"{_SHARED}.ffn_output"}


class _NameClash(nn.Module):
    """A branch whose module is called like a parameter of a site."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Linear(8, 8)
        self.block = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.phi(x)
        return x + torch.tanh(self.block(x))


def test_a_module_named_like_a_parameter_of_a_site_gets_another_name() -> None:
    assert names(found(_NameClash(), dict(x=torch.randn(2, 3, 8)))) == ["phi_site", "block"]


def test_a_frame_without_its_source_does_not_hide_the_next_one() -> None:
    """Dynamo writes such frames for generated code and for files that changed since they were read."""
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["stack_trace"] = (
        '  File "/a/outer.py", line 7, in forward\n  File "/a/inner.py", line 12, in forward\n    x = x + y\n'
    )
    assert source_line(node) == "a/inner.py:12: x = x + y"
