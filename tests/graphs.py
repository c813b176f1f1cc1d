"""Capture, rewrite and compare models: what the tests of the passes share."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

import models
import zoo
from mhc_compile import HyperConnection, MHCConfig, mhc_compile
from mhc_compile.conversion import is_converted, plain_forward
from mhc_compile.passes.bind import bind_parameters
from mhc_compile.passes.capture import Captured, ahead_of_time, just_in_time
from mhc_compile.passes.emit import Emitter, copy_graph
from mhc_compile.passes.op_kinds import aten
from mhc_compile.passes.rewrite import Analysis, analyze, rewrite
from mhc_compile.passes.trunks import Site
from mhc_compile.trace import rewritten
from random_modules import Case

# Tensors here are tiny: with two threads in each of two pytest workers on two cores, training steps took five
# times as long. It also makes sums independent of the machine.
torch.set_num_threads(1)

mhc = torch.ops.mhc

# One site's phi, alpha and bias.
Weights = tuple[Tensor, Tensor, Tensor]

GRADIENT_FLOOR = 1e-2  # of the largest gradient in the model, see `gradient_error`


# ---------------------------------------------------------------------------------------------- models


SINCE = {"deepseek_v4": "5.12", "glm5_next": "5.23"}  # the first transformers, of those tried, that has the model


def zoo_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A fresh model of the zoo and its inputs; the test is skipped where transformers is too old to have it."""
    if name in SINCE:
        pytest.importorskip("transformers", minversion=SINCE[name])
    build, inputs = next((build, inputs) for known, build, inputs in zoo.ZOO + zoo.REFERENCE if known == name)
    return build(), inputs()


def small_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A fresh model of `models.MODELS` and its inputs."""
    entry = next(entry for entry in models.MODELS if entry.name == name)
    return entry.build(), entry.inputs()


def as_double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with every float tensor in float64."""
    return {name: value.double() if is_float(value) else value for name, value in inputs.items()}


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# ---------------------------------------------------------------------------------------------- graphs


