"""Lower the ops of a site to the two of level 2 (`kernels.site_ops`), where that computes the same.

    level 1                                        level 2
    pre, post, logits = coefficients(X, ...)       u, pre, post, res, carrier = read(X, ...)
    res = sinkhorn(logits)
    u = aggregate(X, pre)
    f = F(u)                                       f = F(u)
    X' = merge(X, f, post, res)                    X' = merge_carried(X, f, carrier, post, res)

With single-pass reads the aggregate of X is not by its own pre but by w, that of the site before, and becomes part of

    u = aggregate(X, w)                            u, pre, post, res, carrier = read_early(X, w, ...)

A site without mixing has no Sinkhorn, and a head is coefficients and an aggregate alone. A site is matched by its
values alone, from its coefficients on. Whoever else reads X, pre, post or res goes on reading it. What does not fit
stays on level 1, which is always right, and a note says why.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

import mhc_compile.kernels.single_pass_ops
import mhc_compile.kernels.site_ops  # noqa: F401 - registers the ops of both levels
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.emit import Emitter
from mhc_compile.passes.history import Outcome
from mhc_compile.passes.provenance import source_line

mhc = torch.ops.mhc

LOGITS = "the logits of its res are not read by one Sinkhorn alone"
SKIP = "its merge does not take the streams that it reads: an op on the skip (a scale, a mask, a cast) changes them"
WRITTEN = "an op writes in place into its streams"
GRADIENTS = "its ops stand in regions of different grad mode"
IMPLICIT = "there is no kernel of a site whose Sinkhorn has an implicit gradient"
OTHER_FORM = "there is no kernel of coefficients in this form (static, fixed pre or post, lite, unconstrained)"
OTHER_RES = "there is no kernel of a site whose res is {kind}"
MERGES = "its merges differ in how they take res (transposed, rounded)"
UNREAD = "no aggregate reads its streams with its pre"


@dataclass(frozen=True)
class SiteOps:
    """The level-1 ops of one site; `pre` and `post` are the nodes that hold those outputs of `coefficients`.

    `aggregates` are by its own pre; where there are none, `early` are those by another weight, the same for all.
    """

    coefficients: fx.Node
    pre: tuple[fx.Node, ...]
    post: tuple[fx.Node, ...]
    sinkhorn: fx.Node | None
    aggregates: tuple[fx.Node, ...]
    merges: tuple[fx.Node, ...]
    early: tuple[fx.Node, ...] = ()

    @property
    def is_early(self) -> bool:
        """Nobody reads its streams by its own pre, which is for the site behind it."""
        return not self.aggregates


def lower(gm: fx.GraphModule, compiled: bool = False, early: bool = True) -> Outcome:
    """Rewrite every site of `gm` that fits, in place; a note for each reason why others do not.

    compiled: inductor may compile the bodies of the ops, too, where they run on a CPU. early: sites with single-pass
    reads become `read_early`; otherwise they are a `read` whose u nobody takes, and their aggregates stay.
    """
    starts = [node for node in gm.graph.nodes if node.target in (mhc.coefficients.default, mhc.gates.default)]
    if not starts:
        return Outcome(False)
    flow = Dataflow(gm.graph)
    found = [match(start, flow) for start in starts]
    if early:
        found = [with_early_read(site, flow) if isinstance(site, SiteOps) else site for site in found]
    emitter = Emitter(gm.graph)
    for site in found:
        if isinstance(site, SiteOps):
            _rewrite(emitter, site, compiled, early and site.is_early)
    gm.recompile()
    kept: dict[str, list[str]] = {}
    for start, reason in zip(starts, found, strict=True):
        if isinstance(reason, str):
            kept.setdefault(reason, []).append(start.meta.get("mhc_site") or source_line(start) or start.name)
    notes = [_note(reason, names) for reason, names in kept.items()]
    reads = sum(isinstance(site, SiteOps) and bool(site.early) for site in found)
    if reads:
        notes.append(f"{reads} {'site reads' if reads == 1 else 'sites read'} with the pre of the site before")
    return Outcome(any(isinstance(site, SiteOps) for site in found), tuple(notes))


# ---------------------------------------------------------------------------------------------- pattern and check


def match(start: fx.Node, flow: Dataflow) -> SiteOps | str:
    """The site that the coefficients `start` belong to, or the reason why it stays on level 1."""
    if start.target is mhc.gates.default:
        return OTHER_FORM
    streams: Any = start.args[0]
    pre, post, logits = (_output(start, place) for place in range(3))
    aggregates = _calls(mhc.aggregate.default, [streams], pre)
    res: list[fx.Node] | None = None
    if _groups(start) == 3:
        res = _readers(logits)
        if [reader.target for reader in res] == [mhc.constrain.default]:
            return OTHER_RES.format(kind=res[0].args[1])
        if [reader.target for reader in res] != [mhc.sinkhorn.default]:
            return LOGITS
        if given(res[0], "implicit", False):
            return IMPLICIT
    merges = _calls(mhc.merge.default, [streams], None, post, res) if post else ()
    if _groups(start) > 1 and not merges:
        return SKIP
    if not merges and not aggregates:
        return UNREAD
    if len({_manner(merge) for merge in merges}) > 1:
        return MERGES
    if flow.is_mutated(streams):
        return WRITTEN
    frozen = {flow.has(flow.without_grad, op) for op in (start, *(res or ()), *aggregates, *merges)}
    return GRADIENTS if len(frozen) > 1 else SiteOps(start, pre, post, res[0] if res else None, aggregates, merges)


def with_early_read(site: SiteOps, flow: Dataflow) -> SiteOps:
    """With the aggregates that read its streams by weights which are there before its coefficients are."""
    if not site.is_early:
        return site
    start = site.coefficients
    streams: Any = start.args[0]
    by: dict[fx.Node, list[fx.Node]] = {}
    for user in streams.users:
        if user.target is mhc.aggregate.default and user.args[0] is streams and _may_move(user, start, flow):
            by.setdefault(user.args[1], []).append(user)
    first = min(by, key=flow.index.__getitem__, default=None)
    return site if first is None else replace(site, early=tuple(by[first]))


def _may_move(aggregate: fx.Node, start: fx.Node, flow: Dataflow) -> bool:
    """An aggregate may be computed where the coefficients `start` are."""
    weights: Any = aggregate.args[1]
    if flow.index[weights] > flow.index[start] or any(flow.index[user] < flow.index[start] for user in aggregate.users):
        return False
    return flow.has(flow.without_grad, aggregate) == flow.has(flow.without_grad, start)


def given(node: fx.Node, name: str, default: Any) -> Any:
    """The argument of a call of an op, by name or by place."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    return node.kwargs.get(name, node.args[place] if place < len(node.args) else default)


