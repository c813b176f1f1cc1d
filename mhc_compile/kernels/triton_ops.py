"""The ops on Triton kernels, with the signatures of ``plain`` and ``site_plain``.

The backward of a merge by itself is two launches; a site that was lowered does not need it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_compile.kernels.convention import Before, Coefficients, Convention
from mhc_compile.kernels.triton_aggregate import aggregate
from mhc_compile.kernels.triton_aggregate_backward import aggregate_backward
from mhc_compile.kernels.triton_coefficients import coefficients as _coefficients
from mhc_compile.kernels.triton_coefficients import read as _read
from mhc_compile.kernels.triton_expand import expand, expand_backward, readout, readout_backward
from mhc_compile.kernels.triton_implicit import sinkhorn_implicit_backward
from mhc_compile.kernels.triton_merge import merge as _merge
from mhc_compile.kernels.triton_merge_backward import merge_backward as _merge_backward
from mhc_compile.kernels.triton_merge_read import merge_read as _merge_read
from mhc_compile.kernels.triton_replay import replay_block as _replay_block
from mhc_compile.kernels.triton_single_pass import merge_read_early as _merge_read_early
from mhc_compile.kernels.triton_sinkhorn import sinkhorn as _sinkhorn
from mhc_compile.kernels.triton_sinkhorn import sinkhorn_backward as _sinkhorn_backward
from mhc_compile.kernels.triton_site_backward import crosses, site_backward

__all__ = [
    "aggregate",
    "aggregate_backward",
    "crosses",
    "expand",
    "expand_backward",
    "readout",
    "readout_backward",
]


def coefficients(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, convention: Convention
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``plain.coefficients``."""
    return _filled(_coefficients(streams, phi, alpha, bias, convention))


def coefficients_backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_logits: Tensor,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    convention: Convention,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``plain.coefficients_backward``."""
    site = _coefficients(streams, phi, alpha, bias, convention)
    grads = site_backward(
        streams,
        (phi, alpha, bias),
        site,
        convention,
        grad_pre=grad_pre,
        grad_post=grad_post if convention.post else None,
        grad_res=grad_logits if convention.res != "none" else None,
    )
    return grads.streams, grads.phi, grads.alpha, grads.bias


def sinkhorn(logits: Tensor, convention: Convention) -> Tensor:
    """As ``plain.sinkhorn``."""
    return _sinkhorn(logits, convention.iterations, convention.divisor_eps, convention.rows_first)


def sinkhorn_backward(grad: Tensor, logits: Tensor, convention: Convention) -> Tensor:
    """As ``plain.sinkhorn_backward``."""
    if convention.implicit:
        return sinkhorn_implicit_backward(grad, logits, convention.iterations, convention.rows_first)
    return _sinkhorn_backward(grad, logits, convention.iterations, convention.divisor_eps, convention.rows_first)


def merge(
    streams: Tensor, f: Tensor, post: Tensor, res: Tensor | None, transposed: bool = False, rounded: bool = False
) -> Tensor:
    """As ``plain.merge``."""
    return _merge(streams, f, post, res, _mix(res, transposed), rounded)


def merge_backward(
    grad: Tensor,
    streams: Tensor,
    f: Tensor,
    post: Tensor,
    res: Tensor | None,
    transposed: bool = False,
    rounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``plain.merge_backward``: df, dpost and dres by the kernel."""
    dx = grad.clone()
    if res is not None:
        nothing = torch.zeros_like(f), torch.zeros_like(post)
        dx = _merge(grad, *nothing, res, "given" if transposed else "transposed", rounded)
    return dx, *branch_backward(grad, streams, f, post, _mix(res, transposed), rounded)


