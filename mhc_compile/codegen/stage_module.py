"""A pipeline stage of a model as a module of its own, with the model's own names for what it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from mhc_compile import _torch
from mhc_compile.codegen.stage_graphs import StageGraph
from mhc_compile.errors import PartitionError, ShapeError, wrong
from mhc_compile.passes.capture import graph_input
from mhc_compile.passes.emit import copy_graph
from mhc_compile.record import Function

_AGAIN = "cut the model again: pipeline_stages(plan, model, inputs)"


@dataclass(frozen=True)
class Call:
    """How a model is called, and what it gives.

    names: of the positional parameters of its forward. inputs: path in the call -> value, tensors as they were traced,
    in the order of the graph's inputs. output: structure of what it gives.
    """

    names: tuple[str, ...]
    inputs: Mapping[str, Any]
    output: pytree.TreeSpec

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call in the order of the graph. Raises ShapeError when it is another call."""
        given = leaves(self.names, args, kwargs)
        unknown = [path for path in given if path not in self.inputs and given[path] is not None]
        if unknown:
            step = "plan and cut with inputs that hold it"
            raise ShapeError(wrong(f"input {unknown[0]}", "given", f"the inputs {', '.join(self.inputs)}", step))
        return [
            _checked(path, given.get(path), known) for path, known in self.inputs.items() if self._counts(path, given)
        ]

    def _counts(self, path: str, given: Mapping[str, Any]) -> bool:
        """The input is a tensor; another one has to be as it was traced, or left out."""
        known = self.inputs[path]
        if isinstance(known, Tensor):
            return True
        value = given.get(path, known)
        if isinstance(value, Tensor) or value != known:
            raise ShapeError(wrong(f"input {path}", repr(value), f"{known!r}, as traced", "cut with that value"))
        return False


