"""The Triton kernels compiled for devices that are not there: registers, instructions, on-chip memory, traffic.

No device is needed, and nothing runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which the interpreter cannot", allow_module_level=True)

from kernel_compiler import Compiled, Target, compile_for
from mhc_compile.errors import ShapeError
from mhc_compile.kernels import triton_launch, triton_streams_backward
from mhc_compile.kernels.convention import DEEPSEEK_V4, HEAD, HUNYUAN_V4, PAPER, Before, Convention
from mhc_compile.kernels.triton_aggregate import aggregate
from mhc_compile.kernels.triton_aggregate_backward import aggregate_backward
from mhc_compile.kernels.triton_coefficients import read
from mhc_compile.kernels.triton_expand import expand, expand_backward
from mhc_compile.kernels.triton_implicit import sinkhorn_implicit_backward
from mhc_compile.kernels.triton_launch import Launch, record
from mhc_compile.kernels.triton_merge import merge
from mhc_compile.kernels.triton_merge_backward import merge_backward
from mhc_compile.kernels.triton_merge_read import merge_read
from mhc_compile.kernels.triton_replay import replay_block
from mhc_compile.kernels.triton_single_pass import merge_read_early
from mhc_compile.kernels.triton_sinkhorn import sinkhorn, sinkhorn_backward
from mhc_compile.kernels.triton_site_backward import crosses, site_backward
from mhc_compile.kernels.triton_traffic import table, traffic

A100, H200, B200 = Target("80", 163 << 10), Target("90", 227 << 10), Target("100", 227 << 10)
MI300 = Target("gfx942", 64 << 10)
CONSUMER = Target("120", 99 << 10)
TOKENS, FEATURES = 8192, 1280


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward(n: int, dtype: torch.dtype, convention: Convention, t: int = TOKENS, c: int = FEATURES) -> list[Launch]:
    k = convention.columns(n)
    parameters = meta(n * c, k), meta(convention.groups), meta(k)
    streams = meta(t, n, c, dtype=dtype)
    with record(run=False) as launches:
        u, site = read(streams, *parameters, convention)
        if site.post is not None:
            merge(streams, u, site.post, site.res, convention.mix, convention.rounded)
    return launches


def backward(n: int, dtype: torch.dtype, convention: Convention, t: int = TOKENS, c: int = FEATURES) -> list[Launch]:
    k = convention.columns(n)
    parameters = meta(n * c, k), meta(convention.groups), meta(k)
    streams = meta(t, n, c, dtype=dtype)
    with record(run=False):
        u, site = read(streams, *parameters, convention)
    with record(run=False) as launches:
        if site.post is None:
            site_backward(streams, parameters, site, convention, du=u)
        else:
            rounds = convention.rounded
            _, dpost, dres = merge_backward(streams, streams, u, site.post, convention.mix, rounds)
            site_backward(streams, parameters, site, convention, grad=streams, du=u, grad_post=dpost, grad_res=dres)
    return launches


def across(n: int, dtype: torch.dtype, convention: Convention, t: int = TOKENS, c: int = FEATURES) -> list[Launch]:
    """The merge of a site and the read of the next."""
    k = convention.columns(n)
    parameters = meta(n * c, k), meta(convention.groups), meta(k)
    streams, f = meta(t, n, c, dtype=dtype), meta(t, c, dtype=dtype)
    res = None if convention.mix == "identity" else meta(t, n, n)
    with record(run=False) as launches:
        merge_read((streams, f, meta(t, n), res), parameters, convention.mix, convention.rounded, convention)
    return launches


def early(n: int, dtype: torch.dtype, convention: Convention, t: int = TOKENS, c: int = FEATURES) -> list[Launch]:
    """The same, with the weights that the state is read with known before."""
    k = convention.columns(n)
    parameters = meta(n * c, k), meta(convention.groups), meta(k)
    streams, f = meta(t, n, c, dtype=dtype), meta(t, c, dtype=dtype)
    merging = streams, f, meta(t, n), None if convention.mix == "identity" else meta(t, n, n)
    with record(run=False) as launches:
        merge_read_early(merging, meta(t, n), parameters, convention.mix, convention.rounded, convention)
    return launches


def chained(
    n: int,
    dtype: torch.dtype,
    convention: Convention,
    t: int = TOKENS,
    c: int = FEATURES,
    tapped: bool = False,
    weights: bool = False,
) -> list[Launch]:
    """The backward of one site in a chain of sites, with df of the site before."""
    k, rounds = convention.columns(n), convention.rounded
    parameters = meta(n * c, k), meta(convention.groups), meta(k)
    streams = meta(t, n, c, dtype=dtype)
    assert crosses(streams, "given")
    with record(run=False):
        u, site = read(streams, *parameters, convention)
    given = {} if site.post is None else {"grad": streams, "f": u}
    with record(run=False) as launches:
        before, tap = Before(meta(t, n), rounds, dtype), streams if tapped else None
        read_with = {"weights": meta(t, n), "grad_pre": meta(t, n)} if weights else {}
        site_backward(streams, parameters, site, convention, **given, du=u, tap=tap, before=before, **read_with)
    return launches


def others(n: int, dtype: torch.dtype) -> list[Launch]:
    streams, u, logits = meta(TOKENS, n, FEATURES, dtype=dtype), meta(TOKENS, FEATURES, dtype=dtype), meta(TOKENS, n, n)
    with record(run=False) as launches:
        aggregate(streams, meta(TOKENS, n))
        expand(u, n)
        expand_backward(streams)
        sinkhorn(logits, 20)
        sinkhorn_backward(logits, logits, 20)
        sinkhorn_implicit_backward(logits, logits, 20)
    return launches


def compiled(launches: list[Launch], target: Target) -> dict[str, Compiled]:
    """By the kernel's name: without spills, small enough for the device, and short enough to compile in seconds."""
    found = {launch.name: compile_for(launch, target) for launch in launches}
    for name, result in found.items():
        assert result.spills == 0, f"{name} spills {result.spills} on {target.name}"
        assert result.shared <= target.shared_memory, f"{name} takes {result.shared} bytes on {target.name}"
        assert result.text.count("\n") < 12000, name
    return found


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Target], None]:
    """Makes launches be those of another device."""

    def choose(target: Target) -> None:
        monkeypatch.setattr(torch.version, "hip", "7.0" if target.is_amd else None)
        monkeypatch.setattr(triton_streams_backward, "shared_memory", lambda device: target.shared_memory)

    return choose


