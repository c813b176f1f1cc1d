"""The best cuts and recompute blocks of a chain of units: an exact search, on numbers alone.

A *unit* is what lies between two neighbouring legal cuts. A *stage* is a run of units, and keeps for the backward of
each microbatch what its branches need (`kept`). Its mHC values are either stored as well, or replayed from the first
state of a *block*, a run of units of one stage (arXiv 2512.24880, eq. 20). With m microbatches in flight a stage takes

    (m - 1) (kept + states) + max over blocks b of (kept and states up to and with b + what the replay of b makes)

bytes: whatever lies behind block b is freed when b is replayed. So blocks that shrink towards the end of a stage are
better than equal ones. Where a schedule splits the backward, nothing is freed before the weight gradients, and the
maximum is that of the replays alone. The fronts below are the pairs (bytes of states, that maximum) that no other
choice of blocks betters in both: they serve every m. Which stage gets which units is a search over stage ends, for
each in turn:

1. the least time of the slowest stage, with what it receives at both ends where it waits for that, and with every
   stage inside the memory limit;
2. of these, the least bytes sent between stages;
3. of these, the least memory of the fullest stage.

Without a limit every stage replays. With one, a stage replays only where storing does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import inf, isfinite

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Unit:
    """What one unit costs, for one microbatch; times in seconds, memory in bytes.

    time: of its forward and backward; replay: of replaying its mHC ops.
    kept: for its backward, in every case; saved: also, if its mHC values are stored and not replayed.
    state: the trunk states that enter it, kept when a block starts here.
    outgoing: the states that it makes for later units; replayed by a block that goes on behind it.
    together: what a replay makes for this unit's backward, all units of a block at once.
    alone: what exists for one unit of a block at a time: what is replayed when it is needed, gradients on their way.
    boundary: sent to a stage that starts here; None where no stage may. send: the seconds of that, one direction.
    again: values of earlier units that a stage which starts here keeps for itself.
    waiting: gradients kept between a backward for inputs and the one for weights.
    """

    time: float
    kept: int = 0
    replay: float = 0.0
    saved: int = 0
    state: int = 0
    outgoing: int = 0
    together: int = 0
    alone: int = 0
    boundary: int | None = 0
    send: float = 0.0
    again: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Load:
    """What a stage holds at its fullest moments: microbatches kept, and those that wait for their weight gradients.

    split: nothing is freed before the weight gradients.
    """

    moments: tuple[tuple[int, int], ...]
    split: bool = False

    @property
    def in_flight(self) -> int:
        """The most microbatches kept."""
        return max(kept for kept, _ in self.moments)


@dataclass(frozen=True)
class FoundStage:
    """Units `start` to `end` (not included); the first unit of each recompute block, none where all is stored."""

    start: int
    end: int
    blocks: tuple[int, ...]
    time: float
    peak: int


@dataclass(frozen=True)
class Blocks:
    """One choice of blocks for a run of units: the bytes of their first states, and its highest moment."""

    states: int
    highest: int
    starts: tuple[int, ...]


class _Chain:
    """The numbers of all units, as arrays."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.kept = [0, *accumulate(unit.kept for unit in units)]
        self.state, self.outgoing, self.together, self.alone = (
            np.array([getattr(unit, name) for unit in units], np.int64)
            for name in ("state", "outgoing", "together", "alone")
        )


