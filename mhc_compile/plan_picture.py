"""The picture of a plan: its units, blocks and stages, and the memory of each stage over one step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import ConfigError, wrong
from mhc_compile.passes.plan_devices import way
from mhc_compile.passes.quantities import size
from mhc_compile.passes.schedules import Event

if TYPE_CHECKING:
    from mhc_compile.plan import Plan, PlannedStage

Curve = list[tuple[float, float]]  # seconds, bytes from there on


def draw(plan: Plan, path: Path) -> None:
    """Write the picture in the format of the path's suffix. ConfigError without matplotlib, or for another suffix."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        step = "pip install 'mhc-compile[demo]', or print the plan"
        raise ConfigError(wrong("matplotlib", "not installed", "an installed matplotlib", step)) from error
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        legal = "a path that ends in ." + ", .".join(sorted(formats))
        raise ConfigError(wrong("the picture's path", repr(str(path)), legal, "plan.draw('plan.png')"))
    above, below = figure.subplots(2, 1, height_ratios=[1, 2])
    _draw_chain(plan, above)
    _draw_memory(plan, below)
    figure.savefig(path, dpi=120)


def _color(number: int) -> str:
    return f"C{number % 10}"


def _draw_chain(plan: Plan, axes: Any) -> None:
    """A bar for each unit, as high as what it keeps; a frame around each block; stages by color."""
    highest = max(_stored(plan, stage, unit) for stage in plan.stages for unit in range(stage.start, stage.end))
    for number, stage in enumerate(plan.stages):
        places = range(stage.start, stage.end)
        heights = [_stored(plan, stage, unit) / max(highest, 1) for unit in places]
        axes.bar(places, heights, 0.7, color=_color(number), label=f"stage {number}")
        for start, end in _block_bounds(stage):
            left, right = start - 0.45, end - 0.55
            axes.plot([left, right, right, left, left], [0, 0, 1.12, 1.12, 0], "k-", lw=1)
            axes.text((start + end - 1) / 2, 1.15, str(_sites(plan, start, end) or ""), ha="center", fontsize=8)
        if number:
            axes.axvline(stage.start - 0.5, color="black", linestyle=":")
            sent = size(plan.units[stage.start].cost.boundary or 0)
            axes.text(stage.start - 0.5, 1.33, sent, ha="center", fontsize=8)
    axes.set(title=f"{plan.model}: what units keep, recompute blocks (with their sites) and cuts", ylim=(0, 1.5))
    axes.set(xlabel="unit", ylabel=f"of {size(highest)}")


def _sites(plan: Plan, start: int, end: int) -> int:
    return sum(len(unit.sites) for unit in plan.units[start:end])


def _draw_memory(plan: Plan, axes: Any) -> None:
    events = plan.events()
    curves = [memory_curve(plan, device, events) for device in range(plan.devices)]
    top = max(memory for curve in curves for _, memory in curve)
    scale, unit = next((one for one in _SCALES if top >= one[0]), _SCALES[-1])
    for device, curve in enumerate(curves):
        times, memory = zip(*curve, strict=True)
        color = _color(next(number for number, stage in enumerate(plan.stages) if stage.device == device))
        steps = [1e3 * time for time in times], [one / scale for one in memory]
        axes.step(*steps, where="post", color=color, label=f"device {device}")
    if plan.memory is not None:
        axes.axhline(plan.memory / scale, color="black", linestyle="--", label="limit")
    title = f"memory of each device over one step of {plan.schedule}, weights included"
    axes.set(xlabel=f"ms ({plan.timing})", ylabel=unit, title=title)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", fontsize=8, ncols=4)


_SCALES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def memory_curve(plan: Plan, device: int, events: list[Event]) -> Curve:
    """Bytes of a device from each moment on.

    A forward adds what its stage keeps; a backward replays and frees block by block, or where it is split replays
    twice, and frees with its weight gradients.
    """
    memory: float = sum(stage.weights for stage in plan.stages if stage.device == device)
    split = any(event.action.kind == "I" for event in events)
    ways = [way(plan.costs, stage.start, stage.end, stage.blocks, split) for stage in plan.stages]
    curve: Curve = [(0.0, memory)]
    for event in events:
        if plan.stages[event.action.stage].device != device:
            continue
        stage, one = plan.stages[event.action.stage], ways[event.action.stage]
        if event.action.kind == "F":
            memory += one.one
        elif event.action.kind == "B":
            curve += _whole_backward(plan, stage, event, memory)
            memory -= one.one
        else:
            memory += one.waiting if event.action.kind == "I" else 0
            curve.append((event.start, memory + one.largest))
            memory -= one.waiting + one.one if event.action.kind == "W" else 0
        curve.append((event.end, memory))
    return curve


def _whole_backward(plan: Plan, stage: PlannedStage, event: Event, memory: float) -> Curve:
    """The moments of one backward: each block's replay, and what is left behind it."""
    bounds = _block_bounds(stage) or [(stage.start, stage.end)]
    total = sum(plan.units[unit].backward for unit in range(stage.start, stage.end)) or 1.0
    time, curve = event.start, []
    for start, end in reversed(bounds):
        blocks = (start,) if stage.blocks else ()
        curve.append((time, memory + way(plan.costs, start, end, blocks, False).largest))
        time += (event.end - event.start) * sum(unit.backward for unit in plan.units[start:end]) / total
        memory -= sum(_stored(plan, stage, unit) for unit in range(start, end))
    return curve


def _block_bounds(stage: PlannedStage) -> list[tuple[int, int]]:
    return list(pairwise([*stage.blocks, stage.end]))


def _stored(plan: Plan, stage: PlannedStage, unit: int) -> int:
    """What a unit keeps of one microbatch."""
    cost = plan.costs[unit]
    if not stage.blocks:
        return cost.kept + cost.saved
    return cost.kept + (cost.state if unit in stage.blocks else 0)
