"""How the tests run, not what they test."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Look for garbage seldom, and never among what was imported.

    Tracing makes millions of short-lived objects beside the many that torch and transformers keep: by Python's own
    thresholds an eighth of a test's time went to looking for cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
