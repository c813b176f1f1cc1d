"""Stages of a plan compute what the whole model computes: one after the other here, and trained on two processes."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import grid_worker
import pipeline_worker
import zoo
from graphs import FAR, float_outputs, fresh, loss_of, randomize, zoo_model
from mhc_compile import ConfigError, MHCError, PartitionError, RewriteError, ShapeError, mhc_compile
from mhc_compile import pipeline as cutting
from mhc_compile.codegen.stage_module import StageModule
from mhc_compile.partition import Plan, partition
from mhc_compile.passes import eager_replay
from mhc_compile.pipeline import pipeline_stages, stage_modules
from mhc_compile.trace import Exported

TESTS = Path(__file__).parent
DEADLINE = 240.0  # seconds, for all checks on two processes
mhc = torch.ops.mhc

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of a cut is its export: the models that tests share are exported once, others at each cut."""
    plain = cutting.exported

    def found(model: nn.Module, inputs: Any) -> Exported:
        shared = any(model is one.model and inputs is one.inputs for one in _known.values())
        return (pipeline_worker.exported_once if shared else plain)(model, inputs)

    monkeypatch.setattr(cutting, "exported", found)


# -------------------------------------------------------------------------------------- one process


class Known:
    """A converted model with random mHC weights, what it gives, and the gradients of a loss on that."""

    def __init__(self, name: str, n: int = 4, **inputs: Any) -> None:
        self.model, self.inputs = fresh(name)
        self.inputs |= inputs
        plain = float_outputs(self.model(**self.inputs))[0].detach()
        mhc_compile(self.model, n, backend="eager", example_inputs=self.inputs)
        if n > 1:
            randomize(self.model)
        self.outputs = float_outputs(self.model(**self.inputs))
        far = (self.outputs[0].detach() - plain).abs().max() > FAR * plain.abs().max()
        assert bool(far) == (n > 1), "the test could not tell mHC from plain"
        loss_of(self.outputs).backward()
        self.gradients = self.take_gradients()

    def take_gradients(self) -> dict[str, Tensor | None]:
        found = {name: value.grad for name, value in self.model.named_parameters()}
        self.model.zero_grad()
        return found

    def plan(self, stages: int = 3, **options: Any) -> Plan:
        return partition(self.model, self.inputs, stages=stages, microbatches=4, **options)

    def stages(self, plan: Plan | None = None, **options: Any) -> list[StageModule]:
        return stage_modules(plan or self.plan(), self.model, self.inputs, **{"tied": "reduce", **options})

    def check(self, stages: Sequence[StageModule], tolerance: float = 1e-5) -> None:
        """The stages, one after the other, give the same outputs and gradients."""
        outputs = float_outputs(run(stages, **self.inputs))
        for actual, expected in zip(outputs, self.outputs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))
        loss_of(outputs).backward()
        for name, gradient in self.take_gradients().items():
            expected_gradient = self.gradients[name]
            assert (gradient is None) == (expected_gradient is None), name
            if gradient is not None and expected_gradient is not None:
                scale = max(float(expected_gradient.abs().max()), 1e-3)
                torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=tolerance * scale, msg=name)


def assert_planned(plan: Plan, stages: Sequence[StageModule]) -> None:
    """What the plan counts at its boundaries is what the stages send."""
    sent = [sum(value.nbytes for value in stage.sent) for stage in stages[:-1]]
    assert [plan.units[stage.start].cost.boundary for stage in plan.stages[1:]] == sent
    assert [len(plan.units[stage.start].skips) + 1 for stage in plan.stages[1:]] == [len(s.sent) for s in stages[:-1]]


def run(stages: Sequence[StageModule], *args: Any, **kwargs: Any) -> Any:
    values = stages[0](*args, **kwargs)
    for stage in stages[1:]:
        values = stage(*values)
    return values


_known: dict[str, Known] = {}


def known_model(name: str) -> Known:
    """Shared by tests, which leave it as it is."""
    if name not in _known:
        _known[name] = Known(name)
    return _known[name]


def llama() -> Known:
    return known_model("llama")


@cache
def llama_plan() -> Plan:
    return llama().plan()


