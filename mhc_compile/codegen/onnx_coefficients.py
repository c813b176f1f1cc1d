"""What reads the coefficients of a site off its streams, as ONNX functions: `Coefficients...` and `Gates...`.

They compute what `reference.coefficients` and `reference.gates` do; how bodies are written is said in `onnx_functions`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mhc_compile.codegen.onnx_functions import Function, number, real


def coefficients(groups: int, double: bool) -> Function:
    """The coefficients of a site; of `groups` 3 all of them, of 2 without res, of 1 pre alone."""
    numbers = ("eps", "pre_eps", "post_scale", "post_eps")[: 2 if groups == 1 else 4]
    lines = [
        _learned(("pre", "post", "logits")[:groups], double),
        *(number(one, double, "phi") for one in numbers[1:]),
        "gate_pre = Sigmoid (a_pre)",
        "pre = Add (gate_pre, pre_eps)",
    ]
    outputs, formula = ["pre"], "pre = sigmoid(alpha_0 z_pre / r + b_pre) + pre_eps"
    if groups > 1:
        lines += [
            "gate_post = Sigmoid (a_post)",
            "larger_post = Mul (post_scale, gate_post)",
            "post = Add (larger_post, post_eps)",
        ]
        outputs.append("post")
        formula += "; post = post_scale sigmoid(alpha_1 z_post / r + b_post) + post_eps"
    if groups > 2:
        lines.append(_MATRIX)
        outputs.append("logits")
        formula += "; logits = alpha_2 z_res / r + b_res"
    name = {1: "CoefficientsHead", 2: "CoefficientsUnmixed", 3: "Coefficients"}[groups] + "Double" * double
    formula = f"r = sqrt(mean(X^2) + eps); z = vec(X) phi; {formula}"
    inputs = ("streams", "phi", "alpha", "bias")
    return Function(name, inputs, tuple(outputs), formula, "\n".join(lines), dict.fromkeys(numbers, real(double)))


LOGITS = {"matrix": "", "list": "Listed", "none": "Unmixed"}  # n n of them, another number, none -> in the name


def gates(pre: bool, post: bool, logits: str, bounded: bool, dynamic: bool, double: bool) -> Function:
    """The coefficients of a site in any other form; arguments as of `reference.gates`, logits a key of LOGITS."""
    parts = [part for part, one in (("pre", pre), ("post", post), ("logits", logits != "none")) if one]
    lines = [_learned(parts, double, bounded) if dynamic else _constant(parts), _ONE]
    lines.append(_GATES[bounded]["pre"] if pre else "share = Div (one, n_like)\npre = Expand (share, lead)")
    lines.append(_GATES[bounded]["post"] if post else "post = Expand (one, lead)")
    if logits != "none":
        lines.append(_MATRIX if logits == "matrix" else "logits = Identity (a_logits)")
    fixed = "PreFixed" * (not pre) + "PostFixed" * (not post)
    double = double and dynamic  # constants need no eps
    name = f"Gates{'Static' * (not dynamic)}{'Tanh' * (not bounded)}{fixed}{LOGITS[logits]}{'Double' * double}"
    outputs = ("pre", "post") if logits == "none" else ("pre", "post", "logits")
    formula = _gates_formula(pre, post, logits != "none", bounded, dynamic)
    if not dynamic:
        return Function(name, ("streams", "bias"), outputs, formula, "\n".join(lines))
    inputs = ("streams", "phi", "alpha", "bias")
    return Function(name, inputs, outputs, formula, "\n".join(lines), {"eps": real(double)})


def _gates_formula(pre: bool, post: bool, logits: bool, bounded: bool, dynamic: bool) -> str:
    def raw(part: str) -> str:
        return f"alpha z_{part} + b_{part}" if dynamic else f"b_{part}"

    def gate(part: str, factor: str) -> str:
        return f"{factor}sigmoid({raw(part)})" if bounded else raw(part)

    z = "z = vec(X) phi / sqrt(mean(X^2) + eps)" if bounded else "z_j = tanh(X_j phi / sqrt(mean(X_j^2) + eps))"
    return "; ".join(
        [
            *([z] if dynamic else []),
            f"pre = {gate('pre', '') if pre else '1 / n'}",
            f"post = {gate('post', '2 ') if post else '1'}",
            *([f"logits = {raw('res')}"] if logits else []),
        ]
    )


# ---------------------------------------------------------------------------------------------- bodies

_MATRIX = """
        matrix = Concat <axis = 0> (tokens, n, n)
        logits = Reshape (a_logits, matrix)
