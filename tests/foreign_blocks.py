"""mHC as people write it: blocks of a few sites in plain torch, each another spelling, and blocks that nearly are mHC.

Every block maps [batch, tokens, C] to the same shape through streams, two sites with a linear branch each, and an exit.
`BLOCKS` names for each what a matcher has to find in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N, C, BATCH, TOKENS, ITERATIONS, EPS = 4, 8, 2, 5, 6, 1e-6

# ---------------------------------------------------------------------------------------------- Sinkhorn


def column_first(a: Tensor) -> Tensor:
    m = a.exp()
    for _ in range(ITERATIONS):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def row_first(a: Tensor) -> Tensor:
    m = torch.exp(a - a.amax(dim=(-2, -1), keepdim=True))
    for _ in range(ITERATIONS):
        m = m / m.sum(dim=-1).unsqueeze(-1)
        m = m / m.sum(dim=-2).unsqueeze(-2)
    return m


def softmax_start(a: Tensor) -> Tensor:
    m = torch.softmax(a, dim=-2)
    m = m * torch.reciprocal(m.sum(-1, keepdim=True))
    for _ in range(ITERATIONS - 1):
        m = m * (1 / m.sum(-2, keepdim=True))
        m = m * (1 / m.sum(-1, keepdim=True))
    return m


def deepseek(a: Tensor) -> Tensor:
    m = torch.softmax(a, dim=-1) + EPS
    m = m / (m.sum(-2, keepdim=True) + EPS)
    for _ in range(ITERATIONS - 1):
        m = m / (m.sum(-1, keepdim=True) + EPS)
        m = m / (m.sum(-2, keepdim=True) + EPS)
    return m


def log_domain(a: Tensor) -> Tensor:
    for _ in range(ITERATIONS):
        a = a - torch.logsumexp(a, dim=-2, keepdim=True)
        a = a - a.logsumexp(-1).unsqueeze(-1)
    return a.exp()


def log_softmax(a: Tensor) -> Tensor:
    for _ in range(ITERATIONS):
        a = F.log_softmax(a, dim=-2)
        a = F.log_softmax(a, dim=-1)
    return torch.exp(a)


def normalize(a: Tensor) -> Tensor:
    m = (a - a.amax(-2, keepdim=True).detach()).exp()
    for _ in range(ITERATIONS):
        m = F.normalize(m, p=1, dim=-2)
        m = F.normalize(m, p=1, dim=-1)
    return m


def in_place(a: Tensor) -> Tensor:
    m = a.exp()
    for _ in range(ITERATIONS):
        m /= m.sum(-2, keepdim=True)
        m.div_(m.sum(-1, keepdim=True))
    return m


def tokens_last(a: Tensor) -> Tensor:
    m = a.flatten(0, 1).permute(1, 2, 0).exp()
    for _ in range(ITERATIONS):
        m = m / m.sum(0, keepdim=True)
        m = m / m.sum(1, keepdim=True)
    return m.permute(2, 0, 1).unflatten(0, a.shape[:2])


# Nearly Sinkhorn.


def without_a_column_step(a: Tensor) -> Tensor:
    m = a.exp()
    for t in range(ITERATIONS):
        if t != 2:
            m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def eps_in_one_place(a: Tensor) -> Tensor:
    m = a.exp()
    for _ in range(ITERATIONS):
        m = m / (m.sum(-2, keepdim=True) + EPS)
        m = m / m.sum(-1, keepdim=True)
    return m


def eps_not_behind_the_softmax(a: Tensor) -> Tensor:
    m = torch.softmax(a, dim=-1)
    m = m / (m.sum(-2, keepdim=True) + EPS)
    for _ in range(ITERATIONS - 1):
        m = m / (m.sum(-1, keepdim=True) + EPS)
        m = m / (m.sum(-2, keepdim=True) + EPS)
    return m


def clamped(a: Tensor) -> Tensor:
    m = a.exp()
    for _ in range(ITERATIONS):
        m = m / m.sum(-1, keepdim=True).clamp(min=1e-6)
        m = m / m.sum(-2, keepdim=True).clamp(min=1e-6)
    return m


def half_iteration(a: Tensor) -> Tensor:
    m = column_first(a)
    return m / m.sum(-2, keepdim=True)


def shifted_along_rows(a: Tensor) -> Tensor:
    return column_first(a - a.amax(-1, keepdim=True))


# ---------------------------------------------------------------------------------------------- coefficients


class Coefficients(nn.Module):
    """SPEC's formula: one projection, the division by r behind it; the other classes spell it otherwise."""

    sinkhorn: Callable[[Tensor], Tensor]

    def __init__(self, sinkhorn: Callable[[Tensor], Tensor] = column_first, gate: Any = torch.sigmoid) -> None:
        super().__init__()
        self.sinkhorn, self.gate = sinkhorn, gate
        self.phi = nn.Parameter(torch.randn(N * C, 2 * N + N * N) / 4)
        self.alpha = nn.Parameter(torch.rand(3) + 0.5)
        self.bias = nn.Parameter(torch.randn(2 * N + N * N))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.flatten(-2).to(self.phi.dtype)
        r = torch.sqrt(flat.square().mean(-1, keepdim=True) + EPS)
        z = flat @ self.phi / r
        pre = self.gate(self.alpha[0] * z[..., :N] + self.bias[:N])
        post = 2 * self.gate(self.alpha[1] * z[..., N : 2 * N] + self.bias[N : 2 * N])
        res = self.alpha[2] * z[..., 2 * N :] + self.bias[2 * N :]
        return pre, post, self.sinkhorn(res.unflatten(-1, (N, N)))


