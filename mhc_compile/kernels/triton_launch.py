"""Launching Triton kernels: what they read and write, argument checks, and the choice of tiles.

Every launch of this package goes through :func:`launch`, with the tensors that the kernel reads and those
that it writes kept apart.  :func:`record` lists them, with or without running anything, so that tables of
memory traffic and compilation for another device come from the very arguments of a launch.

Only the ``triton_*`` files import this one; the rest of the package imports them inside functions, and so
works where triton is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mhc_compile.errors import ShapeError, wrong
from mhc_compile.kernels.priority import launching

STREAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_STREAMS = 16
Constants = Mapping[str, int | float | bool | str | tuple[int, ...]]


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, typed."""
    return triton.jit(function)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(a: int) -> int:
    """The smallest power of two that is not below a."""
    return 1 << max(0, a - 1).bit_length()


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, with all its arguments.  A tensor that is None was not asked for.

    Tensors called ``name.0``, ``name.1`` and so on are those of a tuple that the kernel's parameter ``name`` takes.
    """

    kernel: Any
    grid: tuple[int, ...]
    reads: Mapping[str, Tensor | None]
    writes: Mapping[str, Tensor | None]
    constants: Constants
    options: Constants

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).strip("_")

    @property
    def arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in {**self.reads, **self.writes, **self.constants}.items():
            parameter, part, _ = name.partition(".")
            found[parameter] = (*found.get(parameter, ()), value) if part else value
        return found

    def run(self) -> None:
        if 0 in self.grid:
            return
        first = next(tensor for tensor in self.writes.values() if tensor is not None)
        device = first.get_device()  # -1, no device, for tensors of the interpreter
        with torch.cuda.device(device), launching(device):
            self.kernel[self.grid](**self.arguments, **self.options)


@dataclass(frozen=True, eq=False)
class _Recorder:
    launches: list[Launch]
    run: bool


# Of the process and not of a thread: on a GPU autograd runs a backward in a thread of its own.
_recorders: list[_Recorder] = []


@contextmanager
def record(run: bool = True) -> Iterator[list[Launch]]:
    """The launches of the block, of every thread.  With ``run=False`` nothing runs, and tensors may be on ``meta``."""
    launches: list[Launch] = []
    recorder = _Recorder(launches, run)
    _recorders.append(recorder)
    try:
        yield launches
    finally:
        _recorders.remove(recorder)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    reads: Mapping[str, Tensor | None],
    writes: Mapping[str, Tensor | None],
    constants: Constants,
    warps: int = 4,
    stages: int = 2,
) -> None:
    """Run ``kernel`` on ``grid``; nothing when the grid is empty."""
    # Contraction to fused multiply-adds is asked for by name: its default differs between versions of triton.
    options: Constants = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    entry = Launch(kernel, grid, reads, writes, constants, options)
    recorder = _recorders[-1] if _recorders else None
    if recorder is not None:
        recorder.launches.append(entry)
    if recorder is None or recorder.run:
        entry.run()


# --- argument checks --------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter, and hence on the CPU."""
    return not isinstance(jit(interpreted), triton.runtime.JITFunction)


def check_streams(streams: Tensor, name: str = "streams") -> tuple[int, int, int]:
    """T, n and C of streams [..., n, C], on a device that kernels run on."""
    if streams.dim() < 2 or not 1 <= streams.shape[-2] <= MAX_STREAMS or streams.shape[-1] < 1:
        legal = f"[..., n, C] with n in 1..{MAX_STREAMS} and C >= 1"
        raise ShapeError(wrong(name, _shape(streams), legal, "expand x to n streams first"))
    if streams.dtype not in STREAM_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in STREAM_DTYPES)
        step = "use the plain ops for other dtypes"
        raise ShapeError(wrong(f"dtype of {name}", streams.dtype, names, step))
    check_device(streams, name)
    n, features = streams.shape[-2:]
    return streams.numel() // (n * features), n, features


def check_device(tensor: Tensor, name: str) -> None:
    recorder = _recorders[-1] if _recorders else None
    if tensor.is_cuda or interpreted() or (recorder is not None and not recorder.run):
        return
    raise ShapeError(wrong(f"device of {name}", tensor.device, "a CUDA device", "use the plain ops elsewhere"))


def check(name: str, tensor: Tensor, legal: str, shape: tuple[int, ...], like: Tensor, *dtypes: torch.dtype) -> Tensor:
    """``tensor``, contiguous, if it has this shape, one of these dtypes, and the device of ``like``."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(
            wrong(name, _shape(tensor), f"{legal} = {_text(shape)} here", "all arguments share tokens, n and C")
        )
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        step = "coefficients and parameters are float32, and gradients have the dtype of what they belong to"
        raise ShapeError(wrong(f"dtype of {name}", tensor.dtype, names, step))
    if tensor.device != like.device:
        raise ShapeError(
            wrong(f"device of {name}", tensor.device, f"{like.device}, as the other arguments", "move it there")
        )
    return tensor.contiguous()


def _shape(tensor: Tensor) -> str:
    return _text(tuple(tensor.shape))


def _text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


# --- tiles ------------------------------------------------------------------------------------------------


def column_block(features: int, limit: int) -> int:
    """A power of two, at most ``limit``: the largest that wastes no more than a tenth of its columns."""
    block = min(limit, max(16, power_of_two(features)))
    while block > 64 and cdiv(features, block) * block > 1.1 * features:
        block //= 2
    return block


# --- the device; for tensors of the interpreter and of a dry run, an H200 ----------------------------------


def on_amd() -> bool:
    return torch.version.hip is not None


def lanes() -> int:
    """Threads of a warp."""
    return 64 if on_amd() else 32


def multiprocessors(device: torch.device) -> int:
    """How many programs a launch has to have at least to keep the device busy."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shared_memory(device: torch.device) -> int:
    """Bytes of on-chip memory that a program may have."""
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))
