"""ONNX files of the models of the tests: what they cost beside plain torch.onnx.export, and whether they are right.

python benchmarks/onnx_export.py [--models zoo | more | gpt2,t5] [--rounds 2] [--skip-known] [--out FILE]

For each model, plain `torch.onnx.export(dynamo=True)` of the plain model and `export_onnx` of the converted one, in
turn in one process; the ratio is of the best processor times. Then the files: the full check of onnx, the calls of the
domain `mhc` by site, and the largest error of onnxruntime against torch, in units of the largest output, at three
shapes, for the plain file as well. mHC weights are random and not those of the identity. Mixtures of experts run as
batched products; grouped ones have no ONNX form. Indexers take every position, as torch and onnxruntime choose among
equal scores differently. What the exporter cannot do is recorded with its op and line.

`zoo` are the models of tests/zoo.py, those that are mHC already among them; `more` those of tests/models.py. FILE keeps
what it has of other models, so that a long run can be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from mhc_compile import export_onnx, mhc_compile
from mhc_compile.export import ONNXFile

LIMIT = 1e-5
TIMES, SECONDS = 1.5, 3.0  # an export may take this many times the plain one, and this much longer
BATCHES = (3, 1)  # of the other two shapes; positions become 3 and 1 fewer
POSITIONS = 64  # more than any input has
SITE = Counter(["Coefficients", "Sinkhorn", "Aggregate", "Merge"])


@dataclass(frozen=True)
class Subject:
    """A model to export; sites: how many a conversion makes, None for a model that is mHC already."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    sites: int | None


def subjects() -> dict[str, dict[str, Subject]]:
    """The models of the tests by list and name, but for those without a site."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import models
    import zoo

    counts = {name: sites for name, (sites, _) in zoo.EXPECT.items()}
    return {
        "zoo": {name: Subject(make, inputs, counts.get(name)) for name, make, inputs in zoo.ZOO + zoo.REFERENCE},
        "more": {one.name: Subject(one.build, one.inputs, one.sites) for one in models.MODELS if one.sites},
    }


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode, with an implementation of experts that has an ONNX form."""
    model = make().eval()
    if hasattr(model, "set_experts_implementation") and any("xperts" in type(one).__name__ for one in model.modules()):
        model.set_experts_implementation("batched_mm")
    for module in model.modules():
        if "Indexer" in type(module).__name__ and hasattr(module, "index_topk"):
            module.index_topk = POSITIONS  # all: which of equal scores are the top ones is left open
    return model


def plain_export(model: nn.Module, inputs: dict[str, Any], path: Path) -> None:
    """What export_onnx is measured against: the same sizes may change."""
    auto = torch.export.Dim.AUTO
    shapes = pytree.tree_map(
        lambda value: dict.fromkeys(range(value.dim()), auto) if isinstance(value, Tensor) else None, inputs
    )
    options: dict[str, Any] = dict(dynamo=True, opset_version=20, verbose=False, external_data=False)
    torch.onnx.export(model, (), path, kwargs=inputs, dynamic_shapes=shapes, **options)


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall clock and processor time of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def best(runs: list[tuple[float, float]]) -> dict[str, float]:
    return {"wall_s": round(min(wall for wall, _ in runs), 2), "cpu_s": round(min(cpu for _, cpu in runs), 2)}


# ---------------------------------------------------------------------------------------------- what a file computes


def others(inputs: dict[str, Any], shapes: dict[str, tuple[int | str, ...]]) -> Iterator[dict[str, Any]]:
    """The inputs, and twice others of another batch and another length, where the file leaves them free.

    Images keep their height and width. Integers are drawn from those that are there.
    """
    yield inputs
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)

        def size(value: Tensor, axis: int, shape: tuple[int | str, ...], batch: int = batch) -> int:
            if isinstance(shape[axis], int) or (axis and value.dim() > 3):
                return value.shape[axis]
            return batch if axis == 0 else value.shape[axis] - batch

        def other(name: str, value: Any, size: Any = size, generator: torch.Generator = generator) -> Any:
            if not isinstance(value, Tensor) or name not in shapes:
                return value
            wanted = [size(value, axis, shapes[name]) for axis in range(value.dim())]
            if value.is_floating_point():
                return torch.randn(wanted, generator=generator, dtype=value.dtype)
            return value.flatten()[torch.randint(value.numel(), wanted, generator=generator)]

        yield {name: other(name, value) for name, value in inputs.items()}


