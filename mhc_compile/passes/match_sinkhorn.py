"""Find Sinkhorn chains: a matrix of positive entries whose two axes are divided by their sums in turn.

A chain is walked from its last division back to its start. What a division divides by, and along which axis, is read
from its form, so that the spelling (keepdim or a view, quotient or product, any layout) does not matter. In the
logarithmic domain a step is `a - logsumexp(a)` or a `log_softmax`. Every step has to have the same eps, the axes have
to alternate and the start has to be one that `mhc::sinkhorn` has; otherwise the chain is refused.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import fx

import mhc_compile.kernels.ops  # noqa: F401 - registers torch.ops.mhc
from mhc_compile.passes.forms import Axis, Factor, Form, Slot, Term, Unreadable, contract, leaf_form
from mhc_compile.passes.match_rewrites import Match, Placer, Refusal, bound_to, coefficient_dtype, refusal
from mhc_compile.passes.op_kinds import aten, is_float_tensor, packet, tensor_of
from mhc_compile.passes.read_forms import LAYOUT_OPS, Depth, Reader, dims_of, literal, number_of

mhc = torch.ops.mhc

RULE = "mhc::sinkhorn"
# `torch.nn.functional.normalize` guards its divisor so. Below it a float32 sum of a line that was normalised a
# step before holds no digit that matters.
GUARD = 1e-12
_GUARDED = f"the guard of {GUARD:g} below a Sinkhorn chain's divisors (F.normalize) is left out: no sum comes near it"
_NOTICED = 3  # fewer normalisations than this are no chain that a reader of the report would miss


@dataclass(frozen=True)
class Step:
    """One normalisation: the axis, the eps in its divisor, the node, and the tensor before it."""

    axis: Axis
    eps: float
    node: fx.Node
    before: Factor
    added: float = 0.0  # behind the quotient
    guarded: bool = False  # by a clamp that sums of normalised lines never reach
    reason: str = ""  # why this step has no form in the op


@dataclass(frozen=True)
class Chain:
    """The steps of a chain, the first one first, and the tensor that they begin with; start: `exp` or another op."""

    root: fx.Node
    slots: tuple[Slot, ...]
    steps: tuple[Step, ...]
    start: Factor
    exponential: bool
    shift: Factor | None


def find_sinkhorn(graph: fx.Graph) -> tuple[list[Match], list[Refusal]]:
    """The Sinkhorn chains of a graph, and those that are none that the op could compute."""
    walker = _Walker()
    inner: set[fx.Node] = set()
    matches, refusals = [], []
    for node in reversed(graph.nodes):  # from its end, a chain is walked once and whole
        if node in inner or packet(node) not in _ENDS or not is_float_tensor(node):
            continue
        chain = walker.chain(node)
        if chain is None:
            continue
        inner.update(_parts(chain))
        reason = _misfit(chain) or _continued(node)
        if reason is None:
            matches.append(_match(chain))
        elif len(chain.steps) >= _NOTICED:
            refusals.append(refusal(RULE, reason, node))
    return matches[::-1], refusals[::-1]


def _parts(chain: Chain) -> list[fx.Node]:
    """The nodes of a chain that a chain of their own would end at."""
    leaves = [step.before.leaf for step in chain.steps]
    nodes = [*leaves, *(step.node for step in chain.steps)]
    return [node for node in nodes if isinstance(node, fx.Node) and node is not chain.root]


_REDUCTIONS = frozenset({aten.sum, aten.logsumexp, aten.linalg_vector_norm, aten.amax, aten.mean})
_SOFTMAXES = frozenset({aten.softmax, aten.special_softmax, aten._softmax})
_LOG_SOFTMAXES = frozenset({aten.log_softmax, aten.special_log_softmax, aten._log_softmax})
_ENDS = frozenset({aten.div, aten.mul, aten.exp, aten.true_divide, *_SOFTMAXES})


class _Walker:
    """Walks chains back; each node is looked at once."""

    def __init__(self) -> None:
        self._reader = Reader(Depth.SINGLE)

    def chain(self, root: fx.Node) -> Chain | None:
        """The chain that ends at `root`; None when `root` ends none."""
        value = tensor_of(root)
        assert value is not None
        if value.dim() < 2:
            return None
        try:
            slots = leaf_form(root, value.shape, value.dtype).terms[0].factors[0].slots
            return self._walk(root, slots)
        except Unreadable:
            return None

    def _walk(self, root: fx.Node, slots: tuple[Slot, ...]) -> Chain | None:
        at = Factor(root, slots, 1, torch.float64)
        steps: list[Step] = []
        logarithmic = False
        shift: Factor | None = None
        while True:
            try:
                step = self._logarithmic(at) if logarithmic else self._quotient(at)
                if step is not None:
                    steps.append(step)
                    at, logarithmic = step.before, logarithmic or packet(step.node) in _SOFTMAXES
                elif not logarithmic and packet(_node(at)) is aten.exp:
                    logarithmic, at = True, self._argument(at)
                elif logarithmic and shift is None and (found := self._shifted(at)) is not None:
                    at, shift = found
                else:
                    break
            except Unreadable:
                break
        if not steps:
            return None
        return Chain(root, slots, tuple(reversed(steps)), at, logarithmic, shift)

    # ------------------------------------------------------------------------------------------ steps

    def _form(self, at: Factor) -> Form:
        return bound_to(self._reader.form(_node(at)), at.slots)

    def _argument(self, at: Factor) -> Factor:
        """The first argument of the op at a leaf, behind views and casts where they only reorder dimensions."""
        node: Any = _node(at).args[0]
        try:
            return _alone(bound_to(self._reader.leaf(node), at.slots))
        except Unreadable:
            value = tensor_of(node)
            assert value is not None
            return _alone(bound_to(leaf_form(node, value.shape, value.dtype), at.slots))

    def _quotient(self, at: Factor) -> Step | None:
        """`a / (sum(a) + eps)`, or a softmax, perhaps with an eps behind it."""
        form = self._form(at)
        added = sum(term.scale for term in form.terms if not term.factors)
        products = [term for term in form.terms if term.factors]
        if len(products) != 1 or form.summed or products[0].scale != 1:
            return None
        factors = products[0].factors
        if len(factors) == 1 and factors[0].power == 1:
            return self._softmax(factors[0], added, at)
        if len(factors) != 2 or added:
            return None
        for a, divisor in (factors, factors[::-1]):
            if (a.power, divisor.power) == (1, -1):
                return self._divided(a, divisor, at)
        return None

    def _softmax(self, at: Factor, added: float, end: Factor) -> Step | None:
        """The step that a softmax is: in its argument's exponential."""
        node = _node(at)
        if packet(node) not in _SOFTMAXES or (packet(node) is aten._softmax and node.args[2]):  # which casts as well
            return None
        slot = at.slots[_dim(node) % len(at.slots)]
        (axis,) = slot.axes if len(slot.axes) == 1 else (None,)
        if axis is None:
            return None
        return Step(axis, 0.0, node, self._argument(at), added)

    def _divided(self, a: Factor, divisor: Factor, at: Factor) -> Step | None:
        node, reason, guarded = _node(divisor), "", False
        if packet(node) in (aten.clamp_min, aten.clamp):
            least = number_of(node, 1)
            guarded = least is not None and least <= GUARD and len(node.args) < 3
            reason = "" if guarded else "its divisors are clamped"
            node = node.args[0]  # type: ignore[assignment]
        line = bound_to(self._sum(node), divisor.slots)
        eps = sum(term.scale for term in line.terms if not term.factors)
        sums = [term for term in line.terms if term.factors]
        if len(sums) != 1 or len(sums[0].factors) != 1:
            return None
        axis = _summed(a, sums[0].factors[0], line)
        if axis is None:
            return None
        if sums[0].scale != 1:
            reason = "a divisor is a multiple of the sum"
        return Step(axis, eps, _node(at), a, 0.0, guarded, reason)

    def _sum(self, node: fx.Node) -> Form:
        """The form of a sum over an axis; of positive entries a 1-norm is one, also where it is decomposed."""
        if packet(node) is aten.linalg_vector_norm and node.args[1] == 1:
            return self._line(node, *dims_of(node))
        total = _first_power(node)
        if packet(total) is aten.sum:
            entries = _first_power(total.args[0])
            if packet(entries) is aten.abs:
                return self._line(total, *dims_of(total), entries.args[0])
        return self._reader.form(node)

    def _line(self, node: fx.Node, dims: Sequence[int], keep: bool, entries: Any = None) -> Form:
        """The form of the sum over dimensions of what a reduction reads, or of `entries`."""
        form = self._reader.leaf(node.args[0] if entries is None else entries)  # type: ignore[arg-type]
        names = list(range(len(form.dims)))
        gone = [dim % len(names) for dim in dims]
        total = contract([(form, names)], [name for name in names if name not in gone])
        if not keep:
            return total
        kept = iter(total.dims)
        return Form(tuple(() if name in gone else next(kept) for name in names), total.terms)

    # ------------------------------------------------------------------------------------------ logarithms

    def _logarithmic(self, at: Factor) -> Step | None:
        """`a - logsumexp(a)`, or a log_softmax: the logarithm of a quotient."""
        node = _node(at)
        if packet(node) in _LOG_SOFTMAXES:
            slot = at.slots[_dim(node) % len(at.slots)]
            return Step(slot.axes[0], 0.0, node, self._argument(at)) if len(slot.axes) == 1 else None
        pair = self._difference(at)
        if pair is None or packet(_node(pair[1])) is not aten.logsumexp:
            return None
        a, least = pair
        reduced = _node(least)
        line = bound_to(self._line(reduced, *dims_of(reduced)), least.slots)
        axis = _summed(a, _alone(line), line)
        return None if axis is None else Step(axis, 0.0, node, a)

    def _shifted(self, at: Factor) -> tuple[Factor, Factor] | None:
        """`a - max(a)`: a and the maximum."""
        pair = self._difference(at)
        if pair is None:
            return None
        a, most = pair
        node = _node(most)
        if packet(node) is aten.detach:
            node = node.args[0]  # type: ignore[assignment]
        if node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        if packet(node) not in (aten.amax, aten.max):
            return None
        source = self._reader.leaf(node.args[0])  # type: ignore[arg-type]
        return (a, most) if _alone(source).leaf is a.leaf else None

    def _difference(self, at: Factor) -> tuple[Factor, Factor] | None:
        form = self._form(at)
        if len(form.terms) != 2 or form.summed:
            return None
        for plus, minus in (form.terms, form.terms[::-1]):
            if (plus.scale, minus.scale) == (1, -1) and len(plus.factors) == len(minus.factors) == 1:
                return plus.factors[0], minus.factors[0]
        return None


