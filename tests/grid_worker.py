"""What each process of a grid of stages and replicas runs: `python grid_worker.py <rank> <folder>`.

Two replicas of a pipeline of two stages, each stage in DDP with its twin, take a step of training with other data each;
losses and gradients must be those of the whole model in one process, in float64. The mHC weights are random. It
imports little, as four processes start at once.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mhc_compile import Plan, mhc_compile, partition, pipeline_schedule, pipeline_stages

STAGES, REPLICAS, MICROBATCHES = 2, 2, 4
WORLD = STAGES * REPLICAS
WIDTH, ROWS = 8, 3
SECONDS = 120  # what a collective waits for the other processes
TOLERANCE = 1e-9  # of values of order one, in float64; what differs is the order of sums


class Small(nn.Module):
    """Four residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def converted(x: Tensor) -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    model = mhc_compile(Small().double(), 4, backend="eager", example_inputs=x)
    with torch.no_grad():
        for parameter in model.get_submodule("mhc").parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def whole_step(model: nn.Module, x: Tensor, target: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of the microbatches, and the gradients of their mean."""
    model.zero_grad()
    losses = [loss_of(model(a), b) for a, b in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True)]
    (sum(losses, torch.zeros(())) / MICROBATCHES).backward()
    return [loss.detach() for loss in losses], {name: p.grad.clone() for name, p in model.named_parameters()}


def prepare(model: nn.Module, data: Tensor, folder: Path) -> None:
    """In one process, for all: the plan, and what the whole model gives for the data of each replica."""
    expected = [whole_step(model, *both) for both in data]
    assert not torch.allclose(expected[0][0][0], expected[1][0][0])
    torch.manual_seed(0)
    x, target = (part[:ROWS] for part in data[0])
    assert float((loss_of(Small().double()(x), target) - expected[0][0][0]).abs()) > 1e-3, "mHC makes no difference"
    torch.save(expected, folder / "expected.pt")
    partition(model, x, stages=STAGES, microbatches=MICROBATCHES).save(folder / "plan.json")


def check(rank: int, folder: Path) -> None:
    """A step of this process's stage and replica against the whole model."""
    stage, replica = rank % STAGES, rank // STAGES
    pipelines = [dist.new_group([STAGES * one + each for each in range(STAGES)]) for one in range(REPLICAS)]
    twins = [dist.new_group([STAGES * each + one for each in range(REPLICAS)]) for one in range(STAGES)]
    generator = torch.Generator().manual_seed(1)
    size = (REPLICAS, 2, MICROBATCHES * ROWS, WIDTH)
    data = torch.randn(size, generator=generator, dtype=torch.float64)
    part = data[0, 0, :ROWS]
    model = converted(part)
    if rank == 0:
        prepare(model, data, folder)
    dist.barrier()
    expected, plan = torch.load(folder / "expected.pt"), Plan.load(folder / "plan.json")
    model.zero_grad()
    (own,) = pipeline_stages(plan, model, part, group=pipelines[replica])
    own.submod = DistributedDataParallel(own.submod, process_group=twins[stage])
    losses: list[Tensor] = []
    x, target = data[replica]
    given = (x,) if own.is_first else ()
    more = {"target": target, "losses": losses} if own.is_last else {}
    pipeline_schedule([own], loss_of).step(*given, **more, return_outputs=False)

    assert len(losses) == (MICROBATCHES if own.is_last else 0)
    for loss, right in zip(losses, expected[replica][0], strict=False):
        assert float((loss - right).abs()) <= TOLERANCE, "a loss"
    names = [name for name, _ in own.module.named_parameters()]
    assert any(name.startswith("mhc.") for name in names) and any(name.startswith("layers.") for name in names)
    for name, parameter in own.module.named_parameters():
        right = sum((one[1][name] for one in expected), torch.zeros(())) / REPLICAS
        assert parameter.grad is not None and float(right.abs().max()) > 1e-6, name
        assert float((parameter.grad - right).abs().max()) <= TOLERANCE, name
    print(f"stage {stage} of replica {replica} agrees in {len(names)} gradients", flush=True)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=limit)
    check(rank, folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
