"""The backward of a site after its branch: from du and the gradients of the coefficients to dX and the parameters.

The whole backward of a site is three passes over its streams.  By itself::

    merge_backward          G, X, f    -> df, dpost, dres              before the branch's backward
    coefficients_backward   du, X      -> d, pull                      after it; with Sinkhorn's backward
    streams_backward        G, du, X   -> dX, dphi, dalpha, dbias

and in a chain of sites, where the last pass of the next site has made df already, two::

    products                G, du, X, f -> dpre, dpost, dres
    coefficients_backward   these      -> d, pull                      a few numbers a token
    streams_backward        G, du, X   -> dX, dphi, dalpha, dbias, and df of the site before

With single-pass reads, where u was read with the pre of the site before, the same passes give that its gradient:
``<du, X_i>`` of `products` goes there and not to the site's own pre, whose gradient the site behind this one has given,
and du comes into dX with those weights.  The units are the same.  Where `merge_backward` has run, that gradient is a
pass of its own over du and X, in place of `coefficients_backward`'s.

The product ``sum_i res_ij G_i`` is never in memory by itself.  :func:`site_backward` is all but ``merge_backward``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.errors import ConfigError, wrong
from mhc_compile.kernels.convention import Before, Coefficients, Convention, SiteGradients

_Sums = tuple[Tensor | None, Tensor | None, Tensor | None]  # the gradients of pre, post and res


def crosses(streams: Tensor, mix: str) -> bool:
    """Whether the backward of a site with these streams and this mix goes over its border with the next.

    Above four streams the kernels have other forms.  Without mixing no X is read for dres, and nothing is saved.
    On AMD the tile of float32 that is fastest leaves no registers for df.
    """
    from mhc_compile.kernels.triton_launch import on_amd

    return streams.shape[-2] <= 4 and mix != "identity" and not (on_amd() and streams.dtype == torch.float32)


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
    f: Tensor | None = None,
    tap: Tensor | None = None,
    before: Before | None = None,
    weights: Tensor | None = None,
    packed: Tensor | None = None,
) -> SiteGradients:
    """The gradients of streams [..., n, C], phi [n C, columns], alpha and bias.

    ``parameters`` are phi, alpha and bias, ``site`` what ``read`` kept.  ``grad`` [..., n, C] is the gradient of the
    merged streams, ``du`` [..., C] that of the branch's input, ``grad_post`` and ``grad_res`` what
    ``merge_backward`` returned, ``grad_pre`` what else pre received.  Any of these may be None, which is zero; with
    ``grad`` None, no merge, and the streams get the part through the coefficients and u alone (a head, or
    coefficients by themselves).

    For a chain of sites whose backward :func:`crosses`: ``f`` [..., C] is what the site's own branch gave, where
    nobody has run ``merge_backward``; ``grad_post`` and ``grad_res`` are then what else post and res received.
    ``tap`` [..., n, C] is what else the streams received.  ``before`` is the merge that made the streams; the gradients
    then have one for its branch, too.

    ``weights`` [..., n] is what u was read with, if that is not the site's own pre; the gradients have one for it, too.
    """
    from mhc_compile.kernels.triton_aggregate_backward import weights_backward
    from mhc_compile.kernels.triton_coefficients import check_parameters
    from mhc_compile.kernels.triton_coefficients_backward import coefficients_backward
    from mhc_compile.kernels.triton_launch import check, check_streams
    from mhc_compile.kernels.triton_phi_backward import add_shares, phi_shares
    from mhc_compile.kernels.triton_products import products
    from mhc_compile.kernels.triton_project import pack
    from mhc_compile.kernels.triton_streams_backward import streams_backward
    from mhc_compile.kernels.triton_wide_backward import wide_backward

    _, n, features = check_streams(streams)
    _check_chain(convention, n, grad, f, (tap, before))
    lead, phi = tuple(streams.shape[:-2]), parameters[0]
    alpha, _ = check_parameters(streams, *parameters, convention)

    def checked(name: str, tensor: Tensor | None, legal: str, *shape: int) -> Tensor | None:
        return None if tensor is None else check(name, tensor, legal, (*lead, *shape), streams, streams.dtype)

    grad, tap = (checked(*each, "[..., n, C]", n, features) for each in (("grad", grad), ("tap", tap)))
    du = checked("du", du, "[..., C]", features)
    if weights is not None:
        weights = check("weights", weights, "[..., n]", (*lead, n), streams, torch.float32)
    streams = streams.contiguous()
    others, dweights = (grad_pre, grad_post, grad_res), None
    if f is None or grad is None:
        to_sum, given = du, others
        if weights is not None and du is not None:
            to_sum, dweights = None, weights_backward(du, streams)
    else:
        found = products(grad, du, streams, f, convention.transposed)
        if weights is not None:
            dweights, found = found[0], (None, *found[1:])
        to_sum, given = None, _added(others, found)
    d, pull = coefficients_backward(streams, to_sum, *given, parameters, site, convention)
    reads = {
        "grad": grad,
        "du": du,
        "streams": streams,
        "pre": site.pre if weights is None else weights,
        "res": site.res if grad is not None else None,
        "d": d,
        "pull": pull,
        "r": site.r,
        "alpha": alpha,
        "packed": pack(phi, streams) if packed is None else packed,
    }
    if n <= 4:
        chain = {"z": site.z, "tap": tap}
        dx, df, dphi, sums = streams_backward({**reads, **chain}, convention.mix, convention.rounded, before)
    else:
        dx, df = wide_backward(reads, convention.mix, convention.rounded), None
        dphi, sums = phi_shares(streams, d, site.z, site.r, alpha)
    turned = phi.t().is_contiguous() and not phi.is_contiguous()
    return SiteGradients(dx, *add_shares(dphi, sums, n, convention.groups, turned), df, dweights)


def _check_chain(
    convention: Convention, n: int, grad: Tensor | None, f: Tensor | None, more: tuple[object, object]
) -> None:
    if grad is not None and convention.mix == "none":
        raise ConfigError(wrong("grad", "a tensor", "None, as this convention has no merge", "pass du alone"))
    if f is not None and convention.mix not in ("given", "transposed"):
        raise ConfigError(wrong("f", "a tensor", "None, as this convention has no res", "run merge_backward"))
    if n > 4 and any(each is not None for each in (f, *more)):
        found = f"f, tap or before with {n} streams"
        raise ConfigError(wrong("site_backward", found, "up to 4 streams with these", "ask `crosses` first"))


def _added(others: _Sums, found: _Sums) -> _Sums:
    """The gradients of pre, post and res: what others sent, and what the streams give."""
    pre, post, res = (b if a is None else a if b is None else a + b for a, b in zip(others, found, strict=True))
    return pre, post, res
