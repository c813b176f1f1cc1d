"""The only place that knows private names of torch; each is looked up at import.

Names of torch's modules are imported below; of torch's objects the package reads the private members in MEMBERS alone.
What moves in a later release fails here, at import, with one message.
"""

from __future__ import annotations

import functools
import itertools
import logging
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import fx

TESTED = ("2.11", "2.12", "2.13", "2.14", "2.15")
"""The releases of torch that were tried, on which every name here is found; docs/versions.md has what was run."""

try:
    from torch._C import (
        DispatchKey,
        _current_graph_task_id,
        _disabled_torch_function_impl,
        _dispatch_tls_is_dispatch_key_excluded,
        _dispatch_tls_set_dispatch_key_excluded,
        _set_grad_enabled,
    )
    from torch._C._autograd import _top_saved_tensors_default_hooks
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code, set_eval_frame
    from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
    from torch._dynamo import OptimizedModule, convert_frame, eval_frame
    from torch._dynamo import config as dynamo_config
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.eval_frame import cached_backends, skip_code
    from torch._dynamo.exc import (
        BackendCompilerFailed,
        FailOnRecompileLimitHit,
        ShortenTraceback,
        TorchDynamoException,
        TorchRuntimeError,
        Unsupported,
    )
    from torch._dynamo.exc import UserError as DynamoUserError
    from torch._dynamo.guards import CheckFunctionManager
    from torch._dynamo.pgo import get_code_state
    from torch._functorch import config as functorch_config
    from torch._functorch.predispatch import _remove_batch_dim as vmap_unwrap
    from torch._functorch.predispatch import _vmap_decrement_nesting as vmap_exit
    from torch._functorch.predispatch import _vmap_increment_nesting as vmap_enter
    from torch._guards import TracingContext
    from torch._inductor import compile as inductor_compile
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options as inductor_modes
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch._library.custom_ops import OPDEFS, CustomOpDef
    from torch._ops import HigherOrderOperator, OpOverload
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
    from torch.autograd import forward_ad
    from torch.fx._symbolic_trace import is_fx_symbolic_tracing
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, track_tensor_tree
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_traceable_wrapper_subclass

    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
except ImportError as error:  # pragma: no cover - depends on the installed torch
    raise ImportError(
        f"mhc_compile does not know this torch ({torch.__version__}): {error}. Tested: {', '.join(TESTED)}."
    ) from error

