"""Plans of real converted models: their cuts, what they say, how they are kept, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from graphs import Converted, float_outputs, small_model
from mhc_compile import ConfigError, PartitionError, RewriteError, mhc_compile
from mhc_compile.partition import Pipeline, as_bytes, cost_model, partition, planned
from mhc_compile.passes.cost import CostModel
from mhc_compile.passes.plan_devices import loads
from mhc_compile.passes.plan_search import Search, Unit, least_blocks
from mhc_compile.passes.schedules import Action, Schedule, simulate
from mhc_compile.passes.stages import Layout
from mhc_compile.plan import Plan
from mhc_compile.plan_picture import memory_curve
from mhc_compile.trace import Rewritten, rewritten
from plan_oracle import replay_peak

# Sites and legal cuts, counted by hand: a cut between sites, before a trunk's first and behind its last.
CUTS = {
    "llama": (6, 7),
    "gpt2": (6, 7),
    "t5": (10, 12),  # two trunks; the encoder's readout is one
    "vit": (6, 7),
    "albert": (6, 9),  # before and behind the projection of the embeddings; behind the head's first product
    "resnet": (3, 8),  # 1 between sites, the others at convolutions, norms, pools and sums of the plain parts
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@cache
def model_of(name: str) -> Converted:
    """A converted model with random mHC weights; tests leave it as it is."""
    return Converted(name)


@cache
def graph_of(name: str) -> Rewritten:
    known = model_of(name)
    return rewritten(known.model, known.inputs)


@cache
def costs_of(name: str) -> CostModel:
    made = graph_of(name)
    return CostModel(made.graph, made.arguments)


def plan_of(name: str, **options: Any) -> Plan:
    """As `partition` plans, from costs that are worked out once."""
    return planned(costs_of(name), Pipeline.of(**options), type(model_of(name).model).__name__, 4)


# ---------------------------------------------------------------------------------------------- legal cuts


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.cases(1)
def test_cuts_are_found_in_real_models(name: str) -> None:
    layout = Layout(graph_of(name).graph.graph)
    assert (len(layout.sites), len(layout.cuts)) == CUTS[name]
    for cut in layout.cuts:
        for site in layout.sites:
            assert cut.place <= layout.index[site.read] or cut.place > layout.index[site.merge]


@pytest.mark.parametrize("name", CUTS)
def test_what_crosses_a_cut_is_all_that_the_rest_needs(name: str) -> None:
    """The nodes behind each cut run on what crosses it, the model's state and nothing else."""
    made = graph_of(name)
    layout = Layout(made.graph.graph)
    with torch.no_grad():
        values = run_nodes(made, layout.nodes, {})
        expected = float_outputs(values[layout.nodes[-1]])
        for cut in layout.cuts:
            given = {node: values[node] for node in (*cut.crossing, *layout.boundaries.repeated)}
            given |= {node: values[node] for node in layout.nodes if layout.is_parameter(node)}
            actual = float_outputs(run_nodes(made, layout.nodes[cut.place :], given)[layout.nodes[-1]])
            assert all(map(torch.equal, expected, actual))


