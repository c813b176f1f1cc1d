"""A training step of a decoder of Llama's shape: time and peak memory, plain, converted, and with mHC written by hand.

python -m benchmarks.train_step [--shape 1b] [--cases NAMES] [--rounds 5] [--optimizer adamw] [--seconds N] [--out FILE]
python -m benchmarks.train_step --dry            a tiny shape on a CPU, without inductor: everything but figures

Random weights, in bfloat16 on a GPU, made on the device; the mHC parameters are the same random ones in all cases, and
far from their initialisation. All cases are held at once and take their steps in turn; a figure is the median of all
steps, forward, loss, backward and optimizer. The first step is compared with that of the reference of the same function
before any is timed. Peak memory is that of a step, with the weights and the optimizer of that case alone.

A case that fails or does not fit goes into the results with its reason, and the others go on. The file is saved after
each case and round; --seconds starts nothing new after so long.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.llama import ByHand, Llama, Shape
from benchmarks.turns import environment, now, reason
from mhc_compile import HyperConnection, mhc_compile, param_groups
from mhc_compile.conversion import conversion

SHAPES = {
    "1b": Shape(layers=16, width=2048, heads=16, hidden=5632, vocabulary=32000, batch=1, length=4096),
    "dry": Shape(layers=2, width=32, heads=2, hidden=48, vocabulary=50, batch=1, length=12),
}
PAPER = 0.067  # the overhead that arXiv 2512.24880 gives for its 27B model, n = 4
N = 4
# How far logits and gradient may be from the reference, relative, over all elements.
LIMITS = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (5e-2, 2e-1)}

Row = dict[str, Any]


@dataclass
class Setting:
    """What all cases share."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    backend: str
    optimizer: str

    def ids(self) -> Tensor:
        made = torch.randint(self.shape.vocabulary, (self.shape.batch, self.shape.length), generator=seeded(0))
        return made.to(self.device)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the cases --------------------------------------------------------------------------------------------


def plain(setting: Setting) -> Llama:
    torch.manual_seed(0)
    with torch.device(setting.device):
        return Llama(setting.shape).to(setting.dtype)


def compiled(setting: Setting) -> nn.Module:
    model: nn.Module = torch.compile(plain(setting), backend=setting.backend, fullgraph=True)
    return model


def converted(setting: Setting, backend: str, recompute: str | None = None) -> nn.Module:
    """A converted model whose streams differ from one another."""
    model = mhc_compile(plain(setting), N, example_inputs=(setting.ids(),), backend=backend, recompute=recompute)
    generator = seeded(1)
    with torch.no_grad():
        for name, parameter in model.mhc.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise.to(parameter) / (parameter.shape[0] ** 0.5 if name.endswith("phi") else 1))
    return model


def by_hand(setting: Setting) -> nn.Module:
    """The formulas op by op, with the parameters of a converted model."""
    model = converted(setting, "eager")
    sites = [model.get_submodule(f"mhc.{site.name}") for site in conversion(model).record.sites]
    assert all(isinstance(one, HyperConnection) for one in sites)
    return ByHand(plain(setting), sites)  # type: ignore[arg-type]


# name -> how it is made, and the case that computes the same function (None: it is the reference)
CASES: dict[str, tuple[Callable[[Setting], nn.Module], str | None]] = {
    "plain, eager": (plain, None),
    "plain": (compiled, "plain, eager"),
    "mHC by hand, eager": (by_hand, None),
    "mHC": (lambda setting: converted(setting, setting.backend), "mHC by hand, eager"),
    "mHC, recompute": (lambda setting: converted(setting, setting.backend, "auto"), "mHC by hand, eager"),
}
BASELINES = {"mHC by hand, eager": "plain, eager", "mHC": "plain", "mHC, recompute": "plain"}