def leaves(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> value of everything that is passed in a call, however it is spelled."""
    named = {names[place] if place < len(names) else f"argument {place}": value for place, value in enumerate(args)}
    return {
        f"{name}{pytree.keystr(path)}": leaf
        for name, value in {**named, **kwargs}.items()
        for path, leaf in _torch.leaves_with_path(value)
    }


def _checked(path: str, value: Any, known: Tensor) -> Tensor:
    """The graph holds the sizes that it was traced with."""
    if isinstance(value, Tensor) and value.shape == known.shape and value.dtype == known.dtype:
        return value
    found = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
    legal = f"{list(known.shape)} {known.dtype}, a microbatch as the plan was made for"
    raise ShapeError(wrong(f"input {path}", found, legal, "pass a batch of that many microbatches, or plan for others"))


class _Level(nn.Module):
    """Stands for a module of the model; only what the stage reads is in it."""


class StageModule(nn.Module):
    """A stage of a converted model. It shares parameters and buffers with the model, and names them alike.

    Called with the model's inputs (the first stage) or what the stage before it gave; gives what the next one takes, or
    the model's output (the last). Boundaries and their gradients are contiguous, and nothing given is a view of what
    was taken. It runs in the mode (training or not) that the model was in.
    """

    def __init__(
        self,
        stage: StageGraph,
        model: nn.Module,
        state: Mapping[fx.Node, Tensor],
        trained: set[fx.Node],
        unread: Sequence[Tensor] = (),
        *,
        function: Function,
    ) -> None:
        """state: the tensors behind the nodes of `stage.state`; unread: others of the model that the stage keeps.

        function: what decides what the model's weights compute.
        """
        super().__init__()
        self._function = function
        self.received = tuple(node.meta["val"] for node in stage.given)
        self.sent = tuple(node.meta["val"] for node in stage.sent)
        self.takes_grad = tuple(node in trained for node in stage.given)
        self.gives_grad = tuple(node in trained for node in stage.sent)
        self.whole = stage.whole
        self.call: Call | None = None  # of the first stage
        self.output: pytree.TreeSpec | None = None  # of the last
        self.training = model.training
        self._held = [stage.graph]  # in a list: its constants are no part of the state
        self._prepare: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]] | None = None
        self._prepared: dict[bool, Callable[..., Any]] = {}
        held = {id(value): value for value in [*(state[node] for node in stage.state), *unread]}
        slots: dict[int, tuple[nn.Module, str]] = {}
        for name, key, saved in state_names(model):  # in the order of the model, which is then that of the stage
            if key in held:
                slots.setdefault(key, self._hold(model, name, held[key], saved))
        for node in stage.state:
            key = id(state[node])
            if key not in slots:
                slots[key] = self._hold(model, _constant_name(node), state[node], False)
        self._slots = [slots[id(state[node])] for node in stage.state]

    @property
    def graph(self) -> fx.GraphModule:
        """What the stage runs: its inputs, then the parameters and buffers that it reads."""
        return self._held[0]

    def prepare_with(self, prepare: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]) -> None:
        """Have the first call make what runs from the graph, once with and once without gradients.

        That compiles the graph, or has it replay its recompute blocks.
        """
        self._prepare = prepare

    def _hold(self, model: nn.Module, path: str, value: Tensor, persistent: bool) -> tuple[nn.Module, str]:
        """Register a tensor of the model under its own path; gives the module that has it, and its name there."""
        *steps, name = path.split(".")
        place: nn.Module = self
        for depth, step in enumerate(steps, 1):
            if step not in place._modules:
                place.add_module(step, _emptied(model, ".".join(steps[:depth])))
            place = place.get_submodule(step)
        if isinstance(value, nn.Parameter):
            place.register_parameter(name, value)
        else:
            place.register_buffer(name, value, persistent=persistent)
        return place, name

    def train(self, mode: bool = True) -> StageModule:
        """Raises PartitionError for the mode that the model was not in when it was cut."""
        if mode != self.training:
            now, new = ("train", "eval") if self.training else ("eval", "train")
            legal = f"{now}, in which the model was when it was cut"
            step = f"call model.{new}() and {_AGAIN}"
            raise PartitionError(wrong("the mode of a pipeline stage", new, legal, step))
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Raises ConfigError for the weights of another conversion, before anything is copied."""
        self._function.check_state(state, prefix, step=f"convert a model as these weights were, and {_AGAIN}")
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stages but the first leave keyword arguments alone: a schedule hands them to every stage of a process."""
        if self.call is not None:
            flat: list[Any] = self.call.flat(args, kwargs)
        else:
            flat = [_contiguous_gradient(value) for value in args]
        values = self._run([*flat, *(getattr(place, name) for place, name in self._slots)])
        if self.output is not None:
            return pytree.tree_unflatten(list(values), self.output)
        self._check_trained(values)
        taken = {id(value) for value in flat}
        return tuple(_own(value, taken) for value in values)

    def _run(self, flat: list[Any]) -> Sequence[Any]:
        if self._prepare is None:
            outputs: Sequence[Any] = self.graph(*flat)
            return outputs
        key = torch.is_grad_enabled()
        if key not in self._prepared:
            leaves = [value if value.is_leaf else value.detach().requires_grad_() for value in flat]
            self._prepared[key] = self._prepare(copy_graph(self.graph), leaves)
        return self._prepared[key](*flat)  # type: ignore[no-any-return]

    def _check_trained(self, values: Sequence[Tensor]) -> None:
        """A gradient that no stage expects would be lost in silence."""
        if torch.is_grad_enabled() and not all(
            known or not value.requires_grad for value, known in zip(values, self.gives_grad, strict=True)
        ):
            legal = "the requires_grad of the parameters when the model was cut"
            raise PartitionError(wrong("requires_grad of a stage's output", "True now", legal, _AGAIN))


def state_names(model: nn.Module) -> list[tuple[str, int, bool]]:
    """Path, id, and whether it is saved, of every parameter and buffer; one that is tied has several paths."""
    found = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    found.append((prefix + name, id(value), name not in module._non_persistent_buffers_set))
    return found


def _constant_name(node: fx.Node) -> str:
    record = graph_input(node)
    return record.path.replace(".", "_") if record is not None else node.name


def _emptied(model: nn.Module, path: str) -> nn.Module:
    """A module that stands for the one at a path, with what it does beyond its tensors: when cast, and when saved."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return _Level()
    kind = type(module)
    if kind._apply is nn.Module._apply and kind.get_extra_state is nn.Module.get_extra_state:
        return _Level()
    made = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = {}
    return made


def _own(value: Tensor, taken: Iterable[int]) -> Tensor:
    """A contiguous tensor that is neither a view nor one that was taken: schedules detach and send it."""
    if id(value) in taken or value._is_view():
        return value.clone(memory_format=torch.contiguous_format)
    return value.contiguous()


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def _contiguous_gradient(value: Tensor) -> Tensor:
    """The tensor itself; its gradient is contiguous."""
    if not (value.requires_grad and torch.is_grad_enabled()):
        return value
    made: Tensor = _Contiguous.apply(value)  # type: ignore[no-untyped-call]
    return made