QUICK = ("llama", "gpt2", "t5", "vit")
SLOWER = ("bert", "albert", "gemma2", "mamba")  # of the zoo, those whose trunks are of other kinds


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.sweep) for name in SLOWER)])
@pytest.mark.cases(1)
def test_the_stages_are_the_whole_model(name: str) -> None:
    """Its outputs, its gradients, and its state, with its names."""
    known = known_model(name) if name in QUICK else Known(name)
    plan = known.plan()
    stages = known.stages(plan)
    known.check(stages)
    assert_planned(plan, stages)
    names = [key for stage in stages for key, _ in stage.named_parameters()]
    assert set(names) == {key for key, _ in known.model.named_parameters()}
    assert bool(plan.tied) == (len(names) > len(set(names)))
    assert {key for stage in stages for key in stage.state_dict()} == set(known.model.state_dict())


def test_streams_alone_cross_where_nothing_else_has_to() -> None:
    """Positions, rotary tables and a mask without padding are computed again by the stages that read them."""
    stages = llama().stages(llama_plan())
    batch, length = llama().inputs["input_ids"].shape
    assert [[tuple(value.shape) for value in stage.sent] for stage in stages] == [
        [(batch, length, 4, zoo.WIDTH)],
        [(batch, length, 4, zoo.WIDTH)],
        [],
    ]
    ops = [[node.target for node in stage.graph.graph.nodes] for stage in stages]
    assert [found.count(mhc.expand.default) for found in ops] == [1, 0, 0]
    assert [found.count(mhc.readout.default) for found in ops] == [0, 0, 1]


def test_sites_of_a_stage_are_fused() -> None:
    """Within a stage that stores everything, each merge but the last makes the product of the next site."""
    for stage in llama().stages(stored(llama_plan())):
        ops = [node.target for node in stage.graph.graph.nodes]
        reads, both = ops.count(mhc.read.default), ops.count(mhc.merge_read.default)
        assert reads == 1 and both >= 1
        assert mhc.coefficients.default not in ops and mhc.merge.default not in ops


@pytest.mark.parametrize(("name", "count", "works"), [("llama", 3, True), ("t5", 2, False), ("t5", 4, False)])
def test_split_backwards(name: str, count: int, works: bool) -> None:
    """Input gradients first and weight gradients later, as torch does it: right, or known beforehand to fail."""
    known = known_model(name)
    stages = known.stages(known.plan(count))
    assert any(stage.whole for stage in stages[1:]) != works
    values: list[Any] = [stages[0](**known.inputs)]
    given: list[tuple[Tensor, ...]] = []
    for stage in stages[1:]:
        pairs = zip(values[-1], stage.takes_grad, strict=True)
        given.append(tuple(value.detach().requires_grad_(grad) for value, grad in pairs))
        values.append(stage(*given[-1]))
    values[-1] = (loss_of(float_outputs(values[-1])),)

    def backward() -> None:
        gradients: Any = None
        for stage, taken, gave in reversed(list(zip(stages[1:], given, values[1:], strict=True))):
            found, groups = stage_backward_input(list(gave), gradients, list(taken), stage.parameters())
            stage_backward_weight(stage.parameters(), groups)
            pairs = zip(found, taken, strict=True)
            gradients = [torch.zeros_like(value) if one is None else one for one, value in pairs]
        trained = [(value, one) for value, one in zip(values[0], gradients, strict=True) if value.requires_grad]
        torch.autograd.backward(*map(list, zip(*trained, strict=True)))

    if not works:
        with pytest.raises(RuntimeError, match="a second time"):
            backward()
        known.take_gradients()
        return
    backward()
    for key, gradient in known.take_gradients().items():
        torch.testing.assert_close(gradient, known.gradients[key], msg=key)


