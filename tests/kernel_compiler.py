"""Compiling launches for devices that are not there, and reading what came out."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from mhc_compile.kernels.triton_launch import Launch

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Target:
    name: str
    shared_memory: int  # bytes that one program may have

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget("hip", self.name, 64) if self.is_amd else GPUTarget("cuda", int(self.name), 32)

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")


@dataclass(frozen=True)
class Compiled:
    text: str  # PTX, or the assembly of AMD
    shared: int
    registers: int
    spills: int  # bytes, or registers on AMD

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.text))


def source(launch: Launch) -> ASTSource:
    """What triton's launcher would compile for these arguments: aligned pointers, integers by their divisibility."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(path: tuple[int, ...], value: Any, is_constant: bool) -> Any:
        if isinstance(value, tuple) and not is_constant:
            return tuple(kind((*path, place), one, False) for place, one in enumerate(value))
        if isinstance(value, Tensor):
            attributes[path] = ALIGNED
            return POINTERS[value.dtype]
        if is_constant or value is None or value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = ALIGNED
        return "i32"

    for i, parameter in enumerate(launch.kernel.params):
        signature[parameter.name] = kind((i,), launch.arguments[parameter.name], parameter.is_constexpr)
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(launch: Launch, target: Target) -> Compiled:
    kernel = triton.compile(source(launch), target=target.gpu, options=dict(launch.options))
    if target.is_amd:
        text = kernel.asm["amdgcn"]
        found = {name: int(number) for name, number in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
        spills = found["vgpr_spill_count"] + found["sgpr_spill_count"]
        return Compiled(text, kernel.metadata.shared, found["vgpr_count"], spills)
    text = kernel.asm["ptx"]
    report = assembler_report(text, int(target.name))
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return Compiled(text, kernel.metadata.shared, int(registers[1]), spills)


def assembler_report(ptx: str, architecture: int) -> str:
    """What NVIDIA's assembler, which comes with triton, says of registers: the one of two that triton takes for it."""
    assembler = get_ptxas(architecture).path
    name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    command = [assembler, "-v", f"--gpu-name={name}", "-", "-o", "/dev/null"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr
