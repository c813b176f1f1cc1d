"""The forward of a graph as lines of Python: names, one expression for one line of the model, regions, comments.

Nodes that the model's own code wrote on one line become one expression again where nothing is in the way. Variables
take the names that the model gives them, and are reused as soon as their values are dead, so that a forward keeps no
more alive than the model's does.
"""

from __future__ import annotations

import builtins
import keyword
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mhc_compile import _torch
from mhc_compile.codegen.source_state import reference
from mhc_compile.codegen.spelling import (
    WIDTH,
    Expression,
    joined,
    literal,
    named,
    no_form,
    packet_name,
    spell,
    value_of,
)
from mhc_compile.passes.op_kinds import DROPOUTS, aten, draws, packet
from mhc_compile.passes.provenance import calling_frame, calling_module, module_path

mhc = torch.ops.mhc
_INDENT = " " * 8
_LONGEST = 88  # of an expression that is made of several nodes
GRAD = _torch.set_grad_enabled
ENTER, EXIT = _torch.enter_autocast, _torch.exit_autocast
_CHECKS = (  # of the trace; they compute nothing
    "_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size",
)  # fmt: skip
_RESERVED = {
    *keyword.kwlist, *dir(builtins), "self", "torch", "transformers", "F", "nn", "mhc", "manifold_ops", "math",
    "device", "fits", "same", "sizes", "l", "O", "I",
}  # fmt: skip
_OF_MHC = {
    "expand": "streams", "merge": "streams", "aggregate": "u", "sinkhorn": "res", "constrain": "res", "readout": "mean",
}  # fmt: skip
_COEFFICIENTS = ("pre", "post", "logits")
_ASSIGNED = re.compile(r"^((?:\w+\s*,\s*)*\w+)\s*[-+*/@]?=(?!=)")


@dataclass
class Body:
    """Lines of a forward, and what they need: `F`, `mhc`, `math`, `device` or modules to import."""

    lines: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def is_check(node: fx.Node) -> bool:
    """An assertion that the trace put there."""
    return isinstance(node.target, _torch.OpOverload) and packet_name(node.target) in _CHECKS


def same_as(node: fx.Node) -> fx.Node | None:
    """The argument that a call only hands on: dropout that is off, an alias, a slice of everything."""
    target, source = node.target, node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(target, _torch.OpOverload):
        return None
    if packet(node) in DROPOUTS and len(node.args) == 3 and node.args[2] is False:
        return source
    if target is aten.alias.default:
        return source
    if target is aten.slice.Tensor and not node.kwargs:
        start, end, step = (*node.args[2:], None, None, None)[:3]
        if start in (None, 0) and step in (None, 1) and (end is None or end == torch.iinfo(torch.int64).max):
            return source
    return None


def has_effect(node: fx.Node) -> bool:
    """It writes, draws random numbers, or is unknown: it stays where it is."""
    target = node.target
    if isinstance(target, _torch.OpOverload):
        return target._schema.is_mutable or draws(node)
    return target in (GRAD, ENTER, EXIT)


