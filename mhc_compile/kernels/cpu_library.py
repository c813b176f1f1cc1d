"""The C++ bodies of a site as a library: compiled once for each (n, dtype of streams), kept on disk.

``cpu_site.cpp`` includes nothing of torch, so a compilation takes a second or two and not the ten to twenty that
inductor takes for the same. Libraries lie in inductor's cache folder; their names hold the source, the flags, and what
the compiler says of itself and of the processor, so that one folder may serve several machines. Calls may come from
several threads: whoever comes first compiles while the others wait.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import threading
import warnings
from ctypes import CDLL, POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from mhc_compile import _torch
from mhc_compile.errors import wrong
from mhc_compile.kernels.convention import Convention

SOURCE = Path(__file__).with_name("cpu_site.cpp")
ELEMENTS = {  # what makes streams of a dtype
    torch.float32: ("-DELEMENT=float",),
    torch.bfloat16: ("-DELEMENT=Bfloat16",),
    torch.float16: ("-DELEMENT=Half", "-DHALF"),
}

_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_NATIVE = (  # the first that a compiler takes
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-mcpu=native", "-fopenmp-simd"),
)


class Settings(Structure):
    """``struct Convention`` of the source."""

    _fields_ = [
        *((name, c_float) for name in ("rms_eps", "pre_eps", "post_scale", "post_eps", "divisor_eps")),
        *((name, c_int32) for name in ("groups", "iterations", "rows_first")),
    ]

    @classmethod
    def of(cls, convention: Convention) -> Settings:
        return cls(*(getattr(convention, field[0]) for field in cls._fields_))


_SIZES = (c_int64, c_int64, c_int)  # tokens, features, threads
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "mhc_read": (*[c_void_p] * 11, POINTER(Settings), *_SIZES),
    "mhc_read_backward": (*[c_void_p] * 14, POINTER(Settings), *_SIZES),
    "mhc_streams": (*[c_void_p] * 8, c_int, c_int, *_SIZES),
    "mhc_read_backward_few": (*[c_void_p] * 17, POINTER(Settings), c_int, c_int, *_SIZES),
    "mhc_merge": (*[c_void_p] * 5, c_int, c_int, *_SIZES),
    "mhc_branch_backward": (*[c_void_p] * 7, c_int, c_int, *_SIZES),
}

_libraries: dict[tuple[int, torch.dtype], CDLL | None] = {}
_warned: set[str] = set()
_lock = threading.Lock()


def library(n: int, dtype: torch.dtype) -> CDLL | None:
    """The bodies for n streams of a dtype; None where compilation is switched off or has failed (warned of once)."""
    key = (n, dtype)
    if key not in _libraries:
        if _torch.dynamo_config.disable:
            return None
        with _lock:
            if key not in _libraries:
                _libraries[key] = _tried(n, dtype)
    return _libraries[key]


def _tried(n: int, dtype: torch.dtype) -> CDLL | None:
    try:
        return _loaded(compiled(n, dtype))
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        found = f"not possible here ({type(error).__name__}: {first})"
        if found not in _warned:
            _warned.add(found)
            legal = "g++ or clang++, as torch.compile uses them on a CPU"
            step = "install one, or name it in CXX, or go on: the same is computed in plain torch, more slowly"
            warnings.warn(wrong("compiling the CPU bodies of mHC", found, legal, step), stacklevel=2)
        return None


def compiled(n: int, dtype: torch.dtype) -> Path:
    """The file of the library, made if it is not there."""
    compiler = _torch.cpp_compiler()
    native, known = _native(compiler)
    command = [compiler, *_FLAGS, *native, f"-DSTREAMS={n}", *ELEMENTS[dtype], str(SOURCE)]
    source = SOURCE.read_bytes()
    name = hashlib.sha256(b"\0".join([source, known, *map(str.encode, command[1:-1])])).hexdigest()[:32]
    folder = _torch.compiler_cache() / "mhc"
    target = folder / f"{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Under a name of its own, then renamed: two processes may do this at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own, target.name)
            _run([*command, "-o", str(made)])
            os.replace(made, target)
    return target


def _native(compiler: str) -> tuple[tuple[str, ...], bytes]:
    """Flags for this processor, and all that the compiler defines with them: its version and the instructions."""
    for flags in _NATIVE:
        try:
            return flags, _run([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
        except RuntimeError as error:
            reason = error
    raise reason


def _run(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _loaded(path: Path) -> CDLL:
    found = CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found
