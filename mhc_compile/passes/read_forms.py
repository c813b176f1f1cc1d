"""Read the form (`forms`) of a node of the graph: which sum of products of which leaves it computes.

Readers differ in how far they look. One of a `SINGLE` op opens a product or a sum over an axis, whose operands are
leaves behind views and casts; one of a `PRODUCT` also opens the product under a sum; a `DEEP` one opens products of
products, as the logits of a site are. All stop at given nodes.
A sum is opened where it stands alone, and is a leaf where it is a factor. What an op computes is read from its schema
and literals; whatever is not in the tables below is a leaf.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Callable, Set
from enum import Enum
from math import isclose
from typing import Any, ClassVar

import torch
from torch import fx

from mhc_compile import _torch
from mhc_compile.passes.forms import (
    Axis,
    Factor,
    Form,
    Rms,
    Slot,
    Term,
    Unreadable,
    add,
    contract,
    expanded,
    extent,
    inverted,
    leaf_form,
    reshaped,
    scaled,
    shifted,
    sliced,
    squared,
)
from mhc_compile.passes.op_kinds import CASTS, PERMUTES, VIEWS, aten, packet, tensor_of
from mhc_compile.passes.permutation import permutation

# `detach` and `to(device)` are none of them: the one changes gradients, the other may move.
IDENTITIES = frozenset({aten.contiguous, aten.clone, aten.alias, aten.positive})
_EXPANDS = frozenset({aten.expand, aten.expand_as, aten.broadcast_to})
_SPLITS = frozenset({aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split})
_NUMBERS = (int, float)


class Depth(Enum):
    """How far a reader looks."""

    SINGLE = 1
    PRODUCT = 2
    DEEP = 3


class Reader:
    """The forms of the nodes of one graph, as it stands.

    stops: nodes that are leaves; narrowing: whether a cast to a less precise dtype is looked through.
    """

    def __init__(self, depth: Depth, stops: Set[fx.Node] = frozenset(), *, narrowing: bool = True) -> None:
        self._deep, self._depth, self._stops, self._narrowing = depth is Depth.DEEP, depth, stops, narrowing
        self._open: dict[fx.Node, Form] = {}
        self._closed: dict[fx.Node, Form] = {}

    def form(self, node: fx.Node) -> Form:
        """The node's form; the node itself as a leaf when its op has none."""
        if node not in self._open:
            self._open[node] = self._read(node, self._READINGS.get(packet(node)), self.form)
        return self._open[node]

    def opened(self, node: fx.Node) -> Form:
        """The node's form, also where the node is one to stop at."""
        return self._read(node, self._READINGS.get(packet(node)), self.form, stop=False)

    def leaf(self, node: fx.Node) -> Form:
        """The node's form with nothing but views and casts looked through."""
        if node not in self._closed:
            self._closed[node] = self._read(node, self._LAYOUTS.get(packet(node)), self.leaf)
        return self._closed[node]

    def product(self, node: fx.Node) -> Form:
        """The node's form as a factor of a product: one term."""
        if not self._deep:
            return self.leaf(node)
        form = self.form(node)
        return form if len(form.terms) == 1 else self.leaf(node)

    def _read(self, node: fx.Node, reading: Any, inner: Callable[[fx.Node], Form], stop: bool = True) -> Form:
        value = tensor_of(node)
        if value is None:
            raise Unreadable
        if reading is not None and not (stop and node in self._stops):
            try:
                form: Form = reading(self, node, inner)
                return _at(form, node)
            except Unreadable:
                pass
        return leaf_form(node, value.shape, value.dtype)

    # ------------------------------------------------------------------------------------------ views and casts

    def _same(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        return inner(_source(node))

    def _cast(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        value, source = tensor_of(node), tensor_of(_source(node))
        if value is None or source is None or value.device != source.device or not value.is_floating_point():
            raise Unreadable
        if not self._narrowing and value.dtype.itemsize < source.dtype.itemsize:
            raise Unreadable
        return _narrowed(inner(_source(node)), value.dtype)

    def _view(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        return reshaped(inner(_source(node)), _shape(node))

    def _expand(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        return expanded(inner(_source(node)), _shape(node))

    def _permute(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        form = inner(_source(node))
        order = permutation(node)
        if order is None:
            raise Unreadable
        return Form(tuple(form.dims[place] for place in order), form.terms)

    def _slice(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        source, dim, start, end, step = _arguments(node, None, 0, None, None, 1)
        size, start, end = _bounds(source, dim, start, end)
        if step != 1 or not 0 <= start < end:
            raise Unreadable
        form = inner(source)
        return form if (start, end) == (0, size) else self._cut(form, dim % len(form.dims), start, end - start, inner)

    def _select(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        source, dim, index = node.args[:3]
        return self._pick(source, dim, index, inner)

    def _pick(self, source: Any, dim: Any, index: Any, inner: Callable[[fx.Node], Form]) -> Form:
        form = inner(source)
        if not isinstance(index, int):
            raise Unreadable
        dim %= len(form.dims)
        size = tensor_of(source).shape[dim]  # type: ignore[union-attr]
        if index < 0:
            index += _whole(size)
        form = self._cut(form, dim, index, 1, inner)
        return Form((*form.dims[:dim], *form.dims[dim + 1 :]), form.terms)

    def _item(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        """One part of a split, a chunk or an unbind."""
        parts, index = node.args
        if not isinstance(parts, fx.Node) or not isinstance(index, int):
            raise Unreadable
        kind = packet(parts)
        if kind is aten.unbind:
            return self._pick(parts.args[0], _arguments(parts, None, 0)[1], index, inner)
        if kind not in _SPLITS:
            raise Unreadable
        source, _, dim = _arguments(parts, None, None, 0)
        dim %= len(tensor_of(source).shape)  # type: ignore[union-attr]
        lengths = [_whole(part.shape[dim]) for part in parts.meta["val"]]
        return self._cut(inner(source), dim, sum(lengths[:index]), lengths[index], inner)

    def _cut(self, form: Form, dim: int, start: int, length: int, inner: Callable[[fx.Node], Form]) -> Form:
        cut = sliced(form, dim, start, length)
        terms = tuple(
            Term(term.scale, tuple(self._of_piece(factor, inner) for factor in term.factors)) for term in cut.terms
        )
        return Form(cut.dims, terms)

    def _of_piece(self, factor: Factor, inner: Callable[[fx.Node], Form]) -> Factor:
        """A slice of joined tensors that lies in one of them, as a slice of that one."""
        joined = factor.leaf
        if not isinstance(joined, fx.Node) or packet(joined) not in (aten.cat, aten.concat):
            return factor
        pieces, dim = _arguments(joined, None, 0)
        dim %= len(factor.slots)
        slot = factor.slots[dim]
        start = slot.start
        length = 1
        for axis in slot.axes:
            length *= _whole(axis.size)
        for piece in pieces:
            value = tensor_of(piece)
            if value is None or value.dtype != tensor_of(joined).dtype:  # type: ignore[union-attr]
                return factor
            if value.dim() != len(factor.slots):
                continue  # the one that `cat` allows: an empty tensor of one axis, as of a cache that holds nothing yet
            size = _whole(value.shape[dim])
            if start + length <= size:
                return self._inside(piece, factor, dim, Slot(slot.axes, start), inner)
            if start < size:
                return factor
            start -= size
        return factor

    def _inside(
        self, piece: fx.Node, factor: Factor, dim: int, slot: Slot, inner: Callable[[fx.Node], Form]
    ) -> Factor:
        """The factor with a joined tensor replaced by the leaf that one of its pieces is a view of."""
        slots = (*factor.slots[:dim], slot, *factor.slots[dim + 1 :])
        plain = Factor(piece, slots, factor.power, factor.narrowest)
        form = self.leaf(piece)
        if len(form.terms) != 1 or len(form.terms[0].factors) != 1 or form.terms[0].scale != 1:
            return plain
        (behind,) = form.terms[0].factors
        if any(other.start for other in slots) or behind.power != 1:
            return plain
        try:
            table: dict[Axis, tuple[Axis, ...]] = {}
            wanted = Form(tuple(one.axes for one in slots), ())
            joined = contract_names(form, wanted, table)
        except Unreadable:
            return plain
        return Factor(behind.leaf, joined, factor.power, _narrower(factor.narrowest, behind.narrowest))

    # ------------------------------------------------------------------------------------------ arithmetic

    def _add(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        left, right = _operands(node)
        if node.kwargs.get("alpha", 1) != 1:
            raise Unreadable
        if _both_tensors(left, right):
            return add(self._summand(left), self._summand(right))
        tensor, number = (left, right) if tensor_of(left) is not None else (right, left)
        return shifted(self.form(tensor), _number(number))

    def _summand(self, node: fx.Node) -> Form:
        form = self.form(node)
        return form if self._deep or len(form.terms) == 1 else self.leaf(node)

    def _subtract(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        left, right = _operands(node)
        if node.kwargs.get("alpha", 1) != 1 or not isinstance(left, fx.Node):
            raise Unreadable
        if tensor_of(right) is not None:
            return add(self._summand(left), scaled(self._summand(right), -1))
        return shifted(self.form(left), -_number(right))

    def _multiply(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        left, right = _operands(node)
        if _both_tensors(left, right):
            return _times(self.product(left), self.product(right))
        tensor, number = (left, right) if tensor_of(left) is not None else (right, left)
        return scaled(self.form(tensor), _number(number))

    def _divide(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        left, right = _operands(node)
        if node.kwargs.get("rounding_mode") is not None or not isinstance(left, fx.Node):
            raise Unreadable
        if tensor_of(right) is not None:
            return _times(self.product(left), inverted(self.product(right)))
        return scaled(self.form(left), 1 / _number(right))

    def _negate(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        return scaled(self.form(_source(node)), -1)

    def _reciprocal(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        return inverted(self.product(_source(node)))

    def _closed_reciprocal(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        return inverted(inner(_source(node)))

    def _times_one(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        """`1 / x` is traced as `reciprocal(x) * 1`."""
        if literal(node.args[1]) != 1:
            raise Unreadable
        return inner(_source(node))

    def _square(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        return squared(self.leaf(_source(node)))

    def _power(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        exponent = node.args[1]
        if exponent == 2:
            return self._square(node, inner)
        if exponent == -1:
            return self._reciprocal(node, inner)
        if exponent in (0.5, -0.5):
            return self._root(_source(node), 1 if exponent == 0.5 else -1)
        raise Unreadable

    def _sum(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        return self._reduced(node)[0]

    def _mean(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        form, count = self._reduced(node)
        return scaled(form, 1 / count)

    def _reduced(self, node: fx.Node) -> tuple[Form, int]:
        if "dim" not in [argument.name for argument in node.target._schema.arguments]:  # type: ignore[union-attr]
            raise Unreadable
        source, dims, keep = _arguments(node, None, None, False)
        form = self.leaf(source) if self._depth is Depth.SINGLE else self.form(source)
        count = 1
        names = list(range(len(form.dims)))
        gone = [dim % len(names) for dim in ([dims] if isinstance(dims, int) else dims or names)]
        for dim in gone:
            count *= _whole(tensor_of(source).shape[dim])  # type: ignore[union-attr]
        result = contract([(form, names)], [name for name in names if name not in gone])
        if keep:
            kept = iter(result.dims)
            result = Form(tuple(() if name in gone else next(kept) for name in names), result.terms)
        return result, count

    # ------------------------------------------------------------------------------------------ products of matrices

    def _matmul(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        left, right = (self.product(argument) for argument in node.args[:2])  # type: ignore[arg-type]
        return _matrix_product(left, right)

    def _linear(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        x, weight, bias = _arguments(node, None, None, None)
        of_weight = self.product(weight)
        turned = Form(tuple(reversed(of_weight.dims)), of_weight.terms)
        result = _matrix_product(self.product(x), turned)
        return result if bias is None else add(result, self.product(bias))

    def _addmm(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        base, left, right = node.args[:3]
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            raise Unreadable
        operands = [self.product(argument) for argument in (left, right)]  # type: ignore[arg-type]
        return add(_matrix_product(*operands), self._summand(base))  # type: ignore[arg-type]

    def _einsum(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        equation, operands = node.args[:2]
        forms = [self.product(operand) for operand in operands]  # type: ignore[union-attr, arg-type]
        inputs, out = _labels(str(equation), [len(form.dims) for form in forms])
        return contract(list(zip(forms, inputs, strict=True)), out)

    # ------------------------------------------------------------------------------------------ root mean squares

    def _square_root(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        return self._root(_source(node), 1)

    def _inverse_root(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        return self._root(_source(node), -1)

    def _root(self, argument: fx.Node, power: int) -> Form:
        """`sqrt(mean(x^2) + eps)` or its reciprocal as the factor `Rms`."""
        form = self.form(argument)
        squares = [term for term in form.terms if term.factors]
        eps = sum(term.scale for term in form.terms if not term.factors)
        if len(squares) != 1 or eps < 0:
            raise Unreadable
        (term,) = squares
        if len(term.factors) != 2 or term.factors[0] != term.factors[1]:
            raise Unreadable
        (x, _) = term.factors
        count = 1
        for axis in form.summed:
            count *= _whole(axis.size)
        if not isclose(term.scale * count, 1, rel_tol=1e-9) or not isinstance(x.leaf, fx.Node) or x.power != 1:
            raise Unreadable
        return _rms_form(form, x, eps, power)

    def _rms_norm(self, node: fx.Node, inner: Callable[[fx.Node], Form]) -> Form:
        source, shape, weight, eps = _arguments(node, None, None, None, None)
        value = tensor_of(source)
        assert value is not None
        if eps is None:
            if value.dtype not in (torch.float32, torch.float64):
                raise Unreadable
            eps = torch.finfo(value.dtype).eps
        form = self.leaf(source)
        last = len(form.dims) - len(shape)
        if len(form.terms) != 1 or len(form.terms[0].factors) != 1 or form.terms[0].scale != 1:
            raise Unreadable
        (x,) = form.terms[0].factors
        kept = Form(tuple(() if place >= last else dim for place, dim in enumerate(form.dims)), form.terms)
        result = _times(self.product(source), _rms_form(kept, x, float(eps), -1))
        return result if weight is None else _times(result, self.product(weight))

    # ------------------------------------------------------------------------------------------ tables

    _LAYOUTS: ClassVar[dict[Any, Any]] = {
        **dict.fromkeys(IDENTITIES, _same),
        **dict.fromkeys(CASTS, _cast),
        **dict.fromkeys(VIEWS, _view),
        **dict.fromkeys(_EXPANDS, _expand),
        **dict.fromkeys(PERMUTES, _permute),
        aten.slice: _slice,
        aten.select: _select,
        operator.getitem: _item,
        aten.reciprocal: _closed_reciprocal,
        aten.mul: _times_one,
        aten.div: _times_one,
    }
    _READINGS: ClassVar[dict[Any, Any]] = {
        **_LAYOUTS,
        aten.add: _add,
        aten.sub: _subtract,
        aten.mul: _multiply,
        aten.div: _divide,
        aten.true_divide: _divide,
        aten.neg: _negate,
        aten.reciprocal: _reciprocal,
        aten.square: _square,
        aten.pow: _power,
        aten.sum: _sum,
        aten.mean: _mean,
        aten.matmul: _matmul,
        aten.mm: _matmul,
        aten.bmm: _matmul,
        aten.linear: _linear,
        aten.addmm: _addmm,
        aten.einsum: _einsum,
        aten.sqrt: _square_root,
        aten.rsqrt: _inverse_root,
        aten.rms_norm: _rms_norm,
    }


# ---------------------------------------------------------------------------------------------- pieces of the above


def _at(form: Form, node: fx.Node) -> Form:
    """The form, checked against the shape that the capture recorded, and rounded to its dtype."""
    value = tensor_of(node)
    assert value is not None
    if len(form.dims) != len(value.shape):
        raise Unreadable
    for axes, size in zip(form.dims, value.shape, strict=True):
        volume: Any = 1
        for axis in axes:
            volume *= axis.size
        if volume != extent(size):
            raise Unreadable
    return form


def _times(left: Form, right: Form) -> Form:
    count = max(len(left.dims), len(right.dims))
    names = list(range(count))
    return contract([(one, names[count - len(one.dims) :]) for one in (left, right)], names)


def _matrix_product(left: Form, right: Form) -> Form:
    """matmul's rules: 1-D operands, and leading dimensions that broadcast."""
    if not left.dims or not right.dims:
        raise Unreadable
    count = max(len(left.dims), len(right.dims), 2) - 2
    lead = [f"lead{place}" for place in range(count)]
    first = ["k"] if len(left.dims) == 1 else [*lead[count + 2 - len(left.dims) :], "row", "k"]
    second = ["k"] if len(right.dims) == 1 else [*lead[count + 2 - len(right.dims) :], "k", "column"]
    out = [name for name in (*lead, "row", "column") if name in first or name in second]
    return contract([(left, first), (right, second)], out)


def _labels(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """The labels of the operands and of the result of an einsum; `...` becomes labels of its own."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if len(operands) != len(ranks):
        raise Unreadable
    count = max([rank - len(one.replace("...", "")) for one, rank in zip(operands, ranks, strict=True)] + [0])

    def spelled(text: str, rank: int | None) -> list[str]:
        before, dots, after = text.partition("...")
        if set(before + after) - set(string.ascii_letters):
            raise Unreadable
        width = count if rank is None else rank - len(before + after)
        spread = [f"...{place}" for place in range(count)][count - width :] if dots else []
        return [*before, *spread, *after]

    inputs = [spelled(one, rank) for one, rank in zip(operands, ranks, strict=True)]
    if arrow:
        return inputs, spelled(right, None)
    letters = sorted(name for name in {*left} & {*string.ascii_letters} if left.count(name) == 1)
    return inputs, [*(f"...{place}" for place in range(count)), *letters]


def _rms_form(form: Form, x: Factor, eps: float, power: int) -> Form:
    """The form of the root mean square of `x` over the axes of it that are no dimension of `form`."""
    kept = set(form.axes)
    if any(slot.start for slot in x.slots):
        raise Unreadable
    bound = {axis: Axis(axis.size, bound=True) for axis in x.axes if axis not in kept}
    slots = tuple(Slot(tuple(bound.get(axis, axis) for axis in slot.axes)) for slot in x.slots)
    assert isinstance(x.leaf, fx.Node)
    return Form(form.dims, (Term(1.0, (Factor(Rms(x.leaf, eps), slots, power, x.narrowest),)),))


def contract_names(form: Form, wanted: Form, table: dict[Axis, tuple[Axis, ...]]) -> tuple[Slot, ...]:
    """The slots of the one factor of `form` when its dimensions are named as those of `wanted` are.

    Raises Unreadable when that would need an axis of `wanted` to be split.
    """
    for old, new in zip(form.dims, wanted.dims, strict=True):
        left, right = list(old), list(new)
        while right:
            axis = right.pop(0)
            if not left or left[0].size != axis.size:
                raise Unreadable
            table[left.pop(0)] = (axis,)
        if left:
            raise Unreadable
    (factor,) = form.terms[0].factors
    return tuple(
        Slot(tuple(new for axis in slot.axes for new in table.get(axis, (axis,))), slot.start) for slot in factor.slots
    )


_PRECISION = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}


def _narrower(left: torch.dtype, right: torch.dtype) -> torch.dtype:
    if left not in _PRECISION or right not in _PRECISION:
        raise Unreadable
    return min(left, right, key=_PRECISION.__getitem__)


def _narrowed(form: Form, dtype: torch.dtype) -> Form:
    terms = tuple(
        Term(
            term.scale,
            tuple(
                Factor(one.leaf, one.slots, one.power, _narrower(one.narrowest, dtype)) for one in term.factors
            ),
        )
        for term in form.terms
    )
    return Form(form.dims, terms)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise Unreadable
    return source


def _shape(node: fx.Node) -> Any:
    return tensor_of(node).shape  # type: ignore[union-attr]


def _whole(size: Any) -> int:
    known = extent(size) if isinstance(size, torch.SymInt) else size
    if not isinstance(known, int):
        raise Unreadable
    return known


def _operands(node: fx.Node) -> tuple[Any, Any]:
    """The two operands of a sum or a product: nodes or numbers."""
    return node.args[0], node.args[1]


def _both_tensors(left: Any, right: Any) -> bool:
    return tensor_of(left) is not None and tensor_of(right) is not None


def literal(value: Any) -> Any:
    """A literal, or the number that a symbolic float had when the graph was captured."""
    held = value.meta.get("val") if isinstance(value, fx.Node) else None
    return _torch.number_seen(held) if isinstance(held, torch.SymFloat) else value


def _number(value: Any) -> float:
    value = literal(value)
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        raise Unreadable
    return float(value)


def _arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    """The first arguments of a call, given by place or by name, or their defaults."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return [given.get(name, default) for name, default in zip(names, defaults, strict=False)]


def _bounds(source: Any, dim: Any, start: Any, end: Any) -> tuple[Any, int, int]:
    size = extent(tensor_of(source).shape[dim])  # type: ignore[union-attr]
    start = 0 if start is None else start
    if not isinstance(start, int):
        raise Unreadable
    if end is None or (isinstance(end, int) and end >= 2**62):
        end = size
    if not isinstance(size, int):
        if start == 0 and end is size:
            return size, 0, size
        raise Unreadable
    if not isinstance(end, int):
        raise Unreadable
    start, end = (value + size if value < 0 else value for value in (start, end))
    return size, start, min(end, size)


def number_of(node: fx.Node, place: int) -> float | None:
    """A literal number among the arguments of a call, or None."""
    value = literal(_arguments(node, *[None] * (place + 1))[place])
    return float(value) if isinstance(value, _NUMBERS) and not isinstance(value, bool) else None


# They compute nothing.
LAYOUT_OPS = frozenset(Reader._LAYOUTS) - {aten.mul, aten.div, aten.reciprocal} | _SPLITS | {aten.unbind}


def dims_of(node: fx.Node) -> tuple[list[int], bool]:
    """The dimensions that a reduction is over, and whether it keeps them."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    dims: Any = given.get("dim")
    if dims is None:
        raise Unreadable
    return [dims] if isinstance(dims, int) else list(dims), bool(given.get("keepdim", False))
