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

from mhc_compile import _torch
from mhc_compile.passes.capture import graph_input

SITE = "mhc_site"  # in meta["custom"], which torch carries through its own passes


def as_program(graph: fx.GraphModule, arguments: Sequence[Any], source: ExportedProgram) -> ExportedProgram:
    """A rewritten graph as an exported program for inference; the graph becomes part of it.

    arguments: one for each input of the graph. source: the program whose graph was captured and rewritten. Parameters
    that the rewrite added become parameters of the program. Regions of grad mode are dropped: one that ends would
    switch gradients on.
    """
    for node in list(graph.graph.nodes):
        if node.target is _torch.set_grad_enabled:
            graph.graph.erase_node(node)
        elif "mhc_site" in node.meta:
            node.meta["custom"] = {**node.meta.get("custom", {}), SITE: node.meta["mhc_site"]}
    state, inputs = _inputs(graph.graph, arguments, source.graph_signature)
    signature = ExportGraphSignature(inputs, _outputs(graph.graph, source.graph_signature))
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


def _inputs(
    graph: fx.Graph, arguments: Sequence[Any], signature: ExportGraphSignature
) -> tuple[dict[str, torch.Tensor], list[InputSpec]]:
    """The parameters that the rewrite added, and the signature's inputs with them in front, as programs want it.

    The graph has the inputs of the program that it was captured from, though not always by their names (fx calls an
    `input` otherwise), and behind them those that were added.
    """
    placeholders = list(graph.find_nodes(op="placeholder"))
    for node, value in zip(placeholders, arguments, strict=True):
        node.meta.setdefault("val", None if isinstance(value, torch.Tensor) else value)  # captures leave out constants
    first, known = placeholders[0], len(signature.input_specs)
    kept = [
        replace(spec, arg=replace(spec.arg, name=node.name))
        for spec, node in zip(signature.input_specs, placeholders[:known], strict=True)
    ]
    state, added = {}, []
    for node, value in zip(placeholders[known:], arguments[known:], strict=True):
        record = graph_input(node)
        assert record is not None
        state[record.path] = value
        added.append(InputSpec(InputKind.PARAMETER, TensorArgument(node.name), record.path))
        first.prepend(node)
    return state, [*added, *kept]


def _outputs(graph: fx.Graph, signature: ExportGraphSignature) -> list[OutputSpec]:
    """The signature's outputs by the names that the graph has for them now."""
    (output,) = graph.find_nodes(op="output")
    return [
        spec
        if isinstance(spec.arg, ConstantArgument) or not isinstance(value, fx.Node)
        else OutputSpec(spec.kind, replace(spec.arg, name=value.name), spec.target)
        for spec, value in zip(signature.output_specs, output.args[0], strict=True)
    ]
