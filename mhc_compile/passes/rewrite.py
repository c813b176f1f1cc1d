"""From a captured graph to its sites, and from its sites to the rewritten graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from torch import fx

from mhc_compile.config import MHCConfig
from mhc_compile.errors import RewriteError
from mhc_compile.passes.canonicalize import canonicalize
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.expand import Parameters, expand
from mhc_compile.passes.foreign import find_foreign
from mhc_compile.passes.history import Outcome, Pass, PassRecord, run_passes
from mhc_compile.passes.naming import name_sites
from mhc_compile.passes.residuals import Refusal
from mhc_compile.passes.select import select
from mhc_compile.passes.trunks import Site, Trunk, chain

CHOSEN = "left a plain add by only= or skip="


@dataclass
class Analysis:
    """The trunks of one graph, the adds that were refused, and the canonical graph they were found in."""

    graph: fx.GraphModule
    flow: Dataflow
    trunks: list[Trunk]
    refused: list[Refusal]
    records: list[PassRecord]
    foreign: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """All sites in the order of their adds."""
        sites = [site for trunk in self.trunks for site in trunk.sites]
        return sorted(sites, key=lambda site: self.flow.index[site.merge.root])


def analyze(gm: fx.GraphModule, *, tie_shared: bool = False) -> Analysis:
    """Bring a captured graph to canonical form, in place, and find and name its sites."""
    notes: list[str] = []

    def run(graph: fx.GraphModule) -> Outcome:
        notes.extend(canonicalize(graph))
        return Outcome(True, tuple(sorted(set(notes))))

    records = run_passes(gm, [Pass("canonicalize", False, run)])
    flow = Dataflow(gm.graph)
    selection = select(gm.graph, flow)
    refused = list(selection.refused)
    foreign = find_foreign(gm.graph, selection.sites)
    trunks = chain(selection.sites, flow, refused)
    name_sites(trunks, flow, tie_shared=tie_shared)
    refused.sort(key=lambda refusal: flow.index[refusal.node])
    return Analysis(gm, flow, trunks, refused, records, foreign, notes)


def leave_plain(analysis: Analysis, names: AbstractSet[str]) -> Analysis:
    """The same analysis with some sites left as plain adds, as ops on their trunk where they lie between others.

    The other sites keep their names.
    """
    name_of = {site.merge: site.name for site in analysis.sites if site.name not in names}
    refused = [*analysis.refused, *(Refusal(site.merge.root, CHOSEN) for site in analysis.sites if site.name in names)]
    trunks = chain(list(name_of), analysis.flow, refused)
    for trunk in trunks:
        for site in trunk.sites:
            site.name = name_of[site.merge]
    refused.sort(key=lambda refusal: analysis.flow.index[refusal.node])
    return replace(analysis, trunks=trunks, refused=refused)


def rename(analysis: Analysis, *, tie_shared: bool) -> Analysis:
    """The same analysis with its sites named as if the graph had no others."""
    name_sites(analysis.trunks, analysis.flow, tie_shared=tie_shared)
    return analysis


def rewrite(analysis: Analysis, config: MHCConfig, parameters: Parameters) -> list[PassRecord]:
    """Widen the trunks of an analysed graph in place; gives the records of the passes that ran."""

    def run(graph: fx.GraphModule) -> Outcome:
        expand(graph, analysis.trunks, analysis.flow, parameters, config)
        return Outcome(bool(analysis.trunks))

    records = run_passes(analysis.graph, [Pass("expand", False, run)])
    analysis.graph.recompile()
    return records


def keep_sites(analysis: Analysis, recorded: Mapping[str, tuple[int, int]]) -> None:
    """Check that a graph has just the sites that the model was converted with.

    recorded: name -> features, and how often the site is applied. Raises RewriteError when one is missing or new:
    leaving it a plain add, or without parameters, would change the model's function in silence.
    """
    times = Counter(site.name for site in analysis.sites)
    found = {site.name: (site.features, times[site.name]) for site in analysis.sites}
    if found == dict(recorded):
        return
    missing, extra = sorted(recorded.keys() - found.keys()), sorted(found.keys() - recorded.keys())
    if missing and sorted(found.values()) == sorted(recorded.values()):
        raise RewriteError(
            "this call runs other residual adds than the one the model was converted with, or the same under other "
            f"names: it has no site {', '.join(missing[:4])} and has also {', '.join(extra[:4])}. A site is named "
            "after the weights that its branch reads: what wraps weights (fake quantisation, a parametrisation) has to "
            "come before the conversion. Convert with example_inputs that run the same layers"
        )
    other = [
        f"site {name} with {found[name][0]} features, {found[name][1]} times, not {recorded[name][0]} features, "
        f"{recorded[name][1]} times"
        for name in sorted(found.keys() & recorded.keys())
        if found[name] != recorded[name]
    ]
    what = [
        f"has no site {', '.join(missing[:4])}" if missing else "",
        f"has also {', '.join(extra[:4])}" if extra else "",
        f"has {other[0]}" if other else "",
    ]
    raise RewriteError(
        "this call runs other residual adds than the one the model was converted with: it "
        + " and ".join(part for part in what if part)
        + ". Convert with example_inputs that run the same layers (mode, optional branches, layer drop)"
    )
