"""Load the weights of a converted model, and convert as they say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhc_compile import hugging_face
from mhc_compile.conversion import PENDING, attach, conversion, detach, is_converted, refuse_prefix
from mhc_compile.errors import ConfigError, RewriteError, wrong
from mhc_compile.record import KEY, Record

_LEGAL = "a directory that save_pretrained wrote, a file of a state_dict (.safetensors, .pt), or a state_dict"


def load(checkpoint: str | Path | Mapping[str, Any], model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A converted model with the weights of a checkpoint, converted as the checkpoint's record says.

    ::

        model = load("saved/")                         # written by save_pretrained of a converted model
        model = load("weights.safetensors", MyModel())   # a saved state_dict of a converted model
        model = load(torch.load("run.pt")["model"], MyModel())

    checkpoint: a directory of `save_pretrained`, the file of a state_dict (safetensors, or what `torch.save` wrote),
        or a state_dict.
    model: the plain model, converted in place (nothing is traced before its first call), or one that is converted in
        the same way already. Needed for everything but a directory.
    options: of `from_pretrained`, for a directory.

    Raises ConfigError when the checkpoint holds no mHC weights, does not fit the model, or belongs to another
    conversion. The model is then as it was.
    """
    directory = isinstance(checkpoint, str | Path) and Path(checkpoint).is_dir()
    if model is None or directory:
        if not directory or model is not None:
            legal = f"{_LEGAL}, with a model for all but a directory"
            found = f"{_named(checkpoint)} with {'no model' if model is None else 'a model'}"
            step = "build the plain model and pass it" if model is None else "leave the model out"
            raise ConfigError(wrong("checkpoint", found, legal, step))
        return hugging_face.load_directory(Path(str(checkpoint)), attach, **options)
    if options:
        found = f"given the option {next(iter(options))!r} beside a model"
        step = "for another backend pass a model that mhc_compile converted with it"
        raise ConfigError(wrong("load", found, "options of from_pretrained, beside a directory", step))
    return _load_into(model, _read(checkpoint))


def _read(checkpoint: object) -> dict[str, Any]:
    """The state_dict in a file, or the one given."""
    state: Any = _read_file(Path(checkpoint)) if isinstance(checkpoint, str | Path) else checkpoint
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ConfigError(wrong("checkpoint", _named(state), _LEGAL, "save model.state_dict()"))
    if KEY not in state:
        refuse_prefix(state)
        inner = [key for key, value in state.items() if isinstance(value, Mapping) and KEY in value]
        found = f"with keys {', '.join(list(state)[:3])}, ... and without {KEY}"
        step = (
            f"pass its entry {inner[0]!r}" if inner else "load weights of a plain model before the call of mhc_compile"
        )
        raise ConfigError(wrong("checkpoint", found, "the state_dict of a converted model", step))
    return dict(state)


def _read_file(path: Path) -> Any:
    """What a file of weights holds. Raises ConfigError when it holds something else, or is damaged."""
    if not path.is_file():
        raise ConfigError(wrong("checkpoint", f"{path}, which does not exist", _LEGAL, "correct the path"))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        step = "save model.state_dict() again; a whole pickled model is read by torch.load(path, weights_only=False)"
        found = f"{path}, which cannot be read as weights ({type(error).__name__}: {reason[:120]})"
        raise ConfigError(wrong("checkpoint", found, _LEGAL, step)) from error


def _load_into(model: nn.Module, state: dict[str, Any]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(wrong("model", f"a {type(model).__name__}", "a torch.nn.Module", "build the plain model"))
    if PENDING in model.__dict__:
        raise RewriteError(
            f"{type(model).__name__} waits for its first call to be converted; call restore(model) first: load "
            "converts as the checkpoint says"
        )
    record = Record.from_tensor(state[KEY])
    converted_here = not is_converted(model)
    if converted_here:
        attach(model, record)
    else:
        conversion(model).record.function.check(record.function)
    try:
        _check_fits(model, state)
    except ConfigError:
        if converted_here:
            detach(model)
        raise
    model.load_state_dict(state)
    return model


def _check_fits(model: nn.Module, state: dict[str, Any]) -> None:
    """The same keys and shapes, before anything is copied."""
    own = {key: value for key, value in model.state_dict().items() if key != KEY}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys() - {KEY})
    sizes = [
        f"{key} is {_shape(state[key])} and not {list(value.shape)}"
        for key, value in own.items()
        if key in state and isinstance(value, torch.Tensor) and _shape(state[key]) != list(value.shape)
    ]
    found = [
        *([f"there is no {', '.join(missing[:3])}"] if missing else []),
        *([f"there is also {', '.join(extra[:3])}"] if extra else []),
        *sizes[:2],
    ]
    if found:
        legal = f"the state of a converted {type(model).__name__} of this size"
        step = "build the model with the sizes of the checkpoint, and save its whole state_dict"
        raise ConfigError(wrong("checkpoint", "one in which " + "; ".join(found), legal, step))


def _shape(value: object) -> list[int] | str:
    return list(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _named(value: object) -> str:
    return repr(str(value)) if isinstance(value, str | Path) else f"a {type(value).__name__}"
