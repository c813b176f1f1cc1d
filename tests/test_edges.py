"""Models and calls at the edge of what is promised: what is special there is kept, or refused in words."""

from __future__ import annotations

import gc
import io
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from graphs import randomize
from mhc_compile import (
    CaptureError,
    ConfigError,
    RewriteError,
    ShapeError,
    explain,
    mhc_compile,
    observe,
    trace,
    verify,
)
from zoo import ZOO

logger = logging.getLogger(__name__)
X = torch.linspace(-2, 2, 64).reshape(4, 16)


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class HalfFrozen(nn.Module):
    """Two blocks that run without gradients, then two that train."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.ModuleList([Block(), Block()])
        self.trained = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for block in self.frozen:
                x = block(x)
        for block in self.trained:
            x = block(x)
        return x


class Tapped(nn.Module):
    """`tap + (x + F(x))`: a sum that must be read as an inner merge and an older state."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        start = x
        x = x + torch.tanh(self.a(x))
        x = x + torch.tanh(self.b(x))
        return x + start


class Pooled(nn.Module):
    """A mean over positions by the size seen while tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.linear(x)).sum(1) / x.shape[1]


def test_no_grad_regions_stay_plain_with_gradients_off_too() -> None:
    torch.manual_seed(0)
    model = HalfFrozen()
    mhc_compile(model, 4, example_inputs=X, backend="eager")
    assert {name.split(".")[0] for name, _ in model.get_submodule("mhc").named_parameters()} == {"trained"}
    randomize(model)
    expected = model(X)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)  # some processors: other kernels
    with torch.inference_mode():
        torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)  # some processors: other kernels


class Frozen(nn.Module):
    """A layer that runs without gradients, one that trains, and one that runs when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained, self.optional = Block(), Block(), Block()

    def forward(self, x: Tensor, more: bool = False, again: bool = False) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        x = self.trained(x)
        if again:
            x = self.frozen(x)
        return self.optional(x) if more else x


def test_an_optional_layer_beside_a_frozen_one_is_not_taken_for_it() -> None:
    """With gradients off a no-grad region leaves no trace: what stays plain is known by its place alone."""
    model = Frozen()
    mhc_compile(model, 2, example_inputs=X, backend="eager")
    randomize(model)
    expected = model(X).detach()
    with torch.no_grad():
        assert torch.equal(model(X), expected)
        with pytest.raises(RewriteError, match="has also optional"):
            model(X, more=True)


def test_a_layer_inside_and_outside_of_a_frozen_region_is_refused_with_gradients_off() -> None:
    model = Frozen()
    mhc_compile(model, 2, example_inputs={"x": X, "again": True}, backend="eager")
    randomize(model)
    model(X, again=True).sum().backward()
    with torch.no_grad(), pytest.raises(RewriteError, match="cannot be told apart"):
        model(X, again=True)


class Repeated(nn.Module):
    """One block, applied as often as asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, times: int = 3) -> Tensor:
        for _ in range(times):
            x = self.block(x)
        return x


def test_tied_sites_are_counted() -> None:
    model = mhc_compile(Repeated(), 2, example_inputs=X, backend="eager", tie_shared=True)
    model(X)
    for times in (2, 4):
        with pytest.raises(RewriteError, match=f"{times} times"):
            model(X, times=times)


def test_an_older_state_beside_a_merge_is_a_long_skip() -> None:
    found = explain(Tapped(), X)
    assert (len(found.sites), len(found.trunks)) == (2, 1)
    assert [refusal.reason for refusal in found.refused] == [
        "a long skip: it adds an older state of the trunk, read out, to every stream"
    ]


def test_a_sequential_root_runs_and_keeps_its_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    expected = model(X)
    mhc_compile(model, 4, example_inputs=X, backend="eager")
    assert torch.allclose(model(X), expected, atol=1e-5)
    randomize(model)
    assert verify(model, X)


def test_a_traced_model_refuses_other_shapes() -> None:
    model = Pooled()
    mhc_compile(model, 4, example_inputs=X.reshape(1, 4, 16), backend="eager")
    traced = trace(model, X.reshape(1, 4, 16))
    assert torch.allclose(traced(X.reshape(1, 4, 16)), model(X.reshape(1, 4, 16)), atol=1e-6)
    with pytest.raises(ShapeError, match=r"\[1, 2, 16\].*dynamic_shapes"):
        traced(X[:2].reshape(1, 2, 16))


def test_verify_with_a_key_value_cache() -> None:
    build = next(build for name, build, _ in ZOO if name == "llama")
    model = mhc_compile(build(), 4, backend="eager")
    report = verify(model)
    assert report
    assert any(check.status == "not run" and "DynamicCache" in check.detail for check in report.checks)


class SeveralBranches(nn.Module):
    """`x + f(x) + g(x)`, twice, with layers of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.layers:
            x = x + torch.tanh(first(x)) + torch.tanh(second(x))
        return x


def test_a_sum_of_several_branches_is_verified() -> None:
    report = verify(mhc_compile(SeveralBranches(), 4, example_inputs=X, backend="eager"), X)
    assert report, str(report)


