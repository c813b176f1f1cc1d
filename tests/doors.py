"""The doors of a converted model, as functions: each runs a form in its own way and gives outputs and gradients.

A door joins by one entry of `DOORS`; `uncovered` tells the public functions that no door goes through.
"""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import forms
import mhc_compile as package
from forms import Form
from graphs import Result, gradient_error, output_error, result_of
from mhc_compile import Backend, export_onnx, load, partition, recompute, source, stage_modules, trace
from mhc_compile.codegen.source_check import module_of
from mhc_compile.config import BACKENDS
from mhc_compile.conversion import attach, conversion


class Case:
    """A form, converted once: the model under eager, its weights, its inputs, and what level 1 gives for them."""

    def __init__(self, form: Form) -> None:
        self.form, self.model, self.x = form, form.convert(), form.inputs()
        self.state = self.model.state_dict()

    @cached_property
    def expected(self) -> Result:
        """Outputs and gradients of the ops of the paper's terms, one after the other, without a compiler."""
        run = conversion(self.model).compiled(self.model, "eager", level=1)
        return self.result(lambda x: run(self.model, x)[1], dict(self.model.named_parameters()))

    @cached_property
    def plain(self) -> Tensor:
        """What the model gave before its conversion."""
        with torch.no_grad():
            made: Tensor = self.form.plain()(self.x)
        return made

    def result(self, call: Callable[[Tensor], Any], parameters: Mapping[str, Tensor]) -> Result:
        """Outputs of a call, and gradients of its input and of parameters by the model's names."""
        x = self.x.clone().requires_grad_(self.x.is_floating_point())
        return result_of(lambda: call(x), {**({"the input": x} if x.requires_grad else {}), **parameters})

    def of(self, module: nn.Module, call: Callable[[Tensor], Any] | None = None) -> Result:
        """The result of a module that names its parameters as the model does."""
        names = {name.replace("/", "."): one for name, one in module.named_parameters()}
        own = {name: names[name] for name, _ in self.model.named_parameters()}
        return self.result(module if call is None else call, own)

    def again(self, backend: str) -> nn.Module:
        """A fresh model with the same weights, converted as their record says, under another backend."""
        record = conversion(self.model).record
        model = self.form.plain(seed=1)
        attach(model, replace(record, config=replace(record.config, backend=backend)))
        model.load_state_dict(self.state)
        return model


def call(case: Case, backend: str) -> Result:
    """The model, as it is called."""
    return case.of(case.again(backend))


def replayed(case: Case, backend: str, choice: Any) -> Result:
    """The model, whose backward computes its mHC ops again."""
    return case.of(recompute(case.again(backend), choice))


def traced(case: Case) -> Result:
    """The module of the rewritten graph."""
    return case.of(trace(case.model, case.x))


def traced_and_exported(case: Case) -> Result:
    """That module through torch.export."""
    return case.of(torch.export.export(trace(case.model, case.x), (case.x,)).module())


def _written(case: Case) -> nn.Module:
    made = source(case.model, case.x)
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "written.py")
        code = (Path(folder) / "written.py").read_text(encoding="utf-8")
    module: nn.Module = module_of(code, made.constants, made.name)()
    module.load_state_dict(case.state)
    return module


def written(case: Case) -> Result:
    """The Python file, executed in a fresh module, with the weights of the model."""
    return case.of(_written(case))


def written_and_fused(case: Case) -> Result:
    """The module of the Python file under `backend="mhc"`, which warns where it finds no mHC to fuse."""
    module = _written(case)
    return case.of(module, torch.compile(module, backend="mhc" if case.form.config.n > 1 else "inductor"))


class NotRun(package.MHCError):
    """What runs a file has no implementation of one of its ops."""


