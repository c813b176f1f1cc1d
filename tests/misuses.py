"""Misuses of the package: what makes each, and what its error says. `docs/errors.md` has a row for each.

An entry is a function that sets the scene and gives a `Situation`; its decorator says what the error must be. A message
holds three parts: what was found, what is legal, and what to do next.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from graphs import randomize, zoo_model
from mhc_compile import (
    AdaptiveClip,
    Backend,
    CaptureError,
    ConfigError,
    ExportError,
    HyperConnection,
    MHCConfig,
    Monitor,
    PartitionError,
    Plan,
    RewriteError,
    ShapeError,
    composite_gains,
    cost_model,
    draw,
    explain,
    export_onnx,
    gain,
    high_priority_merges,
    history,
    load,
    mhc_compile,
    observe,
    param_groups,
    partition,
    pipeline_schedule,
    pipeline_stages,
    recompute,
    restore,
    scale_updates,
    set_iterations,
    source,
    stage_modules,
    trace,
    verify,
)
from mhc_compile.backend import mhc as mhc_backend
from mhc_compile.kernels import ops
from mhc_compile.kernels.replay_ops import replay_block
from mhc_compile.record import KEY

X = torch.linspace(-2, 2, 48).reshape(2, 3, 8)
Unsupported = torch._dynamo.exc.Unsupported  # Dynamo stops an outer compilation itself; the words in it are ours


@dataclass
class Situation:
    """A misuse about to happen.

    call: makes it; model: must be the same afterwards; run: a legal call, which must give the same afterwards;
    expected: what `run` gives, where it cannot be called before; undo: what makes `run` legal again.
    """

    call: Callable[[], Any]
    model: nn.Module | None = None
    run: Callable[[], Any] | None = None
    expected: Tensor | None = None
    undo: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Misuse:
    """One misuse: how to make it, and what it raises; found, legal and step are parts of the message."""

    name: str
    group: str
    make: Callable[[Path], Situation]
    error: type[Exception]
    found: str
    legal: str
    step: str


TABLE: list[Misuse] = []
Make = Callable[[Path], Situation]


def misuse(group: str, error: type[Exception], found: str, legal: str, step: str) -> Callable[[Make], Make]:
    """Enter a function into the table."""

    def enter(make: Make) -> Make:
        TABLE.append(Misuse(make.__name__, group, make, error, found, legal, step))
        return make

    return enter


# ---------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    """Two blocks, of which the second can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        x = self.first(x)
        return self.second(x) if both else x


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def own(forward: Callable[..., Any]) -> nn.Module:
    """A module with a linear layer and this forward."""
    made = type("Own", (nn.Linear,), {"forward": forward})
    torch.manual_seed(0)
    return made(8, 8)


