"""Which code computes an op: Triton kernels on a GPU, plain torch elsewhere."""

from __future__ import annotations

import hashlib
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_KERNEL_STREAMS = 16


@cache
def fingerprint() -> str:
    """Of the code of all ops: what torch's caches on disk must not outlive.

    Their key has the names of the ops in a graph, and not what these compute, nor what their backward keeps.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".py", ".cpp")):
        digest.update(path.read_bytes())
    return f"mhc-{digest.hexdigest()[:16]}"


def has_kernel(tensor: Tensor, n: int) -> bool:
    """Whether the Triton kernels take tensors of this device and dtype, with n streams.

    float64 and more than 16 streams go to plain torch on every device.
    """
    if not tensor.is_cuda or tensor.dtype not in KERNEL_DTYPES or not 1 <= n <= MAX_KERNEL_STREAMS:
        return False
    return _has_triton()


@cache
def _has_triton() -> bool:
    found = find_spec("triton") is not None
    if not found:
        warnings.warn(
            "triton is not installed: the mHC ops run in plain torch on the GPU, without fused kernels. "
            "Next: pip install triton",
            stacklevel=3,
        )
    return found
