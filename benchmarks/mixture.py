"""A mixture-of-experts decoder of DeepSeek's shape in plain torch, on the meta device: sizes without weights.

Multi-head latent attention, leading dense layers, then layers of routed and shared experts; pre-norm, two residual adds
a layer. Routing is even, so that all sizes are known: an expert takes the same number of rows, and what is left over by
the division is dropped. `parallel` devices share the experts of a layer; each holds its part and computes as many rows
as it has itself, which the others send.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Mixture:
    """Sizes. dense: leading layers without experts, and their hidden width; expert: the hidden width of one expert."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    dense: tuple[int, int]
    experts: int
    active: int
    shared: int
    expert: int
    parallel: int = 1
    query_rank: int = 1536
    key_rank: int = 512
    plain: int = 128  # of a head's queries and keys, without positions
    rotary: int = 64  # with them
    value: int = 128


def projection(width: int, to: int) -> nn.Linear:
    return nn.Linear(width, to, bias=False)


class Attention(nn.Module):
    """Queries and keys of low rank; rotary positions cost next to nothing and are left out."""

    def __init__(self, size: Mixture) -> None:
        super().__init__()
        self.size = size
        key = size.plain + size.rotary
        self.norm, self.query_norm = nn.RMSNorm(size.width), nn.RMSNorm(size.query_rank)
        self.key_norm = nn.RMSNorm(size.key_rank)
        self.query_down = projection(size.width, size.query_rank)
        self.query_up = projection(size.query_rank, size.heads * key)
        self.key_down = projection(size.width, size.key_rank + size.rotary)
        self.key_up = projection(size.key_rank, size.heads * (size.plain + size.value))
        self.out = projection(size.heads * size.value, size.width)

    def forward(self, x: Tensor) -> Tensor:
        size, x = self.size, self.norm(x)
        q = self._heads(self.query_up(self.query_norm(self.query_down(x))))
        low, rotary = self.key_down(x).split([size.key_rank, size.rotary], -1)
        k, v = self._heads(self.key_up(self.key_norm(low))).split([size.plain, size.value], -1)
        k = torch.cat((k, rotary.unsqueeze(1).expand(-1, size.heads, -1, -1)), -1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.size.heads, -1)).transpose(1, 2)


class Dense(nn.Module):
    """A gated MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = projection(width, 2 * hidden), projection(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Experts(nn.Module):
    """Routed experts and shared ones."""

    def __init__(self, size: Mixture) -> None:
        super().__init__()
        self.active, self.here = size.active, size.experts // size.parallel
        self.router = projection(size.width, size.experts)
        self.up = nn.Parameter(torch.empty(self.here, size.width, 2 * size.expert))
        self.down = nn.Parameter(torch.empty(self.here, size.expert, size.width))
        self.always = Dense(size.width, size.shared * size.expert)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).sigmoid().topk(self.active, -1)
        order = chosen.flatten().argsort()
        rows = order.shape[0]
        order = order[: rows // self.here * self.here]
        given = x.flatten(0, -2).index_select(0, order // self.active).unflatten(0, (self.here, -1))
        gate, up = torch.bmm(given, self.up).chunk(2, -1)
        made = torch.bmm(F.silu(gate) * up, self.down).flatten(0, 1)
        made = made.new_zeros(rows, made.shape[-1]).index_copy(0, order, made).unflatten(0, (-1, self.active))
        out: Tensor = (made * weights.flatten(0, -2).unsqueeze(-1)).sum(1).view_as(x) + self.always(x)
        return out


class Feed(nn.Module):
    """A norm, and an MLP or experts."""

    def __init__(self, size: Mixture, layer: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(size.width)
        self.inner = Dense(size.width, size.dense[1]) if layer < size.dense[0] else Experts(size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.norm(x))
        return out


class Decoder(nn.Module):
    """Embedding, layers, norm and head, in bfloat16 on the meta device."""

    def __init__(self, size: Mixture) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embed, self.head = nn.Embedding(size.vocabulary, size.width), projection(size.width, size.vocabulary)
            self.attention = nn.ModuleList(Attention(size) for _ in range(size.layers))
            self.feed = nn.ModuleList(Feed(size, layer) for layer in range(size.layers))
            self.norm = nn.RMSNorm(size.width)
        self.bfloat16()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for attention, feed in zip(self.attention, self.feed, strict=True):
            x = x + attention(x)
            x = x + feed(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
