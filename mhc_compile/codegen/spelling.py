"""How a call in a graph is written in Python: `x + y`, `F.linear(...)`, `x.reshape(...)`, or the op itself.

A clean spelling is chosen by the op's name alone; whether it really calls that op is checked on the whole file
afterwards (`source_check`).
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mhc_compile import _torch
from mhc_compile.errors import ExportError, wrong
from mhc_compile.passes.op_kinds import aten, packet
from mhc_compile.passes.provenance import source_line

# How tightly Python binds, as far as it matters here.
COMPARE, OR, XOR, AND, SUM, PRODUCT, UNARY, POWER, ATOM = range(9)


class Expression(NamedTuple):
    """Python text, how tightly it binds, and the parts that may stand on lines of their own."""

    text: str
    binding: int = ATOM
    head: str = ""  # `f(`
    parts: tuple[Expression, ...] = ()  # `a`, `b=1`
    tail: str = ""  # `)`
    comma: str = ","  # behind each part

    def lines(self, room: int, indent: str = "") -> list[str]:
        """The text on as few lines as it needs, with `room` characters on the first."""
        if len(self.text) <= room or not self.parts:
            return [self.text]
        inner = indent + "    "
        made = [self.head]
        for part in self.parts:
            first, *others = part.lines(WIDTH - len(inner) - len(self.comma), inner)
            made += [inner + first, *others]
            made[-1] += self.comma
        return [*made, indent + self.tail]


WIDTH = 120  # of a line

Write = Callable[[Any], Expression]  # of an argument: a node, a number, a list, ...

_FULL = sys.maxsize
_BINARY = {
    "add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "div": ("/", PRODUCT), "matmul": ("@", PRODUCT),
    "floor_divide": ("//", PRODUCT), "remainder": ("%", PRODUCT), "__and__": ("&", AND), "bitwise_and": ("&", AND),
    "__or__": ("|", OR), "bitwise_or": ("|", OR), "bitwise_xor": ("^", XOR), "eq": ("==", COMPARE),
    "ne": ("!=", COMPARE), "lt": ("<", COMPARE), "le": ("<=", COMPARE), "gt": (">", COMPARE), "ge": (">=", COMPARE),
    "pow": ("**", POWER),
}  # fmt: skip
_OF_SIZES = {
    operator.add: ("+", SUM), operator.sub: ("-", SUM), operator.mul: ("*", PRODUCT), operator.truediv: ("/", PRODUCT),
    operator.floordiv: ("//", PRODUCT), operator.mod: ("%", PRODUCT), operator.pow: ("**", POWER),
    operator.eq: ("==", COMPARE), operator.ne: ("!=", COMPARE), operator.lt: ("<", COMPARE),
    operator.le: ("<=", COMPARE), operator.gt: (">", COMPARE), operator.ge: (">=", COMPARE),
    operator.and_: ("&", AND), operator.or_: ("|", OR),
}  # fmt: skip
_OF_NUMBERS = {
    torch.sym_max: "torch.sym_max", torch.sym_min: "torch.sym_min", torch.sym_not: "torch.sym_not",
    torch.sym_float: "torch.sym_float", torch.sym_int: "torch.sym_int", torch.sym_ite: "torch.sym_ite",
    math.ceil: "math.ceil", math.floor: "math.floor", math.trunc: "math.trunc",
}  # fmt: skip
# torch.nn.functional: the parameters of the ATen op in the order in which F takes them, `=` where by name.
_FUNCTIONAL = {
    "linear": "input weight bias",
    "layer_norm": "input normalized_shape weight bias eps=",
    "rms_norm": "input normalized_shape weight eps=",
    "group_norm": "input num_groups weight bias eps=",
    "batch_norm": "input running_mean running_var weight bias training= momentum= eps=",
    "embedding": "indices weight padding_idx=",
    "conv1d": "input weight bias stride= padding= dilation= groups=",
    "conv2d": "input weight bias stride= padding= dilation= groups=",
    "conv3d": "input weight bias stride= padding= dilation= groups=",
    "softmax": "self dim= dtype=",
    "log_softmax": "self dim= dtype=",
    "gelu": "self approximate=",
    "silu": "self",
    "relu": "self",
    "mish": "self",
    "hardswish": "self",
    "softplus": "self beta= threshold=",
    "leaky_relu": "self negative_slope=",
    "elu": "self alpha=",
    "dropout": "input p= train=training",
    "scaled_dot_product_attention": "query key value attn_mask= dropout_p= is_causal= scale= enable_gqa=",
    "max_pool2d": "self kernel_size stride= padding= dilation= ceil_mode=",
    "avg_pool2d": "self kernel_size stride= padding= ceil_mode= count_include_pad= divisor_override=",
    "adaptive_avg_pool1d": "self output_size",
    "adaptive_avg_pool2d": "self output_size",
    "pad": "self pad mode= value=",
    "one_hot": "self num_classes",
    "pixel_shuffle": "self upscale_factor",
}
_IGNORED = {"cudnn_enable", "cudnn_enabled", "pin_memory", "layout"}  # no part of the function
_SPREAD = {"reshape", "view", "expand", "permute", "repeat"}  # x.reshape(2, 3) for x.reshape([2, 3])
_FREE = {"addmm", "baddbmm", "addcmul", "addcdiv", "bmm", "mm"}  # functions of equals, not methods of the first
_UNNAMED_DIM = {"unsqueeze", "squeeze", "transpose", "select", "unbind", "size"}
# The ops of this package: parameters that are clear by their places; the others are written with their names.
# The ops of ours by the module of their functions, as a file names it, and how many arguments are told by their place.
_OURS = {
    "mhc": {"expand": 1, "readout": 1, "coefficients": 1, "sinkhorn": 1, "aggregate": 2, "merge": 4},
    "manifold_ops": {"gates": 1, "constrain": 1},
}


def joined(parts: Sequence[Expression], head: str = "", tail: str = "") -> Expression:
    """A call or display of parts."""
    return Expression(f"{head}{', '.join(part.text for part in parts)}{tail}", ATOM, head, tuple(parts), tail)


def named(name: str, value: Expression) -> Expression:
    """`name=value`."""
    return Expression(f"{name}={value.text}", ATOM, f"{name}={value.head}", value.parts, value.tail, value.comma)


def bound(part: Expression, binding: int) -> str:
    """The text of an operand, in parentheses where it binds less than its operator."""
    return part.text if part.binding >= binding else f"({part.text})"


def spell(node: fx.Node, write: Write, *, clean: bool = True) -> Expression:
    """A call as Python: with `clean` as a user would write it, else with torch.ops. ExportError when it has no form."""
    if node.target is operator.getitem:
        return Expression(f"{bound(write(node.args[0]), ATOM)}[{write(node.args[1]).text}]")
    if node.target in _OF_SIZES:
        return _binary(*_OF_SIZES[node.target], *map(write, node.args))
    if node.target in _OF_NUMBERS:
        return joined([write(one) for one in node.args], f"{_OF_NUMBERS[node.target]}(", ")")
    if node.target is operator.neg:
        return Expression(f"-{bound(write(node.args[0]), UNARY)}", UNARY)
    if not isinstance(node.target, _torch.OpOverload):
        raise no_form(node)
    if node.target is aten.sym_size.int:
        return Expression(f"{bound(write(node.args[0]), ATOM)}.size({write(node.args[1]).text})")
    if clean:
        for form in (_of_mhc, _operator, _indexing, _functional, _method, _function):
            made = form(node, node.target, write)
            if made is not None:
                return made
    return _raw(node, node.target, write)


def no_form(node: fx.Node) -> ExportError:
    """The error for a call that cannot be written down."""
    found = f"{getattr(node.target, '__name__', node.target)}, which has no form in a Python file"
    step = "rewrite that line in tensor ops, or inspect the graph: history(model)[-1].print_readable()"
    return ExportError(
        wrong("an op of the rewritten graph", found, "ops of torch.ops", step), line=source_line(node) or None
    )


def needed_import(target: Any) -> str | None:
    """The module that defines an op of neither torch nor this package; "" if it is unknown, None if none is needed."""
    if not isinstance(target, _torch.OpOverload) or target.namespace in ("aten", "prims", "prim", "mhc"):
        return None
    module = _torch.module_of_op(target)
    if module is not None:
        return None if module.split(".")[0] == "torch" else "" if module == "__main__" else module
    return target.namespace if target.namespace in sys.modules else ""


# ------------------------------------------------------------------------------------------------- values


def literal(value: Any) -> Expression:
    """A constant argument as Python."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return Expression(_quoted(value) if isinstance(value, str) else repr(value))
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return Expression(str(value))
    if isinstance(value, torch.device):
        return Expression(f'torch.device("{value}")')
    if isinstance(value, int):
        return Expression(repr(value), UNARY if value < 0 else ATOM)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, complex):
        return Expression(repr(value))
    raise TypeError(f"a {type(value).__name__} is no literal")


