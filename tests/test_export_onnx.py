"""`export_onnx`: what is in the file, and that two evaluators compute from it what torch does."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import product
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.library import CustomOpDef

import foreign_blocks
import zoo
from graphs import FAR, float_outputs, fresh, randomize
from mhc_compile import ExportError, HyperConnection, export_onnx, mhc_compile
from mhc_compile.codegen import onnx_coefficients, onnx_constraints
from mhc_compile.codegen import onnx_functions as functions
from mhc_compile.codegen.onnx import _Table
from mhc_compile.codegen.onnx_functions import DOMAIN, OPSET, Function
from mhc_compile.constraints import CONSTRAINTS, Constraint
from mhc_compile.export import ONNXFile
from mhc_compile.kernels import manifold_ops, ops, reference
from test_manifolds import FORMS

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5  # of scale, float32

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Compiled frames of one test must not steer another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- running files


def session(path: Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path if isinstance(path, bytes) else str(path), options)


def as_feed(inputs: dict[str, Any], written: ONNXFile) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.numpy() for name, value in inputs.items() if name in written.inputs}


def off(got: Any, want: Tensor) -> float:
    """The largest error, in units of the largest value."""
    assert tuple(got.shape) == tuple(want.shape)
    got, want = torch.as_tensor(got).detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


def in_groups(path: Path) -> dict[str, list[str]]:
    """The calls of our functions by site, in the order of the graph."""
    found: dict[str, list[str]] = {}
    for node in onnx.load(path).graph.node:
        if node.domain == DOMAIN:
            site, _, _ = node.name.rpartition("/")
            found.setdefault(site, []).append(node.op_type)
    return found


SITE = ["Coefficients", "Sinkhorn", "Aggregate", "Merge"]


# ---------------------------------------------------------------------------------------------- functions

T, N, C = 5, 3, 6
STREAM_DTYPES = [torch.float32, torch.float64, torch.float16]


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def one_call(function: Function, inputs: list[Tensor], attributes: dict[str, Any]) -> onnx.ModelProto:
    """A model that calls one function. Sizes of tokens are not given."""
    infos = [
        onnx.helper.make_tensor_value_info(
            name,
            onnx.helper.np_dtype_to_tensor_dtype(value.numpy().dtype),
            [f"{name}_{axis}" for axis in range(value.dim())],
        )
        for name, value in zip(function.inputs, inputs, strict=True)
    ]
    results = [onnx.helper.make_empty_tensor_value_info(name) for name in function.outputs]
    node = onnx.helper.make_node(function.name, function.inputs, function.outputs, domain=DOMAIN, **attributes)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "call", infos, results),
        functions=[function.proto()],
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def both_evaluators(
    function: Function, inputs: list[Tensor], attributes: dict[str, Any] | None = None
) -> list[list[Any]]:
    model = one_call(function, inputs, attributes or {})
    feed = {name: value.numpy() for name, value in zip(function.inputs, inputs, strict=True)}
    return [list(session(model.SerializeToString()).run(None, feed)), list(ReferenceEvaluator(model).run(None, feed))]


def expect(function: Function, inputs: list[Tensor], wanted: list[Tensor], **numbers: float) -> None:
    """Both evaluators give what the oracle does, in its dtypes."""
    limit = 2e-3 if any(one.dtype == torch.float16 for one in wanted) else 2e-6
    if all(one.dtype == torch.float64 for one in wanted):
        limit = 1e-14
    for found in both_evaluators(function, inputs, function.given(**numbers)):
        for got, want in zip(found, wanted, strict=True):
            assert torch.as_tensor(got).dtype == want.dtype
            assert off(got, want) < limit


def parameters_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", STREAM_DTYPES)
@pytest.mark.parametrize("groups", [3, 2, 1])
def test_coefficients(dtype: torch.dtype, groups: int) -> None:
    own = parameters_dtype(dtype)
    columns = (N, 2 * N, 2 * N + N * N)[groups - 1]
    (streams,) = tensors(dtype, (2, T, N, C))
    phi, alpha, bias = tensors(own, (N * C, columns), (groups,), (columns,))
    given = dict(eps=0.1, pre_eps=0.2, post_scale=1.3, post_eps=0.3)  # none is exact in float32
    wanted = reference.coefficients(streams, phi, alpha, bias, **given, groups=groups)[:groups]
    function = onnx_coefficients.coefficients(groups, dtype == torch.float64)
    expect(function, [streams, phi, alpha, bias], list(wanted), **given)


# What `gates` may be asked for, but for tanh of nothing.
GATES = [
    dict(pre=pre, post=post, logits=logits, bounded=bounded, dynamic=dynamic)
    for pre, post, bounded, dynamic in product([True, False], repeat=4)
    for logits in onnx_coefficients.LOGITS
    if pre or post or logits != "none" or bounded or not dynamic
]


@pytest.mark.parametrize("dtype", STREAM_DTYPES)
@pytest.mark.parametrize("form", GATES, ids=lambda form: "-".join(map(str, form.values())))
def test_gates(form: dict[str, Any], dtype: torch.dtype) -> None:
    """Every combination of what is learned, bounded or not, of the streams or constant, with each number of logits."""
    own, dynamic = parameters_dtype(dtype), form["dynamic"]
    logits = {"matrix": N * N, "list": factorial(N), "none": 0}[form["logits"]]
    columns, groups = N * (form["pre"] + form["post"]) + logits, form["pre"] + form["post"] + (logits > 0)
    (streams,) = tensors(dtype, (2, T, N, C))
    phi, alpha, bias = tensors(own, (N * C, columns) if form["bounded"] else (C, columns // N), (groups,), (columns,))
    weights = (phi, alpha) if dynamic else (None, None)
    rest = (form["pre"], form["post"], form["bounded"])
    wanted = reference.gates(streams, *weights, bias, 0.1, logits, *rest)
    inputs = [streams, phi, alpha, bias] if dynamic else [streams, bias]
    function = onnx_coefficients.gates(**form, double=dtype == torch.float64)
    expect(function, inputs, list(wanted[: 3 if logits else 2]), eps=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("divisor_eps", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(N, N), (2, T, N, N)])
def test_sinkhorn(dtype: torch.dtype, rows_first: bool, divisor_eps: float, shape: tuple[int, ...]) -> None:
    logits = tensors(dtype, shape)[0] * 3
    function = functions.softmax_sinkhorn(dtype == torch.float64) if divisor_eps else functions.sinkhorn()
    first, second = (-1, -2) if rows_first else (-2, -1)
    options = dict(iterations=3, first=first, second=second, divisor_eps=divisor_eps)
    expect(function, [logits], [reference.sinkhorn(logits, 3, divisor_eps, rows_first)], **options)


def test_sinkhorn_of_large_logits() -> None:
    """The first iteration in log space: exp of these would overflow, and a shift of all of them would underflow."""
    logits = tensors(torch.float32, (T, N, N))[0] * 1000
    wanted = reference.sinkhorn(logits.double(), 20)
    for (got,) in both_evaluators(functions.sinkhorn(), [logits], dict(iterations=20, first=-2, second=-1)):
        assert np.isfinite(got).all()
        assert off(got, wanted) < 1e-4


def logits_of(entry: Constraint, n: int, dtype: torch.dtype, std: float) -> Tensor:
    count = entry.count(n)
    (logits,) = tensors(dtype, (2, 200, *((n, n) if count == n * n else (count,))))
    return logits * std


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constrain(name: str, n: int, dtype: torch.dtype) -> None:
    entry = CONSTRAINTS[name]
    n = min(n, entry.most)
    function, numbers = onnx_constraints.FUNCTIONS[name](n)
    for std in (0.3, 3.0):
        logits = logits_of(entry, n, dtype, std)
        expect(function, [logits], [entry.res(logits, n)], **numbers)


def far_off(name: str, n: int, dtype: torch.dtype, std: float) -> tuple[float, float, list[Tensor]]:
    """Of logits of a size: errors of torch and of the function, the larger of both evaluators, and what these gave."""
    entry = CONSTRAINTS[name]
    logits = logits_of(entry, n, dtype, std)
    exact = entry.res(logits.double(), n)
    function, numbers = onnx_constraints.FUNCTIONS[name](n)
    found = [torch.as_tensor(one) for (one,) in both_evaluators(function, [logits], function.given(**numbers))]
    return off(entry.res(logits, n), exact), max(off(one, exact) for one in found), found


@pytest.mark.parametrize("std", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_the_cayley_transform_of_large_logits(n: int, std: float) -> None:
    """As near as torch's own solve in the same dtype, and a rotation: without a choice of pivots it is neither."""
    by_torch, ours, found = far_off("orthogonal", n, torch.float32, std)
    assert ours < 3 * by_torch + 1e-6
    for res in found:
        assert ((res @ res.mT).double() - torch.eye(n)).abs().max() < 2e-6
    _, ours, _ = far_off("orthogonal", n, torch.float64, std)
    assert ours < 1e-15 * max(std, 10)


