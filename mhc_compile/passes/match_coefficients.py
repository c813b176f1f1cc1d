"""Find the coefficients of a site: gates and logits that are one projection of the normalised streams.

The gates are `factor * sigmoid(a) + eps`, the logits of res are `a` itself, and each `a` has to have the form

    a[t, k] = number * sum_d X[t, d] phi[d, k] / sqrt(mean_d X[t, d]^2 + eps) * alpha + b[k]

whatever the order of projection, division and scaling. Factors that depend on d or k (the weight of the norm, a scale
per column) are absorbed into phi; a site may have one projection or several, which are joined.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import mhc_compile.kernels.ops  # noqa: F401 - registers torch.ops.mhc
from mhc_compile.passes.forms import Axes, Axis, Factor, Form, Rms, Slot, Term, Unreadable, substitute, unify, volume
from mhc_compile.passes.match_merge import node_of, tokens_of
from mhc_compile.passes.match_rewrites import Match, Placer, coefficient_dtype, unique
from mhc_compile.passes.op_kinds import aten, packet, tensor_of
from mhc_compile.passes.read_forms import Reader, literal

mhc = torch.ops.mhc

RULE = "mhc::coefficients"


@dataclass(frozen=True)
class Logits:
    """One `a` of the module's docstring: what it is computed from, and which axes of it are columns and inputs.

    node: holds the value; form: its dimensions; streams: X; eps: under the root; terms: what X is multiplied with
    (`weights`), and what is added.
    """

    node: fx.Node
    form: Form
    streams: Factor
    eps: float
    scale: float
    weights: tuple[Factor, ...]
    added: tuple[Term, ...]
    columns: Axes
    summed: frozenset[Axis]


@dataclass(frozen=True)
class Gate:
    """`factor * sigmoid(a) + eps`, at the node `root`."""

    root: fx.Node
    logits: Logits
    factor: float
    eps: float


class Misfit(Exception):
    """The coefficients are none that the op has; the text says why."""


# ---------------------------------------------------------------------------------------------- patterns


def logits_at(node: fx.Node, reader: Reader) -> Logits | None:
    """The logits that a node holds, or None when they are no projection of normalised streams."""
    try:
        form = reader.form(node)
    except Unreadable:
        return None
    main = [term for term in form.terms if any(isinstance(factor.leaf, Rms) for factor in term.factors)]
    if len(main) != 1:
        return None
    (term,) = main
    norms = [factor for factor in term.factors if isinstance(factor.leaf, Rms)]
    if len(norms) != 1 or norms[0].power != -1:
        return None
    (norm,) = norms
    assert isinstance(norm.leaf, Rms)
    streams = [factor for factor in term.factors if factor.leaf is norm.leaf.source and factor.power == 1]
    if len(streams) != 1:
        return None
    (x,) = streams
    weights = tuple(factor for factor in term.factors if factor not in (norm, x))
    summed = frozenset(term.axes - set(form.axes))
    if not summed or not summed <= set(x.axes) or not _normalised_over(x, norm, summed):
        return None
    columns = tuple(axis for axis in form.axes if axis not in x.axes)
    tokens = set(x.axes) - summed
    if any(factor.power != 1 or tokens & set(factor.axes) for factor in weights):
        return None
    added = tuple(one for one in form.terms if one is not term)
    if any(tokens & one.axes or any(f.power != 1 for f in one.factors) or one.axes - set(columns) for one in added):
        return None
    return Logits(node, form, x, norm.leaf.eps, term.scale, weights, added, columns, summed)


def _normalised_over(x: Factor, norm: Factor, summed: frozenset[Axis]) -> bool:
    """The mean of the norm is over just the axes that the projection sums over."""
    for of_x, of_norm in zip(x.slots, norm.slots, strict=True):
        kept = [axis for axis in of_x.axes if axis not in summed]
        if kept != [axis for axis in of_norm.axes if not axis.bound]:
            return False
        if of_x.start or volume(of_x.axes) != volume(of_norm.axes):
            return False
        if len(of_x.axes) > 1 and [axis in summed for axis in of_x.axes] != _bounds_in(of_norm, of_x, summed):
            return False
    return True


def _bounds_in(norm: Slot, x: Slot, summed: frozenset[Axis]) -> list[bool]:
    """Which axes of x's slot the norm has bound, as far as the two are split alike."""
    if len(norm.axes) == len(x.axes):
        return [axis.bound for axis in norm.axes]
    return [True] * len(x.axes) if all(axis.bound for axis in norm.axes) else []


