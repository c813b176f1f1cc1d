"""Rewrite many random residual modules and compare each with itself: counts, outputs, gradients at step 0.

`python benchmarks/random_modules.py --seeds 3000 --start 0` prints progress, the source of every module that
fails, and a summary line; it exits with 1 if any failed. One seed takes about a third of a second.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this script shares its name with the helper in tests/

import random_modules  # noqa: E402
from graphs import problems  # noqa: E402

EVERY = 50  # seeds between two lines of progress


def check(seed: int) -> list[str]:
    """What is wrong with the module of a seed; an exception counts."""
    torch._dynamo.reset()  # keeps memory down
    try:
        return problems(random_modules.make(seed))
    except Exception:
        return [traceback.format_exc(limit=-4)]


def report(seed: int, wrong: list[str]) -> None:
    """Print a failing module as code that reproduces it."""
    print(f"\n# seed {seed} FAILED")
    for one in wrong:
        print("# " + one.rstrip().replace("\n", "\n# "))
    print(random_modules.make(seed), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3000, help="how many modules")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    failed, start = [], time.perf_counter()
    for done, seed in enumerate(range(options.start, options.start + options.seeds), 1):
        wrong = check(seed)
        if wrong:
            failed.append(seed)
            report(seed, wrong)
        if done % EVERY == 0:
            seconds = time.perf_counter() - start
            print(f"{done} of {options.seeds} modules, {len(failed)} failed, {seconds:.0f} s", flush=True)
    names = ", ".join(map(str, failed)) or "none"
    print(f"{options.seeds} modules, {len(failed)} failed ({names}), {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
