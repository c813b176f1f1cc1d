"""What a cost model says of one op and of one site, and the sites a block that follow from sizes alone (L_r*)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class NodeCost:
    """One op, for one microbatch: FLOPs, bytes moved, and seconds, forward and backward.

    kept: bytes that it is the first to save for the backward. replayed: it may be computed again in the backward, which
    takes replay_seconds.
    """

    name: str
    op: str
    site: str
    flops: int
    backward_flops: int
    bytes: int
    backward_bytes: int
    kept: int
    replayed: bool
    seconds: float
    backward_seconds: float
    replay_seconds: float


@dataclass(frozen=True)
class SiteSize:
    """Streams, features, tokens of a microbatch, and bytes of one stream (`one`) of a site."""

    n: int
    features: int
    tokens: int
    one: int


def formula_length(streams: int, sites: int) -> float:
    """The paper's sites a block: sqrt(n L / (n + 2))."""
    return sqrt(streams * sites / (streams + 2))


def block_objective(states: Sequence[int], replays: Sequence[int], length: int) -> int:
    """The paper's objective for blocks of `length` sites: first states of all blocks, and the largest replay."""
    starts = range(0, len(states), length)
    return sum(states[start] for start in starts) + max(sum(replays[start : start + length]) for start in starts)


def exact_length(states: Sequence[int], replays: Sequence[int]) -> int:
    """The length with the least objective, the shortest of equals."""
    lengths = range(1, len(states) + 1)
    return min(lengths, key=lambda length: block_objective(states, replays, length))
