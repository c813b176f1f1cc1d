"""Separate learning rates for pre, post and res, whose parameters lie side by side in one tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mhc_compile.config import PARTS
from mhc_compile.conversion import TREE
from mhc_compile.errors import ConfigError, wrong
from mhc_compile.gradients import the_converted
from mhc_compile.hyper_connection import HyperConnection

_Scales = tuple[float, float, float]


class UpdateScales:
    """What `scale_updates` set on an optimizer; `remove()` takes it off again."""

    def __init__(self, optimizer: Optimizer, scales: list[tuple[nn.Parameter, Tensor]]) -> None:
        self._scales = scales
        self._before: list[Tensor] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._keep),
            optimizer.register_step_post_hook(self._scale),
        ]

    def remove(self) -> None:
        """The optimizer steps as before."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _keep(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = [parameter.clone() for parameter, _ in self._scales]

    @torch.no_grad()
    def _scale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for (parameter, scale), before in zip(self._scales, self._before, strict=True):
            parameter.copy_(torch.lerp(before, parameter, scale))  # exact where the scale is 0 or 1
        self._before = []


def scale_updates(
    optimizer: Optimizer, model: nn.Module, *, pre: float = 1.0, post: float = 1.0, res: float = 1.0
) -> UpdateScales:
    """Multiply what each step of an optimizer changes in the parameters of pre, post and res, from now on.

    ::

        optimizer = AdamW(param_groups(model))
        scale_updates(optimizer, model, res=0.1)

    It is a learning rate for each part: the columns of phi and the entries of alpha and bias that belong to pre, post
    and res get ``p_new = p_old + scale * (p_stepped - p_old)``. They lie in one tensor, so that parameter groups cannot
    tell them apart, and scaling gradients would do nothing under Adam. For optimizers that treat each number alone
    (SGD, Adam, AdamW, Lion; weight decay included) it is what parameter groups of separate tensors would do; under
    those that treat a matrix as one (Muon, Adafactor) it scales what they make of it.

    A scale of 1 leaves its part as it is bit for bit, one of 0 freezes it. Steps keep a copy of the mHC parameters
    meanwhile. It is not in the optimizer's state_dict: call it again after a restart, and after `fully_shard`.

    pre, post, res: finite numbers >= 0. Raises ConfigError for another, or when the optimizer holds no mHC parameter of
    the model; RewriteError for a model that is not converted.
    """
    for name, value in (("pre", pre), ("post", post), ("res", res)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise ConfigError(wrong(name, repr(value), "a finite number >= 0", "1.0 leaves its updates as they are"))
    if not isinstance(optimizer, Optimizer):
        step = "pass the optimizer of torch that a wrapper holds (accelerate: optimizer.optimizer)"
        raise ConfigError(wrong("optimizer", f"a {type(optimizer).__name__}", "a torch.optim.Optimizer", step))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    sites = [
        module for module in the_converted(model).get_submodule(TREE).modules() if isinstance(module, HyperConnection)
    ]
    found = [
        (parameter, _like(_of_part(site, name, parameter, (pre, post, res)), parameter))
        for site in sites
        for name, parameter in site.named_parameters()
        if id(parameter) in held
    ]
    if not found:
        step = "build the optimizer from param_groups(model) after mhc_compile(model)"
        raise ConfigError(wrong("the optimizer", "without mHC parameters of the model", "one that holds them", step))
    return UpdateScales(optimizer, found)


def _of_part(site: HyperConnection, name: str, parameter: nn.Parameter, scales: _Scales) -> Tensor:
    """The scales of a parameter's last axis, which holds those of pre, post and res that the site learns.

    alpha has one number for each; of the columns each has its share, in phi as in bias.
    """
    columns, axis = site.form.columns, parameter.shape[-1]
    every = sum(columns.values())
    sizes = [1 if name == "alpha" else count * axis // every for count in columns.values()]
    chosen = [scale for part, scale in zip(PARTS, scales, strict=True) if part in columns]
    return torch.tensor(chosen).repeat_interleave(torch.tensor(sizes))


def _like(scale: Tensor, parameter: nn.Parameter) -> Tensor:
    """A scale on the device, in the dtype and, for a DTensor, with the shards of its parameter."""
    scale = scale.to(device=parameter.device, dtype=parameter.dtype)
    if not hasattr(parameter, "device_mesh"):
        return scale
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    full = scale.expand(parameter.shape).contiguous()
    sharded: Tensor = distribute_tensor(full, parameter.device_mesh, parameter.placements)
    return sharded
