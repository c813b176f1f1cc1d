"""What a conversion is asked to do, validated once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mhc_compile.constraints import CONSTRAINTS, MAX_STREAMS
from mhc_compile.errors import ConfigError, wrong

INITS = ("identity", "paper", "deepseek_v4")
BACKENDS = ("inductor", "aot_eager", "eager")
PARTS = ("pre", "post", "res")  # the coefficients of a site, as the paper's table 1 takes them away

# Every field of MHCConfig is in one of these. The first decide what given weights compute: weights go from one
# conversion to another where they are the same. The others say what parameters start from, how gradients are made, and
# what compiles.
FUNCTION = ("n", "constraint", "iterations", "eps", "tie_shared", "fixed", "dynamic", "single_pass")
NO_FUNCTION = ("init", "implicit_gradient", "backend")


@dataclass(frozen=True)
class MHCConfig:
    """The options of a conversion.

    n: number of streams, 1 to 64; with 1 the model keeps its plain adds and gets no parameters.
    init: `identity` keeps the model's function at step 0; `paper` and `deepseek_v4` are for training from scratch.
    constraint: what keeps the matrix that mixes the streams in bounds, a name of `mhc_compile.constraints`: `sinkhorn`
        (the paper), `lite`, `orthogonal`, `spectral`, `identity`, `unconstrained` (Hyper-Connections).
    iterations: Sinkhorn iterations, >= 1 (the paper uses 20).
    eps: added to the mean square of the streams before the root, > 0.
    implicit_gradient: Sinkhorn's gradient is that of its fixed point instead of the unrolled iterations' (near it for
        logits of std 1, far from it from std 3 on); such sites have no fused kernel.
    fixed: coefficients that are constants, for the ablations of the paper's table 1: `pre` at 1/n, `res` at I.
    dynamic: coefficients depend on the streams; otherwise they are learned constants, without phi and alpha.
    single_pass: each branch reads with the `pre` of the site before, and the exit with that of the last one, so that a
        state of the streams is read once:  u_0 = x,  u_l+1 = sum_i pre_l,i X_l+1,i,  y = sum_i pre_L-1,i X_L,i.
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
    constraint: str = "sinkhorn"
    fixed: tuple[str, ...] = ()
    dynamic: bool = True
    single_pass: bool = False

    def __post_init__(self) -> None:
        _whole("n", self.n, 1, MAX_STREAMS, "every published model has n=4")
        _whole("iterations", self.iterations, 1, 1000, "the paper uses 20")
        _one_of("init", self.init, INITS, "'identity' keeps the function of the model")
        _one_of("backend", self.backend, BACKENDS, "'inductor' is the fast one, 'eager' the one to debug with")
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not 0 < self.eps < math.inf:
            raise ConfigError(wrong("eps", repr(self.eps), "a finite number > 0", "the default is 1e-6"))
        for name in ("implicit_gradient", "tie_shared", "dynamic", "single_pass"):
            if not isinstance(getattr(self, name), bool):
                default = getattr(MHCConfig, name)
                raise ConfigError(wrong(name, repr(getattr(self, name)), "True or False", f"the default is {default}"))
        object.__setattr__(self, "fixed", checked_fixed(self.fixed))
        self.check_constraint(self.constraint)

    def check_constraint(self, constraint: object) -> None:
        """Raise ConfigError for a constraint that does not go with the other options."""
        if not isinstance(constraint, str) or constraint not in CONSTRAINTS:
            legal = "one of " + ", ".join(map(repr, CONSTRAINTS))
            raise ConfigError(wrong("constraint", repr(constraint), legal, "'sinkhorn' is the paper's"))
        entry = CONSTRAINTS[constraint]
        if self.n > entry.most:
            found, legal = f"{constraint!r} with n={self.n}", f"n up to {entry.most}, for its {entry.count_text} logits"
            raise ConfigError(wrong("constraint", found, legal, "take 'sinkhorn', which takes any n"))
        if self.implicit_gradient and constraint != "sinkhorn":
            step = "leave implicit_gradient out"
            raise ConfigError(wrong("implicit_gradient", f"True with {constraint!r}", "True with 'sinkhorn'", step))
        if not entry.bounded and self.init == "deepseek_v4":
            step = "'paper' starts as Hyper-Connections do"
            found = f"'deepseek_v4' with {constraint!r}, whose post would start at 0"
            raise ConfigError(wrong("init", found, "'identity' or 'paper'", step))
        self._check_divergence(constraint)

    def _check_divergence(self, constraint: str) -> None:
        """Refuse what leaves all streams equal for ever: a model of one stream, with the cost of n."""
        fixed, rows = {*self.fixed}, "rows" in CONSTRAINTS[constraint].promises or "res" in self.fixed
        if self.n == 1:
            return
        if "post" in fixed and ("pre" in fixed or rows):
            legal = "post fixed alone, with a constraint whose rows need not sum to 1: 'unconstrained', 'orthogonal'"
            found = f"{self.fixed} with {constraint!r}: every stream is given the same, and all stay equal for ever"
            raise ConfigError(wrong("fixed", found, legal, "leave post free"))
        if not self.dynamic and "pre" in fixed:
            found = "False with pre fixed: nothing tells the streams apart, and all stay equal for ever"
            raise ConfigError(wrong("dynamic", found, "False with pre free", "fix res instead, or leave dynamic True"))
        if not self.dynamic and self.init != "identity" and CONSTRAINTS[constraint].bounded:
            found = f"{self.init!r} with dynamic=False: it starts all streams alike, and they stay equal for ever"
            raise ConfigError(wrong("init", found, "'identity'", "its pre differs from stream to stream"))


def checked_fixed(fixed: object) -> tuple[str, ...]:
    """Names of coefficients in their own order; ConfigError for anything else, and for all three."""
    names = list(fixed) if isinstance(fixed, Iterable) and not isinstance(fixed, str) else [fixed]
    if not all(name in PARTS for name in names) or len(set(names)) == len(PARTS):
        legal = "a tuple of one or two of " + ", ".join(map(repr, PARTS))
        raise ConfigError(wrong("fixed", repr(fixed), legal, "fixed=('res',) is the paper's first ablation"))
    return tuple(part for part in PARTS if part in names)


def _whole(name: str, value: object, low: int, high: int, step: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(wrong(name, repr(value), f"an integer from {low} to {high}", step))


def _one_of(name: str, value: object, legal: tuple[str, ...], step: str) -> None:
    if value not in legal:
        raise ConfigError(wrong(name, repr(value), "one of " + ", ".join(map(repr, legal)), step))
