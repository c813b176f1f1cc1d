"""More models that the residual finder is tried on, each with a hand count.

Conventions of the counts:

- a site is one outermost merge (an add-tree with a skip); merges inside another merge's branch do not count;
- a trunk is a chain of merges connected by trunk ops: pointwise ops, casts, norms over features, layout ops,
  dropout, adding a tensor that is no merge;
- a projected or pooled shortcut, BatchNorm, a change of width or resolution, a concatenation or a learned
  projection ends a trunk, and a following merge starts a new one; a trunk without a site does not count;
- an added long skip is no site: where the tap and the sum lie on one trunk it is a trunk op, where the
  resolution changed in between it is a plain add of two readouts.

`inputs()` gives keyword arguments; `build()` seeds torch and returns a module in eval mode. Where a model's
own initialisation leaves outputs or gradients near zero, a larger one is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo import (
    BATCH,
    DECODER,
    ENCODER,
    FEED,
    POSITIONS,
    SEQ,
    SHAPE,
    SPECIAL,
    VOCAB,
    WIDTH,
    Build,
    Inputs,
    decoder_inputs,
    encoder_decoder_inputs,
    encoder_inputs,
    hf,
    image,
    pixel_inputs,
    token_ids,
)

C = 16  # width of the modules below


@dataclass(frozen=True)
class Entry:
    """One model, what to call it with, and what a correct finder finds in it."""

    name: str
    build: Build
    inputs: Inputs
    sites: int
    trunks: int
    why: str


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def x_inputs() -> dict[str, Any]:
    return dict(x=randn(BATCH, SEQ, C))


def image_inputs() -> dict[str, Any]:
    return dict(x=randn(BATCH, 3, 16, 16))


def seeded(make: Callable[[], nn.Module]) -> Build:
    """A builder that seeds torch first, in eval mode."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return build


# ------------------------------------------------------------------------------------------- parts


class Attention(nn.Module):
    """Multi-head attention, by default of `x` to itself."""

    def __init__(self, width: int = C, context: int | None = None, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context or width, 2 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(self.split(self.q(x)), self.split(k), self.split(v))
        return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int = C, hidden: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden or 2 * width)
        self.down = nn.Linear(hidden or 2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Residual(nn.Module):
    """`x + branch(norm(x))`: one site."""

    def __init__(self, branch: nn.Module, width: int = C) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


class Chain(nn.Sequential):
    """Sequential, called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def block(width: int = C) -> nn.Sequential:
    """A pre-norm transformer block: two sites."""
    return nn.Sequential(Residual(Attention(width), width), Residual(Mlp(width), width))


def twice(branch: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Two residuals around a branch, on a projected input."""
    return lambda: Chain(nn.Linear(C, C), Residual(branch()), Residual(branch()))


def layers(make: Callable[[], nn.Module], count: int) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(count))


def alternating(count: int) -> nn.ModuleList:
    """Attention and MLP in turn."""
    return nn.ModuleList(Mlp() if i % 2 else Attention() for i in range(count))


class RMSNorm(nn.Module):
    """Written out, as most models do."""

    def __init__(self, width: int = C) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class ConvResidual(nn.Module):
    """Channels first, activation after the add: one site."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.second(F.silu(self.first(self.norm(x)))))


# ------------------------------------------------------------------------------- trunks and skips


class TwoModalities(nn.Module):
    """Two trunks of different width and length; every second branch of one reads the other."""

    def __init__(self, a: int = C, b: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.self_a = layers(lambda: Residual(Mlp(a), a), depth)
        self.self_b = layers(lambda: Residual(Mlp(b), b), depth)
        self.norm_a = layers(lambda: nn.LayerNorm(a), depth)
        self.norm_b = layers(lambda: nn.LayerNorm(b), depth)
        self.cross_a = layers(lambda: Attention(a, b), depth)
        self.cross_b = layers(lambda: Attention(b, a), depth)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for i, (self_a, self_b) in enumerate(zip(self.self_a, self.self_b, strict=True)):
            x, y = self_a(x), self_b(y)
            new_x = x + self.cross_a[i](self.norm_a[i](x), y)
            y = y + self.cross_b[i](self.norm_b[i](y), x)
            x = new_x
        return x, y


class LongSkips(nn.Module):
    """U-ViT with one width: the taps are added back to the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.middle = layers(block, 2), layers(block, 2), block()

    def forward(self, x: Tensor) -> Tensor:
        taps = []
        for part in self.down:
            x = part(x)
            taps.append(x)
        x = self.middle(x)
        for part in self.up:
            x = part(x + taps.pop())
        return x


