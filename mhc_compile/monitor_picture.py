"""The picture of a Monitor: the paper's figures 3, 7 and 8 for the last sample, and the gradients of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhc_compile.errors import ConfigError, wrong
from mhc_compile.gains import Gain
from mhc_compile.monitor_sample import Mixing, Sample, SiteSample

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito: told apart by every eye
MATRICES = 3  # single ones, and as many composite ones
_WIDE = 50  # beyond this ratio an axis is logarithmic


def draw(history: Sequence[Sample], path: Path, name: str) -> None:
    """Write the picture in the format of the path's suffix. ConfigError without matplotlib, or for another suffix."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        step = "pip install 'mhc-compile[demo]', or read monitor.history"
        raise ConfigError(wrong("matplotlib", "not installed", "an installed matplotlib", step)) from error
    figure = Figure(figsize=(12, 10.5), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        legal = "a path that ends in ." + ", .".join(sorted(formats))
        raise ConfigError(wrong("the picture's path", repr(str(path)), legal, "monitor.plot('gains.png')"))
    last, longest = history[-1], max(history[-1].trunks().values(), key=len)
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.1]).tolist()  # type: ignore[union-attr]
    figure.suptitle(f"{name}, step {last.step}: {len(last.sites)} sites, {last.sites[0].tokens} tokens")
    (singles, composites), (similarity, gradients) = above.subplots(2, 2)
    _draw_gains(last, singles, composites)
    _draw_similarity(last, similarity)
    _draw_gradients(history, gradients)
    _draw_matrices(longest, below)
    figure.savefig(path, dpi=120)


def _draw_gains(sample: Sample, singles: Any, composites: Any) -> None:
    _draw_by_depth(sample, singles, lambda site: site.single.gain)
    _draw_by_depth(sample, composites, lambda site: site.composite and site.composite.gain)
    singles.set(title="gain of each site", xlabel="site", ylabel="mean over tokens")
    composites.set(title="composite gain, from a site to its trunk's end", xlabel="first site of the product")
    for axes in (singles, composites):
        axes.axhline(1, color="grey", lw=0.8, zorder=0)
        axes.legend(fontsize=8)


def _draw_by_depth(sample: Sample, axes: Any, gain_of: Any) -> None:
    """Forward and backward gains over the sites, a line for each trunk."""
    start, drawn = 0, list[list[float]]()
    for trunk in sample.trunks().values():
        gains: list[Gain | None] = [gain_of(site) for site in trunk]
        known = [(start + place, one) for place, one in enumerate(gains) if one is not None]
        start += len(trunk)
        for what, color, marker in (("forward", BLUE, "o"), ("backward", ORANGE, "s")):
            label = None if drawn[2:] else f"{what} (largest {'row' if what == 'forward' else 'column'} sum)"
            values = [getattr(one, what) for _, one in known]
            drawn.append(values)
            axes.plot([place for place, _ in known], values, color=color, marker=marker, ms=3, lw=1.2, label=label)
    _scale(axes, [value for values in drawn for value in values])


def _scale(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis for values that span much; one that shows more than rounding for values all alike."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if low > 0 and high > _WIDE * low:
        axes.set_yscale("log")
    elif high - low < 0.02:
        middle = (low + high) / 2
        axes.set_ylim(middle - 0.02, middle + 0.02)
    axes.ticklabel_format(axis="y", useOffset=False) if axes.get_yscale() == "linear" else None


def _draw_similarity(sample: Sample, axes: Any) -> None:
    start = 0
    for trunk in sample.trunks().values():
        places = range(start, start + len(trunk))
        axes.plot(places, [site.similarity for site in trunk], color=GREEN, marker="o", ms=3, lw=1.2)
        start += len(trunk)
    axes.set(title="similarity of the streams (1: all equal)", xlabel="site", ylabel="mean pairwise cosine")
    _scale(axes, [site.similarity for site in sample.sites])


def _draw_gradients(history: Sequence[Sample], axes: Any) -> None:
    known = [(sample.step, sample.gradients) for sample in history if sample.gradients is not None]
    steps = [step for step, _ in known]
    lines = (("whole", "all parameters", BLUE), ("mhc", "mHC parameters", ORANGE))
    for what, label, color in lines:
        axes.plot(steps, [getattr(norms, what) for _, norms in known], color=color, marker="o", ms=3, label=label)
    axes.set(title="gradient norm", xlabel="step")
    if known:
        _scale(axes, [getattr(norms, what) for _, norms in known for what, *_ in lines])
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "no optimizer step yet", ha="center", transform=axes.transAxes)


def _draw_matrices(sites: list[SiteSample], figure: Any) -> None:
    """Mean matrices of a trunk: of its first, a middle and its last site, and products from three depths to its end."""
    count, last = min(MATRICES, len(sites)), len(sites) - 1
    panels = figure.subplots(2, count, squeeze=False)
    for place, (top, bottom) in enumerate(panels.T):
        depth = round(place * last / max(count - 1, 1))
        image = _draw_matrix(top, sites[depth].single, f"site {depth}: {_short(sites[depth].name)}")
        start = place * len(sites) // count
        product = sites[start].composite
        if product is None:
            bottom.set_axis_off()
        else:
            _draw_matrix(bottom, product, f"product of sites {start} to {last}")
    figure.colorbar(image, ax=panels, label="mean over tokens", shrink=0.6)
    title = "mixing matrices: a row is an output stream (its sum at the left), a column an input stream (its sum below)"
    figure.suptitle(title, fontsize=10)


def _draw_matrix(axes: Any, mixing: Mixing, title: str) -> Any:
    """A mean matrix with its row sums at the left and its column sums below."""
    rows, n = mixing.mean, len(mixing.mean)
    image = axes.imshow(rows, cmap="RdBu_r", vmin=-1, vmax=1)
    if n <= 8:
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                color = "white" if abs(value) > 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    columns = [sum(row[j] for row in rows) for j in range(n)]
    axes.set_yticks(range(n), [f"{sum(row):.3f}" for row in rows], fontsize=7)
    axes.set_xticks(range(n), [f"{value:.3f}" for value in columns], fontsize=7)
    axes.set_title(title, fontsize=9)
    return image


def _short(name: str) -> str:
    return name if len(name) <= 32 else "..." + name[-29:]