def check_instructions(found: dict[str, Compiled], target: Target, streams: dict[str, int]) -> None:
    """Loads of 16 bytes where memory is what counts, and matrix instructions where there are products.

    ``streams``: how many arrays as long as a stream each kernel reads.
    """
    for name, result in found.items():
        if name in streams:
            wide = r"_load_dwordx4" if target.is_amd else r"ld\.global\S*\.v[48]"
            assert result.count(wide) >= streams[name], name
    products = {"gfx942": r"v_mfma", "80": r"mma\.sync", "90": r"wgmma\.mma_async", "100": r"tcgen05\.mma|mma\.sync"}
    copied = r"_load_dwordx4" if target.is_amd else r"cp\.async\.c[ag]\.shared\.global.*, 0x10"
    for name in found.keys() & {"project", "merge_project", "merge_read_early", "streams_backward"}:
        pattern = r"mma\.sync|v_mfma" if name == "streams_backward" else products[target.name]
        assert found[name].count(pattern) > 0, name
        assert found[name].count(copied) >= 3, name


READS = {
    "finish": 4,
    "merge": 5,
    "merge_backward": 9,
    "coefficients_backward": 5,
    "products": 10,
    "aggregate": 4,
    "sum": 4,
    "broadcast": 1,
}


@pytest.mark.parametrize("target", [A100, H200, B200, MI300], ids=lambda t: t.name)
@pytest.mark.parametrize("direction", [forward, backward])
@pytest.mark.cases(2)
def test_a_site_of_four_streams(
    direction: Callable[..., list[Launch]], target: Target, on: Callable[[Target], None]
) -> None:
    on(target)
    found = compiled(direction(4, torch.bfloat16, PAPER), target)
    check_instructions(found, target, READS)


@pytest.mark.parametrize("target", [A100, H200, B200, MI300], ids=lambda t: t.name)
def test_across_sites(target: Target, on: Callable[[Target], None]) -> None:
    on(target)
    check_instructions(compiled(some(across(4, torch.bfloat16, PAPER), "merge_project"), target), target, READS)


