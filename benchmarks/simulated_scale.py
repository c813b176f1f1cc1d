"""What mHC costs at scale by the cost model: step, bubble and memory of pipelines of two large models.  Simulated.

python -m benchmarks.simulated_scale [--out FILE]      simulate, on a CPU and without weights (a few minutes)
python -m benchmarks.simulated_scale --table           print the table of benchmarks/results/simulated_scale.json
python -m benchmarks.simulated_scale --write           put it into docs/pipeline.md

The figures follow from sizes, from the rates of `Device` and from the schedule; they are the same in every run. The
baseline is the same graph with plain adds. mHC is costed as it is compiled, each merge fused with the read behind it
(14 and 24 units of C a site), and again with an op for each term, as the kernels of the paper's table 2 (18 and 39).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from benchmarks.mixture import Decoder, Mixture
from mhc_compile import MHCConfig, Plan
from mhc_compile.conversion import original_forward
from mhc_compile.partition import Pipeline, planned
from mhc_compile.passes.bind import bind_parameters
from mhc_compile.passes.capture import Captured, just_in_time
from mhc_compile.passes.cost import CostModel, Device
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.rewrite import analyze, rewrite

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "simulated_scale.json", ROOT / "docs" / "pipeline.md"
START, END = "<!-- simulated scale -->", "<!-- end of simulated scale -->"
PAPER = 0.067
N, TOKENS = 4, 4096
EACH = 4  # microbatches for each stage
# stages, schedule: with "dualpipev" two stages share a device
PIPELINES = (8, "1f1b"), (16, "1f1b"), (16, "dualpipev")
MODELS = {
    "27B": Mixture(
        layers=30,
        width=2560,
        heads=32,
        vocabulary=129280,
        dense=(1, 12288),
        experts=72,
        active=6,
        shared=2,
        expert=1536,
    ),
    "61 layers": Mixture(
        layers=61,
        width=7168,
        heads=128,
        vocabulary=129280,
        dense=(3, 18432),
        experts=256,
        active=8,
        shared=1,
        expert=2048,
        parallel=64,
    ),
}
# Stages are on different machines: a link of 400 Gb/s for each device. Within a machine it is faster.
NETWORK = Device("H200, 400 Gb/s", link=5e10)
WITHIN = Device()

KINDS = "baseline", "mHC", "mHC, an op a term"
PARTS = "forward", "backward", "replay"

Row = dict[str, Any]


# --- the graphs -------------------------------------------------------------------------------------------


def capture(size: Mixture, tokens: int) -> Captured:
    """The plain graph of a microbatch of one sequence."""
    torch._dynamo.reset()
    return just_in_time(original_forward, Decoder(size), (torch.zeros(1, tokens, dtype=torch.long, device="meta"),), {})


def widened(captured: Captured) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """A copy on n streams, level 1, and its arguments."""
    graph = copy_graph(captured.graph)
    analysis = analyze(graph)
    config = MHCConfig(n=N)
    look_up, names = bind_parameters(graph, analysis.sites, config)
    added = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")][len(captured.arguments) :]
    assert len(added) == len(names)
    rewrite(analysis, config, look_up)
    return graph, (*captured.arguments, *(torch.empty_like(one, device="meta").requires_grad_() for one in added))


def cost_models(captured: Captured) -> dict[str, CostModel]:
    """Of the baseline, of mHC as it is compiled, and of mHC op by op, on the network."""
    wide, plain = widened(captured), (captured.graph, captured.arguments)
    return {
        kind: CostModel(*made, device=NETWORK, kernels=kernels)
        for kind, made, kernels in zip(KINDS, (plain, wide, wide), (None, "chain", "op"), strict=True)
    }


# --- the plans --------------------------------------------------------------------------------------------


def plans(costs: dict[str, CostModel], stages: int, schedule: str) -> dict[str, Plan]:
    """Of the baseline, of mHC that stores everything, and of mHC that replays."""
    pipeline = Pipeline.of(stages, EACH * stages, schedule)
    storing = replace(pipeline, memory=1e18)
    return {
        "baseline": planned(costs["baseline"], storing, "baseline", 1),
        "mHC, stored": planned(costs["mHC"], storing, "mHC", N),
        "mHC, replayed": planned(costs["mHC"], pipeline, "mHC", N),
    }


def within(plan: Plan) -> Plan:
    """The same plan with links as they are within a machine."""
    nearer = NETWORK.link / WITHIN.link
    units = (replace(unit, cost=replace(unit.cost, send=unit.cost.send * nearer)) for unit in plan.units)
    return replace(plan, units=tuple(units))


def rows(name: str, costs: dict[str, CostModel], stages: int, schedule: str) -> list[Row]:
    made = plans(costs, stages, schedule)
    steps = {kind: (plan.step_seconds, within(plan).step_seconds) for kind, plan in made.items()}
    over = {kind: [a / b - 1 for a, b in zip(each, steps["baseline"], strict=True)] for kind, each in steps.items()}
    found = []
    for kind, plan in made.items():
        found.append(
            {
                "model": name,
                "stages": stages,
                "schedule": schedule,
                "what": kind,
                "step_s": round(steps[kind][0], 5),
                "overhead": round(over[kind][0], 4),
                "overhead_within": round(over[kind][1], 4),
                "bubble": round(plan.bubble, 4),
                "devices": plan.devices,
                "slowest_stage_s": round(max(stage.seconds for stage in plan.stages), 6),
                "peak_bytes": [stage.peak for stage in plan.stages[: plan.devices]],  # of each device
                "weights_bytes": [stage.weights for stage in plan.stages],
                "sites": [len(plan.sites_of(stage)) for stage in plan.stages],
                "blocks": [[len(block) for block in plan.block_sites(stage)] for stage in plan.stages],
            }
        )
    return found


def simulate(models: dict[str, Mixture], pipelines: Sequence[tuple[int, str]], out: Path | None = None) -> Row:
    """Everything, for each model; saved after each."""
    result: Row = {
        "simulated": "by the cost model; nothing here is measured",
        "torch": torch.__version__,
        "devices": {"network": asdict(NETWORK), "within": asdict(WITHIN)},
        "n": N,
        "tokens": TOKENS,
        "microbatches_each_stage": EACH,
        "models": {},
        "rows": [],
    }
    for name, size in models.items():
        costs = cost_models(capture(size, TOKENS))
        result["models"][name] = {**asdict(size), **work(costs), "parameters_here": parameters(size)}
        for count, schedule in pipelines:
            made = rows(name, costs, count, schedule)
            result["rows"] += made
            print("\n".join(map(line, made)), flush=True)
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def work(costs: dict[str, CostModel]) -> Row:
    """What one device would need for the whole model, without a pipeline."""
    found: Row = {"sites": len(costs["mHC"].sites)}
    for kind, model in costs.items():
        forward, backward = (sum(one) for one in zip(*model.seconds, strict=True))
        found[kind] = {
            "flops": sum(op.flops + op.backward_flops for op in model.nodes.values()),
            "forward_s": round(forward, 6),
            "backward_s": round(backward, 6),
            "replay_s": round(sum(unit.replay for unit in model.units), 6),
        }
    return found


def parameters(size: Mixture) -> int:
    """On one group of devices that share nothing but experts."""
    return sum(one.numel() for one in Decoder(size).parameters())


def line(row: Row) -> str:
    peaks = ", ".join(gib(one) for one in row["peak_bytes"])
    return (
        f"{row['model']:10s}{row['stages']:3d} {row['what']:28s}{row['step_s']:8.3f} s {row['overhead']:+7.1%} "
        f"bubble {row['bubble']:.1%}  {peaks} GiB"
    )


# --- the table --------------------------------------------------------------------------------------------


def gib(count: float) -> str:
    return f"{count / 2**30:.0f}"


def table(result: Row) -> str:
    """The markdown of the page."""
    near, far = (f"{result['devices'][name]['link'] / 1e9:.0f} GB/s" for name in ("within", "network"))
    lines = [
        f"| | step | over the baseline, links of {far} | of {near}, same cuts | bubble "
        "| memory by device, first to last, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        own = row["what"] == "baseline"
        if own:
            lines.append(f"| **{row['model']}, {pipeline_text(row)}** | | | | | |")
        over = ["", ""] if own else [f"{row[name]:+.1%}" for name in ("overhead", "overhead_within")]
        peaks = " ".join(gib(one) for one in row["peak_bytes"])
        cells = [row["what"], f"{row['step_s']:.3f} s", *over, f"{row['bubble']:.1%}", peaks]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {one}" for one in remarks(result, near, far))])


def remarks(result: Row, near: str, far: str) -> list[str]:
    """The paper's figure beside these, one device without a pipeline, and the recompute blocks."""
    found = []
    for name in result["models"]:
        kinds = {kind: sum(result["models"][name][kind][f"{part}_s"] for part in PARTS) for kind in KINDS}
        over = [kinds[kind] / kinds["baseline"] - 1 for kind in KINDS[1:]]
        replayed = [row for row in result["rows"] if (row["model"], row["what"]) == (name, "mHC, replayed")]
        spans = [f"{min(each):+.1%} to {max(each):+.1%}" for each in spread(replayed)]
        found.append(
            f"{name}: all ops of a microbatch, replayed, without a pipeline: {over[0]:+.1%} over the baseline, and "
            f"{over[1]:+.1%} with an op a term. In these pipelines {spans[0]} with links of {far}, {spans[1]} with "
            f"{near}. (The paper: {PAPER:+.1%} for its 27B model, measured on its own machines and schedule.)"
        )
        for row in replayed:
            blocks = [" + ".join(map(str, stage)) for stage in row["blocks"] if stage]
            found.append(
                f"{name}, {pipeline_text(row)}: recompute blocks of {blocks[0]} sites in the first stage that has any, "
                f"{blocks[len(blocks) // 2]} in a middle one, {blocks[-1]} in the last."
            )
    return found


def spread(replayed: list[Row]) -> tuple[list[float], list[float]]:
    return [row["overhead"] for row in replayed], [row["overhead_within"] for row in replayed]


def pipeline_text(row: Row) -> str:
    shared = "" if row["devices"] == row["stages"] else f" on {row['devices']} devices"
    return f"{row['stages']} stages{shared}, {row['schedule']}"


def with_table(page: str, text: str) -> str:
    """The page with the text between the markers."""
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise SystemExit(f"docs/pipeline.md has to hold one {START} and, behind it, one {END}")
    return f"{page[: page.index(START)]}{START}\n{text}\n{page[page.index(END) :]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the results, as JSON")
    parser.add_argument("--table", action="store_true", help="of the results that are there")
    parser.add_argument("--write", action="store_true", help="the table into docs/pipeline.md")
    options = parser.parse_args()
    if options.table or options.write:
        text = table(json.loads(RESULTS.read_text()))
        if options.write:
            PAGE.write_text(with_table(PAGE.read_text(), text))
        else:
            print(text)
        return
    simulate(MODELS, PIPELINES, options.out)


if __name__ == "__main__":
    main()
