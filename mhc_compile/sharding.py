"""Converted models under distributed wrappers: FSDP2's shards are gathered around a call, the rest is refused in words.

A converted forward runs as one graph, which reads every parameter of the model. FSDP2 gathers the parameters of a
module in hooks around that module's own forward; for a module inside the graph those hooks cannot run. So the
converted forward gathers all of them before it starts, and once more where a backward pass finds them freed. The
root's hooks, outside the graph, reduce all gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile.errors import RewriteError, wrong

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_Call = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
_FSDP = "torch.distributed.fsdp"
_LEGAL = "DDP, or FSDP2's fully_shard on the model and, if wanted, on modules inside it"
_TREE = "mhc"


def run_gathered(call: _Call, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`call(model, args, kwargs)`, the compiled forward of a converted model, while what it reads is whole.

    Raises RewriteError when a parameter would still be a shard, or when FSDP2 would cast what has to stay as it is.
    """
    if not is_distributed():
        return call(model, args, kwargs)
    parts = _gather(model)
    hooks = _take_hooks(parts)
    try:
        output = call(model, args, kwargs)
    finally:
        _put_back(hooks)
    _release(output, parts)
    return output


def is_distributed() -> bool:
    """This process takes part in a process group, without which nothing can be sharded."""
    return dist.is_available() and dist.is_initialized()


for _function in (run_gathered, is_distributed):
    _torch.outside_dynamo(_function, "the gathering of shards cannot be inlined")


@_torch.paused
def _gather(model: nn.Module) -> list[FSDPModule]:
    """Gather the parameters of the sharded modules inside a model, and give these modules."""
    parts = sharded_parts(model)
    _refuse_rootless(model, parts)
    _refuse_bypass(model)
    _refuse_policies(model, parts)
    for part in parts:
        part.reshard()  # what an earlier call left gathered may be older than the last optimizer step
        part.unshard()
    _refuse_shards(model)
    _refuse_cast(model)
    return parts


@_torch.paused
def _release(output: Any, parts: Sequence[FSDPModule]) -> None:
    """Free what was gathered, or leave that to the backward pass.

    The backward of `output` gathers again what is freed by then, as after the backward of another output.
    """
    if not torch.is_grad_enabled():
        for part in parts:
            part.reshard()
        return

    def gather(grad: Tensor) -> None:
        for part in parts:
            part.unshard()

    if parts:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(gather)  # type: ignore[no-untyped-call]


_Hooks = list[tuple[Any, str, Any]]


@_torch.paused
def _take_hooks(parts: Sequence[FSDPModule]) -> _Hooks:
    """Take FSDP2's own hooks off modules, as they would break the graph; all other hooks stay."""
    taken: _Hooks = []
    for part in parts:
        for attribute in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(part, attribute)
            taken.append((part, attribute, hooks))
            others = {key: hook for key, hook in hooks.items() if not _is_fsdp(hook)}
            setattr(part, attribute, type(hooks)(others))
    return taken


def _is_fsdp(hook: object) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_FSDP)


@_torch.paused
def _put_back(taken: _Hooks) -> None:
    for part, attribute, hooks in taken:
        setattr(part, attribute, hooks)