class BodyWriter:
    """Writes the nodes of one graph.

    inputs: what graph inputs are called; device: the text that stands for the graph's only device; clean: False for
    torch.ops throughout.
    """

    def __init__(
        self,
        graph: fx.Graph,
        inputs: Mapping[fx.Node, str],
        *,
        device: Callable[[torch.device], str],
        clean: bool,
    ) -> None:
        self._device, self._clean = device, clean
        self._same: dict[fx.Node, fx.Node] = {}
        self._names: dict[fx.Node, str] = dict(inputs)
        self._inputs = set(inputs)
        self._output = next(iter(graph.find_nodes(op="output")))
        self._nodes = self._alive(graph)
        self._readers = self._find_readers()
        self._parts = self._tuple_parts()
        self._inlined = self._choose_inlined()
        self._statements = [node for node in self._nodes if node not in self._inlined and not self._is_part(node)]
        self._last = self._last_uses()

    # --------------------------------------------------------------------------------- what is written at all

    def _alive(self, graph: fx.Graph) -> list[fx.Node]:
        """The calls whose value or effect counts, in order."""
        needed: set[fx.Node] = set()
        kept = []
        for node in reversed(list(graph.nodes)):
            if node.op == "output":
                needed.update(node.all_input_nodes)
            elif node.op == "placeholder" or is_check(node) or (node not in needed and not has_effect(node)):
                continue
            elif node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor):
                raise no_form(node)  # a constant that the capture did not lift
            elif node.op == "get_attr":
                continue  # the body of a call that has no form itself
            else:
                source = same_as(node)
                if source is not None:
                    self._same[node] = source
                    needed.add(source)
                    continue
                kept.append(node)
                needed.update(node.all_input_nodes)
        return kept[::-1]

    def resolved(self, node: fx.Node) -> fx.Node:
        """The node whose value a node hands on."""
        while node in self._same:
            node = self._same[node]
        return node

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a node, as often as they occur."""
        found: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), lambda one: found.append(self.resolved(one)))
        return found

    def _find_readers(self) -> dict[fx.Node, list[fx.Node]]:
        """Node -> what reads it, as often as it does."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in [*self._nodes, self._output]:
            for one in self._operands(node):
                readers.setdefault(one, []).append(node)
        return readers

    # ------------------------------------------------------------------------------------------ several results

    def _tuple_parts(self) -> dict[fx.Node, list[list[fx.Node]]]:
        """Call with several results -> the nodes that take each of them; when nothing else takes it."""
        found: dict[fx.Node, list[list[fx.Node]]] = {}
        for node in self._nodes:
            value = value_of(node)
            if not isinstance(value, tuple | list) or not 1 <= len(value) <= 8:
                continue
            readers = self._readers.get(node, [])
            if readers and all(user.target is operator.getitem for user in readers):
                found[node] = [[user for user in readers if user.args[1] == place] for place in range(len(value))]
        return found

    def _is_part(self, node: fx.Node) -> bool:
        return node.target is operator.getitem and self.resolved(node.args[0]) in self._parts  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------------------- inlining

    def _choose_inlined(self) -> set[fx.Node]:
        """Nodes that are written where their only reader stands: same line of the model, no effect between."""
        effects, count = {}, 0
        for node in self._nodes:
            count += has_effect(node)
            effects[node] = count
        inlined: set[fx.Node] = set()
        for node in self._nodes:
            if self._is_part(node):
                continue
            mine = [one for one in dict.fromkeys(self._operands(node)) if self._fits_in(one, node, effects)]
            inlined.update(mine)
            for one in sorted(mine, key=lambda one: -len(self._draft(one, inlined))):
                if len(self._draft(node, inlined)) > _LONGEST:
                    inlined.discard(one)
        return inlined

    def _fits_in(self, node: fx.Node, reader: fx.Node, effects: Mapping[fx.Node, int]) -> bool:
        if node not in effects or len(self._readers[node]) != 1 or has_effect(node) or node in self._parts:
            return False
        if self._is_part(node) or is_of_mhc(node) or is_of_mhc(reader):
            return False
        return effects[node] == effects[reader] - has_effect(reader) and calling_frame(node) == calling_frame(reader)

    def _draft(self, node: fx.Node, inlined: set[fx.Node]) -> str:
        """About what a node's line will be."""

        def write(value: Any) -> Expression:
            if isinstance(value, fx.Node):
                value = self.resolved(value)
                if value in inlined:
                    return spell(value, write, clean=self._clean)
                return Expression(self._names.get(value) or self._hint(value))
            return self._constant(value, write)

        return spell(node, write, clean=self._clean).text

    # ------------------------------------------------------------------------------------------------- lifetimes

    def _leaves(self, node: fx.Node) -> list[fx.Node]:
        """The named values that a statement reads."""
        found = []
        for one in self._operands(node):
            found += self._leaves(one) if one in self._inlined else [one]
        return found

    def _last_uses(self) -> dict[fx.Node, int]:
        last: dict[fx.Node, int] = {}
        for place, node in enumerate([*self._statements, self._output]):
            for one in self._leaves(node):
                last[one] = place
        return last

    # --------------------------------------------------------------------------------------------------- writing

    def write(self) -> Body:
        """All lines. Raises ExportError for an op that has no form in Python."""
        body, regions = Body(), _Regions()
        live = {name: node for node, name in self._names.items() if name.isidentifier()}
        where: Any = None
        for place, node in enumerate(self._statements):
            if node.target in (GRAD, ENTER, EXIT):
                regions.step(node, body.lines)
                continue
            expression = spell(node, self._write, clean=self._clean)
            for name, holder in list(live.items()):
                if self._last.get(holder, -1) <= place:
                    del live[name]
            pad = _INDENT + "    " * regions.depth
            if (here := self._section(node)) != where:
                gap = [] if body.lines and body.lines[-1].endswith(":") else [""]
                body.lines += [*gap, *self._comment(node, here, pad)]
                where = here
            left = self._targets(node, live)
            body.lines += _statement(pad, left, expression)
        regions.close(body.lines, self._output)
        body.outputs = [self._write(one).text for one in self._output.args[0]]
        return body

    def _targets(self, node: fx.Node, live: dict[str, fx.Node]) -> str:
        """`name = ` for what a statement gives; nothing for a value that nobody reads."""
        parts = self._parts.get(node)
        if parts is None:
            return f"{self._bind([node], self._hint(node), live)} = " if node in self._readers else ""
        names = []
        for takers, hint in zip(parts, self._part_hints(node, len(parts)), strict=True):
            read = [one for one in takers if one in self._readers]
            names.append(self._bind(read, hint, live) if read else "_")
        return f"{', '.join(names)} = " if len(names) > 1 else f"({names[0]},) = "

    def _bind(self, nodes: list[fx.Node], hint: str, live: dict[str, fx.Node]) -> str:
        name = hint
        for number in range(2, 10**6):
            if name not in live:
                break
            name = f"{hint}_{number}"
        for node in nodes:
            self._names[node] = name
        live[name] = max(nodes, key=lambda node: self._last.get(node, -1))
        return name

    def _write(self, value: Any) -> Expression:
        if not isinstance(value, fx.Node):
            return self._constant(value, self._write)
        value = self.resolved(value)
        if value in self._inlined:
            return spell(value, self._write, clean=self._clean)
        return Expression(self._names[value])

    def _constant(self, value: Any, write: Callable[[Any], Expression]) -> Expression:
        if isinstance(value, list | tuple):
            tail = ",)" if isinstance(value, tuple) and len(value) == 1 else "]" if isinstance(value, list) else ")"
            return joined([write(one) for one in value], "(" if tail != "]" else "[", tail)
        if isinstance(value, dict):
            return joined([Expression(f"{key!r}: {write(one).text}") for key, one in value.items()], "{", "}")
        return Expression(self._device(value)) if isinstance(value, torch.device) else literal(value)

    # ---------------------------------------------------------------------------------------------- names, comments

    def _hint(self, node: fx.Node) -> str:
        """What a value is called: as the model's line does, else as its module or op."""
        if is_of_mhc(node):
            return _OF_MHC.get(packet_name(node.target), packet_name(node.target))  # type: ignore[arg-type]
        frame = calling_frame(node)
        assigned = _ASSIGNED.match(frame.code) if frame is not None else None
        readers = [user for user in node.users if calling_frame(user) == frame]
        if assigned and "," not in assigned[1] and not readers:
            return _legal(assigned[1])
        path, (outer, _) = module_path(node), calling_module(node)
        if path and (path != outer or (frame is not None and frame.code.startswith("return ") and not readers)):
            steps = [step for step in path.split(".") if not step.isdecimal()]
            return _legal(steps[-1] if steps else "")
        if node.target is aten.sym_size.int:
            return "size"
        return _legal(packet_name(node.target) if isinstance(node.target, _torch.OpOverload) else "value")

    def _part_hints(self, node: fx.Node, count: int) -> list[str]:
        if is_of_mhc(node) and count == len(_COEFFICIENTS):
            return list(_COEFFICIENTS)
        frame = calling_frame(node)
        assigned = _ASSIGNED.match(frame.code) if frame is not None else None
        names = re.split(r"\s*,\s*", assigned[1]) if assigned else []
        if len(names) == count and not any(calling_frame(user) == frame for part in self._parts[node] for user in part
                                           for user in user.users):  # fmt: skip
            return [_legal(name) for name in names]
        return [f"{self._hint(node)}_{place}" for place in range(count)]

    def _section(self, node: fx.Node) -> tuple[str, ...]:
        """What a comment is put above: a module, or the parts of a site."""
        return (self._part_of_site(node),) if is_of_mhc(node) else calling_module(node)

    def _comment(self, node: fx.Node, section: tuple[str, ...], pad: str) -> list[str]:
        path, *kind = section
        frame = calling_frame(node)
        name = path if not kind else f"{path or 'the model'}: {kind[0]}" if kind[0] else "outside of the model"
        text = f"{pad}# {name}" + (f"  ({frame})" if frame is not None else "")
        text = text.encode("ascii", "backslashreplace").decode()
        return [text if len(text) <= WIDTH else text[: WIDTH - 4].rstrip() + " ..."]

    def _part_of_site(self, node: fx.Node) -> str:
        if node.target is mhc.expand.default:
            return "the streams of a trunk: copies of its first state"
        if node.target is mhc.readout.default:
            return "readout: the mean over streams"
        if "mhc_site" not in node.meta:
            return "the streams, read with the pre of the site before"
        site = reference(f"{node.meta['mhc_site']}.bias").removeprefix("self.").removesuffix(".bias")
        return f"site {site}" + (": its branch goes back into the streams" if node.target is mhc.merge.default else "")


