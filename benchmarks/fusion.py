"""What `backend="mhc"` does to models that are mHC: their graphs, how long they compile, and the time of a step.

python -m benchmarks.fusion [--only NAMES] [--layers 1,4,8] [--rounds 5] [--threads 1] [--seconds N] [--out FILE]
python -m benchmarks.fusion --dry                  tiny, without inductor: everything but figures that mean something

Each model runs eager, under inductor, and under "mhc", in one process; their outputs and gradients are compared before
anything is timed. The models are those of `transformers` in tiny random-weight configurations, and a Llama whose trunk
is mHC written by hand; its fourth contestant is the same function from `mhc_compile`.

Graphs: calls in the graphs that reach the backend, before and behind matching, lowering and fusing, and of these what
belongs to mHC, for each site (the exit's share included). Compile: the first forward and backward, with empty caches,
behind what a process pays once (imports, the check of the processor's instructions). Each depth is a part of its own:
what inductor compiles grows with the layers, the bodies of the ops are compiled once for all sites.
Step: medians, all contestants in turn. On a CPU ratios are of processor time, which other work on the machine disturbs
less than the clock.

With a CUDA device two parts more: a chain of sites whose merges are fused with the reads behind them, beside one whose
are not, and a larger DeepSeek-V4: a training step, and decoding with a cache, also with CUDA graphs. What fails goes
into the results with its reason, and the rest goes on; the file is saved after each part.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import json
import operator
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from benchmarks.llama import ByHand, Llama, Shape
from benchmarks.turns import Taken, environment, forget_compiled_code, in_turn, now, reason, taken
from mhc_compile import mhc_compile
from mhc_compile.backend import level_2
from mhc_compile.conversion import conversion
from mhc_compile.passes.capture import normalize
from mhc_compile.passes.history import run_passes
from mhc_compile.passes.match import match_passes
from mhc_compile.passes.match_report import Matches

ROOT = Path(__file__).parents[1]
LIMIT = 1e-3  # how far float32 outputs and gradients may be from eager, of the largest value
SMALL = Shape(layers=1, width=32, heads=4, hidden=64, vocabulary=99, batch=2, length=8)

Row = dict[str, Any]
Forward = Callable[..., Any]
Save = Callable[[], None]


# --- the models -------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model that is mHC, a call of it, and other modules that compute the same."""

    model: nn.Module
    inputs: dict[str, Any]
    others: dict[str, nn.Module] = field(default_factory=dict)


def from_zoo(name: str, layers: int, device: str) -> Subject:
    """A model of the test zoo, with coefficients that depend on the streams: as released they hardly do."""
    sys.path.append(str(ROOT / "tests"))
    import zoo

    build, inputs = next((build, inputs) for known, build, inputs in zoo.REFERENCE if known == name)
    model = build()
    trunk = model.model if hasattr(model, "model") else model
    del trunk.layers[layers:]
    trunk.config.num_hidden_layers = layers
    disturb(model, "hc")
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs().items()}
    return Subject(model.to(device), given)


def disturb(model: nn.Module, word: str) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if word in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def written_by_hand(layers: int, device: str, backend: str) -> Subject:
    """A Llama on four streams in the paper's formulas, and the same from a conversion."""
    shape = Shape(**{**vars(SMALL), "layers": layers})

    def plain() -> Llama:
        torch.manual_seed(0)
        return Llama(shape).to(device)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (shape.batch, shape.length), generator=generator).to(device)
    converted = mhc_compile(plain(), 4, example_inputs=(ids,), backend=backend)
    disturb(converted, "mhc.")
    sites = [copy.deepcopy(converted.get_submodule(f"mhc.{one.name}")) for one in conversion(converted).record.sites]
    return Subject(ByHand(plain(), sites), {"ids": ids}, {"converted": converted})  # type: ignore[arg-type]


SUBJECTS: dict[str, Callable[[int, str, str], Subject]] = {
    "deepseek_v4": lambda layers, device, backend: from_zoo("deepseek_v4", layers, device),
    "glm5_next": lambda layers, device, backend: from_zoo("glm5_next", layers, device),
    "hy_v4": lambda layers, device, backend: from_zoo("hy_v4", layers, device),
    "llama by hand": written_by_hand,
}


# --- graphs -----------------------------------------------------------------------------------------------