@pytest.mark.parametrize("std", [1e-30, 1e-3, 1000.0])
@pytest.mark.parametrize("name", ["lite", "spectral"])
def test_large_and_small_logits(name: str, std: float) -> None:
    by_torch, ours, _ = far_off(name, 4, torch.float32, std)
    assert ours < 3 * by_torch + 1e-6


def test_a_zero_matrix_stays_zero() -> None:
    function, numbers = onnx_constraints.FUNCTIONS["spectral"](4)
    for (res,) in both_evaluators(function, [torch.zeros(2, 3, 4, 4)], function.given(**numbers)):
        assert not res.any()


def every_function() -> list[Function]:
    return [
        *(onnx_coefficients.coefficients(groups, double) for groups in (1, 2, 3) for double in (False, True)),
        *(onnx_coefficients.gates(**form, double=double) for form in GATES for double in (False, True)),
        *(
            make(n)[0]
            for name, make in onnx_constraints.FUNCTIONS.items()
            for n in range(1, min(CONSTRAINTS[name].most, 8) + 1)
        ),
        *(functions.softmax_sinkhorn(double) for double in (False, True)),
        *(functions.readout(double) for double in (False, True)),
        *(functions.merge(*form) for form in product([False, True], repeat=3) if form[0] or not form[1]),
        *(functions.expand(), functions.aggregate(), functions.sinkhorn()),
    ]


