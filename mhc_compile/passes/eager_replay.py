"""Recomputation without a compiler: a tagged graph that drops its streams behind the forward, and replays them.

The backward of a site needs the streams that it read, the aggregate and its norm; all follow from the first streams of
their block, the outputs of the branches and the coefficients. Those are kept: the branches' outputs because a merge
needs them anyway, the coefficients because they are a few numbers a token. The rest is handed to autograd as a name
(`torch.autograd.graph.saved_tensors_hooks`), and computed again, op by op and bit for bit, when the backward asks.
Nothing of a branch beside its first norm is ever computed twice. Autograd calls the innermost hooks alone: what is kept
as it is goes through those of the caller (an offload, an activation checkpoint) from here.

On a GPU the states of a block, and the aggregates that wait for the backward, are made in one launch
(`kernels.replay_ops`) when the first of them is asked for; elsewhere each by its own op.

`tag` (`passes.recompute`) says which nodes are replayed. Backwards that ask twice (`retain_graph`, schedules that take
the gradients of inputs and of weights apart) replay twice.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile import _torch
from mhc_compile.kernels.replay_ops import replay_block
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.replay import replayed_nodes

mhc = torch.ops.mhc


def replaying(gm: fx.GraphModule, whole_blocks: bool | None = None) -> Callable[..., Any]:
    """The graph, lowered to `read` and `merge_carried`, as a function that replays what it is tagged for.

    whole_blocks: make all states of a block at once; by default where they are on a CUDA device.
    """
    program = _Program(gm, whole_blocks)

    def run(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return gm(*arguments)
        session = _Session(program, _torch.saved_tensor_hooks())
        with torch.autograd.graph.saved_tensors_hooks(session.pack, session.unpack):
            return session.run(*arguments)

    return run


class _Program:
    """What a graph's runs have in common: which nodes are replayed, and what they are replayed from."""

    def __init__(self, gm: fx.GraphModule, whole_blocks: bool | None) -> None:
        self.gm, self.whole_blocks = gm, whole_blocks
        self.replayed: set[fx.Node] = set()
        # An activation checkpoint of the model tags the ops of branches too, dropout among them: not ours to replay.
        ours = replayed_nodes(Dataflow(gm.graph))
        for node in gm.graph.nodes:
            if node in ours and node.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE and self._can(node):
                self.replayed.add(node)
        self.roots: dict[fx.Node, list[fx.Node]] = {}  # and what is replayed from each
        for node in self.replayed:
            for source in _sources(node):
                if source not in self.replayed:
                    self.roots.setdefault(source, []).append(node)
        # Of each state: the aggregates of it that are replayed, and the merges that may follow it in one launch.
        self.aggregates: dict[fx.Node, list[fx.Node]] = {}
        self.following: dict[fx.Node, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            if node in self.replayed and _is_aggregate(node):
                self.aggregates.setdefault(_sources(node)[0], []).append(node)
            elif self.is_step(node):
                self.following.setdefault(node.args[0], []).append(node)

    def is_step(self, node: fx.Node) -> bool:
        """A replayed merge that needs nothing but the streams to be replayed before it."""
        if node not in self.replayed or node.target is not mhc.merge_carried.default:
            return False
        return self.replayed.isdisjoint(source for source in _sources(node) if source is not node.args[0])

    def _can(self, node: fx.Node) -> bool:
        """A tensor that can be made again from others. Of a `read` that is u; its coefficients are kept."""
        if node.target is operator.getitem:
            source, place = node.args
            assert isinstance(source, fx.Node)
            return bool(source.target is mhc.read.default and place == 0) or source in self.replayed
        return node.op == "call_function" and node.target is not mhc.read.default


def _sources(node: fx.Node) -> list[fx.Node]:
    """What a replayed node is computed from: u of a read from its streams and its pre."""
    if _is_aggregate(node):
        read: Any = node.args[0]
        return [read.args[0], read]
    return [source for source in node.all_input_nodes if node.target is not mhc.merge_carried.default or _real(source)]


def _is_aggregate(node: fx.Node) -> bool:
    return node.target is operator.getitem and getattr(node.args[0], "target", None) is mhc.read.default


def _variant(merge: fx.Node) -> tuple[bool, bool, bool]:
    """Whether streams stay unmixed, and the merge's transposed and rounded."""
    transposed, rounded = (bool(one) for one in (*merge.args[5:7], False, False)[:2])
    return merge.args[4] is None, transposed, rounded


def _real(source: fx.Node) -> bool:
    """Not a carrier, which holds nothing."""
    return not (_is_aggregate(source) and source.args[1] == 4)


@dataclass(frozen=True)
class _Name:
    """What autograd keeps in place of a tensor: the node that it is of, or a view of."""

    node: fx.Node
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Packed:
    """What the caller's hooks made of a tensor."""

    value: Any


@dataclass
class _Held:
    """What autograd keeps. A tensor until the op that saved it has run; then a name if it is that op's result."""

    value: Tensor | _Name | _Packed


def _identity(tensor: Tensor) -> StorageWeakRef:
    """Of a tensor's memory; not an address, which another tensor may have once this one is gone."""
    made: StorageWeakRef = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return made


class _Session:
    """One forward of a program, and what its backward needs."""

    def __init__(
        self, program: _Program, hooks: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None
    ) -> None:
        """hooks: the caller's, for tensors that are kept."""
        self.program, self._hooks = program, hooks
        self._roots: dict[fx.Node, Any] = {}
        self._opened: dict[fx.Node, Tensor] = {}  # roots from the caller's hooks, which may give each once a backward
        self._owners: dict[StorageWeakRef, fx.Node] = {}
        self._fresh: list[_Held] = []  # what the op that runs has saved and nobody owns yet
        self._asked: Counter[fx.Node] = Counter()  # how many names of each node autograd keeps
        self._served: Counter[fx.Node] = Counter()
        self._values: dict[fx.Node, Any] = {}
        self._autocast: dict[fx.Node, tuple[str, torch.dtype]] = {}
        self._whole = False

    def run(self, *arguments: Any) -> Any:
        whole = self.program.whole_blocks
        self._whole = any(isinstance(one, Tensor) and one.is_cuda for one in arguments) if whole is None else whole
        interpreter = _Recording(self)
        result = interpreter.run(*arguments)
        self._owners.clear()
        self._keep_fresh()
        return result

    def record(self, node: fx.Node, value: Any) -> None:
        """Note what a node of the forward gave."""
        if node in self.program.roots:
            # For a read, pre; its other outputs that are needed are roots of their own.
            kept = value[1] if node.target is mhc.read.default else value
            self._roots[node] = self._kept(kept.detach()) if isinstance(kept, Tensor) else kept
        if node in self.program.replayed and isinstance(value, Tensor):
            self._owners.setdefault(_identity(value), node)
            for held in self._fresh:
                if isinstance(held.value, Tensor) and _identity(held.value) == _identity(value):
                    held.value = self._asked_for(node, held.value)
            device = value.device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                self._autocast[node] = device, torch.get_autocast_dtype(device)
        self._keep_fresh()

    def _keep_fresh(self) -> None:
        """Keep what the op has saved and is not replayed."""
        for held in self._fresh:
            if isinstance(held.value, Tensor):
                held.value = self._kept(held.value)
        self._fresh.clear()

    def _kept(self, tensor: Tensor) -> Tensor | _Packed:
        if self._hooks is None:
            return tensor
        with torch.no_grad():  # as autograd calls them
            return _Packed(self._hooks[0](tensor))

    def _unpacked(self, kept: Any) -> Any:
        return self._hooks[1](kept.value) if isinstance(kept, _Packed) and self._hooks else kept

    def _close(self) -> None:
        """Drop the opened roots that nothing is left to be replayed from."""
        for node in [*self._opened]:
            if all(map(self._is_done, self.program.roots[node])):
                del self._opened[node]

    def _is_done(self, node: fx.Node) -> bool:
        """Replayed, or never asked for."""
        asked = self._asked[node]
        return node in self._values or (self._served[node] >= asked if asked else _is_aggregate(node))

    def pack(self, tensor: Tensor) -> _Held:
        node = self._owners.get(_identity(tensor))
        if node is not None:
            return _Held(self._asked_for(node, tensor))
        self._fresh.append(_Held(tensor))
        return self._fresh[-1]

    def _asked_for(self, node: fx.Node, tensor: Tensor) -> _Name:
        self._asked[node] += 1
        return _Name(node, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, held: _Held) -> Tensor:
        kept = held.value
        if not isinstance(kept, _Name):
            found: Tensor = self._unpacked(kept)
            return found
        with torch.no_grad():
            value: Tensor = self._value(kept.node)
        self._serve(kept.node)
        return value.as_strided(kept.size, kept.stride, kept.offset)

    def _serve(self, node: fx.Node) -> None:
        """Drop a value when autograd has had it for all of its names: those it was needed for are there already."""
        self._served[node] += 1
        if self._served[node] >= self._asked[node]:
            self._values.pop(node, None)
        if self._served.total() >= self._asked.total():
            self._served.clear()
            self._values.clear()
            self._opened.clear()

    def _value(self, node: fx.Node) -> Any:
        missing = self._missing(node)
        for each in missing:
            if each in self._values:
                continue
            if self._whole and self.program.is_step(each):
                self._replay_block(each, missing)
            else:
                self._values[each] = self._compute(each)
        self._close()
        return self._values[node]

    def _replay_block(self, first: fx.Node, missing: list[fx.Node]) -> None:
        """Make the states from that of the merge `first` on that are missing, and the aggregates of all of them."""
        merges: list[Any] = [first]
        while found := [one for one in self.program.following.get(merges[-1], ()) if one in missing]:
            if _variant(found[0]) != _variant(first):
                break
            merges.append(found[0])
        start, *_ = merges[0].args
        reads: list[Any] = [self._waiting_aggregate(state, missing) for state in (start, *merges)]
        _, f, _, post, res = zip(*(merge.args[:5] for merge in merges), strict=True)
        made, aggregates = replay_block(
            self._known(start),
            [self._known(one) for one in f],
            [self._known(one) for one in post],
            [None if one is None else self._known(one) for one in res],
            [None if u is None else self._known(u.args[0]) for u in reads],
            *_variant(first)[1:],
        )
        self._values |= dict(zip(merges, made, strict=True))
        self._values |= dict(zip(filter(None, reads), aggregates, strict=True))

    def _waiting_aggregate(self, state: fx.Node, missing: list[fx.Node]) -> fx.Node | None:
        """The aggregate of a state that is needed now, or that autograd will ask for."""
        for node in self.program.aggregates.get(state, ()):
            if node not in self._values and (node in missing or self._served[node] < self._asked[node]):
                return node
        return None

    def _known(self, node: fx.Node) -> Any:
        if node not in self._roots:
            return self._values[node]
        if not isinstance(self._roots[node], _Packed):
            return self._roots[node]
        if node not in self._opened:
            self._opened[node] = self._unpacked(self._roots[node])
        return self._opened[node]

    def _missing(self, node: fx.Node) -> list[fx.Node]:
        """What has to be computed for a node, in order."""
        order: dict[fx.Node, None] = {}
        stack = [(node, False)]
        while stack:
            current, ready = stack.pop()
            if current in order or current in self._values or current in self._roots:
                continue
            if ready:
                order[current] = None
                continue
            stack.append((current, True))
            stack.extend((source, False) for source in _sources(current))
        return list(order)

    def _compute(self, node: fx.Node) -> Any:
        if _is_aggregate(node):
            streams, read = _sources(node)
            return mhc.aggregate.default(self._known(streams), self._known(read))
        if node.target is mhc.merge_carried.default:
            return mhc.merge.default(*fx.map_arg((*node.args[:2], *node.args[3:7]), self._known))
        args, kwargs = fx.map_arg(node.args, self._known), fx.map_arg(node.kwargs, self._known)
        assert callable(node.target)
        device, dtype = self._autocast.get(node, ("cpu", torch.bfloat16))
        with torch.autocast(device, dtype, enabled=node in self._autocast):
            return node.target(*args, **kwargs)


class _Recording(fx.Interpreter):
    """Runs the graph and tells the session what each node gave."""

    def __init__(self, session: _Session) -> None:
        super().__init__(session.program.gm)
        self._session = session

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self._session.record(n, value)
        return value
