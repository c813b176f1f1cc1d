"""The backward of a site after its branch: from du and the gradients of the coefficients to dX and the parameters.

The whole backward of a site is three passes over its streams::

    merge_backward          G, X, f    -> df, dpost, dres              before the branch's backward
    coefficients_backward   du, X      -> d, pull                      after it; with Sinkhorn's backward
    streams_backward        G, du, X   -> dX, dphi, dalpha, dbias

The product ``sum_i res_ij G_i`` is never in memory by itself.  :func:`site_backward` is the second and third.
"""

from __future__ import annotations

from torch import Tensor

from mhc_compile.errors import ConfigError, wrong
from mhc_compile.kernels.convention import Coefficients, Convention, SiteGradients


def site_backward(
    streams: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor],
    site: Coefficients,
    convention: Convention,
    *,
    grad: Tensor | None = None,
    du: Tensor | None = None,
    grad_pre: Tensor | None = None,
    grad_post: Tensor | None = None,
    grad_res: Tensor | None = None,
    packed: Tensor | None = None,
) -> SiteGradients:
    """The gradients of streams [..., n, C], phi [n C, columns], alpha and bias.

    ``parameters`` are phi, alpha and bias, ``site`` what ``read`` kept.  ``grad`` [..., n, C] is the gradient of the
    merged streams, ``du`` [..., C] that of the branch's input, ``grad_post`` and ``grad_res`` what
    ``merge_backward`` returned, ``grad_pre`` what else pre received.  Any of these may be None, which is zero; with
    ``grad`` None, no merge, and the streams get the part through the coefficients and u alone (a head, or
    coefficients by themselves).
    """
    from mhc_compile.kernels.triton_coefficients import check_parameters
    from mhc_compile.kernels.triton_coefficients_backward import coefficients_backward
    from mhc_compile.kernels.triton_launch import check, check_streams
    from mhc_compile.kernels.triton_phi_backward import add_shares, phi_shares
    from mhc_compile.kernels.triton_project import pack
    from mhc_compile.kernels.triton_streams_backward import streams_backward
    from mhc_compile.kernels.triton_wide_backward import wide_backward

    _, n, features = check_streams(streams)
    lead, phi = tuple(streams.shape[:-2]), parameters[0]
    alpha, _ = check_parameters(streams, *parameters, convention)
    if grad is not None and convention.mix == "none":
        raise ConfigError(wrong("grad", "a tensor", "None, as this convention has no merge", "pass du alone"))
    if grad is not None:
        grad = check("grad", grad, "[..., n, C]", (*lead, n, features), streams, streams.dtype)
    if du is not None:
        du = check("du", du, "[..., C]", (*lead, features), streams, streams.dtype)
    streams = streams.contiguous()
    d, pull = coefficients_backward(streams, du, grad_pre, grad_post, grad_res, parameters, site, convention)
    reads = {
        "grad": grad,
        "du": du,
        "streams": streams,
        "pre": site.pre,
        "res": site.res if grad is not None else None,
        "d": d,
        "pull": pull,
        "r": site.r,
        "alpha": alpha,
        "packed": pack(phi, streams) if packed is None else packed,
    }
    if n <= 4:
        dx, dphi, sums = streams_backward({**reads, "z": site.z}, convention.mix, convention.rounded)
    else:
        dx = wide_backward(reads, convention.mix, convention.rounded)
        dphi, sums = phi_shares(streams, d, site.z, site.r, alpha)
    turned = phi.t().is_contiguous() and not phi.is_contiguous()
    return SiteGradients(dx, *add_shares(dphi, sums, n, convention.groups, turned))
