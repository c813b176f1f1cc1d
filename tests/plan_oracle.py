"""Every plan of a short chain, each walked through step by step: what the search for the best one is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from mhc_compile.passes.plan_search import Unit

Tied = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Choice:
    """Cuts, and for each stage its blocks (none: everything is stored)."""

    cuts: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    slowest: float
    sent: int
    fullest: int


def replay_peak(units: Sequence[Unit], start: int, end: int, blocks: Sequence[int], in_flight: int) -> int:
    """Run the forwards of the microbatches in flight, then one backward, and look at the memory at every step."""
    again = units[start].again if start else 0
    ends = [*blocks[1:], end]
    one = again + sum(units[block].state for block in blocks) + sum(unit.kept for unit in units[start:end])
    memory = in_flight * one
    peak = memory
    for block, stop in reversed(list(zip(blocks, ends, strict=True))):
        inside = units[block:stop]
        memory += sum(unit.together for unit in inside) + sum(unit.outgoing for unit in inside[:-1])
        for unit in reversed(inside):
            peak = max(peak, memory + unit.alone)
        memory -= sum(unit.together for unit in inside) + sum(unit.outgoing for unit in inside[:-1])
        memory -= units[block].state + sum(unit.kept for unit in inside)
    assert memory == (in_flight - 1) * one + again
    return peak


def stored_peak(units: Sequence[Unit], start: int, end: int, in_flight: int) -> int:
    """The same for a stage that stores everything; its backward may start anywhere near the end."""
    one = (units[start].again if start else 0) + sum(unit.kept + unit.saved for unit in units[start:end])
    return in_flight * one + max(unit.alone for unit in units[start:end])


def cut_blocks(start: int, end: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut a run of units into blocks."""
    for count in range(end - start):
        for inner in combinations(range(start + 1, end), count):
            yield (start, *inner)


def stage_time(units: Sequence[Unit], start: int, end: int, replays: bool) -> float:
    """Compute, replay, and what a stage receives at both of its ends."""
    total = sum(unit.time + (unit.replay if replays else 0) for unit in units[start:end])
    return total + sum(units[place].send for place in (start, end) if 0 < place < len(units))


def stage_choices(
    units: Sequence[Unit], start: int, end: int, in_flight: int, limit: float | None
) -> list[tuple[tuple[int, ...], float, int]]:
    """Blocks, time and peak of the ways that one stage may run; of those that replay, the lowest."""
    ways = [(replay_peak(units, start, end, blocks, in_flight), blocks) for blocks in cut_blocks(start, end)]
    peak, blocks = min(ways)
    replayed = blocks, stage_time(units, start, end, True), peak
    if limit is None:
        return [replayed]
    stored = (), stage_time(units, start, end, False), stored_peak(units, start, end, in_flight)
    return [way for way in (stored, replayed) if way[2] <= limit][:1]


def every_choice(
    units: Sequence[Unit], in_flight: Sequence[int], limit: float | None, fixed: Sequence[int], tied: Tied = ()
) -> Iterator[Choice]:
    """Every legal plan that fits."""
    legal = [place for place in range(1, len(units)) if units[place].boundary is not None]
    for cuts in combinations(legal, len(in_flight) - 1):
        bounds = list(zip([0, *cuts], [*cuts, len(units)], strict=True))
        weights = [weights_of(fixed, tied, *bound) for bound in bounds]
        ways = [
            stage_choices(units, *bound, many, None if limit is None else limit - weight)
            for bound, many, weight in zip(bounds, in_flight, weights, strict=True)
        ]
        if all(ways):
            times, peaks = [way[0][1] for way in ways], [way[0][2] for way in ways]
            yield Choice(
                cuts,
                tuple(way[0][0] for way in ways),
                max(times),
                sum(units[cut].boundary or 0 for cut in cuts),
                max(peak + weight for peak, weight in zip(peaks, weights, strict=True)),
            )


def weights_of(fixed: Sequence[int], tied: Tied, start: int, end: int) -> int:
    """What a stage takes once: its own, and what it shares with earlier stages alone."""
    inside = range(start, end)
    return sum(fixed[start:end]) + sum(size for before, unit, size in tied if unit in inside and before not in inside)


def least_memory(units: Sequence[Unit], in_flight: Sequence[int], fixed: Sequence[int], tied: Tied = ()) -> int:
    """The lowest fullest stage that any plan has."""
    legal = [place for place in range(1, len(units)) if units[place].boundary is not None]
    least = []
    for cuts in combinations(legal, len(in_flight) - 1):
        bounds = zip([0, *cuts], [*cuts, len(units)], in_flight, strict=True)
        least.append(
            max(
                weights_of(fixed, tied, start, end)
                + min(
                    stored_peak(units, start, end, many),
                    *(replay_peak(units, start, end, blocks, many) for blocks in cut_blocks(start, end)),
                )
                for start, end, many in bounds
            )
        )
    return min(least)


# ---------------------------------------------------------------------------------------------- any schedule


@dataclass(frozen=True)
class Run:
    """How one stage of a device runs: its units, and its blocks (none: stored)."""

    start: int
    end: int
    blocks: tuple[int, ...]


def device_peak(units: Sequence[Unit], runs: dict[int, Run], actions: Sequence[tuple[str, int]]) -> int:
    """Walk through what a device does in a step, allocating and freeing unit by unit.

    actions: kind and stage. A split backward replays in both parts, and frees in the second.
    """
    memory = peak = 0
    splits = any(kind == "I" for kind, _ in actions)
    for kind, stage in actions:
        run = runs[stage]
        inside = units[run.start : run.end]
        again = units[run.start].again if run.start else 0
        stored = sum(unit.saved for unit in inside) if not run.blocks else 0
        one = again + stored + sum(unit.kept for unit in inside) + sum(units[block].state for block in run.blocks)
        waits = sum(unit.waiting for unit in inside) if splits else 0
        if kind == "F":
            memory += one
            peak = max(peak, memory)
            continue
        memory += waits if kind == "I" else 0
        freed = 0
        for block, stop in reversed(list(zip(run.blocks, [*run.blocks[1:], run.end], strict=False))):
            part = units[block:stop]
            made = sum(unit.together for unit in part) + sum(unit.outgoing for unit in part[:-1])
            peak = max(peak, memory - freed + made + max(unit.alone for unit in part))
            if kind == "B":
                freed += units[block].state + sum(unit.kept for unit in part)
        if not run.blocks:
            peak = max(peak, memory + max(unit.alone for unit in inside))
        memory -= one if kind == "B" else one + waits if kind == "W" else 0
    assert memory == 0
    return peak
