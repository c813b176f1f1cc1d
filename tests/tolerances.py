"""One table: how far a result may be from the float64 oracle, relative to the largest expected value."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
    torch.float32: 1e-5,
    torch.float64: 1e-13,
}


def assert_close(name: str, actual: Tensor, expected: Tensor) -> None:
    """``actual`` against the float64 ``expected``, within the tolerance of actual's own dtype."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    error = (actual.double() - expected).abs().max().item()
    bound = TOLERANCES[actual.dtype] * max(expected.abs().max().item(), 1e-3)
    assert error <= bound, f"{name} ({actual.dtype}): error {error:.3g} > {bound:.3g}"