MEMBERS: tuple[tuple[object, tuple[str, ...]], ...] = (
    (torch.nn.Module(), ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")),
    (torch.nn.Module(), ("_load_from_state_dict", "_forward_hooks", "_forward_pre_hooks")),
    (torch.ops.aten.add.Tensor, ("_schema", "_opname", "_overloadname")),
    (torch.ops.aten.add, ("_qualified_op_name",)),
    (torch.ops.aten, ("_assert_tensor_metadata", "_log_softmax", "_softmax", "_unsafe_view")),
    (torch.Tensor, ("_is_view",)),
    (torch.UntypedStorage, ("_cdata",)),
    (fx.Node, ("_rename",)),
    (CustomOpDef, ("_init_fn",)),
    (DistributedDataParallel, ("_get_active_ddp_module",)),
    (torch.nn.Module, ("_apply",)),
    (weakref.finalize, ("_registry",)),
    (eval_frame, ("_stance",)),
    (eval_frame.DisableContext, ("_torchdynamo_disable", "_torchdynamo_disable_msg")),
    (forward_ad, ("_current_level",)),
    *(
        ((FSDPModule, ("_get_fsdp_state",)), (FSDPState, ("_training_state", "_mp_policy")))
        if torch.distributed.is_available()
        else ()
    ),
)
"""Private members of torch's objects that the package reads, on one object or class that has them."""


def missing_members(members: Iterable[tuple[object, tuple[str, ...]]]) -> list[str]:
    """Return the names that an object does not have, nor the methods of a class, which may set them."""
    return [
        f"{name} of {getattr(owner, '__name__', type(owner).__name__)}"
        for owner, names in members
        for name in names
        if not hasattr(owner, name) and not _is_set_by(owner, name)
    ]


def _is_set_by(owner: object, name: str) -> bool:
    methods = vars(owner).values() if isinstance(owner, type) else ()
    return any(name in code.co_names for code in (getattr(one, "__code__", None) for one in methods) if code)


def check_torch(version: str, missing: list[str]) -> None:
    """Raise ImportError where members are missing; warn once of a release that is newer than all tested ones."""
    tested = f"Tested: {', '.join(TESTED)}."
    if missing:
        raise ImportError(f"mhc_compile does not know this torch ({version}): it has no {', '.join(missing)}. {tested}")
    newest = tuple(map(int, TESTED[-1].split(".")))
    if tuple(map(int, version.split(".")[:2])) > newest:
        warnings.warn(
            f"mhc_compile was not tested with torch {version}. {tested} The private names that it needs are there. "
            f"Next: compare a converted model with verify(model), or install torch {TESTED[-1]}",
            stacklevel=2,
        )


check_torch(torch.__version__, missing_members(MEMBERS))

_Function = TypeVar("_Function", bound=Callable[..., Any])
_counter = itertools.count()
_TORCH = str(Path(torch.__file__).parent)

SIZES_OF_DATA = (DynamicOutputShapeException, DataDependentOutputException)

# The nodes that begin and end a region of autocast, and those that switch gradients.
enter_autocast: Callable[..., Any] = _enter_autocast
exit_autocast: Callable[..., Any] = _exit_autocast
set_grad_enabled: Callable[..., Any] = _set_grad_enabled

__all__ = [
    "SIZES_OF_DATA",
    "BackendCompilerFailed",
    "CustomGraphPass",
    "DynamoUserError",
    "FailOnRecompileLimitHit",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OptimizedModule",
    "TorchDynamoException",
    "TorchRuntimeError",
    "Unsupported",
    "active_ddp",
    "as_fake",
    "caches_of",
    "compile_graph",
    "compile_settings",
    "compiled_alone",
    "compiler_cache",
    "cpp_compiler",
    "dispatch_modes",
    "dynamo_config",
    "dynamo_is_off",
    "dynamo_source_name",
    "enter_autocast",
    "exit_autocast",
    "fake_mode_of",
    "forget_gradients",
    "forward_mode",
    "fragment",
    "function_transforms",
    "get_hash_for_files",
    "gradients_inside_op",
    "graph_recorded",
    "has_own_backward",
    "has_tangents",
    "in_backward",
    "inductor_compile",
    "inductor_config",
    "inductor_modes",
    "inner_tensors",
    "is_autograd_function",
    "is_tracing",
    "is_whole",
    "is_wrapper",
    "keep_no_backend",
    "leaves_with_path",
    "make_fx",
    "memory_budget",
    "module_of_op",
    "outside_dynamo",
    "paused",
    "record_opaque",
    "saving_unseen",
    "set_grad_enabled",
    "size_hint",
    "storage_key",
    "through_dynamo",
    "tracer",
    "tracked_inputs",
    "vmap_enter",
    "vmap_exit",
    "vmap_unwrap",
]


def dynamo_source_name(placeholder: fx.Node) -> str:
    """Where Dynamo took a graph input from, as `L['self']._modules['a']._parameters['weight']`; '' if unknown."""
    grapharg = placeholder.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    if source is None:
        return ""
    name = source.name  # a method up to torch 2.9, a property since
    return str(name() if callable(name) else name)


@dataclass(frozen=True)
class Fragment:
    """Where a graph of Dynamo is from: the model or function that is compiled, and whether its call ends there."""

    root: object | None
    ends: bool


def fragment(gm: fx.GraphModule) -> Fragment:
    """The place of a graph that a backend is called with, read from the stack; where that is unknown, a whole call."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    compiled, callers = None, list[types.CodeType]()
    for frame, _ in traceback.walk_stack(None):
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path == eval_frame.__file__ and name == "compile_wrapper":
            given = frame.f_locals.get("fn")
            break
        if path == convert_frame.__file__:
            compiled = frame.f_locals.get("code", compiled)
        elif compiled is not None and not path.startswith(_TORCH):
            callers.append(frame.f_code)
    else:
        return Fragment(None, True)
    if compiled is None:
        return Fragment(None, True)
    _, *others = [*reversed(callers), compiled]
    continues = all(code.co_name.startswith("torch_dynamo_resume_in_") for code in others)
    return Fragment(getattr(given, "__self__", given), continues and not getattr(reason, "graph_break", False))


def fake_mode_of(values: Iterable[object]) -> FakeTensorMode | None:
    """The fake mode of the first fake tensor among `values`.

    Not `detect_fake_mode`: inside a backend that one answers with the mode of the tracing context, which is not
    always that of Dynamo's own example values, and modes must not mix.
    """
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def forget_gradients(values: Iterable[object]) -> None:
    """Take off the fake gradients of fake parameters: a fake tensor with one is never freed.

    A gradient is held in C++, where no garbage collector looks, and holds its fake mode, which holds the parameter.
    """
    for value in values:
        if isinstance(value, FakeTensor) and value.is_leaf:
            value.grad = None


def as_fake(values: Iterable[object], tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Stand-ins of fixed size for `tensors`, in the fake mode that Dynamo traced `values` in."""
    mode = fake_mode_of(values) or TracingContext.get().fake_mode
    if mode is None:
        return list(tensors)
    return [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]


def compile_graph(
    backend: str,
    graph: fx.GraphModule,
    example_inputs: list[Any],
    fingerprint: str,
    inductor: dict[str, Any] | None = None,
    tagged: bool = False,
) -> Callable[..., Any]:
    """The graph compiled by a registered backend of Dynamo; torch's caches are told `fingerprint` apart from others.

    tagged: the partitioner has to obey tags of recomputation, which it does not look at under a budget of 0.

    inductor: settings of inductor, where that is the backend; they hold for the backward too, which is compiled later.
    """
    given = {"config_patches": inductor} if inductor and backend == "inductor" else {}
    budget = {"activation_memory_budget": 1e-9} if tagged and memory_budget() == 0 else {}
    with caches_of(fingerprint), functorch_config.patch(budget):
        compiled: Callable[..., Any] = lookup_backend(backend)(graph, example_inputs, **given)
    return compiled


def saved_tensor_hooks() -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]] | None:
    """Pack and unpack of the innermost `saved_tensors_hooks` that are entered, which autograd would call; or None."""
    found: tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]] | None
    found = _top_saved_tensors_default_hooks(False)
    return found