def run_nodes(made: Rewritten, nodes: list[fx.Node], given: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """The values of some nodes of a graph, from those given."""
    runner = fx.Interpreter(made.graph, garbage_collect_values=False)
    runner.args_iter = iter(made.arguments)
    runner.env = dict(given)
    for node in nodes:
        runner.env[node] = runner.run_node(node)
    return runner.env


def test_what_nothing_decides_does_not_cross() -> None:
    """Positions and rotary tables follow from no input and no parameter: they are computed again."""
    layout = Layout(graph_of("llama").graph.graph)
    tables = {node for node in layout.nodes if node.target in (torch.ops.aten.cos.default, torch.ops.aten.sin.default)}
    assert len(tables) == 2 and tables <= layout.boundaries.repeated
    assert all(not cut.skips for cut in layout.cuts)


def test_a_state_is_n_times_as_large_as_what_the_trunk_starts_from() -> None:
    layout = Layout(graph_of("gpt2").graph.graph)
    first, second, *_, last = layout.cuts
    mask = sum(node.meta["val"].nbytes for node in second.skips)
    assert second.bytes - mask == 4 * first.value.meta["val"].nbytes
    assert last.value.target is torch.ops.mhc.readout.default
    assert last.bytes == first.value.meta["val"].nbytes


def test_values_that_skip_stages_are_counted() -> None:
    """T5's decoder attends to the encoder's output: it crosses every cut of the decoder."""
    layout = Layout(graph_of("t5").graph.graph)
    readouts = [node for node in layout.nodes if node.target is torch.ops.mhc.readout.default]
    encoder_end = next(place for place, cut in enumerate(layout.cuts) if cut.value is readouts[0])
    attended = {reader for cut in layout.cuts[encoder_end + 1 :] for reader in cut.skips}
    behind = [cut for cut in layout.cuts[encoder_end + 1 :] if len(cut.skips) > 0]
    assert len(behind) == len(layout.cuts) - encoder_end - 1
    assert any(readouts[0] in layout.flow.members(layout.flow.ancestors[layout.index[node]]) for node in attended)


def test_a_plain_graph_is_cut_at_its_dominators() -> None:
    """With n = 1 there are no streams: the residual stream itself is what every path passes."""
    known = Converted.__new__(Converted)
    known.model, known.inputs = small_model("parallel")
    mhc_compile(known.model, 1, backend="eager", example_inputs=known.inputs)
    layout = Layout(rewritten(known.model, known.inputs).graph.graph)
    assert not layout.sites and layout.cuts
    assert {cut.value for cut in layout.cuts} <= set(layout.dominators)


# ---------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_plan_prints_draws_saves_and_loads(name: str, tmp_path: Path) -> None:
    known = model_of(name)
    state = {key: value.clone() for key, value in known.model.state_dict().items()}
    plan = partition(known.model, known.inputs, stages=2, microbatches=4)
    text = str(plan)
    assert max(map(len, text.splitlines())) <= 110
    sites = [site.name for site in Layout(graph_of(name).graph.graph).sites]
    assert [site for stage in plan.stages for site in plan.sites_of(stage)] == sites
    assert [site for block in plan.blocks for site in block] == sites
    assert f"stage 1 starts behind {sites[2 if name != 't5' else 3]} with {plan.cuts[0].value}" in " ".join(
        text.split()
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    plan.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    known.check(known.model)
    assert all(torch.equal(value, state[key]) for key, value in known.model.state_dict().items())


@pytest.mark.parametrize(("name", "tied"), [("llama", []), ("gpt2", ["wte.weight"]), ("t5", ["embed_tokens.weight"])])
def test_weights_that_several_stages_read_are_named(name: str, tied: list[str]) -> None:
    plan = plan_of(name, stages=2, microbatches=2)
    assert [path.split(".", 1)[1] for path in plan.tied] == tied
    assert ("must be added up" in str(plan)) == bool(tied)
    assert plan_of(name).tied == ()


def test_stages_are_runs_of_units_and_blocks_do_not_cross_cuts() -> None:
    for stages in (1, 2, 3, 4):
        plan = plan_of("t5", stages=stages, microbatches=6)
        assert len(plan.stages) == stages
        bounds = [(stage.start, stage.end) for stage in plan.stages]
        assert [end for _, end in bounds] == [*(start for start, _ in bounds[1:]), len(plan.units)]
        for stage in plan.stages:
            assert stage.blocks[0] == stage.start and stage.blocks[-1] < stage.end
            assert list(stage.blocks) == sorted(set(stage.blocks))


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [("1f1b", 3), ("gpipe", 3), ("zero-bubble", 3), ("interleaved", 4), ("zbv", 4), ("dualpipev", 4)],
)
def test_the_memory_of_a_device_over_a_step_peaks_where_the_plan_says(schedule: str, stages: int) -> None:
    options = dict(stages=stages, microbatches=6, schedule=schedule)
    free = plan_of("t5", **options)
    for limit in (None, 3 * free.peak):
        plan = plan_of("t5", memory=limit, **options)
        events = plan.events()
        for device in range(plan.devices):
            here = [stage for stage in plan.stages if stage.device == device]
            assert len(here) == stages // plan.devices
            curve = memory_curve(plan, device, events)
            assert all(max(memory for _, memory in curve) == stage.peak for stage in here)
            assert curve[-1][1] == sum(stage.weights for stage in here)  # all is freed
            assert all(bool(stage.blocks) == (limit is None) for stage in here)  # what fits is stored
        assert 0 < plan.bubble < 0.4 and Plan.from_dict(plan.as_dict()) == plan


def test_v_shapes_put_the_first_and_the_last_stage_on_one_device() -> None:
    plan = plan_of("llama", stages=4, microbatches=6, schedule="zbv")
    assert [stage.device for stage in plan.stages] == [0, 1, 1, 0]
    assert plan.stages[0].peak == plan.stages[3].peak > plan.stages[0].weights + plan.stages[3].weights
    assert [stage.device for stage in plan_of("llama", stages=4, microbatches=6, schedule="interleaved").stages] == [
        0, 1, 0, 1,
    ]  # fmt: skip
    with pytest.raises(PartitionError, match=r"cut for the best time, as 'zbv' is\. Next: pass memory=\d+") as caught:
        plan_of("llama", stages=4, microbatches=6, schedule="zbv", memory=1000)
    least = int(re.search(r"memory=(\d+)", str(caught.value))[1])  # type: ignore[index]
    assert plan_of("llama", stages=4, microbatches=6, schedule="zbv", memory=least).peak == least


def test_the_plan_is_below_every_equal_length() -> None:
    """One stage, one microbatch in flight: the peak of the plan against blocks of 1, 2, 3, ... units."""
    made = graph_of("t5")
    for compiled in (False, True):
        units = CostModel(made.graph, made.arguments, compiled=compiled).units
        blocks, peak = least_blocks(units)
        equal = [
            replay_peak(units, 0, len(units), range(0, len(units), length), 1) for length in range(1, len(units) + 1)
        ]
        assert peak == replay_peak(units, 0, len(units), blocks, 1)
        assert peak < min(equal)


def test_measured_times_can_be_planned_with() -> None:
    known = model_of("llama")
    plan = partition(known.model, known.inputs, stages=2, microbatches=2, measure=True)
    assert plan.timing == "measured"
    assert plan.step_seconds > 1e-4  # an estimate for an H200 is a microsecond


def test_a_converted_model_prints_its_costs() -> None:
    known = model_of("llama")
    text = str(cost_model(known.model, known.inputs))
    assert "6 sites of n = 4 streams, C = 32" in text and "model.layers.2.mlp" in text
    with pytest.raises(RewriteError, match="not converted"):
        cost_model(nn.Linear(2, 2), (torch.ones(1, 2),))


# ---------------------------------------------------------------------------------------------- memory limits


def test_an_unreachable_limit_names_the_least_that_would_do() -> None:
    with pytest.raises(PartitionError, match=r"memory is .*1000 bytes.*Next: pass memory=\d+") as caught:
        plan_of("llama", stages=2, microbatches=4, memory=1000)
    least = int(re.search(r"memory=(\d+)", str(caught.value))[1])  # type: ignore[index]
    plan = plan_of("llama", stages=2, microbatches=4, memory=least)
    assert plan.peak == least
    with pytest.raises(PartitionError):
        plan_of("llama", stages=2, microbatches=4, memory=least - 1)
    loose = plan_of("llama", stages=2, microbatches=4, memory=100 * least)
    assert not loose.blocks and loose.step_seconds < plan.step_seconds


def test_weights_count_as_often_as_asked() -> None:
    plans = {copies: plan_of("llama", weight_copies=copies) for copies in (0, 2, 4)}
    weights = [plans[copies].stages[0].weights for copies in (0, 2, 4)]
    known = model_of("llama").model
    own, fixed = (sum(one.nbytes for one in held) for held in (known.parameters(), known.buffers()))
    assert weights == [0, 2 * own + 16, 4 * own + 16] and fixed >= 16  # the rotary frequencies it reads
    assert plans[4].peak - weights[2] == plans[0].peak


@pytest.mark.parametrize(
    ("text", "count"),
    [("80 GB", 8e10), ("40GiB", 40 * 2**30), ("1.5k", 1500.0), ("12", 12.0), (7, 7.0), ("3 mib", 3 * 2**20)],
)
def test_limits_are_read(text: object, count: float) -> None:
    assert as_bytes(text) == count


# ---------------------------------------------------------------------------------------------- schedules


def test_microbatches_in_flight() -> None:
    def most(name: str, stages: int, microbatches: int) -> list[int]:
        return [load.in_flight for load in loads(Schedule.of(name, stages, None, microbatches))]

    assert most("gpipe", 4, 8) == [8, 8, 8, 8]
    assert most("1f1b", 4, 8) == [4, 3, 2, 1]
    assert most("1f1b", 4, 4) == [4, 3, 2, 1]
    assert most("zero-bubble", 4, 8) == [4, 4, 4, 4]  # freed by the weight gradients, which come late
    assert sum(most("zbv", 4, 8)) == 10


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 4), (4, 8), (8, 32)])
def test_the_bubble_of_equal_stages(name: str, stages: int, microbatches: int) -> None:
    """(S - 1) / (M + S - 1) of a step, for both schedules."""
    schedule = Schedule.of(name, stages, None, microbatches)
    events = simulate(schedule, [1.0] * stages, [2.0] * stages, [0.0] * (stages - 1))
    assert max(event.end for event in events) == 3 * (microbatches + stages - 1)
    assert len(events) == 2 * stages * microbatches
    for stage in range(stages):
        own = [event for event in events if event.action.stage == stage]
        assert all(before.end <= after.start for before, after in pairwise(own))


