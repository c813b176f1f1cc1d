"""The cost model against hand-worked values, against what real autograd keeps, and against the paper's formulas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphs import randomize, zoo_model
from mhc_compile import mhc_compile
from mhc_compile.passes.cost import CostModel, Device
from mhc_compile.passes.cost_tables import _OPS, _UNFUSED, traffic
from mhc_compile.passes.cost_values import block_objective, exact_length, formula_length
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.lower import lower
from mhc_compile.passes.profile import profile_units
from mhc_compile.trace import Rewritten, rewritten

TOKENS, WIDTH, HIDDEN, N = 6, 8, 20, 4
FLOAT = 4  # bytes


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


class Chain(nn.Module):
    """Sites of one width between two products."""

    def __init__(self, sites: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.branches = nn.ModuleList(Branch() for _ in range(sites))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.leave(x)


def converted(model: nn.Module, inputs: Any) -> Rewritten:
    """The rewritten graph of a model with random mHC weights."""
    mhc_compile(model, N, backend="eager", example_inputs=inputs)
    randomize(model)
    return rewritten(model, inputs)


def chain_costs(sites: int, **options: Any) -> CostModel:
    torch.manual_seed(0)
    made = converted(Chain(sites), (torch.randn(2, TOKENS // 2, WIDTH),))
    return CostModel(made.graph, made.arguments, **options)


def zoo_graph(name: str, train: bool = False) -> Rewritten:
    model, inputs = zoo_model(name)
    return converted(model.train(train), inputs)


# ---------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("sites", [2, 5])
def test_the_bytes_of_a_chain_are_those_worked_out_by_hand(sites: int) -> None:
    units = chain_costs(sites).units
    assert len(units) == sites + 2  # and what enters and leaves
    one = TOKENS * FLOAT
    state = N * WIDTH * one
    first, *others = [unit for unit in units if unit.saved]
    last = others[-1]
    # F keeps the input of the second product (which is the relu's output, saved once) and f, which the merge saves;
    # the site its coefficients, z and r, and its norm a mean and a deviation that nothing else gives
    small = 2 * (N * N + 2 * N) + 1 + 2
    for unit in others:
        assert unit.kept == (HIDDEN + WIDTH + small) * one
    # the trunk is entered with x, which the replay widens again
    assert first.kept == (HIDDEN + WIDTH + WIDTH + small) * one
    # per site: X, u and the norm's output
    for unit in others:
        assert unit.saved == state + 2 * WIDTH * one
    assert first.saved == state + WIDTH * one
    assert [unit.state for unit in (first, *others)] == [0, *[state] * (sites - 1)]
    assert [unit.outgoing for unit in (first, *others)] == [*[state] * (sites - 1), 0]
    assert [unit.together - 2 * WIDTH * one for unit in (first, *others)] == [state] + [0] * (sites - 1)
    assert last.boundary == state and first.boundary in (None, WIDTH * one)
    assert all(unit.again == 0 for unit in units)


def test_gradients_on_their_way_are_those_of_the_largest_op() -> None:
    """The merge's: of X', of X and of f, and of post and res."""
    units = [unit for unit in chain_costs(3).units if unit.saved]
    one = TOKENS * FLOAT
    assert [unit.alone for unit in units] == [(2 * N * WIDTH + WIDTH + N + N * N) * one] * 3


def test_the_work_of_a_site_is_that_worked_out_by_hand() -> None:
    costs = chain_costs(2, kernels="op")
    ops = {op.op: op for op in costs.nodes.values() if op.site == costs.sites[1].name}
    columns, elements = N * N + 2 * N, TOKENS * N * WIDTH
    assert ops["mhc.coefficients.default"].flops == 2 * elements * columns
    assert ops["mhc.coefficients.default"].backward_flops == 3 * 2 * elements * columns
    assert ops["mhc.aggregate.default"].flops == 2 * elements
    assert ops["mhc.merge.default"].flops == 2 * elements * (N + 1)
    assert ops["mhc.merge.default"].backward_flops == 2 * 2 * elements * (N + 1)
    coefficients = (N * N + 2 * N) * TOKENS * FLOAT
    c = WIDTH * TOKENS * FLOAT
    # 4 + 5 + 9 units of C forward and 14 + 13 + 12 backward, with one kernel for each op
    parameters = (N * WIDTH * columns + 3 + columns) * FLOAT
    assert ops["mhc.coefficients.default"].bytes == 4 * c + coefficients + parameters
    assert ops["mhc.aggregate.default"].bytes == 5 * c + N * TOKENS * FLOAT
    assert ops["mhc.merge.default"].bytes == 9 * c + (N * N + N) * TOKENS * FLOAT
    back = [ops[f"mhc.{name}.default"].backward_bytes for name in ("merge", "aggregate", "coefficients")]
    assert back == [14 * c, 13 * c, 12 * c]
    products = [op for op in costs.nodes.values() if "linear" in op.op]
    assert [op.flops for op in products] == [
        2 * TOKENS * WIDTH * WIDTH,
        *[2 * TOKENS * WIDTH * HIDDEN] * 4,
        2 * TOKENS * WIDTH * 3,
    ]
    assert all(op.backward_flops == 2 * op.flops for op in products)


def units_moved(costs: CostModel, site: int) -> tuple[float, float, float]:
    """Units of C that a site's ops move of streams: in the forward, the backward, and a replay."""
    ops = (node for node in costs.moves if node.meta["mhc_site"] == costs.sites[site].name)
    found = [costs.moves[node] for node in ops]
    return tuple(sum(getattr(one, part).units(N) for one in found) for part in ("forward", "backward", "replay"))


