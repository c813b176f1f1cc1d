"""One reader of ops that permute axes: what it says of each op, with every argument, is what the op does."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from mhc_compile.passes.op_kinds import PERMUTES, aten
from mhc_compile.passes.permutation import permutation

pytestmark = [
    pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension other than 2:UserWarning"),
    pytest.mark.filterwarnings("ignore:Tensor.T is deprecated on 0-D:UserWarning"),
]

Call = tuple[Any, tuple[Any, ...]]
SIZES = (2, 3, 5)


def calls(rank: int) -> list[Call]:
    """Every op of PERMUTES on a tensor of `rank` axes: overload and arguments behind the tensor."""
    axes, count = list(range(rank)), range(1, rank + 1)
    either = list(range(-rank, rank)) or [0, -1]
    found: list[Call] = [(aten.numpy_T.default, ())]
    found += [(aten.permute.default, (order,)) for order in permutations(axes)]
    found += [(aten.permute.default, ([axis - rank for axis in order],)) for order in permutations(axes)]
    for op in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.movedim.int, aten.moveaxis.int):
        found += [(op, pair) for pair in product(either, either)]
    for op in (aten.movedim.intlist, aten.moveaxis.intlist):
        lists = ((permutations(axes, some), permutations(either[:rank], some)) for some in count)
        found += [(op, pair) for sources, targets in lists for pair in product(sources, targets)]
    found += [(aten.t.default, ())] if rank <= 2 else []
    found += [(aten.mT.default, ()), (aten.adjoint.default, ())] if rank >= 2 else []
    return found


def node_of(op: Any, args: tuple[Any, ...], value: Tensor, *, by_name: bool = False) -> fx.Node:
    """The call in a graph, as a capture holds it."""
    graph = fx.Graph()
    names = [argument.name for argument in op._schema.arguments][1:]
    given = {"kwargs": dict(zip(names, args, strict=True))} if by_name else {"args": args}
    node = graph.call_function(op, (graph.placeholder("x"), *given.get("args", ())), given.get("kwargs"))
    node.meta["val"] = op(value, *args)
    return node


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_the_reader_says_what_the_op_does(rank: int) -> None:
    sizes = SIZES[:rank]
    value = torch.rand(sizes)
    for op, args in calls(rank):
        for by_name in (False, True):
            order = permutation(node_of(op, args, value, by_name=by_name))
            assert order is not None and torch.equal(op(value, *args), value.permute(order)), (str(op), args, order)


def test_every_op_of_the_list_is_tried() -> None:
    assert {op.overloadpacket for rank in (1, 2, 3) for op, _ in calls(rank)} == PERMUTES


def test_what_computes_is_no_permutation() -> None:
    assert permutation(node_of(aten.adjoint.default, (), torch.rand(2, 3, dtype=torch.complex64))) is None
