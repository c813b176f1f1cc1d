"""The mHC ops as functions of the ONNX domain `mhc`, whose bodies are standard ops of opset 20.

One function for each term of a site (arXiv 2512.24880, eq. 7 to 19), as `kernels/reference.py` states it. A body knows
no sizes and no dtypes: n, C and the tokens come from the shapes of its inputs, and streams are computed with in the
dtype of the coefficients. What changes a body and not a number gives the function another name: `MergeTransposed`, etc.
Attributes reach a body through `Constant` alone, as ONNX's own evaluator knows of no other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
import onnx.parser

DOMAIN = "mhc"
VERSION = 1  # of the domain: to be raised when a function changes what it computes
OPSET = 20  # of the standard ops in the bodies, and in the files


@dataclass(frozen=True)
class Function:
    """One function: its signature, the formula for readers, and the body in ONNX's text form.

    attributes: name -> type, float or int; a call gives all of them.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    formula: str
    body: str
    attributes: Mapping[str, type] = field(default_factory=dict)

    def proto(self) -> onnx.FunctionProto:
        """The function as a file holds it."""
        head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        given = f" <{', '.join(self.attributes)}>" if self.attributes else ""
        signature = f"{self.name}{given} ({', '.join(self.inputs)}) => ({', '.join(self.outputs)})\n"
        made: onnx.FunctionProto = onnx.parser.parse_function(f"{head}{signature}{{\n{self.body}}}\n")
        made.doc_string = self.formula
        return made


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
    return Function("Expand", ("x",), ("streams",), "X_i = x for each of n streams", body, {"n": int})


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


def coefficients(groups: int) -> Function:
    """The coefficients of a site; of `groups` 3 all of them, of 2 without res, of 1 pre alone."""
    parts = ("pre", "post", "res")[:groups]
    sizes = ("n", "n", "n_squared")[:groups]
    lines = [
        """
        tokens = Shape <end = -2> (streams)
        n = Shape <start = -2, end = -1> (streams)
        c = Shape <start = -1> (streams)
        width = Mul (n, c)
        n_squared = Mul (n, n)
        flat = Concat <axis = 0> (tokens, width)
        wide = CastLike (streams, phi)
        x = Reshape (wide, flat)
        square = Mul (x, x)
        minus_one = Constant <value_ints = [-1]> ()
        mean = ReduceMean <keepdims = 1> (square, minus_one)
        eps_float = Constant <value_float: float = @eps> ()
        eps_like = CastLike (eps_float, phi)
        shifted = Add (mean, eps_like)
        r = Sqrt (shifted)
        z = MatMul (x, phi)
        normed = Div (z, r)
        """,
        f"sizes = Concat <axis = 0> ({', '.join(sizes)})",
        f"{', '.join(f'z_{part}' for part in parts)} = Split <axis = -1> (normed, sizes)",
        f"{', '.join(f'b_{part}' for part in parts)} = Split <axis = 0> (bias, sizes)",
        f"{', '.join(f'alpha_{part}' for part in parts)} = Split <axis = 0, num_outputs = {groups}> (alpha)",
    ]
    for part in parts:
        lines += [
            f"scaled_{part} = Mul (alpha_{part}, z_{part})",
            f"raw_{part} = Add (scaled_{part}, b_{part})",
        ]
    lines += ["gate_pre = Sigmoid (raw_pre)", *_shifted("pre", "gate_pre", "pre_eps")]
    outputs, formula = ["pre"], "pre = sigmoid(alpha_0 z_pre / r + b_pre) + pre_eps"
    attributes = {"eps": float, "pre_eps": float}
    if groups > 1:
        lines += [
            "gate_post = Sigmoid (raw_post)",
            "scale_float = Constant <value_float: float = @post_scale> ()",
            "scale_like = CastLike (scale_float, phi)",
            "larger_post = Mul (scale_like, gate_post)",
            *_shifted("post", "larger_post", "post_eps"),
        ]
        outputs, attributes = [*outputs, "post"], {**attributes, "post_scale": float, "post_eps": float}
        formula += "; post = post_scale sigmoid(alpha_1 z_post / r + b_post) + post_eps"
    if groups > 2:
        lines += ["matrix = Concat <axis = 0> (tokens, n, n)", "logits = Reshape (raw_res, matrix)"]
        outputs, formula = [*outputs, "logits"], f"{formula}; logits = alpha_2 z_res / r + b_res"
    name = {1: "CoefficientsHead", 2: "CoefficientsUnmixed", 3: "Coefficients"}[groups]
    formula = f"r = sqrt(mean(X^2) + eps); z = vec(X) phi; {formula}"
    inputs = ("streams", "phi", "alpha", "bias")
    return Function(name, inputs, tuple(outputs), formula, "\n".join(lines), attributes)


def _shifted(result: str, value: str, attribute: str) -> list[str]:
    return [
        f"{attribute}_float = Constant <value_float: float = @{attribute}> ()",
        f"{attribute}_like = CastLike ({attribute}_float, phi)",
        f"{result} = Add ({value}, {attribute}_like)",
    ]


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


def softmax_sinkhorn() -> Function:
    """Sinkhorn's iterations with e in every divisor, from a softmax + e (DeepSeek-V4)."""
    body = f"""{_AXES}
        e_float = Constant <value_float: float = @divisor_eps> ()
        e = CastLike (e_float, logits)
        max = ReduceMax <keepdims = 1> (logits, first_axis)
        shifted = Sub (logits, max)
        exp = Exp (shifted)
        exp_sum = ReduceSum <keepdims = 1> (exp, first_axis)
        softmax = Div (exp, exp_sum)
        half = Add (softmax, e)
        half_sum = ReduceSum <keepdims = 1> (half, second_axis)
        half_divisor = Add (half_sum, e)
        start = Div (half, half_divisor)
        res = Loop <body = iteration (int64 step, bool keep, m) => (bool again, m_next) {{
            again = Identity (keep)
            first_sum = ReduceSum <keepdims = 1> (m, first_axis)
            first_divisor = Add (first_sum, e)
            m_half = Div (m, first_divisor)
            second_sum = ReduceSum <keepdims = 1> (m_half, second_axis)
            second_divisor = Add (second_sum, e)
            m_next = Div (m_half, second_divisor)
        }}> (others, go, start)
    """
    formula = "M = softmax(logits, first) + e; M / (sum over second + e); iterations - 1 times both axes, e as before"
    attributes = {"iterations": int, "first": int, "second": int, "divisor_eps": float}
    return Function("SoftmaxSinkhorn", ("logits",), ("res",), formula, body, attributes)


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
