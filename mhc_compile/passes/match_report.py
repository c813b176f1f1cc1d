"""What the matcher found, for the user: the sites of a model that is mHC, and its exits."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

import mhc_compile.kernels.ops  # noqa: F401 - registers torch.ops.mhc
from mhc_compile.passes.capture import graph_input
from mhc_compile.passes.match_rewrites import Refusal
from mhc_compile.passes.op_kinds import tensor_of
from mhc_compile.passes.provenance import module_path, source_line

mhc = torch.ops.mhc

_OPS = (mhc.coefficients, mhc.sinkhorn, mhc.aggregate, mhc.merge, mhc.readout)


@dataclass(frozen=True)
class MatchedSite:
    """One site of the model itself, or its exit, as far as one graph shows it.

    kind: `site`, `read` or `write` for the part of a site that a graph break leaves, `head` for an exit; module, line:
    where the model computes it; n, features: of its streams; ops: the ops that were put in; kept: the terms that stay
    the model's own; options: the variant.
    """

    kind: str
    module: str
    line: str
    n: int
    features: int
    ops: tuple[str, ...]
    kept: tuple[str, ...]
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Matches:
    """What the matcher did to a graph: sites and exits, the number of each op, and what it refused."""

    sites: tuple[MatchedSite, ...]
    heads: tuple[MatchedSite, ...]
    ops: dict[str, int]
    refused: tuple[Refusal, ...]
    remarks: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each refusal, and what the user should know of a match."""
        return tuple(dict.fromkeys([*self.remarks, *map(str, self.refused)]))


def report(graph: fx.Graph, refused: list[Refusal], remarks: list[str]) -> Matches:
    """The sites of a graph that the matcher is done with."""
    taken: set[fx.Node] = set()
    _name(graph)
    sites = [_site(node, taken) for node in graph.nodes if node.target is mhc.merge.default]
    heads = [_exit(node, taken) for node in graph.nodes if node.target is mhc.readout.default]
    for node in graph.nodes:  # a graph break may part the read of a site from its merge
        if node.target is mhc.aggregate.default and node not in taken:
            source = _producer(node.args[1])
            groups = source.args[8] if source is not None and len(source.args) > 8 else 3
            found = _exit(node, taken, source)
            (heads if groups == 1 else sites).append(found if groups == 1 else _named(found, "read"))
    count = {
        op.__name__: number
        for op in _OPS
        if (number := sum(node.target is op.default for node in graph.nodes))
    }
    return Matches(tuple(sites), tuple(heads), count, tuple(refused), tuple(dict.fromkeys(remarks)))


def _name(graph: fx.Graph) -> None:
    """Give the ops of each site the path of the module that computes its coefficients, as `mhc_site`."""
    for node in graph.nodes:
        if node.target in (mhc.aggregate.default, mhc.merge.default):
            source = _producer(node.args[1] if node.target is mhc.aggregate.default else node.args[2])
            for one in (node, source):
                if one is not None:
                    one.meta["mhc_site"] = module_path(source or node)


def _named(site: MatchedSite, kind: str) -> MatchedSite:
    return MatchedSite(kind, *list(vars(site).values())[1:])


def _producer(value: object) -> fx.Node | None:
    """The `coefficients` that a gate comes from, behind layouts and casts; None for the model's own."""
    while isinstance(value, fx.Node) and value.target is not mhc.coefficients.default:
        if value.target is operator.getitem or len(value.all_input_nodes) == 1:
            value = value.args[0] if value.args else None
        else:
            return None
    return value if isinstance(value, fx.Node) else None


def _site(merge: fx.Node, taken: set[fx.Node]) -> MatchedSite:
    streams, _, post, res = merge.args[:4]
    source = _producer(post)
    ops, kept, options = ["merge"], [], _options(merge)
    reads = [
        node
        for node in streams.users  # type: ignore[union-attr]
        if node.target is mhc.aggregate.default and node not in taken
        and (source is None or _producer(node.args[1]) is source)
    ]
    parted = _is_input(post)  # the graph begins between the read and the merge
    if reads:
        taken.add(reads[0])
        ops.insert(0, "aggregate")
    elif not parted:
        kept.append("aggregate")
    chain = _chain(res)
    if chain is not None:
        ops.insert(0, "sinkhorn")
        options |= _options(chain)
    elif res is not None and not _is_input(res):
        kept.append("res")
    if source is not None:
        ops.insert(0, "coefficients")
        options |= _options(source)
    elif not parted:
        kept.append("coefficients")
    return _described("write" if parted else "site", source or merge, streams, ops, kept, options)


def _is_input(value: object) -> bool:
    """The value is an input of the graph that is no weight, behind layouts and casts."""
    while isinstance(value, fx.Node) and value.op == "call_function" and len(value.all_input_nodes) == 1:
        value = value.args[0]
    record = graph_input(value) if isinstance(value, fx.Node) else None
    return record is not None and record.kind == "input"


def _chain(res: object) -> fx.Node | None:
    while isinstance(res, fx.Node) and res.target is not mhc.sinkhorn.default:
        if len(res.all_input_nodes) != 1:
            return None
        res = res.args[0]
    return res if isinstance(res, fx.Node) else None


def _exit(node: fx.Node, taken: set[fx.Node], source: fx.Node | None = None) -> MatchedSite:
    taken.add(node)
    ops = ["readout"] if node.target is mhc.readout.default else ["aggregate"]
    kept = []
    if node.target is mhc.aggregate.default:
        (ops.insert(0, "coefficients") if source is not None else kept.append("coefficients"))
    options = _options(source) if source is not None else {}
    return _described("head", source or node, node.args[0], ops, kept, options)


def _options(node: fx.Node) -> dict[str, object]:
    """The literals of a call by name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {
        name: value
        for name, value in zip(names, node.args, strict=False)
        if isinstance(value, (bool, int, float)) and not isinstance(value, fx.Node)
    }


def _described(
    kind: str, node: fx.Node, streams: object, ops: list[str], kept: list[str], options: dict[str, object]
) -> MatchedSite:
    value = tensor_of(streams)
    assert value is not None
    n, features = (int(size) for size in value.shape[-2:])
    return MatchedSite(kind, module_path(node), source_line(node), n, features, tuple(ops), tuple(kept), options)