class _Front:
    """The runs of units from one start on: for each end the choices of blocks that no other betters.

    The choices lie in flat arrays, those of each end behind those of the end before. `highest` is the highest moment of
    a backward that frees block by block, or with `split` the largest replay.
    """

    def __init__(self, start: int, chain: _Chain, split: bool) -> None:
        self.start, self.chain, self.split = start, chain, split
        self.states = self.highest = self.last = np.zeros(1, np.int64)
        self.before = np.full(1, -1)  # the choice that the last block was added to
        self.ends = [0, 1]  # where the choices of each run begin

    def extend(self) -> None:
        """Add the run that is longer by one unit."""
        start, end = self.start, self.start + len(self.ends) - 1
        kept = self.chain.kept[end] - self.chain.kept[start]
        states = self.states + self.chain.state[start:end][self.last]
        made = self._replays(end)[self.last]
        highest = np.maximum(self.highest, made if self.split else states + kept + made)
        order = np.lexsort((highest, states))
        falling = highest[order]
        keep = order[np.append(True, falling[1:] < np.minimum.accumulate(falling)[:-1])]
        self.before = np.append(self.before, keep)
        self.states, self.highest = np.append(self.states, states[keep]), np.append(self.highest, highest[keep])
        self.last = np.append(self.last, np.full(len(keep), end - start))
        self.ends.append(len(self.states))

    def _replays(self, end: int) -> NDArray[np.int64]:
        """For each first unit of a block that ends at `end`: what its replay makes."""
        together = self.chain.together[self.start : end].copy()
        together[:-1] += self.chain.outgoing[self.start : end - 1]
        alone = np.maximum.accumulate(self.chain.alone[self.start : end][::-1])
        return np.asarray((together[::-1].cumsum() + alone)[::-1])

    def choices(self, end: int) -> slice:
        """Where the choices for the run that ends there are."""
        while len(self.ends) - 2 < end - self.start:
            self.extend()
        return slice(*self.ends[end - self.start : end - self.start + 2])

    def blocks(self, choice: int) -> Blocks:
        """A choice by its place in the arrays."""
        states, highest = int(self.states[choice]), int(self.highest[choice])
        starts = []
        while self.before[choice] >= 0:
            choice = int(self.before[choice])
            starts.append(self.start + int(self.last[choice]))
        return Blocks(states, highest, tuple(reversed(starts)))


class Fronts:
    """The best blocks of every run of units."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._chain = _Chain(units)
        self.kept = self._chain.kept
        self._known: dict[tuple[int, bool], _Front] = {}

    def _front(self, start: int, split: bool) -> _Front:
        if (start, split) not in self._known:
            self._known[start, split] = _Front(start, self._chain, split)
        return self._known[start, split]

    def all(self, start: int, end: int, split: bool) -> list[Blocks]:
        """The choices of blocks that no other betters, states growing."""
        front = self._front(start, split)
        found = front.choices(end)
        return [front.blocks(choice) for choice in range(found.start, found.stop)]

    def best(self, start: int, end: int, load: Load, each: int, waiting: int) -> tuple[Blocks, int]:
        """The blocks with the least peak under a load, of these those with the least states; and that peak.

        each: bytes that a microbatch keeps beside its states; waiting: and while it waits for its weight gradients.
        """
        front = self._front(start, load.split)
        found = front.choices(end)
        states, highest = front.states[found], front.highest[found]
        if load.split:
            kept = [count * (states + each) + late * waiting for count, late in load.moments]
        else:
            own = self.kept[end] - self.kept[start]  # of the microbatch at work, which is in `highest`
            kept = [count * (states + each) - states - own for count, _ in load.moments]
        peaks = np.max(kept, axis=0) + highest
        choice = int(np.argmin(peaks))
        return front.blocks(found.start + choice), int(peaks[choice])


@dataclass(frozen=True)
class _Option:
    time: float
    peak: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class _Runs:
    """All stages that end at one place, by the place where they start: arrays, so that most are ruled out at once.

    time, replay: seconds of one that stores, and of its replay; kept, saved, waits, fixed: as for one stage; alone: the
    largest of its units; state: of its first block. last: what the replay of its last unit makes, whatever its blocks.
    """

    time: NDArray[np.float64]
    replay: NDArray[np.float64]
    kept: NDArray[np.int64]
    saved: NDArray[np.int64]
    waits: NDArray[np.int64]
    fixed: NDArray[np.int64]
    alone: NDArray[np.int64]
    state: NDArray[np.int64]
    last: int

    def stored(self, load: Load) -> NDArray[np.int64]:
        """The peak of each without replay."""
        return _fullest(load, self.kept + self.saved, self.waits) + self.alone + self.fixed

    def floor(self, load: Load) -> NDArray[np.int64]:
        """What each takes at least, with replay: one block, and no more made again than for the last unit."""
        return _fullest(load, self.kept + self.state, self.waits) + self.last + self.fixed


def _fullest(load: Load, each: NDArray[np.int64], waits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of microbatches that keep so much, and wait."""
    moments = [count * each + (late * waits if load.split else 0) for count, late in load.moments]
    return np.asarray(np.max(moments, axis=0))


