"""mHC that a model has already is found whatever its spelling, keeps its function, and nothing else is found."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import foreign_blocks as blocks
from foreign_blocks import BATCH, BLOCKS, NEAR_MISSES, TOKENS, Block, C, N
from graphs import capture
from mhc_compile import explain
from mhc_compile.passes import match as matcher
from mhc_compile.passes import match_check
from mhc_compile.passes.capture import Captured, normalize
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.history import PassRecord, run_passes
from mhc_compile.passes.match import match_passes
from mhc_compile.passes.match_report import Matches
from mhc_compile.passes.op_kinds import aten, packet
from mhc_compile.passes.rewrite import analyze
from mutants import Judge

mhc = torch.ops.mhc


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Compiled frames of one test must not steer another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def captured(build: Any, dtype: torch.dtype = torch.float64) -> Captured:
    torch.manual_seed(0)
    model = build().to(dtype)
    return capture(model, (torch.randn(BATCH, TOKENS, C, dtype=dtype),))


def matched(graph: fx.GraphModule) -> tuple[fx.GraphModule, Matches, list[PassRecord]]:
    """A copy of a graph behind the matcher, what was found, and the records of its passes."""
    copy = copy_graph(graph)
    found: list[Matches] = []
    records = run_passes(copy, match_passes(found))
    copy.recompile()
    return copy, found[0], records


def assert_same_function(
    before: fx.GraphModule,
    after: fx.GraphModule,
    arguments: tuple[Any, ...],
    *,
    trains: bool = True,
    tolerance: float = 1e-9,
) -> None:
    """Outputs and all gradients agree in float64; they are not all zero."""
    judge = Judge(arguments)
    if not trains:
        with torch.no_grad():
            assert_near(after(*judge.arguments)[0], before(*judge.arguments)[0], 1e-12)
        return
    expected = judge.results(before)
    assert sum(value is not None and bool(value.abs().max() > 1e-6) for value in expected) > 2
    assert not judge.differ(judge.results(after), expected, tolerance)


def needs(name: str) -> None:
    for module in filter(None, [BLOCKS[name].needs, BLOCKS[name].needs and "einops"]):
        pytest.importorskip(module)


# ---------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.cases(8)
def test_every_spelling_is_found_whole(name: str) -> None:
    needs(name)
    before = captured(BLOCKS[name].build)
    after, found, _ = matched(before.graph)
    assert found.ops == BLOCKS[name].found
    assert len(found.sites) == 2
    assert all((site.n, site.features) == (N, C) for site in (*found.sites, *found.heads))
    left = {packet(node) for node in after.graph.nodes}
    if "sinkhorn" in found.ops:
        assert not left & {aten.exp, aten.softmax, aten.log_softmax, aten.logsumexp}
        assert aten.sum not in left or BLOCKS[name].needs == "hyper_connections"  # its exit is a sum
    if "coefficients" in found.ops:
        assert not left & {aten.sigmoid, aten.rsqrt, aten.sqrt, aten.rms_norm}
    block = BLOCKS[name]
    assert_same_function(before.graph, after, before.arguments, trains=block.trains, tolerance=block.tolerance)


@pytest.mark.parametrize("name", ["spec", "three_projections", "head", "identity"])
def test_float32_agrees_with_eager(name: str) -> None:
    torch.manual_seed(0)
    model, x = BLOCKS[name].build(), torch.randn(BATCH, TOKENS, C)
    before = capture(model, (x,))
    after, _, _ = matched(before.graph)
    assert_near(after(*before.arguments)[0], model(x), 1e-6)


def test_a_slice_behind_a_cache_that_holds_nothing() -> None:
    """`cat` takes an empty tensor of one axis beside any others."""

    class Cached(Block):
        def forward(self, x: Tensor) -> Tensor:
            held = torch.cat([torch.tensor([], dtype=x.dtype), x, x], dim=-2)
            return super().forward(held[:, :TOKENS])

    before = captured(Cached)
    after, found, _ = matched(before.graph)
    assert found.ops == BLOCKS["spec"].found
    assert_same_function(before.graph, after, before.arguments)


def assert_near(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("spec", dict(iterations=6, divisor_eps=0.0, rows_first=False, transposed=False, eps=1e-6, post_scale=2.0)),
        ("row_first", dict(iterations=6, divisor_eps=0.0, rows_first=True, transposed=False)),
        ("deepseek", dict(iterations=6, divisor_eps=1e-6, rows_first=True, transposed=True)),
        ("transposed", dict(rows_first=False, transposed=True)),
        ("contracted", dict(pre_eps=1e-6, post_eps=0.0, groups=3)),
        ("identity", dict(pre_eps=1e-6, post_scale=1.5, post_eps=1e-6, groups=2)),
        ("head", dict(groups=3)),
    ],
)
def test_the_variant_is_in_the_options(name: str, options: dict[str, Any]) -> None:
    _, found, _ = matched(captured(BLOCKS[name].build).graph)
    for site in found.sites:
        assert {key: site.options[key] for key in options} == options


def test_the_report_names_module_line_and_what_stays() -> None:
    _, found, _ = matched(captured(BLOCKS["head"].build).graph)
    assert [site.module for site in found.sites] == ["coefficients.0", "coefficients.1"]
    assert all("foreign_blocks.py" in site.line and "self.gate" in site.line for site in found.sites)
    assert [(head.ops, head.kept) for head in found.heads] == [(("coefficients", "aggregate"), ())]
    _, found, _ = matched(captured(BLOCKS["static"].build).graph)
    assert [site.kept for site in found.sites] == [("res", "coefficients")] * 2
    assert any("read gate is not sigmoid" in note for note in found.notes)


def test_the_ops_of_a_site_share_the_streams_that_they_read() -> None:
    """What is lowered to one kernel has to read one node, in whatever layout the model keeps its streams."""
    for name in ("spec", "flat", "folded", "features_first"):
        after, _, _ = matched(captured(BLOCKS[name].build).graph)
        merges = after.graph.find_nodes(op="call_function", target=mhc.merge.default)
        reads = after.graph.find_nodes(op="call_function", target=mhc.coefficients.default)
        assert [read.args[0] for read in reads] == [merge.args[0] for merge in merges], name
        assert merges[1].args[0] is merges[0], name


def test_one_tensor_that_holds_all_weights_is_not_copied() -> None:
    after, _, _ = matched(captured(BLOCKS["spec"].build).graph)
    for node in after.graph.find_nodes(op="call_function", target=mhc.coefficients.default):
        assert [argument.op for argument in node.args[1:4]] == ["placeholder"] * 3


# ---------------------------------------------------------------------------------------------- near misses


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_as_they_are(name: str) -> None:
    build, rule, reason = NEAR_MISSES[name]
    before = captured(build)
    after, found, records = matched(before.graph)
    assert rule not in found.ops
    notes = [note for note in found.notes if f"mhc::{rule}" in note and reason in note]
    assert notes and all("foreign_blocks.py:" in note for note in notes), found.notes
    assert set(notes) <= set(records[-1].notes)
    assert_same_function(before.graph, after, before.arguments)


def test_a_further_term_stays_beside_the_merge() -> None:
    before = captured(lambda: Block(write=blocks.write_scaled))
    after, found, _ = matched(before.graph)
    assert found.ops["merge"] == 2
    assert_same_function(before.graph, after, before.arguments)


def test_models_without_mhc_are_not_touched() -> None:
    class Plain(nn.Module):
        """Attention, a softmax, a router with normalised gates, a state that outer products are added to."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.proj = nn.RMSNorm(C), nn.Linear(C, 4 * C)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v, g = self.proj(self.norm(x)).chunk(4, -1)
            x = x + F.softmax(q @ k.mT, -1) @ v
            gate = torch.sigmoid(g)
            gate = gate / (gate.sum(-1, keepdim=True) + 1e-20)
            state = x.new_zeros(BATCH, C, C)
            for t in range(3):
                state = state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            return x + gate * (q @ state)

    before = captured(Plain)
    after, found, _ = matched(before.graph)
    assert found.ops == {} and found.refused == ()
    assert [str(node.target) for node in after.graph.nodes if "mhc" in str(node.target)] == []


