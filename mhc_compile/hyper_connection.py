"""The parameters of one residual site, their initialisation, and the coefficients they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.config import INITS, MHCConfig
from mhc_compile.constraints import MAX_STREAMS
from mhc_compile.errors import ConfigError, wrong
from mhc_compile.kernels import ops
from mhc_compile.site_form import SiteForm


class HyperConnection(nn.Module):
    """One site of manifold-constrained hyper-connections (arXiv 2512.24880, eq. 14 to 19).

    n: streams, >= 2 (one stream needs no parameters: the site is the plain residual add).
    features: C, the width of one stream.
    stream: the site's own stream, taken modulo n; with ``init="identity"`` the one it mostly reads.
    init: one of

    - ``"identity"`` keeps the function of a converted model.  phi 0, alpha 0.01, post 1, pre 0.7 for the
      site's own stream with 0.3 shared by the others (the sum is 1; equal values would keep all streams
      equal for ever), res 0.9 on the diagonal and 0.1 / (n - 1) off it (``"orthogonal"``: I).  With pre fixed,
      phi is random and alpha 0 instead.
    - ``"paper"`` trains from scratch.  alpha 0.01, bias 0 (pre 1/2, post 1, res uniform), phi normal with
      standard deviation ``1 / sqrt(n C)``: z / r then has unit variance at any width, and alpha is the size
      of the dynamic part.
    - ``"deepseek_v4"``: phi normal(0, 0.02), bias 0, alpha 1.

    iterations: of Sinkhorn.  eps: added to the mean square, units of streams squared.  implicit_gradient: of
    Sinkhorn at its fixed point, instead of through the iterations.

    constraint, fixed, dynamic: as in MHCConfig.

    Parameters: phi [n C, n n + 2 n], alpha [3], bias [n n + 2 n], columns pre (n), post (n), res (n n,
    row-major); fewer or more as constraint and fixed have it, and the bias alone with ``dynamic=False``.
    They are float32 and stay so, bit for bit, when a model is cast to a narrower dtype;
    ``.double()`` makes them float64, for float64 streams.  They should take no weight decay.  Raises
    ConfigError for an illegal option.
    """

    def __init__(
        self,
        n: int,
        features: int,
        *,
        stream: int = 0,
        init: str = "identity",
        iterations: int = 20,
        eps: float = 1e-6,
        implicit_gradient: bool = False,
        constraint: str = "sinkhorn",
        fixed: tuple[str, ...] = (),
        dynamic: bool = True,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        _whole("n", n, 2, "one stream is the plain residual add")
        _whole("features", features, 1, "the width C of one stream")
        _whole("stream", stream, 0, "the number of the site")
        _whole("iterations", iterations, 1, "the paper uses 20")
        if init not in INITS:
            step = "'identity' keeps the function of a converted model"
            raise ConfigError(wrong("init", repr(init), ", ".join(map(repr, INITS)), step))
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
            raise ConfigError(wrong("eps", repr(eps), "a finite number > 0", "the default is 1e-6"))
        self.n = n
        self.features = features
        self.stream = stream % n
        self.init = init
        self.iterations = iterations
        self.eps = eps
        checked = MHCConfig(
            n=min(n, MAX_STREAMS),
            init=init,
            implicit_gradient=implicit_gradient,
            constraint=constraint,
            fixed=fixed,
            dynamic=dynamic,
        )
        self.implicit_gradient = implicit_gradient
        self.constraint, self.fixed, self.dynamic = constraint, checked.fixed, dynamic
        self.phi: nn.Parameter | None
        self.alpha: nn.Parameter | None
        self.bias: nn.Parameter
        shapes = self.form.shapes(features)
        for name in ("phi", "alpha", "bias"):
            # The dtype is explicit: models are often built under a 16-bit default.
            made = torch.empty(shapes[name], dtype=torch.float32, device=device) if name in shapes else None
            self.register_parameter(name, None if made is None else nn.Parameter(made))
        self.reset_parameters()

    @property
    def form(self) -> SiteForm:
        """What its options say of its parameters and ops."""
        options = (self.constraint, self.fixed, self.dynamic, self.iterations, self.eps, self.implicit_gradient)
        return SiteForm(self.n, *options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to the values of ``init``."""
        form = self.form
        with torch.device("cpu"):  # values to copy, whatever device is the default
            start = form.bias(self.init, self.stream)
        self.bias.copy_(start)
        if self.phi is None or self.alpha is None:
            return
        self.alpha.fill_(form.alpha(self.init))
        if form.draws_phi(self.init):
            self.phi.normal_(0.0, form.phi_std(self.init, self.features))
        else:
            self.phi.zero_()

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams [..., n, C] -> pre [..., n], post [..., n], res [..., n, n], float32 (float64 if phi is).

        ::

            pre = sigmoid(pre~)    post = 2 sigmoid(post~)    res = Sinkhorn(res~), or what the constraint makes
        """
        form = self.form
        ops._refuse_transforms(streams, self.bias)
        (read, rest), mix = form.read, form.mix
        pre, post, logits = read(streams, self.phi, self.alpha, self.bias, *rest)
        if mix is None:
            return pre, post, form.mixing.res(logits, self.n)
        make, others = mix
        return pre, post, make(logits, *others)

    def extra_repr(self) -> str:
        return (
            f"n={self.n}, features={self.features}, stream={self.stream}, init={self.init!r}, "
            f"iterations={self.iterations}, eps={self.eps:g}"
            + (f", constraint={self.constraint!r}" if self.constraint != "sinkhorn" else "")
            + (f", fixed={self.fixed}" if self.fixed else "")
            + ("" if self.dynamic else ", dynamic=False")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Every cast and move of a module comes through here: moves are kept, casts to a narrower dtype are
        # not.
        return super()._apply(lambda tensor: _widest(tensor, fn(tensor)), recurse)  # type: ignore[no-untyped-call]


def _whole(name: str, value: object, low: int, step: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(wrong(name, repr(value), f"an integer >= {low}", step))


def _widest(before: Tensor, after: Tensor) -> Tensor:
    """``after``, or, if it was rounded, ``before`` on its device in float32."""
    if not before.is_floating_point() or after.dtype in (torch.float32, torch.float64):
        return after
    return before.to(device=after.device, dtype=torch.float32)
