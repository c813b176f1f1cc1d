"""Give a graph that was captured without mHC parameters inputs for them, behind its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from mhc_compile import _torch
from mhc_compile.config import MHCConfig
from mhc_compile.passes.capture import GraphInput
from mhc_compile.passes.expand import Parameters
from mhc_compile.passes.trunks import Site
from mhc_compile.site_form import SiteForm


def bind_parameters(gm: fx.GraphModule, sites: list[Site], config: MHCConfig) -> tuple[Parameters, list[str]]:
    """Add inputs `site.phi`, `site.alpha`, `site.bias` for every site, in that order, as far as it has them.

    Gives the look-up that the rewrite asks for, and the names in the order of the new inputs; tied sites have one.
    """
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    fake_mode = _torch.fake_mode_of([node.meta.get("val") for node in placeholders])
    made: dict[str, fx.Node] = {}
    place = placeholders[-1] if placeholders else None
    for site in sites:
        for part, shape in SiteForm.of(config, site.constraint).shapes(site.features).items():
            name = f"{site.name}.{part}"
            if name not in made:
                place = _placeholder(gm, name, _like(site, shape), fake_mode, place)
                made[name] = place

    return named_parameters(made, config), list(made)


def named_parameters(nodes: Mapping[str, fx.Node], config: MHCConfig) -> Parameters:
    """The look-up of each site's parameters among nodes that are named `site.phi` and so on."""

    def look_up(site: Site) -> dict[str, fx.Node]:
        return {part: nodes[f"{site.name}.{part}"] for part in SiteForm.of(config, site.constraint).parameters}

    return look_up


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


def _like(site: Site, shape: tuple[int, ...]) -> torch.Tensor:
    state = site.merge.base.meta["val"]
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=state.device)
