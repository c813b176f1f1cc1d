"""Measure the forward and backward of each unit of a graph on real inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mhc_compile.passes.stages import Layout


def profile_units(
    gm: fx.GraphModule, arguments: Sequence[Any], layout: Layout, rounds: int = 3
) -> list[tuple[float, float]]:
    """Seconds of the forward and of the backward of each unit, medians of `rounds` after one more to warm up.

    Each unit runs by itself, op by op, on what the ones before gave; gradients of its outputs are ones.
    """
    runs = [_Stepwise(gm, arguments, layout).run_units() for _ in range(rounds + 1)][1:]
    return [
        (statistics.median(run[unit][0] for run in runs), statistics.median(run[unit][1] for run in runs))
        for unit in range(len(runs[0]))
    ]


class _Stepwise(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, arguments: Sequence[Any], layout: Layout) -> None:
        super().__init__(gm)
        self.layout = layout
        places = [node for node in layout.nodes if node.op == "placeholder"]
        self.env = dict(zip(places, arguments, strict=True))

    def run_units(self) -> list[tuple[float, float]]:
        return [self._unit(numbers) for numbers in self.layout.units()]

    def _unit(self, numbers: range) -> tuple[float, float]:
        nodes = [self.layout.nodes[number] for number in numbers]
        inside = set(nodes)
        sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
        given = [source for source in sources if source not in inside]
        for source in given:
            value = self.env[source]
            if isinstance(value, torch.Tensor) and value.requires_grad and not value.is_leaf:
                self.env[source] = value.detach().requires_grad_()
        start = _now()
        with torch.enable_grad():
            for node in nodes:
                if node.op != "output":
                    self.env[node] = self.run_node(node)
        middle = _now()
        self._backward(nodes, [self.env[source] for source in given])
        return middle - start, _now() - middle

    def _backward(self, nodes: list[fx.Node], given: list[Any]) -> None:
        last = self.layout.index[nodes[-1]]
        leaving = [node for node in nodes if node.op != "output" and self.layout.last_use[node] > last]
        made = [node for node in nodes if nodes[-1] in node.users] if nodes[-1].op == "output" else leaving
        outputs = [value for node in made if _trains(value := self.env[node])]
        inputs = [value for value in given if _trains(value)]
        if outputs and inputs:
            ones = [torch.ones_like(output) for output in outputs]
            torch.autograd.grad(outputs, inputs, ones, allow_unused=True)


def _trains(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
