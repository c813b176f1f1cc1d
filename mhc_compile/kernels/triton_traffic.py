"""How many bytes launches move, read off their arguments.

The unit is one stream of all tokens, T C elements: the traffic that counts, and that a site needs 18 units of forward
and 28 backward, or 14 and 24 in a chain of sites.  All else (coefficients, phi, shares of sums) is small, and is
reported in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from mhc_compile.kernels.triton_launch import Launch

# The arguments of kernels that are as long as the streams.  ``grad`` is the gradient of merged streams, ``tap`` what
# streams got from other readers.
STREAMS = frozenset({"streams", "merged", "x", "u", "f", "grad", "du", "df", "dx", "tap"})


@dataclass(frozen=True)
class Traffic:
    """What one launch, or several, read and write: each tensor once."""

    name: str
    read: float
    written: float
    other_bytes: int

    @property
    def units(self) -> float:
        return self.read + self.written


def traffic(launches: Sequence[Launch], tokens: int, features: int) -> list[Traffic]:
    """A row for each launch and a last one for their sum."""
    rows = [
        Traffic(
            launch.name,
            _units(launch.reads, tokens * features),
            _units(launch.writes, tokens * features),
            _other(launch.reads) + _other(launch.writes),
        )
        for launch in launches
    ]
    total = Traffic("all", sum(r.read for r in rows), sum(r.written for r in rows), sum(r.other_bytes for r in rows))
    return [*rows, total]


def _units(tensors: Mapping[str, Tensor | None], unit: int) -> float:
    return sum(t.numel() for name, t in tensors.items() if t is not None and name in STREAMS) / max(1, unit)


def _other(tensors: Mapping[str, Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if t is not None and name not in STREAMS)


def table(rows: Sequence[Traffic]) -> str:
    lines = [f"{'launch':24s}{'read':>8s}{'written':>9s}{'units':>7s}{'other MB':>10s}"]
    for row in rows:
        lines.append(f"{row.name:24s}{row.read:8.2f}{row.written:9.2f}{row.units:7.2f}{row.other_bytes / 1e6:10.2f}")
    return "\n".join(lines)
