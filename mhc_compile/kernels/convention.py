"""What the kernels of a site take and give: the convention of a model, the coefficients, the gradients.

No triton here: this may be imported where it is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_compile.errors import ConfigError, wrong

RES_FORMS = ("sinkhorn", "logits", "none")


def check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ConfigError(wrong("iterations", iterations, "an integer >= 1", "the paper uses 20"))


@dataclass(frozen=True)
class Convention:
    """::

        r    = sqrt(mean(X^2 over n C) + rms_eps)       z = vec(X) @ phi
        pre  = sigmoid(alpha_0 z_pre / r + b_pre) + pre_eps
        post = post_scale sigmoid(alpha_1 z_post / r + b_post) + post_eps        (if there is a post)
        res  = the logits alpha_2 z_res / r + b_res, through Sinkhorn or as they are, or no res

    ``rows_first``: Sinkhorn begins with rows and ends with columns.  ``divisor_eps``: see ``sinkhorn``.
    ``transposed``: res is [in, out], and the merge is ``X'_j = sum_i res_ij X_i + post_j f``.
    ``rounded``: post and res are rounded to streams' dtype where they multiply streams.
    ``implicit``: Sinkhorn's gradient is that of the fixed point, as if it had converged: near the unrolled one
    for logits of std 1, far from it for std 3 and more.
    """

    res: str = "sinkhorn"
    post: bool = True
    iterations: int = 20
    rows_first: bool = False
    divisor_eps: float = 0.0
    transposed: bool = False
    rms_eps: float = 1e-6
    pre_eps: float = 0.0
    post_scale: float = 2.0
    post_eps: float = 0.0
    rounded: bool = False
    implicit: bool = False

    def __post_init__(self) -> None:
        if self.res not in RES_FORMS:
            raise ConfigError(wrong("res", repr(self.res), ", ".join(map(repr, RES_FORMS)), "the paper has 'sinkhorn'"))
        check_iterations(self.iterations)
        if self.implicit and self.divisor_eps != 0:
            found = f"True with divisor_eps={self.divisor_eps}"
            raise ConfigError(wrong("implicit", found, "True with divisor_eps=0, or False", "unroll the backward"))
        if self.res != "none" and not self.post:
            raise ConfigError(wrong("post", False, "True where there is a res", "pass res='none' for a head"))

    @property
    def groups(self) -> int:
        """How many scales alpha has: pre, post, res."""
        return 1 + self.post + (self.res != "none")

    def columns(self, n: int) -> int:
        """How many columns phi has; n may be a symbol, which multiplies no bool."""
        return n * (2 if self.post else 1) + (n * n if self.res != "none" else 0)

    @property
    def mix(self) -> str:
        """How ``merge`` has to read res."""
        if self.res == "none":
            return "identity" if self.post else "none"
        return "transposed" if self.transposed else "given"


PAPER = Convention()
DEEPSEEK_V4 = Convention(rows_first=True, divisor_eps=1e-6, transposed=True, pre_eps=1e-6, rounded=True)
HUNYUAN_V4 = Convention(res="none", pre_eps=1e-6, post_eps=1e-6)
HEAD = Convention(res="none", post=False, pre_eps=1e-6)


def of_coefficients(
    eps: float, pre_eps: float = 0.0, post_scale: float = 2.0, post_eps: float = 0.0, groups: int = 3
) -> Convention:
    """That of the op ``mhc::coefficients``: ``groups`` 1 is pre alone, 2 pre and post, 3 res too, as logits."""
    return Convention(_res("logits", groups), groups > 1, 1, False, 0.0, False, eps, pre_eps, post_scale, post_eps)


def of_sinkhorn(
    iterations: int, divisor_eps: float = 0.0, rows_first: bool = False, implicit: bool = False
) -> Convention:
    """That of the op ``mhc::sinkhorn``."""
    return Convention(iterations=iterations, divisor_eps=divisor_eps, rows_first=rows_first, implicit=implicit)


def of_site(
    eps: float,
    iterations: int,
    pre_eps: float = 0.0,
    post_scale: float = 2.0,
    post_eps: float = 0.0,
    groups: int = 3,
    divisor_eps: float = 0.0,
    rows_first: bool = False,
    transposed: bool = False,
    rounded: bool = False,
) -> Convention:
    """That of the op ``mhc::read``, whose backward knows of the merge too."""
    form = (groups > 1, iterations, rows_first, divisor_eps, transposed)
    return Convention(_res("sinkhorn", groups), *form, eps, pre_eps, post_scale, post_eps, rounded)


def _res(form: str, groups: int) -> str:
    if groups not in (1, 2, 3):
        raise ConfigError(wrong("groups", groups, "1 (pre), 2 (and post), 3 (and res)", "the paper has all three"))
    return form if groups == 3 else "none"


@dataclass(frozen=True)
class Coefficients:
    """What a site computes from the streams, float32; ``z`` [columns, T] and ``r`` [T] are kept for its backward."""

    pre: Tensor
    post: Tensor | None
    res: Tensor | None
    z: Tensor
    r: Tensor


@dataclass(frozen=True)
class Before:
    """The merge that made a site's streams: its post [..., n] in float32, whether that is rounded, and f's dtype."""

    post: Tensor
    rounded: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class SiteGradients:
    """What the backward of a site gives; streams in their own dtype, the parameters in float32.

    ``f``: for the branch of the merge before, where the site's last pass made that too.  ``weights``: of what u was
    read with, where that is not the site's own pre.
    """

    streams: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    f: Tensor | None = None
    weights: Tensor | None = None