def _quoted(text: str) -> str:
    return f'"{ascii(text)[1:-1]}"' if not {"'", '"'} & set(text) else ascii(text)


_LIMITS = {
    getattr(torch.finfo(dtype), name): f"torch.finfo({dtype}).{name}"
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32)
    for name in ("min", "max")
}


def _float(value: float) -> Expression:
    if value in _LIMITS:
        return Expression(_LIMITS[value])
    if math.isfinite(value):
        return Expression(repr(value), UNARY if math.copysign(1, value) < 0 else ATOM)
    name = "nan" if math.isnan(value) else "inf"
    return Expression(f"-torch.{name}", UNARY) if value < 0 else Expression(f"torch.{name}")


# -------------------------------------------------------------------------------------------------- forms


def _binary(sign: str, binding: int, left: Expression, right: Expression) -> Expression:
    on_left, on_right = (binding + 1, UNARY) if binding in (COMPARE, POWER) else (binding, binding + 1)
    if binding == COMPARE:
        on_right = COMPARE + 1
    first, second = bound(left, on_left), bound(right, on_right)
    parts = (Expression(first), Expression(f"{sign} {second}"))
    return Expression(f"{first} {sign} {second}", binding, "(", parts, ")", "")


def _of_mhc(node: fx.Node, target: _torch.OpOverload, write: Write) -> Expression | None:
    name = packet_name(target)
    place = next((one for one in _OURS if name in _OURS[one]), None) if target.namespace == "mhc" else None
    if place is None:
        return None
    names = [argument.name for argument in target._schema.arguments]
    places = _OURS[place][name]
    by_name = {**dict(zip(names[places:], node.args[places:], strict=False)), **node.kwargs}
    parts = [write(one) for one in node.args[:places]]
    parts += [named(key, write(value)) for key, value in by_name.items()]
    return joined(parts, f"{place}.{name}(", ")")


