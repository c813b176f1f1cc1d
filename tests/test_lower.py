"""Lowered graphs compute what level 1 computes; what does not fit stays there, with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

import random_modules
from graphs import (
    Result,
    Weights,
    as_double,
    assert_same,
    capture,
    identity_weights,
    output_error,
    own_parameters,
    result_of,
    small_model,
    split_reads,
    widen,
    zoo_model,
)
from mhc_compile import MHCConfig
from mhc_compile.passes import lower as level_2
from mhc_compile.passes.bind import bind_parameters
from mhc_compile.passes.emit import Emitter, copy_graph
from mhc_compile.passes.history import Pass, PassRecord, run_passes
from mhc_compile.passes.lower import lower
from mhc_compile.passes.op_kinds import aten
from mhc_compile.passes.rewrite import analyze, rewrite
from mhc_compile.passes.trunks import Site
from test_site_ops import Allocations, kept

mhc = torch.ops.mhc

LEVEL_1 = ("coefficients", "sinkhorn", "aggregate", "merge")
FAR = 1e-3  # further than this from the plain output, an output cannot be the plain one

# Of scale. In float32 level 1 itself is up to 6e-6 from its gradients in float64 (t5), so that two orders of the same
# sums cannot agree better; that they are the same sums is what float64 shows.
LIMITS = {
    torch.float64: dict(outputs=1e-12, gradients=1e-12),
    torch.float32: dict(outputs=1e-6, gradients=2e-5),
    torch.bfloat16: dict(outputs=5e-2, gradients=2e-1),
}

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compilations() -> Any:
    """Nothing from another test, nor from the caches on disk: their keys know nothing of the ops' formulas."""
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def random_weights(site: Site, n: int = 4) -> Weights:
    """Parameters far from those that keep the function; the same for every application of a layer."""
    generator = torch.Generator().manual_seed(sum(map(ord, site.name)))
    own = [one.detach() for one in identity_weights(site, n)]
    phi, alpha, bias = (one + 0.3 * torch.randn(one.shape, generator=generator).to(one) for one in own)
    return phi.requires_grad_(), alpha.requires_grad_(), bias.requires_grad_()


@dataclass
class Pair:
    """One call of a model as rewritten to level 1, and the same lowered."""

    model: nn.Module
    plain: fx.GraphModule
    level_1: fx.GraphModule
    lowered: fx.GraphModule
    record: PassRecord
    arguments: tuple[Any, ...]
    weights: tuple[Tensor, ...]
    sites: list[Site]

    def run(self, call: Callable[..., Any]) -> Result:
        """Outputs, and gradients of the model's parameters and of those of its sites."""
        parameters = {**own_parameters(self.model), **{f"mhc {i}": one for i, one in enumerate(self.weights)}}
        given = [_copy(one) for one in self.arguments]
        return result_of(lambda: call(*given, *self.weights), parameters)

    def check(self, **limits: float) -> None:
        """Both graphs compute the same, and not what the plain model does."""
        expected = self.run(self.level_1)
        plain = result_of(lambda: self.plain(*self.arguments), own_parameters(self.model))
        assert output_error(plain, expected) > FAR, "the test could not tell mHC from plain"
        assert_same(expected, self.run(self.lowered), **limits)


def _copy(value: Any) -> Any:
    """Buffers and inputs may be written into; parameters are what is differentiated."""
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value


def lowered(graph: fx.GraphModule) -> tuple[fx.GraphModule, PassRecord]:
    copy = copy_graph(graph)
    return copy, run_passes(copy, [Pass("lower", False, lower)])[0]


def pair(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, n: int = 4) -> Pair:
    made = widen(model, args, kwargs, n=n, weights=lambda site: random_weights(site, n))
    graph, record = lowered(made.graph)
    return Pair(model, made.plain, made.graph, graph, record, made.arguments, made.weights, made.analysis.sites)


def zoo_pair(name: str, double: bool = False) -> Pair:
    torch.manual_seed(0)
    model, inputs = zoo_model(name)
    return pair(model.double(), (), as_double(inputs)) if double else pair(model, (), inputs)


def small_pair(name: str, double: bool = True) -> Pair:
    torch.manual_seed(0)
    model, inputs = small_model(name)
    return pair(model.double(), (), as_double(inputs)) if double else pair(model, (), inputs)


def op_counts(graph: fx.GraphModule) -> Counter[str]:
    """How often each op of level 1 or 2 that belongs to a site is called."""
    names = (*LEVEL_1, "read", "merge_carried")
    return Counter(
        node.target._opname
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "mhc"
        if node.target._opname in names
    )