class ThreeProjections(nn.Module):
    """A weighted RMSNorm, a linear layer for each coefficient, and no alpha but one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(N * C, eps=EPS)
        self.to_pre, self.to_post = nn.Linear(N * C, N), nn.Linear(N * C, N)
        self.to_res = nn.Linear(N * C, N * N, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.b = nn.Parameter(torch.randn(N, N))
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(x.reshape(*x.shape[:-2], -1))
        res = self.scale * self.to_res(h).view(*h.shape[:-1], N, N) + self.b
        return self.to_pre(h).sigmoid(), self.to_post(h).sigmoid().mul(2.0), column_first(res)


class Contracted(Coefficients):
    """An einsum over streams and features, the norm before it, weights in the layout [out, n, C]."""

    def __init__(self) -> None:
        super().__init__(log_domain)
        self.w = nn.Parameter(torch.randn(2 * N + N * N, N, C) / 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = x * torch.rsqrt(x.pow(2).mean(dim=(-2, -1), keepdim=True) + EPS)
        a = torch.einsum("btnc,knc->btk", normed, self.w)
        pre, post, res = a.split([N, N, N * N], dim=-1)
        b_pre, b_post, b_res = self.bias.split([N, N, N * N])
        alpha = self.alpha.unbind()
        return (
            torch.sigmoid(pre * alpha[0] + b_pre) + EPS,
            2 * torch.sigmoid(post * alpha[1] + b_post),
            self.sinkhorn((res * alpha[2] + b_res).reshape(*res.shape[:-1], N, N)),
        )


class ClampedNorm(Coefficients):
    """eps outside of the root: another function."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.flatten(-2)
        z = flat @ self.phi / (flat.square().mean(-1, keepdim=True).sqrt() + EPS)
        pre, post, res = (self.alpha.repeat_interleave(torch.tensor([N, N, N * N])) * z + self.bias).split(
            [N, N, N * N], -1
        )
        return pre.sigmoid(), 2 * post.sigmoid(), self.sinkhorn(res.unflatten(-1, (N, N)))


# ---------------------------------------------------------------------------------------------- merges


def read(x: Tensor, pre: Tensor) -> Tensor:
    return (pre.unsqueeze(-1) * x).sum(-2)


def read_by_matmul(x: Tensor, pre: Tensor) -> Tensor:
    return (pre.unsqueeze(-2) @ x).squeeze(-2)


