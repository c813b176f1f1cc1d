"""What one environment saves, another loads: every form of a conversion, by each way to save it.

python -m benchmarks.saved_across PYTHON PYTHON [--forms lite,tied]

The pythons are those of two environments with the package, of two versions of torch, say. Each saves all forms of
tests/forms.py with mHC weights that are not the initial ones: as a `state_dict`, as a whole model (pickle), as the file
that `source` writes with its weights, and one model of transformers with `save_pretrained`. The other one loads them,
and its outputs are compared with what was saved beside them. The result goes into benchmarks/results/saved_across.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_compile import load, source

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "saved_across.json"
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest output
DIRECTORY = "save_pretrained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="two interpreters")
    parser.add_argument("--forms", default="", help="names of tests/forms.py, separated by commas; all by default")
    parser.add_argument("--step", choices=("save", "load"), help="one side, in the folder that PYTHON names then")
    options = parser.parse_args()
    sys.path.append(str(ROOT / "tests"))
    if options.step:
        folder = Path(options.pythons[0])
        (save_all if options.step == "save" else load_all)(folder, chosen(options.forms))
        return
    if len(options.pythons) != 2:
        parser.error(f"{len(options.pythons)} interpreters; legal: two")
    results = []
    for saving, loading in (options.pythons, options.pythons[::-1]):
        with tempfile.TemporaryDirectory() as folder:
            for step, python in (("save", saving), ("load", loading)):
                command = [python, "-m", "benchmarks.saved_across", folder, "--step", step, "--forms", options.forms]
                subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
            results.append(json.loads((Path(folder) / "result.json").read_text(encoding="utf-8")))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
    RESULT.write_text(json.dumps({"machine": machine, "commit": commit.strip(), "runs": results}, indent=1) + "\n")
    sys.exit(1 if any(one["wrong"] for one in results) else 0)


def chosen(names: str) -> dict[str, Any]:
    """The forms of these names, or all, with the model of transformers."""
    from forms import FORMS, Form, pretrained

    every = {**FORMS, DIRECTORY: Form("model", dtype=torch.float32, model=pretrained)}
    return {name: form for name, form in every.items() if not names or name in names.split(",")}


def place(folder: Path, name: str) -> Path:
    """Where a form is saved."""
    return folder / "".join(letter if letter.isalnum() else "_" for letter in name)


@torch.no_grad()
def save_all(folder: Path, forms: dict[str, Any]) -> None:
    """Save every form in a folder of its own, with inputs and outputs."""
    for name, form in forms.items():
        model, x = form.convert(), form.inputs()
        where = place(folder, name)
        where.mkdir(parents=True)
        known = {"state": model.state_dict(), "output": flat(model(x))}
        torch.save(model, where / "model.pt")
        if name == DIRECTORY:
            model.save_pretrained(where / "directory")
        else:
            written = source(model, x)
            written.save(where / "rewritten.py")
            known["class"] = written.name
        torch.save(known, where / "state.pt")
    (folder / "versions.json").write_text(json.dumps(versions()), encoding="utf-8")


def load_all(folder: Path, forms: dict[str, Any]) -> None:
    """Load every form in each way, compare outputs, and write down the largest differences."""
    errors: dict[str, float] = {}
    wrong: list[str] = []
    count = 0
    for name, form in forms.items():
        where = place(folder, name)
        saved = torch.load(where / "state.pt", weights_only=True)
        expected = saved["output"]
        for way, run in ways(where, form, saved):
            count += 1
            try:
                error = float((flat(run()) - expected).abs().max() / expected.abs().max())
            except Exception as raised:
                wrong.append(f"{name}, {way}: {type(raised).__name__}: {str(raised)[:200]}")
                continue
            errors[way] = max(errors.get(way, 0.0), error)
            if not error <= LIMITS[form.dtype]:
                wrong.append(f"{name}, {way}: {error:.1e}")
    given = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    result = {"saved": given, "loaded": versions(), "tried": count, "wrong": wrong, "largest": errors}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    print(f"saved by {given}, loaded by {versions()}: {count} tried, {len(wrong)} wrong {wrong}")


def ways(where: Path, form: Any, saved: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of each way to load what is in a folder, and a call of what is loaded."""
    x, state = form.inputs(), saved["state"]

    def into_plain() -> Any:
        return load(state, form.plain(seed=1))(x)

    def into_converted() -> Any:
        model = form.convert(seed=1)
        model.load_state_dict(state)
        return model(x)

    def whole() -> Any:
        return torch.load(where / "model.pt", weights_only=False)(x)

    def written() -> Any:
        return run_written(where / "rewritten.py", saved["class"], state, x)

    def directory() -> Any:
        return load(where / "directory")(x)

    if form.config.n > 1:  # the state of one stream is the plain model's
        yield "load", into_plain
    yield from (("load_state_dict", into_converted), ("pickle", whole))
    yield ("save_pretrained", directory) if (where / "directory").exists() else ("source", written)


def run_written(path: Path, name: str, state: dict[str, Any], x: Tensor) -> Any:
    """The output of a class in a written file, with these weights."""
    names: dict[str, Any] = {"__name__": "written", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    model = names[name]()
    model.load_state_dict(state)
    return model(x)


def flat(output: Any) -> Tensor:
    """The first tensor of an output."""
    found: Tensor = output if isinstance(output, Tensor) else next(iter(output.values()))
    return found.detach().double()


def versions() -> dict[str, str]:
    """Of Python and torch."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
