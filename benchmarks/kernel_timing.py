"""Times on a CUDA device: graphs of calls on inputs that the cache cannot hold, and medians over events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles

import torch

Call = Callable[[], object]

BUDGET_US = 100_000  # how long the measured runs of one call take together
RUNS = 10, 200  # at least and at most so many of them


@dataclass(frozen=True)
class Time:
    """Microseconds of one call: the median, and the tenth and ninetieth percentile.

    ``how``: "graph" (replayed, without the time that launching takes on the CPU) or "launches"; ``launched_us`` is
    always that of plain calls one after the other, with the CPU's part where it is the longer.
    """

    us: float
    low_us: float
    high_us: float
    how: str
    launched_us: float


def rotation(sample_bytes: int) -> int:
    """How many samples it takes for none to be in the cache when its turn comes again."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(128, max(2, math.ceil(4 * cache / sample_bytes)))


def measure(prepare: Sequence[Callable[[], Call]]) -> Time:
    """The time of the calls that ``prepare`` gives, one for each sample; they are made on the stream that runs them."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls = [make() for make in prepare]
        for call in calls * 2:  # compiles, tunes, and warms up
            call()
        stream.synchronize()
        launched = _loop(calls, stream)
    try:
        times, how = _graph(calls, stream), "graph"
    except Exception as error:  # something in the calls cannot be captured
        torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails leaves its own in place
        torch.cuda.synchronize()  # raises again if the device is lost
        times, how = launched, f"launches ({type(error).__name__}: {error})"[:200]
    deciles = quantiles(times, n=10)
    return Time(median(times), deciles[0], deciles[-1], how, median(launched))


def _loop(calls: Sequence[Call], stream: torch.cuda.Stream) -> list[float]:
    """Microseconds of a call, from passes over all calls as Python launches them."""

    def one_pass() -> None:
        for call in calls:
            call()

    return [us / len(calls) for us in _events(one_pass, stream)]


def _graph(calls: Sequence[Call], stream: torch.cuda.Stream) -> list[float]:
    """The same from replays of a graph of all calls.  All results are kept, so that none lands where another was."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]
    with torch.cuda.stream(stream):
        times = _events(graph.replay, stream)
    del results
    graph.reset()
    return [us / len(calls) for us in times]


def _events(run: Callable[[], None], stream: torch.cuda.Stream) -> list[float]:
    """Microseconds of each of many runs, queued without waiting for one another."""
    first = _between(run, stream, 3)[-1]
    runs = max(RUNS[0], min(RUNS[1], int(BUDGET_US / max(first, 1.0))))
    return _between(run, stream, runs)


def _between(run: Callable[[], None], stream: torch.cuda.Stream, runs: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    run()
    events[0].record(stream)
    for event in events[1:]:
        run()
        event.record(stream)
    stream.synchronize()
    return [1000 * a.elapsed_time(b) for a, b in pairwise(events)]


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second of copies on the device, read and written counted."""
    pairs = [(torch.randn(size // 4, device="cuda"), torch.empty(size // 4, device="cuda")) for _ in range(2)]
    time = measure([lambda a=a, b=b: lambda: b.copy_(a) for a, b in pairs])  # type: ignore[misc]
    return 2 * size / time.us * 1e6
