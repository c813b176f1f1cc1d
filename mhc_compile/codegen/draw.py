"""The picture of a model's trunks: sites from the input to the output, what reads the trunk, blocks, cuts, refusals.

A trunk runs from left to right, in rows as the lines of a text. All lengths are inches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import ConfigError, wrong

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png", ".pdf")
_SLOTS = 9  # sites in a row
_SLOT, _MARGIN, _LEAD = 1.12, 0.3, 0.62  # widths: of a site, of the edges, of the way into and out of a trunk
_EDGES = 2 * _MARGIN + 2 * _LEAD
_SIGN = 0.6  # of a sign of the legend and the gaps around it
_NARROW = 8.0  # the least width of a picture
_MANY = 24  # sites from which on alike groups are folded
_TEXT, _SMALL = 8.0, 7.0  # points
_INK, _PALE, _GROUND = "#222222", "#666666", "#f0f0f0"
_TRUNK, _READ, _BLOCK, _CUT = "#0072B2", "#007A5A", "#E69F00", "#C44601"  # told apart by the colour-blind


@dataclass(frozen=True)
class DrawnSite:
    """A site: its name, the numbers of other trunks that its branch reads, and its place in a plan."""

    name: str
    reads: tuple[int, ...] = ()
    block: int | None = None
    stage: int | None = None


@dataclass(frozen=True)
class Tap:
    """A readout behind the first `behind` sites of a trunk; readers: the modules that get it."""

    behind: int
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Lane:
    """A trunk."""

    number: int
    features: int
    entry: str
    sites: tuple[DrawnSite, ...]
    taps: tuple[Tap, ...] = ()


@dataclass(frozen=True)
class Picture:
    """What is drawn. refused: how often, why, and where an add stays plain."""

    title: str
    subtitle: str
    n: int
    lanes: tuple[Lane, ...]
    refused: tuple[tuple[int, str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _Slot:
    """One place in a row: a site, or several groups that are alike (`folded`)."""

    label: str
    first: int  # sites of the trunk before it
    count: int = 1
    site: DrawnSite | None = None
    note: str = ""


@dataclass
class _Group:
    """The sites of one block of the model."""

    name: str
    slots: list[_Slot] = field(default_factory=list)


def check_suffix(path: Path) -> None:
    """ConfigError for a path that names no format of a picture."""
    if path.suffix.lower() not in SUFFIXES:
        legal = f"a path that ends in {', '.join(SUFFIXES)}"
        raise ConfigError(wrong("the picture's path", repr(str(path)), legal, "draw(model, inputs, 'model.svg')"))


def save(picture: Picture, path: Path) -> None:
    """Write the picture in the format of the path's suffix. ConfigError without matplotlib, or for another suffix."""
    check_suffix(path)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        step = "pip install 'mhc-compile[demo]', or print(explain(model, inputs))"
        raise ConfigError(wrong("matplotlib", "not installed", "an installed matplotlib", step)) from error
    with matplotlib.rc_context({"svg.hashsalt": "mhc", "font.family": "DejaVu Sans", "path.simplify": False}):
        sheet = _Sheet(picture)
        figure = Figure(figsize=(sheet.width, sheet.height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, sheet.width), ylim=(-sheet.height, 0))
        axes.set_axis_off()
        sheet.draw(axes)
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
        figure.savefig(path, dpi=110, metadata=metadata)


# ------------------------------------------------------------------------------------------------- layout


def groups_of(lane: Lane, *, fold: bool) -> list[_Group]:
    """The sites of a trunk by blocks of the model: what they share up to their first number."""
    found = []
    place = 0
    for name, members in groupby(lane.sites, key=lambda site: _group_name(site.name)):
        sites = list(members)
        labels = _labels([site.name.removeprefix(name).removeprefix(".") or site.name for site in sites])
        slots = [_Slot(label, place + number, site=site) for number, (label, site) in enumerate(zip(labels, sites))]  # noqa: B905
        found.append(_Group(name, slots))
        place += len(sites)
    return _folded(found, lane) if fold else found


def _group_name(name: str) -> str:
    steps = name.split(".")
    number = next((place for place, step in enumerate(steps) if step.isdecimal()), None)
    return ".".join(steps[: -1 if number is None else number + 1])


def _labels(rests: list[str]) -> list[str]:
    """The last step of each name, where that tells them apart."""
    last = [rest.rpartition(".")[2] for rest in rests]
    clear = len(set(last)) == len(last) and not any(one.isdecimal() for one in last)
    return last if clear else rests


