"""Tag a rewritten graph for replay: what its backward computes again, and the states that it starts from.

The tags stand in `node.meta["recompute"]`, which AOTAutograd carries into the joint graph of forward and backward, and
torch's min-cut partitioner obeys. They go on level-1 ops, before `lower` and `fuse`, which keep them. Nothing else is
tagged: what a branch keeps is the partitioner's choice, and it never computes a product, attention or random numbers
again. Values are the same bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.errors import RewriteError, wrong
from mhc_compile.passes.history import Outcome
from mhc_compile.passes.op_kinds import draws
from mhc_compile.passes.replay import replayed_nodes
from mhc_compile.passes.stages import Layout, SiteSpan

mhc = torch.ops.mhc

# The names of the sites of each block, in the order of the graph.
Blocks = tuple[tuple[str, ...], ...]


def tag(gm: fx.GraphModule, blocks: Blocks) -> Outcome:
    """Tag the graph in place. Sites in no block are stored; blocks may name sites that this graph does not run.

    Nodes that are tagged already (by an activation checkpoint of the model) stay as they are. Raises RewriteError when
    the graph runs none of the sites.
    """
    layout = Layout(gm.graph)
    place = {site.name: number for number, site in enumerate(layout.sites)}
    present = [[place[name] for name in block if name in place] for block in blocks]
    replayed_sites = {number for block in present for number in block}
    if blocks and not replayed_sites:
        named = ", ".join(name for block in blocks for name in block[:2])
        message = wrong("the recompute plan", f"one of other sites ({named})", "a plan of this model", _AGAIN)
        raise RewriteError(message)
    if not replayed_sites:
        return Outcome(False)
    for node, site in _owners(layout).items():
        if site in replayed_sites:
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
    for node in filter(draws, layout.nodes):  # a small activation_memory_budget of torch would draw them again
        node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
    for block in present:
        if block:
            _keep(layout.sites[min(block)].streams)
    return Outcome(True, (f"{len(replayed_sites)} sites are replayed in {sum(map(bool, present))} blocks",))


_AGAIN = "make the plan again with partition(model, inputs)"


def _keep(streams: fx.Node) -> None:
    """Keep the first state of a block; a trunk's entry is widened again instead."""
    if streams.target is not mhc.expand.default:
        streams.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _owners(layout: Layout) -> dict[fx.Node, int]:
    """The number of the site that each node to be replayed belongs to: the last one read before it."""
    replayed = replayed_nodes(layout.flow)
    reads = {site.read: number for number, site in enumerate(layout.sites)}
    owners: dict[fx.Node, int] = {}
    current = 0
    for node in layout.nodes:
        current = reads.get(node, current)
        if node in replayed:
            owners[node] = current
    for number, site in enumerate(layout.sites):
        if site.streams.target is mhc.expand.default:
            owners[site.streams] = number
    return owners


def equal_blocks(gm: fx.GraphModule, length: int) -> Blocks:
    """Blocks of `length` sites each, counted from the entry of each trunk; the last one of a trunk may be shorter."""
    trunks: dict[fx.Node, list[str]] = {}
    for site in Layout(gm.graph).sites:
        trunks.setdefault(_entry(site), []).append(site.name)
    return tuple(
        tuple(names[start : start + length]) for names in trunks.values() for start in range(0, len(names), length)
    )


def _entry(site: SiteSpan) -> fx.Node:
    """The first value of a trunk: what its first site reads, as far back as the streams go."""
    node = site.streams
    while node.target is not mhc.expand.default and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def fingerprint(blocks: Blocks | Sequence[Sequence[str]]) -> str:
    """Tells compilations with different blocks apart in torch's caches, whose keys do not see tags."""
    return f"replay-{hashlib.sha256(repr([list(block) for block in blocks]).encode()).hexdigest()[:16]}"
