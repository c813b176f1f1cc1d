"""Sums of products with named axes: one normal form for the many spellings of a linear computation.

A `Form` says of a tensor which sum of products of other tensors (its leaves) it is. `einsum`, `matmul`, a product that
is summed, views, permutations and casts between them all give the same form:

    mixed[t, i, c] = sum_j res[t, i, j] X[t, j, c]      dims (t)(i)(c), one term, factors res(t)(i)(j) and X(t)(j)(c)

An axis (`Axis`) is an index that runs over a size; a dimension of a tensor is a tuple of axes, the slowest first, so
that a flat [T, n C] tensor has the dimensions (t)(i, c). An axis of a term that is no dimension of the form is summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from mhc_compile import _torch

MAX_TERMS = 64


class Unreadable(Exception):
    """The op, or these arguments of it, have no form of their own."""


@dataclass(frozen=True, eq=False)
class Axis:
    """An index and the size it runs over, an int or an expression of symbolic sizes.

    bound: an axis that the root mean square of a leaf has summed over already.
    """

    size: Any
    bound: bool = False

    def __repr__(self) -> str:
        return f"{'#' if self.bound else ''}{self.size}.{id(self) % 9973}"


Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Slot:
    """One dimension of a leaf: the axes that index it, from element `start` on."""

    axes: Axes
    start: int = 0


@dataclass(frozen=True)
class Rms:
    """The leaf `sqrt(mean(source^2) + eps)`; its slots are those of the source, the axes of the mean bound."""

    source: fx.Node
    eps: float


Leaf = fx.Node | Rms


@dataclass(frozen=True)
class Factor:
    """A leaf to the power of 1 or -1; `narrowest`: the least precise dtype that it was cast to on its way."""

    leaf: Leaf
    slots: tuple[Slot, ...]
    power: int
    narrowest: torch.dtype

    @property
    def axes(self) -> Axes:
        return tuple(axis for slot in self.slots for axis in slot.axes if not axis.bound)


@dataclass(frozen=True)
class Term:
    """A number times a product of factors, summed over the axes that are no dimension of the form."""

    scale: float
    factors: tuple[Factor, ...] = ()

    @property
    def axes(self) -> set[Axis]:
        return {axis for factor in self.factors for axis in factor.axes}


@dataclass(frozen=True)
class Form:
    """Dimensions, and the terms whose sum the tensor is."""

    dims: tuple[Axes, ...]
    terms: tuple[Term, ...]

    @property
    def axes(self) -> Axes:
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def summed(self) -> set[Axis]:
        """The axes of the terms that are no dimension."""
        return {axis for term in self.terms for axis in term.axes} - set(self.axes)


# ---------------------------------------------------------------------------------------------- sizes


def extent(size: int | torch.SymInt) -> Any:
    """A size that can be compared and divided without a guard: an int, or the expression of a symbolic size."""
    if isinstance(size, int):
        return size
    expression = _torch.expression_of(size)
    return int(expression) if expression.is_Integer else expression


def same(left: Any, right: Any) -> bool:
    """The sizes are provably equal."""
    return bool(left == right)


def quotient(whole: Any, part: Any) -> Any:
    """`whole / part` when that is provably a whole number, else None."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    ratio = whole / part
    if ratio.is_Integer:
        return int(ratio)
    return ratio if ratio.is_integer else None


def volume(axes: Iterable[Axis]) -> Any:
    """The product of the sizes of axes."""
    return prod(axis.size for axis in axes)


def axes_of(size: int | torch.SymInt) -> Axes:
    """New axes for a dimension: none for a size of 1."""
    known = extent(size)
    return () if same(known, 1) else (Axis(known),)


# ---------------------------------------------------------------------------------------------- substitution

Table = dict[Axis, Axes]


def _resolve(axes: Axes, table: Mapping[Axis, Axes]) -> Axes:
    found: list[Axis] = []
    for axis in axes:
        found.extend(_resolve(table[axis], table) if axis in table else (axis,))
    return tuple(found)


def substitute(form: Form, table: Mapping[Axis, Axes]) -> Form:
    """The same form with axes replaced by others, or by several that they split into."""
    if not table:
        return form

    def slot(old: Slot) -> Slot:
        return replace(old, axes=_resolve(old.axes, table))

    terms = tuple(
        Term(term.scale, tuple(replace(one, slots=tuple(map(slot, one.slots))) for one in term.factors))
        for term in form.terms
    )
    return Form(tuple(_resolve(dim, table) for dim in form.dims), terms)


def fresh(form: Form) -> Form:
    """The same form with axes of its own."""
    axes = {*form.axes, *form.summed}
    return substitute(form, {axis: (Axis(axis.size),) for axis in axes})


def unify(left: Axes, right: Axes, table: Table) -> None:
    """Make two lists of axes with one volume the same, by entries in `table`.

    Raises Unreadable when their sizes do not fit.
    """
    first, second = list(_resolve(left, table)), list(_resolve(right, table))
    while first and second:
        a, b = first.pop(0), second.pop(0)
        if a is b:
            continue
        if same(a.size, b.size):
            table[b] = (a,)
        elif (rest := quotient(a.size, b.size)) is not None:
            minor = Axis(rest)
            table[a] = (b, minor)
            first.insert(0, minor)
        elif (rest := quotient(b.size, a.size)) is not None:
            minor = Axis(rest)
            table[b] = (a, minor)
            second.insert(0, minor)
        else:
            raise Unreadable
        if a in second or b in first:
            raise Unreadable  # a diagonal
    if first or second:
        raise Unreadable


