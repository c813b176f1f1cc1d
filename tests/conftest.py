"""How the tests run, not what they test."""

from __future__ import annotations

import gc
from zlib import crc32

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--sample 5` runs one test in five, the same ones on every machine: what other versions are tried with."""
    parser.addoption("--sample", type=int, default=1, metavar="K", help="run one test in K")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in the sample, by the test's name."""
    every = config.getoption("--sample")
    chosen = [item for item in items if crc32(item.nodeid.encode()) % every == 0]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


def pytest_collection_finish() -> None:
    """Look for garbage seldom, and never among what was imported.

    Tracing makes millions of short-lived objects beside the many that torch and transformers keep: by Python's own
    thresholds an eighth of a test's time went to looking for cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
