"""What makes res of a site's logits, by each entry of `mhc_compile.constraints`, as ONNX functions.

A body follows the formula of its entry; how bodies are written is said in `onnx_functions`.
"""

from __future__ import annotations

from collections.abc import Callable

from mhc_compile.codegen.onnx_functions import Function, sinkhorn
from mhc_compile.constraints import ITERATIONS, SQUARINGS, permutation_matrices

_EYE = """
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        last = Constant <value_ints = [-1]> ()
        index = Range (zero, n, one)
        rows = Unsqueeze (index, last)
        diagonal = Equal (rows, index)
        eye = CastLike (diagonal, logits)
        go = Cast <to = 9> (one)
"""


def _sinkhorn(n: int) -> tuple[Function, dict[str, int]]:
    return sinkhorn(), {"iterations": ITERATIONS, "first": -2, "second": -1}


def _lite(n: int) -> tuple[Function, dict[str, int]]:
    """The table of permutations is a constant, so that each n has a function of its own."""
    table = permutation_matrices(n)
    entries = ", ".join(str(int(one)) for one in table.flatten().tolist())
    body = f"""
        weights = Softmax <axis = -1> (logits)
        table = Constant <value = float[{table.shape[0]}, {table.shape[1]}] {{ {entries} }}> ()
        permutations = CastLike (table, logits)
        flat = MatMul (weights, permutations)
        tokens = Shape <end = {-2 if n == 1 else -1}> (logits)
        n = Constant <value_ints = [{n}]> ()
        matrix = Concat <axis = 0> (tokens, n, n)
        res = Reshape (flat, matrix)
    """
    formula = "res = sum_k softmax(logits)_k P_k over the n! permutation matrices"
    return Function(f"Lite{n}", ("logits",), ("res",), formula, body), {}


def _orthogonal(n: int) -> tuple[Function, dict[str, int]]:
    """ONNX has no solve: the columns of I - S are eliminated one after the other, each by the row of its largest entry.

    That I - S has a positive definite symmetric part makes pivots of the diagonal possible, but not accurate: entries
    grow with S^2 on the way, and at logits of standard deviation 1000 float32 would be off by 0.5, and no rotation.
    """
    body = f"""
        n_list = Shape <start = -1> (logits)
        n = Squeeze (n_list)
        {_EYE}
        second_last = Constant <value_ints = [-2]> ()
        minus_one = Sub (zero, one)
        never = CastLike (minus_one, logits)
        two = Constant <value_int = 2> ()
        three = Constant <value_int = 3> ()
        halves = CastLike (two, logits)
        thirds = CastLike (three, logits)
        turned = Einsum <equation = "...ij->...ji"> (logits)
        difference = Sub (logits, turned)
        skew = Div (difference, halves)
        left = Sub (eye, skew)
        right = Add (eye, skew)
        both = Concat <axis = -1> (left, right)
        solved = Loop <body = column (int64 step, bool keep, w) => (bool again, w_next) {{
            again = Identity (keep)
            k = Unsqueeze (step, last)
            here = Equal (rows, k)
            entries = Gather <axis = -1> (w, k)
            sizes = Abs (entries)
            done = Less (rows, k)
            candidates = Where (done, never, sizes)
            place = ArgMax <axis = -2, keepdims = 1> (candidates)
            chosen = Equal (rows, place)
            chosen_like = CastLike (chosen, w)
            picked = Mul (w, chosen_like)
            row = ReduceSum <keepdims = 1> (picked, second_last)
            upper = Gather <axis = -2> (w, k)
            half_swapped = Where (chosen, upper, w)
            swapped = Where (here, row, half_swapped)
            pivot = Gather <axis = -1> (row, k)
            scaled = Div (row, pivot)
            factors = Gather <axis = -1> (swapped, k)
            product = Mul (factors, scaled)
            eliminated = Sub (swapped, product)
            w_next = Where (here, scaled, eliminated)
        }}> (n, go, both)
        twice = Add (n_list, n_list)
        rotation = Slice (solved, n_list, twice, last)
        gram = Einsum <equation = "...ki,...kj->...ij"> (rotation, rotation)
        three_eye = Mul (thirds, eye)
        correction = Sub (three_eye, gram)
        corrected = MatMul (rotation, correction)
        res = Div (corrected, halves)
    """
    formula = "S = (logits - logits^T) / 2; Q = (I - S)^-1 (I + S); res = Q (3 I - Q^T Q) / 2"
    return Function("Orthogonal", ("logits",), ("res",), formula, body), {}


def _spectral(n: int) -> tuple[Function, dict[str, int]]:
    body = f"""
        n_list = Shape <start = -1> (logits)
        n = Squeeze (n_list)
        {_EYE}
        axes = Constant <value_ints = [-2, -1]> ()
        squarings = Constant <value_int: int = @squarings> ()
        nothing = CastLike (zero, logits)
        whole = CastLike (one, logits)
        sizes = Abs (logits)
        largest = ReduceMax <keepdims = 1> (sizes, axes)
        largest_found = Greater (largest, nothing)
        scale = Where (largest_found, largest, whole)
        a = Div (logits, scale)
        gram = Einsum <equation = "...ki,...kj->...ij"> (a, a)
        squared = Loop <body = squaring (int64 step, bool keep, power) => (bool again, power_next) {{
            again = Identity (keep)
            {_over_trace("power", "unit")}
            power_next = MatMul (unit, unit)
        }}> (squarings, go, gram)
        {_over_trace("squared", "projector")}
        projected = MatMul (logits, projector)
        products = Mul (projected, logits)
        square = ReduceSum <keepdims = 1> (products, axes)
        square_found = Greater (square, nothing)
        safe_square = Where (square_found, square, whole)
        norm = Sqrt (safe_square)
        res = Div (logits, norm)
    """
    formula = "P = (logits^T logits)^(2^squarings) over its trace; res = logits / sqrt(tr(logits P logits^T)), or 0"
    function = Function("Spectral", ("logits",), ("res",), formula, body, {"squarings": int})
    return function, {"squarings": SQUARINGS}


def _over_trace(value: str, result: str) -> str:
    """Divide matrices by their trace; a zero matrix stays zero."""
    return f"""
            {result}_diagonal = Mul ({value}, eye)
            {result}_trace = ReduceSum <keepdims = 1> ({result}_diagonal, axes)
            {result}_found = Greater ({result}_trace, nothing)
            {result}_divisor = Where ({result}_found, {result}_trace, whole)
            {result} = Div ({value}, {result}_divisor)
    """


def _identity(n: int) -> tuple[Function, dict[str, int]]:
    body = f"""
        n = Constant <value_int: int = @n> ()
        {_EYE}
        tokens = Shape <end = -1> (logits)
        n_list = Unsqueeze (n, last)
        matrix = Concat <axis = 0> (tokens, n_list, n_list)
        res = Expand (eye, matrix)
    """
    return Function("Unmixed", ("logits",), ("res",), "res = I of n streams", body, {"n": int}), {"n": n}


def _unconstrained(n: int) -> tuple[Function, dict[str, int]]:
    return Function("Unconstrained", ("logits",), ("res",), "res = logits", "res = Identity (logits)"), {}


# name of an entry -> n streams -> its function, and the numbers that a call gives it
FUNCTIONS: dict[str, Callable[[int], tuple[Function, dict[str, int]]]] = {
    "sinkhorn": _sinkhorn,
    "lite": _lite,
    "orthogonal": _orthogonal,
    "spectral": _spectral,
    "identity": _identity,
    "unconstrained": _unconstrained,
}