def test_across_sites_in_other_forms(on: Callable[[Target], None]) -> None:
    on(H200)
    for n, dtype, convention, t in [
        (4, torch.float16, DEEPSEEK_V4, TOKENS),
        (4, torch.float32, PAPER, TOKENS),
        (4, torch.bfloat16, HUNYUAN_V4, TOKENS),
        (2, torch.bfloat16, PAPER, TOKENS),
        (4, torch.bfloat16, DEEPSEEK_V4, 1),
    ]:
        compiled(some(across(n, dtype, convention, t), "merge_project"), H200)


def test_two_launches_a_site_when_decoding() -> None:
    for t in (1, 16):
        for launches in (across(4, torch.bfloat16, DEEPSEEK_V4, t), early(4, torch.bfloat16, DEEPSEEK_V4, t)):
            assert [launch.name for launch in launches] == ["merge_project", "finish"]


@pytest.mark.parametrize("target", [A100, H200, B200, MI300], ids=lambda t: t.name)
@pytest.mark.cases(1)
def test_a_merge_and_an_early_read_are_one_launch(target: Target, on: Callable[[Target], None]) -> None:
    on(target)
    launches = early(4, torch.bfloat16, PAPER)
    assert [launch.name for launch in launches] == ["merge_read_early"]
    check_instructions(compiled(launches, target), target, READS)


@pytest.mark.sweep
def test_early_reads_in_other_forms(on: Callable[[Target], None]) -> None:
    on(H200)
    for n, dtype, convention, t in [
        (4, torch.float16, DEEPSEEK_V4, TOKENS),
        (4, torch.float32, PAPER, TOKENS),
        (3, torch.bfloat16, HUNYUAN_V4, TOKENS),
        (4, torch.bfloat16, PAPER, 1024),
    ]:
        launches = some(early(n, dtype, convention, t), "merge_read_early", "merge_project")
        check_instructions(compiled(launches, H200), H200, {})


def test_the_backward_of_a_read_by_itself(on: Callable[[Target], None]) -> None:
    for target, n in ((H200, 4), (H200, 16), (MI300, 4)):
        on(target)
        with record(run=False) as launches:
            aggregate_backward(
                meta(TOKENS, FEATURES, dtype=torch.bfloat16),
                meta(TOKENS, n, FEATURES, dtype=torch.bfloat16),
                meta(TOKENS, n),
            )
        check_instructions(compiled(launches, target), target, {"aggregate_backward": 1 + n})


@pytest.mark.parametrize("target", [A100, H200, B200, MI300], ids=lambda t: t.name)
def test_backward_across_sites(target: Target, on: Callable[[Target], None]) -> None:
    on(target)
    launches = some(chained(4, torch.bfloat16, PAPER), "products", "streams_backward")
    check_instructions(compiled(launches, target), target, READS)


@pytest.mark.parametrize(
    ("dtype", "target"),
    [(torch.float16, A100), (torch.float16, H200), (torch.float16, MI300)]
    + [(torch.float32, target) for target in (A100, H200, B200)],
    ids=str,
)
def test_backward_across_sites_in_other_dtypes(
    dtype: torch.dtype, target: Target, on: Callable[[Target], None]
) -> None:
    on(target)
    launches = some(chained(4, dtype, PAPER), "streams_backward", *["products"] * (target is H200))
    check_instructions(compiled(launches, target), target, READS)


@pytest.mark.sweep
def test_backward_across_sites_in_other_forms(on: Callable[[Target], None]) -> None:
    """Streams with other readers, few tokens, fewer streams, a head; and little on-chip memory."""
    for target, n, dtype, convention, tapped in [
        (A100, 4, torch.bfloat16, PAPER, True),
        (H200, 4, torch.float32, DEEPSEEK_V4, True),
        (H200, 4, torch.bfloat16, DEEPSEEK_V4, True),
        (H200, 4, torch.bfloat16, HEAD, False),
        (H200, 3, torch.bfloat16, PAPER, True),
        (H200, 1, torch.bfloat16, PAPER, False),
        (CONSUMER, 4, torch.bfloat16, PAPER, True),
        (CONSUMER, 4, torch.float32, PAPER, True),
    ]:
        on(target)
        compiled(some(chained(n, dtype, convention, tapped=tapped), "streams_backward"), target)