# --- the same function ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "resnet", pytest.param("t5", marks=pytest.mark.slow), "albert"])
@pytest.mark.cases(2)
def test_models_compute_the_same(name: str) -> None:
    for double in (True, False):
        one = zoo_pair(name, double)
        one.check(**LIMITS[torch.float64 if double else torch.float32])
        assert op_counts(one.lowered) == {"read": len(one.sites), "merge_carried": len(one.sites)}
        assert not one.record.notes


# The random modules in which a gate is on the skip.
NOT_FUSED = {0: ["1 site is"], 1: ["1 site is"], 12: ["2 sites are"], 14: ["1 site is"]}


@pytest.mark.parametrize("seed", range(15))
def test_random_modules_compute_the_same(seed: int) -> None:
    case = random_modules.make(seed)
    model = case.build()
    one = pair(model, case.inputs())
    one.check(**LIMITS[next(model.parameters()).dtype if case.exact else torch.bfloat16])
    counted = op_counts(one.lowered)
    stay = counted["coefficients"]
    assert [counted[name] for name in LEVEL_1] == 4 * [stay]
    assert counted["read"] == counted["merge_carried"] == len(one.sites) - stay
    assert [note.split(" not fused")[0] for note in one.record.notes] == NOT_FUSED.get(seed, [])


# what the trunk of each has: sites that fit, and sites that stay on level 1
SHAPES = {
    "trunk_mask": (4, 0),  # an op between sites, on the streams
    "auxiliary_heads": (3, 0),  # other readers of the trunk
    "two_modalities": (8, 0),
    "long_skips": (10, 0),
    "parallel": (3, 0),  # several branches of one site
    "layout_ops": (4, 0),
    "checkpointed": (6, 0),
    "highway": (0, 3),  # a factor on the skip
    "learned_weights": (0, 3),
}


@pytest.mark.parametrize("name", SHAPES)
def test_trunks_of_many_shapes(name: str) -> None:
    one = small_pair(name)
    one.check(**LIMITS[torch.float64])
    counted = op_counts(one.lowered)
    assert (counted["read"], counted["coefficients"]) == SHAPES[name]


@pytest.mark.parametrize("name", ["mixed_precision", "half_trunk", "autocast_off"])
def test_narrow_and_mixed_dtypes(name: str) -> None:
    small_pair(name, double=False).check(**LIMITS[torch.bfloat16])


