"""What in a sample calls for a look: composite gains that grow, streams that collapse, Sinkhorn that does not work.

Each finding has a kind and the places that it is about, so that none is told twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mhc_compile.errors import wrong
from mhc_compile.monitor_sample import Sample, SiteSample

MAX_GAIN = 3.0
"""Twice the composite gain that mHC had at 27B (1.6), and a thousandth of what HC had (3000; arXiv 2512.24880)."""
EQUAL = 0.9999  # mean cosine between streams: random mHC weights on a small Llama or GPT-2 give 0.96 to 0.9997
SATURATED = 0.999  # of a row in one entry: Sinkhorn's gradient is that entry's rest, as small as for logits 8 apart
UNBALANCED = 0.1  # mean over tokens of the largest |column sum - 1|: backward gain 1.1 of a single site


class StabilityWarning(UserWarning):
    """What a Monitor warns of."""


@dataclass
class Health:
    """Looks at the samples of one run, in order.

    max_gain: of the composite matrices of a trunk; warm_up: calls before which streams that were never different may be
    equal (with init="identity" they start so).
    """

    max_gain: float
    warm_up: int
    _differed: set[int] = field(default_factory=set)
    _told: set[tuple[str, str]] = field(default_factory=set)

    def findings(self, sample: Sample) -> list[str]:
        """What is new in a sample, in words."""
        messages: dict[str, list[str]] = {}
        for kind, place, message in self._all(sample):
            if (kind, place) not in self._told:
                self._told.add((kind, place))
                messages.setdefault(kind, []).append(message)
        return [_joined(found) for found in messages.values()]

    def _all(self, sample: Sample) -> Iterator[tuple[str, str, str]]:
        for number, trunk in sample.trunks().items():
            yield from self._gain(sample.step, number, trunk)
            yield from self._collapse(sample.step, number, trunk)
        for site in sample.sites:
            if site.iterations is not None:
                yield from _sinkhorn(sample.step, site, site.iterations)

    def _gain(self, step: int, number: int, trunk: list[SiteSample]) -> Iterator[tuple[str, str, str]]:
        gains = [
            (max(site.composite.gain.forward, site.composite.gain.backward), site.name)
            for site in trunk
            if site.composite is not None
        ]
        worst, name = max(gains, default=(0.0, ""))
        if not worst <= self.max_gain:
            what = f"the composite gain from {name} to the end of trunk {number} at step {step}"
            legal = f"up to {self.max_gain:g} (mHC had 1.6 at 27B, HC 3000; max_gain= of the Monitor)"
            step_on = "lower the learning rate of res: scale_updates(optimizer, model, res=0.1)"
            yield "gain", str(number), wrong(what, f"{worst:.4g}", legal, step_on)

    def _collapse(self, step: int, number: int, trunk: list[SiteSample]) -> Iterator[tuple[str, str, str]]:
        lowest = min(site.similarity for site in trunk)
        if lowest < EQUAL:
            self._differed.add(number)
        elif number in self._differed or step >= self.warm_up:
            what = f"the similarity of the streams of trunk {number} at step {step}"
            step_on = "raise the learning rate of the mHC parameters, or start with another init"
            yield "collapse", str(number), wrong(what, f"{lowest:.6f} at every site", f"below {EQUAL}", step_on)


def _sinkhorn(step: int, site: SiteSample, iterations: int) -> Iterator[tuple[str, str, str]]:
    if site.single.peak > SATURATED:
        what = f"the largest entry of each row of res of {site.name} at step {step}"
        step_on = "lower the learning rate of res: scale_updates(optimizer, model, res=0.1)"
        legal = f"up to {SATURATED} (beyond it Sinkhorn gives no gradient)"
        yield "saturated", site.name, wrong(what, f"{site.single.peak:.5f} in the mean", legal, step_on)
    if site.single.mean_column_error > UNBALANCED:
        what = f"the error of the column sums of res of {site.name} at step {step}"
        step_on = f"convert with more iterations than {iterations}, or lower the learning rate of res: scale_updates"
        found = f"{site.single.mean_column_error:.2g} in the mean"
        yield "unbalanced", site.name, wrong(what, found, f"up to {UNBALANCED}", step_on)


def _joined(messages: list[str]) -> str:
    more = len(messages) - 1
    return messages[0] + (f" (and {more} more site{'s' if more > 1 else ''} or trunks alike)" if more else "")
