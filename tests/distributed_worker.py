"""What each process of test_distributed.py runs: `python distributed_worker.py <check> ... <rank> <store>`.

Each check does its work on this process's half of a batch in a wrapped model, and the same work on the whole batch in
an unwrapped one, in float64; the results must agree. The mHC weights are random.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mhc_compile import AdaptiveClip, Monitor, explain, mhc_compile, observe, restore, scale_updates, trace, verify
from mhc_compile.errors import MHCError
from mhc_compile.monitor_sample import Sample, sample_of
from zoo import ZOO

WORLD = 2
SECONDS = 30  # what a collective waits for the other process
STEPS = 2
WIDTH, VOCAB = 16, 24
TOLERANCE = 1e-9  # of values of order one, in float64; what differs is the order of sums
FAR = 1e-2

Wrap = Callable[[nn.Module], nn.Module]


# ---------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Three blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.head(self.norm(x)).clone()  # a view would make FSDP2 warn


class Spare(Model):
    """The model with a layer that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)


def batches(count: int) -> list[Tensor]:
    """Batches of token ids of different contents."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (4, 6), generator=generator) for _ in range(count)]


def half(batch: Tensor) -> Tensor:
    return batch.chunk(WORLD)[dist.get_rank()]


def plain(kind: type[nn.Module] = Model) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def scramble(model: nn.Module) -> nn.Module:
    """Random mHC weights, the same in every process."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.get_submodule("mhc").parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@functools.cache
def _converted(kind: type[nn.Module], backend: str) -> nn.Module:
    return scramble(mhc_compile(plain(kind), n=4, example_inputs=batches(1)[0], backend=backend))


def converted(kind: type[nn.Module] = Model, backend: str = "eager") -> nn.Module:
    """A fresh converted model; a copy, which is quicker than another conversion."""
    return copy.deepcopy(_converted(kind, backend))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


# ----------------------------------------------------------------------------------------- comparisons


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(a: Tensor, b: Tensor) -> float:
    return (a.detach().double() - b.detach().double()).abs().max().item()


def same_output(actual: Tensor, expected: Tensor, batch: Tensor, tolerance: float = TOLERANCE) -> None:
    """This process's half of the expected output, and not the plain model's."""
    assert distance(actual, half(expected)) <= tolerance, f"off by {distance(actual, half(expected))}"
    with torch.no_grad():
        assert distance(expected, plain()(batch)) > FAR, "the test could not tell mHC from the plain model"


