"""Pipeline schedules: what each device does in one step, what it keeps meanwhile, and how long the step takes.

A device runs forwards `F` and backwards `B` of its stages, or where a schedule splits the backward, input gradients `I`
and weight gradients `W`. What a microbatch keeps in a stage is freed by its `B` or `W`. GPipe and 1F1B have a stage a
device; the orders of the others are those of `torch.distributed.pipelining`, which runs them.

What a stage sends, its device does not wait for. What it receives, the device of a gpipe or 1f1b stage does: torch
posts the receive in front of the action that needs it, behind the one before. So the transfer begins when both sides
are done with what they did before, and takes its time of the receiver (in 1f1b of both, which send and receive at
once). The schedules of several stages a device post receives ahead, as soon as their order knows of the send: there a
transfer delays its own input alone, and runs beside other work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from mhc_compile.errors import ConfigError, PartitionError, wrong

# How many stages a device has; None: any number.
SCHEDULES: dict[str, int | None] = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": None,
    "zero-bubble": None,
    "zbv": 2,
    "dualpipev": 2,
}
_IN_TORCH = {
    "interleaved": "ScheduleInterleaved1F1B",
    "zero-bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
_KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
_V_SHAPED = frozenset({"zbv", "dualpipev"})


@dataclass(frozen=True)
class Action:
    """One thing that a device does: F, B, I or W of a stage, for one microbatch."""

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Event:
    """An action with its time."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """A schedule for a number of stages, devices and microbatches."""

    name: str
    stages: int
    devices: int
    microbatches: int

    @classmethod
    def of(cls, name: object, stages: int, devices: int | None, microbatches: int) -> Schedule:
        """Checked; ConfigError for what is not legal. devices: by default as many as the schedule has use for."""
        if not isinstance(name, str) or name not in SCHEDULES:
            legal = "one of " + ", ".join(map(repr, SCHEDULES))
            raise ConfigError(wrong("schedule", repr(name), legal, "'1f1b' keeps little and is simple"))
        many = _devices(name, stages, devices)
        if name != "gpipe" and microbatches < many:
            legal = f"at least {many}, one for each device, for {name!r}"
            step = f"pass microbatches={many} or more, or schedule='gpipe'"
            raise ConfigError(wrong("microbatches", microbatches, legal, step))
        made = cls(name, stages, many, microbatches)
        made.orders()
        return made

    @property
    def waits(self) -> bool:
        """A device does nothing else while it receives."""
        return self.name not in _IN_TORCH

    def device(self, stage: int) -> int:
        """The device of a stage: in turn, for V shapes there and back."""
        if self.name in _V_SHAPED and stage >= self.devices:
            return self.stages - 1 - stage
        return stage % self.devices

    def orders(self) -> tuple[tuple[Action, ...], ...]:
        """What each device does in one step, in order."""
        if self.name in _IN_TORCH:
            return _from_torch(self)
        return tuple(tuple(_order(self, stage)) for stage in range(self.stages))

    def loads(self) -> list[list[Moment]]:
        """For each device the moments that may be its fullest."""
        return [_moments(order) for order in self.orders()]


def _devices(name: str, stages: int, devices: int | None) -> int:
    each = SCHEDULES[name]
    if devices is None:
        each = each or (1 if name == "zero-bubble" or stages % 2 else 2)
        devices = max(stages // each, 1)
    legal = f"a divisor of stages={stages}" if each is None else f"stages / {each} for {name!r}"
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1 or (each is None and stages % devices):
        raise ConfigError(wrong("devices", repr(devices), legal, "leave it out, or pass other stages"))
    if each is not None and stages != devices * each:
        found = f"{devices} for {stages} stages"
        raise ConfigError(wrong("devices", found, legal, f"pass stages={devices * each}"))
    return devices


def _order(schedule: Schedule, stage: int) -> list[Action]:
    microbatches = schedule.microbatches
    if schedule.name == "gpipe":
        return [Action(kind, stage, number) for kind in "FB" for number in range(microbatches)]
    ahead = min(schedule.stages - stage, microbatches)
    actions = [Action("F", stage, number) for number in range(ahead)]
    for number in range(microbatches):
        actions.append(Action("B", stage, number))
        if number + ahead < microbatches:
            actions.append(Action("F", stage, number + ahead))
    return actions


@cache
def _from_torch(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """The order that torch's own schedule works out, from stages that are only numbers."""
    if not torch.distributed.is_available():
        step = "plan with 'gpipe' or '1f1b', or install a torch with distributed"
        raise PartitionError(wrong("torch.distributed", "not in this build of torch", "one with it", step))
    from torch.distributed.pipelining import schedules

    kind: Any = getattr(schedules, _IN_TORCH[schedule.name])
    here = [stage for stage in range(schedule.stages) if schedule.device(stage) == 0]
    try:
        made = kind([_numbered(stage, schedule) for stage in here], schedule.microbatches)
    except (ValueError, AssertionError) as error:
        found = f"refused by torch for {schedule.stages} stages, {schedule.devices} devices and "
        found += f"{schedule.microbatches} microbatches: {str(error).rstrip('.')}"
        step = f"pass microbatches={4 * schedule.devices}, say"
        raise ConfigError(wrong(f"schedule {schedule.name!r}", found, "numbers that torch takes", step)) from error
    return tuple(
        tuple(action for one in made.pipeline_order[device] if one is not None for action in _actions(one))
        for device in range(schedule.devices)
    )


