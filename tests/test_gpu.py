"""Converted models on a CUDA device: they run on the Triton kernels, and compute what the CPU computes."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from graphs import float_outputs, zoo_model
from mhc_compile import HyperConnection, high_priority_merges, mhc_compile
from mhc_compile.kernels import priority

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _fresh_compilations() -> Any:
    yield
    torch._dynamo.reset()


def converted(backend: str) -> tuple[Any, dict[str, Any]]:
    """A Llama with random sites, in float32 on the CPU, and a call of it."""
    torch.manual_seed(0)
    model, inputs = zoo_model("llama")
    model = mhc_compile(model, n=4, example_inputs=inputs, backend=backend)
    with torch.no_grad():
        for parameter in model.mhc.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, inputs


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    return float_outputs(model(**inputs))[0]


def on_cuda(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_on_the_cpu(backend: str, dtype: torch.dtype) -> None:
    from mhc_compile.kernels.triton_launch import record

    model, inputs = converted(backend)
    right = logits(model, inputs).detach()
    model, inputs = model.to("cuda", dtype), on_cuda(inputs)
    with record() as launches:
        found = logits(model, inputs)
        found.float().square().mean().backward()
    names = {launch.name for launch in launches}
    assert {"merge_project", "finish", "merge_backward", "coefficients_backward", "streams_backward"} <= names
    # The last site alone is by itself: the backward of the others crosses their borders.
    counts, sites = Counter(launch.name for launch in launches), [*model.mhc.modules()]
    assert counts["merge_backward"] == 1
    assert counts["products"] == sum(isinstance(site, HyperConnection) for site in sites) - 1
    limit = 5e-2 if dtype == torch.bfloat16 else 1e-4
    assert (found.detach().float().cpu() - right).abs().max() <= limit * right.abs().max()


def test_gradients_are_the_same_bits_each_time() -> None:
    model, inputs = converted("eager")
    model, inputs = model.to("cuda", torch.bfloat16), on_cuda(inputs)
    runs = []
    for _ in range(5):
        model.zero_grad()
        logits(model, inputs).float().square().mean().backward()
        runs.append({name: copy.copy(p.grad) for name, p in model.mhc.named_parameters()})
    for run in runs[1:]:
        for name, grad in run.items():
            assert grad is not None and torch.equal(grad, runs[0][name]), name


def test_cuda_graphs() -> None:
    """A few tokens, as in decoding, replayed: one recording for the whole model."""
    model, inputs = converted("inductor")
    model = model.to("cuda", torch.bfloat16).eval()
    few = {**on_cuda(inputs), "input_ids": inputs["input_ids"][:1, :1].cuda()}
    with torch.no_grad():
        right = logits(model, few).clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits(model, few)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = logits(model, few)
        graph.replay()
    assert torch.equal(found, right)


def run_of(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Logits and all gradients."""
    model.zero_grad()
    found = logits(model, inputs)
    found.float().square().mean().backward()
    return [found.detach(), *(copy.copy(p.grad) for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_merges_of_high_priority_are_the_same_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a stream of large products, and with the blocks that the allocator gets back used again at once."""
    asked = []
    high_stream = priority.high_stream
    monkeypatch.setattr(priority, "high_stream", lambda device: asked.append(device) or high_stream(device))
    model, inputs = converted(backend)
    model, inputs = model.to("cuda", torch.bfloat16), on_cuda(inputs)
    expected = run_of(model, inputs)
    assert not asked
    high_priority_merges(model, "*.mlp")
    busy, large = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    busy.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(busy):
            for _ in range(20):
                large @ large
        found = run_of(model, inputs)
        assert len(found) == len(expected) and all(map(torch.equal, expected, found))
    assert asked and high_stream(asked[0]).priority < torch.cuda.current_stream().priority
    torch.cuda.synchronize()


def test_merges_of_high_priority_in_a_cuda_graph() -> None:
    model, inputs = converted("eager")
    model, inputs = model.to("cuda", torch.bfloat16).eval(), on_cuda(inputs)
    with torch.no_grad():
        expected = logits(model, inputs).clone()
        high_priority_merges(model, "*")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits(model, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = logits(model, inputs)
        for _ in range(3):
            graph.replay()
    assert torch.equal(found, expected)
