"""Adaptive gradient clipping, with a threshold of their own for the mHC parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.errors import ConfigError, wrong
from mhc_compile.gradients import norm, split

_KEYS = {"steps", "own", "mhc"}


@dataclass(frozen=True)
class Clipped:
    """What one call of AdaptiveClip saw and did: 0-d tensors, on the device of the gradients.

    own, mhc: L2 norms before clipping, of the model's own parameters and of the mHC parameters; own_scale, mhc_scale:
    what the gradients were multiplied by, at most 1.
    """

    own: Tensor
    mhc: Tensor
    own_scale: Tensor
    mhc_scale: Tensor


class AdaptiveClip:
    """Clips gradients against a moving average of their own recent norms, mHC parameters apart from all others.

    ::

        clip = AdaptiveClip(model)
        loss.backward()
        clip()
        optimizer.step()

    For the gradients g_t of a group, the moving average a of their norms, and the clipped gradients h_t::

        t < warm_up:   h_t = g_t min(1, max_norm / |all gradients|)
        afterwards:    h_t = g_t min(1, factor a_{t-1} / |g_t|)
        always:        a_t = momentum a_{t-1} + (1 - momentum) |h_t|,  a_0 = |h_0|

    This is AdaGC (arXiv 2502.11034) for two groups instead of each tensor: the gradients of mHC parameters, of which
    there are few, say nothing in the norm of a large model, and their spikes would go unseen. Two things differ. AdaGC
    takes the smallest norm of the warm-up for a; those of mHC parameters start near zero with init="identity" (streams
    are equal) and grow, and that threshold would hold them down. For the same reason factor and momentum are 2 and 0.9
    here (1.05 and 0.98 there), so that a threshold can grow by a tenth each step; a spike still passes as twice the
    average at most. (ZClip, arXiv 2504.02507, clips by the z-score of the norm of all gradients.)
    Norms that are zero or not finite change nothing: a loss scaler skips those steps. Shards (FSDP2) are summed over
    processes, all of which have to call it; nothing waits for a device.

    model: a converted model, or a wrapper that holds one; like an optimizer, make it after what exchanges parameters
    (`fully_shard`). momentum: in [0, 1). factor: > 0. warm_up: steps, >= 0. max_norm: > 0, in units of the gradient.
    Raises ConfigError for other values, RewriteError for a model that is not converted.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.9,
        factor: float = 2.0,
        *,
        warm_up: int = 100,
        max_norm: float = 1.0,
    ) -> None:
        parts = split(model)
        if not _is_number(momentum) or not 0 <= momentum < 1:
            raise ConfigError(wrong("momentum", repr(momentum), "a number in [0, 1)", "0.9 is the default"))
        for name, value in (("factor", factor), ("max_norm", max_norm)):
            if not _is_number(value) or not 0 < value < math.inf:
                step = "factor=2.0 and max_norm=1.0 are the defaults"
                raise ConfigError(wrong(name, repr(value), "a finite number > 0", step))
        if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 0:
            raise ConfigError(wrong("warm_up", repr(warm_up), "an integer >= 0", "100 is the default"))
        self.momentum, self.factor, self.warm_up, self.max_norm = momentum, factor, warm_up, max_norm
        self._groups = {"own": parts.own, "mhc": parts.mhc}
        self._averages: dict[str, Tensor] = {}  # infinite until there is a norm
        self._steps = 0

    @torch.no_grad()
    def __call__(self) -> Clipped:
        """Clip the gradients that the parameters hold now, in place, and give their norms."""
        norms = self._norms()
        whole = torch.stack(list(norms.values())).norm()
        scales: dict[str, Tensor] = {}
        for name, found in norms.items():
            average = self._averages.get(name, torch.tensor(math.inf)).to(found)
            warming = self._steps < self.warm_up
            excess = whole / self.max_norm if warming else found / (self.factor * average)
            counts = found.isfinite() & (found > 0) & excess.isfinite()
            excess = torch.where(counts, excess, 0.0)
            torch.nn.utils.clip_grads_with_norm_(self._groups[name], 1.0, excess)
            scales[name] = 1 / excess.clamp(min=1)
            clipped = found * scales[name]
            moved = torch.where(average.isinf(), clipped, torch.lerp(clipped, average, self.momentum))
            self._averages[name] = torch.where(counts, moved, average)
        self._steps += 1
        return Clipped(norms["own"], norms["mhc"], scales["own"], scales["mhc"])

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and the averages, as 0-d tensors."""
        infinite = torch.tensor(math.inf)
        return {"steps": self._steps, **{name: self._averages.get(name, infinite).clone() for name in self._groups}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as after the step at which `state_dict` was taken. ConfigError for another state."""
        if not isinstance(state, Mapping) or state.keys() != _KEYS:
            found = f"one with {', '.join(map(str, state)) or 'nothing'}" if isinstance(state, Mapping) else repr(state)
            legal, step = "one with steps, own and mhc", "pass what state_dict() of an AdaptiveClip gave"
            raise ConfigError(wrong("the state", found, legal, step))
        self._steps = int(state["steps"])
        self._averages = {name: torch.as_tensor(state[name], dtype=torch.float32).clone() for name in self._groups}

    def _norms(self) -> dict[str, Tensor]:
        """Norms of both groups in fp32, on one device; 0 for one without gradients."""
        found = {name: norm(parameters) for name, parameters in self._groups.items()}
        device = next((value.device for value in found.values() if value is not None), torch.device("cpu"))
        zero = torch.zeros((), device=device)
        return {name: zero if value is None else value.to(zero) for name, value in found.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
