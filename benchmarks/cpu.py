"""A site, and training with sites, on a CPU: plain torch, compiled bodies, and what else there is.

python benchmarks/cpu.py [--rounds 9] [--threads 2] [--peer DIR] [--only site|training] [--out FILE]

All contestants run in one process and in turn; a turn is one call to warm up and three that count, and a figure is the
median of all that counted, in milliseconds. A ratio is another's time over ours: above 1 we are faster. First calls are
in seconds, with empty caches. Before it is timed, each contestant of the same function is checked against the others.

Contestants: a module that follows the formulas of the paper (tokens first, einsum, twenty iterations one by one), eager
and under torch.compile; the package `hyper-connections` in its mHC mode (another function: its phi is one for all
streams), where --peer names a directory that holds it; and this package: its ops as they are, its ops with compiled
bodies, and a converted Llama with each backend.

    pip install --no-deps --target DIR hyper-connections einops torch-einops-utils
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile import mhc_compile
from mhc_compile.kernels import cpu_library, site_ops

N, ITERATIONS, EPS = 4, 20, 1e-6
SIZES = ((512, 256), (2048, 512), (2048, 1280))  # tokens, features
LAYERS, WIDTH, BATCH, LENGTH = 6, 256, 4, 128
Call = Callable[[], Any]


# --- the formulas, as one would write them ----------------------------------------------------------------


def coefficients(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and res."""
    n = streams.shape[-2]
    x = streams.flatten(-2)
    z = (x @ phi) * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    pre = torch.sigmoid(alpha[0] * z[..., :n] + bias[:n])
    post = 2 * torch.sigmoid(alpha[1] * z[..., n : 2 * n] + bias[n : 2 * n])
    logits = (alpha[2] * z[..., 2 * n :] + bias[2 * n :]).unflatten(-1, (n, n))
    res = torch.exp(logits - logits.amax(-2, keepdim=True))
    for _ in range(ITERATIONS):
        res = res / res.sum(-2, keepdim=True)
        res = res / res.sum(-1, keepdim=True)
    return pre, post, res


def naive_site(streams: Tensor, parameters: tuple[Tensor, ...], branch: Callable[[Tensor], Tensor]) -> Tensor:
    """One site."""
    u, post, res = _naive_read(streams, *parameters)
    return _naive_merge(streams, branch(u), post, res)


