"""Every constraint on one small GPT: loss, composite gain by depth, time of a step.

The same weights, converted with each way to keep `res` in bounds, are trained on the same byte-level English text. From
scratch the streams start with `init="paper"`; here all start as the plain model, so the curves start together. What is
to be seen is the gain, a row or column sum of the product of all `res`: it stays at 1 where rows and columns sum to 1,
below sqrt(n) where singular values are bounded (it may also fade there), and nothing holds it without a constraint.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile import composite_gains, mhc_compile, observe, param_groups
from mhc_compile.constraints import CONSTRAINTS
from mhc_compile.gains import Gain

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

LENGTH, BATCH, LR = 48, 8, 3e-3
# Of Okabe and Ito, told apart by every eye; the plain model is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass
class Run:
    """One training: the loss of each step's batch, the seconds of each step, and the composite gains at the end."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)

    @property
    def step(self) -> float:
        """The middle time of a step, in seconds; the first compiles and is left out."""
        return statistics.median(self.seconds[1:] or self.seconds)

    @property
    def last(self) -> float:
        """The mean loss of the last tenth of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])


def main(
    steps: int = 60, layers: int = 3, width: int = 64, n: int = 4, picture: str | Path = "manifolds.png"
) -> dict[str, Run]:
    """Run the example; gives each run by name."""
    torch.set_num_threads(1)  # tensors are small: threads would wait for each other
    batches = text(steps)
    choices: dict[str, dict[str, Any]] = {
        name: {"constraint": name} for name, entry in CONSTRAINTS.items() if n <= entry.most
    }
    runs = [train("plain", layers, width, batches, None)]
    for name, options in {**choices, "single pass": {"single_pass": True}}.items():
        runs.append(train(name, layers, width, batches, {"n": n, **options}))
    print(table(runs))
    print("one seed and a short run: no verdict on which constraint is best")
    draw(runs, Path(picture))
    print(f"picture: {picture}")
    return {run.name: run for run in runs}


def text(steps: int) -> list[Tensor]:
    """Batches of bytes from Python's own documentation, [BATCH, LENGTH]."""
    data = torch.tensor(list("\n".join(topics.values()).encode()))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(data) - LENGTH, (steps, BATCH), generator=generator)
    return [torch.stack([data[start : start + LENGTH] for start in row.tolist()]) for row in starts]


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm and added to the trunk."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, layers: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bytes(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def train(name: str, layers: int, width: int, batches: list[Tensor], options: dict[str, Any] | None) -> Run:
    """Train a fresh model, converted with `options` unless they are None."""
    torch.manual_seed(0)
    model: nn.Module = GPT(layers, width)
    if options is not None:
        mhc_compile(model, backend="eager", example_inputs=batches[0], **options)
    groups = param_groups(model, weight_decay=0.1)
    for group in groups:
        group["lr"] = 10 * LR if group["name"] == "mhc" else LR  # behind alpha = 0.01 they hardly move otherwise
    optimizer = torch.optim.AdamW(groups)
    run = Run(name)
    for ids in batches:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - start)
    if options is not None:
        sites = observe(model.eval(), batches[0]).values()
        run.gains = composite_gains([site.res for site in sites])
    print(f"{name:14} loss {run.losses[0]:.3f} -> {run.last:.3f}")
    return run


def table(runs: list[Run]) -> str:
    """Losses, gains of all sites together, and the time of a step beside the plain model's."""
    lines = [f"\n{'constraint':14} {'loss':>7} {'forward gain':>13} {'backward gain':>14} {'step':>9}"]
    for run in runs:
        gain = run.gains[-1] if run.gains else None
        gains = f"{gain.forward:13.3f} {gain.backward:14.3f}" if gain else f"{'':28}"
        lines.append(f"{run.name:14} {run.last:7.3f} {gains} {run.step * 1e3:6.1f} ms")
    return "\n".join(lines)


def draw(runs: list[Run], path: Path) -> None:
    """Loss over steps, composite gain over depth, and the time of a step."""
    figure, (losses, gains, times) = pyplot.subplots(1, 3, figsize=(14, 4.4), width_ratios=(3, 3, 2))
    colours = dict(zip([run.name for run in runs], ("#999999", *COLOURS), strict=False))
    for run in runs:
        style = {"color": colours[run.name], "label": run.name, "linewidth": 1.4}
        apart = [own - plain for own, plain in zip(run.losses, runs[0].losses, strict=True)]
        smooth = [statistics.fmean(apart[max(0, step - 4) : step + 1]) for step in range(len(apart))]
        losses.plot(range(1, len(smooth) + 1), smooth, **style)
        if run.gains:
            depths = range(1, len(run.gains) + 1)
            gains.plot(depths, [one.forward for one in run.gains], **style)
            gains.plot(depths, [one.backward for one in run.gains], **{**style, "label": None, "linestyle": ":"})
    losses.set(xlabel="step", ylabel="loss - plain model's (mean of 5 steps)", title="training")
    gains.set(xlabel="sites", ylabel="composite gain", title="mixing of the first sites together", yscale="log")
    gains.yaxis.set_major_formatter(ticker.ScalarFormatter())
    gains.yaxis.set_minor_formatter(ticker.FormatStrFormatter("%.1f"))
    gains.tick_params(axis="y", which="minor", labelsize=7)
    gains.axhline(1, color="#cccccc", linewidth=0.8, zorder=0)
    gains.plot([], [], color="#555555", label="forward (rows)")
    gains.plot([], [], color="#555555", linestyle=":", label="backward (columns)")
    times.barh([run.name for run in runs], [run.step * 1e3 for run in runs], color=[colours[run.name] for run in runs])
    times.invert_yaxis()
    times.set(xlabel="ms, eager, this machine", title="one step")
    gains.legend(fontsize=7, frameon=False)
    losses.legend(fontsize=7, frameon=False)
    for axes in (losses, gains, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
