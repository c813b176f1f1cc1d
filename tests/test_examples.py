"""The examples run, in a reduced size, and show what they are there to show."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`import llama` finds the example; compiled frames of one test must not steer another."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    torch._dynamo.reset()


def run(name: str, **size: Any) -> dict[str, Any]:
    found: dict[str, Any] = importlib.import_module(name).main(**size)
    return found


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"llama", "vit_digits", "own_module"}


def test_llama(capsys: pytest.CaptureFixture[str]) -> None:
    losses = run("llama", steps=8, layers=1)
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM: 2 sites on 1 trunk" in printed
    assert "LlamaForCausalLM: verified" in printed
    assert losses["before"] == pytest.approx(losses["plain"], abs=1e-4)
    assert losses["after"] < losses["before"] - 0.5


def test_vit_digits() -> None:
    accuracies = run("vit_digits", epochs=1, layers=1)
    assert set(accuracies) == {"plain", "mHC, n=4"}
    assert all(accuracy > 0.1 for accuracy in accuracies.values())


def test_own_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("own_module") == {"sites": 7, "trunks": 2, "refused": 5}
    printed = capsys.readouterr().out
    assert "shared.attention_call1" in printed
    assert "+7 mhc.merge.default" in printed
    assert "mhc.stem.same.phi" in printed
