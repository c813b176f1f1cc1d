"""The form of a site: which parameters it has, of what shapes, and what they start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mhc_compile.kernels.manifold_ops  # noqa: F401 - registers the ops
from mhc_compile.config import PARTS, MHCConfig
from mhc_compile.constraints import CONSTRAINTS, Constraint

mhc = torch.ops.mhc

_OWN_STREAM = 0.7  # of pre, with init="identity"; the other streams share the rest


@dataclass(frozen=True)
class SiteForm:
    """What tells the sites of a conversion from those of another, as far as one site is concerned.

    The fields are those of MHCConfig. A site has the columns of those coefficients that are not fixed: pre (n), post
    (n) and the logits of res.
    """

    n: int
    constraint: str = "sinkhorn"
    fixed: tuple[str, ...] = ()
    dynamic: bool = True
    iterations: int = 20
    eps: float = 1e-6
    implicit: bool = False

    @classmethod
    def of(cls, config: MHCConfig, constraint: str = "") -> SiteForm:
        """That of a conversion's sites; `constraint` where a site has one of its own."""
        return cls(
            config.n,
            constraint or config.constraint,
            config.fixed,
            config.dynamic,
            config.iterations,
            config.eps,
            config.implicit_gradient,
        )

    @property
    def mixing(self) -> Constraint:
        """Its row in the table of constraints; a fixed res is the identity."""
        return CONSTRAINTS["identity" if "res" in self.fixed else self.constraint]

    @property
    def logits(self) -> int:
        """How many numbers res is made from."""
        return self.mixing.count(self.n)

    @property
    def columns(self) -> dict[str, int]:
        """How many columns each coefficient has that is learned, in their order."""
        sizes = zip(PARTS, (self.n, self.n, self.logits), strict=True)
        return {part: size for part, size in sizes if size and part not in self.fixed}

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return ("phi", "alpha", "bias") if self.dynamic else ("bias",)

    def shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, for streams of `features`.

        phi is [n C, columns]; where coefficients are not bounded (Hyper-Connections) it is applied to each stream by
        itself: [C, 1 + 1 + n].
        """
        columns = sum(self.columns.values())
        phi = (self.n * features, columns)
        if not self.gating.bounded:
            phi = (features, columns // self.n)
        every = {"phi": phi, "alpha": (len(self.columns),), "bias": (columns,)}
        return {name: every[name] for name in self.parameters}

    @property
    def gating(self) -> Constraint:
        """The row that says how pre and post are bounded: that of the constraint, also when res is fixed."""
        return CONSTRAINTS[self.constraint]

    @property
    def has_kernel(self) -> bool:
        """`mhc::coefficients` computes its coefficients: all that are learned, of the streams, by sigmoids."""
        nothing_else = self.dynamic and not {"pre", "post"} & set(self.fixed)
        return nothing_else and self.gating.bounded and self.logits in (0, self.n * self.n)

    # ------------------------------------------------------------------------------------------ its ops

    @property
    def read(self) -> tuple[Any, tuple[Any, ...]]:
        """The op that gives pre, post and the logits, and its arguments behind streams, phi, alpha and bias."""
        if self.has_kernel:
            return mhc.coefficients.default, (self.eps,) if self.logits else (self.eps, 0.0, 2.0, 0.0, 2)
        learned = ("pre" not in self.fixed, "post" not in self.fixed)
        return mhc.gates.default, (self.eps, self.logits, *learned, self.gating.bounded)

    @property
    def mix(self) -> tuple[Any, tuple[Any, ...]] | None:
        """The op that makes res of the logits, and its other arguments; None where res is I."""
        if not self.logits:
            return None
        if self.constraint == "sinkhorn":
            return mhc.sinkhorn.default, (self.iterations, 0.0, False, True) if self.implicit else (self.iterations,)
        return mhc.constrain.default, (self.constraint, self.n)

    # ------------------------------------------------------------------------------------------ initial values

    def bias(self, init: str, stream: int) -> Tensor:
        """The initial bias, float64; `stream` is the site's own one."""
        start = {
            "pre": self._pre(init, stream),
            "post": torch.full((self.n,), 0.0 if self.gating.bounded else 1.0, dtype=torch.float64),
            "res": self.mixing.start(self.n),
        }
        if init != "identity" and not self.mixing.free_start:
            start["res"] = torch.zeros_like(start["res"])
        return torch.cat([start[part] for part in self.columns])

    def _pre(self, init: str, stream: int) -> Tensor:
        pre = torch.full((self.n,), (1 - _OWN_STREAM) / (self.n - 1), dtype=torch.float64)
        pre[stream] = _OWN_STREAM
        if init == "identity":
            return pre.logit() if self.gating.bounded else pre
        # Hyper-Connections begin by reading one stream alone
        return torch.zeros_like(pre) if self.gating.bounded else (pre == _OWN_STREAM).double()

    def alpha(self, init: str) -> float:
        """The initial alpha."""
        return 1.0 if init == "deepseek_v4" else 0.0 if self.draws_phi(init) and init == "identity" else 0.01

    def draws_phi(self, init: str) -> bool:
        """phi starts random, not at zero.

        With pre fixed, nothing else would ever tell the streams apart; with init `identity` alpha is then 0 instead.
        """
        return init != "identity" or "pre" in self.fixed

    def phi_std(self, init: str, features: int) -> float:
        """Standard deviation of a random phi: z / r has unit variance, but for `deepseek_v4`."""
        return 0.02 if init == "deepseek_v4" else self.shapes(features)["phi"][0] ** -0.5
