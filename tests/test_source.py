"""A written model gives the bits of the rewritten graph, in a process of its own, and reads like a program."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import zoo
from graphs import FAR, first_output, fresh, randomize
from mhc_compile import ConfigError, ExportError, Source, mhc_compile, source, trace
from mhc_compile.codegen import source_body, spelling

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

ROOT = Path(__file__).parents[1]

# Loads each written model with its weights and compares its outputs with the saved ones, bit for bit.
FRESH = """
import importlib.util, json, sys
from pathlib import Path
import torch
import torch.utils._pytree as pytree

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for name, cls in json.loads((folder / "names.json").read_text()).items():
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = getattr(module, cls)()
    model.load_state_dict(torch.load(folder / f"{name}.weights"))
    inputs, expected = torch.load(folder / f"{name}.expected")
    with torch.no_grad():
        actual = pytree.tree_leaves(model(**inputs))
    same = [a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(actual, expected, strict=True)]
    print(name, len(same) if all(same) else "differs")
"""


class Block(nn.Module):
    """Two sites."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.norm(x))
        return x + self.second(torch.tanh(x))


def converted(model: nn.Module, inputs: Any, n: int = 4) -> nn.Module:
    """The model with `n` streams and random mHC weights, which it is not the plain model with."""
    with torch.no_grad():
        plain = first_output(lambda: call(model, inputs))
        mhc_compile(model, n, backend="eager", example_inputs=inputs)
        if n > 1:
            randomize(model)
            far = (first_output(lambda: call(model, inputs)) - plain).abs().max()
            assert float(far) > FAR * float(plain.abs().max())
    return model


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def loaded(written: Source, folder: Path, weights: dict[str, Any]) -> nn.Module:
    """The class of a written file, imported from disk, with weights."""
    written.save(folder / "written.py")
    spec = importlib.util.spec_from_file_location("written", folder / "written.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = getattr(module, written.name)()
    model.load_state_dict(weights)
    return model


def assert_same(actual: Any, expected: Any) -> None:
    pairs = list(zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True))
    assert pairs
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a is b for a, b in pairs)


def lint(folder: Path) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--quiet", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def write_all(names: list[tuple[str, int]], folder: Path) -> dict[str, Source]:
    """Write models, their weights, and what their rewritten graphs give."""
    made = {}
    for name, n in names:
        model, inputs = fresh(name)
        converted(model, inputs, n)
        key = f"{name}_{n}"
        made[key] = source(model, inputs)
        made[key].save(folder / f"{key}.py")
        with torch.no_grad():
            expected = pytree.tree_leaves(trace(model, inputs)(**inputs))
        torch.save(model.state_dict(), folder / f"{key}.weights")
        torch.save((inputs, expected), folder / f"{key}.expected")
    (folder / "names.json").write_text(json.dumps({key: one.name for key, one in made.items()}))
    return made


def check_in_a_new_process(folder: Path, names: list[tuple[str, int]]) -> None:
    command = [sys.executable, "-c", FRESH, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in results] == [f"{name}_{n}" for name, n in names]
    assert all(int(count) > 0 for _, count in results), done.stdout


def test_written_models_have_the_bits_of_their_graphs_in_a_new_process(tmp_path: Path) -> None:
    """Tied weights, two trunks, an autocast region, n = 1."""
    names = [("gpt2", 4), ("t5", 2), ("autocast_off", 3), ("auxiliary_heads", 1)]
    made = write_all(names, tmp_path)
    lint(tmp_path)
    check_in_a_new_process(tmp_path, names)
    for one in made.values():  # as a user would write it, not with torch.ops
        assert "torch.ops." not in one.code
    text = str(made["gpt2_4"])
    assert "streams = mhc.merge(streams, x, post, res)" in text
    assert "phi=self.mhc.transformer.h[0].attn.phi," in text
    assert "# site transformer.h[0].attn  (gpt2/modeling_gpt2.py:" in text
    assert "F.layer_norm(u, [32], self.transformer.h[0].ln_1.weight, self.transformer.h[0].ln_1.bias)" in text
    assert '"lm_head.weight": "transformer.wte.weight",' in text
    assert "mhc." not in made["auxiliary_heads_1"].code.split("def forward")[1].split("\n\n\n")[0]
    assert "with torch.autocast(" in made["autocast_off_3"].code


@pytest.mark.sweep
@pytest.mark.parametrize("n", [1, 4])
def test_every_zoo_model_has_the_bits_of_its_graph(n: int, tmp_path: Path) -> None:
    names = [(name, n) for name, *_ in zoo.ZOO]
    made = write_all(names, tmp_path)
    lint(tmp_path)
    check_in_a_new_process(tmp_path, names)
    assert all("torch.ops.aten" not in one.code for one in made.values())