def _first_power(node: Any) -> fx.Node:
    """What a node raises to the power of 1; another node itself."""
    of_one = packet(node) is aten.pow and literal(node.args[1]) == 1
    return node.args[0] if of_one else node  # type: ignore[no-any-return]


def _dim(node: fx.Node) -> int:
    """The dimension of a softmax."""
    dim = number_of(node, 1)
    if dim is None:
        raise Unreadable
    return int(dim)


def _summed(whole: Factor, part: Factor, line: Form) -> Axis | None:
    """The one axis of `whole` that `line`, a sum of it, has summed over; None if it is the sum of something else."""
    gone = set(part.axes) - set(line.axes)
    if part.leaf is not whole.leaf or part.power != 1 or len(gone) != 1:
        return None
    found = []
    for one, other in zip(whole.slots, part.slots, strict=True):
        if one.start != other.start or len(one.axes) != len(other.axes):
            return None
        pairs = zip(one.axes, other.axes, strict=True)
        found += [a for a, b in pairs if a is not b and b in gone]
        if any(a is not b and b not in gone for a, b in zip(one.axes, other.axes, strict=True)):
            return None
    return found[0] if len(found) == 1 else None


def _node(at: Factor) -> fx.Node:
    if not isinstance(at.leaf, fx.Node):
        raise Unreadable
    return at.leaf