def same_tensors(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, other in expected.items():
        mine = actual[name]
        assert (mine is None) == (other is None), f"{name}: one is None"
        if mine is not None and other is not None:
            assert distance(mine, other) <= TOLERANCE, f"{name} is off by {distance(mine, other)}"


def same_parameters(actual: nn.Module, expected: nn.Module) -> None:
    same_tensors(*({name: whole(p) for name, p in model.named_parameters()} for model in (actual, expected)))


def same_gradients(actual: nn.Module, expected: nn.Module) -> None:
    same_tensors(*({name: whole(p.grad) for name, p in model.named_parameters()} for model in (actual, expected)))


@dataclass
class Step:
    """An optimizer step: the output of its forward, the gradients, and the parameters behind it."""

    output: Tensor
    gradients: dict[str, Tensor | None]
    parameters: dict[str, Tensor]


def steps(model: nn.Module, run: nn.Module, data: list[Tensor]) -> Iterator[Step]:
    """Train `model`, called as `run`, a step a batch."""
    optimizer = optimizer_of(model)
    for batch in data:
        output = run(batch)
        loss_of(output).backward()
        gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        gradients = {name: grad if grad is None else grad.clone() for name, grad in gradients.items()}
        optimizer.step()
        optimizer.zero_grad()
        parameters = {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()}
        yield Step(output.detach(), gradients, parameters)


@functools.cache
def one_process(kind: type[nn.Module], backend: str) -> list[Step]:
    model = converted(kind, backend).train()
    return list(steps(model, model, batches(STEPS)))


def trains_like_one_process(wrap: Wrap, kind: type[nn.Module] = Model, backend: str = "eager") -> None:
    """Outputs, gradients and optimizer steps of the wrapped model are those of one process on the whole batch."""
    expected = one_process(kind, backend)
    model = converted(kind, backend).train()
    run = wrap(model)
    for batch, many, one in zip(
        batches(STEPS), steps(model, run, [half(batch) for batch in batches(STEPS)]), expected, strict=True
    ):
        same_output(many.output, one.output, batch)
        assert all(many.gradients[name] is not None for name in many.gradients if name.startswith("mhc."))
        same_tensors(many.gradients, one.gradients)
        same_tensors(many.parameters, one.parameters)


def watched_steps(model: nn.Module, run: nn.Module, data: list[Tensor]) -> list[Sample]:
    """Train under a Monitor, with clipping and separate learning rates; gives the samples."""
    optimizer = optimizer_of(model)
    scale_updates(optimizer, model, res=0.1)
    clip = AdaptiveClip(run, warm_up=1, max_norm=0.01)
    with Monitor(run, every=1) as monitor:
        for batch in data:
            loss_of(run(batch)).backward()
            clip()
            optimizer.step()
            optimizer.zero_grad()
    return monitor.history


def watched_like_one_process(wrap: Wrap) -> None:
    """What is trained, and what is seen, is that of one process."""
    data = batches(3)
    alone, model = converted().train(), converted().train()
    first = sample_of(0, observe(alone, half(data[0])).values())
    expected = watched_steps(alone, alone, data)
    actual = watched_steps(model, wrap(model), [half(batch) for batch in data])
    same_parameters(model, alone)
    assert actual[0].sites == first.sites, "the sites of this process's half"
    for many, one in zip(actual, expected, strict=True):
        assert many.gradients is not None and one.gradients is not None
        pairs = [(many.gradients.whole, one.gradients.whole), (many.gradients.mhc, one.gradients.mhc)]
        pairs += zip(many.gradients.sites.values(), one.gradients.sites.values(), strict=True)
        assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in pairs), pairs


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """The body raises an error of the package that says all of `words`."""
    try:
        yield
    except MHCError as error:
        missing = [word for word in words if not re.search(word, str(error))]
        assert not missing, f"{missing} not in: {error}"
    else:
        raise AssertionError("not refused")


# ------------------------------------------------------------------------------------------------- DDP


def ddp(**options: Any) -> Wrap:
    return lambda model: DistributedDataParallel(model, **options)


def check_ddp() -> None:
    trains_like_one_process(ddp())


def check_ddp_watched() -> None:
    watched_like_one_process(ddp())


def tiny_buckets(model: nn.Module) -> nn.Module:
    """DDP with buckets of a thousand bytes, where Dynamo splits what it compiles."""
    return DistributedDataParallel(model, bucket_cap_mb=0.001)


def small_first_bucket() -> Any:
    """Without it the splitter refuses buckets below a megabyte."""
    return mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)


def check_ddp_with_buckets_that_split_the_graph() -> None:
    with small_first_bucket():
        graphs: list[torch.fx.GraphModule] = []

        def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs.append(graph)
            return graph.forward

        torch.compile(tiny_buckets(plain()), backend=count)(batches(1)[0])
        assert len(graphs) > 1, "buckets of this size split nothing"
        trains_like_one_process(tiny_buckets, backend="aot_eager")


def check_ddp_find_unused_parameters() -> None:
    trains_like_one_process(ddp(find_unused_parameters=True), kind=Spare)


def check_ddp_static_graph() -> None:
    trains_like_one_process(ddp(static_graph=True), kind=Spare)


def check_ddp_inside_torch_compile() -> None:
    with small_first_bucket():
        trains_like_one_process(
            lambda model: torch.compile(tiny_buckets(model), backend="aot_eager"), backend="aot_eager"
        )


def check_ddp_no_sync() -> None:
    one, inner = converted(), converted()
    many = DistributedDataParallel(inner)
    first, second = batches(2)
    for batch in (first, second):
        loss_of(one(batch)).backward()
    with many.no_sync():
        loss_of(many(half(first))).backward()
    loss_of(many(half(second))).backward()
    same_gradients(inner, one)


