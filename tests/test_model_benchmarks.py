"""The benchmarks of whole models run but for the figures, and count and report what is right.  No time is asserted."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for the folder `benchmarks`

from benchmarks import fusion, onnx_export, priority_merge, simulated_scale, train_step, turns  # noqa: E402
from benchmarks.mixture import Mixture  # noqa: E402
from graphs import SINCE  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    torch._dynamo.reset()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch._dynamo.reset()


# --- a training step --------------------------------------------------------------------------------------


def setting() -> train_step.Setting:
    return train_step.Setting(train_step.SHAPES["dry"], CPU, torch.float32, "aot_eager", "adamw")


def measured(names: list[str], path: Path | None = None, deadline: float = float("inf")) -> dict[str, Any]:
    results = train_step.Results(path, {"paper_overhead": train_step.PAPER})
    train_step.measure(names, setting(), results, rounds=1, steps=1, deadline=deadline)
    rows: dict[str, Any] = results.data["cases"]
    return rows


def test_a_training_step_of_each_case(tmp_path: Path) -> None:
    out = tmp_path / "folder" / "results.json"
    rows = measured(["plain, eager", "mHC by hand, eager", "mHC, recompute"], out)
    assert json.loads(out.read_text()) == {"paper_overhead": 0.067, "cases": rows}
    assert {(row["status"], row["rounds"], row["steps"]) for row in rows.values()} == {("ok", 1, 1)}
    assert max(rows["mHC, recompute"]["errors"].values()) < 1e-5
    by_hand, plain = rows["mHC by hand, eager"], rows["plain, eager"]
    assert by_hand["overhead"] == pytest.approx(by_hand["ms"] / plain["ms"] - 1, abs=1e-3)
    assert "overhead" not in rows["mHC, recompute"]  # its baseline was not asked for
    assert "over 'plain, eager' (the paper's 27B model: +6.7%)" in train_step.line("mHC by hand, eager", by_hand)


def test_the_streams_of_the_cases_differ_from_the_plain_trunk() -> None:
    made = setting()
    plain, by_hand = train_step.plain(made), train_step.by_hand(made)
    assert float((plain(made.ids()) - by_hand(made.ids())).detach().abs().max()) > 1e-2


def test_a_case_that_fails_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> nn.Module:
        raise ValueError("no such thing\nand more")

    def large(_: Any) -> nn.Module:
        raise torch.OutOfMemoryError("tried to allocate")

    def wrong(made: train_step.Setting) -> nn.Module:
        model = train_step.plain(made)
        with torch.no_grad():
            model.head.bias.add_(1e6)
        return model

    cases = {"broken": (broken, None), "large": (large, None), "wrong": (wrong, "plain, eager")}
    monkeypatch.setattr(train_step, "CASES", {"plain, eager": (train_step.plain, None), **cases})
    rows = measured(["broken", "plain, eager", "large", "wrong"])
    assert rows["broken"] == {"status": "failed", "reason": "ValueError: no such thing and more"}
    assert rows["large"]["status"] == "out of memory" and rows["plain, eager"]["ms"] > 0
    assert rows["wrong"]["status"] == "wrong" and "wrong: {" in train_step.line("wrong", rows["wrong"])


def test_nothing_starts_behind_the_deadline() -> None:
    assert measured(["plain, eager"], deadline=0.0) == {
        "plain, eager": {"status": "not started", "reason": "no time was left"}
    }


def test_merges_of_high_priority(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    priority_merge.main(["--dry", "--rounds", "1", "--out", str(out)])
    saved = json.loads(out.read_text())
    kinds = "nothing", "products", "copies"
    ops = "merge", "merge and read", "backward of a merge"
    assert saved["latencies"].keys() == {f"{op}, beside {kind}" for op in ops for kind in kinds}
    assert saved["steps"].keys() == {f"beside {kind}" for kind in kinds}
    for row in [*saved["latencies"].values(), *saved["steps"].values()]:
        assert row.keys() == {"usual", "high priority", "ratio"} and row["ratio"] > 0  # no reason: nothing failed


def test_merges_of_high_priority_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = {"merge": lambda high: [torch.ones(1) * (2 if high else 1)]}
    monkeypatch.setattr(priority_merge, "merges", lambda setting: ops)
    results = priority_merge.Results()
    priority_merge.latencies(priority_merge.DRY, 1, results)
    assert results.data["latencies"] == {"merge": {"reason": "the two ways give other bits"}}


def test_a_gpu_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        priority_merge.main([])
    assert "no CUDA device: --dry" in capsys.readouterr().err
    for words, message in (([], "no CUDA device: --dry"), (["--dry", "--cases", "x"], "--cases x: legal are plain")):
        with pytest.raises(SystemExit):
            train_step.main(words)
        assert message in capsys.readouterr().err


# --- fusion -----------------------------------------------------------------------------------------------


def test_the_fusion_of_a_model(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    subject = fusion.written_by_hand(1, "cpu", "eager")
    row = fusion.graphs(subject)
    assert (row["graphs"], row["sites"], row["exits"]) == (1, 2, 1)
    # read, merge_read and merge_carried, and the exit's mean; coefficients and twenty iterations twice before
    assert row["of mHC, behind, ops"] == 4 and row["a site, ops"][1] == 2
    assert row["a site, ops"][0] > 2 * 2 * 20
    whole = {"graph": row}
    fusion.compile_and_run(whole, subject, {"inductor": "aot_eager", "mhc": fusion.Counter()}, rounds=1)
    assert whole["error"].keys() == {"inductor", "mhc", "converted"} and max(whole["error"].values()) < 1e-4
    run = fusion.Run(out, float("inf"), {"parts": {}})
    run.part("llama by hand", lambda row: row.update(whole))
    run.part("hy_v4", lambda row: {}["no such model"])
    saved = json.loads(out.read_text())["parts"]
    assert saved["hy_v4"] == {"reason": "KeyError: 'no such model'"}
    assert saved["llama by hand"]["error"] == whole["error"]
    console = fusion.Console(width=100, record=True, file=io.StringIO())
    for one in fusion.tables(run.data):
        console.print(one)
    printed = console.export_text()
    assert "KeyError: 'no such model'" in printed and "inductor over mhc" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_the_page_has_the_counts_of_the_results() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    parts = json.loads((ROOT / "benchmarks" / "results" / "fusion_cpu.json").read_text())["parts"]
    assert parts.keys() >= fusion.SUBJECTS.keys()
    for name in fusion.SUBJECTS:
        numbers = [*parts[name]["graph"]["a site"], *parts[name]["graph"]["a site, ops"]]
        assert f"| {' | '.join([name, *map(str, numbers)])} |" in page


def test_contestants_that_disagree_are_not_timed() -> None:
    subject = fusion.written_by_hand(1, "cpu", "eager")
    fusion.disturb(subject.others["converted"], "mhc.")
    with pytest.raises(RuntimeError, match=r"converted is .* away from eager"):
        fusion.compile_and_run({}, subject, {}, rounds=1)


def test_a_chain_with_and_without_fused_merges() -> None:
    row: dict[str, Any] = {}
    fusion.chain(row, 3, 5, 16, "cpu", torch.float32)
    assert row["forward"]["error"] == row["forward and backward"]["error"] == 0.0


def broken_backend(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no such backend")


@pytest.mark.slow
def test_decoding_with_a_cache() -> None:
    pytest.importorskip("transformers", minversion=SINCE["deepseek_v4"])
    model = fusion.deepseek(1, 64, "cpu", torch.float32).eval()
    row: dict[str, Any] = {}
    saves: list[int] = []
    backends = {"mhc": {"backend": fusion.Counter()}, "broken": {"backend": broken_backend}}
    fusion.decoding(row, lambda: saves.append(len(row["step_s"])), model, backends, batch=2, prompt=6, rounds=1)
    assert saves == [2] and "no such backend" in row["failed"].pop("broken")
    assert row["failed"] == {} and row["error"]["mhc"] < 1e-5 and row["step_s"].keys() == {"eager", "mhc"}


def test_no_part_starts_behind_the_deadline(tmp_path: Path) -> None:
    run = fusion.Run(tmp_path / "results.json", 0.0, {"parts": {}})
    run.part("one", lambda row: row.update(made=True))
    assert run.data["parts"] == {"one": {"reason": "TimeoutError: not started: no time was left"}}


def test_medians_are_of_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn's first call is left out."""
    lengths = iter([50.0, 1.0, 3.0, 2.0, 70.0, 4.0, 5.0, 6.0])
    times = {"clock": 0.0}

    def call() -> None:
        times["clock"] += next(lengths)

    monkeypatch.setattr(turns, "now", lambda: times["clock"])
    monkeypatch.setattr(turns, "processor_seconds", lambda: times["clock"] / 2)
    assert turns.in_turn({"a": call}, rounds=2) == {"a": turns.Taken(3.5, 1.75)}


