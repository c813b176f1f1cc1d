"""A graph that the passes rewrote, as the exported program that it was captured from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)

from mhc_compile.passes.capture import graph_input

SITE = "mhc_site"  # in meta["custom"], which torch carries through its own passes


def as_program(graph: fx.GraphModule, arguments: Sequence[Any], source: ExportedProgram) -> ExportedProgram:
    """A rewritten graph as an exported program for inference; the graph becomes part of it.

    arguments: one for each input of the graph. source: the program whose graph was captured and rewritten. Parameters
    that the rewrite added become parameters of the program. Regions of grad mode are dropped: one that ends would
    switch gradients on.
    """
    for node in list(graph.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            graph.graph.erase_node(node)
        elif "mhc_site" in node.meta:
            node.meta["custom"] = {**node.meta.get("custom", {}), SITE: node.meta["mhc_site"]}
    state, added = _added(graph.graph, arguments, source)
    signature = ExportGraphSignature(
        [*added, *source.graph_signature.input_specs], _outputs(graph.graph, source.graph_signature)
    )
    return ExportedProgram(
        root=graph,
        graph=graph.graph,
        graph_signature=signature,
        state_dict={**source.state_dict, **state},
        range_constraints=source.range_constraints,
        module_call_graph=source.module_call_graph,
        example_inputs=source.example_inputs,
        constants=source.constants,
        verifiers=source.verifiers,
    )


def _added(
    graph: fx.Graph, arguments: Sequence[Any], source: ExportedProgram
) -> tuple[dict[str, torch.Tensor], list[InputSpec]]:
    """The parameters that the source does not have, now first of the graph's inputs as programs want it."""
    known = {spec.arg.name for spec in source.graph_signature.input_specs}
    placeholders = graph.find_nodes(op="placeholder")
    first = next(iter(graph.nodes))
    state, specs = {}, []
    for node, value in zip(list(placeholders), arguments, strict=True):
        node.meta.setdefault("val", None if isinstance(value, torch.Tensor) else value)  # captures leave out constants
        record = graph_input(node)
        if node.name not in known and record is not None:
            state[record.path] = value
            specs.append(InputSpec(InputKind.PARAMETER, TensorArgument(node.name), record.path))
            first.prepend(node)
    return state, specs


def _outputs(graph: fx.Graph, signature: ExportGraphSignature) -> list[OutputSpec]:
    """The signature's outputs by the names that the graph has for them now."""
    (output,) = graph.find_nodes(op="output")
    return [
        spec
        if isinstance(spec.arg, ConstantArgument) or not isinstance(value, fx.Node)
        else OutputSpec(spec.kind, replace(spec.arg, name=value.name), spec.target)
        for spec, value in zip(signature.output_specs, output.args[0], strict=True)
    ]