class Search:
    """Cuts of `units` into as many stages as there are loads; an integer stands for so many microbatches in flight.

    limit: the bytes that a stage may take; None: every stage replays, and takes as few as it can. fixed: for each unit,
    bytes that it takes once, whatever is in flight (weights). tied: (unit, later unit, bytes) of what the later one
    takes as well, unless both are in one stage.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        loads: Sequence[Load | int],
        limit: float | None = None,
        fixed: Sequence[int] | None = None,
        tied: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        self.units, self.limit = units, limit
        self.loads = [Load(((load, 0),)) if isinstance(load, int) else load for load in loads]
        self.fronts = Fronts(units)
        self.tied = tied
        self.fixed = [0, *accumulate(fixed or [0] * len(units))]
        self.time = [0.0, *accumulate(unit.time for unit in units)]
        self.replay = [0.0, *accumulate(unit.replay for unit in units)]
        self.saved = [0, *accumulate(unit.saved for unit in units)]
        self.waiting = [0, *accumulate(unit.waiting for unit in units)]
        self._options: dict[tuple[Load, int, int], _Option | None] = {}
        self._starts = np.array(self.places[:-1])
        self._alone = np.array([unit.alone for unit in units], np.int64)
        self._again, self._state = (
            np.array([getattr(units[place], name) if place else first for place in self.places[:-1]], np.int64)
            for name, first in (("again", 0), ("state", units[0].state))
        )
        self._time = np.array(self.time)
        self._sums = [np.array(one) for one in (self.replay, self.fronts.kept, self.saved, self.waiting, self.fixed)]
        self._sends = np.array([self.send(place) for place in self.places[:-1]])

    # ------------------------------------------------------------------------------------------ one stage

    def send(self, place: int) -> float:
        """Seconds to receive at a cut, in either direction; none at the ends of the chain."""
        return self.units[place].send if 0 < place < len(self.units) else 0.0

    def least_time(self, start: int, end: int) -> float:
        """Time of a stage that stores everything."""
        return self.time[end] - self.time[start] + self.send(start) + self.send(end)

    def _kept(self, start: int, end: int) -> int:
        return self.fronts.kept[end] - self.fronts.kept[start] + (self.units[start].again if start else 0)

    def replayed(self, stage: int, start: int, end: int) -> _Option:
        """The stage with replay, in the blocks of the least peak."""
        load = self.loads[stage]
        blocks, peak = self.fronts.best(start, end, load, self._kept(start, end), self._waits(start, end))
        times = 2 if load.split else 1  # each part of a split backward replays
        time = self.time[end] - self.time[start] + times * (self.replay[end] - self.replay[start])
        return _Option(time + self.send(start) + self.send(end), peak + self.fixed_of(start, end), blocks.starts)

    def stored(self, stage: int, start: int, end: int) -> _Option:
        """The stage without replay."""
        load, waits = self.loads[stage], self._waits(start, end)
        every = self._kept(start, end) + self.saved[end] - self.saved[start]
        peak = max(kept * every + (late * waits if load.split else 0) for kept, late in load.moments)
        peak += int(self._alone[start:end].max())
        time = self.time[end] - self.time[start] + self.send(start) + self.send(end)
        return _Option(time, peak + self.fixed_of(start, end), ())

    def _waits(self, start: int, end: int) -> int:
        return self.waiting[end] - self.waiting[start]

    def fixed_of(self, start: int, end: int) -> int:
        """What a stage takes once, whatever is in flight."""
        again = sum(size for before, here, size in self.tied if before < start <= here < end)
        return self.fixed[end] - self.fixed[start] + again

    def option(self, stage: int, start: int, end: int) -> _Option | None:
        """The fastest way to run these units as this stage; None if it does not fit."""
        key = self.loads[stage], start, end
        if key not in self._options:
            self._options[key] = self._fastest(stage, start, end)
        return self._options[key]

    def _fastest(self, stage: int, start: int, end: int) -> _Option | None:
        if self.limit is None:
            return self.replayed(stage, start, end)
        stored = self.stored(stage, start, end)
        if stored.peak <= self.limit:
            return stored
        replayed = self.replayed(stage, start, end)
        return replayed if replayed.peak <= self.limit else None

    # ------------------------------------------------------------------------------------------ all stages

    @cached_property
    def places(self) -> list[int]:
        """Where a stage may start or end."""
        inner = [place for place, unit in enumerate(self.units) if place and unit.boundary is not None]
        return [0, *inner, len(self.units)]

    def run(self) -> list[FoundStage] | None:
        """The best stages, or None when no choice fits the limit."""
        bottleneck = self.least_bottleneck()
        return None if not isfinite(bottleneck) else self._within(bottleneck * (1 + 1e-12))

    def _runs(self, there: int) -> _Runs:
        """Of all starts before a place."""
        starts, end = self._starts[:there], self.places[there]
        replay, kept, saved, waits, fixed = (sums[end] - sums[starts] for sums in self._sums)
        for before, unit, size in self.tied:
            if unit < end:
                fixed = fixed + size * ((before < starts) & (starts <= unit))
        return _Runs(
            time=self._spans(there),
            replay=replay,
            kept=kept + self._again[:there],
            saved=saved,
            waits=waits,
            fixed=fixed,
            alone=np.maximum.accumulate(self._alone[:end][::-1])[::-1][starts],
            state=self._state[:there],
            last=self.units[end - 1].together + self.units[end - 1].alone,
        )

    def _spans(self, there: int) -> NDArray[np.float64]:
        """The least time of a stage that ends at a place, for all starts before it."""
        starts, end = self._starts[:there], self.places[there]
        found: NDArray[np.float64] = self._time[end] - self._time[starts] + self._sends[:there] + self.send(end)
        return found

    def _times(self, stage: int, runs: _Runs) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The time of each of these stages if it fits, infinite where it cannot; and whether it is known to fit."""
        load = self.loads[stage]
        replayed = runs.time + (2 if load.split else 1) * runs.replay  # each part of a split backward replays
        if self.limit is None:
            return replayed, np.ones(len(replayed), np.bool_)
        fits = runs.stored(load) <= self.limit
        return np.where(fits, runs.time, np.where(runs.floor(load) <= self.limit, replayed, inf)), fits

    def least_bottleneck(self) -> float:
        """The time of the slowest stage, as short as possible; infinite when nothing fits."""
        ends, best = self._hopeful(), np.full(len(self.places), inf)
        best[0] = 0.0
        for stage in range(len(self.loads)):
            reached = np.full(len(self.places), inf)
            for there in sorted(ends[stage + 1] - {0}):
                times, known = self._times(stage, self._runs(there))
                bounds = np.maximum(best[:there], times)
                while isfinite(bounds[here := int(bounds.argmin())]):
                    if known[here] or self.option(stage, self.places[here], self.places[there]) is not None:
                        reached[there] = bounds[here]
                        break
                    bounds[here] = inf
            best = reached
        return float(best[-1])

    def _hopeful(self) -> list[set[int]]:
        """For each number of stages: the places from which the others may reach the end, by what is cheap to say."""
        count, last = len(self.loads), len(self.places) - 1
        found = [{last}]
        for stage in reversed(range(count)):
            if self.limit is None:
                found.append(set(range(stage, last - count + stage + 1)))
                continue
            starts: set[int] = set()
            for there in found[-1]:
                starts.update(np.flatnonzero(np.isfinite(self._times(stage, self._runs(there))[0])).tolist())
            found.append(starts)
        return found[::-1]

    def _within(self, bottleneck: float) -> list[FoundStage]:
        """Of the choices as fast as `bottleneck`, those that send least; of these, the one that takes least."""
        count, last = len(self.loads), len(self.places) - 1
        ahead, behind = self._reachable(bottleneck), self._reachable(bottleneck, backwards=True)
        edges: list[list[tuple[int, int, _Option]]] = []  # for each stage: start, end, how
        for stage in range(count):
            found = []
            starts = np.array(sorted(ahead[stage] & behind[count - stage]), np.int64)
            for there in sorted(ahead[stage + 1] & behind[count - stage - 1]):
                near, runs = starts[starts < there], self._runs(there)
                times, known = self._times(stage, runs)
                peaks = runs.stored(self.loads[stage])
                for here in near[times[near] <= bottleneck].tolist():
                    if known[here] and self.limit is not None:
                        option: _Option | None = _Option(float(times[here]), int(peaks[here]), ())
                    else:
                        option = self.option(stage, self.places[here], self.places[there])
                    if option is not None and option.time <= bottleneck:
                        found.append((here, there, option))
            edges.append(found)
        return self._lightest(edges, last)

    def _reachable(self, bottleneck: float, backwards: bool = False) -> list[set[int]]:
        """For each number of stages: the places that so many fast stages, counted from one end, may lead to."""
        last = len(self.places) - 1
        near = [np.flatnonzero(self._spans(there) <= bottleneck) for there in range(last + 1)]
        found = [{last if backwards else 0}]
        for _ in self.loads:
            if backwards:
                found.append({here for there in found[-1] for here in near[there].tolist()})
            else:
                inside = np.isin(np.arange(last + 1), list(found[-1]))
                found.append({there for there in range(last + 1) if inside[near[there]].any()})
        return found

    def _lightest(self, edges: list[list[tuple[int, int, _Option]]], last: int) -> list[FoundStage]:
        sent: list[dict[int, int]] = [{last: 0}]  # least bytes still to send, from a start, for each stage
        for found in reversed(edges):
            costs: dict[int, int] = {}
            for here, there, _ in found:
                if there in sent[-1]:
                    cost = sent[-1][there] + self._boundary(there)
                    costs[here] = min(costs.get(here, cost), cost)
            sent.append(costs)
        sent.reverse()
        least: dict[int, tuple[int, list[FoundStage]]] = {last: (0, [])}  # the fullest stage from there on
        for stage in range(len(edges) - 1, -1, -1):
            lightest: dict[int, tuple[int, list[FoundStage]]] = {}
            for here, there, option in edges[stage]:
                if there not in least or sent[stage][here] != sent[stage + 1][there] + self._boundary(there):
                    continue
                fullest, stages = least[there]
                peak = max(fullest, option.peak)
                if here not in lightest or peak < lightest[here][0]:
                    lightest[here] = peak, [self._stage(here, there, option), *stages]
            least = lightest
        return least[0][1]

    def _boundary(self, place: int) -> int:
        return 0 if place == len(self.places) - 1 else self.units[self.places[place]].boundary or 0

    def _stage(self, here: int, there: int, option: _Option) -> FoundStage:
        return FoundStage(self.places[here], self.places[there], option.blocks, option.time, option.peak)

    def least_memory(self) -> int:
        """The least that the fullest stage can take, whatever the time."""
        rest, bound = self._memory_ahead()
        best = np.full(len(self.places), inf)
        best[0] = 0
        for stage, load in enumerate(self.loads):
            reached = np.full(len(self.places), inf)
            for there in np.flatnonzero(rest[stage + 1] <= bound).tolist():
                runs = self._runs(there)
                stored = runs.stored(load)
                reached[there] = np.maximum(best[:there], stored).min(initial=inf)
                bounds = np.maximum(best[:there], np.minimum(stored, runs.floor(load)))
                while there and bounds[here := int(bounds.argmin())] < min(reached[there], bound + 1):
                    took = self.replayed(stage, self.places[here], self.places[there]).peak
                    reached[there] = min(reached[there], max(best[here], min(took, stored[here])))
                    bounds[here] = inf
            best = reached
        return int(best[-1])

    def _memory_ahead(self) -> tuple[list[NDArray[np.float64]], int]:
        """For each number of stages and place: what the stages behind take at least; and what some plan does take."""
        count = len(self.loads)
        rest = [np.full(len(self.places), inf) for _ in range(count + 1)]
        following = np.zeros((count, len(self.places)), np.int64)
        rest[count][-1] = 0
        for stage in reversed(range(count)):
            load = self.loads[stage]
            for there in np.flatnonzero(np.isfinite(rest[stage + 1])).tolist():
                runs = self._runs(there)
                least = np.maximum(np.minimum(runs.stored(load), runs.floor(load)), rest[stage + 1][there])
                better = least < rest[stage][:there]
                rest[stage][:there][better] = least[better]
                following[stage, :there][better] = there
        here, bound = 0, 0
        for stage in range(count):
            there = int(following[stage, here])
            run = stage, self.places[here], self.places[there]
            bound, here = max(bound, min(self.replayed(*run).peak, self.stored(*run).peak)), there
        return rest, bound


def least_blocks(units: Sequence[Unit], in_flight: int = 1) -> tuple[tuple[int, ...], int]:
    """The blocks of one stage that holds all units, and its peak."""
    found = Search(units, [in_flight]).replayed(0, 0, len(units))
    return found.blocks, found.peak
