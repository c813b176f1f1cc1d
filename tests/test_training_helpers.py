"""AdaptiveClip and scale_updates against what their formulas give by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphs import randomize
from mhc_compile import AdaptiveClip, mhc_compile, param_groups, scale_updates
from mhc_compile.gradients import split
from misuses import X, net


@pytest.fixture(scope="module")
def model() -> Iterator[nn.Module]:
    """One converted model; nothing here runs it: gradients are set by hand."""
    made = mhc_compile(net(), 3, backend="eager", example_inputs=X)
    randomize(made)
    yield made
    torch._dynamo.reset()


def set_gradients(model: nn.Module, own: float, mhc: float, seed: int = 0) -> None:
    """Random gradients of these norms."""
    generator = torch.Generator().manual_seed(seed)
    parts = split(model)
    for parameters, size in ((parts.own, own), (parts.mhc, mhc)):
        grads = [torch.randn(one.shape, generator=generator) for one in parameters]
        length = torch.cat([grad.flatten() for grad in grads]).norm()
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad * (size / length)


def norms(model: nn.Module) -> tuple[float, float]:
    parts = split(model)
    own, mhc = (
        float(torch.cat([one.grad.flatten() for one in group if one.grad is not None]).norm())
        for group in (parts.own, parts.mhc)
    )
    return own, mhc


def by_hand(sequence: list[tuple[float, float]], momentum: float, factor: float, warm_up: int) -> list[list[float]]:
    """Norms after clipping by the rule, in plain floats; max_norm 1."""
    averages, result = [math.inf, math.inf], []
    for step, sizes in enumerate(sequence):
        after = []
        for group, size in enumerate(sizes):
            warming = step < warm_up
            limit = size / math.hypot(*sizes) if warming else factor * averages[group]
            clipped = min(size, limit) if not warming or math.hypot(*sizes) > 1 else size
            first = math.isinf(averages[group])
            averages[group] = clipped if first else momentum * averages[group] + (1 - momentum) * clipped
            after.append(clipped)
        result.append(after)
    return result


SIZES = st.lists(st.tuples(*[st.floats(0.01, 100)] * 2), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(SIZES, st.floats(0, 0.99), st.floats(0.5, 3), st.integers(0, 4))
def test_clipping_follows_its_rule_for_two_groups(
    model: nn.Module, sizes: list[tuple[float, float]], momentum: float, factor: float, warm_up: int
) -> None:
    clip = AdaptiveClip(model, momentum, factor, warm_up=warm_up)
    for step, (right, given_sizes) in enumerate(
        zip(by_hand(sizes, momentum, factor, warm_up), sizes, strict=True)
    ):
        set_gradients(model, *given_sizes, seed=step)
        seen = clip()
        assert (seen.own.item(), seen.mhc.item()) == pytest.approx(given_sizes, rel=1e-4)
        assert norms(model) == pytest.approx(right, rel=1e-4)
        scales = [a / b for a, b in zip(right, given_sizes, strict=True)]
        assert [seen.own_scale.item(), seen.mhc_scale.item()] == pytest.approx(scales, rel=1e-4)


def test_a_spike_of_mhc_is_clipped_alone_and_keeps_its_direction(model: nn.Module) -> None:
    clip = AdaptiveClip(model, warm_up=3, max_norm=1000.0)
    for step in range(5):
        set_gradients(model, 100.0, 0.1, seed=step)
        clip()
    set_gradients(model, 100.0, 5.0)  # in the norm of all, 100.0 becomes 100.1
    before = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    seen = clip()
    assert seen.own_scale.item() == 1 and seen.mhc_scale.item() == pytest.approx(2 * 0.1 / 5, rel=1e-3)
    held = {id(one) for one in split(model).mhc}
    for parameter, old in zip(model.parameters(), before, strict=True):
        scale = seen.mhc_scale if id(parameter) in held else 1.0
        assert torch.allclose(parameter.grad, old * scale, rtol=1e-5, atol=0)  # type: ignore[arg-type]
    assert torch.equal(before[0], next(model.parameters()).grad)  # type: ignore[arg-type]


def test_clipping_goes_on_after_a_restart(model: nn.Module) -> None:
    clip = AdaptiveClip(model, warm_up=2)
    for step in range(3):
        set_gradients(model, 3.0 + step, 1.0)
        clip()
    state = copy.deepcopy(clip.state_dict())
    again = AdaptiveClip(model, warm_up=2)
    again.load_state_dict(state)
    results = []
    for one in (clip, again):
        set_gradients(model, 50.0, 50.0)
        results.append(one())
    assert results[0].own_scale == results[1].own_scale < 1
    assert state["steps"] == 3 and clip.state_dict()["steps"] == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("warm_up", [0, 9])
def test_norms_that_are_no_measure_change_nothing(model: nn.Module, bad: float, warm_up: int) -> None:
    clip = AdaptiveClip(model, warm_up=warm_up)
    set_gradients(model, 0.5, 0.5)
    clip()
    before = clip.state_dict()
    set_gradients(model, 0.5, 0.5)
    parameter = split(model).mhc[0]
    if bad:
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] = bad
    else:
        for one in split(model).mhc:
            one.grad = None
    old = [one.grad.clone() for one in split(model).mhc if one.grad is not None]
    clip()
    assert clip.state_dict()["mhc"] == before["mhc"]
    new = [one.grad for one in split(model).mhc if one.grad is not None]
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(old, new, strict=True))


# ---------------------------------------------------------------------------------------------- scale_updates

SCALES = {"pre": 0.5, "post": 0.0, "res": 3.0}

Build = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "sgd with momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1),
    "adam, foreach": lambda groups: torch.optim.Adam(groups, lr=0.1, foreach=True, amsgrad=True),
}


def parts(tensor: Tensor, n: int) -> list[Tensor]:
    """The pre, post and res parts of a phi, alpha or bias."""
    sizes = [1, 1, 1] if tensor.shape == (3,) else [n, n, n * n]
    return list(tensor.split(sizes, -1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_part_steps_as_a_tensor_with_its_own_learning_rate(model: nn.Module, name: str) -> None:
    """The other way: every part is a parameter of its own, in a group with the scaled learning rate."""
    model = copy.deepcopy(model)
    mhc = split(model).mhc
    by_part: list[list[nn.Parameter]] = [[], [], []]
    for parameter in mhc:
        for group, part in zip(by_part, parts(parameter.detach(), 3), strict=True):
            group.append(nn.Parameter(part.clone()))
    build = OPTIMIZERS[name]
    ours = build([{"params": group["params"]} for group in param_groups(model)])
    lr = ours.defaults["lr"]
    theirs = build([{"params": p, "lr": lr * s} for p, s in zip(by_part, SCALES.values(), strict=True)])
    own = [parameter.detach().clone() for parameter in split(model).own]
    scale_updates(ours, model, **SCALES)
    for step in range(3):
        set_gradients(model, 1.0, 1.0, seed=step)
        for number, parameter in enumerate(mhc):
            assert parameter.grad is not None
            for group, grad in zip(by_part, parts(parameter.grad, 3), strict=True):
                group[number].grad = grad.clone()
        ours.step()
        theirs.step()
    for number, parameter in enumerate(mhc):
        right = torch.cat([group[number] for group in by_part], -1)
        assert torch.allclose(parameter, right, rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(a, b) for a, b in zip(own, split(model).own, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.floats(0, 4)] * 3), st.integers(0, 1000))
def test_one_step_by_hand(model: nn.Module, scales: tuple[float, float, float], seed: int) -> None:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(param_groups(model), lr=0.25)
    scale_updates(optimizer, model, pre=scales[0], post=scales[1], res=scales[2])
    set_gradients(model, 1.0, 1.0, seed)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        step = -0.25 * parameter.grad
        if name.startswith("mhc."):
            step = torch.cat([part * scale for part, scale in zip(parts(step, 3), scales, strict=True)], -1)
        elif parameter.dim() >= 2:
            step = step - 0.25 * 0.01 * before[name]
        assert torch.allclose(parameter, before[name] + step, rtol=1e-5, atol=1e-6), name


def test_scales_of_one_and_zero_are_exact_and_can_be_taken_off(model: nn.Module) -> None:
    scaled, plain = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(param_groups(one), lr=1e-2) for one in (scaled, plain)]
    handle = scale_updates(optimizers[0], scaled, res=0.0)
    for optimizer, one in zip(optimizers, (scaled, plain), strict=True):
        set_gradients(one, 1.0, 1.0)
        optimizer.step()
    for a, b, start in zip(split(scaled).mhc, split(plain).mhc, split(model).mhc, strict=True):
        assert [torch.equal(x, y) for x, y in zip(parts(a, 3), parts(b, 3), strict=True)] == [True, True, False]
        assert torch.equal(parts(a, 3)[2], parts(start, 3)[2])
    handle.remove()
    before = [one.detach().clone() for one in split(scaled).mhc]
    optimizers[0].step()
    assert all(not torch.equal(parts(a, 3)[2], parts(b, 3)[2]) for a, b in zip(before, split(scaled).mhc, strict=True))
