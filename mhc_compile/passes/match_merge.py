"""Find what reads and writes streams: the merge, the aggregate, and the mean over streams.

    merge      X'[t, i, c] = sum_j res[t, i, j] X[t, j, c] + post[t, i] f[t, c]     (without res: X[t, i, c] + ...)
    aggregate  u[t, c]     = sum_i pre[t, i] X[t, i, c]
    readout    y[t, c]     = sum_i X[t, i, c] / n

They are told by the axes of their forms alone; which axis is which follows from who has it. A product with streams is
no sign of mHC by itself: attention and linear attention have the same forms. The rules that need more than the form
say so in their arguments.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from math import isclose

import torch
from torch import fx

import mhc_compile.kernels.ops  # noqa: F401 - registers torch.ops.mhc
from mhc_compile.passes.forms import Axes, Axis, Factor, Form, Slot, Term, Unreadable
from mhc_compile.passes.match_rewrites import PARALLEL_STREAMS, Match, Placer, narrowed_root
from mhc_compile.passes.op_kinds import aten, tensor_of
from mhc_compile.passes.read_forms import Reader

mhc = torch.ops.mhc

MERGE, AGGREGATE, READOUT = "mhc::merge", "mhc::aggregate", "mhc::readout"


@dataclass(frozen=True)
class Merge:
    """A merge as its form says it: the factors, and the axes of stream, of features, and of tokens by dimension."""

    root: fx.Node
    form: Form
    streams: Factor
    f: Factor
    post: Factor
    scale: float
    res: Factor | None
    stream: Axis
    source: Axis | None  # the axis that res sums over
    features: Axes

    @property
    def tokens(self) -> list[Axes]:
        """The axes of tokens, a group for each dimension of the streams."""
        return tokens_of(self.streams, {self.source or self.stream, *self.features})


@dataclass(frozen=True)
class Read:
    """An aggregate (with `pre`) or a mean over streams (without)."""

    root: fx.Node
    form: Form
    streams: Factor
    pre: Factor | None
    scale: float
    stream: Axis
    features: Axes

    @property
    def tokens(self) -> list[Axes]:
        return tokens_of(self.streams, {self.stream, *self.features})


def tokens_of(streams: Factor, others: set[Axis]) -> list[Axes]:
    """The axes of the streams but `others`, a group for each dimension."""
    groups = [tuple(axis for axis in slot.axes if axis not in others) for slot in streams.slots]
    return [group for group in groups if group]


# ---------------------------------------------------------------------------------------------- patterns


def merge_at(node: fx.Node, reader: Reader) -> Merge | None:
    """The merge that an add is, or None."""
    form = reader.opened(node)
    if len(form.terms) != 2:
        return None
    for kept, written in (form.terms, form.terms[::-1]):
        for streams, res, source in _kept(form, kept):
            for post, f in _pairs(written):
                found = _as_merge(node, form, streams, res, source, post, f, written)
                if found is not None:
                    return found
    return None


def _kept(form: Form, term: Term) -> Iterator[tuple[Factor, Factor | None, Axis | None]]:
    """How a term may be the streams, mixed or not: the streams, res, and the axis that is summed."""
    if term.scale != 1 or any(factor.power != 1 for factor in term.factors):
        return
    summed = term.axes - set(form.axes)
    if len(term.factors) == 1 and not summed:
        yield term.factors[0], None, None
    elif len(term.factors) == 2 and len(summed) == 1:
        (source,) = summed
        for res, streams in (term.factors, term.factors[::-1]):
            if source in res.axes and source in streams.axes:
                yield streams, res, source


def _pairs(term: Term) -> Iterator[tuple[Factor, Factor]]:
    if len(term.factors) == 2 and all(factor.power == 1 for factor in term.factors):
        yield term.factors
        yield term.factors[::-1]


def _as_merge(
    node: fx.Node,
    form: Form,
    streams: Factor,
    res: Factor | None,
    source: Axis | None,
    post: Factor,
    f: Factor,
    written: Term,
) -> Merge | None:
    out = set(form.axes)
    only_post = [axis for axis in post.axes if axis not in f.axes]
    if len(only_post) != 1 or written.axes - out:
        return None
    (stream,) = only_post
    tokens_and_features = out - {stream}
    if set(f.axes) != tokens_and_features or set(streams.axes) != tokens_and_features | {source or stream}:
        return None
    if not isinstance(stream.size, int) or not 1 < stream.size <= PARALLEL_STREAMS or stream in f.axes:
        return None
    if res is not None:
        if source is None or source.size != stream.size or not {stream, source} <= set(res.axes):
            return None
        used = set(post.axes) | set(res.axes)
    else:
        used = set(post.axes)
    features = tuple(axis for axis in streams.axes if axis not in used)
    if not features:
        return None
    return Merge(node, form, streams, f, post, written.scale, res, stream, source, _static_features(streams, features))


def _static_features(streams: Factor, candidates: Axes) -> Axes:
    """The feature axes among those that no coefficient has: the last dimension, if coefficients have no tokens."""
    for slot in reversed(streams.slots):
        last = tuple(axis for axis in slot.axes if axis in candidates)
        if last:
            break
    dynamic = len({axis for slot in streams.slots for axis in slot.axes}) - len(candidates) > 1
    return candidates if dynamic else last


def read_at(node: fx.Node, reader: Reader) -> Read | None:
    """The aggregate or the mean over streams that a node is, or None."""
    form = reader.opened(node)
    if len(form.terms) != 1 or len(form.summed) != 1:
        return None
    (term,), (stream,) = form.terms, form.summed
    if not isinstance(stream.size, int) or stream.size > PARALLEL_STREAMS or any(f.power != 1 for f in term.factors):
        return None
    out = set(form.axes)
    if len(term.factors) == 1:
        (streams,) = term.factors
        mean = isclose(term.scale * stream.size, 1, rel_tol=1e-9)
        dims = [tuple(axis for axis in slot.axes if axis is not stream) for slot in streams.slots]
        features = [dim for dim in dims if dim][-1] if any(dims) else ()
        if not mean or set(streams.axes) != out | {stream} or not features:
            return None
        return Read(node, form, streams, None, 1.0, stream, features)
    if len(term.factors) != 2:
        return None
    for pre, streams in (term.factors, term.factors[::-1]):
        features = tuple(axis for axis in streams.axes if axis not in pre.axes)
        whole = set(streams.axes) == out | {stream} and set(pre.axes) <= set(streams.axes) and stream in pre.axes
        if whole and features:
            return Read(node, form, streams, pre, term.scale, stream, _static_features(streams, features))
    return None


def is_static(factor: Factor, tokens: Container[Axis]) -> bool:
    """The coefficient is one for all tokens."""
    return not any(axis in tokens for axis in factor.axes)


# ---------------------------------------------------------------------------------------------- rewrites


def merge_match(found: Merge) -> Match:
    """The rewrite of a merge."""
    root = narrowed_root(found.root)
    x, f = _value(found.streams), _value(found.f)
    result = tensor_of(root)
    assert result is not None
    given = f.dtype if found.f.narrowest == f.dtype else found.f.narrowest
    computed = torch.promote_types(torch.promote_types(x.dtype, given), result.dtype)
    if result.dtype.itemsize < torch.promote_types(x.dtype, given).itemsize:
        computed = torch.promote_types(x.dtype, given)
    coefficients = [one for one in (found.post, found.res) if one is not None]
    rounded = computed.itemsize == 2 and all(
        one.narrowest == computed and _value(one).dtype != computed for one in coefficients
    )
    wide = torch.float64 if computed == torch.float64 else torch.float32
    stream, features, tokens = (found.stream,), found.features, found.tokens
    source = (found.source,) if found.source else stream
    transposed = False
    if found.res is not None and found.source is not None:
        order = found.res.axes
        transposed = order.index(found.source) < order.index(found.stream)

    def build(place: Placer) -> tuple[fx.Node, ...]:
        arranger, like = place.arranger, found.root
        now = {one: place.now(node_of(one)) for one in (found.streams, found.f, *coefficients)}
        for one, node in now.items():
            arranger.learn(node, one.slots)
        state = arranger.factor(found.streams, now[found.streams], [*tokens, source, features], computed)
        branch = arranger.factor(found.f, now[found.f], [*tokens, features], None)
        branch = place.emit.cast(branch, given)
        post = arranger.factor(found.post, now[found.post], [*tokens, stream], wide)
        if found.scale != 1:
            post = place.emit.call(aten.mul.Tensor, post, found.scale, like=like)
        res = None
        if found.res is not None:
            pair = [source, stream] if transposed else [stream, source]
            res = arranger.factor(found.res, now[found.res], [*tokens, *pair], wide)
        made = place.emit.call(mhc.merge.default, state, branch, post, res, transposed, rounded, like=like)
        back = arranger.arranged(made, [Slot(dim) for dim in (*tokens, stream, features)], found.form.dims)
        return (place.emit.cast(back, result.dtype),)

    inputs = tuple(node_of(one) for one in (found.streams, found.f, *coefficients))
    return Match(MERGE, (root,), inputs, build)


def read_match(found: Read) -> Match:
    """The rewrite of an aggregate or of a mean over streams."""
    root = narrowed_root(found.root)
    result, x = tensor_of(root), _value(found.streams)
    assert result is not None
    computed = torch.promote_types(x.dtype, result.dtype)
    wide = torch.float64 if computed == torch.float64 else torch.float32
    tokens, stream, features = found.tokens, (found.stream,), found.features

    def build(place: Placer) -> tuple[fx.Node, ...]:
        arranger, like = place.arranger, found.root
        node = place.now(node_of(found.streams))
        state = arranger.factor(found.streams, node, [*tokens, stream, features], computed)
        if found.pre is None:
            made = place.emit.call(mhc.readout.default, state, like=like)
        else:
            pre = arranger.factor(found.pre, place.now(node_of(found.pre)), [*tokens, stream], wide)
            if found.scale != 1:
                pre = place.emit.call(aten.mul.Tensor, pre, found.scale, like=like)
            made = place.emit.call(mhc.aggregate.default, state, pre, like=like)
        back = arranger.arranged(made, [Slot(dim) for dim in (*tokens, features)], found.form.dims)
        return (place.emit.cast(back, result.dtype),)

    inputs = tuple(node_of(one) for one in (found.streams, found.pre) if one is not None)
    return Match(AGGREGATE if found.pre is not None else READOUT, (root,), inputs, build)


def node_of(factor: Factor) -> fx.Node:
    """The node that a factor is."""
    if not isinstance(factor.leaf, fx.Node):
        raise Unreadable
    return factor.leaf


def _value(factor: Factor) -> torch.Tensor:
    value = tensor_of(node_of(factor))
    assert value is not None
    return value
