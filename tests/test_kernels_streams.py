"""Merge, aggregate, expand and readout as Triton kernels, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_lanes import CASES, DEVICE, DTYPES, INTERPRETED, assert_same_again, numeric, scattered, to_device
from mhc_compile.errors import ConfigError, ShapeError
from mhc_compile.kernels import reference, triton_aggregate, triton_expand, triton_launch, triton_merge, triton_replay
from tolerances import assert_close

pytestmark = numeric

MIXES = ["given", "transposed", "identity"]


def site(t: int, n: int, c: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """streams, f, post, res."""
    torch.manual_seed(0)
    streams, f = torch.randn(t, n, c).to(dtype), torch.randn(t, c).to(dtype)
    return to_device(streams, f, torch.rand(t, n) * 2, torch.rand(t, n, n))


def expected_merge(streams: Tensor, f: Tensor, post: Tensor, res: Tensor, mix: str) -> Tensor:
    n = streams.shape[-2]
    matrix = {"given": res, "transposed": res.transpose(-1, -2), "identity": torch.eye(n).expand_as(res)}[mix]
    return reference.merge(*(a.cpu().double() for a in (streams, f, post, matrix)))


@pytest.mark.parametrize(("n", "t", "c", "dtype"), CASES)
def test_merge(n: int, t: int, c: int, dtype: torch.dtype) -> None:
    streams, f, post, res = site(t, n, c, dtype)
    for mix in MIXES:
        merged = triton_merge.merge(streams, f, post, res, mix)
        assert_close(f"merge {mix}", merged.cpu(), expected_merge(streams, f, post, res, mix))
        rounded = triton_merge.merge(streams, f, post, res, mix, rounds=True)
        narrow = post.to(dtype).float(), res.to(dtype).float()
        assert_close(f"rounded merge {mix}", rounded.cpu(), expected_merge(streams, f, *narrow, mix))
        if mix != "identity" and dtype == torch.bfloat16 and t * c > 600:
            assert not torch.equal(rounded, merged)


@pytest.mark.parametrize(("n", "t", "c", "dtype"), CASES)
def test_aggregate_expand_readout(n: int, t: int, c: int, dtype: torch.dtype) -> None:
    streams, x, pre, _ = site(t, n, c, dtype)
    wide, wide_x = streams.cpu().double(), x.cpu().double()
    assert_close(
        "aggregate", triton_aggregate.aggregate(streams, pre).cpu(), reference.aggregate(wide, pre.cpu().double())
    )
    assert_close("readout", triton_expand.readout(streams).cpu(), reference.readout(wide))
    assert torch.equal(triton_expand.expand(x, n), reference.expand(x, n))
    assert_close("expand backward", triton_expand.expand_backward(streams).cpu(), wide.sum(-2))
    assert_close("readout backward", triton_expand.readout_backward(x, n).cpu(), reference.expand(wide_x / n, n))
    if dtype != torch.float32 or n in (1, 2, 4):  # where the sum is exact, equal streams give back what they hold
        assert torch.equal(triton_expand.readout(triton_expand.expand(x, n)), x)


def block(
    t: int, n: int, c: int, dtype: torch.dtype, sites: int
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The first state, f, post and res of each site, and pre of each state."""
    torch.manual_seed(sites)
    streams = torch.randn(t, n, c).to(dtype)
    f = [torch.randn(t, c).to(dtype) for _ in range(sites)]
    post, pre = ([torch.rand(t, n) * 2 for _ in range(sites + 1)] for _ in range(2))
    matrices = [torch.rand(t, n, n) / n for _ in range(sites)]
    return streams.to(DEVICE), *([one.to(DEVICE) for one in given] for given in (f, post[:-1], matrices, pre))


def chain(streams: Tensor, f: Any, post: Any, res: Any, pre: Any, mix: str, rounds: bool) -> list[Tensor | None]:
    """The states, and the aggregates of them, by the kernels of single sites."""
    states = [streams]
    for one in zip(f, post, res, strict=True):
        states.append(triton_merge.merge(states[-1], *one, mix, rounds))
    taken = [None if w is None else triton_aggregate.aggregate(x, w) for x, w in zip(states, pre, strict=True)]
    return [*states[1:], *taken]


