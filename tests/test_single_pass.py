"""Single-pass reads as level-2 ops: the ops themselves, and what `lower` and `fuse` make of a conversion."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from graphs import as_double, assert_same, fresh, output_error, randomize, result_of
from mhc_compile import history, mhc_compile
from mhc_compile.conversion import conversion
from mhc_compile.errors import RewriteError, ShapeError
from mhc_compile.kernels import cross_site_ops, ops, single_pass_ops
from mhc_compile.passes.fuse import fuse
from mhc_compile.passes.history import count_ops
from mhc_compile.passes.lower import lower
from opcheck import opcheck
from test_conventions import MERGE, VARIANTS, chosen
from test_fuse import EPS, ITERATIONS, C, parameters

mhc = torch.ops.mhc

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- the ops


def leaves_of(n: int, variant: dict[str, Any], sites: int = 3) -> list[Tensor]:
    """streams, f, weights of the first read, and the parameters of each site."""
    torch.manual_seed(0)
    inputs = [torch.randn(7, n, C), torch.randn(7, C), torch.randn(7, n)]
    return [
        *(one.double().requires_grad_() for one in inputs),
        *(p for _ in range(sites) for p in parameters(n, variant)),
    ]


def chain(leaves: list[Tensor], variant: dict[str, Any], left: bool | None) -> list[Tensor]:
    """Sites in a row, with readers of states and coefficients between; left None: level-1 reads beside `read`."""
    streams, f, weights, *rest = leaves
    manner = chosen(variant, MERGE)
    flags = manner.get("transposed", False), manner.get("rounded", False)
    outputs = []
    merging: Any = None
    while rest:
        site, rest = rest[:3], rest[3:]
        if left is None:
            streams = streams if merging is None else mhc.merge_carried(*merging[:3], *merging[4:], *flags)
            u = ops.aggregate(streams, weights)
            _, pre, post, res, carrier, branch, _, _ = mhc.read(streams, *site, EPS, ITERATIONS, **variant)
        elif merging is None:
            result = mhc.read_early(streams, weights, *site, EPS, ITERATIONS, **variant)
            u, pre, post, res, carrier, branch, _, _ = result
        else:
            result = mhc.merge_read_early(*merging, *flags, weights, *site, EPS, ITERATIONS, **variant)
            streams, u, pre, post, res, carrier, branch, _, _ = result
        outputs += [u, pre * 3, post, ops.readout(streams.sin())]
        mixing = res if res.numel() else None
        merging = (streams, f * torch.tanh(u), carrier, branch if left else None, post, mixing)
        weights = pre
    return outputs


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("name", ["paper", "deepseek_v4", "hunyuan_v4"])
def test_the_ops_are_those_of_their_terms(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with every gradient; what a merge leaves to the read before is made up for."""
    monkeypatch.setattr(cross_site_ops, "leaves_products", lambda streams, mix, compiled: mix != "identity")
    variant = VARIANTS[name]
    leaves = leaves_of(n, variant)
    right, *both = (chain(leaves, variant, left) for left in (None, False, True))
    sent = [torch.randn(output.shape).double() for output in right]
    expected = torch.autograd.grad(right, leaves, sent)
    for outputs in both:
        assert all(torch.equal(a, b) for a, b in zip(outputs, right, strict=True))
        for a, b in zip(torch.autograd.grad(outputs, leaves, sent), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", [[0], [1], [2], [0, 1, 2], [0, 3, 4, 5], [3, 4, 5, 6, 7, 8]], ids=str)
@pytest.mark.parametrize("left", [False, True])
def test_only_some_of_it_is_trained(left: bool, frozen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_site_ops, "leaves_products", lambda streams, mix, compiled: mix != "identity")
    leaves = leaves_of(3, {})
    for i in frozen:
        leaves[i].requires_grad_(False)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    found, right = (
        torch.autograd.grad(sum(o.square().sum() for o in chain(leaves, {}, way)), trained) for way in (left, None)
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_public_functions_are_the_ops() -> None:
    streams, f, weights, *sites = leaves_of(3, {}, 2)
    u, _, post, res, carrier = single_pass_ops.read_early(streams, weights, *sites[:3], EPS, ITERATIONS)
    assert torch.equal(u, ops.aggregate(streams, weights))
    rest = (tuple(sites[3:]), EPS, ITERATIONS)
    merged, v, *_ = single_pass_ops.merge_read_early(streams, f, carrier, post, res, weights, *rest)
    assert torch.equal(merged, ops.merge(streams, f, post, res)) and torch.equal(v, ops.aggregate(merged, weights))
    nothing = single_pass_ops.merge_read_early(streams, f, carrier, post, res, None, *rest)[1]
    assert nothing.shape == (0,)


def test_opcheck() -> None:
    torch.manual_seed(0)
    first, second = parameters(2, {}, torch.float32), parameters(2, {}, torch.float32)
    streams, f, w = (torch.randn(shape, requires_grad=True) for shape in ((3, 2, C), (3, C), (3, 2)))
    with torch.no_grad():
        u, pre, post, res, carrier, _, z, r = mhc.read_early(streams, w, *first, EPS, ITERATIONS)
    opcheck(mhc.read_early.default, (streams, None, *first, EPS, ITERATIONS))
    opcheck(mhc.read_early.default, (streams, w, *first, EPS, ITERATIONS))
    args = (streams, f, carrier, None, post.requires_grad_(), res.requires_grad_(), False, False)
    opcheck(mhc.merge_read_early.default, (*args, w, *second, EPS, ITERATIONS))
    grads = [torch.randn_like(one) for one in (u, pre, post, res, streams, u, streams)]
    values = [one.detach() for one in (streams, w, *first, pre, post, res, z, r)]
    gains = torch.randn(3, 2)
    for sent, tail in (
        (grads, (True, gains, False, torch.bfloat16)),
        ([None] * 7, (True, None, False, torch.float32)),
        ([*grads[:5], None, None], (False, None, False, torch.float32)),
    ):
        opcheck(mhc.read_early_backward.default, (*sent, *values, *tail, EPS, ITERATIONS))


def test_wrong_weights_and_double_backward() -> None:
    streams, _, weights, *site = leaves_of(3, {}, 1)
    with pytest.raises(ShapeError, match=r"weights is \[7, 2\]; legal: \[..., n\] = \[7, 3\]"):
        mhc.read_early(streams, weights[:, :2], *site, EPS, ITERATIONS)
    with pytest.raises(ShapeError, match=r"dtype of weights is torch.float32"):
        mhc.read_early(streams, weights.float(), *site, EPS, ITERATIONS)
    u, *_ = mhc.read_early(streams, weights, *site, EPS, ITERATIONS)
    (grad,) = torch.autograd.grad(u.square().sum(), streams, create_graph=True)
    with pytest.raises(RewriteError, match="double backward"):
        torch.autograd.grad(grad.sum(), streams)


def test_the_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward those of the terms; backward the same whether or not a merge leaves some to the read before."""
    monkeypatch.setattr(cross_site_ops, "leaves_products", lambda streams, mix, compiled: mix != "identity")
    counts = []
    for left in (None, False, True):
        leaves = leaves_of(3, {})
        with FlopCounterMode(display=False) as counter:
            outputs = chain(leaves, {}, left)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward([output.sum() for output in outputs])
        counts.append((forward, counter.get_total_flops()))
    unused = 3 * 2 * 7 * 3 * C  # u of each `read`, which nobody takes
    assert counts[1] == counts[2] and counts[1][0] == counts[0][0] - unused and counts[1][1] > 0


# ---------------------------------------------------------------------------------------------- the passes


def level_1(taps: int = 1, later: bool = False, n: int = 4) -> fx.GraphModule:
    """Three sites of single-pass reads as the rewrite emits them; ``later``: something between a state and its read."""
    sites = [parameters(n, {}) for _ in range(3)]

    def run(x: Tensor, *values: Tensor) -> list[Tensor]:
        streams, before, outputs = mhc.expand(x, n), None, []
        for i in range(0, 9, 3):
            pre, post, logits = mhc.coefficients(streams, *values[i : i + 3], EPS)
            if later and before is not None:
                before = before * torch.sigmoid(pre)
            reads = [mhc.readout(streams)] if before is None else [mhc.aggregate(streams, before) for _ in range(taps)]
            outputs += reads[1:]
            streams = mhc.merge(streams, torch.tanh(reads[0]), post, mhc.sinkhorn(logits, ITERATIONS))
            before = pre
        return [*outputs, mhc.aggregate(streams, before)]

    values = (torch.randn(5, C).double(), *(p for site in sites for p in site))
    graph = make_fx(run, pre_dispatch=True, tracing_mode="fake")(*values)
    graph.values = values
    return graph


def check(graph: fx.GraphModule, **expected: int) -> list[str]:
    """Lowers and fuses; values and gradients stay."""
    values: Any = graph.values
    before = graph(*values)
    trained = list(values[1:])
    right = torch.autograd.grad(sum(one.square().sum() for one in before), trained)
    notes = [*lower(graph).notes, *fuse(graph).notes]
    graph.graph.lint()
    counts = count_ops(graph.graph)
    assert {name: counts.get(f"mhc.{name}.default", 0) for name in expected} == expected
    after = graph(*values)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(sum(one.square().sum() for one in after), trained)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    return notes


def test_every_site_but_the_first_is_read_where_it_is_made() -> None:
    notes = check(level_1(), read_early=1, merge_read_early=2, merge_carried=1, aggregate=1, read=0)
    assert notes == [
        "2 sites read with the pre of the site before",
        "2 of 3 reads fused with the merge before them; 1 read something else",
        "2 merges are read with the pre of the site before in the same launch",
    ]


def test_the_first_read_makes_nothing_that_nobody_takes() -> None:
    graph = level_1()
    lower(graph)
    first, *others = graph.graph.find_nodes(op="call_function", target=mhc.read_early.default)
    assert first.args[1] is None and all(other.args[1] is not None for other in others)
    assert first.meta["val"][0].shape == (0,)
    assert not any(user.target is operator.getitem and user.args[1] == 0 for user in first.users)


def test_other_readers_of_the_same_state_share_its_read() -> None:
    check(level_1(taps=3), read_early=1, merge_read_early=2, aggregate=1)


def test_weights_that_come_later_stay_an_aggregate() -> None:
    """No op can read with what is computed from the very state that it makes."""
    notes = check(level_1(later=True), read_early=1, merge_read_early=2, aggregate=3)
    assert not any("pre of the site before" in note for note in notes if "launch" not in note)


def test_more_than_four_streams_are_said_to_be_launches_of_their_own() -> None:
    notes = check(level_1(n=5), merge_read_early=2)
    assert notes[-1] == "2 reads with the pre of the site before are launches of their own: above 4 streams"


def test_a_replay_keeps_its_aggregates() -> None:
    """What replays without a compiler makes aggregates again by themselves."""
    graph = level_1()
    lower(graph, early=False)
    counts = count_ops(graph.graph)
    assert counts["mhc.read.default"] == counts["mhc.aggregate.default"] == 3 and "mhc.read_early.default" not in counts


# Fused pairs, and reads that stay, at the entries of trunks.
FUSED = {"llama": (5, 1), "vit": (5, 1), "t5": (8, 2)}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.cases(1)
def test_models_compute_the_same(name: str) -> None:
    """A conversion as compiled, in training, against its level-1 ops one by one."""
    model, inputs = fresh(name)
    model, inputs = model.double(), as_double(inputs)
    own = dict(model.named_parameters())
    modes = (False, True) if name == "llama" else (True,)
    plain = {training: result_of(lambda: model.train(training)(**inputs), own) for training in modes}  # noqa: B023
    mhc_compile(model, n=4, single_pass=True, backend="aot_eager", example_inputs=inputs)
    randomize(model)
    op_by_op = conversion(model).compiled(model, "eager", level=1)
    for training in plain:
        model.train(training)
        named = dict(model.named_parameters())
        expected = result_of(lambda: op_by_op(model, **inputs)[1], named)
        actual = result_of(lambda: model(**inputs), named)
        assert_same(expected, actual, outputs=1e-10, gradients=1e-9)
        assert output_error(plain[training], actual) > 1e-3, "the test could not tell mHC from plain"
        counts = history(model)[-1].ops
        assert (counts["mhc.merge_read_early.default"], counts["mhc.read_early.default"]) == FUSED[name]