def linear(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


@cache
def state(n: int = 2, backend: str = "eager") -> dict[str, Any]:
    """The weights of a converted Net whose output is not the plain one."""
    model = mhc_compile(net(), n, backend=backend, example_inputs=X)
    randomize(model)
    assert not torch.allclose(model(X), net()(X), atol=1e-3)
    return dict(model.state_dict())


def converted(**options: Any) -> nn.Module:
    """A converted Net with these weights: loading them traces nothing, which saves much of the time of these tests."""
    return load({key: value.clone() for key, value in state(**options).items()}, net())


def called(**options: Any) -> nn.Module:
    """The same, called once."""
    model = converted(**options)
    model(X)
    return model


def waiting() -> nn.Module:
    """A Net that is converted at its first call."""
    return mhc_compile(net(), 2, backend="eager")


def converting(model: Any = None, inputs: Any = X, run: Any = X, **options: Any) -> Situation:
    """The conversion of a plain model."""
    model = net() if model is None else model
    given = {"backend": "eager", "example_inputs": inputs, **({} if "config" in options else {"n": 2}), **options}
    call = lambda: mhc_compile(model, **given)  # noqa: E731
    module = model if isinstance(model, nn.Module) else None
    return Situation(call, module, None if run is None or module is None else lambda: model(run))


def using(model: nn.Module, call: Callable[[nn.Module], Any]) -> Situation:
    """Some use of a model that can be called with X."""
    return Situation(lambda: call(model), model, lambda: model(X))


def before_first_call(call: Callable[[nn.Module], Any]) -> Situation:
    """Some use of a model that waits; it must still be converted by its first call."""
    model = waiting()
    return Situation(lambda: call(model), model, lambda: model(X), expected=converted_at_step_0())


def converted_at_step_0() -> Tensor:
    output: Tensor = mhc_compile(net(), 2, backend="eager", example_inputs=X)(X)
    return output


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- options

OPTIONS = "Options of a conversion"
WHOLE, FOUR = "an integer from 1 to 64", "every published model has n=4"


@misuse(OPTIONS, ConfigError, "n is 0", WHOLE, FOUR)
def no_streams(_: Path) -> Situation:
    return converting(n=0)


@misuse(OPTIONS, ConfigError, "n is -2", WHOLE, FOUR)
def negative_streams(_: Path) -> Situation:
    return converting(n=-2)


@misuse(OPTIONS, ConfigError, "n is 2.0", WHOLE, FOUR)
def float_streams(_: Path) -> Situation:
    return converting(n=2.0)


@misuse(OPTIONS, ConfigError, "n is True", WHOLE, FOUR)
def boolean_streams(_: Path) -> Situation:
    return converting(n=True)


@misuse(OPTIONS, ConfigError, "n is 65", WHOLE, FOUR)
def too_many_streams(_: Path) -> Situation:
    return converting(n=65)


@misuse(OPTIONS, ConfigError, "option is 'streams'", "one of n, init, iterations", "help(MHCConfig)")
def unknown_option(_: Path) -> Situation:
    return converting(streams=4)


@misuse(OPTIONS, ConfigError, "init is 'zeros'", "one of 'identity', 'paper', 'deepseek_v4'", "'identity' keeps")
def unknown_init(_: Path) -> Situation:
    return converting(init="zeros")


@misuse(OPTIONS, ConfigError, "backend is 'mhc'", "one of 'inductor', 'aot_eager', 'eager'", "'inductor' is the fast")
def unknown_backend(_: Path) -> Situation:
    return converting(backend="mhc")


@misuse(OPTIONS, ConfigError, "iterations is 0", "an integer from 1 to 1000", "the paper uses 20")
def no_iterations(_: Path) -> Situation:
    return converting(iterations=0)


@misuse(OPTIONS, ConfigError, "iterations is 2.5", "an integer from 1 to 1000", "the paper uses 20")
def half_an_iteration(_: Path) -> Situation:
    return converting(iterations=2.5)


@misuse(OPTIONS, ConfigError, "eps is 0.0", "a finite number > 0", "the default is 1e-6")
def zero_eps(_: Path) -> Situation:
    return converting(eps=0.0)


@misuse(OPTIONS, ConfigError, "eps is nan", "a finite number > 0", "the default is 1e-6")
def nan_eps(_: Path) -> Situation:
    return converting(eps=float("nan"))


@misuse(OPTIONS, ConfigError, "eps is True", "a finite number > 0", "the default is 1e-6")
def boolean_eps(_: Path) -> Situation:
    return converting(eps=True)


@misuse(OPTIONS, ConfigError, "tie_shared is 'yes'", "True or False", "the default is False")
def tie_shared_of_a_wrong_type(_: Path) -> Situation:
    return converting(tie_shared="yes")


@misuse(OPTIONS, ConfigError, "implicit_gradient is 1", "True or False", "the default is False")
def implicit_gradient_of_a_wrong_type(_: Path) -> Situation:
    return converting(implicit_gradient=1)


@misuse(OPTIONS, ConfigError, "recompute is 'all'", "None, 'auto', sites a block", "'auto' takes the least memory")
def unknown_recompute(_: Path) -> Situation:
    return converting(recompute="all")


@misuse(OPTIONS, ConfigError, "config is given beside other options", "config alone", "dataclasses.replace")
def config_beside_options(_: Path) -> Situation:
    return converting(config=MHCConfig(), n=4, backend="eager")


@misuse(OPTIONS, ConfigError, "config is a dict", "an MHCConfig", "MHCConfig(**options)")
def config_of_a_wrong_type(_: Path) -> Situation:
    model = net()
    return using(model, lambda model: mhc_compile(model, config={"n": 4}, example_inputs=X))  # type: ignore[arg-type]


@misuse(OPTIONS, ConfigError, "only is '*.attn'", "a pattern of first.linear, second.linear", "explain(model)")
def only_that_matches_nothing(_: Path) -> Situation:
    return converting(only="*.attn")


@misuse(OPTIONS, ConfigError, "skip is 'third'", "a pattern of first.linear, second.linear", "explain(model)")
def skip_that_matches_nothing(_: Path) -> Situation:
    return converting(skip=["first", "third"])


@misuse(OPTIONS, ConfigError, "what only and skip leave is no site", "at least one of first.linear", "leave one")
def only_and_skip_that_leave_nothing(_: Path) -> Situation:
    return converting(only="first", skip="*.linear")


@misuse(OPTIONS, ConfigError, "skip('first.linear') is 'no'", "True or False", "lambda site: site.trunk == 0")
def choice_that_gives_no_boolean(_: Path) -> Situation:
    return converting(skip=lambda site: "no")


@misuse(OPTIONS, ConfigError, "constraint is 'stiefel'", "one of 'sinkhorn', 'lite'", "'sinkhorn' is the paper's")
def unknown_constraint(_: Path) -> Situation:
    return converting(constraint="stiefel")


@misuse(OPTIONS, ConfigError, "constraint is 'lite' with n=6", "n up to 5, for its n! logits", "take 'sinkhorn'")
def lite_with_six_streams(_: Path) -> Situation:
    return converting(constraint="lite", n=6)


@misuse(OPTIONS, ConfigError, "fixed is ('phi',)", "one or two of 'pre', 'post', 'res'", "fixed=('res',)")
def fixed_of_an_unknown_name(_: Path) -> Situation:
    return converting(fixed=("phi",))


@misuse(OPTIONS, ConfigError, "fixed is ('pre', 'post', 'res')", "one or two of 'pre', 'post', 'res'", "fixed=('res',)")
def fixed_that_leaves_nothing(_: Path) -> Situation:
    return converting(fixed=("pre", "post", "res"))


@misuse(OPTIONS, ConfigError, "fixed is ('post',) with 'sinkhorn'", "rows need not sum to 1", "leave post free")
def post_fixed_where_streams_then_stay_equal(_: Path) -> Situation:
    return converting(fixed=("post",))


@misuse(OPTIONS, ConfigError, "dynamic is False with pre fixed", "False with pre free", "fix res instead")
def static_with_pre_fixed(_: Path) -> Situation:
    return converting(dynamic=False, fixed=("pre",))


@misuse(OPTIONS, ConfigError, "init is 'paper' with dynamic=False", "'identity'", "its pre differs")
def static_from_equal_streams(_: Path) -> Situation:
    return converting(dynamic=False, init="paper")


@misuse(OPTIONS, ConfigError, "init is 'deepseek_v4' with 'unconstrained'", "'identity' or 'paper'", "as Hyper-Conn")
def deepseek_init_of_hyper_connections(_: Path) -> Situation:
    return converting(constraint="unconstrained", init="deepseek_v4")


@misuse(OPTIONS, ConfigError, "implicit_gradient is True with 'lite'", "True with 'sinkhorn'", "leave implicit_grad")
def implicit_gradient_without_sinkhorn(_: Path) -> Situation:
    return converting(constraint="lite", implicit_gradient=True)


@misuse(OPTIONS, ConfigError, "single_pass is 1", "True or False", "the default is False")
def single_pass_of_a_wrong_type(_: Path) -> Situation:
    return converting(single_pass=1)


@misuse(OPTIONS, ConfigError, "site_constraints is '*.attn'", "a pattern of first.linear", "explain(model)")
def site_constraints_that_match_nothing(_: Path) -> Situation:
    return converting(site_constraints={"*.attn": "lite"})


@misuse(OPTIONS, ConfigError, "site_constraints is 'lite'", "a function SiteRecord -> name or None", "explain(model)")
def site_constraints_that_are_a_name(_: Path) -> Situation:
    return converting(site_constraints="lite")


@misuse(OPTIONS, ConfigError, "constraint is True", "one of 'sinkhorn', 'lite'", "'sinkhorn' is the paper's")
def site_constraints_that_give_no_name(_: Path) -> Situation:
    return converting(site_constraints=lambda site: True)


@misuse(OPTIONS, ConfigError, "iterations is 0", "an integer from 1 to 1000", "the paper uses 20")
def set_iterations_to_none(_: Path) -> Situation:
    return using(called(), lambda model: set_iterations(model, 0))


@misuse(OPTIONS, RewriteError, "converted with 'identity'", "a model with sites of 'sinkhorn'", "leave the schedule")
def set_iterations_without_sinkhorn(_: Path) -> Situation:
    model = mhc_compile(net(), 2, constraint="identity", backend="eager", example_inputs=X)
    return using(model, lambda model: set_iterations(model, 3))


@misuse(OPTIONS, ConfigError, "weight_decay is -1.0", "a number >= 0", "0.01 is the default")
def negative_weight_decay(_: Path) -> Situation:
    return using(called(), lambda model: param_groups(model, weight_decay=-1.0))


# ---------------------------------------------------------------------------------------------- models

MODELS = "Models that are not converted"
NOT_ONE_GRAPH = "a forward that torch.compile(model, fullgraph=True) captures"
REWRITE_LINE = "rewrite that line in tensor ops"


@misuse(MODELS, ConfigError, "model is a function", "a torch.nn.Module", "pass the model itself")
def no_module(_: Path) -> Situation:
    return converting(linear)


@misuse(MODELS, RewriteError, "no residual add to convert", "one that adds F(x) to x", "explain(model, inputs)")
def no_residual_add(_: Path) -> Situation:
    return converting(own(linear))


@misuse(MODELS, RewriteError, "a local skip, not a residual branch", "one that adds F(x) to x", "explain(model")
def only_adds_that_are_refused(_: Path) -> Situation:
    return converting(own(lambda self, x: linear(self, x + x**3)))


@misuse(MODELS, RewriteError, "no two float tensors, only torch.int64", "in float16 to float64", "explain(model")
def integers_only(_: Path) -> Situation:
    ids = torch.arange(12).reshape(3, 4)
    return converting(own(lambda self, x: x + x.cumsum(-1)), ids, run=ids)


@misuse(MODELS, RewriteError, "no two float tensors, only torch.complex64", "in float16 to float64", "explain(model")
def complex_trunk(_: Path) -> Situation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls complex modules new
        model = own(lambda self, x: x + linear(self, x)).to(torch.complex64)
    x = X.to(torch.complex64)
    return converting(model, x, run=x)


@misuse(MODELS, CaptureError, "one without a tensor op", "computes with tensors", "pass inputs that exercise it")
def no_tensors_at_all(_: Path) -> Situation:
    return converting(own(lambda self, x: x + 3), (4,), run=None)


def _breaks(self: Any, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x + linear(self, x)


@misuse(MODELS, CaptureError, "torch._dynamo.graph_break()", NOT_ONE_GRAPH, REWRITE_LINE)
def a_graph_break(_: Path) -> Situation:
    return converting(own(_breaks))


@misuse(MODELS, CaptureError, "calls torch.func.grad", "derivatives are taken outside", "write that derivative")
def derivatives_inside(_: Path) -> Situation:
    return converting(own(lambda self, x: x + torch.func.grad(lambda y: linear(self, y).sum())(x)))


def _branches(self: Any, x: Tensor) -> Tensor:
    if x.sum() > 9:
        x = x * 2
    return x + linear(self, x)


@misuse(MODELS, CaptureError, "if x.sum() > 9", NOT_ONE_GRAPH, REWRITE_LINE)
def a_branch_on_a_tensor(_: Path) -> Situation:
    return converting(own(_branches))


def _reads_a_number(self: Any, x: Tensor) -> Tensor:
    if x.sum().item() > 9:
        x = x * 2
    return x + linear(self, x)


@misuse(MODELS, CaptureError, "if x.sum().item() > 9", NOT_ONE_GRAPH, REWRITE_LINE)
def a_branch_on_item(_: Path) -> Situation:
    return converting(own(_reads_a_number))


def _selects(self: Any, x: Tensor) -> Tensor:
    if len(x.sum((-1, -2)).nonzero()) > 1:
        x = x * 2
    return x + linear(self, x)


@misuse(MODELS, CaptureError, "nonzero()) > 1", NOT_ONE_GRAPH, REWRITE_LINE)
def a_branch_on_a_data_dependent_shape(_: Path) -> Situation:
    return converting(own(_selects))


@misuse(MODELS, CaptureError, "torch.ops.quantized", NOT_ONE_GRAPH, REWRITE_LINE)
def packed_quantised_weights(_: Path) -> Situation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will drop this kind of quantisation
        model = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)
    return converting(model)


def _fails(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] != 3:
        raise ValueError("a batch of three")
    return x + linear(self, x)


@misuse(MODELS, CaptureError, "raises on these inputs", "inputs that the plain model runs on", "call the plain model")
def a_forward_that_raises(_: Path) -> Situation:
    return converting(own(_fails), run=None)


@misuse(MODELS, RewriteError, "Net is converted already", "a model that is not", "restore(model)")
def converted_twice(_: Path) -> Situation:
    return converting(called())


@misuse(MODELS, RewriteError, "to be converted at its first call already", "a model that is not", "restore(model)")
def converted_twice_before_the_first_call(_: Path) -> Situation:
    return before_first_call(lambda model: mhc_compile(model, 2, example_inputs=X))


@misuse(MODELS, RewriteError, "1 of Sequential is converted already", "no converted module inside", "call it as it is")
def a_converted_module_inside(_: Path) -> Situation:
    return converting(nn.Sequential(nn.LayerNorm(8), called()))


@misuse(MODELS, RewriteError, "mHC already", "plain residual adds", 'torch.compile(model, backend="mhc")')
def mhc_already(_: Path) -> Situation:
    model, inputs = zoo_model("deepseek_v4")
    del model.model.layers[1:]
    return Situation(lambda: mhc_compile(model, 4, backend="eager"), model, lambda: model(**inputs).logits)


@misuse(MODELS, RewriteError, "the attribute 'mhc' of Net is its own", "the sites go there", "rename that attribute")
def an_attribute_mhc(_: Path) -> Situation:
    model = net()
    model.mhc = nn.Linear(8, 8)
    return converting(model)


@misuse(MODELS, RewriteError, "forward of this Net is one set on the instance", "the one of its class", "convert the")
def a_forward_of_the_instance(_: Path) -> Situation:
    model = net()
    model.forward = lambda x: Net.forward(model, x)  # type: ignore[method-assign]
    return converting(model)


@misuse(MODELS, RewriteError, "an adapter around a model", "the model inside it", "mhc_compile(model.get_base_model())")
def a_peft_model(_: Path) -> Situation:
    from peft import LoraConfig, get_peft_model

    return converting(get_peft_model(net(), LoraConfig(target_modules=["linear"])))


@misuse(MODELS, RewriteError, "the model is inside torch.compile", "the model itself", "convert the model, then wrap")
def a_compiled_model(_: Path) -> Situation:
    return converting(torch.compile(net(), backend="eager"))


@misuse(MODELS, RewriteError, "the model is inside DataParallel", "the model itself", "convert the model, then wrap")
def a_wrapped_model(_: Path) -> Situation:
    return converting(nn.DataParallel(net()))


@misuse(MODELS, RewriteError, "TorchScript (a TopLevelTracedModule)", "whose forward is Python", "that was scripted")
def a_scripted_model(_: Path) -> Situation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return converting(torch.jit.trace(net(), X))


@misuse(MODELS, RewriteError, "sharded over processes", "whose parameters are whole", "convert and inspect the model")
def tensor_parallel_parameters(folder: Path) -> Situation:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    def call() -> None:
        with process_group(folder):
            weight = model.get_parameter("first.linear.weight")
            model.first.linear.weight = nn.Parameter(distribute_tensor(weight, init_device_mesh("cpu", (1,))))
            try:
                mhc_compile(model, 2, example_inputs=X)
            finally:
                model.first.linear.weight = weight

    model = net()
    return Situation(call, model, lambda: model(X))


@misuse(MODELS, UserWarning, "first.linear.weight of Net is not finite", "finite parameters", "load or initialise the")
def nan_parameters(_: Path) -> Situation:
    model = net()
    model.first.linear.weight.data[0, 0] = float("nan")
    return converting(model)


@misuse(MODELS, RewriteError, "loaded as a plain model", "mhc_compile.load(directory)", "delete model.config.mhc")
def a_plain_class_from_a_converted_checkpoint(_: Path) -> Situation:
    model, inputs = zoo_model("gpt2")
    model.config.mhc = {"version": 1}
    return Situation(lambda: mhc_compile(model, 4), model, lambda: model(**inputs).logits)


# ---------------------------------------------------------------------------------------------- inputs

INPUTS = "Inputs"
FORMS = "a tensor, a tuple of positional arguments or a dict of keyword arguments"
SIGNATURE, PASS_THESE = "forward(x, both=True)", "pass these"
ON_CPU, ON_META = "on cpu, where the model's parameters are", "on meta, where the model's parameters are"


@misuse(INPUTS, ConfigError, "example_inputs is a int", FORMS, "put the arguments of forward into a tuple")
def example_inputs_of_a_wrong_type(_: Path) -> Situation:
    return converting(inputs=3)


@misuse(INPUTS, CaptureError, "missing a required argument: 'x'", SIGNATURE, PASS_THESE)
def example_inputs_of_another_name(_: Path) -> Situation:
    return converting(inputs={"y": X})


@misuse(INPUTS, CaptureError, "too many positional arguments", SIGNATURE, PASS_THESE)
def too_many_example_inputs(_: Path) -> Situation:
    return converting(inputs=(X, True, X))


@misuse(INPUTS, CaptureError, "input x of Net is on meta", ON_CPU, "x.to('cpu')")
def example_inputs_on_another_device(_: Path) -> Situation:
    return converting(inputs=X.to("meta"))


@misuse(INPUTS, CaptureError, "second.norm.weight on meta", "on one device", "model.to(device)")
def a_model_on_two_devices(_: Path) -> Situation:
    model = net()
    model.second.to("meta")
    return converting(model, run=None)


@misuse(INPUTS, ConfigError, "input x is torch.float64", "torch.float32, that of the parameters", "cast the example")
def example_inputs_of_another_dtype(_: Path) -> Situation:
    return converting(inputs=X.double())


@misuse(INPUTS, CaptureError, "raises on these inputs: ", "inputs that the plain model runs on", "correct the inputs")
def example_inputs_of_another_width(_: Path) -> Situation:
    return converting(own(lambda self, x: linear(self, x[..., :8]) + x), inputs=torch.ones(2, 9))


@misuse(INPUTS, CaptureError, "input x of Net is a sparse tensor", "a dense tensor", "x.to_dense()")
def sparse_example_inputs(_: Path) -> Situation:
    return converting(inputs=X.to_sparse())


@misuse(INPUTS, CaptureError, "input x of Net is a quantised tensor", "a dense tensor", "x.dequantize()")
def quantised_example_inputs(_: Path) -> Situation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch will drop these tensors
        return converting(inputs=torch.quantize_per_tensor(X, 0.1, 0, torch.quint8))


@misuse(INPUTS, ShapeError, "input x of Net is a nested tensor", "a dense tensor", "pass it padded")
def nested_inputs(_: Path) -> Situation:
    nested = torch.nested.nested_tensor([X[0], X[1][:2]], layout=torch.jagged)
    return using(called(), lambda model: model(nested))


@misuse(INPUTS, CaptureError, "input x of Net is on meta", ON_CPU, "x.to('cpu')")
def inputs_on_another_device(_: Path) -> Situation:
    return using(called(), lambda model: model(X.to("meta")))


@misuse(INPUTS, CaptureError, "input x of Net is on cpu", ON_META, "model.to_empty, then load")
def inputs_for_a_model_on_meta(_: Path) -> Situation:
    model = mhc_compile(net().to("meta"), 2, backend="eager", example_inputs=X.to("meta"))
    return Situation(lambda: model(X), model)


@misuse(INPUTS, ShapeError, "input x of Net is torch.float64", "torch.float32, that of the model's", "cast the one")
def inputs_of_another_dtype(_: Path) -> Situation:
    return using(called(), lambda model: model(X.double()))


@misuse(INPUTS, ShapeError, "input x of Net is torch.bfloat16", "torch.float32, that of the model's", "torch.autocast")
def narrow_inputs(_: Path) -> Situation:
    return using(called(), lambda model: model(X.bfloat16()))


@misuse(INPUTS, CaptureError, "unexpected keyword argument 'mask'", SIGNATURE, PASS_THESE)
def arguments_that_forward_does_not_take(_: Path) -> Situation:
    return using(called(), lambda model: model(X, mask=None))


@misuse(INPUTS, RewriteError, "it has no site second.linear", "the one the model was converted with", "Convert with")
def layers_dropped_between_calls(_: Path) -> Situation:
    return using(called(), lambda model: model(X, both=False))


# ---------------------------------------------------------------------------------------------- other doors

DOORS = "Transforms, tracers and compilers around a converted model"
PLAIN_CALL, NO_VMAP = "a plain call, with loss.backward()", "pass the batch in one call instead of vmap"
ORIGINAL = "differentiate the original model"
NO_TRACER, TRACE = "a call with real tensors", "mhc_compile.trace(model, inputs)"


@misuse(DOORS, RewriteError, "inside torch.func.vmap", PLAIN_CALL, NO_VMAP)
def vmap(_: Path) -> Situation:
    return using(called(), lambda model: torch.func.vmap(model)(X))


@misuse(DOORS, RewriteError, "inside torch.func.grad", PLAIN_CALL, ORIGINAL)
def func_grad(_: Path) -> Situation:
    return using(called(), lambda model: torch.func.grad(lambda x: model(x).sum())(X))


@misuse(DOORS, RewriteError, "inside torch.func.grad", PLAIN_CALL, ORIGINAL)
def func_grad_of_parameters(_: Path) -> Situation:
    def call(model: nn.Module) -> Any:
        own = dict(model.named_parameters())
        return torch.func.grad(lambda own: torch.func.functional_call(model, own, X).sum())(own)

    return using(called(), call)


@misuse(DOORS, RewriteError, "inside torch.func.jvp", PLAIN_CALL, ORIGINAL)
def func_jvp(_: Path) -> Situation:
    return using(called(), lambda model: torch.func.jvp(model, (X,), (X,)))


@misuse(DOORS, RewriteError, "inside torch.func.", PLAIN_CALL, ORIGINAL)
def func_hessian(_: Path) -> Situation:
    return using(called(), lambda model: torch.func.hessian(lambda x: model(x).sum())(X))


@misuse(DOORS, RewriteError, "inside forward-mode differentiation", PLAIN_CALL, ORIGINAL)
def tangents(_: Path) -> Situation:
    def call(model: nn.Module) -> Any:
        with forward_ad.dual_level():
            return model(forward_ad.make_dual(X, X))

    return using(called(), call)


def _second_derivative(model: nn.Module) -> None:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), x)


