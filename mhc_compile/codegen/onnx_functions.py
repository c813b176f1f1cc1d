"""The mHC ops as functions of the ONNX domain `mhc`, whose bodies are standard ops of opset 20.

One function for each term of a site (arXiv 2512.24880, eq. 7 to 19), as `kernels/reference.py` states it. A body knows
no sizes and no dtypes: n, C and the tokens come from the shapes of its inputs, and streams are computed with in the
dtype of the coefficients. What changes a body and not a number gives the function another name: `MergeTransposed`, etc.
Attributes reach a body through `Constant` alone, as ONNX's own evaluator knows of no other way. Those that are numbers
are float32, as ONNX has no others; the functions of a float64 model (`...Double`) have scalar tensors in their place.

Coefficients are in `onnx_coefficients`, what makes res in other ways than Sinkhorn's in `onnx_constraints`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.parser

DOMAIN = "mhc"
VERSION = 1  # of the domain: to be raised when a function changes what it computes
OPSET = 20  # of the standard ops in the bodies, and in the files


@dataclass(frozen=True)
class Function:
    """One function: its signature, the formula for readers, and the body in ONNX's text form.

    attributes: name -> type, a key of KINDS; a call gives all of them.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    formula: str
    body: str
    attributes: Mapping[str, Kind] = field(default_factory=dict)

    def proto(self) -> onnx.FunctionProto:
        """The function as a file holds it."""
        head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        given = f" <{', '.join(self.attributes)}>" if self.attributes else ""
        signature = f"{self.name}{given} ({', '.join(self.inputs)}) => ({', '.join(self.outputs)})\n"
        made: onnx.FunctionProto = onnx.parser.parse_function(f"{head}{signature}{{\n{self.body}}}\n")
        made.doc_string = self.formula
        return made

    def given(self, **numbers: float) -> dict[str, Any]:
        """The attributes of a call, of these numbers or more, as ONNX holds them."""
        return {name: KINDS[kind][1](numbers[name]) for name, kind in self.attributes.items()}


def _exact(number: float) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.array(number, np.float64))


Kind = type[int] | type[float] | type[onnx.TensorProto]
# kind of an attribute -> its type in ONNX, what makes a number one, the attribute of `Constant` that takes it
KINDS: dict[Kind, tuple[onnx.defs.OpSchema.AttrType, Any, str]] = {
    int: (onnx.defs.OpSchema.AttrType.INT, int, "value_int: int"),
    float: (onnx.defs.OpSchema.AttrType.FLOAT, float, "value_float: float"),
    onnx.TensorProto: (onnx.defs.OpSchema.AttrType.TENSOR, _exact, "value: tensor"),
}


def real(double: bool) -> Kind:
    """The kind of an attribute that is a number of any size: exact in float64 models, float32 in others."""
    return onnx.TensorProto if double else float


def number(name: str, double: bool, like: str) -> str:
    """Lines that give the attribute `name` as a scalar of that name, in the dtype of `like`."""
    return f"""
        {name}_given = Constant <{KINDS[real(double)][2]} = @{name}> ()
        {name} = CastLike ({name}_given, {like})
    """


def expand() -> Function:
    """The entry of a trunk."""
    body = """
        minus_two = Constant <value_ints = [-2]> ()
        wide = Unsqueeze (x, minus_two)
        zero = Constant <value_ints = [0]> ()
        one = Constant <value_ints = [1]> ()
        n_scalar = Constant <value_int: int = @n> ()
        n_list = Unsqueeze (n_scalar, zero)
        sizes = Concat <axis = 0> (n_list, one)
        streams = Expand (wide, sizes)
    """
    return Function("ExpandStreams", ("x",), ("streams",), "X_i = x for each of n streams", body, {"n": int})


def readout(double: bool) -> Function:
    """The mean over streams, summed in float32, or in float64 where the streams are."""
    body = f"""
        x = Cast <to = {onnx.TensorProto.DOUBLE if double else onnx.TensorProto.FLOAT}> (streams)
        minus_two = Constant <value_ints = [-2]> ()
        mean = ReduceMean <keepdims = 0> (x, minus_two)
        y = CastLike (mean, streams)
    """
    return Function("ReadOutDouble" if double else "ReadOut", ("streams",), ("y",), "y = mean_i X_i", body)


def aggregate() -> Function:
    """The input of a branch."""
    body = """
        x = CastLike (streams, pre)
        minus_two = Constant <value_ints = [-2]> ()
        row = Unsqueeze (pre, minus_two)
        product = MatMul (row, x)
        sum = Squeeze (product, minus_two)
        u = CastLike (sum, streams)
    """
    return Function("Aggregate", ("streams", "pre"), ("u",), "u = sum_i pre_i X_i", body)


_AXES = """
    zero = Constant <value_ints = [0]> ()
    first_scalar = Constant <value_int: int = @first> ()
    second_scalar = Constant <value_int: int = @second> ()
    first_axis = Unsqueeze (first_scalar, zero)
    second_axis = Unsqueeze (second_scalar, zero)
    total = Constant <value_int: int = @iterations> ()
    one = Constant <value_int = 1> ()
    others = Sub (total, one)
    go = Cast <to = 9> (one)
"""


