"""Run a graph on fake tensors to see what it would do: what autograd keeps for the backward, and how much it computes.

Autograd itself says what it saves, so every op and every custom op is counted as it is. Nothing is computed, and no
memory is taken. What is kept is what eager execution of the graph keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from mhc_compile import _torch
from mhc_compile.errors import PartitionError, wrong
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.provenance import source_line


@dataclass(frozen=True)
class Saved:
    """A storage that is kept for the backward: its bytes, the node that made it, and the nodes that save it.

    inside: it was made within the op, which does not give it (the mean that a layer norm keeps).
    """

    bytes: int
    made_by: fx.Node
    savers: tuple[fx.Node, ...]
    inside: bool = False


@dataclass
class DryRun:
    """What a run of a graph does.

    saved: the storages kept for the backward, graph inputs left out. flops: of each node's forward, where not 0.
    views: nodes that give no memory of their own. trained: nodes whose value requires grad.
    """

    saved: list[Saved] = field(default_factory=list)
    flops: dict[fx.Node, int] = field(default_factory=dict)
    views: set[fx.Node] = field(default_factory=set)
    trained: set[fx.Node] = field(default_factory=set)


def dry_run(gm: fx.GraphModule, arguments: Sequence[Any]) -> DryRun:
    """Run `gm` on fake stand-ins of `arguments`, which keep their shapes, dtypes and requires_grad.

    Raises PartitionError for an op whose sizes depend on data.
    """
    mode = _torch.FakeTensorMode(allow_non_fake_inputs=True)
    fakes = _stand_ins(mode, arguments)
    watch = _Watch(gm)
    hooks = torch.autograd.graph.saved_tensors_hooks(watch.pack, _no_backward)
    with mode, torch.enable_grad(), FlopCounterMode(display=False) as counter, hooks:
        watch.counter = counter
        try:
            watch.run(*fakes)
        except _torch.SIZES_OF_DATA as error:
            node = watch.node
            found = f"open: those of {node.target if node else 'an op'} depend on the values in a call"
            legal = "sizes that follow from those of the inputs"
            step = "compute with all rows and a mask, or plan the stages by hand"
            raise PartitionError(wrong("a size", found, legal, step), source_line(node) if node else None) from error
        finally:
            found_so_far = watch.result()
            watch.forget()
    return found_so_far


def _stand_ins(mode: _torch.FakeTensorMode, arguments: Sequence[Any]) -> list[Any]:
    """Fake tensors like the arguments, which may be fake themselves, in another mode; sizes as they are, or hinted."""
    return [_stand_in(mode, one) if isinstance(one, torch.Tensor) else _number(one) for one in arguments]


def _stand_in(mode: _torch.FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, _torch.FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    shape, stride = (tuple(map(_torch.size_hint, sizes)) for sizes in (value.shape, value.stride()))
    with mode:
        made = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return made.requires_grad_() if value.requires_grad else made


def _number(value: Any) -> Any:
    return _torch.size_hint(value) if isinstance(value, torch.SymInt) else value


def partitioned(gm: fx.GraphModule, arguments: Sequence[Any]) -> list[Saved]:
    """What torch's min-cut partitioner keeps for the backward of a tagged graph, graph inputs left out.

    Traces forward and backward of `gm` on fake tensors, which takes a few times as long as `dry_run`. Each value stands
    as saved by the node that makes it.
    """
    from functorch.compile import (  # type: ignore[import-untyped]
        aot_module_simplified,
        min_cut_rematerialization_partition,
    )

    traced = copy_graph(gm)
    names = {node.name: node for node in gm.graph.nodes}
    for node in traced.graph.nodes:
        node.meta["custom"] = {**node.meta.get("custom", {}), _ORIGIN: node.name}
    kept: list[fx.Node] = []
    given: set[int | None] = {None}

    def partition(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        forward, _ = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
        kept.extend(_outputs(forward)[num_fwd_outputs:])
        given.update(_torch.storage_key(node.meta.get("val")) for node in forward.graph.find_nodes(op="placeholder"))
        raise _Partitioned

    mode = _torch.FakeTensorMode(allow_non_fake_inputs=True)
    with suppress(_Partitioned):
        aot_module_simplified(traced, _stand_ins(mode, arguments), fw_compiler=_inference, partition_fn=partition)
    found: dict[int, Saved] = {}
    for node in kept:
        value = node.meta.get("val")
        key = _torch.storage_key(value)
        if isinstance(value, torch.Tensor) and key is not None and key not in given:
            maker = names.get(node.meta.get("custom", {}).get(_ORIGIN, ""))
            if maker is not None:
                found.setdefault(key, Saved(int(value.untyped_storage().nbytes()), maker, (maker,)))
    return list(found.values())


_ORIGIN = "mhc_node"


class _Partitioned(Exception):
    """All is known, and nothing needs to be compiled."""


def _inference(gm: fx.GraphModule, inputs: Any) -> Any:
    """Nothing needs a gradient: there is no backward, and nothing is kept for one."""
    raise _Partitioned


def _outputs(gm: fx.GraphModule) -> list[fx.Node]:
    output = next(iter(gm.graph.find_nodes(op="output")))
    return [one for one in output.args[0] if isinstance(one, fx.Node)]


def _no_backward(saved: None) -> torch.Tensor:
    raise AssertionError("a dry run has no backward")


class _Watch(fx.Interpreter):
    """Runs a graph node by node; keeps every value alive, so that no storage is taken for another."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.counter: Any = nullcontext()
        self.found = DryRun()
        self.makers: dict[int, fx.Node] = {}
        self.savers: dict[int, dict[fx.Node, None]] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        flops = self.counter.get_total_flops() - before
        if flops:
            self.found.flops[n] = flops
        tensors = [one for one in (value if isinstance(value, (tuple, list)) else [value]) if _is_tensor(one)]
        known = 0
        for tensor in tensors:
            key = _torch.storage_key(tensor)
            if key is not None:
                known += key in self.makers
                self.makers.setdefault(key, n)
        if tensors and known == len(tensors):
            self.found.views.add(n)
        if any(tensor.requires_grad for tensor in tensors):
            self.found.trained.add(n)
        return value

    def pack(self, tensor: torch.Tensor) -> None:
        """The hook that sees each tensor that autograd saves, and keeps it from it: its graph would hold itself."""
        key = _torch.storage_key(tensor)
        if key is not None and self.node is not None:
            self.tensors[key] = tensor  # kept alive
            self.savers.setdefault(key, {})[self.node] = None

    def forget(self) -> None:
        """Let go of all values: autograd's graph of them holds this object by its hook, where no collector looks."""
        self.env.clear()
        self.tensors.clear()

    def result(self) -> DryRun:
        """What was seen."""
        for key, savers in self.savers.items():
            inside = key not in self.makers
            maker = next(iter(savers)) if inside else self.makers[key]
            if maker.op == "call_function":
                size = int(self.tensors[key].untyped_storage().nbytes())
                self.found.saved.append(Saved(size, maker, tuple(savers), inside))
        return self.found


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
