"""What a rewritten graph costs: work, memory traffic, what is kept for the backward, what a cut has to send.

Of each node: FLOPs by torch's formulas (and those of `kernels` for the mHC ops), bytes moved, bytes kept. Ops on single
elements are taken as fused: between two of them nothing is moved. The time of a node is the larger of its FLOPs and
its bytes, each at the device's rate; or it is measured. Of each unit between two legal cuts: what the search for a
plan asks for (`plan_search.Unit`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from mhc_compile.passes.cost_tables import UnitCosts, text
from mhc_compile.passes.cost_values import NodeCost, SiteSize
from mhc_compile.passes.dataflow import parameter_behind
from mhc_compile.passes.dry_run import DryRun, Saved, dry_run, partitioned
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.lower import lower
from mhc_compile.passes.op_kinds import CONVOLUTIONS, NORMS, PRODUCTS, REDUCTIONS, aten, is_local, packet, tensor_of
from mhc_compile.passes.plan_search import Unit
from mhc_compile.passes.recompute import Blocks, equal_blocks, tag
from mhc_compile.passes.replay import READS, replayed_nodes
from mhc_compile.passes.site_kernels import moves
from mhc_compile.passes.stages import Cut, Layout, SiteSpan, bytes_of, tensor_bytes

mhc = torch.ops.mhc


@dataclass(frozen=True)
class Device:
    """Rates that a model's time is estimated with: FLOP/s of 16-bit products, bytes/s of memory, of a link."""

    name: str = "H200"
    flops: float = 6.5e14
    bandwidth: float = 4.3e12
    link: float = 4.5e11

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s for a dtype: half of it in (TF)32 bits, a tenth in 64."""
        return self.flops * {2: 1.0, 4: 0.5, 8: 0.1}.get(dtype.itemsize, 1.0)


# Backward FLOPs over forward ones, by the formulas in `kernels`.
_FLOP_RATIO: dict[object, float] = {
    mhc.coefficients: 3.0,
    mhc.gates: 3.0,
    mhc.aggregate: 2.0,
    mhc.merge: 2.0,
}
_LOOKUPS = frozenset({aten.embedding, aten.index, aten.index_select, aten.gather})


class CostModel:
    """The costs of a rewritten graph. `str()` prints them as the paper's tables do (`passes.cost_tables`).

    compiled: what branches keep is what torch's partitioner keeps, which takes a trace of the backward; what a replay
    makes for one branch (aggregate, norm) then exists for one site at a time. Otherwise branches keep what autograd
    does, and a block replays all of that at once, but for the coefficients of every site, which are kept as its fused
    ops keep them, and what ops keep that they do not give (`passes.eager_replay`).

    kernels: how the mHC ops run, which decides what they move: "site" (what replays in eager mode), "chain" (compiled:
    sites fused across their borders), or "op" (each by itself, as the paper's table 2 counts). By default as compiled.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        arguments: Sequence[Any],
        *,
        device: Device | None = None,
        compiled: bool = False,
        kernels: str | None = None,
    ) -> None:
        self.device, self.compiled = device or Device(), compiled
        self.graph, self.layout = gm, Layout(gm.graph)
        self.moves = moves(self.layout.flow, kernels or ("chain" if compiled else "site"))
        self.run: DryRun = dry_run(gm, arguments)
        self.replayed = replayed_nodes(self.layout.flow)
        self.branch_values = self._branch_values(gm, arguments)
        self.ranges = self.layout.units()
        self._kept = _KeptBytes(self)
        self._measured: list[tuple[float, float]] | None = None

    def _branch_values(self, gm: fx.GraphModule, arguments: Sequence[Any]) -> list[Saved]:
        """What is kept when every site is replayed, trunk states left out."""
        eager = [saved for saved in self.run.saved if saved.made_by not in self.replayed]
        if not self.compiled:
            return eager
        tagged, own = copy_graph(gm), {node.name: node for node in self.layout.nodes}
        tag(tagged, equal_blocks(tagged, 1))
        found = []
        for saved in partitioned(tagged, arguments):
            maker = own[saved.made_by.name]
            if maker not in self.replayed:
                found.append(Saved(saved.bytes, maker, self._savers(maker)))
        return found

    def _savers(self, maker: fx.Node) -> tuple[fx.Node, ...]:
        """Who needs a value that the partitioner keeps: who saves it in eager mode, or replays from it."""
        for saved in self.run.saved:
            if saved.made_by is maker:
                return saved.savers
        return tuple(reader for reader in maker.users if reader in self.replayed)[:1] or (maker,)

    @property
    def cuts(self) -> list[Cut]:
        """The legal cuts: cut k is in front of unit k + 1."""
        return self.layout.cuts

    @property
    def sites(self) -> list[SiteSpan]:
        """The sites in the order of the graph."""
        return self.layout.sites

    @cached_property
    def sites_of_units(self) -> list[list[SiteSpan]]:
        """The sites of each unit."""
        index = self.layout.index
        return [[site for site in self.sites if index[site.read] in numbers] for numbers in self.ranges]

    def kept(self, blocks: int | Blocks) -> int:
        """Bytes that a call keeps for its backward with these blocks, or blocks of so many sites; weights left out."""
        blocks = equal_blocks(self.graph, blocks) if isinstance(blocks, int) else blocks
        first = {block[0] for block in blocks}
        starts = [place for place, sites in enumerate(self.sites_of_units) if sites and sites[0].name in first]
        return sum(unit.kept for unit in self.units) + sum(self.units[start].state for start in starts)

    @cached_property
    def nodes(self) -> dict[fx.Node, NodeCost]:
        """The cost of every op."""
        first: dict[fx.Node, int] = {}
        for saved in self.run.saved:
            first[saved.savers[0]] = first.get(saved.savers[0], 0) + saved.bytes
        return {
            node: self._node(node, first.get(node, 0))
            for node in self.layout.nodes
            if node.op == "call_function" and bytes_of(node)
        }

    def _node(self, node: fx.Node, kept: int) -> NodeCost:
        flops, (moved, back_moved, again) = self.run.flops.get(node, 0), self._moved(node)
        back_flops = int(flops * _FLOP_RATIO.get(packet(node), 2.0))
        if node not in self.run.trained:
            back_flops = back_moved = 0
        rate = self.device.rate(_dtype(node))
        return NodeCost(
            node.name,
            str(node.target),
            str(node.meta.get("mhc_site", "")),
            flops,
            back_flops,
            moved,
            back_moved,
            kept,
            node in self.replayed,
            max(flops / rate, moved / self.device.bandwidth),
            max(back_flops / rate, back_moved / self.device.bandwidth),
            max(flops / rate, again / self.device.bandwidth) if node in self.replayed else 0.0,
        )

    def _moved(self, node: fx.Node) -> tuple[int, int, int]:
        """Bytes that an op moves in the forward, in the backward, and when it is computed again."""
        if node in self.moves:
            return self._moved_by_site(node)
        if node in self.run.views:
            return 0, 0, 0
        cheap = _is_fusible(node)
        given = [bytes_of(source) for source in node.all_input_nodes if not (cheap and _is_fusible(source))]
        made = bytes_of(node)
        if packet(node) in _LOOKUPS:
            given = [min(size, made) for size in given]
        written = 0 if cheap and node.users and all(map(_is_fusible, node.users)) else made
        moved = sum(given) + written
        return moved, 2 * moved, moved

    def _moved_by_site(self, node: fx.Node) -> tuple[int, int, int]:
        """Of an op on streams by the table of kernels; coefficients and parameters beside it, in the forward."""
        streams, found = node.args[0].meta["val"], self.moves[node]  # type: ignore[union-attr]
        n, features = streams.shape[-2:]
        one = tensor_bytes(streams) // n
        values = ((other, tensor_of(other)) for other in (*node.all_input_nodes, node))
        small = sum(bytes_of(other) for other, value in values if value is None or value.shape[-1] != features)
        forward, backward, replay = (int(part.units(n) * one) for part in (found.forward, found.backward, found.replay))
        return forward + small, backward, replay + small

    # ------------------------------------------------------------------------------------------ units

    @cached_property
    def units(self) -> list[Unit]:
        """What the search for a plan needs to know of each unit."""
        return [self._unit(number) for number in range(len(self.ranges))]

    def _unit(self, number: int) -> Unit:
        ops = [self.nodes[node] for node in self._nodes_of(number) if node in self.nodes]
        forward, backward = self.seconds[number]
        modelled = sum(op.seconds for op in ops)
        share = sum(op.replay_seconds for op in ops) / modelled if modelled else 0.0
        kept = self._kept
        working = max((self._working(node) for node in self._nodes_of(number)), default=0)
        cut = self.cuts[number - 1] if number else None
        return Unit(
            time=forward + backward,
            kept=kept.kept[number],
            replay=forward * share,
            saved=kept.saved[number],
            state=kept.state[number],
            outgoing=kept.outgoing[number],
            together=kept.coefficients[number] + (0 if self.compiled else kept.branch[number]),
            alone=working + (kept.branch[number] if self.compiled else 0),
            boundary=cut.bytes if cut is not None else None,
            send=cut.bytes / self.device.link if cut is not None else 0.0,
            again=kept.again[number],
            waiting=sum(bytes_of(node) for node in self._nodes_of(number) if self._has_weight_gradient(node)),
        )

    @cached_property
    def seconds(self) -> list[tuple[float, float]]:
        """Forward and backward of each unit, estimated unless measured."""
        if self._measured is not None:
            return self._measured
        found = []
        for number in range(len(self.ranges)):
            ops = [self.nodes[node] for node in self._nodes_of(number) if node in self.nodes]
            found.append((sum(op.seconds for op in ops), sum(op.backward_seconds for op in ops)))
        return found

    def _nodes_of(self, number: int) -> list[fx.Node]:
        return [self.layout.nodes[place] for place in self.ranges[number]]

    def _working(self, node: fx.Node) -> int:
        """Gradients that exist while the backward of a node runs: of its value and of what it reads."""
        if node not in self.run.trained or node in self.run.views or node.op != "call_function":
            return 0
        sources = [source for source in node.all_input_nodes if source.op != "placeholder"]
        return bytes_of(node) + sum(bytes_of(source) for source in sources if source in self.run.trained)

    def _has_weight_gradient(self, node: fx.Node) -> bool:
        """A product with a weight: its gradient waits where a schedule splits the backward."""
        if packet(node) not in PRODUCTS and packet(node) not in CONVOLUTIONS:
            return False
        return node in self.run.trained and any(parameter_behind(source) for source in node.all_input_nodes)

    def weights(self, copies: float) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Bytes of the parameters and buffers that each unit is the first to read, and those of later readers.

        copies: how often trained ones count (gradients, optimizer states); the others count once, or less. A later
        reader is given as (unit that reads it before, unit, bytes).
        """
        last: dict[fx.Node, int] = {}
        first, again = [0] * len(self.ranges), []
        for unit, numbers in enumerate(self.ranges):
            for node in self.weights_read(numbers):
                size = int(bytes_of(node) * (copies if node in self.run.trained else min(copies, 1)))
                if node in last:
                    again.append((last[node], unit, size))
                else:
                    first[unit] += size
                last[node] = unit
        return first, again

    def weights_read(self, numbers: Iterable[int]) -> set[fx.Node]:
        """The parameters that nodes of these numbers read."""
        nodes = [self.layout.nodes[number] for number in numbers]
        return {source for node in nodes for source in node.all_input_nodes if self.layout.is_parameter(source)}

    # ------------------------------------------------------------------------------------------ measured times

    def measure(self, seconds: Sequence[tuple[float, float]]) -> None:
        """Use measured seconds (forward, backward) of each unit in place of the estimates."""
        self._measured = list(seconds)
        for name in ("seconds", "units"):
            self.__dict__.pop(name, None)

    @property
    def timing(self) -> str:
        """Where the times come from."""
        return f"estimated for {self.device.name}" if self._measured is None else "measured"

    @cached_property
    def site_sizes(self) -> list[SiteSize]:
        """The sizes of each site."""
        return [_site_size(site) for site in self.sites]

    def __str__(self) -> str:
        rows = [
            UnitCosts(
                tuple(site.name for site in self.sites_of_units[number]),
                tuple(self.nodes[node] for node in self._nodes_of(number) if node in self.nodes),
                unit,
                self.seconds[number],
            )
            for number, unit in enumerate(self.units)
        ]
        return text(self.site_sizes, rows)


def _site_size(site: SiteSpan) -> SiteSize:
    streams = site.streams.meta["val"]
    n, features = int(streams.shape[-2]), int(streams.shape[-1])
    one = tensor_bytes(streams) // n
    return SiteSize(n, features, one // (features * streams.element_size()), one)


def _is_fusible(node: fx.Node) -> bool:
    """An op that a compiler puts into one kernel with its neighbours."""
    if node.op != "call_function" or node.target in READS:
        return False
    return is_local(node) or packet(node) in NORMS or packet(node) in REDUCTIONS


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return next((one.dtype for one in values if isinstance(one, torch.Tensor)), torch.float32)


class _KeptBytes:
    """Of each unit, what is kept for its backward, and what a replay makes; see `plan_search.Unit`."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        count = len(model.ranges)
        self.unit = {number: place for place, numbers in enumerate(model.ranges) for number in numbers}
        self.kept, self.saved, self.state, self.again = [0] * count, [0] * count, [0] * count, [0] * count
        self.outgoing, self.coefficients, self.branch = [0] * count, [0] * count, [0] * count
        self.fused = set[fx.Node]() if model.compiled else self._fused()
        for saved in model.branch_values:
            self._stored(saved)
        for saved in model.run.saved:
            if saved.made_by in model.replayed:
                self._replayed(saved)
        self._sources_of_replays()
        for place, cut in enumerate(model.cuts, start=1):
            self.state[place] = self._states_at(cut.place)

    def _place(self, node: fx.Node) -> int:
        return self.unit[self.model.layout.index[node]]

    def _stored(self, saved: Saved) -> None:
        """Kept by the unit of its first saver; a stage that starts between two savers holds it too."""
        places = sorted({self._place(saver) for saver in saved.savers})
        self.kept[places[0]] += saved.bytes
        for place in range(places[0] + 1, places[-1] + 1):
            self.again[place] += saved.bytes

    def _replayed(self, saved: Saved) -> None:
        made, places = self._place(saved.made_by), [self._place(saver) for saver in saved.savers]
        if not self.model.compiled and (saved.inside or _is_coefficient(saved.made_by)):
            self.kept[min(places)] += 0 if _site_of(saved.made_by) in self.fused else saved.bytes
            return
        self.saved[min(places)] += saved.bytes
        if max(places) > made:
            self.outgoing[made] += saved.bytes
        elif _is_coefficient(saved.made_by):
            self.coefficients[made] += saved.bytes
        else:
            self.branch[made] += saved.bytes

    def _fused(self) -> set[fx.Node]:
        """The trained sites that will run as a `read`, which keeps its coefficients, and z and r beside them."""
        lowered, found = copy_graph(self.model.graph), set()
        lower(lowered, early=False)
        for site, other in zip(self.model.sites, Layout(lowered.graph).sites, strict=True):
            if other.read.target is mhc.read.default and site.read in self.model.run.trained:
                _, pre, post, res, *_, z, r = other.read.meta["val"]
                self.kept[self._place(site.read)] += sum(map(tensor_bytes, (pre, post, res, z, r)))
                found.add(site.read)
        return found

    def _sources_of_replays(self) -> None:
        """What a replay starts from and autograd does not keep: the entries of trunks."""
        model = self.model
        known = {saved.made_by for saved in model.branch_values}
        stored = {saved.made_by for saved in model.run.saved}
        for node in model.layout.nodes:
            if node.target is mhc.expand.default:
                entry = node.args[0]
                assert isinstance(entry, fx.Node)
                if node in model.run.trained and entry.op == "call_function":
                    if entry not in known:
                        self.kept[self._place(node)] += bytes_of(entry)
                    if entry not in stored:
                        self.saved[self._place(node)] -= bytes_of(entry)  # not needed when the streams are stored

    def _states_at(self, place: int) -> int:
        layout = self.model.layout
        return sum(bytes_of(node) for node in layout.crossing(place) if node in self.model.replayed)


def _site_of(node: fx.Node) -> object:
    """The read that a coefficient comes from; None for other values."""
    if node.target in READS:
        return node
    part: Any = node.args[0] if node.target is mhc.sinkhorn.default else None  # the logits
    return part.args[0] if part is not None and part.target is operator.getitem else None


def _is_coefficient(node: fx.Node) -> bool:
    return node.target in READS or node.target in (mhc.sinkhorn.default, mhc.constrain.default)
