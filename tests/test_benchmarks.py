"""The benchmarks of the kernels run but for the timing, and what they count and report is right.

No time is asserted: the arithmetic of the timing is tested with a clock of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("records launches for a device, which the interpreter is not", allow_module_level=True)

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for the folder `benchmarks`

from benchmarks import kernel_accuracy, kernel_table, kernel_times, kernel_timing, stability  # noqa: E402
from benchmarks.kernel_implementations import Eager, Function, Outputs  # noqa: E402
from benchmarks.kernel_samples import GROUPS, OPS, Shape, chosen, copies, sample  # noqa: E402
from benchmarks.kernel_traffic import report, site_launches, site_traffic  # noqa: E402
from mhc_compile.kernels import moved  # noqa: E402
from mhc_compile.kernels.triton_launch import record  # noqa: E402
from mhc_compile.kernels.triton_replay import replay_block  # noqa: E402
from mhc_compile.kernels.triton_traffic import STREAMS, traffic  # noqa: E402

SMALL = Shape(5, 16)
CPU = torch.device("cpu")


# --- traffic ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _same_precision() -> Iterator[None]:
    """A measurement sets the precision of products, for the whole process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)



@pytest.mark.parametrize("features", [1280, 2560, 4096, 7168])
def test_what_a_site_moves(features: int) -> None:
    """Units of C elements a token, and what is beside them: coefficients, phi, shares of sums."""
    moved = site_traffic(8192, features)
    assert moved["forward"].units <= 18 and moved["in a chain"].units <= 14
    assert moved["backward"].units <= 28 and moved["backward in a chain"].units <= 24
    assert moved["single pass"].units <= 10 and moved["backward, single pass"].units <= 24
    assert all(one.other_share < 0.06 for one in moved.values())
    assert moved["forward"].bytes == pytest.approx(moved["forward"].units * 8192 * features * 2, rel=0.06)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_table_of_the_cost_model_is_that_of_the_launches(n: int) -> None:
    tokens, features, seen = 8192, 2560, set()
    for direction, launches in site_launches(tokens, features, n).items():
        for row in traffic(launches, tokens, features)[:-1]:
            if row.units >= 1:  # the others move numbers of a token, or parameters
                across = direction in ("backward in a chain", "backward, single pass")
                crossing = across and row.name == "streams_backward"
                known = moved.LAUNCHES[row.name] + (moved.CROSSING if crossing else moved.Moved())
                assert row.units == known.units(n), (direction, row.name)
                seen.add(row.name)
    assert seen == moved.LAUNCHES.keys()
    streams, f = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((64, n, 32), (64, 32)))
    post, res = torch.empty(64, n, device="meta"), torch.empty(64, n, n, device="meta")
    with record(run=False) as replayed:
        replay_block(streams, [f] * 8, [post] * 8, [res] * 8, [*[post] * 8, None])
    tensors = [tensor for launch in replayed for tensor in (*launch.reads.values(), *launch.writes.values())]
    long = sum(tensor.numel() for tensor in tensors if tensor is not None and tensor.dtype == torch.bfloat16)
    assert long == 8 * moved.REPLAY.units(n) * 64 * 32


@pytest.mark.parametrize("features", [1280, 7168])
def test_units_are_all_that_is_as_long_as_a_stream(features: int) -> None:
    """By name, as the traffic is counted, and by shape and dtype: the same tensors."""
    unit = 8192 * features
    for launches in site_launches(8192, features).values():
        for launch in launches:
            for name, tensor in {**launch.reads, **launch.writes}.items():
                if tensor is not None:
                    is_long = tensor.dtype == torch.bfloat16 and tensor.numel() in (unit, 4 * unit)
                    assert is_long == (name in STREAMS), (launch.name, name)
                    assert is_long or tensor.numel() < unit, (launch.name, name)