@pytest.mark.parametrize(
    ("kernels", "first", "inner", "last"),
    [
        ("op", (18, 39, 18), (18, 39, 18), (18, 39, 18)),
        ("site", (18, 28, 7), (18, 28, 7), (18, 28, 7)),
        # The read of the first is by itself, and so is the merge of the last and its backward.
        ("chain", (18, 23, 18), (14, 24, 14), (14, 29, 14)),
    ],
)
def test_a_site_moves_what_its_kernels_do(kernels: str, first: Any, inner: Any, last: Any) -> None:
    """Sums of docs/kernels.md. Fused, 4 less forward of each border; backward 10 + 14 in the place of 10 + 5 + 13."""
    costs = chain_costs(3, kernels=kernels)
    assert [units_moved(costs, site) for site in range(3)] == [first, inner, last]
    ops = [op for op in costs.nodes.values() if op.site == costs.sites[1].name]
    one = TOKENS * WIDTH * FLOAT
    assert sum(op.backward_bytes for op in ops if "sinkhorn" not in op.op) == inner[1] * one
    assert inner[0] * one < sum(op.bytes for op in ops) < (inner[0] + 1) * one + (N * WIDTH + 9) * (N * N + 2 * N) * 99


def test_single_pass_reads_are_in_the_launches_of_the_merges() -> None:
    torch.manual_seed(0)
    model, inputs = Chain(4), (torch.randn(2, TOKENS // 2, WIDTH),)
    mhc_compile(model, N, backend="eager", example_inputs=inputs, single_pass=True)
    made = rewritten(model, inputs)
    costs = CostModel(made.graph, made.arguments, kernels="chain")
    by_site = {site.name: [0.0, 0.0] for site in costs.sites}
    *ops, (_, exit_read) = costs.moves.items()
    for node, moved in ops:
        for place, part in enumerate((moved.forward, moved.backward)):
            by_site[node.meta["mhc_site"]][place] += part.units(N)
    # The first reads the mean of equal streams; the merge of the last is by itself, and the exit is read behind it.
    assert list(by_site.values()) == [[13, 23], [10, 24], [10, 24], [10, 29]]
    assert exit_read.forward.units(N) == 5


def test_a_site_that_stays_on_level_1_moves_what_its_ops_do() -> None:
    torch.manual_seed(0)
    model, inputs = Chain(2), (torch.randn(2, TOKENS // 2, WIDTH),)
    mhc_compile(model, N, backend="eager", example_inputs=inputs, constraint="orthogonal")
    made = rewritten(model, inputs)
    found = {kind: CostModel(made.graph, made.arguments, kernels=kind).moves for kind in ("op", "site", "chain")}
    assert found["site"] == found["chain"] == found["op"] != {}


def test_a_time_is_that_of_the_slower_of_work_and_traffic() -> None:
    made = converted(Chain(2), (torch.randn(2, TOKENS // 2, WIDTH),))
    by_traffic = CostModel(made.graph, made.arguments, device=Device("x", flops=1e30, bandwidth=1e6, link=1e3))
    by_work = CostModel(made.graph, made.arguments, device=Device("x", flops=2e6, bandwidth=1e30, link=1e3))
    for node, op in by_traffic.nodes.items():
        assert op.seconds == pytest.approx(op.bytes / 1e6)
        assert by_work.nodes[node].seconds == pytest.approx(op.flops / 1e6)  # float32: half the rate
    unit = by_work.units[-1]
    assert unit.boundary is not None and unit.send == pytest.approx(unit.boundary / 1e3)
    assert 0 < by_traffic.units[1].replay < by_traffic.seconds[1][0]


def test_the_papers_table_of_traffic() -> None:
    """Table 2: (5 n + 1) C + n^2 + 2 n elements read and (3 n + 1) C + n^2 + 2 n written by the formula."""
    (size,) = set(chain_costs(1).site_sizes)
    reads, writes = traffic(_UNFUSED, size)
    small = N * N + 2 * N
    assert reads == (5 * N + 1) * WIDTH + small
    assert writes == (3 * N + 1) * WIDTH + small
    reads, writes = traffic(_OPS, size)
    assert (reads - small, writes - small) == (13 * WIDTH, 5 * WIDTH)


# ---------------------------------------------------------------------------------------------- what is really kept


def kept_by_autograd(made: Rewritten) -> int:
    """Bytes of the storages that a real forward of the fused ops of each site keeps, its inputs left out."""
    graph = copy_graph(made.graph)
    lower(graph)
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = graph(*made.arguments)
    inputs = [one.untyped_storage().data_ptr() for one in made.arguments if isinstance(one, Tensor)]
    del output
    return sum(size for key, size in kept.items() if key not in inputs)


@pytest.mark.parametrize(
    ("name", "train"), [("llama", False), ("gpt2", True), ("t5", True), ("vit", False), ("resnet", False)]
)
@pytest.mark.cases(2)
def test_what_autograd_keeps_is_predicted_to_the_byte(name: str, train: bool) -> None:
    made = zoo_graph(name, train)
    costs = CostModel(made.graph, made.arguments)
    assert sum(unit.kept + unit.saved for unit in costs.units) == kept_by_autograd(made)


def test_frozen_parameters_keep_less() -> None:
    model, inputs = zoo_model("llama")
    whole = converted(model, inputs)
    costs = CostModel(whole.graph, whole.arguments)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    frozen = rewritten(model, inputs)
    some = CostModel(frozen.graph, frozen.arguments)
    assert sum(unit.kept + unit.saved for unit in some.units) == kept_by_autograd(frozen)
    assert sum(unit.kept for unit in some.units) < sum(unit.kept for unit in costs.units) / 2


def test_profiled_times_replace_the_estimates() -> None:
    made = zoo_graph("llama")
    costs = CostModel(made.graph, made.arguments)
    estimated = costs.units
    seconds = profile_units(made.graph, made.arguments, costs.layout, rounds=1)
    assert len(seconds) == len(costs.units) and all(one > 0 for pair in seconds[1:] for one in pair)
    costs.measure(seconds)
    assert [unit.time for unit in costs.units] == [sum(pair) for pair in seconds]
    assert [unit.kept for unit in costs.units] == [unit.kept for unit in estimated]


# ---------------------------------------------------------------------------------------------- L_r*


@pytest.mark.parametrize("sites", [16, 24, 61, 128])
def test_the_formula_is_near_the_exact_objective(sites: int) -> None:
    states, replays = [4] * sites, [6] * sites
    best = exact_length(states, replays)
    assert block_objective(states, replays, best) == min(
        4 * -(-sites // length) + 6 * length for length in range(1, sites + 1)
    )
    assert abs(best - formula_length(4, sites)) < 2


def test_sites_of_other_widths_change_the_objective() -> None:
    states, replays = [4] * 8 + [40] * 8, [6] * 8 + [60] * 8
    assert block_objective(states, replays, 8) == 44 + 480
    assert block_objective(states, replays, 1) == 32 + 320 + 60
    assert exact_length(states, replays) == 2


# ---------------------------------------------------------------------------------------------- printing


def test_the_tables_hold_the_numbers_and_fit() -> None:
    costs = chain_costs(5)
    text = str(costs)
    assert max(map(len, text.splitlines())) <= 110
    assert f"5 sites of n = 4 streams, C = {WIDTH}, {TOKENS} tokens of 4 bytes an element" in text
    length = exact_length([4] * 5, [6] * 5)
    assert f"{formula_length(4, 5):.2f} by sqrt(nL / (n + 2)), {length} by the exact objective" in text
    assert costs.sites[4].name in text and f"{(5 * N + 1) * WIDTH + N * N + 2 * N}" in text
