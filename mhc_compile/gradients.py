"""Norms of gradients: of all parameters, of the model's own, of mHC's, and of each site; right for shards, too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhc_compile.conversion import PENDING, TREE, conversion, is_converted
from mhc_compile.errors import RewriteError, wrong


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the gradients of one step.

    whole: of all parameters; own: of those that the model had before the conversion; mhc: of all sites' phi, alpha and
    bias; sites: of each site's.
    """

    whole: float
    own: float
    mhc: float
    sites: dict[str, float]


@dataclass(frozen=True)
class Split:
    """The trainable parameters of a converted model, or of what wraps it: its own, and those of each site."""

    own: list[nn.Parameter]
    sites: dict[str, list[nn.Parameter]]

    @property
    def mhc(self) -> list[nn.Parameter]:
        """The parameters of all sites."""
        return [parameter for site in self.sites.values() for parameter in site]


def the_converted(model: nn.Module) -> nn.Module:
    """The converted model that a module is, or that it wraps. RewriteError when it holds none, or several."""
    if not isinstance(model, nn.Module) or is_converted(model) or PENDING in model.__dict__:
        conversion(model)  # says what is wrong, if anything
        return model
    found = [module for module in model.modules() if is_converted(module)]
    if len(found) > 1:
        legal = "a module that holds one, as it is or wrapped (DDP, torch.compile)"
        kinds = ", ".join(type(module).__name__ for module in found)
        held = f"one with {len(found)} converted models ({kinds})"
        raise RewriteError(wrong(type(model).__name__, held, legal, "pass each of them by itself"))
    if not found:
        conversion(model)  # says what it is instead
    return found[0]


def split(model: nn.Module) -> Split:
    """The parameters that require a gradient, as they are now (wrappers such as `fully_shard` exchange them)."""
    converted = the_converted(model)
    sites = {
        site.name: [one for one in converted.get_submodule(f"{TREE}.{site.name}").parameters() if one.requires_grad]
        for site in conversion(converted).record.sites
    }
    held = {id(parameter) for site in sites.values() for parameter in site}
    own = [one for one in model.parameters() if one.requires_grad and id(one) not in held]
    return Split(own, sites)


def norm(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """The L2 norm of the gradients, 0-d and whole on every process; None when there is none.

    Shards (DTensor) are summed over processes, all of which have to call this.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds: dict[Any, list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault(_placement(grad), []).append(grad)
    norms = [_whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds.values()]
    if not norms:
        return None
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([one.float() for one in norms]))


def norms(model: nn.Module) -> GradientNorms | None:
    """The norms of the gradients that the parameters hold now; None when none holds one."""
    parts = split(model)
    every = [norm([*parts.own, *parts.mhc]), norm(parts.own), norm(parts.mhc), *map(norm, parts.sites.values())]
    if every[0] is None:
        return None
    zero = torch.zeros_like(every[0])
    values = torch.stack([(zero if one is None else one).to(zero) for one in every]).tolist()  # one transfer
    whole, own, mhc, *sites = values
    return GradientNorms(whole, own, mhc, dict(zip(parts.sites, sites, strict=True)))


def _placement(grad: Tensor) -> Any:
    return getattr(grad, "device_mesh", None)


def _whole(value: Tensor) -> Tensor:
    if dist.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(value, DTensor):
            full: Tensor = value.full_tensor()
            return full
    return value