def _operator(node: fx.Node, target: _torch.OpOverload, write: Write) -> Expression | None:
    name = packet_name(target)
    if target.namespace != "aten" or node.kwargs:
        return None
    if name == "neg":
        return Expression(f"-{bound(write(node.args[0]), UNARY)}", UNARY)
    if name == "bitwise_not":
        return Expression(f"~{bound(write(node.args[0]), UNARY)}", UNARY)
    if name == "rsub" and len(node.args) == 2:
        return _binary("-", SUM, write(node.args[1]), write(node.args[0]))
    if name not in _BINARY or len(node.args) != 2 or not any(is_tensor(one) for one in node.args):
        return None
    if any(isinstance(one, bool) for one in node.args):  # `x == True` reads like a mistake
        return None
    return _binary(*_BINARY[name], *map(write, node.args))


def _indexing(node: fx.Node, target: _torch.OpOverload, write: Write) -> Expression | None:
    kind, source = packet(node), node.args[0] if node.args else None
    if kind not in (aten.slice, aten.select, aten.index) or node.kwargs or not is_tensor(source):
        return None
    if kind is aten.index:
        indices = [Expression(":") if one is None else write(one) for one in node.args[1]]  # type: ignore[union-attr]
        return joined(indices, f"{bound(write(source), ATOM)}[", "]")
    rank = value_of(source).dim()
    dim = int(node.args[1]) % rank if len(node.args) > 1 else 0  # type: ignore[arg-type]
    if kind is aten.select:
        if not isinstance(node.args[2], int):
            return None
        place = write(node.args[2]).text
    else:
        start, end, step = (*node.args[2:], None, None, None)[:3]
        first = "" if start in (None, 0) else write(start).text
        last = "" if end is None or end == _FULL else write(end).text
        place = f"{first}:{last}" + (f":{write(step).text}" if step not in (None, 1) else "")
    behind = rank - 1 - dim
    places = ["...", place, *[":"] * behind] if dim > 1 and dim > behind else [*[":"] * dim, place]
    return Expression(f"{bound(write(source), ATOM)}[{', '.join(places)}]")


