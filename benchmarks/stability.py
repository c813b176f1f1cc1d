"""How much a deep product of mixing matrices amplifies, for each way to make them, and what small trained models show.

python -m benchmarks.stability [--steps 300] [--layers 4] [--out FILE.json] [--picture FILE.png]

Two parts, both deterministic.

`random`: matrices of 128 sites for 64 tokens, n = 4, in float64. The logits of each are where a converted model starts
(a matrix near the identity: 0.9 on its diagonal) and independent normal numbers of standard deviation `spread`.
Sinkhorn is taken with 1, 5, 10 and 20 iterations, and each other constraint that the package knows. HC
(Hyper-Connections, arXiv 2409.19606) is unconstrained: near the identity, plus `spread tanh(z)` for normal z. The gains
of the product of the first 1, 2, 4, ... sites are the largest absolute row sum (forward) and column sum (backward),
means over tokens (figures 3 and 7 of arXiv 2512.24880).

`trained`: a small Llama on characters, converted in each of these ways and trained for some hundred steps from one
seed; gains of its composites in the last sample of a Monitor, and its loss on text that it was not trained on. One seed
each: no verdict on which trains best.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from mhc_compile import Monitor, StabilityWarning, composite_gains, mhc_compile, param_groups
from mhc_compile.kernels.reference import sinkhorn

N, TOKENS, DEPTH = 4, 64, 128
SPREADS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ITERATIONS = (1, 5, 10, 20)
SHOWN = 1.0  # the spread whose gains are drawn by depth
LENGTH, BATCH, LR, MHC_LR = 64, 8, 3e-3, 3e-2
FLOOR = 1e-6  # of what is drawn: a gain nearer to 1 is rounding
Matrices = Callable[[float, torch.Generator], Tensor]  # spread -> [TOKENS, N, N]


# ---------------------------------------------------------------------------------------------- the ways


def near_identity() -> Tensor:
    """0.9 on the diagonal, and rows that sum to 1."""
    return torch.full((N, N), 0.1 / (N - 1), dtype=torch.float64).fill_diagonal_(0.9)


def normal(count: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers for each token, [TOKENS, *count]."""
    return torch.randn((TOKENS, *count), generator=generator, dtype=torch.float64)


def hyper_connections(spread: float, generator: torch.Generator) -> Tensor:
    """HC: nothing holds the matrix."""
    return near_identity() + spread * torch.tanh(normal((N, N), generator))


def by_sinkhorn(iterations: int) -> Matrices:
    """mHC with so many iterations."""

    def matrices(spread: float, generator: torch.Generator) -> Tensor:
        return sinkhorn(near_identity().log() + spread * normal((N, N), generator), iterations)

    return matrices


def by_constraint(entry: Any) -> Matrices:
    """A row of the package's table of constraints."""

    def matrices(spread: float, generator: torch.Generator) -> Tensor:
        logits = entry.start(N) + spread * normal((entry.count(N),), generator)
        square = entry.count(N) == N * N
        made: Tensor = entry.res(logits.unflatten(-1, (N, N)) if square else logits, N)
        return made

    return matrices


def other_constraints() -> dict[str, Any]:
    """The rows of the table of constraints beside Sinkhorn and HC; none where the package has no such table."""
    if find_spec("mhc_compile.constraints") is None:
        return {}
    table = import_module("mhc_compile.constraints").CONSTRAINTS
    return {name: entry for name, entry in table.items() if name not in ("sinkhorn", "unconstrained")}


def ways() -> dict[str, Matrices]:
    """Every way to make matrices, by name."""
    found = {"HC": hyper_connections}
    found |= {f"Sinkhorn, R = {iterations}": by_sinkhorn(iterations) for iterations in ITERATIONS}
    return found | {name: by_constraint(entry) for name, entry in other_constraints().items()}


# ---------------------------------------------------------------------------------------------- random


def random_gains(make: Matrices, spread: float, depth: int) -> list[dict[str, float]]:
    """Gains of the product of the first 1, 2, 4, ... sites."""
    generator = torch.Generator().manual_seed(0)
    gains = composite_gains([make(spread, generator) for _ in range(depth)])
    depths = [2**power for power in range(depth.bit_length()) if 2**power <= depth]
    return [
        {"sites": sites, "forward": gains[sites - 1].forward, "backward": gains[sites - 1].backward} for sites in depths
    ]


