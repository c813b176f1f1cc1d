"""The README's tables of kernel times, from the results in benchmarks/results/kernels_*.json.

python -m benchmarks.kernel_table [--write] [RESULTS ...]

Prints the markdown; with --write puts it into README.md, between <!-- kernels --> and <!-- end of kernels -->.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_samples import GROUPS, OPS

ROOT = Path(__file__).parents[1]
START, END = "<!-- kernels -->", "<!-- end of kernels -->"
NOT_YET = "The kernels were not measured on a GPU yet."
OURS = "mhc_compile"
SHORT = {"failed": "failed", "wrong": "wrong result", "not offered": "none"}
SITE_ROWS = [
    ("site", "forward", "read and merge"),
    ("merge+read", "forward", "merge and the next read"),
    ("site", "backward", "backward"),
    ("chain", "backward", "backward in a chain"),
    ("merge+early", "forward", "merge and the next read, single pass"),
    ("early-chain", "backward", "backward in a chain, single pass"),
]

Results = dict[str, Any]


def tables(paths: Sequence[Path]) -> str:
    """One block for each file of results that holds a time."""
    blocks = [block(json.loads(path.read_text())) for path in sorted(paths)]
    return "\n\n".join(text for text in blocks if text) or NOT_YET


def block(results: Results) -> str:
    if not any("us" in row for row in results["rows"]):
        return ""
    parts = [heading(results), sites(results), ops(results), footnotes(results)]
    return "\n\n".join(part for part in parts if part)


def heading(results: Results) -> str:
    machine, copies = results["machine"], results["copy_gb_s"].values()
    versions = f"{machine['name']}, torch {machine['torch']}, triton {machine['triton']}"
    copied = f"{min(copies) / 1000:.2f} to {max(copies) / 1000:.2f} TB/s"
    return (
        f"{versions}. Medians in microseconds, on inputs that are not in the cache. In brackets: for ours the bytes of "
        f"its launches over the time, as a share of what a copy moves in the same run ({copied}); for others how many "
        "times our time."
    )


def implementations(results: Results) -> list[str]:
    """Ours first, then who has a time at all."""
    timed = {row["implementation"] for row in results["rows"] if "us" in row}
    return [name for name in results["implementations"] if name in timed]


def find(results: Results, shape: str, op: str, direction: str, implementation: str) -> Results | None:
    key = {"shape": shape, "op": op, "direction": direction, "implementation": implementation}
    return next((row for row in results["rows"] if key.items() <= row.items()), None)


def cell(row: Results | None, ours: Results | None) -> str:
    """A time with what it is compared with, or why there is none."""
    if row is None:
        return ""
    if row["status"] != "ok" or "us" not in row:
        return SHORT.get(row["status"], str(row["status"]))
    text = f"{row['us']:.0f}" if row["us"] >= 100 else f"{row['us']:.1f}"
    if "share" in row:
        return f"{text} ({row['share']:.0%})"
    if ours is None or ours["status"] != "ok" or "us" not in ours:
        return text
    return f"{text} ({row['us'] / ours['us']:.1f} x)"


def sites(results: Results) -> str:
    """A site, forward and backward, at the headline shapes."""
    shapes = GROUPS["headline"]
    first = shapes[0]
    lines = [
        f"| a site, T = {first.tokens}, n = {first.streams}, bf16 | "
        + " | ".join(f"C = {s.features}" for s in shapes)
        + " |",
        "|---|" + "---|" * len(shapes),
    ]
    for op, direction, label in SITE_ROWS:
        for name in implementations(results):
            rows = [find(results, shape.name, op, direction, name) for shape in shapes]
            if all(row is None or row["status"] == "not offered" for row in rows):
                continue
            best = [find(results, shape.name, op, direction, OURS) for shape in shapes]
            cells = [cell(row, ours) for row, ours in zip(rows, best, strict=True)]
            lines.append(f"| {label}, {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ops(results: Results) -> str:
    """Each op by itself, at the first headline shape."""
    shape = GROUPS["headline"][0]
    names = [name for name in implementations(results) if "(no grad)" not in name]
    lines = [
        f"| op, T = {shape.tokens}, C = {shape.features} | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for op in OPS:
        for direction in OPS[op].directions:
            if op not in {row[0] for row in SITE_ROWS}:
                ours = find(results, shape.name, op, direction, OURS)
                cells = [cell(find(results, shape.name, op, direction, name), ours) for name in names]
                lines.append(f"| {op}, {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def footnotes(results: Results) -> str:
    """What was called, and what could not be."""
    return "\n".join(f"- {name}: {note}" for name, note in results["implementations"].items() if note)


def with_tables(readme: str, text: str) -> str:
    """The README with the text between the markers."""
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(START) > readme.index(END):
        raise SystemExit(f"README.md has to hold one {START} and, behind it, one {END}")
    return f"{readme[: readme.index(START)]}{START}\n{text}\n{readme[readme.index(END) :]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="into README.md")
    options = parser.parse_args()
    text = tables(options.results or list((ROOT / "benchmarks" / "results").glob("kernels_*.json")))
    if options.write:
        readme = ROOT / "README.md"
        readme.write_text(with_tables(readme.read_text(), text))
    else:
        print(text)


if __name__ == "__main__":
    main()
