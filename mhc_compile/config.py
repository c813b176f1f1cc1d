"""What a conversion is asked to do, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mhc_compile.errors import ConfigError, wrong

INITS = ("identity", "paper", "deepseek_v4")
BACKENDS = ("inductor", "aot_eager", "eager")
MAX_STREAMS = 64


@dataclass(frozen=True)
class MHCConfig:
    """The options of a conversion.

    n: number of streams, 1 to 64; with 1 the model keeps its plain adds and gets no parameters.
    init: `identity` keeps the model's function at step 0; `paper` and `deepseek_v4` are for training from scratch.
    iterations: Sinkhorn iterations, >= 1 (the paper uses 20).
    eps: added to the mean square of the streams before the root, > 0.
    implicit_gradient: Sinkhorn's gradient is that of its fixed point instead of the unrolled iterations' (near it for
        logits of std 1, far from it from std 3 on); such sites have no fused kernel.
    tie_shared: a layer that is applied several times shares one site's parameters between its applications;
        otherwise each application has its own.
    backend: what compiles the rewritten graph: `inductor`, `aot_eager` or `eager`.

    Raises ConfigError for an illegal value.
    """

    n: int = 4
    init: str = "identity"
    iterations: int = 20
    eps: float = 1e-6
    implicit_gradient: bool = False
    tie_shared: bool = False
    backend: str = "inductor"

    def __post_init__(self) -> None:
        _whole("n", self.n, 1, MAX_STREAMS, "every published model has n=4")
        _whole("iterations", self.iterations, 1, 1000, "the paper uses 20")
        _one_of("init", self.init, INITS, "'identity' keeps the function of the model")
        _one_of("backend", self.backend, BACKENDS, "'inductor' is the fast one, 'eager' the one to debug with")
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not 0 < self.eps < math.inf:
            raise ConfigError(wrong("eps", repr(self.eps), "a finite number > 0", "the default is 1e-6"))
        for name in ("implicit_gradient", "tie_shared"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(wrong(name, repr(getattr(self, name)), "True or False", "the default is False"))


def _whole(name: str, value: object, low: int, high: int, step: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(wrong(name, repr(value), f"an integer from {low} to {high}", step))


def _one_of(name: str, value: object, legal: tuple[str, ...], step: str) -> None:
    if value not in legal:
        raise ConfigError(wrong(name, repr(value), "one of " + ", ".join(map(repr, legal)), step))
