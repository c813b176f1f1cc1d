"""Convert a model in place, undo it, and group its parameters for an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

import mhc_compile.kernels.ops as ops
from mhc_compile import _torch
from mhc_compile.backend import ConvertingBackend
from mhc_compile.config import MHCConfig
from mhc_compile.errors import ConfigError, ExportError, RewriteError, wrong
from mhc_compile.example_inputs import as_call, derive
from mhc_compile.hyper_connection import HyperConnection
from mhc_compile.passes.capture import DYNAMO_ERRORS, just_in_time, translated
from mhc_compile.passes.history import PassRecord
from mhc_compile.passes.provenance import module_path, source_line
from mhc_compile.passes.residuals import Refusal
from mhc_compile.passes.rewrite import Analysis, analyze
from mhc_compile.passes.select import NO_GRAD
from mhc_compile.passes.trunks import Site

_STATE = "_mhc_conversion"
_TREE = "mhc"
_INLINED = (
    "a model converted by mhc_compile compiles itself and cannot be inlined into another fullgraph compilation or a "
    "strict export; compile without fullgraph, or use mhc_compile.trace(model, inputs)"
)


class SiteTree(nn.Module):
    """A level of the tree of sites; its children are named like the modules of the model."""

    def forward(self, x: Any) -> Any:
        """Gives `x`: an nn.Sequential calls every child, this one too."""
        return x


@dataclass(frozen=True)
class SiteRecord:
    """What is kept of a site: its name, features C, own stream, trunk, where its add stands; double: fp64 streams."""

    name: str
    features: int
    stream: int
    trunk: int
    line: str
    double: bool = False


class Conversion:
    """The state of a converted model: its options, its sites, its original class and its compiled forward."""

    def __init__(
        self,
        original: type[nn.Module],
        config: MHCConfig,
        sites: list[SiteRecord],
        skips_no_grad: frozenset[tuple[str, str]],
    ) -> None:
        self.original, self.config, self.sites = original, config, sites
        self.skips_no_grad = skips_no_grad
        self.backend: ConvertingBackend | None = None
        self._compiled: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles compile anew."""
        return {**self.__dict__, "backend": None, "_compiled": None}

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The converted forward."""
        if torch.compiler.is_exporting():
            raise ExportError(
                f"torch.export of a converted {self.original.__name__} would give the plain model; "
                "call mhc_compile.trace(model, inputs) for its rewritten graph"
            )
        if self._compiled is None:
            self._compiled, self.backend = self.compiled(model, self.config.backend)
        try:
            with _torch.compile_settings():
                _, output = self._compiled(model, *args, **kwargs)
        except DYNAMO_ERRORS as error:
            raise translated(error, model) from error
        return output

    def compiled(self, model: nn.Module, backend: str) -> tuple[Callable[..., Any], ConvertingBackend]:
        """The anchored forward `(model, ...) -> (token, output)`, freshly compiled with a backend, and that."""
        names = [name for name, _ in getattr(model, _TREE).named_parameters()]
        sites = [site.name for site in self.sites]
        converting = ConvertingBackend(replace(self.config, backend=backend), sites, names, self.skips_no_grad)
        forward = _torch.fresh_function(anchored(self.original))
        return torch.compile(forward, backend=converting, fullgraph=True), converting


for _method in (Conversion.run, Conversion.compiled):
    _torch.outside_dynamo(_method, _INLINED)


def anchored(original: type[nn.Module]) -> Callable[..., Any]:
    """The forward that is traced: the original one, and an anchor that fails to run unless it was rewritten."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return ops.anchor(list(getattr(self, "mhc").parameters())), original.forward(self, *args, **kwargs)  # noqa: B009

    return forward


def original_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a model that is not converted, as a function of the model."""
    return type(self).forward(self, *args, **kwargs)


def plain_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward of a model before any conversion, as a function of the model."""
    if not is_converted(model):
        return original_forward
    original = conversion(model).original

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original.forward(self, *args, **kwargs)

    return forward


