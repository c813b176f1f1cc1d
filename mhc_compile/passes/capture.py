"""Capture a model as one fx graph of pre-dispatch ATen ops, through either of two doors.

Just in time, Dynamo hands a graph to a backend; ahead of time, `torch.export` gives an exported program. Both are run
once more under `make_fx(pre_dispatch=True)`, which leaves one language: ATen ops above autograd and autocast (`linear`,
`layer_norm`, `scaled_dot_product_attention` and `dropout` still whole), with the fake value (`val`), the module stack
and the stack trace on each node. Activation checkpoints are looked into: their bodies stand in the graph, tagged for
recomputation. Other higher-order ops (scans, branches) stay whole. Regions of grad mode and autocast stay as pairs of
nodes; in-place ops are the business of `canonicalize`.
"""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile import _torch
from mhc_compile.errors import CaptureError, MHCError, wrong
from mhc_compile.passes.misfit import misfit
from mhc_compile.passes.op_kinds import packet_named
from mhc_compile.passes.provenance import attribute_path, calling_frame, is_of_torch, is_ours, source_line

_HOPS = torch.ops.higher_order
_LOOKED_INTO = (
    _HOPS.tag_activation_checkpoint,
    _HOPS.wrap_with_set_grad_enabled,
    _HOPS.wrap_with_autocast,
    _HOPS.invoke_subgraph,
)


@dataclass(frozen=True)
class GraphInput:
    """What a graph input stands for: kind is `parameter`, `buffer` or `input`; path is `a.b.weight` or ''."""

    kind: str
    path: str


@dataclass(frozen=True)
class Captured:
    """A model's graph and the flat arguments of the call that was captured, in the order of its placeholders.

    backwards: names of the `autograd.Function`s whose forward stands in the graph op by op, without their backward.
    """

    graph: fx.GraphModule
    arguments: tuple[Any, ...]
    backwards: tuple[str, ...] = ()


def graph_input(node: fx.Node) -> GraphInput | None:
    """The record of a placeholder of a captured graph; None for other nodes."""
    record = node.meta.get("mhc_input")
    return record if isinstance(record, GraphInput) else None


class _Arguments(Exception):
    """Carries the flat arguments out of a compiled call, before anything runs."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments


def just_in_time(
    function: Callable[..., Any], model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Captured:
    """Capture `function(model, *args, **kwargs)` with Dynamo, without running it.

    Raises CaptureError, with the line of the user's code, when it does not capture as one graph.
    """
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(normalize(gm, [node.meta["example_value"] for node in _placeholders(gm)]))

        def stop(*arguments: Any) -> Any:
            raise _Arguments(arguments)

        return stop

    try:
        with torch.enable_grad(), _torch.compile_settings():
            _torch.compiled_alone(function, backend)(model, *args, **kwargs)
    except _Arguments as signal:
        return Captured(graphs[0], signal.arguments)
    except DYNAMO_ERRORS as error:
        raise translated(error, model, args, kwargs) from error
    except RuntimeError as error:
        raise (under_a_mode(type(model).__name__) or error) from error
    raise CaptureError(_nothing_captured(type(model).__name__))


def _nothing_captured(name: str) -> str:
    if _torch.dynamo_is_off():
        return wrong(
            f"the capture of {name}",
            "empty: Dynamo is switched off (TORCHDYNAMO_DISABLE, or set_stance('force_eager'))",
            "a process in which torch.compile compiles",
            "switch Dynamo on for the call",
        )
    legal = "a forward that computes with tensors on these inputs"
    return wrong(f"the forward of {name}", "one without a tensor op", legal, "pass inputs that exercise it")


def ahead_of_time(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> tuple[Captured, pytree.TreeSpec | None]:
    """Capture `model(*args, **kwargs)` with `torch.export` (non-strict), in the same language.

    Also gives the structure of the model's output. Raises CaptureError when torch.export refuses the model.
    """
    with _noting_backwards() as backwards:
        program = exported(model, args, kwargs, dynamic_shapes)
    captured = captured_from(program, args, kwargs)
    return replace(captured, backwards=tuple(dict.fromkeys(backwards))), program.call_spec.out_spec


_patched = threading.RLock()


@contextmanager
def _noting_backwards() -> Iterator[list[str]]:
    """The names of the functions with a backward of their own that run meanwhile, between tensors that take gradients.

    torch.export puts what their forward computes into the graph, and nothing there tells that there was a backward.
    torch's own (of its reentrant checkpoints) only compute the gradients of their forward in another way.
    """
    found: list[str] = []
    apply, thread = torch.autograd.Function.__dict__["apply"], threading.get_ident()

    def noting(kind: type[Any], *args: Any, **kwargs: Any) -> Any:
        output = apply.__get__(None, kind)(*args, **kwargs)
        if threading.get_ident() != thread:  # is not exporting
            return output
        trained = any(isinstance(one, torch.Tensor) and one.requires_grad for one in (*args, *kwargs.values()))
        if trained and kind.__module__.split(".")[0] != "torch":
            found.append(f"{kind.__module__}.{kind.__qualname__}")
        return output

    with _patched:
        setattr(torch.autograd.Function, "apply", classmethod(noting))  # noqa: B010 - mypy refuses the assignment
        try:
            yield found
        finally:
            setattr(torch.autograd.Function, "apply", apply)  # noqa: B010


def exported(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """What `torch.export` (non-strict) makes of `model(*args, **kwargs)`.

    Raises CaptureError when it refuses the model.
    """
    with torch.enable_grad():
        try:
            found = torch.export.export(model, tuple(args), dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
            _torch.tracked_inputs(found.graph_module).clear()
            return found
        except MHCError:
            raise
        except Exception as error:
            raise CaptureError(misfit(model, args, kwargs, error) or _refused_export(model, error)) from error


def captured_from(program: torch.export.ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Captured:
    """The graph of an exported program in the language of the passes, with the arguments it was exported for."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    values = iter(pytree.tree_leaves((tuple(args), dict(kwargs))))
    state = {**program.state_dict, **program.constants}
    arguments, examples = [], []
    for node in _placeholders(program.graph_module):
        spec = specs[node.name]
        lifted = spec.target is not None
        arguments.append(state[str(spec.target)] if lifted else next(values))
        examples.append(_torch.settled(node.meta["val"]))
        kind = spec.kind.name.lower() if lifted else "input"
        node.meta["mhc_input"] = GraphInput(kind if kind in ("parameter", "buffer") else "input", spec.target or "")
    graph = normalize(program.graph_module, examples)
    _drop_metadata_checks(graph)
    return Captured(graph, tuple(arguments))


