"""What a dropped conversion leaves behind: nothing that grows."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.guards import CheckFunctionManager
from torch._subclasses.fake_tensor import FakeTensor

import mhc_compile
from mhc_compile import (
    Backend,
    cost_model,
    explain,
    history,
    observe,
    partition,
    recompute,
    restore,
    set_iterations,
    stage_modules,
    trace,
    verify,
)

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(self.norm(x)))


def net() -> nn.Module:
    return nn.Sequential(Block(), Block())


def converted(backend: str) -> nn.Module:
    return mhc_compile.mhc_compile(net(), n=4, example_inputs=X, backend=backend)


def step(model: nn.Module) -> nn.Module:
    model(X).sum().backward()
    return model


def live() -> tuple[int, int]:
    """The graph modules and the fake tensors that are alive."""
    gc.collect()
    kinds = [type(one) for one in gc.get_objects()]
    return sum(issubclass(kind, fx.GraphModule) for kind in kinds), sum(kind is FakeTensor for kind in kinds)


def after_each(rounds: int, run: Callable[[int], object]) -> list[tuple[int, int]]:
    found = []
    for number in range(rounds):
        run(number)
        found.append(live())
    return found


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_dropped_conversion_leaves_nothing(backend: str) -> None:
    found = after_each(4, lambda _: step(converted(backend)))
    assert found[1] == found[2] == found[3]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_restored_and_converted_again_leaves_nothing(backend: str) -> None:
    """Nor with gradients on the parameters, whose fake ones torch itself never frees."""
    model = net()

    def run(_: int) -> None:
        restore(step(mhc_compile.mhc_compile(model, n=4, example_inputs=X, backend=backend)))

    found = after_each(4, run)
    assert found[1] == found[2] == found[3]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inputs_that_are_views_leave_nothing(backend: str) -> None:
    """torch itself frees no fake tensor of a graph one of whose inputs is a view."""
    model, view = net(), X[:1]

    def run(_: int) -> None:
        mhc_compile.mhc_compile(model, n=4, example_inputs=view, backend=backend)(view).sum().backward()
        restore(model)

    found = after_each(4, run)
    assert found[1] == found[2] == found[3]


def test_guards_go_with_what_they_guard() -> None:
    """torch keeps those of each compilation as long as the classes and functions that they compare with live."""

    def guards() -> int:
        gc.collect()
        return sum(type(one) is CheckFunctionManager for one in gc.get_objects())

    found = []
    for _ in range(4):
        step(converted("eager"))
        found.append(guards())
    assert found[1] == found[2] == found[3]


LOOKS: list[Any] = [explain, verify, trace, observe, cost_model, partition]


@pytest.mark.parametrize("x", [X, X[:1]], ids=["", "a view"])
@pytest.mark.parametrize("look", LOOKS, ids=lambda look: str(look.__name__))
def test_looking_leaves_nothing(look: Callable[[nn.Module, Tensor], object], x: Tensor) -> None:
    model = step(converted("eager"))
    found = after_each(4, lambda _: look(model, x))
    assert found[2] == found[3]


def test_iterations_that_come_back_leave_nothing() -> None:
    model = converted("aot_eager")
    found = after_each(5, lambda number: step(set_iterations(model, 1 + number % 2)))
    assert found[2] == found[3] == found[4]


def test_recomputation_that_is_switched_leaves_nothing() -> None:
    model = converted("eager")
    found = after_each(6, lambda number: step(recompute(model, (None, 1)[number % 2])))
    assert found[2] == found[4] and found[3] == found[5]


def test_stages_that_are_dropped_leave_nothing() -> None:
    model = step(converted("eager"))

    def run(_: int) -> None:
        plan = partition(model, X, stages=2, microbatches=2)
        first, second = stage_modules(plan, model, X, backend="aot_eager")
        second(*first(X)).sum().backward()

    found = after_each(4, run)
    assert found[1] == found[2] == found[3]


def test_an_interpreter_that_ends_says_nothing() -> None:
    """With models alive, converted and not yet, and a Backend's."""
    code = """
import torch
from test_lifetime import X, converted, net, step
from mhc_compile import Backend, mhc_compile
kept = [step(converted("aot_eager")), mhc_compile(net(), n=4)]
kept.append(step(torch.compile(net(), backend=Backend(n=4, backend="eager"))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    # nanobind speaks of what triton 3.9 leaves
    said = [line for line in done.stderr.splitlines() if "nanobind" not in line and not line.startswith(" - ")]
    assert done.returncode == 0 and said == []


def test_records_go_with_what_was_compiled() -> None:
    model = step(converted("aot_eager"))
    count = len(history(model))
    for sites in (1, 2, 1, 2):
        step(recompute(model, sites))
        assert len(history(model)) == count + 1  # "recompute" itself


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_backward_outlives_its_model(backend: str) -> None:
    model = converted(backend)
    plain_input = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(plain_input).sum(), plain_input)
    output = model(plain_input).sum()  # its backward has not run
    del model
    gc.collect()
    (found,) = torch.autograd.grad(output, plain_input)
    assert torch.equal(found, expected)


def test_a_backend_lets_go_of_a_dropped_model() -> None:
    def run(_: int) -> None:
        step(torch.compile(net(), backend=Backend(n=4, backend="eager"), fullgraph=True))

    found = after_each(4, run)
    assert [graphs for graphs, _ in found[1:]] == [found[0][0]] * 3


def test_a_class_of_a_function_goes_with_its_models() -> None:
    def made() -> weakref.ref[type]:
        class Local(nn.Sequential):
            pass

        models = [Local(Block(), Block()) for _ in range(2)]
        for model in models:
            mhc_compile.mhc_compile(model, n=4, backend="eager")  # at its first call: Dynamo keeps classes that it saw
        assert type(models[0]) is type(models[1]) is not Local
        return weakref.ref(Local)

    local = made()
    gc.collect()
    assert local() is None


def test_a_model_is_dropped_while_another_thread_calls_it() -> None:
    """And copies go on: each has a compilation of its own."""
    models = [converted("aot_eager")]
    expected = models[0](X).detach()
    copied = copy.deepcopy(models[0])
    calls = [models[0].forward]
    started, outputs = threading.Event(), list[Tensor]()

    def many() -> None:
        for _ in range(200):
            outputs.append(calls[0](X).detach())
            started.set()

    thread = threading.Thread(target=many)
    thread.start()
    assert started.wait(60)
    models.clear()
    gc.collect()
    thread.join()
    assert len(outputs) == 200 and all(torch.equal(output, expected) for output in outputs)
    calls.clear()
    gc.collect()
    assert torch.equal(copied(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(copied))(X), expected)
