"""Merges on a stream of high priority: which ops are marked, and the fork and join around each of their launches.

The streams here are fakes that write down what is asked of them; on a CUDA device: tests/test_gpu.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphs import assert_bitwise, result_of
from mhc_compile import (
    ConfigError,
    convert,
    high_priority_merges,
    history,
    mhc_compile,
    partition,
    pipeline,
    pipeline_stages,
)
from mhc_compile.conversion import conversion
from mhc_compile.kernels import cross_site_ops, plain, priority, site_ops, site_plain
from mhc_compile.kernels.convention import PAPER, Before
from mhc_compile.kernels.priority import on_high_priority
from misuses import Net, X, process_group

mhc = torch.ops.mhc


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- launches


class Stream:
    """Writes down what waits for it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of launches, allocations and streams, on a device that is not there."""
    log: list[str] = []
    now = [Stream("current", log)]
    high = Stream("high", log)

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        now.append(chosen)
        yield
        now.pop()

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        log.append(f"allocated on {now[-1].name}")
        return allocate(*args, **kwargs)

    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(priority, "high_stream", lambda device: high)
    jit = pytest.importorskip("triton").runtime.JITFunction
    from mhc_compile.kernels import triton_launch

    def launched(**given: Any) -> None:
        log.append(f"launched on {now[-1].name}")

    monkeypatch.setattr(jit, "__getitem__", lambda self, grid: launched)
    monkeypatch.setattr(triton_launch, "check_device", lambda tensor, name: None)
    monkeypatch.setattr(triton_launch, "launching", lambda device: priority.launching(0))
    return log


FORK, LAUNCH, JOIN = "high waits for current", "launched on high", "current waits for high"


def kernels() -> dict[str, Callable[[], Any]]:
    """Calls of what a merge of high priority may run, forward and backward."""
    from mhc_compile.kernels import triton_ops

    n, features, tokens = 4, 64, 8

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    parameters = made(n * features, n * n + 2 * n), made(3), made(n * n + 2 * n)
    streams, f = made(tokens, n, features, dtype=torch.bfloat16), made(tokens, features, dtype=torch.bfloat16)
    pre, post, res = made(tokens, n), made(tokens, n), made(tokens, n, n)
    kept = (streams, *parameters, pre, post, res, made(n * n + 2 * n, tokens), made(tokens))
    grads = (f, None, post, res, streams)
    before = Before(post, False, torch.bfloat16)
    return {
        "merge": lambda: triton_ops.merge(streams, f, post, res),
        "merge backward": lambda: triton_ops.branch_backward(streams, streams, f, post, "given", False),
        "merge and read": lambda: triton_ops.merge_read(streams, f, post, res, False, False, parameters, PAPER),
        "backward of both": lambda: triton_ops.chain_backward(grads, f, streams, before, kept, PAPER, True),
        "merge and early read": lambda: triton_ops.merge_read_early(
            streams, f, post, res, False, False, pre, parameters, PAPER
        ),
    }


NAMES = ["merge", "merge backward", "merge and read", "backward of both", "merge and early read"]


@pytest.mark.parametrize("name", NAMES)
def test_every_launch_forks_and_joins_and_nothing_is_allocated_in_between(name: str, log: list[str]) -> None:
    call = kernels()[name]
    log.clear()
    with on_high_priority(True):
        call()
    marked, log[:] = log[:], []
    call()
    assert "allocated on current" in marked and "allocated on high" not in marked
    events = [event for event in marked if event != "allocated on current"]
    launches = events.count(LAUNCH)
    assert launches and events == [FORK, LAUNCH, JOIN] * launches
    places = [place for place, event in enumerate(marked) if event == FORK]
    assert all(marked[place : place + 3] == [FORK, LAUNCH, JOIN] for place in places)
    # The same launches without it, on the stream that was there, which nobody waits for.
    assert log == [event.replace("high", "current") for event in marked if event not in (FORK, JOIN)]


def test_a_launch_that_fails_is_joined(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mhc_compile.kernels import triton_launch

    def fail(**given: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(triton_launch.triton.runtime.JITFunction, "__getitem__", lambda self, grid: fail)
    with pytest.raises(RuntimeError, match="no"), on_high_priority(True):
        kernels()["merge"]()
    assert log[-2:] == [FORK, JOIN]


def test_what_the_interpreter_runs_has_no_stream(log: list[str]) -> None:
    with on_high_priority(True), priority.launching(-1):
        torch.empty(1)
    assert log == ["allocated on current"]


# ---------------------------------------------------------------------------------------------- ops


def merges() -> dict[str, Callable[[bool], list[Tensor]]]:
    """Outputs and gradients of each op that takes the argument."""
    torch.manual_seed(0)
    n, features = 2, 3
    streams, f, f2 = torch.randn(5, n, features), torch.randn(5, features), torch.randn(5, features)
    phi, alpha, bias = torch.randn(n * features, n * n + 2 * n), torch.randn(3), torch.randn(n * n + 2 * n)

    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [tensor.clone().requires_grad_() for tensor in tensors]

    def run(op: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        given = leaves(*tensors)
        made = op(*given)
        return [made, *torch.autograd.grad(made.square().sum(), given)]

    def level_1(high: bool) -> list[Tensor]:
        post, res = torch.rand(5, n), torch.rand(5, n, n)
        torch.manual_seed(1)
        return run(lambda *given: mhc.merge(*given, high_priority=high), streams, f, post, res)

    def carried(high: bool) -> list[Tensor]:
        def site(x: Tensor, f: Tensor, *parameters: Tensor) -> Tensor:
            _, _, post, res, carrier = site_ops.read(x, *parameters, 1e-6, 3)
            return mhc.merge_carried(x, f, carrier, post, res, high_priority=high)  # type: ignore[no-any-return]

        return run(site, streams, f, phi, alpha, bias)

    def across(high: bool) -> list[Tensor]:
        def sites(x: Tensor, f: Tensor, f2: Tensor, *parameters: Tensor) -> Tensor:
            _, _, post, res, carrier = site_ops.read(x, *parameters, 1e-6, 3)
            given = (x, f, carrier, None, post, res, False, False, *parameters, 1e-6, 3)
            x, _, _, post, res, carrier, *_ = mhc.merge_read(*given, high_priority=high)
            return site_ops.merge_carried(x, f2, carrier, post, res)

        return run(sites, streams, f, f2, phi, alpha, bias)

    def early(high: bool) -> list[Tensor]:
        def sites(x: Tensor, f: Tensor, f2: Tensor, *parameters: Tensor) -> Tensor:
            _, pre, post, res, carrier = site_ops.read(x, *parameters, 1e-6, 3)
            given = (x, f, carrier, None, post, res, False, False, pre, *parameters, 1e-6, 3)
            x, u, _, post, res, carrier, *_ = mhc.merge_read_early(*given, high_priority=high)
            return site_ops.merge_carried(x, f2 + u, carrier, post, res)

        return run(sites, streams, f, f2, phi, alpha, bias)

    torch.manual_seed(1)
    return {"merge": level_1, "merge_carried": carried, "merge_read": across, "merge_read_early": early}


@pytest.mark.parametrize("name", ["merge", "merge_carried", "merge_read", "merge_read_early"])
def test_an_op_asks_for_it_and_its_backward_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def spied(module: Any, function: str) -> None:
        run = getattr(module, function)

        def spy(*args: Any, **kwargs: Any) -> Any:
            asked.append((function, priority._wanted.now))
            return run(*args, **kwargs)

        monkeypatch.setattr(module, function, spy)

    for function in ("merge", "merge_backward"):
        spied(plain, function)
    for function in ("merge", "branch_backward", "read_backward"):
        spied(site_plain, function)
    torch.manual_seed(1)
    expected = merges()[name](False)
    assert asked and not any(high for _, high in asked)
    usual, asked[:] = [function for function, _ in asked], []
    torch.manual_seed(1)
    actual = merges()[name](True)
    assert all(map(torch.equal, expected, actual))
    assert [function for function, _ in asked] == usual
    # Of two sites the first has it: its merge comes first in the forward, and its backward last.
    by_name = {kind: [high for function, high in asked if function == kind] for kind in usual}
    backward = "merge_backward" if name == "merge" else "branch_backward"
    assert by_name["merge"][0] and by_name[backward][-1]
    if name.startswith("merge_read"):
        assert not by_name["merge"][1] and not by_name[backward][0]
        # The backward of a single-pass read makes df of the merge too, in one op; the other's are two on a CPU.
        assert by_name["read_backward"] == [name == "merge_read_early", False]
    assert not priority._wanted.now


def test_the_fused_backward_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose kernels cross the border of two sites."""
    asked = []
    kept = [torch.randn(5, 2, 3), torch.randn(6, 8), torch.randn(3), torch.randn(8), torch.randn(5, 3)]

    def chain_backward(*given: Any) -> tuple[Tensor, ...]:
        asked.append(priority._wanted.now)
        return tuple(map(torch.clone, kept))

    monkeypatch.setattr(cross_site_ops, "crosses", lambda chosen, streams, mix: True)
    monkeypatch.setattr(
        cross_site_ops, "kernels", lambda streams, compiled: SimpleNamespace(chain_backward=chain_backward)
    )
    post, res = torch.rand(5, 2), torch.rand(5, 2, 2)
    given = (None,) * 7, *kept[:4], post, post, res, torch.rand(8, 5), torch.rand(5), post, False, torch.float32
    for high in (True, False):
        mhc.merge_read_backward(*given[0], *given[1:], 1e-6, 3, high_priority=high)
    assert asked == [True, False]


