"""What a Monitor costs: training steps with it and without, in turn in one process.

python benchmarks/monitor.py [--rounds 12] [--every 100] [--threads 1] [--backend aot_eager] [--out FILE]

Two copies of one converted Llama train side by side. A round takes one step that is sampled, and a few that are not, of
the watched one, each next to a step of the other. Times are medians in milliseconds. The cost of a
Monitor is what sampling adds to the sampled step, once in `every` steps, and what watching adds to every other step:

    overhead = ((sampled / plain - 1) + (every - 1) (unsampled / plain - 1)) / every

The first sample, which traces the model, is reported by itself: `first_s`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mhc_compile import Monitor, mhc_compile, param_groups

BETWEEN = 4  # unsampled steps of a round
Step = Callable[[], None]


def build(width: int, layers: int, backend: str, device: torch.device) -> nn.Module:
    """A converted Llama in train mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        use_cache=False,
    )
    return mhc_compile(LlamaForCausalLM(config).to(device), 4, backend=backend).train()


def stepping(model: nn.Module, ids: Tensor) -> Step:
    """A training step of a model."""
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step, device: torch.device) -> float:
    """The time of one step, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    rounds: int, every: int, backend: str, width: int = 256, layers: int = 4, batch: int = 4, length: int = 128
) -> dict[str, Any]:
    """Times of plain, unsampled and sampled steps, and the overhead of sampling every `every` steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watched, plain = (build(width, layers, backend, device) for _ in range(2))
    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    with_monitor, without = stepping(watched, ids), stepping(plain, ids)
    times: dict[str, list[float]] = {"plain": [], "unsampled": [], "sampled": []}
    ratios: dict[str, list[float]] = {"unsampled": [], "sampled": []}
    for step in (with_monitor, without):
        step()
        step()
    with Monitor(watched, every=BETWEEN + 1) as monitor:
        first = seconds(with_monitor, device)
        for _ in range(BETWEEN):
            with_monitor()
        for _ in range(rounds):
            for place in range(BETWEEN + 1):
                other = seconds(without, device)
                own = seconds(with_monitor, device)
                kind = "sampled" if monitor.sampled else "unsampled"
                assert monitor.sampled == (place == 0)
                times["plain"].append(other)
                times[kind].append(own)
                ratios[kind].append(own / other)
    extra = {kind: median(found) - 1 for kind, found in ratios.items()}
    return {
        "model": f"Llama, {layers} layers, width {width}, 4 streams, {batch} x {length} tokens",
        "every": every,
        "ms": {kind: 1e3 * median(found) for kind, found in times.items()},
        "extra_of_a_sampled_step": extra["sampled"],
        "extra_of_an_unsampled_step": extra["unsampled"],
        "overhead": (extra["sampled"] + (every - 1) * extra["unsampled"]) / every,
        "overhead_of_sampling_alone": extra["sampled"] / every,
        "first_s": first,
        "rounds": rounds,
    }


def machine(backend: str) -> dict[str, Any]:
    """Where the figures are from."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "backend": backend}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="aot_eager")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = {"machine": machine(options.backend), **measure(options.rounds, options.every, options.backend)}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
