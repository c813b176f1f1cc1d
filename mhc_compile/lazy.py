"""Models that are converted at their first call, because nothing is known of their inputs before.

Until then whatever collects their parameters or state (an optimizer, a checkpoint, DDP) would miss the mHC part, so
these methods raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mhc_compile import _torch
from mhc_compile.config import MHCConfig
from mhc_compile.conversion import PENDING, like, one_for_each, subclass
from mhc_compile.errors import RewriteError
from mhc_compile.site_choice import Choice

_INLINED = (
    "a model that mhc_compile converts at its first call is inside a larger fullgraph compilation before that call; "
    "legal: a compilation of the converted model by itself. Next: call the model once, and leave fullgraph out"
)


@dataclass(frozen=True)
class Pending:
    """A conversion that waits for the first call: the class of the model, what converts it, and what was asked for."""

    original: type[nn.Module]
    convert: Callable[..., nn.Module]
    config: MHCConfig
    only: Choice | None
    skip: Choice | None


def convert_later(model: nn.Module, pending: Pending) -> nn.Module:
    """Let the model convert itself when it is called."""
    model.__dict__[PENDING] = pending
    model.__class__ = pending_class(pending.original)
    return model


def forget(model: nn.Module) -> nn.Module:
    """Undo `convert_later`."""
    model.__class__ = model.__dict__.pop(PENDING).original
    return model


@_torch.paused
def convert_now(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Convert a waiting model for its call; after an error it waits on."""
    pending: Pending = model.__dict__[PENDING]
    forget(model)
    try:
        pending.convert(model, pending.config, pending.only, pending.skip, args, kwargs)
    except BaseException:
        convert_later(model, pending)
        raise


@one_for_each
def pending_class(original: type[nn.Module]) -> type[nn.Module]:
    """The original class with a forward that converts, and without the methods that give parameters or state."""

    @like(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        convert_now(self, args, kwargs)
        return type(self).forward(self, *args, **kwargs)

    _torch.outside_dynamo(forward, _INLINED)
    # named_modules: a parent collects the parameters of its children through it
    guarded = ("named_parameters", "named_modules", "state_dict", "load_state_dict", "save_pretrained")
    body = {name: _too_early(name, getattr(original, name)) for name in guarded if hasattr(original, name)}
    return subclass(original, {"forward": forward, **body}, rebuilt)


def _too_early(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _torch.is_tracing():  # Dynamo walks over the modules of what it traces
            return original(self, *args, **kwargs)
        raise RewriteError(
            f"{name}() of a {type(self).__name__} that is not converted yet: its mHC parameters appear at its first "
            "call. Call it once before (an optimizer, a checkpoint or DDP needs them), or pass example_inputs to "
            "mhc_compile"
        )

    return method


def rebuilt(original: type[nn.Module]) -> nn.Module:
    """An empty waiting model for pickle and copy to fill."""
    made = pending_class(original)
    return made.__new__(made)
