"""ONNX files of the zoo of the tests: what they cost beside plain torch.onnx.export, and whether they are right.

python benchmarks/onnx_export.py [--models gpt2,t5] [--rounds 2] [--out FILE]

For each model, plain `torch.onnx.export(dynamo=True)` of the plain model and `export_onnx` of the converted one, in
turn in one process; the ratio is of the best processor times. Then the file: the full check of onnx, the calls of the
domain `mhc` by site, and the largest error of onnxruntime against torch, in units of the largest output, at three
shapes. mHC weights are random and not those of the identity. Mixtures of experts run as batched products; grouped
ones have no ONNX form.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile import MHCError, export_onnx, mhc_compile

SHAPES = ((2, 8), (3, 5), (1, 7))  # batch and length of token ids
LIMIT = 1e-5
SITE = Counter(["Coefficients", "Sinkhorn", "Aggregate", "Merge"])


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall clock and processor time of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A model of the zoo, with an implementation of experts that has an ONNX form."""
    model = make()
    config = getattr(model, "config", None)
    if hasattr(config, "num_local_experts") or hasattr(config, "n_routed_experts"):
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    return model


def plain_export(model: nn.Module, inputs: dict[str, Any], path: Path) -> None:
    """What export_onnx is measured against: the same sizes may change."""
    auto = torch.export.Dim.AUTO
    shapes = {
        name: dict.fromkeys(range(value.dim()), auto) if isinstance(value, Tensor) else None
        for name, value in inputs.items()
    }
    torch.onnx.export(
        model,
        (),
        path,
        kwargs=inputs,
        dynamic_shapes=shapes,
        dynamo=True,
        opset_version=20,
        verbose=False,
        external_data=False,
    )


def times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Best wall clock and processor time of calls that are made in turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return {
        name: {"wall_s": round(min(wall for wall, _ in runs), 2), "cpu_s": round(min(cpu for _, cpu in runs), 2)}
        for name, runs in found.items()
    }


def other(
    inputs: dict[str, Any], batch: int, length: int, vocabulary: int, shapes: dict[str, tuple[int | str, ...]]
) -> dict[str, Any]:
    """Inputs of another batch and length; images keep their size, and a file its fixed sizes."""
    generator = torch.Generator().manual_seed(batch)

    def one(name: str, value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn((batch, *value.shape[1:]), generator=generator)
        fixed = shapes[name][1]
        size = fixed if isinstance(fixed, int) else length if name == "input_ids" else length - 1
        return torch.randint(3, vocabulary, (batch, size), generator=generator)

    return {name: one(name, value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@torch.no_grad()
def errors(model: nn.Module, inputs: list[dict[str, Any]], path: Path) -> list[float]:
    """The largest error of any output of a file, for each of several inputs."""
    import onnxruntime
    import torch.utils._pytree as pytree

    session = onnxruntime.InferenceSession(str(path))
    names = {one.name for one in session.get_inputs()}
    found = []
    for given in inputs:
        wanted = [leaf for leaf in pytree.tree_leaves(model(**given)) if isinstance(leaf, Tensor)]
        got = session.run(None, {name: value.numpy() for name, value in given.items() if name in names})
        off = [
            (torch.from_numpy(one) - want).abs().max() / want.abs().max()
            for one, want in zip(got, wanted, strict=True)
            if want.is_floating_point()
        ]
        found.append(float(max(off)))
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


def measure(
    make: Callable[[], nn.Module], inputs: dict[str, Any], sites: int | None, folder: Path, rounds: int, vocabulary: int
) -> dict[str, Any]:
    """Times and checks of one model; sites: how many it must have, None for one that is mHC already."""
    plain, model = build(make), build(make)
    if sites is not None:
        mhc_compile(model, n=4, backend="eager", example_inputs=inputs)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.get_submodule("mhc").parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    paths = folder / "plain.onnx", folder / "mhc.onnx"
    calls = {
        "plain": lambda: plain_export(plain, inputs, paths[0]),
        "mhc": lambda: export_onnx(model, inputs, paths[1]),
    }
    found: dict[str, Any] = times(calls, rounds)
    found["ratio"] = round(found["mhc"]["cpu_s"] / found["plain"]["cpu_s"], 2)
    by_site = {site: calls for site, calls in groups(paths[1]).items() if site != "mhc"}
    found["sites"] = len(by_site)
    complete = sites is None or (len(by_site) == sites and all(one == SITE for one in by_site.values()))
    found["one group a site"] = complete
    free = export_onnx(model, inputs, paths[1]).inputs
    found["inputs"] = {name: list(shape) for name, shape in free.items()}
    given = [inputs, *(other(inputs, batch, length, vocabulary, free) for batch, length in SHAPES[1:])]
    found["errors"] = [float(f"{one:.1e}") for one in errors(model, given, paths[1])]
    found["right"] = max(found["errors"]) < LIMIT and complete
    return found


def main() -> None:
    """Measure, print a table, save."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import zoo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names, with commas between; by default all that can be exported")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = options.models.split(",") if options.models else [*zoo.EXPECT, "deepseek_v4"]
    entries = {name: (make, inputs) for name, make, inputs in zoo.ZOO + zoo.REFERENCE}
    record: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "load": round(os.getloadavg()[0], 1),
        "models": {},
    }
    print(f"{'model':12} {'plain':>8} {'mhc':>8} {'ratio':>6} {'sites':>5}  errors at {SHAPES}")
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            make, inputs = entries[name]
            torch._dynamo.reset()
            sites = zoo.EXPECT[name][0] if name in zoo.EXPECT else None
            try:
                found = measure(make, inputs(), sites, Path(folder), options.rounds, zoo.VOCAB)
            except (MHCError, RuntimeError) as error:
                found = {"refused": str(error).splitlines()[0]}
            record["models"][name] = found
            print(_row(name, found), flush=True)
            if options.out:
                options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _row(name: str, found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"{name:12} {found['refused']}"
    mark = "" if found["right"] else "  WRONG"
    costs = f"{found['plain']['cpu_s']:7.1f}s {found['mhc']['cpu_s']:7.1f}s {found['ratio']:6.2f}"
    return f"{name:12} {costs} {found['sites']:5}  {found['errors']}{mark}"


if __name__ == "__main__":
    main()
