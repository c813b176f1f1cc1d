"""Where the numeric tests of the kernels run: on a CUDA device, or in triton's interpreter.

The interpreter has to be chosen before triton is first imported, so that lane is a process of its own, started
by ``test_kernels_interpreted.py``.  In any other process these tests need a CUDA device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tolerances import assert_close

pytest.importorskip("triton")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
numeric = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device or the interpreter"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STREAMS = [1, 2, 3, 4, 8]
SIZES = [(1, 129), (7, 1), (129, 7)]  # tokens and features, ragged

# n, tokens, features and dtype: every size in every dtype with four streams, and each once with another number.
CASES = [(4, t, c, dtype) for t, c in SIZES for dtype in DTYPES] + [
    (n, t, c, DTYPES[(i + n) % 3]) for n in STREAMS if n != 4 for i, (t, c) in enumerate(SIZES)
]

if INTERPRETED:
    import kernel_interpreter

    kernel_interpreter.repair()


def to_device(*arguments: Any) -> tuple[Any, ...]:
    return tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments)


def double(*arguments: Any) -> tuple[Any, ...]:
    """The same values for the oracle, as leaves."""
    return tuple(a.detach().cpu().double().requires_grad_() if isinstance(a, Tensor) else a for a in arguments)


# A float32 result that went through the two bfloat16 halves of phi, which hold 16 bits of it, and a sum over tokens
# with cancellation. (TF32, which would do, holds 11.)
SPLIT = 2**-14


def assert_near(name: str, actual: Tensor, expected: Tensor, streams: torch.dtype) -> None:
    """``assert_close``, but a float32 result of 16-bit streams may be off by SPLIT."""
    if actual.dtype != torch.float32 or streams == torch.float32 or actual.numel() == 0:
        return assert_close(name, actual.cpu(), expected)
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    error, bound = (actual.cpu() - expected).abs().max(), SPLIT * expected.abs().max().clamp(min=1e-3)
    assert error <= bound, f"{name} of {streams}: error {error:.3g} > {bound:.3g}"


def scattered(tensor: Tensor) -> Tensor:
    """The same values in a layout that is neither contiguous nor dense."""
    wide = tensor.new_zeros((*tensor.shape, 2))
    wide[..., 0] = tensor
    return wide[..., 0]


def assert_same_again(function: Callable[[], Any], times: int = 1 if INTERPRETED else 5) -> None:
    """Every run gives the same bits."""
    first = torch.utils._pytree.tree_leaves(function())
    for _ in range(times):
        for a, b in zip(first, torch.utils._pytree.tree_leaves(function()), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