# ---------------------------------------------------------------------------------------------- shapes


def leaf_form(node: fx.Node, shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> Form:
    """A tensor as itself."""
    dims = tuple(axes_of(size) for size in shape)
    return Form(dims, (Term(1.0, (Factor(node, tuple(map(Slot, dims)), 1, dtype),)),))


def reshaped(form: Form, shape: Sequence[int | torch.SymInt]) -> Form:
    """The form of a tensor viewed in another shape."""
    table: Table = {}
    left = list(form.axes)
    dims: list[Axes] = []
    for size in map(extent, shape):
        dim: list[Axis] = []
        while not same(volume(dim), size):
            if not left:
                raise Unreadable
            axis = left.pop(0)
            wanted = quotient(size, volume(dim))
            if wanted is None:
                raise Unreadable
            if quotient(wanted, axis.size) is None:
                minor = quotient(axis.size, wanted)
                if minor is None:
                    raise Unreadable
                table[axis] = (Axis(wanted), Axis(minor))
                axis, rest = table[axis]
                left.insert(0, rest)
            dim.append(axis)
        dims.append(tuple(dim))
    if left:
        raise Unreadable
    return Form(tuple(dims), substitute(form, table).terms)


def expanded(form: Form, shape: Sequence[int | torch.SymInt]) -> Form:
    """The form of a tensor broadcast to a shape."""
    dims = [axes_of(size) for size in shape]
    for place in range(1, len(form.dims) + 1):
        if form.dims[-place]:
            dims[-place] = form.dims[-place]
    return Form(tuple(dims), form.terms)


def sliced(form: Form, dim: int, start: int, length: int) -> Form:
    """The form of `length` elements of a dimension, from `start` on; the dimension stays."""
    axes = form.dims[dim]
    if len(axes) != 1:
        if not axes and start == 0 and length == 1:
            return form
        raise Unreadable
    (old,) = axes
    new = axes_of(length)

    def cut(slot: Slot) -> Slot:
        if old not in slot.axes:
            return slot
        if slot.axes != (old,):
            raise Unreadable
        return Slot(new, slot.start + start)

    terms = tuple(
        Term(term.scale, tuple(replace(one, slots=tuple(map(cut, one.slots))) for one in term.factors))
        for term in form.terms
    )
    return Form((*form.dims[:dim], new, *form.dims[dim + 1 :]), terms)


# ---------------------------------------------------------------------------------------------- arithmetic


def add(left: Form, right: Form) -> Form:
    """The sum of two tensors that broadcast against each other."""
    count = max(len(left.dims), len(right.dims))
    left, right = (Form(((),) * (count - len(one.dims)) + one.dims, one.terms) for one in (fresh(left), fresh(right)))
    table: Table = {}
    dims = []
    for a, b in zip(left.dims, right.dims, strict=True):
        if a and b:
            unify(a, b, table)
        dims.append(a or b)
    left, right = substitute(left, table), substitute(right, table)
    terms = left.terms + right.terms
    if len(terms) > MAX_TERMS:
        raise Unreadable
    return Form(tuple(_resolve(dim, table) for dim in dims), terms)


def scaled(form: Form, scale: float) -> Form:
    """A tensor times a number."""
    return Form(form.dims, tuple(Term(term.scale * scale, term.factors) for term in form.terms))


def shifted(form: Form, number: float) -> Form:
    """A tensor plus a number."""
    return Form(form.dims, (*form.terms, Term(float(number))))


def inverted(form: Form) -> Form:
    """1 over a tensor that is one product, with no sum in it."""
    if len(form.terms) != 1 or form.summed or not form.terms[0].scale:
        raise Unreadable
    (term,) = form.terms
    return Form(form.dims, (Term(1 / term.scale, tuple(replace(f, power=-f.power) for f in term.factors)),))


def squared(form: Form) -> Form:
    """The elementwise square of a tensor that is one product, with no sum in it."""
    if len(form.terms) != 1 or form.summed:
        raise Unreadable
    (term,) = form.terms
    return Form(form.dims, (Term(term.scale**2, term.factors * 2),))


def contract(operands: Sequence[tuple[Form, Sequence[Any]]], out: Sequence[Any]) -> Form:
    """The Einstein sum of operands, each with a label a dimension; labels that are not in `out` are summed."""
    table: Table = {}
    axes: dict[Any, Axes] = {}
    forms = []
    for form, labels in operands:
        form = fresh(form)
        forms.append(form)
        for label, dim in zip(labels, form.dims, strict=True):
            if label in axes and axes[label] and dim:
                unify(axes[label], dim, table)
            axes[label] = axes.get(label) or dim
    forms = [substitute(form, table) for form in forms]
    axes = {label: _resolve(dim, table) for label, dim in axes.items()}
    terms = [Term(1.0)]
    for form in forms:
        terms = [Term(a.scale * b.scale, a.factors + b.factors) for a in terms for b in form.terms]
    if len(terms) > MAX_TERMS:
        raise Unreadable
    gone = [axis for label, dim in axes.items() if label not in out for axis in dim]
    terms = [_counted(term, gone) for term in terms]
    return Form(tuple(axes[label] for label in out), tuple(terms))


def _counted(term: Term, gone: Sequence[Axis]) -> Term:
    """A sum over an axis that a term does not depend on multiplies it by the size."""
    for axis in gone:
        if axis not in term.axes:
            if not isinstance(axis.size, int):
                raise Unreadable
            term = Term(term.scale * axis.size, term.factors)
    return term
