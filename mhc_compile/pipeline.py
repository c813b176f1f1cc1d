"""The stages of a plan as modules, and as stages of `torch.distributed.pipelining`."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from mhc_compile.backend import compiled_by, level_2
from mhc_compile.codegen.stage_graphs import split
from mhc_compile.codegen.stage_module import Call, StageModule, leaves, state_names
from mhc_compile.conversion import Conversion, conversion
from mhc_compile.convert import check_has_streams
from mhc_compile.errors import ConfigError, PartitionError, wrong
from mhc_compile.example_inputs import as_call, derive
from mhc_compile.partition import Plan
from mhc_compile.passes import recompute
from mhc_compile.passes.dry_run import dry_run
from mhc_compile.passes.eager_replay import replaying
from mhc_compile.passes.history import run_passes
from mhc_compile.passes.provenance import source_line
from mhc_compile.passes.schedules import Schedule
from mhc_compile.passes.stages import Cut, Layout
from mhc_compile.sharding import is_distributed
from mhc_compile.site_choice import Choice, chosen
from mhc_compile.trace import TracedModel, as_module, exported

if TYPE_CHECKING:
    import torch.distributed as dist

    from mhc_compile.codegen.pipeline import Stage

_RETRY = "make the plan again with partition(model, inputs, stages=...)"
TIED = ("refuse", "reduce")


def pipeline_stages(
    plan: Plan,
    model: nn.Module,
    inputs: Any = None,
    *,
    schedule: str | None = None,
    device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
    tied: str = "refuse",
    backend: str | None = None,
    split_backward: bool = True,
    high_priority_merges: Choice | None = None,
) -> list[Stage]:
    """The stages of a plan that this process runs, for torch's schedules (`pipeline_schedule` builds one).

    model: the converted model, whole and the same in every process; the stages share its parameters. inputs: of one
        microbatch, as for `partition`.
    schedule: `gpipe`, `1f1b`, `interleaved`, `zero-bubble`, `zbv` or `dualpipev`; by default the plan's. It decides
        which stages a process runs.
    device: where the stages of this process go; by default where the model is. group: the processes of the pipeline.
    tied: `refuse` raises when several stages read one trainable weight; `reduce` gives each of them the weight, and
        sums its gradients at the end of a step, so that the copies stay equal.
    backend: compiles the stages; by default the model's. All of them replay the recompute blocks of the plan.
    split_backward: `zero-bubble`, `zbv` and `dualpipev` compute input gradients first and weight gradients later, which
        compiled stages cannot do, nor stages in which a weight takes effect at several places; False has them run the
        whole backward at once, in the order of the schedule.
    high_priority_merges: the sites whose merges run on a CUDA stream of high priority, so that they do not queue behind
        communication: see the function of that name. By default those that were chosen for the model.

    Raises PartitionError for a plan of another model, for tied weights, for processes and stages that do not go
    together, and without a process group; ConfigError for an illegal argument.
    """
    from mhc_compile.codegen.pipeline import Stage, TiedWeights

    if not is_distributed():
        step = "start the script with torchrun and call torch.distributed.init_process_group()"
        raise PartitionError(wrong("the process group", "missing", "an initialised torch.distributed", step))
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    order = Schedule.of(schedule or plan.schedule, len(plan.stages), size, plan.microbatches)
    cut = _cut(plan, model, inputs, device=device, tied=tied, backend=backend)
    if high_priority_merges is not None:
        check_has_streams(cut.device)
        cut.high_priority = chosen("high_priority_merges", high_priority_merges, conversion(model).record.sites)
    local = [stage for stage in range(order.stages) if order.device(stage) == rank]
    held = {path: value for path, (value, readers) in cut.tied.items() if not set(readers).isdisjoint(local)}
    holders = {path: sorted({order.device(stage) for stage in cut.tied[path][1]}) for path in held}
    weights = TiedWeights(held, holders, frozenset(local), group)
    whole = _why_whole(cut) if split_backward else None
    return [
        Stage(cut.module(stage), stage, order, cut.device, weights, split=split_backward, whole=whole)
        for stage in local
    ]


def _why_whole(cut: _Stages) -> str | None:
    """Why some stage, of any process, needs whole backwards; None if all can do without."""
    if cut.backend != "eager":
        return f"stages compiled by {cut.backend!r}"
    found = ((stage, graph.whole) for stage, graph in enumerate(cut.graphs) if stage and graph.whole)
    return next((f"stage {stage}, where {why}" for stage, why in found), None)


def pipeline_schedule(
    stages: Sequence[Stage],
    loss: Callable[..., Tensor] | None = None,
    *,
    microbatches: int | None = None,
    **options: Any,
) -> Any:
    """torch's schedule over the stages of this process, of the kind that `pipeline_stages` was given.

    loss: of the last stage's output and the target; without it the schedule runs forwards only. microbatches: of a
    step; by default the plan's. options: as torch's class takes them (`scale_grads`, ...). Raises PartitionError for
    what torch would refuse and where it would lose gradients, ConfigError for microbatches that the schedule does not
    take.
    """
    from mhc_compile.codegen.pipeline import build_schedule

    return build_schedule(stages, loss, microbatches, **options)


def stage_modules(
    plan: Plan,
    model: nn.Module,
    inputs: Any = None,
    *,
    device: torch.device | str | None = None,
    tied: str = "refuse",
    backend: str | None = None,
) -> list[StageModule]:
    """All stages of a plan as modules, to be called one after the other. Arguments as for `pipeline_stages`."""
    cut = _cut(plan, model, inputs, device=device, tied=tied, backend=backend)
    return [cut.module(stage) for stage in range(len(plan.stages))]


# ---------------------------------------------------------------------------------------------- cutting


@dataclass(frozen=True)
class _Whole:
    """The rewritten graph of a model, the tensors behind its inputs, and how the model is called."""

    graph: fx.GraphModule
    state: Mapping[fx.Node, Tensor]
    call: Call


def _cut(
    plan: Plan, model: nn.Module, inputs: Any, *, device: torch.device | str | None, tied: str, backend: str | None
) -> _Stages:
    known = conversion(model)
    backend = known.record.config.backend if backend is None else backend
    if backend not in ("eager", "aot_eager", "inductor"):
        legal = "'eager', 'aot_eager' or 'inductor'"
        raise ConfigError(wrong("backend", repr(backend), legal, "leave it out for the model's own"))
    if tied not in TIED:
        raise ConfigError(wrong("tied", repr(tied), "'refuse' or 'reduce'", "'reduce' sums the gradients"))
    _check_plan(plan, known)
    args, kwargs = as_call(derive(model, cached=False) if inputs is None else inputs)
    seen = exported(model, inputs)
    if seen.backwards:
        what = f"trained through {', '.join(seen.backwards)}, whose own backward torch.export leaves out"
        legal = "a model whose gradients are those of its ops"
        step = "train it without stages, or write that function in differentiable ops"
        raise PartitionError(wrong(type(model).__name__, what, legal, step))
    traced = as_module(model, seen)
    whole = _whole(known, model, traced, args, kwargs)
    blocks = tuple(plan.blocks)
    if blocks:
        recompute.tag(whole.graph, blocks)
    target = None if device is None else torch.device(device)
    stages = _Stages(plan, model, whole, backend, blocks, target)
    if stages.tied and tied == "refuse":
        path, (_, readers) = next(iter(stages.tied.items()))
        found = f"read by the stages {', '.join(map(str, readers))}, each of which would train its own copy"
        step = "pass tied='reduce' to sum its gradients, or untie it (tie_word_embeddings=False) before the conversion"
        raise PartitionError(wrong(path, found, "trainable weights that one stage reads", step))
    return stages


class _Stages:
    """The graphs of all stages, from which modules are made."""

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        whole: _Whole,
        backend: str,
        blocks: recompute.Blocks,
        device: torch.device | None,
    ) -> None:
        self.model, self.whole, self.backend, self.blocks = model, whole, backend, blocks
        layout = Layout(whole.graph.graph)
        places = [cut.place for cut in matching_cuts(plan, layout)]
        arguments = [whole.state.get(node, node.meta.get("val")) for node in layout.nodes if node.op == "placeholder"]
        self.trained = dry_run(whole.graph, arguments).trained
        if device is not None:
            _put_on(whole.graph, {value.device for value in whole.state.values()}, device)
        self.graphs = split(whole.graph, places, self.trained)
        self.high_priority: Set[str] = conversion(model).high_priority
        self.target = device
        known = next((value.device for value in whole.state.values()), torch.device("cpu"))
        self.device = known if device is None else device
        self.tied = self._tied()

    def _tied(self) -> dict[str, tuple[nn.Parameter, list[int]]]:
        """Path -> trainable parameter that several stages read, and these stages."""
        readers: dict[int, tuple[nn.Parameter, list[int]]] = {}
        for stage, graph in enumerate(self.graphs):
            for value in {id(self.whole.state[node]): self.whole.state[node] for node in graph.state}.values():
                if isinstance(value, nn.Parameter) and value.requires_grad:
                    readers.setdefault(id(value), (value, []))[1].append(stage)
        names = {key: path for path, key, _ in reversed(state_names(self.model))}
        return {names[key]: found for key, found in readers.items() if len(found[1]) > 1}

    def module(self, stage: int) -> StageModule:
        """The module of a stage, on its device."""
        graph = self.graphs[stage]
        replays = bool(self.blocks) and self.backend == "eager"
        run_passes(graph.graph, level_2(self.backend, replays=replays, high_priority=self.high_priority))
        unread = () if stage else self._unread()
        function = conversion(self.model).record.function
        made = StageModule(graph, self.model, self.whole.state, self.trained, unread, function=function)
        if stage == 0:
            made.call = self.whole.call
        if stage == len(self.graphs) - 1:
            made.output = self.whole.call.output
        if self.backend != "eager":
            made.prepare_with(partial(compiled_by, self.backend, blocks=self.blocks))
        elif replays:
            made.prepare_with(lambda graph, flat: replaying(graph))
        if self.target is not None:
            _move(made, self.target)
        return made

    def _unread(self) -> list[Tensor]:
        """What is saved of the model and no stage reads: it stays with the first one, so that nothing is missing."""
        read = {id(self.whole.state[node]) for graph in self.graphs for node in graph.state}
        left = {key for _, key, saved in state_names(self.model) if saved and key not in read}
        return [value for value in chain(self.model.parameters(), self.model.buffers()) if id(value) in left]


def _whole(
    known: Conversion, model: nn.Module, traced: TracedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Whole:
    """The graph that `trace` made, apart from the module around it."""
    graph = traced.graph_module
    parameters = list(inspect.signature(known.original.forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(one.name for one in parameters if one.kind in positional)
    given = iter(leaves(names, args, kwargs).items())
    state, inputs = dict[fx.Node, Tensor](), dict[str, Any]()
    for node, slot in zip(graph.graph.find_nodes(op="placeholder"), traced._slots, strict=True):
        if slot is not None:
            state[node] = getattr(traced, slot)
            continue
        path, value = next(given)
        inputs[path] = node.meta["val"] if isinstance(value, Tensor) else value
    return _Whole(graph, state, Call(names, inputs, traced._out_spec))


def _put_on(gm: fx.GraphModule, devices: set[torch.device], target: torch.device) -> None:
    """Make new tensors of a graph on the device that its stage runs on."""

    def moved(value: Any) -> Any:
        return target if isinstance(value, torch.device) and value in devices else value

    for node in gm.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    gm.recompile()


def _move(module: StageModule, device: torch.device) -> None:
    """Move a stage; what has no values yet (a model on the meta device) gets memory, to be loaded into."""
    if any(value.is_meta for value in [*module.parameters(), *module.buffers()]):
        module.to_empty(device=device)
    else:
        module.to(device)
    module.graph.to(device)


# ---------------------------------------------------------------------------------------------- plans


def _check_plan(plan: Plan, known: Conversion) -> None:
    """Raise PartitionError for a plan of another model."""
    own = Counter(name for site in known.record.sites for name in _applied(site.name, site.applications))
    planned = Counter(site for unit in plan.units for site in unit.sites)
    if known.record.config.n > 1 and own != planned:
        missing = sorted((planned - own) or (own - planned))
        found = f"one of a {plan.model} with {'other ' if planned else 'no '}sites ({', '.join(missing[:2])})"
        raise PartitionError(wrong("the plan", found, "a plan of this model", _RETRY))


def _applied(name: str, times: int) -> list[str]:
    return [name, *(f"{name}@{number}" for number in range(1, times))]


def matching_cuts(plan: Plan, layout: Layout) -> list[Cut]:
    """The plan's cuts in another capture of the same model: between the same sites, at the same line of the model."""
    found: list[Cut] = []
    for stage in plan.stages[1:]:
        unit = plan.units[stage.start]
        before = Counter(site for one in plan.units[: stage.start] for site in one.sites)
        legal = [cut for cut in layout.cuts if Counter(_sites_before(layout, cut)) == before]
        legal = [cut for cut in legal if not found or cut.place > found[-1].place]
        same = [cut for cut in legal if source_line(cut.value) == unit.line]
        if not legal:
            where = f"behind the site {plan.units[stage.start - 1].sites[-1:]}" if before else "in front of all sites"
            message = wrong("a cut of the plan", f"not legal here ({where})", "the cuts of this model", _RETRY)
            raise PartitionError(message, line=unit.line or None)
        found.append((same or legal)[0])
    return found


def _sites_before(layout: Layout, cut: Cut) -> list[str]:
    return [site.name for site in layout.sites if layout.index[site.read] < cut.place]