def memory_budget() -> float:
    """The share of what a backward would keep that torch's partitioner may keep; below 1 it redraws random numbers."""
    return float(functorch_config.activation_memory_budget)


def caches_of(fingerprint: str) -> Any:
    """A context in which torch's caches on disk know nothing but what was compiled with this fingerprint."""
    tag = f"{torch.compiler.config.cache_key_tag}{fingerprint}"
    return torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]


def cpp_compiler() -> str:
    """The C++ compiler that inductor would use, by its configuration and CXX; raises where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # inductor takes a second to import

    return str(get_cpp_compiler())


def compiler_cache() -> Path:
    """The folder where inductor keeps what it compiles."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def active_ddp() -> bool:
    """The current forward is that of a DistributedDataParallel module."""
    return DistributedDataParallel._get_active_ddp_module() is not None  # type: ignore[no-untyped-call]


def through_dynamo(error: Exception) -> Exception:
    """An error of a backend in the form that Dynamo lets through as it is, instead of wrapping it in its own."""
    kind = type(error)
    passing = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__, "__str__": kind.__str__})
    made: Exception = passing.__new__(passing, *error.args)
    made.__dict__.update(error.__dict__)
    made.first_useful_frame = None  # type: ignore[attr-defined]
    return made


def is_wrapper(value: object) -> bool:
    """A tensor of a class that wraps other tensors, as quantised weights are."""
    return bool(is_traceable_wrapper_subclass(value))


def inner_tensors(value: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor wraps, at any depth; itself where it wraps none."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    held = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [inner for one in held if isinstance(one, torch.Tensor) for inner in inner_tensors(one)]


def is_whole(value: object) -> bool:
    """A tensor that wraps others and computes some torch functions by itself, as quantised weights do.

    Such a function runs before any op is dispatched: no op of ATen stands for it, and what it does with the wrapped
    tensors is not seen as a use of the wrapper.
    """
    if not is_wrapper(value):
        return False
    kind: Any = type(value)
    function = kind.__torch_function__
    default: Any = torch.Tensor.__torch_function__
    return function is not _disabled_torch_function_impl and (
        getattr(function, "__func__", None) is not default.__func__
    )


def is_autograd_function(target: object) -> bool:
    """What Dynamo puts into a graph for an `autograd.Function` that is marked `allow_in_graph`."""
    return getattr(target, "__name__", "") == "trampoline_autograd_apply"


def has_own_backward(outputs: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]) -> bool:
    """Between these tensors a gradient runs through the backward of some `autograd.Function` written in Python."""
    pending = [tensor.grad_fn for tensor in outputs]
    seen: set[Any] = {tensor.grad_fn for tensor in inputs}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        pending += [source for source, _ in node.next_functions]
    return False


