"""Match mutants of hand-written mHC blocks and count those whose function the rewrite changed (none may be).

    python benchmarks/mutants.py [--count 2000] [--seed 1]

As tests/test_match_mutants.py, with every spelling and other seeds; exits with 1 when a mutant came out wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this script shares its name with the helper in tests/
sys.modules.pop("mutants", None)

import foreign_blocks as blocks  # noqa: E402
from mhc_compile.passes import match as matcher  # noqa: E402
from test_match_mutants import wrong_mutants  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="mutants in all")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    blocks.EPS, blocks.ITERATIONS = 0.03, 3
    matcher.difference = lambda *arguments: None  # the rules alone, without the replay behind them
    names = [name for name, block in blocks.BLOCKS.items() if block.trains and not block.needs]
    each = -(-options.count // len(names))
    total, bad = Counter[str](), []
    start = time.perf_counter()
    for name in names:
        wrong, tally = wrong_mutants(name, each, options.seed)
        total.update(tally)
        bad += wrong
        print(f"{name:18s} {dict(tally)} {len(wrong)} wrong", flush=True)
    for one in bad:
        print(f"WRONG {one}")
    print(f"{sum(total.values())} mutants, {dict(total)}, {len(bad)} wrong, {time.perf_counter() - start:.0f} s")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
