"""The rewritten graph of a model as one Python file: an nn.Module with the model's own names."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from mhc_compile.codegen.source_body import BodyWriter
from mhc_compile.codegen.source_state import Held, as_code, held, reference
from mhc_compile.codegen.spelling import WIDTH, Expression, joined, literal, needed_import, no_form, value_of
from mhc_compile.codegen.stage_module import leaves
from mhc_compile.errors import ExportError, wrong
from mhc_compile.passes.capture import graph_input
from mhc_compile.record import SITE_FUNCTION, Function

_TAKEN = {"Any", "Function", "Level", "Path", "Recorded", "Shape", "Tensor", "F", "nn"}  # names in every file


@dataclass(frozen=True)
class TracedCall:
    """A graph and the call that it stands for.

    name: of the model's class; arguments: the flat arguments of the graph; names: of the positional parameters of the
    model's forward; args, kwargs: the call; output: the structure of what it gives; function: what decides what the
    weights compute.
    """

    name: str
    graph: fx.GraphModule
    arguments: tuple[Any, ...]
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: pytree.TreeSpec
    function: Function


@dataclass(frozen=True)
class Written:
    """The text of a module, the name of its class, and the constants that are too large for the text."""

    name: str
    code: str
    constants: Mapping[str, Tensor]


def write(model: nn.Module, call: TracedCall, header: str, *, clean: bool = True) -> Written:
    """The Python of a traced call. header: first lines of its docstring. Raises ExportError for what has no form."""
    state = state_of(call)
    holds = held(model, dict(state.values()))
    if "" in holds.extra:
        found = "a model whose root module saves an extra state"
        raise ExportError(wrong(call.name, found, "extra states of submodules", "move it into a submodule"))
    inputs = _Inputs(call, [node for node in call.graph.graph.find_nodes(op="placeholder") if node not in state])
    device = _Device(call.graph.graph, inputs)
    names = {node: reference(path) for node, (path, _) in state.items()} | inputs.expressions
    body = BodyWriter(call.graph.graph, names, device=device.text, clean=clean).write()
    result = _output(call.output, body.outputs, call.graph.graph)
    forward = [*inputs.checks, *([device.line] if device.used else []), *body.lines, *_returned(result)]
    name = call.name if call.name not in _TAKEN else f"{call.name}Model"
    parts = [
        _docstring(name, header, inputs, holds, model.training),
        "from __future__ import annotations",
        _imports(forward, holds, call.graph.graph),
        _LEVEL,
        _class(name, holds, model.training, inputs.signature, _annotation(call.output), forward),
        *inputs.helpers,
        *([_RECORDED] if holds.extra else []),
        _conversion(call.function),
        _hold(holds),
        *([_CONSTANTS] if holds.large() else []),
        *_tables(holds),
    ]
    code = "\n\n".join(parts)
    return Written(name, re.sub(r"\n{3,}(?=[^\s])", "\n\n\n", _spaced(code)) + "\n", holds.large())


# -------------------------------------------------------------------------------------------------- inputs


def state_of(call: TracedCall) -> dict[fx.Node, tuple[str, Tensor]]:
    """Graph input -> name and value of the parameter, buffer or constant that it stands for."""
    found: dict[fx.Node, tuple[str, Tensor]] = {}
    for node, value in zip(call.graph.graph.find_nodes(op="placeholder"), call.arguments, strict=True):
        record = graph_input(node)
        if isinstance(value, Tensor) and record is not None and (record.kind != "input" or record.path):
            found[node] = record.path, value
    return found


class _Inputs:
    """The parameters of the written forward: its signature, what it checks, and what graph inputs are called in it."""

    def __init__(self, call: TracedCall, nodes: Sequence[fx.Node]) -> None:
        given = leaves(call.names, call.args, call.kwargs)
        if len(given) != len(nodes) or not all(path.split("[")[0].split(".")[0].isidentifier() for path in given):
            legal = "a call whose arguments have names"
            raise ExportError(wrong("the call", f"one with {', '.join(given)}", legal, "give them by name"))
        self.expressions: dict[fx.Node, str] = {}
        self.checks: list[str] = []
        self.told: list[str] = []
        self._dynamic = self._fixed = False
        for node, (path, value) in zip(nodes, given.items(), strict=True):
            self._add(node, path, value)
        order = [name for name in call.names if any(_root(path) == name for path in given)]
        order += [name for name in dict.fromkeys(map(_root, given)) if name not in order]
        self.signature = ", ".join(["self", *_parameters(order, given)])
        self.checks = [line.replace("@)", ", sizes)" if self._dynamic else ")") for line in self.checks]
        if self._dynamic:
            self.checks.insert(0, "        sizes: dict[str, int] = {}")

    def _add(self, node: fx.Node, path: str, value: Any) -> None:
        seen, quoted = value_of(node), literal(path).text
        if isinstance(seen, Tensor):
            name = path if path.isidentifier() else node.name
            if name != path:
                self.checks.append(f"        {name} = {path}")
            shape = [_size(size) for size in seen.shape]
            self._dynamic = self._dynamic or not all(isinstance(size, int) for size in seen.shape)
            sizes = joined([literal(size) for size in shape], "(", ",)" if len(shape) == 1 else ")").text
            self.checks.append(f"        fits({quoted}, {name}, {sizes}, {seen.dtype}@)")
            self.told.append(f"{path} [{', '.join(map(str, seen.shape))}] {str(seen.dtype)[6:]}")
            self.expressions[node] = name
        elif isinstance(seen, torch.SymInt | torch.SymFloat):
            self.expressions[node] = path
        else:
            self._fixed = True
            self.checks.append(f"        same({quoted}, {path}, {_literal(value, path)})")
            self.expressions[node] = _literal(value, path)

    @property
    def helpers(self) -> list[str]:
        """The functions that check inputs."""
        fits = (_FITS_DYNAMIC if self._dynamic else _FITS) if self.told else ""
        return [text for text in (fits, _SAME if self._fixed else "") if text]


def _root(path: str) -> str:
    return re.split(r"[\[.]", path, maxsplit=1)[0]


def _parameters(order: list[str], given: Mapping[str, Any]) -> list[str]:
    """Name, type and default of each parameter; behind one with a default, by name only."""
    found: list[str] = []
    optional = False
    for name in order:
        value = given.get(name, given)
        if value is given:
            kind, default = "Any", ""
        elif isinstance(value, Tensor):
            kind, default = "Tensor", ""
        else:
            kind, default = ("Any" if value is None else type(value).__name__), f" = {_literal(value, name)}"
        if optional and not default:
            found.insert(next(place for place, text in enumerate(found) if "=" in text), "*")
            optional = False
        optional = optional or (bool(default) and "*" not in found)
        found.append(f"{name}: {kind}{default}")
    return found


def _literal(value: Any, path: str) -> str:
    try:
        return literal(value).text
    except TypeError:
        legal = "tensors, numbers, strings and None, in dicts, lists and tuples"
        raise ExportError(wrong(f"input {path}", f"a {type(value).__name__}", legal)) from None


def _size(size: Any) -> int | str | None:
    if isinstance(size, int):
        return size
    return str(size) if str(size).isidentifier() else None


class _Device:
    """The only device of a graph is that of its first input, wherever that lies; several are named as they were."""

    def __init__(self, graph: fx.Graph, inputs: _Inputs) -> None:
        values = [leaf for node in graph.nodes for leaf in pytree.tree_leaves(value_of(node))]
        self._only = len({value.device for value in values if isinstance(value, Tensor)}) == 1
        first = next((name for node, name in inputs.expressions.items() if isinstance(value_of(node), Tensor)), None)
        self.line, self.used = f"        device = {first}.device", False
        self._known = self._only and first is not None

    def text(self, device: torch.device) -> str:
        if not self._known:
            return literal(device).text
        self.used = True
        return "device"


# -------------------------------------------------------------------------------------------------- output


def _output(spec: pytree.TreeSpec, outputs: Sequence[str], graph: fx.Graph) -> Expression:
    """The structure of the output, with classes other than torch's and Python's as dicts."""
    values = iter(outputs)
    made = _nested(spec, values)
    if next(values, None) is not None:
        raise no_form(next(iter(graph.find_nodes(op="output"))))
    return made


def _nested(spec: pytree.TreeSpec, values: Any) -> Expression:
    if spec.is_leaf():
        return Expression(next(values))
    parts = [_nested(child, values) for child in children(spec)]
    if spec.type is list:
        return joined(parts, "[", "]")
    if spec.type is tuple:
        return joined(parts, "(", ",)" if len(parts) == 1 else ")")
    named = [
        Expression(f"{literal(key).text}: {part.text}", head=f"{literal(key).text}: {part.head}", parts=part.parts,
                   tail=part.tail)
        for key, part in zip(_keys(spec, len(parts)), parts, strict=True)
    ]  # fmt: skip
    return joined(named, "{", "}")


def children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """The specs below one."""
    found = spec.children  # a list in some releases, a method in others
    return list(found() if callable(found) else found)


def _keys(spec: pytree.TreeSpec, count: int) -> list[Any]:
    context = spec.context
    if hasattr(context, "_fields"):  # a named tuple
        return list(context._fields)
    while isinstance(context, tuple | list) and len(context) == 2 and isinstance(context[1], tuple | list):
        context = context[1]  # defaultdict
    plain = isinstance(context, tuple | list) and all(isinstance(key, str | int) for key in context)
    return list(context) if plain and len(context) == count else [str(place) for place in range(count)]


def _annotation(spec: pytree.TreeSpec) -> str:
    if spec.is_leaf():
        return "Tensor"
    if spec.type in (list, tuple):
        return "Any" if not all(child.is_leaf() for child in children(spec)) else (
            "list[Tensor]" if spec.type is list else "tuple[Tensor, ...]")  # fmt: skip
    return "dict[str, Tensor]" if all(child.is_leaf() for child in children(spec)) else "dict[str, Any]"


def _returned(result: Expression) -> list[str]:
    first, *others = result.lines(WIDTH - 15, "        ")
    return ["", f"        return {first}", *others]


# ---------------------------------------------------------------------------------------------------- file


def _docstring(name: str, header: str, inputs: _Inputs, holds: Held, training: bool) -> str:
    mode = "train" if training else "eval"
    given = ", ".join(re.findall(r"(\w+): \w+(?!\w| =)", inputs.signature)) or "..."
    lines = [
        header,
        "",
        f"    model = {name}()",
        '    model.load_state_dict(torch.load("weights.pt"))  # the state_dict of the converted model',
        f"    output = model({given})",
        "",
        f"Inputs: {'; '.join(inputs.told) or 'none'}.",
        f"Mode: {mode}, as the model was; what the other mode does differently is not in this file. Until weights are",
        "loaded, parameters are NaN.",
    ]
    if holds.large():
        lines += ["The file of the same name that ends in .constants.pt belongs to it."]
    text = [piece for line in lines for piece in (textwrap.wrap(line, 110) if line[:1].strip() else [line])]
    body = "\n".join(text).encode("ascii", "backslashreplace").decode().replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{body}\n"""'


