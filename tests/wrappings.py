"""What people wrap around a model, and what happens: `docs/wrapping.md` has a row for each entry, in this order.

An entry is a function that does what its row says and asserts what it says. It gives None where the row says that it
works, and the error where the row says that it is refused.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
import torch.utils._pytree as pytree
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import return_and_correct_aliasing

from graphs import randomize, zoo_model
from hf_pairs import LLAMA, Pair
from mhc_compile import (
    CaptureError,
    ConfigError,
    ExportError,
    RewriteError,
    cost_model,
    explain,
    history,
    load,
    mhc_compile,
    param_groups,
    partition,
    recompute,
    source,
    trace,
    verify,
)
from misuses import Block, Net, X, net

aten = torch.ops.aten


@dataclass(frozen=True)
class Wrapping:
    """A thing that is wrapped around a model."""

    name: str
    group: str
    run: Callable[[Path], Exception | None]
    slow: bool


TABLE: list[Wrapping] = []
Run = Callable[[Path], Exception | None]


def wrapping(group: str, *, slow: bool = False) -> Callable[[Run], Run]:
    """Enter a function into the table."""

    def enter(run: Run) -> Run:
        TABLE.append(Wrapping(run.__name__, group, run, slow))
        return run

    return enter


def refused(kind: type[Exception], call: Callable[[], Any]) -> Exception:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


# ---------------------------------------------------------------------------------------------- models


class Quantized(Tensor):
    """An int8 matrix and a scale a row, as one float32 tensor: ops see the product, by dispatch."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)  # type: ignore

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.int8, self.scale = data, scale

    @classmethod
    def of(cls, weight: Tensor) -> Quantized:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["int8", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Quantized:
        return cls(inner["int8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.clone.default, aten.alias.default, aten.t.default):
            one = args[0]
            made = type(one)(func(one.int8), func(one.scale))
            return return_and_correct_aliasing(func, args, kwargs or {}, made)
        whole = lambda one: one.int8.to(one.scale.dtype) * one.scale  # noqa: E731
        args, kwargs = pytree.tree_map_only(Quantized, whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)})"


class OwnLinear(Quantized):
    """The same, which computes `F.linear` by itself, with its parts: so do torchao's quantised weights."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return x @ weight.int8.to(x.dtype).t() * weight.scale.reshape(-1) + bias
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def quantize(model: nn.Module, kind: type[Quantized]) -> nn.Module:
    """Give the linear layers of a Net quantised weights, in place."""
    for block in (model.first, model.second):
        block.linear.weight = nn.Parameter(kind.of(block.linear.weight), requires_grad=False)
    return model


def convert(model: nn.Module, n: int = 2, backend: str = "eager", **options: Any) -> nn.Module:
    return mhc_compile(model, n, backend=backend, example_inputs=X, **options)


def trained(backend: str = "eager") -> nn.Module:
    """A converted Net whose function is not the plain one."""
    model = convert(net(), backend=backend)
    randomize(model)
    return model


def step_of(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the model's own parameters."""
    model.zero_grad()
    output = model(X)
    output.square().sum().backward()
    own = [(name, value.grad) for name, value in model.named_parameters() if not name.startswith("mhc.")]
    return output.detach(), {name: grad.clone() for name, grad in own if grad is not None}


def assert_same_function(plain: nn.Module, converted: nn.Module, exact: bool = False) -> None:
    """One step of both: outputs and gradients, bit for bit or up to rounding."""
    (expected, gradients), (found, others) = step_of(plain), step_of(converted)
    limits = dict(rtol=0, atol=0) if exact else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, **limits)
    assert others.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, **limits)


