"""Look at the coefficients of a converted model: how streams are read, mixed and written, and what mixing amplifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_compile.conversion import conversion
from mhc_compile.errors import ConfigError, ShapeError, wrong
from mhc_compile.trace import rewritten

mhc = torch.ops.mhc


@dataclass(frozen=True)
class SiteCoefficients:
    """The coefficients of one site for the tokens of one call: pre, post [tokens, n], res [tokens, n, n]."""

    name: str
    trunk: int
    pre: Tensor
    post: Tensor
    res: Tensor


@dataclass(frozen=True)
class Gain:
    """Amax gains (arXiv 2512.24880, figures 3 and 7), means over tokens.

    forward: largest absolute row sum, backward: largest absolute column sum.
    """

    forward: float
    backward: float


@torch.no_grad()
def observe(model: nn.Module, inputs: Any = None) -> dict[str, SiteCoefficients]:
    """Run a converted model once, op by op, and give the coefficients of each site, in the order of the sites.

    inputs: as for `mhc_compile`. The model's buffers and the random state are left as they were.
    """
    if conversion(model).record.config.n == 1:
        raise ConfigError(wrong("n", 1, "a model converted with n >= 2", "with one stream there are no coefficients"))
    result = rewritten(model, inputs)
    recorder = _Recorder(result.graph)
    arguments = [value.clone() if isinstance(value, Tensor) else value for value in result.arguments]
    with torch.random.fork_rng(devices=[]):
        recorder.run(*arguments)
    found = {}
    for site in result.analysis.sites:
        seen = recorder.seen[site.name]
        found[site.name] = SiteCoefficients(site.name, site.trunk, seen["pre"], seen["post"], seen["res"])
    return found


class _Recorder(fx.Interpreter):
    """Runs a rewritten graph and keeps what its coefficient and Sinkhorn ops give."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[str, dict[str, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        seen = self.seen.setdefault(n.meta.get("mhc_site", ""), {})
        if n.target in (mhc.coefficients.default, mhc.gates.default):
            seen["pre"], seen["post"] = (part.flatten(0, -2) for part in result[:2])
            streams = seen["pre"].shape[-1]
            seen["res"] = torch.eye(streams).to(seen["pre"]).expand(len(seen["pre"]), streams, streams)  # if no op says
        elif n.target in (mhc.sinkhorn.default, mhc.constrain.default):
            seen["res"] = result.flatten(0, -3)
        return result


def gain(res: Tensor) -> Gain:
    """The Amax gain of mixing matrices [tokens, n, n], rows being output streams. ShapeError for other shapes."""
    _check_matrices(res)
    return Gain(_largest_sum(res, -1), _largest_sum(res, -2))


def composite_gains(matrices: Sequence[Tensor]) -> list[Gain]:
    """The gain of the product of the first 1, 2, ... sites of a trunk, in fp64.

    matrices: res [tokens, n, n] of each site in order, all for the same tokens.
    """
    gains = []
    product: Tensor | None = None
    for res in matrices:
        _check_matrices(res, None if product is None else product.shape)
        product = res.double() if product is None else res.double() @ product
        gains.append(gain(product))
    return gains


def _check_matrices(res: Tensor, shape: torch.Size | None = None) -> None:
    legal = "[tokens, n, n]" if shape is None else f"{list(shape)}, that of the sites before"
    if res.dim() != 3 or res.shape[-1] != res.shape[-2] or (shape is not None and res.shape != shape):
        step = "take .res of what observe gives, of one trunk and one call"
        raise ShapeError(wrong("the mixing matrices", list(res.shape), legal, step))


def _largest_sum(res: Tensor, axis: int) -> float:
    return float(res.abs().sum(axis).amax(-1).mean())