def _imports(forward: Sequence[str], holds: Held, graph: fx.Graph) -> str:
    text = "\n".join(forward)
    plain = ["import math"] if "math." in text else []
    plain += ["from pathlib import Path"] if holds.large() else []
    plain += ["from typing import Any"]
    outer = ["import torch"]
    outer += ["import torch.nn.functional as F"] if "F." in text else []
    defined = {name for node in graph.nodes if (name := _defined_by(node)) is not None}
    outer += [f"import {name}  # noqa: F401 - defines ops" for name in defined]
    used = set(re.findall(r"\b(mhc|manifold_ops)\.\w+\(", text))
    ours = ["from mhc_compile.kernels import manifold_ops"] if "manifold_ops" in used else []
    ours += ["from mhc_compile.kernels import ops as mhc"] if "mhc" in used else []
    ours += ["from mhc_compile.record import Function"]
    return "\n".join([*plain, "", *sorted(outer), "from torch import Tensor, nn", "", *ours])


def _defined_by(node: fx.Node) -> str | None:
    name = needed_import(node.target) if node.op == "call_function" else None
    if name == "":
        raise no_form(node)
    return name


def _tables(holds: Held) -> list[str]:
    rows = []
    for name, value in holds.saved.items():
        shape = joined([literal(size) for size in value.shape], "(", ",)" if value.dim() == 1 else ")")
        row = joined([literal(name), shape, literal(value.dtype), literal(_kind(value))], "(", ")")
        first, *others = row.lines(WIDTH - 5, "    ")
        rows += [f"    {first}", *others]
        rows[-1] += ","
    made = ["\n".join(["STATE = (  # the state_dict: name, shape, dtype, kind", *rows, ")"])]
    if holds.tied:
        tied = [f"    {literal(name).text}: {literal(first).text}," for name, first in holds.tied.items()]
        made.append("\n".join(["TIED = {  # the same tensors under other names", *tied, "}"]))
    return made