def priority(merge: fx.Node) -> dict[str, bool]:
    """The argument of `passes.prioritize` as it goes to the op that takes the merge's place."""
    return {name: value for name, value in merge.kwargs.items() if name == "high_priority"}  # type: ignore[misc]


def _groups(start: fx.Node) -> int:
    return int(given(start, "groups", 3))


def _manner(merge: fx.Node) -> tuple[bool, bool]:
    return bool(given(merge, "transposed", False)), bool(given(merge, "rounded", False))


def _output(start: fx.Node, place: int) -> tuple[fx.Node, ...]:
    """The nodes that hold one of an op's outputs."""
    return tuple(user for user in start.users if user.target is operator.getitem and user.args[1] == place)


def _readers(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(user for node in nodes for user in node.users))


def _calls(target: Any, *wanted: Sequence[fx.Node] | None) -> tuple[fx.Node, ...]:
    """The calls of `target` whose arguments are each among the nodes wanted there; None stands for any value."""
    known = next(nodes for nodes in reversed(wanted) if nodes is not None)
    return tuple(
        user
        for user in _readers(known)
        if user.target is target
        and all(nodes is None or value in nodes for value, nodes in zip(user.args, wanted, strict=False))
        and _mixes_alike(user, wanted)
    )


def _mixes_alike(user: fx.Node, wanted: tuple[Sequence[fx.Node] | None, ...]) -> bool:
    """A merge without res belongs to a site without one."""
    return len(wanted) < 4 or wanted[3] is not None or user.args[3] is None


def _note(reason: str, sites: list[str]) -> str:
    named = ", ".join(sites[:3]) + (", ..." if len(sites) > 3 else "")
    return f"{len(sites)} {'site is' if len(sites) == 1 else 'sites are'} not fused ({named}): {reason}"


# ---------------------------------------------------------------------------------------------- rewrite


def _rewrite(emitter: Emitter, site: SiteOps, compiled: bool, early: bool) -> None:
    graph, start, balance = emitter.graph, site.coefficients, site.sinkhorn
    with graph.inserting_before(start):
        streams, *parameters = start.args[:4]
        # The weights are what the aggregates have by now: the site before has been rewritten.
        target, *weights = (mhc.read_early.default, _weights(site)) if early else (mhc.read.default,)
        read = emitter.call(target, streams, *weights, *parameters, *_variant(site, compiled), like=start)
        u, pre, post, res, carrier = (emitter.call(operator.getitem, read, place, like=start) for place in range(5))
    made = [read, u, res]
    for merge in site.merges:
        with graph.inserting_before(merge):
            mixing, flags = None if balance is None else res, [*_manner(merge), *([True] if compiled else [])]
            args, where = (*merge.args[:2], carrier, post, mixing, *flags), priority(merge)
            made.append(emitter.call(mhc.merge_carried.default, *args, like=merge, **where))
        merge.replace_all_uses_with(made[-1])
        graph.erase_node(merge)
    replaced = [((*site.aggregates, *site.early), u), (site.pre, pre), (site.post, post)]
    for olds, new in [*replaced, ([balance], res)] if balance is not None else replaced:
        for old in olds:
            old.replace_all_uses_with(new)
            graph.erase_node(old)
    for node in made:
        if "mhc_site" in start.meta:
            node.meta["mhc_site"] = start.meta["mhc_site"]
    for node in [*start.users, start, u, pre, post, res, carrier]:
        if not node.users:  # the logits and what they came from, and outputs of `read` that nobody wanted
            graph.erase_node(node)


def _weights(site: SiteOps) -> Any:
    return site.early[0].args[1] if site.early else None


def _variant(site: SiteOps, compiled: bool) -> tuple[Any, ...]:
    """The arguments of `read` after the parameters, as far as they are not its defaults."""
    start, balance = site.coefficients, site.sinkhorn
    transposed, rounded = _manner(site.merges[0]) if site.merges else (False, False)
    values = (
        start.args[4],
        1 if balance is None else balance.args[1],
        *(given(start, name, default) for name, default in _GATES.items()),
        *(default if balance is None else given(balance, name, default) for name, default in _BALANCE.items()),
        transposed,
        rounded,
        compiled,
    )
    defaults = (*_GATES.values(), *_BALANCE.values(), False, False, False)
    kept = len(values)
    while kept > 2 and values[kept - 1] == defaults[kept - 3]:
        kept -= 1
    return values[:kept]


_GATES = {"pre_eps": 0.0, "post_scale": 2.0, "post_eps": 0.0, "groups": 3}
_BALANCE = {"divisor_eps": 0.0, "rows_first": False}
