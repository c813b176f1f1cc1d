"""The torch.compile backends: the one behind a converted model, and `backend="mhc"`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any
from weakref import WeakSet

import torch
from torch import fx

from mhc_compile import _torch
from mhc_compile.errors import RewriteError
from mhc_compile.kernels.devices import fingerprint
from mhc_compile.passes.bind import named_parameters
from mhc_compile.passes.capture import normalize
from mhc_compile.passes.cpu_calls import CpuCalls
from mhc_compile.passes.eager_replay import replaying
from mhc_compile.passes.emit import Emitter
from mhc_compile.passes.fuse import fuse
from mhc_compile.passes.history import Pass, PassRecord, run_passes, start_record
from mhc_compile.passes.lower import lower
from mhc_compile.passes.match import match_passes
from mhc_compile.passes.match_report import Matches
from mhc_compile.passes.op_kinds import aten, draws
from mhc_compile.passes.prioritize import prioritize
from mhc_compile.passes.provenance import module_path
from mhc_compile.passes.recompute import Blocks, tag
from mhc_compile.passes.recompute import fingerprint as blocks_fingerprint
from mhc_compile.passes.recompute_choice import Recompute
from mhc_compile.passes.rewrite import Analysis, analyze, keep_sites, leave_plain, rename, rewrite
from mhc_compile.record import Record

ANCHOR = torch.ops.mhc.anchor.default


def level_2(backend: str, *, replays: bool = False, high_priority: Set[str] = frozenset()) -> list[Pass]:
    """The passes to fused ops, of what is compiled; graphs that are looked at or exported stay on level 1.

    replays: what replays without a compiler does so op by op: a merge, or an aggregate, is not made again for the sake
    of a read. high_priority: the sites whose merges are launched so.
    """
    compiled = backend == "inductor"  # who has asked for its compilations has its first calls take seconds anyway
    first = [Pass("prioritize", True, partial(prioritize, sites=high_priority))] if high_priority else []
    last = [] if replays else [Pass("fuse", False, fuse)]
    return [*first, Pass("lower", False, partial(lower, compiled=compiled, early=not replays)), *last]


@dataclass
class ConvertingBackend:
    """Rewrites the graph of a converted model's forward, then compiles it.

    record: of the conversion; parameters: the names (`site.phi`, ...) of what its anchor lists, in order. Keeps the
    pass records of every compilation in `history`. level: of the ops that are compiled, 1 or 2 (where they fit).
    recompute: which sites the backward replays; None stores all. high_priority: the sites whose merges are launched so.
    """

    record: Record
    parameters: list[str]
    history: list[PassRecord] = field(default_factory=list)
    level: int = 2
    recompute: Recompute | None = None
    high_priority: Set[str] = frozenset()

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Dynamo's backend interface."""
        graph, config = normalized(gm, self.history), self.record.config
        self.history.extend(self.rewrite(graph))
        if config.n == 1:
            return compiled_by(config.backend, graph, example_inputs)
        options = self.recompute, self.level, self.high_priority
        return compile_rewritten(graph, example_inputs, config.backend, self.history, *options)

    def rewrite(self, graph: fx.GraphModule) -> list[PassRecord]:
        """Widen the trunks of a normalised graph, in place, with the parameters its anchor lists; level-1 ops."""
        anchor = next(iter(graph.graph.find_nodes(op="call_function", target=ANCHOR)), None)
        if anchor is None:
            raise RewriteError(
                "a part of a converted model reached the backend without its mHC parameters: something split its "
                "graph (DDP's bucket splitter does; set torch._dynamo.config.optimize_ddp = False)"
            )
        held = list(anchor.args[0])
        if len(held) != len(self.parameters):
            raise RewriteError(
                f"model.mhc holds {len(held)} parameters, and its conversion made {len(self.parameters)}: something "
                "wrapped or replaced sites (PEFT's modules_to_save does, by a module's name); leave them as they are"
            )
        _drop_anchor(graph, anchor)
        if self.record.config.n == 1:
            return []  # the plain add, bit for bit: not even its spelling changes
        analysis = recorded_analysis(graph, self.record)
        look_up = named_parameters(dict(zip(self.parameters, held, strict=True)), self.record.config)
        return [*analysis.records, *rewrite(analysis, self.record.config, look_up)]


def compile_rewritten(
    graph: fx.GraphModule,
    example_inputs: list[Any],
    backend: str,
    history: list[PassRecord],
    recompute: Recompute | None,
    level: int = 2,
    high_priority: Set[str] = frozenset(),
) -> Callable[..., Any]:
    """Compile a graph of level-1 ops, which are first tagged for recomputation and brought to `level`."""
    blocks: Blocks = ()
    if recompute is not None and torch.is_grad_enabled():
        blocks = recompute.blocks(graph, example_inputs, compiled=backend != "eager")
        history += run_passes(graph, [Pass("recompute", True, partial(tag, blocks=blocks))])
    replays = bool(blocks) and backend == "eager"
    if level == 2 or replays:
        history += run_passes(graph, level_2(backend, replays=replays, high_priority=high_priority))
    if replays:
        return replaying(graph)
    return compiled_by(backend, graph, example_inputs, blocks, inductor_settings())


