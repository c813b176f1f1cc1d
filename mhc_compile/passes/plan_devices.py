"""The memory of devices that run several stages, and the blocks of stages that share one.

What one stage may take depends on the others of its device, so cuts are chosen by time alone, and blocks (or storing)
for all stages of a device together: of all combinations the fastest that fits, then the one that takes least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

from mhc_compile.passes.plan_search import FoundStage, Load, Search, Unit
from mhc_compile.passes.schedules import Moment, Schedule

_COMBINATIONS = 50_000  # beyond that, stages are settled one after another


def loads(schedule: Schedule) -> list[Load]:
    """For each stage the moments at which it may be its device's fullest, the other stages left out."""
    found: list[Load] = []
    for stage in range(schedule.stages):
        moments = schedule.loads()[schedule.device(stage)]
        split = any(not moment.whole for moment in moments)
        pairs = {(dict(one.counts).get(stage, 0), dict(one.waiting).get(stage, 0) if split else 0) for one in moments}
        found.append(Load(tuple(sorted(pairs - {(0, 0)})), split))
    return found


@dataclass(frozen=True)
class Way:
    """One way to run a stage: its blocks (none: stored), seconds of replay, and bytes.

    one: that a microbatch keeps; highest: that the microbatch at work takes at most while its backward frees block by
    block; largest: what the largest replay makes; waiting: between input and weight gradients.
    """

    blocks: tuple[int, ...]
    replay: float
    one: int
    highest: int
    largest: int
    waiting: int


def way(units: Sequence[Unit], start: int, end: int, blocks: tuple[int, ...], split: bool) -> Way:
    """A stage of these units in these blocks, or stored."""
    inside = units[start:end]
    again = units[start].again if start else 0
    waiting = sum(unit.waiting for unit in inside) if split else 0
    kept = again + sum(unit.kept for unit in inside)
    if not blocks:
        one, largest = kept + sum(unit.saved for unit in inside), max(unit.alone for unit in inside)
        return Way((), 0.0, one, one + largest, largest, waiting)
    so_far, highest, largest = again, 0, 0
    for block, stop in pairwise([*blocks, end]):
        run = units[block:stop]
        so_far += units[block].state + sum(unit.kept for unit in run)
        made = sum(unit.together for unit in run) + sum(unit.outgoing for unit in run[:-1])
        made += max(unit.alone for unit in run)
        highest, largest = max(highest, so_far + made), max(largest, made)
    seconds = sum(unit.replay for unit in inside) * (2 if split else 1)
    return Way(blocks, seconds, so_far, highest, largest, waiting)


def peak(moments: Sequence[Moment], ways: dict[int, Way]) -> int:
    """The bytes of a device at its fullest moment, weights left out; ways: of each of its stages."""
    return max(_held(moment, ways) for moment in moments)


def _held(moment: Moment, ways: dict[int, Way]) -> int:
    held = sum(count * ways[stage].one for stage, count in moment.counts)
    held += sum(count * ways[stage].waiting for stage, count in moment.waiting)
    if moment.active is None:
        return held
    active = ways[moment.active]
    return held + (active.highest - active.one if moment.whole else active.largest)


def shared(search: Search, schedule: Schedule, stages: Sequence[FoundStage]) -> tuple[list[FoundStage], int]:
    """Stages with the same cuts, whose blocks are chosen for each device; `peak` is that of the device.

    Also the least limit that these cuts fit. The stages take more than `search.limit` if that is below it.
    """
    found, least = list(stages), 0
    for device, moments in enumerate(schedule.loads()):
        here = [number for number in range(schedule.stages) if schedule.device(number) == device]
        split = any(not moment.whole for moment in moments)
        ways = {number: _ways(search, stages[number], split) for number in here}
        fixed = sum(search.fixed_of(stages[number].start, stages[number].end) for number in here)
        limit = None if search.limit is None else search.limit - fixed
        chosen, lowest = _choose(moments, ways, limit)
        least = max(least, lowest + fixed)
        for number, one in chosen.items():
            stage = stages[number]
            time = search.least_time(stage.start, stage.end) + one.replay
            found[number] = replace(stage, blocks=one.blocks, time=time, peak=peak(moments, chosen) + fixed)
    return found, least


def _ways(search: Search, stage: FoundStage, split: bool) -> list[Way]:
    """The ways that may be best: of the blocks that no other betters, and storing where there is a limit."""
    run = stage.start, stage.end
    blocks = {one.starts for kind in (False, split) for one in search.fronts.all(*run, kind)}
    chosen = [*sorted(blocks), ()] if search.limit is not None else sorted(blocks)
    return [way(search.units, *run, starts, split) for starts in chosen]


def _choose(
    moments: Sequence[Moment], ways: dict[int, list[Way]], limit: float | None
) -> tuple[dict[int, Way], int]:
    """The best way for each stage of a device, and the least peak of any."""
    size = 1
    for options in ways.values():
        size *= len(options)
    if size <= _COMBINATIONS:
        every = [dict(zip(ways, chosen, strict=True)) for chosen in product(*ways.values())]
    else:
        every = _settled(moments, ways)
    peaks = [peak(moments, one) for one in every]
    least = min(peaks)
    within = least if limit is None or limit < least else limit
    fitting = [(_replay(chosen), took, place) for place, (took, chosen) in enumerate(zip(peaks, every, strict=True))]
    *_, best = min(entry for entry in fitting if entry[1] <= within)
    return every[best], least


def _replay(ways: dict[int, Way]) -> float:
    return sum(one.replay for one in ways.values())


def _settled(moments: Sequence[Moment], ways: dict[int, list[Way]]) -> list[dict[int, Way]]:
    """Combinations around one that is improved a stage at a time, until no change of one stage lowers the peak."""
    now = {stage: options[0] for stage, options in ways.items()}
    seen = [now]
    while True:
        before = peak(moments, now)
        for stage, options in ways.items():
            changed = [{**now, stage: option} for option in options]
            seen += changed
            now = min(changed, key=lambda one: peak(moments, one))
        if peak(moments, now) >= before:
            return seen
