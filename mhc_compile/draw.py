"""The picture of a model: its trunks and sites, what reads them, and what a plan does with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from mhc_compile.codegen.draw import DrawnSite, Lane, Picture, Tap, check_suffix, save
from mhc_compile.config import MHCConfig
from mhc_compile.conversion import is_converted
from mhc_compile.errors import ConfigError, wrong
from mhc_compile.explain import Explanation, analysed, explanation, with_its_own
from mhc_compile.passes.bind import bind_parameters
from mhc_compile.passes.provenance import module_path
from mhc_compile.passes.rewrite import Analysis, rewrite
from mhc_compile.plan import Plan

mhc = torch.ops.mhc
_HELD = 4  # streams of the graph that the readouts are counted in: at n = 1 there would be none


def draw(model: nn.Module, inputs: Any, path: str | Path, *, plan: Plan | None = None) -> None:
    """Write a picture of a model, converted or not, to `path` (.svg, .png or .pdf).

    Trunks run from where they begin to where they are read out; under each site hangs the module of its branch. Behind
    them stand the modules that the sites belong to; long runs of alike ones are folded. With a `plan`, recompute blocks
    and stage cuts are drawn too. The adds that stay plain are listed with reasons.

    inputs: as for `explain`; None derives those of Hugging Face models. The model is traced, not run, and not changed.
    Needs matplotlib (the extra `demo`). Raises ConfigError for another suffix, without matplotlib, or for a plan of
    other sites; CaptureError when the model is not one graph.
    """
    check_suffix(Path(path))
    analysis, config = analysed(model, inputs)
    found = explanation(type(model).__name__, analysis)
    if analysis.foreign is not None:
        picture = _of_its_own(with_its_own(found, analysis), plan)
    else:
        n = config.n
        streams = _Streams(analysis, n if n > 1 else _HELD)
        state = f"converted, n = {n}" if is_converted(model) else f"not converted: what mhc_compile(model, n={n}) makes"
        picture = Picture(
            found.model,
            f"{_counts(found)}, {state}" + (f"; plan: {plan.schedule}" if plan is not None else ""),
            n,
            tuple(_lane(found, streams, number, plan) for number in range(len(found.trunks))),
            _refused(found),
            tuple(found.notes),
        )
    save(picture, Path(path))


def _counts(found: Explanation) -> str:
    sites, trunks = len(found.sites), len(found.trunks)
    return f"{sites} site{'' if sites == 1 else 's'} on {trunks} trunk{'' if trunks == 1 else 's'}"


def _lane(found: Explanation, streams: _Streams, number: int, plan: Plan | None) -> Lane:
    trunk, places = found.trunks[number], _places(plan)
    names = [site.name for site in found.sites if site.trunk == number]
    missing = [name for name in names if plan is not None and name not in places]
    if missing:
        legal = "the plan of this model: partition(model, inputs, ...)"
        raise ConfigError(wrong("the plan", f"one without the site {missing[0]}", legal, "plan the model again"))
    sites = [
        DrawnSite(name, tuple(sorted(streams.reads.get((number, place), ()))), *places.get(name, (None, None)))
        for place, name in enumerate(names)
    ]
    mine = sorted((behind, readers) for (one, behind), readers in streams.taps.items() if one == number)
    taps = tuple(Tap(behind, tuple(readers)) for behind, readers in mine)
    return Lane(number, trunk.features, trunk.entry, tuple(sites), taps)


def _places(plan: Plan | None) -> dict[str, tuple[int | None, int | None]]:
    """Site -> the numbers of its recompute block and its stage."""
    found: dict[str, tuple[int | None, int | None]] = {}
    if plan is None:
        return found
    blocks = 0
    for number, stage in enumerate(plan.stages):
        found.update(dict.fromkeys(plan.sites_of(stage), (None, number)))
        for sites in plan.block_sites(stage):
            found.update(dict.fromkeys(sites, (blocks, number)))
            blocks += 1
    return found


def _refused(found: Explanation) -> tuple[tuple[int, str, str], ...]:
    """How often each reason is given, in short, and where first."""
    where: dict[str, str] = {}
    count: Counter[str] = Counter()
    for one in found.refused:
        reason = one.reason.partition(": ")[0]
        count[reason] += 1
        where.setdefault(reason, one.line)
    return tuple((number, reason, where[reason]) for reason, number in count.most_common())


def _of_its_own(found: Explanation, plan: Plan | None) -> Picture:
    """A model that is mHC already."""
    if plan is not None:
        raise ConfigError(wrong("plan", "given", "None for a model that is mHC already", "leave plan away"))
    own = found.own
    assert own is not None
    taps = (Tap(len(own.sites), tuple(one.module for one in own.heads)),) if own.heads else ()
    first = (own.sites or own.heads)[:1]
    n, features = (first[0].n, first[0].features) if first else (1, 0)
    sites = tuple(DrawnSite(one.module) for one in own.sites)
    lanes = (Lane(0, features, "its own expand", sites, taps),) if sites else ()
    subtitle = f"mHC already: {len(sites)} sites of its own, n = {n}"
    return Picture(found.model, subtitle, n, lanes, _refused(found), tuple(found.notes))


class _Streams:
    """Where the trunks of a graph are read out, and which sites' branches read another trunk.

    taps: (trunk, sites before the readout) -> modules that read it; reads: (trunk, place of a site) -> other trunks.
    """

    def __init__(self, analysis: Analysis, n: int) -> None:
        order = [(site.trunk, site.index) for site in analysis.sites]
        config = MHCConfig(n=n)
        look_up, _ = bind_parameters(analysis.graph, analysis.sites, config)
        rewrite(analysis, config, look_up)
        self._sites = iter(order)
        self._at: dict[fx.Node, tuple[int, int]] = {}  # streams -> trunk and sites before them
        self._from: dict[fx.Node, frozenset[int]] = {}  # other values -> the trunks whose readouts they come from
        self.taps: dict[tuple[int, int], list[str]] = {}
        self.reads: dict[tuple[int, int], set[int]] = {}
        nodes = list(analysis.graph.graph.nodes)
        self._begin(nodes)
        for node in nodes:
            self._step(node)

    def _begin(self, nodes: list[fx.Node]) -> None:
        """The trunk of each expand: that of the first merge that its streams come to."""
        merges = [node for node in nodes if node.target is mhc.merge.default]
        trunk_of = dict(zip(merges, self._sites, strict=True))
        for node in nodes:
            if node.target is mhc.expand.default:
                first = next((one for one in _downstream(node) if one in trunk_of), None)
                if first is not None:
                    self._at[node] = trunk_of[first][0], 0
        self._place = trunk_of

    def _step(self, node: fx.Node) -> None:
        sources = [one for one in node.all_input_nodes if one in self._at]
        if node.target is mhc.merge.default:
            trunk, place = self._place[node]
            others = self._from.get(node.args[1], frozenset()) - {trunk}  # type: ignore[arg-type]
            if others:
                self.reads.setdefault((trunk, place), set()).update(others)
            self._at[node] = trunk, place + 1
        elif node.target is mhc.readout.default:
            trunk, behind = self._at[node.all_input_nodes[0]]
            self._from[node] = frozenset((trunk,))
            readers = [_reader(user) for user in node.users]
            self.taps.setdefault((trunk, behind), []).extend(dict.fromkeys(readers))
        elif node.target in (mhc.coefficients.default, mhc.aggregate.default, mhc.expand.default):
            return
        elif sources:
            self._at[node] = self._at[sources[0]]
        else:
            known = [self._from[one] for one in node.all_input_nodes if one in self._from]
            if known:
                self._from[node] = frozenset().union(*known)


def _downstream(node: fx.Node) -> Iterator[fx.Node]:
    """What streams come to, nearest first."""
    seen, queue = {node}, [node]
    for one in queue:
        for user in one.users:
            if user not in seen and user.target not in (mhc.coefficients.default, mhc.aggregate.default):
                yield user
                seen.add(user)
                if user.target not in (mhc.readout.default, mhc.merge.default):
                    queue.append(user)


def _reader(node: fx.Node) -> str:
    if node.op == "output":
        return "the output"
    return module_path(node)

