"""Every form of a conversion through every door, and every two forms that go together; each against level 1 in eager.

    python benchmarks/forms_and_doors.py [--pairs] [--doors eager/trace] [--forms sinkhorn/lite] [--minutes 60]

The tables are those of tests/forms.py and tests/doors.py. Prints progress, writes results/forms_and_doors.json (what
was run, what was left out for want of time, refusals with their words, the largest errors), and exits with 1 if a
product was wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import doors  # noqa: E402
import forms  # noqa: E402


def attempt(form: forms.Form, door: str) -> doors.Outcome:
    """What came of a product; an exception counts as wrong."""
    torch._dynamo.reset()  # keeps memory down
    try:
        return doors.outcome(form, door)
    except Exception:
        return doors.Outcome("wrong", words=traceback.format_exc(limit=-3))


def packages() -> dict[str, str]:
    """Versions that decide numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "onnxruntime", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def processor() -> str:
    """The machine's name for its processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def summary(done: dict[str, dict[str, doors.Outcome]], left: int, seconds: float) -> dict[str, Any]:
    """What is written."""
    every = [(form, door, one) for form, row in done.items() for door, one in row.items()]
    equal = [one for _, _, one in every if one.status == "equal"]
    return {
        "machine": processor(),
        "versions": packages(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
        "products": {**Counter(one.status for _, _, one in every), "left out for want of time": left},
        "forms": sorted({form for form, _, _ in every}),
        "doors": dict(Counter(door for _, door, _ in every)),
        "largest error of an output": max((one.outputs for one in equal), default=0.0),
        "largest error of a gradient": max((one.gradients for one in equal), default=0.0),
        "refusals": [[form, door, one.words] for form, door, one in every if one.status == "refused"],
        "wrong": [[form, door, vars(one)] for form, door, one in every if one.status == "wrong"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", action="store_true", help="also every two forms that go together")
    parser.add_argument("--forms", default="", help="names with slashes between; by default all")
    parser.add_argument("--doors", default="", help="names with slashes between; by default all")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "forms_and_doors.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    chosen = {**forms.FORMS, **(forms.pairs() if options.pairs else {})}
    names = options.forms.split("/") if options.forms else list(chosen)
    through = options.doors.split("/") if options.doors else list(doors.DOORS)
    todo = [(name, door) for name in names for door in through if doors.fitting(chosen[name], door)]
    done: dict[str, dict[str, doors.Outcome]] = {}
    start = time.perf_counter()
    for place, (name, door) in enumerate(todo):
        seconds = time.perf_counter() - start
        if seconds > 60 * options.minutes:
            break
        one = attempt(chosen[name], door)
        done.setdefault(name, {})[door] = one
        print(f"{place + 1}/{len(todo)} {seconds:.0f} s {name} | {door}: {one.status} {one.outputs:.1e} "
              f"{one.gradients:.1e} {one.words if one.status == 'wrong' else ''}", flush=True)  # fmt: skip
        left = len(todo) - place - 1
        options.out.write_text(json.dumps(summary(done, left, time.perf_counter() - start), indent=1) + "\n")
    return int(any(one.status == "wrong" for row in done.values() for one in row.values()))


if __name__ == "__main__":
    sys.exit(main())
