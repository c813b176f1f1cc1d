"""The kernels and their peers: accuracy, repeatability, time, and share of the bandwidth of a copy.

python -m benchmarks.kernel_times [--only headline] [--implementations NAMES] [--ops NAMES] [--out FILE] [--resume]
                                 [--seconds N] [--compile | --check | --dry]

Forward and backward of each op and of a site, at the shapes of benchmarks/kernel_samples.py, in one process.  Results
are compared with the float64 oracle before anything is timed.  The file is saved after each measurement, and --resume
leaves out what is in it; an exit code of 3 says that the device was lost, and that --resume would go on.

--check measures no times, and --compile only calls everything once, to fill caches.  --dry runs everything but the
timing on a CPU, in Triton's interpreter, at tiny shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_accuracy import LIMIT, errors, expected, poisoned, same_again
from benchmarks.kernel_implementations import Implementation, NotOffered, Ours
from benchmarks.kernel_peers import NAMES, load
from benchmarks.kernel_samples import OPS, Sample, Shape, chosen, copies, sample, size_of

ROOT = Path(__file__).parents[1]
RERUNS = 20
LOST = 3  # the exit code after an error that the device does not recover from

Row = dict[str, Any]


class Results:
    """What was measured so far, on disk after each step."""

    def __init__(self, path: Path | None, resume: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {"machine": {}, "implementations": {}, "copy_gb_s": {}, "rows": []}
        if resume and path is not None and path.exists():
            self.data = json.loads(path.read_text())
            for row in self.data["rows"]:
                if row["status"] == "started":
                    row |= {"status": "failed", "reason": "the process ended in it"}

    def done(self, key: Row) -> bool:
        return any(key.items() <= row.items() for row in self.data["rows"])

    def add(self, row: Row) -> None:
        self.data["rows"].append(row)
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(self.data, indent=1) + "\n")
        fresh.replace(self.path)


class DeviceLost(Exception):
    """Nothing more can run in this process."""


def machine() -> Row:
    import triton

    gpu = torch.cuda.is_available()
    return {
        "name": torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def measure_shape(shape: Shape, implementations: list[Implementation], results: Results, options: Any) -> None:
    """All that is not in the results yet, for one shape."""
    mode = "compile" if options.compile else "check" if options.dry or options.check else "time"
    device = device_of(options)
    torch.set_float32_matmul_precision("high" if shape.dtype == torch.bfloat16 else "highest")
    torch._dynamo.reset()
    one = sample(shape, device, seed=0)
    if mode == "time" and shape.name not in results.data["copy_gb_s"]:
        from benchmarks.kernel_timing import copy_bandwidth

        results.data["copy_gb_s"][shape.name] = round(copy_bandwidth() / 1e9, 1)
    for implementation in implementations:
        for key in keys(shape.name, implementation.name, options.ops):
            if results.done(key):
                continue
            if time.monotonic() > options.deadline:
                return
            row: Row = {**key, "status": "started"}
            results.add(row)
            row |= guarded(implementation, row["op"], row["direction"], one, mode)
            if "us" in row and "bytes" in row:
                row["gb_s"] = round(row["bytes"] / row["us"] / 1e3, 1)
                row["share"] = round(row["gb_s"] / results.data["copy_gb_s"][shape.name], 3)
            results.save()
            print(line(row), flush=True)
            if row["status"] == "failed":
                stop_if_lost(device, row, options.ops, results)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def keys(shape: str, implementation: str, ops: list[str]) -> list[Row]:
    """What names each measurement of an implementation at a shape."""
    both = {"shape": shape, "implementation": implementation}
    return [{**both, "op": op, "direction": direction} for op in ops for direction in OPS[op].directions]


def device_of(options: Any) -> torch.device:
    return torch.device("cpu" if options.dry else "cuda")


def guarded(implementation: Implementation, op: str, direction: str, one: Sample, mode: str) -> Row:
    """The measurement, or why there is none."""
    try:
        return measure_one(implementation, op, direction, one, mode)
    except NotOffered as reason:
        return {"status": "not offered", "reason": str(reason)}
    except Exception as error:  # of ours or of a peer: it goes into the results by name, and the others go on
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}


def stop_if_lost(device: torch.device, row: Row, ops: list[str], results: Results) -> None:
    """Raise DeviceLost after an error that stays; what does it is not tried again at this shape."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.ones(1, device=device).item()
    except Exception as error:
        reason = f"not tried: the device was lost in {row['op']} {row['direction']}"
        for key in keys(row["shape"], row["implementation"], ops):
            if not results.done(key):
                results.add({**key, "status": "failed", "reason": reason})
        raise DeviceLost(str(error)) from error