@pytest.mark.parametrize(
    ("name", "most"), [("interleaved", 0.16), ("zero-bubble", 0.12), ("zbv", 0.06), ("dualpipev", 0.07)]
)
def test_schedules_of_torch_wait_less_than_1f1b(name: str, most: float) -> None:
    """Four devices and eight microbatches: 1F1B waits 3 / 11 of the time."""
    stages = 4 if name == "zero-bubble" else 8
    schedule = Schedule.of(name, stages, 4, 8)
    events = simulate(schedule, [1.0] * stages, [2.0] * stages, [0.0] * (stages - 1))
    step = max(event.end for event in events)
    assert 0 <= 1 - 3 * stages * 8 / (4 * step) < most
    for kind in "F", "B", "I", "W":
        done = [event.action for event in events if event.action.kind == kind]
        assert len(set(done)) == len(done)
    finished = {(event.action.stage, event.action.microbatch) for event in events if event.action.kind in "BW"}
    assert len(finished) == 8 * stages


def test_a_slow_link_delays_the_next_stage() -> None:
    events = simulate(Schedule.of("1f1b", 2, None, 2), [1.0, 1.0], [1.0, 1.0], [5.0])
    starts = {event.action: event.start for event in events}
    assert starts[Action("F", 1, 0)] == 6.0 and starts[Action("B", 0, 0)] == 13.0


