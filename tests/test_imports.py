"""The import rules of the package, read from its source: layers, triton, private torch names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import networkx as nx
import pytest
import torch
from setuptools import find_namespace_packages

from mhc_compile import _torch

PACKAGE = "mhc_compile"
ROOT = Path(__file__).parents[1]

# Lowest first. A module belongs to the layer with its longest matching prefix, below the package's name, and
# imports from its own layer and those before it. What is named nowhere is a user-facing module.
LAYERS = (
    ("errors",),
    ("_torch",),
    ("kernels.reference", "kernels.convention"),
    ("constraints",),
    ("config",),
    ("kernels.plain_sinkhorn",),
    ("kernels.plain", "kernels.site_plain"),
    ("kernels",),
    ("site_form",),
    ("hyper_connection",),
    ("record",),
    ("passes",),
    ("codegen",),
    ("*",),
    ("", "__main__"),
)
RANKS = {prefix: rank for rank, layer in enumerate(LAYERS) for prefix in layer}

ALLOWED_PRIVATE = "torch.utils._pytree"


@dataclass(frozen=True)
class Import:
    """One imported name: `from a import b` gives `a.b`, whether b is a module or not."""

    name: str
    line: int
    deferred: bool  # inside a function or under TYPE_CHECKING: importing the module does not run it

    def under(self, module: str) -> bool:
        return self.name == module or self.name.startswith(module + ".")


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    base = module.split(".") if is_package else module.split(".")[:-1]

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, deferred)
        elif isinstance(node, ast.ImportFrom):
            above = base[: len(base) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}", node.lineno, deferred)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from visit_all(node.body, True)
            yield from visit_all(node.orelse, deferred)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit_all(ast.iter_child_nodes(node), deferred or inside)

    def visit_all(nodes: Iterator[ast.AST] | list[ast.stmt], deferred: bool) -> Iterator[Import]:
        for node in nodes:
            yield from visit(node, deferred)

    return visit(ast.parse(source), False)


def read_package() -> dict[str, list[Import]]:
    modules = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = list(imports(path.read_text(encoding="utf-8"), name, is_package))
    return modules


MODULES = read_package()


def rank(module: str) -> int:
    inner = module.removeprefix(PACKAGE).removeprefix(".")
    prefix = inner
    while prefix and prefix not in RANKS:
        prefix = prefix.rpartition(".")[0]
    return RANKS[prefix or ("*" if inner else "")]


def target(found: Import, modules: dict[str, list[Import]]) -> str:
    """The module of the package that an import reads: `from mhc_compile import ops` may name either kind."""
    return found.name if found.name in modules else found.name.rpartition(".")[0]


def own(module: str, modules: dict[str, list[Import]]) -> Iterator[tuple[Import, str]]:
    for found in modules[module]:
        if found.under(PACKAGE):
            yield found, target(found, modules)


def is_private_torch(name: str) -> bool:
    """Has a component below torch that starts with one underscore."""
    first, *rest = name.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in rest)
    allowed = name == ALLOWED_PRIVATE or name.startswith(ALLOWED_PRIVATE + ".")
    return first == "torch" and hidden and not allowed


def arrows_back(modules: dict[str, list[Import]]) -> list[str]:
    return [
        f"{module}:{found.line} imports {to}"
        for module in modules
        for found, to in own(module, modules)
        if rank(to) > rank(module)
    ]


def import_cycles(modules: dict[str, list[Import]]) -> list[list[str]]:
    """Circles of modules that cannot be imported in every order; an import inside a function breaks one."""
    graph = nx.DiGraph(
        (module, to) for module in modules for found, to in own(module, modules) if not found.deferred
    )
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def triton_misuses(modules: dict[str, list[Import]]) -> list[str]:
    """Triton outside `kernels`, and every way by which importing the package could import triton.

    A file of kernels may import triton at its top, where `@triton.jit` looks names up. Then only other such
    files, and those called `triton_*`, may import that file at their tops; all else imports it inside the function
    that launches.
    """
    uses = {name: [found for found in modules[name] if found.under("triton")] for name in modules}
    tied = {name for name, found in uses.items() if any(not each.deferred for each in found)}
    tied |= {name for name in modules if name.startswith(f"{PACKAGE}.kernels.triton_")}
    always = {f"{PACKAGE}.kernels", *(f"{PACKAGE}.kernels.{name}" for name in ("reference", "plain", "ops"))}
    outside = [
        f"{name}:{found[0].line} imports triton"
        for name, found in uses.items()
        if found and not name.startswith(f"{PACKAGE}.kernels.")
    ]
    at_top = [f"{name} imports triton at its top" for name in sorted(tied & always)]
    through = [
        f"{module}:{found.line} imports {to}, which needs triton, at its top"
        for module in modules
        if module not in tied
        for found, to in own(module, modules)
        if to in tied and not found.deferred
    ]
    return outside + at_top + through


def private_torch(modules: dict[str, list[Import]]) -> list[str]:
    return [
        f"{module}:{found.line} imports {found.name}"
        for module in modules
        if module != f"{PACKAGE}._torch"
        for found in modules[module]
        if is_private_torch(found.name)
    ]


OF_OTHERS = {
    "_fields": "Python's named tuples",
    "_output_capturing_hooks_installed": "transformers",
    "_keys_to_ignore_on_load_unexpected": "transformers",
    "_from_config": "transformers",
}


def private_attributes(source: str, members: frozenset[str], *, in_torch: bool = False) -> list[str]:
    """Private names that a file reaches by attribute, or by a string, and that are neither its own nor in `members`.

    Names that hang on torch's modules (`torch._dynamo.config`) are for `_torch.py` to import, whatever is in `members`.
    """
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_self(node.value)}
    modules = {alias.asname or alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE
        for alias in node.names
    }
    found = []
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_self(node.value):
            text = ast.unparse(node)
            of_torch = text.split(".")[0] in ("torch", "functorch") and not text.startswith("torch.ops.")
            of_package = ast.unparse(node.value) in modules and not of_torch
            if (of_torch and not in_torch) or not (of_package or node.attr in own | members):
                found.append(f"{node.lineno}: {text}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if isinstance(name, str) and is_private(name) and name not in own | members:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_torch_names_reached_by_attribute_stand_in_one_file() -> None:
    members = frozenset(name for _, names in _torch.MEMBERS for name in names)
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
    fields = {name for text in texts.values() for name in re.findall(r"self\.(_\w+)(?:: .+)? =", text)}
    known = members | frozenset(OF_OTHERS) | fields
    found = [
        f"{path.relative_to(ROOT)}:{one}"
        for path, text in texts.items()
        for one in private_attributes(text, known, in_torch=path.name == "_torch.py")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("torch._dynamo.config.disable", True),
        ("functorch.compile._x", True),
        ("torch.nn.parallel._functions", True),
        ("op._schema", False),
        ("op._unheard_of", True),
        ("getattr(op, '_unheard_of', None)", True),
        ("torch.ops.aten._unheard_of.default", True),
        ("self._own", False),
        ("class A:\n    def _own(self): ...\n\ndef f(a): a._own()", False),
        ("import torch\ntorch._C._anything", True),
        ("from mhc_compile.kernels import plain\nplain._tiles", False),
    ],
)
def test_a_private_name_reached_by_attribute_is_seen(source: str, seen: bool) -> None:
    assert bool(private_attributes(source, frozenset({"_schema"}))) == seen


def test_a_missing_member_is_named() -> None:
    found = _torch.missing_members([(torch.nn.Module(), ("_modules", "_unheard_of")), (ast, ("_moved",))])
    assert found == ["_unheard_of of Module", "_moved of ast"]
    with pytest.raises(ImportError, match=r"this torch \(2.99.0\): it has no _moved of ast. Tested: 2.11"):
        _torch.check_torch("2.99.0", found[1:])


def test_a_newer_torch_is_warned_of_once_and_works() -> None:
    with pytest.warns(UserWarning, match=r"not tested with torch 2\.99\.0a0\+git1\. Tested: 2\.11.*verify\(model\)"):
        _torch.check_torch("2.99.0a0+git1", [])
    for version in _torch.TESTED:
        _torch.check_torch(f"{version}.1+cpu", [])


def test_pages_and_the_package_say_which_torch_was_tested() -> None:
    """One list, `_torch.TESTED`: the oldest is what pip asks for."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"torch>={_torch.TESTED[0]}" in config["project"]["dependencies"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"torch {_torch.TESTED[0]} to {_torch.TESTED[-1]}" in readme


