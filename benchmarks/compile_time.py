"""What conversion costs before the first result: first calls, and the passes' time over the depth of the model.

python benchmarks/compile_time.py [--layers 12] [--backend inductor] [--rounds 2] [--out FILE]

First call: a Llama, plain under torch.compile and converted with the same backend, forward and backward, in turn in one
process with cold caches (a fresh cache directory and torch._dynamo.reset() before each); the ratio is of best times.
Passes: the seconds of canonicalising, finding and rewriting graphs of growing depth; the ratio is per doubling.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhc_compile import MHCConfig, mhc_compile
from mhc_compile.conversion import original_forward
from mhc_compile.passes.bind import bind_parameters
from mhc_compile.passes.capture import just_in_time
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.rewrite import analyze, rewrite

DEPTHS = (24, 48, 96, 192)  # layers; a layer has two sites


def llama(layers: int, width: int = 128) -> nn.Module:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).train()


def inputs() -> dict[str, Any]:
    """Token ids of two sequences."""
    return {"input_ids": torch.arange(64).reshape(2, 32), "use_cache": False}


def first_call(model: nn.Module) -> float:
    """Seconds of the first forward and backward."""
    start = time.perf_counter()
    model(**inputs()).logits.square().mean().backward()
    return time.perf_counter() - start


def compare_first_calls(layers: int, backend: str, rounds: int) -> dict[str, Any]:
    """Plain and converted in turn; best of some rounds each, without what conversion itself takes."""
    plain_times, converted_times, conversion_times = [], [], []
    first_call(torch.compile(llama(1), backend=backend))  # what a process pays once: imports, compiler checks
    for _ in range(rounds):
        _forget_compilations()
        plain_times.append(first_call(torch.compile(llama(layers), backend=backend, fullgraph=True)))
        _forget_compilations()
        model = llama(layers)
        start = time.perf_counter()
        mhc_compile(model, 4, example_inputs=inputs(), backend=backend)
        conversion_times.append(time.perf_counter() - start)
        _forget_compilations()
        converted_times.append(first_call(model))
        print(f"plain {plain_times[-1]:.1f} s, converted {converted_times[-1]:.1f} s", flush=True)
    return {
        "layers": layers,
        "backend": backend,
        "plain_s": round(min(plain_times), 2),
        "converted_s": round(min(converted_times), 2),
        "mhc_compile_s": round(min(conversion_times), 2),
        "ratio": round(min(converted_times) / min(plain_times), 3),
    }


def _forget_compilations() -> None:
    torch._dynamo.reset()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="mhc_compile_time_")


def pass_times(depths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Seconds of all passes on one captured graph of each depth, and the growth over the depth before."""
    rows: list[dict[str, Any]] = []
    for layers in depths:
        torch._dynamo.reset()
        captured = just_in_time(original_forward, llama(layers, width=32), (), inputs())
        seconds = min(_run_passes(copy_graph(captured.graph)) for _ in range(rounds))
        row = {"layers": layers, "nodes": len(captured.graph.graph.nodes), "seconds": round(seconds, 3)}
        if rows:
            row["growth"] = round(seconds / rows[-1]["exact"], 2)
        rows.append({**row, "exact": seconds})
        print(f"{layers} layers ({2 * layers} sites): {row}", flush=True)
    return [{key: value for key, value in row.items() if key != "exact"} for row in rows]


def _run_passes(graph: torch.fx.GraphModule) -> float:
    gc.collect()
    start = time.perf_counter()
    analysis = analyze(graph)
    look_up, _ = bind_parameters(graph, analysis.sites, MHCConfig(n=4))
    rewrite(analysis, MHCConfig(n=4), look_up)
    return time.perf_counter() - start


def main() -> None:
    """Run both comparisons and print, or save, the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
        if not torch.cuda.is_available()
        else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "passes": pass_times(DEPTHS, 3),
        "first_call": compare_first_calls(options.layers, options.backend, options.rounds),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
