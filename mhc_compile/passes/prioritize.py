"""Have the merges of some sites run on a CUDA stream of high priority: an argument of their ops (`kernels.priority`).

It stands on the level-1 merge, and `lower` and `fuse` hand it on to what takes its place: of a merge that is fused with
the read behind it, both run there.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import fx

import mhc_compile.kernels.ops  # noqa: F401 - registers the op
from mhc_compile.passes.history import Outcome

mhc = torch.ops.mhc


def prioritize(gm: fx.GraphModule, sites: Set[str]) -> Outcome:
    """Mark the merges of the sites of these names, in place. The graph may lack some of them."""
    found = [
        node
        for node in gm.graph.find_nodes(op="call_function", target=mhc.merge.default)
        if node.meta.get("mhc_site") in sites
    ]
    for merge in found:
        merge.update_kwarg("high_priority", True)
    gm.recompile()
    return Outcome(bool(found), (f"{len(found)} merges run on a stream of high priority",) if found else ())