@pytest.mark.parametrize("tie_shared", [False, True])
def test_branches_that_one_module_adds_are_tied_only_where_their_weights_are_the_same(tie_shared: bool) -> None:
    model = mhc_compile(SeveralBranches(), 4, example_inputs=X, backend="eager", tie_shared=tie_shared)
    assert [name for name, _ in model.mhc.named_parameters() if name.endswith("phi")] == ["root.phi", "root_call1.phi"]


class Pairs(nn.Module):
    """Layers in lists of lists, which the model's own forward adds: in the style of small vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([Norm(), Norm()]) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.layers:
            x = first(x) + x
            x = second(x) + x
        return x


class Norm(nn.Sequential):
    """A norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(16), nn.Linear(16, 16))


@pytest.mark.parametrize("tie_shared", [False, True])
def test_layers_in_lists_of_lists_have_sites_of_their_own(tie_shared: bool) -> None:
    model = mhc_compile(Pairs(), 4, example_inputs=X, backend="eager", tie_shared=tie_shared)
    names = [name[: -len(".phi")] for name, _ in model.mhc.named_parameters() if name.endswith("phi")]
    assert names == ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"]


def test_a_hook_that_comes_after_the_first_call_is_called() -> None:
    model = mhc_compile(Pairs(), 4, example_inputs=X, backend="eager")
    model(X)
    seen: list[torch.Size] = []
    handle = model.layers[0][1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(X)
    assert seen == [X.shape]
    handle.remove()
    model(X)
    assert seen == [X.shape]


class Experts(nn.Module):
    """Tokens are sent to experts by `where`: how many each gets is known in the call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 2)
        self.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.softmax(self.gate(x), -1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (tokens,) = torch.where(chosen == number)
            out = out.index_add(0, tokens, expert(x[tokens]) * weights[tokens, None])
        return x + out


def test_a_size_that_depends_on_the_data_is_no_obstacle() -> None:
    model = nn.Sequential(Block(), Experts(), Block())
    expected = model(X)
    mhc_compile(model, 4, example_inputs=X, backend="eager")
    assert torch.allclose(model(X), expected, atol=1e-6)
    randomize(model)
    assert not torch.allclose(model(X), expected, atol=1e-3)
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class SummedInDouble(nn.Module):
    """A float32 model that adds in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (x.double() + self.linear(x).double()).float()


def test_a_sum_in_float64_of_a_float32_model_is_a_site() -> None:
    model = SummedInDouble()
    expected = model(X)
    mhc_compile(model, 4, example_inputs=X, backend="eager")
    assert torch.allclose(model(X), expected, atol=1e-6)
    randomize(model)
    assert not torch.allclose(model(X), expected, atol=1e-3)


class Recurrent(nn.Module):
    """A recurrent layer behind a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)[0]


def test_recurrent_layers_are_branches() -> None:
    model, x = nn.Sequential(Recurrent(), Recurrent(), nn.LayerNorm(16)), X[:, None]
    expected = model(x)
    mhc_compile(model, 4, example_inputs=x, backend="eager")
    assert torch.allclose(model(x), expected, atol=1e-6)
    randomize(model)
    assert not torch.allclose(model(x), expected, atol=1e-3)


def test_a_default_device_does_not_move_the_values_that_sites_start_with() -> None:
    model = nn.Sequential(Block(), Block())
    with torch.device("meta"):
        mhc_compile(model, 4, example_inputs=X, backend="eager")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert verify(model, X)


def test_one_stream_has_no_coefficients_to_observe() -> None:
    model = mhc_compile(Block(), 1, example_inputs=X, backend="eager")
    with pytest.raises(ConfigError, match="n is 1"):
        observe(model, X)
    assert verify(model, X)


class Logs(nn.Module):
    """Writes to a log within the forward, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            logger.info("a block")
            x = block(x)
        logger.warning("done")
        return x


def test_log_messages_inside_the_forward_are_left_out_and_torch_logs_no_error() -> None:
    model = Logs()
    expected = model(X)
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    for each in (logger, logging.getLogger("torch._dynamo")):
        each.addHandler(handler)
    try:
        mhc_compile(model, n=2, backend="eager", example_inputs=X)
        torch.testing.assert_close(model(X), expected)
    finally:
        for each in (logger, logging.getLogger("torch._dynamo")):
            each.removeHandler(handler)
    assert written.getvalue() == ""


def test_wrong_arguments_are_not_called_a_graph_break() -> None:
    with pytest.raises(CaptureError, match="takes others"):
        mhc_compile(Block(), 4, example_inputs=(X, X), backend="eager")


def test_ddp_with_tiny_buckets_gives_the_mhc_output(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block())
    plain = model(X)
    mhc_compile(model, 4, example_inputs=X, backend="aot_eager")
    randomize(model)
    expected = model(X)
    assert not torch.allclose(expected, plain, atol=1e-3)
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
        output = wrapped(X)
        assert torch.equal(output, expected)
        output.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        # Before the group: the last owner of the group waits for its threads, and DDP's reducer, were it the last,
        # would do so without letting go of the interpreter's lock, which those threads may want.
        wrapped = output = None
        gc.collect()
        dist.destroy_process_group()
