"""Name sites after the module that computes their branch, so that parameters keep their names.

The name is part of the checkpoint format: `model.layers.0.self_attn` for the add behind that module, with
`_call1`, `_call2`, ... for later applications of a shared layer. It depends on module paths and on the order of
application alone, and so is the same for every shape, in training and in evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import fx

from mhc_compile.passes.dataflow import Dataflow, is_trainable, parameter_behind
from mhc_compile.passes.op_kinds import CASTS, CONVOLUTIONS, COPIES, DROPOUTS, PRODUCTS, is_local, packet
from mhc_compile.passes.provenance import module_path, module_paths
from mhc_compile.passes.residuals import is_sum
from mhc_compile.passes.trunks import Site, Trunk

_RESERVED = {"phi", "alpha", "bias"}


def name_sites(trunks: list[Trunk], flow: Dataflow, *, tie_shared: bool = False) -> None:
    """Set `name` on every site. With `tie_shared` all applications of a shared layer carry one name.

    A layer is shared when its weights are the same: the names alone may be equal for other reasons.
    """
    sites = sorted((site for trunk in trunks for site in trunk.sites), key=lambda site: flow.index[site.merge.root])
    stems = [_stem(site, flow) for site in sites]
    prefixes = {".".join(stem.split(".")[:depth]) for stem in stems for depth in range(1, stem.count(".") + 1)}
    calls: Counter[str] = Counter()
    named: dict[tuple[str, frozenset[str]], str] = {}
    for site, stem in zip(sites, stems, strict=True):
        name = f"{stem}_site" if stem in prefixes or stem.rsplit(".", 1)[-1] in _RESERVED else stem
        layer = name, _weights(site, flow)
        if not tie_shared or layer not in named:
            number = calls[name]
            calls[name] += 1
            named[layer] = name if number == 0 else f"{name}_call{number}"
        site.name = named[layer]


def _weights(site: Site, flow: Dataflow) -> frozenset[str]:
    """The parameters of the ops that the branches of a site are named after."""
    last = [node for leaf in _parts(site.merge.branches) if (node := _last_weighted(leaf, site, flow))]
    return frozenset(name for node in last for source in node.all_input_nodes if (name := parameter_behind(source)))


def _stem(site: Site, flow: Dataflow) -> str:
    adder = module_path(site.merge.root).split(".") if module_path(site.merge.root) else []
    owners = {name for leaf in _parts(site.merge.branches) if (name := _owner(leaf, site, flow, adder))}
    if len(owners) == 1:
        return owners.pop()
    return ".".join(adder) or "root"  # parallel branches of several modules: the one that adds them


def _parts(leaves: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """The branches that the leaves are sums of, looking through casts and dropout."""
    for leaf in leaves:
        if is_sum(leaf) or any(packet(leaf) in kind for kind in (CASTS, COPIES, DROPOUTS)):
            yield from _parts([source for source in leaf.args[:2] if isinstance(source, fx.Node)])
        else:
            yield leaf


def _owner(leaf: fx.Node, site: Site, flow: Dataflow, adder: list[str]) -> str:
    """The outermost module called for the branch below what it shares with the module that adds.

    Without one, the weight that is read. A list or dict of modules is never called, so that of two lists of layers side
    by side (`for attn, ff in layers: ...`) each layer has its own name.
    """
    node = _last_weighted(leaf, site, flow)
    if node is None:
        return ""
    path = module_path(node).split(".") if module_path(node) else []
    common = 0
    while common < min(len(path), len(adder)) and path[common] == adder[common]:
        common += 1
    if common < len(path):
        called = [one for one in module_paths(node) if one.split(".")[: common + 1] == path[: common + 1]]
        return min(called, key=len, default=".".join(path))
    weights = [name for source in node.all_input_nodes if (name := parameter_behind(source))]
    return weights[0] if weights else ".".join(path)


def _last_weighted(leaf: fx.Node, site: Site, flow: Dataflow) -> fx.Node | None:
    """The last op of a branch that multiplies by a matrix; else by any parameter; else that mixes."""
    fallback: list[fx.Node | None] = [None, None]
    for node in flow.members(flow.between(site.merge.base, [leaf])):
        trained = any(parameter_behind(source) for source in node.all_input_nodes)
        if trained and any(packet(node) in kind for kind in (PRODUCTS, CONVOLUTIONS)):
            return node
        if fallback[0] is None and any(is_trainable(source) for source in node.all_input_nodes):
            fallback[0] = node
        if fallback[1] is None and not is_local(node):
            fallback[1] = node
    return fallback[0] or fallback[1]
