"""One sample of a Monitor: the diagnostics of every site, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_compile.gains import (
    Gain,
    backward_gains,
    column_errors,
    forward_gains,
    peaks,
    products_to_end,
    row_errors,
)
from mhc_compile.gradients import GradientNorms
from mhc_compile.observation import SiteCoefficients

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Mixing:
    """What a matrix for each token does, over the tokens of one call (arXiv 2512.24880).

    gain: means over tokens of each token's gain (figures 3 and 7); gain_of_mean: of the mean matrix (figure 8);
    mean: that matrix, rows being output streams. row_error, column_error: the largest |sum - 1| of any token;
    mean_column_error: the mean over tokens of each token's largest. peak: the mean over rows and tokens of a row's
    largest entry.
    """

    gain: Gain
    gain_of_mean: Gain
    mean: Matrix
    row_error: float
    column_error: float
    mean_column_error: float
    peak: float


@dataclass(frozen=True)
class SiteSample:
    """One site in one call.

    single: its own mixing matrices; composite: the products of those of this site to the last site of its trunk, None
    where the sites of the trunk have different numbers of tokens. similarity: the mean cosine over pairs of streams
    behind the site. pre, post: how much each stream is read and written, means over tokens. iterations: of the Sinkhorn
    that made its matrices, None where none did.
    """

    name: str
    trunk: int
    tokens: int
    single: Mixing
    composite: Mixing | None
    similarity: float
    pre: tuple[float, ...]
    post: tuple[float, ...]
    iterations: int | None


@dataclass
class Sample:
    """The diagnostics of one call.

    step: the number of the call; gradients: of the step it belongs to, None until they are known.
    """

    step: int
    sites: tuple[SiteSample, ...]
    gradients: GradientNorms | None = None

    def trunks(self) -> dict[int, list[SiteSample]]:
        """The sites of each trunk, in order."""
        found: dict[int, list[SiteSample]] = {}
        for site in self.sites:
            found.setdefault(site.trunk, []).append(site)
        return found

    def flat(self, sites: bool = True) -> dict[str, float]:
        """Names and values for a logger; without `sites` those of trunks and of the whole model alone."""
        values: dict[str, float] = {"mhc/step": float(self.step)}
        for number, trunk in self.trunks().items():
            values |= _of_trunk(f"trunk{number}", trunk)
        if sites:
            for site in self.sites:
                values |= _of_site(site)
        if self.gradients is not None:
            norms = self.gradients
            values |= {"mhc/grad_norm": norms.whole, "mhc/grad_norm_own": norms.own, "mhc/grad_norm_mhc": norms.mhc}
            if sites:
                values |= {f"mhc/grad_norm/{name}": value for name, value in norms.sites.items()}
        return values


def _of_trunk(name: str, sites: Sequence[SiteSample]) -> dict[str, float]:
    composites = [site.composite for site in sites if site.composite is not None]
    values = {
        "row_error": max(site.single.row_error for site in sites),
        "column_error": max(site.single.column_error for site in sites),
        "similarity": sites[-1].similarity,
        "lowest_similarity": min(site.similarity for site in sites),
    }
    if composites:
        values["composite_forward"] = max(one.gain.forward for one in composites)
        values["composite_backward"] = max(one.gain.backward for one in composites)
    return {f"mhc/{what}/{name}": value for what, value in values.items()}


def _of_site(site: SiteSample) -> dict[str, float]:
    values = {**_of_mixing("", site.single), "similarity": site.similarity, "peak": site.single.peak}
    values |= {"row_error": site.single.row_error, "column_error": site.single.column_error}
    if site.composite is not None:
        values |= _of_mixing("composite_", site.composite)
    named = {f"mhc/{what}/{site.name}": value for what, value in values.items()}
    for what, streams in (("pre", site.pre), ("post", site.post)):
        named |= {f"mhc/{what}/{site.name}/{stream}": value for stream, value in enumerate(streams)}
    return named


def _of_mixing(prefix: str, mixing: Mixing) -> dict[str, float]:
    return {
        f"{prefix}forward": mixing.gain.forward,
        f"{prefix}backward": mixing.gain.backward,
        f"{prefix}mean_forward": mixing.gain_of_mean.forward,
        f"{prefix}mean_backward": mixing.gain_of_mean.backward,
    }


# ---------------------------------------------------------------------------------------------- from tensors


def sample_of(step: int, seen: Iterable[SiteCoefficients]) -> Sample:
    """The sample that the coefficients of one call make."""
    sites = list(seen)
    composites: dict[str, Tensor] = {}
    for number in {site.trunk for site in sites}:
        trunk = [site for site in sites if site.trunk == number]
        if len({site.res.shape for site in trunk}) == 1:
            names = [site.name for site in trunk]
            composites |= zip(names, products_to_end([site.res for site in trunk]), strict=True)
    rows = [_numbers(site, composites.get(site.name)) for site in sites]
    numbers = iter(torch.cat(rows).tolist() if rows else ())  # one transfer from the device
    return Sample(step, tuple(_site(site, site.name in composites, numbers) for site in sites))


def _numbers(site: SiteCoefficients, composite: Tensor | None) -> Tensor:
    """Everything that is known of a site, in the order in which `_site` reads it, [...] in fp64."""
    parts = [site.similarity.mean(dtype=torch.float64)[None], site.pre.double().mean(0), site.post.double().mean(0)]
    parts.append(_mixing_numbers(site.res))
    if composite is not None:
        parts.append(_mixing_numbers(composite))
    return torch.cat(parts)


def _mixing_numbers(res: Tensor) -> Tensor:
    res = res.double()
    mean, columns = res.mean(0), column_errors(res)
    scalars = [forward_gains(res).mean(), backward_gains(res).mean(), forward_gains(mean), backward_gains(mean)]
    scalars += [row_errors(res).amax(), columns.amax(), columns.mean(), peaks(res).mean()]
    return torch.cat([torch.stack(scalars), mean.flatten()])


def _site(site: SiteCoefficients, composite: bool, numbers: Iterable[float]) -> SiteSample:
    source, n = iter(numbers), site.res.shape[-1]
    similarity = next(source)
    pre, post = (tuple(next(source) for _ in range(n)) for _ in range(2))
    single = _mixing(source, n)
    made = _mixing(source, n) if composite else None
    return SiteSample(site.name, site.trunk, len(site.res), single, made, similarity, pre, post, site.iterations)


def _mixing(numbers: Iterable[float], n: int) -> Mixing:
    source = iter(numbers)
    forward, backward, mean_forward, mean_backward, row, column, mean_column, peak = (next(source) for _ in range(8))
    mean = tuple(tuple(next(source) for _ in range(n)) for _ in range(n))
    single, of_mean = Gain(forward, backward), Gain(mean_forward, mean_backward)
    return Mixing(single, of_mean, mean, row, column, mean_column, peak)