"""

_ONE = """
        lead = Shape <end = -1> (streams)
        number = Constant <value_float = 1.0> ()
        one = CastLike (number, bias)
        two = Add (one, one)
        n_like = CastLike (n, bias)
"""

_GATES = {
    True: {"pre": "pre = Sigmoid (a_pre)", "post": "half_post = Sigmoid (a_post)\npost = Mul (two, half_post)"},
    False: {"pre": "pre = Identity (a_pre)", "post": "post = Identity (a_post)"},
}


def _split_bias(parts: Sequence[str]) -> list[str]:
    """Lines for tokens, n, the sizes of `parts` and their bias, b_pre and so on; logits have what the gates leave."""
    gates = [part for part in parts if part != "logits"]
    lines = [
        "tokens = Shape <end = -2> (streams)",
        "n = Shape <start = -2, end = -1> (streams)",
        *(f"size_{part} = Identity (n)" for part in gates),
    ]
    if "logits" in parts:
        lines += [
            f"gates = Constant <value_ints = [{len(gates)}]> ()",
            "before = Mul (gates, n)",
            "columns = Shape (bias)",
            "size_logits = Sub (columns, before)",
        ]
    if parts:
        lines += [
            f"sizes = Concat <axis = 0> ({', '.join(f'size_{part}' for part in parts)})",
            f"{', '.join(f'b_{part}' for part in parts)} = Split <axis = 0> (bias, sizes)",
        ]
    for part in parts:
        lines.append(f"shape_{part} = Concat <axis = 0> (tokens, size_{part})")
    return lines


def _constant(parts: Sequence[str]) -> str:
    """a = b for each of `parts`, at every token."""
    return "\n".join([*_split_bias(parts), *(f"a_{part} = Expand (b_{part}, shape_{part})" for part in parts)])


def _learned(parts: Sequence[str], double: bool, bounded: bool = True) -> str:
    """a = alpha z / r + b for each of `parts`, or alpha tanh(z / r) + b with each stream over its own r."""
    lines = _split_bias(parts)
    if not parts:
        return "\n".join(lines)
    lines += [_FLAT if bounded else "x = CastLike (streams, phi)", number("eps", double, "phi"), _NORMED]
    if bounded:
        lines.append(f"{', '.join(f'z_{part}' for part in parts)} = Split <axis = -1> (normed, sizes)")
    else:  # [..., stream j, columns]: res is row-major in (i, j)
        lines += ["bent = Tanh (normed)", "each = Div (sizes, n)"]
        lines.append(f"{', '.join(f'bent_{part}' for part in parts)} = Split <axis = -1> (bent, each)")
        for part in parts:
            lines.append(f'turned_{part} = Einsum <equation = "...jk->...kj"> (bent_{part})')
            lines.append(f"z_{part} = Reshape (turned_{part}, shape_{part})")
    alphas = ", ".join(f"alpha_{part}" for part in parts)
    lines.append(f"{alphas} = Split <axis = 0, num_outputs = {len(parts)}> (alpha)")
    for part in parts:
        lines += [f"scaled_{part} = Mul (alpha_{part}, z_{part})", f"a_{part} = Add (scaled_{part}, b_{part})"]
    return "\n".join(lines)


_FLAT = """
        c = Shape <start = -1> (streams)
        width = Mul (n, c)
        flat = Concat <axis = 0> (tokens, width)
        wide = CastLike (streams, phi)
        x = Reshape (wide, flat)
"""

_NORMED = """
        square = Mul (x, x)
        minus_one = Constant <value_ints = [-1]> ()
        mean = ReduceMean <keepdims = 1> (square, minus_one)
        shifted = Add (mean, eps)
        r = Sqrt (shifted)
        z = MatMul (x, phi)
        normed = Div (z, r)
"""
