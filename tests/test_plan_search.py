"""The search for cuts and blocks against every plan of short chains, and what long chains are known to want."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.passes.plan_devices import loads, shared
from mhc_compile.passes.plan_search import Search, Unit, least_blocks
from mhc_compile.passes.schedules import Schedule
from plan_oracle import Run, cut_blocks, device_peak, every_choice, least_memory, replay_peak, weights_of

SMALL = st.integers(0, 9)
UNIT = st.builds(
    Unit,
    time=st.integers(1, 9).map(float),
    kept=SMALL,
    replay=st.integers(0, 2).map(float),
    saved=SMALL,
    state=SMALL,
    outgoing=SMALL,
    together=SMALL,
    alone=SMALL,
    boundary=st.one_of(SMALL, SMALL, st.none()),
    send=st.integers(0, 2).map(float),
    again=st.integers(0, 3),
    waiting=SMALL,
)
UNITS = st.lists(UNIT, min_size=1, max_size=7)


def tied_units(count: int) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    """Weights that two units read."""
    pairs = [(before, unit) for unit in range(count) for before in range(unit)]
    if not pairs:
        return st.just([])
    return st.lists(st.tuples(st.sampled_from(pairs), SMALL).map(lambda one: (*one[0], one[1])), max_size=2)


@settings(max_examples=200, deadline=None)
@given(units=UNITS, data=st.data())
def test_the_plan_is_the_best_of_all(units: list[Unit], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, min(3, len(units))))
    in_flight = data.draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages))
    fixed = data.draw(st.lists(st.integers(0, 20), min_size=len(units), max_size=len(units)))
    tied = data.draw(tied_units(len(units)))
    limit = data.draw(st.one_of(st.none(), st.integers(1, 300)))
    choices = list(every_choice(units, in_flight, limit, fixed, tied))
    found = Search(units, in_flight, limit, fixed, tied).run()
    if not choices:
        assert found is None
        return
    best = min((choice.slowest, choice.sent, choice.fullest) for choice in choices)
    assert found is not None
    cuts = [stage.start for stage in found[1:]]
    assert (
        max(stage.time for stage in found),
        sum(units[cut].boundary or 0 for cut in cuts),
        max(stage.peak for stage in found),
    ) == best
    assert [stage.end for stage in found] == [*cuts, len(units)]
    for stage, many in zip(found, in_flight, strict=True):
        if stage.blocks:  # what it says it takes is what its own blocks take
            took = replay_peak(units, stage.start, stage.end, stage.blocks, many)
            assert stage.peak == took + weights_of(fixed, tied, stage.start, stage.end)


@settings(max_examples=50, deadline=None)
@given(units=UNITS, data=st.data())
def test_the_least_memory_is_reachable_and_no_less_is(units: list[Unit], data: st.DataObject) -> None:
    legal = sum(unit.boundary is not None for unit in units[1:])
    stages = data.draw(st.integers(1, min(3, legal + 1)))
    in_flight = data.draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages))
    fixed = data.draw(st.lists(st.integers(0, 20), min_size=len(units), max_size=len(units)))
    tied = data.draw(tied_units(len(units)))
    least = Search(units, in_flight, None, fixed, tied).least_memory()
    assert least == least_memory(units, in_flight, fixed, tied)
    assert Search(units, in_flight, least, fixed, tied).run() is not None
    assert Search(units, in_flight, least - 1, fixed, tied).run() is None


def chain(sites: int, n: int = 4) -> list[Unit]:
    """Equal sites in units of C, as the paper counts them, that keep as much again for their branches."""
    return [Unit(1.0, kept=7, saved=n + 2, state=n, outgoing=n, together=2, alone=2 * n) for _ in range(sites)]


@pytest.mark.parametrize("sites", [16, 24, 61])
@pytest.mark.parametrize("in_flight", [1, 4])
def test_uneven_blocks_are_better_than_any_equal_ones(sites: int, in_flight: int) -> None:
    units = chain(sites)
    blocks, peak = least_blocks(units, in_flight)
    assert peak == replay_peak(units, 0, sites, blocks, in_flight)
    equal = min(replay_peak(units, 0, sites, range(0, sites, length), in_flight) for length in range(1, sites + 1))
    assert peak < equal
    lengths = [after - before for before, after in zip(blocks, [*blocks[1:], sites], strict=True)]
    assert lengths == sorted(lengths, reverse=True)


def test_more_microbatches_in_flight_want_longer_blocks() -> None:
    units = chain(24)
    counts = [len(least_blocks(units, many)[0]) for many in (1, 2, 4, 8, 16)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_blocks_of_one_stage_are_the_best_of_all() -> None:
    numbers = random.Random(0)
    for _ in range(30):
        units = [
            Unit(1.0, kept=numbers.randint(0, 9), state=numbers.randint(0, 9), outgoing=numbers.randint(0, 9))
            for _ in range(9)
        ]
        for many in (1, 3):
            best = min(replay_peak(units, 0, 9, blocks, many) for blocks in cut_blocks(0, 9))
            assert least_blocks(units, many)[1] == best


def test_no_block_crosses_a_cut_and_no_cut_is_where_none_may_be() -> None:
    units = [Unit(1.0, state=1, outgoing=1, boundary=None if place % 3 else 4) for place in range(12)]
    found = Search(units, [2, 1]).run()
    assert found is not None
    assert [stage.start for stage in found] == [0, 6]
    assert found[1].blocks[0] == 6
    assert all(stage.start <= block < stage.end for stage in found for block in stage.blocks)


def test_a_cut_with_little_to_send_is_taken_where_it_costs_no_time() -> None:
    units = [Unit(1.0, boundary=9) for _ in range(6)]
    units[2] = Unit(1.0, boundary=1)
    found = Search(units, [2, 1]).run()
    assert found is not None and found[1].start == 3  # the slowest stage comes first
    units[3] = Unit(1.0, boundary=9, send=1.0)
    found = Search(units, [2, 1]).run()
    assert found is not None and found[1].start == 2


def test_a_stage_stores_what_fits() -> None:
    units = [Unit(1.0, kept=1, replay=1.0, saved=10, state=4, outgoing=4, together=2) for _ in range(8)]
    search = Search(units, [4, 1], limit=60)
    found = search.run()
    assert found is not None
    assert found[0].blocks and not found[1].blocks  # four microbatches in flight in the first, one in the last
    assert all(stage.peak <= 60 for stage in found)
    assert found[0].time == 2 * (found[0].end - found[0].start) and found[1].time == found[1].end - found[1].start


def every_device_peak(units: list[Unit], runs: dict[int, Run], actions: list[tuple[str, int]]) -> tuple[int, int]:
    """The lowest peaks of a device: of all blocks, and with stages that store as well."""
    blocks = [list(cut_blocks(run.start, run.end)) for run in runs.values()]
    found = []
    for options in (blocks, [[*choices, ()] for choices in blocks]):
        every = [dict(zip(runs, chosen, strict=True)) for chosen in product(*options)]
        tried = [{number: replace(runs[number], blocks=one) for number, one in chosen.items()} for chosen in every]
        found.append(min(device_peak(units, one, actions) for one in tried))
    return found[0], found[1]


COUPLED = [("interleaved", 4, 2), ("zbv", 4, 2), ("dualpipev", 4, 2), ("zero-bubble", 4, 2)]


@settings(max_examples=60, deadline=None)
@given(units=UNITS, data=st.data())
def test_a_split_backward_frees_nothing_before_its_second_part(units: list[Unit], data: st.DataObject) -> None:
    """Zero-bubble, a stage a device: the blocks of each stage against all, walked through in the order of torch."""
    legal = sum(unit.boundary is not None for unit in units[1:])
    stages = data.draw(st.integers(1, min(3, legal + 1)))
    schedule = Schedule.of("zero-bubble", stages, stages, stages * data.draw(st.integers(1, 3)))
    found = Search(units, loads(schedule)).run()
    assert found is not None
    for number, stage in enumerate(found):
        actions = [(action.kind, number) for action in schedule.orders()[number]]
        peaks = {
            blocks: device_peak(units, {number: Run(stage.start, stage.end, blocks)}, actions)
            for blocks in cut_blocks(stage.start, stage.end)
        }
        assert stage.peak == peaks[stage.blocks] == min(peaks.values())


@pytest.mark.parametrize(("name", "stages", "devices"), COUPLED)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_stages_that_share_a_device_share_its_memory(name: str, stages: int, devices: int, data: st.DataObject) -> None:
    """What is said of a device is what its actions take, and with a limit they fit, or nothing could."""
    units = [replace(unit, boundary=1) for unit in data.draw(st.lists(UNIT, min_size=4, max_size=6))]
    schedule = Schedule.of(name, stages, devices, 4)
    cuts = Search(units, loads(schedule)).run()
    assert cuts is not None
    free, least = shared(Search(units, loads(schedule)), schedule, cuts)
    limit = data.draw(st.integers(max(least - 5, 1), max(stage.peak for stage in free) + 60))
    limited, least_of_all = shared(Search(units, loads(schedule), limit), schedule, cuts)
    lowest = []
    for device in range(devices):
        here = [number for number in range(stages) if schedule.device(number) == device]
        actions = [(action.kind, action.stage) for action in schedule.orders()[device]]
        for found in (free, limited):
            runs = {number: Run(found[number].start, found[number].end, found[number].blocks) for number in here}
            took = device_peak(units, runs, actions)
            assert all(found[number].peak == took for number in here)
        lowest.append(every_device_peak(units, runs, actions))
    assert max(peak for peak, _ in lowest) == least or name == "dualpipev"  # it frees in both ways
    assert max(peak for _, peak in lowest) == least_of_all or name == "dualpipev"
    assert (max(stage.peak for stage in limited) <= limit) == (least_of_all <= limit)