def test_imports_point_to_lower_layers() -> None:
    assert len(MODULES) > 10
    assert arrows_back(MODULES) == []


def test_no_import_cycles() -> None:
    assert import_cycles(MODULES) == []


def test_triton_is_imported_by_kernel_files_only_and_lazily() -> None:
    assert triton_misuses(MODULES) == []


def test_private_torch_names_are_imported_in_one_file() -> None:
    assert private_torch(MODULES) == []


def package_with(**sources: str) -> dict[str, list[Import]]:
    """A package of a few modules, in place of the real one; `__` in a name stands for a dot."""
    names = {f"{PACKAGE}.{name.replace('__', '.')}": source for name, source in sources.items()}
    return {PACKAGE: []} | {name: list(imports(source, name)) for name, source in names.items()}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("passes__find", "from mhc_compile import verify"),
        ("passes__find", "from mhc_compile import anything"),
        ("passes__find", "import mhc_compile.verify"),
        ("passes__find", "from ..verify import check"),
        ("passes__find", "from .. import verify"),
        ("passes__find", "def late():\n    from mhc_compile.verify import check"),
        ("kernels__reference", "from mhc_compile.kernels import plain"),
        ("kernels__plain", "from mhc_compile.kernels import ops"),
        ("errors", "from mhc_compile import _torch"),
        ("verify", "from mhc_compile import __main__"),
    ],
)
def test_an_arrow_back_is_seen(module: str, source: str) -> None:
    others = {"verify": "", "kernels__plain": "", "kernels__ops": "", "_torch": "", "__main__": ""}
    modules = package_with(**{**others, module: source})
    assert len(arrows_back(modules)) == 1