def _alone(form: Form) -> Factor:
    """The factor of a form that is a leaf and nothing else."""
    terms: tuple[Term, ...] = form.terms
    if len(terms) != 1 or len(terms[0].factors) != 1 or terms[0].scale != 1 or terms[0].factors[0].power != 1:
        raise Unreadable
    return terms[0].factors[0]


# ---------------------------------------------------------------------------------------------- check


def _misfit(chain: Chain) -> str | None:
    """Why the op cannot compute the chain; None when it can."""
    first, last = chain.steps[0], chain.steps[-1]
    reasons = [step.reason for step in chain.steps if step.reason]
    if reasons:
        return reasons[0]
    if not chain.exponential:
        return "it starts from entries that are neither exp(logits) nor a softmax"
    axes = [step.axis for step in chain.steps]
    if len(set(axes)) != 2:
        return "it normalises one axis only" if len(set(axes)) == 1 else "it normalises more than two axes"
    if any(a is b for a, b in itertools.pairwise(axes)):
        return "an iteration lacks one of its two normalisations: the axes do not alternate"
    if last.axis is first.axis:
        return f"it ends with a half iteration: {len(axes)} normalisations"
    if not isinstance(first.axis.size, int) or first.axis.size != last.axis.size:
        return "its matrices are not square"
    if chain.shift is not None and first.axis in chain.shift.axes:
        return "the maximum that it subtracts differs along the axis normalised first, where it does not cancel"
    return _misfit_of_eps(chain)