@misuse(DOORS, RewriteError, "double backward through mHC sites is not supported", "first derivatives", "create_graph")
def second_derivative(_: Path) -> Situation:
    return using(called(), _second_derivative)


@misuse(DOORS, RewriteError, "double backward through a converted model", "first derivatives", ORIGINAL)
def gradient_penalty(_: Path) -> Situation:
    def call(model: nn.Module) -> None:
        x = X.clone().requires_grad_()
        score = model(x).square().mean()
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
        try:
            (score + (gradient.norm() - 1) ** 2).backward()
        finally:
            model.zero_grad()

    return using(called(backend="aot_eager"), call)


@misuse(DOORS, ExportError, "torch.export of a converted Net", "the export of mhc_compile.trace", "for the rewritten")
def torch_export(_: Path) -> Situation:
    return using(called(), lambda model: torch.export.export(model, (X,), strict=False))


@misuse(DOORS, Unsupported, "cannot be inlined into another fullgraph compilation", "without fullgraph", TRACE)
def strict_export(_: Path) -> Situation:
    return using(called(), lambda model: torch.export.export(model, (X,), strict=True))


@misuse(DOORS, ExportError, "traced by torch.jit.trace", NO_TRACER, TRACE)
def jit_trace(_: Path) -> Situation:
    def call(model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.trace(model, X)

    return using(called(), call)


@misuse(DOORS, ExportError, "given to torch.jit.script", "mhc_compile.trace(model, inputs) with", "script the model")
def jit_script(_: Path) -> Situation:
    def call(model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(nn.Sequential(model))

    return using(called(), call)


@misuse(DOORS, ExportError, "traced by torch.fx.symbolic_trace or make_fx", NO_TRACER, TRACE)
def symbolic_trace(_: Path) -> Situation:
    return using(called(), torch.fx.symbolic_trace)


@misuse(DOORS, ExportError, "traced by torch.fx.symbolic_trace or make_fx", NO_TRACER, TRACE)
def make_fx_of_a_model(_: Path) -> Situation:
    return using(called(), lambda model: make_fx(model)(X))


@misuse(DOORS, Unsupported, "cannot be inlined into another fullgraph compilation", "without fullgraph", "drop fullgra")
def fullgraph_around_a_larger_function(_: Path) -> Situation:
    return using(called(), lambda model: torch.compile(lambda x: model(x) * 2, backend="eager", fullgraph=True)(X))


@misuse(DOORS, RewriteError, "this graph was not rewritten", "that the model compiles itself", "set_stance")
def dynamo_forced_to_be_eager(_: Path) -> Situation:
    def call(model: nn.Module) -> None:
        with torch.compiler.set_stance("force_eager"):
            model(X)

    return using(called(), call)


@misuse(DOORS, CaptureError, "Dynamo is switched off", "in which torch.compile compiles", "switch Dynamo on")
def a_conversion_without_dynamo(_: Path) -> Situation:
    def call(model: nn.Module) -> None:
        with torch.compiler.set_stance("force_eager"):
            mhc_compile(model, 2, example_inputs=X)

    return using(net(), call)


@misuse(DOORS, CaptureError, "inside FlopCounterMode", "outside of dispatch modes", "trace(model, inputs), a module")
def counting_flops_of_a_converted_model(_: Path) -> Situation:
    def call(model: nn.Module) -> None:
        with FlopCounterMode(display=False):
            model(X)

    return using(called(), call)


@misuse(DOORS, CaptureError, "given a backward hook", "of the converted model itself", "take that hook off")
def backward_hook_on_a_module_inside(_: Path) -> Situation:
    model = called()
    before = model(X).detach()
    hook = model.first.register_full_backward_hook(lambda *_: None)
    return Situation(lambda: model(X), run=lambda: model(X), expected=before, undo=hook.remove)


@misuse(DOORS, RewriteError, "first of Net is converted by itself", "one conversion", "restore() that submodule")
def a_submodule_converted_after_the_model(_: Path) -> Situation:
    model = called()
    before = model(X).detach()
    mhc_compile(model.first, 2, backend="eager", example_inputs=X)
    return Situation(lambda: model(X), run=lambda: model(X), expected=before, undo=lambda: restore(model.first))


# ---------------------------------------------------------------------------------------------- sites

SITES = "Sites changed by hand"
WHOLE_TREE, PUT_BACK = "phi, alpha and bias of its sites", "put the sites back"
CAST_MODEL = "cast the model with model.to(dtype)"


def changed(change: Callable[[nn.Module], Any], back: Callable[[nn.Module], Any]) -> Situation:
    """A call after the sites were changed, which can be taken back."""
    model = called()
    expected = model(X)
    change(model)
    return Situation(lambda: model(X), model, lambda: model(X), expected, lambda: back(model))


@misuse(SITES, RewriteError, "without second.linear.alpha", WHOLE_TREE, PUT_BACK)
def a_site_deleted(_: Path) -> Situation:
    model = called()
    kept = model.mhc.second
    return changed(lambda model: delattr(model.mhc, "second"), lambda model: setattr(model.mhc, "second", kept))


@misuse(SITES, RewriteError, "with more.alpha, which is none of its own", WHOLE_TREE, PUT_BACK)
def a_site_added(_: Path) -> Situation:
    return changed(
        lambda model: setattr(model.mhc, "more", HyperConnection(2, 8)), lambda model: delattr(model.mhc, "more")
    )


@misuse(SITES, RewriteError, "with first.linear.parametrizations.phi.original", WHOLE_TREE, PUT_BACK)
def a_site_parametrised(_: Path) -> Situation:
    from torch.nn.utils import parametrize

    return changed(
        lambda model: parametrize.register_parametrization(model.mhc.first.linear, "phi", nn.Identity()),
        lambda model: parametrize.remove_parametrizations(model.mhc.first.linear, "phi"),
    )


@misuse(SITES, RewriteError, "a second name of another parameter", WHOLE_TREE, PUT_BACK)
def two_sites_tied_by_hand(_: Path) -> Situation:
    model = converted()
    model.mhc.second.linear.phi = model.mhc.first.linear.phi
    return Situation(lambda: model(X), model)


@misuse(SITES, RewriteError, "n of model.mhc.first.linear is 4", "2, as the model was converted", "restore(model)")
def sites_of_another_conversion(_: Path) -> Situation:
    own, other = called(), converted(n=4)
    expected, kept = own(X), own.mhc
    own.mhc = other.mhc
    return Situation(lambda: own(X), own, lambda: own(X), expected, lambda: setattr(own, "mhc", kept))


@misuse(SITES, RewriteError, "iterations of model.mhc.first.linear is 5", "20, as the model was", "convert with the")
def iterations_set_on_a_site(_: Path) -> Situation:
    return changed(
        lambda model: setattr(model.mhc.first.linear, "iterations", 5),
        lambda model: setattr(model.mhc.first.linear, "iterations", 20),
    )


@misuse(SITES, RewriteError, "model.mhc is replaced by a Linear", "the tree of sites", "put it back")
def the_tree_replaced(_: Path) -> Situation:
    model = called()
    expected, kept = model(X), model.mhc
    model.mhc = nn.Linear(8, 8)
    return Situation(lambda: model(X), model, lambda: model(X), expected, lambda: setattr(model, "mhc", kept))


@misuse(SITES, RewriteError, "model.mhc is deleted", "the tree of sites", "put it back")
def the_tree_deleted(_: Path) -> Situation:
    model = called()
    expected, kept = model(X), model.mhc
    del model.mhc
    return Situation(lambda: model(X), model, lambda: model(X), expected, lambda: setattr(model, "mhc", kept))


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.mhc.parameters():
        parameter.data = parameter.data.to(dtype)


@misuse(SITES, ShapeError, "linear.phi is torch.bfloat16", "torch.float32", CAST_MODEL)
def sites_cast_by_hand(_: Path) -> Situation:
    model = called()
    _cast(model, torch.bfloat16)
    return Situation(lambda: model(X), model)


@misuse(SITES, ShapeError, "linear.phi is torch.float64", "torch.float32", CAST_MODEL)
def sites_made_double(_: Path) -> Situation:
    return changed(lambda model: model.mhc.double(), lambda model: model.mhc.float())


@misuse(SITES, ShapeError, "linear.phi is torch.float32", "torch.float64", CAST_MODEL)
def a_trunk_made_double(_: Path) -> Situation:
    model = called()
    model.first.double(), model.second.double()
    return Situation(lambda: model(X.double()), model)


@misuse(SITES, ShapeError, "the shape of model.mhc.first.linear.bias is [4]", "[8], as converted", "copy values into")
def a_parameter_of_another_shape(_: Path) -> Situation:
    model = called()
    expected, kept = model(X), model.mhc.first.linear.bias
    model.mhc.first.linear.bias = nn.Parameter(torch.zeros(4))
    undo = lambda: setattr(model.mhc.first.linear, "bias", kept)  # noqa: E731
    return Situation(lambda: model(X), model, lambda: model(X), expected, undo)


@misuse(SITES, ShapeError, "phi is on cpu", "meta, where the rest of the model is", "move the model as a whole")
def a_trunk_moved_without_its_sites(_: Path) -> Situation:
    model = called()
    model.first.to("meta"), model.second.to("meta")
    return Situation(lambda: model(X.to("meta")), model)


@misuse(SITES, ShapeError, "phi is on meta", "cpu, where the rest of the model is", "move the model as a whole")
def sites_moved_without_their_trunk(_: Path) -> Situation:
    model = called()
    model.mhc.to("meta")
    return Situation(lambda: model(X), model)


# ---------------------------------------------------------------------------------------------- waiting

WAITING = "A model that is converted at its first call, before that call"
APPEAR, CALL_ONCE = "appear at its first call", "Call it once before"


@misuse(WAITING, RewriteError, "that is not converted yet", APPEAR, CALL_ONCE)
def an_optimizer_before_the_first_call(_: Path) -> Situation:
    return before_first_call(lambda model: torch.optim.AdamW(model.parameters()))


@misuse(WAITING, RewriteError, "state_dict() of a Net that is not converted yet", APPEAR, CALL_ONCE)
def a_state_before_the_first_call(_: Path) -> Situation:
    return before_first_call(lambda model: model.state_dict())


@misuse(WAITING, RewriteError, "that is not converted yet", APPEAR, CALL_ONCE)
def a_parent_s_parameters_before_the_first_call(_: Path) -> Situation:
    return before_first_call(lambda model: list(nn.Sequential(model).parameters()))


@misuse(WAITING, RewriteError, "that is not converted yet", APPEAR, CALL_ONCE)
def ddp_before_the_first_call(folder: Path) -> Situation:
    def call(model: nn.Module) -> None:
        with process_group(folder):
            nn.parallel.DistributedDataParallel(model)

    return before_first_call(call)


@misuse(WAITING, RewriteError, "Net is not converted yet", "a converted model", "call it once")
def a_trace_before_the_first_call(_: Path) -> Situation:
    return before_first_call(lambda model: trace(model, X))


@misuse(WAITING, CaptureError, "input x of Net is on meta", ON_CPU, "x.to('cpu')")
def a_first_call_that_cannot_convert(_: Path) -> Situation:
    return before_first_call(lambda model: model(X.to("meta")))


@misuse(WAITING, Unsupported, "before that call; legal", "the converted model by itself", "call the model once")
def fullgraph_before_the_first_call(_: Path) -> Situation:
    return before_first_call(lambda model: torch.compile(lambda x: model(x) * 2, backend="eager", fullgraph=True)(X))


@misuse(WAITING, ExportError, "given to torch.jit.script", "mhc_compile.trace(model, inputs) with", "script the model")
def jit_script_before_the_first_call(_: Path) -> Situation:
    def call(model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(model)

    return before_first_call(call)


# ---------------------------------------------------------------------------------------------- checkpoints

CHECKPOINTS = "Checkpoints"


def weights(**options: Any) -> dict[str, Any]:
    """A state that may be edited."""
    return dict(state(**options))


def edited(edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """A state whose record was edited."""
    made = weights()
    record = json.loads(bytes(made[KEY].tolist()))
    edit(record)
    made[KEY] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
    return made


def loading(checkpoint: Any, model: nn.Module | None = None) -> Situation:
    return using(net() if model is None else model, lambda model: load(checkpoint, model))


@misuse(CHECKPOINTS, ConfigError, "of another conversion: n is 3, here 2", "weights of the same n", "restore(model)")
def a_state_of_another_conversion(_: Path) -> Situation:
    other = weights(n=3)
    return using(called(), lambda model: model.load_state_dict(other))


@misuse(CHECKPOINTS, ConfigError, "of another conversion: n is 3, here 2", "weights of the same n", "restore(model)")
def load_of_another_conversion(_: Path) -> Situation:
    return loading(weights(n=3), called())


@misuse(CHECKPOINTS, ConfigError, "that of the plain model", "with mhc.*", "strict=False")
def a_plain_state_into_a_converted_model(_: Path) -> Situation:
    plain = net().state_dict()
    return using(called(), lambda model: model.load_state_dict(plain))


@misuse(CHECKPOINTS, ConfigError, "begin with 'module.'", "the keys of the model itself", "removeprefix('module.')")
def a_state_with_a_prefix(_: Path) -> Situation:
    wrapped = {f"module.{key}": value for key, value in called().state_dict().items()}
    return using(called(), lambda model: model.load_state_dict(wrapped, strict=False))


@misuse(CHECKPOINTS, ConfigError, "the state is a list", "a state_dict", "pass model.state_dict()")
def a_state_of_a_wrong_type(_: Path) -> Situation:
    return using(called(), lambda model: model.load_state_dict([1]))


@misuse(CHECKPOINTS, ConfigError, "without mhc._extra_state", "the state_dict of a converted model", "load weights of")
def load_of_a_plain_state(_: Path) -> Situation:
    return loading(net().state_dict())


@misuse(CHECKPOINTS, ConfigError, "with keys model, step", "the state_dict of a converted model", "pass its entry 'mod")
def load_of_a_training_checkpoint(_: Path) -> Situation:
    return loading({"model": weights(), "step": 3})


@misuse(CHECKPOINTS, ConfigError, "with no model", "with a model for all but a directory", "build the plain")
def load_without_a_model(_: Path) -> Situation:
    made = weights()
    return Situation(lambda: load(made))


@misuse(
    CHECKPOINTS, ConfigError, "which does not exist", "a file of a state_dict (.safetensors, .pt)", "correct the path"
)
def load_of_a_missing_file(folder: Path) -> Situation:
    return loading(folder / "none.pt")


@misuse(
    CHECKPOINTS, ConfigError, "which cannot be read as weights", "a file of a state_dict", "save model.state_dict()"
)
def load_of_a_damaged_file(folder: Path) -> Situation:
    torch.save(weights(), folder / "weights.pt")
    whole = (folder / "weights.pt").read_bytes()
    (folder / "weights.pt").write_bytes(whole[: len(whole) // 2])
    return loading(folder / "weights.pt")


@misuse(
    CHECKPOINTS, ConfigError, "which cannot be read as weights", "a file of a state_dict", "save model.state_dict()"
)
def load_of_a_damaged_safetensors_file(folder: Path) -> Situation:
    (folder / "weights.safetensors").write_bytes(b"nothing")
    return loading(folder / "weights.safetensors")


@misuse(CHECKPOINTS, ConfigError, "which cannot be read as weights", "a file of a state_dict", "weights_only=False")
def load_of_a_pickled_model(folder: Path) -> Situation:
    torch.save(called(), folder / "model.pt")
    return loading(folder / "model.pt")


@misuse(CHECKPOINTS, ConfigError, "the mHC record is 2", "1 to 1", "load it with the version that wrote it")
def a_record_of_a_newer_version(_: Path) -> Situation:
    return loading(edited(lambda record: record.update(version=2)))


@misuse(
    CHECKPOINTS, ConfigError, "the mHC record is not readable ('sites')", "a table with config, sites", "save the mod"
)
def a_record_without_sites(_: Path) -> Situation:
    return loading(edited(lambda record: record.pop("sites")))


@misuse(CHECKPOINTS, ConfigError, "mhc._extra_state is no JSON", "the tensor of JSON bytes", "save and load the whole")
def a_damaged_record(_: Path) -> Situation:
    made = weights()
    made[KEY] = made[KEY][:-3]
    return loading(made)


@misuse(
    CHECKPOINTS, ConfigError, "there is no mhc.first.linear.phi", "the state of a converted Net", "its whole state_dict"
)
def a_state_without_a_weight(_: Path) -> Situation:
    made = weights()
    del made["mhc.first.linear.phi"]
    return loading(made)


@misuse(
    CHECKPOINTS,
    ConfigError,
    "first.linear.weight is [4, 8] and not [8, 8]",
    "the state of a converted",
    "build the model",
)
def a_state_of_another_size(_: Path) -> Situation:
    made = weights()
    made["first.linear.weight"] = made["first.linear.weight"][:4]
    return loading(made)


@misuse(
    CHECKPOINTS, ConfigError, "first.linear.weight is a int and not [8, 8]", "the state of a converted", "build the"
)
def a_state_of_numbers(_: Path) -> Situation:
    made = weights()
    made["first.linear.weight"] = 3
    return loading(made)


@misuse(CHECKPOINTS, RewriteError, "waits for its first call", "load converts as the checkpoint says", "restore(model)")
def load_into_a_waiting_model(_: Path) -> Situation:
    made = weights()
    return before_first_call(lambda model: load(made, model))


@misuse(CHECKPOINTS, ConfigError, "the mHC record is 2", "1 to 1", "load it with the version that wrote it")
def a_pickle_of_a_newer_version(_: Path) -> Situation:
    with patch("mhc_compile.record.VERSION", 2):
        saved = pickle.dumps(called())
    return Situation(lambda: pickle.loads(saved))


# ---------------------------------------------------------------------------------------------- tools

TOOLS = "Functions that look at a model"
CONVERT_FIRST = "call mhc_compile(model) first"


def not_converted(call: Callable[[nn.Module], Any]) -> Situation:
    return using(net(), call)


@misuse(TOOLS, RewriteError, "Net is not converted", "a converted model", CONVERT_FIRST)
def restore_of_a_plain_model(_: Path) -> Situation:
    return not_converted(restore)


@misuse(TOOLS, RewriteError, "Net is not converted", "a converted model", CONVERT_FIRST)
def verify_of_a_plain_model(_: Path) -> Situation:
    return not_converted(lambda model: verify(model, X))


@misuse(TOOLS, RewriteError, "Net is not converted", "a converted model", CONVERT_FIRST)
def trace_of_a_plain_model(_: Path) -> Situation:
    return not_converted(lambda model: trace(model, X))


@misuse(TOOLS, ExportError, "Net is a model without mHC", "a converted model, or one that is mHC", CONVERT_FIRST)
def onnx_of_a_plain_model(folder: Path) -> Situation:
    return not_converted(lambda model: export_onnx(model, X, folder / "model.onnx"))


@misuse(TOOLS, ConfigError, "path is", "a file in a folder that exists", "create the folder, or name a file")
def onnx_into_a_folder_that_is_missing(folder: Path) -> Situation:
    return not_converted(lambda model: export_onnx(model, X, folder / "missing" / "model.onnx"))


@misuse(TOOLS, ConfigError, "dynamic is 'batch'", "True, False, or dynamic_shapes", "True frees all")
def onnx_with_sizes_of_a_wrong_type(folder: Path) -> Situation:
    return not_converted(lambda model: export_onnx(model, X, folder / "model.onnx", dynamic="batch"))


@misuse(TOOLS, RewriteError, "Net is not converted", "a converted model", CONVERT_FIRST)
def observe_of_a_plain_model(_: Path) -> Situation:
    return not_converted(lambda model: observe(model, X))


@misuse(TOOLS, RewriteError, "Net is not converted", "a converted model", CONVERT_FIRST)
def history_of_a_plain_model(_: Path) -> Situation:
    return not_converted(history)


@misuse(TOOLS, RewriteError, "Net is not converted", "a converted model", CONVERT_FIRST)
def source_of_a_plain_model(_: Path) -> Situation:
    return not_converted(lambda model: source(model, X))


@misuse(TOOLS, ConfigError, "the path of the source is 'net.txt'", "a path that ends in .py", "save('rewritten.py')")
def source_in_another_format(_: Path) -> Situation:
    return using(called(), lambda model: source(model, X).save("net.txt"))


@misuse(TOOLS, ConfigError, "the picture's path is 'net.gif'", ".svg, .png, .pdf", "draw(model, inputs, 'model.svg')")
def picture_in_another_format(_: Path) -> Situation:
    return using(called(), lambda model: draw(model, X, "net.gif"))


@misuse(TOOLS, ConfigError, "example_inputs is not given", FORMS, "pass what Net.forward takes")
def verify_without_inputs(_: Path) -> Situation:
    return using(called(), verify)


@misuse(TOOLS, ConfigError, "example_inputs is not given", FORMS, "pass what Net.forward takes")
def explain_without_inputs(_: Path) -> Situation:
    return using(net(), explain)


@misuse(TOOLS, CaptureError, "missing a required argument: 'x'", SIGNATURE, PASS_THESE)
def verify_with_other_inputs(_: Path) -> Situation:
    return using(called(), lambda model: verify(model, {"y": X}))


@misuse(TOOLS, CaptureError, "input x of Net is on meta", ON_CPU, "x.to('cpu')")
def trace_on_another_device(_: Path) -> Situation:
    return using(called(), lambda model: trace(model, X.to("meta")))


class KeyValueCache:
    """Not a type that torch.export knows."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


@misuse(TOOLS, CaptureError, "a misuses.KeyValueCache, in which", "a model that it exports", "pass use_cache=False")
def trace_with_a_cache(_: Path) -> Situation:
    def forward(self: Any, x: Tensor, use_cache: bool = False) -> Any:
        x = x + linear(self, x)
        return (x, KeyValueCache(x)) if use_cache else x

    model = mhc_compile(own(forward), 2, backend="eager", example_inputs=X)
    return using(model, lambda model: trace(model, (X, True)))


@misuse(TOOLS, ConfigError, "model is a int", "a torch.nn.Module", "pass the model itself")
def explain_of_no_module(_: Path) -> Situation:
    return Situation(lambda: explain(3, X))  # type: ignore[arg-type]


@misuse(TOOLS, ConfigError, "model is a int", "a torch.nn.Module", "pass the model itself")
def param_groups_of_no_module(_: Path) -> Situation:
    return Situation(lambda: param_groups(3))  # type: ignore[arg-type]


@misuse(TOOLS, ConfigError, "n is 1", "a model converted with n >= 2", "there are no coefficients")
def observe_one_stream(_: Path) -> Situation:
    return using(mhc_compile(net(), 1, backend="eager", example_inputs=X), lambda model: observe(model, X))


@misuse(TOOLS, ShapeError, "[1, 3, 8] torch.float32", "[2, 3, 8] torch.float32", "with dynamic_shapes")
def a_traced_model_with_another_shape(_: Path) -> Situation:
    model = called()
    traced = trace(model, X)
    return using(model, lambda model: traced(X[:1]))


@misuse(TOOLS, RewriteError, "changed after its conversion, to Wrapped", "that the conversion gave", "restore(model)")
def restore_after_the_class_changed(_: Path) -> Situation:
    model = called()
    model.__class__ = type("Wrapped", (type(model),), {})
    return using(model, restore)


@misuse(TOOLS, RewriteError, "set on the instance after its conversion", "the converted class", "take it off first")
def restore_under_a_forward_of_the_instance(_: Path) -> Situation:
    model = called()
    model.forward = lambda x: type(model).forward(model, x)  # type: ignore[method-assign]
    return using(model, restore)


@misuse(TOOLS, ShapeError, "the mixing matrices is [2, 3]", "[tokens, n, n]", "take .res of what observe gives")
def the_gain_of_one_matrix_that_is_not_square(_: Path) -> Situation:
    return Situation(lambda: gain(torch.ones(2, 3)))


@misuse(TOOLS, ShapeError, "the mixing matrices is [3, 4, 4]", "[3, 2, 2], that of the sites before", "of one trunk")
def composite_gains_over_two_trunks(_: Path) -> Situation:
    return Situation(lambda: composite_gains([torch.ones(3, 2, 2), torch.ones(3, 4, 4)]))


class Answer:
    """An output class that torch does not know."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Answering(Net):
    """A Net that returns one."""

    def forward(self, x: Tensor) -> Answer:  # type: ignore[override]
        return Answer(super().forward(x))


@misuse(TOOLS, CaptureError, "returns a misuses.Answer", "a model that it exports", "register_pytree_node) first")
def a_trace_of_an_output_of_a_class_of_its_own(_: Path) -> Situation:
    model = mhc_compile(Answering(), 2, backend="eager", example_inputs=X)
    return Situation(lambda: trace(model, X), model, lambda: model(X).value)


# ---------------------------------------------------------------------------------------------- training

TRAINING = "Watching and training"


@misuse(TRAINING, RewriteError, "Net is not converted", "a converted model", CONVERT_FIRST)
def monitor_of_a_plain_model(_: Path) -> Situation:
    return not_converted(Monitor)


@misuse(TRAINING, RewriteError, "Net is not converted yet", "a converted model", "call it once")
def monitor_of_a_model_that_waits(_: Path) -> Situation:
    return before_first_call(Monitor)


@misuse(TRAINING, RewriteError, "2 converted models", "a module that holds one", "each of them by itself")
def monitor_of_two_models(_: Path) -> Situation:
    both = nn.ModuleList([converted(), converted()])
    return Situation(lambda: Monitor(both))


@misuse(TRAINING, ConfigError, "n is 1", "a model converted with n >= 2", "there is nothing to watch")
def monitor_of_one_stream(_: Path) -> Situation:
    return using(mhc_compile(net(), 1, backend="eager", example_inputs=X), Monitor)


@misuse(TRAINING, ConfigError, "every is 0", "an integer >= 1", "every=100")
def monitor_every_0th_step(_: Path) -> Situation:
    return using(converted(), lambda model: Monitor(model, every=0))


@misuse(TRAINING, ConfigError, "max_gain is 0.5", "a number >= 1", "3.0 is the default")
def monitor_with_a_bound_below_1(_: Path) -> Situation:
    return using(converted(), lambda model: Monitor(model, max_gain=0.5))


@misuse(TRAINING, ConfigError, "the Monitor is entered already", "one that is not entered", "Monitor(model)")
def monitor_entered_twice(_: Path) -> Situation:
    model = converted()
    monitor = Monitor(model).__enter__()
    return Situation(monitor.__enter__, model, lambda: model(X), undo=lambda: monitor.__exit__(None, None, None))


@misuse(TRAINING, ConfigError, "the Monitor is empty", "a Monitor with a sample", "call the model in train mode")
def monitor_plot_before_a_sample(_: Path) -> Situation:
    return using(converted(), lambda model: Monitor(model).plot("gains.png"))


@misuse(TRAINING, RewriteError, "restored since its Monitor was made", "the conversion as it was then", "after the Mon")
def monitor_of_a_restored_model(_: Path) -> Situation:
    model = converted()
    monitor = Monitor(model)
    return using(restore(model), lambda model: monitor.__enter__())


@misuse(TRAINING, ConfigError, "momentum is 1", "a number in [0, 1)", "0.9 is the default")
def clip_with_a_momentum_of_1(_: Path) -> Situation:
    return using(converted(), lambda model: AdaptiveClip(model, momentum=1))


@misuse(TRAINING, ConfigError, "factor is nan", "a finite number > 0", "max_norm=1.0 are the defaults")
def clip_with_a_factor_of_nan(_: Path) -> Situation:
    return using(converted(), lambda model: AdaptiveClip(model, factor=float("nan")))


@misuse(TRAINING, ConfigError, "warm_up is -1", "an integer >= 0", "100 is the default")
def clip_with_a_negative_warm_up(_: Path) -> Situation:
    return using(converted(), lambda model: AdaptiveClip(model, warm_up=-1))


@misuse(TRAINING, ConfigError, "one with step", "one with steps, own and mhc", "state_dict() of an AdaptiveClip")
def clip_from_another_state(_: Path) -> Situation:
    return using(converted(), lambda model: AdaptiveClip(model).load_state_dict({"step": 3}))


@misuse(TRAINING, ConfigError, "res is -0.1", "a finite number >= 0", "1.0 leaves its updates as they are")
def scale_updates_by_less_than_0(_: Path) -> Situation:
    optimizer = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)  # noqa: E731
    return using(converted(), lambda model: scale_updates(optimizer(model), model, res=-0.1))


@misuse(TRAINING, ConfigError, "without mHC parameters of the model", "one that holds them", "param_groups(model)")
def scale_updates_of_an_optimizer_built_too_early(_: Path) -> Situation:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mhc_compile(model, 2, backend="eager", example_inputs=X)
    return using(model, lambda model: scale_updates(optimizer, model, res=0.1))


@misuse(TRAINING, ConfigError, "optimizer is a list", "a torch.optim.Optimizer", "that a wrapper holds")
def scale_updates_of_no_optimizer(_: Path) -> Situation:
    return using(converted(), lambda model: scale_updates([], model, res=0.1))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- memory and stages

STAGES = "Memory and pipeline stages"


def planning(**options: Any) -> Situation:
    return using(called(), lambda model: partition(model, X, **options))


@misuse(STAGES, RewriteError, "Net is not converted", "a converted model", CONVERT_FIRST)
def partition_of_a_plain_model(_: Path) -> Situation:
    return not_converted(lambda model: partition(model, X))


@misuse(STAGES, RewriteError, "Net is not converted", "a converted model", CONVERT_FIRST)
def recompute_of_a_plain_model(_: Path) -> Situation:
    return not_converted(lambda model: recompute(model, "auto"))


@misuse(STAGES, ConfigError, "recompute is 0", "sites a block (an integer >= 1)", "'auto' takes the least memory")
def blocks_of_no_site(_: Path) -> Situation:
    return using(called(), lambda model: recompute(model, 0))


@misuse(
    STAGES, ConfigError, "the device of high-priority merges is cpu", "a CUDA device", "move it first, model.to('cuda')"
)
def high_priority_on_a_cpu(_: Path) -> Situation:
    return using(called(), lambda model: high_priority_merges(model, "*"))


@misuse(STAGES, ConfigError, "'*.mlp', which matches no site", "a pattern of first.linear, second", "explain(model)")
def high_priority_of_no_site(_: Path) -> Situation:
    return using(called(), lambda model: high_priority_merges(model, "*.mlp"))


@misuse(STAGES, RewriteError, "Net is not converted", "a converted model", CONVERT_FIRST)
def high_priority_of_a_plain_model(_: Path) -> Situation:
    return not_converted(lambda model: high_priority_merges(model, "*"))


def replaying(**changed: Any) -> Situation:
    """A replay of two sites, with another argument."""
    streams, f, post, res = torch.ones(5, 2, 3), torch.ones(5, 3), torch.ones(5, 2), torch.ones(5, 2, 2)
    given = {"streams": streams, "f": [f, f], "post": [post, post], "res": [res, res], "pre": [None, post, None]}
    return Situation(lambda: replay_block(**{**given, **changed}))


def data_parallel(schedule: str, folder: Path) -> Situation:
    """DDP around a stage, under a schedule."""
    model = called()

    def call() -> Any:
        with process_group(folder):
            plan = partition(model, X, stages=2, devices=1, microbatches=4, schedule=schedule)
            stages = pipeline_stages(plan, model, X)
            stages[0].submod = nn.parallel.DistributedDataParallel(stages[0].submod)
            return pipeline_schedule(stages, lambda output, target: output.sum())

    return using(model, lambda model: call())


APART = "which computes input and weight gradients apart"
WHOLE_BACKWARDS = "'1f1b', 'gpipe' or 'interleaved' for stages"


@misuse(STAGES, PartitionError, f"'zero-bubble', {APART}", WHOLE_BACKWARDS, "fully_shard(stage.submod)")
def data_parallel_under_zero_bubble(folder: Path) -> Situation:
    return data_parallel("zero-bubble", folder)


@misuse(STAGES, PartitionError, f"'zbv', {APART}", WHOLE_BACKWARDS, "fully_shard(stage.submod)")
def data_parallel_under_zbv(folder: Path) -> Situation:
    return data_parallel("zbv", folder)


@misuse(STAGES, PartitionError, f"'dualpipev', {APART}", WHOLE_BACKWARDS, "fully_shard(stage.submod)")
def data_parallel_under_dualpipev(folder: Path) -> Situation:
    return data_parallel("dualpipev", folder)


@misuse(
    STAGES, ShapeError, "(1, 2, 2, 3) tensors", "k, k, k and k + 1 for k sites", "pass None for an aggregate that"
)
def a_replay_of_other_numbers(_: Path) -> Situation:
    return replaying(f=[torch.ones(5, 3)])


@misuse(STAGES, ShapeError, "None at some sites and given at others", "all or none", "replay the two kinds")
def a_replay_of_mixed_and_unmixed_sites(_: Path) -> Situation:
    return replaying(res=[torch.ones(5, 2, 2), None])


@misuse(STAGES, ShapeError, "f is [5, 4]", "[..., C] = [5, 3] for these streams", "n and C are the last")
def a_replay_of_other_features(_: Path) -> Situation:
    return replaying(f=[torch.ones(5, 4), torch.ones(5, 3)])


@misuse(STAGES, ShapeError, "pre is [5, 3]", "[..., n] = [5, 2] for these streams", "n and C are the last")
def a_replay_with_weights_of_other_streams(_: Path) -> Situation:
    return replaying(pre=[torch.ones(5, 3), None, None])


@misuse(STAGES, ConfigError, "stages is 0", "an integer >= 1", "pass stages=4, say")
def no_stages(_: Path) -> Situation:
    return planning(stages=0)


@misuse(STAGES, ConfigError, "microbatches is 2.5", "an integer >= 1", "pass microbatches=4, say")
def half_a_microbatch(_: Path) -> Situation:
    return planning(microbatches=2.5)


@misuse(STAGES, PartitionError, "stages is 99", "1 to 2: Net has 1 legal cut", "pass stages=2 or fewer")
def more_stages_than_cuts(_: Path) -> Situation:
    return planning(stages=99, microbatches=99)


@misuse(STAGES, ConfigError, "schedule is 'dualpipe'", "'zbv', 'dualpipev'", "'1f1b' keeps little and is simple")
def unknown_schedule(_: Path) -> Situation:
    return planning(schedule="dualpipe")


@misuse(STAGES, ConfigError, "memory is 'plenty'", "a number of bytes > 0", "leave it out for the least")
def memory_that_is_no_size(_: Path) -> Situation:
    return planning(memory="plenty")


@misuse(STAGES, PartitionError, "memory is 0.977 KiB", "at least 10.2 KiB", "pass memory=10432")
def memory_that_nothing_fits(_: Path) -> Situation:
    return planning(memory=1000)


def chosen(self: Any, x: Tensor) -> Tensor:
    (rows,) = torch.where(x[:, 0, 0] > 0)
    return x + torch.zeros_like(x).index_add(0, rows, linear(self, x)[rows])


@misuse(STAGES, PartitionError, "depend on the values in a call", "follow from those of the inputs", "all rows and a")
def sizes_that_depend_on_data(_: Path) -> Situation:
    model = mhc_compile(own(chosen), 2, backend="eager", example_inputs=X)
    return using(model, lambda model: cost_model(model, X))


class Rounded(torch.autograd.Function):
    """With a gradient that its forward does not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


class Rounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + Rounded.apply(self.second(x))  # type: ignore[no-any-return]


@misuse(
    STAGES, PartitionError, "trained through misuses.Rounded, whose own backward", "those of its ops", "without stages"
)
def stages_without_a_backward(_: Path) -> Situation:
    model = mhc_compile(Rounding(), 2, backend="eager", example_inputs=X)
    plan = partition(model, X, stages=2, microbatches=2)
    return using(model, lambda model: stage_modules(plan, model, X))


@misuse(STAGES, ConfigError, "the version of the plan is 99", "1 to 1", "make the plan again")
def a_plan_of_a_later_version(_: Path) -> Situation:
    return Situation(lambda: Plan.from_dict({"version": 99}))


# ---------------------------------------------------------------------------------------------- Backend

BACKEND = "Backend(n=...)"


def through(backend: Backend, model: nn.Module) -> Any:
    return torch.compile(model, backend=backend)(X)


@misuse(BACKEND, ConfigError, "n is 0", WHOLE, FOUR)
def a_backend_of_no_streams(_: Path) -> Situation:
    return Situation(lambda: Backend(0))


@misuse(BACKEND, RewriteError, "has compiled nothing yet", "appear with the first call", "Call it once before")
def a_backend_s_parameters_before_the_first_call(_: Path) -> Situation:
    backend = Backend(2, backend="eager")
    return Situation(backend.parameters)


@misuse(BACKEND, RewriteError, "serves another model already", "a Backend for each model", "compile with fullgraph")
def a_backend_for_two_models(_: Path) -> Situation:
    backend, model = Backend(2, backend="eager"), net()
    through(backend, net())
    return using(model, lambda model: through(backend, model))


@misuse(BACKEND, ConfigError, "one without mhc.", "the weights of all sites, and mhc._extra_state", "of a Backend")
def a_backend_s_state_without_weights(_: Path) -> Situation:
    backend, model = Backend(2, backend="eager"), net()
    through(backend, model)
    return using(model, lambda model: backend.load_state_dict({}))


@misuse(BACKEND, RewriteError, "no residual add to convert", "one that adds F(x) to x", "explain(model, inputs)")
def a_backend_for_a_model_without_residuals(_: Path) -> Situation:
    return using(own(linear), lambda model: through(Backend(2, backend="eager"), model))


@misuse(BACKEND, UserWarning, "found 0 mHC sites", "a model that is mHC already", "call mhc_compile(model)")
def the_mhc_backend_for_a_plain_model(_: Path) -> Situation:
    def capture(model: nn.Module) -> None:
        def backend(graph: Any, inputs: list[Any]) -> Any:
            found.extend([graph, inputs])
            return graph.forward

        found: list[Any] = []
        torch.compile(model, backend=backend)(X)
        mhc_backend(*found)

    return using(net(), capture)


# ---------------------------------------------------------------------------------------------- ops

OPS = "HyperConnection and its ops"
STREAMS = torch.ones(3, 2, 8)
PRE, RES, BRANCH = torch.ones(3, 2), torch.ones(3, 2, 2), torch.ones(3, 8)


def site(call: Callable[[HyperConnection], Any]) -> Situation:
    made = HyperConnection(2, 8, init="paper")
    return Situation(lambda: call(made), made, lambda: made(STREAMS)[2])


@misuse(OPS, ConfigError, "n is 1", "an integer >= 2", "one stream is the plain residual add")
def a_site_of_one_stream(_: Path) -> Situation:
    return Situation(lambda: HyperConnection(1, 8))


@misuse(OPS, ConfigError, "n is 2.0", "an integer >= 2", "one stream is the plain residual add")
def a_site_of_a_float_number_of_streams(_: Path) -> Situation:
    return Situation(lambda: HyperConnection(2.0, 8))  # type: ignore[arg-type]


@misuse(OPS, ConfigError, "features is 0", "an integer >= 1", "the width C of one stream")
def a_site_without_features(_: Path) -> Situation:
    return Situation(lambda: HyperConnection(2, 0))


@misuse(OPS, ShapeError, "streams is [8]", "[..., n, C]", "expand the trunk first")
def streams_without_a_stream_axis(_: Path) -> Situation:
    return site(lambda made: made(torch.ones(8)))


@misuse(OPS, ShapeError, "phi is [16, 8]", "[n C, n n + 2 n] = [24, 15]", "the last two sizes of the streams")
def streams_of_another_number(_: Path) -> Situation:
    return site(lambda made: made(torch.ones(3, 3, 8)))


@misuse(OPS, ShapeError, "dtype of streams is torch.int64", "float16, bfloat16, float32, float64", "cast them")
def integer_streams(_: Path) -> Situation:
    return site(lambda made: made(STREAMS.long()))


@misuse(OPS, ShapeError, "dtype of phi is torch.float32", "torch.float64 for these streams", "keep the coefficients")
def double_streams_with_single_weights(_: Path) -> Situation:
    return site(lambda made: made(STREAMS.double()))


@misuse(OPS, ShapeError, "device of phi is cpu", "meta, that of the streams", "move the whole model")
def streams_on_another_device(_: Path) -> Situation:
    return site(lambda made: made(STREAMS.to("meta")))


@misuse(OPS, ShapeError, "layout of streams is torch.sparse_coo", "torch.strided", "to_dense()")
def sparse_streams(_: Path) -> Situation:
    return site(lambda made: made(STREAMS.to_sparse()))


@misuse(OPS, RewriteError, "an mHC op is inside torch.func.jvp", "backward()", "mhc_compile.kernels.reference")
def jvp_of_a_site(_: Path) -> Situation:
    return site(lambda made: torch.func.jvp(made, (STREAMS,), (STREAMS,)))


@misuse(OPS, RewriteError, "an mHC op is inside torch.func.grad", "backward()", "mhc_compile.kernels.reference")
def func_grad_of_a_site(_: Path) -> Situation:
    return site(lambda made: torch.func.grad(lambda x: made(x)[0].sum())(STREAMS))


@misuse(OPS, RewriteError, "an mHC op is inside forward-mode", "backward()", "mhc_compile.kernels.reference")
def tangents_of_a_site(_: Path) -> Situation:
    def call(made: HyperConnection) -> None:
        with forward_ad.dual_level():
            made(forward_ad.make_dual(STREAMS, STREAMS))

    return site(call)


@misuse(OPS, ShapeError, "f is [3, 7]", "[..., C] = [3, 8]", "the last two sizes of the streams")
def a_branch_of_another_width(_: Path) -> Situation:
    return Situation(lambda: ops.merge(STREAMS, torch.ones(3, 7), PRE, RES))


@misuse(OPS, ShapeError, "dtype of f is torch.float64", "that promotes to torch.float32", "cast f or the streams")
def a_branch_of_a_wider_dtype(_: Path) -> Situation:
    return Situation(lambda: ops.merge(STREAMS, BRANCH.double(), PRE, RES))


@misuse(OPS, ShapeError, "dtype of pre is torch.bfloat16", "torch.float32 for these streams", "keep the coefficients")
def narrow_coefficients(_: Path) -> Situation:
    return Situation(lambda: ops.aggregate(STREAMS, PRE.bfloat16()))


@misuse(OPS, ShapeError, "logits is [3, 4]", "[..., n, n] with n >= 1", "one square matrix a token")
def logits_that_are_not_square(_: Path) -> Situation:
    return Situation(lambda: ops.sinkhorn(torch.ones(3, 4), 20))


@misuse(OPS, ConfigError, "iterations is 0", "an integer >= 1", "the paper uses 20")
def sinkhorn_without_iterations(_: Path) -> Situation:
    return Situation(lambda: ops.sinkhorn(RES, 0))


@misuse(OPS, ShapeError, "x is [3, 8] of torch.int64", "[..., C] of a floating dtype", "cast it before")
def an_integer_trunk(_: Path) -> Situation:
    return Situation(lambda: ops.expand(BRANCH.long(), 2))
