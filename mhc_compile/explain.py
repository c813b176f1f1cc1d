"""Say what a conversion finds in a model: trunks, sites, and every add that was considered and refused."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mhc_compile.config import MHCConfig
from mhc_compile.conversion import conversion, is_converted, plain_forward
from mhc_compile.example_inputs import as_call, derive
from mhc_compile.passes.bind import bind_parameters
from mhc_compile.passes.capture import just_in_time
from mhc_compile.passes.dataflow import is_learned
from mhc_compile.passes.fuse import fuse
from mhc_compile.passes.history import count_ops, run_passes
from mhc_compile.passes.lower import lower
from mhc_compile.passes.match import match_passes
from mhc_compile.passes.match_report import Matches
from mhc_compile.passes.op_kinds import NORMS, aten, packet
from mhc_compile.passes.provenance import module_path, source_line
from mhc_compile.passes.rewrite import Analysis, analyze, leave_plain, rewrite
from mhc_compile.passes.trunks import Trunk
from mhc_compile.sharding import refuse_wrapped

_WIDTH = 110  # of a printed table when the output is no terminal


@dataclass(frozen=True)
class ExplainedSite:
    """A residual add that becomes a site.

    name: the site's name in `model.mhc`; module: the module whose forward adds; line: source line of the add;
    shape, dtype: of the sum as captured; axis: its feature axis; features: C; trunk: the trunk's number.
    """

    name: str
    module: str
    line: str
    shape: tuple[str, ...]
    dtype: torch.dtype
    axis: int
    features: int
    trunk: int


@dataclass(frozen=True)
class ExplainedTrunk:
    """A chain of sites: its number, how many sites it has, its width C, and where its entry is made."""

    number: int
    sites: int
    features: int
    entry: str


@dataclass(frozen=True)
class ExplainedRefusal:
    """An add of float tensors that stays a plain add: module, source line, shape, and the reason."""

    module: str
    line: str
    shape: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` is a table that fits a terminal."""

    model: str
    sites: list[ExplainedSite]
    trunks: list[ExplainedTrunk]
    refused: list[ExplainedRefusal]
    notes: list[str]
    own: Matches | None = None  # the mHC that the model has already, as `backend="mhc"` finds it

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=min(Console().width, _WIDTH) if Console().is_terminal else _WIDTH)
        sites, trunks, refused = len(self.sites), len(self.trunks), len(self.refused)
        counts = f"{_plural(sites, 'site')} on {_plural(trunks, 'trunk')}, {_plural(refused, 'add')} refused"
        if self.own is not None:
            own = f"{_plural(len(self.own.sites), 'site')} of its own, {_plural(len(self.own.heads), 'exit')}"
            console.print(f"{self.model}: {own}", markup=False, highlight=False)
            console.print(_own_table(self.own), markup=False)
            return self._with_notes(console)
        console.print(f"{self.model}: {counts}", markup=False, highlight=False)
        for trunk in self.trunks:
            text = (
                f"trunk {trunk.number}: {_plural(trunk.sites, 'site')}, C = {trunk.features}, starts at {trunk.entry}"
            )
            console.print(text, markup=False, highlight=False)
        if self.sites:
            console.print(self._site_table(), markup=False)
        if self.refused:
            console.print(self._refusal_table(), markup=False)
        return self._with_notes(console)

    def _with_notes(self, console: Console) -> str:
        for note in self.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).rstrip()

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        sites = [{**vars(site), "dtype": str(site.dtype)} for site in self.sites]
        return {
            "model": self.model,
            "sites": sites,
            "trunks": [vars(trunk) for trunk in self.trunks],
            "refused": [vars(refusal) for refusal in self.refused],
            "notes": self.notes,
            **({} if self.own is None else {"own": [vars(one) for one in (*self.own.sites, *self.own.heads)]}),
        }

    def _site_table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for header, ratio in (("trunk", 0), ("site", 4), ("sum", 2), ("source line", 5)):
            table.add_column(header, ratio=ratio or None, overflow="fold")
        for site in self.sites:
            table.add_row(str(site.trunk), site.name, _tensor(site.shape, site.dtype, site.axis), site.line)
        return table

    def _refusal_table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("refused", justify="right")
        table.add_column("source line", ratio=4, overflow="fold")
        table.add_column("reason", ratio=5, overflow="fold")
        for (line, reason), count in Counter((one.line, one.reason) for one in self.refused).items():
            table.add_row(f"{count} x", line, reason)
        return table


def _own_table(own: Matches) -> Table:
    table = Table(box=None, pad_edge=False)
    for header, ratio in (("", 0), ("module", 4), ("streams", 0), ("ops", 4), ("source line", 5)):
        table.add_column(header, ratio=ratio or None, overflow="fold")
    for one in (*own.sites, *own.heads):
        ops = ", ".join(one.ops) + (f"; its own {', '.join(one.kept)}" if one.kept else "")
        table.add_row(
            "exit" if one.kind == "head" else one.kind, one.module, f"{one.n} x {one.features}", ops, one.line
        )
    return table


