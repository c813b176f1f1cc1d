"""The rewritten graph of a converted model as a module of its own: to run, inspect and export."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from mhc_compile.backend import recorded_analysis
from mhc_compile.codegen.stage_module import leaves
from mhc_compile.conversion import STATE, TREE, conversion, plain_forward
from mhc_compile.errors import CaptureError, ShapeError, wrong
from mhc_compile.example_inputs import as_call, derive
from mhc_compile.parts import inside
from mhc_compile.passes.bind import bind_parameters
from mhc_compile.passes.capture import Captured, ahead_of_time, graph_input, just_in_time
from mhc_compile.passes.rewrite import Analysis, analyze, rewrite
from mhc_compile.record import Record
from mhc_compile.sharding import refuse_sharded


@contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients on and inference mode off, whatever the caller's mode: for what looks at a step of training."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass(frozen=True)
class Rewritten:
    """A converted model's graph after all passes, with the flat arguments of one call."""

    graph: fx.GraphModule
    arguments: tuple[Any, ...]
    analysis: Analysis


def rewritten(model: nn.Module, inputs: Any = None) -> Rewritten:
    """Capture a converted model just in time for `inputs` and rewrite it with the parameters it has now."""
    refuse_sharded(model)
    args, kwargs = as_call(derive(model) if inputs is None else inputs)
    return rewrite_captured(model, just_in_time(plain_forward(model), model, args, kwargs))


@dataclass(frozen=True)
class Exported:
    """What torch.export and the rewrite give for one call of a converted model.

    output: the structure of what the model gives; names: of the positional parameters of its forward; args, kwargs: the
    call. backwards: the `autograd.Function`s whose own backward torch.export has left out.
    """

    rewritten: Rewritten
    output: pytree.TreeSpec
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    backwards: tuple[str, ...] = ()


def warn_of_backwards(model: nn.Module, found: Exported) -> None:
    """Warn that what was exported has other gradients than the model, where functions have a backward of their own."""
    if found.backwards:
        name = type(model).__name__
        what = f"with the backward of {', '.join(found.backwards)}, which torch.export leaves out"
        legal = "outputs of the trace as they are, and gradients of the ops of that forward"
        step = f"train the converted {name} itself, whose gradients are its own"
        warnings.warn(wrong(f"the trace of {name}", what, legal, step), stacklevel=3)


def exported(model: nn.Module, inputs: Any = None, dynamic_shapes: Any = None) -> Exported:
    """Capture a converted model ahead of time for `inputs`, and rewrite it; errors as of `trace`."""
    state = conversion(model)
    refuse_sharded(model)
    args, kwargs = as_call(derive(model, cached=False) if inputs is None else inputs)
    plain = without_mhc(model)
    captured, output = inside(ahead_of_time)(plain, args, kwargs, dynamic_shapes)
    if output is None:
        raise CaptureError(f"torch.export gives no output structure for {state.original.__name__}")
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(plain.forward).parameters.values()
    names = tuple(parameter.name for parameter in parameters if parameter.kind in positional)
    return Exported(rewrite_captured(model, captured), output, names, tuple(args), dict(kwargs), captured.backwards)


def rewrite_captured(model: nn.Module, captured: Captured) -> Rewritten:
    """Rewrite a captured call of a converted model's plain forward with the parameters that the model has now."""
    record = conversion(model).record
    if record.config.n == 1:
        analysis = analyze(captured.graph, tie_shared=record.config.tie_shared)
        captured.graph.recompile()
        return Rewritten(captured.graph, captured.arguments, analysis)
    analysis = recorded_analysis(captured.graph, record)
    look_up, names = bind_parameters(captured.graph, analysis.sites, record.config)
    rewrite(analysis, record.config, look_up)
    parameters = tuple(model.get_parameter(f"{TREE}.{name}") for name in names)
    return Rewritten(captured.graph, (*captured.arguments, *parameters), analysis)


