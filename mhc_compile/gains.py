"""What mixing matrices do to a signal and to its gradient (arXiv 2512.24880, section 5.4).

A mixing matrix is [..., n, n]: rows are output streams, columns input streams. The forward gain is the largest absolute
row sum, the backward gain the largest absolute column sum; both are 1 for a doubly stochastic matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_compile.errors import ShapeError, wrong


@dataclass(frozen=True)
class Gain:
    """Amax gains (arXiv 2512.24880, figures 3 and 7), means over tokens.

    forward: largest absolute row sum, backward: largest absolute column sum.
    """

    forward: float
    backward: float


def gain(res: Tensor) -> Gain:
    """The Amax gain of mixing matrices [tokens, n, n], rows being output streams. ShapeError for other shapes."""
    _check_matrices(res)
    return Gain(float(forward_gains(res).mean()), float(backward_gains(res).mean()))


def composite_gains(matrices: Sequence[Tensor]) -> list[Gain]:
    """The gain of the product of the first 1, 2, ... sites of a trunk, in fp64.

    matrices: res [tokens, n, n] of each site in order, all for the same tokens.
    """
    gains = []
    product: Tensor | None = None
    for res in matrices:
        _check_matrices(res, None if product is None else product.shape)
        product = res.double() if product is None else res.double() @ product
        gains.append(gain(product))
    return gains


def products_to_end(matrices: Sequence[Tensor]) -> list[Tensor]:
    """For each site l of a trunk the product res_L ... res_l of the sites l to L, [tokens, n, n] in fp64.

    It is what the streams before site l become by mixing alone, behind the trunk's last site L. matrices: as for
    `composite_gains`.
    """
    products: list[Tensor] = []
    for res in reversed(matrices):
        products.append(res.double() if not products else products[-1] @ res.double())
    return products[::-1]


def forward_gains(res: Tensor) -> Tensor:
    """The largest absolute row sum of each matrix, [..., n, n] -> [...]."""
    return res.abs().sum(-1).amax(-1)


def backward_gains(res: Tensor) -> Tensor:
    """The largest absolute column sum of each matrix, [..., n, n] -> [...]."""
    return res.abs().sum(-2).amax(-1)


def row_errors(res: Tensor) -> Tensor:
    """The largest |row sum - 1| of each matrix, [..., n, n] -> [...]."""
    return (res.sum(-1) - 1).abs().amax(-1)


def column_errors(res: Tensor) -> Tensor:
    """The largest |column sum - 1| of each matrix, [..., n, n] -> [...]."""
    return (res.sum(-2) - 1).abs().amax(-1)


def peaks(res: Tensor) -> Tensor:
    """The mean over rows of each row's largest absolute entry, [..., n, n] -> [...].

    Of doubly stochastic matrices: 1 / n where all streams are averaged, 1 where they are only permuted.
    """
    return res.abs().amax(-1).mean(-1)


def stream_similarity(streams: Tensor) -> Tensor:
    """The mean cosine over all pairs of streams of each token, [..., n, C] -> [...]; 1: all point the same way."""
    n = streams.shape[-2]
    unit = torch.nn.functional.normalize(streams.to(torch.promote_types(streams.dtype, torch.float32)), dim=-1)
    total = unit.sum(-2).square().sum(-1)  # the sum over all ordered pairs, each stream with itself included
    return (total - unit.square().sum((-1, -2))) / (n * (n - 1))


def _check_matrices(res: Tensor, shape: torch.Size | None = None) -> None:
    legal = "[tokens, n, n]" if shape is None else f"{list(shape)}, that of the sites before"
    if res.dim() != 3 or res.shape[-1] != res.shape[-2] or (shape is not None and res.shape != shape):
        step = "take .res of what observe gives, of one trunk and one call"
        raise ShapeError(wrong("the mixing matrices", list(res.shape), legal, step))