def is_of_mhc(node: fx.Node) -> bool:
    """An op of this package."""
    return isinstance(node.target, _torch.OpOverload) and node.target.namespace == "mhc"


def _legal(name: str) -> str:
    name = name.strip("_") or "value"
    return f"{name}_value" if name in _RESERVED or not name.isidentifier() else name


def _statement(pad: str, left: str, expression: Expression) -> list[str]:
    first, *others = expression.lines(WIDTH - len(pad) - len(left), pad)
    if len(pad) + len(left) + len(first) <= WIDTH or not left:
        return [f"{pad}{left}{first}", *others]
    inner = pad + "    "  # a long path of modules, which has no place to break
    first, *others = expression.lines(WIDTH - len(inner), inner)
    return [f"{pad}{left}(", inner + first, *others, f"{pad})"]


class _Regions:
    """The pairs of nodes that switch gradients or autocast, as nested `with` blocks."""

    def __init__(self) -> None:
        self._open: list[tuple[Any, int]] = []  # what closes a block, and the line that opens it
        self._grad = [True]

    @property
    def depth(self) -> int:
        """How many blocks are open."""
        return len(self._open)

    def step(self, node: fx.Node, lines: list[str]) -> None:
        """Open or close what a node switches."""
        if node.target is EXIT:
            self._close(node.args[0], node, lines)
        elif node.target is ENTER:
            device, dtype, enabled, cache = (*node.args, None, None, None)[:4]
            parts = [literal(device), named("dtype", literal(dtype)), named("enabled", literal(enabled))]
            parts += [named("cache_enabled", literal(cache))] if cache is not None else []
            self._begin(node, joined(parts, "torch.autocast(", ")").text, lines)
        elif len(self._grad) > 1 and self._grad[-2] == node.args[0]:
            self._grad.pop()
            self._close(GRAD, node, lines)
        elif self._grad[-1] != node.args[0]:
            self._grad.append(bool(node.args[0]))
            self._begin(GRAD, "torch.enable_grad()" if node.args[0] else "torch.no_grad()", lines)

    def _begin(self, closer: Any, text: str, lines: list[str]) -> None:
        pad = _INDENT + "    " * self.depth
        self._open.append((closer, len(lines)))
        lines.append(f"{pad}with {text}:")

    def _close(self, closer: Any, node: fx.Node, lines: list[str]) -> None:
        if not self._open or self._open[-1][0] is not closer:
            raise no_form(node)
        _, line = self._open.pop()
        if not any(text.strip() and not text.lstrip().startswith("#") for text in lines[line + 1 :]):
            del lines[line:]
            return
        inner = [place for place in range(line + 1, len(lines)) if lines[place].strip()]
        first = lines[inner[0]]
        if first.lstrip().startswith("with ") and all(len(lines[one]) - len(lines[one].lstrip()) > len(first)
                                                      - len(first.lstrip()) for one in inner[1:]):  # fmt: skip
            lines[line] = f"{lines[line][:-1]}, {first.strip().removeprefix('with ')}"  # one `with` for both
            lines[inner[0] :] = [text[4:] for text in lines[inner[0] + 1 :]]

    def close(self, lines: list[str], output: fx.Node) -> None:
        """Raises ExportError when something is still open."""
        if self._open:
            raise no_form(output)


__all__ = ["Body", "BodyWriter", "has_effect", "is_check", "same_as"]
