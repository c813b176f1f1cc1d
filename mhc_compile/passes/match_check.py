"""Run the nodes of a match and the nodes that replace them on random numbers, and compare values and gradients.

Both run in float64, whatever dtype the graph names, so that a difference is one of functions and not of rounding; and
on small sizes, where the graph's literals allow it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile.passes.dataflow import value_inputs
from mhc_compile.passes.forms import extent
from mhc_compile.passes.op_kinds import aten, packet, tensor_of
from mhc_compile.passes.read_forms import literal

TOLERANCE = 1e-8  # of the largest value
# Elements of an input: up to the one the sizes stay as they are, up to the other a check at full size is affordable.
_SMALL, _LARGEST = 2**12, 2**22

# Where an op has sizes among its arguments.
_SIZES: dict[object, tuple[int, ...]] = {
    aten.view: (1,),
    aten.reshape: (1,),
    aten._unsafe_view: (1,),
    aten.expand: (1,),
    aten.unflatten: (2,),
    aten.rms_norm: (1,),
    aten.full: (0,),
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def difference(inputs: Sequence[fx.Node], olds: Sequence[fx.Node], news: Sequence[fx.Node]) -> str | None:
    """How the new nodes differ from the old ones as functions of the inputs; None when they do not.

    Gives the first difference at full size, if they differ on small sizes: a literal may belong to a size.
    """
    found = None
    for sizes in _scales(inputs):
        try:
            found = _compared(inputs, olds, news, sizes)
        except Exception as error:  # a literal that belongs to another size, most often
            found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if found is None:
            return None
    return found


def _scales(inputs: Sequence[fx.Node]) -> list[dict[int, int]]:
    """Replacements of sizes to try in turn: all large ones, those of tokens alone, and none if that is affordable."""
    values = [value for value in map(tensor_of, inputs) if value is not None]
    largest = max((_count(value) for value in values), default=0)
    if largest <= _SMALL:
        return [{}]
    streams = [value for value in values if value.dim() > 2]
    tokens = {size for value in streams for size in _large(value.shape[:-1])}
    features = {size for value in streams for size in _large(value.shape[-1:])}
    wide = {size for value in values for size in _large(value.shape) if any(size % one == 0 for one in features)}
    scales = [_smaller(sorted(tokens | features | wide)), _smaller(sorted(tokens))]
    return [scale for scale in scales if scale] + ([{}] if largest <= _LARGEST else [])


def _large(sizes: Sequence[Any]) -> list[int]:
    """The known sizes that are neither streams nor their matrices."""
    return [size for size in sizes if isinstance(size, int) and size > 16]


def _count(value: Tensor) -> int:
    count = 1
    for size in value.shape:
        known = extent(size)
        count *= known if isinstance(known, int) else 3
    return count


def _smaller(sizes: Sequence[int]) -> dict[int, int]:
    """A small size for each large one; what is a small multiple of another large size stays that."""
    table: dict[int, int] = {}
    for size in sizes:
        base = next((one for one in table if size % one == 0 and size // one <= 16), None)
        table[size] = 6 + len(table) if base is None else size // base * table[base]
    return table


_VALUES: dict[str, Any] = dict(dtype=torch.float64, device="cpu")  # of what is drawn, whatever the caller's defaults


def _compared(
    inputs: Sequence[fx.Node], olds: Sequence[fx.Node], news: Sequence[fx.Node], sizes: Mapping[int, int]
) -> str | None:
    generator = torch.Generator("cpu").manual_seed(0)
    symbols: dict[Any, int] = {}

    def size(value: Any) -> int:
        known = extent(value)
        if isinstance(known, int):
            return sizes.get(known, known)
        for symbol in sorted(known.free_symbols, key=str):
            symbols.setdefault(symbol, 2 + len(symbols))
        return int(known.subs(symbols))

    given: dict[fx.Node, Any] = {}
    for node in inputs:
        value = tensor_of(node)
        if value is None or node in given:
            continue
        if not value.is_floating_point():
            return "an input is no float tensor"
        shape = [size(one) for one in value.shape]
        given[node] = torch.randn(shape, generator=generator, **_VALUES).requires_grad_()
    with torch.enable_grad():
        old, new = (_Run(given, sizes, size).of(nodes) for nodes in (olds, news))
    for one, other in zip(old, new, strict=True):
        if one.shape != other.shape or not _close(one, other):
            return "values differ"
    seeds = [torch.randn(one.shape, generator=generator, **_VALUES) for one in old]
    leaves = list(given.values())
    before, after = (torch.autograd.grad(outs, leaves, seeds, allow_unused=True) for outs in (old, new))
    for one, other in zip(before, after, strict=True):
        if not _close(*(torch.zeros(()) if grad is None else grad for grad in (one, other))):
            return "gradients differ"
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    scale = max(1.0, float(one.detach().abs().max())) if one.numel() else 1.0
    return bool(((one - other).abs() <= TOLERANCE * scale).all())


class _Run:
    """Runs the nodes between given values and wanted ones, in float64."""

    def __init__(self, given: Mapping[fx.Node, Any], sizes: Mapping[int, int], size: Any) -> None:
        self._values, self._sizes, self._size = dict(given), sizes, size

    def of(self, nodes: Sequence[fx.Node]) -> list[Tensor]:
        """The values of nodes."""
        for node in nodes:
            self._run_to(node)
        return [self._values[node] for node in nodes]

    def _run_to(self, wanted: fx.Node) -> None:
        pending = [wanted]
        while pending:
            node = pending[-1]
            if node in self._values:
                pending.pop()
                continue
            known = self._known(node)
            if known is not None:
                self._values[node] = known
                continue
            missing = [source for source in value_inputs(node) if source not in self._values]
            if missing:
                pending.extend(missing)
            else:
                self._values[node] = self._call(node)

    def _known(self, node: fx.Node) -> Any:
        """A size, read from the capture."""
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return self._size(value)
        if isinstance(value, torch.SymFloat):
            return literal(node)
        if node.op != "call_function":
            raise ValueError(f"{node.name} is no input of the match")
        return None

    def _call(self, node: fx.Node) -> Any:
        places = _SIZES.get(packet(node), ())
        args = [
            fx.map_arg(self._resized(one) if place in places else one, self._values.__getitem__)
            for place, one in enumerate(node.args)
        ]
        kwargs = fx.map_arg(dict(node.kwargs), self._values.__getitem__)
        args = [torch.float64 if one in _FLOATS else one for one in args] if _has_dtype(args) else args
        kwargs = {name: torch.float64 if name == "dtype" and one in _FLOATS else one for name, one in kwargs.items()}
        if packet(node) is aten.rms_norm and (eps := _default_eps(node)) is not None:
            args, kwargs = [*args[:3], *[None] * (3 - len(args))], {**kwargs, "eps": eps}
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        target: Any = node.target
        return operator.getitem(*args) if target is operator.getitem else target(*args, **kwargs)

    def _resized(self, argument: Any) -> Any:
        """Literal sizes among the arguments of a view, as the check has them."""
        if isinstance(argument, (list, tuple)):
            return [self._sizes.get(one, one) if isinstance(one, int) else one for one in argument]
        return argument


def _default_eps(node: fx.Node) -> float | None:
    """The eps of an `rms_norm` that names none, which goes by the dtype in the graph; None if it names one."""
    named = node.kwargs.get("eps", node.args[3] if len(node.args) > 3 else None)
    source = node.args[0] if isinstance(node.args[0], fx.Node) else None
    value = tensor_of(source) if source is not None else None
    return torch.finfo(value.dtype).eps if named is None and value is not None else None


def _has_dtype(args: Sequence[Any]) -> bool:
    return any(isinstance(one, torch.dtype) for one in args)
