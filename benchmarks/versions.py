"""The tests under other versions of torch, Python and what goes with them.

python -m benchmarks.versions [--rows torch-2.15,torch-2.11] [--sample 6] [--folder FOLDER] [--keep]

For each row a fresh virtual environment with the package, its extra `test` and the versions that the row pins; then the
suite, or a sample of it (`pytest --sample`, the same tests in every environment), then the row's result goes
into benchmarks/results/versions.json and into the table of docs/versions.md. An environment is removed when its row is
done, unless --keep; one that is in FOLDER already is used as it is. Builds of torch for CUDA are installed where there
are no others, and run on a CPU; each takes 6 GB on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
START, END = "<!-- table -->\n", "<!-- end of table -->"
SAMPLE = 6  # one test in so many
SHOWN = ("torch", "transformers", "triton", "onnxruntime")
console = Console(highlight=False)


@dataclass(frozen=True)
class Row:
    """An environment: the Python, what is pinned (or constrained, else the newest); all tests or some."""

    name: str
    python: str
    pins: Mapping[str, str] = field(default_factory=dict)
    constrained: bool = False
    whole: bool = False


ROWS = (
    # numpy 2.4 takes no array of one element for a number, as triton 3.6's interpreter makes them.
    Row("torch-2.11", "3.11", {"torch": "2.11.0", "transformers": "5.0.0", "numpy": "2.3.*"}),
    Row("torch-2.12", "3.11", {"torch": "2.12.1", "transformers": "5.12.*"}),
    Row("torch-2.13", "3.11", constrained=True, whole=True),
    Row("torch-2.14", "3.11", {"torch": "2.14.1"}),
    Row("torch-2.15", "3.11", {"torch": "2.15.0"}, whole=True),
    Row("python-3.12", "3.12", {"torch": "2.15.0"}),
    Row("python-3.13", "3.13", {"torch": "2.15.0"}),
)

_VERSIONS = """
import json, platform
from importlib.metadata import version
found = {name: version(name) for name in NAMES}
print(json.dumps({"python": platform.python_version(), **found}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS), help="names, separated by commas")
    parser.add_argument("--folder", type=Path, help="where environments are made; by default a temporary folder")
    parser.add_argument("--sample", type=int, help=f"one test in so many; by default all, or one in {SAMPLE}, by row")
    parser.add_argument("--keep", action="store_true", help="leave the environments in the folder")
    options = parser.parse_args()
    known = {row.name: row for row in ROWS}
    chosen = options.rows.split(",")
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--rows {', '.join(unknown)}; legal: {', '.join(known)}")
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen:
            place = (options.folder or Path(temporary)) / name
            record(name, tried(known[name], place, options.sample))
            if not options.keep:
                shutil.rmtree(place)


def tried(row: Row, place: Path, sample: int | None) -> dict[str, Any]:
    """The result of a row in the environment at `place`, which is made if it is not there."""
    every = sample or (1 if row.whole else SAMPLE)
    python = place / "bin" / "python"
    if not python.exists():
        console.print(f"{row.name}: installing into {place}")
        run([f"python{row.python}", "-m", "venv", str(place)])
        pins = [f"{name}=={version}" for name, version in row.pins.items()]
        constraints = ["-c", "constraints.txt"] if row.constrained else []
        run([str(python), "-m", "pip", "install", "-q", *constraints, "-e", ".[test]", *pins])
    names = f"NAMES = {SHOWN!r}\n"
    versions = json.loads(run([str(python), "-c", names + _VERSIONS]).stdout)
    console.print(f"{row.name}: {versions}")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-n", str(os.cpu_count()), "--dist", "worksteal", "-q"]
        command += ["--sample", str(every), "-m", "not sweep", "--timeout", "1800"]
        run([*command, "-p", "no:cacheprovider", f"--junitxml={report}"], True)
        counts = read(report)
    minutes = round((time.monotonic() - start) / 60, 1)
    tests = "all" if every == 1 else f"one in {every}"
    commit = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
    return {"versions": versions, "tests": tests, **counts, "minutes": minutes, "commit": commit, "machine": machine}


def run(command: list[str], may_fail: bool = False) -> subprocess.CompletedProcess[str]:
    """A command in the root of the repository, whose own modules come first; its output is shown where it may fail."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=None if may_fail else subprocess.PIPE)
    if done.returncode and not may_fail:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}")
    return done


def read(report: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, by pytest's report; the failed ones by name, reasons to skip."""
    counts: Counter[str] = Counter()
    failed, reasons = [], Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            reasons[str(next(child.get("message") for child in case if child.tag == "skipped"))] += 1
        else:
            counts["passed"] += 1
    return {"passed": counts["passed"], "failed": sorted(failed), "skipped": dict(reasons.most_common())}


def record(name: str, found: dict[str, Any]) -> None:
    """Put the result of a row into the file of results, and all of them into the page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results = {row.name: one for row in ROWS if (one := {**results, name: found}.get(row.name))}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    PAGE.write_text(f"{before}{START}{table(results.values())}{END}{rest.split(END)[1]}", encoding="utf-8")
    console.print(f"{name}: {found['passed']} passed, {len(found['failed'])} failed: {', '.join(found['failed'][:5])}")


def table(results: Collection[Mapping[str, Any]]) -> str:
    """The results as the page has them: a row each, the names of tests that failed, and why others were skipped."""
    head = (*SHOWN, "Python", "tests", "passed", "failed", "skipped")
    rows = [head, ("---",) * len(head)]
    for one in results:
        versions = one["versions"]
        shown = (*(versions[name] for name in SHOWN), versions["python"])
        counted = (one["tests"], f"{one['passed']:,}", str(len(one["failed"])), f"{sum(one['skipped'].values()):,}")
        rows.append((*shown, *counted))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    failed = [f"- torch {one['versions']['torch']}: `{name}`" for one in results for name in one["failed"]]
    skipped = {reason for one in results for reason in one["skipped"]}
    lines += ["", "Failed:", "", *failed] if failed else []
    lines += ["", f"Skipped: {'; '.join(sorted(skipped))}."] if skipped else []
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