def test_values_that_skip_stages_are_threaded_through() -> None:
    """A padding mask is read by all attentions: it crosses every cut in front of one."""
    mask = torch.ones(zoo.BATCH, zoo.SEQ, dtype=torch.long)
    mask[0, :3] = 0
    known = Known("llama", attention_mask=mask)
    plan = known.plan(4)
    stages = known.stages(plan)
    known.check(stages)
    assert_planned(plan, stages)
    crossing = [len(stage.sent) for stage in stages[:-1]]
    attends = [any("self_attn" in site for site in plan.sites_of(stage)) for stage in plan.stages]
    assert crossing == [2 if any(attends[number:]) else 1 for number in (1, 2, 3)]
    assert crossing[0] == 2
    other = dict(known.inputs, attention_mask=torch.ones_like(mask))
    difference = run(stages, **other).logits - run(stages, **known.inputs).logits
    assert float(difference.detach().abs().max()) > FAR, "the mask has no effect"


def test_what_an_encoder_gives_goes_on_to_the_decoder() -> None:
    known = known_model("t5")
    plan = known.plan(4)
    stages = known.stages(plan)
    known.check(stages)
    assert_planned(plan, stages)
    encoded = known.outputs[-1].shape
    last = [[tuple(value.shape) for value in stage.sent] for stage in stages[2:-1]]
    assert all(tuple(encoded) in shapes for shapes in last)
    assert any(not grad for stage in stages for grad in stage.gives_grad), "token ids are sent without a gradient"


@pytest.mark.parametrize("name", ["t5", "turned"])
def test_boundaries_and_their_gradients_are_contiguous(name: str) -> None:
    """Also where the model's values and gradients are not, and where a value only passes through."""
    if name == "t5":
        stages = known_model("t5").stages(known_model("t5").plan(4))
    else:
        model, x = pipeline_worker.Turned(), torch.randn(2, 5, pipeline_worker.WIDTH)
        mhc_compile(model, 2, backend="eager", example_inputs=x)
        stages = stage_modules(partition(model, x, stages=3, microbatches=3), model, x, tied="reduce")
        assert not all(value.is_contiguous() for value in stages[0].sent)
    sent: tuple[Tensor, ...] = ()
    for stage in stages[:-1]:
        given = tuple(value.detach().requires_grad_(grad) for value, grad in zip(sent, stage.takes_grad, strict=False))
        sent = stage(*given) if given else stage(**known_model("t5").inputs) if name == "t5" else stage(x)
        assert all(value.is_contiguous() and not value._is_view() for value in sent)
        assert not {value.data_ptr() for value in sent} & {value.data_ptr() for value in given}
        leaves = [value for value in given if value.requires_grad]
        if leaves:
            trained = [value for value in sent if value.requires_grad]
            ones = [torch.ones(1, dtype=value.dtype).expand(value.shape) for value in trained]
            for gradient in torch.autograd.grad(trained, leaves, ones, allow_unused=True):
                assert gradient is None or gradient.is_contiguous()


def test_a_single_stream() -> None:
    known = Known("llama", n=1)
    stages = known.stages(known.plan(3))
    known.check(stages, tolerance=0.0)
    assert all(value.dim() == 3 for stage in stages for value in stage.sent)


def test_stages_draw_the_dropout_of_the_whole_model() -> None:
    """Cut in train mode, under one seed, and one microbatch at a time: bit for bit."""
    model, inputs = zoo_model("gpt2")
    mhc_compile(model.train(), 4, backend="eager", example_inputs=inputs)
    randomize(model)
    stages = stage_modules(partition(model, inputs, stages=2, microbatches=2), model, inputs, tied="reduce")
    found = []
    for call in (model, functools.partial(run, stages)):
        torch.manual_seed(5)
        outputs = float_outputs(call(**inputs))
        loss_of(outputs).backward()
        found.append([outputs[0].detach(), *(value.grad for value in model.parameters() if value.grad is not None)])
        model.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True)) and len(found[0]) > 10
    with torch.no_grad():
        assert not torch.equal(float_outputs(run(stages, **inputs))[0], found[0][0]), "nothing is drawn"


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.sweep)])
def test_compiled_stages_replay_their_blocks(backend: str) -> None:
    """Less is kept for the backward, and the gradients are the same."""
    known, plan = llama(), llama().plan(2)
    assert any(len(block) > 1 for block in plan.blocks)
    as_they_are, compiled = known.stages(stored(plan)), known.stages(plan, backend=backend)
    known.check(compiled, tolerance=1e-6 if backend == "aot_eager" else 1e-5)
    assert kept(compiled, known) < 0.8 * kept(as_they_are, known)
    with torch.no_grad():
        torch.testing.assert_close(float_outputs(run(compiled, **known.inputs))[0], known.outputs[0].detach())


