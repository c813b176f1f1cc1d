"""What a conversion keeps of itself beside the weights: its options and its sites, in the form that is saved.

The record travels in the model's `state_dict`, as JSON bytes in a uint8 tensor (`mhc._extra_state`), and in the
`config.json` of a saved Hugging Face model. It is part of the checkpoint format, and versioned.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mhc_compile.config import FUNCTION, MHCConfig
from mhc_compile.errors import ConfigError, wrong
from mhc_compile.site_form import SiteForm

VERSION = 1
KEY = "mhc._extra_state"
_FIRST = ("n", "init", "iterations", "eps", "tie_shared", "backend")  # the options that the first records had
# Every field of a SiteRecord but its name is in one of these, as the options are in config.FUNCTION and NO_FUNCTION.
SITE_FUNCTION = ("features", "constraint", "applications")
SITE_NO_FUNCTION = ("stream", "trunk", "line", "double")  # what it starts from, where it is, how exact it is
_WHOLE = "save and load the whole state_dict, without changing that entry"
_RETRY = "save the model again with this version, or load it with the version that wrote it"
_CONVERT = "restore(model), then mhc_compile.load(checkpoint, model) converts as the checkpoint says"


@dataclass(frozen=True)
class SiteRecord:
    """What is kept of a site.

    name: its name in `model.mhc`; features: C; stream: its own stream; trunk: the trunk's number; line: where its
    add stands; double: float64 streams; applications: how often it is applied in a call (tied layers: several).
    constraint: its own, where it has another than the conversion.
    """

    name: str
    features: int
    stream: int
    trunk: int
    line: str
    double: bool = False
    applications: int = 1
    constraint: str = ""

    def form(self, config: MHCConfig) -> SiteForm:
        """Which parameters it has, in a conversion with these options."""
        return SiteForm.of(config, self.constraint)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; without the constraint where it has none, so that earlier releases read it too."""
        return {name: value for name, value in asdict(self).items() if value or name != "constraint"}


@dataclass(frozen=True)
class Function:
    """What decides what the weights of a conversion compute.

    options: name -> value, for `config.FUNCTION`. sites: name -> its values of `SITE_FUNCTION`, in that order.
    """

    options: Mapping[str, Any]
    sites: Mapping[str, tuple[Any, ...]]

    def differences(self, other: Function) -> list[str]:
        """What makes weights of `other` compute another function here, in words; empty if nothing does."""
        found = [
            f"{name} is {other.options[name]!r}, here {own!r}"
            for name, own in self.options.items()
            if other.options[name] != own
        ]
        found += _listed("it has no site", self.sites.keys() - other.sites.keys())
        found += _listed("it has also the site", other.sites.keys() - self.sites.keys())
        return found + [
            f"{field} of site {name!r} is {_said(theirs)}, here {_said(own)}"
            for name in sorted(self.sites.keys() & other.sites.keys())
            for field, theirs, own in zip(SITE_FUNCTION, other.sites[name], self.sites[name], strict=True)
            if theirs != own
        ]

    def check(self, other: Function, step: str = _CONVERT) -> None:
        """Raise ConfigError when weights of `other` would compute another function here. step: what to do then."""
        found = self.differences(other)
        if found:
            legal = f"weights of the same {', '.join(FUNCTION)} and sites"
            raise ConfigError(wrong("the checkpoint", "of another conversion: " + "; ".join(found), legal, step))

    def check_state(self, state: Mapping[str, Any], prefix: str = "", step: str = _CONVERT) -> None:
        """The same of a state_dict; one without a record is left alone."""
        if prefix + KEY in state:
            self.check(Record.from_tensor(state[prefix + KEY]).function, step)


@dataclass(frozen=True)
class Record:
    """A conversion.

    sites: of the model; plain: names of the residual adds that `only` and `skip` left as they are; no_grad: module
    and source line of the adds that were refused in no-grad regions.
    """

    config: MHCConfig
    sites: tuple[SiteRecord, ...]
    plain: frozenset[str] = frozenset()
    no_grad: frozenset[tuple[str, str]] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "version": VERSION,
            "config": self._saved_config(),
            "sites": [site.as_dict() for site in self.sites],
            "plain": sorted(self.plain),
            "no_grad": sorted(map(list, self.no_grad)),
        }

    def _saved_config(self) -> dict[str, Any]:
        """Without the options that came later and are not used, so that earlier releases read the record too."""
        default = asdict(MHCConfig())
        own = asdict(self.config).items()
        return {name: value for name, value in own if name in _FIRST or value != default[name]}

    @classmethod
    def from_dict(cls, found: Any) -> Record:
        """The record that `as_dict` gave. Raises ConfigError for anything else, and for a newer version."""
        version = found.get("version") if isinstance(found, dict) else None
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise ConfigError(wrong("the version of the mHC record", repr(version), f"1 to {VERSION}", _RETRY))
        try:
            return cls(
                MHCConfig(**found["config"]),
                tuple(SiteRecord(**site) for site in found["sites"]),
                frozenset(found["plain"]),
                frozenset((module, line) for module, line in found["no_grad"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            keys = ", ".join(field.name for field in fields(cls))
            message = wrong("the mHC record", f"not readable ({error})", f"a table with {keys}", _RETRY)
            raise ConfigError(message) from error

    def to_tensor(self) -> Tensor:
        """The record as a uint8 tensor of JSON, which every checkpoint format can hold."""
        return torch.frombuffer(bytearray(json.dumps(self.as_dict()).encode()), dtype=torch.uint8).clone()

    @classmethod
    def from_tensor(cls, data: object) -> Record:
        """The record in a tensor that `to_tensor` gave; ConfigError for another value."""
        legal = "the tensor of JSON bytes that a converted model's state_dict holds there"
        if not isinstance(data, Tensor) or data.dim() != 1:
            raise ConfigError(wrong(KEY, f"a {type(data).__name__}", legal, _WHOLE))
        try:
            found = json.loads(bytes(data.to("cpu", torch.uint8).tolist()))
        except ValueError as error:
            raise ConfigError(wrong(KEY, f"no JSON ({error})", legal, _WHOLE)) from error
        return cls.from_dict(found)

    @property
    def function(self) -> Function:
        """What decides what its weights compute."""
        return Function(
            {name: getattr(self.config, name) for name in FUNCTION},
            {site.name: tuple(getattr(site, name) for name in SITE_FUNCTION) for site in self.sites},
        )


def _said(value: Any) -> str:
    return "the conversion's" if value == "" else repr(value)


def _listed(words: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return [f"{words} {', '.join(ordered[:3])}{more}"] if ordered else []


def unique(records: Iterable[SiteRecord]) -> tuple[SiteRecord, ...]:
    """One record a name: tied applications of a shared layer have one. Raises ConfigError if their widths differ."""
    every = list(records)
    times = Counter(record.name for record in every)
    first: dict[str, SiteRecord] = {}
    for record in every:
        kept = first.setdefault(record.name, record)
        if kept.features != record.features:
            widths = f"{kept.features} and {record.features}"
            step = "convert with tie_shared=False"
            raise ConfigError(wrong(f"the width of the tied sites {record.name!r}", widths, "one width", step))
    return tuple(SiteRecord(**{**asdict(one), "applications": times[name]}) for name, one in first.items())