def _folded(groups: list[_Group], lane: Lane) -> list[_Group]:
    """Runs of groups that are alike, as their first, a count, and their last."""

    def form(group: _Group) -> tuple[Any, ...]:
        tapped = {tap.behind for tap in lane.taps if tap.behind < len(lane.sites)}
        return tuple(
            (slot.label, slot.site and (slot.site.reads, slot.site.block, slot.site.stage), slot.first + 1 in tapped)
            for slot in group.slots
        )

    found: list[_Group] = []
    for _, members in groupby(groups, key=form):
        run = list(members)
        if len(run) < 4:
            found += run
            continue
        inner = run[1:-1]
        count = sum(len(group.slots) for group in inner)
        note = f"{_last(inner[0].name)} to {_last(inner[-1].name)}"
        slot = _Slot(f"{len(inner)} alike", inner[0].slots[0].first, count, None, f"{note}, {count} sites")
        found += [run[0], _Group("", [slot]), run[-1]]
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def rows_of(groups: Sequence[_Group], room: int = _SLOTS) -> list[list[_Group]]:
    """Groups in rows; one that is longer than a row is cut."""
    rows: list[list[_Group]] = [[]]
    used = 0
    for group in groups:
        left = list(group.slots)
        while left:
            if used and (used == room or (len(left) > room - used and len(group.slots) <= room)):
                rows.append([])
                used = 0
            part, left = left[: room - used], left[room - used :]
            rows[-1].append(_Group(group.name, part))
            used += len(part)
    return rows


def _readers(lane: Lane) -> str:
    """The modules that read the end of a trunk."""
    names = [name for tap in lane.taps if tap.behind == len(lane.sites) for name in tap.readers if name]
    return ", ".join(dict.fromkeys(names)) or "the output"


def _length(row: Sequence[_Group]) -> int:
    return sum(len(group.slots) for group in row)


# ------------------------------------------------------------------------------------------------ drawing


