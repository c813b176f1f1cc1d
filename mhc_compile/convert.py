"""Convert a model in place, undo it, and group its parameters for an optimizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mhc_compile import hugging_face, lazy, preconditions, sharding
from mhc_compile.config import MHCConfig
from mhc_compile.conversion import (
    PENDING,
    TREE,
    attach,
    conversion,
    detach,
    is_converted,
    original_forward,
    take_off_own_forward,
)
from mhc_compile.errors import CaptureError, ConfigError, RewriteError, wrong
from mhc_compile.example_inputs import as_call, derivable, derive
from mhc_compile.hyper_connection import HyperConnection
from mhc_compile.passes.capture import just_in_time
from mhc_compile.passes.history import PassRecord
from mhc_compile.passes.op_kinds import aten
from mhc_compile.passes.provenance import module_path, source_line
from mhc_compile.passes.recompute_choice import Recompute
from mhc_compile.passes.residuals import Refusal
from mhc_compile.passes.rewrite import Analysis, analyze, leave_plain
from mhc_compile.passes.select import NO_GRAD
from mhc_compile.passes.trunks import Site
from mhc_compile.record import Record, SiteRecord, unique
from mhc_compile.site_choice import Choice, Constraints, chosen, left_plain, own_constraints


def mhc_compile(
    model: nn.Module,
    n: int | None = None,
    *,
    config: MHCConfig | None = None,
    example_inputs: Any = None,
    only: Choice | None = None,
    skip: Choice | None = None,
    site_constraints: Constraints | None = None,
    recompute: Any = None,
    **options: Any,
) -> nn.Module:
    """Turn a model into n-stream mHC, in place, and give it back.

    Every residual add that `explain` lists as a site becomes one of manifold-constrained hyper-connections
    (arXiv 2512.24880). With the default `init="identity"` the model computes at first what it did, gradients of its
    own parameters included. `model.mhc` holds the new parameters (float32), named after the modules of the
    branches: build the optimizer after the call, with `param_groups(model)`.

    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of the model's forward, of any
        batch and length; derived when omitted for Hugging Face models. The model is traced, not run. Any other model
        without them is converted at its first call, and until then refuses to give its parameters or state.
    only, skip: which sites are converted, and which stay plain adds: a pattern of `fnmatch` for site or module
        names (`"model.layers.0"`, `"*.mlp"`), several, or a function of a SiteRecord.
    site_constraints: other constraints than the config's for some sites: names by such patterns, of which the last
        that matches a site counts (`{"*.mlp": "identity"}`), or a function of a SiteRecord, None for the config's.
    recompute: what the backward computes again instead of keeping it, see `recompute(model, choice)`.
    n, options: the fields of MHCConfig; or pass `config`.

    Raises ConfigError for a wrong option, CaptureError for a model that is not one graph, and RewriteError when it
    has no residual add, is mHC or converted already. The model is then as it was.
    """
    config, replay = as_config(n, config, options), Recompute.of(recompute)
    _convertible(model)
    convert = partial(convert_for_call, recompute=replay, site_constraints=site_constraints)
    if example_inputs is None and not derivable(model):
        return lazy.convert_later(model, lazy.Pending(type(model), convert, config, only, skip))
    args, kwargs = as_call(derive(model) if example_inputs is None else example_inputs)
    return convert(model, config, only, skip, args, kwargs)


def convert_for_call(
    model: nn.Module,
    config: MHCConfig,
    only: Choice | None,
    skip: Choice | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recompute: Recompute | None = None,
    site_constraints: Constraints | None = None,
) -> nn.Module:
    """Convert a plain model as one call `model(*args, **kwargs)` shows it."""
    try:
        captured = just_in_time(original_forward, model, args, kwargs)
    except CaptureError as error:
        if not hugging_face.had_no_output_hooks(error, model):
            raise
        captured = just_in_time(original_forward, model, args, kwargs)
    analysis = analyze(captured.graph, tie_shared=config.tie_shared)
    refuse_unfit(type(model).__name__, analysis)
    record = recorded(analysis, config, only, skip, site_constraints)
    preconditions.refuse_other_precision(model, record, args, kwargs)
    preconditions.warn_not_finite(model)
    attach(model, record, recompute)
    return model


def recompute(model: nn.Module, choice: Any) -> nn.Module:
    """Let the backward of a converted model replay its mHC ops from a few states, in place, and give the model back.

    choice: `"auto"` (the blocks of sites that take least memory under the model's backend; to find them takes a trace
    of the backward, but for "eager"), the number of sites of a block, a plan of `partition(model, ...)`, or None:
    everything is stored. Values and gradients are the same bit for bit, except under
    inductor, which fuses otherwise. What a branch computes is never computed again. Applies from the next compilation
    on, that is, from the next call. The backends "aot_eager" and "inductor" leave the rest to torch's min-cut
    partitioner; "eager" replays by hooks on what autograd saves.
    Raises ConfigError for another choice, and RewriteError for a model that is not converted.
    """
    replay, state = Recompute.of(choice), conversion(model)
    state.recompute = replay
    state.forget_compiled()
    return model


def high_priority_merges(model: nn.Module, sites: Choice | None) -> nn.Module:
    """Launch the merges of some sites of a converted model on a CUDA stream of high priority, and give the model back.

    The paper runs the merges of MLP sites so (arXiv 2512.24880, section 4.3), for pipelines whose communication runs
    beside the computation: a merge is then not queued behind the long kernels of another stream.
    sites: a pattern of `fnmatch` for site or module names (`"*.mlp"`), several, or a function of a SiteRecord, as for
    `mhc_compile(only=)`; None: no site any more. Covers what Triton kernels launch of the merge, forward and backward,
    and where it is fused with the read behind it (or its backward) that part too; not the merges that a backward
    replays, nor what runs in plain torch (float64, more than 16 streams). The rest of the model waits for each merge,
    so values and gradients are the same bits. Applies from the next call on, and to the stages of `pipeline_stages`.
    Raises ConfigError for another choice and for a model that is not on a CUDA device, RewriteError for a model that
    is not converted.
    """
    state = conversion(model)
    found = set() if sites is None else chosen("sites", sites, state.record.sites)
    if found:
        check_has_streams(next(model.parameters()).device)
    state.high_priority = frozenset(found)
    state.forget_compiled()
    return model


def check_has_streams(device: torch.device) -> None:
    """Raise ConfigError for a device whose kernels do not run on CUDA streams."""
    if device.type != "cuda":
        legal = "a CUDA device, whose streams have priorities"
        step = "move it first, model.to('cuda'), or leave the option out: elsewhere ops run one after the other"
        raise ConfigError(wrong("the device of high-priority merges", device, legal, step))


def set_iterations(model: nn.Module, iterations: int) -> nn.Module:
    """Let a converted model's Sinkhorn run another number of iterations from its next call on, and give the model back.

    For a schedule over training: few at first, 20 at the end. Each number is compiled once, at its first call, and
    kept; going back to one compiles nothing. The record has the last one, and so has a checkpoint.
    Raises ConfigError for a number below 1, and RewriteError for a model that is not converted or has no Sinkhorn site.
    """
    state = conversion(model)
    config = replace(state.record.config, iterations=iterations)
    if not any(site.form(config).mixing.name == "sinkhorn" for site in state.record.sites):
        found = f"converted with {config.constraint!r}" if state.record.sites else "converted with n = 1"
        step = "leave the schedule out"
        raise RewriteError(wrong(type(model).__name__, found, "a model with sites of 'sinkhorn'", step))
    state.set_iterations(model, iterations)
    return model


def recorded(
    analysis: Analysis,
    config: MHCConfig,
    only: Choice | None,
    skip: Choice | None,
    site_constraints: Constraints | None = None,
) -> Record:
    """The record of converting an analysed graph."""
    every = [_site_record(site) for site in analysis.sites]
    plain = left_plain(every, only, skip)
    kept = leave_plain(analysis, plain) if plain else analysis
    own = own_constraints([_site_record(site) for site in kept.sites], site_constraints, config)
    records = (replace(_site_record(site), constraint=own.get(site.name, "")) for site in kept.sites)
    sites = unique(records) if config.n > 1 else ()
    return Record(
        config,
        sites,
        plain=frozenset(site.name for site in every) - {site.name for site in kept.sites},
        no_grad=frozenset(
            (module_path(one.node), source_line(one.node)) for one in analysis.refused if one.reason == NO_GRAD
        ),
    )


def as_config(n: int | None, config: MHCConfig | None, options: dict[str, Any]) -> MHCConfig:
    """The configuration that the arguments of a public function stand for; ConfigError for an unknown option."""
    if config is not None:
        if n is not None or options:
            step = "set them in the config: dataclasses.replace(config, n=4)"
            raise ConfigError(wrong("config", "given beside other options", "config alone, or n and options", step))
        if not isinstance(config, MHCConfig):
            step = "pass the options by name, or MHCConfig(**options)"
            raise ConfigError(wrong("config", f"a {type(config).__name__}", "an MHCConfig", step))
        return config
    known: dict[str, Any] = asdict(MHCConfig())
    for name in options:
        if name not in known:
            step = "help(MHCConfig) explains each"
            raise ConfigError(wrong("option", repr(name), "one of " + ", ".join(known), step))
    return MHCConfig(**(options if n is None else {"n": n, **options}))


def _convertible(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(wrong("model", f"a {type(model).__name__}", "a torch.nn.Module", "pass the model itself"))
    name = type(model).__name__
    if is_converted(model) or PENDING in model.__dict__:
        found = "converted already" if is_converted(model) else "to be converted at its first call already"
        raise RewriteError(wrong(name, found, "a model that is not", "call restore(model) first"))
    preconditions.refuse_torchscript(model)
    sharding.refuse_wrapped(model)
    if hasattr(model, TREE):
        step = "rename that attribute, or convert the modules inside that do not have it"
        raise RewriteError(wrong(f"the attribute {TREE!r} of {name}", "its own", "none: the sites go there", step))
    take_off_own_forward(model)
    if "forward" in model.__dict__:
        found = f"one set on the instance ({_described(model.__dict__['forward'])}), and would run in place of ours"
        step = "convert the model first, then call what sets it (accelerate's prepare, a device map)"
        raise RewriteError(wrong(f"forward of this {name}", found, "the one of its class", step))
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        found = "an adapter around a model, and calls it past a conversion of its own"
        raise RewriteError(wrong(name, found, "the model inside it", "call mhc_compile(model.get_base_model())"))
    for inner, module in model.named_modules():
        if is_converted(module):
            step = "call it as it is (its sites work inside a larger model), or restore that module first"
            raise RewriteError(wrong(f"{inner} of {name}", "converted already", "no converted module inside", step))
    hugging_face.refuse_stripped(model)


def _described(forward: object) -> str:
    return str(getattr(forward, "__qualname__", None) or type(forward).__name__)


def refuse_unfit(name: str, analysis: Analysis) -> None:
    """Raise RewriteError for the graph of a model that is mHC already or has no site."""
    if analysis.foreign is not None:
        step = 'torch.compile(model, backend="mhc") makes it fast and keeps its function'
        message = wrong(name, "mHC already, or has several streams", "a model with plain residual adds", step)
        raise RewriteError(message, line=analysis.foreign)
    if not analysis.sites:
        found = f"a model with no residual add to convert{_other_sums(analysis)}"
        legal = "one that adds F(x) to x of the same shape, in float16 to float64, with something learned or mixed in F"
        step = "explain(model, inputs) lists every add and why it stays"
        raise RewriteError(wrong(name, found, legal, step) + _why(analysis.refused))


def _other_sums(analysis: Analysis) -> str:
    """What a graph adds in which no add of float tensors was seen."""
    if analysis.refused:
        return ""
    sums = [node.meta["val"] for node in analysis.graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)]
    kinds = sorted({str(value.dtype) for value in sums if isinstance(value, torch.Tensor)})
    return ": its graph adds no two float tensors" + (f", only {', '.join(kinds)}" if kinds else "")


def _why(refused: list[Refusal]) -> str:
    if not refused:
        return ""
    lines = [f"{source_line(one.node) or one.node.name}: {one.reason}" for one in refused[:3]]
    more = [f"and {len(refused) - 3} more; explain(model, inputs) lists all"] if len(refused) > 3 else []
    return ".\nRefused:\n  " + "\n  ".join([*lines, *more])


def _site_record(site: Site) -> SiteRecord:
    double = site.merge.base.meta["val"].dtype == torch.float64
    return SiteRecord(site.name, site.features, site.index, site.trunk, site.line, double)


def restore(model: nn.Module) -> nn.Module:
    """Undo `mhc_compile`, in place: the original class and forward, without `model.mhc`.

    The model keeps its own parameters as they are now, trained or not. Raises RewriteError if it is not converted.
    """
    if isinstance(model, nn.Module) and PENDING in model.__dict__:
        return lazy.forget(model)
    detach(model)
    return model


def history(model: nn.Module) -> list[PassRecord]:
    """What each pass did in each compilation that the model may run again, first to last; empty before the first call.

    What `recompute`, `high_priority_merges` or a change of the sites makes useless is not among them any more.
    """
    return conversion(model).history


def param_groups(model: nn.Module, *, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Optimizer groups: matrices with weight decay, mHC parameters and vectors (norms, biases) without.

    The groups are named "decay", "no_decay" and "mhc", so that other optimizers (Muon) can be given some of them.
    Parameters that do not require grad are left out. Of a model that is mHC already the parameters of its sites are
    not known as such: warns where its modules are called HyperConnection or HyperHead. Raises ConfigError for a
    negative weight_decay.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(wrong("model", f"a {type(model).__name__}", "a torch.nn.Module", "pass the model itself"))
    if not isinstance(weight_decay, int | float) or not weight_decay >= 0:
        raise ConfigError(wrong("weight_decay", repr(weight_decay), "a number >= 0", "0.01 is the default"))
    own = {
        id(parameter)
        for module in model.modules()
        if is_converted(module) or isinstance(module, HyperConnection)
        for parameter in (module.get_submodule(TREE) if is_converted(module) else module).parameters()
    }
    _warn_of_foreign_sites(model, own)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: Iterable[tuple[str, float, list[nn.Parameter]]] = (
        ("decay", weight_decay, [p for p in trained if id(p) not in own and p.dim() >= 2]),
        ("no_decay", 0.0, [p for p in trained if id(p) not in own and p.dim() < 2]),
        ("mhc", 0.0, [p for p in trained if id(p) in own]),
    )
    return [{"name": name, "params": params, "weight_decay": decay} for name, decay, params in groups if params]


_FOREIGN_SITE = re.compile(r"hyper_?(connection|head)", re.IGNORECASE)


def _warn_of_foreign_sites(model: nn.Module, own: AbstractSet[int]) -> None:
    """Warn of matrices that by the name of their module mix the streams of a model that is mHC already."""
    found = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if _FOREIGN_SITE.search(type(module).__name__)
        for name, parameter in module.named_parameters()
        if id(parameter) not in own and parameter.requires_grad and parameter.dim() >= 2
    ]
    if found:
        names = ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")
        warnings.warn(
            wrong(
                f"param_groups of this {type(model).__name__}",
                f"one that decays {names}, which seem to be sites of a model that is mHC already",
                "a model whose sites mhc_compile made, which go into a group without decay",
                "move these parameters into a group of their own with weight_decay=0",
            ),
            stacklevel=3,
        )
