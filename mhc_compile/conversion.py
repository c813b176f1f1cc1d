"""The state of a converted model: its record, the tree of its sites, its class, and its compiled forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import mhc_compile.kernels.ops as ops
from mhc_compile import _torch, hugging_face, preconditions
from mhc_compile.backend import ConvertingBackend
from mhc_compile.config import MHCConfig
from mhc_compile.errors import CaptureError, ConfigError, MHCError, RewriteError, wrong
from mhc_compile.hyper_connection import HyperConnection
from mhc_compile.parts import inside, is_inside, part_paths, record_of_part
from mhc_compile.passes.history import PassRecord
from mhc_compile.passes.recompute_choice import Recompute
from mhc_compile.record import KEY, Record, SiteRecord
from mhc_compile.sharding import run_gathered

_Function = TypeVar("_Function", bound=Callable[..., Any])
Observer = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], str], None]
"""What is told of each call of a converted model before it runs: model, args, kwargs, path of the part ('': all)."""
STATE = "_mhc_conversion"
TREE = "mhc"
PART = "_mhc_part"  # of a part of a converted model
PENDING = "_mhc_pending"  # of a model that is converted at its first call
_INLINED = (
    "a model converted by mhc_compile compiles itself and cannot be inlined into another fullgraph compilation or a "
    "strict export; legal: torch.compile without fullgraph, which steps over the model. Next: drop fullgraph=True, or "
    "take mhc_compile.trace(model, inputs)"
)


class SiteTree(nn.Module):
    """A level of the tree of sites; its children are named like the modules of the model."""

    def forward(self, x: Any) -> Any:
        """Gives `x`: an nn.Sequential calls every child, this one too."""
        return x


class RecordedTree(SiteTree):
    """The root of a tree of sites: puts the record of the conversion into the `state_dict`."""

    _extra_state = None  # `from_pretrained` of transformers 5.0 asks for it as for a parameter

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def get_extra_state(self) -> Tensor:
        """The record, as a uint8 tensor."""
        return self.record.to_tensor()

    def set_extra_state(self, state: object) -> None:
        """Raises ConfigError when the weights belong to another conversion."""
        self.record.function.check(Record.from_tensor(state).function)


class Conversion:
    """A model's conversion: its record, its original class, and the compiled forward of it and of its parts."""

    def __init__(self, original: type[nn.Module], record: Record, recompute: Recompute | None = None) -> None:
        self.original, self.record, self.recompute = original, record, recompute
        self.high_priority: frozenset[str] = frozenset()  # the sites whose merges are launched so
        self._histories: WeakKeyDictionary[Callable[..., Any], list[PassRecord]] = WeakKeyDictionary()
        self.observers: list[Observer] = []
        self._compiled: dict[str, Callable[..., Any]] = {}  # by the path of the part; '' is the whole model
        self._of_iterations: dict[int, dict[str, Callable[..., Any]]] = {}  # the same, of other numbers of iterations
        self._sites = preconditions.SiteCheck(record)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles compile anew; the record goes with its version."""
        kept = {"recompute": self.recompute, "high_priority": self.high_priority}
        return {"original": self.original, "record": self.record.as_dict(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises ConfigError for a record that this version does not know."""
        record = Record.from_dict(state["record"])
        self.__init__(state["original"], record, state.get("recompute"))  # type: ignore[misc]
        self.high_priority = state.get("high_priority", frozenset())

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], part: str = "") -> Any:
        """The converted forward of the model, or of the part at this path."""
        preconditions.check_call(model, self.original.__name__, args, kwargs)
        if self._sites_changed(model):
            self.forget_compiled()
        if part not in self._compiled:
            self._compiled[part] = self.compiled(model, self.record.config.backend, part)
        try:
            return run_gathered(functools.partial(self._retried, part), model, args, kwargs)
        except MHCError:
            self._compiled.pop(part, None)  # Dynamo remembers the sizes of a refused call, and would trace dynamic ones
            raise

    @property
    def history(self) -> list[PassRecord]:
        """What each pass did in each compilation that is kept; records hold graphs, and go with what was compiled."""
        return [record for records in list(self._histories.values()) for record in records]

    def forget_compiled(self) -> None:
        """The next call of the model, or of a part, compiles anew."""
        self._compiled.clear()
        self._of_iterations.clear()

    def set_iterations(self, model: nn.Module, iterations: int) -> None:
        """Another number of Sinkhorn iterations, in the record and in all sites; what is compiled for each is kept."""
        if self._sites_changed(model):
            self.forget_compiled()
        before = self.record.config.iterations
        self._of_iterations[before] = self._compiled
        self._compiled = self._of_iterations.pop(iterations, {}) if iterations != before else self._compiled
        self.record = replace(self.record, config=replace(self.record.config, iterations=iterations))
        tree = getattr(model, TREE)
        tree.record = self.record
        for site in map(tree.get_submodule, (site.name for site in self.record.sites)):
            site.iterations = iterations
        self._sites = preconditions.SiteCheck(self.record)
        self._sites.changed(tree)

    def _retried(self, part: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for observer in tuple(self.observers):
            observer(model, args, kwargs, part)
        return self.with_hooks(self._call, part, model, args, kwargs)

    def with_hooks(
        self,
        call: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any],
        part: str,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """`call`, once more where transformers has to set its hooks first; errors of a capture are explained."""
        try:
            return self._explained(call, part, model, args, kwargs)
        except CaptureError as error:
            if not hugging_face.had_no_output_hooks(error, model):
                raise
        return self._explained(call, part, model, args, kwargs)

    def _explained(
        self,
        call: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any],
        part: str,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            with _torch.compile_settings():
                return call(part, model, args, kwargs)
        except Exception as error:
            run = model.get_submodule(part)
            _refuse_converted_inside(run, error)
            found = preconditions.explained(error, run, getattr(model, TREE), self.record, args, kwargs)
            if found is error:
                raise
            raise found from error

    def _call(self, part: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, output = self._compiled[part](model, *args, **kwargs)
        if torch.is_grad_enabled() and self.record.config.backend != "eager":
            preconditions.watch_second_derivative(output)
        return output

    @_torch.paused
    def _sites_changed(self, model: nn.Module) -> bool:
        """The sites are no longer those of the last call. Raises RewriteError if they are not the conversion's."""
        tree = model._modules.get(TREE)
        if not isinstance(tree, SiteTree):
            raise RewriteError(
                wrong(
                    f"model.{TREE}",
                    "deleted" if tree is None else f"replaced by a {type(tree).__name__}",
                    "the tree of sites that the conversion put there",
                    "put it back; under PEFT leave it out of modules_to_save, and call "
                    "model.mhc.requires_grad_(True) to train the sites",
                )
            )
        return self._sites.changed(tree)

    @_torch.paused
    def compiled(self, model: nn.Module, backend: str, part: str = "", level: int = 2) -> Callable[..., Any]:
        """The anchored forward `(model, ...) -> (token, output)` of the model or of a part, freshly compiled."""

        history = list[PassRecord]()

        def converting(record: Record, names: list[str]) -> ConvertingBackend:
            config = replace(record.config, backend=backend)
            options = level, self.recompute, self.high_priority
            return ConvertingBackend(replace(record, config=config), names, history, *options)

        compiled = self.compiled_by(converting, model, part)
        self._histories[compiled] = history
        return compiled

    @_torch.paused
    def compiled_by(
        self, make: Callable[[Record, list[str]], Any], model: nn.Module, part: str = ""
    ) -> Callable[..., Any]:
        """The anchored forward, freshly compiled by the backend that `make(record, names of parameters)` gives."""
        record = self.record
        names = [name for name, _ in getattr(model, TREE).named_parameters()]
        original = self.original
        if part:
            record, original = record_of_part(record, part), model.get_submodule(part).__dict__[PART].original
            names = [name for name in names if name.startswith(f"{part}.")]
        backend = make(record, names)
        return _torch.compiled_alone(anchored(original, part), backend)


def _refuse_converted_inside(model: nn.Module, error: Exception) -> None:
    """Raise RewriteError when a submodule of a converted model was converted by itself afterwards."""
    for name, module in model.named_modules():
        if module is not model and STATE in module.__dict__:
            found = "converted by itself, after the model that holds it"
            step = "restore() that submodule, or restore the model and convert the submodule alone"
            raise RewriteError(wrong(f"{name} of {type(model).__name__}", found, "one conversion", step)) from error


_STEPS = (Conversion.run, Conversion._retried, Conversion.with_hooks, Conversion._explained, Conversion._call)
for _method in _STEPS:  # an outer compilation stays out of them
    _torch.outside_dynamo(_method, _INLINED)


def anchored(original: type[nn.Module], part: str = "") -> Callable[..., Any]:
    """The forward that is traced: the original one, and an anchor that fails to run unless it was rewritten.

    It takes the whole model, whose site names it keeps, for the forward of the part at a path too.
    """
    run = inside(original.forward)
    steps = part.split(".") if part else []

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        module, tree = self, getattr(self, "mhc")  # noqa: B009
        for step in steps:
            module, tree = getattr(module, step), getattr(tree, step)
        return ops.anchor(list(tree.parameters())), run(module, *args, **kwargs)

    return forward


def original_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a model that is not converted, as a function of the model."""
    return type(self).forward(self, *args, **kwargs)


def plain_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward of a model before any conversion, as a function of the model. ConfigError for no module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(wrong("model", f"a {type(model).__name__}", "a torch.nn.Module", "pass the model itself"))
    state = model.__dict__.get(STATE) or model.__dict__.get(PENDING)
    if state is None:
        return original_forward
    run = inside(state.original.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    return forward


def is_converted(model: nn.Module) -> bool:
    """The model was converted by `mhc_compile`."""
    return isinstance(model, nn.Module) and STATE in model.__dict__


def conversion(model: nn.Module) -> Conversion:
    """The conversion of a model; RewriteError if it is not converted."""
    if isinstance(model, nn.Module) and PENDING in model.__dict__:
        step = "call it once: a model without example_inputs is converted at its first call"
        raise RewriteError(wrong(type(model).__name__, "not converted yet", "a converted model", step))
    if not is_converted(model):
        step = (
            "call mhc_compile(model) first; a model that is mHC already stays as it is: torch.compile(model, "
            'backend="mhc") makes it fast, and explain(model, inputs) shows its sites'
        )
        raise RewriteError(wrong(type(model).__name__, "not converted", "a converted model", step))
    found: Conversion = model.__dict__[STATE]
    return found


def attach(model: nn.Module, record: Record, recompute: Recompute | None = None) -> None:
    """Make a plain model the converted one that `record` describes, in place, with freshly initialised sites.

    The sites lie on the device of the model's first parameter. Nothing is traced: the first call checks that the
    forward has these sites.
    """
    original = type(model)
    device = next((parameter.device for parameter in model.parameters()), None)
    with torch.inference_mode(False):  # a first call may be in that mode, whose tensors can never be trained
        tree = plant(record, device).train(model.training)
    model.add_module(TREE, tree)
    model.__dict__[STATE] = Conversion(original, record, recompute)
    model.__class__ = converted_class(original)
    for path in part_paths(model, record):
        part = model.get_submodule(path)
        part.__dict__[PART] = Part(type(part), model, path)
        part.__class__ = part_class(type(part))


def plant(record: Record, device: torch.device | None) -> SiteTree:
    """The tree of freshly initialised sites that `record` describes."""
    tree: SiteTree = RecordedTree(record) if record.sites else SiteTree()
    for site in record.sites:
        place: nn.Module = tree
        *path, last = site.name.split(".")
        for part in path:
            if part not in place._modules:
                place.add_module(part, SiteTree())
            place = place._modules[part]  # type: ignore[assignment]
        place.add_module(last, connection(site, record.config, device))
    return tree


def connection(site: SiteRecord, config: MHCConfig, device: torch.device | None) -> HyperConnection:
    """The freshly initialised parameters of one site."""
    made = HyperConnection(
        config.n,
        site.features,
        stream=site.stream,
        init=config.init,
        iterations=config.iterations,
        eps=config.eps,
        implicit_gradient=config.implicit_gradient,
        constraint=site.constraint or config.constraint,
        fixed=config.fixed,
        dynamic=config.dynamic,
        device=device,
    )
    return made.double() if site.double else made


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    state = conversion(model)
    take_off_own_forward(model)
    if "forward" in model.__dict__:
        raise RewriteError(
            wrong(
                f"forward of this {state.original.__name__}",
                "set on the instance after its conversion (accelerate does that)",
                "the forward of the converted class",
                "take it off first (accelerator.unwrap_model(model, keep_fp32_wrapper=False))",
            )
        )
    if type(model) is not converted_class(state.original):
        raise RewriteError(
            wrong(
                f"the class of this {state.original.__name__}",
                f"changed after its conversion, to {type(model).__name__} (fully_shard does that)",
                "the class that the conversion gave it",
                "call restore(model) before what changes it",
            )
        )
    for part in model.modules():
        if PART in part.__dict__:
            part.__class__ = part.__dict__.pop(PART).original
    model.__class__ = state.original
    del model.__dict__[STATE]
    delattr(model, TREE)


def one_for_each(make: Callable[[type[nn.Module]], type[nn.Module]]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Let a function that makes a subclass make one for each class, and keep neither class alive.

    A class knows its subclasses, weakly: there the one that was made is found again.
    """

    def made(original: type[nn.Module]) -> type[nn.Module]:
        known = (kind for kind in original.__subclasses__() if kind.__dict__.get(_MAKER) is make)
        found = next(known, None) or make(original)
        setattr(found, _MAKER, make)
        return found

    return made


_MAKER = "_mhc_maker"  # of a class that was made: the function that did


@one_for_each
def converted_class(original: type[nn.Module]) -> type[nn.Module]:
    """The original class with a forward that runs rewritten; its name stays, as frameworks look classes up by it."""

    @like(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[STATE].run(self, args, kwargs)

    _torch.outside_dynamo(forward, _INLINED)

    def load_from(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.__dict__[STATE].record.function.check_state(state_dict, prefix)  # before anything is copied
        original._load_from_state_dict(self, state_dict, prefix, *rest)

    @functools.wraps(original.load_state_dict)
    def load(self: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        _refuse_other_state(self.__dict__[STATE].record, state_dict, strict)
        return original.load_state_dict(self, state_dict, strict, assign)

    body: dict[str, Any] = {"forward": forward, "_load_from_state_dict": load_from, "load_state_dict": load}
    if hasattr(original, "save_pretrained"):
        body["save_pretrained"] = hugging_face.recorded_save(original, lambda model: conversion(model).record)
    return subclass(original, body, rebuilt)


def _refuse_other_state(record: Record, state: Mapping[str, Any], strict: bool) -> None:
    if not isinstance(state, Mapping):
        raise ConfigError(wrong("the state", f"a {type(state).__name__}", "a state_dict", "pass model.state_dict()"))
    if record.sites and KEY not in state:
        refuse_prefix(state)
    if strict and record.sites and not any(str(key).startswith(f"{TREE}.") for key in state):
        raise ConfigError(
            wrong(
                "the state",
                "that of the plain model, without mHC weights",
                f"the state_dict of the converted model, with {TREE}.*",
                "load it before the conversion, or with strict=False to keep the mHC weights of the model",
            )
        )


def refuse_prefix(state: Mapping[str, Any]) -> None:
    """Raise ConfigError for the state of what wraps a converted model (DDP, torch.compile, a Lightning module)."""
    prefix = next((str(key).removesuffix(KEY) for key in state if str(key).endswith(f".{KEY}")), "")
    if prefix:
        legal = f"the keys of the model itself, {TREE}.* among them"
        step = f"pass {{key.removeprefix({prefix!r}): value for key, value in state.items()}}"
        raise ConfigError(wrong("the state", f"one whose keys begin with {prefix!r}", legal, step))


def like(original: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Name, documentation and signature of `original` for a function in its place.

    Not `__wrapped__`, as `functools.wraps` sets: what unwraps functions (accelerate does) would find the plain forward.
    """

    def named(function: _Function) -> _Function:
        functools.update_wrapper(function, original)
        del function.__wrapped__  # type: ignore[attr-defined]
        function.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return function

    return named


def take_off_own_forward(model: nn.Module) -> None:
    """Remove a forward on the instance that is the one of its class, as accelerate leaves it behind."""
    own = model.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is type(model).forward:
        del model.__dict__["forward"]


def subclass(original: type[nn.Module], body: dict[str, Any], rebuild: Callable[..., nn.Module]) -> type[nn.Module]:
    """A class named like `original`, with other methods, whose instances are copied and pickled through `rebuild`."""

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return rebuild, (original,), dict(self.__dict__)

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__reduce_ex__": reduce}
    hook = {"__prepare_scriptable__": preconditions.refuse_script}
    return type(original.__name__, (original,), {**body, **hook, **names})


def rebuilt(original: type[nn.Module]) -> nn.Module:
    """An empty converted model for pickle and copy to fill: they find classes by name, and that is the original's."""
    made = converted_class(original)
    return made.__new__(made)


@dataclass(frozen=True)
class Part:
    """A part of a converted model: its own class, the model, and its path there."""

    original: type[nn.Module]
    model: nn.Module
    path: str


@one_for_each
def part_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a part: called by itself it runs rewritten, within the whole model as it always did."""

    @like(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original.forward(self, *args, **kwargs) if is_inside() else _run_part(self, args, kwargs)

    return subclass(original, {"forward": forward}, rebuilt_part)


def _run_part(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    part: Part = module.__dict__[PART]
    return conversion(part.model).run(part.model, args, kwargs, part.path)


_torch.outside_dynamo(_run_part, _INLINED)


def rebuilt_part(original: type[nn.Module]) -> nn.Module:
    """An empty part for pickle and copy to fill."""
    made = part_class(original)
    return made.__new__(made)