@pytest.mark.parametrize(("n", "t", "c", "dtype"), CASES)
def test_the_states_of_a_block_are_those_of_its_merges(n: int, t: int, c: int, dtype: torch.dtype) -> None:
    """Bit for bit, in one launch for four sites; more streams than registers hold go site by site."""
    given = block(t, n, c, dtype, 3)
    for mix, rounds in [("given", False), ("transposed", True), ("identity", False)]:
        res = [None if mix == "identity" else one for one in given[3]]
        arguments = (*given[:3], res, given[4], mix, rounds)
        with triton_launch.record() as launches:
            states, aggregates = triton_replay.replay_block(*arguments)
        for actual, expected in zip([*states, *aggregates], chain(*arguments), strict=True):
            assert actual is not None and expected is not None and torch.equal(bits(actual), bits(expected))
        assert len(launches) == (1 if n <= 4 else 3 + 4)


@pytest.mark.parametrize(("sites", "wanted"), [(0, (0,)), (1, ()), (4, (4,)), (5, (0, 3, 4)), (9, range(10))])
def test_a_block_of_any_length_with_the_aggregates_asked_for(sites: int, wanted: Any) -> None:
    streams, f, post, res, pre = block(9, 4, 40, torch.bfloat16, sites)
    some = [one if place in wanted else None for place, one in enumerate(pre)]
    with triton_launch.record() as launches:
        states, aggregates = triton_replay.replay_block(streams, f, post, res, some)
    expected = chain(streams, f, post, res, some, "given", False)
    assert [one is None for one in aggregates] == [one is None for one in expected[sites:]]
    for actual, one in zip([*states, *aggregates], expected, strict=True):
        assert actual is one is None or torch.equal(bits(actual), bits(one))
    assert len(launches) == max(1, -(-sites // triton_replay.MAX_SITES))


@pytest.mark.parametrize(("t", "n", "c"), [(5, 16, 40), (13, 4, 600)])
def test_many_streams_and_several_strips_of_columns(t: int, n: int, c: int) -> None:
    streams, f, post, res = site(t, n, c, torch.bfloat16)
    assert_close(
        "aggregate",
        triton_aggregate.aggregate(streams, post).cpu(),
        reference.aggregate(streams.cpu().double(), post.cpu().double()),
    )
    assert_close("readout", triton_expand.readout(streams).cpu(), reference.readout(streams.cpu().double()))
    for mix in MIXES:
        merged = triton_merge.merge(streams, f, post, res, mix)
        assert_close(f"merge {mix}", merged.cpu(), expected_merge(streams, f, post, res, mix))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_stream_is_bitwise_the_plain_residual(dtype: torch.dtype) -> None:
    streams, f, post, res = site(50, 1, 33, dtype)
    streams[0], f[0] = -0.0, -0.0
    ones = torch.ones_like(post), torch.ones_like(res)
    assert torch.equal(bits(triton_merge.merge(streams, f, *ones)[:, 0]), bits(streams[:, 0] + f))
    assert torch.equal(bits(triton_aggregate.aggregate(streams, ones[0])), bits(streams[:, 0]))
    assert torch.equal(bits(triton_expand.readout(streams)), bits(streams[:, 0]))


def test_f_may_be_narrower_than_the_streams() -> None:
    streams, f, post, res = site(7, 4, 33, torch.float32)
    f = f.bfloat16()
    assert_close(
        "merge", triton_merge.merge(streams, f, post, res).cpu(), expected_merge(streams, f, post, res, "given")
    )


@pytest.mark.parametrize("lead", [(0,), (3, 0), (), (2, 3, 2)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    streams, f, post, res = (
        a[:12].reshape(*lead, *a.shape[1:]) if 0 not in lead else a.new_empty(*lead, *a.shape[1:])
        for a in site(12 if lead else 1, 3, 5, torch.float32)
    )
    assert_close(
        "merge", triton_merge.merge(streams, f, post, res).cpu(), expected_merge(streams, f, post, res, "given")
    )
    assert triton_aggregate.aggregate(streams, post).shape == f.shape == triton_expand.readout(streams).shape
    assert triton_expand.expand(f, 3).shape == streams.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_of_the_inputs_does_not_matter(dtype: torch.dtype) -> None:
    arguments = site(9, 4, 20, dtype)
    streams, f, post, res = (scattered(a) for a in arguments)
    assert not streams.is_contiguous()
    assert torch.equal(triton_merge.merge(streams, f, post, res), triton_merge.merge(*arguments))
    assert torch.equal(
        triton_aggregate.aggregate(streams, post), triton_aggregate.aggregate(arguments[0], arguments[2])
    )
    assert torch.equal(triton_expand.readout(streams), triton_expand.readout(arguments[0]))
    assert torch.equal(triton_expand.expand(f, 2), triton_expand.expand(arguments[1], 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_stays_alone(bad: float) -> None:
    arguments = site(9, 4, 20, torch.bfloat16)
    clean = triton_merge.merge(*arguments)
    arguments[0][4, 1, 3] = bad
    dirty = triton_merge.merge(*arguments)
    others = [i for i in range(9) if i != 4]
    assert torch.equal(clean[others], dirty[others]) and not dirty[4].isfinite().all()


def wrong_calls() -> dict[str, Any]:
    streams, f, post, res = site(5, 4, 6, torch.float32)
    merge = triton_merge.merge
    return {
        "streams": (lambda: merge(streams[:, 0, 0], f, post, res), r"streams is \[5\]; legal: \[..., n, C\]"),
        "too many streams": (lambda: triton_expand.readout(f.new_empty(2, 17, 4)), r"n in 1..16"),
        "dtype": (lambda: triton_expand.readout(streams.double()), "dtype of streams is torch.float64; legal: float16"),
        "f": (lambda: merge(streams, f[:, :3], post, res), r"f is \[5, 3\]; legal: \[..., C\] = \[5, 6\]"),
        "f dtype": (lambda: merge(streams.half(), f, post, res), "dtype of f is torch.float32; legal: float16"),
        "post": (lambda: merge(streams, f, post[1:], res), r"post is \[4, 4\]; legal: \[..., n\] = \[5, 4\]"),
        "post dtype": (lambda: merge(streams, f, post.half(), res), "dtype of post is torch.float16; legal: float32"),
        "res": (lambda: merge(streams, f, post, res[0]), r"res is \[4, 4\]; legal: .* = \[5, 4, 4\]"),
        "device": (lambda: merge(streams, f, post.to("meta"), res), "device of post is meta; legal: "),
        "pre": (lambda: triton_aggregate.aggregate(streams, post[:, :2]), r"pre is \[5, 2\]"),
        "n": (lambda: triton_expand.expand(f, 0), r"n is 0; legal: an integer in 1..16"),
    }


@pytest.mark.parametrize("case", wrong_calls() if INTERPRETED or torch.cuda.is_available() else [])
def test_wrong_arguments(case: str) -> None:
    call, message = wrong_calls()[case]
    with pytest.raises(ShapeError, match=message):
        call()


def test_wrong_mix() -> None:
    streams, f, post, res = site(5, 4, 6, torch.float32)
    with pytest.raises(ConfigError, match="mix is 'both'; legal: 'identity', 'given', 'transposed'"):
        triton_merge.merge(streams, f, post, res, "both")
    with pytest.raises(ConfigError, match=r"res is None; legal: a tensor \[..., n, n\]"):
        triton_merge.merge(streams, f, post, None)


def test_runs_are_bitwise_equal() -> None:
    arguments = site(*((9, 4, 300) if INTERPRETED else (5000, 4, 1280)), torch.bfloat16)
    assert_same_again(lambda: triton_merge.merge(*arguments))
    assert_same_again(lambda: triton_aggregate.aggregate(arguments[0], arguments[2]))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter sees single addresses")
def test_each_element_is_moved_once() -> None:
    from kernel_interpreter import watched

    streams, f, post, res = site(21, 4, 129, torch.bfloat16)
    with watched() as memories:
        triton_merge.merge(streams, f, post, res)
        triton_aggregate.aggregate(streams, post)
        triton_expand.readout(streams)
        triton_expand.expand(f, 4)
    assert [m.launch.name for m in memories] == ["merge", "aggregate", "sum", "broadcast"]
    for memory in memories:
        moved = {**memory.reads, **memory.writes}
        for name in moved.keys() & {"streams", "f", "merged", "u", "x"}:
            assert (moved[name] == 1).all(), name
    assert DEVICE == "cpu"
