"""Tell a model that is mHC, or has several streams, already: converting it again would widen its streams."""

from __future__ import annotations

from typing import Any

from torch import fx

from mhc_compile import _torch
from mhc_compile.passes.op_kinds import aten, is_elementwise, tensor_of
from mhc_compile.passes.provenance import source_line
from mhc_compile.passes.residuals import Merge

_MANY = 4  # normalisations in a row that no other computation needs
_MAX_STREAMS = 64


_SUMS = (aten.sum.dim_IntList, aten.linalg_vector_norm.default)
_REDUCTIONS: dict[Any, tuple[Any, ...]] = {  # an op that normalises, and what it may normalise by
    aten.div.Tensor: _SUMS,
    aten.mul.Tensor: _SUMS,
    aten.add.Tensor: (aten.logsumexp.default,),
    aten.log_softmax.int: (),
    aten._log_softmax.default: (),
}
_HANDED_ON = (aten.expand_as.default, aten.expand.default)


def find_foreign(graph: fx.Graph, merges: list[Merge]) -> str | None:
    """The source line of a Sinkhorn chain or of a gated write into streams; None if there is neither."""
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        source = _normalised(node)
        if source is not None:
            depth[node] = depth.get(source, 0) + 1
            if depth[node] >= _MANY:
                return source_line(node) or node.name
    for merge in merges:
        if any(_writes_streams(merge, branch) for branch in merge.branches):
            return source_line(merge.root) or merge.root.name
    return None


def _normalised(node: fx.Node) -> fx.Node | None:
    """For `a / (sum(a, axis) [+ eps])` over square matrices, or `a - logsumexp(a, axis)`: a."""
    reductions = _REDUCTIONS.get(node.target)
    if reductions is None or len(node.args) < 2:
        return None
    value = tensor_of(node)
    if value is None or value.dim() < 2 or _torch.size_hint(value.shape[-1]) != _torch.size_hint(value.shape[-2]):
        return None
    if not reductions:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    for source, divisor in (node.args[:2], node.args[1::-1]):
        if isinstance(source, fx.Node) and isinstance(divisor, fx.Node) and _reduces(divisor, source, reductions):
            return source
    return None


def _reduces(node: fx.Node, source: fx.Node, reductions: tuple[Any, ...], steps: int = 4) -> bool:
    """The node is a sum over an axis of `source`, behind at most a few elementwise ops (an eps, a clamp, a sign)."""
    while steps and node.target not in reductions:
        skipped = is_elementwise(node) or node.target in _HANDED_ON
        if not skipped or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        node, steps = node.args[0], steps - 1
    if node.target is aten.linalg_vector_norm.default and node.args[1:2] != (1.0,):
        return False
    return node.target in reductions and _entries(node) is source


def _entries(node: fx.Node) -> object:
    """What a reduction reads, behind the absolute value and the power of a 1-norm that was decomposed."""
    found = node.args[0]
    while isinstance(found, fx.Node) and found.target in (aten.abs.default, aten.pow.Tensor_Scalar):
        if found.target is aten.pow.Tensor_Scalar and found.args[1] != 1:
            break
        found = found.args[0]
    return found


def _writes_streams(merge: Merge, branch: fx.Node) -> bool:
    """The branch is one value spread over a small axis of the skip by gates: `gate[..., n, 1] * f[..., 1, C]`."""
    state = tensor_of(merge.base)
    flat = _through_views(branch)
    if flat.target is not aten.mul.Tensor or state is None:
        return False
    left, right = (tensor_of(argument) for argument in flat.args[:2])
    if left is None or right is None or left.dim() != right.dim() or left.dim() < 3:
        return False
    for gate, value in ((left, right), (right, left)):
        n, width = _torch.size_hint(gate.shape[-2]), _torch.size_hint(value.shape[-1])
        if (
            1 < n <= _MAX_STREAMS
            and _torch.size_hint(gate.shape[-1]) == 1
            and _torch.size_hint(value.shape[-2]) == 1
            and width > 1
            and _reads_fewer(merge, width)
        ):
            return True
    return False


def _reads_fewer(merge: Merge, width: int) -> bool:
    """The state is wider than what one branch writes."""
    state = tensor_of(merge.base)
    assert state is not None
    last = _torch.size_hint(state.shape[-1])
    return last > width or (state.dim() > 2 and last == width)


def _through_views(node: fx.Node) -> fx.Node:
    while node.target in (aten.flatten.using_ints, aten.reshape.default, aten.view.default, aten.to.dtype):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node
