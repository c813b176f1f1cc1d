"""The demonstration: a small GPT-2 on real text, converted, checked, and trained beside the plain one.

The text is what Python carries of its own language reference (`pydoc_data.topics`), read byte by byte; the weights are
random. Needs the extra `demo`. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from mhc_compile._torch import TESTED
from mhc_compile.convert import history, mhc_compile, param_groups
from mhc_compile.explain import explain
from mhc_compile.gains import Gain, composite_gains
from mhc_compile.observation import observe
from mhc_compile.verify import verify

_SEED = 0


@dataclass(frozen=True)
class DemoOptions:
    """Size of the demonstration. steps: optimizer steps of each model; length: bytes a sequence; picture: PNG path."""

    n: int = 4
    steps: int = 300
    layers: int = 4
    width: int = 128
    heads: int = 4
    batch: int = 8
    length: int = 128
    picture: Path = Path("mhc_demo.png")


@dataclass
class Run:
    """One model's training: its loss at each step, and seconds for a step (median)."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    warmup: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, ids: Tensor) -> None:
        """One optimizer step on token ids [batch, length]."""
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.warmup.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        self.seconds.append(time.perf_counter() - start)

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the steps."""
        tail = self.losses[-max(len(self.losses) // 10, 1) :]
        return sum(tail) / len(tail)


def run_demo(options: DemoOptions | None = None, console: Console | None = None) -> bool:
    """Convert, explain, verify, train side by side, draw; gives whether every check passed."""
    options = options or DemoOptions()
    console = console or Console()
    torch.manual_seed(_SEED)
    plain = small_gpt2(options)
    model = copy.deepcopy(plain)
    batches = text_batches(options)
    example = {"input_ids": next(batches)[:2, :32]}

    console.print(versions(), markup=False, highlight=False)
    console.rule(f"1. convert a GPT-2 of {options.layers} layers to {options.n} streams")
    mhc_compile(model, options.n, example_inputs=example, backend="aot_eager")
    console.print(str(explain(model, example)), markup=False, highlight=False, soft_wrap=True)
    added = sum(parameter.numel() for parameter in model.get_submodule("mhc").parameters())
    console.print(f"{added:,} mHC parameters beside {sum(p.numel() for p in plain.parameters()):,} of the model")

    console.rule("2. verify")
    report = verify(model, example)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)

    console.rule(f"3. train both for {options.steps} steps on pydoc_data.topics")
    runs = [_start("plain", plain), _start(f"mHC, n = {options.n}", model)]
    train_side_by_side(runs, batches, options.steps, console)
    for record in history(model)[:3]:
        console.print(str(record).splitlines()[0], markup=False, highlight=False, soft_wrap=True)

    console.rule("4. look")
    with torch.no_grad():
        seen = observe(model, {"input_ids": next(batches)})
    gains = composite_gains([site.res for site in seen.values()])
    for run in runs:
        middle = sorted(run.seconds)[len(run.seconds) // 2]
        console.print(f"{run.name}: loss {run.losses[0]:.3f} -> {run.final_loss:.3f}, {middle * 1e3:.0f} ms a step")
    last = gains[-1]
    console.print(f"composite Amax gain, {len(gains)} sites: forward {last.forward:.6f}, backward {last.backward:.6f}")
    draw(runs, gains, options.picture)
    console.print(f"picture: {options.picture}")
    return report.passed


def versions() -> str:
    """Return what the demonstration runs on, and which releases of torch the package is for."""
    found = ", ".join(f"{name} {version(name)}" for name in ("mhc-compile", "torch", "transformers"))
    tested = f"made for torch {TESTED[0]} to {TESTED[-1]}, see docs/versions.md"
    return f"{found}, Python {platform.python_version()}; {tested}"


def small_gpt2(options: DemoOptions) -> nn.Module:
    """A GPT-2 with random weights over bytes."""
    transformers = _demo_extra("transformers")
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=options.length,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config).train()
    return model


def text_batches(options: DemoOptions) -> Iterator[Tensor]:
    """Random pieces of the language reference as ids [batch, length], for ever, the same for every run."""
    from pydoc_data.topics import topics

    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.long)
    generator = torch.Generator().manual_seed(_SEED)
    while True:
        starts = torch.randint(len(text) - options.length, (options.batch,), generator=generator)
        yield torch.stack([text[start : start + options.length] for start in starts.tolist()])


def train_side_by_side(runs: list[Run], batches: Iterator[Tensor], steps: int, console: Console) -> None:
    """One step of each model on the same batch, in turn, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=steps)
        for step in range(steps):
            ids = next(batches)
            for run in runs:
                run.step(ids)
            if step % 5 == 0 or step == steps - 1:
                progress.update(task, description=", ".join(f"{run.name} {run.losses[-1]:.3f}" for run in runs))
            progress.advance(task)


def draw(runs: list[Run], gains: list[Gain], path: Path) -> None:
    """Loss curves, and the composite gain by depth (arXiv 2512.24880, figure 3), as a PNG."""
    matplotlib = _demo_extra("matplotlib")
    matplotlib.use("Agg")
    pyplot = _demo_extra("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for run in runs:
        left.plot(_smooth(run.losses), label=run.name)
    left.set(xlabel="step", ylabel="loss (nats a byte, smoothed)", title="Training on pydoc_data.topics")
    left.legend()
    depth = range(1, len(gains) + 1)
    right.plot(depth, [one.forward for one in gains], "o-", label="forward (row sums)")
    right.plot(depth, [one.backward for one in gains], "s-", label="backward (column sums)")
    right.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    low, high = right.get_ylim()
    right.set_ylim(min(low, 0.95), max(high, 1.05))
    right.set(xlabel="sites in the product", ylabel="composite Amax gain", title="Composite Amax gain by depth")
    right.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _smooth(losses: list[float], weight: float = 0.9) -> list[float]:
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else weight * smooth[-1] + (1 - weight) * loss)
    return smooth


def _start(name: str, model: nn.Module) -> Run:
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.1), lr=1e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20)
    return Run(name, model, optimizer, warmup)


def _demo_extra(name: str) -> Any:
    import importlib

    from mhc_compile.errors import ConfigError

    load: Callable[[str], Any] = importlib.import_module
    try:
        return load(name)
    except ImportError as error:
        raise ConfigError(f"the demonstration needs {name}: pip install 'mhc-compile[demo]'") from error