def test_a_name_is_that_of_one_body_and_of_no_op_of_onnx() -> None:
    """What joins files takes functions of one name for one function, and renames them whatever their domain."""
    bodies: dict[str, bytes] = {}
    for function in every_function():
        body = function.proto().SerializeToString(deterministic=True)
        assert bodies.setdefault(function.name, body) == body, function.name
    assert bodies.keys().isdisjoint(schema.name for schema in onnx.defs.get_all_schemas_with_history())


@pytest.mark.parametrize("dtype", STREAM_DTYPES)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("mix", ["given", "transposed", "identity"])
def test_merge(dtype: torch.dtype, rounded: bool, mix: str) -> None:
    streams, f = tensors(dtype, (2, T, N, C), (2, T, C))
    post, res = tensors(parameters_dtype(dtype), (2, T, N), (2, T, N, N))
    mixed = mix != "identity"
    wanted = reference.merge(streams, f, post, res if mixed else None, mix == "transposed", rounded)
    inputs = [streams, f, post, *([res] if mixed else [])]
    expect(functions.merge(mixed, mix == "transposed", rounded), inputs, [wanted])


@pytest.mark.parametrize("dtype", STREAM_DTYPES)
def test_the_other_functions(dtype: torch.dtype) -> None:
    streams, x = tensors(dtype, (2, T, N, C), (T, C))
    (pre,) = tensors(parameters_dtype(dtype), (2, T, N))
    expect(functions.aggregate(), [streams, pre], [reference.aggregate(streams, pre)])
    expect(functions.readout(dtype == torch.float64), [streams], [reference.readout(streams)])
    for got, *_ in both_evaluators(functions.expand(), [x], dict(n=4)):
        assert torch.equal(torch.as_tensor(got), reference.expand(x, 4))


# ---------------------------------------------------------------------------------------------- converted models

# causal; two trunks and inputs; channels first; a scale on the trunk. `python benchmarks/onnx_export.py`
# does the same with all models of the zoo.
SAMPLE = {
    "gpt2": (6, 1),
    "two_modalities": (8, 2),
    "trunk_batch_norm": (4, 2),
    "highway": (3, 1),
}


