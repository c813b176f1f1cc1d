"""Plan recompute blocks and pipeline stages of a converted model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mhc_compile.conversion import conversion
from mhc_compile.errors import ConfigError, PartitionError, wrong
from mhc_compile.passes.capture import graph_input
from mhc_compile.passes.cost import CostModel, Device
from mhc_compile.passes.cost_values import exact_length, formula_length
from mhc_compile.passes.plan_devices import loads, shared
from mhc_compile.passes.plan_search import FoundStage, Search
from mhc_compile.passes.profile import profile_units
from mhc_compile.passes.provenance import source_line
from mhc_compile.passes.quantities import plural, size
from mhc_compile.passes.schedules import Schedule
from mhc_compile.passes.stages import bytes_of
from mhc_compile.plan import Plan, PlannedStage, PlannedUnit
from mhc_compile.trace import rewritten, with_gradients

__all__ = ["Pipeline", "Plan", "PlannedStage", "PlannedUnit", "as_bytes", "cost_model", "partition", "planned"]


def partition(
    model: nn.Module,
    inputs: Any = None,
    *,
    stages: int = 1,
    microbatches: int = 1,
    schedule: str = "1f1b",
    devices: int | None = None,
    memory: float | str | None = None,
    weight_copies: float = 4,
    measure: bool = False,
    compiled: bool | None = None,
    device: Device | None = None,
) -> Plan:
    """The best recompute blocks and pipeline cuts of a converted model.

    inputs: of one microbatch, as for `mhc_compile`. The model is traced, not run, and not changed.
    stages, microbatches, schedule: of the pipeline; `gpipe`, `1f1b`, `interleaved`, `zero-bubble`, `zbv` or
        `dualpipev`, as torch.distributed.pipelining runs them. devices: 2 stages a device for `interleaved`, `zbv` and
        `dualpipev`, 1 for the others, unless given.
    memory: what a device may take, in bytes or as "80 GB": activations, and `weight_copies` times its weights (4: the
        weights, their gradients and Adam's two states; frozen ones count once). Stages then replay only where storing
        does not fit. Without a limit every stage replays, in the blocks that take least.
    measure: run the graph on `inputs` and take measured times; else they are estimated for `device` (an H200).
    compiled: branches keep what torch's partitioner keeps, and not all that autograd does; finding out takes a trace of
        the backward. By default as the model's backend does: False for "eager".

    Cuts are the exact optimum: the shortest slowest stage, then the least sent, then the least memory; and so are the
    blocks, which are uneven where that is better. Where stages share a device, cuts are chosen by time alone, and a
    limit that they do not fit is refused. Raises ConfigError for an illegal argument, RewriteError for a model
    that is not converted, and PartitionError when the model has fewer legal cuts than asked for, or no plan fits.
    """
    pipeline = Pipeline.of(stages, microbatches, schedule, devices, memory, weight_copies)
    costs = cost_model(model, inputs, measure=measure, compiled=compiled, device=device)
    return planned(costs, pipeline, type(model).__name__, conversion(model).record.config.n)


def cost_model(
    model: nn.Module,
    inputs: Any = None,
    *,
    measure: bool = False,
    compiled: bool | None = None,
    device: Device | None = None,
) -> CostModel:
    """What a converted model costs, in the mode that it is in; arguments as for `partition`.

    `str()` prints the paper's tables 2 and 3 for the model, L_r*, and the work, traffic, memory and time of each site.
    It costs a step of training, under `no_grad` and `inference_mode` too.
    """
    backend = conversion(model).record.config.backend
    compiled = backend != "eager" if compiled is None else compiled
    with with_gradients():
        made = rewritten(model, inputs)
        costs = CostModel(made.graph, made.arguments, device=device, compiled=compiled)
        if measure:
            costs.measure(profile_units(made.graph, made.arguments, costs.layout))
    return costs


@dataclass(frozen=True)
class Pipeline:
    """What is planned for, checked: the schedule, the limit in bytes, and how often weights count."""

    schedule: Schedule
    memory: float | None = None
    weight_copies: float = 4

    @classmethod
    def of(
        cls,
        stages: object = 1,
        microbatches: object = 1,
        schedule: object = "1f1b",
        devices: int | None = None,
        memory: object = None,
        weight_copies: float = 4,
    ) -> Pipeline:
        """From the arguments of `partition`; ConfigError for one that is not legal."""
        for name, value in (("stages", stages), ("microbatches", microbatches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(wrong(name, repr(value), "an integer >= 1", f"pass {name}=4, say"))
        assert isinstance(stages, int) and isinstance(microbatches, int)
        copies: object = weight_copies
        if isinstance(copies, bool) or not isinstance(copies, (int, float)) or not 0 <= copies < math.inf:
            step = "4 counts weights, gradients and Adam's states; 0 counts activations alone"
            raise ConfigError(wrong("weight_copies", repr(copies), "a finite number >= 0", step))
        limit = None if memory is None else as_bytes(memory)
        return cls(Schedule.of(schedule, stages, devices, microbatches), limit, copies)


def planned(costs: CostModel, pipeline: Pipeline, name: str, n: int) -> Plan:
    """The best plan by a cost model. Raises PartitionError as `partition` does."""
    schedule, limit = pipeline.schedule, pipeline.memory
    if schedule.stages > len(costs.units):
        legal = f"1 to {len(costs.units)}: {name} has {plural(len(costs.cuts), 'legal cut')}"
        raise PartitionError(wrong("stages", schedule.stages, legal, f"pass stages={len(costs.units)} or fewer"))
    found, weights = _search(costs, schedule, limit, pipeline.weight_copies)
    return Plan(
        name,
        n,
        schedule.name,
        schedule.devices,
        schedule.microbatches,
        limit,
        costs.timing,
        pipeline.weight_copies,
        tuple(_planned_units(costs)),
        tuple(
            _planned_stage(number, one, schedule, weight)
            for number, (one, weight) in enumerate(zip(found, weights, strict=True))
        ),
        tuple(_tied(costs, found)),
        *_lengths(costs),
    )


def _search(
    costs: CostModel, schedule: Schedule, limit: float | None, copies: float
) -> tuple[list[FoundStage], list[int]]:
    """The best stages, and the bytes of each one's weights; PartitionError when none fit the limit."""
    fixed, tied = costs.weights(copies)
    units = costs.units if schedule.waits else [replace(unit, send=0.0) for unit in costs.units]
    search = Search(units, loads(schedule), limit, fixed, tied)
    if schedule.devices == schedule.stages:
        found = search.run()
        if found is None:
            raise PartitionError(_no_fit(limit or 0, search.least_memory(), ""))
    else:
        cuts = Search(units, loads(schedule), None, fixed, tied).run()
        assert cuts is not None  # there is no limit
        found, least = shared(search, schedule, cuts)
        if limit is not None and limit < least:
            raise PartitionError(_no_fit(limit, least, f", cut for the best time, as {schedule.name!r} is"))
    return found, [search.fixed_of(stage.start, stage.end) for stage in found]


def _planned_stage(number: int, found: FoundStage, schedule: Schedule, weights: int) -> PlannedStage:
    most = loads(schedule)[number].in_flight
    device = schedule.device(number)
    return PlannedStage(device, found.start, found.end, found.blocks, found.time, found.peak, weights, most)


_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def as_bytes(memory: object) -> float:
    """A limit in bytes: a number, or text such as "80 GB" (powers of 1000) or "80GiB" (of 1024)."""
    value: float | None = None
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(i?)B?\s*", memory, re.IGNORECASE)
        if match and not (match[3] and not match[2]):
            value = float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].upper()]
    elif isinstance(memory, (int, float)) and not isinstance(memory, bool):
        value = float(memory)
    if value is None or not 0 < value < math.inf:
        legal = 'a number of bytes > 0, or text such as "80 GB" or "40GiB"'
        raise ConfigError(wrong("memory", repr(memory), legal, "leave it out for the least that the best time allows"))
    return value


