"""Example inputs of a model: given by the user, or derived from a Hugging Face config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mhc_compile.errors import ConfigError, wrong

_BATCH, _LENGTH = 2, 8
_LEGAL = "a tensor, a tuple of positional arguments or a dict of keyword arguments"


def as_call(example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that `example_inputs` stands for.

    Raises ConfigError for anything but a tensor, a tuple or list, or a mapping of names.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    step = "put the arguments of forward into a tuple, or into a dict of their names"
    raise ConfigError(wrong("example_inputs", f"a {type(example_inputs).__name__}", _LEGAL, step))


def derivable(model: nn.Module) -> bool:
    """`derive` knows inputs for this model."""
    return getattr(model, "main_input_name", None) in _MAKERS and getattr(model, "config", None) is not None


def derive(model: nn.Module, *, cached: bool = True) -> dict[str, Any]:
    """Small inputs for a Hugging Face model, from its `main_input_name` and config.

    cached: False asks a model that would return a key-value cache to go without, as torch.export gives out no cache.
    Raises ConfigError for other modules, and for main inputs this does not know.
    """
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if not isinstance(name, str) or config is None:
        raise ConfigError(
            wrong(
                "example_inputs",
                "not given",
                _LEGAL,
                f"pass what {type(model).__name__}.forward takes, as example_inputs=...; "
                "they are derived for Hugging Face models only",
            )
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if name not in _MAKERS:
        raise ConfigError(wrong("the model's main input", repr(name), ", ".join(_MAKERS), "pass example_inputs=..."))
    inputs: dict[str, Any] = {name: _MAKERS[name](config).to(device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(config)[:, :5].to(device)
    if not cached and "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def _ids(config: Any) -> torch.Tensor:
    text = getattr(config, "text_config", None) or config
    high = int(text.vocab_size)
    return torch.arange(_BATCH * _LENGTH).reshape(_BATCH, _LENGTH) % max(high - 3, 1) + min(3, high - 1)


def _pixels(config: Any) -> torch.Tensor:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(vision, "num_channels", 3)
    frames = getattr(vision, "num_frames", None)  # of a video model
    shape = (_BATCH, *([] if frames is None else [frames]), channels, height, width)
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


def _features(config: Any) -> torch.Tensor:
    length = 2 * getattr(config, "max_source_positions", 50)
    mels = getattr(config, "num_mel_bins", 80)
    return torch.linspace(-1, 1, _BATCH * mels * length).reshape(_BATCH, mels, length)


def _waveform(config: Any) -> torch.Tensor:
    return torch.sin(torch.arange(_BATCH * 16000) * 0.05).reshape(_BATCH, 16000)


_MAKERS = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _waveform,
}