def _drop_metadata_checks(gm: fx.GraphModule) -> None:
    """Erase what torch.export asserts at each cast, and what only these assertions read.

    They hold for the inputs that were traced, and calls with other ones are refused before the graph runs. Left in,
    each would be a reader of the trunk, which gets a readout of its own.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _refused_export(model: nn.Module, error: Exception) -> str:
    found = f"refused by torch.export: {_first_line(error)}"
    step = "rewrite what it names; calls, explain and observe do not need torch.export"
    unknown = re.search(r"Found <class '(\S+)'> in output, which is not a known type", str(error))
    if unknown:
        found = f"one that returns a {unknown[1]}, in which torch.export cannot look for tensors"
        step = (
            "pass use_cache=False among the inputs, or set it in the model's config"
            if "cache" in unknown[1].lower()
            else "return tuples, lists or dicts, or call torch.export.register_dataclass (for other classes "
            "torch.utils._pytree.register_pytree_node) first"
        )
    return wrong(type(model).__name__, found, "a model that it exports", step)


def normalize(gm: fx.GraphModule, examples: Sequence[Any]) -> fx.GraphModule:
    """Retrace a captured graph into the pre-dispatch ATen language.

    `examples` are the fake values of its placeholders, one for each. Gives a new graph with the same inputs and
    outputs in the same order; `gm` is left as it was. Every value is recorded as seen with gradients enabled.
    """
    _refuse_derivatives(gm)
    fake_mode = _torch.fake_mode_of(examples)
    inliner = _Inliner(gm)
    with _lenient(fake_mode), torch.fx.traceback.preserve_node_meta(), torch.enable_grad(), _torch.saving_unseen():
        traced = _torch.make_fx(lambda *flat: inliner.run(*flat), pre_dispatch=True)(*examples)
    for old, new, example in zip(_placeholders(gm), _placeholders(traced), examples, strict=True):
        new.meta["mhc_input"] = old.meta.get("mhc_input") or _input_record(old, example)
        new._rename(old.name)
        new.target = new.name
    _share_mode(traced, fake_mode)
    traced.graph.lint()
    traced.recompile()
    _torch.forget_gradients(examples)
    return traced


def _share_mode(gm: fx.GraphModule, fake_mode: _torch.FakeTensorMode | None) -> None:
    """Give constants (inductor's freezing makes such of parameters) a value in the fake mode of all others."""
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target), None)
        if fake_mode is not None and isinstance(value, torch.Tensor):
            node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)


