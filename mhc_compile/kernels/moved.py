"""What the kernels of a site move through memory, launch by launch: one table for the cost model, tests and pages.

Counted are streams, u, f and their gradients, each time that a launch reads or writes them. The counts are those of
the launches' own arguments (``benchmarks/kernel_traffic.py``), which a test compares. Coefficients, phi and partial
sums come beside them, a few percent. No triton here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Moved:
    """Elements a token: ``states`` times n C, and ``rows`` times C."""

    states: float = 0
    rows: float = 0

    def units(self, n: int) -> float:
        """In units of C."""
        return self.states * n + self.rows

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.states + other.states, self.rows + other.rows)


PROJECT = Moved(1, 0)  # X
FINISH = Moved(1, 1)  # X -> u
MERGE = Moved(2, 1)  # X, f -> X'; `merge_project` as well
EARLY = Moved(0, 1)  # -> u of a single-pass read, in the launch that merges
MERGE_BACKWARD = Moved(2, 2)  # G, X, f -> df
MERGE_BACKWARD_UNMIXED = Moved(1, 2)  # without res X is not read
COEFFICIENTS_BACKWARD = Moved(1, 1)  # du, X
PRODUCTS = Moved(2, 2)  # G, du, X, f: in a chain, in the place of the two before
STREAMS_BACKWARD = Moved(3, 1)  # G, du, X -> dX
HEAD_BACKWARD = Moved(2, 1)  # the same of a read without a merge: no G
CROSSING = Moved(0, 1)  # -> df of the merge before
REPLAY = Moved(1 + 1 / 4, 2)  # of a site: f -> X', u; X again behind every fourth

# By the launches' names; in a chain `streams_backward` makes df of the site before as well.
LAUNCHES = {
    "project": PROJECT,
    "finish": FINISH,
    "merge": MERGE,
    "merge_project": MERGE,
    "merge_read_early": MERGE + EARLY,
    "merge_backward": MERGE_BACKWARD,
    "coefficients_backward": COEFFICIENTS_BACKWARD,
    "products": PRODUCTS,
    "streams_backward": STREAMS_BACKWARD,
}

# One kernel for each op of the paper's table 2, as libraries have them: forward, and backward, where each writes its
# gradient of the streams and adds it to that of the others.
OPS = {
    "coefficients": (Moved(1, 0), Moved(3, 0)),
    "gates": (Moved(1, 0), Moved(3, 0)),
    "aggregate": (Moved(1, 1), Moved(3, 1)),
    "merge": (Moved(2, 1), Moved(3, 2)),
}