# --- simulated scale --------------------------------------------------------------------------------------


def test_the_models_have_the_sizes_that_they_are_named_for() -> None:
    models = simulated_scale.MODELS
    assert simulated_scale.parameters(models["27B"]) == pytest.approx(27.0e9, rel=0.02)
    whole = Mixture(**{**vars(models["61 layers"]), "parallel": 1})
    assert simulated_scale.parameters(whole) == pytest.approx(671e9, rel=0.02)


def test_a_simulated_pipeline() -> None:
    """Four layers: more time and more to send than the baseline, and less memory with replay than without."""
    size = Mixture(
        layers=4, width=512, heads=4, vocabulary=64, dense=(1, 1024), experts=8, active=2, shared=1, expert=256
    )
    costs = simulated_scale.cost_models(simulated_scale.capture(size, 128))
    assert len(costs["baseline"].sites) == 0 and len(costs["mHC"].sites) == 8
    found = {row["what"]: row for row in simulated_scale.rows("small", costs, 2, "1f1b")}
    assert found["baseline"]["overhead"] == 0.0
    stored, replayed = found["mHC, stored"], found["mHC, replayed"]
    assert 0 < stored["overhead"] < replayed["overhead"]
    assert 0 < replayed["overhead_within"] < replayed["overhead"]
    assert max(replayed["peak_bytes"]) < max(stored["peak_bytes"])
    assert sum(map(sum, replayed["blocks"])) == 8 and not any(stored["blocks"])
    # bytes of a site's forward and backward, in units of C: 14 + 24 as it is compiled, with 4 and 4 more for the ends
    # of the chain of 8, and 18 + 39 op by op
    unit = 128 * 512 * 2
    for kind, units in (("mHC", 39), ("mHC, an op a term", 57)):
        ops = [op for op in costs[kind].nodes.values() if op.op.startswith("mhc.") and op.site]
        moved = sum(op.bytes + op.backward_bytes for op in ops) / (8 * unit)
        assert units < moved < 1.35 * units  # phi and coefficients, which are not small at this width


def test_the_page_has_the_table_of_the_results() -> None:
    page = simulated_scale.PAGE.read_text()
    text = simulated_scale.table(json.loads(simulated_scale.RESULTS.read_text()))
    assert simulated_scale.with_table(page, text) == page, "run python -m benchmarks.simulated_scale --write"
    with pytest.raises(SystemExit, match=r"docs/pipeline\.md has to hold one"):
        simulated_scale.with_table("no markers", "new")


def test_the_page_on_onnx_has_the_committed_results() -> None:
    """What is refused or does not run is so for the plain model as well."""
    found = json.loads((ROOT / "benchmarks" / "results" / "onnx_export_cpu.json").read_text())["models"]
    assert onnx_export.table(found) in (ROOT / "docs" / "inspecting.md").read_text()
    assert sum(one.get("right", False) for one in found.values()) > 20
    wrong = [one["plain"] for one in found.values() if not one.get("right")]
    assert all("refused" in plain or isinstance(plain["errors"], str) for plain in wrong)