# ---------------------------------------------------------------------------------------------- regions and sizes


def test_another_grad_mode_inside_is_refused() -> None:
    class Frozen(blocks.Coefficients):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                normed = x.flatten(-2) * torch.rsqrt(x.flatten(-2).square().mean(-1, keepdim=True) + blocks.EPS)
            pre, post, res = (normed @ self.phi * self.alpha[0] + self.bias).split([N, N, N * N], -1)
            return pre.sigmoid(), 2 * post.sigmoid(), self.sinkhorn(res.unflatten(-1, (N, N)))

    before = captured(lambda: Block(Frozen))
    after, found, _ = matched(before.graph)
    assert "coefficients" not in found.ops
    assert any("grad mode" in note for note in found.notes)
    assert_same_function(before.graph, after, before.arguments)


def test_a_gradient_that_is_cut_inside_is_kept_cut() -> None:
    def cut(a: Tensor) -> Tensor:
        m = a.exp()
        for t in range(blocks.ITERATIONS):
            m = m / (m.sum(-2, keepdim=True).detach() if t == 1 else m.sum(-2, keepdim=True))
            m = m / m.sum(-1, keepdim=True)
        return m

    before = captured(lambda: Block(lambda: blocks.Coefficients(cut)))
    after, found, _ = matched(before.graph)
    assert "sinkhorn" not in found.ops
    assert_same_function(before.graph, after, before.arguments)


