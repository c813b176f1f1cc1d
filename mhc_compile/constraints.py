"""The table of constraints: what a site may ask of the matrix `res` that mixes its streams.

`res` [..., n, n] (row i: the output stream) is made from logits that a site computes for each token. Each way to do
that is one `Constraint` of `CONSTRAINTS`, and everything else reads this table: the options, the op `mhc::constrain`,
the initial parameters, the checks of what is promised, the command line, and the table in docs/manifolds.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from math import factorial

import torch
from torch import Tensor

from mhc_compile.kernels import reference

MAX_STREAMS = 64
DIAGONAL = 0.9  # of an initial `res` that has other entries too: most of a stream stays, and no gradient is lost
ITERATIONS = 20  # of Sinkhorn's, where a site's form does not say how many
SQUARINGS = 20  # a power of 2^20 leaves the norm within 7e-7 of the largest singular value, whatever its multiplicity

# What an entry may promise of every matrix that its formula gives.
PROMISES = {
    "positive": "no entry is negative",
    "rows": "rows sum to 1: equal streams stay equal",
    "columns": "columns sum to 1: the mean over streams is conserved",
    "norm": "no singular value is above 1",
    "orthogonal": "all singular values are 1",
}

# Which of a site's ops have kernels: all of them in one (level 2); those that read and write streams; the merge alone.
SITE, STREAMS, MERGE = "site", "streams", "merge"


@dataclass(frozen=True)
class Constraint:
    """One way to make `res` of a site.

    name: as in MHCConfig(constraint=...). words: what it is, for the documentation. source: where it comes from.
    count: how many logits n streams have, in words count_text. res: logits, n -> `res` [..., n, n], differentiable
    torch in the logits' dtype; logits are [..., n, n] where there are n n of them, [..., count] otherwise. start: n ->
    initial logits [count], float64, of a matrix near the identity whose rows sum to 1. promises: keys of PROMISES, of
    any finite logits. free_start: zero logits give no matrix to begin with, and every init uses `start`. most: the
    largest n. bounded: pre and post are sigmoids; otherwise `alpha tanh(theta x~) + b`. kernels: SITE, STREAMS, MERGE.
    """

    name: str
    words: str
    source: str
    count: Callable[[int], int]
    res: Callable[[Tensor, int], Tensor]
    start: Callable[[int], Tensor]
    promises: tuple[str, ...]
    free_start: bool = False
    most: int = MAX_STREAMS
    bounded: bool = True
    kernels: str = STREAMS
    count_text: str = "n n"


def near_identity(n: int) -> Tensor:
    """[n, n], float64: 0.9 on the diagonal, the rest of each row shared equally. Its largest singular value is 1."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    matrix = torch.full((n, n), (1 - DIAGONAL) / (n - 1), dtype=torch.float64)
    return matrix.fill_diagonal_(DIAGONAL)


# ---------------------------------------------------------------------------------------------- formulas


def _sinkhorn(logits: Tensor, n: int) -> Tensor:
    return reference.sinkhorn(logits, ITERATIONS)


def _mixed_permutations(logits: Tensor, n: int) -> Tensor:
    """Softmax weights over the n! permutation matrices: every doubly stochastic matrix is such a mixture (Birkhoff)."""
    if n == 1:
        return logits.softmax(-1)  # [..., 1, 1] already
    return (logits.softmax(-1) @ permutation_matrices(n).to(logits)).reshape(*logits.shape[:-1], n, n)


@cache
@torch.inference_mode(False)  # it is kept for calls in every mode
def permutation_matrices(n: int) -> Tensor:
    """[n!, n n] on the CPU, the identity first."""
    eye = torch.eye(n, device="cpu")
    return torch.stack([eye[list(order)].flatten() for order in permutations(range(n))])


def _permutation_start(n: int) -> Tensor:
    """The logits of `near_identity`: the identity, and a little of the mean of all permutations."""
    count = factorial(n)
    if n == 1:
        return torch.zeros(1, dtype=torch.float64)
    rest = (1 - DIAGONAL) * n / (n - 1)
    weights = torch.full((count,), rest / count, dtype=torch.float64)
    weights[0] += 1 - rest
    return weights.log()


def _cayley(logits: Tensor, n: int) -> Tensor:
    """``Q = (I - S)^-1 (I + S)`` of the skew part ``S = (A - A^T) / 2``: a rotation, smooth for any A.

    One step of Newton and Schulz, ``Q (3 I - Q^T Q) / 2``, takes off what rounding left in the solution for large A.
    """
    skew = (logits - logits.mT) / 2
    eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
    rotation: Tensor = torch.linalg.solve(eye - skew, eye + skew)
    return rotation @ (3 * eye - rotation.mT @ rotation) / 2