def write(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    return torch.einsum("btij,btjc->btic", res, x) + post.unsqueeze(-1) * f.unsqueeze(-2)


def write_by_matmul(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    return post[..., None] * f[..., None, :] + torch.matmul(res, x)


def write_by_bmm(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    mixed = torch.bmm(res.flatten(0, 1), x.flatten(0, 1)).view_as(x)
    return mixed + torch.matmul(post.unsqueeze(-1), f.unsqueeze(-2))


def write_by_products(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    mixed = (res.unsqueeze(-1) * x.unsqueeze(-3)).sum(-2)
    return mixed + torch.einsum("bti,btc->btic", post, f)


def write_transposed(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    return write(x, f, post, res.mT)


def write_scaled(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    return write(x, f, post, res) + 0.1 * x


class Block(nn.Module):
    """Two sites in the layout [batch, tokens, n, C]."""

    def __init__(
        self,
        coefficients: Callable[[], nn.Module] = Coefficients,
        read: Callable[..., Tensor] = read,
        write: Callable[..., Tensor] = write,
    ) -> None:
        super().__init__()
        self.coefficients = nn.ModuleList(coefficients() for _ in range(2))
        self.branches = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.read, self.write = read, write

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-2).expand(-1, -1, N, -1).contiguous()
        for coefficients, branch in zip(self.coefficients, self.branches, strict=True):
            pre, post, res = coefficients(x)
            x = self.write(x, branch(self.read(x, pre)).tanh(), post, res)
        return x.mean(-2)


class Flat(Block):
    """The streams side by side in one dimension: [batch, tokens, n C]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, 1, N)
        for coefficients, branch in zip(self.coefficients, self.branches, strict=True):
            state = x.view(*x.shape[:-1], N, C)
            pre, post, res = coefficients(state)
            f = branch(read_by_matmul(state, pre)).tanh()
            x = write_by_matmul(state, f, post, res).flatten(-2)
        return x.view(*x.shape[:-1], N, C).mean(-2)


class Folded(Block):
    """The streams in the batch: [batch n, tokens, C]."""

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = x.repeat_interleave(N, dim=0)
        for coefficients, branch in zip(self.coefficients, self.branches, strict=True):
            state = x.unflatten(0, (batch, N)).permute(0, 2, 1, 3)
            pre, post, res = coefficients(state)
            x = write(state, branch(read(state, pre)).tanh(), post, res).permute(0, 2, 1, 3).flatten(0, 1)
        return x.unflatten(0, (batch, N)).mean(1)


class FeaturesFirst(Block):
    """The streams behind the features: [batch, tokens, C, n]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-1).expand(-1, -1, -1, N).contiguous()
        for coefficients, branch in zip(self.coefficients, self.branches, strict=True):
            pre, post, res = coefficients(x.mT)
            f = branch(torch.einsum("btcn,btn->btc", x, pre)).tanh()
            x = torch.einsum("btcj,btij->btci", x, res) + f.unsqueeze(-1) * post.unsqueeze(-2)
        return x.mean(-1)


class Identity(Block):
    """No mixing: the streams keep what they hold (as Hunyuan V4)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-2).expand(-1, -1, N, -1).contiguous()
        for coefficients, branch in zip(self.coefficients, self.branches, strict=True):
            flat = x.flatten(-2)
            a = F.linear(flat, coefficients.phi.t()[: 2 * N]) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
            pre, post = (a * coefficients.alpha[0] + coefficients.bias[: 2 * N]).chunk(2, -1)
            f = branch(read(x, pre.sigmoid() + EPS)).tanh()
            x = (1.5 * post.sigmoid() + EPS).unsqueeze(-1) * f.unsqueeze(-2) + x
        return x.mean(-2)


class Head(Block):
    """A learned exit: read gates of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fn = nn.Parameter(torch.randn(N, N * C) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-2).expand(-1, -1, N, -1).contiguous()
        for coefficients, branch in zip(self.coefficients, self.branches, strict=True):
            pre, post, res = coefficients(x)
            x = write(x, branch(read(x, pre)).tanh(), post, res)
        flat = x.flatten(2)
        gate = torch.sigmoid(F.linear(flat * torch.rsqrt(flat.pow(2).mean(-1, True) + EPS), self.fn)) + EPS
        return (gate.unsqueeze(-1) * x).sum(2)


class Static(Block):
    """Hyper-connections with coefficients that are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.post = (nn.Parameter(torch.randn(2, N)) for _ in range(2))
        self.res = nn.Parameter(torch.randn(2, N, N))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-2).expand(-1, -1, N, -1).contiguous()
        for site, branch in enumerate(self.branches):
            u = torch.einsum("i,btic->btc", self.pre[site], x)
            f = branch(u).tanh()
            x = torch.matmul(self.res[site], x) + self.post[site].unsqueeze(-1) * f.unsqueeze(-2)
        return x.mean(-2)


class Tanh(Block):
    """Dynamic hyper-connections: coefficients are gated by tanh, their norm is one of each stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-2).expand(-1, -1, N, -1).contiguous()
        for coefficients, branch in zip(self.coefficients, self.branches, strict=True):
            normed = F.rms_norm(x, (C,), eps=EPS)
            a = torch.tanh(normed @ coefficients.phi[:C, : N + 2]) * 0.1
            pre, post = a[..., 0] + coefficients.bias[:N], a[..., 1] + coefficients.bias[N : 2 * N]
            res = a[..., 2:] + torch.eye(N)
            x = write_transposed(x, branch(read(x, pre)).tanh(), post, res)
        return x.mean(-2)


class MiddleState(Block):
    """A Sinkhorn whose state half way is used as well."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-2).expand(-1, -1, N, -1).contiguous()
        used = x.new_zeros(())
        for coefficients, branch in zip(self.coefficients, self.branches, strict=True):
            pre, post, m = coefficients(x)
            for t in range(ITERATIONS):
                m = m / m.sum(-2, keepdim=True)
                m = m / m.sum(-1, keepdim=True)
                if t == 2:
                    used = used + m.square().mean()
            x = write(x, branch(read(x, pre)).tanh(), post, m)
        return x.mean(-2) * used


class Einops(Block):
    """Everything by einops."""

    def forward(self, x: Tensor) -> Tensor:
        from einops import einsum, rearrange, reduce, repeat

        x = repeat(x, "b t c -> b t n c", n=N)
        for coefficients, branch in zip(self.coefficients, self.branches, strict=True):
            flat = rearrange(x, "b t n c -> b t (n c)")
            normed = flat / torch.sqrt(reduce(flat**2, "b t d -> b t 1", "mean") + EPS)
            a = einsum(normed, coefficients.phi, "b t d, d k -> b t k")
            pre, post, res = a.split([N, N, N * N], -1)
            b_pre, b_post, b_res = coefficients.bias.split([N, N, N * N])
            pre = torch.sigmoid(coefficients.alpha[0] * pre + b_pre)
            post = 2.0 * torch.sigmoid(coefficients.alpha[1] * post + b_post)
            m = rearrange(coefficients.alpha[2] * res + b_res, "b t (i j) -> b t i j", i=N).exp()
            for _ in range(ITERATIONS):
                m = m / reduce(m, "b t i j -> b t 1 j", "sum")
                m = m / reduce(m, "b t i j -> b t i 1", "sum")
            f = branch(einsum(pre, x, "b t n, b t n c -> b t c")).tanh()
            x = einsum(m, x, "b t i j, b t j c -> b t i c") + einsum(post, f, "b t i, b t c -> b t i c")
        return reduce(x, "b t n c -> b t c", "mean")


class HyperConnections(nn.Module):
    """The package `hyper-connections` in its mHC mode: a norm of each stream, streams in the batch."""

    def __init__(self, *, log: bool = False) -> None:
        from hyper_connections import mc_get_init_and_expand_reduce_stream_functions as functions

        super().__init__()
        init, self.expand, self.reduce = functions(N, dim=C, sinkhorn_iters=ITERATIONS, log_domain_sinkhorn=log)
        branches = [nn.Sequential(nn.Linear(C, C), nn.Tanh()) for _ in range(2)]
        self.sites = nn.ModuleList(init(branch=branch) for branch in branches)
        for parameter in self.sites.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        for site in self.sites:
            x = site(x)
        return self.reduce(x)


# ---------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Spelling:
    """A block and how many ops of each kind a matcher has to find in it.

    trains: eager mode has its gradients; tolerance: of float64 results (1e-4 where the block casts to float32).
    """

    build: Callable[[], nn.Module]
    found: dict[str, int] = field(default_factory=dict)
    needs: str = ""
    trains: bool = True
    tolerance: float = 1e-9


SITES = dict(coefficients=2, sinkhorn=2, aggregate=2, merge=2, readout=1)
NO_MATRIX = dict(coefficients=2, aggregate=2, merge=2, readout=1)
ONLY_STREAMS = dict(aggregate=2, merge=2, readout=1)


def _with(sinkhorn: Callable[[Tensor], Tensor], **options: Any) -> Callable[[], nn.Module]:
    return partial(Block, partial(Coefficients, sinkhorn), **options)


BLOCKS: dict[str, Spelling] = {
    "spec": Spelling(Block, SITES),
    "row_first": Spelling(_with(row_first, read=read_by_matmul, write=write_by_matmul), SITES),
    "softmax_start": Spelling(_with(softmax_start, write=write_by_bmm), SITES),
    "deepseek": Spelling(_with(deepseek, write=write_transposed), SITES),
    "log_domain": Spelling(_with(log_domain, write=write_by_products), SITES),
    "log_softmax": Spelling(_with(log_softmax), SITES),
    "normalize": Spelling(_with(normalize), SITES),
    "in_place": Spelling(_with(in_place), SITES, trains=False),
    "tokens_last": Spelling(_with(tokens_last), SITES),
    "transposed": Spelling(_with(column_first, write=write_transposed), SITES),
    "three_projections": Spelling(partial(Block, ThreeProjections), SITES),
    "contracted": Spelling(partial(Block, Contracted, read=read_by_matmul), SITES),
    "flat": Spelling(Flat, SITES),
    "folded": Spelling(Folded, SITES),
    "features_first": Spelling(FeaturesFirst, SITES),
    "identity": Spelling(Identity, NO_MATRIX),
    "head": Spelling(Head, dict(coefficients=3, sinkhorn=2, aggregate=3, merge=2)),
    "static": Spelling(Static, ONLY_STREAMS),
    "tanh": Spelling(Tanh, ONLY_STREAMS),
    "einops": Spelling(Einops, SITES, needs="einops"),
    "hyper_connections": Spelling(
        HyperConnections, dict(sinkhorn=2, aggregate=2, merge=2), needs="hyper_connections", tolerance=1e-4
    ),
    "hyper_connections_log": Spelling(
        partial(HyperConnections, log=True),
        dict(sinkhorn=2, aggregate=2, merge=2),
        needs="hyper_connections",
        tolerance=1e-4,
    ),
}

# What is named here has to stay as it is; the rest of the block may be found.
NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "without a column step": (_with(without_a_column_step), "sinkhorn", "axes do not alternate"),
    "eps in one place": (_with(eps_in_one_place), "sinkhorn", "eps of its divisors differ"),
    "no eps behind the softmax": (_with(eps_not_behind_the_softmax), "sinkhorn", "behind the softmax"),
    "clamped": (_with(clamped), "sinkhorn", "clamped"),
    "half an iteration": (_with(half_iteration), "sinkhorn", "half iteration"),
    "shifted along the rows": (_with(shifted_along_rows), "sinkhorn", "does not cancel"),
    "a middle state is used": (
        partial(MiddleState, partial(Coefficients, torch.exp)),
        "sinkhorn",
        "a state inside it is read elsewhere too",
    ),
    "another gate": (partial(Block, partial(Coefficients, gate=torch.tanh)), "coefficients", "read gate"),
    "eps outside of the root": (partial(Block, ClampedNorm), "coefficients", "read gate"),
}
