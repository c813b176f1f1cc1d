"""Forms times doors: each product is what level 1 gives in eager, or is refused in the words that the table has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import doors
import forms
from doors import DOORS, REFUSALS, Case, outcome, refusal, sample
from forms import FORMS
from graphs import FAR
from mhc_compile.constraints import CONSTRAINTS

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ nothing is left out


def test_every_constraint_option_and_door_is_in_a_table() -> None:
    assert not forms.gaps()
    assert not doors.uncovered()


def test_what_is_in_no_table_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONSTRAINTS, "new", replace(CONSTRAINTS["lite"], name="new"))
    assert forms.gaps() == ["constraint='new'"]
    monkeypatch.delitem(CONSTRAINTS, "new")
    for form, words in (("eps", "another eps than the default"), ("paper", "init='paper'")):
        with monkeypatch.context() as without:
            without.delitem(FORMS, form)
            assert forms.gaps() == [words]
    monkeypatch.delitem(DOORS, "onnx")
    assert doors.uncovered() == ["export_onnx"]


def test_every_refusal_is_of_some_product_and_names_its_limit() -> None:
    for one in REFUSALS:
        met = [(name, door) for name, form in FORMS.items() for door in DOORS if refusal(form, door) == one.words]
        assert met and one.why, one.words


def test_the_sample_has_every_form_and_every_door() -> None:
    chosen = sample()
    assert {form for form, _ in chosen} == FORMS.keys() and {door for _, door in chosen} == DOORS.keys()
    assert len(chosen) == len(set(chosen))


def test_the_forms_are_far_from_the_plain_model_and_from_each_other() -> None:
    """A door that ran the plain model, or another form, could not pass for the right one."""
    seen = {}
    for name in ("sinkhorn", "lite", "orthogonal", "unconstrained", "single pass", "n = 3"):
        case = Case(FORMS[name])
        (seen[name],) = case.expected.outputs
        assert (seen[name] - case.plain).abs().max() > FAR
    for left in seen:
        assert all((seen[left] - seen[right]).abs().max() > FAR for right in seen if right != left)


# ---------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize(("form", "door"), sample())
@pytest.mark.cases(24)
def test_a_form_through_a_door(form: str, door: str) -> None:
    found = outcome(FORMS[form], door)
    assert found.status != "wrong", found


@pytest.mark.sweep
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_through_every_door(form: str, door: str) -> None:
    if doors.fitting(FORMS[form], door):
        found = outcome(FORMS[form], door)
        assert found.status != "wrong", found