def compiled_by(
    backend: str,
    graph: fx.GraphModule,
    example_inputs: list[Any],
    blocks: Blocks = (),
    inductor: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The graph compiled by a backend of torch's; blocks: those that it is tagged for."""
    if not blocks:
        warn_of_budget(graph, backend)
    told_apart = fingerprint() + blocks_fingerprint(blocks)  # the caches' keys do not see tags
    return _torch.compile_graph(backend, graph, example_inputs, told_apart, inductor=inductor, tagged=bool(blocks))


def warn_of_budget(graph: fx.GraphModule, backend: str) -> None:
    """Warn where torch's partitioner would draw random numbers a second time, and the gradients be of another mask."""
    budget = _torch.memory_budget()
    if backend == "eager" or budget >= 1 or not torch.is_grad_enabled() or not any(map(draws, graph.graph.nodes)):
        return
    warnings.warn(
        f"torch._functorch.config.activation_memory_budget is {budget} and the model draws random numbers (dropout): "
        "torch's partitioner may draw them again in the backward, and gradients are then those of other masks; legal: "
        "a budget of 1, or recompute= of a converted model, under which all random ops are saved. Next: set the "
        "budget to 1, or call mhc_compile.recompute(model, 'auto')",
        stacklevel=2,
    )


def inductor_settings() -> dict[str, Any]:
    """What inductor is to do with the fused ops of a graph; nothing where a pass of the user has that place."""
    place = "post_grad_custom_post_pass"
    return {} if getattr(_torch.inductor_config, place) is not None else {place: CpuCalls()}


def normalized(gm: fx.GraphModule, history: list[PassRecord]) -> fx.GraphModule:
    """A graph from Dynamo in the language of the passes; `history` gets its record."""
    start = time.perf_counter()
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    graph = normalize(gm, [node.meta["example_value"] for node in placeholders])
    history.append(start_record(graph, time.perf_counter() - start))
    return graph


def recorded_analysis(graph: fx.GraphModule, record: Record) -> Analysis:
    """The sites of a normalised graph, checked to be those of a recorded conversion.

    Raises RewriteError when the graph has other residual adds.
    """
    tied = record.config.tie_shared
    analysis = analyze(graph, tie_shared=tied)
    known = {site.name: (site.features, site.applications) for site in record.sites}
    if not torch.is_grad_enabled():
        # with gradients off everywhere a no-grad region leaves no trace in the graph
        frozen = {site.name for site in analysis.sites if (site.module, site.line) in record.no_grad}
        both = sorted(frozen & (known.keys() | record.plain))
        if both:
            raise RewriteError(
                f"{both[0]} runs in a no-grad region and outside of it; with gradients off the two cannot be told "
                "apart: call the model with gradients enabled"
            )
        if frozen:
            analysis = rename(leave_plain(analysis, frozen), tie_shared=tied)
    chosen = leave_plain(analysis, record.plain) if record.plain else analysis
    absent = trunks_not_run(record, chosen)
    keep_sites(chosen, {name: shape for name, shape in known.items() if name not in absent})
    own = {site.name: site.constraint for site in record.sites}
    for site in chosen.sites:
        site.constraint = own[site.name]
    return chosen


def trunks_not_run(record: Record, analysis: Analysis) -> set[str]:
    """The sites of trunks that a graph leaves out as a whole: nothing runs in the module that holds one.

    An encoder's output, or an image's features, may be given in the place of what they are computed from.
    """
    ran = {module_path(node) for node in analysis.graph.graph.nodes}
    absent: set[str] = set()
    for number in {site.trunk for site in record.sites}:
        names = [site.name for site in record.sites if site.trunk == number]
        home = _home(names)
        if home and not any(path == home or path.startswith(f"{home}.") for path in ran):
            absent.update(names)
    return absent


def _home(names: list[str]) -> str:
    """The innermost module that holds all of these sites; '' for the model itself."""
    paths = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda steps: len(set(steps)) == 1, zip(*paths, strict=False))
    return ".".join(steps[0] for steps in shared)


def _drop_anchor(graph: fx.GraphModule, anchor: fx.Node) -> None:
    """Put an empty tensor in the anchor's place."""
    value = anchor.meta["val"]
    with graph.graph.inserting_before(anchor):
        token = Emitter(graph.graph).call(aten.zeros.default, [0], dtype=value.dtype, device=value.device, like=anchor)
    anchor.replace_all_uses_with(token)
    graph.graph.erase_node(anchor)
    graph.recompile()


_with_mhc: WeakSet[Any] = WeakSet()  # models and functions that gave a graph with mHC


def mhc(gm: fx.GraphModule, example_inputs: list[Any], *, options: Any = None, mode: str | None = None) -> Any:
    """`torch.compile(model, backend="mhc")`: for models that are mHC already. Converts nothing.

    Compiles with inductor (`mode` and `options` are handed to it). Warns when a model holds no mHC: once, with its last
    graph, where graph breaks cut it into many.
    """
    chosen = {**inductor_settings(), **(_torch.inductor_modes(mode) if mode else {}), **(options or {})}
    graph = _matched(gm)
    with _torch.caches_of(fingerprint()):
        return _torch.inductor_compile(graph, example_inputs, options=chosen)


def _matched(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph from Dynamo with the mHC that it holds on fused ops; the graph itself when it holds none."""
    examples = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    if not any(isinstance(example, torch.Tensor) for example in examples):
        return gm
    graph, found = normalize(gm, examples), list[Matches]()
    warn_of_budget(graph, "inductor")
    run_passes(graph, [*match_passes(found), *level_2("inductor")])
    (matches,) = found
    place = _torch.fragment(gm)
    if matches.ops:
        if place.root is not None:
            _with_mhc.add(place.root)
        graph.recompile()
        return graph
    if not place.ends or place.root in _with_mhc:
        return gm  # a part of a call: others may hold some, or did
    nearest = f"; nearest: {matches.refused[0]}" if matches.refused else ""
    warnings.warn(
        f'backend="mhc" found 0 mHC sites in this graph and leaves it to inductor{nearest}; legal: the graph of a '
        "model that is mHC already. Next: to convert a model, call mhc_compile(model)",
        stacklevel=2,
    )
    return gm
