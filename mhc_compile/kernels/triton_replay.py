"""All states of a recompute block from its first one: ``X_{l+1} = res_l X_l + post_l f_l``, and ``u_l = pre_l X_l``.

A program holds all streams of a few tokens and columns in registers while it goes through the sites: what is read is
the first state, and f and the coefficients of each site; what is written are the states and aggregates asked for. A
chain of merges and aggregates would read each state twice again. Streams are separable by column, so that no program
needs another; the coefficients are not (z and r are sums over all columns) and have to be kept.

Each state is rounded to streams' dtype before it goes on, by the operations of ``triton_merge`` and
``triton_aggregate`` in their order: the bits are those of the chain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from mhc_compile.kernels.triton_aggregate import aggregate
from mhc_compile.kernels.triton_launch import STREAM_DTYPES, cdiv, check, check_streams, jit, launch
from mhc_compile.kernels.triton_merge import check_res, merge, merge_tile, mixed_stream
from mhc_compile.kernels.triton_tiles import (
    load_rows,
    load_streams,
    load_vector,
    nothing,
    rounded,
    store_rows,
    weighted_sum,
)

# Sites of one launch, whose steps are unrolled: longer blocks take several, each with one more read of a state. The
# time to compile grows with the square of it: seconds for 4, half a minute for 8.
MAX_SITES = 4
# More streams than these do not fit into registers.
MAX_STREAMS = 4


@jit
def _replay(
    streams: tl.tensor,
    f: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    pre: tl.tensor,
    states: tl.tensor,
    aggregates: tl.tensor,
    tokens: tl.tensor,
    SITES: tl.constexpr,
    PLACES: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    MIX: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    strips: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    rows = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (tl.program_id(0) % strips) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = rows < tokens
    mask = valid[:, None] & (columns < C)[None, :]
    tiles = load_streams(streams, rows, columns, mask, N, C)
    for site in tl.static_range(SITES + 1):
        if PLACES[site] >= 0:
            weights = load_vector(pre[PLACES[site]], rows, valid, N)
            store_rows(aggregates[PLACES[site]], weighted_sum(weights, tiles, N), rows, columns, mask, C)
        if site < SITES:
            matrix = streams if MIX == "identity" else res[site]  # which is not read where there is none
            branch = load_rows(f[site], rows, columns, mask, C)
            merged = nothing()
            for i in tl.static_range(N):
                gain = rounded(tl.load(post[site] + rows * N + i, mask=valid, other=0.0), streams, ROUND)
                mixed = mixed_stream(tiles, streams, matrix, rows, valid, i, N, MIX, ROUND) + gain[:, None] * branch
                store_rows(states[site] + i * C, mixed, rows, columns, mask, N * C)
                merged += (rounded(mixed, streams, True),)
            tiles = merged


def replay_block(
    streams: Tensor,
    f: Sequence[Tensor],
    post: Sequence[Tensor],
    res: Sequence[Tensor | None],
    pre: Sequence[Tensor | None],
    mix: str = "given",
    rounds: bool = False,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The states behind each merge, and the aggregates in front of it and behind the last, where pre is given.

    streams [..., n, C]; of each of the k sites f [..., C], post [..., n] and res [..., n, n] as for ``merge``; pre of
    k + 1 states, [..., n] or None. Up to MAX_SITES sites take one launch; with more than MAX_STREAMS streams each
    merge and each aggregate takes one.
    """
    if not f or streams.shape[-2] > MAX_STREAMS:
        return _one_by_one(streams, list(zip(f, post, res, strict=True)), pre, mix, rounds)
    states: list[Tensor] = []
    aggregates: list[Tensor | None] = []
    for start in range(0, len(f), MAX_SITES):
        end = min(start + MAX_SITES, len(f))
        sites = list(zip(f[start:end], post[start:end], res[start:end], strict=True))
        reads = pre[start : end + (end == len(f))]
        made = _one_launch(states[-1] if states else streams, sites, reads, mix, rounds)
        states += made[0]
        aggregates += made[1]
    return states, aggregates


# f, post and res of a site.
_Site = tuple[Tensor, Tensor, Tensor | None]


def _one_by_one(
    streams: Tensor, sites: Sequence[_Site], pre: Sequence[Tensor | None], mix: str, rounds: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    states = [streams]
    for site in sites:
        states.append(merge(states[-1], *site, mix, rounds))
    return states[1:], [None if one is None else aggregate(x, one) for x, one in zip(states, pre, strict=True)]


def _one_launch(
    streams: Tensor, sites: Sequence[_Site], pre: Sequence[Tensor | None], mix: str, rounds: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    tokens, n, features = check_streams(streams)
    lead = tuple(streams.shape[:-2])
    narrower = [d for d in STREAM_DTYPES if torch.promote_types(d, streams.dtype) == streams.dtype]
    f = [check("f", one, "[..., C]", (*lead, features), streams, *narrower) for one, _, _ in sites]
    post = [check("post", one, "[..., n]", (*lead, n), streams, torch.float32) for _, one, _ in sites]
    res = [check_res(one, mix, lead, n, streams) for _, _, one in sites]
    given = [check("pre", one, "[..., n]", (*lead, n), streams, torch.float32) for one in pre if one is not None]
    states = [torch.empty(streams.shape, dtype=streams.dtype, device=streams.device) for _ in f]
    wanted = [site for site, one in enumerate(pre) if one is not None]
    made = [torch.empty((*lead, features), dtype=streams.dtype, device=streams.device) for _ in wanted]
    block_t, block_c = merge_tile(n, features, streams.element_size())
    launch(
        _replay,
        (cdiv(tokens, block_t) * cdiv(features, block_c),),
        reads={"streams": streams.contiguous(), **_parts(f=f, post=post, res=res, pre=given)},
        writes=_parts(states=states, aggregates=made),
        constants={
            "tokens": tokens,
            "SITES": len(sites),
            "PLACES": tuple(wanted.index(site) if site in wanted else -1 for site in range(len(sites) + 1)),
            "N": n,
            "C": features,
            "MIX": mix,
            "ROUND": rounds and streams.dtype != torch.float32,
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
        },
    )
    parts = iter(made)
    return states, [next(parts) if site in wanted else None for site in range(len(pre))]


def _parts(**tuples: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors of tuples by the names that `Launch` gives them; None for a tuple of nothing."""
    found: dict[str, Tensor | None] = {}
    for name, tensors in tuples.items():
        given = [tensor for tensor in tensors if tensor is not None]
        found |= {f"{name}.{place}": tensor for place, tensor in enumerate(given)} if given else {name: None}
    return found