@torch.no_grad()
def errors(model: nn.Module, inputs: list[dict[str, Any]], path: Path) -> list[float] | str:
    """The largest error of any output of a file, for each of several inputs; what stopped it, if it does not run."""
    import onnxruntime

    found = []
    try:
        session = onnxruntime.InferenceSession(str(path))
        names = {one.name for one in session.get_inputs()}
        for given in inputs:
            leaves = [leaf for leaf in pytree.tree_leaves(model(**given)) if isinstance(leaf, Tensor)]
            got = session.run(None, {name: value.numpy() for name, value in given.items() if name in names})
            off = [
                float((torch.from_numpy(one) - want).abs().max() / want.abs().max())
                for one, want in zip(got, leaves, strict=True)
                if want.is_floating_point()
            ]
            found.append(float(f"{max(off):.1e}"))
    except Exception as error:  # the exceptions of onnxruntime have no class of their own
        return f"{len(found)} of {len(inputs)} shapes, then {type(error).__name__}: {error}"[:300]
    return found


def groups(path: Path) -> dict[str, Counter[str]]:
    """The calls of the domain mhc in a file that passes onnx's full check, by site."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    found: dict[str, Counter[str]] = {}
    for node in onnx.load(path).graph.node:
        if node.domain == "mhc":
            found.setdefault(node.name.rpartition("/")[0], Counter())[node.op_type] += 1
    return found


def why(error: BaseException) -> str:
    """What stopped an export: the op or the first line of the innermost error, and the line of the model's source."""
    from mhc_compile.codegen.onnx import _untranslated

    line = getattr(error, "line", None)
    if isinstance(error, torch.onnx.errors.OnnxExporterError):
        named = _untranslated(error)
        if named.line:
            return f"{str(named).splitlines()[0]} [{named.line}]"
    while error.__cause__ is not None:
        error = error.__cause__
        line = getattr(error, "line", None) or line
    frames = re.findall(r'File "[^"]*?([^"/]+/[^"/]+\.py)", line (\d+)', str(error))
    line = line or (f"{frames[-1][0]}:{frames[-1][1]}" if frames else "")
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" + (f" [{line}]" if line else "")


# ---------------------------------------------------------------------------------------------- one model


def converted(subject: Subject, inputs: dict[str, Any]) -> nn.Module:
    """The model that is exported, with mHC weights other than those of the identity."""
    model = build(subject.make)
    if subject.sites is None:
        return model
    mhc_compile(model, n=4, backend="eager", example_inputs=inputs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.get_submodule("mhc").parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def measure(subject: Subject, folder: Path, rounds: int) -> dict[str, Any]:
    """Times and checks of one model: `plain`, `mhc`, and whether the latter is right."""
    inputs = subject.inputs()
    plain, model = build(subject.make), converted(subject, inputs)
    paths = {"plain": folder / "plain.onnx", "mhc": folder / "mhc.onnx"}
    written: list[ONNXFile] = []
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_export(plain, inputs, paths["plain"]),
        "mhc": lambda: written.append(export_onnx(model, inputs, paths["mhc"])),
    }
    found: dict[str, Any] = {}
    runs: dict[str, list[tuple[float, float]]] = {"plain": [], "mhc": []}
    for _ in range(rounds):
        for name, call in calls.items():
            if name not in found:
                try:
                    runs[name].append(seconds(call))
                except Exception as error:  # whatever the exporter raises is the answer
                    found[name] = {"refused": why(error)}
    for name, times in runs.items():
        found.setdefault(name, best(times) if times else {})
    if "refused" in found["mhc"]:
        return found
    check(found, subject, (plain, model), inputs, paths["plain"], written[-1])
    return found


def check(
    found: dict[str, Any],
    subject: Subject,
    both: tuple[nn.Module, nn.Module],
    inputs: dict[str, Any],
    plain_file: Path,
    written: ONNXFile,
) -> None:
    """Add what the files hold and compute."""
    plain, model = both
    found["inputs"] = {name: list(shape) for name, shape in written.inputs.items()}
    given = list(others(inputs, written.inputs))
    if "refused" not in found["plain"]:
        found["ratio"] = round(found["mhc"]["cpu_s"] / found["plain"]["cpu_s"], 2)
        found["plain"]["errors"] = errors(plain, given, plain_file)
    by_site = {site: calls for site, calls in groups(written.path).items() if site != "mhc"}
    found["sites"] = len(written.sites)
    found["calls"] = written.calls
    if subject.sites is not None:
        found["one group a site"] = len(by_site) == subject.sites and all(one == SITE for one in by_site.values())
        with torch.no_grad():
            before, after = (first_output(one, inputs) for one in both)
        found["moved"] = float(f"{(after - before).abs().max() / before.abs().max():.1e}")
    found["mhc"]["errors"] = errors(model, given, written.path)
    found["right"] = right(found)


