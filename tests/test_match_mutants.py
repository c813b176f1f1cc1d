"""Mutants of correct blocks: none is fused to a function that is not its own.

The matcher replays each rewrite on random numbers and would take a wrong one back; here that is switched off, so that
it is the rules that are tested. `benchmarks/mutants.py` runs more of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

import foreign_blocks as blocks
from graphs import capture
from mhc_compile.passes import match as matcher
from mhc_compile.passes.canonicalize import canonicalize
from mhc_compile.passes.emit import copy_graph
from mutants import Judge, mutants

# Spellings that differ in each part: start, steps and eps of the chain, projection and norm, merge and layout.
NAMES = ["spec", "deepseek", "log_domain", "three_projections", "flat", "folded", "identity", "head"]
EACH = 25


@pytest.fixture(autouse=True)
def _visible_eps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An eps that a float64 comparison cannot miss, and few iterations."""
    torch._dynamo.reset()
    monkeypatch.setattr(blocks, "EPS", 0.03)
    monkeypatch.setattr(blocks, "ITERATIONS", 3)
    monkeypatch.setattr(matcher, "difference", lambda *arguments: None)
    yield
    torch._dynamo.reset()


def wrong_mutants(name: str, count: int, seed: int = 0) -> tuple[list[str], Counter[str]]:
    """What was done to the mutants that matching changed, and how many were matched whole, in part or not at all."""
    torch.manual_seed(0)
    model = blocks.BLOCKS[name].build().double()
    original = capture(model, (torch.randn(blocks.BATCH, blocks.TOKENS, blocks.C, dtype=torch.float64),))
    judge = Judge(original.arguments)
    whole = copy_graph(original.graph)
    canonicalize(whole)
    most = sum(matcher.match(whole).ops.values())
    wrong, tally = [], Counter[str]()
    for mutant in islice(mutants(original.graph, judge, seed), count):
        canonicalize(mutant.graph)
        found = sum(matcher.match(mutant.graph).ops.values())
        tally["whole" if found == most else "in part" if found else "not at all"] += 1
        if judge.differ(judge.results(mutant.graph), mutant.results):
            wrong.append(f"{name}: {mutant.done}")
    return wrong, tally


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cases(3)
def test_no_mutant_becomes_another_function(name: str) -> None:
    wrong, tally = wrong_mutants(name, EACH)
    assert wrong == []
    assert tally["in part"] + tally["not at all"] > EACH // 4, "the mutants are too tame to tell"
