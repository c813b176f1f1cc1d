"""Who depends on whose values in a graph: ancestor and descendant sets, grad-mode regions, mutated storage.

Sets of nodes are Python integers used as bit sets (bit i is the i-th node): a union of two sets of a graph of
10,000 nodes costs less than a microsecond, so that whole-graph reachability stays cheap for 200 layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

from torch import fx

from mhc_compile import _torch
from mhc_compile.passes.capture import graph_input
from mhc_compile.passes.op_kinds import (
    CASTS,
    COPIES,
    PERMUTES,
    VIEWS,
    aten,
    is_float_tensor,
    is_inner_tensor,
    is_local,
    is_mutating,
    packet,
    schema_of,
    tensor_of,
)

# These read the shape and dtype of their argument, never its values.
_SHAPE_ONLY = frozenset(
    getattr(aten, name)
    for name in (
        "sym_size", "sym_numel", "sym_stride", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like",
        "randn_like", "new_zeros", "new_ones", "new_empty", "new_full",
    )
)  # fmt: skip


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values (not merely shapes) a node reads."""
    return [] if packet(node) in _SHAPE_ONLY else node.all_input_nodes


class Dataflow:
    """Reachability over one graph as it stands; build a new one after the graph changes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: number for number, node in enumerate(self.nodes)}
        self.sources = self._value_edges()  # as they are now, for what is computed later
        self.ancestors: list[int] = []
        for sources in self.sources.values():
            found = 0
            for source in sources:
                number = self.index[source]
                found |= self.ancestors[number] | (1 << number)
            self.ancestors.append(found)

    def _value_edges(self) -> dict[fx.Node, list[fx.Node]]:
        """What each node reads; behind a write through a view, a reader of the storage also reads the write."""
        edges = {}
        writers: dict[int | None, fx.Node] = {}
        for node in self.nodes:
            sources = value_inputs(node)
            if writers:
                keys = {_torch.storage_key(tensor_of(source)) for source in sources}
                sources = sources + [writers[key] for key in keys if key in writers]
            edges[node] = sources
            writers.update(dict.fromkeys(_written(node), node))
        return edges

    @cached_property
    def readers(self) -> dict[fx.Node, list[fx.Node]]:
        """Who reads each node's value directly."""
        readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        for node, sources in self.sources.items():
            for source in sources:
                readers[source].append(node)
        return readers

    @cached_property
    def descendants(self) -> list[int]:
        """For each node the set of nodes that read its value, directly or not."""
        result = [0] * len(self.nodes)
        for number in range(len(self.nodes) - 1, -1, -1):
            reached = result[number] | (1 << number)
            for source in self.sources[self.nodes[number]]:
                result[self.index[source]] |= reached
        return result

    def depends(self, later: fx.Node, earlier: fx.Node) -> bool:
        """`later` is computed from `earlier`."""
        return bool(self.ancestors[self.index[later]] >> self.index[earlier] & 1)

    def between(self, base: fx.Node, ends: Iterable[fx.Node]) -> int:
        """The set of nodes computed from `base` that some node of `ends` is computed from, the ends included."""
        upstream = 0
        for end in ends:
            upstream |= self.ancestors[self.index[end]] | (1 << self.index[end])
        return upstream & self.descendants[self.index[base]]

    def members(self, bits: int) -> Iterator[fx.Node]:
        """The nodes of a set, the last one first."""
        while bits:
            number = bits.bit_length() - 1
            bits ^= 1 << number
            yield self.nodes[number]

    def has(self, bits: int, node: fx.Node) -> bool:
        """The node is in the set."""
        return bool(bits >> self.index[node] & 1)

    @cached_property
    def computed_floats(self) -> int:
        """The nodes that compute one float tensor."""
        return sum(
            1 << number
            for number, node in enumerate(self.nodes)
            if node.op == "call_function" and is_float_tensor(node)
        )

    @cached_property
    def without_grad(self) -> int:
        """The nodes that stand in a no-grad region of the user's forward."""
        inside, enabled = 0, True
        for number, node in enumerate(self.nodes):
            if node.target is _torch.set_grad_enabled:
                enabled = bool(node.args[0])
            elif not enabled:
                inside |= 1 << number
        return inside

    @cached_property
    def mutated(self) -> frozenset[int]:
        """Keys of the storages that some op still writes into."""
        return frozenset(key for node in self.nodes for key in _written(node))

    def is_mutated(self, node: fx.Node) -> bool:
        """Some op of the graph writes into the storage of this node's tensor."""
        return _torch.storage_key(tensor_of(node)) in self.mutated


def _written(node: fx.Node) -> list[int]:
    """Keys of the storages that a node writes into."""
    if not is_mutating(node):
        return []
    keys = [
        _torch.storage_key(tensor_of(value))
        for argument, value in zip(schema_of(node).arguments, node.args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [key for key in keys if key is not None]


def parameter_behind(node: object) -> str | None:
    """The path of the parameter or buffer that a node is, looking through casts, copies and views; else None."""
    while isinstance(node, fx.Node):
        record = graph_input(node)
        if record is not None:
            return record.path if record.kind in ("parameter", "buffer") else None
        if node.op == "get_attr":
            return str(node.target)
        if not _is_looked_through(node):
            return None
        node = node.args[0] if node.args else None
    return None


def _is_looked_through(node: fx.Node) -> bool:
    """The node is its first argument in another form."""
    return is_inner_tensor(node) or any(packet(node) in kind for kind in (CASTS, COPIES, VIEWS, PERMUTES))


def is_trainable(node: object) -> bool:
    """The node is an nn.Parameter, looking through casts, copies and views."""
    while isinstance(node, fx.Node):
        record = graph_input(node)
        if record is not None:
            return record.kind == "parameter"
        if not _is_looked_through(node):
            return False
        node = node.args[0] if node.args else None
    return False


def mixes(node: fx.Node) -> bool:
    """The op computes across positions or features, as every product with a weight matrix does.

    A learned scale of single elements does not: a branch of such ops alone is a local skip.
    """
    if node.op != "call_function" or (tensor_of(node) is None and not isinstance(node.meta.get("val"), (tuple, list))):
        return False
    return not is_local(node)


def is_learned(node: fx.Node) -> bool:
    """One of the op's operands is a parameter or buffer."""
    return any(parameter_behind(source) for source in node.all_input_nodes)
