"""Check a converted model against what its conversion promises; each promise passes or fails with a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from mhc_compile import _torch
from mhc_compile.backend import recorded_analysis
from mhc_compile.config import MHCConfig
from mhc_compile.constraints import CONSTRAINTS
from mhc_compile.conversion import connection, conversion, plain_forward
from mhc_compile.errors import CaptureError, MHCError
from mhc_compile.example_inputs import as_call, derive
from mhc_compile.kernels import reference
from mhc_compile.passes.bind import bind_parameters
from mhc_compile.passes.capture import Captured, just_in_time
from mhc_compile.passes.emit import Emitter, copy_graph
from mhc_compile.passes.expand import expand
from mhc_compile.passes.fuse import fuse
from mhc_compile.passes.lower import lower
from mhc_compile.passes.op_kinds import aten, draws
from mhc_compile.passes.rewrite import Analysis, analyze
from mhc_compile.record import Record
from mhc_compile.sharding import refuse_sharded
from mhc_compile.trace import exported, rewritten, with_gradients

mhc = torch.ops.mhc
_BACK_IN_PLACE = (aten.permute.default, aten.clone.default)  # what brings a read back to the axes it had

# Relative to the largest value of the tensor that is compared; coefficients are fp32 whatever the model's dtype.
OUTPUT_LIMIT = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GRADIENT_LIMIT = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
# A gradient is compared at its own scale, or at this part of the model's largest one if that is more: some are
# zero by symmetry (a key's bias behind a softmax) and hold only rounding.
GRADIENT_FLOOR = 1e-2


@dataclass(frozen=True)
class Check:
    """One promise: its name, `pass`, `fail` or `not run`, and the figure or the reason."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class Report:
    """All checks of one call to `verify`; true when none failed."""

    model: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(check.status != "fail" for check in self.checks)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        lines = [f"{self.model}: {'verified' if self.passed else 'FAILED'}"]
        wide = max(len(check.name) for check in self.checks)
        return "\n".join([*lines, *(f"  {one.status:7}  {one.name:{wide}}  {one.detail}" for one in self.checks)])

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {"model": self.model, "passed": self.passed, "checks": [vars(check) for check in self.checks]}


def verify(model: nn.Module, inputs: Any = None) -> Report:
    """Check a converted model on `inputs` (as for `mhc_compile`), in the mode it is in.

    - the plain add at n = 1, bit for bit, outputs and gradients, through the whole machinery;
    - at step 0 (init `identity`, whatever weights the model has now) outputs and all gradients of its own parameters
      equal the plain model's;
    - every mHC op equals the fp64 oracle on this model's states and weights;
    - the compiled forward equals the rewritten graph run op by op;
    - torch.export gives the same graph.

    The model's weights, buffers, gradients and the random state are left as they were. Raises RewriteError when the
    model is not converted and CaptureError when it is not one graph.
    """
    conversion(model)
    refuse_sharded(model)
    args, kwargs = as_call(derive(model) if inputs is None else inputs)
    with with_gradients():
        return _verified(model, args, kwargs)


