"""Run passes one after another and keep what each did: its graph, what it changed, how long it took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from mhc_compile import _torch
from mhc_compile.errors import RewriteError
from mhc_compile.passes.emit import copy_nodes
from mhc_compile.passes.provenance import module_path, source_line


@dataclass(frozen=True)
class Outcome:
    """What a pass says of itself: whether it changed the graph, and notes for the user."""

    modified: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """A rewrite of one graph in place. `exact` passes keep every bit of the result, the others its function."""

    name: str
    exact: bool
    run: Callable[[fx.GraphModule], Outcome]


@dataclass(frozen=True)
class PassRecord:
    """One pass of a compilation: the graph behind it, the change in op counts, seconds, notes."""

    name: str
    exact: bool
    nodes: fx.Graph
    owner: fx.GraphModule = field(repr=False)
    ops: Counter[str]
    change: dict[str, int]
    seconds: float
    notes: tuple[str, ...]

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The graph as a module that can be run; its constants are shared with the compiled one."""
        return fx.GraphModule(self.owner, self.nodes)

    @property
    def code(self) -> str:
        """The graph as a Python function, each line behind the module and the source line it comes from."""
        return _python(self.nodes)

    def print_readable(self) -> None:
        """Print the record's summary and code."""
        print(f"{self}\n{self.code}")

    def __str__(self) -> str:
        changed = ", ".join(f"{count:+d} {op}" for op, count in sorted(self.change.items())) or "no op changed"
        lines = [f"{self.name}: {sum(self.ops.values())} ops, {self.seconds * 1e3:.0f} ms ({changed})"]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def count_ops(graph: fx.Graph) -> Counter[str]:
    """How often each op is called."""
    return Counter(_op_name(node.target) for node in graph.nodes if node.op == "call_function")


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass]) -> list[PassRecord]:
    """Run passes on `gm` in place; the graph is checked before the first and after each.

    Raises RewriteError, and names the pass, when one leaves a graph that is not valid.
    """
    before, outputs = count_ops(gm.graph), _output_metadata(gm)
    records = []
    for one in passes:
        start = time.perf_counter()
        outcome = one.run(gm)
        seconds = time.perf_counter() - start
        _check(gm, one.name, outputs)
        after = count_ops(gm.graph)
        change = {op: after[op] - before[op] for op in {*before, *after} if after[op] != before[op]}
        records.append(PassRecord(one.name, one.exact, copy_nodes(gm.graph), gm, after, change, seconds, outcome.notes))
        before = after
    return records


def start_record(gm: fx.GraphModule, seconds: float) -> PassRecord:
    """The record of the capture itself."""
    return PassRecord("capture", True, copy_nodes(gm.graph), gm, count_ops(gm.graph), {}, seconds, ())


def _check(gm: fx.GraphModule, name: str, outputs: list[object]) -> None:
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise RewriteError(f"pass {name!r} left a graph that is not valid: {error}. Please report it") from error
    if _output_metadata(gm) != outputs:
        raise RewriteError(f"pass {name!r} changed the shape or dtype of an output. Please report it")


def _output_metadata(gm: fx.GraphModule) -> list[object]:
    output = next(iter(gm.graph.find_nodes(op="output")))
    found: list[object] = []
    for node in output.all_input_nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and node.target is not torch.ops.mhc.anchor.default:
            found.append((tuple(map(str, value.shape)), value.dtype, str(value.device)))
    return found


def _op_name(target: object) -> str:
    return str(target) if isinstance(target, _torch.OpOverload) else getattr(target, "__name__", str(target))


def _python(graph: fx.Graph) -> str:
    """fx's own printout, with a comment where module or source line changes."""
    lines = graph.python_code("self").src.splitlines()
    origin = {node.name: (module_path(node), source_line(node)) for node in graph.nodes}
    printed, last = [], ("", "")
    for line in lines:
        name = line.strip().split(" ", 1)[0].rstrip(":")
        where = origin.get(name, last)
        if where != last and where[1]:
            printed.append(f"    # {where[0] or '(root)'}  {where[1]}")
            last = where
        printed.append(line)
    return "\n".join(printed)
