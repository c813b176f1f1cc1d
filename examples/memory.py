"""What a training step keeps for its backward, over the sites of a recompute block: measured, and as the plan has it.

A small Llama with 4 streams, compiled with "aot_eager". Nothing is timed: bytes are the same on every machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mhc_compile import cost_model, mhc_compile, partition, recompute

LENGTH = 32


def build(layers: int) -> nn.Module:
    """A Llama over bytes with random weights, in training."""
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=256, num_hidden_layers=layers, max_position_embeddings=LENGTH, **shape)
    return LlamaForCausalLM(config).train()


def kept(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes that a forward keeps for the backward, parameters and inputs left out."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs)
    for own in [*model.parameters(), *model.buffers(), *inputs.values()]:
        if isinstance(own, Tensor):
            sizes.pop(own.untyped_storage().data_ptr(), None)
    assert output.logits.requires_grad
    return sum(sizes.values())


def draw(found: dict[str, Any], path: Path) -> None:
    """The prediction as a line, the measurement as points over it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lengths = list(found["measured"])
    axes.plot(lengths, [found["predicted"][one] / 1024 for one in lengths], color="#b07a3c", label="predicted")
    axes.plot(lengths, [found["measured"][one] / 1024 for one in lengths], "o", color="#2b5d8a", label="measured")
    axes.axhline(found["stored"] / 1024, color="#888888", linestyle=":", label="without recomputation, measured")
    axes.plot([], [], " ", label=f"plan, blocks of {found['blocks']}: {found['plan'] / 1024:.0f} KiB")
    axes.set(xlabel="sites of a block", ylabel="KiB kept for the backward", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(one) for one in lengths])
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(layers: int = 8, picture: Path | str | None = "memory.png") -> dict[str, Any]:
    """Run the example; gives bytes kept, by the length of a block."""
    torch.manual_seed(0)
    model = build(layers)
    inputs = {"input_ids": torch.randint(256, (2, LENGTH)), "use_cache": False}
    mhc_compile(model, n=4, backend="aot_eager", example_inputs=inputs)
    costs = cost_model(model, inputs)
    print(costs)
    sites = 2 * layers
    found: dict[str, Any] = {"stored": kept(model, inputs), "measured": {}, "predicted": {}}
    for length in [one for one in (1, 2, 3, 4, 8, 16, 32) if one <= sites]:
        recompute(model, length)
        found["measured"][length] = kept(model, inputs)
        found["predicted"][length] = costs.kept(length)
    plan = partition(model, inputs)
    recompute(model, plan)
    found["plan"], found["blocks"] = kept(model, inputs), [len(block) for block in plan.blocks]

    print(f"\nsites a block   measured    predicted   (without recomputation {found['stored'] / 1024:.0f} KiB)")
    for length, measured in found["measured"].items():
        print(f"{length:13d} {measured / 1024:7.0f} KiB  {found['predicted'][length] / 1024:7.0f} KiB")
    print(f"the plan's blocks, {found['blocks']}: {found['plan'] / 1024:.0f} KiB kept")
    if picture is not None:
        draw(found, Path(picture))
        print(f"picture: {picture}")
    return found


if __name__ == "__main__":
    main()