@contextmanager
def saving_unseen() -> Iterator[None]:
    """A context in which what autograd saves does not reach the hooks of a caller, as an outer checkpoint's.

    It is let go at the end: a graph of autograd that holds its own outputs by a hook would never be freed.
    """
    if saved_tensor_hooks() is None:  # nor may any be entered where a model takes gradients with torch.func
        yield
        return
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> int:
        saved.append(tensor)
        return len(saved) - 1

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, saved.__getitem__):
            yield
    finally:
        saved.clear()


def leaves_with_path(value: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Each leaf of nested containers with its path, as `torch.utils._pytree.keystr` spells it.

    Outputs of transformers are read as the dicts that they are: up to 5.12 they are registered without keys.
    """

    def is_output(part: Any) -> bool:
        return isinstance(part, dict) and type(part) is not dict and type(part) in pytree.SUPPORTED_NODES

    found: list[tuple[tuple[Any, ...], Any]] = []
    for path, leaf in pytree.tree_leaves_with_path(value, is_leaf=is_output):
        inner = leaves_with_path(dict(leaf)) if is_output(leaf) else [((), leaf)]
        found += [((*path, *rest), one) for rest, one in inner]
    return found


def compiled_alone(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled by `backend` as one graph; what Dynamo keeps of it goes when the result is dropped.

    Dynamo keeps its compiled variants by code object, and what it knows of changing shapes by code name and
    line: two models behind one function would evict each other and make each other's sizes dynamic. So the function is
    copied, with a code object and a code name of its own. A variant holds its code object, and that holds the variants
    where no garbage collector looks: left alone, neither ever goes.
    """
    own, tracked = _fresh_function(function), list[list[Any]]()

    def tracking(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        tracked.append(tracked_inputs(gm))
        made: Callable[..., Any] = backend(gm, example_inputs)
        return made

    compiled: Callable[..., Any] = torch.compile(own, backend=tracking, fullgraph=True)
    keep_no_backend(tracking)
    # A call that runs, in any thread, holds `compiled`: nothing is reset under it. A backward holds what it runs.
    weakref.finalize(compiled, _forget, own.__code__, tracked).atexit = False
    return compiled


def tracked_inputs(gm: fx.GraphModule) -> list[Any]:
    """The list of fake inputs that a capture keeps to write guards for; empty it when all guards are written.

    A fake tensor that is a view holds its fake mode in C++, where no garbage collector looks, and the mode this list:
    of a call with one view among its inputs no fake tensor would ever be freed.
    """
    metas = [node.meta for node in gm.graph.find_nodes(op="placeholder")]
    mode = fake_mode_of([meta.get("example_value", meta.get("val")) for meta in metas])
    found: list[Any] | None = getattr(getattr(mode, "shape_env", None), "tracked_fakes", None)
    return [] if found is None else found


def _forget(code: types.CodeType, tracked: list[list[Any]]) -> None:
    """Drop the compiled variants of a code object, what Dynamo saw of its sizes, and the fakes of its inputs."""
    guards = {id(entry.guard_manager) for entry in _debug_get_cache_entry_list(code)}
    reset_code(code)
    for fakes in tracked:
        fakes.clear()
    _forget_finalizers(guards)
    seen = get_code_state()
    for known in [one for one in list(seen) if one.name == code.co_name]:
        seen.pop(known, None)


def _forget_finalizers(guards: set[int]) -> None:
    """Take off the finalizers by which guards would hear that a class or function they compare with is gone.

    Each holds all of the guards that it belongs to, as long as its class or function lives: that is, for good.
    """
    for one in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        known = one.peek()
        owner = getattr(getattr(known[1], "func", None), "__self__", None) if known else None
        if isinstance(owner, CheckFunctionManager) and id(getattr(owner, "guard_manager", None)) in guards:
            one.detach()


def keep_no_backend(backend: Callable[..., Any]) -> None:
    """Take a backend out of those that Dynamo keeps for good, to call the `reset` of the ones that have it."""
    for key, kept in list(cached_backends.items()):
        if getattr(kept, "compiler_fn", kept) is backend:
            cached_backends.pop(key, None)


def _fresh_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of `function` with a code object, and a code name, of its own."""
    assert isinstance(function, types.FunctionType)
    name = f"{function.__code__.co_name}_{next(_counter)}"
    copy = types.FunctionType(
        function.__code__.replace(co_name=name, co_qualname=name),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def module_of_op(op: OpOverload) -> str | None:
    """The module that defines a custom op in Python; None when torch.library does not know."""
    definition = OPDEFS.get(op._schema.name)
    return None if definition is None else str(definition._init_fn.__module__)


def storage_key(value: object) -> int | None:
    """An integer that two tensors share exactly when they alias one storage; None for what is no plain tensor."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except NotImplementedError:  # a value inside vmap has no storage of its own
        return None


def outside_dynamo(function: _Function, reason: str) -> _Function:
    """Let an outer `torch.compile` step over a function's frame, but not over what it calls.

    What `torch.compiler.disable(recursive=False)` does, without its own error under `torch.export`; when Dynamo
    must inline the function (an outer fullgraph), it stops with `reason`.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
    skip_code(function.__code__)
    return function


def paused(function: _Function) -> _Function:
    """Keep an outer `torch.compile` out of a function and of all that it calls, except for compiling within it.

    `torch.compiler.disable` would also switch off the compilations that the function starts itself.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            set_eval_frame(before)

    return outside_dynamo(run, "this function compiles by itself")  # type: ignore[return-value]


def is_tracing() -> bool:
    """Dynamo is at work on a frame: calls of Python code may be its own."""
    return TracingContext.try_get() is not None


def compile_settings() -> Any:
    """A context for tracing and running a compiled forward.

    One forward may be compiled for many modes (train, eval, autocast, dtypes, shapes): Dynamo's default of 8 variants
    is met by ordinary use, and beyond it a `fullgraph` function stops with an error. Log messages inside the forward
    (transformers warns from within) are left out instead of breaking the graph. DDP's graph splitter is off: each of
    its fragments would widen and read out a part of a trunk by itself. A hook that is put on a module behind the first
    call, or taken off, compiles anew: Dynamo's default does not look, and would leave it out in silence.
    Recurrent layers of torch are ops like others. Inductor's freezing is off: it makes constants of the parameters, by
    whose names sites are known.
    """
    settings = dynamo_config.patch(
        {
            "recompile_limit": 64,
            "optimize_ddp": False,
            "skip_nnmodule_hook_guards": False,
            "allow_rnn": True,
            _IGNORED_LOGGING: _LoggingMethods(),
        }
    )
    if not inductor_config.freezing:
        return settings
    both = ExitStack()
    both.enter_context(inductor_config.patch(freezing=False))
    both.enter_context(settings)
    return both


def dynamo_is_off() -> bool:
    """TORCHDYNAMO_DISABLE=1, torch._dynamo.config.disable, or torch.compiler.set_stance("force_eager")."""
    stance = eval_frame._stance
    return bool(dynamo_config.disable) or getattr(stance, "stance", "default") == "force_eager"


def tracer() -> str | None:
    """The tracer of ops that is at work, outside of a compilation; it cannot see what a compiled function does."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit.trace"
    if torch.compiler.is_compiling() or getattr(dynamo_config, "force_compile_during_fx_trace", False):
        return None
    return "torch.fx.symbolic_trace or make_fx" if is_fx_symbolic_tracing() else None


def dispatch_modes() -> list[str]:
    """The classes of the TorchDispatchModes at work (FlopCounterMode, ...), the innermost last."""
    return [type(mode).__name__.lstrip("_") for mode in _get_current_dispatch_mode_stack()]


_TRANSFORMS = {
    TransformType.Vmap: "torch.func.vmap",
    TransformType.Grad: "torch.func.grad (or vjp, jacrev)",
    TransformType.Jvp: "torch.func.jvp (or jacfwd)",
}


def function_transforms() -> list[str]:
    """The transforms of torch.func that are at work, except functionalize."""
    if peek_interpreter_stack() is None:
        return []
    kinds = [level.key() for level in get_interpreter_stack() or []]
    return [_TRANSFORMS[kind] for kind in kinds if kind in _TRANSFORMS]


def forward_mode() -> bool:
    """A level of forward-mode differentiation is open: tensors may carry tangents."""
    return int(forward_ad._current_level) >= 0


def in_backward() -> bool:
    """Autograd runs a backward: a forward that runs now is an activation checkpoint's, for the second time."""
    return int(_current_graph_task_id()) != -1


def has_tangents(values: Iterable[object]) -> bool:
    """Some of the tensors carry a tangent of forward-mode differentiation."""
    if not forward_mode():
        return False
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)  # type: ignore[no-untyped-call]


_AUTOGRAD_KEYS = (DispatchKey.AutogradFunctionality, DispatchKey.AutogradOther, DispatchKey.ADInplaceOrView)


def gradients_inside_op(
    formula: Callable[..., Any], inputs: Iterable[torch.Tensor], grads: Any
) -> tuple[torch.Tensor, ...]:
    """The gradients of `formula(*inputs)`, plain torch, in the body of a custom op: autograd is switched off there.

    Of an input that the formula does not read: zeros. (torch.func.vjp works there too, but not under a dispatch mode.)
    """
    was = [(key, _dispatch_tls_is_dispatch_key_excluded(key)) for key in _AUTOGRAD_KEYS]
    try:
        for key, _ in was:
            _dispatch_tls_set_dispatch_key_excluded(key, False)
        with torch.enable_grad():
            leaves = [one.detach().requires_grad_() for one in inputs]
            outputs = formula(*leaves)
            pairs = zip(outputs, grads, strict=True) if isinstance(outputs, tuple) else [(outputs, grads)]
            kept = [(output, grad) for output, grad in pairs if output.requires_grad]
            tensors, given = zip(*kept, strict=True)
            return torch.autograd.grad(tensors, leaves, given, allow_unused=True, materialize_grads=True)
    finally:
        for key, excluded in was:
            _dispatch_tls_set_dispatch_key_excluded(key, excluded)


class _LoggingMethods(dict[Any, None]):
    """The methods of Logger that log, those that libraries add to it (`warning_once`) included.

    A mapping that holds nothing itself: torch 2.11 writes its settings as JSON into its own log, where methods have no
    form, and would print an error with every compilation.
    """

    def __iter__(self) -> Iterator[Any]:
        verbs = ("debug", "info", "warn", "error", "critical", "exception", "log")
        methods = vars(logging.Logger).items()
        return (method for name, method in methods if name.startswith(verbs) and callable(method))

    def __contains__(self, method: object) -> bool:
        return any(method is each for each in self)


_IGNORED_LOGGING = (  # renamed in some version
    "ignore_logging_functions" if hasattr(dynamo_config, "ignore_logging_functions") else "ignore_logger_methods"
)
skip_code(compile_settings.__code__)


def record_opaque(
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    *,
    kind: str = "call_function",
    hidden: bool = False,
    like: object = None,
) -> Any:
    """Under `make_fx`: put one call into the graph as it is, without running it, and give `result` (fake) for it.

    With `hidden`, `result` only stands for a value that has no fake form; the node records none. like: the packet of
    ATen that the call stands in the place of (`passes.op_kinds.packet`).
    """
    mode: Any = get_proxy_mode()
    for body in [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.nn.Module)]:
        mode.tracer.root.register_module(f"{target.__name__}_body_{next(_counter)}", body)
    proxy_args, proxy_kwargs = pytree.tree_map(mode.tracer.unwrap_proxy, (args, kwargs))
    proxy = mode.tracer.create_proxy(kind, target, proxy_args, proxy_kwargs)
    track_tensor_tree(result, proxy, constant=None, tracer=mode.tracer)
    if hidden:
        proxy.node.meta["val"] = None
    if like is not None:
        proxy.node.meta["mhc_like"] = like
    return result


