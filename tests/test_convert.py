"""Converting a model in place: what it keeps, what it adds, and how it fails."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from graphs import (
    Result,
    as_double,
    assert_bitwise,
    assert_same,
    divergence,
    float_outputs,
    force_pre_and_post_to_one,
    is_float,
    loss_of,
    own_parameters,
    random_weights_of_one_stream,
    randomize,
    result_of,
    small_model,
    split_reads,
    widen,
    zoo_model,
)
from mhc_compile import (
    CaptureError,
    ConfigError,
    HyperConnection,
    MHCConfig,
    RewriteError,
    history,
    mhc_compile,
    param_groups,
    restore,
)

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

NAMES = [name for name, *_ in zoo.ZOO]
SLOW = {"mamba", "t5"}  # more than ten seconds, nearly all of it in Dynamo


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    """Compiled frames of one test must not steer another; dropping them also keeps memory down."""
    yield
    torch._dynamo.reset()


def called(model: nn.Module, inputs: dict[str, Any]) -> Result:
    return result_of(lambda: model(**inputs), own_parameters(model))


def captured(model: nn.Module, inputs: dict[str, Any], backend: str = "eager") -> Result:
    """A plain model under the same capture: being compiled at all may change the last bit."""
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return result_of(lambda: compiled(**inputs), own_parameters(model))


def convert(model: nn.Module, inputs: dict[str, Any], n: int = 4, **options: Any) -> nn.Module:
    return mhc_compile(model, n=n, example_inputs=inputs, **{"backend": "eager", **options})


def connections(model: nn.Module) -> list[HyperConnection]:
    return [module for module in model.mhc.modules() if isinstance(module, HyperConnection)]


def first_float(output: Any) -> Tensor:
    return float_outputs(output)[0].detach()


# ---------------------------------------------------------------------------------------------- step 0


def _named(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.mark.parametrize("name", _named(NAMES))
@pytest.mark.cases(3)
def test_outputs_and_gradients_are_unchanged_at_step_0(name: str) -> None:
    """In evaluation, and in train mode under one seed: every dropout mask and drop path must agree."""
    (plain, inputs), (converted, _) = zoo_model(name), zoo_model(name)
    convert(converted, inputs)
    assert_same(called(plain, inputs), called(converted, inputs), outputs=1e-5, gradients=1e-4)
    plain.train(), converted.train()
    assert_same(called(plain, inputs), called(converted, inputs), outputs=1e-5, gradients=1e-4)
    buffers = dict(converted.named_buffers())
    for key, buffer in plain.named_buffers():  # running statistics too
        torch.testing.assert_close(buffers[key], buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "falcon", "resnet"])
@pytest.mark.cases(1)
def test_outputs_and_gradients_are_unchanged_in_float64(name: str) -> None:
    (plain, inputs), (converted, _) = zoo_model(name), zoo_model(name)
    inputs = as_double(inputs)
    convert(converted.double(), inputs).double()
    for connection in connections(converted):
        connection.reset_parameters()  # logits rounded to float32 make the coefficients sum to 1 + 1e-8
    assert_same(called(plain.double(), inputs), called(converted, inputs), outputs=1e-10, gradients=1e-10)


def test_a_float64_model_runs_as_it_is_converted() -> None:
    (plain, inputs), (converted, _) = small_model("parallel"), small_model("parallel")
    inputs = as_double(inputs)
    convert(converted.double(), inputs)
    assert_same(called(plain.double(), inputs), called(converted, inputs), outputs=1e-6, gradients=1e-6)


# -------------------------------------------------------------------------------------------- training


def train(model: nn.Module, inputs: dict[str, Any], steps: int = 20) -> None:
    """AdamW on one batch; the gradients of the last step stay.

    With its usual eps of 1e-8, Adam turns gradients that are zero but for rounding into whole steps.
    """
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2, eps=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(float_outputs(model(**inputs))).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["llama", "bert", "resnet", "vit", "t5"])
@pytest.mark.cases(1)
def test_training_makes_the_streams_diverge(name: str) -> None:
    """Equal streams that all sites read alike get equal gradients for ever; the default must not do that."""
    model, inputs = zoo_model(name)
    convert(model.train(), inputs)
    train(model, inputs)
    diverged = divergence(model, inputs)
    print(f"{name}: mean cosine distance between the streams after 20 steps {diverged:.1e}")
    assert diverged > 1e-8  # 1e-14 where streams are equal but for rounding, see the next test
    for key, parameter in model.mhc.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, f"{key} has a zero gradient after 20 steps"


def test_streams_that_all_sites_read_alike_never_diverge() -> None:
    """The trap itself, so that the test above is known to see it."""
    model, inputs = small_model("parallel")
    convert(model, inputs)
    with torch.no_grad():
        for connection in connections(model):
            connection.bias[:4] = -math.log(3.0)  # pre = 1/4
    train(model, inputs)
    assert divergence(model, inputs) < 1e-12


def test_training_moves_both_kinds_of_parameters() -> None:
    model, inputs = small_model("parallel")
    convert(model, inputs)
    before = copy.deepcopy(model.state_dict())
    train(model, inputs, steps=3)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key, _ in model.named_parameters()}


# ----------------------------------------------------------------------------------------------- n = 1


EAGER = [(name, "eager") for name in ("llama", "bert", "t5", "resnet")]


@pytest.mark.parametrize(("name", "backend"), [*EAGER, ("gpt2", "aot_eager"), ("resnet", "aot_eager")])
@pytest.mark.cases(1)
def test_one_stream_is_the_plain_model_bit_for_bit(name: str, backend: str) -> None:
    (plain, inputs), (converted, _) = zoo_model(name), zoo_model(name)
    convert(converted, inputs, n=1, backend=backend)
    assert not list(converted.mhc.parameters())
    assert converted.state_dict().keys() == plain.state_dict().keys()
    assert_bitwise(captured(plain, inputs, backend), called(converted, inputs))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "name"), [(1, "gpt2"), (4, "llama")])
@pytest.mark.cases(1)
def test_inductor(n: int, name: str) -> None:
    (plain, inputs), (converted, _) = zoo_model(name), zoo_model(name)
    for model in (plain, converted):  # one layer: the others have the same kernels, each a second of the C++ compiler
        del (model.model.layers if name == "llama" else model.transformer.h)[1:]
    convert(converted, inputs, n=n, backend="inductor")
    assert_same(called(plain, inputs), called(converted, inputs), outputs=1e-5, gradients=1e-4)


MACHINERY = ["llama", "gpt2", "bert", "vit", "t5", "resnet", "falcon", "gpt_neox"]


@pytest.mark.parametrize("name", MACHINERY)
def test_the_whole_machinery_at_one_stream(name: str) -> None:
    """Expand, coefficients with random logits, Sinkhorn 1 x 1, merge, readout; pre and post forced to 1."""
    model, inputs = zoo_model(name)
    made = widen(model, (), inputs, n=1, weights=random_weights_of_one_stream)
    assert force_pre_and_post_to_one(made.graph) == 2 * len(made.analysis.sites) > 0
    split_reads(made.graph)
    parameters = own_parameters(model)
    expected = result_of(lambda: made.canonical(*made.arguments), parameters)
    actual = result_of(lambda: made.graph(*made.arguments, *made.weights), parameters)
    if name == "resnet":
        # a site's gradients lie in memory with the channels last: batch norm's backward sums otherwise
        assert_same(expected, actual, outputs=0.0, gradients=1e-6)
    else:
        assert_bitwise(expected, actual)


# --------------------------------------------------------------------------------------------- calling


def test_positional_and_keyword_arguments_give_the_same() -> None:
    model, inputs = zoo_model("llama")
    convert(model, inputs)
    randomize(model)
    by_name = first_float(model(input_ids=inputs["input_ids"], use_cache=False))
    by_place = first_float(model(inputs["input_ids"], use_cache=False))
    assert torch.equal(by_name, by_place)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_forms_of_example_inputs(form: str) -> None:
    model, inputs = small_model("parallel")
    x = inputs["x"]
    given = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"x": x}}[form]
    converted = mhc_compile(model, n=4, backend="eager", example_inputs=given)
    assert torch.equal(first_float(converted(x)), first_float(converted(x=x)))


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit"])
@pytest.mark.cases(1)
def test_hugging_face_models_need_no_example_inputs_and_keep_their_output_class(name: str) -> None:
    model, inputs = zoo_model(name)
    plain = model(**inputs)
    output = mhc_compile(model, n=4, backend="eager")(**inputs)
    assert type(output) is type(plain)
    assert list(output.keys()) == list(plain.keys())
    torch.testing.assert_close(first_float(output), first_float(plain), rtol=1e-4, atol=1e-5)


def test_tuples_are_kept() -> None:
    model, inputs = zoo_model("gpt2")
    plain = model(**inputs, return_dict=False)
    output = convert(model, inputs)(**inputs, return_dict=False)
    assert type(output) is tuple and len(output) == len(plain)


def test_hidden_states_are_read_out() -> None:
    model, inputs = zoo_model("gpt2")
    expected = model(**inputs, output_hidden_states=True).hidden_states
    actual = convert(model, inputs)(**inputs, output_hidden_states=True).hidden_states
    assert [state.shape for state in actual] == [state.shape for state in expected]
    for state, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, state, rtol=1e-4, atol=1e-5)


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def captures(model: nn.Module) -> int:
    return sum(record.name == "capture" for record in history(model))


def test_batch_and_length_may_change() -> None:
    (plain, inputs), (model, _) = zoo_model("llama"), zoo_model("llama")
    convert(model, inputs)
    for batch, length in ((2, 8), (3, 8), (3, 12), (5, 17), (4, 32)):
        ids = torch.randint(3, zoo.VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            actual = first_float(model(input_ids=ids, use_cache=False))
            expected = first_float(plain(input_ids=ids, use_cache=False))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert captures(model) <= 3


def test_two_models_of_one_class_do_not_share_captures() -> None:
    (one, inputs), (two, _) = small_model("parallel"), small_model("parallel")
    convert(one, inputs), convert(two, inputs)
    randomize(two)
    outputs = [first_float(model(**inputs)) for model in (one, two, one, two)]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.allclose(outputs[0], outputs[1])
    assert captures(one) == captures(two) == 1


# --------------------------------------------------------------------------------------- modes, dtypes


def test_train_and_eval_can_be_switched() -> None:
    (plain, inputs), (model, _) = zoo_model("gpt2"), zoo_model("gpt2")
    convert(model, inputs)
    quiet = first_float(model(**inputs))
    model.train()
    assert model.mhc.training
    torch.manual_seed(7)
    noisy = first_float(model(**inputs))
    torch.manual_seed(7)
    expected = first_float(torch.compile(plain.train(), backend="eager", fullgraph=True)(**inputs))
    torch.testing.assert_close(noisy, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(noisy, quiet)
    model.eval()
    assert torch.equal(first_float(model(**inputs)), quiet)


@pytest.mark.parametrize("without_grad", [torch.no_grad, torch.inference_mode])
def test_training_after_a_call_without_gradients(without_grad: Callable[[], Any]) -> None:
    model, inputs = small_model("parallel")
    convert(model, inputs)
    randomize(model)
    with without_grad():
        quiet = first_float(model(**inputs)).clone()
    output = float_outputs(model(**inputs))[0]
    assert torch.equal(output, quiet)
    output.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


def test_training_works_under_autocast() -> None:
    (plain, inputs), (model, _) = zoo_model("llama"), zoo_model("llama")
    convert(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = plain(**inputs), model(**inputs)
    assert first_float(actual).dtype == first_float(expected).dtype == torch.bfloat16
    scale = first_float(expected).abs().max().item()
    difference = (first_float(actual).float() - first_float(expected).float()).abs().max().item()
    assert difference <= 3e-2 * scale
    loss_of(float_outputs(actual)).backward()
    for key, parameter in model.mhc.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), key


CASTS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "to": ("llama", lambda model: model.to(torch.bfloat16)),
    "bfloat16": ("parallel", nn.Module.bfloat16),
    "half": ("parallel", nn.Module.half),
}


@pytest.mark.parametrize("how", CASTS)
def test_casting_the_model_keeps_mhc_parameters_in_float32(how: str) -> None:
    name, cast = CASTS[how]
    model, inputs = zoo_model(name) if name == "llama" else small_model(name)
    plain = cast(copy.deepcopy(model))
    convert(model, inputs)
    before = {key: value.clone() for key, value in model.mhc.state_dict().items()}
    cast(model)
    inputs = {key: value.to(dtype_of(model)) if is_float(value) else value for key, value in inputs.items()}
    for key, parameter in model.mhc.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[key]), key
    assert {parameter.dtype for parameter in own_parameters(model).values()} == {dtype_of(plain)}
    with torch.no_grad():
        expected, actual = first_float(plain(**inputs)), first_float(model(**inputs))
    assert actual.dtype == expected.dtype
    difference = (actual.float() - expected.float()).abs().max().item()
    assert difference <= 3e-2 * expected.float().abs().max().item()


# ----------------------------------------------------------------------------------------------- state


def test_state_dict_has_the_original_keys_and_the_sites() -> None:
    model, inputs = zoo_model("llama")
    before = list(model.state_dict())
    convert(model, inputs)
    after = list(model.state_dict())
    assert [key for key in after if not key.startswith("mhc.")] == before
    sites = [f"mhc.model.layers.{layer}.{branch}" for layer in range(3) for branch in ("self_attn", "mlp")]
    added = ["mhc._extra_state", *(f"{site}.{part}" for site in sites for part in ("phi", "alpha", "bias"))]
    assert [key for key in after if key.startswith("mhc.")] == added


def test_state_dict_round_trip() -> None:
    (one, inputs), (two, _) = small_model("parallel"), small_model("parallel")
    convert(one, inputs), convert(two, inputs)
    randomize(one)
    assert not torch.allclose(first_float(one(**inputs)), first_float(two(**inputs)))
    two.load_state_dict(one.state_dict())
    assert torch.equal(first_float(one(**inputs)), first_float(two(**inputs)))


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_converted_models_can_be_copied(copied: str) -> None:
    model, inputs = small_model("parallel")
    convert(model, inputs)
    randomize(model)
    expected = first_float(model(**inputs))
    twin = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(first_float(twin(**inputs)), expected)
    randomize(twin, seed=4)
    assert not torch.allclose(first_float(twin(**inputs)), expected)
    assert torch.equal(first_float(model(**inputs)), expected), "the copy shares parameters with the model"


def test_the_converted_model_is_the_same_object_of_its_class() -> None:
    model, inputs = zoo_model("llama")
    original = type(model)
    converted = convert(model, inputs)
    assert converted is model
    assert isinstance(model, original) and type(model).__name__ == original.__name__


@pytest.mark.parametrize(("name", "n"), [("bert", 4), ("resnet", 4), ("gpt2", 1)])
def test_restore_gives_the_original_back(name: str, n: int) -> None:
    model, inputs = zoo_model(name)
    original, keys, expected = type(model), list(model.state_dict()), first_float(model(**inputs))
    convert(model, inputs, n=n)
    if n > 1:
        randomize(model)
    model(**inputs)
    assert restore(model) is model
    assert type(model) is original
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "mhc")
    assert torch.equal(first_float(model(**inputs)), expected)
    with pytest.raises(RewriteError, match="not converted"):
        restore(model)


def test_a_restored_model_can_be_converted_again() -> None:
    model, inputs = small_model("parallel")
    randomize(convert(model, inputs))
    first = first_float(model(**inputs))
    randomize(convert(restore(model), inputs))
    assert torch.equal(first_float(model(**inputs)), first)


def test_param_groups_decay_matrices_only() -> None:
    model, inputs = zoo_model("gpt2")
    convert(model, inputs)
    model.lm_head.weight.requires_grad_(False)  # tied with the embedding
    groups = {group["name"]: group for group in param_groups(model, weight_decay=0.1)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "decay": 0.1,
        "no_decay": 0.0,
        "mhc": 0.0,
    }
    assert all(one.dim() >= 2 for one in groups["decay"]["params"])
    assert all(one.dim() < 2 for one in groups["no_decay"]["params"])
    assert {id(one) for one in groups["mhc"]["params"]} == {id(one) for one in model.mhc.parameters()}
    listed = [id(one) for group in groups.values() for one in group["params"]]
    assert sorted(listed) == sorted({id(one) for one in model.parameters() if one.requires_grad})
    with pytest.raises(ConfigError, match="weight_decay"):
        param_groups(model, weight_decay=-1.0)


@pytest.mark.parametrize("init", ["identity", "paper", "deepseek_v4"])
def test_inits(init: str) -> None:
    model, inputs = small_model("parallel")
    expected = first_float(model(**inputs))
    torch.manual_seed(0)
    convert(model, inputs, init=init)
    assert {connection.init for connection in connections(model)} == {init}
    zero_phi = all(not connection.phi.any() for connection in connections(model))
    assert zero_phi == (init == "identity")
    actual = first_float(model(**inputs))
    assert torch.isfinite(actual).all()
    if init == "identity":
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(actual, expected, rtol=1e-2)


def test_options_reach_the_sites() -> None:
    model, inputs = small_model("parallel")
    mhc_compile(model, config=MHCConfig(n=3, iterations=7, eps=1e-4, backend="eager"), example_inputs=inputs)
    made = connections(model)
    assert {(one.n, one.iterations, one.eps) for one in made} == {(3, 7, 1e-4)}
    assert [one.stream for one in made] == [number % 3 for number in range(len(made))]


# -------------------------------------------------------------------------------------------- refusals


class NoResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class IntegersOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.cumsum(-1)


class BranchesOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # a graph break
            x = x * 2
        return x + self.linear(x)


class OwnsTheName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mhc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mhc(x)


def assert_refused(model: nn.Module, inputs: Any, error: type[Exception], match: str, **options: Any) -> Any:
    """The conversion fails with `error` and leaves the model as it was."""
    original, keys, attributes = type(model), list(model.state_dict()), set(model.__dict__)
    modules = dict(model.named_modules())
    training = model.training
    with pytest.raises(error, match=match) as caught:
        mhc_compile(model, example_inputs=inputs, **options)
    assert type(model) is original
    assert list(model.state_dict()) == keys
    assert set(model.__dict__) == attributes
    assert dict(model.named_modules()) == modules
    assert model.training == training
    return caught.value


X = torch.linspace(-1, 2, 24).reshape(3, 8)


def test_a_model_without_residuals_is_refused() -> None:
    model = NoResidual()
    assert_refused(model, X, RewriteError, "no residual add")
    assert not hasattr(model, "mhc")


def test_a_refusal_lists_the_adds_that_were_considered() -> None:
    model, inputs = small_model("decoys")
    error = assert_refused(model, inputs, RewriteError, "no residual add")
    assert "Refused:" in str(error) and "models.py:" in str(error)


def test_a_module_of_integers_is_refused() -> None:
    assert_refused(IntegersOnly(), torch.arange(12).reshape(3, 4), RewriteError, "adds no two float tensors")


def test_a_graph_break_is_named_with_its_line() -> None:
    error = assert_refused(BranchesOnData(), X, CaptureError, "one graph")
    assert "test_convert.py" in error.line and "if x.sum() > 0" in error.line
    number = int(error.line.split(":")[1])
    assert "a graph break" in Path(__file__).read_text().splitlines()[number - 1]


def test_a_taken_name_is_refused() -> None:
    assert_refused(OwnsTheName(), X, RewriteError, "'mhc'")


def test_example_inputs_of_a_wrong_type() -> None:
    assert_refused(BranchesOnData(), 3, ConfigError, "example_inputs")


def test_example_inputs_that_forward_does_not_take() -> None:
    model, _ = small_model("parallel")
    assert_refused(model, {"y": X}, Exception, "y")


def test_a_model_is_converted_once() -> None:
    model, inputs = small_model("parallel")
    convert(model, inputs)
    expected = first_float(model(**inputs))
    assert_refused(model, inputs, RewriteError, "converted already")
    assert torch.equal(first_float(model(**inputs)), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(n=0), "n is 0"),
        (dict(n=-1), "n is -1"),
        (dict(n=True), "n is True"),
        (dict(n=2.0), "n is 2.0"),
        (dict(n=65), "n is 65"),
        (dict(streams=4), "'streams'"),
        (dict(init="zeros"), "'zeros'"),
        (dict(backend="mhc"), "'mhc'"),
        (dict(iterations=0), "iterations is 0"),
        (dict(eps=0.0), "eps is 0.0"),
        (dict(eps=float("nan")), "eps is nan"),
        (dict(tie_shared=1), "tie_shared is 1"),
        (dict(n=4, config=MHCConfig()), "config"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    model, inputs = small_model("parallel")
    error = assert_refused(model, inputs, ConfigError, match, **options)
    assert "legal:" in str(error)
    assert isinstance(error, ValueError)


def test_a_call_that_runs_other_sites_than_the_converted_one_is_an_error() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, both: bool = True) -> Tensor:
            x = x + self.one(x)
            return x + self.two(x) if both else x

    model = mhc_compile(Optional(), n=4, backend="eager", example_inputs=(X,))
    model(X)
    with pytest.raises(RewriteError, match="two"):
        model(X, both=False)


def test_no_module() -> None:
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
        mhc_compile(torch.tanh, n=4, example_inputs=X)  # type: ignore[arg-type]
