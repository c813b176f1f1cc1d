"""What has to hold where a model is converted and where a converted one is called; what does not is said in words.

Most of it is looked for when something has failed already, so that calls stay cheap: only what would go wrong in
silence is checked before each of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile.errors import CaptureError, ConfigError, ExportError, MHCError, RewriteError, ShapeError, wrong
from mhc_compile.passes.capture import DYNAMO_ERRORS, translated, under_a_mode
from mhc_compile.passes.misfit import misfit, tensors
from mhc_compile.record import Record, SiteRecord

_INSPECTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OTHER_WAYS = "call the model itself, or take mhc_compile.trace(model, inputs), the rewritten graph as a module"
_FIRST_ONLY = "drop create_graph=True, or differentiate the original model (restore, or a copy from before)"
_ORIGINAL = "differentiate the original model (restore, or a copy from before the conversion)"


# ----------------------------------------------------------------------------------------- before a conversion


def refuse_torchscript(model: nn.Module) -> None:
    """Raise RewriteError for a module without a forward in Python."""
    if isinstance(model, torch.jit.ScriptModule):
        raise RewriteError(
            wrong(
                "the model",
                f"TorchScript (a {type(model).__name__})",
                "a module whose forward is Python",
                "convert the module that was scripted or traced",
            )
        )


def warn_not_finite(model: nn.Module) -> None:
    """Warn about parameters that hold nan or inf: nothing that is compared with them can hold."""
    found = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warnings.warn(
            wrong(
                f"{found[0]} of {type(model).__name__}{more}",
                "not finite (nan or inf)",
                "finite parameters: verify can show nothing about others, and outputs will be nan",
                "load or initialise the weights before the conversion",
            ),
            stacklevel=4,
        )


def _is_finite(parameter: Tensor) -> bool:
    """In one pass without a copy; True for what holds no values of its own or no float numbers."""
    plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and not parameter.is_quantized
    if not plain or parameter.dtype not in _INSPECTED or parameter.is_meta or not parameter.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(parameter.detach()))).all())


def refuse_other_precision(model: nn.Module, record: Record, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError when example inputs of another float width gave the trunks a dtype the model does not have.

    Shapes and sites come out right with such inputs, as nothing is computed; the model could then never be called.
    """
    own = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if not own or all(site.double == (torch.float64 in own) for site in record.sites):
        return
    for name, tensor in tensors(model, args, kwargs):
        if tensor.is_floating_point() and tensor.dtype not in own:
            raise ConfigError(
                wrong(
                    f"the dtype of the example input {name}",
                    tensor.dtype,
                    f"{_some(own)}, that of the parameters of {type(model).__name__}",
                    "cast the example input, or the model before its conversion",
                )
            )


# ----------------------------------------------------------------------------------------- before a call