def _continued(end: fx.Node, steps: int = 5) -> str | None:
    """Why the end of a chain is not its end: it is combined with a sum of itself again, in some other way."""
    values = {end, *(user for user in end.users if packet(user) in LAYOUT_OPS)}
    reached = {user for value in values for user in value.users if packet(user) in _REDUCTIONS}
    for _ in range(steps):
        reached = {user for node in reached for user in node.users if user.op == "call_function"}
        if any(source in values for node in reached for source in node.all_input_nodes):
            return "it goes on with a step that is no normalisation"
    return None


def _misfit_of_eps(chain: Chain) -> str | None:
    """The op adds nothing anywhere, or one eps behind a softmax and to every divisor."""
    first, *later = chain.steps
    if any(step.added for step in later):
        return "an eps is added behind a softmax inside the chain"
    placed = {step.eps for step in later}
    if len(placed) > 1:
        return f"the eps of its divisors differ: {', '.join(map(str, sorted(placed)))}"
    (eps,) = placed
    if eps == first.added == first.eps == 0:
        return None
    if packet(first.node) not in _SOFTMAXES:
        return f"eps {eps or first.eps} in its divisors needs a start of softmax + eps; it starts from exp"
    if eps <= 0 or not isclose(eps, first.added, rel_tol=1e-12):
        return f"eps is {first.added} behind the softmax and {eps} in the divisors; the op has one for both"
    return None


# ---------------------------------------------------------------------------------------------- rewrite


def _match(chain: Chain) -> Match:
    logits = _node(chain.start)
    first, second = chain.steps[0].axis, chain.steps[1].axis
    axes = chain.start.axes
    rows_first = axes.index(second) < axes.index(first)
    pair = (second, first) if rows_first else (first, second)
    tokens = [(axis,) for axis in axes if axis not in pair]
    wanted = [*tokens, (pair[0],), (pair[1],)]
    iterations = len(chain.steps) // 2
    eps = chain.steps[1].eps
    value = tensor_of(chain.root)
    assert value is not None

    def build(place: Placer) -> tuple[fx.Node, ...]:
        source = place.now(logits)
        given = place.arranger.factor(chain.start, source, wanted, coefficient_dtype(source))
        made = place.emit.call(mhc.sinkhorn.default, given, iterations, eps, rows_first, like=chain.root)
        back = place.arranger.arranged(made, [Slot(dim) for dim in wanted], [slot.axes for slot in chain.slots])
        return (place.emit.cast(back, value.dtype),)

    guarded = any(step.guarded for step in chain.steps)
    return Match(RULE, (chain.root,), (logits,), build, (_GUARDED,) if guarded else ())