def first_output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    leaves = pytree.tree_leaves(model(**inputs))
    return next(one.double() for one in leaves if isinstance(one, Tensor) and one.is_floating_point())


def right(found: dict[str, Any]) -> bool:
    """Whether the file computes what torch does, with a group of calls for each site, in time."""
    off = found["mhc"]["errors"]
    in_time = "ratio" not in found or found["mhc"]["cpu_s"] <= TIMES * found["plain"]["cpu_s"] + SECONDS
    return (
        isinstance(off, list)
        and max(off) < LIMIT
        and found.get("one group a site", True)
        and found.get("moved", 1.0) > 1e-3
        and in_time
    )


# ---------------------------------------------------------------------------------------------- all of them


def main() -> None:
    """Measure, print a table, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="zoo", help="zoo, more, or names with commas between")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--skip-known", action="store_true", help="leave out what FILE has already")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="only print FILE as the table of docs/inspecting.md")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text(encoding="utf-8"))["models"]))
        return
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lists = subjects()
    known = {**lists["zoo"], **lists["more"]}
    chosen = list(lists.get(options.models) or options.models.split(","))
    record: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "load": round(os.getloadavg()[0], 1),
        "models": {},
    }
    if options.out and options.out.exists():
        record["models"] = json.loads(options.out.read_text(encoding="utf-8"))["models"]
    if options.skip_known:
        chosen = [name for name in chosen if name not in record["models"]]
    print(f"{'model':18} {'plain':>8} {'mhc':>8} {'ratio':>6} {'sites':>5}  errors")
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            torch._dynamo.reset()
            try:
                found = measure(known[name], Path(folder), options.rounds)
            except Exception as error:  # one model must not stop the others
                found = {"failed": why(error)}
            record["models"][name] = found
            print(row(name, found), flush=True)
            if options.out:
                record["models"] = {one: record["models"][one] for one in known if one in record["models"]}
                options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in found:
        return f"{name:18} FAILED {found['failed']}"
    times = [f"{found[one]['cpu_s']:7.1f}s" if "cpu_s" in found[one] else f"{'refused':>8}" for one in ("plain", "mhc")]
    start = f"{name:18} {' '.join(times)}"
    plain = found["plain"].get("refused") or found["plain"].get("errors", "fine")
    if "refused" in found["mhc"]:
        return f"{start}  {found['mhc']['refused']} | plain: {plain}"
    mark = "" if found["right"] else f"  WRONG (plain: {plain})"
    return f"{start} {found.get('ratio', 0):6.2f} {found['sites']:5}  {found['mhc']['errors']}{mark}"


def table(models: dict[str, Any]) -> str:
    """The results as the page on ONNX has them."""
    head = ["model", "sites", "largest error, plain / mHC", "export in s, plain / mHC", "sizes that may change"]
    rows = [head, ["---"] * len(head)]
    for name, found in models.items():
        if "refused" in found["mhc"]:
            rows.append([name, "", "", f"refused, {_also(found['plain'])}", f"`{found['mhc']['refused']}`"])
            continue
        off = " / ".join(_largest(found[one]) for one in ("plain", "mhc"))
        times = " / ".join(str(found[one].get("cpu_s", "refused")) for one in ("plain", "mhc"))
        rows.append([name, str(found["sites"]), off, times, _free(found["inputs"])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _also(plain: dict[str, Any]) -> str:
    return "as plain" if "refused" in plain else "not as plain"


def _largest(one: dict[str, Any]) -> str:
    off = one.get("errors", "")
    return f"{max(off):.0e}" if isinstance(off, list) else "does not run" if off else ""


def _free(inputs: dict[str, list[int | str]]) -> str:
    names = dict.fromkeys(size for shape in inputs.values() for size in shape if isinstance(size, str))
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
