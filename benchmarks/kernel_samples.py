"""The shapes that kernels are measured at, the ops, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_compile.kernels.convention import HEAD, PAPER


@dataclass(frozen=True)
class Shape:
    """T tokens of n streams of C features."""

    tokens: int
    features: int
    streams: int = 4
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"T{self.tokens}-C{self.features}-n{self.streams}-{DTYPE_NAMES[self.dtype]}"


DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}

# In the order in which they are measured.
GROUPS = {
    "headline": [Shape(8192, 2560), Shape(8192, 4096), Shape(8192, 7168)],
    "narrow": [Shape(8192, 1280)],
    "tokens": [Shape(4096, 2560), Shape(16384, 2560)],
    "streams": [Shape(8192, 2560, streams=2), Shape(8192, 2560, streams=8)],
    "float32": [Shape(8192, 2560, dtype=torch.float32)],
    "few": [Shape(64, 2560)],
}
# For --dry, and for checks of memory accesses: ragged, and together they take every kernel; not part of "all".
DRY = [Shape(19, 160), Shape(3, 48, streams=2, dtype=torch.float32), Shape(5, 80, streams=5)]


@dataclass(frozen=True)
class Op:
    """The names of an op's inputs, of its outputs, and of the gradients of its outputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    grads: tuple[str, ...]
    directions: tuple[str, ...] = ("forward", "backward")


PARAMETERS = ("phi", "alpha", "bias")
OPS = {
    "site": Op(("streams", "f", *PARAMETERS), ("merged", "u"), ("grad", "du")),
    # What a trunk of sites does between two branches: the merge of one and the read of the next.
    "merge+read": Op(("streams", "f", "post", "res", *PARAMETERS), ("merged", "u"), ("grad", "du"), ("forward",)),
    # A site of a trunk with what its backward takes: the merge before, the read, and the merge of its own branch.
    "chain": Op(
        ("streams", "f", "post", "res", *PARAMETERS, "next_f"), ("merged", "u"), ("grad", "du"), ("backward",)
    ),
    # The same with single-pass reads: u by weights that are known before, and coefficients for what is behind.
    "merge+early": Op(
        ("streams", "f", "post", "res", "pre", *PARAMETERS),
        ("merged", "u", "next_pre", "next_post", "next_res"),
        ("grad", "du", "grad_pre", "grad_post", "grad_res"),
        ("forward",),
    ),
    "early-chain": Op(
        ("streams", "f", "post", "res", "pre", *PARAMETERS, "next_f"),
        ("merged", "u", "next_pre"),
        ("grad", "du", "grad_pre"),
        ("backward",),
    ),
    "coefficients": Op(("streams", *PARAMETERS), ("pre", "post", "res"), ("grad_pre", "grad_post", "grad_res")),
    "sinkhorn": Op(("logits",), ("res",), ("grad_res",)),
    "aggregate": Op(("streams", "pre"), ("u",), ("du",)),
    "merge": Op(("streams", "f", "post", "res"), ("merged",), ("grad",)),
    "expand": Op(("f",), ("streams",), ("grad",)),
    "readout": Op(("streams",), ("u",), ("du",)),
    "head": Op(("streams", "head_phi", "head_alpha", "head_bias"), ("u",), ("du",)),
}

Sample = dict[str, Tensor]


def sample(shape: Shape, device: torch.device, seed: int) -> Sample:
    """Random inputs and gradients of all ops; wide ones in the dtype of the shape, the others in float32."""
    generator = torch.Generator(device).manual_seed(seed)
    t, n, c = shape.tokens, shape.streams, shape.features

    def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    columns, head_columns = PAPER.columns(n), HEAD.columns(n)
    wide = {"streams": (t, n, c), "f": (t, c), "grad": (t, n, c), "du": (t, c), "next_f": (t, c)}
    return {
        **{name: random(*size, dtype=shape.dtype) for name, size in wide.items()},
        "phi": random(n * c, columns) / (n * c) ** 0.5,
        "alpha": 1 + 0.2 * random(3),
        "bias": 0.5 * random(columns),
        "head_phi": random(n * c, head_columns) / (n * c) ** 0.5,
        "head_alpha": 1 + 0.2 * random(1),
        "head_bias": 0.5 * random(head_columns),
        "logits": random(t, n, n),
        "pre": random(t, n).sigmoid(),
        "post": 2 * random(t, n).sigmoid(),
        "res": random(t, n, n).softmax(-1),
        "grad_pre": random(t, n),
        "grad_post": random(t, n),
        "grad_res": random(t, n, n),
    }


def copies(one: Sample, op: str, count: int) -> list[Sample]:
    """So many samples with what the op takes in memory of its own; the rest is shared."""
    names = {*OPS[op].inputs, *OPS[op].grads}
    return [{name: value.clone() if name in names else value for name, value in one.items()} for _ in range(count)]


def size_of(one: Sample, op: str) -> int:
    """Bytes of what an op takes."""
    names = {*OPS[op].inputs, *OPS[op].grads}
    return sum(one[name].numel() * one[name].element_size() for name in names)


def chosen(names: str) -> list[Shape]:
    """The shapes of groups, or of single names, that ``names`` lists with commas; "all" and "rest" are groups too."""
    every = [shape for group in GROUPS.values() for shape in group]
    groups = {**GROUPS, "dry": DRY, "all": every, "rest": [shape for shape in every if shape not in GROUPS["headline"]]}
    groups |= {shape.name: [shape] for shape in [*every, *DRY]}
    found: list[Shape] = []
    for name in names.split(","):
        if name not in groups:
            raise SystemExit(f"--only {name}: legal are {', '.join(groups)}")
        found += [shape for shape in groups[name] if shape not in found]
    return found
