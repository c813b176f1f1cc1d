"""What each process of test_pipeline.py runs: `python pipeline_worker.py <check> ... <rank> <folder>`.

Each check trains a converted model in stages on two processes, and the same model whole in this one, in float64; losses
and gradients must agree. The mHC weights are random.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from graphs import randomize, zoo_model
from mhc_compile import ConfigError, MHCError, PartitionError, mhc_compile
from mhc_compile import pipeline as cutting
from mhc_compile.codegen.pipeline import Stage
from mhc_compile.partition import Pipeline, Plan, cost_model, planned
from mhc_compile.passes.cost import CostModel
from mhc_compile.passes.emit import copy_graph
from mhc_compile.pipeline import pipeline_schedule, pipeline_stages
from mhc_compile.trace import Exported, exported

WORLD = 2
SECONDS = 60  # what a collective waits for the other process
MICROBATCHES = 4
STEPS = 2
RATE = 0.1
TOLERANCE = 1e-9  # of values of order one, in float64; what differs is the order of sums
STAGES = {"gpipe": 2, "1f1b": 2, "interleaved": 4, "zero-bubble": 4, "zbv": 4, "dualpipev": 4}


WIDTH = 8


class Small(nn.Module):
    """Four residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Turned(Small):
    """Every branch reads a value that lies in memory, like its gradient, in another order than its dims."""

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.tanh(self.layers[0](x).transpose(1, 2))
        for layer in self.layers:
            x = x + torch.tanh(layer(x) + turned.transpose(1, 2))
        return x