def sharded_parts(model: nn.Module) -> list[FSDPModule]:
    """The modules inside a model, without itself, that `fully_shard` was called on.

    Raises RewriteError when one is inside FSDP1, whose own forward cannot be a part of the graph.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    parts = []
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise RewriteError(wrong(f"{name} of a converted {type(model).__name__}", "inside FSDP1", _LEGAL))
        if name and isinstance(module, FSDPModule):
            parts.append(module)
    return parts


def refuse_wrapped(model: nn.Module) -> None:
    """Raise RewriteError for a model inside a wrapper that has to come after the conversion, or with shards."""
    wrapper = _wrapper(model)
    if wrapper is not None:
        raise RewriteError(
            wrong("the model", f"inside {wrapper}", "the model itself", "convert the model, then wrap it")
        )
    refuse_sharded(model)


def refuse_sharded(model: nn.Module) -> None:
    """Raise RewriteError when parameters of a model are sharded over processes."""
    if not is_distributed():
        return
    shards = _shards(model)
    if shards:
        raise RewriteError(
            wrong(
                _named(model, shards),
                f"sharded over processes ({len(shards)} such tensors)",
                "a model whose parameters are whole",
                "convert and inspect the model first, then shard it: " + _LEGAL,
            )
        )


def _wrapper(model: nn.Module) -> str | None:
    """How a wrapper around a model is called; None for a model of its own."""
    kinds = {nn.DataParallel: "DataParallel", _torch.OptimizedModule: "torch.compile"}
    if is_distributed():
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.nn.parallel import DistributedDataParallel

        kinds |= {DistributedDataParallel: "DistributedDataParallel", FullyShardedDataParallel: "FSDP1"}
    return next((name for kind, name in kinds.items() if isinstance(model, kind)), None)


def _refuse_rootless(model: nn.Module, parts: Sequence[FSDPModule]) -> None:
    """Only the hooks of a root reduce the gradients of the modules inside the graph."""
    from torch.distributed.fsdp import FSDPModule

    if parts and not isinstance(model, FSDPModule):
        names = ", ".join(name for name, module in model.named_modules() if module in parts)
        raise RewriteError(
            wrong(
                f"fully_shard on {names} of a converted {type(model).__name__}",
                "without one on the model itself",
                _LEGAL,
                "call fully_shard(model) after those calls and before the first forward",
            )
        )


def _refuse_bypass(model: nn.Module) -> None:
    """A root whose hooks did not run neither gathers its parameters nor reduces gradients."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule) and model._get_fsdp_state()._training_state.name == "IDLE":
        raise RewriteError(
            wrong(
                f"the forward of a sharded {type(model).__name__}",
                "called past the hooks of FSDP2",
                "a call of the model",
                "call model(...), not model.forward(...)",
            )
        )


def _shards(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are DTensors now."""
    from torch.distributed.tensor import DTensor

    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for own in (module._parameters, module._buffers)
        for name, tensor in own.items()
        if isinstance(tensor, DTensor)
    ]


def _refuse_shards(model: nn.Module) -> None:
    shards = _shards(model)
    if shards:
        raise RewriteError(
            wrong(
                _named(model, shards),
                f"a DTensor in the converted forward ({len(shards)} such tensors)",
                _LEGAL + "; tensor parallel trunks are not supported",
                "leave out parallelize_module and distribute_module",
            )
        )


def _refuse_cast(model: nn.Module) -> None:
    for name, parameter in model.get_submodule(_TREE).named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise RewriteError(
                wrong(
                    f"{_TREE}.{name}",
                    f"{parameter.dtype} in the forward, through the mixed precision of FSDP2",
                    "float32 mHC parameters",
                    "call fully_shard(model.mhc) without mp_policy before fully_shard(model, mp_policy=...)",
                )
            )


def _refuse_policies(model: nn.Module, parts: Sequence[FSDPModule]) -> None:
    """The hooks that would cast at the border of a part do not run: only one precision for all can be kept."""
    if not parts:
        return
    own = _policy(model)
    for name, module in model.named_modules():
        if module in parts and not f"{name}.".startswith(f"{_TREE}.") and _policy(module) != own:
            raise RewriteError(
                wrong(
                    f"the mixed precision of {name}",
                    "not that of the model",
                    "one param_dtype and output_dtype for fully_shard on a converted model and on modules inside it",
                    "pass the same mp_policy to each fully_shard; model.mhc alone takes none",
                )
            )


def _policy(part: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    policy = part._get_fsdp_state()._mp_policy
    return policy.param_dtype, policy.output_dtype


def _named(model: nn.Module, names: Sequence[str]) -> str:
    return f"{names[0]} of {type(model).__name__}"


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from _tensors(getattr(leaf, field.name))