class ConcatenatedSkips(nn.Module):
    """U-ViT as published: concatenation and a learned projection."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.middle = layers(block, 2), layers(block, 2), block()
        self.join = layers(lambda: nn.Linear(2 * C, C), 2)

    def forward(self, x: Tensor) -> Tensor:
        taps = []
        for part in self.down:
            x = part(x)
            taps.append(x)
        x = self.middle(x)
        for part, join in zip(self.up, self.join, strict=True):
            x = part(join(torch.cat([x, taps.pop()], dim=-1)))
        return x


def conv_level(width: int) -> nn.Sequential:
    return nn.Sequential(ConvResidual(width), ConvResidual(width))


class UNet(nn.Module):
    """Three resolutions, two residual blocks at each, skips added across resolutions."""

    def __init__(self, widths: tuple[int, int, int] = (8, 12, 16)) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Conv2d(3, a, 3, padding=1)
        self.level_a, self.level_b, self.middle = conv_level(a), conv_level(b), conv_level(c)
        self.down_a = nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.down_b = nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.up_b = nn.ConvTranspose2d(c, b, 2, stride=2)
        self.up_a = nn.Conv2d(b, a, 3, padding=1)
        self.back_b, self.back_a = conv_level(b), conv_level(a)
        self.head = nn.Conv2d(a, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.level_a(self.stem(x))
        b = self.level_b(self.down_a(a))
        c = self.middle(self.down_b(b))
        b = self.back_b(self.up_b(c) + b)
        up = self.up_a(F.interpolate(b, scale_factor=2.0, mode="nearest"))
        return self.head(self.back_a(up + a))


class Hierarchy(nn.Module):
    """Three stages: a projected and pooled shortcut, then patch merging."""

    def __init__(self, a: int = 8, b: int = 12, c: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, a, 4, stride=4)
        self.first = nn.Sequential(Residual(Mlp(a), a), Residual(Mlp(a), a))
        self.shortcut, self.widen = nn.Linear(a, b), Mlp(a)
        self.out = nn.Linear(a, b)
        self.second = nn.Sequential(Residual(Mlp(b), b), Residual(Mlp(b), b))
        self.merge = nn.Linear(4 * b, c)
        self.third = nn.Sequential(Residual(Mlp(c), c), Residual(Mlp(c), c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x).permute(0, 2, 3, 1))
        x = self.second(self.shortcut(x) + self.out(self.widen(x)))
        parts = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
        x = self.third(self.merge(torch.cat(parts, dim=-1)).flatten(1, 2))
        return x.mean(1)


class ClassToken(nn.Module):
    """A token is concatenated to the trunk half way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(), block()
        self.token = nn.Parameter(torch.randn(1, 1, C))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.second(x)[:, 0]


class DenseNet(nn.Module):
    """Growth by concatenation: no add."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.ModuleList(nn.Linear(C + 4 * i, 4) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.grow:
            x = torch.cat([x, F.gelu(part(x))], dim=-1)
        return x


class SharedLayers(nn.Module):
    """One block applied three times, sums in place, every state an extra output."""

    def __init__(self, times: int = 3) -> None:
        super().__init__()
        self.times = times
        self.norms = layers(lambda: nn.LayerNorm(C), 2)
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        taps = []
        for _ in range(self.times):
            h = self.attention(self.norms[0](x))
            h += x
            x = self.mlp(self.norms[1](h))
            x.add_(h)
            taps.append(x)
        return x, taps


class FusedAddNorm(nn.Module):
    """The pair (hidden, residual) goes through; the adds happen in the norms."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.branches = alternating(2 * depth)
        self.norms = layers(RMSNorm, 2 * depth)
        self.last = RMSNorm()

    def add_norm(self, norm: nn.Module, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        return norm(residual), residual

    def forward(self, x: Tensor) -> Tensor:
        hidden, residual = x, None
        for norm, branch in zip(self.norms, self.branches, strict=True):
            hidden, residual = self.add_norm(norm, hidden, residual)
            hidden = branch(hidden)
        return self.add_norm(self.last, hidden, residual)[0]


class Auxiliary(nn.Module):
    """A head on every state, and a gate on one that reads an older state."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = layers(lambda: Residual(Mlp()), 3)
        self.heads = layers(lambda: nn.Linear(C, 2), 3)
        self.old = nn.Linear(C, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outs, first = [], x
        for part, head in zip(self.blocks, self.heads, strict=True):
            x = part(x)
            outs.append(head(x))
        return (x, self.old(first).sigmoid() * outs[-1], *outs)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = layers(block, 3)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.blocks:
            x = checkpoint(part, x, use_reentrant=False)
        return x


# -------------------------------------------------------------------------------- ops on the trunk


class LayoutOps(nn.Module):
    """Transposed, flattened to 2-D and viewed back between the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = layers(lambda: Residual(Mlp()), 4)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = self.parts[0](x)
        x = self.parts[1](x.transpose(0, 1))
        x = self.parts[2](x.transpose(0, 1).reshape(-1, C))
        return self.parts[3](x.view(shape).unsqueeze(1)).squeeze(1)


class TrunkOp(nn.Module):
    """Four sites with an op of the subclass after each."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Residual(part) for part in alternating(4))

    def between(self, x: Tensor, index: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for index, part in enumerate(self.parts):
            x = self.between(part(x), index)
        return x


class TrunkDropout(TrunkOp):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def between(self, x: Tensor, index: int) -> Tensor:
        return self.drop(x)


class TrunkMask(TrunkOp):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
            x *= mask.unsqueeze(-1).to(x.dtype)
        return x


class TrunkFill(TrunkOp):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x).masked_fill(mask.unsqueeze(-1) == 0, 0.0)
        return x


class TrunkRMSNorm(TrunkOp):
    """Post-norm with the norm written out; the branch reads the normalised trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = alternating(4)
        self.norms = layers(RMSNorm, 4)

    def forward(self, x: Tensor) -> Tensor:
        for part, norm in zip(self.parts, self.norms, strict=True):
            x = norm(x + part(x))
        return x


class TrunkScale(TrunkOp):
    def between(self, x: Tensor, index: int) -> Tensor:
        return x * math.sqrt(0.5) if index % 2 else x / 1.1


class TrunkTime(TrunkOp):
    """A time embedding is added to the trunk before every branch."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(4, C)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x + self.time(t)[:, None])
        return x


class TrunkBatchNorm(nn.Module):
    """Channels first; the statistics of the batch are read between the second and the third site."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_level(3), conv_level(3)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x))))


class FlatTrunk(nn.Module):
    """A table: [rows, features], no batch dimension beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = layers(lambda: Residual(Mlp(12), 12), 3)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class MixedPrecision(nn.Module):
    """bf16 weights, fp32 residual: casts between the skip and its reader."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = layers(lambda: nn.LayerNorm(C), 4).bfloat16()
        self.parts = alternating(4).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x.to(torch.bfloat16))).float()
        return x


