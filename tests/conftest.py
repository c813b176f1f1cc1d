"""How the tests run, not what they test."""

from __future__ import annotations

import gc
from zlib import crc32

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--sample 6` runs one test in six, the same ones on every machine: what other versions are tried with."""
    parser.addoption("--sample", type=int, default=1, metavar="K", help="run one test in K")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark cases beyond those of `cases` as a sweep, and leave out what is not in the sample; by the test's name."""
    of_each: dict[object, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("cases"):
            of_each.setdefault(getattr(item, "function", None), []).append(item)
    for same in of_each.values():
        count = next(mark.args[0] for mark in same[0].iter_markers("cases"))
        for item in sorted(same, key=_number)[count:]:
            item.add_marker("sweep")
    every = config.getoption("--sample")
    chosen = [item for item in items if _number(item) % every == 0]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


def _number(item: pytest.Item) -> int:
    """The same on every machine."""
    return crc32(item.nodeid.encode())


def pytest_collection_finish() -> None:
    """Look for garbage seldom, and never among what was imported.

    Tracing makes millions of short-lived objects beside the many that torch and transformers keep: by Python's own
    thresholds an eighth of a test's time went to looking for cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