def test_streams_that_are_written_in_place_are_refused() -> None:
    class Written(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(-2).expand(-1, -1, N, -1).contiguous()
            state = x.clone()
            view = state[:, :1]
            pre, post, res = self.coefficients[0](state)
            view.add_(1.0)
            return blocks.write(state, self.branches[0](blocks.read(state, pre)), post, res).mean(-2)

    before = captured(Written)
    after, found, _ = matched(before.graph)
    assert any("writes in place" in note for note in found.notes)
    assert_same_function(before.graph, after, before.arguments, trains=False)


def test_autocast_keeps_the_precision_of_the_coefficients() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(BATCH, TOKENS, C)
    exact = model.double()(x.double()).float()
    model.float()

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.model(x)

    cast = Cast()
    before = capture(cast, (x,))
    after, found, _ = matched(before.graph)
    assert found.ops == blocks.SITES
    result, eager = after(*before.arguments)[0], cast(x)
    assert result.dtype == eager.dtype
    assert (result - exact).norm() <= 1.05 * (eager - exact).norm()


def test_streams_in_bfloat16_are_as_near_as_eager() -> None:
    torch.manual_seed(0)
    model, x = BLOCKS["deepseek"].build(), torch.randn(BATCH, TOKENS, C)
    exact = model(x)
    low, y = model.bfloat16(), x.bfloat16()
    before = capture(low, (y,))
    after, found, _ = matched(before.graph)
    assert found.ops == blocks.SITES
    result, eager = after(*before.arguments)[0], low(y)
    assert result.dtype == eager.dtype == torch.bfloat16
    assert (result - exact).norm() <= 1.05 * (eager - exact).norm()


DECOMPOSED = ["spec", "normalize", "log_softmax", "softmax_start", "deepseek"]


def decomposed(name: str) -> tuple[nn.Module, Tensor]:
    """A block as torch.export decomposes it: a softmax has another name, and from torch 2.14 on a 1-norm is no op."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, TOKENS, C, dtype=torch.float64)
    program = torch.export.export(BLOCKS[name].build().double(), (x,))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
        return program.run_decompositions().module(), x


@pytest.mark.parametrize("name", DECOMPOSED)
def test_a_decomposed_program_is_matched_as_the_module_is(name: str) -> None:
    program, x = decomposed(name)
    before = capture(program, (x,))
    after, found, _ = matched(before.graph)
    assert found.ops == BLOCKS[name].found
    assert_near(after(*before.arguments)[0], program(x), 1e-9)


@pytest.mark.parametrize("name", DECOMPOSED)
@pytest.mark.cases(2)
def test_a_decomposed_program_is_not_converted_again(name: str) -> None:
    program, x = decomposed(name)
    assert analyze(capture(program, (x,)).graph).foreign is not None


@pytest.mark.parametrize("name", ["spec", "flat", "folded", "tokens_last"])
def test_symbolic_sizes_stay_symbolic(name: str) -> None:
    torch.manual_seed(0)
    model = BLOCKS[name].build()
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Any:
        values = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
        graph, found, _ = matched(normalize(gm, values))
        assert found.ops == BLOCKS[name].found
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for batch, tokens in ((2, 5), (3, 7), (4, 6)):
        x = torch.randn(batch, tokens, C)
        assert_near(compiled(x), model(x), 1e-6)
    assert len(graphs) == 1


def test_a_large_block_is_checked_on_small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "C", 512)
    torch.manual_seed(0)
    model = Block()
    before = capture(model, (torch.randn(4, 64, 512),))
    seen: list[tuple[dict[int, int], str | None]] = []
    compare = match_check._compared

    def watched(inputs: Any, olds: Any, news: Any, sizes: dict[int, int]) -> str | None:
        seen.append((sizes, compare(inputs, olds, news, sizes)))
        return seen[-1][1]

    monkeypatch.setattr(match_check, "_compared", watched)
    _, found, _ = matched(before.graph)
    assert found.ops == blocks.SITES
    assert len(seen) == sum(found.ops.values())  # each agreed at the first attempt
    large = [sizes for sizes, differs in seen if sizes and differs is None]
    assert len(large) == 7 and all(sizes[512] < 64 for sizes in large)  # Sinkhorn's inputs are small anyway


# ---------------------------------------------------------------------------------------------- a wrong rule


@pytest.mark.parametrize("rule", ["mhc::merge", "mhc::sinkhorn", "mhc::coefficients"])
def test_a_rule_that_is_wrong_is_taken_back_and_reported(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put = matcher._Session._put

    def spoiled(session: Any, one: Any, *rest: Any) -> bool:
        if one.rule == rule:
            inner = one.build

            def wrong(placer: Any) -> tuple[fx.Node, ...]:
                first, *others = inner(placer)
                return (placer.emit.call(aten.mul.Tensor, first, 1.001, like=first), *others)

            one.build = wrong
        return bool(put(session, one, *rest))

    monkeypatch.setattr(matcher._Session, "_put", spoiled)
    before = captured(Block)
    with pytest.warns(UserWarning, match=f"a rule of mhc_compile for {rule} is wrong .values differ"):
        after, found, _ = matched(before.graph)
    assert rule.removeprefix("mhc::") not in found.ops
    assert any("would compute something else" in note for note in found.notes)
    assert_same_function(before.graph, after, before.arguments)


class Written(nn.Module):
    """A site in the logarithmic domain whose norm has the default eps, which goes by the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.phi, self.bias = nn.Parameter(torch.randn(N * C, N * N + 2 * N)), nn.Parameter(torch.randn(N * N + 2 * N))
        self.alpha, self.linear = nn.Parameter(torch.rand(3) + 0.5), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        streams = x.unsqueeze(-2).expand(*x.shape[:-1], N, C)
        pre, post, res = (F.rms_norm(streams.flatten(-2), (N * C,)) @ self.phi).split([N, N, N * N], -1)
        pre = torch.sigmoid(self.alpha[0] * pre + self.bias[:N])
        post = 2 * torch.sigmoid(self.alpha[1] * post + self.bias[N : 2 * N])
        logits = (self.alpha[2] * res + self.bias[2 * N :]).unflatten(-1, (N, N))
        for _ in range(5):
            logits = logits - torch.logsumexp(logits, -2, keepdim=True)
            logits = logits - torch.logsumexp(logits, -1, keepdim=True)
        y = self.linear((pre.unsqueeze(-1) * streams).sum(-2))
        return (logits.exp() @ streams + post.unsqueeze(-1) * y.unsqueeze(-2)).mean(-2)


def test_a_norm_with_the_default_eps_and_logarithms_are_found_and_explained() -> None:
    torch.manual_seed(0)
    found = explain(Written(), torch.randn(BATCH, TOKENS, C)).own
    assert found is not None
    (site,) = found.sites
    assert {"coefficients", "sinkhorn"} <= set(site.ops), site
    assert not site.kept