@_torch.paused
def check_call(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise when a call of a converted model would lose mHC or a derivative in silence. name: of the model's class."""
    if torch.compiler.is_exporting():
        raise ExportError(
            wrong(
                f"torch.export of a converted {name}",
                "outside of the model's own compilation, and would give the plain model",
                "the export of mhc_compile.trace(model, inputs)",
                "call mhc_compile.trace(model, inputs) for the rewritten graph, and export that",
            )
        )
    tracer = _torch.tracer()
    if tracer is not None:
        raise ExportError(wrong(f"a converted {name}", f"traced by {tracer}", "a call with real tensors", _OTHER_WAYS))
    for transform in _torch.function_transforms():
        _refuse_transform(name, transform)
    if _torch.forward_mode() and _torch.has_tangents([*pytree.tree_leaves((args, kwargs)), *model.parameters()]):
        _refuse_transform(name, "forward-mode differentiation (torch.autograd.forward_ad)")


def _refuse_transform(name: str, transform: str) -> None:
    raise RewriteError(
        wrong(
            f"a call of a converted {name}",
            f"inside {transform}",
            "a plain call, with loss.backward() or torch.autograd.grad for first derivatives",
            f"pass the batch in one call instead of vmap; for derivatives, {_ORIGINAL}",
        )
    )


def refuse_script(model: nn.Module) -> nn.Module:
    """What torch.jit.script asks a module for first: raises ExportError."""
    raise ExportError(
        wrong(
            f"a converted {type(model).__name__}",
            "given to torch.jit.script, which reads the source of forward and cannot see its rewritten graph",
            "mhc_compile.trace(model, inputs) with torch.export",
            "export mhc_compile.trace(model, inputs), or script the model before its conversion",
        )
    )


# ----------------------------------------------------------------------------------------- the sites


class SiteCheck:
    """Sees that the tree of sites of a model is still that of its conversion."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._modules: list[nn.Module] = []
        self._sites: list[tuple[nn.Module, tuple[Any, ...]]] = []

    def changed(self, tree: nn.Module) -> bool:
        """The tree has other modules than at the last check, or this is the first.

        Raises RewriteError when it does not hold the sites of the conversion, and these alone.
        """
        modules = [tree]
        for module in modules:  # grows meanwhile; much faster than `tree.modules()`
            modules.extend(child for child in module._modules.values() if child is not None)
        if modules == self._modules and all(_facts(site) == facts for site, facts in self._sites):
            return False
        _refuse_other_names(tree, self._record)
        _refuse_other_options(tree, self._record)
        self._sites = [(site, _facts(site)) for site in map(tree.get_submodule, _names(self._record))]
        self._modules = modules
        return True


_OPTIONS = ("n", "features", "iterations", "eps", "constraint", "fixed", "dynamic")


def _options(site: Any) -> tuple[Any, ...]:
    return tuple(getattr(site, name) for name in _OPTIONS)


def _facts(site: nn.Module) -> tuple[Any, ...]:
    """What the compiled forward took from a site: its options, and the order of its parameters."""
    return *_options(site), *site._parameters


def _names(record: Record) -> list[str]:
    return [site.name for site in record.sites]


def _refuse_other_names(tree: nn.Module, record: Record) -> None:
    wanted = {f"{site.name}.{part}" for site in record.sites for part in site.form(record.config).parameters}
    found = [name for name, _ in tree.named_parameters(remove_duplicate=False)]
    own = {name for name, _ in tree.named_parameters()}
    less, more, tied = sorted(wanted - set(found)), sorted(set(found) - wanted), sorted(set(found) - own)
    if less or more or tied:
        parts = [
            f"without {less[0]}" if less else "",
            f"with {more[0]}, which is none of its own" if more else "",
            f"with {tied[0]} a second name of another parameter" if tied and not less and not more else "",
        ]
        raise RewriteError(
            wrong(
                "model.mhc",
                "changed since the conversion: " + " and ".join(part for part in parts if part),
                "phi, alpha and bias of its sites, each a parameter of its own",
                "put the sites back (PEFT: leave them out of modules_to_save), or restore(model) and convert with "
                "only= or skip=",
            )
        )


def _refuse_other_options(tree: nn.Module, record: Record) -> None:
    config = record.config
    for site in record.sites:
        found = _options(tree.get_submodule(site.name))
        constraint = site.constraint or config.constraint
        wanted = (config.n, site.features, config.iterations, config.eps, constraint, config.fixed, config.dynamic)
        for name, one, other in zip(_OPTIONS, found, wanted, strict=True):
            if one != other:
                raise RewriteError(
                    wrong(
                        f"{name} of model.mhc.{site.name}",
                        one,
                        f"{other}, as the model was converted",
                        "put the site back, or restore(model) and convert with the other value",
                    )
                )


def unfit_site(model: nn.Module, tree: nn.Module, record: Record) -> ShapeError | None:
    """The error for a parameter of a site that has a shape, dtype or device which its ops cannot take."""
    inside = {id(parameter) for parameter in tree.parameters()}
    own = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    devices = {parameter.device for parameter in own}
    dtypes = {parameter.dtype for parameter in own if parameter.is_floating_point()}
    for site in record.sites:
        for part, shape in site.form(record.config).shapes(site.features).items():
            parameter = tree.get_parameter(f"{site.name}.{part}")
            name = f"model.mhc.{site.name}.{part}"
            if tuple(parameter.shape) != shape:
                legal, step = f"{list(shape)}, as converted", "copy values into it, in place of another tensor"
                return ShapeError(wrong(f"the shape of {name}", list(parameter.shape), legal, step))
            legal_dtypes = _legal_dtypes(dtypes, site)
            if parameter.dtype not in legal_dtypes:
                step = "cast the model with model.to(dtype), which keeps the sites in float32 (float64 under double())"
                return ShapeError(wrong(f"the dtype of {name}", parameter.dtype, _some(legal_dtypes), step))
            if devices and parameter.device not in devices:
                legal = f"{_some(devices)}, where the rest of the model is"
                return ShapeError(wrong(name, f"on {parameter.device}", legal, "move the model as a whole, model.to()"))
    return None


def _legal_dtypes(own: set[torch.dtype], site: SiteRecord) -> set[torch.dtype]:
    """float32; float64 in a float64 model; both where the trunk may have another dtype than the parameters."""
    if own == {torch.float64}:
        return own
    return {torch.float32, torch.float64} if torch.float64 in own or site.double else {torch.float32}


def _some(values: set[Any]) -> str:
    return " or ".join(sorted(map(str, values)))


# ----------------------------------------------------------------------------------------- after a failure


def explained(
    error: Exception, model: nn.Module, tree: nn.Module, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Exception:
    """What to raise for an error in a call of a converted model: one of ours where the reason can be named."""
    if "no compiled frames" in str(error) or "was not rewritten" in str(error):
        error = under_a_mode(f"a converted {type(model).__name__}") or error
    if isinstance(error, DYNAMO_ERRORS):
        error = translated(error, model, args, kwargs)
    if not isinstance(error, MHCError) and not _speaks_of_tensors(error):
        return error
    found = unfit_site(model, tree, record)
    if found is not None:
        return found
    explained_already = isinstance(error, CaptureError)
    message = None if explained_already else misfit(model, args, kwargs, error)
    return error if message is None else ShapeError(message)


def _speaks_of_tensors(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("device", "dtype", "scalar type"))


@_torch.paused
def watch_second_derivative(output: Any) -> None:
    """Let a second derivative of a compiled forward fail in our words: compiled backward graphs have none."""
    for leaf in pytree.tree_leaves(output):
        node = leaf.grad_fn if isinstance(leaf, Tensor) else None
        while node is not None and not type(node).__name__.endswith("CompiledFunctionBackward"):
            node = node.next_functions[0][0] if len(node.next_functions) == 1 else None  # a view of an output
        if node is not None:
            node.register_hook(_watch)
            return


def _watch(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
    for gradient in grad_inputs:
        if gradient is not None and gradient.requires_grad:
            gradient.register_hook(_refuse_second_derivative)  # type: ignore[no-untyped-call]


def _refuse_second_derivative(gradient: Tensor) -> None:
    raise RewriteError(
        wrong("double backward through a converted model", "not supported", "first derivatives", _FIRST_ONLY)
    )
