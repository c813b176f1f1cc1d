"""A small DeepSeek-V4, which is mHC as it comes: plain, under inductor, and with `backend="mhc"`, which fuses its mHC.

Same logits and same gradients, how many ops its graph holds before and after, and the times of a step, taken in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mhc_compile import explain


def build(layers: int = 2, width: int = 64) -> nn.Module:
    """A DeepSeek-V4 over bytes with random weights, its mHC parameters too: as released they start at nothing."""
    config = DeepseekV4Config(
        vocab_size=256,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        num_key_value_heads=1,
        head_dim=32,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        qk_rope_head_dim=16,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_hash_layers=0,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        sliding_window=32,
        hc_mult=4,
        use_cache=False,
    )
    model = DeepseekV4ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_hc." in name or "hc_head." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def text(batch: int, length: int) -> Tensor:
    """The beginning of the language reference that Python carries, as bytes."""
    data = "\n".join(topics[name] for name in sorted(topics)).encode()[: batch * length]
    return torch.tensor(list(data)).view(batch, length)


def step(call: Callable[..., Any], model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of all parameters."""
    model.zero_grad()
    output = call(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def far(found: Tensor, right: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((found - right).abs().max() / right.abs().max().clamp(min=1e-12))


def main(
    layers: int = 1, batch: int = 4, length: int = 64, turns: int = 5, backends: tuple[str, ...] = ("inductor", "mhc")
) -> dict[str, float]:
    """Run the example; gives how far each backend is from eager, and the median seconds of a step."""
    torch.manual_seed(0)
    model = build(layers).eval()
    ids = text(batch, length)
    print(explain(model, {"input_ids": ids}))

    calls: dict[str, Callable[..., Any]] = {}
    first: dict[str, float] = {}
    results = {}
    for name in ("eager", *backends):
        calls[name] = model if name == "eager" else torch.compile(model, backend=name)
        start = time.perf_counter()
        results[name] = step(calls[name], model, ids)
        first[name] = time.perf_counter() - start
    logits, gradients = results["eager"]
    found: dict[str, float] = {}
    for name in backends:
        others, theirs = results[name]
        found[f"{name}: logits"] = far(others, logits)
        found[f"{name}: gradients"] = max(far(theirs[key], gradients[key]) for key in gradients)

    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name in calls:
            start = time.perf_counter()
            step(calls[name], model, ids)
            times[name].append(time.perf_counter() - start)
    print("\nbackend   first step    a step   logits off  gradients off")
    for name in calls:
        seconds = statistics.median(times[name])
        found[f"{name}: seconds"] = seconds
        off = [f"{found.get(f'{name}: {what}', 0.0):9.1e}" for what in ("logits", "gradients")]
        print(f"{name:9s} {first[name]:8.1f} s {seconds * 1e3:6.0f} ms    {off[0]}      {off[1]}")
    return found


if __name__ == "__main__":
    main()