class HalfTrunk(nn.Module):
    """A bf16 trunk whose sums are made in fp32 and cast back."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = layers(lambda: nn.LayerNorm(C), 3).bfloat16()
        self.parts = layers(Mlp, 3).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = (x.float() + part(norm(x)).float()).to(torch.bfloat16)
        return x.float()


# ------------------------------------------------------------------------------- forms of the sum


class Highway(nn.Module):
    """`t * f(x) + (1 - t) * x`."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.parts = layers(lambda: nn.Linear(C, C), 3), layers(Mlp, 3)

    def forward(self, x: Tensor) -> Tensor:
        for gate, part in zip(self.gates, self.parts, strict=True):
            t = torch.sigmoid(gate(x))
            x = t * part(x) + (1 - t) * x
        return x


class LearnedWeights(nn.Module):
    """`a * x + b * f(x)` with learned scalars; in the last layer `a` is a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ParameterList([torch.tensor(0.9), torch.tensor(1.1), torch.full((C,), 0.8)])
        self.b = nn.ParameterList([torch.tensor(0.3), torch.tensor(0.5), torch.full((C,), 0.4)])
        self.norms, self.parts = layers(lambda: nn.LayerNorm(C), 3), layers(Mlp, 3)

    def forward(self, x: Tensor) -> Tensor:
        for a, b, norm, part in zip(self.a, self.b, self.norms, self.parts, strict=True):
            x = a * x + b * part(norm(x))
        return x


class AddForms(nn.Module):
    """The same sum through six operators."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = layers(lambda: nn.LayerNorm(C), 6)
        self.parts = layers(Mlp, 4)
        self.gate = nn.Parameter(torch.rand(C))
        self.hidden = layers(lambda: nn.Linear(C, 8), 2)
        self.out = nn.ParameterList([torch.randn(8, C) * 0.2, torch.randn(8, C) * 0.2])

    def forward(self, x: Tensor) -> Tensor:
        n, f = self.norms, self.parts
        x = torch.add(x, f[0](n[0](x)), alpha=0.5)
        x = torch.addcmul(x, self.gate, f[1](n[1](x)), value=0.7)
        x = x - f[2](n[2](x))
        x = torch.sub(x, f[3](n[3](x)), alpha=0.5)
        hidden = F.gelu(self.hidden[0](n[4](x)))
        x = torch.baddbmm(x, hidden, self.out[0].expand(x.shape[0], -1, -1))
        flat = x.reshape(-1, C)
        flat = torch.addmm(flat, F.gelu(self.hidden[1](n[5](flat))), self.out[1])
        return flat.view_as(x)


