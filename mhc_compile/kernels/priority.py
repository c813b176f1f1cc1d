"""Launches on a CUDA stream of high priority, for kernels that others wait for.

The device gives such a stream's kernels the next free multiprocessors, before those of other streams that were queued
earlier: those of a communication, or of another microbatch. (The paper, arXiv 2512.24880, section 4.3, runs the merges
of MLP sites so, that they do not hold up the pipeline's communication.)

Every launch is a fork and a join: the high stream waits for the current one, the kernel is queued on it, and the
current stream waits for the high one. So nothing can race that could not on the current stream alone:

- What a kernel reads and writes was allocated before, on the current stream. A tensor that is freed later is freed for
  that stream, and whatever takes its memory there comes behind the join: no ``record_stream`` is needed. Nothing may be
  allocated within :func:`launching`; kernels that want scratch memory of Triton's would, and none of this package does.
- A capture for a CUDA graph sees a branch that leaves the captured stream and comes back.

No triton here, and nothing of CUDA until a launch asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


class _Wanted(threading.local):
    """Of a thread: autograd runs backwards in threads of its own, one for each device."""

    now = False


_wanted = _Wanted()


@contextmanager
def on_high_priority(wanted: bool) -> Iterator[None]:
    """If wanted, what this thread launches within the block runs on a stream of high priority."""
    before, _wanted.now = _wanted.now, wanted
    try:
        yield
    finally:
        _wanted.now = before


@contextmanager
def launching(device: int) -> Iterator[None]:
    """Around one launch on this device (-1: the interpreter's, which has no streams): the fork and the join."""
    if not _wanted.now or device < 0:
        yield
        return
    current, high = torch.cuda.current_stream(device), high_stream(device)
    high.wait_stream(current)
    try:
        with torch.cuda.stream(high):
            yield
    finally:
        current.wait_stream(high)


@cache
def high_stream(device: int) -> torch.cuda.Stream:
    """The one stream of highest priority that all such launches on a device share."""
    _, highest = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]  # it is static
    made: torch.cuda.Stream = torch.cuda.Stream(device, priority=highest)  # type: ignore[no-untyped-call]
    return made