def _naive_read(streams: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pre, post, res = coefficients(streams, *parameters)
    return torch.einsum("...n,...nc->...c", pre, streams), post, res


def _naive_merge(streams: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    return torch.einsum("...ij,...jc->...ic", res, streams) + post.unsqueeze(-1) * f.unsqueeze(-2)


def our_site(
    streams: Tensor,
    parameters: tuple[Tensor, ...],
    branch: Callable[[Tensor], Tensor],
    compiled: bool = False,
) -> Tensor:
    """One site, by the two ops that a conversion compiles it to; `compiled` as with backend="inductor"."""
    u, _, post, res, carrier = site_ops.read(streams, *parameters, EPS, ITERATIONS, compiled=compiled)
    return site_ops.merge_carried(streams, branch(u), carrier, post, res, compiled=compiled)


def our_compiled_site(streams: Tensor, parameters: tuple[Tensor, ...], branch: Callable[[Tensor], Tensor]) -> Tensor:
    """One site whose bodies are compiled."""
    return our_site(streams, parameters, branch, compiled=True)


# --- turns ------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """What is timed; `first` are the seconds of its first call."""

    name: str
    call: Call
    first: float = 0.0
    times: list[float] = field(default_factory=list)

    def turn(self, calls: int = 3) -> None:
        self.call()
        for _ in range(calls):
            start = time.perf_counter()
            self.call()
            self.times.append(time.perf_counter() - start)


def race(contestants: list[Contestant], rounds: int) -> dict[str, float]:
    """The median milliseconds of each."""
    for one in contestants:
        forget_compilations()
        start = time.perf_counter()
        one.call()
        one.first = time.perf_counter() - start
    for _ in range(rounds):
        for one in contestants:
            one.turn()
    return {one.name: round(1e3 * median(one.times), 3) for one in contestants}


def forget_compilations() -> None:
    """An empty cache on disk; what is compiled in memory stays."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="mhc_cpu_")


def ratios(times: dict[str, float], ours: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Other's time over ours."""
    others = [name for name in times if name not in ours]
    return {mine: {other: round(times[other] / times[mine], 2) for other in others} for mine in ours}


# --- one site ---------------------------------------------------------------------------------------------


def site_inputs(tokens: int, features: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    k = N * N + 2 * N
    phi = torch.randn(N * features, k) / (N * features) ** 0.5
    parameters = phi, torch.tensor([0.5, 1.0, 1.0]), torch.randn(k)
    return torch.randn(1, tokens, N, features), tuple(one.requires_grad_() for one in parameters)


def compare_sites(peer: Any, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for tokens, features in SIZES:
        streams, parameters = site_inputs(tokens, features)
        grad = torch.randn_like(streams)
        check_sites(streams, parameters, grad)
        for backward in (False, True):
            contestants = site_contestants(streams, parameters, grad, backward)
            if peer is not None:
                contestants.append(Contestant("hyper-connections", peer_site(peer, streams, grad, backward)))
            times = race(contestants, rounds)
            row = {
                "tokens": tokens,
                "features": features,
                "what": "forward and backward" if backward else "forward",
                "ms": times,
                "ratios": ratios(times, ("ours", "ours, compiled bodies")),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        torch._dynamo.reset()
    return rows


def site_contestants(streams: Tensor, parameters: tuple[Tensor, ...], grad: Tensor, backward: bool) -> list[Contestant]:
    def steps(function: Any) -> Call:
        return site_call(lambda x: function(x, parameters, lambda u: u), streams, grad, backward)

    return [
        Contestant("naive eager", steps(naive_site)),
        Contestant("naive torch.compile", steps(torch.compile(naive_site))),
        Contestant("ours", steps(our_site)),
        Contestant("ours, compiled bodies", steps(our_compiled_site)),
    ]


def first_calls() -> dict[str, Any]:
    """Seconds of the first forward and of the first backward, on top of what a second one takes."""
    streams, parameters = site_inputs(2048, 512)

    def seconds(function: Any) -> list[float]:
        start = time.perf_counter()
        merged = function(streams.detach().requires_grad_(), parameters, torch.tanh)
        between = time.perf_counter()
        merged.sum().backward()
        return [round(between - start, 1), round(time.perf_counter() - between, 1)]

    torch.compile(lambda x: x + 1)(torch.ones(3))  # what a process pays once: imports, compiler checks
    found = {}
    for cache in ("empty cache", "warm cache"):
        if cache == "empty cache":
            forget_compilations()
        torch._dynamo.reset()
        found[f"naive torch.compile, {cache}"] = seconds(torch.compile(naive_site))
        cpu_library._libraries.clear()
        found[f"ours, compiled bodies, {cache}"] = seconds(our_compiled_site)
    print(json.dumps(found), flush=True)
    return found


def site_call(function: Callable[[Tensor], Tensor], streams: Tensor, grad: Tensor, backward: bool) -> Call:
    def forward() -> Tensor:
        with torch.no_grad():
            return function(streams)

    def both() -> None:
        x = streams.detach().requires_grad_()
        function(x).backward(grad)

    return both if backward else forward


def peer_site(peer: Any, streams: Tensor, grad: Tensor, backward: bool) -> Call:
    """One site of `hyper-connections`, whose streams are in the batch: [n, T, C]."""
    site = peer.mHC(N, dim=streams.shape[-1], layer_index=0, sinkhorn_iters=ITERATIONS, branch=nn.Identity())
    own, own_grad = (one.squeeze(0).transpose(0, 1).contiguous() for one in (streams, grad))
    return site_call(site, own, own_grad, backward)


def check_sites(streams: Tensor, parameters: tuple[Tensor, ...], grad: Tensor) -> None:
    """The same output and gradients from the formulas, from our ops, and with compiled bodies."""

    def results(function: Any) -> list[Tensor]:
        x = streams.detach().requires_grad_()
        merged = function(x, parameters, torch.tanh)
        return [merged.detach(), *torch.autograd.grad(merged, [x, *parameters], grad)]

    for a, *others in zip(*map(results, (naive_site, our_site, our_compiled_site)), strict=True):
        for other in others:
            error = ((a - other).abs().max() / a.abs().max()).item()
            if error > 2e-4:
                raise SystemExit(f"the contestants disagree: a relative error of {error:.1g}")


# --- a training step --------------------------------------------------------------------------------------


def llama() -> nn.Module:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


class Streams(nn.Module):
    """A Llama whose trunk has n streams, its sites written by hand; `sites` maps a branch's number to its site."""

    def __init__(self, model: nn.Module, sites: list[Any], expand: Callable[..., Tensor], mean: Callable[..., Tensor]):
        super().__init__()
        self.model, self.sites, self.expand, self.mean = model, sites, expand, mean
        self.held = nn.ModuleList(one for one in sites if isinstance(one, nn.Module))

    def forward(self, input_ids: Tensor) -> Tensor:
        trunk = self.model.model
        x = trunk.embed_tokens(input_ids)
        positions = trunk.rotary_emb(x, torch.arange(x.shape[1]).unsqueeze(0))
        streams = self.expand(x)
        for number, layer in enumerate(trunk.layers):

            def attention(u: Tensor, layer: Any = layer) -> Tensor:
                normed = layer.input_layernorm(u)
                out: Tensor = layer.self_attn(normed, position_embeddings=positions, attention_mask=None)[0]
                return out

            def mlp(u: Tensor, layer: Any = layer) -> Tensor:
                out: Tensor = layer.mlp(layer.post_attention_layernorm(u))
                return out

            streams = self.sites[2 * number](streams, attention)
            streams = self.sites[2 * number + 1](streams, mlp)
        logits: Tensor = self.model.lm_head(trunk.norm(self.mean(streams)))
        return logits


class NaiveSite(nn.Module):
    """The parameters of one site of a converted model, and the formulas."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.own = nn.ParameterList(nn.Parameter(one.detach().clone()) for one in (site.phi, site.alpha, site.bias))

    def forward(self, streams: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        return naive_site(streams, tuple(self.own), branch)


class CompiledNaiveSite(NaiveSite):
    """The same, compiled but for its branch, once for all sites.

    In one graph the unrolled Sinkhorns of twelve sites keep inductor busy for more than ten minutes.
    """

    read = staticmethod(torch.compile(lambda *args: _naive_read(*args)))
    merge = staticmethod(torch.compile(lambda *args: _naive_merge(*args)))

    def forward(self, streams: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        u, post, res = self.read(streams, *self.own)
        merged: Tensor = self.merge(streams, branch(u), post, res)
        return merged


def converted(backend: str) -> nn.Module:
    """A converted Llama whose sites are not at their initialisation."""
    model = mhc_compile(llama(), N, example_inputs={"input_ids": token_ids()}, backend=backend)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.mhc.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[0] ** 0.5)
    return model


def naive_llama(make: type[NaiveSite] = NaiveSite) -> nn.Module:
    """The same model written by hand."""
    sites = [one for one in converted("eager").mhc.modules() if hasattr(one, "phi")]
    return Streams(llama(), [make(one) for one in sites], lambda x: x.unsqueeze(-2).repeat(1, 1, N, 1), _mean)


def peer_llama(peer: Any) -> nn.Module:
    """With the sites of `hyper-connections`."""
    make, expand, reduce = peer.mc_get_init_and_expand_reduce_stream_functions(N, dim=WIDTH, sinkhorn_iters=ITERATIONS)

    class Site(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.site = make(layer_index=number)

        def forward(self, streams: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
            u, add = self.site(streams)
            out: Tensor = add(branch(u))
            return out

    return Streams(llama(), [Site(number) for number in range(2 * LAYERS)], expand, reduce)


def _mean(streams: Tensor) -> Tensor:
    return streams.mean(-2)


def token_ids() -> Tensor:
    return torch.randint(512, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def training_step(model: nn.Module) -> Call:
    """Forward, loss, backward, and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = token_ids()

    def step() -> None:
        out = model(input_ids=ids)
        logits = out if isinstance(out, Tensor) else out.logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_training(peer: Any, rounds: int) -> dict[str, Any]:
    naive, eager = naive_llama(), converted("eager")
    ids = token_ids()
    with torch.no_grad():
        error = (naive(ids) - eager(input_ids=ids).logits).abs().max().item()
    if error > 1e-3:
        raise SystemExit(f"the hand-written model and the converted one disagree by {error:.1g}")
    contestants = [
        Contestant("no mHC, eager", training_step(llama())),
        Contestant("no mHC, torch.compile", training_step(torch.compile(llama()))),
        Contestant("naive eager", training_step(naive)),
        Contestant("naive torch.compile", training_step(naive_llama(CompiledNaiveSite))),
        Contestant('ours, backend="eager"', training_step(eager)),
        Contestant('ours, backend="aot_eager"', training_step(converted("aot_eager"))),
        Contestant('ours, backend="inductor"', training_step(converted("inductor"))),
    ]
    if peer is not None:
        contestants.append(Contestant("hyper-connections", training_step(peer_llama(peer))))
    times = race(contestants, rounds)
    row = {
        "model": f"Llama, {LAYERS} layers of width {WIDTH}, {BATCH} x {LENGTH} tokens, AdamW",
        "ms": times,
        "ratios": ratios(times, tuple(name for name in times if name.startswith("ours"))),
        "first_step_s": {one.name: round(one.first, 1) for one in contestants},
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Race the sites and the models, and print or save the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--only", choices=("site", "training"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peer is not None:
        sys.path.insert(0, str(options.peer))
    peer = None if options.peer is None else importlib.import_module("hyper_connections")
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads",
        "platform": platform.platform(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 1),  # other processes: above 1 the times are not to be trusted
        "n": N,
        "iterations": ITERATIONS,
        "dtype": "float32",
    }
    if options.only != "training":
        result["first_site_s"] = {"[forward, backward]": first_calls()}
        result["site"] = compare_sites(peer, options.rounds)
    if options.only != "site":
        result["training"] = compare_training(peer, options.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