@dataclass
class Case:
    """A model that takes steps, and the times of those that count."""

    name: str
    model: nn.Module
    setting: Setting
    times: list[float] = field(default_factory=list)
    own_bytes: int = 0  # of weights and optimizer

    def __post_init__(self) -> None:
        self.ids, self.optimizer = self.setting.ids(), None
        if self.setting.optimizer == "adamw":
            groups = param_groups(self.model) if hasattr(self.model, "mhc") else self.model.parameters()
            self.optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=self.setting.device.type == "cuda")

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Logits, and the gradient of the embedding, which comes through all layers."""
        logits = self.model(self.ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten())
        loss.backward()
        grad = next(p.grad for name, p in self.model.named_parameters() if name.endswith("embed.weight"))
        assert grad is not None
        return logits.detach(), grad

    def step(self) -> None:
        self.gradients()
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def turn(self, steps: int) -> None:
        self.step()
        for _ in range(steps):
            start = now()
            self.step()
            self.times.append(now() - start)


# --- results ----------------------------------------------------------------------------------------------


class Results:
    """Rows by the name of their case, on disk after each change."""

    def __init__(self, path: Path | None, head: Row) -> None:
        self.path, self.data = path, {**head, "cases": {}}

    def note(self, case: str, **values: Any) -> None:
        row = self.data["cases"].setdefault(case, {})
        row |= values
        for name, baseline in BASELINES.items():
            rows = self.data["cases"].get(name, {}), self.data["cases"].get(baseline, {})
            if all("ms" in row and row["status"] == "ok" for row in rows):
                rows[0]["overhead"] = round(rows[0]["ms"] / rows[1]["ms"] - 1, 4)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_suffix(".part")
            fresh.write_text(json.dumps(self.data, indent=1) + "\n")
            fresh.replace(self.path)


def measure(names: list[str], setting: Setting, results: Results, rounds: int, steps: int, deadline: float) -> None:
    """Make and check each case, then let all that are right take turns."""
    cases: list[Case] = []
    right: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        if time.monotonic() > deadline:
            results.note(name, status="not started", reason="no time was left")
            continue
        made = guarded(results, name, lambda name=name: prepared(name, setting, right, results))
        # A turn by itself, so that there is a figure if the run ends before all are there to take turns.
        if made is not None and guarded(results, name, lambda made=made: took(made, steps, results)) is not None:
            cases.append(made)
            print(line(name, results.data["cases"][name]), flush=True)
    for case in cases:
        case.times.clear()
    for number in range(rounds):
        for case in list(cases):
            if time.monotonic() > deadline:
                return
            if guarded(results, case.name, lambda case=case, done=number + 1: took(case, steps, results, done)) is None:
                cases.remove(case)
    for case in cases:
        print(line(case.name, results.data["cases"][case.name]), flush=True)


def guarded(results: Results, name: str, call: Callable[[], Case]) -> Case | None:
    """What `call` gives, or None with the reason in the results."""
    found: Case | None = None
    try:
        found = call()
    except Exception as error:  # a case that does not fit or compile: it is reported by name, and the others go on
        status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
        results.note(name, status=status, reason=reason(error))
        print(f"{name}: {status}: {reason(error)}", flush=True)
    if found is None:  # outside of the handler, whose error holds on to what the case had made
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def prepared(name: str, setting: Setting, right: dict[str, tuple[Tensor, Tensor]], results: Results) -> Case:
    """The case behind its first step, compared with its reference, and the peak of its second."""
    make, reference = CASES[name]
    gc.collect()
    before = allocated()
    start = now()
    case = Case(name, make(setting), setting)
    built = now()
    found = tuple(one.float().cpu() for one in case.gradients())
    first = now() - built
    case.model.zero_grad(set_to_none=True)
    results.note(name, status="ok", build_s=round(built - start, 1), first_step_s=round(first, 1))
    if reference is None:
        right[name] = found  # type: ignore[assignment]
    elif reference in right:
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, right[reference], strict=True)]
        within = all(error <= limit for error, limit in zip(errors, LIMITS[setting.dtype], strict=True))
        # A wrong case is timed too, as that helps to find out what happened, but is compared with nothing.
        results.note(name, status="ok" if within else "wrong", errors={"logits": errors[0], "gradient": errors[1]})
    case.step()  # makes the optimizer's state
    gc.collect()  # what making the case has left in cycles is not its own
    case.own_bytes = allocated() - before
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        resting = allocated()
        case.step()
        peak = torch.cuda.max_memory_allocated() - resting + case.own_bytes
        results.note(name, peak_bytes=peak, weights_and_optimizer_bytes=case.own_bytes)
    return case


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def took(case: Case, steps: int, results: Results, rounds: int = 0) -> Case:
    """One turn, and the figures of all so far; rounds: how many there were in turn with the other cases."""
    case.turn(steps)
    times = sorted(1e3 * one for one in case.times)
    values = {"ms": median(times), "low_ms": times[len(times) // 10], "high_ms": times[-1 - len(times) // 10]}
    rounded = {name: round(value, 3) for name, value in values.items()}
    results.note(case.name, rounds=rounds, steps=len(times), **rounded)
    return case


def line(name: str, row: Row) -> str:
    """One case as a line of text."""
    parts = [f"{name:20s}", f"{row['ms']:9.2f} ms" if "ms" in row else row["status"]]
    if row["status"] == "wrong":
        parts.append(f"wrong: {row['errors']}")
    if "peak_bytes" in row:
        parts.append(f"peak {row['peak_bytes'] / 2**30:6.2f} GiB")
    if "overhead" in row:
        parts.append(f"{row['overhead']:+.1%} over {BASELINES[name]!r} (the paper's 27B model: {PAPER:+.1%})")
    return "  ".join(parts)


def arguments(words: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), help="1b, or dry with --dry")
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument("--cases", default=";".join(CASES), help="names, with semicolons")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="that count, a round")
    parser.add_argument("--optimizer", choices=("adamw", "none"), default="adamw", help="fused on a GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after so long")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny, with aot_eager in the place of inductor")
    options = parser.parse_args(words)
    options.names = options.cases.split(";")
    if unknown := [name for name in options.names if name not in CASES]:
        parser.error(f"--cases {'; '.join(unknown)}: legal are {'; '.join(CASES)}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("no CUDA device: --dry runs all but the memory on a CPU")
    return options


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    deadline = time.monotonic() + options.seconds
    shape = SHAPES[options.shape or ("dry" if options.dry else "1b")]
    if options.batch is not None:
        shape = Shape(**{**asdict(shape), "batch": options.batch})
    setting = Setting(
        shape,
        torch.device("cpu" if options.dry else "cuda"),
        torch.float32 if options.dry else torch.bfloat16,
        "aot_eager" if options.dry else "inductor",
        options.optimizer,
    )
    torch.set_float32_matmul_precision("high")
    head = {
        **environment(),
        "shape": asdict(shape),
        "n": N,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "optimizer": options.optimizer,
        "paper_overhead": PAPER,
    }
    results = Results(options.out, head)
    measure(options.names, setting, results, options.rounds, options.steps, deadline)


if __name__ == "__main__":
    main()
