"""Give a graph that was captured without mHC parameters inputs for them, behind its own."""

from __future__ import annotations

import torch
from torch import fx

from mhc_compile import _torch
from mhc_compile.passes.capture import GraphInput
from mhc_compile.passes.expand import Parameters
from mhc_compile.passes.trunks import Site

PARTS = ("phi", "alpha", "bias")


def bind_parameters(gm: fx.GraphModule, sites: list[Site], n: int) -> tuple[Parameters, list[str]]:
    """Add inputs `site.phi`, `site.alpha`, `site.bias` for every site, in that order.

    Gives the look-up that the rewrite asks for, and the names in the order of the new inputs; tied sites have one.
    """
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    fake_mode = _torch.fake_mode_of([node.meta.get("val") for node in placeholders])
    made: dict[str, fx.Node] = {}
    place = placeholders[-1] if placeholders else None
    for site in sites:
        for part in PARTS:
            name = f"{site.name}.{part}"
            if name not in made:
                place = _placeholder(gm, name, _like(site, part, n), fake_mode, place)
                made[name] = place

    def look_up(site: Site) -> tuple[fx.Node, fx.Node, fx.Node]:
        return made[f"{site.name}.phi"], made[f"{site.name}.alpha"], made[f"{site.name}.bias"]

    return look_up, list(made)


def _placeholder(
    gm: fx.GraphModule,
    name: str,
    like: torch.Tensor,
    fake_mode: _torch.FakeTensorMode | None,
    after: fx.Node | None,
) -> fx.Node:
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(after) if after is not None else gm.graph.inserting_before(first):
        node = gm.graph.placeholder("mhc_" + name.replace(".", "_"))
    node.meta["val"] = like if fake_mode is None else fake_mode.from_tensor(like, static_shapes=True)
    node.meta["mhc_input"] = GraphInput("parameter", f"mhc.{name}")
    return node


def _like(site: Site, part: str, n: int) -> torch.Tensor:
    columns = n * n + 2 * n
    shape = {"phi": (n * site.features, columns), "alpha": (3,), "bias": (columns,)}[part]
    state = site.merge.base.meta["val"]
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=state.device)