def assert_converts(change: Callable[[nn.Module], nn.Module], *, after: bool = True) -> None:
    """A change to a plain model, before the conversion and after it: the function stays, and is mHC's when trained."""
    plain = change(net())
    for backend in ("eager", "aot_eager"):
        assert_same_function(plain, convert(change(net()), 1, backend), exact=True)
        model = convert(change(net()), backend=backend)
        assert_same_function(plain, model)
        if after:
            assert_same_function(plain, change(convert(net(), backend=backend)))
    with torch.no_grad():
        torch.testing.assert_close(model(X), plain(X), rtol=1e-5, atol=1e-5)
    assert verify(model, X)
    torch.testing.assert_close(trace(model, X)(X), model(X), rtol=1e-5, atol=1e-5)
    randomize(model)
    assert not torch.allclose(model(X), plain(X), atol=1e-3)


# ---------------------------------------------------------------------------------------------- weights

WEIGHTS = "Weights"


@wrapping(WEIGHTS, slow=True)
def weights_that_compute(_: Path) -> None:
    assert_converts(lambda model: quantize(model, OwnLinear))
    model = convert(quantize(net(), OwnLinear))
    names = [name for name, _ in convert(net()).mhc.named_parameters()]
    assert [name for name, _ in model.mhc.named_parameters()] == names
    model(X)
    assert any("linear" in op for op in history(model)[0].ops)  # whole, and no constants of what it holds
    assert not list(history(model)[0].nodes.find_nodes(op="get_attr"))


@wrapping(WEIGHTS, slow=True)
def weights_that_dispatch(_: Path) -> None:
    assert_converts(lambda model: quantize(model, Quantized))


@wrapping(WEIGHTS)
def source_of_such_weights(_: Path) -> Exception:
    model = convert(quantize(net(), OwnLinear))
    return refused(ExportError, lambda: source(model, X))


@wrapping(WEIGHTS)
def sparse_weights(_: Path) -> Exception:
    model = net()
    for block in (model.first, model.second):
        weight = torch.sparse_coo_tensor([[0], [1]], [1.0], (8, 8)).to_sparse_csr()
        block.linear.weight = nn.Parameter(weight, requires_grad=False)
    return refused(CaptureError, lambda: convert(model))