def mhc_compile(
    model: nn.Module,
    n: int | None = None,
    *,
    config: MHCConfig | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> nn.Module:
    """Turn a model into n-stream mHC, in place, and give it back.

    Every residual add that `explain` lists as a site becomes one of manifold-constrained hyper-connections
    (arXiv 2512.24880). With the default `init="identity"` the model computes at first what it did, gradients of its
    own parameters included. `model.mhc` holds the new parameters (float32), named after the modules of the
    branches: build the optimizer after the call, with `param_groups(model)`.

    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of the model's forward, of any
        batch and length; derived when omitted for Hugging Face models. The model is traced, not run.
    n, options: the fields of MHCConfig; or pass `config`.

    Raises ConfigError for a wrong option, CaptureError for a model that is not one graph, and RewriteError when it
    has no residual add, is mHC or converted already. The model is then as it was.
    """
    config = _config(n, config, options)
    _convertible(model)
    args, kwargs = as_call(derive(model) if example_inputs is None else example_inputs)
    analysis = analyze(just_in_time(original_forward, model, args, kwargs).graph, tie_shared=config.tie_shared)
    refuse_unfit(model, analysis)
    sites = [] if config.n == 1 else _unique([_record(site) for site in analysis.sites])
    skips_no_grad = frozenset(
        (module_path(one.node), source_line(one.node)) for one in analysis.refused if one.reason == NO_GRAD
    )
    _attach(model, config, sites, skips_no_grad)
    return model


def _config(n: int | None, config: MHCConfig | None, options: dict[str, Any]) -> MHCConfig:
    if config is not None:
        if n is not None or options:
            raise ConfigError(wrong("config", "given beside other options", "config alone, or n and options"))
        return config
    known: dict[str, Any] = asdict(MHCConfig())
    for name in options:
        if name not in known:
            raise ConfigError(wrong("option", repr(name), "one of " + ", ".join(known)))
    return MHCConfig(**(options if n is None else {"n": n, **options}))


def _convertible(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(wrong("model", f"a {type(model).__name__}", "a torch.nn.Module"))
    if is_converted(model):
        raise RewriteError(f"{type(model).__name__} is converted already; call restore(model) first")
    if hasattr(model, _TREE):
        raise RewriteError(f"{type(model).__name__} has an attribute {_TREE!r} of its own, where the sites would go")


def refuse_unfit(model: nn.Module, analysis: Analysis) -> None:
    """Raise RewriteError for a model that is mHC already or has no site."""
    name = type(model).__name__
    if analysis.foreign is not None:
        raise RewriteError(
            f'{name} is mHC already; torch.compile(model, backend="mhc") makes it fast and keeps its function',
            line=analysis.foreign,
        )
    if not analysis.sites:
        raise RewriteError(f"{name} has no residual add to convert{_why(analysis.refused)}")


def _why(refused: list[Refusal]) -> str:
    if not refused:
        return ": its graph adds no two float tensors"
    lines = [f"{source_line(one.node) or one.node.name}: {one.reason}" for one in refused[:3]]
    more = [f"and {len(refused) - 3} more; explain(model, inputs) lists all"] if len(refused) > 3 else []
    return ". Refused:\n  " + "\n  ".join([*lines, *more])


def _record(site: Site) -> SiteRecord:
    double = site.merge.base.meta["val"].dtype == torch.float64
    return SiteRecord(site.name, site.features, site.index, site.trunk, site.line, double)


def _unique(records: list[SiteRecord]) -> list[SiteRecord]:
    """One record a name: tied applications of a shared layer have one."""
    first: dict[str, SiteRecord] = {}
    for record in records:
        kept = first.setdefault(record.name, record)
        if kept.features != record.features:
            raise RewriteError(f"tied sites {record.name!r} differ in width: {kept.features} and {record.features}")
    return list(first.values())


def _attach(
    model: nn.Module, config: MHCConfig, sites: list[SiteRecord], skips_no_grad: frozenset[tuple[str, str]]
) -> None:
    original = type(model)
    tree = SiteTree()
    device = next((parameter.device for parameter in model.parameters()), None)
    for site in sites:
        place: nn.Module = tree
        *path, last = site.name.split(".")
        for part in path:
            if part not in place._modules:
                place.add_module(part, SiteTree())
            place = place._modules[part]  # type: ignore[assignment]
        connection = HyperConnection(
            config.n,
            site.features,
            stream=site.stream,
            init=config.init,
            iterations=config.iterations,
            eps=config.eps,
            device=device,
        )
        if site.double:
            connection.double()
        place.add_module(last, connection.train(model.training))
    tree.train(model.training)
    model.add_module(_TREE, tree)
    model.__dict__[_STATE] = Conversion(original, config, sites, skips_no_grad)
    model.__class__ = _subclass(original)  # type: ignore[arg-type]  # mypy takes the class for its instance


@functools.cache
def _subclass(original: type[nn.Module]) -> type[nn.Module]:
    """The original class with a forward that runs rewritten; its name stays, as frameworks look classes up by it."""

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_STATE].run(self, args, kwargs)

    _torch.outside_dynamo(forward, _INLINED)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (original,), dict(self.__dict__)

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    return type(original.__name__, (original,), body)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """An empty converted model for pickle and copy to fill: they find classes by name, and that is the original's."""
    made = _subclass(original)  # type: ignore[arg-type]
    return made.__new__(made)


def is_converted(model: nn.Module) -> bool:
    """The model was converted by `mhc_compile`."""
    return _STATE in model.__dict__


def conversion(model: nn.Module) -> Conversion:
    """The conversion of a model; RewriteError if it is not converted."""
    if not isinstance(model, nn.Module) or not is_converted(model):
        raise RewriteError(f"{type(model).__name__} is not converted; call mhc_compile(model) first")
    found: Conversion = model.__dict__[_STATE]
    return found


def restore(model: nn.Module) -> nn.Module:
    """Undo `mhc_compile`, in place: the original class and forward, without `model.mhc`.

    The model keeps its own parameters as they are now, trained or not. Raises RewriteError if it is not converted.
    """
    state = conversion(model)
    model.__class__ = state.original
    del model.__dict__[_STATE]
    delattr(model, _TREE)
    return model


def history(model: nn.Module) -> list[PassRecord]:
    """What each pass did in each compilation so far, first to last; empty before the first call."""
    backend = conversion(model).backend
    return [] if backend is None else list(backend.history)


def param_groups(model: nn.Module, *, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Optimizer groups: matrices with weight decay, mHC parameters and vectors (norms, biases) without.

    Parameters that do not require grad are left out. Raises ConfigError for a negative weight_decay.
    """
    if not weight_decay >= 0:
        raise ConfigError(wrong("weight_decay", repr(weight_decay), "a number >= 0"))
    tree = model._modules.get(_TREE) if is_converted(model) else None
    own = {id(parameter) for parameter in (tree.parameters() if tree is not None else ())}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: Iterable[tuple[str, float, list[nn.Parameter]]] = (
        ("decay", weight_decay, [p for p in trained if id(p) not in own and p.dim() >= 2]),
        ("no_decay", 0.0, [p for p in trained if id(p) not in own and p.dim() < 2]),
        ("mhc", 0.0, [p for p in trained if id(p) in own]),
    )
    return [{"name": name, "params": params, "weight_decay": decay} for name, decay, params in groups if params]


__all__ = ["Conversion", "SiteRecord", "history", "is_converted", "mhc_compile", "param_groups", "restore"]