@dataclass
class Counter:
    """A backend that counts what reaches it, and what the passes make of it; runs op by op."""

    row: Row = field(default_factory=lambda: dict.fromkeys(("graphs", "sites", "exits", *COUNTS), 0))

    def __call__(self, gm: fx.GraphModule, examples: list[Any]) -> Forward:
        values = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
        if not any(isinstance(value, Tensor) for value in values):
            return gm.forward
        graph, found = normalize(gm, values), list[Matches]()
        before = calls(graph)
        run_passes(graph, [*match_passes(found), *level_2("eager")])
        after = calls(graph)
        own = [node for node in after if is_mhc(node)]
        self.row["graphs"] += 1
        self.row["sites"] += len(found[0].sites)
        self.row["exits"] += len(found[0].heads)
        for name, nodes in zip(COUNTS, (before, after, own), strict=True):
            self.row[name] += len(nodes)
            self.row[f"{name}, ops"] = self.row.get(f"{name}, ops", 0) + sum(map(is_op, nodes))
        graph.recompile()
        return graph


COUNTS = "before", "behind", "of mHC, behind"


def calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def is_mhc(node: fx.Node) -> bool:
    """An op of this package, or an output taken from one."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, fx.Node) and getattr(source.target, "namespace", "") == "mhc"


def is_op(node: fx.Node) -> bool:
    """Computes: no view, and no output taken from another."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return not any(one.alias_info is not None for one in node.target._schema.returns)


def graphs(subject: Subject) -> Row:
    """Counts, and those of mHC for each site."""
    counter = Counter()
    torch._dynamo.reset()
    torch.compile(subject.model, backend=counter)(**subject.inputs)
    torch._dynamo.reset()
    row = counter.row
    for ops in ("", ", ops"):
        before, behind, own = (row[f"{name}{ops}"] for name in COUNTS)
        # what is not of mHC is in both graphs
        row[f"a site{ops}"] = [round((before - behind + own) / row["sites"], 1), round(own / row["sites"], 1)]
    return row


# --- compiling and running --------------------------------------------------------------------------------


def step(forward: Forward, subject: Subject) -> Tensor:
    """The first output, behind a backward of a fixed function of it."""
    output = first_output(forward(**subject.inputs))
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output.float() * noise.to(output.device)).sum().backward()
    return output.detach()


def first_output(found: Any) -> Tensor:
    if isinstance(found, Tensor):
        return found
    return next(one for one in found.values() if isinstance(one, Tensor) and one.is_floating_point())


def results(module: nn.Module, forward: Forward, subject: Subject) -> dict[str, Tensor]:
    """The output, and the gradients of the parameters by the names that they have in a plain model."""
    module.zero_grad()
    found = {"output": step(forward, subject)}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("model.")] = parameter.grad.clone()
    return found


