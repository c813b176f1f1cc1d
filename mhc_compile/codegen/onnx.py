"""A rewritten graph as an ONNX file, whose mHC ops are functions of the domain `mhc`.

torch's exporter inlines every function that it is given. It is therefore told to write calls of functions that it does
not know, and the bodies are put beside its graph when it is done.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import opset20 as standard

from mhc_compile.codegen import onnx_coefficients, onnx_constraints
from mhc_compile.codegen import onnx_functions as functions
from mhc_compile.codegen.onnx_functions import DOMAIN, KINDS, OPSET, VERSION, Function
from mhc_compile.errors import ExportError, wrong
from mhc_compile.passes.provenance import source_line

mhc = torch.ops.mhc

_FLOATS = [f"tensor({name})" for name in ("float", "double", "float16", "bfloat16")]

SITE = "mhc_site"  # what nodes of a program hold in meta["custom"], and nodes of a file in their metadata


@dataclass(frozen=True)
class Written:
    """What is in a file.

    calls: function -> how often it is called. inputs, outputs: name -> shape; a name stands for a size that may change.
    data: the file of the weights, if they are not in the file itself.
    """

    calls: dict[str, int]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    data: Path | None


def write(
    program: torch.export.ExportedProgram,
    path: Path,
    names: tuple[Sequence[str], Sequence[str]],
    external_data: bool,
) -> Written:
    """Write a program of level-1 ops to an ONNX file.

    names: of the program's tensor inputs and outputs. external_data: put the weights into `path.data` even if a file
    could hold them. Raises ExportError for an op that torch's exporter cannot translate, and for one of mHC that this
    module cannot.

    What a file says of mHC stands at its nodes and functions. Metadata of the whole model would be in the way of tools
    that make one model of two: they take two values of one key for a conflict.
    """
    table = _Table()
    _refuse_unknown(program, table)
    with _quiet():
        try:
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(names[0]),
                output_names=list(names[1]),
                custom_translation_table=table.translations(),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _untranslated(error) from error
    model = made.model
    for function, _ in table.used.values():
        attached = ir.serde.deserialize_function(function.proto())
        model.functions[attached.identifier()] = attached
    model.opset_imports[DOMAIN] = VERSION
    calls = _name_calls(model, {name: op for name, (_, op) in table.used.items()})
    _name_sizes(model)
    made.save(path, external_data=external_data)
    shapes = [{str(one.name): _shape(one) for one in values} for values in (model.graph.inputs, model.graph.outputs)]
    data = path.with_name(f"{path.name}.data")
    return Written(dict(calls), shapes[0], shapes[1], data if _has_external_data(path) else None)


def _has_external_data(path: Path) -> bool:
    stored = onnx.load(path, load_external_data=False).graph.initializer
    return any(one.data_location == onnx.TensorProto.EXTERNAL for one in stored)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of its own insides."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
        yield


# ---------------------------------------------------------------------------------------------- translation


class _Table:
    """What torch's exporter calls for our ops; each call writes a node, and notes its function."""

    def __init__(self) -> None:
        self.used: dict[str, tuple[Function, str]] = {}  # name -> the function, and the op that it stands for

    def translations(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """op -> what writes its node."""
        methods: dict[Any, Callable[..., Any]] = {
            mhc.expand.default: self.expand,
            mhc.readout.default: self.readout,
            mhc.coefficients.default: self.coefficients,
            mhc.gates.default: self.gates,
            mhc.sinkhorn.default: self.sinkhorn,
            mhc.constrain.default: self.constrain,
            mhc.aggregate.default: self.aggregate,
            mhc.merge.default: self.merge,
        }
        return {op: _as_function(method) for op, method in methods.items()}

    def _call(self, op: str, function: Function, *inputs: Any, **numbers: float) -> Any:
        self.used[function.name] = function, op
        opset = onnxscript.values.Opset(DOMAIN, VERSION)
        return onnxscript.values.Op(opset, function.name, _schema(function))(*inputs, **function.given(**numbers))

    def expand(self, x: Any, n: int) -> Any:
        return self._call("expand", functions.expand(), x, n=n)

    def readout(self, streams: Any) -> Any:
        return self._call("readout", functions.readout(_is_double(streams)), streams)

    def coefficients(
        self,
        streams: Any,
        phi: Any,
        alpha: Any,
        bias: Any,
        eps: float,
        pre_eps: float = 0.0,
        post_scale: float = 2.0,
        post_eps: float = 0.0,
        groups: int = 3,
    ) -> Any:
        function = onnx_coefficients.coefficients(groups, _is_double(streams))
        numbers = dict(eps=eps, pre_eps=pre_eps, post_scale=post_scale, post_eps=post_eps)
        made = self._call("coefficients", function, streams, phi, alpha, bias, **numbers)
        if groups == 3:
            return made
        pre, *rest = made if groups == 2 else (made,)
        none = _empty(pre)
        last: Any = standard.Constant(value_ints=[-1])
        return pre, *(rest or [none]), _empty(standard.Unsqueeze(none, last))

    def gates(
        self,
        streams: Any,
        phi: Any,
        alpha: Any,
        bias: Any,
        eps: float,
        logits: int,
        pre: bool = True,
        post: bool = True,
        bounded: bool = True,
    ) -> Any:
        dynamic, n = phi is not None and alpha is not None, streams.shape[-2]
        kind = "none" if not logits else "matrix" if logits == n * n else "list"
        function = onnx_coefficients.gates(pre, post, kind, bounded, dynamic, _is_double(streams))
        inputs = (streams, phi, alpha, bias) if dynamic else (streams, bias)
        made = self._call("gates", function, *inputs, eps=eps)
        return made if logits else (*made, _empty(made[0]))

    def sinkhorn(
        self,
        logits: Any,
        iterations: int,
        divisor_eps: float = 0.0,
        rows_first: bool = False,
        implicit: bool = False,  # of the gradient alone
    ) -> Any:
        first, second = (-1, -2) if rows_first else (-2, -1)
        function = functions.softmax_sinkhorn(_is_double(logits)) if divisor_eps else functions.sinkhorn()
        options = dict(iterations=iterations, first=first, second=second, divisor_eps=divisor_eps)
        return self._call("sinkhorn", function, logits, **options)

    def constrain(self, logits: Any, kind: str, n: int) -> Any:
        function, numbers = onnx_constraints.FUNCTIONS[kind](n)
        return self._call("constrain", function, logits, **numbers)

    def aggregate(self, streams: Any, pre: Any) -> Any:
        return self._call("aggregate", functions.aggregate(), streams, pre)

    def merge(
        self,
        streams: Any,
        f: Any,
        post: Any,
        res: Any,
        transposed: bool = False,
        rounded: bool = False,
    ) -> Any:
        function = functions.merge(res is not None, transposed, rounded)
        return self._call("merge", function, streams, f, post, *([] if res is None else [res]))


def _is_double(value: Any) -> bool:
    return bool(value.dtype == ir.DataType.DOUBLE)


def _empty(value: Any) -> Any:
    """What an op gives where there is no such coefficient: nothing of the last dimension. Nobody reads it."""
    zero: Any = standard.Constant(value_ints=[0])
    return standard.Slice(value, zero, zero, standard.Constant(value_ints=[-1]))


def _as_function(method: Callable[..., Any]) -> Callable[..., Any]:
    """torch's exporter writes an attribute to what it is given, which a bound method does not take."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


def _schema(function: Function) -> Any:
    """What the exporter has to know of a function to write a call of it: every input may be of any float type."""
    defs = onnx.defs.OpSchema
    types = [f"T_{name}" for name in function.inputs]
    return defs(
        function.name,
        DOMAIN,
        VERSION,
        inputs=[defs.FormalParameter(name, kind) for name, kind in zip(function.inputs, types, strict=True)],
        outputs=[defs.FormalParameter(name, types[0]) for name in function.outputs],
        type_constraints=[(kind, _FLOATS, "") for kind in types],
        attributes=[defs.Attribute(name, KINDS[kind][0]) for name, kind in function.attributes.items()],
    )


def _refuse_unknown(program: torch.export.ExportedProgram, table: _Table) -> None:
    """Raise ExportError for an mHC op, or a constraint, that this package writes into graphs and not into files."""
    known = table.translations()
    for node in program.graph.nodes:
        if _is_ours(node) and node.target not in known:
            raise _gap(f"the op {node.target}")
        if node.target is mhc.constrain.default:
            kind = node.kwargs.get("kind") or node.args[1]
            if kind not in onnx_constraints.FUNCTIONS:
                raise _gap(f"the constraint {kind!r}")


def _is_ours(node: torch.fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "mhc"


def _gap(what: str) -> ExportError:
    found = "one that export_onnx cannot write, which is a fault of mhc_compile and not of the model"
    legal = "what mhc_compile/codegen/onnx.py has a function for"
    step = "please report it; trace(model, inputs) and source(model, inputs) write the model without ONNX"
    return ExportError(wrong(what, found, legal, step))


def _untranslated(error: Exception) -> ExportError:
    """Which op stopped torch's exporter, and where the model's source has it."""
    node = _stopped_at(error)
    if node is None:
        reason = str(error).strip().splitlines()[0]
        return ExportError(f"torch.onnx.export does not translate the model: {reason}")
    if _is_ours(node):
        return _gap(f"the op {node.target}")
    op = str(node.meta.get("original_aten") or node.target)
    legal = "an op that torch.onnx.export(dynamo=True) translates"
    step = "write that line in other ops"
    if "grouped_mm" in op:  # how transformers computes a mixture of experts by default
        step = "call model.set_experts_implementation('batched_mm') before the conversion"
    message = wrong("an op of the model", f"{op}, which has no ONNX form", legal, step)
    return ExportError(message, source_line(node) or None)


def _stopped_at(error: BaseException) -> torch.fx.Node | None:
    """The node that the exporter was at: its messages have the name, which does not lead back to the model's source."""
    found = None
    frame = error.__traceback__
    while frame is not None:
        node = frame.tb_frame.f_locals.get("node")
        found = node if isinstance(node, torch.fx.Node) else found
        frame = frame.tb_next
    below = error.__cause__
    return found if found is not None or below is None else _stopped_at(below)


# ---------------------------------------------------------------------------------------------- names


def _name_calls(model: Any, ops: Mapping[str, str]) -> Counter[str]:
    """Name the calls of our functions after their sites, `model.layers.0.mlp/merge`, and count them."""
    calls: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        calls[node.op_type] += 1
        site = _site(node)
        name = f"{site or DOMAIN}/{ops[node.op_type]}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        if site:
            node.metadata_props[SITE] = site
    return calls


def _site(node: Any) -> str:
    source = node.meta.get("node")
    return str((source.meta.get("custom") or {}).get(SITE, "")) if isinstance(source, torch.fx.Node) else ""


def _name_sizes(model: Any) -> None:
    """Call sizes that may change after the input that has them: `batch`, and `input_ids_1` for its axis 1."""
    names: dict[str, str] = {}
    for place, value in enumerate(model.graph.inputs):
        for axis, size in enumerate(_shape(value)):
            if isinstance(size, str) and size.isidentifier() and size not in names:
                names[size] = "batch" if place == axis == 0 else f"{value.name}_{axis}"
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(names)})\b")
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            for axis, size in enumerate(_shape(value)):
                if isinstance(size, str) and size != "?":  # without a name it stays: equal names mean equal sizes
                    value.shape[axis] = ir.SymbolicDim(symbol.sub(lambda found: names[found[1]], size))


def _shape(value: Any) -> tuple[int | str, ...]:
    """Sizes by number or name; "?" for one that has neither."""
    return tuple(size if isinstance(size, int) else size.value or "?" for size in value.shape)