def test_a_device_receives_while_it_works_where_receives_are_posted_ahead() -> None:
    """Forwards of two stages, with a transfer as long as each: in turn on the second device, or side by side."""
    ends = {}
    for name in ("gpipe", "interleaved"):
        schedule = Schedule.of(name, 2, 2, 4)
        events = simulate(schedule, [1.0, 1.0], [0.0, 0.0], [1.0])
        ends[name] = max(event.end for event in events if event.action == Action("F", 1, 2))
    assert schedule.device(1) == 1 and not schedule.waits
    assert ends == {"gpipe": 1.0 + 3 * 2.0, "interleaved": 3.0 + 1.0 + 1.0}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_further_microbatch_costs_what_the_planner_says(data: st.DataObject) -> None:
    """The slowest stage, as the search counts it, is by how much the simulated step grows; and no cuts grow less."""
    times = st.integers(1, 20).map(float)
    count = data.draw(st.integers(2, 6))
    halves = data.draw(st.lists(st.tuples(times, times), min_size=count, max_size=count))
    links = data.draw(st.lists(st.integers(0, 10).map(float), min_size=count, max_size=count))
    units = [Unit(a + b, send=link) for (a, b), link in zip(halves, links, strict=True)]
    stages = data.draw(st.integers(1, min(3, count)))

    def growth(cuts: tuple[int, ...]) -> float:
        bounds = list(pairwise((0, *cuts, count)))
        forward, backward = (
            [sum(half[part] for half in halves[start:end]) for start, end in bounds] for part in (0, 1)
        )
        ends = []
        for microbatches in (12 * stages, 13 * stages):  # behind all that is of the start
            schedule = Schedule.of("1f1b", stages, None, microbatches)
            events = simulate(schedule, forward, backward, [links[cut] for cut in cuts])
            ends.append(max(event.end for event in events))
        return (ends[1] - ends[0]) / stages

    found = Search(units, [stages - stage for stage in range(stages)]).run()
    assert found is not None
    planned = growth(tuple(stage.start for stage in found[1:]))
    assert planned == pytest.approx(max(stage.time for stage in found))
    assert planned == pytest.approx(min(map(growth, combinations(range(1, count), stages - 1))))


# ---------------------------------------------------------------------------------------------- refusals