class _Rounded(torch.autograd.Function):
    """The nearest number of 1 / 16, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 16).round() / 16

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


@torch._dynamo.allow_in_graph
class _Marked(_Rounded):
    """The same, which the capture is told not to look into."""


class _FakeQuantized(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return _Rounded.apply(weight)  # type: ignore[no-any-return]


@wrapping(WEIGHTS)
def quantization_aware_training(_: Path) -> None:
    def change(model: nn.Module) -> nn.Module:
        for block in (model.first, model.second):
            nn.utils.parametrize.register_parametrization(block.linear, "weight", _FakeQuantized(), unsafe=True)
        return model

    plain = change(net())
    for backend in ("eager", "aot_eager"):
        assert_same_function(plain, convert(change(net()), backend=backend))


class _NormedAtTheEnd(Block):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(8, 8, bias=False), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.linear(self.norm(x)))


@wrapping(WEIGHTS)
def wrapped_after_the_conversion(_: Path) -> Exception:
    model = convert(nn.Sequential(_NormedAtTheEnd(), _NormedAtTheEnd()))
    for block in (model[0], model[1]):
        nn.utils.parametrize.register_parametrization(block.linear, "weight", _FakeQuantized(), unsafe=True)
    return refused(RewriteError, lambda: model(X))


class _Marking(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(_Marked.apply(self.linear(self.norm(x))))


@torch._dynamo.allow_in_graph
def _inside_a_marked_function(x: Tensor) -> Tensor:
    return _Rounded.apply(x) * 1.0  # type: ignore[no-any-return]


class _Inside(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(_inside_a_marked_function(self.linear(self.norm(x))))


@wrapping(WEIGHTS)
def own_backwards(_: Path) -> None:
    for kind in (_Marking, _Inside):
        torch.manual_seed(0)
        plain = nn.Sequential(kind(), kind())
        _, gradients = step_of(plain)
        assert float(gradients["0.linear.weight"].abs().max()) > 1e-3  # that of round() is zero
        for backend in ("eager", "aot_eager"):
            assert_same_function(plain, convert(copy.deepcopy(plain), 1, backend), exact=True)
            assert_same_function(plain, convert(copy.deepcopy(plain), backend=backend))
        model = convert(copy.deepcopy(plain))
        for written in (trace, source):
            with pytest.warns(UserWarning, match="the backward of wrappings._(Marked|Rounded), which torch.export"):
                written(model, X)


_PARAMETRIZED: list[Callable[[nn.Module], nn.Module]] = [
    nn.utils.parametrizations.spectral_norm,
    nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.orthogonal,
    nn.utils.spectral_norm,
]


@wrapping(WEIGHTS, slow=True)
def parametrized_weights(_: Path) -> None:
    """In train mode spectral norms write their vectors with every call, gradients or none."""
    for norm in _PARAMETRIZED:

        def change(model: nn.Module, norm: Callable[[nn.Module], nn.Module] = norm) -> nn.Module:
            torch.manual_seed(1)
            norm(model.first.linear)
            norm(model.second.linear)
            return model.train()

        plain = change(net())
        with torch.no_grad():
            model = convert(change(net()))
            assert verify(model, X)
            for _ in range(2):
                torch.testing.assert_close(model(X), plain(X), rtol=1e-5, atol=1e-5)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer)
        assert_same_function(plain, model)


# ---------------------------------------------------------------------------------------------- training

TRAINING = "Training"


@wrapping(TRAINING)
def averaged_weights(_: Path) -> None:
    model = trained()
    average = torch.optim.swa_utils.AveragedModel(model)
    first = {name: value.detach().clone() for name, value in model.named_parameters()}
    average.update_parameters(model)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1)
    average.update_parameters(model)
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, first[name] + 0.05)
    assert not torch.allclose(average(X), model(X), atol=1e-3)
    expected = trained()
    with torch.no_grad():
        for name, value in expected.named_parameters():
            value.copy_(first[name] + 0.05)
    torch.testing.assert_close(average(X), expected(X), rtol=1e-5, atol=1e-5)


@wrapping(TRAINING)
def swapped_weights(_: Path) -> None:
    model, other = trained(), trained()
    randomize(other, seed=7)
    expected, own = other(X), model(X)
    weights = {name: value.detach() for name, value in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, weights, (X,)), expected)
    assert torch.equal(model(X), own)
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(X), expected)
    model.load_state_dict(kept)
    assert torch.equal(model(X), own)


@wrapping(TRAINING)
def scaled_gradients(_: Path) -> None:
    model = trained("aot_eager")
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(X).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 2.0
    optimizer.zero_grad()
    scaler.scale(model(X).sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(model.state_dict()["mhc.first.linear.phi"], before["mhc.first.linear.phi"])


@wrapping(TRAINING)
def saved_tensor_hooks(_: Path) -> None:
    for backend, blocks in itertools.product(("eager", "aot_eager"), (None, 1)):
        model = recompute(trained(backend), blocks)
        _, expected = step_of(model)
        seen: list[Tensor] = []

        def pack(tensor: Tensor, seen: list[Tensor] = seen) -> int:
            seen.append(tensor)
            return len(seen) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda place, seen=seen: seen[place].clone()):
            _, found = step_of(model)
        assert seen and all(torch.equal(found[name], value) for name, value in expected.items())


@wrapping(TRAINING)
def checkpointed_blocks(_: Path) -> None:
    model = net()
    model.first = checkpoint_wrapper(model.first)
    converted = convert(model, backend="aot_eager")
    plain, (output, found) = convert(net(), backend="aot_eager"), step_of(converted)
    expected, gradients = step_of(plain)
    torch.testing.assert_close(output, expected)
    assert [value.shape for value in found.values()] == [value.shape for value in gradients.values()]
    for one, other in zip(found.values(), gradients.values(), strict=True):
        torch.testing.assert_close(one, other)


@wrapping(TRAINING)
def muon(_: Path) -> None:
    model = trained()
    groups = {group["name"]: group for group in param_groups(model, weight_decay=0.1)}
    hidden = torch.optim.Muon([groups["decay"]], lr=0.02)
    rest = torch.optim.AdamW([groups["no_decay"], groups["mhc"]], lr=1e-3)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model(X).square().sum().backward()
    hidden.step()
    rest.step()
    moved = {name: float((value.detach() - before[name]).abs().max()) for name, value in model.named_parameters()}
    assert all(0 < size <= 1.5e-3 for name, size in moved.items() if name.startswith("mhc."))
    held = {id(value) for group in hidden.param_groups for value in group["params"]}
    assert held == {id(block.linear.weight) for block in (model.first, model.second)}


@wrapping(TRAINING)
def groups_of_foreign_sites(_: Path) -> None:
    model, _inputs = zoo_model("deepseek_v4")
    with pytest.warns(UserWarning, match="decays .*attn_hc.*mHC already.*weight_decay=0"):
        param_groups(model)


# ---------------------------------------------------------------------------------------------- adapters and states

STATES = "Adapters and weights on disk"


@wrapping(STATES, slow=True)
def adapters(folder: Path) -> None:
    pair = Pair(LLAMA)
    model = get_peft_model(pair.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    pair.model.mhc.requires_grad_(True)
    randomize(pair.model)
    expected = model(**pair.inputs).logits

    model.save_pretrained(folder)  # the adapter alone
    torch.save(model.get_base_model().mhc.state_dict(), folder / "mhc.pt")

    base = Pair(LLAMA).model
    again = PeftModel.from_pretrained(base, folder).eval()
    assert not torch.allclose(again(**pair.inputs).logits, expected, atol=1e-3)
    base.mhc.load_state_dict(torch.load(folder / "mhc.pt"))
    torch.testing.assert_close(again(**pair.inputs).logits, expected, rtol=1e-4, atol=1e-4)


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@wrapping(STATES)
def states_with_a_prefix(_: Path) -> Exception:
    state = _Wrapper(trained()).state_dict()
    for strict in (True, False):
        error = refused(ConfigError, lambda strict=strict: convert(net()).load_state_dict(state, strict=strict))
    assert str(refused(ConfigError, lambda: load(state, Net()))) == str(error)
    stripped = {key.removeprefix("module."): value for key, value in state.items()}
    assert torch.equal(load(stripped, Net())(X), trained()(X))
    return error


# ---------------------------------------------------------------------------------------------- modes and compilers

MODES = "Modes and compilers"
_TOOLS: list[Callable[[nn.Module], Any]] = [
    lambda model: str(cost_model(model, X)),
    lambda model: str(cost_model(model, X, compiled=True)),
    lambda model: str(partition(model, X, stages=2, microbatches=2)),
    lambda model: str(explain(model, X)),
    lambda model: str(verify(model, X)),
    lambda model: trace(model, X)(X).sum().item(),
    lambda model: str(source(model, X)),
]


@wrapping(MODES, slow=True)
def tools_in_any_mode(_: Path) -> None:
    model = trained()
    expected = [tool(model) for tool in _TOOLS]
    modes: list[Callable[[], AbstractContextManager[Any]]] = [
        torch.no_grad, torch.inference_mode, lambda: torch.device("meta"),
    ]  # fmt: skip
    for mode in modes:
        with mode():
            assert [tool(model) for tool in _TOOLS] == expected


@wrapping(MODES, slow=True)
def frozen_parameters(_: Path) -> None:
    model = trained()
    with inductor_config.patch(freezing=True), torch.no_grad():
        again = load(model.state_dict(), Net())
        for backend in ("aot_eager", "inductor"):
            fresh = convert(net(), backend=backend)
            fresh.load_state_dict(model.state_dict())
            torch.testing.assert_close(fresh(X), model(X), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(X), model(X), rtol=1e-5, atol=1e-5)


@wrapping(MODES)
def tools_of_a_model_that_is_mhc(_: Path) -> Exception:
    model, inputs = zoo_model("hy_v4")
    return refused(RewriteError, lambda: verify(model, inputs))
