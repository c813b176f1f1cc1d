"""What is wrapped around a model works, or is refused in words, as `docs/wrapping.md` says row by row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wrappings import TABLE, Wrapping

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    # PEFT reads every attribute of a model, also those that transformers deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # torch's support of CSR tensors is in beta, and tells of it when one is made
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
    # Dynamo makes an instance of a function to trace its forward
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

PAGE = Path(__file__).parents[1] / "docs" / "wrapping.md"


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def rows() -> dict[str, tuple[str, str]]:
    """name -> group and what happens: the tables of the page."""
    found: dict[str, tuple[str, str]] = {}
    group = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            group = line[3:]
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        named = re.fullmatch(r"<a id=\"(\w+)\"></a>(.+)", cells[0])
        if named:
            assert len(cells) == 2, line
            found[named[1]] = (group, cells[1])
    return found


ROWS = rows()


def test_the_page_has_a_row_for_each_wrapping() -> None:
    assert [(name, group) for name, (group, _) in ROWS.items()] == [(one.name, one.group) for one in TABLE]


CASES = [pytest.param(one, id=one.name, marks=[pytest.mark.slow] if one.slow else []) for one in TABLE]


@pytest.mark.parametrize("wrapping", CASES)
def test_what_is_wrapped_does_what_the_page_says(wrapping: Wrapping, tmp_path: Path) -> None:
    error, (_, says) = wrapping.run(tmp_path), ROWS[wrapping.name]
    if error is None:
        assert says.startswith(("works", "warns"))
        return
    kind, quoted = re.match(r"`(\w+)`: ([^.]+)\.", says).groups()  # type: ignore[union-attr]
    assert kind == type(error).__name__
    place, flat = 0, " ".join(str(error).split())
    for piece in quoted.split("…"):
        assert piece.strip() in flat[place:], f"the page says {piece.strip()!r}, the message: {flat}"
        place = flat.index(piece.strip(), place) + len(piece.strip())
