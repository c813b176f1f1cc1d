"""Insert nodes into a captured graph so that it stays whole: each new node gets its fake value and provenance."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mhc_compile import _torch
from mhc_compile.passes.op_kinds import aten, tensor_of

# What a new node takes over from the node it stands for.
_INHERITED = ("nn_module_stack", "stack_trace", "recompute", "ac_graph_id", "seq_nr", "source_fn_stack")


class Emitter:
    """Adds nodes to one graph, computing the fake value of each as the capture would have."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
        self._fake_mode = _torch.fake_mode_of(values)

    def call(self, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """Append `target(*args, **kwargs)` at the graph's insertion point, with the provenance of `like`."""
        node = self.graph.call_function(target, args, kwargs)
        for key in _INHERITED:
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta["val"] = self._fake(target, args, kwargs)
        return node

    def _fake(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def value(item: Any) -> Any:
            return item.meta["val"] if isinstance(item, fx.Node) else item

        args, kwargs = fx.map_arg(args, value), fx.map_arg(kwargs, value)
        if self._fake_mode is None:
            return target(*args, **kwargs)
        with self._fake_mode, torch.enable_grad():
            return target(*args, **kwargs)

    def size(self, node: fx.Node, dim: int) -> Any:
        """One size of a node's tensor: an int, or a node that reads it at run time."""
        value = tensor_of(node)
        assert value is not None
        size = value.shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, dim, like=node)

    def shape(self, node: fx.Node) -> list[Any]:
        """All sizes of a node's tensor, as `size` gives them."""
        value = tensor_of(node)
        assert value is not None
        return [self.size(node, dim) for dim in range(value.dim())]

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node in a dtype; the node itself if it has it."""
        value = tensor_of(node)
        assert value is not None
        return node if value.dtype == dtype else self.call(aten.to.dtype, node, dtype, like=node)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be rewritten alone; submodules, constants and recorded values are shared."""
    return fx.GraphModule(gm, copy_nodes(gm.graph))


def copy_nodes(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph's nodes, without the cost of a module's code."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = copy.node_copy(node, mapping.__getitem__)
    return copy