def onnx(case: Case) -> Result:
    """The ONNX file in onnxruntime; outputs alone."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(case.model, case.x, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            session = onnxruntime.InferenceSession(str(path), options)
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            raise NotRun(str(error)) from error
        outputs = session.run(None, {session.get_inputs()[0].name: case.x.numpy()})
    return Result([torch.as_tensor(one) for one in outputs], {})


def loaded(case: Case) -> Result:
    """The state_dict, loaded into a plain model of other weights."""
    return case.of(load(case.state, case.form.plain(seed=1)).eval())


def copied(case: Case) -> Result:
    """A deep copy."""
    return case.of(copy.deepcopy(case.model))


def pickled(case: Case) -> Result:
    """A pickle."""
    return case.of(pickle.loads(pickle.dumps(case.model)))


def saved_and_loaded(case: Case) -> Result:
    """`save_pretrained` and `load`."""
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        return case.of(load(folder, dtype=case.form.dtype, attn_implementation="eager").eval())


def in_stages(case: Case, backend: str) -> Result:
    """Two stages of a pipeline, one after the other."""
    plan = partition(case.model, case.x, stages=2, microbatches=2)
    stages = stage_modules(plan, case.model, case.x, tied="reduce", backend=backend)

    def run(x: Tensor) -> Any:
        value: Any = (x,)
        for stage in stages:
            value = stage(*value)
            value = value if isinstance(value, tuple) else (value,)
        return value

    return case.result(run, dict(case.model.named_parameters()))


def owned(case: Case, backend: str) -> Result:
    """A plain model under `torch.compile` with a `Backend` that has the weights of sites."""
    plain = case.form.plain()
    config = replace(case.form.config, backend=backend)
    owner = Backend(config=config, site_constraints=case.form.site_constraints)
    run = torch.compile(plain, backend=owner, fullgraph=True)
    run(case.x.clone().requires_grad_())
    owner.load_state_dict(case.state)
    own = {**dict(plain.named_parameters()), **dict(owner.named_parameters())}
    return case.result(run, {name: own[name] for name, _ in case.model.named_parameters()})


@dataclass(frozen=True)
class Door:
    """A way to run a form. run: as the functions above. pretrained: it is for models of transformers, and tried on one.

    covers: names of the public functions that it goes through.
    """

    run: Callable[[Case], Result]
    covers: tuple[str, ...] = ()
    pretrained: bool = False

    def case(self, form: Form) -> Case:
        """What it is run on."""
        return _case(replace(form, model=forms.pretrained) if self.pretrained else form)


@lru_cache(maxsize=4)
def _case(form: Form) -> Case:
    return Case(form)


DOORS: dict[str, Door] = {
    **{backend: Door(partial(call, backend=backend), ("mhc_compile",)) for backend in BACKENDS},
    **{
        f"recompute {choice}, {backend}": Door(partial(replayed, backend=backend, choice=choice), ("recompute",))
        for backend in BACKENDS
        for choice in ("auto", 1, 2)
    },
    "trace": Door(traced, ("trace",)),
    "trace, torch.export": Door(traced_and_exported, ("trace",)),
    "source": Door(written, ("source",)),
    "source, mhc": Door(written_and_fused, ("source",)),
    "onnx": Door(onnx, ("export_onnx",)),
    "load": Door(loaded, ("load",)),
    "deepcopy": Door(copied),
    "pickle": Door(pickled),
    "save_pretrained": Door(saved_and_loaded, ("load",), pretrained=True),
    **{
        f"stages, {backend}": Door(partial(in_stages, backend=backend), ("partition", "stage_modules"))
        for backend in BACKENDS
    },
    **{f"Backend, {backend}": Door(partial(owned, backend=backend), ("Backend",)) for backend in BACKENDS},
}

# Public names that are no door: what they are instead.
NO_DOOR: dict[str, str] = {
    **dict.fromkeys(
        ("MHCError", "CaptureError", "ConfigError", "ExportError", "PartitionError", "RewriteError", "ShapeError"),
        "an error",
    ),
    "StabilityWarning": "a warning",
    **dict.fromkeys(("MHCConfig", "HyperConnection", "Plan", "Source"), "what a door takes or gives"),
    **dict.fromkeys(("composite_gains", "gain", "cost_model"), "a number about matrices or costs"),
    **dict.fromkeys(("AdaptiveClip", "Monitor", "observe", "scale_updates", "param_groups"), "looks at a training"),
    **dict.fromkeys(("draw", "explain", "history", "verify"), "looks at a model"),
    "restore": "takes the form away",
    "set_iterations": "another form: test_manifolds.py compares it with a conversion of that form",
    "high_priority_merges": "needs a CUDA device: test_priority.py",
    **dict.fromkeys(("pipeline_schedule", "pipeline_stages"), "needs processes: test_pipeline.py runs stages of forms"),
}


def uncovered() -> list[str]:
    """Public names that are neither a door's nor told to be none; and names told that are not public."""
    told = {name for door in DOORS.values() for name in door.covers} | NO_DOOR.keys()
    return sorted(told ^ {*package.__all__})


