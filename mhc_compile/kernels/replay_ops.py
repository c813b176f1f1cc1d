"""The replay of a recompute block as one op: all of its states, from the first one, in as few launches as they take.

No backward: it runs within one (``passes.eager_replay``). The coefficients are given, and so have to be kept: they come
from sums over all features of a token, and a kernel that made them again could not hold the streams in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from mhc_compile.errors import ShapeError, wrong
from mhc_compile.kernels import arguments
from mhc_compile.kernels.ops import _fake, _like, _no_autocast, _op, kernels


def replay_block(
    streams: Tensor,
    f: Sequence[Tensor],
    post: Sequence[Tensor],
    res: Sequence[Tensor | None],
    pre: Sequence[Tensor | None],
    transposed: bool = False,
    rounded: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """``X_{l+1} = res_l X_l + post_l f_l`` for k sites one behind another, and ``u_l = pre_l X_l``.

    streams [..., n, C], the first state; of each site f [..., C], post [..., n], res [..., n, n] (None at all of them
    where streams are not mixed), transposed and rounded as for ``ops.merge``; pre of each of the k + 1 states,
    [..., n], or None where no aggregate is asked for. Gives the k states behind the merges, and the aggregates asked
    for, in order, in streams' dtype: the bits of ``ops.merge`` and ``ops.aggregate`` called one after the other.

    Traffic of a token on a GPU, in units of C: n + k read and n k written, and 1 for each aggregate, beside n n + 2 n
    float32 coefficients of each site; single ops would read n for each merge and each aggregate. Behind every fourth
    site the kernel starts anew, and reads n.

    Raises ShapeError for other shapes, dtypes or numbers of tensors. There is no gradient.
    """
    made: list[Tensor] = _replay_block(streams, list(f), list(post), list(res), list(pre), transposed, rounded)
    return made[: len(f)], made[len(f) :]


def _check(
    streams: Tensor, f: list[Tensor], post: list[Tensor], res: list[Tensor | None], pre: list[Tensor | None]
) -> None:
    counts = (len(f), len(post), len(res), len(pre))
    if counts != (len(f), len(f), len(f), len(f) + 1):
        found, legal = f"{counts} tensors", "k, k, k and k + 1 for k sites"
        raise ShapeError(wrong("f, post, res and pre", found, legal, "pass None for an aggregate that is not wanted"))
    if len({matrix is None for matrix in res}) > 1:
        found = "None at some sites and given at others"
        raise ShapeError(wrong("res", found, "all or none", "replay the two kinds of sites apart"))
    arguments.check_streams(streams)
    for one, gains, matrix in zip(f, post, res, strict=True):
        arguments.check_merge(streams, one, gains, matrix)
    for weights in pre:
        if weights is not None:
            arguments.check_aggregate(streams, weights)


@_op(
    "replay_block",
    "(Tensor streams, Tensor[] f, Tensor[] post, Tensor?[] res, Tensor?[] pre, bool transposed=False,"
    " bool rounded=False) -> Tensor[]",
)
def _replay_block(
    streams: Tensor,
    f: list[Tensor],
    post: list[Tensor],
    res: list[Tensor | None],
    pre: list[Tensor | None],
    transposed: bool = False,
    rounded: bool = False,
) -> list[Tensor]:
    _check(streams, f, post, res, pre)
    with _no_autocast(streams):
        states, aggregates = kernels(streams).replay_block(streams, f, post, res, pre, transposed, rounded)
    return [*states, *(u for u in aggregates if u is not None)]


@_fake(_replay_block)
def _(
    streams: Tensor,
    f: list[Tensor],
    post: list[Tensor],
    res: list[Tensor | None],
    pre: list[Tensor | None],
    *variant: bool,
) -> list[Tensor]:
    _check(streams, f, post, res, pre)
    u = (*streams.shape[:-2], streams.shape[-1])
    return [*(_like(streams) for _ in f), *(streams.new_empty(u) for one in pre if one is not None)]


def _flops(streams: Sequence[int], f: Sequence[Any], *args: Any, **kwargs: Any) -> int:
    pre = args[2]
    mixed = 2 * prod(streams) * (streams[-2] + 1)
    return mixed * len(f) + 2 * prod(streams) * sum(one is not None for one in pre)


if torch.ops.mhc.replay_block not in flop_counter.flop_registry:  # a reload finds the formula of the first import
    flop_counter.register_flop_formula(torch.ops.mhc.replay_block)(_flops)
