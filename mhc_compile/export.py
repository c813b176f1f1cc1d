"""`export_onnx`: a model with mHC as an ONNX file, to look at and to run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from mhc_compile import _torch
from mhc_compile.codegen.program import as_program
from mhc_compile.conversion import PENDING, conversion, is_converted
from mhc_compile.errors import ConfigError, ExportError, wrong
from mhc_compile.example_inputs import as_call, derive
from mhc_compile.parts import inside
from mhc_compile.passes.capture import captured_from, exported
from mhc_compile.passes.history import run_passes
from mhc_compile.passes.match import match_passes
from mhc_compile.passes.match_report import Matches
from mhc_compile.sharding import refuse_sharded
from mhc_compile.trace import rewrite_captured, without_mhc

EXTRA = "mhc-compile[onnx]"


@dataclass(frozen=True)
class ONNXFile:
    """What `export_onnx` wrote.

    sites: the names of the sites, in the order of the graph. calls: how often each function of the domain `mhc` is
    called. inputs, outputs: name -> shape, in which a name stands for a size that may change. data: the file that holds
    the weights, None if `path` does. notes: what the reader should know of the file.
    """

    path: Path
    opset: int
    sites: tuple[str, ...]
    calls: dict[str, int]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    data: Path | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        calls = ", ".join(f"{count} {name}" for name, count in self.calls.items()) or "no calls: n = 1 is the plain add"
        lines = [f"{self.path}: {len(self.sites)} sites, opset {self.opset}", f"mhc: {calls}"]
        for what, shapes in (("inputs", self.inputs), ("outputs", self.outputs)):
            named = (f"{name} [{', '.join(map(str, shape))}]" for name, shape in shapes.items())
            lines.append(f"{what}: {', '.join(named)}")
        lines += [f"weights: {self.data}"] if self.data else []
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts and lists, for JSON."""
        paths = {"path": str(self.path), "data": None if self.data is None else str(self.data)}
        return {**asdict(self), **paths, "sites": list(self.sites), "notes": list(self.notes)}


def export_onnx(
    model: nn.Module,
    inputs: Any = None,
    path: str | os.PathLike[str] = "model.onnx",
    dynamic: Any = True,
    *,
    external_data: bool = False,
) -> ONNXFile:
    """Write a model with mHC to an ONNX file (opset 20), through `torch.onnx.export(dynamo=True)`.

    Each term of a site (arXiv 2512.24880, eq. 7 to 19) is one call of a function in the domain `mhc`, named after the
    site; the functions are in the file, in standard ops, so that any runtime runs it. The file computes what the model
    computes in eval mode.

    model: converted by `mhc_compile`, or mHC by itself (DeepSeek-V4, ...). It is left as it was.
    inputs: as for `mhc_compile`; derived for Hugging Face models.
    path: of the file. Its folder must exist; a file that is there is replaced.
    dynamic: True lets every size of the inputs change that the model itself lets change (batch and sequence, as a
        rule), if it is 2 or more in `inputs`; False fixes all sizes; or dynamic_shapes as for `torch.export.export`.
    external_data: write the weights to a file of their own, `path` + ".data". More than 1.5 GB always go there, as a
        file holds 2 GB at most.

    Raises ExportError for a model without mHC, for an op that torch's exporter does not know (with its source line),
    and without the packages of the extra `onnx`; CaptureError when torch.export refuses the model.
    """
    writer = _writer()
    target = _checked(Path(path))
    _check_arguments(model, dynamic)
    refuse_sharded(model)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor,
        lambda one: one.detach().clone(),
        as_call(derive(model, cached=False) if inputs is None else inputs),
    )  # views would have the program ask for their bases
    notes = [_TRAINING] if model.training else []
    with _evaluating(model):
        source = _source(model, args, kwargs, dynamic)
        program, found = _program(model, source, args, kwargs)
    notes += found
    sites = tuple(dict.fromkeys(_sites(program)))
    names = _input_names(source), _output_names(source)
    written = writer.write(program, target, names, external_data)
    facts = (written.calls, written.inputs, written.outputs, written.data)
    return ONNXFile(target, writer.OPSET, sites, *facts, tuple(notes))


