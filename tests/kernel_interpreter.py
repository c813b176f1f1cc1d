"""Triton's interpreter, repaired and watched.

It gets bfloat16 wrong in silence: ``tl.dot`` multiplies the bit patterns of its operands, and a cast from
float32 truncates.  (Sums and products of bfloat16 are wrong too; no kernel of ours has one.)  Here both are
right, for the versions of triton that were looked at; others fail until someone has looked.  A mask of a vector
and a scalar comparison is an array of integers there, which 3.9 refuses.  A call of one function by another is made
cheap as well: the interpreter would patch all of ``triton.language`` each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mhc_compile.kernels.triton_launch import Launch

LOOKED_AT = ("3.6.", "3.7.", "3.8.", "3.9.")

_convert_float = interpreter._convert_float
_create_dot = InterpreterBuilder.create_dot
_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _converted(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if source == tl.float32 and target == tl.bfloat16:
        return to_bfloat16(data)
    if source == tl.bfloat16 and target == tl.float32:
        return from_bfloat16(data)
    return _convert_float(data, source, target, rounding)


def _dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
    a, b = (TensorHandle(from_bfloat16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _create_dot(self, a, b, d, *precision)


def _flags(mask: Any) -> Any:
    return TensorHandle(mask.data.astype(bool), tl.int1)


def _masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
    return _load(self, ptrs, _flags(mask), *rest, **options)


def _masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
    return _store(self, ptrs, value, _flags(mask), *rest, **options)


_patched: set[int] = set()


def _inner_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    # The launch has patched the language that our functions see; triton's own see another module of it, which
    # nothing ever restores.
    names = self.fn.__globals__
    if names["__name__"].startswith("triton.") and id(names) not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(id(names))
    return self.rewrite()(*args, **kwargs)


def repair() -> None:
    assert triton.__version__.startswith(LOOKED_AT), (
        f"triton {triton.__version__}: look whether its interpreter still needs these repairs, then add it to LOOKED_AT"
    )
    interpreter._convert_float = _converted
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = _masked_load, _masked_store
    interpreter.InterpretedFunction.__call__ = _inner_call
    np.seterr(all="ignore")  # the device computes inf - inf without a warning


class Memory:
    """How often each element of a launch's tensors was read and written."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.reads = {name: np.zeros(t.numel(), np.int64) for name, t in launch.reads.items() if t is not None}
        self.writes = {name: np.zeros(t.numel(), np.int64) for name, t in launch.writes.items() if t is not None}
        self._tensors = {name: t for name, t in {**launch.reads, **launch.writes}.items() if t is not None}

    def touch(self, counts: dict[str, np.ndarray], addresses: np.ndarray) -> None:
        for name, count in counts.items():
            start, size = self._tensors[name].data_ptr(), self._tensors[name].element_size()
            here = (addresses >= start) & (addresses < start + count.size * size)
            np.add.at(count, (addresses[here] - np.uint64(start)) // np.uint64(size), 1)
            addresses = addresses[~here]
        assert addresses.size == 0, f"{addresses.size} addresses outside of {list(counts)}"


@contextmanager
def watched() -> Iterator[list[Memory]]:
    """What each launch of the block touches; an address outside of a launch's tensors is an error."""
    load, store, run = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, Launch.run
    memories: list[Memory] = []

    def watched_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        memories[-1].touch(memories[-1].reads, ptrs.data[mask.data.astype(bool)])
        return load(self, ptrs, mask, *rest)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memories[-1].touch(memories[-1].writes, ptrs.data[mask.data.astype(bool)])
        return store(self, ptrs, value, mask, *rest)

    def watched_run(self: Launch) -> None:
        memories.append(Memory(self))
        run(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
        patch.setattr(Launch, "run", watched_run)
        yield memories