class Autocast(nn.Module):
    """The second branch and its sum stand in a region of autocast, the read before it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.first(x))
        with torch.autocast("cpu", torch.bfloat16):
            return x + torch.tanh(self.second(x))


def test_a_merge_in_an_autocast_region() -> None:
    one = pair(Autocast(), (torch.randn(2, 5, 8),))
    assert op_counts(one.lowered) == {"read": 2, "merge_carried": 2}
    one.check(**LIMITS[torch.bfloat16])


def test_tied_sites() -> None:
    """Two applications of a layer read with the same parameters, each with a carrier of its own."""
    torch.manual_seed(0)
    model, inputs = small_model("shared_layers")
    model, inputs = model.double(), as_double(inputs)
    captured = capture(model, (), inputs)
    plain, analysis = copy_graph(captured.graph), analyze(captured.graph, tie_shared=True)
    look_up, names = bind_parameters(captured.graph, analysis.sites, MHCConfig())
    rewrite(analysis, MHCConfig(), look_up)
    by_name = {site.name: random_weights(site) for site in analysis.sites}
    assert len(by_name) < len(analysis.sites) and len(names) == 3 * len(by_name)
    graph, record = lowered(captured.graph)
    weights = tuple(chain.from_iterable(by_name[name.removesuffix(".phi")] for name in names if name.endswith(".phi")))
    one = Pair(model, plain, captured.graph, graph, record, captured.arguments, weights, analysis.sites)
    assert op_counts(graph) == {"read": len(one.sites), "merge_carried": len(one.sites)}
    one.check(**LIMITS[torch.float64])


@pytest.mark.parametrize("n", [2, 3])
def test_other_numbers_of_streams(n: int) -> None:
    case = random_modules.make(0)
    pair(case.build(), case.inputs(), n=n).check(**LIMITS[torch.float64])


def test_several_aggregates_of_one_site() -> None:
    one = zoo_pair("bert", double=True)
    split_reads(one.level_1)  # one for each of query, key and value
    assert op_counts(one.level_1)["aggregate"] > len(one.sites)
    one.lowered, one.record = lowered(one.level_1)
    assert op_counts(one.lowered) == {"read": len(one.sites), "merge_carried": len(one.sites)}
    one.check(**LIMITS[torch.float64])


def test_coefficients_that_others_read() -> None:
    """A monitor in the graph, with a loss on it."""
    one = small_pair("parallel")
    output = next(iter(one.level_1.graph.find_nodes(op="output")))
    seen = []
    for start in one.level_1.graph.find_nodes(op="call_function", target=mhc.coefficients.default):
        pre, post, logits = sorted(start.users, key=lambda user: user.args[1])
        seen += [pre, post, next(iter(logits.users))]
    output.args = ((*output.args[0], *seen),)
    one.level_1.recompile()
    one.lowered, one.record = lowered(one.level_1)
    assert op_counts(one.lowered) == {"read": 3, "merge_carried": 3}
    expected, actual = one.run(one.level_1), one.run(one.lowered)
    assert len(expected.outputs) == 1 + len(seen)
    assert_same(expected, actual, **LIMITS[torch.float64])


# --- the graph --------------------------------------------------------------------------------------------


class Recorded(fx.Interpreter):
    """Runs a graph and compares what each node gives with what was recorded for it."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "output":
            return result
        for value, fake in zip(_tensors(result), _tensors(n.meta.get("val")), strict=True):
            assert (value.shape, value.stride(), value.dtype) == (fake.shape, fake.stride(), fake.dtype), n
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(one, Tensor)]


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_every_new_node_has_its_value_and_its_origin(name: str) -> None:
    one = zoo_pair(name)
    Recorded(one.lowered).run(*one.arguments, *one.weights)
    merges = list(one.level_1.graph.find_nodes(op="call_function", target=mhc.merge.default))
    carried = list(one.lowered.graph.find_nodes(op="call_function", target=mhc.merge_carried.default))
    reads = list(one.lowered.graph.find_nodes(op="call_function", target=mhc.read.default))
    assert [node.meta["mhc_site"] for node in reads] == [site.name for site in one.sites]
    for merge, new, read in zip(merges, carried, reads, strict=True):
        assert new.meta["mhc_site"] == merge.meta["mhc_site"] == read.meta["mhc_site"]
        for node in (new, read, *read.users):
            assert node.meta["nn_module_stack"] == merge.meta["nn_module_stack"]
            assert node.meta["stack_trace"] == merge.meta["stack_trace"]
        assert {user.args[1] for user in read.users} <= set(range(5))


def test_the_record_says_what_changed() -> None:
    record = small_pair("parallel").record
    gone = {f"mhc.{name}.default": -3 for name in LEVEL_1}
    assert record.change == {**gone, "mhc.read.default": 3, "mhc.merge_carried.default": 3, "getitem": 3}


def test_a_lowered_graph_stays_as_it_is() -> None:
    graph = small_pair("parallel").lowered
    before = [str(node) for node in graph.graph.nodes]
    assert not lower(graph).modified
    assert [str(node) for node in graph.graph.nodes] == before


def test_a_graph_without_sites_stays_as_it_is() -> None:
    outcome = lower(small_pair("parallel").plain)
    assert not outcome.modified and not outcome.notes


# --- what stays on level 1 --------------------------------------------------------------------------------


