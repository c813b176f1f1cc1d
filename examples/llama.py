"""A small Llama on byte-level English text: explain, convert to 4 streams, verify, train, look, restore."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mhc_compile import composite_gains, explain, mhc_compile, observe, param_groups, restore, verify

LENGTH = 64


def build(layers: int = 2) -> nn.Module:
    """A Llama over bytes with random weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def text() -> Tensor:
    """The language reference that Python carries, as bytes."""
    joined = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(joined.encode()), dtype=torch.long)


def batch(data: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` random pieces of the text."""
    starts = torch.randint(len(data) - LENGTH, (size,), generator=generator)
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()])


@torch.no_grad()
def loss_on(model: nn.Module, ids: Tensor) -> float:
    """Mean cross entropy a byte, in nats."""
    model.eval()
    return float(model(input_ids=ids, labels=ids).loss)


def main(n: int = 4, steps: int = 60, layers: int = 2, backend: str = "aot_eager") -> dict[str, float]:
    """Run the example; gives the losses before and after training."""
    torch.manual_seed(0)
    model = build(layers).eval()
    data, generator = text(), torch.Generator().manual_seed(0)
    training, held_out = data[: -len(data) // 10], data[-len(data) // 10 :]
    probe = batch(held_out, 16, generator)
    inputs = {"input_ids": probe[:2]}

    print(explain(model, inputs))
    plain = loss_on(model, probe)

    mhc_compile(model, n=n, backend=backend, example_inputs=inputs)
    print()
    print(verify(model, inputs))

    before = loss_on(model, probe)
    print(f"\nheld-out loss: plain {plain:.4f}, converted {before:.4f}")
    # The optimizer is built after the conversion, so that it holds the parameters of the sites too.
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.1), lr=3e-3)
    model.train()
    for _ in range(steps):
        ids = batch(training, 8, generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = loss_on(model, probe)
    print(f"after {steps} steps of training: {after:.4f}\n")

    print("site                           pre: how each stream is read    post: how it is written")
    sites = observe(model, inputs)
    for name, site in sites.items():
        print(f"{name:30} {_row(site.pre)}       {_row(site.post)}")
    last = composite_gains([site.res for site in sites.values()])[-1]
    print(f"gain of all mixing matrices together: forward {last.forward:.3f}, backward {last.backward:.3f}")

    restore(model)
    restored = loss_on(model, probe)
    print(f"\nrestored to {type(model).__name__} without streams: loss {restored:.4f} with the trained weights")
    return {"plain": plain, "before": before, "after": after, "restored": restored}


def _row(values: Tensor) -> str:
    """One mean over tokens for each stream."""
    return " ".join(f"{value:5.3f}" for value in values.mean(0).tolist())


if __name__ == "__main__":
    main()
