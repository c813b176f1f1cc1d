"""The rewritten model as one Python file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile.codegen.source import TracedCall, Written, state_of, write
from mhc_compile.codegen.source_check import module_of, same_graph
from mhc_compile.conversion import conversion
from mhc_compile.errors import ConfigError, ExportError, wrong
from mhc_compile.trace import Exported, exported, warn_of_backwards


@dataclass(frozen=True)
class Source:
    """A rewritten model as Python: `str()` is the file, `save` writes it.

    name: of the class in it; code: the text; constants: tensors that are in no state_dict and too large for the text,
    which `save` writes beside it.
    """

    name: str
    code: str
    constants: Mapping[str, Tensor]

    def __str__(self) -> str:
        return self.code

    def save(self, path: str | Path) -> None:
        """Write `path` (`.py`), and `.constants.pt` beside it when there are constants. ConfigError for a suffix."""
        file = Path(path)
        if file.suffix != ".py":
            legal = "a path that ends in .py"
            raise ConfigError(wrong("the path of the source", repr(str(path)), legal, "save('rewritten.py')"))
        file.write_text(self.code, encoding="utf-8")
        if self.constants:
            torch.save(dict(self.constants), file.with_suffix(".constants.pt"))


def source(model: nn.Module, inputs: Any = None, *, dynamic_shapes: Any = None) -> Source:
    """The rewritten forward of a converted model as an nn.Module in one file that needs torch and mhc_compile.

    The class takes the state_dict of the converted model, and its forward gives bit for bit what `trace(model, inputs)`
    gives, with classes of outputs as dicts. Sites stand in it as the ops of the paper's terms. It holds what the trace
    holds: the shapes of `inputs` but for `dynamic_shapes` (as of `torch.export.export`), the values of inputs that are
    no tensors, dtypes, and the mode (train or eval) that the model is in.

    The text is traced again before it is given, and has the ops of the graph that it stands for. Raises ExportError for
    an op that has no form in Python, and otherwise as `trace` does.
    """
    state = conversion(model)
    _refuse_wrapped(model)
    found = exported(model, inputs, dynamic_shapes)
    warn_of_backwards(model, found)
    config = state.record.config
    call = TracedCall(
        state.original.__name__,
        found.rewritten.graph,
        found.rewritten.arguments,
        found.names,
        found.args,
        found.kwargs,
        found.output,
        state.record.function,
    )
    sites = len(found.rewritten.analysis.sites)
    header = f"{call.name} with n = {config.n} streams at {sites} residual sites, written by mhc_compile."
    for clean in (True, False):
        written = write(model, call, header, clean=clean)
        try:
            same = _calls_the_same(written, found, call)
        except Exception:  # whatever a wrong spelling does
            same = False
        if same:
            return Source(written.name, written.code, written.constants)
    legal = "one that is traced to the same ops"
    raise ExportError(wrong(f"the Python of {call.name}", "not that of its graph", legal, "please report it"))


def _refuse_wrapped(model: nn.Module) -> None:
    """Raise ExportError for weights of a tensor class of their own: the file's module holds plain ones."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if _torch.is_wrapper(value):
            step = "write the source before they are quantised; trace(model, inputs) keeps them as they are"
            raise ExportError(wrong(f"{name} of this model", f"a {type(value).__name__}", "a plain tensor", step))


def _calls_the_same(written: Written, found: Exported, call: TracedCall) -> bool:
    graph = found.rewritten.graph
    places = state_of(call)
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    with torch.device("meta"):
        module = module_of(written.code, written.constants, written.name)()
    by_name = {**dict(zip(found.names, found.args, strict=False)), **found.kwargs}
    spec = pytree.tree_structure(by_name)

    def run(*flat: Any) -> list[Any]:
        held = {places[node][0]: value for node, value in zip(placeholders, flat, strict=True) if node in places}
        given = [value for node, value in zip(placeholders, flat, strict=True) if node not in places]
        output = torch.func.functional_call(module, held, (), pytree.tree_unflatten(given, spec), tie_weights=False)
        return pytree.tree_leaves(output)

    return same_graph(graph, call.arguments, run)