def branch_backward(
    grad: Tensor, streams: Tensor, f: Tensor, post: Tensor, mix: str, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``plain.branch_backward``."""
    df, dpost, dres = _merge_backward(grad, streams, f, post, mix, rounded)
    return df, dpost, post.new_empty((*post.shape[:-1], 0, 0)) if dres is None else dres


def read(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, convention: Convention
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``site_plain.read``."""
    u, site = _read(streams, phi, alpha, bias, convention)
    lead = streams.shape[:-2]
    return u, *_filled(site), site.z.view(-1, *lead), site.r.view(lead)


def read_backward(
    grad_u: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    grad_merged: Tensor | None,
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    post: Tensor,
    res: Tensor,
    z: Tensor,
    r: Tensor,
    convention: Convention,
    wants_streams: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``site_plain.read_backward``."""
    grads = (grad_u, grad_pre, grad_post, grad_res, grad_merged)
    kept = (streams, phi, alpha, bias, pre, post, res, z, r)
    dx, dphi, dalpha, dbias, *_ = chain_backward(grads, None, None, None, kept, convention, wants_streams)
    assert dx is not None and dphi is not None and dalpha is not None and dbias is not None
    return dx, dphi, dalpha, dbias


def chain_backward(
    grads: tuple[Tensor | None, ...],
    f: Tensor | None,
    tap: Tensor | None,
    before: Before | None,
    kept: tuple[Tensor, ...],
    convention: Convention,
    wants_streams: bool,
    weights: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """As ``read_backward``, and df of the merge ``before``, for streams that :func:`crosses` is true of.

    ``grads`` and ``kept`` are the arguments of ``read_backward``.  ``f`` is what the site's branch gave, where its
    merge left dpost and dres to this; ``tap`` is what else the streams received.  ``weights`` are what u was read with,
    where that is not pre; their gradient is the last of what is given.
    """
    grad_u, grad_pre, grad_post, grad_res, grad_merged = grads
    streams, phi, alpha, bias, *rest = kept
    has_res = convention.res != "none"
    got = site_backward(
        streams,
        (phi, alpha, bias),
        _site(rest, convention),
        convention,
        grad=grad_merged,
        du=grad_u,
        grad_pre=grad_pre,
        grad_post=grad_post if convention.post else None,
        grad_res=grad_res if has_res else None,
        f=f,
        tap=tap,
        before=before,
        weights=weights,
    )
    dx = got.streams if wants_streams else streams.new_empty(0)
    return dx, got.phi, got.alpha, got.bias, got.f, got.weights


def _site(kept: Sequence[Tensor], convention: Convention) -> Coefficients:
    """What ``read`` kept: pre, post, res, z and r, of which the convention may have no post or res."""
    pre, post, res, z, r = kept
    has_res = convention.res != "none"
    return Coefficients(
        pre, post if convention.post else None, res if has_res else None, z.reshape(len(z), -1), r.flatten()
    )


def merge_read(
    streams: Tensor,
    f: Tensor,
    post: Tensor,
    res: Tensor | None,
    transposed: bool,
    rounded: bool,
    parameters: tuple[Tensor, Tensor, Tensor],
    convention: Convention,
) -> tuple[Tensor, ...]:
    """The merged streams, and what ``read`` gives for them, in two launches."""
    mix, lead = _mix(res, transposed), streams.shape[:-2]
    merged, u, site = _merge_read((streams, f, post, res), parameters, mix, rounded, convention)
    return merged, u, *_filled(site), site.z.view(-1, *lead), site.r.view(lead)


def read_early(
    streams: Tensor, weights: Tensor | None, phi: Tensor, alpha: Tensor, bias: Tensor, convention: Convention
) -> tuple[Tensor, ...]:
    """As ``read``, with u by these weights, or an empty one."""
    site, lead = _coefficients(streams, phi, alpha, bias, convention), streams.shape[:-2]
    u = streams.new_empty(0) if weights is None else aggregate(streams, weights)
    return u, *_filled(site), site.z.view(-1, *lead), site.r.view(lead)


def merge_read_early(
    streams: Tensor,
    f: Tensor,
    post: Tensor,
    res: Tensor | None,
    transposed: bool,
    rounded: bool,
    weights: Tensor | None,
    parameters: tuple[Tensor, Tensor, Tensor],
    convention: Convention,
) -> tuple[Tensor, ...]:
    """The merged streams, and what ``read_early`` gives for them, in one launch or two."""
    mix, lead = _mix(res, transposed), streams.shape[:-2]
    merged, u, site = _merge_read_early((streams, f, post, res), weights, parameters, mix, rounded, convention)
    u = streams.new_empty(0) if u is None else u
    return merged, u, *_filled(site), site.z.view(-1, *lead), site.r.view(lead)


def replay_block(
    streams: Tensor,
    f: Sequence[Tensor],
    post: Sequence[Tensor],
    res: Sequence[Tensor | None],
    pre: Sequence[Tensor | None],
    transposed: bool,
    rounded: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """As ``plain.replay_block``."""
    return _replay_block(streams, f, post, res, pre, _mix(res[0] if res else None, transposed), rounded)


def _mix(res: Tensor | None, transposed: bool) -> str:
    if res is None:
        return "identity"
    return "transposed" if transposed else "given"


def _filled(site: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and res, empty where the convention has none."""
    lead = site.pre.shape[:-1]
    post = site.pre.new_empty((*lead, 0)) if site.post is None else site.post
    return site.pre, post, site.pre.new_empty((*lead, 0, 0)) if site.res is None else site.res