def _over_largest_singular_value(logits: Tensor, n: int) -> Tensor:
    """``A / sigma_1(A)``; a zero matrix stays zero.

    sigma_1 is the Schatten norm of order 2^21, by repeated squaring of A^T A: smooth where singular values meet (their
    directions share the gradient), as an eigenvalue is not. What the squarings leave is the projector P on its
    direction, and ``sigma_1^2 = tr(A P A^T)`` has the gradient of the norm with P held fixed.
    """
    with torch.no_grad():
        tiny = torch.finfo(logits.dtype).tiny
        scaled = logits / logits.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
        power = scaled.mT @ scaled
        for _ in range(SQUARINGS):
            power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(tiny)
            power = power @ power
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(tiny)
    square = ((logits @ power) * logits).sum((-2, -1), keepdim=True)
    return logits / torch.where(square > 0, square, 1).sqrt()


def _identity(logits: Tensor, n: int) -> Tensor:
    """Whatever the logits: there are none, [..., 0] or [..., 0, 0]."""
    lead = logits.shape[:-2] if logits.shape[-2:] == (0, 0) else logits.shape[:-1]
    return torch.eye(n, dtype=logits.dtype, device=logits.device).expand(*lead, n, n)


def _as_they_are(logits: Tensor, n: int) -> Tensor:
    return logits


# ---------------------------------------------------------------------------------------------- the table


def _entries(n: int) -> int:
    return n * n


CONSTRAINTS: dict[str, Constraint] = {
    entry.name: entry
    for entry in (
        Constraint(
            "sinkhorn",
            "`exp`, then `iterations` times columns and rows by their sums; columns as far as that converged",
            "mHC, 2512.24880",
            _entries,
            _sinkhorn,
            lambda n: near_identity(n).log().flatten(),
            ("positive", "rows"),
            kernels=SITE,
        ),
        Constraint(
            "lite",
            "softmax weights over the n! permutation matrices",
            "mHC-lite, 2601.05732",
            factorial,
            _mixed_permutations,
            _permutation_start,
            ("positive", "rows", "columns", "norm"),
            most=5,
            kernels=MERGE,
            count_text="n!",
        ),
        Constraint(
            "orthogonal",
            "Cayley transform of the skew part: a rotation",
            "Cayley, 1846",
            _entries,
            _cayley,
            lambda n: torch.zeros(n * n, dtype=torch.float64),
            ("norm", "orthogonal"),
        ),
        Constraint(
            "spectral",
            "divided by its largest singular value",
            "spectral normalisation, 1802.05957",
            _entries,
            _over_largest_singular_value,
            lambda n: near_identity(n).flatten(),
            ("norm",),
            free_start=True,
        ),
        Constraint(
            "identity",
            "I: streams are not mixed, and res has no parameters",
            "mHC, table 1",
            lambda n: 0,
            _identity,
            lambda n: torch.zeros(0, dtype=torch.float64),
            ("positive", "rows", "columns", "norm", "orthogonal"),
            kernels=SITE,
            count_text="no",
        ),
        Constraint(
            "unconstrained",
            "`alpha tanh(theta x~) + b` (pre and post too), x~ each stream over its own root mean square",
            "Hyper-Connections, 2409.19606",
            _entries,
            _as_they_are,
            lambda n: near_identity(n).flatten(),
            (),
            free_start=True,
            bounded=False,
            kernels=MERGE,
        ),
    )
}


_KERNELS = {
    SITE: "all ops of a site, across sites",
    STREAMS: "coefficients, aggregate, merge",
    MERGE: "aggregate, merge",
}


def markdown_table() -> str:
    """The table as docs/manifolds.md has it."""
    head = ("`constraint=`", "res", "logits", "n", *PROMISES, "pre, post", "Triton kernels", "from")
    rows = [head, ("---",) * len(head)]
    for one in CONSTRAINTS.values():
        promised = ("yes" if promise in one.promises else "" for promise in PROMISES)
        gate = "sigmoid, 2 sigmoid" if one.bounded else "tanh"
        rows.append(
            (
                f"`{one.name}`",
                one.words,
                one.count_text,
                f"to {one.most}",
                *promised,
                gate,
                _KERNELS[one.kernels],
                one.source,
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