class ThreeLeaves(nn.Module):
    """`x + f(x) + bias`, `bias + x + f(x)` and `x + f(x) + time` in one sum each."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.parts = layers(lambda: nn.LayerNorm(C), 3), layers(Mlp, 3)
        self.bias = nn.ParameterList([torch.randn(C), torch.randn(C)])
        self.time = nn.Linear(4, C)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        n, f = self.norms, self.parts
        x = x + f[0](n[0](x)) + self.bias[0]
        x = self.bias[1] + x + f[1](n[1](x))
        return x + (f[2](n[2](x)) + self.time(t)[:, None])


class Parallel(nn.Module):
    """`(x + attention) + mlp`, then `x + (mlp + attention)`, then `attention + (mlp + x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.attention, self.mlp = (
            layers(lambda: nn.LayerNorm(C), 3),
            layers(Attention, 3),
            layers(Mlp, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = (x + self.attention[0](h)) + self.mlp[0](h)
        h = self.norms[1](x)
        x = x + (self.mlp[1](h) + self.attention[1](h))
        h = self.norms[2](x)
        return self.attention[2](h) + (self.mlp[2](h) + x)


class Conformer(nn.Module):
    """Half steps, a depthwise convolution, and a norm on the trunk at the end of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = layers(lambda: nn.LayerNorm(C), 5)
        self.first, self.last = Mlp(), Mlp()
        self.attention = Attention()
        self.conv = nn.Sequential(nn.Conv1d(C, 2 * C, 1), nn.GLU(1), nn.Conv1d(C, C, 3, padding=1, groups=C))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norms
        x = x + 0.5 * self.first(n[0](x))
        x = x + self.attention(n[1](x))
        x = x + self.conv(n[2](x).transpose(1, 2)).transpose(1, 2)
        x = x + 0.5 * self.last(n[3](x))
        return n[4](x)


class Modulated(nn.Module):
    """DiT: shift, scale and gate from a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, C)
        self.parts = alternating(6)
        self.norms = layers(lambda: nn.LayerNorm(C, elementwise_affine=False), 6)
        self.condition = layers(lambda: nn.Linear(C, 3 * C), 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        cond = F.silu(self.embed(t))[:, None]
        for part, norm, condition in zip(self.parts, self.norms, self.condition, strict=True):
            shift, scale, gate = condition(cond).chunk(3, dim=-1)
            h = norm(x)
            h = h * scale + h + shift
            x = x + gate * part(h)
        return x


# ------------------------------------------------------------------- branches with adds inside them


class GeluNew(nn.Module):
    """GPT-2's activation written out: `x + 0.0447 x^3` is no merge."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
        return self.down(h)


class LocalSkip(nn.Module):
    """`u * v + u` between the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v, self.down = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        u = self.u(x)
        return self.down(u * torch.sigmoid(self.v(x)) + u)


class Rotary(nn.Module):
    """Rotary position embedding, raw biases, a relative bias and a mask on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C))
        self.relative = nn.Parameter(torch.randn(SEQ, SEQ))
        angle = torch.outer(torch.arange(SEQ).float(), 10.0 ** -torch.arange(0, C // 2).float())
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos())
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin())

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-b, a], dim=-1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.rotate(self.q(x) + self.q_bias), self.rotate(self.k(x)), self.v(x) + self.v_bias
        mask = torch.full((SEQ, SEQ), -1e9).triu(1)
        scores = q @ k.transpose(1, 2) / math.sqrt(C) + self.relative + mask
        return self.out(scores.softmax(-1) @ v)


class Adapter(nn.Module):
    """A bottleneck with its own residual behind the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.adapter, self.out = Mlp(), Mlp(C, 4), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        return self.out(h + self.adapter(h))


class StateSpace(nn.Module):
    """A diagonal scan with the D skip `y + D * u`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dt, self.out = nn.Linear(C, 2 * C), nn.Linear(C, C), nn.Linear(C, C)
        self.a, self.d = nn.Parameter(torch.rand(C)), nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.inner(x).chunk(2, dim=-1)
        step = F.softplus(self.dt(u))
        state, ys = torch.zeros_like(u[:, 0]), []
        for t in range(u.shape[1]):
            state = torch.exp(-step[:, t] * self.a) * state + step[:, t] * u[:, t]
            ys.append(state)
        y = torch.stack(ys, dim=1) + self.d * u
        return self.out(y * F.silu(gate))


class Nested(nn.Module):
    """Down, two residuals at the small width, up."""

    def __init__(self, small: int = 8) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(C, small), nn.Linear(small, C)
        self.inside = block(small)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.inside(self.down(x)))


class GlobalContext(nn.Module):
    """One vector for the whole sequence, broadcast over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.mean(1))[:, None]


class SideValue(nn.Module):
    """A statistic made without gradients scales the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = (x + self.mlp(x)).abs().mean()
        return self.mlp(x) / (1 + size)


class FullPrecision(nn.Module):
    """Autocast switched off inside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.mlp(x.float())


class Quantised(nn.Module):
    """Weights in buffers: int8 values and scales."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (C, C), dtype=torch.int8))
        self.register_buffer("scale", torch.full((C, 1), 0.002))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


class TokenMixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(SEQ)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class SqueezeExcite(nn.Module):
    """Channels first, BatchNorm inside the branch, channel attention at its end."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.squeeze, self.excite = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        weight = torch.sigmoid(self.excite(F.silu(self.squeeze(h.mean((2, 3))))))
        return x + h * weight[:, :, None, None]


class SharedGate(nn.Module):
    """One gate, computed from the first state, on every branch: it looks like a state that the branches skip."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(C, C)
        self.layers = nn.ModuleList(nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.tanh(self.gate(x))
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * gate
        return x


class Decoys(nn.Module):
    """Adds of every kind that is no merge, outside of any branch."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.first, self.second = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.position, self.bias = nn.Parameter(torch.randn(SEQ, C)), nn.Parameter(torch.randn(C))
        self.time = nn.Linear(4, 2 * C)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.token(x) + self.position
        x = self.first(x + 0.044715 * x.pow(3)) + self.bias
        x = self.second(x * torch.sigmoid(x) + x)
        scale, shift = self.time(t)[:, None].chunk(2, dim=-1)
        return x * (1 + scale) + shift


# ------------------------------------------------------------------------------ real models' inputs


def text_and_pixels() -> dict[str, Any]:
    return dict(input_ids=token_ids(), pixel_values=image())


def text_and_regions() -> dict[str, Any]:
    regions, boxes = randn(BATCH, 6, 12), randn(BATCH, 6, 4, seed=1).sigmoid()
    return dict(input_ids=token_ids(), visual_feats=regions, visual_pos=boxes)


def wave() -> dict[str, Any]:
    return dict(input_values=randn(BATCH, 320))


def mel_and_text() -> dict[str, Any]:
    return dict(input_features=randn(BATCH, 8, 32), decoder_input_ids=token_ids()[:, :5], use_cache=False)


def series() -> dict[str, Any]:
    return dict(past_values=randn(BATCH, 16, 2))


def byte_inputs() -> dict[str, Any]:
    return dict(inputs=token_ids())


def large_pixels() -> dict[str, Any]:
    return dict(pixel_values=image(3, 64))


def no_memory() -> dict[str, Any]:
    return dict(input_ids=token_ids(), use_mems=False)


def x_and_time() -> dict[str, Any]:
    return dict(x=randn(BATCH, SEQ, C), t=randn(BATCH, 4, seed=1))


def x_and_mask() -> dict[str, Any]:
    return dict(x=randn(BATCH, SEQ, C), mask=torch.tensor([[1] * 5 + [0] * 3, [1] * SEQ]))


def two_inputs() -> dict[str, Any]:
    return dict(x=randn(BATCH, SEQ, C), y=randn(BATCH, 5, 24, seed=1))


def rows() -> dict[str, Any]:
    return dict(x=randn(20, 12))


SEQ2SEQ = dict(
    vocab_size=VOCAB,
    d_model=WIDTH,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    **SPECIAL,
)
SPEECH = dict(
    vocab_size=VOCAB,
    **SHAPE,
    **FEED,
    conv_dim=(8, 8),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)
PYRAMID = dict(patch_sizes=[7, 3], hidden_sizes=[16, 32], strides=[4, 2], num_labels=5)
TOWERS = dict(
    text_config=dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        **{**SPECIAL, "eos_token_id": VOCAB - 1},
    ),
    vision_config=dict(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    ),
    projection_dim=16,
)
CVT = dict(
    embed_dim=[16, 32],
    num_heads=[2, 4],
    depth=[1, 2],
    mlp_ratio=[2.0, 2.0],
    patch_sizes=[7, 3],
    patch_stride=[4, 2],
    patch_padding=[2, 1],
    attention_drop_rate=[0.0, 0.0],
    drop_rate=[0.0, 0.0],
    drop_path_rate=[0.0, 0.0],
    qkv_bias=[True, True],
    cls_token=[False, True],
    qkv_projection_method=["dw_bn", "dw_bn"],
    kernel_qkv=[3, 3],
    padding_kv=[1, 1],
    stride_kv=[2, 2],
    padding_q=[1, 1],
    stride_q=[1, 1],
    num_labels=5,
)
MAMBA2 = dict(mamba_d_state=8, mamba_d_head=8, mamba_chunk_size=4)

TRANSFORMERS: list[Entry] = [
    Entry(
        "opt_post_norm",
        hf(
            "OPTForCausalLM",
            "OPTConfig",
            init_std=0.2,
            vocab_size=VOCAB,
            **SHAPE,
            **POSITIONS,
            **SPECIAL,
            ffn_dim=64,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
        ),
        decoder_inputs,
        6,
        1,
        "3 x 2, norms on the trunk, the MLP's sum in 2-D and viewed back; a projection + positions",
    ),
    Entry(
        "phi",
        hf("PhiForCausalLM", "PhiConfig", **DECODER),
        decoder_inputs,
        3,
        1,
        "attn + mlp + residual, 3 x 1",
    ),
    Entry(
        "cohere",
        hf("CohereForCausalLM", "CohereConfig", initializer_range=0.1, **DECODER),
        decoder_inputs,
        3,
        1,
        "residual + attn + mlp, 3 x 1",
    ),
    Entry(
        "qwen3",
        hf("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=8),
        decoder_inputs,
        6,
        1,
        "3 x 2; rotary and norms of q and k stay inside",
    ),
    Entry(
        "qwen2_moe",
        hf(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **DECODER,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        decoder_inputs,
        6,
        1,
        "3 x 2; routed (index_add) + shared expert is a sum of branches, in 2-D inside the branch",
    ),
    Entry(
        "gemma3",
        hf(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **DECODER,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=4,
        ),
        decoder_inputs,
        6,
        1,
        "3 x 2, sandwich norms belong to the branches",
    ),
    Entry(
        "bloom_post_norm",
        hf(
            "BloomForCausalLM",
            "BloomConfig",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            n_layer=3,
            n_head=4,
            apply_residual_connection_post_layernorm=True,
            **SPECIAL,
        ),
        decoder_inputs,
        6,
        1,
        "3 x 2; the skip is the normalised trunk, so the pre-norm lies on the trunk",
    ),
    Entry(
        "mamba2",
        hf(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_heads=8,
            head_dim=8,
            expand=2,
            n_groups=1,
            state_size=8,
            chunk_size=4,
            residual_in_fp32=True,
            **SPECIAL,
        ),
        decoder_inputs,
        3,
        1,
        "3 x 1; scan sums and the D skip stay inside",
    ),
    Entry(
        "falcon_h1",
        hf(
            "FalconH1ForCausalLM",
            "FalconH1Config",
            **DECODER,
            **MAMBA2,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_n_groups=1,
        ),
        decoder_inputs,
        6,
        1,
        "3 x 2; residual + (mamba + attention) is one merge",
    ),
    Entry(
        "zamba2",
        hf(
            "Zamba2ForCausalLM",
            "Zamba2Config",
            **DECODER,
            layers_block_type=["mamba", "hybrid", "mamba"],
            mamba_d_state=8,
            mamba_ngroups=1,
            n_mamba_heads=8,
            chunk_size=4,
            num_mem_blocks=1,
        ),
        decoder_inputs,
        3,
        1,
        "3 x 1; x + shared(x, embeddings) feeds the norm of the mamba branch, so it is nested in x + mamba",
    ),
    Entry(
        "rwkv",
        hf(
            "RwkvForCausalLM",
            "RwkvConfig",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            attention_hidden_size=WIDTH,
            num_hidden_layers=3,
            intermediate_size=64,
            context_length=64,
            rescale_every=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        decoder_inputs,
        6,
        1,
        "3 x 2; h * mix + shift(h) * (1 - mix) and the recurrence stay inside (rescaling edits weights: off)",
    ),
    Entry(
        "xlm",
        hf(
            "XLMWithLMHeadModel",
            "XLMConfig",
            vocab_size=VOCAB,
            emb_dim=WIDTH,
            n_layers=3,
            n_heads=4,
            max_position_embeddings=64,
            n_langs=1,
            pad_index=2,
            bos_index=0,
            eos_index=1,
            unk_index=3,
            mask_index=5,
        ),
        encoder_inputs,
        6,
        1,
        "3 x 2, post-norm; the trunk is multiplied by the mask in place",
    ),
    Entry(
        "xlnet",
        hf(
            "XLNetLMHeadModel",
            "XLNetConfig",
            vocab_size=VOCAB,
            d_model=WIDTH,
            n_layer=3,
            n_head=4,
            d_inner=64,
        ),
        no_memory,
        6,
        1,
        "3 x 2, post-norm on a [position, batch, feature] trunk; raw biases in the attention",
    ),
    Entry(
        "fnet",
        hf(
            "FNetForMaskedLM",
            "FNetConfig",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=3,
            **FEED,
            **POSITIONS,
            use_tpu_fourier_optimizations=False,
        ),
        encoder_inputs,
        6,
        1,
        "3 x 2; Fourier mixing has no parameter but mixes positions",
    ),
    Entry(
        "deberta",
        hf(
            "DebertaForMaskedLM",
            "DebertaConfig",
            **ENCODER,
            relative_attention=True,
            max_relative_positions=8,
            pos_att_type=["p2c", "c2p"],
        ),
        encoder_inputs,
        6,
        1,
        "3 x 2, post-norm written out; raw query and value biases and relative scores stay inside",
    ),
    Entry(
        "modernbert",
        hf(
            "ModernBertForMaskedLM",
            "ModernBertConfig",
            **ENCODER,
            **SPECIAL,
            cls_token_id=1,
            sep_token_id=2,
            global_attn_every_n_layers=2,
            local_attention=4,
        ),
        encoder_inputs,
        6,
        1,
        "3 x 2; the first attention reads the trunk without a norm",
    ),
    Entry(
        "mobilebert",
        hf(
            "MobileBertForMaskedLM",
            "MobileBertConfig",
            initializer_range=0.1,
            **ENCODER,
            embedding_size=16,
            intra_bottleneck_size=16,
            num_feedforward_networks=2,
        ),
        encoder_inputs,
        3,
        1,
        "one outer merge a layer; the three inside the bottleneck are nested behind projections",
    ),
    Entry(
        "nystromformer",
        hf(
            "NystromformerForMaskedLM",
            "NystromformerConfig",
            **ENCODER,
            segment_means_seq_len=SEQ,
            num_landmarks=SEQ,
            conv_kernel_size=3,
        ),
        encoder_inputs,
        6,
        1,
        "3 x 2, post-norm; context += conv(value) in place: neither comes from the other",
    ),
    Entry(
        "funnel",
        hf(
            "FunnelForMaskedLM",
            "FunnelConfig",
            vocab_size=VOCAB,
            block_sizes=[2, 2],
            num_decoder_layers=2,
            d_model=WIDTH,
            n_head=4,
            d_head=8,
            d_inner=64,
            **POSITIONS,
        ),
        encoder_inputs,
        12,
        3,
        "4 + 4 + 4: pooling starts the second trunk, upsampled + first block (a plain add) the third",
    ),
    Entry(
        "bart",
        hf(
            "BartForConditionalGeneration",
            "BartConfig",
            init_std=0.1,
            **SEQ2SEQ,
            **POSITIONS,
            decoder_start_token_id=2,
        ),
        encoder_decoder_inputs,
        10,
        2,
        "2 x 2 + 2 x 3, post-norm",
    ),
    Entry(
        "whisper",
        hf(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        mel_and_text,
        10,
        2,
        "2 x 2 + 2 x 3",
    ),
    Entry(
        "wav2vec2",
        hf("Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH),
        wave,
        7,
        1,
        "1 + 3 x 2: the convolutional position embedding is x + conv(x), a merge by dataflow",
    ),
    Entry(
        "wav2vec2_conformer",
        hf("Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", **SPEECH, conv_depthwise_kernel_size=5),
        wave,
        12,
        1,
        "3 x 4: half steps 0.5 * ff + x, attention, convolution; last norm on the trunk",
    ),
    Entry(
        "sew",
        hf("SEWForCTC", "SEWConfig", initializer_range=0.2, **SPEECH, squeeze_factor=2),
        wave,
        6,
        1,
        "3 x 2, post-norm; pool(x) + conv(x) is a pooled shortcut, no site",
    ),
    Entry(
        "clip",
        hf("CLIPModel", "CLIPConfig", **TOWERS),
        text_and_pixels,
        10,
        2,
        "text 2 x 2, vision 3 x 2, other width",
    ),
    Entry(
        "lxmert",
        hf(
            "LxmertModel",
            "LxmertConfig",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_attention_heads=4,
            intermediate_size=64,
            l_layers=2,
            r_layers=1,
            x_layers=2,
            visual_feat_dim=12,
            **POSITIONS,
        ),
        text_and_regions,
        18,
        2,
        "language 2 x 2 + 2 x 3, vision 1 x 2 + 2 x 3; one cross-attention is shared by both trunks",
    ),
    Entry(
        "perceiver",
        hf(
            "PerceiverForMaskedLM",
            "PerceiverConfig",
            initializer_range=0.2,
            vocab_size=VOCAB,
            d_model=16,
            d_latents=WIDTH,
            num_latents=4,
            num_blocks=1,
            num_self_attends_per_block=2,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
            max_position_embeddings=SEQ,
        ),
        byte_inputs,
        7,
        2,
        "latents (an expanded parameter starts the trunk): 2 + 2 x 2; decoder without query residual: 1",
    ),
    Entry(
        "patchtsmixer",
        hf(
            "PatchTSMixerForPrediction",
            "PatchTSMixerConfig",
            context_length=16,
            patch_length=4,
            patch_stride=4,
            num_input_channels=2,
            d_model=16,
            num_layers=3,
            prediction_length=4,
            expansion_factor=2,
        ),
        series,
        6,
        1,
        "3 x 2, patches and features; the final y * scale + loc adds a pooled tensor: no site",
    ),
    Entry(
        "swin",
        hf(
            "SwinForImageClassification",
            "SwinConfig",
            initializer_range=0.2,
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=5,
        ),
        pixel_inputs,
        8,
        2,
        "2 stages x 2 x 2; patch merging (concatenation and projection) between",
    ),
    Entry(
        "pvt_v2",
        hf(
            "PvtV2ForImageClassification",
            "PvtV2Config",
            initializer_range=0.2,
            num_encoder_blocks=2,
            depths=[2, 1],
            sr_ratios=[2, 1],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            image_size=32,
            **PYRAMID,
        ),
        pixel_inputs,
        6,
        2,
        "2 x 2 + 1 x 2; a strided convolution between the stages",
    ),
    Entry(
        "cvt",
        hf("CvtForImageClassification", "CvtConfig", initializer_range=0.2, **CVT),
        pixel_inputs,
        6,
        2,
        "1 x 2 + 2 x 2; BatchNorm inside the attention, a class token before the second trunk",
    ),
    Entry(
        "convnext",
        hf(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            initializer_range=0.2,
            layer_scale_init_value=0.5,
            num_stages=2,
            hidden_sizes=[16, 24],
            depths=[2, 2],
            patch_size=4,
            image_size=32,
            num_labels=5,
        ),
        pixel_inputs,
        4,
        2,
        "2 x 2 channels first, the branch works channels last; down-sampling between",
    ),
    Entry(
        "convnextv2",
        hf(
            "ConvNextV2ForImageClassification",
            "ConvNextV2Config",
            initializer_range=0.2,
            num_stages=2,
            hidden_sizes=[16, 24],
            depths=[2, 2],
            patch_size=4,
            image_size=32,
            num_labels=5,
        ),
        pixel_inputs,
        4,
        2,
        "as convnext; w * (h * norm) + b + h inside the branch is nested",
    ),
    Entry(
        "poolformer",
        hf(
            "PoolFormerForImageClassification",
            "PoolFormerConfig",
            layer_scale_init_value=0.5,
            initializer_range=0.2,
            num_encoder_blocks=2,
            depths=[2, 2],
            padding=[2, 1],
            **PYRAMID,
        ),
        pixel_inputs,
        8,
        2,
        "2 x 2 x 2; pool(h) - h inside the branch is nested under the layer scale",
    ),
    Entry(
        "regnet",
        hf(
            "RegNetForImageClassification",
            "RegNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[3, 2],
            groups_width=8,
            num_labels=5,
        ),
        pixel_inputs,
        3,
        2,
        "(3 - 1) + (2 - 1): the first layer of a stage has a projected shortcut; sums in place",
    ),
    Entry(
        "mobilevit",
        hf(
            "MobileViTForImageClassification",
            "MobileViTConfig",
            initializer_range=0.3,
            image_size=64,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 24, 24, 24, 32],
            num_attention_heads=4,
            num_labels=5,
        ),
        large_pixels,
        21,
        5,
        "inverted residuals 1 + 2, transformers 2 x 2 + 4 x 2 + 3 x 2, each a trunk; concatenated fusion",
    ),
]

MODULES: list[Entry] = [
    Entry(
        "two_modalities", seeded(TwoModalities), two_inputs, 8, 2, "2 layers x (mlp + cross) on each trunk"
    ),
    Entry("long_skips", seeded(LongSkips), x_inputs, 10, 1, "5 blocks x 2; x + tap is a trunk op"),
    Entry(
        "concatenated_skips",
        seeded(ConcatenatedSkips),
        x_inputs,
        10,
        3,
        "3 blocks, then one block after each of two learned joins",
    ),
    Entry(
        "unet_added",
        seeded(UNet),
        image_inputs,
        10,
        5,
        "5 levels x 2; a sum across resolutions is a plain add, the up side starts a trunk",
    ),
    Entry(
        "hierarchy",
        seeded(Hierarchy),
        image_inputs,
        6,
        3,
        "3 stages x 2; proj(x) + f(x) and patch merging end trunks",
    ),
    Entry("class_token", seeded(ClassToken), x_inputs, 4, 2, "2 + 2; a concatenation ends the trunk"),
    Entry("dense_net", seeded(DenseNet), x_inputs, 0, 0, "concatenations only"),
    Entry("shared_layers", seeded(SharedLayers), x_inputs, 6, 1, "3 applications x 2, in place"),
    Entry(
        "fused_add_norm",
        seeded(FusedAddNorm),
        x_inputs,
        6,
        1,
        "7 norms, of which the first has nothing to add",
    ),
    Entry("auxiliary_heads", seeded(Auxiliary), x_inputs, 3, 1, "3 sites; heads are taps"),
    Entry("checkpointed", seeded(Checkpointed), x_inputs, 6, 1, "3 blocks x 2 inside checkpoint wrappers"),
    Entry(
        "layout_ops",
        seeded(LayoutOps),
        x_inputs,
        4,
        1,
        "transposes, 2-D and an extra dimension between the four",
    ),
    Entry("trunk_dropout", seeded(TrunkDropout), x_inputs, 4, 1, "dropout after each of four sums"),
    Entry("trunk_mask", seeded(TrunkMask), x_and_mask, 4, 1, "the trunk is multiplied by a mask in place"),
    Entry("trunk_fill", seeded(TrunkFill), x_and_mask, 4, 1, "masked_fill on the trunk"),
    Entry("trunk_rms_norm", seeded(TrunkRMSNorm), x_inputs, 4, 1, "post-norm written out in basic ops"),
    Entry("trunk_scale", seeded(TrunkScale), x_inputs, 4, 1, "a constant factor after each of four sums"),
    Entry("trunk_time", seeded(TrunkTime), x_and_time, 4, 1, "x + time has no ancestry: a trunk op"),
    Entry("trunk_batch_norm", seeded(TrunkBatchNorm), image_inputs, 4, 2, "2 + 2; BatchNorm ends the trunk"),
    Entry("flat_trunk", seeded(FlatTrunk), rows, 3, 1, "3 sites on [rows, features]"),
    Entry("mixed_precision", seeded(MixedPrecision), x_inputs, 4, 1, "fp32 skip, bf16 branches"),
    Entry("half_trunk", seeded(HalfTrunk), x_inputs, 3, 1, "the casts lie on the trunk"),
    Entry(
        "highway",
        seeded(Highway),
        x_inputs,
        3,
        1,
        "t * f(x) + (1 - t) * x: the factor 1 - t is a trunk scale",
    ),
    Entry("learned_weights", seeded(LearnedWeights), x_inputs, 3, 1, "a * x + b * f(x)"),
    Entry("add_forms", seeded(AddForms), x_inputs, 6, 1, "add alpha, addcmul, -, sub alpha, baddbmm, addmm"),
    Entry("three_leaves", seeded(ThreeLeaves), x_and_time, 3, 1, "a third leaf without ancestry in each sum"),
    Entry(
        "parallel",
        seeded(Parallel),
        x_inputs,
        3,
        1,
        "attention and mlp of one input: one merge, three orders",
    ),
    Entry("conformer", seeded(lambda: Chain(Conformer(), Conformer())), x_inputs, 8, 1, "2 x 4"),
    Entry("modulated", seeded(Modulated), x_and_time, 6, 1, "3 x 2; h * scale + h + shift is no merge"),
    Entry("gelu_new", seeded(twice(GeluNew)), x_inputs, 2, 1, "h + 0.0447 h^3 is pointwise"),
    Entry("local_skip", seeded(twice(LocalSkip)), x_inputs, 2, 1, "u * v + u lies inside the branch"),
    Entry("rotary", seeded(twice(Rotary)), x_inputs, 2, 1, "rotary, biases, relative bias, mask"),
    Entry("adapter", seeded(twice(Adapter)), x_inputs, 2, 1, "h + adapter(h) is nested"),
    Entry(
        "state_space", seeded(twice(StateSpace)), x_inputs, 2, 1, "the recurrence and y + D * u are nested"
    ),
    Entry(
        "nested", seeded(twice(Nested)), x_inputs, 2, 1, "2 outer sites; 2 x 2 at the small width are nested"
    ),
    Entry(
        "global_context",
        seeded(twice(GlobalContext)),
        x_inputs,
        2,
        1,
        "the branch is broadcast over positions",
    ),
    Entry(
        "side_value",
        seeded(twice(SideValue)),
        x_inputs,
        2,
        1,
        "x + f(x) without gradients feeds a factor only",
    ),
    Entry("autocast_off", seeded(twice(FullPrecision)), x_inputs, 2, 1, "autocast region inside the branch"),
    Entry("quantised", seeded(twice(Quantised)), x_inputs, 2, 1, "weights in buffers count as learned"),
    Entry(
        "mlp_mixer",
        seeded(
            lambda: Chain(*(Residual(m()) for m in (TokenMixing, Mlp, TokenMixing, Mlp)), nn.LayerNorm(C))
        ),
        x_inputs,
        4,
        1,
        "2 x (tokens + channels), transposes inside the branch",
    ),
    Entry(
        "squeeze_excite",
        seeded(lambda: Chain(nn.Conv2d(3, 8, 3), SqueezeExcite(), SqueezeExcite())),
        image_inputs,
        2,
        1,
        "channels first, one merge a block",
    ),
    Entry("shared_gate", seeded(SharedGate), x_inputs, 4, 1, "a gate on every branch is no skip"),
    Entry(
        "decoys",
        seeded(Decoys),
        x_and_time,
        0,
        0,
        "position, bias, pointwise local skips, modulation: no merge",
    ),
]

MODELS: list[Entry] = TRANSFORMERS + MODULES


def main() -> None:
    for entry in MODELS:
        entry.build()(**entry.inputs())
        print(f"{entry.name:20s} {entry.sites:3d} sites {entry.trunks} trunks   {entry.why}")


if __name__ == "__main__":
    main()
