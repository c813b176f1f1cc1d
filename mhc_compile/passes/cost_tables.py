"""The costs of a model as the paper's tables 2 and 3 show them (arXiv 2512.24880), its sites, and L_r* three ways."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from mhc_compile.passes.cost_values import NodeCost, SiteSize, exact_length, formula_length
from mhc_compile.passes.plan_search import Unit, least_blocks
from mhc_compile.passes.quantities import count_text, duration, plural, size

_WIDTH = 110  # of a printed table when the output is no terminal


@dataclass(frozen=True)
class UnitCosts:
    """What lies between two legal cuts: the names of its sites, its ops, and its seconds forward and backward."""

    sites: tuple[str, ...]
    ops: tuple[NodeCost, ...]
    unit: Unit
    seconds: tuple[float, float]


def text(sizes: Sequence[SiteSize], units: Sequence[UnitCosts]) -> str:
    """All tables; sizes: of each site."""
    console = Console(file=io.StringIO(), width=min(Console().width, _WIDTH) if Console().is_terminal else _WIDTH)
    groups = Counter(sizes)
    for one, number in groups.items():
        console.print(
            f"{plural(number, 'site')} of n = {one.n} streams, C = {one.features}, {plural(one.tokens, 'token')} of "
            f"{one.one // (one.tokens * one.features)} bytes an element",
            markup=False,
            highlight=False,
        )
    tables = (
        ("forward traffic of a residual stream, elements a token (the paper's table 2):", traffic_table(groups)),
        ("activations with replay in equal blocks (the paper's table 3):", activation_table(sizes, units)),
        (lengths_text(sizes, units), site_table(units)),
    )
    for title, table in tables:
        console.print(title, markup=False, highlight=False)
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(headers[0], overflow="fold")
    for header in headers[1:]:
        table.add_column(header, justify="right", overflow="fold")
    return table


# What each op of a site reads and writes, a token: in units of n C, of C, of n and of n n.
_Traffic = tuple[int, int, int, int]
_UNFUSED: dict[str, tuple[_Traffic, _Traffic]] = {
    "coefficients": ((1, 0, 0, 0), (0, 0, 2, 1)),
    "aggregate": ((1, 0, 1, 0), (0, 1, 0, 0)),
    "merge: post f": ((0, 1, 1, 0), (1, 0, 0, 0)),
    "merge: res X": ((1, 0, 0, 1), (1, 0, 0, 0)),
    "merge: sum": ((2, 0, 0, 0), (1, 0, 0, 0)),
}
_OPS: dict[str, tuple[_Traffic, _Traffic]] = {
    "coefficients": _UNFUSED["coefficients"],
    "aggregate": _UNFUSED["aggregate"],
    "merge": ((1, 1, 1, 1), (1, 0, 0, 0)),
}


def elements(traffic: _Traffic, n: int, features: int) -> int:
    """Elements a token."""
    return traffic[0] * n * features + traffic[1] * features + traffic[2] * n + traffic[3] * n * n


def traffic(rows: dict[str, tuple[_Traffic, _Traffic]], one: SiteSize) -> tuple[int, int]:
    """Elements that a site reads and writes, a token, in the forward."""
    return (
        sum(elements(read, one.n, one.features) for read, _ in rows.values()),
        sum(elements(written, one.n, one.features) for _, written in rows.values()),
    )


def traffic_table(groups: Counter[SiteSize]) -> Table:
    """Table 2: elements read and written a token by one site's residual stream, and bytes of all sites."""
    table = _table("op", "reads", "writes", "all sites")
    for one, number in groups.items():
        times = number * one.one // one.features  # bytes of one element of every token of every site
        table.add_row("plain add", _count(2 * one.features), _count(one.features), size(3 * one.features * times))
        for name, rows in (("formula, op by op", _UNFUSED), ("mHC ops", _OPS)):
            for op, (read, written) in rows.items():
                counts = elements(read, one.n, one.features), elements(written, one.n, one.features)
                table.add_row(f"  {op}", *map(_count, counts), size(sum(counts) * times))
            counts = traffic(rows, one)
            table.add_row(f"{name}: total", *map(_count, counts), size(sum(counts) * times))
    return table


def _count(number: int) -> str:
    return f"{number:,}"


def activation_table(sizes: Sequence[SiteSize], units: Sequence[UnitCosts]) -> Table:
    """Table 3: what is kept of a site and what is replayed, a token and for all sites of a microbatch."""
    table = _table("value", "elements", "bytes", "kept")
    length = _exact(sizes)
    for one, number in Counter(sizes).items():
        wide, narrow = one.n * one.features, one.features
        states = -(-number // length) * one.n * one.one
        table.add_row("first state of a block", _count(wide), size(states), f"every {plural(length, 'site')}")
        table.add_row("output of the branch", _count(narrow), size(number * one.one), "every site")
        longest = min(length, number)
        for name, width in (("state", wide), ("aggregate", narrow), ("its norm", narrow)):
            table.add_row(name, _count(width), size(longest * one.one * width // narrow), f"while {longest} replay")
    branches = sum(one.unit.kept for one in units)
    table.add_row("all that this graph's branches keep", "", size(branches), "always")
    table.add_row("all that its sites keep without replay", "", size(sum(one.unit.saved for one in units)), "")
    return table


def _exact(sizes: Sequence[SiteSize]) -> int:
    if not sizes:
        return 1
    return exact_length([one.n * one.one for one in sizes], [(one.n + 2) * one.one for one in sizes])


def lengths_text(sizes: Sequence[SiteSize], units: Sequence[UnitCosts]) -> str:
    """L_r* by the formula, by the objective, and as planned for one stage and one microbatch."""
    if not sizes:
        return "no sites: nothing to replay"
    blocks, peak = least_blocks([one.unit for one in units])
    bounds = pairwise([*blocks, len(units)])
    lengths = [sum(len(one.sites) for one in units[start:end]) for start, end in bounds]
    planned = ", ".join(str(length) for length in lengths if length)
    return (
        f"sites a block: {formula_length(sizes[0].n, len(sizes)):.2f} by sqrt(nL / (n + 2)), {_exact(sizes)} by the "
        f"exact objective, {planned} as planned for one stage (peak {size(peak)})"
    )


def site_table(units: Sequence[UnitCosts]) -> Table:
    """The work of each site and its branch, and the graph's other parts."""
    table = _table("site", "FLOPs", "of mHC", "moved", "kept", "of mHC", "forward", "backward")
    for one in units:
        table.add_row(
            ", ".join(one.sites) or "(no site)",
            count_text(sum(op.flops + op.backward_flops for op in one.ops)),
            count_text(sum(op.flops + op.backward_flops for op in one.ops if _is_mhc(op))),
            size(sum(op.bytes + op.backward_bytes for op in one.ops)),
            size(one.unit.kept),
            size(one.unit.saved),
            *map(duration, one.seconds),
        )
    return table


def _is_mhc(op: NodeCost) -> bool:
    return op.op.startswith("mhc.")
