"""Bytes, seconds and counts as short text."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in powers of 1024, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits, three digits."""
    for unit in ("s", "ms", "us"):
        if seconds >= 1:
            return f"{seconds:.3g} {unit}"
        seconds *= 1000
    return f"{seconds:.3g} ns"


def count_text(count: float) -> str:
    """A count in powers of 1000, three digits."""
    for unit in ("", "K", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}P"


def plural(count: int, noun: str) -> str:
    """`1 site`, `2 sites`, `3 microbatches`."""
    several = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count} {noun if count == 1 else several}"
