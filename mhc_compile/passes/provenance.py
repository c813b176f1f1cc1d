"""Where in the user's program a graph node comes from: module path and source line."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx

_PACKAGE = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent
_DEVICE_MODE = str(_TORCH / "utils" / "_device.py")  # stands between a line and its op under a default device
_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)(?:\n(?!\s*File ")\s*(?P<code>[^\n]*))?'
)
_ROOT = re.compile(r"^(L\['self'\]|L__self__|self(?!\w))\.?")  # not the start of self_attn
# What torch puts around a module: a block that is checkpointed or compiled later keeps the names of its sites.
_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"})
_MODULES_ITEM = re.compile(r"(?:\._modules|\['_modules'\])\['([^']+)'\]|\[['\"]?([^'\"\]]+)['\"]?\]")
_SOURCE_ITEM = re.compile(
    r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\.([A-Za-z_]\w*)|\[['\"]?([^'\"\]]+)['\"]?\]"
)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made the node; '' for the root module."""
    return _path_of(list((node.meta.get("nn_module_stack") or {}).values()))


def module_paths(node: fx.Node) -> list[str]:
    """Paths of all modules whose forward made the node, the outermost first; without the root module."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return [path for depth in range(1, len(stack) + 1) if (path := _path_of(stack[:depth]))]


def _path_of(stack: list[tuple[Any, Any]]) -> str:
    if not stack:
        return ""
    path = str(stack[-1][0]).replace(".__dict__", "")
    path = _MODULES_ITEM.sub(lambda m: "." + (m.group(1) or m.group(2)), _ROOT.sub("", path))
    # export writes repeated calls of one module as `layer@1`
    parts = re.sub(r"@\d+", "", path).split(".")
    return ".".join(part for part in parts if part and part not in _WRAPPERS)


def attribute_path(source: str) -> str:
    """`L['self']._modules['a']._parameters['w']` as `a.w`; '' when the source is not an attribute of the model."""
    if not _ROOT.match(source):
        return ""
    rest = _ROOT.sub("", source).replace(".__dict__", "")
    rest = rest if rest.startswith((".", "[", "_")) else "." + rest
    rest = rest if not rest.startswith("_") else "." + rest
    return ".".join(next(part for part in match.groups() if part) for match in _SOURCE_ITEM.finditer(rest))


def source_line(node: fx.Node) -> str:
    """`file.py:12: the code` of the innermost user frame that made the node; '' if the capture kept none."""
    every = _FRAME.finditer(node.meta.get("stack_trace") or "")
    frames = [frame for frame in every if not is_ours(frame["file"]) and frame["file"] != _DEVICE_MODE]
    if not frames:
        return ""
    frame = frames[-1]
    return f"{_short(frame['file'])}:{frame['line']}: {(frame['code'] or '').strip()}"


class Frame(NamedTuple):
    """A line of a program: the last two parts of its file, its number and its text."""

    file: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code}"


def calling_frame(node: fx.Node) -> Frame | None:
    """The innermost line outside of torch's own modules: where a Linear is called, not where it calls F.linear."""
    return _calling_frame(node.meta.get("stack_trace") or "")


@cache
def _calling_frame(trace: str) -> Frame | None:
    frames = [
        frame
        for frame in _FRAME.finditer(trace)
        if not is_ours(frame["file"]) and not is_of_torch(frame["file"])
    ]
    if not frames:
        return None
    return Frame(_short(frames[-1]["file"]), int(frames[-1]["line"]), (frames[-1]["code"] or "").strip())


def calling_module(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the innermost module that is none of torch's own; ('', '') for what stands outside."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    for depth in range(len(stack), 0, -1):
        kind = stack[depth - 1][1]
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        if not name.startswith("torch."):
            return _path_of(stack[:depth]), name.rpartition(".")[2]
    return "", ""


def is_of_torch(file: str) -> bool:
    """The file belongs to torch."""
    return Path(file).is_relative_to(_TORCH)


def is_ours(file: str) -> bool:
    """The file belongs to this package, or is code that fx wrote."""
    return Path(file).is_relative_to(_PACKAGE) or file.startswith("<eval_with_key>")


def _short(file: str) -> str:
    """The last two parts of a path: enough to find the file, short enough for a table."""
    return "/".join(Path(file).parts[-2:])
