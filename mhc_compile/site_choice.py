"""Which of the sites that were found are converted, and how: `only=`, `skip=` and `site_constraints=`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from mhc_compile.config import MHCConfig
from mhc_compile.errors import ConfigError, wrong
from mhc_compile.record import SiteRecord

# A module pattern, several, or a function of a site.
Choice = str | Iterable[str] | Callable[[SiteRecord], bool]

# Names of constraints by pattern, the last that matches a site; or a function of a site, None for the config's.
Constraints = Mapping[str, str] | Callable[[SiteRecord], str | None]

_STEP = "explain(model) lists the names of the sites"
_LEGAL = "a module pattern such as 'model.layers.0' or '*.mlp', several of them, or a function SiteRecord -> bool"


def left_plain(sites: Sequence[SiteRecord], only: Choice | None, skip: Choice | None) -> set[str]:
    """Names of the sites that stay plain adds: those that `only` does not name, and those that `skip` does.

    A pattern is that of `fnmatch`; it stands for the sites it matches, and for all sites in a module it matches.
    Raises ConfigError for a pattern that matches no site, and when no site is left.
    """
    names = {site.name for site in sites}
    kept = names if only is None else chosen("only", only, sites)
    kept = kept - (set() if skip is None else chosen("skip", skip, sites))
    if not kept:
        step = "leave one; a model without sites is the plain model"
        raise ConfigError(wrong("what only and skip leave", "no site", f"at least one of {_some(names)}", step))
    return names - kept


def own_constraints(sites: Sequence[SiteRecord], choice: Constraints | None, config: MHCConfig) -> dict[str, str]:
    """The constraint of each site that `site_constraints` gives another one than the config has.

    Raises ConfigError for a pattern that matches no site, and for a constraint that does not go with the config.
    """
    if choice is None:
        return {}
    if callable(choice):
        found = {site.name: choice(site) for site in sites}
    elif isinstance(choice, Mapping):
        found = {
            name: constraint
            for pattern, constraint in choice.items()
            for name in sorted(chosen("site_constraints", [pattern], sites))
        }
    else:
        legal = "{'*.mlp': 'identity'}, or a function SiteRecord -> name or None"
        raise ConfigError(wrong("site_constraints", repr(choice), legal, _STEP))
    for constraint in found.values():
        if constraint is not None:
            config.check_constraint(constraint)
    return {name: one for name, one in found.items() if one is not None and one != config.constraint}


def chosen(option: str, choice: Choice, sites: Sequence[SiteRecord]) -> set[str]:
    """Names of the sites that an option chooses. Raises ConfigError for a pattern that matches none."""
    if callable(choice):
        return {site.name for site in sites if _answer(option, choice, site)}
    patterns = [choice] if isinstance(choice, str) else _patterns(option, choice)
    found: set[str] = set()
    for pattern in patterns:
        matched = {site.name for site in sites if _matches(site.name, pattern)}
        if not matched:
            legal = f"a pattern of {_some(site.name for site in sites)}"
            raise ConfigError(wrong(option, f"{pattern!r}, which matches no site", legal, "explain(model) lists all"))
        found |= matched
    return found


def _patterns(option: str, choice: Iterable[str]) -> list[str]:
    if not isinstance(choice, Iterable):
        raise ConfigError(wrong(option, repr(choice), _LEGAL, _STEP))
    patterns = list(choice)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(wrong(option, repr(patterns), _LEGAL, _STEP))
    return patterns


def _answer(option: str, choice: Callable[[SiteRecord], bool], site: SiteRecord) -> bool:
    answer = choice(site)
    if not isinstance(answer, bool):
        step = "compare, as in lambda site: site.trunk == 0"
        raise ConfigError(wrong(f"{option}({site.name!r})", repr(answer), "True or False", step))
    return answer


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (", ..." if len(ordered) > 4 else "")
