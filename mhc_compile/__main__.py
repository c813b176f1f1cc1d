"""The command line: `mhc-compile demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mhc_compile.errors import MHCError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 1 when a check failed, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="mhc-compile", description="Turn PyTorch models into n-stream mHC.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="convert a small GPT-2, check it, train it beside the plain one, draw both")
    demo.add_argument("--steps", type=int, default=300, help="optimizer steps of each model (default: 300)")
    demo.add_argument("--streams", type=int, default=4, help="number of streams n (default: 4)")
    demo.add_argument("--picture", type=Path, default=Path("mhc_demo.png"), help="where the picture goes")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.streams < 2:
        demo.error("--steps must be at least 1 and --streams at least 2")
    try:
        from mhc_compile.demo import DemoOptions, run_demo

        passed = run_demo(DemoOptions(n=options.streams, steps=options.steps, picture=options.picture))
    except MHCError as error:
        print(f"mhc-compile: {error}", file=sys.stderr)
        return 2
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
