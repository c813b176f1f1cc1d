"""Weights of another form are refused by every door that loads, with the option and both values, before any is copied.

Forms share names and shapes: an orthogonal site has the parameters of a spectral one, a single pass those of any. What
tells them apart is the record, and one list of what counts in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from forms import FORMS, OTHER
from graphs import fresh, randomize
from mhc_compile import (
    Backend,
    ConfigError,
    MHCConfig,
    load,
    mhc_compile,
    partition,
    source,
    stage_modules,
    trace,
)
from mhc_compile.codegen.source_check import module_of
from mhc_compile.config import FUNCTION, NO_FUNCTION
from mhc_compile.conversion import conversion
from mhc_compile.record import KEY, SITE_FUNCTION, SITE_NO_FUNCTION, Record, SiteRecord

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
]

FORM = FORMS["orthogonal"]
OWN = FORM.config


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ what counts


def test_every_option_is_told_to_count_or_not() -> None:
    """A new option of a conversion, or of a site, has to be put in one of the two lists."""
    assert sorted((*FUNCTION, *NO_FUNCTION)) == sorted(one.name for one in fields(MHCConfig))
    assert sorted(("name", *SITE_FUNCTION, *SITE_NO_FUNCTION)) == sorted(one.name for one in fields(SiteRecord))
    assert OTHER.keys() == set(FUNCTION)


def changed_site(**values: Any) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        first, *rest = record.sites
        return replace(record, sites=(replace(first, **values), *rest))

    return change


def changed_option(name: str) -> Callable[[Record], Record]:
    return lambda record: replace(record, config=replace(record.config, **{name: OTHER[name]}))


SITE = "blocks.0.mixer"
# What is changed in the record of a state, and the words that say so.
CHANGES: dict[str, tuple[Callable[[Record], Record], str]] = {
    **{name: (changed_option(name), f"{name} is {OTHER[name]!r}, here {getattr(OWN, name)!r}") for name in FUNCTION},
    "features": (changed_site(features=9), f"features of site '{SITE}' is 9, here 4"),
    "site constraint": (
        changed_site(constraint="spectral"),
        f"constraint of site '{SITE}' is 'spectral', here the conversion's",
    ),
    "applications": (changed_site(applications=2), f"applications of site '{SITE}' is 2, here 1"),
    "a site less": (lambda record: replace(record, sites=record.sites[1:]), f"it has no site {SITE}"),
    "another site": (changed_site(name="blocks.0.other"), "it has also the site blocks.0.other"),
}


@cache
def model() -> nn.Module:
    return FORM.convert()


def state_with(change: Callable[[Record], Record]) -> dict[str, Any]:
    """Weights that fit by name and shape, all zero, with the record of another conversion."""
    record = change(conversion(model()).record)
    zeros = {key: torch.zeros_like(value) for key, value in model().state_dict().items()}
    return {**zeros, KEY: record.to_tensor()}


# ------------------------------------------------------------------------------------------------------ doors
# Each gives the module whose weights must stay, and what loads a state into it.

Door = tuple[nn.Module, Callable[[dict[str, Any]], Any]]


def strict(folder: Path) -> Door:
    return model(), model().load_state_dict


def not_strict(folder: Path) -> Door:
    return model(), lambda state: model().load_state_dict(state, strict=False)


def assigned(folder: Path) -> Door:
    return model(), lambda state: model().load_state_dict(state, assign=True)


def the_tree_alone(folder: Path) -> Door:
    tree = model().get_submodule("mhc")
    return tree, lambda state: tree.load_state_dict(
        {key.removeprefix("mhc."): value for key, value in state.items() if key.startswith("mhc.")}
    )


def inside_another(folder: Path) -> Door:
    outer = nn.ModuleDict({"inner": model()})
    return outer, lambda state: outer.load_state_dict({f"inner.{key}": value for key, value in state.items()})


def by_load(folder: Path) -> Door:
    return model(), lambda state: load(state, model())


def by_load_of_a_file(folder: Path) -> Door:
    def run(state: dict[str, Any]) -> None:
        save_file(state, folder / "weights.safetensors")
        load(folder / "weights.safetensors", model())

    return model(), run


def by_a_distributed_checkpoint(folder: Path) -> Door:
    def run(state: dict[str, Any]) -> None:
        saved = folder / str(len(list(folder.iterdir())))
        dcp.save({"model": state}, checkpoint_id=saved)
        read = {"model": {key: torch.empty_like(value) for key, value in state.items()}}
        dcp.load(read, checkpoint_id=saved)
        model().load_state_dict(read["model"])

    return model(), run


@cache
def written() -> nn.Module:
    made = source(model(), FORM.inputs())
    loaded: nn.Module = module_of(made.code, made.constants, made.name)()
    loaded.load_state_dict(model().state_dict())
    return loaded


def by_a_written_file(folder: Path) -> Door:
    return written(), written().load_state_dict


def by_a_written_file_not_strict(folder: Path) -> Door:
    return written(), lambda state: written().load_state_dict(state, strict=False)


@cache
def traced() -> nn.Module:
    return trace(model(), FORM.inputs())


def by_a_traced_module(folder: Path) -> Door:
    def run(state: dict[str, Any]) -> None:
        named = {key.replace(".", "/"): value for key, value in state.items() if key != KEY}
        traced().load_state_dict({**named, "_extra_state": state[KEY]})

    return traced(), run


@cache
def stages() -> nn.ModuleList:
    x = FORM.inputs()
    return nn.ModuleList(stage_modules(partition(model(), x, stages=2, microbatches=2), model(), x))


def by_the_stages(folder: Path) -> Door:
    def run(state: dict[str, Any]) -> None:
        for stage in stages():
            stage.load_state_dict({key: state[key] for key in stage.state_dict()})

    return stages(), run


@cache
def compiled() -> tuple[nn.Module, Backend]:
    plain, backend = FORM.plain(), Backend(4, constraint=OWN.constraint, backend="eager")
    torch.compile(plain, backend=backend)(FORM.inputs())
    return plain, backend


def by_a_backend(folder: Path) -> Door:
    _, backend = compiled()
    return nn.ParameterList(backend.parameters()), backend.load_state_dict


DOORS = [
    strict,
    not_strict,
    assigned,
    the_tree_alone,
    inside_another,
    by_load,
    by_load_of_a_file,
    by_a_distributed_checkpoint,
    by_a_written_file,
    by_a_written_file_not_strict,
    by_a_traced_module,
    by_the_stages,
    by_a_backend,
]


@pytest.mark.parametrize("door", DOORS)
def test_weights_of_another_form_are_refused(door: Callable[[Path], Door], tmp_path: Path) -> None:
    held, run = door(tmp_path)
    before = [value.detach().clone() for value in held.parameters()]
    for name, (change, words) in CHANGES.items():
        with pytest.raises(ConfigError) as caught:
            run(state_with(change))
        assert "the checkpoint is of another conversion: " in str(caught.value) and words in str(caught.value), name
        assert all(torch.equal(a, b) for a, b in zip(before, held.parameters(), strict=True)), name
    run(state_with(lambda record: record))
    assert not any(value.any() for value in held.parameters()), "the same form is not refused"
    with torch.no_grad():
        for value, kept in zip(held.parameters(), before, strict=True):
            value.copy_(kept)


def test_options_that_do_not_count_are_no_reason_to_refuse() -> None:
    record = conversion(model()).record
    other = replace(record.config, init="paper", backend="inductor")
    moved = tuple(replace(one, stream=one.stream + 1, trunk=7, line="elsewhere", double=False) for one in record.sites)
    assert not record.function.differences(replace(record, config=other, sites=moved).function)


def test_one_stream_and_many() -> None:
    """The state of a plain add has no record, and no weights of sites; that of many goes into none."""
    plain = FORMS["n = 1"].convert()
    made = source(plain, FORM.inputs())
    for one in (plain, module_of(made.code, made.constants, made.name)()):
        with pytest.raises(ConfigError, match="n is 4, here 1"):
            one.load_state_dict(FORMS["sinkhorn"].convert().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        written().load_state_dict(plain.state_dict())
    with pytest.raises(ConfigError, match="without mHC weights"):
        model().load_state_dict(plain.state_dict())


@pytest.mark.parametrize("pair", [("orthogonal", "spectral"), ("single pass", "sinkhorn")], ids=" and ".join)
def test_the_written_file_of_one_form_and_the_weights_of_another(pair: tuple[str, str]) -> None:
    """Whole conversions, not records alone: both directions."""
    converted = [FORMS[name].convert() for name in pair]
    for own, other in (converted, converted[::-1]):
        made = source(own, FORM.inputs())
        again = module_of(made.code, made.constants, made.name)()
        with pytest.raises(ConfigError, match=r"(constraint|single_pass) is '?\w+'?, here '?\w+'?"):
            again.load_state_dict(other.state_dict())
        again.load_state_dict(own.state_dict())
        assert torch.equal(again(FORM.inputs()), trace(own, FORM.inputs())(FORM.inputs()))


# -------------------------------------------------------------------------------------------- saved directories


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_directory_whose_config_is_not_that_of_its_weights(tmp_path: Path) -> None:
    """config.json says how to convert, and the weights what they are of."""
    saved, inputs = fresh("gpt2")
    mhc_compile(saved, 4, constraint="spectral", backend="eager", example_inputs=inputs)
    randomize(saved)
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = saved(**inputs).logits
    assert torch.equal(load(tmp_path, attn_implementation="eager").eval()(**inputs).logits, expected)
    written = json.loads((tmp_path / "config.json").read_text())
    written["mhc"]["config"]["constraint"] = "orthogonal"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ConfigError, match="constraint is 'spectral', here 'orthogonal'"):
        load(tmp_path)