def _kind(value: Tensor) -> str:
    if not isinstance(value, nn.Parameter):
        return "buffer"
    return "parameter" if value.requires_grad else "frozen"


_LEVEL = '''
class Level(nn.Module):
    """Holds tensors and further levels under the names that the model has for them."""

    def __getitem__(self, name: int | str) -> Any:
        return self._modules[str(name)]
'''

_RECORDED = '''
class Recorded(Level):
    """A level that saves a state of its own, which is kept as it was loaded."""

    state: Any = None

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state
'''

_CONSTANTS = '''
def constants() -> dict[str, Tensor]:
    """What the model holds outside of its state_dict."""
    saved: dict[str, Tensor] = torch.load(Path(__file__).with_suffix(".constants.pt"), weights_only=True)
    return saved
'''

_FITS = '''
def fits(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The forward holds the sizes that it was written for."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}; legal: {list(shape)} {dtype}")
'''

_FITS_DYNAMIC = '''
Shape = tuple[int | str | None, ...]


def fits(name: str, tensor: Tensor, shape: Shape, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    """The forward holds the sizes that it was written for; those with a name may change, together."""
    pairs = zip(shape, tensor.shape, strict=False)
    known = [sizes.setdefault(one, size) if isinstance(one, str) else one for one, size in pairs]
    same = all(one is None or one == size for one, size in zip(known, tensor.shape, strict=False))
    if tensor.dim() != len(shape) or not same or tensor.dtype != dtype:
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}; legal: {list(shape)} {dtype}, with {sizes}")
'''