BAD: list[tuple[dict[str, Any], str]] = [
    (dict(stages=0), "stages is 0; legal: an integer >= 1"),
    (dict(stages=True), "stages is True"),
    (dict(stages=1.5), "stages is 1.5"),
    (dict(microbatches=0), "microbatches is 0; legal: an integer >= 1"),
    (dict(microbatches="4"), "microbatches is '4'"),
    (dict(schedule="2f2b"), "schedule is '2f2b'; legal: one of 'gpipe', '1f1b'"),
    (dict(schedule=None), "schedule is None"),
    (dict(stages=3, microbatches=2), "microbatches is 2; legal: at least 3, one for each device, for '1f1b'"),
    (dict(devices=2), "devices is 2 for 1 stages; legal: stages / 1 for '1f1b'"),
    (dict(stages=4, microbatches=4, devices=2), "devices is 2 for 4 stages; legal: stages / 1 for '1f1b'"),
    (dict(stages=3, microbatches=4, schedule="zbv"), "devices is 1 for 3 stages; legal: stages / 2 for 'zbv'"),
    (dict(stages=4, microbatches=4, schedule="interleaved", devices=3), "devices is 3; legal: a divisor of stages=4"),
    (dict(stages=4, microbatches=4, devices=0), "devices is 0"),
    (dict(stages=2, microbatches=5, schedule="zero-bubble"), "schedule 'zero-bubble' is refused by torch .* 5 micro"),
    (dict(memory=0), "memory is 0"),
    (dict(memory=-5.0), "memory is -5.0"),
    (dict(memory="lots"), "memory is 'lots'; legal: a number of bytes"),
    (dict(memory=float("nan")), "memory is nan"),
    (dict(memory=[1]), r"memory is \[1\]"),
    (dict(weight_copies=-1), "weight_copies is -1; legal: a finite number >= 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_arguments_are_refused_in_words(options: dict[str, Any], message: str) -> None:
    known = model_of("llama")
    with pytest.raises(ConfigError, match=message + "(?s:.*)Next: "):
        partition(known.model, known.inputs, **options)


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    known = model_of("llama")
    for options in (dict(schedule="2f2b"), dict(stages=9, microbatches=9), dict(memory=1)):
        with pytest.raises((ConfigError, PartitionError)):
            partition(known.model, known.inputs, **options)
    known.check(known.model)


def test_more_stages_than_legal_cuts_allow_are_refused() -> None:
    assert len(plan_of("llama", stages=8, microbatches=8).stages) == 8
    with pytest.raises(PartitionError, match=r"stages is 9; legal: 1 to 8: LlamaForCausalLM has 7 legal cuts\. Next: "):
        plan_of("llama", stages=9, microbatches=9)


def test_a_plain_model_is_refused() -> None:
    model, inputs = small_model("parallel")
    with pytest.raises(RewriteError, match="not converted"):
        partition(model, inputs)
    with pytest.raises(RewriteError, match="not converted"):
        partition(nn.Linear(2, 2), (torch.ones(1, 2),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {**found, "version": 99}, "version of the plan is 99"),
        (lambda found: {**found, "version": None}, "version of the plan is None"),
        (lambda found: [found], "version of the plan is None"),
        (lambda found: {key: value for key, value in found.items() if key != "units"}, "not readable"),
        (lambda found: {**found, "stages": [{"start": 0}]}, "not readable"),
    ],
)
def test_files_that_are_no_plan_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    plan = plan_of("llama")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(change(plan.as_dict())))
    with pytest.raises(ConfigError, match=message):
        Plan.load(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        Plan.load(path)


def test_a_picture_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan\.xyz.*legal: a path that ends in"):
        plan_of("llama").draw(tmp_path / "plan.xyz")
    assert not list(tmp_path.iterdir())


def test_the_loss_is_a_legal_end() -> None:
    """A model with labels: the last stage holds the loss."""
    known = model_of("llama")
    inputs = {**known.inputs, "labels": known.inputs["input_ids"]}
    plan = partition(known.model, inputs, stages=2, microbatches=2)
    assert isinstance(known.model(**inputs).loss, Tensor)
    assert [len(plan.sites_of(stage)) for stage in plan.stages] == [3, 3]


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x) * table)


class _WithATable(nn.Module):
    """All layers read one table, which is made of parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.made, self.rows = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(1, 8))
        self.layers = nn.ModuleList(_Scaled() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        table, x = torch.sigmoid(self.made(self.rows)), self.enter(x)
        for layer in self.layers:
            x = layer(x, table)
        return x.sum(-1)


def test_a_table_that_all_layers_read_takes_no_cuts_away() -> None:
    x = torch.randn(2, 8)
    found = []
    for n in (1, 4):
        costs = cost_model(mhc_compile(_WithATable(), n, backend="eager", example_inputs=x), x)
        found.append(len(costs.cuts))
        assert all(len(cut.skips) == 1 for cut in costs.cuts)  # the table is sent beside
    assert found == [3, 3]