def test_what_does_not_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases whose kernels have another form, or would spill."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    cases = [(4, torch.bfloat16, "given"), (5, torch.bfloat16, "given"), (4, torch.bfloat16, "identity")]
    cases.append((4, torch.float32, "given"))
    assert [crosses(meta(2, n, 8, dtype=dtype), mix) for n, dtype, mix in cases] == [True, False, False, False]
    monkeypatch.setattr(torch.version, "hip", None)
    assert crosses(meta(2, 4, 8), "given")


def block(n: int, dtype: torch.dtype, sites: int, mix: str, rounds: bool) -> list[Launch]:
    """The replay of a recompute block."""
    res = [None if mix == "identity" else meta(TOKENS, n, n)] * sites
    with record(run=False) as launches:
        replay_block(
            meta(TOKENS, n, FEATURES, dtype=dtype),
            [meta(TOKENS, FEATURES, dtype=dtype)] * sites,
            [meta(TOKENS, n)] * sites,
            res,
            [meta(TOKENS, n)] * sites + [None],
            mix,
            rounds,
        )
    return launches


@pytest.mark.parametrize("target", [A100, H200, B200, MI300], ids=lambda t: t.name)
def test_a_block_of_four_sites(target: Target, on: Callable[[Target], None]) -> None:
    on(target)
    launches = block(4, torch.bfloat16, 4, "given", False)
    check_instructions(compiled(launches, target), target, {"replay": 4 + 4})
    assert len(launches) == 1 and len(block(4, torch.bfloat16, 9, "given", False)) == 3


def test_blocks_in_other_forms(on: Callable[[Target], None]) -> None:
    on(H200)
    for n, dtype, mix, rounds in [
        (4, torch.float16, "transposed", True),
        (4, torch.float32, "given", False),
        (3, torch.bfloat16, "identity", False),
    ]:
        compiled(block(n, dtype, 2, mix, rounds), H200)


def test_a_block_reads_and_writes_each_state_once() -> None:
    """In units of C: the first state and f of each site in, the states and aggregates out; coefficients beside them."""
    sites, n = 4, 4
    (launch,) = block(n, torch.bfloat16, sites, "given", False)
    one = TOKENS * FEATURES * 2
    sizes = [{name: t.nbytes for name, t in part.items() if t is not None} for part in (launch.reads, launch.writes)]
    read, written = (sum(size for size in each.values() if size >= one) for each in sizes)
    assert (read, written) == ((n + sites) * one, (n * sites + sites) * one)
    assert sum(sizes[0].values()) - read == sites * TOKENS * (n * n + 2 * n) * 4


def some(launches: list[Launch], *names: str) -> list[Launch]:
    return [launch for launch in launches if launch.name in names]


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        (torch.float16, H200),
        (torch.float32, H200),
        (torch.float32, A100),
        (torch.float32, B200),
        (torch.float32, MI300),
    ],
    ids=str,
)
def test_other_dtypes(dtype: torch.dtype, target: Target, on: Callable[[Target], None]) -> None:
    on(target)
    launches = forward(4, dtype, PAPER) + backward(4, dtype, PAPER)
    names = ["project", "streams_backward"] + ["merge", "merge_backward"] * (target is H200)
    check_instructions(compiled(some(launches, *names), target), target, READS)


def test_other_conventions(on: Callable[[Target], None]) -> None:
    on(H200)
    deepseek = forward(4, torch.bfloat16, DEEPSEEK_V4) + backward(4, torch.bfloat16, DEEPSEEK_V4)
    check_instructions(compiled(some(deepseek, "finish", "merge", "coefficients_backward"), H200), H200, READS)
    hunyuan = forward(4, torch.bfloat16, HUNYUAN_V4) + backward(4, torch.bfloat16, HUNYUAN_V4)
    found = compiled(some(hunyuan, "merge", "merge_backward", "streams_backward"), H200)
    check_instructions(found, H200, {**READS, "merge_backward": 5})
    a_head = forward(4, torch.bfloat16, HEAD) + backward(4, torch.bfloat16, HEAD)
    check_instructions(compiled(a_head, H200), H200, READS)


def test_other_kernels(on: Callable[[Target], None]) -> None:
    on(H200)
    found = compiled(others(4, torch.bfloat16), H200)
    check_instructions(found, H200, READS)
    for name in ("sinkhorn", "sinkhorn_backward"):
        assert found[name].count(r"shfl|bar\.sync") == 0  # a token stays in its thread


