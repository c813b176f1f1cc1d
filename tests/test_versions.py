"""What the page of versions says is what the script found, and the script reads pytest's report as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for the folder `benchmarks`

from benchmarks import versions  # noqa: E402
from mhc_compile import _torch  # noqa: E402

REPORT = """
import pytest

def test_right(): pass

@pytest.mark.parametrize("one", [1, 2])
def test_wrong(one): assert one == 2

@pytest.mark.skip(reason="not here")
def test_left_out(): pass

@pytest.fixture
def broken(): raise ValueError

def test_without_its_fixture(broken): pass
"""


def test_a_report_is_read(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(REPORT, encoding="utf-8")
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path), f"--junitxml={report}", "-p", "no:cacheprovider"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    found = versions.read(report)
    assert found["passed"] == 2
    assert found["failed"] == ["test_a::test_without_its_fixture", "test_a::test_wrong[1]"]
    assert found["skipped"] == {"not here": 1}


def test_a_sample_is_the_same_tests_everywhere() -> None:
    """And some of them: by names, not by their order."""
    files = ["tests/test_reference.py", "tests/test_imports.py"]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *files]
    every, first, again = (
        [line for line in subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
         if "::" in line]
        for more in ((), ("--sample", "5"), ("--sample", "5"))
    )  # fmt: skip
    assert first == again and set(first) < set(every)
    assert len(every) / 10 < len(first) < len(every) / 3


def test_each_tested_torch_has_a_row_and_one_has_each_python() -> None:
    pinned = {row.pins["torch"].rpartition(".")[0] for row in versions.ROWS if "torch" in row.pins}
    constrained = (ROOT / "constraints.txt").read_text(encoding="utf-8").partition("\ntorch==")[2].split("\n")[0]
    assert pinned | {constrained.rpartition(".")[0]} == {*_torch.TESTED}
    assert {row.python for row in versions.ROWS} == {"3.11", "3.12", "3.13"}


def test_the_page_has_the_results() -> None:
    results = json.loads(versions.RESULTS.read_text(encoding="utf-8"))
    assert list(results) == [row.name for row in versions.ROWS if row.name in results]
    page = versions.PAGE.read_text(encoding="utf-8")
    assert f"{versions.START}{versions.table(results.values())}{versions.END}" in page
