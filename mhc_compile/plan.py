"""A plan of recompute blocks and pipeline stages: what it says, and how it is kept."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from mhc_compile.errors import ConfigError, wrong
from mhc_compile.passes.plan_search import Unit
from mhc_compile.passes.quantities import duration, plural, size
from mhc_compile.passes.schedules import Event, Schedule, simulate

VERSION = 1
_WIDTH = 110  # of a printed table when the output is no terminal
_RETRY = "make the plan again with partition(), or load it with the version that wrote it"


@dataclass(frozen=True)
class PlannedUnit:
    """What lies between two neighbouring legal cuts, for one microbatch.

    value: name of the graph's value at the cut in front of it ('' for the first), line: where the model computes it.
    sites: the names of its sites; skips: names of the other values that are sent with it; cost: see Unit.
    forward, backward: seconds.
    """

    value: str
    line: str
    sites: tuple[str, ...]
    skips: tuple[str, ...]
    forward: float
    backward: float
    cost: Unit


@dataclass(frozen=True)
class PlannedStage:
    """A pipeline stage: its device, its units, `start` to `end` (not included), and how it runs.

    blocks: the first unit of each recompute block; none when the stage stores everything.
    seconds: of one microbatch, with replay, and with transfers where its device waits for them; peak: bytes of its
    device, weights included; weights: of this stage, with gradients and optimizer states; in_flight: the most
    microbatches whose values it keeps.
    """

    device: int
    start: int
    end: int
    blocks: tuple[int, ...]
    seconds: float
    peak: int
    weights: int
    in_flight: int


@dataclass(frozen=True)
class Plan:
    """Recompute blocks and pipeline stages. `str()` is a table; `draw` a picture; `save` and `load` keep it as JSON.

    model: name of the class; n: streams; timing: where the times are from; memory: the limit of a device, in bytes;
    weight_copies: how often the weights are counted; tied: parameters that several stages read; formula, exact:
    sites a block by the paper's formula, and by its objective.
    """

    model: str
    n: int
    schedule: str
    devices: int
    microbatches: int
    memory: float | None
    timing: str
    weight_copies: float
    units: tuple[PlannedUnit, ...]
    stages: tuple[PlannedStage, ...]
    tied: tuple[str, ...]
    formula: float
    exact: int

    # ------------------------------------------------------------------------------------------ what it says

    def sites_of(self, stage: PlannedStage) -> tuple[str, ...]:
        """The names of a stage's sites."""
        return tuple(site for unit in self.units[stage.start : stage.end] for site in unit.sites)

    def block_sites(self, stage: PlannedStage) -> list[tuple[str, ...]]:
        """The names of the sites of each recompute block of a stage that holds any."""
        ends = [*stage.blocks[1:], stage.end]
        runs = [self.units[start:end] for start, end in zip(stage.blocks, ends, strict=False)]
        found = [tuple(site for unit in run for site in unit.sites) for run in runs]
        return [sites for sites in found if sites]

    @property
    def blocks(self) -> list[tuple[str, ...]]:
        """The names of the sites of every recompute block."""
        return [sites for stage in self.stages for sites in self.block_sites(stage)]

    @property
    def costs(self) -> list[Unit]:
        """What each unit costs."""
        return [unit.cost for unit in self.units]

    @property
    def peak(self) -> int:
        """The bytes of the fullest device."""
        return max(stage.peak for stage in self.stages)

    @property
    def cuts(self) -> list[PlannedUnit]:
        """The first unit of each stage but the first."""
        return [self.units[stage.start] for stage in self.stages[1:]]

    @property
    def pipeline(self) -> Schedule:
        """The schedule, with its stages and devices."""
        return Schedule(self.schedule, len(self.stages), self.devices, self.microbatches)

    def events(self) -> list[Event]:
        """A simulation of one step."""
        schedule = self.pipeline
        split = any(not moment.whole for moments in schedule.loads() for moment in moments)
        forward, backward, send = [], [], []
        for stage in self.stages:
            units = self.units[stage.start : stage.end]
            replay = sum(unit.cost.replay for unit in units) * (1 + split) if stage.blocks else 0.0
            forward.append(sum(unit.forward for unit in units))
            backward.append(sum(unit.backward for unit in units) + replay)
            send.append(self.units[stage.end].cost.send if stage.end < len(self.units) else 0.0)
        return simulate(schedule, forward, backward, send)

    @property
    def step_seconds(self) -> float:
        """The time of one step, simulated; without the optimizer."""
        return max(event.end for event in self.events())

    @property
    def bubble(self) -> float:
        """The part of a step in which a device computes nothing, on average: it waits for its input, or receives it."""
        events = self.events()
        step = max(event.end for event in events)
        busy = sum(event.end - event.start for event in events)
        return 1 - busy / (step * self.devices) if step else 0.0

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=min(Console().width, _WIDTH) if Console().is_terminal else _WIDTH)
        for line in self._summary():
            console.print(line, markup=False, highlight=False)
        console.print(self._table(), markup=False)
        for note in self._notes():
            console.print(note, markup=False, highlight=False)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()

    def _summary(self) -> list[str]:
        sites = sum(len(unit.sites) for unit in self.units)
        limit = "no limit" if self.memory is None else f"limit {size(self.memory)}"
        lengths = "; ".join(", ".join(str(len(block)) for block in self.block_sites(one)) for one in self.stages)
        blocks = (
            f"sites a block: {self.formula:.1f} by sqrt(nL / (n + 2)), {self.exact} by the exact objective, "
            f"planned {lengths if self.blocks else 'none: everything is stored'}"
        )
        return [
            f"{self.model}: {sites} sites, n = {self.n}, {len(self.units) - 1} legal cuts",
            f"{plural(len(self.stages), 'stage')} on {plural(self.devices, 'device')}, "
            f"{plural(self.microbatches, 'microbatch')}, {self.schedule}, "
            f"{limit}: fullest device {size(self.peak)}, step {duration(self.step_seconds)}, bubble {self.bubble:.1%} "
            f"(times {self.timing})",
            blocks if sites else "no sites to replay",
        ]

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for header in ("stage", "device", "sites"):
            table.add_column(header, justify="right")
        table.add_column("sites of its blocks", overflow="fold")
        for header in ("time", "peak of device", "weights", "in flight", "receives"):
            table.add_column(header, justify="right", no_wrap=True)
        for number, stage in enumerate(self.stages):
            lengths = " ".join(str(len(block)) for block in self.block_sites(stage))
            sites = len(self.sites_of(stage))
            table.add_row(
                str(number),
                str(stage.device),
                str(sites),
                lengths or ("stored" if sites else "-"),
                duration(stage.seconds),
                size(stage.peak),
                size(stage.weights),
                str(stage.in_flight),
                size(self.units[stage.start].cost.boundary or 0) if number else "inputs",
            )
        return table

    def _notes(self) -> list[str]:
        found = [self._where(number) for number in range(1, len(self.stages))]
        if self.tied:
            named = ", ".join(self.tied[:3]) + (", ..." if len(self.tied) > 3 else "")
            found.append(f"several stages read {named}: their gradients must be added up")
        return found

    def _where(self, number: int) -> str:
        """Where a stage starts, and what it receives beside the state."""
        unit, before = self.units[self.stages[number].start], self.sites_of(self.stages[number - 1])
        skips = ", ".join(unit.skips[:4]) + (", ..." if len(unit.skips) > 4 else "")
        threaded = f"; {skips} threaded through the stages up to the last reader" if skips else ""
        behind = f" behind {before[-1]}" if before else ""
        return f"stage {number} starts{behind} with {unit.value} ({unit.line}){threaded}"

    # ------------------------------------------------------------------------------------------ files

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, with its version."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, found: Any) -> Plan:
        """The plan that `as_dict` gave. Raises ConfigError for anything else, and for another version."""
        version = found.get("version") if isinstance(found, dict) else None
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise ConfigError(wrong("the version of the plan", repr(version), f"1 to {VERSION}", _RETRY))
        try:
            values = {one.name: found[one.name] for one in fields(cls)}
            values["units"] = tuple(_unit_from(unit) for unit in values["units"])
            values["stages"] = tuple(_with_tuples(PlannedStage, stage) for stage in values["stages"])
            return cls(**{**values, "tied": tuple(values["tied"])})
        except (KeyError, TypeError, ValueError) as error:
            keys = ", ".join(one.name for one in fields(cls))
            raise ConfigError(wrong("the plan", f"not readable ({error})", f"a table with {keys}", _RETRY)) from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote. Raises ConfigError for another file."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(wrong(f"the plan {path}", f"no JSON ({error})", "a file of Plan.save", _RETRY)) from error
        return cls.from_dict(found)

    def pipeline_stages(self, model: nn.Module, inputs: Any = None, **options: Any) -> list[Any]:
        """The stages of this process, for torch's schedules: see `mhc_compile.pipeline_stages`."""
        from mhc_compile.pipeline import pipeline_stages  # it reads plans

        return pipeline_stages(self, model, inputs, **options)

    def draw(self, path: str | Path) -> None:
        """Write a picture: sites, blocks and stages above, the memory of each stage over a step below.

        Needs matplotlib (the extra `demo`).
        """
        from mhc_compile.plan_picture import draw

        draw(self, Path(path))


def _with_tuples(kind: type[Any], values: dict[str, Any]) -> Any:
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _unit_from(values: dict[str, Any]) -> PlannedUnit:
    made: PlannedUnit = _with_tuples(PlannedUnit, {**values, "cost": Unit(**values["cost"])})
    return made