def test_floors() -> None:
    moved = site_traffic(8192, 2560)["forward"]
    assert moved.floor_us(4e12) == pytest.approx((18 * 8192 * 2560 * 2 + moved.other_bytes) / 4e6)
    lines = report(8192, 4, 4e12).splitlines()
    assert len(lines) == 2 + 4 * 6 and any(line.split()[:3] == ["2560", "backward", "28"] for line in lines)
    assert any(line.split()[:6] == ["2560", "backward", "in", "a", "chain", "24"] for line in lines)
    assert len(report(8192, 8, 4e12).splitlines()) == 2 + 4 * 4  # more than four streams do not cross


# --- a run without a GPU ----------------------------------------------------------------------------------


def dry_run(out: Path, *more: str) -> str:
    module = [sys.executable, "-m", "benchmarks.kernel_times", "--dry"]
    command = [*module, "--only", "T3-C48-n2-fp32", "--out", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_everything_but_the_timing(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    printed = dry_run(out, "--implementations", "mhc_compile,mhc_compile (site by site),torch eager,tile-kernels")
    results = json.loads(out.read_text())
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["triton"]
    rows = {(row["implementation"], row["op"], row["direction"]): row for row in results["rows"]}
    asked = [(op, direction) for op in OPS for direction in OPS[op].directions]
    for name in ("mhc_compile", "torch eager"):
        for op, direction in asked:
            row = rows[name, op, direction]
            if (name, op, direction) == ("mhc_compile", "aggregate", "backward"):
                assert row["status"] == "not offered" and "site's backward" in row["reason"]
                continue
            assert row["status"] == "ok" and row["reruns_equal"] == row["reruns"] > 0, row
            assert row["errors"] and max(row["errors"].values()) < 1e-5, row
    assert rows["mhc_compile", "site", "backward"]["errors"].keys() == {"dstreams", "df", "dphi", "dalpha", "dbias"}
    assert rows["mhc_compile", "site", "forward"]["bytes"] > 0
    across, alone = (rows[f"mhc_compile{name}", "chain", "backward"] for name in ("", " (site by site)"))
    assert across["errors"].keys() == {"df", "dphi", "dalpha", "dbias"} and across["bytes"] < alone["bytes"]
    early = rows["mhc_compile", "early-chain", "backward"]["errors"]
    assert early.keys() == {"df", "dpre", "dphi", "dalpha", "dbias"}
    assert alone["errors"].keys() == {"dnext_f", "dphi", "dalpha", "dbias"} and max(alone["errors"].values()) < 1e-5
    # A peer that is not there is named with its reason, one that refuses a shape with its own.
    note = results["implementations"]["tile-kernels"]
    if note.startswith("missing"):
        assert "ModuleNotFoundError" in note and note in printed
    else:
        assert rows["tile-kernels", "site", "forward"]["status"] == "not offered"
    # What is in the file is not measured again.
    dry_run(out, "--implementations", "mhc_compile,torch.compile", "--ops", "aggregate", "--resume")
    *again, forward, backward = json.loads(out.read_text())["rows"]
    assert again == results["rows"]
    assert all(row["implementation"] == "torch.compile" and row["status"] == "ok" for row in (forward, backward))


def test_a_gpu_is_asked_for() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no CUDA device: --dry runs all but the timing on a CPU"):
        kernel_times.main([])


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"--only headlines: legal are headline, narrow"):
        chosen("headlines")
    with pytest.raises(SystemExit):
        kernel_times.main(["--dry", "--ops", "site,mix"])
    assert "--ops mix: legal are site, merge+read, chain, merge+early, early-chain, coeff" in capsys.readouterr().err


def test_the_session_script_names_shapes_that_there_are() -> None:
    text = (ROOT / "benchmarks" / "gpu_session.sh").read_text()
    named = re.findall(r"T\d+-C\d+-n\d+-\w+", text)
    assert set(named) == {shape.name for shape in chosen("all")} and len(named) == len(set(named))
    for script in ("gpu_session.sh", "pack_peers.sh"):
        subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / script)], check=True)


