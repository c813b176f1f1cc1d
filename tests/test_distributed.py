"""A converted model under DDP, FSDP2 and activation checkpointing is the same model, or is refused in words."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import distributed_worker
from distributed_worker import FAR, WORLD, batches, converted, distance, loss_of, plain, scramble
from graphs import float_outputs, zoo_model
from mhc_compile import mhc_compile

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_disable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TESTS = Path(__file__).parent
DEADLINE = 200.0  # seconds, for all checks of a group
GROUPS = {"replicated": ("ddp", "refused"), "sharded": ("fsdp",)}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------- two processes


def start(checks: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """The worker processes; each writes to its own log in the folder."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    started = []
    for rank in range(WORLD):
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, distributed_worker.__file__, *checks, str(rank), str(folder / "store")]
            environment = {**os.environ, "PYTHONPATH": path}
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True))
    return started


def run(checks: list[str], folder: Path) -> None:
    """Run checks in two processes; fails with their output when one fails or the time is over."""
    processes = start(checks, folder)
    end = time.monotonic() + DEADLINE
    try:
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break  # the other one would wait for it
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    logs = [(folder / f"{rank}.log").read_text()[-3000:] for rank in range(WORLD)]
    assert codes == [0] * WORLD, f"exit codes {codes}\n" + "\n--- the other process\n".join(logs)


@pytest.mark.slow
@pytest.mark.parametrize("group", list(GROUPS))
def test_two_processes(group: str, tmp_path: Path) -> None:
    run([check for kind in GROUPS[group] for check in distributed_worker.checks(kind)], tmp_path)


# ----------------------------------------------------------------------------- activation checkpointing


class Checkpointed(distributed_worker.Model):
    """Checkpoints its blocks by hand, with dropout that recomputation must repeat."""

    reentrant = False
    active = True

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.active else block(x)
        return self.head(self.norm(nn.functional.dropout(x, 0.2, self.training)))


def output_and_gradients(call: Callable[..., Any], model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(5)
    output = float_outputs(call(**inputs))[0]
    loss_of(output).backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert distance(actual[0], expected[0]) <= 1e-6
    assert actual[1].keys() == expected[1].keys() and any(name.startswith("mhc.") for name in expected[1])
    for name, gradient in expected[1].items():
        assert distance(actual[1][name], gradient) <= 1e-6, name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_checkpointed_by_hand(reentrant: bool, backend: str) -> None:
    ids = batches(1)[0]
    model = converted(Checkpointed, backend).train()
    model.reentrant = reentrant
    checkpointed = output_and_gradients(model, model, ids=ids)
    model.active = False
    expected = output_and_gradients(model, model, ids=ids)
    same(checkpointed, expected)
    torch.manual_seed(5)
    assert distance(plain(Checkpointed).train()(ids), expected[0]) > FAR


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["enable", "convert"])
@pytest.mark.cases(1)
def test_gradient_checkpointing_of_a_hugging_face_model(first: str, reentrant: bool) -> None:
    """With dropout on, switched on before the conversion or behind it."""
    model, inputs = zoo_model("gpt2")
    model.train()
    options = {"use_reentrant": reentrant}
    if first == "enable":
        model.gradient_checkpointing_enable(options)
    scramble(mhc_compile(model, n=4, backend="eager", example_inputs=inputs))
    if first == "convert":
        model.gradient_checkpointing_enable(options)
    assert model.is_gradient_checkpointing
    checkpointed = output_and_gradients(model, model, **inputs)
    model.gradient_checkpointing_disable()
    same(checkpointed, output_and_gradients(model, model, **inputs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_first_call(reentrant: bool, backend: str) -> None:
    """What compiling saves for a backward of its own must not count as saved by the call."""
    ids = batches(1)[0]
    model, reference = converted(backend=backend), converted(backend=backend)
    zero = torch.zeros((), requires_grad=True)  # the reentrant form needs an input that requires grad

    def call(ids: Tensor) -> Any:
        return checkpoint(lambda ids, zero: model(ids) + zero, ids, zero, use_reentrant=reentrant)

    same(output_and_gradients(call, model, ids=ids), output_and_gradients(reference, reference, ids=ids))


# --------------------------------------------------------------------------------- wrappers of submodules


def wrap_blocks(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for index, block in enumerate(model.layers):
        model.layers[index] = wrap(block)
    return model


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda block: torch.compile(block, backend="eager")])
def test_wrapped_blocks_keep_the_names_of_sites(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Wrappers that torch puts around a block may come before the conversion or behind it."""
    ids = batches(1)[0]
    expected = converted()
    names = [name for name, _ in expected.get_submodule("mhc").named_parameters()]
    before = mhc_compile(wrap_blocks(plain(), wrap), n=4, example_inputs=ids, backend="eager")
    assert [name for name, _ in before.get_submodule("mhc").named_parameters()] == names
    for model in (scramble(before), wrap_blocks(converted(), wrap)):
        assert distance(model(ids), expected(ids)) <= 1e-12
