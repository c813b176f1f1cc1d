"""A converted model reached in unusual ways gives its mHC output or an error, never the plain output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from graphs import float_outputs, is_float, randomize, small_model, zoo_model
from hf_pairs import BUILD, zoo_inputs
from mhc_compile import ExportError, RewriteError, ShapeError, mhc_compile, trace
from mhc_compile.example_inputs import derive

pytestmark = [
    # torch announces the end of TorchScript at every use
    pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace_method`:DeprecationWarning"),
    # it reads every attribute of a model, also those that transformers deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SMALL = "parallel"
# A Hugging Face model takes dictionaries through the same code; it is slower, and so is inductor.
WAYS = [(SMALL, "eager"), (SMALL, "inductor"), ("gpt2", "eager")]
INLINED = "cannot be inlined"

TESTS = Path(__file__).parent
TOLERANCE = 1e-5  # of the largest value: the inner model is compiled by itself, whatever compiles around it
FAR = 1e-3


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    """Compiled frames of one test must not steer another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Converted:
    """A converted model with random mHC weights, its inputs, its output and the plain model's output."""

    def __init__(self, name: str, backend: str = "eager") -> None:
        self.model, self.inputs = small_model(name) if name == SMALL else (BUILD[name](), zoo_inputs(name))
        with torch.no_grad():
            self.plain = first_float(self.model(**self.inputs))
            mhc_compile(self.model, n=4, backend=backend, example_inputs=self.inputs)
            randomize(self.model)
            self.expected = first_float(self.model(**self.inputs))
        assert distance(self.plain, self.expected) > FAR, "the test could not tell mHC from the plain model"

    def check(self, output: Any) -> None:
        """The output is that of the converted model, and not that of the plain one."""
        actual = first_float(output)
        assert distance(actual, self.plain) > FAR, "the plain model ran"
        assert distance(actual, self.expected) <= TOLERANCE * self.expected.abs().max().item()


def first_float(output: Any) -> Tensor:
    return float_outputs(output)[0].detach().clone()


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def mhc_or_error(converted: Converted, call: Callable[[], Any], error: str) -> None:
    """The call gives the mHC output, or raises with a message that matches `error`."""
    try:
        output = call()
    except Exception as raised:
        assert re.search(error, str(raised)), f"{type(raised).__name__}: {raised}"
        return
    converted.check(output)


# --------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(("name", "backend"), WAYS)
def test_outer_compile(name: str, backend: str) -> None:
    converted = Converted(name)
    converted.check(torch.compile(converted.model, backend=backend)(**converted.inputs))


def test_outer_compile_after_a_call_in_another_mode() -> None:
    converted = Converted(SMALL)
    outer = torch.compile(converted.model, backend="eager")
    outer(**converted.inputs)
    converted.model.train()
    converted.model(**converted.inputs)
    converted.model.eval()
    converted.check(outer(**converted.inputs))


@pytest.mark.parametrize(("name", "backend"), WAYS)
def test_outer_compile_of_one_graph(name: str, backend: str) -> None:
    converted = Converted(name)
    outer = torch.compile(converted.model, backend=backend, fullgraph=True)
    mhc_or_error(converted, lambda: outer(**converted.inputs), INLINED)


@pytest.mark.parametrize(("name", "backend"), WAYS)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_inside_a_compiled_function(name: str, backend: str, fullgraph: bool) -> None:
    converted = Converted(name)

    @torch.compile(backend=backend, fullgraph=fullgraph)
    def step(inputs: dict[str, Any]) -> Any:
        doubled = {key: value * 2 if is_float(value) else value for key, value in inputs.items()}
        halved = {key: value / 2 if is_float(value) else value for key, value in doubled.items()}
        return converted.model(**halved)

    if fullgraph:
        mhc_or_error(converted, lambda: step(converted.inputs), INLINED)
    else:
        converted.check(step(converted.inputs))


