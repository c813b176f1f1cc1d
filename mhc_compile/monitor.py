"""Watch the mHC of a model while it trains: gains, streams, coefficients and gradients of every k-th step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from mhc_compile import _torch, gradients, monitor_picture
from mhc_compile.conversion import STATE, conversion
from mhc_compile.errors import ConfigError, RewriteError, wrong
from mhc_compile.gradients import GradientNorms, the_converted
from mhc_compile.health import MAX_GAIN, Health, StabilityWarning
from mhc_compile.monitor_sample import Sample, sample_of
from mhc_compile.observation import ObservingBackend, SiteCoefficients, sites_of_call


class Monitor:
    """Samples the diagnostics of a converted model around a training loop of the user's own.

    ::

        with Monitor(model, every=100) as monitor:
            for step, batch in enumerate(batches):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if monitor.sampled:
                    wandb.log(monitor.log(), step=step)
        monitor.plot("gains.png")

    What is sampled: of each site, and of the products of mixing matrices from it to its trunk's end, the forward and
    backward gain (figures 3, 7 and 8 of arXiv 2512.24880) and the distance to doubly stochastic; how similar the
    streams are; how much each is read and written; and the norms of the gradients. Scales, norms and masks that stand
    on the trunk between sites are not in the products. `StabilityWarning`s tell, once for each place, of a composite
    gain beyond `max_gain`, of streams that became equal, and of a saturated or unbalanced Sinkhorn.

    A step is a call of the model in train mode with gradients on; calls number 0, every, 2 every, ... are sampled. With
    gradient accumulation that is one microbatch, and `every` counts microbatches. What an activation checkpoint
    computes again in the backward is no call. With `evaluation=True` calls in eval mode, or without gradients, count
    too.

    A sampled call is run once more before it runs: without gradients, op by op, on copies of its buffers and arguments,
    and only as far as the last site; the random state is put back. Training goes on bit for bit as without a Monitor.
    Dynamo traces the model once more for it. Gradients are read when an optimizer of torch's that holds parameters of
    the model makes the next step (after clipping, if there is any), or where `gradients()` is called.

    model: a converted model, or a wrapper that holds one (DDP, torch.compile). Under FSDP2, and where the forward holds
    collectives, every process needs a Monitor. max_gain: bound of the composite gain. warm_up: calls after which
    streams that never differed are warned of, too.
    Raises ConfigError for a wrong option or n = 1, RewriteError when the model is not converted (any more).
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        evaluation: bool = False,
        max_gain: float = MAX_GAIN,
        warm_up: int = 1000,
    ) -> None:
        _whole("every", every, 1, "every=100 costs under 2 % of a step")
        _whole("warm_up", warm_up, 0, "warm_up=1000 is the default")
        if isinstance(max_gain, bool) or not isinstance(max_gain, int | float) or not max_gain >= 1:
            raise ConfigError(wrong("max_gain", repr(max_gain), "a number >= 1", f"{MAX_GAIN} is the default"))
        self._given, self._model = model, the_converted(model)
        self._state = conversion(self._model)
        if self._state.record.config.n == 1:
            step = "with one stream there is nothing to watch"
            raise ConfigError(wrong("n", 1, "a model converted with n >= 2", step))
        self.every, self.evaluation = every, evaluation
        self.history: list[Sample] = []
        self.sampled = False
        self._calls = 0
        self._health = Health(max_gain, warm_up)
        self._forwards: dict[str, Callable[..., Any]] = {}  # by the path of the part that is called
        self._waiting: Sample | None = None  # for gradients
        self._hook: Any = None

    def __enter__(self) -> Monitor:
        """Start sampling. ConfigError when this Monitor runs already, RewriteError when the model was restored."""
        self._check()
        if self._hook is not None:
            legal = "one that is not entered"
            raise ConfigError(wrong("the Monitor", "entered already", legal, "make another one: Monitor(model)"))
        self._state.observers.append(self._before_call)
        self._hook = register_optimizer_step_pre_hook(self._before_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop sampling; `log`, `history` and `plot` stay."""
        self._state.observers.remove(self._before_call)
        self._hook.remove()
        self._hook, self._waiting, self.sampled = None, None, False
        self._forwards.clear()

    def log(self, sites: bool = True) -> dict[str, float]:
        """The last sample as a flat dict of floats, for any logger; empty before the first.

        sites: also what is known of each site (about 30 values each), beside the trunks' and the model's.
        """
        return self.history[-1].flat(sites) if self.history else {}

    def gradients(self) -> GradientNorms | None:
        """Take the norms of the gradients as they are now for the last sample; None when it has them already.

        To be called between backward and clipping, or before the step of an optimizer that is not torch's. Costs
        nothing on steps that are not sampled.
        """
        self._check()
        if self._waiting is None:
            return None
        found = gradients.norms(self._given)
        if found is not None:
            self._waiting.gradients, self._waiting = found, None
        return found

    def plot(self, path: str | Path) -> None:
        """Draw the last sample's gains by depth and matrices, and the run, into a file (matplotlib).

        Raises ConfigError before the first sample, without matplotlib, or for a suffix it does not know.
        """
        if not self.history:
            legal = "a Monitor with a sample"
            raise ConfigError(wrong("the Monitor", "empty", legal, "call the model in train mode, within the Monitor"))
        monitor_picture.draw(self.history, Path(path), type(self._model).__name__)

    # ------------------------------------------------------------------------------------------ hooks

    @_torch.paused
    def _before_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], part: str) -> None:
        if _torch.in_backward() or not (self.evaluation or (model.training and torch.is_grad_enabled())):
            return
        step = self._calls
        self._calls += 1
        self.sampled = step % self.every == 0
        if not self.sampled:
            return
        sample = sample_of(step, self._state.with_hooks(self._look, part, model, args, kwargs))
        self.history.append(sample)
        self._waiting = sample
        for message in self._health.findings(sample):
            warnings.warn(message, StabilityWarning, stacklevel=2)

    def _look(
        self, part: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[SiteCoefficients]:
        if part not in self._forwards:
            self._forwards[part] = self._state.compiled_by(ObservingBackend, model, part)
        return sites_of_call(self._forwards[part], model, args, kwargs)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._waiting is None:
            self._check()
            return
        own = {id(parameter) for parameter in self._given.parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            self.gradients()

    def _check(self) -> None:
        if self._model.__dict__.get(STATE) is not self._state:
            name = type(self._model).__name__
            found, legal = "restored since its Monitor was made", "the conversion as it was then"
            step = "restore it after the Monitor, or make a Monitor of the model as it is converted now"
            raise RewriteError(wrong(name, found, legal, step))


def _whole(name: str, value: object, low: int, step: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(wrong(name, repr(value), f"an integer >= {low}", step))
