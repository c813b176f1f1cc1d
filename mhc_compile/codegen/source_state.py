"""What a written module holds: the model's parameters and buffers by name, and constants that are in no state_dict."""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.codegen.spelling import Expression, joined, literal, named

_SMALL = 64  # elements of a constant that is written as numbers
EXTRA = "_extra_state"


@dataclass(frozen=True)
class Held:
    """The tensors of a written module.

    saved: name -> parameter or buffer, in the order of the state_dict; tied: name -> the earlier name of the same
    tensor; constants: name -> tensor outside of the state_dict; extra: names of modules that save a state of their own.
    """

    saved: Mapping[str, Tensor]
    tied: Mapping[str, str]
    constants: Mapping[str, Tensor]
    extra: tuple[str, ...]

    def large(self) -> dict[str, Tensor]:
        """The constants that are kept in a file beside the source."""
        return {name: value for name, value in self.constants.items() if as_code(value) is None}


def held(model: nn.Module, read: Mapping[str, Tensor]) -> Held:
    """What the module of a model's graph holds; read: name -> every tensor that the graph reads."""
    saved: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    extra = []
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] == EXTRA:
            extra.append(name.rpartition(".")[0])
        elif id(value) in first:
            tied[name] = first[id(value)]
        else:
            first[id(value)] = name
            saved[name] = value
    known = {*saved, *tied}
    constants = {name: value for name, value in read.items() if name not in known}
    return Held(saved, tied, constants, tuple(extra))


def reference(name: str) -> str:
    """The Python that reads a tensor: `self.transformer.h[0].attn.bias`."""
    *steps, last = name.split(".")
    text = "self" + "".join(f".{step}" if _plain(step) else f"[{_index(step)}]" for step in steps)
    return f"{text}.{last}" if last.isidentifier() else f'getattr({text}, "{last}")'


def _plain(step: str) -> bool:
    return step.isidentifier() and not keyword.iskeyword(step)


def _index(step: str) -> str:
    return step if step.isdecimal() and str(int(step)) == step else literal(step).text


# ---------------------------------------------------------------------------------------------- constants


def as_code(value: Tensor) -> Expression | None:
    """Python that makes exactly this constant; None when only a file can hold it."""
    plain = value.detach().cpu()
    if plain.layout is not torch.strided or plain.is_quantized or plain.is_conj() or plain.is_neg():
        return None
    return next((made for made in _candidates(plain) if made is not None), None)


def _candidates(value: Tensor) -> Iterator[Expression | None]:
    shape, dtype = list(value.shape), value.dtype
    tail = named("dtype", literal(dtype))
    if value.numel() > 1:
        fill = value.flatten()[0].item()
        if isinstance(fill, bool | int | float):
            parts = [_list(shape), literal(fill), tail]
            yield _if_same(value, torch.full(shape, fill, dtype=dtype), parts, "torch.full(")
        yield _arange(value)
    if value.numel() <= _SMALL:
        parts = [_list(value.tolist()), tail]
        yield _if_same(value, torch.tensor(value.tolist(), dtype=dtype).reshape(shape), parts, "torch.tensor(")
    yield None


def _arange(value: Tensor) -> Expression | None:
    """Position ids, by default [1, length]."""
    long = [size for size in value.shape if size != 1]
    if len(long) != 1 or value.dtype not in (torch.int64, torch.int32, torch.float32):
        return None
    made = torch.arange(long[0], dtype=value.dtype).reshape(value.shape)
    parts = [literal(long[0]), named("dtype", literal(value.dtype))]
    found = _if_same(value, made, parts, "torch.arange(")
    if found is None or value.dim() == 1:
        return found
    return Expression(f"{found.text}.reshape({', '.join(map(str, value.shape))})")


def _if_same(value: Tensor, made: Tensor, parts: list[Expression], head: str) -> Expression | None:
    """The call, when what it makes has the very bits of the constant."""
    if value.shape != made.shape or value.dtype != made.dtype:
        return None
    return joined(parts, head, ")") if torch.equal(_bits(value), _bits(made)) else None


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _list(values: Any) -> Expression:
    if isinstance(values, list | tuple):
        return joined([_list(one) for one in values], "[", "]")
    return literal(values)