def sinkhorn() -> Function:
    """Sinkhorn's iterations, the first in log space; `first` and `second` are the axes that sums run along."""
    body = f"""{_AXES}
        {_log_step("logits", "first", "half")}
        {_log_step("half", "second", "whole")}
        start = Exp (whole)
        res = Loop <body = iteration (int64 step, bool keep, m) => (bool again, m_next) {{
            again = Identity (keep)
            first_sum = ReduceSum <keepdims = 1> (m, first_axis)
            m_half = Div (m, first_sum)
            second_sum = ReduceSum <keepdims = 1> (m_half, second_axis)
            m_next = Div (m_half, second_sum)
        }}> (others, go, start)
    """
    formula = "M = exp(logits); iterations times: M / sum over axis first, then M / sum over axis second"
    attributes = {"iterations": int, "first": int, "second": int}
    return Function("Sinkhorn", ("logits",), ("res",), formula, body, attributes)


def _log_step(value: str, axis: str, result: str) -> str:
    """Divide exp(value) by its sums along an axis, in log space: the shift of that axis cancels."""
    return f"""
        {result}_max = ReduceMax <keepdims = 1> ({value}, {axis}_axis)
        {result}_shifted = Sub ({value}, {result}_max)
        {result}_exp = Exp ({result}_shifted)
        {result}_sum = ReduceSum <keepdims = 1> ({result}_exp, {axis}_axis)
        {result}_log = Log ({result}_sum)
        {result} = Sub ({result}_shifted, {result}_log)
    """


def softmax_sinkhorn(double: bool) -> Function:
    """Sinkhorn's iterations with e in every divisor, from a softmax + e (DeepSeek-V4)."""
    body = f"""{_AXES}{number("divisor_eps", double, "logits")}
        max = ReduceMax <keepdims = 1> (logits, first_axis)
        shifted = Sub (logits, max)
        exp = Exp (shifted)
        exp_sum = ReduceSum <keepdims = 1> (exp, first_axis)
        softmax = Div (exp, exp_sum)
        half = Add (softmax, divisor_eps)
        half_sum = ReduceSum <keepdims = 1> (half, second_axis)
        half_divisor = Add (half_sum, divisor_eps)
        start = Div (half, half_divisor)
        res = Loop <body = iteration (int64 step, bool keep, m) => (bool again, m_next) {{
            again = Identity (keep)
            first_sum = ReduceSum <keepdims = 1> (m, first_axis)
            first_divisor = Add (first_sum, divisor_eps)
            m_half = Div (m, first_divisor)
            second_sum = ReduceSum <keepdims = 1> (m_half, second_axis)
            second_divisor = Add (second_sum, divisor_eps)
            m_next = Div (m_half, second_divisor)
        }}> (others, go, start)
    """
    formula = "M = softmax(logits, first) + e; M / (sum over second + e); iterations - 1 times both axes, e as before"
    attributes = {"iterations": int, "first": int, "second": int, "divisor_eps": real(double)}
    return Function("SoftmaxSinkhorn" + "Double" * double, ("logits",), ("res",), formula, body, attributes)


def merge(mixed: bool, transposed: bool, rounded: bool) -> Function:
    """The update of the streams; without `mixed` there is no res, `transposed` reads it as [in, out].

    `rounded`: post and res pass through streams' dtype, which changes nothing where that is float32 or wider.
    """
    lines = ["x = CastLike (streams, post)"]
    given = ("post", "res") if mixed else ("post",)
    for name in given:
        lines += [f"narrow_{name} = CastLike ({name}, streams)"] if rounded else []
        lines += [f"used_{name} = {f'CastLike (narrow_{name}, post)' if rounded else f'Identity ({name})'}"]
    if mixed and transposed:
        lines += ['mixed = Einsum <equation = "...ij,...ic->...jc"> (used_res, x)']
    elif mixed:
        lines += ["mixed = MatMul (used_res, x)"]
    lines += [
        "minus_one = Constant <value_ints = [-1]> ()",
        "minus_two = Constant <value_ints = [-2]> ()",
        "gate = Unsqueeze (used_post, minus_one)",
        "branch = CastLike (f, post)",
        "row = Unsqueeze (branch, minus_two)",
        "written = Mul (gate, row)",
        f"sum = Add ({'mixed' if mixed else 'x'}, written)",
        "merged = CastLike (sum, streams)",
    ]
    name = "Merge" + ("Transposed" if transposed else "") * mixed + "Unmixed" * (not mixed) + "Rounded" * rounded
    carried = ("sum_j res_ji X_j" if transposed else "sum_j res_ij X_j") if mixed else "X_i"
    inputs = ("streams", "f", "post", "res")[: 3 + mixed]
    return Function(name, inputs, ("merged",), f"X'_i = {carried} + post_i f", "\n".join(lines))