def other_inputs(inputs: dict[str, Any], batch: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)

    def other(name: str, value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn((batch, *value.shape[1:]), generator=generator)
        size = length if name == "input_ids" else length - 1
        return torch.randint(3, zoo.VOCAB, (batch, size), generator=generator)

    return {name: other(name, value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return float_outputs(model(**inputs))


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.cases(1)
def test_a_converted_model(name: str, tmp_path: Path) -> None:
    """At three shapes, one of them a batch of one; a group of four calls a site; files that others can read."""
    model, inputs = fresh(name)
    plain = outputs(model, inputs)
    mhc_compile(model, n=4, backend="eager", example_inputs=inputs)
    randomize(model)
    written = export_onnx(model, inputs, tmp_path / "model.onnx")
    onnx.checker.check_model(str(written.path), full_check=True)
    groups = in_groups(written.path)
    sites, trunks = SAMPLE[name]
    assert len(written.sites) == sites
    assert [site for site in groups if site != DOMAIN] == list(written.sites)
    assert all(groups[site] == SITE for site in written.sites)
    assert Counter(groups[DOMAIN])["ExpandStreams"] == trunks
    run = session(written.path)
    assert off(outputs(model, inputs)[0], plain[0]) > FAR
    for given in (inputs, other_inputs(inputs, 3, 5), other_inputs(inputs, 1, 7)):
        for got, want in zip(run.run(None, as_feed(given, written)), outputs(model, given), strict=True):
            assert off(got, want) < TOLERANCE


class Small(nn.Module):
    """Two residual blocks; dropout tells the modes apart."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.first(self.norm(x)))
        return x + self.dropout(self.second(torch.tanh(x)))


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def converted(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model = Small().to(dtype).eval()
    mhc_compile(model, **{"n": 4, "backend": "eager", "example_inputs": x_of(2, 3, 8).to(dtype), **options})
    if model.mhc.state_dict():
        randomize(model)
    return model


def test_the_reference_evaluator_agrees(tmp_path: Path) -> None:
    model = converted()
    written = export_onnx(model, x_of(2, 3, 8), tmp_path / "model.onnx")
    loaded = onnx.shape_inference.infer_shapes(onnx.load(written.path), strict_mode=True, data_prop=True)
    for shape in [(2, 3, 8), (4, 7, 8), (1, 1, 8)]:
        x = x_of(*shape)
        (got,) = ReferenceEvaluator(loaded).run(None, {"x": x.numpy()})
        assert off(got, model(x)) < TOLERANCE
    assert written.inputs == {"x": ("batch", "x_1", 8)} and written.outputs == {"output": ("batch", "x_1", 8)}
    assert written.sites == ("first", "second") and written.opset == 20 and written.data is None
    assert "2 sites, opset 20" in str(written) and "inputs: x [batch, x_1, 8]" in str(written)


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    """Names of weights as in the state dict, sites in the metadata, formulas beside the functions."""
    model = converted()
    written = export_onnx(model, x_of(2, 3, 8), tmp_path / "model.onnx")
    loaded = onnx.load(written.path)
    weights = {one.name for one in loaded.graph.initializer}
    assert {"mhc.first.phi", "mhc.second.alpha", "second.bias", "norm.weight"} <= weights
    assert {one.domain: one.version for one in loaded.opset_import} == {"": OPSET, DOMAIN: 1}
    assert sites_of(loaded) == [("first/merge", "first"), ("second/merge", "second")]
    assert [one.name for one in loaded.functions if one.domain == DOMAIN] == [*dict.fromkeys(written.calls)]
    assert all(one.doc_string for one in loaded.functions if one.domain == DOMAIN)
    sinkhorn = next(node for node in loaded.graph.node if node.op_type == "Sinkhorn")
    assert sinkhorn.name == "first/sinkhorn"
    assert {one.name: onnx.helper.get_attribute_value(one) for one in sinkhorn.attribute} == dict(
        iterations=20, first=-2, second=-1
    )


def test_one_stream_is_plain_adds(tmp_path: Path) -> None:
    model = converted(n=1)
    x = x_of(2, 3, 8)
    written = export_onnx(model, x, tmp_path / "model.onnx")
    assert not written.calls and not in_groups(written.path) and "plain add" in str(written)
    assert off(session(written.path).run(None, {"x": x.numpy()})[0], Small().eval()(x)) < TOLERANCE


def test_a_model_in_training_mode_is_exported_in_eval_mode(tmp_path: Path) -> None:
    model = converted()
    x = x_of(2, 3, 8)
    expected = model(x)
    model.train()
    model.norm.eval()
    before = [module.training for module in model.modules()]
    written = export_onnx(model, x, tmp_path / "model.onnx")
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2
    assert any("training mode" in note for note in written.notes)
    assert off(session(written.path).run(None, {"x": x.numpy()})[0], expected) < TOLERANCE


def test_sizes_are_fixed_or_named_as_asked(tmp_path: Path) -> None:
    model, x = converted(), x_of(2, 3, 8)
    fixed = export_onnx(model, x, tmp_path / "fixed.onnx", dynamic=False)
    assert fixed.inputs == {"x": (2, 3, 8)}
    some = export_onnx(model, x, tmp_path / "some.onnx", dynamic=({0: torch.export.Dim("rows")},))
    assert some.inputs == {"x": ("batch", 3, 8)}
    assert off(session(some.path).run(None, {"x": x_of(5, 3, 8).numpy()})[0], model(x_of(5, 3, 8))) < TOLERANCE


def test_weights_beside_the_file(tmp_path: Path) -> None:
    model, x = converted(), x_of(2, 3, 8)
    written = export_onnx(model, x, tmp_path / "model.onnx", external_data=True)
    assert written.data == tmp_path / "model.onnx.data" and written.data.is_file()
    assert str(written.data) in str(written)
    onnx.checker.check_model(str(written.path), full_check=True)
    assert off(session(written.path).run(None, {"x": x.numpy()})[0], model(x)) < TOLERANCE


# ---------------------------------------------------------------------------------------------- forms of sites


class Chain(nn.Module):
    """Blocks of one site each, called `blocks.0` and so on, without a norm, whose eps is float32 in any ONNX file."""

    def __init__(self, count: int, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, *self.blocks) if self.twice else self.blocks:
            x = x + torch.tanh(block(x))
        return x


def mixed(*kinds: str, **options: Any) -> dict[str, Any]:
    """Options of a conversion in which each site has a constraint of its own."""
    return {"constraint": kinds[0], **options, "site_constraints": {f"blocks.{i}": one for i, one in enumerate(kinds)}}


def chain(options: dict[str, Any], dtype: torch.dtype = torch.float32, **form: Any) -> nn.Module:
    """A converted chain, far from the plain model, with all its mHC weights at random."""
    x = x_of(2, 3, 8).to(dtype)
    model = Chain(len(options.get("site_constraints", "12")), **form).to(dtype).eval()
    plain = model(x)
    mhc_compile(model, **{"backend": "eager", "example_inputs": x, **options})
    randomize(model, scale=0.5)
    assert off(model(x), plain) > FAR
    return model


ALL = tuple(CONSTRAINTS)
FEW = "lite", "unconstrained"  # what tells sites with a fixed res apart is whether their gates are bounded
TURNING = "orthogonal", "unconstrained", "spectral"  # rows need not sum to 1
# What a conversion may be asked for, in one model or several: options, and functions that are called then.
CHAINS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "every constraint": (
        mixed(*ALL, n=4),
        {"Coefficients", "CoefficientsUnmixed", "GatesListed", "GatesTanh"}
        | {"Sinkhorn", "Lite4", "Orthogonal", "Spectral", "Unconstrained", "Merge", "MergeUnmixed"},
    ),
    "static": (
        mixed(*ALL, n=3, dynamic=False),
        {"GatesStatic", "GatesStaticUnmixed", "GatesStaticListed", "GatesStaticTanh", "Lite3", "Orthogonal"},
    ),
    "pre fixed": (
        mixed(*ALL, n=2, fixed=("pre",)),
        {"GatesPreFixed", "GatesPreFixedUnmixed", "GatesPreFixedListed", "GatesTanhPreFixed", "Lite2"},
    ),
    "post fixed": (
        mixed(*TURNING, n=8, fixed=("post",)),
        {"GatesPostFixed", "GatesTanhPostFixed", "Orthogonal", "Spectral"},
    ),
    "res fixed": (mixed(*FEW, n=4, fixed=("res",)), {"CoefficientsUnmixed", "GatesTanhUnmixed"}),
    "pre and res fixed": (
        mixed(*FEW, n=4, fixed=("pre", "res")),
        {"GatesPreFixedUnmixed", "GatesTanhPreFixedUnmixed"},
    ),
    "static, res fixed": (
        mixed(*FEW, n=4, dynamic=False, fixed=("res",)),
        {"GatesStaticUnmixed", "GatesStaticTanhUnmixed"},
    ),
    "static, post fixed": (
        mixed(*TURNING, n=4, dynamic=False, fixed=("post",)),
        {"GatesStaticPostFixed", "GatesStaticTanhPostFixed"},
    ),
    "single pass": (mixed(*ALL, n=4, single_pass=True), {"GatesListed", "GatesTanh", "Orthogonal"}),
    "numbers": (dict(n=4, iterations=1, eps=0.3, implicit_gradient=True), {"Coefficients", "Sinkhorn"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.sweep] * one.startswith("static, ")) for one in CHAINS]
)
def test_every_form_of_a_site(name: str, tmp_path: Path) -> None:
    options, called = CHAINS[name]
    model = chain(options)
    written = export_onnx(model, x_of(2, 3, 8), tmp_path / "model.onnx")
    onnx.checker.check_model(str(written.path), full_check=True)
    assert written.calls.keys() >= called and len(written.sites) == len(model.blocks)
    runs = [session(written.path), ReferenceEvaluator(str(written.path))]
    for x in (x_of(2, 3, 8), x_of(3, 5, 8), x_of(1, 1, 8)):
        for run in runs:
            assert off(run.run(None, {"x": x.numpy()})[0], model(x)) < TOLERANCE


@pytest.mark.sweep
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_with_every_number_of_streams(name: str, n: int, tmp_path: Path) -> None:
    options = FORMS[name] | dict(n=min(n, CONSTRAINTS[FORMS[name].get("constraint", "sinkhorn")].most))
    model, x = chain(options, torch.float64), x_of(3, 5, 8).double()
    written = export_onnx(model, x, tmp_path / "model.onnx", dynamic=False)
    onnx.checker.check_model(str(written.path), full_check=True)
    assert off(session(written.path).run(None, {"x": x.numpy()})[0], model(x)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """float64 and float16 run; onnxruntime has no bfloat16 on a CPU, where the file is checked and read only.

    eps is no float32, and beside streams of this size its rounding would be seen in float64.
    """
    model, x = chain(mixed(*ALL, n=4, eps=1e-3), dtype), x_of(2, 3, 8).to(dtype) / 30
    written = export_onnx(model, x, tmp_path / "model.onnx")
    onnx.checker.check_model(str(written.path), full_check=True)
    double = "Double" * (dtype == torch.float64)
    assert in_groups(written.path)["blocks.0"] == [f"Coefficients{double}", *SITE[1:]]
    assert in_groups(written.path)["blocks.1"] == [f"GatesListed{double}", "Lite4", *SITE[2:]]
    if dtype == torch.bfloat16:
        return
    (got,) = session(written.path).run(None, {"x": x.numpy()})
    assert torch.as_tensor(got).dtype == dtype
    assert off(got, model(x)) < (2e-3 if dtype == torch.float16 else 1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_layers_that_are_applied_twice(tied: bool, tmp_path: Path) -> None:
    model, x = chain(dict(n=4, constraint="orthogonal", tie_shared=tied), twice=True), x_of(2, 3, 8)
    written = export_onnx(model, x, tmp_path / "model.onnx")
    weights = [one.name for one in onnx.load(written.path).graph.initializer]
    assert written.calls["Orthogonal"] == 4
    assert len([name for name in weights if name.endswith("phi")]) == (2 if tied else 4)
    assert off(session(written.path).run(None, {"x": x.numpy()})[0], model(x)) < TOLERANCE


def test_every_op_and_every_constraint_has_a_translation() -> None:
    """The ops of level 1 are those of two files; graphs that are written out hold no backwards and no anchor.

    What the rewrite and the matcher emit is among them.
    """
    defined = {
        one._opoverload
        for module in (ops, manifold_ops)
        for one in vars(module).values()
        if isinstance(one, CustomOpDef) and not one._name.endswith("_backward")
    }
    known = _Table().translations()
    assert known.keys() == defined - {torch.ops.mhc.anchor.default}
    package = ROOT / "mhc_compile"
    for path in (package / "site_form.py", package / "passes" / "expand.py", *package.glob("passes/match*.py")):
        named = {
            getattr(torch.ops.mhc, name).default for name in re.findall(r"\bmhc\.(\w+)\.default", path.read_text())
        }
        assert known.keys() >= named, path.name
    assert onnx_constraints.FUNCTIONS.keys() == CONSTRAINTS.keys()


@pytest.mark.parametrize("fault", ["an op without a translation", "a translation that fails", "a constraint"])
def test_a_gap_of_ours_is_called_ours(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its name, and without a line of the model."""
    model = chain(dict(n=2, constraint="orthogonal"))
    known, what = _Table().translations(), "the op mhc.constrain.default"
    if fault.startswith("an op"):
        del known[torch.ops.mhc.constrain.default]
    elif fault.startswith("a translation"):
        known[torch.ops.mhc.constrain.default] = lambda logits, kind, n: {}[kind]
    else:
        monkeypatch.delitem(onnx_constraints.FUNCTIONS, "orthogonal")
        what = "the constraint 'orthogonal'"
    monkeypatch.setattr(_Table, "translations", lambda table: known)
    with pytest.raises(
        ExportError, match=f"{what} is one that export_onnx cannot write, which is a fault of"
    ) as raised:
        export_onnx(model, x_of(2, 3, 8), tmp_path / "model.onnx")
    assert raised.value.line is None and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- files joined


def sites_of(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """The names of the calls that end a site, and the site that their metadata name."""
    merges = [node for node in model.graph.node if "Merge" in node.op_type]
    return [(node.name, {one.key: one.value for one in node.metadata_props}["mhc_site"]) for node in merges]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[nn.Module, onnx.ModelProto]]:
    """Two models with other sites, forms, numbers of streams and functions, and a layer that is expanded."""
    path = tmp_path_factory.mktemp("pair") / "model.onnx"
    models = [chain(mixed("lite", "unconstrained", n=4)), chain(dict(n=3, constraint="lite", fixed=("pre",)))]
    return [(one, onnx.load(export_onnx(one, x_of(2, 3, 8), path).path)) for one in models]


@pytest.mark.parametrize("io_map", [[], [("output", "x")]], ids=["side by side", "one after the other"])
def test_two_files_become_one(io_map: list[tuple[str, str]], pair: list[tuple[nn.Module, onnx.ModelProto]]) -> None:
    """Names that clash get prefixes, as those of any two files; what the files say of their sites stays."""
    (first, one), (second, other) = pair
    both = onnx.compose.merge_models(one, other, io_map=io_map, prefix1="first/", prefix2="second/")
    onnx.checker.check_model(both, full_check=True)
    x, y = x_of(2, 3, 8), x_of(4, 5, 8)
    feed, wanted = {"first/x": x.numpy(), "second/x": y.numpy()}, [first(x), second(y)]
    if io_map:
        feed, wanted = {"first/x": x.numpy()}, [second(first(x).detach())]
    for found in (session(both.SerializeToString()).run(None, feed), ReferenceEvaluator(both).run(None, feed)):
        for got, want in zip(found, wanted, strict=True):
            assert off(got, want) < TOLERANCE
    names = [("first/", site) for _, site in sites_of(one)] + [("second/", site) for _, site in sites_of(other)]
    assert len(names) == 4 and sites_of(both) == [(f"{prefix}{site}/merge", site) for prefix, site in names]


def test_files_say_nothing_of_themselves_that_others_contradict(
    pair: list[tuple[nn.Module, onnx.ModelProto]],
) -> None:
    """Two values of one key, or two versions of a domain, are a conflict for what joins files."""
    facts = [
        (one.ir_version, {(entry.domain, entry.version) for entry in one.opset_import}, list(one.metadata_props))
        for _, one in pair
    ]
    assert facts[0] == facts[1]


# ---------------------------------------------------------------------------------------------- mHC of its own


class Own(nn.Module):
    """Calls the ops itself, in a convention of choice: a site, and a head."""

    def __init__(self, groups: int = 3, transposed: bool = False, rounded: bool = False, **sinkhorn: Any) -> None:
        super().__init__()
        columns = 2 * N + (N * N if groups == 3 else 0)
        sizes = [(N * C, columns), (groups,), (columns,), (N * C, N), (1,), (N,)]
        self.weights = nn.ParameterList(tensors(torch.float32, *sizes))
        self.groups, self.form, self.sinkhorn = groups, (transposed, rounded), sinkhorn

    def forward(self, x: Tensor) -> Tensor:
        streams = ops.expand(x, N) * torch.linspace(0.5, 1.5, N)[:, None]
        gates = (1e-6, 1e-3, 1.5, 1e-4, self.groups)
        pre, post, logits = ops.coefficients(streams, *self.weights[:3], *gates)
        res = ops.sinkhorn(logits, **self.sinkhorn) if self.groups == 3 else None
        streams = ops.merge(streams, torch.tanh(ops.aggregate(streams, pre)), post, res, *self.form)
        pre, _, _ = ops.coefficients(streams, *self.weights[3:], 1e-6, 1e-3, groups=1)
        return ops.aggregate(streams, pre)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        (dict(iterations=4), ["Coefficients", "Sinkhorn", "Merge"]),
        (dict(iterations=4, rows_first=True), ["Coefficients", "Sinkhorn", "Merge"]),
        (
            dict(iterations=4, rows_first=True, divisor_eps=1e-3, transposed=True, rounded=True),
            ["Coefficients", "SoftmaxSinkhorn", "MergeTransposedRounded"],
        ),
        (dict(iterations=4, implicit=True, rounded=True), ["Coefficients", "Sinkhorn", "MergeRounded"]),
        (dict(groups=2), ["CoefficientsUnmixed", "MergeUnmixed"]),
    ],
)
def test_every_convention(options: dict[str, Any], calls: list[str], tmp_path: Path) -> None:
    model = Own(**options).eval()
    x = x_of(2, T, C)
    written = export_onnx(model, x, tmp_path / "model.onnx")
    assert set(written.calls) == {*calls, "ExpandStreams", "Aggregate", "CoefficientsHead"}
    onnx.checker.check_model(str(written.path), full_check=True)
    for given in (x, x_of(3, 2, C)):
        assert off(session(written.path).run(None, {"x": given.numpy()})[0], model(given)) < TOLERANCE


def test_a_block_written_by_hand(tmp_path: Path) -> None:
    """Its formulas are found and become calls, with the function that they had."""
    torch.manual_seed(0)
    model = foreign_blocks.Block().eval()
    x = x_of(2, 5, foreign_blocks.C)
    written = export_onnx(model, x, tmp_path / "model.onnx")
    assert written.calls == dict(Coefficients=2, Sinkhorn=2, Aggregate=2, Merge=2, ReadOut=1)
    assert written.sites == ("coefficients.0", "coefficients.1")
    for given in (x, x_of(3, 2, foreign_blocks.C)):
        assert off(session(written.path).run(None, {"x": given.numpy()})[0], model(given)) < TOLERANCE


class CastNorm(foreign_blocks.Coefficients):
    """The norm before the product, with a cast in it (DeepSeek-V4): torch.export checks the dtype of what is cast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, flat = foreign_blocks.N, x.flatten(-2)
        rms = torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + foreign_blocks.EPS).to(x.dtype)
        z = (flat * rms) @ self.phi
        pre = torch.sigmoid(self.alpha[0] * z[..., :n] + self.bias[:n])
        post = 2 * torch.sigmoid(self.alpha[1] * z[..., n : 2 * n] + self.bias[n : 2 * n])
        res = self.alpha[2] * z[..., 2 * n :] + self.bias[2 * n :]
        return pre, post, foreign_blocks.deepseek(res.unflatten(-1, (n, n)))


def test_checks_of_dtypes_do_not_hide_a_site(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = foreign_blocks.Block(CastNorm).eval()
    x = x_of(2, 5, foreign_blocks.C)
    written = export_onnx(model, x, tmp_path / "model.onnx")
    assert written.calls["Coefficients"] == written.calls["SoftmaxSinkhorn"] == 2 and len(written.sites) == 2
    assert off(session(written.path).run(None, {"x": x.numpy()})[0], model(x)) < TOLERANCE


def test_a_module_of_the_package(tmp_path: Path) -> None:
    site = HyperConnection(4, 8, init="paper")
    x = x_of(2, 5, 4, 8)
    written = export_onnx(site, x, tmp_path / "model.onnx")
    assert written.calls == dict(Coefficients=1, Sinkhorn=1)
    for got, want in zip(session(written.path).run(None, {"streams": x.numpy()}), site(x), strict=True):
        assert off(got, want) < TOLERANCE


# ---------------------------------------------------------------------------------------------- refusals


class Unknown(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.special.bessel_j0(x).sum()


def test_an_op_without_onnx_form_is_named_with_its_line(tmp_path: Path) -> None:
    model = Unknown().eval()
    mhc_compile(model, n=2, backend="eager", example_inputs=x_of(2, 3, 8))
    with pytest.raises(ExportError, match=r"op of the model is \S*bessel_j0.default") as raised:
        export_onnx(model, x_of(2, 3, 8), tmp_path / "model.onnx")
    assert "bessel_j0(x).sum()" in str(raised.value.line)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_error_names_it() -> None:
    """The package imports without onnx; the export says what to install."""
    script = (
        "import sys; sys.modules['onnx'] = None\n"
        "import torch, mhc_compile\n"
        "model = mhc_compile.HyperConnection(2, 4)\n"
        "try: mhc_compile.export_onnx(model, torch.ones(3, 2, 4))\n"
        "except mhc_compile.ExportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "pip install 'mhc-compile[onnx]'" in done.stdout, done.stderr
