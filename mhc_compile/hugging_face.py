"""What Hugging Face models need beyond any other: saving, loading, and hooks that are set within forward."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from mhc_compile.errors import ConfigError, RewriteError, wrong
from mhc_compile.record import KEY, Record

CONFIG_KEY = "mhc"


def had_no_output_hooks(error: Exception, model: nn.Module) -> bool:
    """A capture failed where transformers sets hooks first: they are set now, and the capture can be tried again.

    Within a forward that is asked for hidden states or attentions it sets hooks that collect them, under a lock that
    Dynamo cannot trace. They stay, and make the model one that cannot be pickled: so they are set on need alone.
    """
    return "output_capturing" in str(error) and _set_output_hooks(model)


def _set_output_hooks(model: nn.Module) -> bool:
    """Set the hooks on every transformers model within `model` that has none; gives whether there was one."""
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    found = False
    for module in list(model.modules()):  # outer models first: setting theirs sets those of the models within
        if not is_pretrained_model(module) or _has_hooks(module):
            continue
        found = True
        # transformers does not see which models within have their hooks, and would set them twice
        done = [part for inner in module.modules() if _has_hooks(inner) for part in inner.modules()]
        before = [(part, set(part._forward_hooks)) for part in done]
        maybe_install_capturing_hooks(module)  # type: ignore[arg-type]
        for part, hooks in before:
            for key in part._forward_hooks.keys() - hooks:
                del part._forward_hooks[key]  # in place: handles of other hooks know this dict
    return found


def _has_hooks(module: nn.Module) -> bool:
    return is_pretrained_model(module) and getattr(module, "_output_capturing_hooks_installed", False)


def is_pretrained_model(model: nn.Module) -> bool:
    """A model of the transformers library; imports nothing that the model's class did not import."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def recorded_save(original: type[Any], record_of: Callable[[Any], Record]) -> Callable[..., Any]:
    """A `save_pretrained` that writes the record of the conversion into `config.json`."""

    @functools.wraps(original.save_pretrained)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = record_of(self)
        if not record.sites:
            return original.save_pretrained(self, *args, **kwargs)
        setattr(self.config, CONFIG_KEY, record.as_dict())
        try:
            return original.save_pretrained(self, *args, **kwargs)
        finally:
            delattr(self.config, CONFIG_KEY)

    return save_pretrained


def refuse_stripped(model: nn.Module) -> None:
    """Raise RewriteError for a plain model whose config says that its checkpoint holds mHC weights."""
    if getattr(getattr(model, "config", None), CONFIG_KEY, None) is None:
        return
    raise RewriteError(
        f"{type(model).__name__} was loaded as a plain model from the checkpoint of a converted one, without its mHC "
        "weights; load it with mhc_compile.load(directory), or, to drop them, delete model.config.mhc"
    )


def load_directory(path: Path, attach: Callable[[nn.Module, Record], None], **options: Any) -> nn.Module:
    """The converted model that `save_pretrained` wrote to a directory.

    options: of `from_pretrained`. Raises ConfigError when the directory holds no converted model, or not all of its
    mHC weights.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    written = getattr(config, CONFIG_KEY, None)
    if written is None:
        step = "load a plain model with from_pretrained, then call mhc_compile"
        legal = "one that a converted model saved"
        raise ConfigError(wrong(f"{path}/config.json", "that of a plain model", legal, step))
    record = Record.from_dict(written)
    step = "save the model again: this config.json is not the one of these weights"
    record.function.check_state(_saved_record(path), step=step)
    delattr(config, CONFIG_KEY)
    loader = _loading_class(_architecture(config, path), record, attach)
    model, report = loader.from_pretrained(path, config=config, output_loading_info=True, **options)
    for name in _IGNORED:
        model.__dict__.pop(name, None)
    failed = map(str, [*report["missing_keys"], *report["mismatched_keys"]])
    lost = sorted(key for key in failed if "mhc." in key)
    if lost:
        raise ConfigError(wrong(f"the mHC weights in {path}", f"without {', '.join(lost[:3])}", "all of the record's"))
    loaded: nn.Module = model
    return loaded


def _saved_record(path: Path) -> dict[str, Any]:
    """The record beside the weights of a directory, which transformers leaves out."""
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            names = set(weights.keys())
            if KEY in names:
                return {KEY: weights.get_tensor(KEY)}
    return {}


def _architecture(config: Any, path: Path) -> type[Any]:
    import transformers

    names = getattr(config, "architectures", None) or [""]
    found = getattr(transformers, names[0], None)
    if found is None:
        legal = "a model class of the installed transformers"
        step = "build the model and call mhc_compile.load(weights, model)"
        raise ConfigError(wrong(f"the architecture in {path}/config.json", repr(names[0]), legal, step))
    loaded: type[Any] = found
    return loaded


def _loading_class(original: type[Any], record: Record, attach: Callable[[nn.Module, Record], None]) -> type[Any]:
    """The original class, whose instances are converted as soon as they are built, before weights are loaded."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, config, *args, **kwargs)
        self.__class__ = original
        attach(self, record)
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), CONFIG_KEY}
        for name in _IGNORED:  # 5.0 looks at the model's lists, later ones make sets of those of this class
            held = getattr(self, name) or []
            self.__dict__[name] = type(held)([*held, record_key])

    # The record, which is checked before: transformers leaves it out, or takes it for a parameter that it cannot find.
    record_key = r"(^|\.)mhc\._extra_state$"
    ignored = {name: [*(getattr(original, name) or ()), record_key] for name in _IGNORED}
    return type(original.__name__, (original,), {"__init__": build, "__module__": original.__module__, **ignored})


_IGNORED = ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing")
