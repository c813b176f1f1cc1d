"""How long a plan takes over the number of sites, and where: the exact search, and the cost model of a real graph.

python benchmarks/plan_time.py [--sites 128] [--stages 8] [--times 1 2 4 8] [--graph 16] [--out FILE]

Search: sites of random unequal costs, without a limit; for a limit 2 % above the least that any plan takes; and that
least itself. Graph: seconds to capture, rewrite, cost and plan a Llama of `--graph` sites, and of twice as many. They
are seconds of the processor, which other work on the machine disturbs less than the clock; the file is saved after each
size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mhc_compile import mhc_compile
from mhc_compile.partition import Pipeline, planned
from mhc_compile.passes.cost import CostModel
from mhc_compile.passes.plan_search import Search, Unit
from mhc_compile.trace import rewritten


def units(count: int) -> list[Unit]:
    """Sites of four streams whose branches keep different amounts."""
    numbers = random.Random(0)
    return [
        Unit(
            time=1 + numbers.random(),
            kept=numbers.randint(60, 90),
            replay=0.1,
            saved=numbers.randint(60, 70),
            state=40,
            outgoing=40,
            together=numbers.randint(20, 25),
            alone=80,
            boundary=40,
            send=0.01,
        )
        for _ in range(count)
    ]


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Of one call, and its result."""
    start = time.process_time()
    result = call()
    return round(time.process_time() - start, 3), result


def search_times(sites: int, stages: int) -> dict[str, Any]:
    """Seconds of the three searches."""
    chain, in_flight = units(sites), [stages - stage for stage in range(stages)]
    free, _ = seconds(Search(chain, in_flight).run)
    lowest, least = seconds(Search(chain, in_flight).least_memory)
    tight, _ = seconds(Search(chain, in_flight, least * 1.02).run)
    return {"sites": sites, "stages": stages, "no limit": free, "least memory": lowest, "tight limit": tight}


def graph_times(sites: int, stages: int) -> dict[str, Any]:
    """Seconds of each step from a converted Llama to its plan."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=sites // 2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    inputs = {"input_ids": torch.arange(64).reshape(2, 32), "use_cache": False}
    mhc_compile(model, n=4, backend="eager", example_inputs=inputs)
    capture, made = seconds(lambda: rewritten(model, inputs))
    cost, costs = seconds(lambda: CostModel(made.graph, made.arguments))
    several, _ = seconds(lambda: costs.units)
    pipeline = Pipeline.of(stages, 2 * stages)
    plan, _ = seconds(lambda: planned(costs, pipeline, "llama", 4))
    return {"sites": sites, "capture and rewrite": capture, "cost model": cost + several, "plan": plan}


def main() -> None:
    """Print the tables; write them to a file with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=128)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--graph", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
    found |= {"python": platform.python_version(), "load_average_before": round(os.getloadavg()[0], 1)}
    for kind, one, sizes in (
        ("search", lambda times: search_times(options.sites * times, options.stages), options.times),
        ("graph", lambda times: graph_times(options.graph * times, 4), (1, 2)),
    ):
        found[kind] = []
        for times in sizes:
            found[kind].append(one(times))
            print("  ".join(_text(*pair) for pair in found[kind][-1].items()), flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _text(name: str, value: float) -> str:
    return f"{name} {value:.2f} s" if isinstance(value, float) else f"{name} {value}"


if __name__ == "__main__":
    main()
