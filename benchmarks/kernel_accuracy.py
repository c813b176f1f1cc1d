"""Results against the float64 oracle, and from run to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.kernel_implementations import Implementation, Outputs, formulas
from benchmarks.kernel_samples import OPS, Sample

# Of the norm of the difference over the norm. bfloat16 rounds to 2e-3; a bfloat16 phi, or sums in bfloat16, are a few
# times off. A formula that is wrong is off by tenths.
LIMIT = 1e-2


def expected(implementation: Implementation, op: str, sample: Sample) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of an op by autograd over the oracle, for the inputs as the implementation gets them."""
    leaves = {n: v.detach().double().requires_grad_() for n, v in implementation.values(op, sample).items()}
    function = formulas(implementation.convention, sample["streams"].shape[-2])[op]
    outputs = tuple(function(*leaves.values()))
    grads = [sample[name].double() for name in OPS[op].grads]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    named = zip(OPS[op].outputs, (out.detach() for out in outputs), strict=True)
    return dict(named), {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def errors(names: list[str], actual: Outputs, right: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each result that there is; infinite where something is not finite."""
    found = {}
    for name, value in zip(names, actual, strict=True):
        if value is None:
            continue
        wide, true = value.detach().double().reshape(right[name].shape), right[name]
        error = ((wide - true).norm() / true.norm()).item() if wide.isfinite().all() else float("inf")
        found[name] = float(f"{error:.2e}")
    return found


def same_again(call: Callable[[], Outputs], times: int) -> int:
    """How many of so many reruns gave the bits of the first run."""
    first = [value for value in call() if value is not None]
    return sum(_equal(first, [value for value in call() if value is not None]) for _ in range(times))


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    bits = {2: torch.int16, 4: torch.int32}
    return all(torch.equal(x.view(bits[x.itemsize]), y.view(bits[y.itemsize])) for x, y in zip(a, b, strict=True))


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold nan until they are written: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
