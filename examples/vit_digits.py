"""A small vision transformer on scikit-learn's handwritten digits, trained plain and with 4 streams."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from mhc_compile import mhc_compile, param_groups

Split = tuple[Tensor, Tensor]


def build(layers: int = 2) -> nn.Module:
    """A ViT with random weights for 8 x 8 images of one channel, in patches of 4 x 4."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def digits() -> tuple[Split, Split]:
    """Images [N, 1, 8, 8] in [-1, 1] and labels, for training and for the test."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    return (images[train], labels[train]), (images[test], labels[test])


def train(model: nn.Module, data: Split, epochs: int, size: int = 96) -> float:
    """Train in place; gives the mean loss of the last epoch."""
    images, labels = data
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(param_groups(model), lr=5e-3)
    model.train()
    losses: list[float] = []
    for _ in range(epochs):
        losses.clear()
        # whole batches only: another batch size in the last step would compile the forward again
        for chosen in torch.randperm(len(labels), generator=order).split(size)[: len(labels) // size]:
            loss = F.cross_entropy(model(pixel_values=images[chosen]).logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / max(len(losses), 1)


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Part of the images that are classified rightly."""
    images, labels = data
    predicted = model.eval()(pixel_values=images).logits.argmax(-1)
    return float((predicted == labels).float().mean())


def main(n: int = 4, epochs: int = 10, layers: int = 2, backend: str = "aot_eager") -> dict[str, float]:
    """Run the example; gives the test accuracy of the plain and of the converted model."""
    training, test = digits()
    results = {}
    for name in ("plain", f"mHC, n={n}"):
        model = build(layers)
        if name != "plain":
            mhc_compile(model, n=n, backend=backend)  # inputs are derived from the config
            own = sum(parameter.numel() for key, parameter in model.named_parameters() if not key.startswith("mhc."))
            added = sum(parameter.numel() for parameter in model.mhc.parameters())
            print(f"{name}: {added} mHC parameters beside {own} of the model")
        loss = train(model, training, epochs)
        results[name] = accuracy(model, test)
        print(f"{name}: training loss {loss:.3f}, test accuracy {results[name]:.1%}")
    return results


if __name__ == "__main__":
    main()
