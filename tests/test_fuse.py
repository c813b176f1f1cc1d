"""Fusing a site's merge with the next site's read: the op, and the pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mhc_compile.errors import ShapeError
from mhc_compile.kernels import cross_site_ops, ops, site_ops
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.fuse import fuse
from mhc_compile.passes.history import count_ops
from mhc_compile.passes.lower import lower
from opcheck import opcheck
from test_conventions import MERGE, VARIANTS, chosen
from test_lower import LIMITS, zoo_pair

mhc = torch.ops.mhc
EPS, ITERATIONS, C = 0.1, 4, 5


def parameters(n: int, variant: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    groups = variant.get("groups", 3)
    columns = (n, 2 * n, n * n + 2 * n)[groups - 1]
    values = [torch.randn(n * C, columns), torch.tensor([0.5, 1.5, -2.0])[:groups], torch.randn(columns)]
    return [value.to(dtype).requires_grad_() for value in values]


def two_sites(
    fused: bool, inputs: list[Tensor], first: list[Tensor], second: list[Tensor], variants: list[dict[str, Any]]
) -> list[Tensor]:
    """Two sites and a tap between them."""
    streams, f = inputs
    before, after = variants
    manner = chosen(before, MERGE)
    u, _, post, res, carrier = site_ops.read(streams, *first, EPS, ITERATIONS, **before)
    mixing, branch = res if res.numel() else None, f * torch.tanh(u)
    if fused:
        renamed = {f"res_{key}": value for key, value in manner.items()}
        rest = (tuple(second), EPS, ITERATIONS)
        merged, u, pre, post, res, carrier = cross_site_ops.merge_read(
            streams, branch, carrier, post, mixing, *rest, **renamed, **after
        )
    else:
        merged = site_ops.merge_carried(streams, branch, carrier, post, mixing, **manner)
        u, pre, post, res, carrier = site_ops.read(merged, *second, EPS, ITERATIONS, **after)
    outputs = [u, pre, post, ops.readout(merged)]
    if after.get("groups", 3) > 1:
        mixing = res if res.numel() else None
        outputs.append(site_ops.merge_carried(merged, f + u, carrier, post, mixing, **chosen(after, MERGE)))
    return outputs


@pytest.mark.parametrize("n", [1, 3, 4, 6])
@pytest.mark.parametrize(
    ("before", "after"),
    [("paper", "paper"), ("deepseek_v4", "deepseek_v4"), ("deepseek_v4", "head"), ("hunyuan_v4", "hunyuan_v4")],
)
def test_the_op_is_the_two_ops(before: str, after: str, n: int) -> None:
    torch.manual_seed(0)
    variants = [VARIANTS[before], VARIANTS[after]]
    inputs = [torch.randn(7, n, C).double().requires_grad_(), torch.randn(7, C).double().requires_grad_()]
    first, second = parameters(n, variants[0]), parameters(n, variants[1])
    leaves = [*inputs, *first, *second]
    both = [two_sites(fused, inputs, first, second, variants) for fused in (True, False)]
    weights = [torch.randn(output.shape).double() for output in both[0]]
    for found, right in zip(*both, strict=True):
        assert torch.equal(found, right)
    grads = [torch.autograd.grad(outputs, leaves, weights) for outputs in both]
    for found, right in zip(*grads, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_opcheck() -> None:
    torch.manual_seed(0)
    first, second = parameters(2, {}, torch.float32), parameters(2, {}, torch.float32)
    streams, f = torch.randn(3, 2, C, requires_grad=True), torch.randn(3, C, requires_grad=True)
    with torch.no_grad():
        _, _, post, res, carrier = site_ops.read(streams, *first, EPS, ITERATIONS)
    coefficients = None, post.requires_grad_(), res.requires_grad_()
    args = (streams, f, carrier, *coefficients, False, False, *second, EPS, ITERATIONS)
    opcheck(mhc.merge_read.default, args)


def test_without_a_gradient_of_the_streams() -> None:
    """Only the parameters of the second site are trained: nothing is computed for the rest."""
    torch.manual_seed(0)
    first, second = parameters(3, {}), parameters(3, {})
    inputs = [torch.randn(7, 3, C).double(), torch.randn(7, C).double()]
    outputs = two_sites(True, inputs, [p.detach() for p in first], second, [{}, {}])
    right = two_sites(False, inputs, [p.detach() for p in first], second, [{}, {}])
    for one in (outputs, right):
        one.pop()
    found = torch.autograd.grad(sum(o.sum() for o in outputs[:3]), second)
    expected = torch.autograd.grad(sum(o.sum() for o in right[:3]), second)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- the backward across sites, which kernels have: here in plain torch -----------------------------------


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Merges leave what they can to the read before, as they do where kernels run."""
    monkeypatch.setattr(cross_site_ops, "leaves_products", lambda streams, mix, compiled: mix != "identity")
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def several(
    inputs: list[Tensor], sites: list[list[Tensor]], variants: list[dict[str, Any]], left: bool
) -> list[Tensor]:
    """Sites in a row, as `fuse` leaves them; readers of the state and of the coefficients between."""
    streams, f = inputs
    u, pre, post, res, carrier, branch, _, _ = mhc.read(streams, *sites[0], EPS, ITERATIONS, **variants[0])
    outputs = [u, post]
    for before, variant, parameters in zip(variants, variants[1:], sites[1:], strict=False):
        manner = chosen(before, MERGE)
        flags = manner.get("transposed", False), manner.get("rounded", False)
        given = (carrier, branch if left else None, post, res if res.numel() else None)
        result = mhc.merge_read(streams, f * torch.tanh(u), *given, *flags, *parameters, EPS, ITERATIONS, **variant)
        streams, u, pre, post, res, carrier, branch, _, _ = result
        outputs += [u, pre * 3, post, ops.readout(streams.sin())]
    return outputs


