"""Recomputation without a compiler: bitwise the same gradients, and how much is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from graphs import float_outputs, randomize, zoo_model
from mhc_compile import ShapeError, history, mhc_compile
from mhc_compile.kernels import ops
from mhc_compile.kernels.replay_ops import replay_block
from mhc_compile.passes import eager_replay
from mhc_compile.passes.cost import CostModel
from mhc_compile.passes.eager_replay import replaying
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.lower import lower
from mhc_compile.passes.recompute import equal_blocks, tag
from opcheck import opcheck
from test_lower import Pair, _copy, pair, zoo_pair


def tagged(one: Pair, length: int) -> fx.GraphModule:
    graph = copy_graph(one.level_1)
    tag(graph, equal_blocks(graph, length))
    lower(graph)
    return graph


def outputs_of(call: Callable[..., Any], one: Pair) -> list[Tensor]:
    return float_outputs(call(*map(_copy, one.arguments), *one.weights))


def gradients(call: Callable[..., Any], one: Pair, times: int = 1) -> list[Tensor]:
    """Outputs, and the gradients of all parameters and weights of sites."""
    torch.manual_seed(3)
    outputs = [output for output in outputs_of(call, one) if output.requires_grad]
    leaves = [p for p in (*one.model.parameters(), *one.weights) if p.requires_grad]
    loss = sum((output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum() for output in outputs)
    assert isinstance(loss, Tensor)
    found: list[Tensor] = [output.detach() for output in outputs]
    for i in range(times):
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=i + 1 < times)
        found += [grad for grad in grads if grad is not None]
    return found


def assert_same_bits(found: list[Tensor], right: list[Tensor]) -> None:
    assert len(found) == len(right) > 10
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "length"), [("llama", 1), ("llama", 2), ("llama", 100), ("gpt2", 2), ("t5", 3)])
def test_same_bits(name: str, length: int) -> None:
    """Whether each op is replayed by itself, as on a CPU, or the states of a block at once, as on a GPU."""
    one = zoo_pair(name)
    graph = tagged(one, length)
    right = gradients(graph, one)
    for whole_blocks in (False, True):
        assert_same_bits(gradients(replaying(graph, whole_blocks), one), right)


@pytest.mark.parametrize("length", [2, 3, 6])
def test_a_block_is_replayed_at_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last state is kept, or needed by nothing: one merge and one aggregate less than sites, and the first u."""
    calls: list[tuple[int, int]] = []

    def watched(streams: Tensor, f: Any, post: Any, res: Any, pre: Any, *variant: bool) -> Any:
        made = replay_block(streams, f, post, res, pre, *variant)
        calls.append((len(made[0]), len(made[1])))
        return made

    one = zoo_pair("llama")
    graph = tagged(one, length)
    right = gradients(graph, one)
    monkeypatch.setattr(eager_replay, "replay_block", watched)
    assert_same_bits(gradients(replaying(graph), one), right)
    assert calls == []
    assert_same_bits(gradients(replaying(graph, whole_blocks=True), one), right)
    assert calls == [(length - 1, length)] * (len(one.sites) // length)


def test_with_dropout_and_twice() -> None:
    """What a branch draws is drawn once; a backward that is run twice gives the same twice."""
    torch.manual_seed(0)
    model, inputs = zoo_model("gpt2")
    one = pair(model.train(), (), inputs)
    assert any("dropout" in str(node.target) for node in one.level_1.graph.nodes)
    graph = tagged(one, 2)
    right = gradients(graph, one, times=2)
    for whole_blocks in (False, True):
        assert_same_bits(gradients(replaying(graph, whole_blocks), one, times=2), right)


def test_under_autocast() -> None:
    one = zoo_pair("llama")
    graph = tagged(one, 2)
    with torch.autocast("cpu", torch.bfloat16):
        right = gradients(graph, one)
        for whole_blocks in (False, True):
            assert_same_bits(gradients(replaying(graph, whole_blocks), one), right)


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_hooks_of_the_caller_have_what_is_kept(whole_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, roots of replays too, and nothing else is held; the gradients come from what they give back."""
    one = zoo_pair("llama")
    graph = tagged(one, 2)
    right = gradients(graph, one)
    expected = sum(value.nbytes for value in kept_tensors(one, graph, monkeypatch))
    packed: list[Tensor] = []
    unpacked: list[int] = []

    def pack(tensor: Tensor) -> int:
        assert not torch.is_grad_enabled()
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    def unpack(place: int) -> Tensor:
        unpacked.append(place)
        return packed[place].clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = gradients(replaying(graph, whole_blocks), one)
    assert_same_bits(found, right)
    assert expected > 0 and sum(value.nbytes for value in packed) >= expected
    assert len(set(unpacked)) > len(packed) / 2


def test_an_activation_checkpoint_around_the_call() -> None:
    """Its hooks count what is saved, in order, and stop a second forward in the middle of the graph."""
    one = zoo_pair("llama")
    graph = tagged(one, 2)
    right = gradients(graph, one)
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return replaying(graph)(*arguments)

    def checkpointed(*arguments: Any) -> Any:
        return checkpoint(counted, *arguments, use_reentrant=False)

    assert_same_bits(gradients(checkpointed, one), right)
    assert len(calls) == 2


def test_without_gradients() -> None:
    one = zoo_pair("llama")
    graph = tagged(one, 2)
    with torch.no_grad():
        found, right = (outputs_of(call, one) for call in (replaying(graph), graph))
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def kept_tensors(one: Pair, graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is kept for the backward, each storage once, and the inputs of the graph left out."""
    pack = eager_replay._Session.pack
    found: list[Any] = []
    sessions = []

    def watched(session: Any, tensor: Tensor) -> Any:
        found.append(pack(session, tensor))
        sessions.append(session)
        return found[-1]

    arguments = (*map(_copy, one.arguments), *one.weights)
    with monkeypatch.context() as patch:
        patch.setattr(eager_replay._Session, "pack", watched)
        output = float_outputs(replaying(graph)(*arguments))[0]
    values = [*(held.value for held in found), *sessions[0]._roots.values()]
    kept = {value.untyped_storage().data_ptr(): value for value in values if isinstance(value, Tensor)}
    given = {value.untyped_storage().data_ptr() for value in arguments if isinstance(value, Tensor)}
    assert output.requires_grad
    return [tensor for key, tensor in kept.items() if key not in given]


def test_states_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each block but the first of a trunk, which is widened again; and what the read-out takes is no state."""
    one = zoo_pair("llama")
    count = len(one.sites)
    assert count == 6
    expand = torch.ops.mhc.expand.default
    size = max(node.meta["val"].numel() for node in one.level_1.graph.find_nodes(op="call_function", target=expand))
    tensors = {length: kept_tensors(one, tagged(one, length), monkeypatch) for length in (1, 2, 3, 6)}
    kept = {
        length: sum(tensor.numel() == size and tensor.dim() == 4 for tensor in found)
        for length, found in tensors.items()
    }
    assert kept == {1: 5, 2: 2, 3: 1, 6: 0}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_what_is_kept_is_predicted_to_the_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coefficients of all sites among it, which are not replayed."""
    one = zoo_pair(name)
    costs = CostModel(one.level_1, (*one.arguments, *one.weights))
    for length in (2, 100):
        found = kept_tensors(one, tagged(one, length), monkeypatch)
        assert sum(tensor.untyped_storage().nbytes() for tensor in found) == costs.kept(length)


def test_an_option_of_a_conversion() -> None:
    """A converted model whose backend is "eager" replays by itself."""
    found = []
    for recompute in (None, 2, "auto"):
        torch.manual_seed(0)
        model, inputs = zoo_model("llama")
        mhc_compile(model, n=4, backend="eager", example_inputs=inputs, recompute=recompute)
        randomize(model)
        output = float_outputs(model(**inputs))[0]
        output.square().mean().backward()
        found.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        names = [record.name for record in history(model)]
        assert ("recompute" in names, "fuse" in names) == (recompute is not None, recompute is None)
        torch._dynamo.reset()
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(found[1], found[2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("policy", [CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE])
def test_tags_of_an_activation_checkpoint_are_not_ours(policy: CheckpointPolicy) -> None:
    """Dropout that was tagged would be drawn again, and the gradients be of another mask."""
    torch.manual_seed(0)
    model, inputs = zoo_model("gpt2")
    one = pair(model.train(), (), inputs)
    graph = copy_graph(one.level_1)
    for node in graph.graph.nodes:
        if node.op == "call_function":
            node.meta["recompute"] = policy
    lower(graph)
    assert_same_bits(gradients(replaying(graph), one), gradients(graph, one))


def block_arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor], list[Tensor], list[Any], Any]:
    """Streams of two sites, and f, post, res and pre of them; the second state has no aggregate."""
    torch.manual_seed(0)
    f, post, res = [torch.randn(5, 7) for _ in range(2)], torch.rand(2, 5, 3), torch.rand(2, 5, 3, 3)
    pre = [torch.rand(5, 3), None, torch.rand(5, 3)]
    return torch.randn(5, 3, 7).to(dtype), [one.to(dtype) for one in f], list(post), list(res), pre


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_of_a_block_is_its_merges_and_aggregates(dtype: torch.dtype) -> None:
    streams, f, post, res, pre = block_arguments(dtype)
    opcheck(torch.ops.mhc.replay_block.default, (streams, f, post, res, pre), {"transposed": True})
    states, aggregates = replay_block(streams, f, post, res, pre, transposed=True)
    one = ops.merge(streams, f[0], post[0], res[0], True)
    two = ops.merge(one, f[1], post[1], res[1], True)
    expected = [one, two, ops.aggregate(streams, pre[0]), ops.aggregate(two, pre[2])]
    assert all(map(torch.equal, [*states, *aggregates], expected))


def test_a_block_that_does_not_fit_is_refused() -> None:
    streams, f, post, res, pre = block_arguments()
    with pytest.raises(ShapeError, match=r"\(2, 2, 2, 2\) tensors; legal: k, k, k and k \+ 1"):
        replay_block(streams, f, post, res, pre[:2])
    with pytest.raises(ShapeError, match="res is None at some sites and given at others"):
        replay_block(streams, f, post, [None, res[1]], pre)
