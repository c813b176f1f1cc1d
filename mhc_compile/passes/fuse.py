"""Fuse across sites: the merge of a site and the read of what it merged become one op (`kernels.cross_site_ops`).

    X' = merge_carried(X, f, carrier, post, res)                 X', u', ..., carrier' = merge_read(X, f, carrier, post,
    u', pre', post', res', carrier' = read(X', phi', ...)                                           res, phi', ...)

and in the same way `read_early` becomes part of `merge_read_early` (`kernels.single_pass_ops`).

This is what no library of modules can do: the two belong to different layers. It applies where the next site, or a
head, reads exactly what a site merged; whoever else reads X' (a tap) reads it from the new op. An op on the trunk
between the sites, a border of recomputed blocks, or a change of grad mode between them leaves both as they are.

Then the backward may cross the border as well: a fused merge whose coefficients are just those of the read before
gets that one's carrier of f.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import mhc_compile.kernels.cross_site_ops
import mhc_compile.kernels.single_pass_ops  # noqa: F401 - both register ops
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.emit import Emitter
from mhc_compile.passes.history import Outcome
from mhc_compile.passes.lower import priority

mhc = torch.ops.mhc

FUSED: dict[Any, Any] = {mhc.read.default: mhc.merge_read.default, mhc.read_early.default: mhc.merge_read_early.default}


def fuse(gm: fx.GraphModule) -> Outcome:
    """Fuse every pair of sites of `gm` that fits, in place; a note for the sites that read something else."""
    reads = [node for node in gm.graph.nodes if node.target in FUSED]
    merges = list(gm.graph.find_nodes(op="call_function", target=mhc.merge_carried.default))
    if not reads or not merges:
        return Outcome(False)
    flow, emitter = Dataflow(gm.graph), Emitter(gm.graph)
    pairs = [pair for read in reads if (pair := match(read, flow)) is not None]
    early_notes = _early_note([pair for pair in pairs if pair.read.target is mhc.read_early.default])
    for pair in pairs:
        _rewrite(emitter, pair)
    for both in [node for node in gm.graph.nodes if node.target in FUSED.values()]:
        _carry_branch(emitter, both)
    gm.recompile()
    alone = len(reads) - len(pairs)
    note = f"{len(pairs)} of {len(reads)} reads fused with the merge before them; {alone} read something else"
    return Outcome(bool(pairs), (note, *early_notes))


def _early_note(early: list[Pair]) -> list[str]:
    """Of fused reads with the pre of the site before: what their kernels are."""
    wide = sum(pair.merge.meta["val"].shape[-2] > 4 for pair in early)
    notes = [f"{len(early) - wide} merges are read with the pre of the site before in the same launch"]
    if wide:
        notes.append(f"{wide} reads with the pre of the site before are launches of their own: above 4 streams")
    return notes[len(early) == wide :]


@dataclass(frozen=True)
class Pair:
    """A merge and the read of its result; `place` is the one of the two where both can be computed."""

    merge: fx.Node
    read: fx.Node
    place: fx.Node


def match(read: fx.Node, flow: Dataflow) -> Pair | None:
    """The merge whose result is what `read` reads, if the two may become one op."""
    merge: Any = read.args[0]
    if not isinstance(merge, fx.Node) or merge.target is not mhc.merge_carried.default:
        return None
    if any(user.target in FUSED and user is not read for user in merge.users):
        return None  # two sites read it: each would need the merge
    f: Any = merge.args[1]
    if flow.is_mutated(merge) or flow.is_mutated(f) or _border(merge, read):
        return None
    if flow.has(flow.without_grad, merge) != flow.has(flow.without_grad, read):
        return None
    if all(flow.index[node] < flow.index[merge] for node in read.all_input_nodes if node is not merge):
        return Pair(merge, read, merge)
    if all(flow.index[user] >= flow.index[read] for user in merge.users):
        return Pair(merge, read, read)  # the parameters of the read are made between the two
    return None


def _border(merge: fx.Node, read: fx.Node) -> bool:
    """One of the two is computed again in backward and the other is not."""
    return bool(merge.meta.get("recompute") != read.meta.get("recompute"))


def _rewrite(emitter: Emitter, pair: Pair) -> None:
    graph, merge, read = emitter.graph, pair.merge, pair.read
    streams, f, carrier, post, res, *flags = merge.args
    flags = [*flags, False, False][:2]
    with graph.inserting_before(pair.place):
        given = (streams, f, carrier, None, post, res, *flags, *read.args[1:])
        both = emitter.call(FUSED[read.target], *given, like=read, **priority(merge))
        outputs: list[Any] = [emitter.call(operator.getitem, both, place, like=read) for place in range(9)]
    if "mhc_site" in read.meta:
        both.meta["mhc_site"] = read.meta["mhc_site"]
    for user in list(read.users):
        user.replace_all_uses_with(outputs[1 + int(str(user.args[1]))])
        graph.erase_node(user)
    graph.erase_node(read)
    merge.replace_all_uses_with(outputs[0])
    graph.erase_node(merge)
    for output in outputs:
        if not output.users:
            graph.erase_node(output)


# Of the ops that give a site's coefficients: which of their outputs the first of these is.
_FIRST = {target: place for pair in FUSED.items() for place, target in enumerate(pair, 2)}  # post, res, both carriers


def _carry_branch(emitter: Emitter, both: fx.Node) -> None:
    """Give a fused merge the carrier of f of the read before, if that one's post and res reach this merge alone.

    What it leaves to that read is right only if the read has them from nowhere else: no op between, no other merge.
    """
    _, _, carrier, branch, post, res, *_ = both.args
    assert isinstance(carrier, fx.Node)
    if branch is not None or res is None or carrier.target is not operator.getitem:
        return
    source: Any = carrier.args[0]
    first = _FIRST.get(source.target)
    if first is None:
        return

    def is_output(node: Any, place: int) -> bool:
        return isinstance(node, fx.Node) and node.target is operator.getitem and node.args == (source, place)

    carriers = [user for user in source.users if is_output(user, first + 2)]
    alone = [user for each in carriers for user in each.users] == [both]
    if alone and all(is_output(node, first + i) for i, node in enumerate((post, res, carrier))):
        with emitter.graph.inserting_after(carrier):
            of_f = emitter.call(operator.getitem, source, first + 3, like=carrier)
        both.update_arg(3, of_f)
