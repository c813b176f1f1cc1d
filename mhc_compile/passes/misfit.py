"""What does not fit between a model and the arguments of a call; looked for when the call could not be captured.

A capture fails at some line, with the tracer's words for it. The usual reasons are seen faster in what was passed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile.errors import wrong


def misfit(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], error: BaseException) -> str | None:
    """The message of a refusal when the arguments explain `error`; None when they do not.

    Devices and dtypes may differ where forward brings them together, so they count only if the error speaks of them.
    """
    text = str(error)
    found = _unbound(model, args, kwargs) or _odd_tensors(model, args, kwargs)
    if found is None and "device" in text:
        found = _devices(model, args, kwargs)
    if found is None and any(word in text for word in ("dtype", "scalar type", "same type")):
        found = _dtypes(model, args, kwargs)
    return found


def _unbound(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Forward has no such parameters."""
    try:
        signature = inspect.signature(type(model).forward)
    except (TypeError, ValueError):  # a forward that is no Python function
        return None
    try:
        signature.bind(model, *args, **kwargs)
    except TypeError as error:
        known = list(signature.parameters.values())[1:]
        names = [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in known]
        return wrong(
            f"the call of {type(model).__name__}",
            f"with arguments where its forward takes others ({error})",
            f"forward({', '.join(names)})",
            "pass these; example inputs are a tensor, a tuple of positional arguments or a dict of names",
        )
    return None


def _odd_tensors(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Tensors of a kind that no graph is captured for."""
    for name, tensor in tensors(model, args, kwargs):
        kind = _kind(tensor)
        if kind is not None:
            what = f"input {name} of {type(model).__name__}"
            return wrong(what, f"a {kind} tensor", "a dense tensor", f"pass {_MADE_DENSE[kind]}")
    return None


_MADE_DENSE = {"nested": "it padded", "quantised": "x.dequantize()", "sparse": "x.to_dense()"}


def _kind(tensor: Tensor) -> str | None:
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantised"
    return None if tensor.layout is torch.strided else "sparse"


def _devices(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    own = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    for name, tensor in tensors(model, args, kwargs):
        if own and tensor.device not in own:
            return wrong(
                f"input {name} of {type(model).__name__}",
                f"on {tensor.device}",
                f"on {_some(own)}, where the model's parameters are",
                f"move the one or the other: {name}.to({str(next(iter(own)))!r})"
                + (" (a model on meta has no values yet: model.to_empty, then load)" if _on_meta(own) else ""),
            )
    if len(own) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in _one_of_each(model))
        return wrong(f"the model {type(model).__name__}", f"in parts: {places}", "on one device", "model.to(device)")
    return None


def _dtypes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    own = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    for name, tensor in tensors(model, args, kwargs):
        if own and tensor.is_floating_point() and tensor.dtype not in own:
            return wrong(
                f"input {name} of {type(model).__name__}",
                f"{tensor.dtype}",
                f"{_some(own)}, that of the model's parameters",
                "cast the one or the other, or call under torch.autocast",
            )
    return None


def _one_of_each(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The first parameter on each device."""
    first: dict[torch.device, tuple[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(parameter.device, (name, parameter))
    return list(first.values())


def _on_meta(devices: set[torch.device]) -> bool:
    return devices == {torch.device("meta")}


def _some(values: set[Any]) -> str:
    return " or ".join(sorted(map(str, values)))


def tensors(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments of a call, each with the name of its parameter of forward."""
    try:
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
    except (TypeError, ValueError):
        given = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
    for name, value in given.items():
        if value is not model:
            for path, leaf in _torch.leaves_with_path(value):
                if isinstance(leaf, Tensor):
                    yield name + pytree.keystr(path), leaf