@pytest.mark.parametrize("names", ["paper paper paper", "deepseek_v4 deepseek_v4 head", "hunyuan_v4 hunyuan_v4 head"])
@pytest.mark.parametrize("n", [1, 4])
def test_what_a_merge_leaves_is_made_up_for(names: str, n: int, leaving: None) -> None:
    torch.manual_seed(0)
    variants = [VARIANTS[name] for name in names.split()]
    sites = [parameters(n, variant) for variant in variants]
    inputs = [torch.randn(7, n, C).double().requires_grad_(), torch.randn(7, C).double().requires_grad_()]
    leaves = [*inputs, *(p for site in sites for p in site)]
    both = [several(inputs, sites, variants, left) for left in (True, False)]
    weights = [torch.randn(output.shape).double() for output in both[0]]
    for found, right in zip(*(torch.autograd.grad(outputs, leaves, weights) for outputs in both), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [["streams"], ["f"], ["streams", "first"], ["first", "second"]], ids="+".join)
def test_only_some_of_it_is_trained(frozen: list[str], leaving: None) -> None:
    torch.manual_seed(0)
    named = {"streams": torch.randn(7, 3, C).double(), "f": torch.randn(7, C).double()}
    sites = {"first": parameters(3, {}), "second": parameters(3, {}), "third": parameters(3, {})}
    for values, name in [*(([v], k) for k, v in named.items()), *((v, k) for k, v in sites.items())]:
        for value in values:
            value.requires_grad_(name not in frozen)
    leaves = [v for v in [*named.values(), *(p for site in sites.values() for p in site)] if v.requires_grad]
    found, right = (
        torch.autograd.grad(
            sum(o.square().sum() for o in several(list(named.values()), list(sites.values()), [{}] * 3, left)), leaves
        )
        for left in (True, False)
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_with_what_a_merge_leaves(backend: str, leaving: None) -> None:
    torch.manual_seed(0)
    sites = [parameters(3, {}, torch.float32) for _ in range(3)]
    inputs = [torch.randn(7, 3, C).requires_grad_(), torch.randn(7, C).requires_grad_()]
    leaves = [*inputs, *(p for site in sites for p in site)]

    def run(*values: Tensor) -> list[Tensor]:
        return several(list(values[:2]), [list(values[i : i + 3]) for i in (2, 5, 8)], [{}] * 3, True)

    outputs = [torch.compile(run, backend=backend, fullgraph=True)(*leaves), run(*leaves)]
    found, right = (torch.autograd.grad(sum(o.square().sum() for o in each), leaves) for each in outputs)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_who_leaves_what() -> None:
    """Kernels; known while a graph is traced, from tensors that are not there."""
    pytest.importorskip("triton")
    cpu = torch.empty(5, 4, 8)
    with FakeTensorMode():
        cuda = torch.empty(5, 4, 8, dtype=torch.bfloat16, device="cuda")
        found = [
            cross_site_ops.leaves_products(streams, mix, False)
            for streams, mix in [(cuda, "given"), (cuda, "transposed"), (cuda, "identity"), (cuda.double(), "given")]
        ]
    assert found == [True, True, False, False] and not cross_site_ops.leaves_products(cpu, "given", False)


def test_the_same_operations_are_counted(leaving: None) -> None:
    torch.manual_seed(0)
    sites = [parameters(3, {}) for _ in range(3)]
    inputs = [torch.randn(7, 3, C).double().requires_grad_(), torch.randn(7, C).double().requires_grad_()]
    totals = []
    for left in (True, False):
        outputs = several(inputs, sites, [{}] * 3, left)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward([output.sum() for output in outputs])
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_the_carrier_of_f_has_its_shape() -> None:
    first, second = parameters(2, {}, torch.float32), parameters(2, {}, torch.float32)
    streams, f = torch.randn(3, 2, C), torch.randn(3, C)
    _, _, post, res, carrier, _, _, _ = mhc.read(streams, *first, EPS, ITERATIONS)
    with pytest.raises(ShapeError, match=r"carrier of f is \[3, 2, 5\]; legal: \[..., C\] = \[3, 5\]"):
        mhc.merge_read(streams, f, carrier, carrier, post, res, False, False, *second, EPS, ITERATIONS)


def test_opcheck_of_the_backward() -> None:
    torch.manual_seed(0)
    values = [value.detach() for value in parameters(2, {}, torch.float32)]
    streams, gains = torch.randn(3, 2, C), torch.randn(3, 2)
    u, pre, post, res, _, _, z, r = mhc.read(streams, *values, EPS, ITERATIONS)
    grads = [torch.randn_like(one) for one in (u, pre, post, res, streams, u, streams)]
    kept = (streams, *values, pre, post, res, z, r, gains, False)
    for sent, dtype in ((grads, torch.float32), ([None] * 7, torch.float32), (grads, torch.bfloat16)):
        opcheck(mhc.merge_read_backward.default, (*sent, *kept, dtype, EPS, ITERATIONS))


# --- the pass ---------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Sites in a row, level 1, by hand."""

    def __init__(self, sites: int, between: Any = None, tap: bool = False) -> None:
        super().__init__()
        self.sites = nn.ParameterList(p for _ in range(sites) for p in parameters(2, {}))
        self.between, self.tap = between, tap

    def forward(self, x: Tensor) -> Any:
        streams = mhc.expand(x, 2)
        taps = []
        for i in range(0, len(self.sites), 3):
            pre, post, logits = mhc.coefficients(streams, *self.sites[i : i + 3], EPS)
            u = mhc.aggregate(streams, pre)
            streams = mhc.merge(streams, torch.tanh(u), post, mhc.sinkhorn(logits, ITERATIONS))
            if self.between is not None:
                streams = self.between(streams)
            if self.tap:
                taps.append(mhc.readout(streams))
        return streams, taps


def traced(module: Chain, x: Tensor) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    class Holder(nn.Module):
        def forward(self, x: Tensor, *parameters: Tensor) -> Any:
            module.sites = list(parameters)  # type: ignore[assignment]
            return torch.utils._pytree.tree_leaves(module(x))

    values = list(module.sites)
    del module.sites
    graph = make_fx(Holder(), pre_dispatch=True, tracing_mode="fake")(x, *values)
    module.sites = nn.ParameterList(values)
    return graph


def check(module: Chain, expected: int) -> fx.GraphModule:
    torch.manual_seed(0)
    x = torch.randn(5, C).double()
    values = list(module.sites)
    graph = traced(module, x)
    right = graph(x, *values)
    lower(graph)
    outcome = fuse(graph)
    graph.graph.lint()
    counts = count_ops(graph.graph)
    assert counts["mhc.merge_read.default"] == expected, outcome
    for a, b in zip(graph(x, *values), right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(sum(o.square().sum() for o in run(x, *values)), values)
        for run in (graph, traced(module, x))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    return graph


def test_every_site_but_the_first_is_fused() -> None:
    graph = check(Chain(4), 3)
    counts = count_ops(graph.graph)
    assert counts["mhc.read.default"] == counts["mhc.merge_carried.default"] == 1
    assert fuse(graph) == fuse(graph) and not fuse(graph).modified


def branches(graph: fx.GraphModule) -> list[bool]:
    """Of each fused merge, whether it has the carrier of f of the read before."""
    fused = graph.graph.find_nodes(op="call_function", target=mhc.merge_read.default)
    return [node.args[3] is not None for node in fused]


@pytest.mark.parametrize("tap", [False, True])
def test_the_backward_goes_over_every_border(tap: bool, leaving: None) -> None:
    assert branches(check(Chain(4, tap=tap), 3)) == [True] * 3


@pytest.mark.parametrize("change", ["post", "res", "two merges"])
def test_a_read_whose_merge_is_another_keeps_its_border(change: str, leaving: None) -> None:
    """An op between a read and its merge, or a second merge: the read cannot make up for what that leaves."""
    from torch.fx.experimental.proxy_tensor import make_fx

    first, second = parameters(2, {}), parameters(2, {})
    streams, f = torch.randn(5, 2, C).double().requires_grad_(), torch.randn(5, C).double().requires_grad_()

    def run(streams: Tensor, f: Tensor, *values: Tensor) -> Tensor:
        u, _, post, res, carrier = site_ops.read(streams, *values[:3], EPS, ITERATIONS)
        mixed = (post * 1.5 if change == "post" else post), (res.detach() if change == "res" else res)
        merged = site_ops.merge_carried(streams, f * u, carrier, *mixed)
        others = site_ops.merge_carried(streams, f, carrier, post, res) if change == "two merges" else 0.0
        return site_ops.read(merged, *values[3:], EPS, ITERATIONS)[0] + ops.readout(merged + others)

    leaves = [streams, f, *first, *second]
    graph = make_fx(run, pre_dispatch=True, tracing_mode="fake")(*leaves)
    assert fuse(graph).modified and branches(graph) == [False]
    found, right = (torch.autograd.grad(each(*leaves).square().sum(), leaves) for each in (graph, run))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_taps_read_the_merged_streams() -> None:
    check(Chain(3, tap=True), 2)


def test_an_op_between_sites_stops_it() -> None:
    graph = check(Chain(3, between=lambda streams: streams * 1.5), 0)
    assert count_ops(graph.graph)["mhc.read.default"] == 3


def test_a_border_of_recomputed_blocks_stops_it() -> None:
    graph = traced(Chain(3), torch.randn(5, C).double())
    lower(graph)
    reads = graph.graph.find_nodes(op="call_function", target=mhc.read.default)
    reads[1].meta["recompute"] = "a block"
    outcome = fuse(graph)
    assert outcome.modified and outcome.notes == (
        "1 of 3 reads fused with the merge before them; 2 read something else",
    )


# Pairs, and reads that stay: behind a norm (post-norm), an activation, or the entry of a trunk.
FUSED = {"llama": (5, 1), "bert": (0, 6), "t5": (8, 2), "resnet": (0, 3), "albert": (0, 6)}


@pytest.mark.parametrize("name", FUSED)
def test_models_compute_the_same(name: str) -> None:
    one = zoo_pair(name, double=True)
    graph = copy_graph(one.lowered)
    fuse(graph)
    replace(one, lowered=graph).check(**LIMITS[torch.float64])
    counts = count_ops(graph.graph)
    assert (counts["mhc.merge_read.default"], counts["mhc.read.default"]) == FUSED[name]
    for node in graph.graph.nodes:
        assert "val" in node.meta or node.op == "output", node