# ---------------------------------------------------------------------------------------------- models


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every device had streams."""
    monkeypatch.setattr(convert, "check_has_streams", lambda device: None)


def converted(**options: Any) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = mhc_compile(Net(), 4, **{"backend": "eager", "example_inputs": (X,), **options})
    with torch.no_grad():
        for parameter in model.mhc.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def marked(graph: fx.GraphModule) -> list[str]:
    """The ops with the argument."""
    return [node.target._opname for node in graph.graph.nodes if node.kwargs.get("high_priority")]


OPS = [
    ({"backend": "aot_eager"}, "first", ["merge_read"]),
    ({}, "second", ["merge_carried"]),
    ({}, "*", ["merge_read", "merge_carried"]),
    ({"recompute": 1}, "first", ["merge_carried"]),
    ({"constraint": "lite"}, ["second"], ["merge"]),
    ({"single_pass": True}, "*", ["merge_read_early", "merge_carried"]),
]


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(("options", "sites", "expected"), OPS, ids=lambda one: str(one))
def test_the_merges_of_the_chosen_sites_are_marked(options: dict[str, Any], sites: Any, expected: list[str]) -> None:
    model = converted(**options)
    before = result_of(lambda: model(X), dict(model.named_parameters()))
    assert not any(marked(record.graph) for record in history(model))
    assert high_priority_merges(model, sites) is model
    after = result_of(lambda: model(X), dict(model.named_parameters()))
    assert marked(history(model)[-1].graph) == expected
    assert "prioritize" in [record.name for record in history(model)]
    assert_bitwise(before, after)


@pytest.mark.usefixtures("anywhere")
def test_copies_have_it_and_all_sites_can_be_taken_back() -> None:
    model = high_priority_merges(converted(), "*")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(X)
        assert marked(history(other)[-1].graph) == ["merge_read", "merge_carried"]
    high_priority_merges(model, None)
    model(X)
    assert not marked(history(model)[-1].graph)


@pytest.mark.parametrize("sites", ["third", 3, lambda site: None])
@pytest.mark.usefixtures("anywhere")
def test_other_choices_are_refused(sites: Any) -> None:
    model = converted()
    with pytest.raises(ConfigError, match="sites"):
        high_priority_merges(model, sites)
    assert not conversion(model).high_priority


def test_stages_have_what_the_model_has_or_what_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anywhere: None
) -> None:
    model = high_priority_merges(converted(), "first")
    with process_group(tmp_path):
        plan = partition(model, X, stages=2, devices=1, microbatches=2, schedule="interleaved")
        assert [marked(stage.module.graph) for stage in pipeline_stages(plan, model, X)] == [["merge_carried"], []]
        with pytest.raises(ConfigError, match="the device of high-priority merges is cpu"):
            pipeline_stages(plan, model, X, high_priority_merges="second")
        monkeypatch.setattr(pipeline, "check_has_streams", lambda device: None)
        stages = pipeline_stages(plan, model, X, high_priority_merges="second")
        assert [marked(stage.module.graph) for stage in stages] == [[], ["merge_carried"]]
