"""Does a written module call the ops of the graph that it was written from, with the same arguments?

It is traced with the graph's own stand-ins for tensors, so that nothing is computed, and both graphs are brought to one
form: what only hands a value on is left out, and a call is told by its op, its arguments, and what was written before.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile import _torch
from mhc_compile.codegen.source_body import ENTER, EXIT, GRAD, has_effect, is_check, same_as
from mhc_compile.codegen.spelling import arguments, packet_name, value_of
from mhc_compile.passes.op_kinds import aten

_FREE = {"device"}  # written as that of the first input


def module_of(code: str, constants: Mapping[str, Tensor], name: str) -> Any:
    """The class in a written file, with large constants from memory."""
    module = types.ModuleType("mhc_written")
    exec(compile(code, "<written>", "exec"), module.__dict__)
    if constants:
        module.__dict__["constants"] = lambda: dict(constants)
    return getattr(module, name)


def same_graph(graph: fx.GraphModule, values: Sequence[Any], run: Callable[..., list[Any]]) -> bool:
    """`run` does what the graph does; values: of the graph's inputs, for those that have no stand-in."""
    inputs = graph.graph.find_nodes(op="placeholder")
    examples = [node.meta.get("val", value) for node, value in zip(inputs, values, strict=True)]
    fake_mode = _torch.fake_mode_of(examples)
    if fake_mode is None:
        return False
    before = fake_mode.allow_non_fake_inputs
    fake_mode.allow_non_fake_inputs = True
    try:
        with fake_mode, torch.enable_grad(), _torch.saving_unseen():
            traced = _torch.make_fx(run, pre_dispatch=True)(*examples)
    finally:
        fake_mode.allow_non_fake_inputs = before
    return _form(graph.graph) == _form(traced.graph)


def _form(graph: fx.Graph) -> tuple[Any, ...]:
    """What the outputs are and which effects there are, in a form that does not depend on order and names."""
    known: dict[fx.Node, int] = {}
    seen: dict[tuple[Any, ...], int] = {}
    unbacked: dict[str, str] = {}
    effects: list[int] = []
    region: list[Any] = []

    def number(key: tuple[Any, ...]) -> int:
        return seen.setdefault(key, hash(key))

    def form(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return known[value]
        if isinstance(value, list | tuple):
            return tuple(form(one) for one in value)
        if isinstance(value, dict):
            return tuple((key, form(one)) for key, one in value.items())
        return (type(value).__name__, repr(value))

    places = 0
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            known[node] = number(("input", places))
            places += 1
        elif node.op == "output":
            return form(node.args[0]), tuple(effects)
        elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            known[node] = number(("size", _sizes(str(value), unbacked)))
        elif is_check(node):
            continue
        elif (source := same_as(node)) is not None:
            known[node] = known[source]
        elif node.target in (GRAD, ENTER, EXIT):
            _switch(node, region, form)
            known[node] = 0
        else:
            known[node] = number((_name(node), form(_given(node)), len(effects), tuple(region)))
            if has_effect(node):
                effects.append(known[node])
    raise AssertionError("a graph without an output")


def _switch(node: fx.Node, region: list[Any], form: Callable[[Any], Any]) -> None:
    """Keep what gradients and autocast are set to behind a marker."""
    if node.target is GRAD:
        region[:] = [one for one in region if one[0] != "grad"] + ([] if node.args[0] else [("grad",)])
    elif node.target is ENTER:
        region.append(("autocast", form(node.args[:3])))
    else:
        del region[max(place for place, one in enumerate(region) if one[0] == "autocast")]


def _name(node: fx.Node) -> str:
    if not isinstance(node.target, _torch.OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    if node.target in (aten.lift_fresh_copy.default, aten.clone.default):
        return "clone"
    return str(node.target)


def _given(node: fx.Node) -> Any:
    if not isinstance(node.target, _torch.OpOverload):
        return [list(node.args), dict(node.kwargs)]
    given = {name: value for name, value in arguments(node, node.target).items() if name not in _FREE}
    if packet_name(node.target) == "index":
        given["indices"] = list(given["indices"])
    if packet_name(node.target) in ("select", "slice") and "dim" in given:
        given["dim"] %= value_of(node.args[0]).dim()
    return given


def _sizes(text: str, unbacked: dict[str, str]) -> str:
    """The expression of a size; sizes that depend on data are told by the order in which they appear."""
    return re.sub(r"\bu\d+\b", lambda found: unbacked.setdefault(found[0], f"u{len(unbacked)}"), text)