_TRAINING = "the model is in training mode; the file holds what it computes in eval mode"


# ---------------------------------------------------------------------------------------------- checks


def _writer() -> Any:
    try:
        from mhc_compile.codegen import onnx
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith(("onnx", "ml_dtypes")):
            raise
        step = f"pip install '{EXTRA}'"
        raise ExportError(wrong("the package " + error.name, "not installed", "the extra onnx", step)) from error
    return onnx


def _checked(path: Path) -> Path:
    if path.is_dir() or not path.parent.is_dir():
        found = f"{path}, which is a folder" if path.is_dir() else f"{path}, in a folder that does not exist"
        raise ConfigError(wrong("path", found, "a file in a folder that exists", "create the folder, or name a file"))
    return path


def _check_arguments(model: object, dynamic: object) -> None:
    if not isinstance(dynamic, bool | Mapping | tuple | list | ShapesCollection):
        legal = "True, False, or dynamic_shapes as for torch.export.export"
        raise ConfigError(wrong("dynamic", repr(dynamic), legal, "True frees all that the model leaves free"))
    if not isinstance(model, nn.Module):
        raise ConfigError(wrong("model", f"a {type(model).__name__}", "an nn.Module", "pass the converted model"))
    if PENDING in model.__dict__:
        conversion(model)  # says that it waits for its first call


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of the model in eval mode; afterwards as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---------------------------------------------------------------------------------------------- the program


def _source(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Any) -> ExportedProgram:
    """The plain model as torch.export sees it."""
    plain = without_mhc(model) if is_converted(model) else model
    shapes = dynamic
    if isinstance(dynamic, bool):
        shapes = _every_size(plain, args, kwargs) if dynamic else None
    program: ExportedProgram = inside(exported)(plain, args, kwargs, shapes)
    return program


def _every_size(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """dynamic_shapes that leave every size to torch.export, which fixes those that the model fixes."""
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            shapes[leaf] = dict.fromkeys(range(leaf.dim()), Dim.AUTO)
    return shapes.dynamic_shapes(model, args, dict(kwargs))


def _program(
    model: nn.Module, source: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[ExportedProgram, list[str]]:
    """The program with its mHC as ops of level 1, and notes on it."""
    captured = captured_from(source, args, kwargs)
    if is_converted(model):
        result = rewrite_captured(model, captured)
        return as_program(result.graph, result.arguments, source), []
    found: list[Matches] = []
    run_passes(captured.graph, match_passes(found))
    (matches,) = found
    if not matches.ops:
        nearest = f" (nearest: {matches.refused[0]})" if matches.refused else ""
        step = "call mhc_compile(model) first; torch.onnx.export writes plain models"
        name = type(model).__name__
        raise ExportError(wrong(name, f"a model without mHC{nearest}", "a converted model, or one that is mHC", step))
    return as_program(captured.graph, captured.arguments, source), list(matches.notes)


def _sites(program: ExportedProgram) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.target is torch.ops.mhc.merge.default and "mhc_site" in node.meta:
            yield node.meta["mhc_site"]


def _input_names(program: ExportedProgram) -> list[str]:
    """The names of the tensors that the model is called with."""
    arguments = [one.arg for one in program.graph_signature.input_specs if one.kind is InputKind.USER_INPUT]
    return [arg.name for arg in arguments if isinstance(arg, TensorArgument)]


def _output_names(program: ExportedProgram) -> list[str]:
    """A name for each tensor that the model returns, from where it stands in the output: `logits`."""
    spec = program.call_spec.out_spec
    assert spec is not None
    places = _torch.leaves_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    names = [re.sub(r"\W+", "_", pytree.keystr(path)).strip("_") or "output" for path, _ in places]
    names = [f"output_{name}" if name.isdigit() else name for name in names]
    arguments = [one.arg for one in program.graph_signature.output_specs if one.kind is OutputKind.USER_OUTPUT]
    return [name for name, arg in zip(names, arguments, strict=True) if isinstance(arg, TensorArgument)]
