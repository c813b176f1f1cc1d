"""The coefficients of a converted model's sites in one call, taken from the rewritten graph as it runs op by op.

The graph of level-1 ops is run without gradients and only as far as its last site; what it would write into (buffers,
arguments) it gets as copies, and the random state is put back. So a call that is looked at leaves no trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_compile import _torch
from mhc_compile.backend import ConvertingBackend, normalized
from mhc_compile.conversion import conversion
from mhc_compile.errors import ConfigError, wrong
from mhc_compile.gains import stream_similarity
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.record import Record
from mhc_compile.trace import rewritten

mhc = torch.ops.mhc


@dataclass(frozen=True)
class SiteCoefficients:
    """The coefficients of one site for the tokens of one call: pre, post [tokens, n], res [tokens, n, n].

    similarity: of the streams behind the site, [tokens]: the mean cosine over pairs of streams, 1 when all are equal.
    iterations: of the Sinkhorn that made res, None where none did.
    """

    name: str
    trunk: int
    pre: Tensor
    post: Tensor
    res: Tensor
    similarity: Tensor
    iterations: int | None = None


def observe(model: nn.Module, inputs: Any = None) -> dict[str, SiteCoefficients]:
    """Run a converted model once, op by op, and give the coefficients of each site, in the order of the sites.

    inputs: as for `mhc_compile`. The model's buffers and the random state are left as they were. A site that is applied
    several times (tied layers) is there once for each application, as `name`, `name_call1`, ...
    """
    record = conversion(model).record
    if record.config.n == 1:
        raise ConfigError(wrong("n", 1, "a model converted with n >= 2", "with one stream there are no coefficients"))
    result = rewritten(model, inputs)
    seen = ObservedGraph(result.graph, record).run(result.arguments)
    return {site.name: site for site in seen}


class ObservedGraph:
    """A rewritten graph of level-1 ops, cut down to what its sites need."""

    def __init__(self, graph: fx.GraphModule, record: Record) -> None:
        self.graph = graph
        self.trunk_of = {site.name: site.trunk for site in record.sites}
        _end_at_last_site(graph)
        self._written = _written_inputs(graph)

    @torch.no_grad()
    def run(self, arguments: Sequence[Any]) -> list[SiteCoefficients]:
        """The sites, in the order of their merges, for the flat arguments of one call."""
        own = [
            value.clone() if isinstance(value, Tensor) and (written or not isinstance(value, nn.Parameter)) else value
            for value, written in zip(arguments, self._written, strict=True)
        ]
        recorder = _Recorder(self.graph, self.trunk_of)
        with _random_state_kept(own):
            recorder.run(*own)
        return recorder.sites


class _Recorder(fx.Interpreter):
    """Runs a rewritten graph and keeps what its merges take, and the pre beside each post."""

    def __init__(self, graph: fx.GraphModule, trunk_of: dict[str, int]) -> None:
        super().__init__(graph)
        self.sites: list[SiteCoefficients] = []
        self._trunk_of, self._calls = trunk_of, Counter[str]()
        merges = graph.graph.find_nodes(op="call_function", target=mhc.merge.default)
        self._coefficients = {_coefficients_behind(merge) for merge in merges}
        self._pre: dict[fx.Node, Tensor] = {}  # by the node of the coefficients

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._coefficients:
            self._pre[n] = result[0].flatten(0, -2)
        elif n.target is mhc.merge.default:
            self._keep(n, result)
        return result

    def _keep(self, merge: fx.Node, streams: Tensor) -> None:
        by, mixing = merge.args[2:4]
        post: Tensor = self.env[by].flatten(0, -2)  # type: ignore[index]
        res = self.env[mixing] if isinstance(mixing, fx.Node) else None
        site, n = str(merge.meta["mhc_site"]), post.shape[-1]
        if res is None:  # no mixing
            res = torch.eye(n, dtype=post.dtype, device=post.device).expand(len(post), n, n)
        call = self._calls[site]
        self._calls[site] += 1
        self.sites.append(
            SiteCoefficients(
                name=f"{site}_call{call}" if call else site,
                trunk=self._trunk_of[site],
                pre=self._pre[_coefficients_behind(merge)],
                post=post,
                res=res.flatten(0, -3),
                similarity=stream_similarity(streams).flatten(),
                iterations=_iterations(mixing),
            )
        )


def _coefficients_behind(merge: fx.Node) -> fx.Node:
    """The op that gives a merge its post, and pre beside it."""
    post: Any = merge.args[2]
    source: fx.Node = post.args[0]
    return source


def _iterations(res: Any) -> int | None:
    """Of the Sinkhorn that made res, if one did."""
    made = isinstance(res, fx.Node) and res.target is mhc.sinkhorn.default
    return int(res.args[1]) if made else None


def _end_at_last_site(graph: fx.GraphModule) -> None:
    """Drop what comes behind the last site (heads, losses), and the switches of the grad mode, which stays off."""
    for node in list(graph.graph.nodes):
        if node.target is _torch.set_grad_enabled:
            graph.graph.erase_node(node)
    (output,) = graph.graph.find_nodes(op="output")
    output.args = (tuple(graph.graph.find_nodes(op="call_function", target=mhc.merge.default)),)
    graph.graph.eliminate_dead_code()
    output.args = ((),)  # no more than the last streams have to stay until the end
    graph.recompile()


def _written_inputs(graph: fx.GraphModule) -> list[bool]:
    flow = Dataflow(graph.graph)
    return [flow.is_mutated(node) for node in graph.graph.find_nodes(op="placeholder")]


def _random_state_kept(values: Sequence[Any]) -> Any:
    """A context that puts back the random state of the CPU and of the devices that hold these values."""
    devices = {value.device for value in values if isinstance(value, Tensor) and value.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    return torch.random.fork_rng(devices=[device for device in devices if device.type == kind], device_type=kind)


class _Seen(Exception):
    """Carries what was seen out of a compiled call.

    Dynamo carries out what a forward does to Python objects (a counter, a list of outputs) behind the graph: a call
    that ends within the graph does nothing of it.
    """

    def __init__(self, sites: list[SiteCoefficients]) -> None:
        self.sites = sites


@dataclass
class ObservingBackend:
    """A Dynamo backend behind the anchored forward of a converted model: its call ends in `_Seen`."""

    record: Record
    parameters: list[str]

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        """Dynamo's backend interface."""
        graph = normalized(gm, [])
        ConvertingBackend(self.record, self.parameters).rewrite(graph)
        observed = ObservedGraph(graph, self.record)

        def run(*arguments: Any) -> Any:
            raise _Seen(observed.run(arguments))

        return run


def sites_of_call(
    forward: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[SiteCoefficients]:
    """The sites of one call of an anchored forward that an ObservingBackend compiled."""
    try:
        forward(model, *args, **kwargs)
    except _Seen as seen:
        return seen.sites
    raise AssertionError("a forward with an anchor has a graph")