def _numbered(stage: int, schedule: Schedule) -> Any:
    """What torch's schedules ask of a stage when they work out an order."""
    return SimpleNamespace(
        stage_index=stage,
        num_stages=schedule.stages,
        group_size=schedule.devices,
        group_rank=0,
        is_first=stage == 0,
        is_last=stage == schedule.stages - 1,
        has_backward=True,
        submod=torch.nn.Module(),
        stage_index_to_group_rank=None,
    )


def _actions(one: Any) -> list[Action]:
    if one.sub_actions:
        return [action for part in one.sub_actions for action in _actions(part)]
    return [Action(_KINDS[one.computation_type.name], one.stage_index, one.microbatch_index)]


# ---------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Moment:
    """What a device holds while it runs one action.

    counts: for each of its stages, the microbatches whose values are kept; waiting: those whose weight gradients are
    still to come; active: the stage at work in a backward (None: a forward); whole: that backward frees as it goes.
    """

    counts: tuple[tuple[int, int], ...]
    waiting: tuple[tuple[int, int], ...]
    active: int | None
    whole: bool

    def covers(self, other: Moment) -> bool:
        """At least as full as another moment, whatever the stages keep."""
        if other.active is not None and (self.active, self.whole) != (other.active, other.whole):
            return False  # any backward takes more than a forward does with the same values kept
        own = dict(self.counts), dict(self.waiting)
        pairs = zip(own, (other.counts, other.waiting), strict=True)
        return all(mine.get(stage, 0) >= count for mine, theirs in pairs for stage, count in theirs)


def _moments(order: Sequence[Action]) -> list[Moment]:
    counts: dict[int, int] = {}
    waiting: dict[int, int] = {}
    found: dict[Moment, None] = {}
    for action in order:
        stage = action.stage
        if action.kind == "F":
            counts[stage] = counts.get(stage, 0) + 1
        elif action.kind == "I":
            waiting[stage] = waiting.get(stage, 0) + 1
        active = None if action.kind == "F" else stage
        found[Moment(_sorted(counts), _sorted(waiting), active, action.kind == "B")] = None
        if action.kind == "W":
            waiting[stage] = waiting.get(stage, 0) - 1
        if action.kind in "BW":
            counts[stage] -= 1
    return [one for one in found if not any(other is not one and other.covers(one) for other in found)]


def _sorted(counts: dict[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted((stage, count) for stage, count in counts.items() if count))


# ---------------------------------------------------------------------------------------------- time


def simulate(
    schedule: Schedule, forward: Sequence[float], backward: Sequence[float], send: Sequence[float]
) -> list[Event]:
    """One step, each action as early as its device and its inputs allow. An event begins behind what it waits for.

    forward, backward: seconds of each stage, for one microbatch; send: from each stage to the next, one direction,
    where they are on different devices. Each part of a split backward takes half its time.
    """
    queues = schedule.orders()
    done: dict[tuple[int, str, int], float] = {}
    free, places = [0.0] * len(queues), [0] * len(queues)
    events: list[Event] = []
    while len(events) < sum(map(len, queues)):
        before = len(events)
        for device, queue in enumerate(queues):
            while places[device] < len(queue):
                action = queue[places[device]]
                ready = _ready(schedule, action, send, done)
                if ready is None:
                    break
                made, transfer = ready
                start = max(free[device], made) + transfer if schedule.waits else max(free[device], made + transfer)
                length = forward[action.stage] if action.kind == "F" else backward[action.stage]
                free[device] = start + (length / 2 if action.kind in "IW" else length)
                events.append(Event(action, start, free[device]))
                done[action.stage, "B" if action.kind == "I" else action.kind, action.microbatch] = free[device]
                places[device] += 1
        assert len(events) > before, f"{schedule} waits for itself"
    return events


def _ready(
    schedule: Schedule, action: Action, send: Sequence[float], done: dict[tuple[int, str, int], float]
) -> tuple[float, float] | None:
    """When the input of an action is made, and how long its transfer takes; None if what gives it has not run."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        before, key = stage - 1, "F"
    elif action.kind == "W":
        before, key = stage, "B"
    elif stage + 1 < schedule.stages:
        before, key = stage + 1, "B"
    else:
        before, key = stage, "F"
    if before < 0:
        return 0.0, 0.0
    time = done.get((before, key, microbatch))
    apart = schedule.device(before) != schedule.device(stage)
    return None if time is None else (time, send[min(before, stage)] if apart else 0.0)