_SAME = '''
def same(name: str, value: Any, written: Any) -> None:
    """The forward is that of one value."""
    if value is not written and value != written:
        raise ValueError(f"{name} is {value!r}; legal: {written!r}, as it was written")
'''


def _conversion(function: Function) -> str:
    tables = [
        joined([Expression(f"{literal(name).text}: {_constant(one).text}") for name, one in table.items()], "{", "}")
        for table in (function.options, function.sites)
    ]
    lines = joined(tables, "CONVERSION = Function(", ")").lines(WIDTH)
    words = f"what decides what the weights compute: options, and of each site {', '.join(SITE_FUNCTION)}"
    return "\n".join([f"# {words}", *lines])


def _constant(value: Any) -> Expression:
    if isinstance(value, tuple):
        return joined([_constant(one) for one in value], "(", ",)" if len(value) == 1 else ")")
    return literal(value)


_LOAD = (
    "    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:",
    "        CONVERSION.check_state(state, prefix, step=\"write the model that has these weights\")",
    "        super()._load_from_state_dict(state, prefix, *rest)",
)


def _hold(holds: Held) -> str:
    kinds = [f"{literal(name).text}: Recorded" for name in holds.extra]
    level = f"KINDS.get({'{path}'}, Level)()".format(path='".".join(steps[: depth + 1])') if kinds else "Level()"
    steps = "for depth, step in enumerate(steps):" if kinds else "for step in steps:"
    table = f"KINDS = {{{', '.join(kinds)}}}\n\n\n" if kinds else ""
    return f'''
{table}def hold(model: nn.Module, name: str, value: Tensor, kind: str) -> None:
    """Register a tensor under its name; makes the levels above it."""
    *steps, last = name.split(".")
    place = model
    {steps}
        if step not in place._modules:
            place.add_module(step, {level})
        place = place._modules[step]
    if isinstance(value, nn.Parameter):  # under a second name
        place.register_parameter(last, value)
    elif kind in ("parameter", "frozen"):
        place.register_parameter(last, nn.Parameter(value, requires_grad=kind == "parameter"))
    else:
        place.register_buffer(last, value, persistent=kind == "buffer")
'''


