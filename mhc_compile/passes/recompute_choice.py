"""What a user asks of recomputation, and the blocks that it means for a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from mhc_compile.errors import ConfigError, wrong
from mhc_compile.passes.cost import CostModel
from mhc_compile.passes.plan_search import least_blocks
from mhc_compile.passes.recompute import Blocks, equal_blocks

AUTO = "auto"
_LEGAL = "None, 'auto', sites a block (an integer >= 1), or a plan of partition()"


@dataclass(frozen=True)
class Recompute:
    """`auto` (the blocks that take least), sites a block, or the blocks themselves."""

    choice: str | int | Blocks

    @classmethod
    def of(cls, option: object) -> Recompute | None:
        """From the option of a public function: None, "auto", an integer, or a Plan. ConfigError for anything else."""
        if option is None:
            return None
        if option == AUTO or (isinstance(option, int) and not isinstance(option, bool) and option >= 1):
            return cls(option)
        blocks = getattr(option, "blocks", None)
        if isinstance(blocks, Sequence) and not isinstance(blocks, str) and all(map(_is_block, blocks)):
            return cls(tuple(tuple(block) for block in blocks))
        raise ConfigError(wrong("recompute", repr(option), _LEGAL, "'auto' takes the least memory"))

    def blocks(self, gm: fx.GraphModule, arguments: Sequence[Any], compiled: bool) -> Blocks:
        """The blocks for a rewritten level-1 graph, called with such arguments (fake ones will do).

        compiled: it will replay by torch's partitioner, which keeps other things than eager execution (`CostModel`).
        """
        if isinstance(self.choice, int):
            return equal_blocks(gm, self.choice)
        if isinstance(self.choice, tuple):
            return self.choice
        return _least(gm, arguments, compiled)


def _is_block(block: object) -> bool:
    return isinstance(block, Sequence) and not isinstance(block, str) and all(isinstance(name, str) for name in block)


def _least(gm: fx.GraphModule, arguments: Sequence[Any], compiled: bool) -> Blocks:
    costs = CostModel(gm, arguments, compiled=compiled)
    starts, _ = least_blocks(costs.units)
    runs = [costs.sites_of_units[start:end] for start, end in pairwise([*starts, len(costs.units)])]
    found = (tuple(site.name for sites in run for site in sites) for run in runs)
    return tuple(block for block in found if block)