def check_ddp_averaged_model() -> None:
    """The average of two states is what its own forward uses, under DDP as in one process."""
    one, inner = converted(), converted()
    averages = [torch.optim.swa_utils.AveragedModel(model) for model in (one, inner)]
    many = DistributedDataParallel(inner)
    batch = batches(1)[0]
    averages[0].update_parameters(one)
    averages[1].update_parameters(inner)
    for model, run, data in ((one, one, batch), (inner, many, half(batch))):
        optimizer = optimizer_of(model)
        loss_of(run(data)).backward()
        optimizer.step()
    averages[0].update_parameters(one)
    averages[1].update_parameters(inner)
    expected = averages[0](batch)
    assert distance(expected, one(batch)) > TOLERANCE, "the average is the last state"
    same_output(averages[1](half(batch)), expected, batch)


# ------------------------------------------------------------------------------------------------ FSDP2


def on_root(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def on_blocks(model: nn.Module) -> nn.Module:
    """The usual way: one group a block, the last two modules together, the root around them."""
    for block in model.layers:
        fully_shard(block)
    fully_shard([model.norm, model.head])
    return fully_shard(model)


def everything_in_parts(model: nn.Module) -> nn.Module:
    """The root holds no parameter of its own."""
    for part in (*model.layers, model.embed, model.norm, model.head, model.get_submodule("mhc")):
        fully_shard(part)
    return fully_shard(model)


def check_fsdp_root() -> None:
    trains_like_one_process(on_root)
    trains_like_one_process(on_root, backend="aot_eager")


def check_fsdp_watched() -> None:
    watched_like_one_process(on_blocks)


def check_fsdp_blocks() -> None:
    trains_like_one_process(on_blocks)
    trains_like_one_process(on_blocks, backend="aot_eager")


def check_fsdp_blocks_inside_torch_compile() -> None:
    trains_like_one_process(lambda model: torch.compile(on_blocks(model), backend="eager"))


def check_fsdp_blocks_that_stay_gathered() -> None:
    def wrap(model: nn.Module) -> nn.Module:
        for block in model.layers:
            fully_shard(block, reshard_after_forward=False)
        return fully_shard(model, reshard_after_forward=False)

    trains_like_one_process(wrap)


def check_fsdp_with_unused_parameters() -> None:
    trains_like_one_process(on_blocks, kind=Spare)


def check_fsdp_cpu_offload() -> None:
    policy = CPUOffloadPolicy(pin_memory=False)

    def wrap(model: nn.Module) -> nn.Module:
        fully_shard(model.layers[1], offload_policy=policy)
        return fully_shard(model, offload_policy=policy)

    trains_like_one_process(wrap)


def check_fsdp_hooks_of_others_run() -> None:
    """Those of the user, inside the graph and around it; those of FSDP2 are back after the call."""
    batch = batches(1)[0]
    without, one, many = converted()(batch), converted(), converted()
    for model in (one, many):
        model.layers[1].register_forward_hook(lambda module, inputs, output: 2 * output)
        model.register_forward_hook(lambda module, inputs, output: output + 1)
    expected = one(batch)
    assert distance(expected - 1, without) > FAR
    on_blocks(many)
    hooks = [(len(block._forward_pre_hooks), len(block._forward_hooks)) for block in many.layers]
    assert hooks == [(1, 1), (1, 2), (1, 1)]
    same_output(many(half(batch)), expected, batch)
    assert hooks == [(len(block._forward_pre_hooks), len(block._forward_hooks)) for block in many.layers]


def two_forwards_then_two_backwards(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """The first backward frees the shards that the second needs."""
    for loss in [loss_of(model(batch)) for batch in data]:
        loss.backward()
    return model


def check_fsdp_sequences() -> None:
    """Calls in an order that needs what is gathered once more; clipping; a call without gradients."""
    data = batches(2)
    one = two_forwards_then_two_backwards(converted(), data)
    norm = nn.utils.clip_grad_norm_(one.parameters(), 0.01)
    assert norm > 0.01, "nothing is clipped"
    with torch.no_grad():
        expected = one(data[0])
    for wrap in (on_root, on_blocks):
        many = two_forwards_then_two_backwards(wrap(converted()), [half(batch) for batch in data])
        assert distance(whole(nn.utils.clip_grad_norm_(many.parameters(), 0.01)), norm) <= TOLERANCE
        same_gradients(many, one)
        with torch.no_grad():
            same_output(many(half(data[0])), expected, data[0])
        assert isinstance(many.layers[0].up.weight, DTensor) == (wrap is on_blocks), "blocks stay gathered"


def check_fsdp_step_after_a_forward_without_backward() -> None:
    """A forward whose backward never comes leaves the blocks gathered: the next one must see the step."""
    one, many = converted(), everything_in_parts(converted())  # FSDP2 itself leaves a root's own parameters gathered
    batch = batches(1)[0]
    optimizers = [optimizer_of(one), optimizer_of(many)]
    loss_of(one(batch)).backward()
    loss_of(many(half(batch))).backward()
    many(half(batch))
    for optimizer in optimizers:
        optimizer.step()
    same_output(many(half(batch)), one(batch), batch)


def check_fsdp_accumulation() -> None:
    first, second = batches(2)
    one = converted()
    for batch in (first, second):
        loss_of(one(batch)).backward()
    for wrap in (on_root, on_blocks):
        many = wrap(converted())
        many.set_requires_gradient_sync(False)
        loss_of(many(half(first))).backward()
        many.set_requires_gradient_sync(True)
        loss_of(many(half(second))).backward()
        same_gradients(many, one)


def check_fsdp_checkpointed_call() -> None:
    """Activation checkpointing around the whole call: its recomputation runs inside the backward pass."""
    batch = batches(1)[0]
    one = converted()
    expected = one(batch)
    loss_of(expected).backward()
    for reentrant in (False, True):
        many = on_blocks(converted())
        # the reentrant form needs an input that requires grad
        zero = torch.zeros((), requires_grad=True, dtype=torch.float64)
        output = checkpoint(lambda ids, add, run=many: run(ids) + add, half(batch), zero, use_reentrant=reentrant)
        same_output(output, expected, batch)
        loss_of(output).backward()
        same_gradients(many, one)


def check_fsdp_mixed_precision() -> None:
    """mHC parameters that are sharded by themselves stay float32 in a bfloat16 model."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    batch = batches(1)[0]
    for parts in (False, True):
        refusing = converted().float()
        with refused(r"mhc\.layers\.0\.\w+\.phi is torch\.bfloat16", r"fully_shard\(model\.mhc\)"):
            fully_shard(refusing, mp_policy=policy)(half(batch))
        many = converted().float()
        fully_shard(many.get_submodule("mhc"))
        for block in many.layers if parts else ():
            fully_shard(block, mp_policy=policy)
        fully_shard(many, mp_policy=policy)
        one = converted().float().bfloat16()
        expected, output = one(batch), many(half(batch))
        assert output.dtype == expected.dtype == torch.bfloat16
        assert {parameter.dtype for parameter in one.get_submodule("mhc").parameters()} == {torch.float32}
        same_output(output, expected, batch, tolerance=0)
        loss_of(output).backward()
        loss_of(expected).backward()
        ours, theirs = dict(many.named_parameters()), dict(one.named_parameters())
        for name, parameter in theirs.items():
            gradient = whole(ours[name].grad)
            assert gradient is not None and gradient.dtype == torch.float32
            scale = max(parameter.grad.abs().max().item(), 1e-3)
            assert distance(gradient, parameter.grad) <= 0.02 * scale, name
    uneven = converted().float()
    fully_shard(uneven.layers[0], mp_policy=policy)
    with refused(r"mixed precision of layers\.0", "the same mp_policy"):
        fully_shard(uneven)(half(batch))


def check_fsdp_checkpoint() -> None:
    """Saving, loading into another way of sharding, and going on gives what going on without gives."""
    saved_in = _shared_folder()
    one, many = converted(), on_root(converted())
    optimizers = [optimizer_of(one), optimizer_of(many)]
    first, second = batches(2)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        loss_of(model(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(one, optimizers[0], first)
    step(many, optimizers[1], half(first))
    state = {"model": get_model_state_dict(many), "optimizer": get_optimizer_state_dict(many, optimizers[1])}
    assert "mhc._extra_state" in state["model"]
    dcp.save(state, checkpoint_id=saved_in)
    step(one, optimizers[0], second)

    resumed = on_blocks(converted())
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.fill_(0.1)
    optimizer = optimizer_of(resumed)
    state = {"model": get_model_state_dict(resumed), "optimizer": get_optimizer_state_dict(resumed, optimizer)}
    dcp.load(state, checkpoint_id=saved_in)
    missing = set_model_state_dict(resumed, state["model"])
    assert not missing.missing_keys and not missing.unexpected_keys
    set_optimizer_state_dict(resumed, optimizer, state["optimizer"])
    step(resumed, optimizer, half(second))
    same_parameters(resumed, one)
    _gather_and_load(resumed, one)


def _gather_and_load(sharded: nn.Module, one: nn.Module) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(sharded, options=options)
    if dist.get_rank() == 0:
        expected = one.state_dict()
        assert gathered.keys() == expected.keys()
        for key, tensor in expected.items():
            assert type(gathered[key]) is Tensor and distance(gathered[key], tensor) <= TOLERANCE, key
    other = on_blocks(converted())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, gathered, options=options)
    same_parameters(other, one)


def _shared_folder() -> str:
    """A folder that both processes see; it lies in the folder of the store, which the test removes."""
    names: list[Any] = [tempfile.mkdtemp(dir=Path(sys.argv[-1]).parent) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return str(names[0])


def check_fsdp_of_a_hugging_face_model() -> None:
    build, inputs = next((build, inputs) for name, build, inputs in ZOO if name == "llama")
    given = inputs()
    mine = {key: half(value) if isinstance(value, Tensor) else value for key, value in given.items()}
    plain_model = build().double()
    del plain_model.model.layers[2:]
    one = scramble(mhc_compile(plain_model, n=4, backend="eager")).train()
    many = copy.deepcopy(one)
    for layer in many.model.layers:
        fully_shard(layer)
    fully_shard(many)
    expected, output = one(**given).logits, many(**mine).logits
    assert distance(output, half(expected)) <= TOLERANCE
    loss_of(expected).backward()
    loss_of(output).backward()
    same_gradients(many, one)


# --------------------------------------------------------------------------------------------- refusals


def check_refused_without_a_root() -> None:
    model = converted()
    fully_shard(model.layers[1])
    with refused(r"layers\.1", r"call fully_shard\(model\) after"):
        model(half(batches(1)[0]))


def check_refused_past_the_hooks_of_the_root() -> None:
    batch = half(batches(1)[0])
    for wrap in (on_root, everything_in_parts):
        model = wrap(converted())
        with refused("called past the hooks of FSDP2", r"not model\.forward"):
            model.forward(batch)
        model(batch)
        with refused("called past the hooks of FSDP2"):
            model.forward(batch)


def check_refused_tensor_parallel() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    batch = batches(1)[0]
    model = converted()
    parallelize_module(model.layers[0], mesh, plan)
    with refused(r"layers\.0\.up\.weight of Model is a DTensor", "tensor parallel"):
        model(batch)
    model = plain()
    parallelize_module(model.layers[0], mesh, plan)
    with refused(r"layers\.0\.up\.weight", "sharded over processes", "convert"):
        mhc_compile(model, n=4, example_inputs=batch, backend="eager")


def check_refused_after_sharding() -> None:
    batch = half(batches(1)[0])
    model = fully_shard(plain())
    for call in (lambda: mhc_compile(model, n=4, example_inputs=batch, backend="eager"), lambda: explain(model, batch)):
        with refused("sharded over processes", "convert and inspect the model first"):
            call()
    model = on_blocks(converted())
    for call in (lambda: trace(model, batch), lambda: verify(model, batch)):
        with refused("sharded over processes"):
            call()
    with refused("fully_shard"):
        restore(model)


def check_refused_wrappers() -> None:
    batch = half(batches(1)[0])
    wrappers: dict[str, Wrap] = {
        "DistributedDataParallel": DistributedDataParallel,
        "DataParallel": nn.DataParallel,
        "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
        "torch.compile": lambda model: torch.compile(model, backend="eager"),
    }
    for name, wrap in wrappers.items():
        with refused(f"inside {name}", "convert the model, then wrap it"):
            mhc_compile(wrap(plain()), n=4, example_inputs=batch, backend="eager")
    model = converted()
    model.layers[0] = wrappers["FSDP1"](model.layers[0])
    with refused("layers.0", "FSDP1"):
        model(batch)


# ------------------------------------------------------------------------------------------------- main


def checks(kind: str) -> list[str]:
    """The names of the checks of one kind: ddp, fsdp or refused."""
    return [name for name in globals() if name.startswith(f"check_{kind}_") or name == f"check_{kind}"]


def main(names: list[str], rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=SECONDS)
    )
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        globals()[name]()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:-2], int(sys.argv[-2]), sys.argv[-1])