@dataclass
class Whole:
    """What training the whole model in one process gives: losses and gradients of each step, and the last weights."""

    model: nn.Module
    inputs: dict[str, Any]
    start: dict[str, Any]
    losses: list[list[Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    logits: Tensor | None = None  # with the last weights, of the first batch

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """For each step a batch of as many microbatches as it has, of other tokens."""
        generator = torch.Generator().manual_seed(3)
        for _ in range(STEPS):
            yield {
                name: torch.randint(3, 99, (MICROBATCHES * len(value), *value.shape[1:]), generator=generator)
                for name, value in self.inputs.items()
                if isinstance(value, Tensor)
            }

    @functools.cached_property
    def costs(self) -> CostModel:
        return cost_model(self.model, self.inputs)

    def plan(self, stages: int, schedule: str = "1f1b", devices: int = WORLD) -> Plan:
        """As `partition` plans, from costs that are worked out once."""
        pipeline = Pipeline.of(stages, MICROBATCHES, schedule, devices)
        return planned(self.costs, pipeline, type(self.model).__name__, 4)


@functools.cache
def whole(name: str) -> Whole:
    """A model of the zoo in float64, converted and trained whole; it then has its first weights again."""
    model, inputs = zoo_model(name)
    model.double()
    plain = model(**inputs).logits.detach()
    randomize(mhc_compile(model, n=4, backend="eager", example_inputs=inputs))
    assert float((model(**inputs).logits.detach() - plain).abs().max()) > 1e-2, "mHC makes no difference"
    found = Whole(model, inputs, copy.deepcopy(model.state_dict()))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for batch in found.batches():
        found.losses.append(whole_step(model, batch))
        found.gradients.append({name: value.grad for name, value in model.named_parameters(remove_duplicate=False)})
        optimizer.step()
        optimizer.zero_grad()
    found.end = copy.deepcopy(model.state_dict())
    # With gradients enabled, as before: without, the model would be compiled once more.
    parts = parts_of(next(found.batches()))
    found.logits = torch.cat([model(**part, use_cache=False).logits.detach() for part in parts])
    return found


_exported: dict[tuple[nn.Module, bool], Exported] = {}


def exported_once(model: nn.Module, inputs: Any) -> Exported:
    """What `exported` gives, which takes most of the time of a cut: once for each model, and a copy for each cut."""
    key = model, model.training
    if key not in _exported:
        _exported[key] = exported(model, inputs)
    made = _exported[key]
    return replace(made, rewritten=replace(made.rewritten, graph=copy_graph(made.rewritten.graph)))


def parts_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The microbatches of a batch."""
    chunks = [value.chunk(MICROBATCHES) for value in batch.values()]
    return [dict(zip(batch, values, strict=True)) for values in zip(*chunks, strict=True)]


def loss_of(output: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def target_of(batch: dict[str, Tensor]) -> Tensor:
    return list(batch.values())[-1].roll(-1, 1)


def whole_step(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """One step of the whole model: its losses; the gradients are those of their mean."""
    losses = []
    for part, target in zip(parts_of(batch), target_of(batch).chunk(MICROBATCHES), strict=True):
        losses.append(loss_of(model(**part, use_cache=False), target))
        (losses[-1] / MICROBATCHES).backward()
    return [loss.detach() for loss in losses]


def step(schedule: Any, stages: list[Stage], batch: dict[str, Tensor]) -> list[Tensor]:
    """One step in stages; gives the losses where the last one runs."""
    losses: list[Tensor] = []
    inputs = batch if any(stage.is_first for stage in stages) else {}
    target = {"target": target_of(batch), "losses": losses} if any(stage.is_last for stage in stages) else {}
    schedule.step(**inputs, **target, return_outputs=False)
    return [loss.detach() for loss in losses]


def near(actual: Tensor, expected: Tensor, what: str) -> None:
    distance = float((actual - expected).abs().max())
    assert distance <= TOLERANCE * max(1.0, float(expected.abs().max())), f"{what}: {distance}"


def train(known: Whole, plan: Plan, **options: Any) -> list[Stage]:
    """Train in stages; losses and gradients are those of the whole model."""
    known.model.load_state_dict(known.start)
    known.model.zero_grad()
    stages = pipeline_stages(plan, known.model, known.inputs, **options)
    schedule = pipeline_schedule(stages, loss_of)
    own = {name: value for stage in stages for name, value in stage.module.named_parameters()}
    optimizer = torch.optim.SGD(set(own.values()), lr=RATE)
    for number, batch in enumerate(known.batches()):
        losses = step(schedule, stages, batch)
        assert len(losses) == (MICROBATCHES if any(stage.is_last for stage in stages) else 0)
        for loss, expected in zip(losses, known.losses[number], strict=False):
            near(loss, expected, "a loss")
        for name, value in own.items():
            gradient = known.gradients[number][name]
            assert (value.grad is None) == (gradient is None), name
            if value.grad is not None and gradient is not None:
                near(value.grad, gradient, f"the gradient of {name}")
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        first = next(known.batches())
        target = {"target": target_of(first)} if stages[-1].is_last or stages[0].is_last else {}
        output = schedule.eval(**(first if stages[0].is_first else {}), **target)
    if known.logits is not None and stages[-1].is_last:
        near(output.logits, known.logits, "the logits after training")
    return stages


@contextmanager
def refused(*parts: str, kind: type[MHCError] = PartitionError) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert all(part in str(error) for part in parts), error
    else:
        raise AssertionError(f"not refused: {parts}")


# --------------------------------------------------------------------------------------------- checks


def check_schedules(folder: Path) -> None:
    """Every schedule, with a stage or two for each process; and the weights of the stages are saved."""
    known = whole("llama")
    plans = {2: known.plan(2), 4: known.plan(4, "zbv")}
    for name, count in STAGES.items():
        stages = train(known, plans[count], schedule=name)
        assert stages[0].num_stages == count and len(stages) == count // WORLD
        check_saved(stages, known, folder)
        print(f"  {name} agrees", file=sys.stderr, flush=True)
    with refused("devices is 2 for 4 stages", "'1f1b'", kind=ConfigError):
        pipeline_stages(plans[4], known.model, known.inputs, schedule="1f1b")
    with refused("microbatches is 1", "at least 2", kind=ConfigError):
        pipeline_schedule(pipeline_stages(plans[2], known.model, known.inputs), loss_of, microbatches=1)


def check_saved(stages: list[Stage], known: Whole, folder: Path) -> None:
    """What the processes save of their stages is together the whole model, which loads it, and gives it back."""
    state = {key: value for stage in stages for key, value in stage.module.state_dict().items()}
    torch.save(state, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    saved: dict[str, Any] = {}
    for rank in range(WORLD):
        saved |= torch.load(folder / f"{rank}.pt")
    dist.barrier()
    known.model.load_state_dict(saved)
    for key, value in known.model.state_dict().items():
        near(value.double(), known.end[key].double(), key)
    for stage in stages:
        stage.module.load_state_dict({key: known.start[key] for key in stage.module.state_dict()})


def check_tied(folder: Path) -> None:
    """GPT-2's embedding is its head: refused, or one weight in two processes, or in two stages of one process."""
    known = whole("gpt2")
    plans = {2: known.plan(2), 4: known.plan(4, "zbv")}
    with refused("transformer.wte.weight", "read by the stages 0, 1", "tied='reduce'"):
        pipeline_stages(plans[2], known.model, known.inputs)
    train(known, plans[4], schedule="zbv", tied="reduce")
    stages = train(known, plans[2], tied="reduce")
    own = stages[0].module.get_parameter("transformer.wte.weight").detach()
    both = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(both, own)
    assert torch.equal(*both), "the copies of a tied weight differ"
    check_accumulated(known, plans[2])
    schedule = pipeline_schedule(stages, loss_of)
    fully_shard(stages[0].module)
    with refused("transformer.wte.weight", "replaced", "DistributedDataParallel"):
        step(schedule, stages, next(known.batches()))


def check_accumulated(known: Whole, plan: Plan) -> None:
    """Gradients of two steps add up, those of a tied weight too."""
    known.model.load_state_dict(known.start)
    known.model.zero_grad()
    stages = pipeline_stages(plan, known.model, known.inputs, tied="reduce")
    schedule = pipeline_schedule(stages, loss_of, scale_grads=False)
    for _ in range(2):
        step(schedule, stages, next(known.batches()))
    for name, value in stages[0].module.named_parameters():
        gradient = known.gradients[0][name]
        assert value.grad is not None and gradient is not None
        near(value.grad, 2 * MICROBATCHES * gradient, f"the gradient of {name}")


def check_two_trunks(folder: Path) -> None:
    """T5: the encoder's output, its mask and the position biases go through the stages between; one weight is tied."""
    known = whole("t5")
    train(known, known.plan(2), tied="reduce")
    plan = known.plan(4, "interleaved")
    train(known, plan, tied="reduce")
    stages = pipeline_stages(plan, known.model, known.inputs, schedule="zbv", tied="reduce")
    with refused("'zbv'", "input and weight gradients apart", "depends on weights alone", "split_backward=False"):
        pipeline_schedule(stages, loss_of)
    train(known, plan, schedule="zbv", tied="reduce", split_backward=False)


def check_compiled(folder: Path) -> None:
    """Stages compiled with the recompute blocks of the plan."""
    known = whole("llama")
    plan = known.plan(2)
    stages = train(known, plan, backend="aot_eager")
    stages = pipeline_stages(known.plan(4, "zbv"), known.model, known.inputs, backend="aot_eager")
    with refused("'zbv'", "stages compiled by 'aot_eager'", "split_backward=False"):
        pipeline_schedule(stages, loss_of)


def check_data_parallel(folder: Path) -> None:
    """A pipeline in each process, and its stage in DDP or FSDP2: gradients are the mean of those of the processes.

    DDP would leave those of schedules with two kinds of backward as they are, in silence.
    """
    known = whole("llama")
    rank, pipelines = dist.get_rank(), [dist.new_group([rank]) for rank in range(WORLD)]
    halves = pipeline_stages(known.plan(4, "zbv"), known.model, known.inputs)
    halves[-1].submod = nn.parallel.DistributedDataParallel(halves[-1].submod, process_group=pipelines[rank])
    with refused("'zbv'", "DistributedDataParallel", "fully_shard"):
        pipeline_schedule(halves, loss_of)
    first, second = known.batches()
    expected = [known.gradients[0], {}]
    known.model.load_state_dict(known.start)
    known.model.zero_grad()
    whole_step(known.model, second)
    expected[1] = {name: value.grad for name, value in known.model.named_parameters(remove_duplicate=False)}
    for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
        known.model.zero_grad()
        (stage,) = pipeline_stages(known.plan(1, devices=1), known.model, known.inputs, group=pipelines[rank])
        stage.submod = wrap(stage.submod)
        step(pipeline_schedule([stage], loss_of), [stage], (first, second)[rank])
        for name, value in stage.module.named_parameters():
            parts = [one[name] for one in expected]
            assert value.grad is not None and parts[0] is not None and parts[1] is not None
            gradient = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
            near(gradient, (parts[0] + parts[1]) / WORLD, f"the gradient of {name} in {wrap.__name__}")
    whole.cache_clear()  # fully_shard has taken its parameters


_PARTS = ("check_saved", "check_accumulated")  # of other checks
CHECKS = [name for name in globals() if name.startswith("check_") and name not in _PARTS]


# ----------------------------------------------------------------------------------------------- main


def main(names: list[str], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=SECONDS)
    )
    cutting.exported = exported_once  # type: ignore[assignment]
    checks: dict[str, Callable[[Path], None]] = {name: globals()[name] for name in names}
    for name, check in checks.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        check(folder)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:-2], int(sys.argv[-2]), Path(sys.argv[-1]))