def refused(edit: Callable[[fx.GraphModule, Emitter], None]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The lowered graph and the notes of a model with three sites, after an edit of its level-1 graph."""
    graph = small_pair("parallel").level_1
    edit(graph, Emitter(graph.graph))
    graph.graph.lint()
    outcome = lower(graph)
    graph.graph.lint()
    return graph, outcome.notes


def first(graph: fx.GraphModule, target: Any) -> fx.Node:
    return next(iter(graph.graph.find_nodes(op="call_function", target=target)))


def scale_the_skip(graph: fx.GraphModule, emit: Emitter) -> None:
    merge = first(graph, mhc.merge.default)
    with graph.graph.inserting_before(merge):
        merge.replace_input_with(merge.args[0], emit.call(aten.mul.Tensor, merge.args[0], 0.5, like=merge))


def read_the_logits(graph: fx.GraphModule, emit: Emitter) -> None:
    logits = first(graph, mhc.sinkhorn.default).args[0]
    with graph.graph.inserting_after(logits):
        copy = emit.call(aten.clone.default, logits, like=logits)
    output = next(iter(graph.graph.find_nodes(op="output")))
    output.args = ((*output.args[0], copy),)


def write_into_the_streams(graph: fx.GraphModule, emit: Emitter) -> None:
    merge = first(graph, mhc.merge.default)
    with graph.graph.inserting_before(merge):
        emit.call(aten.mul_.Tensor, merge.args[0], 0.5, like=merge)


def read_without_gradients(graph: fx.GraphModule, emit: Emitter) -> None:
    sinkhorn = first(graph, mhc.sinkhorn.default)
    with graph.graph.inserting_before(sinkhorn):
        graph.graph.call_function(torch._C._set_grad_enabled, (False,))
    with graph.graph.inserting_after(sinkhorn):
        graph.graph.call_function(torch._C._set_grad_enabled, (True,))


REASONS = {
    scale_the_skip: level_2.SKIP,
    read_the_logits: level_2.LOGITS,
    write_into_the_streams: level_2.WRITTEN,
    read_without_gradients: level_2.GRADIENTS,
}


@pytest.mark.parametrize("edit", REASONS, ids=lambda edit: edit.__name__)
def test_a_site_that_does_not_fit_stays(edit: Callable[[fx.GraphModule, Emitter], None]) -> None:
    graph, notes = refused(edit)
    name = first(graph, mhc.coefficients.default).meta["mhc_site"]
    assert notes == (f"1 site is not fused ({name}): {REASONS[edit]}",)
    assert op_counts(graph) == {**dict.fromkeys(LEVEL_1, 1), "read": 2, "merge_carried": 2}


def test_sites_with_one_reason_share_a_note() -> None:
    one = small_pair("highway")
    names = ", ".join(site.name for site in one.sites)
    assert one.record.notes == (f"3 sites are not fused ({names}): {level_2.SKIP}",)
    assert str(one.record).endswith(f"\n  note: {one.record.notes[0]}")


def test_another_merge_with_the_same_coefficients_stays() -> None:
    """Of two merges only the one of the streams that were read is carried; the other reads post and res."""
    one = small_pair("parallel")
    graph = one.level_1
    merge = first(graph, mhc.merge.default)
    emit = Emitter(graph.graph)
    with graph.graph.inserting_after(merge):
        other = emit.call(mhc.merge.default, merge, *merge.args[1:], like=merge)
    merge.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
    one.lowered, one.record = lowered(graph)
    assert op_counts(one.lowered) == {"read": 3, "merge_carried": 3, "merge": 1} and not one.record.notes
    one.check(**LIMITS[torch.float64])


# --- compiled, and what is kept and allocated -------------------------------------------------------------


COMPILED = [
    ("aot_eager", "parallel"),
    ("aot_eager", "checkpointed"),  # read and merge_carried are computed again in the backward
    pytest.param("inductor", "parallel", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("backend", "name"), COMPILED)
def test_compiled(backend: str, name: str) -> None:
    one = small_pair(name, double=False)
    compiled = torch.compile(one.lowered, backend=backend, fullgraph=True)
    assert_same(one.run(one.level_1), one.run(compiled), outputs=1e-5, gradients=1e-4)


def test_symbolic_sizes() -> None:
    """One lowered graph for any batch and length."""
    torch.manual_seed(0)
    model, inputs = zoo_model("llama")
    ids = inputs["input_ids"]
    for axis in (0, 1):
        torch._dynamo.mark_dynamic(ids, axis)
    one = pair(model, (), {"input_ids": ids})
    read = first(one.lowered, mhc.read.default)
    assert isinstance(read.meta["val"][4].shape[0], torch.SymInt)
    shape = [axis + 3 for axis in ids.shape]
    arguments = tuple(
        torch.randint(100, shape)
        if isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 2
        else value
        for value in one.arguments
    )
    sizes = dict(zip(ids.shape, shape, strict=True))
    one.arguments = tuple(sizes.get(value, value) if isinstance(value, int) else value for value in arguments)
    one.check(**LIMITS[torch.float32])


def test_a_backward_allocates_one_gradient_of_the_streams_a_site() -> None:
    one = zoo_pair("llama")
    streams = first(one.lowered, mhc.read.default).meta["val"][4]

    def counted(graph: fx.GraphModule) -> tuple[int, Counter[str]]:
        with kept() as found:
            output = graph(*one.arguments, *one.weights)
        loss = sum(o.square().sum() for o in output if isinstance(o, Tensor) and o.requires_grad)
        with Allocations(lambda tensor: tensor.shape == streams.shape) as seen:
            loss.backward()
        return sum(tensor.shape == streams.shape for tensor in found), Counter(seen.ops)

    whole, ops = counted(one.lowered)
    assert whole == len(one.sites)  # X of each site
    assert ops == {"read_backward": len(one.sites), "readout_backward": 1}
    whole, ops = counted(one.level_1)  # the same count, where it is known to be more
    assert whole == len(one.sites)
    assert sum(ops.values()) >= 3 * len(one.sites)