class _Sheet:
    """Draws a picture from the top down."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        fold = sum(len(lane.sites) for lane in picture.lanes) > _MANY
        self._lanes = [(lane, rows_of(groups_of(lane, fold=fold))) for lane in picture.lanes]
        longest = max((_length(row) for _, rows in self._lanes for row in rows), default=0)
        exits = [_length(rows[-1]) * _SLOT + width(_readers(lane), _TEXT) for lane, rows in self._lanes]
        wide = min(_EDGES + max(exits, default=0.0) + 0.1, _EDGES + _SLOTS * _SLOT)
        sites = [site for lane in picture.lanes for site in lane.sites]
        self._cuts = {site.name for before, site in pairwise(sites) if site.stage != before.stage}
        self._lines = min(picture.n, 4)
        legend = 2 * _MARGIN + sum(_SIGN + width(text, _SMALL) for _, text in self._signs())
        self.width = max(_NARROW, _EDGES + longest * _SLOT, wide, legend)
        self._planned = any(site.stage is not None for lane in picture.lanes for site in lane.sites)
        self._footer = self._footer_lines()
        rows = sum(self._row_height(lane) * len(rows) for lane, rows in self._lanes)
        self.height = 0.75 + 0.34 * len(self._lanes) + rows + 0.62 + 0.17 * len(self._footer) + 0.15

    def _row_height(self, lane: Lane) -> float:
        return 1.62 + self._band(lane) + (0.42 if self._planned else 0.0)

    def _band(self, lane: Lane) -> float:
        """Height of what taps between sites are named in."""
        return 0.26 if any(tap.behind < len(lane.sites) for tap in lane.taps) else 0.0

    def draw(self, axes: Axes) -> None:
        """Everything."""
        self._axes = axes
        self._write(_MARGIN, -0.24, self.picture.title, size=12, weight="bold")
        self._write(_MARGIN, -0.48, self.picture.subtitle, size=_TEXT, color=_PALE)
        y = -0.75
        for lane, rows in self._lanes:
            self._lane_title(lane, y)
            y -= 0.34
            for number, row in enumerate(rows):
                self._row(lane, row, y, first=number == 0, last=number == len(rows) - 1)
                y -= self._row_height(lane)
        self._legend(y - 0.18)
        for number, (text, color) in enumerate(self._footer):
            self._write(_MARGIN, y - 0.62 - 0.17 * number, text, size=_SMALL, color=color)

    def _lane_title(self, lane: Lane, y: float) -> None:
        head = f"trunk {lane.number}"
        self._write(_MARGIN, y - 0.12, head, size=9, weight="bold", color=_TRUNK)
        rest = f"{_count(len(lane.sites), 'site')}, C = {lane.features}, starts at {lane.entry}"
        x = _MARGIN + width(head, 9, bold=True) + 0.12
        self._write(x, y - 0.12, shortened(rest, self.width - _MARGIN - x, _TEXT), size=_TEXT, color=_PALE)

    def _row(self, lane: Lane, row: list[_Group], y: float, *, first: bool, last: bool) -> None:
        trunk = y - 0.52 - self._band(lane)
        x = _MARGIN + _LEAD
        end = x + _length(row) * _SLOT
        for group in row:
            self._group(group, x, y, trunk)
            x += len(group.slots) * _SLOT
        closing = [tap for tap in lane.taps if tap.behind == len(lane.sites)] if last else []
        self._streams(_MARGIN + _LEAD, end, trunk, opens=first, closes=bool(closing), goes_on=not last)
        if first:
            self._taps([tap for tap in lane.taps if tap.behind == 0], _MARGIN + _LEAD, y, trunk)
        x = _MARGIN + _LEAD
        for group in row:
            for slot in group.slots:
                self._slot(slot, x, trunk)
                inner = [tap for tap in lane.taps if tap.behind == slot.first + slot.count]
                self._taps([tap for tap in inner if tap not in closing], x + _SLOT, y, trunk)
                x += _SLOT
        if closing:
            self._exit(lane, end, trunk)
        if self._planned:
            self._plan([slot for group in row for slot in group.slots], trunk - 1.0, y)

    def _group(self, group: _Group, x: float, y: float, trunk: float) -> None:
        from matplotlib.patches import FancyBboxPatch

        wide, low = len(group.slots) * _SLOT - 0.08, trunk - 0.93
        if not group.name:
            return
        style = "round,pad=0,rounding_size=0.06"
        corner, high = (x + 0.04, low), y - 0.06 - low
        self._axes.add_patch(FancyBboxPatch(corner, wide, high, boxstyle=style, fc=_GROUND, ec="none"))
        name = shortened(group.name, wide - 0.12, _SMALL, front=True)
        self._write(x + 0.1, y - 0.17, name, size=_SMALL, color=_PALE)

    def _streams(self, x: float, end: float, y: float, *, opens: bool, closes: bool, goes_on: bool) -> None:
        """The n streams of a row; they fan out of one line where the trunk begins and into one where it is read out."""
        for place in range(self._lines):
            line = y + (place - (self._lines - 1) / 2) * 0.055
            self._line([(x, line), (end, line)], _TRUNK, 1.1)
            if opens:
                self._line([(x - 0.3, y), (x, line)], _TRUNK, 1.1)
            else:
                self._line([(x - 0.16, line), (x, line)], _TRUNK, 1.1)
            if closes:
                self._line([(end, line), (end + 0.24, y)], _TRUNK, 1.1)
            elif goes_on:
                self._line([(end, line), (end + 0.16, line)], _TRUNK, 1.1)
        if opens:
            self._line([(x - 0.56, y), (x - 0.3, y)], _TRUNK, 1.1)
            self._write(x - 0.3, y + 0.2, "expand", size=_SMALL, color=_TRUNK, ha="center")
        if goes_on:
            self._arrow((end + 0.16, y), (end + 0.36, y), _TRUNK)

    def _slot(self, slot: _Slot, x: float, y: float) -> None:
        if slot.site is None:
            self._box(x + 0.1, y - 0.3, _SLOT - 0.2, 0.6, _PALE, "--")
            self._write(x + _SLOT / 2, y + 0.13, slot.label, size=_TEXT, ha="center", weight="bold", zorder=6)
            for place, text in enumerate(slot.note.split(", ")):
                text = shortened(text, _SLOT - 0.26, _SMALL)
                self._write(x + _SLOT / 2, y - 0.03 - 0.14 * place, text, size=_SMALL, ha="center", zorder=6)
            return
        inlet, outlet, top = x + 0.26, x + _SLOT - 0.26, y - 0.36
        self._read(inlet, y)
        self._arrow((inlet, y - 0.03), (inlet, top), _INK)
        self._arrow((outlet, top), (outlet, y - 0.08), _INK)
        self._merge(outlet, y)
        self._box(x + 0.1, top - 0.46, _SLOT - 0.2, 0.46, _INK, "-")
        self._label(slot, x + _SLOT / 2, top - 0.23, _SLOT - 0.28)

    def _box(self, x: float, y: float, wide: float, high: float, color: str, style: str) -> None:
        from matplotlib.patches import FancyBboxPatch

        shape = "round,pad=0,rounding_size=0.05"
        box = FancyBboxPatch((x, y), wide, high, boxstyle=shape, fc="white", ec=color, ls=style, lw=0.9, zorder=3)
        self._axes.add_patch(box)

    def _read(self, x: float, y: float) -> None:
        from matplotlib.patches import Circle

        self._axes.add_patch(Circle((x, y), 0.05, fc=_TRUNK, ec="white", lw=0.8, zorder=4))

    def _merge(self, x: float, y: float) -> None:
        from matplotlib.patches import Circle

        self._axes.add_patch(Circle((x, y), 0.09, fc="white", ec=_TRUNK, lw=1.3, zorder=4))
        for dx, dy in ((0.05, 0), (0, 0.05)):
            self._line([(x - dx, y - dy), (x + dx, y + dy)], _TRUNK, 1.3, zorder=5)

    def _diamond(self, x: float, y: float) -> None:
        self._axes.plot([x], [y], marker="D", ms=5, mfc=_READ, mec="white", mew=0.6, zorder=6)

    def _label(self, slot: _Slot, x: float, y: float, room: float) -> None:
        assert slot.site is not None
        lines = wrapped(slot.label, room, _TEXT)
        reads = slot.site.reads
        extra = [f"reads trunk {', '.join(map(str, reads))}"] if reads else []
        size = _TEXT if len(lines) + len(extra) < 3 else _SMALL
        step = 0.135
        top = y + step * (len(lines) + len(extra) - 1) / 2
        for place, text in enumerate(lines):
            self._write(x, top - step * place, text, size=size, ha="center", zorder=6)
        for place, text in enumerate(extra, len(lines)):
            self._write(x, top - step * place, text, size=6.3, ha="center", color=_READ, zorder=6)

    def _taps(self, taps: Sequence[Tap], x: float, y: float, trunk: float) -> None:
        """A readout between two sites: an arrow up to what reads it."""
        if not taps:
            return
        readers = list(dict.fromkeys(name for tap in taps for name in tap.readers))
        self._diamond(x, trunk)
        self._arrow((x, trunk + 0.1), (x, y - 0.36), _READ)
        text = f"{readers[0]}" if len(readers) == 1 and readers[0] else _count(len(readers), "reader")
        self._write(x + 0.06, y - 0.34, shortened(text, _SLOT - 0.2, 6.5, front=True), size=6.5, color=_READ, zorder=6)

    def _exit(self, lane: Lane, x: float, y: float) -> None:
        readers = _readers(lane).split(", ")
        self._diamond(x + 0.24, y)
        self._arrow((x + 0.27, y), (x + 0.48, y), _READ)
        self._write(x + 0.26, y + 0.2, "readout", size=_SMALL, color=_READ, ha="center")
        room = self.width - x - 0.52 - 0.1
        if room < 0.9:
            names = [shortened(_last(name), 0.85, _SMALL) for name in readers[:2]]
            for place, name in enumerate([*names, *(["..."] if len(readers) > 2 else [])]):
                self._write(x + 0.2, y - 0.2 - 0.13 * place, name, size=_SMALL, color=_READ)
            return
        self._write(x + 0.52, y, shortened(", ".join(readers), room, _TEXT), size=_TEXT, color=_READ)

    def _plan(self, slots: Sequence[_Slot], y: float, top: float) -> None:
        """Under the sites: brackets around blocks; the stage of each run of sites; a line where a cut lies."""
        x = _MARGIN + _LEAD
        places = [(number, slot) for number, slot in enumerate(slots) if slot.site is not None]
        for block, members in groupby(places, key=lambda item: item[1].site.block if item[1].site else None):
            run = list(members)
            if block is not None:
                left, right = x + run[0][0] * _SLOT + 0.1, x + (run[-1][0] + 1) * _SLOT - 0.1
                self._line([(left, y + 0.06), (left, y), (right, y), (right, y + 0.06)], _BLOCK, 2.2)
                self._write((left + right) / 2, y - 0.1, f"block {block}", size=_SMALL, ha="center")
        before = None
        for number, slot in places:
            assert slot.site is not None
            stage, at = slot.site.stage, x + number * _SLOT
            if slot.site.name in self._cuts:
                at -= 0.0 if slot.first else 0.6  # in front of the expand
                self._line([(at, top - 0.02), (at, y - 0.3)], _CUT, 1.4, style=(0, (4, 2)))
            if stage != before:
                self._write(at + 0.05, y - 0.26, f"stage {stage}", size=_SMALL, color=_CUT, weight="bold")
            before = stage

    # ------------------------------------------------------------------------------------------ legend, footer

    def _legend(self, y: float) -> None:
        """The signs that occur in this picture."""
        x = _MARGIN
        for sign, text in self._signs():
            self._sign(sign, x, y)
            self._write(x + 0.36, y, text, size=_SMALL)
            x += _SIGN + width(text, _SMALL)

    def _signs(self) -> list[tuple[str, str]]:
        n = self.picture.n
        sites = [site for lane in self.picture.lanes for site in lane.sites]
        return [
            ("streams", f"{_count(n, 'stream')}" + (f" ({self._lines} drawn)" if n > self._lines else "")),
            ("read", "pre: what the branch reads"),
            ("merge", "res, post: the branch comes back"),
            *([("tap", "readout")] if any(lane.taps for lane in self.picture.lanes) else []),
            *([("block", "recompute block")] if any(site.block is not None for site in sites) else []),
            *([("cut", "stage cut")] if self._cuts else []),
        ]

    def _sign(self, sign: str, x: float, y: float) -> None:
        if sign == "streams":
            for place in range(self._lines):
                line = y + (place - (self._lines - 1) / 2) * 0.055
                self._line([(x, line), (x + 0.28, line)], _TRUNK, 1.1)
        elif sign == "read":
            self._read(x + 0.2, y)
        elif sign == "merge":
            self._merge(x + 0.18, y)
        elif sign == "tap":
            self._diamond(x + 0.2, y)
        elif sign == "block":
            self._line([(x, y + 0.04), (x, y - 0.02), (x + 0.28, y - 0.02), (x + 0.28, y + 0.04)], _BLOCK, 2.2)
        else:
            self._line([(x + 0.2, y - 0.1), (x + 0.2, y + 0.1)], _CUT, 1.4, style=(0, (4, 2)))

    def _footer_lines(self) -> list[tuple[str, str]]:
        """The adds that stay plain, and notes."""
        room, most = self.width - 2 * _MARGIN, 8
        total = sum(count for count, _, _ in self.picture.refused)
        found = [(f"{_count(total, 'add')} stayed plain" + (":" if total else ""), _INK)]
        for count, reason, where in self.picture.refused[:most]:
            text = f"{count:>4} x  {reason}" + (f"   [{where}]" if where else "")
            found.append((shortened(text, room, _SMALL), _PALE))
        if len(self.picture.refused) > most:
            found.append((f"      and {_count(len(self.picture.refused) - most, 'other kind')}", _PALE))
        found += [(shortened(f"note: {note}", room, _SMALL), _PALE) for note in self.picture.notes]
        return found

    # ------------------------------------------------------------------------------------------------- pencils

    def _write(self, x: float, y: float, text: str, *, size: float, color: str = _INK, **options: Any) -> None:
        self._axes.text(x, y, text, fontsize=size, color=color, va="center", parse_math=False, **options)

    def _line(
        self, points: Sequence[tuple[float, float]], color: str, wide: float, *, style: Any = "-", zorder: float = 2
    ) -> None:
        xs, ys = zip(*points, strict=True)
        self._axes.plot(xs, ys, color=color, lw=wide, ls=style, zorder=zorder, solid_capstyle="round")

    def _arrow(self, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
        style = {"arrowstyle": "-|>,head_width=0.16,head_length=0.3", "shrinkA": 0, "shrinkB": 0}
        self._axes.annotate("", end, start, arrowprops={**style, "color": color, "lw": 0.9}, zorder=3)


# --------------------------------------------------------------------------------------------------- text


@cache
def width(text: str, size: float, *, bold: bool = False) -> float:
    """Inches that a line of text takes at most: glyphs that are set on pixels are a little wider."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal", size=size)
    return 1.05 * float(text_to_path.get_text_width_height_descent(text, font, False)[0]) / 72


def shortened(text: str, room: float, size: float, *, front: bool = False) -> str:
    """The text, or as much of its beginning (of its end with `front`) as fits, and three dots."""
    if width(text, size) <= room:
        return text

    def cut(length: int) -> str:
        return "..." + text[len(text) - length :] if front else text[:length].rstrip() + "..."

    length = bisect_right(range(len(text)), room, key=lambda length: width(cut(length), size)) - 1
    return cut(length) if length > 0 else ""


def wrapped(name: str, room: float, size: float) -> list[str]:
    """A name on at most two lines, broken behind a dot or underscore, or before a capital."""
    if width(name, size) <= room:
        return [name]
    breaks = [
        place
        for place in range(1, len(name))
        if name[place - 1] in "._" or (name[place].isupper() and name[place - 1].islower())
    ]
    fitting = [place for place in breaks if width(name[:place], size) <= room]
    if not fitting:
        return [shortened(name, room, size)]
    middle = [place for place in fitting if width(name[place:], size) <= room]
    place = min(middle, key=lambda place: abs(2 * place - len(name))) if middle else fitting[-1]
    return [name[:place], shortened(name[place:], room, size)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