def random_part(depth: int = DEPTH) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By way and spread."""
    return {
        name: {str(spread): random_gains(make, spread, depth) for spread in SPREADS} for name, make in ways().items()
    }


# ---------------------------------------------------------------------------------------------- trained


def text() -> Tensor:
    """The documentation of Python, as bytes."""
    return torch.tensor(list("\n".join(topics.values()).encode("utf-8", "replace")))


def batches(steps: int) -> Iterator[Tensor]:
    """The same for every model; the last tenth of the text is held out."""
    data, generator = text(), torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(data) * 9 // 10 - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([data[start : start + LENGTH] for start in starts])


@torch.no_grad()
def held_out(model: nn.Module, count: int = 8) -> float:
    """The loss on held-out text, in nats for each byte."""
    data = text()
    data = data[len(data) * 9 // 10 :][: count * BATCH * LENGTH].view(count, BATCH, LENGTH)
    model.eval()
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in data]
    model.train()
    return sum(losses) / count


def trained(steps: int, layers: int, options: dict[str, Any]) -> dict[str, Any]:
    """What one small model shows at the end of its training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = mhc_compile(LlamaForCausalLM(config), N, backend="eager", **options).train()
    groups = [{**group, "lr": MHC_LR if group["name"] == "mhc" else LR} for group in param_groups(model)]
    optimizer = torch.optim.AdamW(groups)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20))
    with Monitor(model, every=max(steps - 1, 1), max_gain=math.inf, warm_up=steps) as monitor:
        for ids in batches(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            monitor.gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            warm.step()
    last = monitor.history[-1]
    composites = [site.composite for site in last.sites if site.composite is not None]
    return {
        "step": last.step,
        "loss": held_out(model),
        "composite_forward": [one.gain.forward for one in composites],
        "composite_backward": [one.gain.backward for one in composites],
        "largest_column_error": max(site.single.column_error for site in last.sites),
        "similarity": last.sites[-1].similarity,
        "grad_norm": None if last.gradients is None else last.gradients.whole,
    }


def trained_part(steps: int, layers: int) -> dict[str, Any]:
    """By way; HC and the other constraints only where the package converts to them."""
    options: dict[str, dict[str, Any]] = {f"Sinkhorn, R = {one}": {"iterations": one} for one in ITERATIONS}
    others = other_constraints()
    if others:
        options |= {"HC": {"constraint": "unconstrained"}, **{name: {"constraint": name} for name in others}}
    found = {}
    for name, chosen in options.items():
        found[name] = trained(steps, layers, chosen)
        print(f"{name}: loss {found[name]['loss']:.3f}", flush=True)
        torch._dynamo.reset()
    return found


# ---------------------------------------------------------------------------------------------- out


def beyond_one(gain: dict[str, float]) -> float:
    """The larger of forward and backward gain, less the 1 of a doubly stochastic matrix, for a logarithmic axis."""
    return max(gain["forward"] - 1, gain["backward"] - 1, FLOOR)


def draw(result: dict[str, Any], path: Path) -> None:
    """Random gains by depth and by spread, and the trained composites by depth."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(dict.fromkeys([*result["random"], *result["trained"]]))
    color = {name: colormaps["tab10"](place % 10) for place, name in enumerate(names)}
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    by_depth, by_spread, small = figure.subplots(1, 3)
    for name, spreads in result["random"].items():
        line = {"color": color[name], "marker": "o", "ms": 3, "lw": 1.3, "label": name}
        shown = spreads[str(SHOWN)]
        by_depth.plot([gain["sites"] for gain in shown], [beyond_one(gain) for gain in shown], **line)
        by_spread.plot([float(one) for one in spreads], [beyond_one(gains[-1]) for gains in spreads.values()], **line)
    for name, one in result["trained"].items():
        pairs = zip(one["composite_forward"], one["composite_backward"], strict=True)
        gains = [beyond_one({"forward": forward, "backward": backward}) for forward, backward in pairs]
        small.plot(gains, color=color[name], marker="o", ms=3, lw=1.3, label=f"{name}: loss {one['loss']:.2f}")
    steps = next(iter(result["trained"].values()))["step"] + 1
    by_depth.set(title=f"random matrices, spread {SHOWN:g}", xlabel="sites in the product", xscale="log")
    by_depth.set(ylabel="composite gain - 1, the larger of forward and backward")
    by_spread.set(title=f"random matrices, {shown[-1]['sites']} sites", xlabel="spread of the logits", xscale="log")
    small.set(title=f"small Llamas after {steps} steps", xlabel="first site of the product, to the last site")
    small.xaxis.get_major_locator().set_params(integer=True)
    for axes in (by_depth, by_spread, small):
        axes.set(yscale="log", ylim=(FLOOR / 2, 1e6))
        axes.axhline(2999, color="grey", lw=0.8, ls="--")
        axes.axhline(0.6, color="grey", lw=0.8, ls="--")
    by_depth.text(1, 3500, "HC at 27B in the paper: 3000", fontsize=7, color="grey")
    by_depth.text(1, 0.68, "mHC at 27B in the paper: 1.6", fontsize=7, color="grey")
    by_depth.set_xticks([gain["sites"] for gain in shown], [str(gain["sites"]) for gain in shown])
    by_depth.minorticks_off()
    by_spread.legend(fontsize=7, loc="upper left")
    small.legend(fontsize=7, loc="upper right")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Compute both parts, and write them where --out and --picture say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", StabilityWarning)  # the figures say it
    torch.set_num_threads(1)  # sums in one order, on every machine
    result = {
        "settings": {
            "n": N,
            "tokens": TOKENS,
            "depth": options.depth,
            "steps": options.steps,
            "layers": options.layers,
            "torch": torch.__version__,
        },
        "random": random_part(options.depth),
        "trained": trained_part(options.steps, options.layers),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        draw(result, options.picture)
    return result


if __name__ == "__main__":
    main()