def _class(name: str, holds: Held, training: bool, signature: str, result: str, forward: Sequence[str]) -> str:
    lines = [
        f"class {name}(Level):",
        "    def __init__(self) -> None:",
        "        super().__init__()",
        "        for name, shape, dtype, kind in STATE:",
        "            empty = torch.nan if dtype.is_floating_point else 0",
        "            hold(self, name, torch.full(shape, empty, dtype=dtype), kind)",
    ]
    if holds.tied:
        lines += [
            "        kinds = {name: kind for name, _, _, kind in STATE}",
            "        tensors = self.state_dict(keep_vars=True)",
            "        for name, first in TIED.items():",
            "            hold(self, name, tensors[first], kinds[first])",
        ]
    lines += _constants(holds)
    lines += [f"        super().train({training})", "", *_train(name, training), "", *_LOAD]
    opening = f"    def forward({signature}) -> {result}:"
    if len(opening) > WIDTH:
        parts = "".join(f"        {part},\n" for part in signature.split(", "))
        opening = f"    def forward(\n{parts}    ) -> {result}:"
    first = next(place for place, line in enumerate(forward) if line.strip())
    return "\n" + "\n".join([*lines, "", opening, *forward[first:]])


def _constants(holds: Held) -> list[str]:
    lines = []
    for name, value in holds.constants.items():
        code = as_code(value)
        if code is not None:
            call = joined([Expression("self"), literal(name), code, literal("constant")], "hold(", ")")
            first, *others = call.lines(WIDTH - 8, "        ")
            lines += [f"        {first}", *others]
    if holds.large():
        lines += [
            "        for name, value in constants().items():",
            '            hold(self, name, value, "constant")',
        ]
    return lines


def _train(name: str, training: bool) -> list[str]:
    mode, other = ("train", "eval") if training else ("eval", "train")
    return [
        f"    def train(self, mode: bool = True) -> {name}:",
        "        if not mode:" if training else "        if mode:",
        f'            raise RuntimeError("written in {mode} mode; write the model in {other} mode for the other")',
        "        return self",
    ]


def _spaced(code: str) -> str:
    """Two empty lines around what stands at the top level."""
    lines: list[str] = []
    for line in code.split("\n"):
        top = line.startswith(("class ", "def ", "Shape", "STATE", "KINDS", "TIED", "# what decides"))
        if top:
            while lines and not lines[-1].strip():
                lines.pop()
            gap = 2 if line.startswith(("class ", "def ")) or lines[-1].startswith((" ", ")")) else 1
            lines += [""] * gap
        lines.append(line.rstrip())
    return "\n".join(lines).rstrip()
