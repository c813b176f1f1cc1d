"""Watch a training: a small Llama with 4 streams, its gains, streams and gradients, as numbers and as a picture.

It is trained on characters of Python's documentation. A Monitor samples every 10th step; the gradients are clipped with
a threshold for the mHC parameters apart from the others'; the matrices that mix streams learn more slowly than what
reads and writes them.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mhc_compile import AdaptiveClip, Monitor, mhc_compile, param_groups, scale_updates

LENGTH, BATCH, LR = 64, 8, 3e-3


def main(steps: int = 81, layers: int = 6, every: int = 10, picture: str | Path = "monitoring.png") -> Monitor:
    """Run the example; gives the Monitor."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = mhc_compile(LlamaForCausalLM(config), n=4, backend="eager").train()
    groups = [{**group, "lr": 10 * LR if group["name"] == "mhc" else LR} for group in param_groups(model)]
    optimizer = torch.optim.AdamW(groups)
    scale_updates(optimizer, model, res=0.5)
    clip = AdaptiveClip(model, warm_up=20)
    text = torch.tensor(list("\n".join(topics.values()).encode("utf-8", "replace")))

    print("step   loss  composite gain  similarity  gradient norm (clipped by)   of mHC (clipped by)")
    with Monitor(model, every=every) as monitor:
        for step in range(steps):
            starts = torch.randint(0, len(text) - LENGTH, (BATCH,))
            ids = torch.stack([text[start : start + LENGTH] for start in starts])
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            monitor.gradients()  # before they are clipped
            clipped = clip()
            optimizer.step()
            optimizer.zero_grad()
            if monitor.sampled:
                seen = monitor.log(sites=False)
                print(
                    f"{step:4}  {loss.item():5.2f}  {seen['mhc/composite_backward/trunk0']:14.4f}"
                    f"  {seen['mhc/lowest_similarity/trunk0']:10.5f}"
                    f"  {seen['mhc/grad_norm']:13.3f} ({clipped.own_scale:5.3f})"
                    f"       {seen['mhc/grad_norm_mhc']:13.4f} ({clipped.mhc_scale:5.3f})"
                )
    monitor.plot(picture)
    print(f"picture: {picture}")
    return monitor


if __name__ == "__main__":
    main()