def _input_record(node: fx.Node, example: object) -> GraphInput:
    path = attribute_path(_torch.dynamo_source_name(node))
    if isinstance(example, nn.Parameter):
        return GraphInput("parameter", path)
    return GraphInput("buffer" if path and isinstance(example, torch.Tensor) else "input", path)


@contextmanager
def _lenient(fake_mode: _torch.FakeTensorMode | None) -> Any:
    """The fake mode of the examples, accepting the real constants that a captured graph may hold."""
    if fake_mode is None:
        with nullcontext():
            yield
        return
    before = fake_mode.allow_non_fake_inputs
    fake_mode.allow_non_fake_inputs = True
    try:
        with fake_mode:
            yield
    finally:
        fake_mode.allow_non_fake_inputs = before


class _Inliner(fx.Interpreter):
    """Runs a graph, looking into the wrappers that hide ops: checkpoints, and export's grad and autocast regions."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self._vmap_depth = 0

    def run_node(self, n: fx.Node) -> Any:
        if n.target is _torch.vmap_enter:
            self._vmap_depth += 1
        if self._vmap_depth:
            return self._inside_vmap(n)
        if isinstance(n.target, _torch.HigherOrderOperator) and n.target not in _LOOKED_INTO:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            result = n.meta["example_value"] if "example_value" in n.meta else n.meta["val"]
            with torch.fx.traceback.set_current_meta(n):
                return _torch.record_opaque(n.target, args, kwargs, result)
        if n.op in ("call_function", "call_method"):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if _torch.is_autograd_function(n.target) or any(map(_torch.is_whole, pytree.tree_leaves((args, kwargs)))):
                return self._kept_whole(n, args, kwargs)
            if isinstance(n.target, FunctionType) and not n.target.__module__.startswith("torch."):
                return self._looked_into(n, args, kwargs)
        return super().run_node(n)

    def _looked_into(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The ops of a function that is marked `allow_in_graph`; itself where a backward of its own would be lost."""
        graph = _torch.graph_recorded()
        last = next(iter(reversed(graph.nodes)))
        result = super().run_node(n)
        if not _torch.has_own_backward(_tensors(result), _tensors((args, kwargs))):
            return result
        for node in [*reversed(graph.nodes)]:
            if node is last:
                break
            graph.erase_node(node)
        return self._kept_whole(n, args, kwargs)

    def _kept_whole(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call whose meaning is not that of the ops it runs stays in the graph as it was captured."""
        target = getattr(torch.Tensor, str(n.target)) if n.op == "call_method" else n.target
        result = n.meta["example_value"] if "example_value" in n.meta else n.meta["val"]
        with torch.fx.traceback.set_current_meta(n):
            return _torch.record_opaque(target, args, kwargs, result, like=packet_named(target))

    def _inside_vmap(self, n: fx.Node) -> Any:
        """Ops on batched tensors have no form above vmap: they stay in the graph as Dynamo wrote them."""
        if n.target is _torch.vmap_exit:
            self._vmap_depth -= 1
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = n.meta.get("example_value")
        if isinstance(result, torch.Tensor) and n.target is not _torch.vmap_unwrap:
            result = torch.empty(())  # stands for a batched tensor; nothing outside reads it
        with torch.fx.traceback.set_current_meta(n):
            return _torch.record_opaque(
                n.target, args, kwargs, result, kind=n.op, hidden=n.target is not _torch.vmap_unwrap
            )

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _HOPS.tag_activation_checkpoint:
            body, *inputs = args
            for node in body.graph.nodes:
                node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
                node.meta.setdefault("ac_graph_id", id(body))
            return _Inliner(body).run(*inputs)
        if target is _HOPS.wrap_with_set_grad_enabled:
            enabled, body, *inputs = args
            with torch.set_grad_enabled(enabled):
                return _Inliner(body).run(*inputs)
        if target is _HOPS.wrap_with_autocast:
            device, dtype, enabled, cache, body, *inputs = args
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
                return _Inliner(body).run(*inputs)
        if target is _HOPS.invoke_subgraph:
            body, _, *inputs = args
            return _Inliner(body).run(*inputs)
        if kwargs.get("out") is not None:  # has no gradient: only legal where gradients are off, as they may be outside
            args = pytree.tree_map_only(torch.Tensor, _without_gradient, args)
        return super().call_function(target, args, kwargs)


_DERIVATIVES = {"_grad_increment_nesting": "grad (or vjp, jacrev)", "_jvp_increment_nesting": "jvp (or jacfwd)"}


def _refuse_derivatives(gm: fx.GraphModule) -> None:
    """Raise CaptureError: ops on what torch.func wraps have no form above it, and some of it leaves its region."""
    nodes = iter(gm.graph.nodes)
    for node in nodes:
        transform = _DERIVATIVES.get(getattr(node.target, "__name__", ""))
        if transform is not None:
            legal = "one whose derivatives are taken outside of it"
            step = "write that derivative in ops, or convert a submodule that does not take it"
            frame = next(filter(None, map(calling_frame, nodes)), None)
            line = str(frame) if frame else None
            raise CaptureError(wrong("the forward", f"one that calls torch.func.{transform}", legal, step), line=line)


def _without_gradient(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


DYNAMO_ERRORS = (
    _torch.Unsupported,
    _torch.DynamoUserError,
    _torch.FailOnRecompileLimitHit,
    _torch.BackendCompilerFailed,
    _torch.TorchRuntimeError,
)


def translated(
    error: Exception, model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Exception:
    """Our error for one of DYNAMO_ERRORS, with the user's line and what to do; else the error itself."""
    if isinstance(error, _torch.BackendCompilerFailed) and isinstance(error.inner_exception, MHCError):
        return error.inner_exception
    message = misfit(model, args, kwargs or {}, error) or _reason(error, type(model).__name__)
    return error if message is None else CaptureError(message, line=_user_line(error))


def under_a_mode(name: str) -> CaptureError | None:
    """The error of a call under a TorchDispatchMode: torch.compile runs nothing of what it compiled there."""
    modes = _torch.dispatch_modes()
    if not modes:
        return None
    step = "give the mode mhc_compile.trace(model, inputs), a module that runs op by op"
    return CaptureError(wrong(f"a call of {name}", f"inside {modes[-1]}", "a call outside of dispatch modes", step))


def _reason(error: Exception, name: str) -> str | None:
    if isinstance(error, _torch.BackendCompilerFailed):
        return None
    if isinstance(error, _torch.FailOnRecompileLimitHit):
        legal = "inputs whose dtypes, modes and Python values come back"
        step = "TORCH_LOGS=recompiles names what changes with every call"
        return wrong(f"the number of variants of {name}", f"too large: {_first_line(error)}", legal, step)
    if isinstance(error, _torch.TorchRuntimeError):
        cause = re.search(r"got (\w+\(.*\))", str(error))
        found = f"one that raises on these inputs: {cause[1] if cause else _first_line(error)}"
        return wrong(f"the forward of {name}", found, _RUNS, "correct the inputs or that line")
    if "Observed exception" in str(error) or "failed to bind arguments" in str(error):
        found = "one that raises on these inputs, or takes others"
        return wrong(f"the forward of {name}", found, _RUNS, "call the plain model on them to see its error")
    if "backwards hooks" in str(error):
        legal = "backward hooks of the converted model itself, of parameters and of tensors"
        return wrong(f"a module inside of {name}", "given a backward hook", legal, "take that hook off the module")
    return wrong(
        f"the forward of {name}",
        f"not one graph: {_first_line(error)}",
        "a forward that torch.compile(model, fullgraph=True) captures",
        "rewrite that line in tensor ops, move it out of forward, or convert the submodule that does not contain it",
    )


_RUNS = "inputs that the plain model runs on"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def _user_line(error: BaseException) -> str | None:
    """The innermost line of the user's program, with the line of torch that it led to."""
    frames = getattr(error, "real_stack", None)
    if not frames:
        return None
    own = [frame for frame in frames if not is_of_torch(frame.filename) and not is_ours(frame.filename)]
    last = frames[-1]
    return _place(last) if not own or own[-1] is last else f"{_place(own[-1])}\n  in {_place(last)}"


def _place(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno}: {(frame.line or '').strip()}"


__all__ = [
    "DYNAMO_ERRORS",
    "Captured",
    "GraphInput",
    "ahead_of_time",
    "captured_from",
    "exported",
    "graph_input",
    "just_in_time",
    "normalize",
    "source_line",
    "translated",
    "under_a_mode",
]