def error(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference, each tensor's of its own scale, or of a hundredth of the largest one."""
    shared = found.keys() & right.keys()
    assert "output" in shared and len(shared) > 3
    scale = max(float(right[name].abs().max()) for name in shared)
    return max(
        float((found[name] - right[name]).abs().max()) / max(float(right[name].abs().max()), 1e-2 * scale)
        for name in shared
    )


def kernels() -> int:
    from torch._inductor import metrics

    return int(metrics.generated_kernel_count)


def compile_and_run(row: Row, subject: Subject, backends: dict[str, Any], rounds: int) -> None:
    """First calls and steps of all contestants."""
    modules = {"eager": subject.model, **dict.fromkeys(backends, subject.model), **subject.others}
    forwards: dict[str, Forward] = {"eager": subject.model}
    right = results(subject.model, subject.model, subject)
    row |= {"error": {}, "compile": {}, "kernels": {}}
    for name, module in modules.items():
        if name == "eager":
            continue
        forwards[name] = torch.compile(module, backend=backends[name]) if name in backends else module
        forget_compiled_code()
        before, found = kernels(), dict[str, Tensor]()
        call = partial(results, module, forwards[name], subject)
        first = taken(lambda call=call, found=found: found.update(call()))
        row["compile"][name] = as_row(first)
        row["kernels"][name] = kernels() - before
        row["error"][name] = error(found, right)
        if not row["error"][name] < LIMIT:
            raise RuntimeError(f"{name} is {row['error'][name]:.1g} away from eager, where {LIMIT:g} is allowed")
    for what, call in (("forward", forward_alone), ("forward and backward", step)):
        turns = {name: lambda call=call, run=run: call(run, subject) for name, run in forwards.items()}
        row[what] = {name: as_row(one) for name, one in in_turn(turns, rounds).items()}
    row["ratios"] = ratios(row)


def forward_alone(forward: Forward, subject: Subject) -> None:
    """The forward part of a training step."""
    forward(**subject.inputs)


def as_row(one: Taken) -> Row:
    return {"wall_s": round(one.wall, 5), "processor_s": round(one.processor, 5)}


def ratios(row: Row) -> Row:
    """Times over those of "mhc": above 1 it is faster."""
    clock = "wall_s" if torch.cuda.is_available() else "processor_s"
    return {
        what: {name: round(one[clock] / row[what]["mhc"][clock], 2) for name, one in row[what].items() if name != "mhc"}
        for what in ("compile", "forward", "forward and backward")
        if row[what]["mhc"][clock]
    }


# --- with a GPU: a chain of sites -------------------------------------------------------------------------


def chain(row: Row, sites: int, tokens: int, features: int, device: str, dtype: torch.dtype) -> None:
    """A trunk of sites whose branches do nothing: merges fused with the reads behind them, and not."""
    from mhc_compile.kernels import cross_site_ops, site_ops

    generator = torch.Generator().manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(device)

    start = random(tokens, 4, features).to(dtype)
    parameters = [(random(4 * features, 24, scale=(4 * features) ** -0.5), random(3), random(24)) for _ in range(sites)]
    for one in parameters:
        for tensor in one:
            tensor.requires_grad_()

    def unfused(x: Tensor) -> Tensor:
        for one in parameters:
            u, _, post, res, carrier = site_ops.read(x, *one, 1e-6, 20)
            x = site_ops.merge_carried(x, u, carrier, post, res)
        return x

    def fused(x: Tensor) -> Tensor:
        u, _, post, res, carrier = site_ops.read(x, *parameters[0], 1e-6, 20)
        for one in parameters[1:]:
            x, u, _, post, res, carrier = cross_site_ops.merge_read(x, u, carrier, post, res, one, 1e-6, 20)
        return site_ops.merge_carried(x, u, carrier, post, res)

    def forward(function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return function(start)

    def both(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = start.detach().requires_grad_()
        function(x).backward(start)
        assert x.grad is not None
        return x.grad

    row |= {"sites": sites, "tokens": tokens, "features": features, "dtype": str(dtype).removeprefix("torch.")}
    for what, call in (("forward", forward), ("forward and backward", both)):
        a, b = call(fused).float(), call(unfused).float()
        far = float((a - b).abs().max() / b.abs().max())
        if not far < (1e-4 if dtype == torch.float32 else 5e-2):
            raise RuntimeError(f"fused and unfused differ by {far:.1g} in {what}")
        made = in_turn({"fused": partial(call, fused), "unfused": partial(call, unfused)}, 5, 5)
        row[what] = {**{name: as_row(one) for name, one in made.items()}, "error": far}
        row[what]["unfused over fused"] = round(made["unfused"].wall / made["fused"].wall, 3)


# --- with a GPU: a larger DeepSeek-V4 ---------------------------------------------------------------------


def deepseek(layers: int, width: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A DeepSeek-V4 of few layers with its published attention, a quarter of its experts' width, and few of them."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        vocab_size=1024 if width < 512 else 32000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 128, 4),
        num_key_value_heads=1,
        head_dim=32 if width < 512 else 128,
        q_lora_rank=width // 4,
        o_lora_rank=width // 4,
        o_groups=2,
        qk_rope_head_dim=16 if width < 512 else 64,
        moe_intermediate_size=width // 2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        num_hash_layers=0,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        hc_mult=4,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = DeepseekV4ForCausalLM(config)
    disturb(model, "hc")
    return model.to(dtype)


def training_steps(row: Row, save: Save, model: nn.Module, backends: dict[str, Any], tokens: int, rounds: int) -> None:
    """A training step of one sequence: first call, step, and peak memory of each backend."""
    device = next(model.parameters()).device
    ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)

    def run(forward: Forward) -> float:
        model.zero_grad(set_to_none=True)
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    forwards: dict[str, Forward] = {}
    row |= {"tokens": tokens, "losses": {}, "first_s": {}, "peak_bytes": {}, "failed": {}}
    for name, backend in {"eager": None, **backends}.items():
        forward = model if backend is None else torch.compile(model, backend=backend)
        try:
            start = now()
            row["losses"][name] = run(forward)
            row["first_s"][name] = round(now() - start, 1)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                run(forward)
                row["peak_bytes"][name] = torch.cuda.max_memory_allocated()
        except Exception as error:  # reported by name; the others go on
            row["failed"][name] = reason(error)
            continue
        forwards[name] = forward
        timed = in_turn({name: partial(run, forward) for name, forward in forwards.items()}, rounds)
        row["step"] = {name: as_row(one) for name, one in timed.items()}  # of those that are there, in turn
        save()


def cache_name(model: nn.Module) -> str:
    """What a transformers model calls its cache: `cache` since 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def decoding(
    row: Row, save: Save, model: nn.Module, backends: dict[str, Any], batch: int, prompt: int, rounds: int
) -> None:
    """One token for each of `batch` sequences behind a prompt, from a copy of the same cache; logits beside eager's."""
    device = next(model.parameters()).device
    ids = torch.randint(1000, (batch, prompt + 1), generator=torch.Generator().manual_seed(0)).to(device)
    row |= {"batch": batch, "prompt": prompt, "first_s": {}, "error": {}, "failed": {}}
    forwards: dict[str, Forward] = {"eager": model}
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values

        def one(forward: Forward, held: Any) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            logits: Tensor = forward(input_ids=ids[:, -1:], use_cache=True, **{cache_name(model): held}).logits
            return logits

        def turn(forward: Forward) -> list[float]:
            """Seconds of three calls, behind one to warm up; each adds to a cache of its own."""
            calls = [partial(one, forward, copy.deepcopy(cache)) for _ in range(4)]
            return [taken(call).wall for call in calls][1:]

        right = one(model, copy.deepcopy(cache)).float()
        for name, options in backends.items():
            forward = torch.compile(model, **options)
            try:
                start = now()
                found = one(forward, copy.deepcopy(cache)).float()
                row["first_s"][name] = round(now() - start, 1)
                turn(forward)  # a CUDA graph is recorded in the second call
            except Exception as error:  # reported by name; the others go on
                row["failed"][name] = reason(error)
                continue
            row["error"][name] = float((found - right).abs().max() / right.abs().max())
            forwards[name] = forward
            times: dict[str, list[float]] = {name: [] for name in forwards}
            for _ in range(rounds):
                for each, run in forwards.items():
                    times[each] += turn(run)
            row["step_s"] = {each: round(median(found), 6) for each, found in times.items()}
            save()


# --- all parts --------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What was found so far, on disk after each part; no part starts behind the deadline."""

    path: Path | None
    deadline: float
    data: Row

    def part(self, name: str, call: Callable[[Row], None]) -> None:
        """Let `call` fill in the row of a part."""
        row: Row = {}
        self.data["parts"][name] = row
        try:
            if time.monotonic() > self.deadline:
                raise TimeoutError("not started: no time was left")
            call(row)
        except Exception as error:  # a model that is not there, or does not fit: by name, and the rest goes on
            row["reason"] = reason(error)
            print(f"{name}: {row['reason']}", flush=True)
        self.save()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def run_models(run: Run, options: Any, device: str) -> None:
    backends = {"inductor": "aot_eager", "mhc": Counter()} if options.dry else {"inductor": "inductor", "mhc": "mhc"}
    for layers in options.layers:
        for name in options.names:

            def all_of(row: Row, name: str = name, layers: int = layers) -> None:
                torch._dynamo.reset()
                subject = SUBJECTS[name](layers, device, "eager" if options.dry else "inductor")
                row |= {"layers": layers, "graph": graphs(subject), "load_average_before": round(os.getloadavg()[0], 1)}
                print(f"{name}: {row['graph']}", flush=True)
                run.save()
                if not options.graphs:
                    compile_and_run(row, subject, backends, options.rounds)

            run.part(part_name(name, layers), all_of)


def part_name(name: str, layers: int) -> str:
    return name if layers == 1 else f"{name}, {layers} layers"


def of_models(data: Row) -> dict[str, Row]:
    """The parts that are models at some depth."""
    return {name: row for name, row in data["parts"].items() if name in SUBJECTS or name.endswith(" layers")}


def run_at_scale(run: Run, options: Any, device: str) -> None:
    tiny, rounds = options.dry, options.rounds
    dtype = torch.float32 if tiny else torch.bfloat16
    for tokens, features in [(5, 16)] if tiny else [(8192, 2560), (8192, 4096)]:
        size = (3 if tiny else 8, tokens, features, device, dtype)
        run.part(f"chain, C = {features}", lambda row, size=size: chain(row, *size))
    # What compiles fast comes first: a run may end in the middle.
    trained = {"mhc": Counter(), "inductor": "aot_eager"} if tiny else {"mhc": "mhc", "inductor": "inductor"}
    decoded: dict[str, Row] = {"mhc": {"backend": trained["mhc"]}}
    if not tiny:
        decoded |= {"mhc, CUDA graphs": {"backend": "mhc", "mode": "reduce-overhead"}}
        decoded |= {"inductor": {"backend": "inductor"}}
        decoded |= {"inductor, CUDA graphs": {"backend": "inductor", "mode": "reduce-overhead"}}
    layers, width = (1, 64) if tiny else (2, 2048)

    def model() -> nn.Module:
        torch._dynamo.reset()
        return deepseek(layers, width, device, dtype)

    def train(row: Row) -> None:
        training_steps(row, run.save, model(), trained, 16 if tiny else 4096, rounds)

    def decode(row: Row, batch: int) -> None:
        decoding(row, run.save, model().eval(), decoded, batch, 8 if tiny else 256, rounds)

    run.part("deepseek_v4, training step", train)
    for batch in (1,) if tiny else (1, 16):
        run.part(f"deepseek_v4, decoding, T = {batch}", partial(decode, batch=batch))


def tables(data: Row) -> list[Table]:
    """What is printed in the end."""
    models = of_models(data)
    counted = table("graph", "sites", "calls", "behind", "a site", "behind", "ops a site", "behind")
    timed = table("model", "contestant", "first call", "kernels", "forward", "and backward", "error")
    for name, row in models.items():
        if "graph" in row:
            graph = row["graph"]
            numbers = [graph["before"], graph["behind"], *graph["a site"], *graph["a site, ops"]]
            counted.add_row(name, str(graph["sites"]), *map(str, numbers))
        if "reason" in row:
            timed.add_row(name, row["reason"][:60])
        if "ratios" not in row:
            continue
        clock = "wall_s" if torch.cuda.is_available() else "processor_s"
        for kind, one in row["forward"].items():
            first = f"{row['compile'][kind][clock]:.1f} s" if kind in row["compile"] else ""
            steps = [f"{1e3 * each[clock]:.1f} ms" for each in (one, row["forward and backward"][kind])]
            off = f"{row['error'][kind]:.0e}" if kind in row["error"] else ""
            timed.add_row(name, kind, first, str(row["kernels"].get(kind, "")), *steps, off)
        over = [f"{row['ratios'][what].get('inductor', '')} x" for what in row["ratios"]]
        timed.add_row("", "inductor over mhc", over[0], "", *over[1:], "", end_section=True)
    return [one for one in (counted, timed) if one.row_count]


def table(*headers: str) -> Table:
    made = Table(box=None, pad_edge=False)
    for place, header in enumerate(headers):
        made.add_column(header, justify="right" if place > 1 else "left")
    return made


def depths(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def arguments(words: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SUBJECTS), help="models, with commas; none for an empty word")
    parser.add_argument("--layers", type=depths, default=[1, 4, 8], help="with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--graphs", action="store_true", help="count calls in graphs alone, which takes seconds")
    parser.add_argument("--scale", action="store_true", help="the chain and the larger model too (always on a GPU)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after so long")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="no inductor, and tiny shapes")
    options = parser.parse_args(words)
    options.names = [name for name in options.only.split(",") if name]
    if unknown := [name for name in options.names if name not in SUBJECTS]:
        parser.error(f"--only {','.join(unknown)}: legal are {', '.join(SUBJECTS)}")
    return options


def main(words: list[str] | None = None) -> Row:
    options = arguments(words)
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() and not options.dry else "cpu"
    if device == "cpu":
        torch._inductor.config.compile_threads = 1  # compilers are children of this process, and their time is seen
    if not options.dry:
        torch.compile(lambda x: x + 1)(torch.ones(3, device=device))
    run = Run(options.out, time.monotonic() + options.seconds, {**environment(), "parts": {}})
    if options.scale or device == "cuda":
        run_at_scale(run, options, device)  # first: what only a GPU can show
    run_models(run, options, device)
    console = Console(width=100)
    for one in tables(run.data):
        console.print(one)
    for name, row in run.data["parts"].items():
        if name not in of_models(run.data):
            console.print(f"{name}: {json.dumps(row)}", markup=False, highlight=False)
    return run.data


if __name__ == "__main__":
    main()