def measure_one(implementation: Implementation, op: str, direction: str, one: Sample, mode: str) -> Row:
    """Errors, reruns and time of one op of one implementation."""
    make = getattr(implementation, direction)
    (first,) = copies(one, op, 1)
    call = make(op, first)
    if mode == "compile":
        call()
        return {"status": "compiled"}
    row: Row = {}
    if isinstance(implementation, Ours):
        row["bytes"] = recorded_bytes(call)
        with poisoned():
            found = call()
    else:
        found = call()
    right = expected(implementation, op, first)[direction == "backward"]
    if direction == "backward":
        found = implementation.gradients(op, first, found)
    row["errors"] = errors(list(right), found, right)
    del found, right
    # A time of something wrong is kept too: it helps to find out what happened.
    row["status"] = "ok" if all(error <= LIMIT for error in row["errors"].values()) else "wrong"
    row["reruns"] = RERUNS if mode == "time" else 2
    row["reruns_equal"] = same_again(call, row["reruns"])
    if mode == "time":
        from benchmarks.kernel_timing import measure, rotation

        samples = copies(one, op, rotation(size_of(one, op)))
        taken = measure([lambda s=s: make(op, s) for s in samples])  # type: ignore[misc]
        row |= {name: round(value, 2) if isinstance(value, float) else value for name, value in asdict(taken).items()}
    return row


def recorded_bytes(call: Any) -> int:
    """What the launches of a call read and write, each tensor of a launch once."""
    from mhc_compile.kernels.triton_launch import record

    with record() as launches:
        call()
    tensors = [t for launch in launches for t in (*launch.reads.values(), *launch.writes.values()) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def line(row: Row) -> str:
    """One row as a line of text."""
    head = f"{row['shape']:22s}{row['op']:13s}{row['direction']:9s}{row['implementation']:28s}{row['status']:12s}"
    parts = []
    if "us" in row:
        parts.append(f"{row['us']:9.1f} us ({row['low_us']:.1f} to {row['high_us']:.1f}, {row['how'][:8]})")
    if "share" in row:
        parts.append(f"{row['gb_s']:.0f} GB/s, {row['share']:.0%} of a copy")
    if "errors" in row:
        worst = max(row["errors"].values(), default=0.0)
        parts.append(f"error {worst:.1e}, {row['reruns_equal']} of {row['reruns']} reruns equal")
    if "reason" in row:
        parts.append(row["reason"].splitlines()[0][:160] if row["reason"] else "")
    return head + "; ".join(parts)


def arguments(words: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="shapes or groups of them, with commas")
    parser.add_argument("--implementations", default=",".join(NAMES), help="names, with commas")
    parser.add_argument("--ops", default=",".join(OPS), help="names, with commas")
    parser.add_argument("--out", type=Path, help="the results, as JSON")
    parser.add_argument("--resume", action="store_true", help="leave out what --out holds")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after so long")
    parser.add_argument("--compile", action="store_true", help="one call each")
    parser.add_argument("--check", action="store_true", help="accuracy and reruns, no times")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in Triton's interpreter, at tiny shapes")
    options = parser.parse_args(words)
    options.ops = options.ops.split(",")
    options.deadline = time.monotonic() + options.seconds
    options.names = options.implementations.split(",")
    for kind, given, legal in (("ops", options.ops, OPS), ("implementations", options.names, NAMES)):
        if unknown := [name for name in given if name not in legal]:
            parser.error(f"--{kind} {', '.join(unknown)}: legal are {', '.join(legal)}")
    return options


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    if options.dry:
        use_interpreter()
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device: --dry runs all but the timing on a CPU")
    shapes = chosen(options.only or ("dry" if options.dry else "all"))
    results = Results(options.out, options.resume)
    implementations, missing = load(options.names, options.dry)
    results.data["machine"] = machine()
    results.data["implementations"] |= {found.name: found.note for found in implementations}
    results.data["implementations"] |= {name: f"missing: {reason}" for name, reason in missing.items()}
    print(json.dumps({name: results.data[name] for name in ("machine", "implementations")}, indent=1), flush=True)
    try:
        for shape in shapes:
            measure_shape(shape, implementations, results, options)
    except DeviceLost as error:
        print(f"the device is lost: {error}", flush=True)
        return LOST
    finally:
        results.save()
    if time.monotonic() > options.deadline:
        print(f"stopped after {options.seconds:g} s; --resume goes on", flush=True)
    return 0


def use_interpreter() -> None:
    """Triton's interpreter, which has to be chosen before triton is imported, and its repairs for bfloat16."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.kernel_times", *sys.argv[1:]])
    sys.path.append(str(ROOT / "tests"))
    import kernel_interpreter

    kernel_interpreter.repair()


if __name__ == "__main__":
    sys.exit(main())
