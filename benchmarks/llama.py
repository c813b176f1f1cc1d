"""A decoder of Llama's shape in plain torch, as it is and with mHC written by hand: needs nothing but torch.

`Llama` holds its weights in the order of Llama's own; `by_hand` gives its trunk n streams, in the paper's formulas as
one would write them, with the parameters of a converted copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile import HyperConnection

Branch = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of a batch."""

    layers: int
    width: int
    heads: int
    hidden: int
    vocabulary: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


class Layer(nn.Module):
    """Attention with rotary positions, and a gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, hidden = shape.width, shape.hidden
        self.heads = shape.heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = self.qkv(self.norm_1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(-2, -3)
        q, k, v = parts.chunk(3, dim=-3)
        mixed = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(-2, -3).flatten(-2))
        return out

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys turned by their position."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Llama(nn.Module):
    """Embedding, layers, norm and head; `sites` takes the place of the residual adds: (streams, branch) -> streams."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(shape.vocabulary, shape.width), nn.Linear(shape.width, shape.vocabulary)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, 1e-6)
        self.half = shape.width // shape.heads // 2

    def positions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rates = 10000 ** (-torch.arange(self.half, device=x.device, dtype=torch.float32) / self.half)
        angles = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None] * rates
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        cos, sin = self.positions(x)
        for layer in self.layers:
            x = x + layer.attention(x, cos, sin)
            x = x + layer.mlp(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class ByHand(nn.Module):
    """A `Llama` on n streams, op by op."""

    def __init__(self, model: Llama, sites: list[HyperConnection]) -> None:
        super().__init__()
        self.model, self.sites = model, nn.ModuleList(sites)

    def forward(self, ids: Tensor) -> Tensor:
        model = self.model
        x = model.embed(ids)
        cos, sin = model.positions(x)
        streams = x.unsqueeze(-2).repeat(1, 1, self.sites[0].n, 1)
        for number, layer in enumerate(model.layers):
            first, second = self.sites[2 * number], self.sites[2 * number + 1]
            streams = site(first, streams, lambda u, layer=layer: layer.attention(u, cos, sin))
            streams = site(second, streams, layer.mlp)
        logits: Tensor = model.head(model.norm(streams.mean(-2)))
        return logits


def site(own: HyperConnection, streams: Tensor, branch: Branch) -> Tensor:
    """One site of the paper: coefficients in float32, twenty iterations one by one, streams in their own dtype."""
    n = streams.shape[-2]
    wide = streams.flatten(-2).float()
    z = (wide @ own.phi) * torch.rsqrt(wide.square().mean(-1, keepdim=True) + own.eps)
    alpha, bias = own.alpha, own.bias
    pre = torch.sigmoid(alpha[0] * z[..., :n] + bias[:n])
    post = 2 * torch.sigmoid(alpha[1] * z[..., n : 2 * n] + bias[n : 2 * n])
    logits = (alpha[2] * z[..., 2 * n :] + bias[2 * n :]).unflatten(-1, (n, n))
    res = torch.exp(logits - logits.amax(-2, keepdim=True))
    for _ in range(own.iterations):
        res = res / res.sum(-2, keepdim=True)
        res = res / res.sum(-1, keepdim=True)
    f = branch((pre.unsqueeze(-1) * streams).sum(-2).to(streams.dtype))
    return (res @ streams.float() + post.unsqueeze(-1) * f.float().unsqueeze(-2)).to(streams.dtype)
