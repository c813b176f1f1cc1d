"""Weights and the record of a conversion travel together, in every form that PyTorch users save models in."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_file, save_model
from torch import nn

from graphs import Converted, fresh, randomize
from mhc_compile import ConfigError, MHCConfig, RewriteError, load, mhc_compile, restore
from mhc_compile.conversion import conversion
from mhc_compile.record import KEY, Record, SiteRecord, unique

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

SMALL = "parallel"
HUGGING_FACE = ["llama", "gpt2", "t5", "mixtral"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    yield
    torch._dynamo.reset()


def blank(name: str) -> nn.Module:
    """A plain model whose weights are all wrong."""
    model, _ = fresh(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------ copies


def by_deepcopy(model: nn.Module, _: Path) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module, _: Path) -> nn.Module:
    made: nn.Module = pickle.loads(pickle.dumps(model))
    return made


def by_torch_save(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    made: nn.Module = torch.load(folder / "model.pt", weights_only=False)
    return made


def by_state_dict(model: nn.Module, _: Path) -> nn.Module:
    return load(model.state_dict(), blank(SMALL))


def by_weights_file(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model.state_dict(), folder / "weights.pt")
    return load(folder / "weights.pt", blank(SMALL))


def by_safetensors_file(model: nn.Module, folder: Path) -> nn.Module:
    save_file(weights(model), folder / "weights.safetensors")
    return load(str(folder / "weights.safetensors"), blank(SMALL))


def by_safetensors_model(model: nn.Module, folder: Path) -> nn.Module:
    save_model(model, str(folder / "model.safetensors"))
    made = load(model.state_dict(), blank(SMALL))
    randomize(made, seed=9)
    load_model(made, str(folder / "model.safetensors"))
    return made


def by_strict_state_dict(model: nn.Module, _: Path) -> nn.Module:
    made, inputs = fresh(SMALL)
    mhc_compile(made, 4, backend="eager", example_inputs=inputs).load_state_dict(weights(model), strict=True)
    return made


WAYS = [
    by_deepcopy,
    by_pickle,
    by_torch_save,
    by_state_dict,
    by_weights_file,
    by_safetensors_file,
    by_safetensors_model,
    by_strict_state_dict,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_the_same(way: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    converted = Converted(SMALL)
    made = way(converted.model, tmp_path)
    converted.check(made)
    assert made is not converted.model and type(made) is type(converted.model)
    assert made.state_dict().keys() == converted.model.state_dict().keys()
    randomize(made, seed=11)  # nothing is shared
    converted.check(converted.model)


def test_a_pickled_model_loads_in_another_process(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    wrapped = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).train()
    x = torch.linspace(-1, 1, 48).reshape(2, 3, 8)
    mhc_compile(wrapped, 2, backend="eager", example_inputs=x)
    randomize(wrapped)
    expected = wrapped(x).detach()
    torch.save((wrapped, x, expected, model), tmp_path / "model.pt")
    source = (
        "import torch; torch.set_num_threads(%d); m, x, e, _ = torch.load(r'%s', weights_only=False); "
        "assert torch.equal(m(x).detach(), e), (m(x) - e).abs().max()"
    )  # of as many threads: on some processors their number changes bits
    command = [sys.executable, "-c", source % (torch.get_num_threads(), tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.cases(1)
def test_save_pretrained_and_load(name: str, tmp_path: Path) -> None:
    converted = Converted(name, backend="eager")
    converted.model.save_pretrained(tmp_path)
    assert not hasattr(converted.model.config, "mhc")
    made = load(tmp_path, attn_implementation="eager").eval()
    converted.check(made)
    assert type(made).__name__ == type(converted.model).__name__
    assert not hasattr(made.config, "mhc")
    assert conversion(made).record == conversion(converted.model).record


def test_a_loaded_model_can_be_saved_again(tmp_path: Path) -> None:
    converted = Converted("llama")
    converted.model.save_pretrained(tmp_path / "one")
    load(tmp_path / "one").save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 2
    converted.check(load(tmp_path / "two", attn_implementation="eager").eval())


def test_a_narrow_load_keeps_the_coefficients_in_float32(tmp_path: Path) -> None:
    converted = Converted("llama")
    converted.model.save_pretrained(tmp_path)
    made = load(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    assert made.dtype == torch.bfloat16
    own = dict(made.named_parameters())
    for key, value in converted.model.mhc.named_parameters():
        assert own[f"mhc.{key}"].dtype == torch.float32
        assert torch.equal(own[f"mhc.{key}"], value)
    converted.check(made, tolerance=3e-2)


@pytest.mark.filterwarnings("ignore")  # transformers reports the keys that a plain model has no place for
def test_a_plain_class_is_marked_when_it_drops_mhc_weights(tmp_path: Path) -> None:
    converted = Converted("llama")
    converted.model.save_pretrained(tmp_path)
    plain = type(fresh("llama")[0]).from_pretrained(tmp_path)
    with pytest.raises(RewriteError, match=r"mhc_compile\.load"):
        mhc_compile(plain, 4)
    assert not hasattr(plain, "mhc")
    del plain.config.mhc
    mhc_compile(plain, 4)


# ------------------------------------------------------------------------------------------------ record


def test_the_record_is_in_the_state_and_readable() -> None:
    converted = Converted(SMALL, n=3, iterations=7, eps=1e-4)
    state = converted.model.state_dict()
    assert state[KEY].dtype == torch.uint8
    record = Record.from_tensor(state[KEY])
    assert record == conversion(converted.model).record
    assert (record.config.n, record.config.iterations, record.config.eps) == (3, 7, 1e-4)
    assert {f"mhc.{site.name}.phi" for site in record.sites} <= state.keys()


def test_an_option_that_came_later_is_saved_where_it_is_used() -> None:
    sites = (SiteRecord("a.b", 8, 1, 0, "model.py:3: x = x + y"),)
    for used in (False, True):
        record = Record(MHCConfig(n=2, implicit_gradient=used), sites)
        saved = record.as_dict()
        assert ("implicit_gradient" in saved["config"]) == used
        assert Record.from_dict(saved) == record


def test_the_checkpoint_format_of_version_1() -> None:
    """What files written today hold: a change here needs a new version and a way to read this one."""
    record = Record(
        MHCConfig(n=2),
        (SiteRecord("a.b", 8, 1, 0, "model.py:3: x = x + y"),),
        frozenset({"c"}),
        frozenset({("d", "model.py:9: x = x + z")}),
    )
    assert json.loads(bytes(record.to_tensor().tolist())) == {
        "version": 1,
        "config": {
            "n": 2,
            "init": "identity",
            "iterations": 20,
            "eps": 1e-6,
            "tie_shared": False,
            "backend": "inductor",
        },
        "sites": [
            {
                "name": "a.b",
                "features": 8,
                "stream": 1,
                "trunk": 0,
                "line": "model.py:3: x = x + y",
                "double": False,
                "applications": 1,
            }
        ],
        "plain": ["c"],
        "no_grad": [["d", "model.py:9: x = x + z"]],
    }
    assert Record.from_dict(record.as_dict()) == record


@pytest.mark.parametrize("damage", ["version", "newer", "sites", "config", "bytes", "shape", "type"])
def test_a_damaged_record_is_refused(damage: str) -> None:
    record = Record(MHCConfig(n=2), (SiteRecord("a", 8, 0, 0, ""),))
    table: Any = record.as_dict()
    if damage == "version":
        del table["version"]
    elif damage == "newer":
        table["version"] = 2
    elif damage == "sites":
        table["sites"][0]["unknown"] = 1
    elif damage == "config":
        table["config"]["n"] = 0
    data: Any = torch.tensor(list(json.dumps(table).encode()), dtype=torch.uint8)
    data = {"bytes": data[:-4], "shape": data[None], "type": table}.get(damage, data)
    with pytest.raises(ConfigError, match=r"record|mhc\._extra_state"):
        Record.from_tensor(data)


def test_casts_of_a_whole_state_do_not_harm_the_record() -> None:
    converted = Converted(SMALL)
    state = {key: value.to(torch.bfloat16) for key, value in converted.model.state_dict().items()}
    assert Record.from_tensor(state[KEY]) == conversion(converted.model).record


def test_tied_sites_are_counted() -> None:
    two = [SiteRecord("a", 8, 0, 0, "l"), SiteRecord("a", 8, 1, 0, "l")]
    assert [site.applications for site in unique(two)] == [2]
    with pytest.raises(ConfigError, match="8 and 9"):
        unique([two[0], SiteRecord("a", 9, 0, 0, "l")])


# ---------------------------------------------------------------------------------------------- refusals

OTHER = [dict(n=2), dict(iterations=3), dict(eps=1e-3), dict(skip=lambda site: site.stream == 0)]


@pytest.mark.parametrize("options", OTHER)
def test_weights_of_another_conversion_are_refused(options: dict[str, Any]) -> None:
    converted = Converted(SMALL)
    other, inputs = fresh(SMALL)
    mhc_compile(other, **{"n": 4, "backend": "eager", "example_inputs": inputs, **options})
    randomize(other, seed=8)
    before = weights(converted.model)
    for strict in (True, False):
        with pytest.raises(ConfigError, match="another conversion"):
            converted.model.load_state_dict(other.state_dict(), strict=strict)
    with pytest.raises(ConfigError, match="another conversion"):
        load(other.state_dict(), converted.model)
    assert all(torch.equal(value, before[key]) for key, value in converted.model.state_dict().items())
    converted.check(converted.model)


def test_the_state_of_a_plain_model_is_refused_unless_asked_for() -> None:
    converted = Converted(SMALL)
    plain = fresh(SMALL)[0].state_dict()
    with pytest.raises(ConfigError, match="strict=False"):
        converted.model.load_state_dict(plain)
    with pytest.raises(ConfigError, match=KEY):
        load(plain, fresh(SMALL)[0])
    result = converted.model.load_state_dict(plain, strict=False)
    assert all(key.startswith("mhc.") for key in result.missing_keys)
    converted.check(converted.model)


def test_a_state_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    converted = Converted(SMALL)
    model, _inputs = fresh(SMALL)
    kind, before = type(model), weights(model)
    for damage in ("missing", "extra", "shape"):
        state: dict[str, Any] = weights(converted.model)
        key = next(key for key in state if key.endswith(".phi"))
        if damage == "missing":
            del state[key]
        elif damage == "extra":
            state["nothing"] = torch.zeros(1)
        else:
            state[key] = state[key][1:]
        with pytest.raises(ConfigError, match=f"{key}|nothing"):
            load(state, model)
        assert type(model) is kind and not hasattr(model, "mhc")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_load_does_not_take(tmp_path: Path) -> None:
    converted = Converted(SMALL)
    state = converted.model.state_dict()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: load(state), "no model"),
        (lambda: load(tmp_path / "none.pt", fresh(SMALL)[0]), "does not exist"),
        (lambda: load({"model": state, "step": 3}, fresh(SMALL)[0]), "pass its entry 'model'"),
        (lambda: load(3, fresh(SMALL)[0]), "a int"),  # type: ignore[arg-type]
        (lambda: load(state, state), "torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: load(state, fresh(SMALL)[0], dtype=torch.float16), "dtype"),
        (lambda: load(tmp_path, fresh(SMALL)[0]), "with a model"),
    ]
    for call, match in cases:
        with pytest.raises(ConfigError, match=match):
            call()


def test_a_directory_of_a_plain_model_is_refused(tmp_path: Path) -> None:
    fresh("gpt2")[0].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="plain model"):
        load(tmp_path)


def test_a_directory_that_lost_mhc_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    converted = Converted("llama")
    converted.model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if not key.endswith("phi")}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="phi"):
        load(tmp_path)


def test_a_record_of_another_model_is_seen_at_the_first_call() -> None:
    """Loading traces nothing; the first call finds that the forward has other sites."""
    model, inputs = fresh("llama")
    mhc_compile(model, 4, backend="eager")
    state = model.state_dict()
    record = conversion(model).record
    sites = record.sites[1:]
    state[KEY] = Record(record.config, sites).to_tensor()
    for key in [key for key in state if key.startswith(f"mhc.{record.sites[0].name}.")]:
        del state[key]
    made = load(state, fresh("llama")[0])
    with pytest.raises(RewriteError, match=record.sites[0].name):
        made(**inputs)


def test_restore_refuses_a_class_that_changed_since() -> None:
    converted = Converted(SMALL)
    kind = type(converted.model)
    converted.model.__class__ = type("Wrapped", (kind,), {})
    with pytest.raises(RewriteError, match="changed after its conversion"):
        restore(converted.model)
    converted.check(converted.model)
    converted.model.__class__ = kind
    restore(converted.model)
    assert not hasattr(converted.model, "mhc")


# --------------------------------------------------------------------------------- partial conversions


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(only="model.layers.1"), {"model.layers.1.self_attn", "model.layers.1.mlp"}),
        (dict(only="*.mlp"), {f"model.layers.{layer}.mlp" for layer in range(3)}),
        (dict(only=["*.mlp", "*.0.self_attn"], skip="model.layers.2"), None),
        (dict(skip=["*self_attn"]), {f"model.layers.{layer}.mlp" for layer in range(3)}),
        (dict(skip=lambda site: site.name.endswith("2.mlp")), None),
    ],
)
@pytest.mark.cases(1)
def test_partial_conversion(options: dict[str, Any], expected: set[str] | None, tmp_path: Path) -> None:
    model, inputs = fresh("llama")
    plain = model(**inputs).logits
    mhc_compile(model, 4, backend="eager", **options)
    torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-5, atol=1e-6)
    sites = {site.name for site in conversion(model).record.sites}
    assert sites == (expected or sites) and 0 < len(sites) < 6
    randomize(model)
    logits = model(**inputs).logits
    assert not torch.allclose(logits, plain, atol=1e-3)
    model.save_pretrained(tmp_path)
    made = load(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(made(**inputs).logits, logits)
    assert {site.name for site in conversion(made).record.sites} == sites
