"""What conversions leave behind in a process: graphs, fake tensors, resident memory, and the time of a call.

python -m benchmarks.lifetime [--kinds convert/drop,...] [--backends aot_eager] [--rounds 50] [--layers 4] [--out FILE]

Each kind runs in a process of its own: a small GPT-2 is converted (restored, switched, cut in stages) and makes a step
of training, `rounds` times over. What is alive is counted after each round, behind a collection. The result holds every
round; it exits with 1 where graphs or fake tensors grow after the third round, resident memory is more than 5 % above
that of the fifth, or the last ten calls take 25 % more of the processor than the ten after the fifth.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.turns import environment
from mhc_compile import mhc_compile, partition, recompute, restore, set_iterations, stage_modules

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "lifetime.json"
FIRST = 5  # rounds that caches of torch and Python may take to fill
console = Console(highlight=False)


def gpt2(layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A GPT-2 of width 16 in train mode, and a batch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=16,
        n_layer=layers,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).train(), {"input_ids": torch.arange(32).reshape(2, 16)}


def step(call: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    """A forward, and the backward of a sum of logits; it leaves the gradients."""
    call(**inputs).logits.sum().backward()


class Kind:
    """What is done over and over; `model` is the one whose calls are timed."""

    def __init__(self, backend: str, layers: int) -> None:
        self.backend, self.layers = backend, layers
        self.model, self.inputs = gpt2(layers)

    def convert(self) -> None:
        mhc_compile(self.model, n=4, backend=self.backend, example_inputs=self.inputs)

    def round(self, number: int) -> None:
        raise NotImplementedError


class Dropped(Kind):
    """A new model each time, and the last one dropped."""

    def round(self, number: int) -> None:
        self.model, _ = gpt2(self.layers)
        self.convert()


class Restored(Kind):
    """One model, restored and converted again."""

    def round(self, number: int) -> None:
        if number:
            restore(self.model)
        self.convert()


class Iterations(Kind):
    """Sinkhorn iterations that change and come back."""

    def round(self, number: int) -> None:
        if not number:
            self.convert()
        set_iterations(self.model, 2 + number % 2)


class Switched(Kind):
    """Recomputation switched on and off."""

    def round(self, number: int) -> None:
        if not number:
            self.convert()
        recompute(self.model, (None, 2)[number % 2])


class Stages(Kind):
    """The model cut in two stages, which are dropped."""

    def round(self, number: int) -> None:
        if not number:
            self.convert()
        plan = partition(self.model, self.inputs, stages=2, microbatches=2)
        first, second = stage_modules(plan, self.model, self.inputs, tied="reduce")
        second(*first(**self.inputs)).logits.sum().backward()


KINDS: dict[str, type[Kind]] = {
    "convert, drop": Dropped,
    "restore, convert": Restored,
    "set_iterations": Iterations,
    "recompute": Switched,
    "stages": Stages,
}


def alive() -> tuple[int, int]:
    """Graph modules and fake tensors, behind a collection."""
    gc.collect()
    kinds = [type(one) for one in gc.get_objects()]
    return sum(issubclass(kind, fx.GraphModule) for kind in kinds), sum(kind is FakeTensor for kind in kinds)


def resident() -> int:
    """Bytes of this process in memory, by Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(name: str, backend: str, layers: int, rounds: int) -> dict[str, list[float]]:
    """What is alive after each round, and seconds of the processor of a round and of a call."""
    kind = KINDS[name](backend, layers)
    found: dict[str, list[float]] = {key: [] for key in ("graphs", "fakes", "resident MiB", "round s", "call s")}
    for number in range(rounds):
        start = time.process_time()
        kind.round(number)
        step(kind.model, kind.inputs)
        found["round s"].append(round(time.process_time() - start, 3))
        calls = []
        for _ in range(5):
            start = time.process_time()
            step(kind.model, kind.inputs)
            calls.append(time.process_time() - start)
        found["call s"].append(round(median(calls), 5))
        kind.model.zero_grad()
        graphs, fakes = alive()
        found["graphs"].append(graphs)
        found["fakes"].append(fakes)
        found["resident MiB"].append(round(resident() / 2**20, 1))
    return found


def verdict(found: dict[str, list[float]]) -> dict[str, Any]:
    """What grew, and by how much. Kinds that go to and fro are compared at rounds of one parity."""
    memory, calls = found["resident MiB"], found["call s"]
    grown = {key: found[key][-1] - found[key][len(found[key]) % 2 + 3] for key in ("graphs", "fakes")}
    memory_ratio = memory[-1] / memory[FIRST - 1]
    call_ratio = median(calls[-10:]) / median(calls[FIRST : FIRST + 10])
    flat = not any(grown.values()) and memory_ratio < 1.05 and call_ratio < 1.25
    return {**grown, "memory": round(memory_ratio, 3), "call": round(call_ratio, 3), "flat": flat}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="/".join(KINDS), help="names with slashes between; by default all")
    parser.add_argument("--backends", default="eager,aot_eager", help="with commas between")
    parser.add_argument("--rounds", type=int, default=50, help="at least 20")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", action="store_true", help="in this process: the first kind and backend, nothing else")
    options = parser.parse_args()
    if options.rounds < 20:
        parser.error(f"--rounds {options.rounds}; legal: at least 20")
    names, backends = options.kinds.split("/"), options.backends.split(",")
    if unknown := [name for name in names if name not in KINDS]:
        parser.error(f"--kinds {'/'.join(unknown)}; legal: {'/'.join(KINDS)}")
    if options.one:
        options.out.write_text(json.dumps(measured(names[0], backends[0], options.layers, options.rounds)))
        return 0
    results = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    results = {"environment": environment(), "layers": options.layers, "rows": results["rows"]}
    for name in names:
        for backend in backends:
            found = apart(name, backend, options)
            results["rows"][f"{name}, {backend}"] = {**verdict(found), "rounds": found}
            options.out.write_text(json.dumps(results) + "\n")
            console.print(f"{name}, {backend}: {verdict(found)}")
    console.print(table(results["rows"]))
    return int(not all(row["flat"] for row in results["rows"].values()))


def apart(name: str, backend: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """`measured`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.lifetime", "--one", "--kinds", name, "--backends", backend]
        command += ["--rounds", str(options.rounds), "--layers", str(options.layers), "--out", str(out)]
        subprocess.run(command, cwd=ROOT, check=True)
        found: dict[str, list[float]] = json.loads(out.read_text())
        return found


def table(rows: dict[str, dict[str, Any]]) -> Table:
    made = Table("", "graphs", "fake tensors", "memory", "call", "flat")
    for name, row in rows.items():
        made.add_row(name, *(str(row[key]) for key in ("graphs", "fakes", "memory", "call", "flat")))
    return made


if __name__ == "__main__":
    sys.exit(main())