# -------------------------------------------------------------------------------------------------- refusals


@dataclass(frozen=True)
class Refusal:
    """What does not go together, and why. door: the first word of its name. words: the message, see `said`.

    why: the limit, of torch, of ONNX or of the mathematics, that the words name.
    """

    door: str
    form: Callable[[Form], bool]
    words: str
    why: str


_ONE_STREAM = "one stream is the plain add, and its state that of the plain model: there is nothing to convert by"
REFUSALS: list[Refusal] = [
    Refusal(
        "onnx",
        lambda form: form.dtype == torch.bfloat16,
        "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for MatMul(13)",
        "onnxruntime multiplies no bfloat16 matrices on a CPU",
    ),
    Refusal(
        "load",
        lambda form: form.config.n == 1,
        "checkpoint is with keys ... and without mhc._extra_state; legal: the state_dict of a converted model. "
        "Next: load weights of a plain model before the call of mhc_compile",
        _ONE_STREAM,
    ),
    Refusal(
        "save_pretrained",
        lambda form: form.config.n == 1,
        "config.json is that of a plain model; legal: one that a converted model saved. "
        "Next: load a plain model with from_pretrained, then call mhc_compile",
        _ONE_STREAM,
    ),
]


def said(error: package.MHCError) -> str:
    """The words of an error, without its source line, the folder and the names that belong to one model."""
    words = str(error).partition("\n  at ")[0]
    for names in (r"(?<=with keys ).*?(?=\.\.\. and)", r"\S*/(?=config\.json)", r" node with name '\w+'$"):
        words = re.sub(names, "", words)
    return words


def refusal(form: Form, door: str) -> str | None:
    """The words with which a door refuses a form; None where it has to take it."""
    fitting = (one for one in REFUSALS if re.split(r"[ ,]", door)[0] == one.door and one.form(form))
    return next((one.words for one in fitting), None)


# -------------------------------------------------------------------------------------------------- the product

# Of the largest value of an output, or of a gradient (or of 1e-2 of the largest gradient), see `graphs`. The largest
# seen in float64 is 2e-12, in onnxruntime: 20 squarings of `spectral` in another order of sums.
OUTPUTS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2}
GRADIENTS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Outcome:
    """What came of a form through a door: `equal`, `refused` as expected, or `wrong`; the errors, or the words."""

    status: str
    outputs: float = 0.0
    gradients: float = 0.0
    words: str = ""


def outcome(form: Form, name: str) -> Outcome:
    """Run a form through a door and compare it with level 1, or with the refusal that is expected."""
    door, expected = DOORS[name], refusal(form, name)
    case = door.case(form)
    try:
        actual = door.run(case)
    except package.MHCError as error:
        words = said(error)
        return Outcome("refused" if words == expected else "wrong", words=words)
    if expected is not None:
        return Outcome("wrong", words=f"taken, where a refusal is expected: {expected}")
    outputs = output_error(case.expected, actual)
    gradients, worst = gradient_error(case.expected, actual) if actual.gradients else (0.0, "")
    same = outputs <= OUTPUTS[form.dtype] and gradients <= GRADIENTS[form.dtype]
    return Outcome("equal" if same else "wrong", outputs, gradients, "" if same else worst)


def fitting(form: Form, name: str) -> bool:
    """The form is one of what the door is run on: its model may be another."""
    return not DOORS[name].pretrained or form.model is forms.Plain


def sample() -> list[tuple[str, str]]:
    """Form and door: every form goes through two doors, which take turns; every dear door has one form, in turn too.

    Dear are those that compile with inductor, and those for models of transformers.
    """
    dear = [name for name, door in DOORS.items() if "inductor" in name or "mhc" in name or door.pretrained]
    cheap, known = [name for name in DOORS if name not in dear], list(forms.FORMS)
    made = [(form, cheap[(2 * place + step) % len(cheap)]) for place, form in enumerate(known) for step in range(2)]
    able = {name: [form for form in known if fitting(forms.FORMS[form], name)] for name in dear}
    made += [(able[name][3 * place % len(able[name])], name) for place, name in enumerate(dear)]
    return sorted(made, key=lambda one: known.index(one[0]))
