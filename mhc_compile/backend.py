"""The torch.compile backends: the one behind a converted model, and `backend="mhc"`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mhc_compile import _torch
from mhc_compile.config import MHCConfig
from mhc_compile.errors import RewriteError
from mhc_compile.passes.capture import normalize
from mhc_compile.passes.emit import Emitter
from mhc_compile.passes.history import PassRecord, start_record
from mhc_compile.passes.op_kinds import aten
from mhc_compile.passes.rewrite import analyze, keep_sites, leave_plain, rewrite
from mhc_compile.passes.trunks import Site

_ANCHOR = torch.ops.mhc.anchor.default


@dataclass
class ConvertingBackend:
    """Rewrites the graph of a converted model's forward, then compiles it.

    sites: the names of the model's sites; parameters: the names (`site.phi`, ...) of what its anchor lists, in order;
    skips_no_grad: module and source line of the adds that the conversion refused in no-grad regions. Keeps the pass
    records of every compilation in `history`.
    """

    config: MHCConfig
    sites: list[str]
    parameters: list[str]
    skips_no_grad: frozenset[tuple[str, str]] = frozenset()
    history: list[PassRecord] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Dynamo's backend interface."""
        start = time.perf_counter()
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        graph = normalize(gm, [node.meta["example_value"] for node in placeholders])
        self.history.append(start_record(graph, time.perf_counter() - start))
        self.history.extend(self.rewrite(graph))
        compiled: Callable[..., Any] = _torch.lookup_backend(self.config.backend)(graph, example_inputs)
        return compiled

    def rewrite(self, graph: fx.GraphModule) -> list[PassRecord]:
        """Widen the trunks of a normalised graph, in place, with the parameters its anchor lists."""
        anchor = next(iter(graph.graph.find_nodes(op="call_function", target=_ANCHOR)), None)
        if anchor is None:
            raise RewriteError(
                "a part of a converted model reached the backend without its mHC parameters: something split its "
                "graph (DDP's bucket splitter does; set torch._dynamo.config.optimize_ddp = False)"
            )
        held = list(anchor.args[0])
        _drop_anchor(graph, anchor)
        if self.config.n == 1:
            return []  # the plain add, bit for bit: not even its spelling changes
        analysis = analyze(graph, tie_shared=self.config.tie_shared)
        extra = {site.name for site in analysis.sites if (site.module, site.line) in self.skips_no_grad} - set(
            self.sites
        )
        if extra and not torch.is_grad_enabled():
            # with gradients off everywhere a no-grad region leaves no trace in the graph
            analysis = leave_plain(analysis, extra, tie_shared=self.config.tie_shared)
        keep_sites(analysis, self.sites)
        nodes = dict(zip(self.parameters, held, strict=True))

        def parameters_of(site: Site) -> tuple[fx.Node, fx.Node, fx.Node]:
            return nodes[f"{site.name}.phi"], nodes[f"{site.name}.alpha"], nodes[f"{site.name}.bias"]

        return [*analysis.records, *rewrite(analysis, self.config, parameters_of)]


def _drop_anchor(graph: fx.GraphModule, anchor: fx.Node) -> None:
    """Put an empty tensor in the anchor's place."""
    value = anchor.meta["val"]
    with graph.graph.inserting_before(anchor):
        token = Emitter(graph.graph).call(aten.zeros.default, [0], dtype=value.dtype, device=value.device, like=anchor)
    anchor.replace_all_uses_with(token)
    graph.graph.erase_node(anchor)
    graph.recompile()


def mhc(gm: fx.GraphModule, example_inputs: list[Any], *, options: Any = None, mode: str | None = None) -> Any:
    """`torch.compile(model, backend="mhc")`: for models that are mHC already. Converts nothing.

    Compiles with inductor (`mode` and `options` are handed to it). Warns when the graph holds no mHC.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    examples = [node.meta["example_value"] for node in placeholders]
    if examples and any(isinstance(example, torch.Tensor) for example in examples):
        analysis = analyze(normalize(gm, examples))
        where = analysis.foreign
        if where is None:
            warnings.warn(
                'backend="mhc" found 0 mHC sites in this graph and leaves it to inductor; to convert a model, '
                "call mhc_compile(model)",
                stacklevel=2,
            )
        else:
            warnings.warn(
                f'backend="mhc" recognises the mHC at {where} but has no fused form for it yet; inductor compiles it',
                stacklevel=2,
            )
    chosen = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}
    return torch._inductor.compile(gm, example_inputs, options=chosen)