def explain(model: nn.Module, inputs: Any = None) -> Explanation:
    """Trunks, sites and refusals of a model, converted or not, as captured for `inputs`.

    inputs: what the model's forward takes (a tensor, a tuple, or a dict of names); derived for Hugging Face models
    when omitted. The model is traced, not run, and not changed. Adds that a conversion left plain (`only`, `skip`) are
    among the refused. Raises CaptureError when it is not one graph.
    """
    analysis, config = analysed(model, inputs)
    found = explanation(type(model).__name__, analysis)
    if analysis.foreign is not None:
        return with_its_own(found, analysis)
    return replace(found, notes=[*found.notes, *_unfused(analysis, config)])


def analysed(model: nn.Module, inputs: Any = None) -> tuple[Analysis, MHCConfig]:
    """What the finder sees in a model, and its conversion's options: the default ones when it is not converted."""
    refuse_wrapped(model)
    args, kwargs = as_call(derive(model) if inputs is None else inputs)
    record = conversion(model).record if is_converted(model) else None
    tied = record is not None and record.config.tie_shared
    analysis = analyze(just_in_time(plain_forward(model), model, args, kwargs).graph, tie_shared=tied)
    if record is not None and record.plain:
        analysis = leave_plain(analysis, record.plain)
    config = record.config if record is not None else MHCConfig()
    own = {} if record is None else {site.name: site.constraint for site in record.sites}
    for site in analysis.sites:
        site.constraint = own.get(site.name, "")
    return analysis, config


def with_its_own(found: Explanation, analysis: Analysis) -> Explanation:
    """With the sites of a model that is mHC already. Rewrites the graph: the analysis is used up."""
    matches = list[Matches]()
    before = count_ops(analysis.graph.graph).total()
    run_passes(analysis.graph, match_passes(matches))
    notes = [*matches[0].notes, *lower(analysis.graph).notes, *fuse(analysis.graph).notes]
    notes.append(f"{before} ops in the graph become {count_ops(analysis.graph.graph).total()}")
    return replace(found, notes=[*found.notes, *notes], own=matches[0])


def _unfused(analysis: Analysis, config: MHCConfig) -> list[str]:
    """The sites that keep an op for each term, and why. Rewrites the graph: the analysis is used up."""
    if config.n == 1:
        return []
    look_up, _ = bind_parameters(analysis.graph, analysis.sites, config)
    rewrite(analysis, config, look_up)
    return [*lower(analysis.graph).notes, *fuse(analysis.graph).notes]


def explanation(name: str, analysis: Analysis) -> Explanation:
    """The printable form of an analysed graph."""
    sites = []
    for site in analysis.sites:
        value = site.merge.root.meta["val"]
        shape = tuple(map(str, value.shape))
        axis = analysis.trunks[site.trunk].axis[site.merge.root]
        sites.append(
            ExplainedSite(site.name, site.module, site.line, shape, value.dtype, axis, site.features, site.trunk)
        )
    trunks = [
        ExplainedTrunk(number, len(trunk.sites), trunk.sites[0].features, _made_at(trunk.entry))
        for number, trunk in enumerate(analysis.trunks)
    ]
    refused = [
        ExplainedRefusal(
            module_path(one.node),
            source_line(one.node),
            tuple(map(str, one.node.meta["val"].shape)),
            one.reason,
        )
        for one in analysis.refused
    ]
    notes = sorted(set(analysis.notes)) + [
        note for trunk in enumerate(analysis.trunks) for note in _trunk_notes(*trunk)
    ]
    if analysis.foreign is not None:
        notes.append(f'this model is mHC already (at {analysis.foreign}); torch.compile(model, backend="mhc") fuses it')
    return Explanation(name, sites, trunks, refused, notes)


def _trunk_notes(number: int, trunk: Trunk) -> list[str]:
    """What acts on every stream of a trunk between its sites, where it changes what mHC promises."""
    ops = [*trunk.steps, *(op for site in trunk.sites for op in site.merge.path)]
    notes = []
    if any(packet(op) in NORMS or (is_learned(op) and packet(op) is aten.mul) for op in trunk.steps):
        notes.append(
            f"trunk {number}: a norm or learned scale acts on each stream between sites (post-norm): the trunk"
        )
        notes[-1] += " has no clean identity path"
    if any(packet(op) in (aten.mul, aten.div) for op in ops):
        notes.append(f"trunk {number}: the skip is scaled or masked on its way, which the composite gain leaves out")
    return notes


def _made_at(node: Any) -> str:
    return "an input" if node.op == "placeholder" else source_line(node) or node.name


def _tensor(shape: tuple[str, ...], dtype: torch.dtype, axis: int) -> str:
    sizes = ", ".join(f"C={size}" if place == axis else size for place, size in enumerate(shape))
    return f"[{sizes}] {str(dtype).removeprefix('torch.')}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
