"""Wrong copies of a correct mHC block: one op of its graph dropped, swapped, repeated or perturbed.

A mutant is a graph like any other: its own function is what it has to keep, whatever a matcher finds in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.op_kinds import aten

# What an op may be mistaken for.
_OTHERS: dict[Any, list[Any]] = {
    aten.sigmoid.default: [aten.tanh.default, aten.relu.default, aten.hardsigmoid.default],
    aten.exp.default: [aten.sigmoid.default, aten.exp2.default, aten.expm1.default],
    aten.add.Tensor: [aten.sub.Tensor, aten.mul.Tensor],
    aten.mul.Tensor: [aten.add.Tensor, aten.div.Tensor],
    aten.div.Tensor: [aten.mul.Tensor],
    aten.sum.dim_IntList: [aten.amax.default],
    aten.amax.default: [aten.amin.default],
    aten.mean.dim: [aten.sum.dim_IntList, aten.amax.default],
    aten.softmax.int: [aten.log_softmax.int],
    aten.log_softmax.int: [aten.softmax.int],
    aten.rsqrt.default: [aten.reciprocal.default, aten.sqrt.default],
    aten.sqrt.default: [aten.square.default],
    aten.square.default: [aten.abs.default],
    aten.reciprocal.default: [aten.neg.default],
    aten.logsumexp.default: [aten.amax.default],
}


@dataclass(frozen=True)
class Mutant:
    """What was done to a graph, the new graph, and its outputs and gradients."""

    done: str
    graph: fx.GraphModule
    results: list[Tensor | None]


def mutants(graph: fx.GraphModule, judge: Judge, seed: int) -> Iterator[Mutant]:
    """Endless mutants of a normalised graph."""
    dice = random.Random(seed)
    count = sum(node.op == "call_function" for node in graph.graph.nodes)
    while True:
        copy = copy_graph(graph)
        calls = [node for node in copy.graph.nodes if node.op == "call_function"]
        node = calls[dice.randrange(count)]
        change = dice.choice(_CHANGES)
        try:
            done = change(copy.graph, node, dice)
            if done is None:
                continue
            copy.recompile()
            results = judge.results(_Recorder(copy).run)
        except Exception:
            continue  # no graph at all: shapes that do not fit, most often
        if any(value is not None and not value.isfinite().all() for value in results):
            continue  # an overflow (the ops of a matcher may well have none) says nothing of the function
        yield Mutant(f"{change.__name__.strip('_')} {node.name}: {done}", copy, results)


def _tensors(node: fx.Node) -> list[int]:
    return [place for place, one in enumerate(node.args) if isinstance(one, fx.Node)]


def _drop(graph: fx.Graph, node: fx.Node, dice: random.Random) -> str | None:
    places = _tensors(node)
    if not places or isinstance(node.meta["val"], (list, tuple)):
        return None
    kept = node.args[dice.choice(places)]
    node.replace_all_uses_with(kept)  # type: ignore[arg-type]
    graph.erase_node(node)
    return f"{kept} instead"


def _swap(graph: fx.Graph, node: fx.Node, dice: random.Random) -> str | None:
    places = _tensors(node)
    if len(places) < 2:
        return None
    first, second = dice.sample(places, 2)
    args = list(node.args)
    args[first], args[second] = args[second], args[first]
    node.args = tuple(args)
    return f"arguments {first} and {second}"


def _turn(graph: fx.Graph, node: fx.Node, dice: random.Random) -> str | None:
    """Exchange the last two dimensions of one reader's view of a value."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.dim() < 2 or not node.users:
        return None
    reader = dice.choice(list(node.users))
    with graph.inserting_after(node):
        turned = graph.call_function(aten.transpose.int, (node, -1, -2))
    reader.replace_input_with(node, turned)
    return f"transposed for {reader}"


def _repeat(graph: fx.Graph, node: fx.Node, dice: random.Random) -> str | None:
    places = _tensors(node)
    if not places:
        return None
    place = dice.choice(places)
    users = list(node.users)
    with graph.inserting_after(node):
        args = list(node.args)
        args[place] = node
        again = graph.call_function(node.target, tuple(args), dict(node.kwargs))  # type: ignore[arg-type]
    for user in users:
        user.replace_input_with(node, again)
    return f"once more, on argument {place}"


def _replace(graph: fx.Graph, node: fx.Node, dice: random.Random) -> str | None:
    if node.target not in _OTHERS:
        return None
    node.target = dice.choice(_OTHERS[node.target])
    if node.target in (aten.log_softmax.int, aten.softmax.int) or node.target in (aten.sum.dim_IntList,):
        return str(node.target)
    node.args = node.args[: len(node.target._schema.arguments)]  # type: ignore[union-attr]
    return str(node.target)


