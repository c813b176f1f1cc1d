"""What may be computed again in the backward: the mHC ops and what is cheap before a branch's first product.

Replayed are the streams, coefficients and aggregates of every site, what acts on the streams between sites, and the ops
between an aggregate and the first op of its branch that mixes (the pre-norm, however it is spelled). Never replayed are
matrix products, attention, convolutions, whatever draws random numbers or writes in place, and readouts, whose readers
run their backward before the trunk's.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

import mhc_compile.kernels.cross_site_ops
import mhc_compile.kernels.manifold_ops
import mhc_compile.kernels.single_pass_ops  # noqa: F401 - and those of other sites than Sinkhorn's
from mhc_compile import _torch
from mhc_compile.passes.capture import graph_input
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.op_kinds import NORMS, REDUCTIONS, is_local, is_mutating, is_random, packet, tensor_of

mhc = torch.ops.mhc

READS = (mhc.coefficients.default, mhc.gates.default, mhc.read.default, mhc.read_early.default)
MERGES = (mhc.merge.default, mhc.merge_carried.default)
_KEPT = frozenset({mhc.readout, mhc.anchor})


def replayed_nodes(flow: Dataflow) -> set[fx.Node]:
    """The nodes of a rewritten graph that a backward may compute again from the streams that are kept."""
    learned = depends_on_parameters(flow)
    found: set[fx.Node] = set()
    for node in flow.nodes:
        if node.op != "call_function":
            continue
        if _is_trunk_op(node) or (node.target is operator.getitem and node.args[0] in found):
            found.add(node)
        elif _is_cheap(node):
            sources = [source for source in flow.sources[node] if source in learned and source.op != "placeholder"]
            if sources and all(source in found for source in sources):
                found.add(node)
    return found


def depends_on_parameters(flow: Dataflow) -> set[fx.Node]:
    """Nodes that a parameter has an influence on, the parameters included."""
    found: set[fx.Node] = set()
    for node in flow.nodes:
        record = graph_input(node)
        if (record is not None and record.kind == "parameter") or any(s in found for s in flow.sources[node]):
            found.add(node)
    return found


def _is_trunk_op(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, _torch.OpOverload) and target.namespace == "mhc" and packet(node) not in _KEPT


def _is_cheap(node: fx.Node) -> bool:
    if tensor_of(node) is None or is_random(node) or is_mutating(node):
        return False
    return is_local(node) or packet(node) in NORMS or packet(node) in REDUCTIONS
