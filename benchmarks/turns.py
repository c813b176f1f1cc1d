"""What the benchmarks of whole models share: calls timed in turn, cold caches, and where a result was measured."""

from __future__ import annotations

import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch._inductor.utils import clear_caches

from mhc_compile.kernels import cpu_library

Call = Callable[[], Any]


def now() -> float:
    """Seconds, behind all work of the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def processor_seconds() -> float:
    """What this process and its ended children took of the processor: on a busy machine less disturbed than `now`."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


@dataclass(frozen=True)
class Taken:
    """Seconds by the clock, and of the processor."""

    wall: float
    processor: float


def taken(call: Call) -> Taken:
    """By one call."""
    start, before = now(), processor_seconds()
    call()
    return Taken(now() - start, processor_seconds() - before)


def in_turn(calls: Mapping[str, Call], rounds: int, each: int = 3) -> dict[str, Taken]:
    """The medians of each; a turn is one call to warm up and `each` that count, all contestants a round."""
    found: dict[str, list[Taken]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            found[name] += [taken(call) for _ in range(each)]
    return {
        name: Taken(median(one.wall for one in times), median(one.processor for one in times))
        for name, times in found.items()
    }


def forget_compiled_code() -> None:
    """Empty caches of generated code, in memory and on disk. What is compiled goes on working."""
    cpu_library._libraries.clear()
    clear_caches()
    folder = tempfile.mkdtemp(prefix="mhc_cold_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")


def environment() -> dict[str, Any]:
    """Machine and versions, and how busy the machine is: times on one that does other work are not to be trusted."""
    cores = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores}, no GPU",
        "platform": platform.platform(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "load_average_before": round(os.getloadavg()[0], 1),
    }


def reason(error: BaseException) -> str:
    """An error in one line of a result: of a compilation's the first line names the backend, the second what it was."""
    return " ".join(f"{type(error).__name__}: {error}".splitlines()[:2])[:300]