class Dropping(nn.Module):
    """A branch whose gradient needs the mask of a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(nn.functional.dropout(torch.sin(self.outer(torch.relu(self.inner(x)))), 0.5, True))


def test_compiled_stages_draw_once_whatever_the_budget() -> None:
    """The gradients are those of a budget that draws nothing again; stages that replay nothing warn of the others."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Dropping() for _ in range(6))), torch.randn(4, 8)
    mhc_compile(model, 4, backend="eager", example_inputs=x)
    plan = partition(model, x, stages=2, microbatches=2)
    assert plan.blocks
    for chosen, right in ((plan, True), (stored(plan), False)):
        found, warned = [], []
        for budget in (1.0, 0.0):
            stages = stage_modules(chosen, model, x, backend="aot_eager")
            torch.manual_seed(1)
            set_budget = torch._functorch.config.patch(activation_memory_budget=budget)
            with set_budget, warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                output = run(stages, x)
                output.square().sum().backward()
            found.append([output.detach(), *(value.grad for value in model.parameters() if value.grad is not None)])
            warned.append(any("activation_memory_budget is 0.0" in str(one.message) for one in seen))
            model.zero_grad()
        assert warned == [False, not right]
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True)) == right and len(found[0]) > 10


@pytest.mark.parametrize("split", [False, True])
def test_eager_stages_replay_their_blocks(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients have the same bits, also where those of the inputs are asked for before those of the weights."""
    known, plan = llama(), llama().plan(2)
    replayed: list[Any] = []
    unpack = eager_replay._Session.unpack

    def watched(session: Any, held: Any) -> Tensor:
        replayed.append(held.value)
        return unpack(session, held)

    monkeypatch.setattr(eager_replay._Session, "unpack", watched)
    found = []
    for chosen in (stored(plan), plan):
        stages = known.stages(chosen)
        values = [value for value in known.model.parameters() if value.requires_grad]
        first, *others = (values[:3], values[3:]) if split else (values,)
        loss = loss_of(float_outputs(run(stages, **known.inputs)))
        found.append(torch.autograd.grad(loss, first, retain_graph=True, allow_unused=True))
        for more in others:
            found[-1] += torch.autograd.grad(loss, more, allow_unused=True)
        assert any(isinstance(value, eager_replay._Name) for value in replayed) == (chosen is plan)
    pairs = zip(*found, strict=True)
    assert all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs) and len(found[0]) > 30


def stored(plan: Plan) -> Plan:
    """The plan without its recompute blocks."""
    return replace(plan, stages=tuple(replace(stage, blocks=()) for stage in plan.stages))


def kept(stages: Sequence[StageModule], known: Known) -> int:
    """Bytes that autograd keeps for the backward, weights left out."""
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        held.append(value)
        return value

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = run(stages, **known.inputs)
    for value in known.model.parameters():
        found.pop(value.untyped_storage()._cdata, None)
    assert output is not None
    return sum(found.values())


# ---------------------------------------------------------------------------------------- their state


def test_weights_load_into_the_stages_and_back() -> None:
    """Stages with other weights take those of the model, and a model with other weights takes those of the stages."""
    inputs, source, other, back = llama().inputs, *(copy.deepcopy(llama().model) for _ in range(3))
    with torch.no_grad():
        for value in source.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(9)))
    expected = float_outputs(source(**inputs))[0].detach()
    assert float((expected - llama().outputs[0].detach()).abs().max()) > FAR
    state, stages = source.state_dict(), stage_modules(llama_plan(), other, inputs)
    for stage in stages:
        stage.load_state_dict({key: state[key] for key in stage.state_dict()})
    torch.testing.assert_close(float_outputs(run(stages, **inputs))[0].detach(), expected)
    merged = {key: value for stage in stages for key, value in stage.state_dict().items()}
    assert merged.keys() == state.keys()
    back.load_state_dict(merged)
    torch.testing.assert_close(float_outputs(back(**inputs))[0].detach(), expected)


def test_weights_of_another_conversion_are_refused() -> None:
    stage, other = llama().stages(llama_plan())[0], Known("llama", n=2).model.state_dict()
    with pytest.raises(ConfigError, match="of another conversion"):
        stage.load_state_dict({key: other[key] for key in stage.state_dict()})


def test_stages_share_the_weights_and_keep_mhc_in_float32() -> None:
    model = copy.deepcopy(llama().model)
    stages = stage_modules(llama_plan(), model, llama().inputs)
    own = {id(value) for value in model.parameters()}
    assert all(id(value) in own for stage in stages for value in stage.parameters())
    stages[1].to(torch.bfloat16)
    dtypes = {name.startswith("mhc."): value.dtype for name, value in stages[1].named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_what_no_stage_reads_stays_with_the_first() -> None:
    class Spare(pipeline_worker.Small):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(3, 3)

    model, x = Spare(), torch.randn(2, 5, pipeline_worker.WIDTH)
    mhc_compile(model, 2, backend="eager", example_inputs=x)
    stages = stage_modules(partition(model, x, stages=2, microbatches=2), model, x)
    assert {"spare.weight", "spare.bias"} <= set(stages[0].state_dict())
    assert {key for stage in stages for key in stage.state_dict()} == set(model.state_dict())


def test_a_stage_goes_to_a_device_of_its_own() -> None:
    """New tensors of its graph too; what has no values yet gets memory, to be loaded into."""
    stage = stage_modules(llama_plan(), copy.deepcopy(llama().model), llama().inputs, device="meta")[1]
    assert {value.device.type for value in [*stage.parameters(), *stage.buffers()]} == {"meta"}
    given = [torch.zeros(value.shape, dtype=value.dtype, device="meta") for value in stage.received]
    assert {value.device.type for value in stage(*given)} == {"meta"}


# ------------------------------------------------------------------------------------------- refusals


def test_a_call_may_be_spelled_in_any_way() -> None:
    known = llama()
    first = known.stages(llama_plan())[0]
    ids = known.inputs["input_ids"]
    expected = first(**known.inputs)[0]
    for args, kwargs in [((ids,), {}), ((), {"use_cache": False, "input_ids": ids}), ((ids, None), {})]:
        assert torch.equal(first(*args, **kwargs)[0], expected)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"input_ids": torch.ones(3, 8, dtype=torch.long)}, ("input_ids is [3, 8]", "[2, 8] torch.int64")),
        ({"input_ids": None}, ("input_ids is None", "[2, 8] torch.int64")),
        ({"attention_mask": torch.ones(2, 8)}, ("attention_mask is given", "input_ids, use_cache")),
        ({"use_cache": True}, ("use_cache is True", "False, as traced")),
    ],
)
def test_another_call_is_refused(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    first = llama().stages(llama_plan())[0]
    with pytest.raises(ShapeError) as error:
        first(**{**llama().inputs, **change})
    assert all(part in str(error.value) for part in (*parts, "Next: "))


def test_a_plan_from_a_file_cuts_alike(tmp_path: Path) -> None:
    llama_plan().save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())
    llama().check(llama().stages(Plan.load(tmp_path / "plan.json")))


def refusals() -> Iterator[tuple[str, type[MHCError], tuple[str, ...], Any]]:
    known = llama()
    yield (
        "a plan of another model",
        PartitionError,
        ("the plan", "other sites", "Next: make the plan again"),
        lambda: stage_modules(known_model("gpt2").plan(2), known.model, known.inputs),
    )
    yield (
        "a model that is not converted",
        RewriteError,
        ("not converted",),
        lambda: stage_modules(llama_plan(), fresh("llama")[0], known.inputs),
    )
    yield (
        "an unknown backend",
        ConfigError,
        ("backend is 'nvfuser'", "'aot_eager'"),
        lambda: known.stages(llama_plan(), backend="nvfuser"),
    )
    yield (
        "an unknown way with tied weights",
        ConfigError,
        ("tied is 'sum'", "'reduce'"),
        lambda: known.stages(llama_plan(), tied="sum"),
    )
    yield (
        "no process group",
        PartitionError,
        ("the process group is missing", "torchrun"),
        lambda: pipeline_stages(llama_plan(), known.model, known.inputs),
    )
    yield (
        "another mode",
        PartitionError,
        ("the mode of a pipeline stage is train", "eval", "model.train()"),
        lambda: known.stages(llama_plan())[0].train(),
    )


@pytest.mark.parametrize("number", range(6))
def test_refused(number: int) -> None:
    _, kind, parts, call = list(refusals())[number]
    with pytest.raises(kind) as error:
        call()
    assert all(part in str(error.value) for part in (*parts, "legal: "))


def test_tied_weights_are_refused() -> None:
    known = known_model("gpt2")
    plan, model = known.plan(2), copy.deepcopy(known.model)
    with pytest.raises(PartitionError) as error:
        stage_modules(plan, model, known.inputs)
    parts = ("transformer.wte.weight is read by the stages 0, 1", "tied='reduce'", "tie_word_embeddings=False")
    assert all(part in str(error.value) for part in parts)
    model.get_parameter("transformer.wte.weight").requires_grad_(False)
    assert len(stage_modules(plan, model, known.inputs)) == 2, "a frozen weight has no gradient to be summed"


def test_a_gradient_that_no_stage_expects_is_refused() -> None:
    model = copy.deepcopy(llama().model).requires_grad_(False)
    stages = stage_modules(llama_plan(), model, llama().inputs)
    run(stages, **llama().inputs)
    model.requires_grad_(True)
    with pytest.raises(PartitionError, match="requires_grad of a stage's output is True now"):
        run(stages, **llama().inputs)


# -------------------------------------------------------------------------------------- two processes


def spawn(command: list[str], folder: Path, world: int = pipeline_worker.WORLD) -> list[str]:
    """Run a command for each rank; fails with their output when one fails or the time is over."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    processes = []
    for rank in range(world):
        with (folder / f"{rank}.log").open("w") as log:
            environment = {**os.environ, "PYTHONPATH": path}
            line = [sys.executable, *command, str(rank), str(folder)]
            processes.append(subprocess.Popen(line, env=environment, stdout=log, stderr=log, text=True))
    end = time.monotonic() + DEADLINE
    try:
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break  # the other one would wait for it
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    logs = [(folder / f"{rank}.log").read_text() for rank in range(world)]
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(log[-3000:] for log in logs)
    return logs


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """All schedules, tied weights, two trunks: losses and gradients of each step are those of one process."""
    logs = spawn([pipeline_worker.__file__, *pipeline_worker.CHECKS], tmp_path)
    assert all(f"{name} agrees" in log for name in pipeline_worker.STAGES for log in logs)


@pytest.mark.slow
@pytest.mark.sweep
def test_four_processes_of_two_stages_and_two_replicas(tmp_path: Path) -> None:
    """A pipeline in DDP: losses are those of each replica's data, gradients the mean over both."""
    logs = spawn([grid_worker.__file__], tmp_path, grid_worker.WORLD)
    said = [line for log in logs for line in log.splitlines() if "agrees in" in line]
    assert sorted(line[:20] for line in said) == [f"stage {i} of replica {j}" for i in range(2) for j in range(2)]


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    """Its stages have the losses of the whole model, on real text."""
    examples = TESTS.parent / "examples"
    # A file for each process: lines that two print to one pipe may come mixed.
    write = "open('losses' + os.environ['RANK'], 'w').write(json.dumps(found))"
    code = f"import json, os, pipeline; found = pipeline.main(steps=4, layers=1); {write}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "--no-python", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{examples}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"losses{rank}").read_text()) for rank in range(2)]
    staged, whole = next(one["stages"] for one in found if one["stages"]), found[0]["whole"]
    assert staged == pytest.approx(whole, rel=1e-3)
    assert whole[-1] < whole[0] - 0.1
    assert "2 stages" in done.stdout and "process 1: stage 1 of 2" in done.stdout
