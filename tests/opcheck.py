"""`torch.library.opcheck`, without a warning of its own."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def opcheck(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **options: Any) -> None:
    """Check an op as torch does. From torch 2.14 on that reads gradients of tensors that are no leaves, and warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        torch.library.opcheck(op, args, kwargs, **options)
