"""A head: n streams become one with weights of their own for each token, ``y = sum_i pre_i X_i``.

It is a site without a merge: its phi has the n columns of pre and no others (DeepSeek-V4, Hunyuan V4).
"""

from __future__ import annotations

from torch import Tensor

from mhc_compile.errors import ConfigError, wrong
from mhc_compile.kernels.triton_convention import HEAD, Coefficients, Convention, SiteGradients
from mhc_compile.kernels.triton_site_backward import site_backward


def head(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    convention: Convention = HEAD,
    packed: Tensor | None = None,
) -> tuple[Tensor, Coefficients]:
    """y [..., C] from streams [..., n, C], phi [n C, n], alpha [1] and bias [n]; and what the backward needs."""
    from mhc_compile.kernels.triton_coefficients import read

    _check(convention)
    return read(streams, phi, alpha, bias, convention, packed)


def head_backward(
    grad: Tensor,
    streams: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor],
    site: Coefficients,
    convention: Convention = HEAD,
    packed: Tensor | None = None,
) -> SiteGradients:
    """The gradients of streams, phi, alpha and bias, from that of y."""
    _check(convention)
    return site_backward(streams, parameters, site, convention, du=grad, packed=packed)


def _check(convention: Convention) -> None:
    if convention.mix != "none":
        raise ConfigError(wrong("convention", convention, "one with post=False and res='none'", "use HEAD"))
