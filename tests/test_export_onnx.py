"""`export_onnx`: what is in the file, and that two evaluators compute from it what torch does."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import foreign_blocks
import zoo
from graphs import FAR, float_outputs, fresh, randomize
from mhc_compile import ExportError, HyperConnection, export_onnx, mhc_compile
from mhc_compile.codegen import onnx_functions as functions
from mhc_compile.codegen.onnx_functions import DOMAIN, OPSET, Function
from mhc_compile.export import ONNXFile
from mhc_compile.kernels import ops, reference

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


def expect(function: Function, inputs: list[Tensor], wanted: list[Tensor], **attributes: Any) -> None:
    """Both evaluators give what the oracle does, in its dtypes."""
    limit = 2e-3 if any(one.dtype == torch.float16 for one in wanted) else 2e-6
    if all(one.dtype == torch.float64 for one in wanted):
        limit = 1e-7 if attributes else 1e-14  # attributes are float32
    for found in both_evaluators(function, inputs, attributes):
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
    given = dict(eps=0.5, pre_eps=0.25, post_scale=1.5, post_eps=0.125)  # exact in float32
    wanted = reference.coefficients(streams, phi, alpha, bias, **given, groups=groups)[:groups]
    function = functions.coefficients(groups)
    expect(function, [streams, phi, alpha, bias], list(wanted), **{key: given[key] for key in function.attributes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("divisor_eps", [0.0, 0.125])
@pytest.mark.parametrize("shape", [(N, N), (2, T, N, N)])
def test_sinkhorn(dtype: torch.dtype, rows_first: bool, divisor_eps: float, shape: tuple[int, ...]) -> None:
    logits = tensors(dtype, shape)[0] * 3
    function = functions.softmax_sinkhorn() if divisor_eps else functions.sinkhorn()
    options: dict[str, Any] = (
        dict(iterations=3, first=-1, second=-2) if rows_first else dict(iterations=3, first=-2, second=-1)
    )
    options |= dict(divisor_eps=divisor_eps) if divisor_eps else {}
    expect(function, [logits], [reference.sinkhorn(logits, 3, divisor_eps, rows_first)], **options)


def test_sinkhorn_of_large_logits() -> None:
    """The first iteration in log space: exp of these would overflow, and a shift of all of them would underflow."""
    logits = tensors(torch.float32, (T, N, N))[0] * 1000
    wanted = reference.sinkhorn(logits.double(), 20)
    for (got,) in both_evaluators(functions.sinkhorn(), [logits], dict(iterations=20, first=-2, second=-1)):
        assert np.isfinite(got).all()
        assert off(got, wanted) < 1e-4


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

# causal; two trunks and inputs; channels first; shared layers; a scale on the trunk. `python benchmarks/onnx_export.py`
# does the same with all models of the zoo.
SAMPLE = {
    "gpt2": (6, 1),
    "two_modalities": (8, 2),
    "trunk_batch_norm": (4, 2),
    "shared_layers": (6, 1),
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
    assert Counter(groups[DOMAIN])["Expand"] == trunks
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
    assert {one.key: one.value for one in loaded.metadata_props}["mhc_compile.sites"] == "first second"
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """float64 and float16 run; onnxruntime has no bfloat16 on a CPU, where the file is checked and read only."""
    model, x = converted(dtype), x_of(2, 3, 8).to(dtype)
    written = export_onnx(model, x, tmp_path / "model.onnx")
    onnx.checker.check_model(str(written.path), full_check=True)
    if dtype == torch.bfloat16:
        assert in_groups(written.path)["first"] == SITE
        return
    (got,) = session(written.path).run(None, {"x": x.numpy()})
    assert torch.as_tensor(got).dtype == dtype
    assert off(got, model(x)) < (2e-3 if dtype == torch.float16 else 1e-7)


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
    assert set(written.calls) == {*calls, "Expand", "Aggregate", "CoefficientsHead"}
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