def _verified(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    state = conversion(model)
    captured = just_in_time(plain_forward(model), model, args, kwargs)
    checks: list[Check] = []
    with _kept_buffers(model), torch.random.fork_rng(devices=[]):
        checks += _at_one_stream(captured, state.record)
        if state.record.config.n > 1:
            checks += _at_step_zero(captured, state.record)
            checks += _with_its_weights(model, args, kwargs)
            checks.append(_other_door(model, args, kwargs))
    return Report(type(model).__name__, checks)


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put back what calls write into buffers: running statistics, the vectors of a spectral norm."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


# ---------------------------------------------------------------------------------------------- checks


def _at_one_stream(captured: Captured, record: Record) -> list[Check]:
    """The n = 1 machinery with pre and post at 1 and random res logits, against the plain graph."""
    graph = copy_graph(captured.graph)
    analysis = recorded_analysis(graph, record) if record.sites else analyze(graph)
    plain = copy_graph(graph)
    for site in analysis.sites:
        site.constraint = ""  # with one stream there is nothing to mix
    added = _widen(analysis, MHCConfig(n=1), lambda like, site: torch.randn_like(like))
    _force_ones(graph)
    _split_reads(graph)
    own = _run(plain, captured.arguments)
    ours = _run(graph, (*captured.arguments, *added))
    worst = max((_difference(a, b) for a, b in zip(own.outputs, ours.outputs, strict=True)), default=0.0)
    same = all(torch.equal(a, b) for a, b in zip(own.outputs, ours.outputs, strict=True))
    gradients = _gradient_difference(own, ours)
    equal = all(_equal(a, b) for a, b in zip(own.gradients, ours.gradients, strict=True))
    # x + f(x) + g(x) becomes x + (f(u) + g(u))
    regrouped = any(len(site.merge.tree.leaves) > 2 for site in analysis.sites)
    why = " (sums of several branches in another order)" if regrouped else ""
    kept = same or (regrouped and worst <= OUTPUT_LIMIT[own.dtype] / 10)
    # autograd may still sum a value's gradients in another order than in the plain graph
    close = gradients <= GRADIENT_LIMIT[own.dtype] / 10
    detail = "bitwise" if equal else f"largest difference {gradients:.1e} (sums of gradients in another order)"
    return [
        _check("n = 1: outputs", kept, "bitwise" if same else f"largest difference {worst:.1e}{why}"),
        _check("n = 1: gradients", equal or close, detail),
    ]


def _at_step_zero(captured: Captured, record: Record) -> list[Check]:
    n, config = record.config.n, replace(record.config, init="identity")
    graph = copy_graph(captured.graph)
    analysis = recorded_analysis(graph, record)
    modules = {site.name: connection(site, config, torch.device("cpu")) for site in record.sites}

    def value(like: Tensor, name: str) -> Tensor:
        site, part = name.rsplit(".", 1)
        parameter: Tensor = getattr(modules[site], part)
        return parameter.detach().to(like)

    added = _widen(analysis, config, value)
    own = _run(captured.graph, captured.arguments)
    ours = _run(graph, (*captured.arguments, *added))
    limit = OUTPUT_LIMIT[own.dtype]
    worst = max((_difference(a, b) for a, b in zip(own.outputs, ours.outputs, strict=True)), default=0.0)
    gradients = _gradient_difference(own, ours)
    bound = GRADIENT_LIMIT[own.dtype]
    return [
        _check(f"n = {n}, step 0: outputs", worst <= limit, f"{worst:.1e} of scale (limit {limit:.0e})"),
        _check(f"n = {n}, step 0: gradients", gradients <= bound, f"{gradients:.1e} of scale (limit {bound:.0e})"),
    ]


def _with_its_weights(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Check]:
    state = conversion(model)
    result = rewritten(model, kwargs if kwargs and not args else args)
    compiled = copy_graph(result.graph)
    lower(compiled)
    fuse(compiled)
    worst: dict[str, float] = {}
    for graph in (result.graph, compiled):
        with torch.no_grad():
            _OracleRun(graph, worst).run(*_copies(result.arguments))
    limit = OUTPUT_LIMIT[_narrowest(_floats(result.arguments))]
    ops = max(worst.values(), default=0.0)
    farthest = max(worst, key=worst.__getitem__, default="none")
    detail = f"{len(worst)} ops, {farthest} by {ops:.0e} (limit {limit:.0e})"
    checks = [_check("ops = fp64 oracle", ops <= limit, detail)]
    name = f"compiled ({state.record.config.backend}) = op by op"
    if state.record.config.backend == "inductor" and _draws_random_numbers(result.graph):
        return [*checks, Check(name, "not run", "inductor draws other dropout masks; call model.eval() first")]
    op_by_op = state.compiled(model, "eager", level=1)
    with torch.no_grad(), _torch.compile_settings():
        torch.manual_seed(0)
        with _kept_buffers(model):
            expected = _floats(op_by_op(model, *args, **kwargs)[1])
        torch.manual_seed(0)
        found = _floats(model(*args, **kwargs))
    error = max((_difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)
    return [*checks, _check(name, error <= 10 * limit, f"{error:.1e} of scale (limit {10 * limit:.0e})")]


def _other_door(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Check:
    name = "torch.export: same sites"
    try:
        exported(model, kwargs if kwargs and not args else args)
    except CaptureError as error:
        return Check(name, "not run", textwrap.shorten(str(error).splitlines()[0], 120))
    except MHCError as error:
        return Check(name, "fail", str(error).splitlines()[0])
    return Check(name, "pass", f"{len(conversion(model).record.sites)} sites")


def _check(name: str, passed: bool, detail: str) -> Check:
    return Check(name, "pass" if passed else "fail", detail)


# ---------------------------------------------------------------------------------------------- running graphs


@dataclass(frozen=True)
class _Result:
    outputs: list[Tensor]
    gradients: list[Tensor | None]

    @property
    def dtype(self) -> torch.dtype:
        return _narrowest(self.outputs)


def _narrowest(values: Sequence[Tensor]) -> torch.dtype:
    return min((one.dtype for one in values), key=lambda dtype: dtype.itemsize)


def _run(graph: fx.GraphModule, arguments: Sequence[Any]) -> _Result:
    """Outputs, and gradients of a fixed random combination of them by every parameter of the model's own."""
    inputs = [_leaf(value) for value in arguments]
    torch.manual_seed(0)
    with torch.enable_grad():
        outputs = _floats(graph(*inputs))
    weights = torch.Generator("cpu").manual_seed(1)
    differentiable = [one for one in outputs if one.requires_grad]
    if not differentiable:
        return _Result(outputs, [])
    made: dict[str, Any] = dict(generator=weights, dtype=torch.float32, device="cpu")  # whatever the caller's defaults
    loss = sum((one.double() * torch.randn(one.shape, **made).to(one.device)).sum() for one in differentiable)
    own = [one for one, given in zip(inputs, arguments, strict=True) if _is_own(given)]
    return _Result([one.detach() for one in outputs], list(torch.autograd.grad(loss, own, allow_unused=True)))  # type: ignore[arg-type]


def _leaf(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return value.detach().requires_grad_(value.requires_grad)
    return value.clone() if isinstance(value, Tensor) else value


def _is_own(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and value.requires_grad


def _copies(arguments: Sequence[Any]) -> list[Any]:
    return [value.detach().clone() if isinstance(value, Tensor) else value for value in arguments]


def _floats(output: Any) -> list[Tensor]:
    return [
        one for one in pytree.tree_leaves(output) if isinstance(one, Tensor) and one.is_floating_point() and one.numel()
    ]


def _widen(analysis: Analysis, config: MHCConfig, value: Callable[[Tensor, str], Tensor]) -> list[Tensor]:
    """Rewrite an analysed graph to n streams; gives the values of the inputs that this adds."""
    look_up, names = bind_parameters(analysis.graph, analysis.sites, config)
    nodes = list(analysis.graph.graph.find_nodes(op="placeholder"))[-len(names) :] if names else []
    expand(analysis.graph, analysis.trunks, analysis.flow, look_up, config)
    analysis.graph.recompile()
    empty = [
        torch.empty(node.meta["val"].shape, dtype=node.meta["val"].dtype, device=node.meta["val"].device)
        for node in nodes
    ]
    return [value(like, name) for like, name in zip(empty, names, strict=True)]


def _force_ones(graph: fx.GraphModule) -> None:
    emitter = Emitter(graph.graph)
    for read in graph.graph.find_nodes(op="call_function", target=mhc.coefficients.default):
        for part in list(read.users):
            if part.args[1] in (0, 1):
                with graph.graph.inserting_after(part):
                    ones = emitter.call(aten.ones_like.default, part, like=part)
                part.replace_all_uses_with(ones, delete_user_cb=lambda user, ones=ones: user is not ones)
    graph.recompile()


def _split_reads(graph: fx.GraphModule) -> None:
    """Give every reader of an aggregate or readout one of its own.

    Autograd then sums the gradients of a trunk value one by one, as it does where the readers read the value itself.
    """
    for target in (mhc.aggregate.default, mhc.readout.default):
        for first in graph.graph.find_nodes(op="call_function", target=target):
            chain = [first]
            while len(chain[-1].users) == 1 and next(iter(chain[-1].users)).target in _BACK_IN_PLACE:
                chain.append(next(iter(chain[-1].users)))
            for reader in sorted(chain[-1].users)[1:]:
                source: fx.Node | None = None
                for node in chain:
                    with graph.graph.inserting_before(reader):
                        copy = graph.graph.node_copy(node)
                    if source is not None:
                        copy.replace_input_with(node.args[0], source)
                    source = copy
                assert source is not None
                reader.replace_input_with(chain[-1], source)
    graph.recompile()


def _draws_random_numbers(graph: fx.GraphModule) -> bool:
    return any(map(draws, graph.graph.nodes))


def _read(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, eps: float, iterations: int, *variant: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gates, balance = variant[:4], variant[4:6]
    pre, post, logits = reference.coefficients(streams, phi, alpha, bias, eps, *gates)
    res = reference.sinkhorn(logits, iterations, *balance) if logits.numel() else logits
    return reference.aggregate(streams, pre), pre, post, res


def _merge_carried(
    streams: Tensor, f: Tensor, carrier: Tensor, post: Tensor, res: Tensor | None, *manner: bool
) -> Tensor:
    return reference.merge(streams, f, post, res, *manner)


def _merge_read(
    streams: Tensor,
    f: Tensor,
    carrier: Tensor,
    branch: Tensor | None,
    post: Tensor,
    res: Tensor | None,
    transposed: bool,
    rounded: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    merged = reference.merge(streams, f, post, res, transposed, rounded)
    return merged, *_read(merged, *rest)


def _read_early(streams: Tensor, weights: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, *coefficients = _read(streams, *rest)
    pre, post, res = coefficients
    return streams.new_empty(0) if weights is None else reference.aggregate(streams, weights), pre, post, res


def _merge_read_early(*arguments: Any) -> tuple[Tensor, ...]:
    streams, f, _, _, post, res, transposed, rounded, *rest = arguments
    merged = reference.merge(streams, f, post, res, transposed, rounded)
    return merged, *_read_early(merged, *rest)


def _constrain(logits: Tensor, kind: str, n: int) -> Tensor:
    return CONSTRAINTS[kind].res(logits, n)


_KEEPS_MORE = (mhc.read.default, mhc.merge_read.default, mhc.read_early.default, mhc.merge_read_early.default)


class _OracleRun(fx.Interpreter):
    """Runs a rewritten graph and compares each mHC op with the fp64 oracle on the values it meets."""

    ORACLE = {  # noqa: RUF012
        mhc.coefficients.default: reference.coefficients,
        mhc.sinkhorn.default: reference.sinkhorn,
        mhc.gates.default: reference.gates,
        mhc.constrain.default: _constrain,
        mhc.aggregate.default: reference.aggregate,
        mhc.merge.default: reference.merge,
        mhc.expand.default: reference.expand,
        mhc.readout.default: reference.readout,
        mhc.read.default: _read,
        mhc.merge_carried.default: _merge_carried,
        mhc.merge_read.default: _merge_read,
        mhc.read_early.default: _read_early,
        mhc.merge_read_early.default: _merge_read_early,
    }

    def __init__(self, graph: fx.GraphModule, worst: dict[str, float]) -> None:
        super().__init__(graph)
        self.worst = worst

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        oracle: Any = self.ORACLE.get(target)
        if oracle is not None:
            exact = oracle(*(one.double() if isinstance(one, Tensor) else one for one in args))
            name = target._opname
            found = pytree.tree_leaves(result)  # `read` gives more: carriers, and what its backward keeps
            for a, b in zip(pytree.tree_leaves(exact), found, strict=target not in _KEEPS_MORE):
                self.worst[name] = max(self.worst.get(name, 0.0), _difference(a, b))
        return result


# ---------------------------------------------------------------------------------------------- comparing


def _difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, as a part of the largest expected value. Infinities and nans must stand alike."""
    a, b = expected.detach().double(), found.detach().double()
    finite = torch.isfinite(a)
    if a.shape != b.shape or not torch.equal(finite, torch.isfinite(b)):
        return float("inf")
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _gradient_difference(own: _Result, ours: _Result) -> float:
    largest = max((float(one.abs().max()) for one in own.gradients if one is not None and one.numel()), default=0.0)
    worst = 0.0
    for a, b in zip(own.gradients, ours.gradients, strict=True):
        if (a is None) != (b is None):
            return float("inf")
        if a is not None and b is not None and a.numel():
            scale = max(float(a.abs().max()), GRADIENT_FLOOR * largest)
            worst = max(worst, float((a.double() - b.double()).abs().max()) / scale if scale else 0.0)
    return worst


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
