"""What a dropped conversion leaves behind: nothing that grows."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

import mhc_compile
from mhc_compile import explain, history, observe, recompute, restore, set_iterations, trace, verify

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
def test_restored_and_converted_again_leaves_no_graph(backend: str) -> None:
    model = net()

    def run(_: int) -> None:
        restore(step(mhc_compile.mhc_compile(model, n=4, example_inputs=X, backend=backend)))

    found = after_each(4, run)
    assert found[1][0] == found[2][0] == found[3][0]


@pytest.mark.parametrize("look", [explain, verify, trace, observe], ids=lambda look: str(look.__name__))
def test_looking_leaves_nothing(look: Callable[[nn.Module, Tensor], object]) -> None:
    model = converted("eager")
    found = after_each(4, lambda _: look(model, X))
    assert found[2] == found[3]


def test_iterations_that_come_back_leave_nothing() -> None:
    model = converted("aot_eager")
    found = after_each(5, lambda number: step(set_iterations(model, 1 + number % 2)))
    assert found[2] == found[3] == found[4]


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