def _functional(node: fx.Node, target: _torch.OpOverload, write: Write) -> Expression | None:
    name = packet_name(target)
    if target.namespace != "aten" or name not in _FUNCTIONAL or not hasattr(F, name):
        return None
    given = arguments(node, target)
    parts = []
    by_name = False
    for place in _FUNCTIONAL[name].split():
        theirs, sign, ours = place.partition("=")
        by_name = by_name or bool(sign) or theirs not in given  # behind one that is left out, all need their names
        if theirs in given:
            value = write(given.pop(theirs))
            parts.append(named(ours or theirs, value) if by_name else value)
    return None if given else joined(parts, f"F.{name}(", ")")


def _method(node: fx.Node, target: _torch.OpOverload, write: Write) -> Expression | None:
    name = packet_name(target)
    schema = target._schema.arguments
    if target.namespace != "aten" or not node.args or not is_tensor(node.args[0]) or schema[0].name != "self":
        return None
    owner = bound(write(node.args[0]), ATOM)
    if name == "numpy_T":
        return Expression(f"{owner}.T")
    if name == "lift_fresh_copy":
        return Expression(f"{owner}.clone()")
    if not callable(getattr(Tensor, name, None)) or name.startswith("_") or name in _FREE:
        return None
    if name in _SPREAD and len(node.args) == 2 and not node.kwargs and node.args[1]:
        return joined([write(one) for one in node.args[1]], f"{owner}.{name}(", ")")  # type: ignore[union-attr]
    return joined(_parts(node, target, write, 1), f"{owner}.{name}(", ")")


def _function(node: fx.Node, target: _torch.OpOverload, write: Write) -> Expression | None:
    name = packet_name(target)
    if target.namespace != "aten" or not hasattr(torch, name) or name.startswith("_"):
        return None
    return joined(_parts(node, target, write, 0), f"torch.{name}(", ")")


def _parts(node: fx.Node, target: _torch.OpOverload, write: Write, skipped: int) -> list[Expression]:
    """Arguments: tensors, numbers and lists by place, flags and dimensions by name."""
    by_name = False
    parts = []
    for place, (name, value) in enumerate(arguments(node, target).items()):
        if place < skipped:
            continue
        plain = isinstance(value, bool | float | None | torch.dtype) or (
            name == "dim" and packet_name(target) not in _UNNAMED_DIM
        )
        alone = packet_name(target) in ("to", "clamp", "pow", "masked_fill", "full", "where", "mul", "add")
        by_name = by_name or name in node.kwargs or (plain and not alone) or _gap(target, place, name)
        parts.append(named(name, write(value)) if by_name else write(value))
    return parts


def _gap(target: _torch.OpOverload, place: int, name: str) -> bool:
    """An argument before this one was left out."""
    return [argument.name for argument in target._schema.arguments].index(name) != place


def _raw(node: fx.Node, target: _torch.OpOverload, write: Write) -> Expression:
    parts = [write(one) for one in node.args] + [named(key, write(one)) for key, one in node.kwargs.items()]
    return joined(parts, f"torch.ops.{target.namespace}.{packet_name(target)}.{target._overloadname}(", ")")


def packet_name(target: _torch.OpOverload) -> str:
    """`add` of `aten.add.Tensor`."""
    return str(target.overloadpacket._qualified_op_name).rpartition("::")[2]


def arguments(node: fx.Node, target: _torch.OpOverload) -> dict[str, Any]:
    """Name -> value of the arguments that say something: not those that are at their default."""
    schema = target._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    given.update(node.kwargs)
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return {
        name: value
        for name, value in given.items()
        if name not in _IGNORED and not (name in defaults and _same(value, defaults[name]))
    }


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, fx.Node) or isinstance(default, Tensor):
        return False
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return list(value) == list(default)
    return type(value) is type(default) and bool(value == default)


def value_of(node: Any) -> Any:
    """What a node stood for when it was captured."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    """The argument is a tensor."""
    return isinstance(value_of(node), Tensor)