def test_a_long_path_of_modules_stands_on_a_line_of_its_own() -> None:
    indices = spelling.joined([spelling.Expression("self.index")], f"self.{'layer.' * 16}table[", "]")
    lines = source_body._statement("        ", "relative_position_bias = ", indices)
    assert max(map(len, lines)) <= spelling.WIDTH < len("".join(lines))
    assert lines[0].endswith("= (") and "".join(one.strip() for one in lines[1:-1]) == indices.text.replace("]", ",]")


class Holder(nn.Module):
    """What a state_dict does not hold: a mask, position ids, a table, a scalar; and weights under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.full((8,), 1.5), persistent=True)
        self.register_buffer("places", torch.arange(5).view(1, 5), persistent=False)
        self.register_buffer("mask", torch.ones(300, dtype=torch.bool), persistent=False)
        self.register_buffer("odd", torch.tensor([0.1, -torch.inf, 1e-8]), persistent=False)
        self.register_buffer("table", torch.randn(5, 40, generator=torch.Generator().manual_seed(0)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.mask[: x.shape[-1]] & (self.places.sum() > 0)
        x = self.block(x * self.scale + self.table[:, :8]) + torch.tensor(0.25)
        return self.tied(self.head(x)) * kept + self.odd[0] + self.odd[2]


def test_constants_are_in_the_file_or_beside_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 5, 8),)
    model = converted(Holder().eval(), inputs)
    written = source(model, inputs)
    assert list(written.constants) == ["table"]
    for text in ('torch.full([300], True, dtype=torch.bool)', 'torch.arange(5, dtype=torch.int64).reshape(1, 5)'):
        assert text in written.code
    assert "-torch.inf" in written.code
    again = loaded(written, tmp_path, model.state_dict())
    lint(tmp_path)
    with torch.no_grad():
        assert_same(again(*inputs), trace(model, inputs)(*inputs))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert again.get_parameter("tied.weight") is again.get_parameter("head.weight")
    (tmp_path / "written.constants.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"written\.constants\.pt"):
        type(again)()


class Nested(nn.Module):
    """Inputs and outputs in structures, an optional flag, in-place ops, several results of one op."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, batch: dict[str, Any], pair: tuple[Tensor, Tensor], *, doubled: bool = False) -> Any:
        x = batch["x"] * 2 if doubled else batch["x"]
        taps = []
        for block in self.blocks:
            x = block(x)
            taps.append(x)
        left, right = (x + pair[0]).chunk(2, dim=-1)
        values, places = left.sort(dim=-1)
        values = values.clone()
        values.add_(right).mul_(0.5)
        with torch.no_grad():
            mean = pair[1].mean() - 1
        return (values.tanh() ** 2, {"taps": taps, "places": places, "none": None}, -mean if doubled else mean)


def test_structures_and_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    inputs = {"batch": {"x": x}, "pair": (torch.randn(3, 8), torch.randn(4)), "doubled": True}
    model = converted(Nested().eval(), inputs)
    again = loaded(source(model, inputs), tmp_path, model.state_dict())
    lint(tmp_path)
    traced = trace(model, inputs)
    expected, actual = traced(**inputs), again(**inputs)
    assert isinstance(actual, tuple) and list(actual[1]) == ["taps", "places", "none"] and len(actual[1]["taps"]) == 2
    assert_same(actual, expected)
    again(**inputs)[0].sum().backward()
    traced(**inputs)[0].sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, again.get_parameter(name).grad), name
    for wrong, words in (
        ({"doubled": False}, "doubled is False; legal: True"),
        ({"batch": {"x": x[:1]}}, r"batch\['x'\] is \[1, 3, 8\] torch.float32; legal: \[2, 3, 8\]"),
        ({"batch": {"x": x.double()}}, "torch.float64; legal"),
    ):
        with pytest.raises(ValueError, match=words):
            again(**{**inputs, **wrong})
    with pytest.raises(RuntimeError, match="written in eval mode"):
        again.train()
    assert again.eval() is again