def _no_fit(limit: float, least: int, how: str) -> str:
    found = f"{size(limit)} ({limit:.0f} bytes), and no plan takes so little on every device"
    legal = f"at least {size(least)} ({least} bytes) for these stages and microbatches{how}"
    return wrong("memory", found, legal, f"pass memory={least}, more stages, or a smaller microbatch as inputs")


def _planned_units(costs: CostModel) -> list[PlannedUnit]:
    found = []
    for number, cost in enumerate(costs.units):
        cut = costs.cuts[number - 1] if number else None
        forward, backward = costs.seconds[number]
        found.append(
            PlannedUnit(
                cut.value.name if cut else "",
                source_line(cut.value) if cut else "",
                tuple(site.name for site in costs.sites_of_units[number]),
                tuple(node.name for node in cut.skips) if cut else (),
                forward,
                backward,
                cost,
            )
        )
    return found


def _tied(costs: CostModel, found: Sequence[FoundStage]) -> list[str]:
    """The paths of the parameters that several stages read."""
    seen: dict[Any, int] = {}
    for stage in found:
        for node in costs.weights_read(number for run in costs.ranges[stage.start : stage.end] for number in run):
            seen[node] = seen.get(node, 0) + 1
    records = [graph_input(node) for node, count in seen.items() if count > 1 and bytes_of(node)]
    return sorted(record.path for record in records if record is not None and record.kind == "parameter")


def _lengths(costs: CostModel) -> tuple[float, int]:
    """Sites a block: by the formula, and by the objective."""
    sizes = costs.site_sizes
    if not sizes:
        return 0.0, 0
    states, replays = [one.n * one.one for one in sizes], [(one.n + 2) * one.one for one in sizes]
    return formula_length(sizes[0].n, len(sizes)), exact_length(states, replays)