# --- what is said of results ------------------------------------------------------------------------------


class Changed(Eager):
    """The formulas, with something done to the result of the aggregate."""

    name = "changed"

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def functions(self, n: int) -> dict[str, Function]:
        right = super().functions(n)["aggregate"]
        return {"aggregate": lambda *given: (self.change(right(*given)[0]),)}


def measured(change: Callable[[Tensor], Tensor], direction: str = "forward", op: str = "aggregate") -> dict[str, Any]:
    return kernel_times.guarded(Changed(change), op, direction, sample(SMALL, CPU, 0), mode="check")


def test_right_and_wrong_results() -> None:
    assert measured(lambda u: u)["status"] == "ok"
    assert measured(lambda u: 1.02 * u)["status"] == "wrong"
    assert measured(lambda u: 1.02 * u, "backward")["status"] == "wrong"
    spoiled = measured(lambda u: torch.where(u == u.max(), float("nan"), u))
    assert spoiled["status"] == "wrong" and spoiled["errors"] == {"u": float("inf")}


def test_a_call_to_fill_caches_compares_nothing() -> None:
    one = sample(SMALL, CPU, 0)
    assert kernel_times.guarded(Changed(lambda u: 2 * u), "aggregate", "forward", one, "compile") == {
        "status": "compiled"
    }


def test_failures_are_named() -> None:
    def broken(u: Tensor) -> Tensor:
        raise ValueError("no such thing")

    assert measured(broken) == {"status": "failed", "reason": "ValueError: no such thing"}
    assert measured(lambda u: u, op="merge") == {"status": "not offered", "reason": "has no such op"}


def test_reruns_are_compared_bit_by_bit() -> None:
    runs = iter(range(100))

    def call() -> Outputs:
        return (torch.tensor([0.0 if next(runs) % 2 else -0.0]), None)

    assert kernel_accuracy.same_again(call, 4) == 2


def test_new_tensors_are_poisoned() -> None:
    with kernel_accuracy.poisoned():
        assert torch.empty(8).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_oracle_gets_what_the_implementation_gets() -> None:
    """And the inputs of a copy are in memory of their own."""
    one = sample(SMALL, CPU, 0)
    a, b = copies(one, "merge", 2)
    assert torch.equal(a["streams"], b["streams"]) and a["streams"].data_ptr() != b["streams"].data_ptr()
    assert a["phi"] is b["phi"]
    outputs, gradients = kernel_accuracy.expected(Eager(), "merge", a)
    assert outputs["merged"].dtype == torch.float64 and gradients.keys() == {"dstreams", "df", "dpost", "dres"}


def test_a_result_is_saved_and_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    key = {"shape": "a", "op": "site", "direction": "forward", "implementation": "x"}
    first = kernel_times.Results(path, resume=False)
    first.add({**key, "status": "ok"})
    first.add({**key, "op": "merge", "status": "started"})
    again = kernel_times.Results(path, resume=True)
    assert again.done(key) and again.done({**key, "op": "merge"}) and not again.done({**key, "shape": "b"})
    assert again.data["rows"][1] == {**key, "op": "merge", "status": "failed", "reason": "the process ended in it"}
    assert kernel_times.Results(path, resume=False).data["rows"] == []


