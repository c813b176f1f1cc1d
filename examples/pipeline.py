"""A small Llama on byte-level English text, converted to 4 streams and trained in two stages on two processes.

    torchrun --nproc-per-node 2 examples/pipeline.py

Gloo on CPU, NCCL where there is a GPU for each process. The losses are those of training the whole model in one
process, which every process also does here, to compare.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from llama import LENGTH, batch, build, text
from torch import Tensor, nn

from mhc_compile import mhc_compile, param_groups
from mhc_compile.partition import partition
from mhc_compile.pipeline import pipeline_schedule, pipeline_stages

SIZE = 2  # of a microbatch


def batches(steps: int, microbatches: int) -> Iterator[Tensor]:
    """The same batches in every process."""
    data, generator = text(), torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield batch(data, SIZE * microbatches, generator)


def loss_of(output: Any, ids: Tensor) -> Tensor:
    """Mean cross entropy a byte, in nats."""
    return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def optimizer_for(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, with the parameters of sites outside of weight decay."""
    return torch.optim.AdamW(groups, lr=3e-3)


def train_whole(model: nn.Module, steps: int, microbatches: int) -> list[float]:
    """Train in this process alone."""
    optimizer, losses = optimizer_for(param_groups(model, weight_decay=0.1)), []
    for ids in batches(steps, microbatches):
        optimizer.zero_grad()
        loss = loss_of(model(input_ids=ids.to(model.device)), ids.to(model.device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_in_stages(model: nn.Module, stages: list[Any], steps: int, microbatches: int) -> list[float]:
    """Train the stages of this process; only the process of the last one sees losses."""
    schedule = pipeline_schedule(stages, loss_of)
    own = {parameter for stage in stages for parameter in stage.submod.parameters()}
    groups = param_groups(model, weight_decay=0.1)
    mine = [{**group, "params": [one for one in group["params"] if one in own]} for group in groups]
    optimizer, losses = optimizer_for(mine), []
    first, last = (any(getattr(stage, which) for stage in stages) for which in ("is_first", "is_last"))
    for ids in batches(steps, microbatches):
        ids, seen = ids.to(stages[0].device), list[Tensor]()
        optimizer.zero_grad()
        given: dict[str, Any] = {"input_ids": ids} if first else {}
        if last:
            given |= {"target": ids, "losses": seen}
        schedule.step(**given, return_outputs=False)
        optimizer.step()
        if seen:
            losses.append(torch.stack(seen).mean().item())
    return losses


def main(
    n: int = 4, steps: int = 20, layers: int = 2, microbatches: int = 4, backend: str = "aot_eager"
) -> dict[str, list[float]]:
    """Run the example; gives the losses of both ways, those of the stages in the process of the last one."""
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    inputs = {"input_ids": torch.zeros(SIZE, LENGTH, dtype=torch.long, device=device)}
    model = mhc_compile(build(layers).to(device), n=n, backend=backend, example_inputs=inputs)

    plan = partition(model, inputs, stages=dist.get_world_size(), microbatches=microbatches)
    if dist.get_rank() == 0:
        print(plan, flush=True)
    whole = train_whole(copy.deepcopy(model), steps, microbatches)
    stages = pipeline_stages(plan, model, inputs)
    losses = train_in_stages(model, stages, steps, microbatches)
    for stage in stages:
        count = sum(parameter.numel() for parameter in stage.submod.parameters())
        place = f"stage {stage.stage_index} of {stage.num_stages}"
        print(f"process {dist.get_rank()}: {place}, {count} weights", flush=True)
    for number, (loss, expected) in enumerate(zip(losses, whole, strict=False)):
        print(f"step {number}: loss {loss:.4f} in stages, {expected:.4f} whole", flush=True)
    dist.destroy_process_group()
    return {"stages": losses, "whole": whole}


if __name__ == "__main__":
    main()