def test_little_on_chip_memory(on: Callable[[Target], None]) -> None:
    """Consumer cards have 99 KiB."""
    on(CONSUMER)
    for dtype in (torch.bfloat16, torch.float32):
        launches = forward(4, dtype, PAPER) + backward(4, dtype, PAPER)
        compiled(some(launches, "project", "streams_backward"), CONSUMER)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_streams(n: int, on: Callable[[Target], None]) -> None:
    on(H200)
    launches = forward(n, torch.bfloat16, PAPER) + backward(n, torch.bfloat16, PAPER)
    compiled(launches if n == 1 else some(launches, "project", "merge_backward", "streams_backward"), H200)


@pytest.mark.parametrize("n", [8, 16])
@pytest.mark.cases(1)
def test_more_streams_compile(n: int, on: Callable[[Target], None]) -> None:
    on(H200)
    launches = forward(n, torch.bfloat16, PAPER) + backward(n, torch.bfloat16, PAPER)
    for launch in launches if n == 8 else some(launches, "merge", "merge_backward_wide", "wide_backward", "project"):
        result = compile_for(launch, H200)
        assert result.shared <= H200.shared_memory and result.text.count("\n") < 12000, launch.name


def test_few_tokens_and_odd_features(on: Callable[[Target], None]) -> None:
    """One token, as in decoding; and rows that are not aligned to anything, which may spill a little."""
    on(H200)
    compiled(some(forward(4, torch.bfloat16, DEEPSEEK_V4, 1, 4096), "project", "finish", "merge"), H200)
    odd = forward(4, torch.bfloat16, HUNYUAN_V4, 77, 129) + backward(4, torch.bfloat16, HUNYUAN_V4, 77, 129)
    assert all(compile_for(launch, H200).spills < 100 for launch in odd)


def test_number_of_tokens_is_no_constant() -> None:
    """Nothing is compiled again for another number of tokens, within the two ranges of tiles."""

    def constants(t: int) -> list[object]:
        launches = forward(4, torch.bfloat16, PAPER, t) + backward(4, torch.bfloat16, PAPER, t)
        launches += chained(4, torch.bfloat16, PAPER, t)
        return [
            {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr} for launch in launches
        ]

    assert constants(4096) == constants(8192) == constants(100_000)
    assert constants(64) == constants(2048)
    (one,), (other,) = (early(4, torch.bfloat16, PAPER, t) for t in (8192, 100_000))
    assert all(one.arguments[p.name] == other.arguments[p.name] for p in one.kernel.params if p.is_constexpr)


def test_fusion_of_multiply_and_add_is_asked_for() -> None:
    launches = forward(4, torch.bfloat16, PAPER) + backward(4, torch.bfloat16, PAPER) + others(4, torch.bfloat16)
    assert all(launch.options["enable_fp_fusion"] is True for launch in launches)


# --- traffic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "features", "share"), [(4096, 1280, 0.07), (8192, 1280, 0.04), (8192, 4096, 0.02)])
def test_traffic_of_a_site(tokens: int, features: int, share: float) -> None:
    """18 units forward and 28 backward; what is not streams is a few percent beside them."""
    for direction, units in ((forward, 18), (backward, 28)):
        rows = traffic(direction(4, torch.bfloat16, PAPER, tokens, features), tokens, features)
        assert rows[-1].units == units == sum(row.units for row in rows[:-1]), table(rows)
        assert rows[-1].other_bytes < share * units * tokens * features * 2, table(rows)


@pytest.mark.parametrize("features", [2560, 4096, 7168])
def test_traffic_across_sites(features: int) -> None:
    """14 units forward."""
    rows = traffic(across(4, torch.bfloat16, PAPER, TOKENS, features), TOKENS, features)
    assert rows[-1].units == 14, table(rows)
    assert rows[-1].other_bytes < 0.06 * 14 * TOKENS * features * 2, table(rows)


