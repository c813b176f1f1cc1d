"""The picture of a model: what is in it, that no text lies on another, and that the formats are as named."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphs import fresh
from mhc_compile import ConfigError, draw, mhc_compile, partition
from mhc_compile.codegen import draw as picture_module
from mhc_compile.codegen.draw import DrawnSite, Lane, Picture, Tap, groups_of, rows_of, save, shortened, width, wrapped

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


def drawn(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> Picture:
    """What `draw` would write."""
    found: list[Picture] = []
    monkeypatch.setattr(sys.modules["mhc_compile.draw"], "save", lambda picture, path: found.append(picture))
    draw(*arguments, "unused.svg", **options)
    return found[0]


def test_a_model_that_is_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = fresh("auxiliary_heads")
    picture = drawn(monkeypatch, model, inputs)
    assert "not converted" in picture.subtitle and picture.n == 4
    (lane,) = picture.lanes
    assert [site.name for site in lane.sites] == ["blocks.0.branch", "blocks.1.branch", "blocks.2.branch"]
    assert lane.taps[:2] == (Tap(1, ("heads.0",)), Tap(2, ("heads.1",)))
    assert lane.taps[2].behind == 3 and "heads.2" in lane.taps[2].readers
    assert not hasattr(model, "mhc")


def test_two_trunks_and_a_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, inputs = fresh("t5")
    mhc_compile(model, 3, backend="eager", example_inputs=inputs)
    plan = partition(model, inputs, stages=2, microbatches=2)
    picture = drawn(monkeypatch, model, inputs, plan=plan)
    encoder, decoder = picture.lanes
    assert (picture.n, len(encoder.sites), len(decoder.sites)) == (3, 4, 6)
    assert encoder.taps == (Tap(4, ("encoder.final_layer_norm",)),)
    reading = [site.name for site in decoder.sites if site.reads == (0,)]
    assert reading == [f"decoder.block.{block}.layer.1.EncDecAttention" for block in (0, 1)]
    by_stage = [[site.name for site in (*encoder.sites, *decoder.sites) if site.stage == stage] for stage in (0, 1)]
    assert by_stage == [list(plan.sites_of(stage)) for stage in plan.stages]
    blocks = [[site.name for site in (*encoder.sites, *decoder.sites) if site.block == block]
              for block in range(len(plan.blocks))]  # fmt: skip
    assert blocks == [list(block) for block in plan.blocks]
    assert_legible(picture)
    other, other_inputs = fresh("auxiliary_heads")
    with pytest.raises(ConfigError, match=r"one without the site blocks\.0\.branch"):
        draw(other, other_inputs, tmp_path / "other.svg", plan=plan)


def test_a_model_that_is_mhc_already(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = fresh("hy_v4")
    picture = drawn(monkeypatch, model, inputs)
    assert picture.subtitle.startswith("mHC already: 6 sites of its own, n = 4")
    assert len(picture.lanes[0].sites) == 6
    assert_legible(picture)


def test_formats(tmp_path: Path) -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 4)), (torch.ones(2, 4),)

    class Site(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.branch(x)

    draw(Site(), inputs, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for suffix, first in ((".svg", b"<?xml"), (".pdf", b"%PDF")):
        for copy in ("a", "b"):
            save(Picture("Model", "2 sites", 4, (lane_of(1),)), tmp_path / f"{copy}{suffix}")
        one, two = ((tmp_path / f"{copy}{suffix}").read_bytes() for copy in ("a", "b"))
        assert one.startswith(first) and one == two, "the same picture each time"
    for name in ("model.gif", "model"):
        with pytest.raises(ConfigError, match=r"legal: a path that ends in \.svg, \.png, \.pdf"):
            draw(Site(), inputs, tmp_path / name)
        assert not (tmp_path / name).exists()


# ------------------------------------------------------------------------------------------------- layout


def lane_of(layers: int, names: tuple[str, ...] = ("self_attn", "mlp"), **options: Any) -> Lane:
    sites = tuple(DrawnSite(f"model.layers.{layer}.{name}") for layer in range(layers) for name in names)
    return Lane(0, 4096, "model.py:1: x = embed(ids)", sites, **options)


def test_alike_blocks_are_folded_and_count_every_site() -> None:
    lane = lane_of(30, taps=(Tap(60, ("model.norm",)),))
    groups = groups_of(lane, fold=True)
    assert [group.name for group in groups] == ["model.layers.0", "", "model.layers.29"]
    folded = groups[1].slots[0]
    assert (folded.label, folded.note) == ("28 alike", "1 to 28, 56 sites")
    assert sum(slot.count for group in groups for slot in group.slots) == 60
    tapped = lane_of(30, taps=(Tap(20, ("probe",)),))
    assert [group.name for group in groups_of(tapped, fold=True)] == [
        "model.layers.0", "", "model.layers.8", "model.layers.9", "model.layers.10", "", "model.layers.29",
    ]  # fmt: skip
    assert len(groups_of(lane, fold=False)) == 30


def test_rows_hold_whole_groups() -> None:
    rows = rows_of(groups_of(lane_of(30), fold=False), 9)
    assert [len(row) for row in rows] == [4] * 7 + [2]
    long = rows_of(groups_of(lane_of(1, tuple(f"part{place}" for place in range(20))), fold=False), 9)
    assert [len(row[0].slots) for row in long] == [9, 9, 2]


def test_names_fit() -> None:
    assert wrapped("feed_forward_network", 0.95, 8) == ["feed_forward_", "network"]
    assert wrapped("EncDecAttention", 0.8, 8) == ["EncDec", "Attention"]
    for text in wrapped("a_very_long_name_for_a_branch_of_some_block", 0.8, 8):
        assert width(text, 8) <= 0.8
    assert shortened("model.layers.12", 0.5, 7, front=True).endswith("12")


NAMES = ("attention_with_relative_positions", "EncDecAttention", "feed.0.inner", "x", "MultiHeadCrossAttention")


@pytest.mark.parametrize("layers", [1, 6, 13])
@pytest.mark.parametrize("planned", [False, True])
def test_no_text_lies_on_another(layers: int, planned: bool) -> None:
    names = NAMES if layers % 2 else ("self_attn", "mlp")
    sites = lane_of(layers, names).sites
    if planned:
        sites = tuple(
            DrawnSite(site.name, (1,) if place % 3 == 0 else (), place // 5, place * 3 // len(sites))
            for place, site in enumerate(sites)
        )
    taps = (Tap(0, ("probe",)), Tap(1, ("heads.auxiliary.first",)), Tap(2, ("a", "b")), Tap(len(sites), ("norm", "")))
    lanes = (Lane(0, 4096, "model.py:1: " + "x" * 300, sites, taps), Lane(1, 64, "an input", sites[:3]))
    refused = tuple((10**place, "a reason " * 30, "a/file.py:3: " + "y" * 90) for place in range(12))
    picture = Picture("A" * 30, "sites", 6, lanes, refused, ("a note that is long " * 20,))
    assert_legible(picture)


def assert_legible(picture: Picture) -> None:
    """No two texts overlap, and none leaves the page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = picture_module._Sheet(picture)
    figure = Figure(figsize=(sheet.width, sheet.height))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, sheet.width), ylim=(-sheet.height, 0))
    sheet.draw(axes)
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in axes.texts if text.get_text()]
    assert len(boxes) > 5
    page = figure.bbox
    outside = [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > page.x1 or box.y1 > page.y1]
    assert not outside
    hit = [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.shrunk(0.97, 0.8).overlaps(two)]
    assert not hit


def test_a_picture_is_written_whole(tmp_path: Path) -> None:
    save(Picture("Model", "2 sites", 4, (lane_of(1),)), tmp_path / "model.svg")
    assert (tmp_path / "model.svg").stat().st_size < 200_000
