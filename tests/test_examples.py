"""The examples run, in a reduced size, and show what they are there to show; the documentation agrees with the code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_compile import Monitor, mhc_compile
from mhc_compile.constraints import CONSTRAINTS
from mhc_compile.passes import residuals, select, trunks

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`import llama` finds the example; compiled frames of one test must not steer another.

    One thread: the models are small, and the threads of test processes that share the cores wait for each other.
    """
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def run(name: str, **size: Any) -> dict[str, Any]:
    found: dict[str, Any] = importlib.import_module(name).main(**size)
    return found


def test_every_example_is_tested() -> None:
    tested = {"llama", "vit_digits", "own_module", "upcycle", "deepseek_v4", "memory", "monitoring", "pipeline"}
    tested |= {"compare_manifolds"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_llama(capsys: pytest.CaptureFixture[str]) -> None:
    losses = run("llama", steps=8, layers=1)
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM: 2 sites on 1 trunk" in printed
    assert "LlamaForCausalLM: verified" in printed
    assert losses["before"] == pytest.approx(losses["plain"], abs=1e-4)
    assert losses["after"] < losses["before"] - 0.5


def test_deepseek_v4(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("deepseek_v4", layers=1, length=16, turns=1, backends=("mhc",))
    printed = capsys.readouterr().out
    assert "DeepseekV4ForCausalLM: 2 sites of its own, 1 exit" in printed
    assert "2 of 3 reads fused with the merge before them" in printed
    before, after = map(int, re.findall(r"(\d+) ops in the graph become (\d+)", printed)[0])
    assert after < before - 250  # two Sinkhorn chains of 20 iterations
    assert found["mhc: logits"] < 1e-5 and found["mhc: gradients"] < 5e-5


@pytest.mark.sweep
def test_memory(tmp_path: Path) -> None:
    found = run("memory", layers=2, picture=tmp_path / "memory.png")
    assert list(found["measured"]) == [1, 2, 3, 4]
    for length, measured in found["measured"].items():
        assert measured == pytest.approx(found["predicted"][length], rel=0.02)
        assert measured < found["stored"]
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_vit_digits() -> None:
    accuracies = run("vit_digits", epochs=1, layers=1)
    assert set(accuracies) == {"plain", "mHC, n=4"}
    assert all(accuracy > 0.1 for accuracy in accuracies.values())


def test_own_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("own_module") == {"sites": 7, "trunks": 2, "refused": 5}
    printed = capsys.readouterr().out
    assert "shared.attention_call1" in printed
    assert "+7 mhc.merge.default" in printed and "+7 mhc.merge_carried.default" in printed
    assert "mhc.stem.same.phi" in printed


def test_upcycle(tmp_path: Path) -> None:
    found = run("upcycle", plain_steps=10, steps=10, layers=1, backend="eager", picture=tmp_path / "seen.png")
    assert found["after"] == pytest.approx(found["before"], abs=1e-4)
    assert found["adam steps"] == {"decay": 20, "no_decay": 20, "mhc": 10}, "the state of AdamW was carried over"
    assert found["off the plain path"] < found["off the plain path, new AdamW"] / 5
    first, *_, last = (max(row) for row in found["apart"])
    assert first < 1e-6
    assert last > 1e-4
    assert found["converted at the end"] != found["plain at the end"]
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.sweep
def test_compare_manifolds(tmp_path: Path) -> None:
    found = run("compare_manifolds", steps=6, layers=1, width=16, picture=tmp_path / "seen.png")
    assert set(found) == {"plain", *CONSTRAINTS, "single pass"}
    start = found["plain"].losses[0]
    for name, one in found.items():
        assert one.losses[0] == pytest.approx(start, abs=1e-4), "a conversion keeps the function"
        assert one.losses[-1] < start
        assert name == "plain" or one.losses[-1] != found["plain"].losses[-1]
        assert len(one.gains) == (0 if name == "plain" else 2)
    assert found["identity"].gains[-1].forward == 1
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------ documentation


ROOT = EXAMPLES.parent


def test_the_code_of_the_readme_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(<!-- not run -->\n)?```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    for skipped, code in blocks:
        if not skipped:
            exec(compile(code, "README.md", "exec"), names)
    assert not hasattr(names["model"], "mhc"), "restored at the end"


def test_the_onnx_of_the_page_on_inspecting_runs(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "inspecting.md").read_text(encoding="utf-8")
    section = text.partition("## ONNX\n")[2]
    section, _, _ = section.partition("\n## ")
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(code, "inspecting.md", "exec"), names)
    printed = capsys.readouterr().out.strip()
    assert f"```\n{printed}\n```" in section


def test_every_reason_is_documented() -> None:
    text = (ROOT / "docs" / "finding.md").read_text(encoding="utf-8")
    reasons = {
        value
        for module in (residuals, select, trunks)
        for name, value in vars(module).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, str)
    }
    assert len(reasons) >= 13
    text = text.replace("3 sites", "{count} sites").replace("FILE:LINE: ...", "{line}")
    assert not [reason for reason in reasons if f"`{reason}`" not in text]


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_code_of_the_page_on_monitoring_runs(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = mhc_compile(LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False)), 4, backend="eager")
    ids = torch.arange(8)[None]
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"model": model, "batches": [{"input_ids": ids, "labels": ids}] * 2}
    exec(compile(code, "monitoring.md", "exec"), names | {"picture": tmp_path / "gains.png"})
    assert (tmp_path / "gains.png").exists()
    logged = set(re.findall(r"`(mhc/[\w/]+)`", text))
    known = {key.replace("model.layers.0.mlp", "SITE").replace("SITE/0", "SITE/STREAM") for key in logged_keys(model)}
    assert len(logged) > 15 and logged <= known


def logged_keys(model: torch.nn.Module) -> set[str]:
    """Of a step with gradients."""
    ids = torch.arange(8)[None]
    with Monitor(model) as monitor:
        model(input_ids=ids, labels=ids).loss.backward()
        monitor.gradients()
    return set(monitor.log())


def test_monitoring(tmp_path: Path) -> None:
    found = importlib.import_module("monitoring").main(steps=4, layers=1, every=3, picture=tmp_path / "gains.png")
    assert [sample.step for sample in found.history] == [0, 3]
    assert all(sample.gradients is not None for sample in found.history)
    assert found.history[1].sites[-1].similarity < found.history[0].sites[-1].similarity == pytest.approx(1)
