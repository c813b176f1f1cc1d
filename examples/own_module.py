"""A module of one's own: what is found in it, what is refused and why, and what the passes did.

The model mixes a convolution stem with transformer blocks. It is written the way such code is written: a fused
"add and norm" helper that returns the state beside the norm, a gate on a branch, one block applied twice, a pooled
shortcut, and sums that are no residual adds.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile import explain, history, mhc_compile

WIDTH = 32


def add_norm(state: Tensor, update: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The new state and its norm, as fused kernels give them."""
    state = state + update
    return state, norm(state)


class Attention(nn.Module):
    """Self-attention with a learned bias on the scores."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.score_bias = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores + self.score_bias
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a gated MLP around fused add-norms."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, state: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        state, normed = add_norm(state, self.attention(normed), self.norm1)
        update = torch.sigmoid(self.gate(normed)) * self.down(F.gelu(self.up(normed)))
        return add_norm(state, update, self.norm2)


class Stem(nn.Module):
    """Convolutions: one with a plain shortcut, one with a pooled shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.same = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.halve = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image)
        x = x + self.same(F.relu(x))
        return F.avg_pool2d(x, 2) + self.halve(F.relu(x))


class Hybrid(nn.Module):
    """Stem, then the first block twice and the second once, then a classifier."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = Stem()
        self.position = nn.Parameter(torch.zeros(16, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.shared, self.last = Block(), Block()
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, image: Tensor) -> Tensor:
        state = self.stem(image).flatten(2).transpose(1, 2)
        state = state + self.position
        normed = self.norm(state)
        for block in (self.shared, self.shared, self.last):
            state, normed = block(state, normed)
        return self.head(normed.mean(1))


def main(n: int = 4, backend: str = "aot_eager") -> dict[str, int]:
    """Run the example; gives the numbers of sites, trunks and refusals."""
    torch.manual_seed(0)
    model = Hybrid().eval()
    image = torch.randn(2, 1, 16, 16)
    expected = model(image)

    found = explain(model, (image,))
    print(found)

    mhc_compile(model, n=n, backend=backend, example_inputs=(image,))
    with torch.no_grad():
        difference = float((model(image) - expected).abs().max())
    print(f"\nlargest change of an output by the conversion: {difference:.0e}\n")

    records = history(model)
    for record in records:
        print(record)

    code = next(record for record in records if record.name == "expand").code.splitlines()
    start = next(number for number, line in enumerate(code) if "mhc.coefficients" in line)
    end = next(number for number, line in enumerate(code) if "mhc.merge" in line)
    print("\nthe first site in the rewritten graph:")
    for line in code[start : end + 1]:
        print("  " + _short(line))
    return {"sites": len(found.sites), "trunks": len(found.trunks), "refused": len(found.refused)}


def _short(line: str) -> str:
    """A line of the graph's code without the deletions at its end, with parameters by their names."""
    line = re.sub(r"l_self_modules_(\w+?)_parameters_(\w+?)_(?=\W)", r"\1.\2", line.split(";  ")[0].strip())
    return line.replace("_modules_", ".").replace("torch.ops.", "").replace(".default(", "(")


if __name__ == "__main__":
    main()