@pytest.mark.parametrize(("tokens", "share"), [(TOKENS, 0.02), (2048, 0.11)])
@pytest.mark.parametrize("features", [1280, 2560, 7168])
def test_traffic_of_early_reads(features: int, tokens: int, share: float) -> None:
    """10 units forward, in one launch or two, and 24 backward."""
    launches = early(4, torch.bfloat16, PAPER, tokens, features)
    rows = traffic(launches, tokens, features)
    assert rows[-1].units == 10 and (rows[0] if len(launches) == 1 else rows[-3]).units == 10, table(rows)
    assert rows[-1].other_bytes < share * 10 * tokens * features * 2, table(rows)
    back = traffic(chained(4, torch.bfloat16, PAPER, tokens, features, weights=True), tokens, features)
    found = {row.name: (row.read, row.written) for row in back}
    assert back[-1].units == 24 and found["products"] == (10, 0) and found["streams_backward"] == (9, 5)


@pytest.mark.parametrize(("features", "share"), [(1280, 0.05), (2560, 0.04), (7168, 0.025)])
def test_traffic_of_the_backward_across_sites(features: int, share: float) -> None:
    """24 units of a site, with df of the site before; 4 more where its streams have another reader."""
    rows = traffic(chained(4, torch.bfloat16, PAPER, TOKENS, features), TOKENS, features)
    assert rows[-1].units == 24, table(rows)
    assert rows[-1].other_bytes < share * 24 * TOKENS * features * 2, table(rows)
    found = {row.name: (row.read, row.written) for row in rows}
    assert found["products"] == (10, 0) and found["streams_backward"] == (9, 5)
    assert found["coefficients_backward"] == found["add_shares"] == found["pack"] == (0, 0)
    tapped = traffic(chained(4, torch.bfloat16, PAPER, TOKENS, features, tapped=True), TOKENS, features)
    assert tapped[-1].units == 28
    assert traffic(chained(4, torch.bfloat16, HEAD, TOKENS, features), TOKENS, features)[-1].units == 5 + 9 + 1


def test_traffic_of_each_launch() -> None:
    launches = forward(4, torch.bfloat16, PAPER) + backward(4, torch.bfloat16, PAPER)
    rows = {row.name: (row.read, row.written) for row in traffic(launches, TOKENS, FEATURES)}
    assert rows["project"] == (4, 0) and rows["finish"] == (4, 1) and rows["merge"] == (5, 4)
    assert rows["merge_backward"] == (9, 1) and rows["coefficients_backward"] == (5, 0)
    assert rows["streams_backward"] == (9, 4) and rows["add_shares"] == rows["pack"] == (0, 0)
    assert "streams_backward" in table(traffic(launches, TOKENS, FEATURES))


def test_traffic_without_mixing() -> None:
    launches = forward(4, torch.bfloat16, HUNYUAN_V4) + backward(4, torch.bfloat16, HUNYUAN_V4)
    assert traffic(launches, TOKENS, FEATURES)[-1].units == 18 + 24  # merge_backward does not read the streams
    launches = forward(4, torch.bfloat16, HEAD) + backward(4, torch.bfloat16, HEAD)
    assert traffic(launches, TOKENS, FEATURES)[-1].units == 9 + 5 + 9


# --- devices ----------------------------------------------------------------------------------------------


def test_tensors_have_to_be_on_a_device() -> None:
    with pytest.raises(ShapeError, match=r"device of streams is cpu; legal: a CUDA device. Next: use the plain ops"):
        aggregate(torch.zeros(2, 4, 8), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="device of streams is meta"):
        read(meta(2, 4, 8), meta(32, 4), meta(1), meta(4), HEAD)
    with pytest.raises(ShapeError, match="device of logits is cpu"):
        sinkhorn(torch.zeros(2, 4, 4), 20)
    assert not triton_launch.interpreted()


def test_a_record_does_not_outlive_its_block() -> None:
    with record(run=False) as launches, record(run=False) as inner:
        expand(meta(2, 8), 4)
    assert (len(launches), len(inner)) == (0, 1)
    with pytest.raises(ShapeError):
        expand(meta(2, 8), 4)
    assert replace(PAPER, res="none").mix == "identity"


def test_a_record_has_the_launches_of_every_thread() -> None:
    """On a GPU, autograd runs a backward in threads of its own."""
    with record(run=False) as launches:
        thread = threading.Thread(target=lambda: expand(meta(2, 8), 4))
        thread.start()
        thread.join()
    assert [launch.name for launch in launches] == ["broadcast"]