def graph_recorded() -> fx.Graph:
    """Under `make_fx`: the graph so far."""
    mode: Any = get_proxy_mode()
    graph: fx.Graph = mode.tracer.graph
    return graph


def settled(value: object) -> object:
    """A fake tensor whose sizes are ints where a guard has made them constants; any other value as it is."""
    if not isinstance(value, FakeTensor):
        return value
    sizes, strides = ([_constant(one) for one in numbers] for numbers in (value.shape, value.stride()))
    if all(new is old for new, old in zip((*sizes, *strides), (*value.shape, *value.stride()), strict=True)):
        return value
    with value.fake_mode:
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def _constant(size: int | torch.SymInt) -> int | torch.SymInt:
    known = None if isinstance(size, int) else size.node.maybe_as_int()
    return size if known is None else known


_UNSEEN = 61


def size_hint(size: int | torch.SymInt) -> int:
    """The size seen when the graph was captured, for a symbolic size too; installs no guard.

    A size that depends on the data of the call (`nonzero`: the tokens of an expert) was never seen, and that of a
    ragged axis is no number: a small number that no axis of a model is likely to have stands for it.
    """
    if isinstance(size, int):
        return size
    seen: object = size.node.hint
    return seen if isinstance(seen, int) else _UNSEEN


def expression_of(size: torch.SymInt) -> Any:
    """The sympy expression of a symbolic size; installs no guard."""
    return size.node.expr


def number_seen(value: torch.SymFloat) -> float:
    """The number that a symbolic float had when the graph was captured; installs no guard."""
    return float(value.node.hint)
