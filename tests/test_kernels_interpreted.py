"""The numeric tests of the Triton kernels on a machine without a GPU: in triton's interpreter, a process of its own.

The interpreter is chosen by an environment variable that triton reads when it is imported, so it cannot be had in
the process that runs the other tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kernel_lanes import INTERPRETED

TESTS = Path(__file__).parent
FAMILIES = ("streams", "sinkhorn", "coefficients", "site", "chain", "early", "ops")
FILES = [f"test_kernels_{family}.py" for family in FAMILIES]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.parametrize("sample", [2, pytest.param(1, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str, sample: int) -> None:
    """One test in `sample`."""
    # numpy's warning about how the interpreter of triton 3.6 indexes is no concern of ours.
    warnings = ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *warnings, file]
    command += ["--sample", str(sample)]
    done = subprocess.run(
        command, cwd=TESTS, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 25 / sample, done.stdout[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]


def test_every_numeric_file_runs_in_the_interpreter() -> None:
    files = TESTS.glob("test_kernels_*.py")
    numeric = {path.name for path in files if re.search(r"^pytestmark = numeric$", path.read_text(), re.MULTILINE)}
    assert numeric == set(FILES)
