"""Every form of a conversion through every door, and every two forms that go together; each against level 1 in eager.

    python benchmarks/forms_and_doors.py [--pairs] [--resume] [--doors eager/trace] [--minutes 60]

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


def kept(file: Path) -> dict[str, dict[str, doors.Outcome]]:
    """What an earlier run wrote, without what was wrong."""
    found = json.loads(file.read_text())
    words = {(form, door): text for form, door, text in found["refusals"]}
    rows = found["every product: status, error of outputs, of gradients"]
    return {
        form: {
            door: doors.Outcome(*one, words=words.get((form, door), ""))
            for door, one in row.items()
            if one[0] != "wrong"
        }
        for form, row in rows.items()
    }


def summary(done: dict[str, dict[str, doors.Outcome]], chosen: dict[str, forms.Form], seconds: float) -> dict[str, Any]:
    """What is written."""
    every = [(form, door, one) for form, row in done.items() for door, one in row.items()]
    whole = [(form, door) for form in chosen for door in doors.DOORS if doors.fitting(chosen[form], door)]
    left = [door for form, door in whole if door not in done.get(form, {})]
    equal = [one for _, _, one in every if one.status == "equal"]
    return {
        "machine": processor(),
        "versions": packages(),
        "threads": torch.get_num_threads(),
        "seconds of the last run": round(seconds),
        "products": {**Counter(one.status for _, _, one in every), "not run": len(left)},
        "not run, by door": dict(Counter(left)),
        "forms": sorted({form for form, _, _ in every}),
        "doors": dict(Counter(door for _, door, _ in every)),
        "largest error of an output": max((one.outputs for one in equal), default=0.0),
        "largest error of a gradient": max((one.gradients for one in equal), default=0.0),
        "refusals": [[form, door, one.words] for form, door, one in every if one.status == "refused"],
        "wrong": [[form, door, one.words] for form, door, one in every if one.status == "wrong"],
        "every product: status, error of outputs, of gradients": {
            form: {door: [one.status, one.outputs, one.gradients] for door, one in row.items()}
            for form, row in done.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", action="store_true", help="also every two forms that go together")
    parser.add_argument("--forms", default="", help="names with slashes between; by default all")
    parser.add_argument("--doors", default="", help="names with slashes between; by default all")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--resume", action="store_true", help="keep what is in the file and was not wrong")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "forms_and_doors.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    chosen = {**forms.FORMS, **(forms.pairs() if options.pairs else {})}
    names = options.forms.split("/") if options.forms else list(chosen)
    through = options.doors.split("/") if options.doors else list(doors.DOORS)
    todo = [(name, door) for name in names for door in through if doors.fitting(chosen[name], door)]
    done = kept(options.out) if options.resume else {}
    todo = [(name, door) for name, door in todo if door not in done.get(name, {})]
    start = time.perf_counter()
    for place, (name, door) in enumerate(todo):
        seconds = time.perf_counter() - start
        if seconds > 60 * options.minutes:
            break
        one = attempt(chosen[name], door)
        done.setdefault(name, {})[door] = one
        print(f"{place + 1}/{len(todo)} {seconds:.0f} s {name} | {door}: {one.status} {one.outputs:.1e} "
              f"{one.gradients:.1e} {one.words if one.status == 'wrong' else ''}", flush=True)  # fmt: skip
        options.out.write_text(json.dumps(summary(done, chosen, time.perf_counter() - start), indent=1) + "\n")
    return int(any(one.status == "wrong" for row in done.values() for one in row.values()))


if __name__ == "__main__":
    sys.exit(main())