def test_sizes_that_may_change(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.block(x) + y).reshape(x.shape[0] * x.shape[1], -1) / x.shape[1]

    torch.manual_seed(0)
    inputs = (torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    model = converted(Two().eval(), inputs)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    again = loaded(source(model, inputs, dynamic_shapes=shapes), tmp_path, model.state_dict())
    lint(tmp_path)
    traced = trace(model, inputs, dynamic_shapes=shapes)
    for size in ((2, 5), (3, 7), (4, 2)):
        x, y = torch.randn(*size, 8), torch.randn(*size, 8)
        assert_same(again(x, y), traced(x, y))
    for x, y in ((torch.randn(2, 5, 9), torch.randn(2, 5, 9)), (torch.randn(2, 5, 8), torch.randn(2, 6, 8))):
        with pytest.raises(ValueError, match="; legal: "):
            again(x, y)


def test_a_model_in_train_mode(tmp_path: Path) -> None:
    """Dropout and batch statistics are those of the mode that the model was in."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.block = nn.BatchNorm1d(8), Block()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.block(self.enter(x)), 0.5, self.training)

    torch.manual_seed(0)
    inputs = (torch.randn(6, 8),)
    model = converted(Noisy().train(), inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again, traced = loaded(source(model, inputs), tmp_path, before), trace(model, inputs)
    assert "training=True" in (tmp_path / "written.py").read_text()
    torch.manual_seed(1)
    actual = again(*inputs)
    model.load_state_dict(before)
    torch.manual_seed(1)
    assert_same(actual, traced(*inputs))
    assert torch.equal(again.get_buffer("enter.running_mean"), model.get_buffer("enter.running_mean"))
    with pytest.raises(RuntimeError, match="written in train mode"):
        again.eval()


def test_weights_must_be_of_the_same_conversion(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 3, 8),)
    model = converted(Block().eval(), inputs)
    other = converted(Block().eval(), inputs)
    written = source(model, inputs)
    again = loaded(written, tmp_path, other.state_dict())
    plain = mhc_compile(Block().eval(), 4, iterations=3, backend="eager", example_inputs=inputs)
    with pytest.raises(ConfigError, match="iterations is 3, here 20"):
        again.load_state_dict(plain.state_dict())
    assert torch.isnan(next(type(again)().parameters())).all()  # a model without weights says so
    with pytest.raises(ConfigError, match=r"a path that ends in \.py"):
        written.save(tmp_path / "written.txt")


def test_the_ops_of_other_forms_read_like_those_of_sinkhorn() -> None:
    """Static sites have no phi; what takes coefficients away, and other constraints, have functions of their own."""
    inputs = (torch.randn(2, 3, 8),)
    some = {"site_constraints": {"first": "lite"}}
    for options in ({"dynamic": False}, {"constraint": "lite", "fixed": ("pre",)}, some):
        model = mhc_compile(Block().eval(), 4, backend="eager", example_inputs=inputs, **options)
        code = source(model, inputs).code
        assert "torch.ops." not in code and "manifold_ops.gates(" in code
        assert {line.split("(")[0].strip() for line in code.splitlines() if "# site" in line} == {
            f"# site {name}{part}" for name in ("first", "second")
            for part in ("", ": its branch goes back into the streams")
        }  # fmt: skip


def test_a_spelling_that_is_another_op_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inputs = (torch.randn(2, 3, 8),)
    model = converted(Block().eval(), inputs)
    real = spelling._method
    monkeypatch.setattr(spelling, "_method", lambda node, target, write: _sinh(real, node, target, write))
    written = source(model, inputs)
    assert ".sinh" not in written.code and "torch.ops.aten.tanh.default(" in written.code
    again = loaded(written, tmp_path, model.state_dict())
    assert_same(again(*inputs), trace(model, inputs)(*inputs))
    monkeypatch.setattr(spelling, "_raw", lambda node, target, write: spelling.Expression("input.sinh()"))
    with pytest.raises(ExportError, match="not that of its graph"):
        source(model, inputs)


def _sinh(real: Callable[..., Any], *arguments: Any) -> Any:
    made = real(*arguments)
    return made and made._replace(text=made.text.replace("tanh", "sinh"), head=made.head.replace("tanh", "sinh"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch.cond's own
def test_an_op_without_a_form_is_refused_with_its_line() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    inputs = (torch.randn(2, 3, 8),)
    model = converted(Branching().eval(), inputs)
    with pytest.raises(ExportError, match="cond, which has no form in a Python file") as caught:
        source(model, inputs)
    assert caught.value.line is not None and "test_source.py" in caught.value.line


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/inspecting.md on source and pictures; what is shown of a written file stands in one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = (ROOT / "docs" / "inspecting.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    chosen = [part for part in parts if part.startswith(("# See", "Python source", "Picture"))]
    names: dict[str, Any] = {}
    shown = []
    for code in [code for part in chosen for code in re.findall(r"```python\n(.*?)```", part, re.DOTALL)]:
        if code.startswith("# site"):
            shown += [line for line in code.splitlines() if line and not line.endswith("...")]
        else:
            exec(compile(code, "inspecting.md", "exec"), names)
    # Releases of transformers move their lines.
    lines = {re.sub(r":\d+:", "", line.strip()) for line in (tmp_path / "rewritten.py").read_text().splitlines()}
    assert len(shown) > 10 and not [line for line in shown if re.sub(r":\d+:", "", line.strip()) not in lines]
    assert {"model.svg", "plan.svg", "rewritten.py", "weights.pt"} <= {path.name for path in tmp_path.iterdir()}