class TracedModel(nn.Module):
    """A rewritten graph with the parameters and buffers that it reads, callable like the model it came from.

    It shares them with the model. `torch.export.export` takes it.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        arguments: tuple[Any, ...],
        out_spec: pytree.TreeSpec,
        names: tuple[str, ...],
        call: tuple[tuple[Any, ...], dict[str, Any]],
        record: Record,
    ) -> None:
        """names: of the positional parameters of the model's forward; call: args and kwargs, as traced."""
        super().__init__()
        self._record = record
        self._names, self._paths = names, list(leaves(names, *call))
        self.graph_module = graph
        self._out_spec = out_spec
        self._slots: list[str | None] = []  # the attribute behind each graph input; None for a user input
        self._inputs: list[tuple[str, Any]] = []  # name of each user input, and what it was traced with
        for node, value in zip(graph.graph.find_nodes(op="placeholder"), arguments, strict=True):
            place = graph_input(node)
            if not isinstance(value, torch.Tensor) or place is None or (place.kind == "input" and not place.path):
                self._slots.append(None)
                self._inputs.append((node.name, _as_traced(node.meta.get("val", value))))
                continue
            name = place.path.replace(".", "/")
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
            self._slots.append(name)

    def get_extra_state(self) -> Tensor:
        """The record of the conversion."""
        return self._record.to_tensor()

    def set_extra_state(self, state: object) -> None:
        """Raises ConfigError for the weights of another conversion."""
        step = "trace a model that was converted as these weights were"
        self._record.function.check(Record.from_tensor(state).function, step)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}_extra_state" in state:  # before anything is copied
            self.set_extra_state(state[f"{prefix}_extra_state"])
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, after the rewrite; arguments as in the traced call, in whatever order they are named."""
        named = leaves(self._names, args, kwargs)
        if len(named) == len(self._paths) and named.keys() != set(self._paths):
            legal = f"{', '.join(self._paths)}, as traced"
            raise ShapeError(wrong("the inputs", ", ".join(named), legal, "trace with these inputs"))
        given = [named[path] for path in self._paths] if len(named) == len(self._paths) else list(named.values())
        _check_inputs(self._inputs, given)
        values = iter(given)
        flat = [next(values) if slot is None else getattr(self, slot) for slot in self._slots]
        return pytree.tree_unflatten(list(self.graph_module(*flat)), self._out_spec)


def _as_traced(value: Any) -> Any:
    """Shape (None where it may change) and dtype of a tensor; another value as it is."""
    if isinstance(value, torch.Tensor):
        return tuple(size if isinstance(size, int) else None for size in value.shape), value.dtype
    return value


def _check_inputs(traced: list[tuple[str, Any]], given: list[Any]) -> None:
    """The graph holds the sizes it was traced with; others would run into an error inside, or give wrong numbers."""
    if len(traced) != len(given):
        raise ShapeError(wrong("the number of inputs", len(given), f"{len(traced)}, as traced"))
    for (name, known), value in zip(traced, given, strict=True):
        if not isinstance(value, torch.Tensor):
            if not isinstance(known, torch.SymInt) and value != known:
                raise ShapeError(wrong(f"input {name}", repr(value), f"{known!r}, as traced", "trace with that value"))
            continue
        shape, dtype = known
        fits = len(shape) == value.dim() and all(a in (None, b) for a, b in zip(shape, value.shape, strict=True))
        if not fits or value.dtype != dtype:
            legal = f"[{', '.join('any' if size is None else str(size) for size in shape)}] {dtype}"
            step = "trace with this input, or with dynamic_shapes"
            raise ShapeError(wrong(f"input {name}", f"{list(value.shape)} {value.dtype}", legal, step))


def without_mhc(model: nn.Module) -> nn.Module:
    """The plain model behind a converted one: it shares all modules with it, but not the tree of sites."""
    state = conversion(model)
    plain = copy.copy(model)
    plain.__dict__["_modules"] = {name: child for name, child in model._modules.items() if name != TREE}
    del plain.__dict__[STATE]
    plain.__class__ = state.original
    return plain


def trace(model: nn.Module, inputs: Any = None, *, dynamic_shapes: Any = None) -> TracedModel:
    """The converted model as one rewritten graph, through torch.export: the door for exporting and planning.

    inputs, dynamic_shapes: as for `mhc_compile` and `torch.export.export`. Raises CaptureError when torch.export
    refuses the model, RewriteError when the model is not converted. Warns of an `autograd.Function`, whose own backward
    torch.export leaves out.
    """
    found = exported(model, inputs, dynamic_shapes)
    warn_of_backwards(model, found)
    return as_module(model, found)


def as_module(model: nn.Module, found: Exported) -> TracedModel:
    """Return what was exported of a converted model as a module."""
    call = found.args, found.kwargs
    record = conversion(model).record
    return TracedModel(found.rewritten.graph, found.rewritten.arguments, found.output, found.names, call, record)