def capture(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Captured:
    """The graph of the model before conversion, through the Dynamo door."""
    return just_in_time(plain_forward(model), model, args, kwargs or {})


def found(
    model: nn.Module, inputs: Mapping[str, Any], *, door: str = "dynamo", tie_shared: bool = False
) -> Analysis:
    """What the finder sees in a model, through either door."""
    captured = capture(model, (), inputs) if door == "dynamo" else ahead_of_time(model, (), inputs)[0]
    return analyze(captured.graph, tie_shared=tie_shared)


def counts(analysis: Analysis) -> tuple[int, int]:
    """Numbers of sites and trunks."""
    return len(analysis.sites), len(analysis.trunks)


def names(analysis: Analysis) -> list[str]:
    """The names of the sites, in the order of their adds."""
    return [site.name for site in analysis.sites]


@dataclass(frozen=True)
class Widened:
    """One call of a model: as captured (`plain`), in normal form (`canonical`), and rewritten (`graph`).

    The first two run on `arguments`, the last on `arguments` and then `weights`.
    """

    analysis: Analysis
    plain: fx.GraphModule
    canonical: fx.GraphModule
    graph: fx.GraphModule
    arguments: tuple[Any, ...]
    weights: tuple[Tensor, ...]


def widen(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    n: int = 4,
    weights: Callable[[Site], Weights] | None = None,
) -> Widened:
    """Capture a call and widen its trunks; `weights` gives a site's parameters (identity init by default)."""
    captured = capture(model, args, kwargs)
    plain = copy_graph(captured.graph)
    analysis = analyze(captured.graph)
    canonical = copy_graph(captured.graph)
    given = [(weights or partial(identity_weights, n=n))(site) for site in analysis.sites]
    look_up, _ = bind_parameters(captured.graph, analysis.sites, MHCConfig(n=n))
    rewrite(analysis, MHCConfig(n=n), look_up)
    flat = tuple(chain.from_iterable(given))
    return Widened(analysis, plain, canonical, captured.graph, captured.arguments, flat)


def identity_weights(site: Site, n: int) -> Weights:
    """Parameters that keep the function; float64 for a float64 trunk, as rounded logits cost 1e-8."""
    connection = HyperConnection(n, site.features, stream=site.index)
    if site.merge.base.meta["val"].dtype == torch.float64:
        connection.double().reset_parameters()
    return connection.phi, connection.alpha, connection.bias


def random_weights_of_one_stream(site: Site) -> Weights:
    """n = 1: every parameter random; one column each for pre, post and res."""
    phi, alpha, bias = torch.randn(site.features, 3), torch.randn(3), torch.randn(3)
    return phi.requires_grad_(), alpha.requires_grad_(), bias.requires_grad_()


def force_pre_and_post_to_one(gm: fx.GraphModule) -> int:
    """Put ones in place of the coefficients that no finite sigmoid makes 1; gives how many were replaced."""
    emitter, replaced = Emitter(gm.graph), 0
    for node in list(gm.graph.find_nodes(op="call_function", target=operator.getitem)):
        source, part = node.args
        if source.target is mhc.coefficients.default and part in (0, 1):
            with gm.graph.inserting_after(node):
                ones = emitter.call(aten.ones_like.default, node, like=node)
            node.replace_all_uses_with(ones, delete_user_cb=lambda user, made=ones: user is not made)
            replaced += 1
    gm.graph.lint()
    gm.recompile()
    return replaced


_BACK_IN_PLACE = ([aten.permute.default], [aten.clone.default])


def split_reads(gm: fx.GraphModule) -> None:
    """Give every reader of an aggregate or readout a copy of its own, made just before it.

    Autograd then adds the gradients of a trunk value one by one, in the order of the plain graph, where the
    readers read the value itself.
    """
    for target in (mhc.aggregate.default, mhc.readout.default):
        for read in gm.graph.find_nodes(op="call_function", target=target):
            brought_back = [read]  # and what brings a channels-first value back to its axes
            while [user.target for user in brought_back[-1].users] in _BACK_IN_PLACE:
                brought_back.extend(brought_back[-1].users)
            last = brought_back[-1]
            for reader in list(last.users)[1:]:
                copies: dict[fx.Node, fx.Node] = {}
                for node in brought_back:
                    with gm.graph.inserting_before(reader):
                        copies[node] = gm.graph.node_copy(node, lambda one, made=copies: made.get(one, one))
                reader.replace_input_with(last, copies[last])
    gm.graph.lint()
    gm.recompile()


class _Merges(fx.Interpreter):
    """Runs a rewritten graph and keeps the streams behind every site."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.streams: list[Tensor] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is mhc.merge.default:
            self.streams.append(result)
        return result


def divergence(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    """Mean pairwise cosine distance between a converted model's streams, behind the site where it is largest.

    0 when all are equal. Not behind a trunk's last site alone: the readout gives its streams equal gradients.
    """
    made = rewritten(model, inputs)
    runner = _Merges(made.graph)
    with torch.no_grad():
        runner.run(*made.arguments)
    return max(map(_cosine_distance, runner.streams))


def _cosine_distance(streams: Tensor) -> float:
    n = streams.shape[-2]
    unit = nn.functional.normalize(streams.double(), dim=-1)
    cosines = (unit @ unit.transpose(-1, -2)).sum((-1, -2)) - n
    return (1 - cosines / (n * (n - 1))).mean().item()


# ------------------------------------------------------------------------------------------- comparing


def float_outputs(output: Any) -> list[Tensor]:
    """The float tensors of any output, Hugging Face's output classes included."""
    return [leaf for leaf in pytree.tree_leaves(output) if is_float(leaf)]


def loss_of(outputs: Iterable[Tensor]) -> Tensor:
    """The sum of all outputs, each element times a fixed random weight."""
    total: Any = 0
    for number, output in enumerate(outputs):
        wide = output if output.dtype == torch.float64 else output.float()
        generator = torch.Generator().manual_seed(number + 1)
        total = total + (wide * torch.randn(wide.shape, generator=generator, dtype=wide.dtype)).sum()
    return total


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the model had before conversion."""
    own = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return {name: one for name, one in own.items() if not (is_converted(model) and name.startswith("mhc."))}


@dataclass(frozen=True)
class Result:
    """The float outputs of one call, and the gradients of the loss by parameter name (None where unused)."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]


def result_of(call: Callable[[], Any], parameters: Mapping[str, Tensor], *, seed: int = 0) -> Result:
    """Run a call under a seed and differentiate its loss."""
    torch.manual_seed(seed)
    with torch.enable_grad():
        outputs = float_outputs(call())
        made = torch.autograd.grad(loss_of(outputs), list(parameters.values()), allow_unused=True)
    detached = [output.detach() for output in outputs]
    return Result(detached, dict(zip(parameters, made, strict=True)))


def output_error(expected: Result, actual: Result) -> float:
    """Largest difference of an output, relative to that output's largest value."""
    assert [one.shape for one in expected.outputs] == [one.shape for one in actual.outputs]
    assert [one.dtype for one in expected.outputs] == [one.dtype for one in actual.outputs]
    pairs = zip(expected.outputs, actual.outputs, strict=True)
    return max((_difference(a, b) / max(_size(a), 1e-6) for a, b in pairs), default=0.0)


def gradient_error(expected: Result, actual: Result) -> tuple[float, str]:
    """Largest difference of a gradient, relative to its parameter's scale, and that parameter's name.

    The scale is the gradient's largest value, but at least 1e-2 of the largest in the model: a key bias has
    an exactly zero gradient by softmax's shift invariance, so its noise has no scale of its own.
    """
    assert expected.gradients.keys() == actual.gradients.keys()
    known = {name: one for name, one in expected.gradients.items() if one is not None}
    other = {name for name, one in actual.gradients.items() if one is not None}
    assert known.keys() == other, f"gradients of one model only: {sorted(known.keys() ^ other)}"
    floor = GRADIENT_FLOOR * max(map(_size, known.values()), default=0.0)
    scales = {name: max(_size(one), floor, 1e-30) for name, one in known.items()}
    errors = {name: _difference(one, actual.gradients[name]) / scales[name] for name, one in known.items()}
    worst = max(errors, key=errors.__getitem__, default="")
    return errors.get(worst, 0.0), worst


def assert_same(expected: Result, actual: Result, *, outputs: float, gradients: float) -> None:
    """Both results agree within relative bounds."""
    error = output_error(expected, actual)
    assert error <= outputs, f"outputs differ by {error:.2e} of their scale > {outputs:g}"
    error, name = gradient_error(expected, actual)
    assert error <= gradients, f"gradient of {name} differs by {error:.2e} of its scale > {gradients:g}"


def assert_bitwise(expected: Result, actual: Result) -> None:
    """Both results have the same bits."""
    assert len(expected.outputs) == len(actual.outputs)
    for number, (a, b) in enumerate(zip(expected.outputs, actual.outputs, strict=True)):
        assert torch.equal(a, b), f"output {number} differs by {_difference(a, b):.2e}"
    for name, gradient in expected.gradients.items():
        other = actual.gradients[name]
        if gradient is None or other is None:
            assert gradient is other, f"{name} has a gradient in one model only"
        else:
            error = _difference(gradient, other)
            assert torch.equal(gradient, other), f"gradient of {name} differs by {error:.2e}"


def _size(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _difference(a: Tensor, b: Tensor) -> float:
    return _size(a.double() - b.double())


# -------------------------------------------------------------------------------------- random modules


def problems(case: Case) -> list[str]:
    """What is wrong with the rewrite of a random module at step 0; empty when nothing is."""
    model = case.build()
    made = widen(model, case.inputs())
    found_counts = counts(made.analysis)
    wrong = []
    if found_counts != (case.sites, case.trunks):
        wrong.append(f"found {found_counts} sites and trunks, expected {(case.sites, case.trunks)}")
    parameters = own_parameters(model)
    expected = result_of(lambda: made.plain(*made.arguments), parameters)
    actual = result_of(lambda: made.graph(*made.arguments, *made.weights), parameters)
    limits = _limits(case, next(model.parameters()).dtype)
    errors = {"outputs": (output_error(expected, actual), ""), "gradients": gradient_error(expected, actual)}
    for what, (error, name) in errors.items():
        if not error <= limits[what]:
            wrong.append(f"{what} differ by {error:.2e} of their scale > {limits[what]:g} {name}".rstrip())
    return wrong


def _limits(case: Case, dtype: torch.dtype) -> dict[str, float]:
    if not case.exact:  # a last bit may round to the other bf16 neighbour
        return dict(outputs=5e-2, gradients=2e-1)
    if dtype == torch.float64:
        return dict(outputs=1e-9, gradients=1e-9)
    # a norm over two features multiplies what was rounded by up to 1 / sqrt(eps) = 300 on the way back
    return dict(outputs=1e-5, gradients=1e-3)


# ------------------------------------------------------------------------------------ converted models


def randomize(model: nn.Module, seed: int = 3, scale: float = 0.3) -> None:
    """Move the mHC parameters of a converted model off the identity."""
    randomize_parameters(model.get_submodule("mhc").parameters(), seed, scale)


@torch.no_grad()
def randomize_parameters(parameters: Iterable[nn.Parameter], seed: int = 3, scale: float = 0.3) -> None:
    """Add noise to parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@torch.no_grad()
def first_output(call: Callable[[], Any]) -> Tensor:
    """The first float tensor that a call gives."""
    return float_outputs(call())[0].detach().clone()


FAR = 1e-3  # further than this from the plain output, an output cannot be the plain one


class Converted:
    """A converted model with random mHC weights, its inputs, its output (`expected`) and the plain model's."""

    def __init__(self, name: str, n: int = 4, **options: Any) -> None:
        self.name = name
        made = _converted(name, n, tuple(sorted(options.items())))
        self.model, self.inputs, self.plain, self.expected = copy.deepcopy(made)  # a copy compiles anew

    def run(self) -> Any:
        """One call."""
        return self.model(**self.inputs)

    def check(self, model: nn.Module, tolerance: float = 0.0) -> None:
        """Another model computes what this one did, to a part of its largest value."""
        actual = first_output(lambda: model(**self.inputs)).to(self.expected.dtype)
        assert float((actual - self.plain).abs().max()) > FAR, "the plain model ran"
        assert float((actual - self.expected).abs().max()) <= tolerance * float(self.expected.abs().max())


@cache
def _converted(
    name: str, n: int, options: tuple[tuple[str, Any], ...]
) -> tuple[nn.Module, dict[str, Any], Tensor, Tensor]:
    """Converted and called once for all tests of a process: model, inputs, the plain output, and the converted one."""
    model, inputs = fresh(name)
    plain = first_output(lambda: model(**inputs))
    mhc_compile(model, n, **{"backend": "eager", "example_inputs": inputs, **dict(options)})
    randomize(model)
    expected = first_output(lambda: model(**inputs))
    assert float((plain - expected).abs().max()) > FAR, "the test could not tell mHC from plain"
    return model, inputs, plain, expected


def fresh(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A fresh model of the zoo or of `models.MODELS`, and its inputs."""
    known = {name for name, *_ in zoo.ZOO + zoo.REFERENCE}
    return zoo_model(name) if name in known else small_model(name)