def gate_at(sigmoid: fx.Node, reader: Reader) -> Gate | None:
    """The gate around a sigmoid, or None when its argument are no logits of a site."""
    argument = sigmoid.args[0]
    logits = logits_at(argument, reader) if isinstance(argument, fx.Node) else None
    if logits is None:
        return None
    root, factor, eps = sigmoid, 1.0, 0.0
    while len(root.users) == 1:
        (user,) = root.users
        step = _affine(user, root)
        if step is None:
            break
        root, factor, eps = user, factor * step[0], eps * step[0] + step[1]
    return Gate(root, logits, factor, eps)


def _affine(node: fx.Node, of: fx.Node) -> tuple[float, float] | None:
    """Factor and summand, when the node is `factor * of + summand` with literals."""
    if len(node.args) < 2 or node.kwargs:
        return None
    other = literal(node.args[1] if node.args[0] is of else node.args[0])
    if isinstance(other, bool) or not isinstance(other, (int, float)):
        return None
    kind = packet(node)
    if kind is aten.mul:
        return float(other), 0.0
    if kind is aten.add:
        return 1.0, float(other)
    if kind is aten.div and node.args[0] is of and other:
        return 1 / other, 0.0
    return None


def alike(left: Logits, right: Logits) -> bool:
    """Both are computed from the same streams with the same norm."""
    a, b = left.streams, right.streams
    return (
        a.leaf is b.leaf
        and left.eps == right.eps
        and [[axis in left.summed for axis in slot.axes] for slot in a.slots]
        == [[axis in right.summed for axis in slot.axes] for slot in b.slots]
        and [[axis.size for axis in slot.axes] for slot in a.slots]
        == [[axis.size for axis in slot.axes] for slot in b.slots]
    )


# ---------------------------------------------------------------------------------------------- rewrite


def coefficients_match(pre: Gate, post: Gate | None, res: Logits | None) -> Match:
    """The rewrite of a site's coefficients. Raises Misfit when the op does not have them."""
    n = volume(pre.logits.columns)
    if not isinstance(n, int) or n < 1:
        raise Misfit("the number of streams is not fixed")
    if pre.factor != 1:
        raise Misfit(f"the read gate is {pre.factor:g} sigmoid; the op has a factor for the write gate alone")
    if post is not None and volume(post.logits.columns) != n:
        raise Misfit(f"the read gate has {n} columns, the write gate {volume(post.logits.columns)}")
    if res is not None and (post is None or [axis.size for axis in res.columns] != [n, n]):
        raise Misfit("the logits of res are not n x n, or there is no write gate beside them")
    site = _Site([pre.logits, *([post.logits] if post else []), *([res] if res else [])], n)
    return site.match(pre, post, res)