def test_after_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lost it is not tried again at this shape, but elsewhere; an error that passes is no loss."""

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    results = kernel_times.Results(None, resume=False)
    row = {"shape": "a", "op": "site", "direction": "forward", "implementation": "x", "status": "failed"}
    results.add(row)
    kernel_times.stop_if_lost(CPU, row, ["site", "merge"], results)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(kernel_times.DeviceLost, match="illegal memory access"):
        kernel_times.stop_if_lost(torch.device("cuda"), row, ["site", "merge"], results)
    left = [(found["op"], found["direction"]) for found in results.data["rows"][1:]]
    assert left == [("site", "backward"), ("merge", "forward"), ("merge", "backward")]
    assert {found["reason"] for found in results.data["rows"][1:]} == {
        "not tried: the device was lost in site forward"
    }


# --- timing, with a clock of the test's own ---------------------------------------------------------------


class Device:
    """Stands for ``torch.cuda``: calls take the microseconds that they say, launching one takes 5 more."""

    def __init__(self, captures: bool) -> None:
        self.now, self.captures, self.capturing = 0.0, captures, False
        self.Stream = lambda: SimpleNamespace(synchronize=lambda: None)
        self.synchronize = self.default_stream = lambda: None
        self.stream = self.set_stream = lambda stream: self.nothing()
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self, stream: object) -> None:
                self.at = device.now

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) / 1000

        class CUDAGraph:
            us = 0.0

            def replay(self) -> None:
                device.now += self.us

            def reset(self) -> None:
                pass

        self.Event, self.CUDAGraph = Event, CUDAGraph

    @contextmanager
    def nothing(self) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, graph: Any, stream: object) -> Iterator[None]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        before, self.capturing = self.now, True
        yield
        self.capturing = False
        graph.us, self.now = self.now - before, before

    def call(self, us: float) -> Callable[[], object]:
        def run() -> None:
            self.now += us if self.capturing else us + 5

        return run


@pytest.mark.parametrize("captures", [True, False])
def test_times_are_those_of_one_call(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(captures)
    monkeypatch.setattr(kernel_timing, "torch", SimpleNamespace(cuda=device))
    time = kernel_timing.measure([lambda: device.call(10.0), lambda: device.call(30.0)])
    assert time.launched_us == pytest.approx(25)
    assert time.us == pytest.approx(20 if captures else 25) and time.low_us == pytest.approx(time.high_us)
    assert time.how.startswith("graph" if captures else "launches (RuntimeError: operation not permitted")


def test_a_measured_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of a run with times, on a device that is a clock."""
    device = Device(captures=True)
    device.get_device_properties = lambda index: SimpleNamespace(L2_cache_size=1000)  # type: ignore[attr-defined]
    device.current_device = lambda: 0  # type: ignore[attr-defined]
    monkeypatch.setattr(kernel_timing, "torch", SimpleNamespace(cuda=device))
    monkeypatch.setattr(kernel_timing, "copy_bandwidth", lambda: 4.3e12)
    monkeypatch.setattr(kernel_times, "device_of", lambda options: CPU)
    results = kernel_times.Results(tmp_path / "results.json", resume=False)
    options = SimpleNamespace(dry=False, check=False, compile=False, deadline=float("inf"))
    options.ops = ["sinkhorn", "aggregate"]
    kernel_times.measure_shape(SMALL, [Changed(lambda u: 2 * u), Eager()], results, options)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["copy_gb_s"] == {SMALL.name: 4300.0}
    found = {(row["implementation"], row["op"], row["direction"]): row for row in saved["rows"]}
    assert len(found) == 8 and {row["status"] for row in found.values()} == {"ok", "wrong", "not offered"}
    for (name, op, _), row in found.items():
        if (name, op) == ("changed", "sinkhorn"):
            assert "us" not in row
        else:
            assert row["how"] == "graph" and row["launched_us"] >= row["us"] >= 0
            assert row["reruns"] == kernel_times.RERUNS
            assert row["status"] == ("wrong" if name == "changed" else "ok") and SMALL.name in kernel_times.line(row)
    options.deadline = 0.0
    kernel_times.measure_shape(Shape(6, 16), [Eager()], results, options)
    assert len(results.data["rows"]) == 8  # nothing new is started after the deadline