def test_a_cycle_is_seen_unless_deferred() -> None:
    late = "def late():\n    from mhc_compile.passes import a"
    assert import_cycles(package_with(passes__a="from . import b", passes__b="from . import a"))
    assert not import_cycles(package_with(passes__a="from . import b", passes__b=late))


KERNEL = "from mhc_compile.kernels import a"


@pytest.mark.parametrize(
    ("sources", "misuses"),
    [
        ({"passes__a": "import triton"}, 1),
        ({"passes__a": "def f():\n    import triton.language as tl"}, 1),
        ({"kernels__ops": "from triton import jit"}, 1),
        ({"kernels__a": "import triton", "kernels__ops": KERNEL}, 1),
        ({"kernels__a": "import triton", "kernels__ops": f"def f():\n    {KERNEL}"}, 0),
        ({"kernels__a": "import triton", "kernels__b": f"import triton\n{KERNEL}"}, 0),
        ({"kernels__ops": "def f():\n    import triton"}, 0),
        ({"kernels__ops": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"}, 0),
    ],
)
def test_a_misuse_of_triton_is_seen(sources: dict[str, str], misuses: int) -> None:
    assert len(triton_misuses(package_with(**sources))) == misuses


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("import torch._dynamo", True),
        ("from torch._subclasses.fake_tensor import FakeTensor", True),
        ("from torch import _ops", True),
        ("from torch.fx.experimental import _config as config", True),
        ("import torch.utils._pytree as pytree", False),
        ("from torch.utils._pytree import tree_map", False),
        ("from torch import __version__", False),
        ("from mhc_compile import _torch", False),
    ],
)
def test_a_private_torch_name_is_seen(source: str, private: bool) -> None:
    assert bool(private_torch(package_with(passes__a=source))) == private


def test_the_distribution_has_one_top_level_name() -> None:
    """A top-level `kernels` would collide on disk with the package of that name, which transformers uses."""

    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = find_namespace_packages(str(ROOT), **config["tool"]["setuptools"]["packages"]["find"])
    assert {name.partition(".")[0] for name in found} == {PACKAGE}
    assert {name for name in MODULES if any(other.startswith(name + ".") for other in MODULES)} <= set(found)
    installed = {name for name, owners in packages_distributions().items() if "mhc-compile" in owners}
    assert {name for name in installed if not name.startswith("__editable__")} <= {PACKAGE}


def import_in_a_new_process(*statements: str) -> None:
    script = "; ".join(["import sys", *statements])
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["mhc_compile", "mhc_compile.kernels.ops"])
def test_imports_without_triton(module: str) -> None:
    import_in_a_new_process("sys.modules['triton'] = None", f"import {module}")


def test_import_does_not_load_inductor() -> None:
    """Inductor takes seconds to import. (Triton, where it is installed, is loaded by torch's Dynamo.)"""
    import_in_a_new_process("import mhc_compile", "assert 'torch._inductor.compile_fx' not in sys.modules")