class Wrapper(nn.Module):
    """A module around the converted one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_submodule_of_a_compiled_module(fullgraph: bool) -> None:
    converted = Converted(SMALL)
    outer = torch.compile(Wrapper(converted.model), backend="eager", fullgraph=fullgraph)
    if fullgraph:
        mhc_or_error(converted, lambda: outer(**converted.inputs), INLINED)
    else:
        converted.check(outer(**converted.inputs))


def test_compiled_in_place() -> None:
    converted = Converted(SMALL)
    converted.model.compile(backend="eager")
    converted.check(converted.model(**converted.inputs))


def test_an_outer_compile_trains_the_sites() -> None:
    converted = Converted(SMALL)
    outer = torch.compile(converted.model, backend="eager")
    float_outputs(outer(**converted.inputs))[0].square().sum().backward()
    for key, parameter in converted.model.mhc.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


def test_the_inductor_backend_of_the_conversion_agrees_with_eager() -> None:
    converted = Converted(SMALL, backend="inductor")
    reference = Converted(SMALL)
    converted.check(reference.expected)


# ---------------------------------------------------------------------------------------- torch.export


@pytest.mark.parametrize(("name", "called_before"), [(SMALL, True), (SMALL, False), ("gpt2", True)])
@pytest.mark.parametrize("strict", [False, True])
def test_export(name: str, called_before: bool, strict: bool) -> None:
    converted = Converted(name)
    if not called_before:
        torch._dynamo.reset()

    def call() -> Any:
        program = torch.export.export(converted.model, (), converted.inputs, strict=strict)
        return program.module()(**converted.inputs)

    mhc_or_error(converted, call, f"would give the plain model|{INLINED}")


def test_export_names_the_way_out() -> None:
    converted = Converted(SMALL)
    with pytest.raises(ExportError, match=r"mhc_compile\.trace"):
        torch.export.export(converted.model, (), converted.inputs, strict=False)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_wrapper(strict: bool) -> None:
    converted = Converted(SMALL)

    def call() -> Any:
        program = torch.export.export(Wrapper(converted.model), (), converted.inputs, strict=strict)
        return program.module()(**converted.inputs)

    mhc_or_error(converted, call, f"would give the plain model|{INLINED}")


# ------------------------------------------------------------------------------------------- no Dynamo


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "fail_on_recompile"])
@pytest.mark.parametrize("called_before", [False, True])
def test_stances(stance: str, called_before: bool) -> None:
    converted = Converted(SMALL)
    if not called_before:
        torch._dynamo.reset()
    with torch.compiler.set_stance(stance), torch.no_grad():
        run = lambda: converted.model(**converted.inputs)  # noqa: E731
        mhc_or_error(converted, run, "not rewritten|fail_on_recompile")


@pytest.mark.parametrize("name", [SMALL, "gpt2"])
def test_force_eager_raises(name: str) -> None:
    converted = Converted(name)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RewriteError, match="not rewritten"):
        converted.model(**converted.inputs)


def test_dynamo_disabled_for_a_region() -> None:
    converted = Converted(SMALL)
    run = torch.compiler.disable(lambda: converted.model(**converted.inputs))
    mhc_or_error(converted, run, "not rewritten")


SWITCHED_OFF = """
import torch
from graphs import small_model
from mhc_compile import mhc_compile
model, inputs = small_model("parallel")
try:
    mhc_compile(model, n=4, backend="eager", example_inputs=inputs)
    torch._dynamo.config.disable = True
    model(**inputs)
except Exception as error:
    print("raised", type(error).__name__, str(error).splitlines()[0])
else:
    print("ran")
"""


def _python(source: str, **environment: str) -> str:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchdynamo_disable() -> None:
    """Neither converts in silence nor runs the plain model."""
    assert "raised" in _python(SWITCHED_OFF, TORCHDYNAMO_DISABLE="1")


def test_dynamo_switched_off_after_the_conversion() -> None:
    assert "raised RewriteError" in _python(SWITCHED_OFF)


# --------------------------------------------------------------------------------------- other tracers


@pytest.mark.parametrize("name", [SMALL, "gpt2"])
def test_jit_trace(name: str) -> None:
    converted = Converted(name)

    def call() -> Any:
        traced = torch.jit.trace(
            converted.model, example_kwarg_inputs=converted.inputs, strict=False, check_trace=False
        )
        return traced(**converted.inputs)

    mhc_or_error(converted, call, "trace")


def test_symbolic_trace() -> None:
    converted = Converted(SMALL)

    def call() -> Any:
        return torch.fx.symbolic_trace(converted.model)(**converted.inputs)

    mhc_or_error(converted, call, "trac|Proxy|not rewritten")


def test_make_fx() -> None:
    converted = Converted(SMALL)
    x = converted.inputs["x"]
    mhc_or_error(converted, lambda: make_fx(converted.model)(x)(x), "trac|Proxy|not rewritten")


def test_functional_call_uses_the_given_weights() -> None:
    converted = Converted(SMALL)
    state = {key: value.clone() for key, value in converted.model.state_dict().items()}
    with torch.no_grad():
        output = torch.func.functional_call(converted.model, state, (), converted.inputs)
    converted.check(output)
    moved = {key: value + 0.5 if key.startswith("mhc.") else value for key, value in state.items()}
    with torch.no_grad():
        other = first_float(torch.func.functional_call(converted.model, moved, (), converted.inputs))
    assert distance(other, converted.expected) > FAR


def test_forward_and_hooks_run_once_a_call() -> None:
    converted = Converted(SMALL)
    seen: list[str] = []
    converted.model.register_forward_hook(lambda *_: seen.append("hook"))
    converted.check(converted.model(**converted.inputs))
    assert seen == ["hook"]
    converted.check(converted.model.forward(**converted.inputs))
    assert seen == ["hook"]


def test_a_traced_model_takes_its_inputs_by_name() -> None:
    """Whatever their order: once, the order in which they were named decided which was which, in silence.

    Nothing in its graph is there for torch.export's assertions alone: the streams are read out once, at their end.
    """
    model, inputs = zoo_model("llama")
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    given = {"input_ids": inputs["input_ids"], "use_cache": False, "attention_mask": mask}
    mhc_compile(model.eval(), n=2, backend="eager", example_inputs=given)
    randomize(model)
    assert derive(model, cached=False)["use_cache"] is False, "what it is traced with where no inputs are given"
    traced = trace(model, given)
    targets = [node.target for node in traced.graph_module.graph.nodes]
    assert targets.count(torch.ops.mhc.readout.default) == 1
    assert torch.ops.aten._assert_tensor_metadata.default not in targets
    right = float_outputs(traced(**given))[0]
    assert torch.equal(float_outputs(traced(**dict(reversed(given.items()))))[0], right)
    assert torch.equal(float_outputs(traced(given["input_ids"], attention_mask=mask, use_cache=False))[0], right)
    with pytest.raises(ShapeError, match="the inputs is input_ids, use_cache, position_ids; legal: input_ids"):
        traced(input_ids=given["input_ids"], use_cache=False, position_ids=mask)