def test_inputs_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SimpleNamespace(L2_cache_size=60 << 20)
    cuda = SimpleNamespace(get_device_properties=lambda device: cache, current_device=lambda: 0)
    monkeypatch.setattr(kernel_timing, "torch", SimpleNamespace(cuda=cuda))
    assert kernel_timing.rotation(1 << 30) == 2
    assert kernel_timing.rotation(10 << 20) * (10 << 20) >= 4 * cache.L2_cache_size


# --- stability --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", stability.ways())
def test_the_committed_gains_of_random_matrices_are_those_of_the_script(name: str) -> None:
    committed = json.loads((ROOT / "benchmarks" / "results" / "stability.json").read_text())["random"]
    if name not in committed:
        pytest.skip("measured before the package had this constraint")
    found = stability.random_gains(stability.ways()[name], 0.3, 8)
    assert [one["sites"] for one in found] == [1, 2, 4, 8]
    for one, right in zip(found, committed[name]["0.3"], strict=False):
        assert one == pytest.approx(right, rel=1e-9)
    assert not name.startswith("Sinkhorn") or found[-1]["backward"] < 1.1


# --- the README's table -----------------------------------------------------------------------------------


def results_file(folder: Path, **changes: Any) -> Path:
    shape = GROUPS["headline"][0].name
    key = {"shape": shape, "op": "site", "direction": "forward"}
    ours = {**key, "implementation": "mhc_compile", "status": "ok", "us": 200.0, "share": 0.91, **changes}
    rows = [ours, {**key, "implementation": "torch eager", "status": "ok", "us": 3000.0}]
    rows.append({**key, "implementation": "liger-kernel", "status": "failed", "reason": "RuntimeError"})
    rows.append({**key, "op": "readout", "implementation": "liger-kernel", "status": "ok", "us": 12.34})
    notes = {"mhc_compile": "", "torch eager": "formulas", "liger-kernel": "", "tile-kernels": "missing: no module"}
    machine = {"name": "A GPU", "torch": "2", "triton": "3"}
    path = folder / "kernels_a.json"
    copy = {shape: 4300.0}
    path.write_text(json.dumps({"machine": machine, "implementations": notes, "copy_gb_s": copy, "rows": rows}))
    return path


def test_the_table(tmp_path: Path) -> None:
    text = kernel_table.tables([results_file(tmp_path)])
    assert "| read and merge, mhc_compile | 200 (91%) |  |  |" in text
    assert "| read and merge, torch eager | 3000 (15.0 x) |  |  |" in text
    assert "| read and merge, liger-kernel | failed |  |  |" in text
    assert "| readout, forward |  |  | 12.3 |" in text
    assert "- tile-kernels: missing: no module" in text and "4.30 TB/s" in text


def test_a_wrong_result_has_no_time_in_the_table(tmp_path: Path) -> None:
    text = kernel_table.tables([results_file(tmp_path, status="wrong")])
    assert "| read and merge, mhc_compile | wrong result |" in text and "| torch eager | 3000 |" not in text
    assert "| read and merge, torch eager | 3000 |" in text


def test_no_table_without_times(tmp_path: Path) -> None:
    assert kernel_table.tables([]) == kernel_table.NOT_YET
    empty = tmp_path / "kernels_b.json"
    empty.write_text(json.dumps({"rows": []}))
    assert kernel_table.tables([empty]) == kernel_table.NOT_YET


def test_the_place_of_the_table() -> None:
    readme = f"before\n{kernel_table.START}\nold\n{kernel_table.END}\nbehind\n"
    assert kernel_table.with_tables(readme, "new") == readme.replace("old", "new")
    with pytest.raises(SystemExit, match=r"README\.md has to hold one"):
        kernel_table.with_tables("no markers", "new")


def test_the_readme_has_the_tables_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    if kernel_table.START not in readme:
        pytest.skip("the README has no place for them")
    text = kernel_table.tables(list((ROOT / "benchmarks" / "results").glob("kernels_*.json")))
    assert kernel_table.with_tables(readme, text) == readme, "run python -m benchmarks.kernel_table --write"