class _Site:
    """The projections of one site with their axes named alike, and the emission of the joined one."""

    def __init__(self, parts: Sequence[Logits], n: int) -> None:
        self.parts = [parts[0], *(_named_as(parts[0], part) for part in parts[1:])]
        self.n = n
        self._split_streams()
        first = self.parts[0]
        self.streams = first.streams
        self.tokens = tokens_of(first.streams, set(first.summed))
        inputs = [axis for axis in first.streams.axes if axis in first.summed]
        self.stream = next((axis for axis in inputs if axis.size == n), None)
        if self.stream is None:
            raise Misfit(f"the streams have no axis of the gates' {n} columns")
        self.features = tuple(axis for axis in inputs if axis is not self.stream)
        self.inputs: Axes = (self.stream, *self.features)
        if not self.features:
            raise Misfit("the streams have no features")

    def _split_streams(self) -> None:
        """Split a flat axis of n C elements into streams and features, if no axis of n elements is there."""
        first = self.parts[0]
        inputs = [axis for axis in first.streams.axes if axis in first.summed]
        if any(axis.size == self.n for axis in inputs):
            return
        whole = inputs[0]
        if not isinstance(whole.size, int) or whole.size % self.n:
            raise Misfit(f"{whole.size} features are no multiple of the {self.n} columns of a gate")
        table: dict[Axis, Axes] = {whole: (Axis(self.n), Axis(whole.size // self.n))}
        self.parts = [_substituted(part, table) for part in self.parts]

    # ------------------------------------------------------------------------------------------ match

    def match(self, pre: Gate, post: Gate | None, res: Logits | None) -> Match:
        roots = [pre.root, *([post.root] if post else []), *([res.node] if res else [])]
        factor, post_eps = (post.factor, post.eps) if post else (2.0, 0.0)
        streams = node_of(self.streams)
        leaves = [node_of(one) for part in self.parts for one in (*part.weights, *_factors(part.added))]
        variant = (pre.logits.eps, pre.eps, factor, post_eps, len(self.parts))

        def build(place: Placer) -> tuple[fx.Node, ...]:
            like = roots[0]
            state = place.now(streams)
            dtype = coefficient_dtype(state)
            x = place.arranger.factor(self.streams, state, [*self.tokens, (self.inputs[0],), self.inputs[1:]], None)
            phi, alpha, bias = self._weights(place, dtype, like)
            made = place.emit.call(mhc.coefficients.default, x, phi, alpha, bias, *variant, like=like)
            outputs = []
            for number, (part, root) in enumerate(zip(self.parts, roots, strict=True)):
                value = place.emit.call(operator.getitem, made, number, like=like)
                have = [Slot(dim) for dim in (*self.tokens, *((axis,) for axis in part.columns))]
                value = place.arranger.arranged(value, have, part.form.dims)
                outputs.append(place.emit.cast(value, tensor_of(root).dtype))  # type: ignore[union-attr]
            return tuple(outputs)

        return Match(RULE, tuple(roots), unique([streams, *leaves]), build)

    def _weights(self, place: Placer, dtype: torch.dtype, like: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        phi = _joined(place, [self._phi(part) for part in self.parts], 1, dtype, like)
        alpha = _joined(place, [_alpha(part, self.inputs) for part in self.parts], 0, dtype, like)
        bias = _joined(place, [_bias(part) for part in self.parts], 0, dtype, like)
        return phi, alpha, bias

    def _phi(self, part: Logits) -> _Piece:
        wide = [one for one in part.weights if one.axes]
        return _Piece([(1.0, wide)], [self.inputs, part.columns])


@dataclass(frozen=True)
class _Piece:
    """A sum of products of weights, each a number and its factors, in a layout; the last dimension is joined."""

    terms: Sequence[tuple[float, Sequence[Factor]]]
    wanted: Sequence[Axes]


def _alpha(part: Logits, inputs: Axes) -> _Piece:
    return _Piece([(part.scale, [one for one in part.weights if not one.axes])], [()])


def _bias(part: Logits) -> _Piece:
    return _Piece([(term.scale, term.factors) for term in part.added], [part.columns])


def _joined(place: Placer, pieces: Sequence[_Piece], dim: int, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """The pieces side by side: a view of the one tensor that they are slices of, or a concatenation."""
    whole = _one_leaf(pieces)
    if whole is not None:
        leaf, slots, wanted = whole
        node = place.now(leaf)
        return place.emit.cast(place.arranger.arranged(node, slots, wanted), dtype)
    nodes = [_emitted(place, piece, dtype, like) for piece in pieces]
    return nodes[0] if len(nodes) == 1 else place.emit.call(aten.cat.default, nodes, dim, like=like)


def _one_leaf(pieces: Sequence[_Piece]) -> tuple[fx.Node, list[Slot], list[Axes]] | None:
    """The tensor that the pieces are consecutive slices of, its slots, and the layout that joins them."""
    factors = []
    for piece in pieces:
        if len(piece.terms) != 1 or piece.terms[0][0] != 1 or len(piece.terms[0][1]) != 1:
            return None
        factors.append(piece.terms[0][1][0])
    leaf = factors[0].leaf
    value = tensor_of(leaf)
    if value is None or any(one.leaf is not leaf or one.power != 1 for one in factors):
        return None
    cut = _cut_slot(pieces, factors)
    if cut is None or cut[1] != value.shape[cut[0]]:
        return None
    place, length = cut
    joined = Axis(length)
    slots = [Slot((joined,)) if at == place else slot for at, slot in enumerate(factors[0].slots)]
    if any(slot.start for slot in slots):
        return None
    assert isinstance(leaf, fx.Node)
    return leaf, slots, [*pieces[0].wanted[:-1], (joined,)]


def _cut_slot(pieces: Sequence[_Piece], factors: Sequence[Factor]) -> tuple[int, int] | None:
    """The dimension of the leaf along which the pieces follow each other from its first element, and their length."""
    for place in range(len(factors[0].slots)):
        end = 0
        for piece, factor in zip(pieces, factors, strict=True):
            slot = factor.slots[place]
            if slot.axes != tuple(piece.wanted[-1]) or slot.start != end:
                break
            end += volume(slot.axes)
        else:
            others = [[slot for at, slot in enumerate(factor.slots) if at != place] for factor in factors]
            if all(other == others[0] for other in others):
                return place, end
    return None


def _emitted(place: Placer, piece: _Piece, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """The sum of products of one piece."""
    total = None
    for scale, factors in piece.terms:
        node = None
        for factor in factors:
            given = place.arranger.factor(factor, place.now(node_of(factor)), piece.wanted, dtype)
            node = given if node is None else place.emit.call(aten.mul.Tensor, node, given, like=like)
        if node is None:
            node = _full(place, piece, scale, dtype, like)
        elif scale != 1:
            node = place.emit.call(aten.mul.Tensor, node, scale, like=like)
        total = node if total is None else place.emit.call(aten.add.Tensor, total, node, like=like)
    if total is None:
        total = _full(place, piece, 0.0, dtype, like)
    return total


def _full(place: Placer, piece: _Piece, number: float, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    value: Any = tensor_of(like)
    sizes = [volume(dim) for dim in piece.wanted]
    return place.emit.call(aten.full.default, sizes, number, dtype=dtype, device=value.device, like=like)


def _factors(terms: Sequence[Term]) -> list[Factor]:
    return [factor for term in terms for factor in term.factors]


def _named_as(first: Logits, other: Logits) -> Logits:
    """The other logits with the axes of the streams named as in the first."""
    table: dict[Axis, Axes] = {}
    for ours, theirs in zip(first.streams.slots, other.streams.slots, strict=True):
        unify(ours.axes, theirs.axes, table)
    return _substituted(other, table)


def _substituted(part: Logits, table: dict[Axis, Axes]) -> Logits:
    terms = (Term(part.scale, (part.streams, *part.weights)), *part.added)
    form = substitute(Form((*part.form.dims, part.columns, tuple(part.summed)), terms), table)
    *dims, columns, summed = form.dims
    (streams, *weights), added = form.terms[0].factors, form.terms[1:]
    plain = Form(tuple(dims), part.form.terms)
    return Logits(
        part.node, plain, streams, part.eps, part.scale, tuple(weights), added, columns, frozenset(summed)
    )
