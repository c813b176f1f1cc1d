"""What the mHC ops of a rewritten graph move when they run as the kernels of sites (`kernels.moved`), not op by op.

`lower` makes two ops of a site and `fuse` one of a merge and the read behind it; here that is foreseen on the level-1
graph, by the same match, so that costs stand with the ops that the plan knows.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import fx

from mhc_compile.kernels.moved import (
    COEFFICIENTS_BACKWARD,
    CROSSING,
    EARLY,
    FINISH,
    HEAD_BACKWARD,
    MERGE,
    MERGE_BACKWARD,
    MERGE_BACKWARD_UNMIXED,
    OPS,
    PRODUCTS,
    PROJECT,
    REPLAY,
    STREAMS_BACKWARD,
    Moved,
)
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.lower import SiteOps, match, with_early_read
from mhc_compile.passes.op_kinds import packet

mhc = torch.ops.mhc

# How mHC runs: each op by itself, the two ops of a site, or fused across sites.
KERNELS = ("op", "site", "chain")
_MOST_STREAMS = 4  # that are fused across sites
_NOTHING = Moved()


@dataclass(frozen=True)
class OpMoves:
    """What one op moves of streams and of what is as long as one; replay: when a backward computes it again."""

    forward: Moved
    backward: Moved
    replay: Moved


def moves(flow: Dataflow, kernels: str) -> dict[fx.Node, OpMoves]:
    """What each op of a level-1 graph that moves streams does, run as `kernels` says."""
    found = {node: _alone(node) for node in flow.nodes if packet(node) in _BY_PACKET}
    if kernels == "op":
        return found
    starts = [node for node in flow.nodes if node.target is mhc.coefficients.default]
    sites = {start: site for start in starts if isinstance(site := match(start, flow), SiteOps)}
    pairs: dict[fx.Node, fx.Node] = {}
    if kernels == "chain":
        sites = {start: with_early_read(site, flow) for start, site in sites.items()}
        pairs = _pairs(sites)
    owners = {merge: site for site in sites.values() for merge in site.merges}
    for start, site in sites.items():
        before = owners[pairs[start]] if start in pairs else None
        found |= _site(site, before, set(pairs.values()), kernels)
    return found


_BY_PACKET = {getattr(mhc, name): moved for name, moved in OPS.items()}


def _alone(node: fx.Node) -> OpMoves:
    forward, backward = _BY_PACKET[packet(node)]
    return OpMoves(forward, backward, forward)


def _pairs(sites: dict[fx.Node, SiteOps]) -> dict[fx.Node, fx.Node]:
    """Coefficients -> the merge of another site whose result they alone read, as `fuse` does."""
    merges = {merge for site in sites.values() for merge in site.merges if _streams(merge) <= _MOST_STREAMS}
    readers = {merge: [user for user in merge.users if user in sites] for merge in merges}
    return {found[0]: merge for merge, found in readers.items() if len(found) == 1}


def _streams(merge: fx.Node) -> int:
    return int(merge.meta["val"].shape[-2])


def _site(site: SiteOps, before: SiteOps | None, fused: Set[fx.Node], kernels: str) -> dict[fx.Node, OpMoves]:
    """before: the site whose merge is fused with this read; fused: all merges that are."""
    crosses, mixed = _leaves(site, fused), site.sinkhorn is not None
    forward = _read(site, before is not None)
    backward = PRODUCTS if crosses else COEFFICIENTS_BACKWARD
    backward += STREAMS_BACKWARD if site.merges else HEAD_BACKWARD
    backward += CROSSING if before is not None and _leaves(before, fused) else _NOTHING
    of_merge = _NOTHING if crosses else MERGE_BACKWARD if mixed else MERGE_BACKWARD_UNMIXED
    if kernels == "chain":
        read, merge = OpMoves(forward, backward, forward), OpMoves(MERGE, of_merge, MERGE)
    else:  # coefficients are kept, and one launch makes the states and aggregates of several sites
        read = OpMoves(forward, backward, REPLAY if site.merges else FINISH)
        merge = OpMoves(MERGE, of_merge, _NOTHING)
    nothing = OpMoves(_NOTHING, _NOTHING, _NOTHING)
    reads = (*site.aggregates, *site.early)
    return {site.coefficients: read, **dict.fromkeys(reads, nothing), **dict.fromkeys(site.merges, merge)}


def _read(site: SiteOps, fused: bool) -> Moved:
    """The forward of a read, as far as it is not in the merge that it may be fused with."""
    made = EARLY if site.early and fused else FINISH if site.early or site.aggregates else _NOTHING
    return made if fused else PROJECT + made


def _leaves(site: SiteOps, fused: Set[fx.Node]) -> bool:
    """Its merge leaves its part of the backward to the reads before and behind it."""
    return site.sinkhorn is not None and len(site.merges) == 1 and site.merges[0] in fused