def _perturb(graph: fx.Graph, node: fx.Node, dice: random.Random) -> str | None:
    """Change one literal: a number, a dimension, an index, an equation."""
    literals = [place for place, one in enumerate(node.args) if _is_literal(one)]
    if not literals:
        return None
    place = dice.choice(literals)
    args: list[Any] = list(node.args)
    args[place] = _other(args[place], dice)
    if args[place] == node.args[place]:
        return None
    done = f"{node.args[place]} -> {args[place]}"
    node.args = tuple(args)
    return done


def _is_literal(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, int) for one in value)
    )


def _other(value: Any, dice: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + dice.choice([-1, 1])
    if isinstance(value, float):
        return value * dice.choice([0.5, 2.0, -1.0, 0.0])
    if isinstance(value, str):
        before, arrow, after = value.partition("->")
        letters = [place for place, letter in enumerate(before) if letter.isalpha()]
        first, second = dice.sample(letters, 2)
        swapped = list(before)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        return "".join(swapped) + arrow + after
    changed = list(value)
    place = dice.randrange(len(changed))
    if dice.random() < 0.5 and len(changed) > 1:
        other = dice.randrange(len(changed))
        changed[place], changed[other] = changed[other], changed[place]
    else:
        changed[place] += dice.choice([-1, 1])
    return changed


def _insert(graph: fx.Graph, node: fx.Node, dice: random.Random) -> str | None:
    """An op more behind a value: a factor, a summand, a bound, a break of the gradient."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or not value.is_floating_point() or not node.users:
        return None
    target, args = dice.choice(
        [
            (aten.mul.Tensor, (1.1,)),
            (aten.add.Tensor, (0.05,)),
            (aten.clamp.default, (0.1, 0.6)),
            (aten.detach.default, ()),
            (aten.neg.default, ()),
            (aten.abs.default, ()),
            (aten.flip.default, ([-1],)),
        ]
    )
    users = list(node.users)
    if dice.random() < 0.5:
        users = [dice.choice(users)]
    with graph.inserting_after(node):
        more = graph.call_function(target, (node, *args))
    for user in users:
        user.replace_input_with(node, more)
    return f"{target} for {len(users)} of its readers"


def _leak(graph: fx.Graph, node: fx.Node, dice: random.Random) -> str | None:
    """Let the output depend on a value inside."""
    value = node.meta["val"]
    output = next(iter(graph.find_nodes(op="output")))
    (result,) = output.args[0]  # type: ignore[misc, union-attr]
    if not isinstance(value, Tensor) or not value.is_floating_point() or result is node:
        return None
    with graph.inserting_before(output):
        mean = graph.call_function(aten.mean.default, (node,))
        more = graph.call_function(aten.add.Tensor, (result, mean))
    output.args = ((more,),)
    return "its mean is added to the output"


_CHANGES: list[Callable[[fx.Graph, fx.Node, random.Random], str | None]] = [
    _drop, _swap, _turn, _repeat, _replace, _perturb, _perturb, _insert, _leak,
]  # fmt: skip


class _Recorder(fx.Interpreter):
    """Runs a graph and records each value where a capture records a fake one."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = result.detach() if isinstance(result, Tensor) else result
        return result


class Judge:
    """Compares two graphs of one block as functions, in float64 on random numbers, with gradients."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        torch.manual_seed(1)
        self.arguments = [
            torch.randn_like(one, dtype=torch.float64).requires_grad_() if isinstance(one, Tensor) else one
            for one in arguments
        ]

    def results(self, graph: Callable[..., Any]) -> list[Tensor | None]:
        """Output and gradients; None where there is none."""
        inputs = [one for one in self.arguments if isinstance(one, Tensor)]
        outputs = graph(*self.arguments)
        torch.manual_seed(2)
        seeds = [torch.randn(one.shape, dtype=one.dtype) for one in outputs]  # by shape, whatever the strides
        if not any(one.requires_grad for one in outputs):
            return [*outputs, *([None] * len(inputs))]
        return [*outputs, *torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)]

    def differ(self, ours: list[Tensor | None], theirs: list[Tensor | None], tolerance: float = 1e-7) -> bool:
        """Some result differs by more than `tolerance` of its size, or exists on one side only."""
        for one, other in zip(ours, theirs, strict=True):
            a, b = (torch.zeros((), dtype=torch.float64) if side is None else side.detach() for side in (one, other))
            same = torch.isclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))
            if not bool(same.all()):
                return True
        return False
