"""The forms of a conversion, as data: what a site may be, each told by the options that make it.

A form joins by one entry of `FORMS`. `gaps` tells what no form exercises: a constraint of `CONSTRAINTS`, a coefficient
that may be fixed, an option of `MHCConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from graphs import randomize
from mhc_compile import ConfigError, MHCConfig, mhc_compile
from mhc_compile.config import INITS, PARTS
from mhc_compile.constraints import CONSTRAINTS

WIDTH, TOKENS = 4, 3


class Block(nn.Module):
    """Two residual sites; the first mixes tokens, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixer, self.mlp = nn.Linear(TOKENS, TOKENS), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x).transpose(-1, -2)).transpose(-1, -2)
        return x + torch.tanh(self.mlp(x))


class Plain(nn.Module):
    """Two blocks: four sites on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


def pretrained() -> nn.Module:
    """A GPT-2 of one layer, which is saved and loaded as models of transformers are; its inputs are token ids."""
    from transformers import GPT2Config, GPT2Model

    shape = dict(vocab_size=9, n_positions=TOKENS, n_embd=WIDTH, n_layer=1, n_head=2)
    ways = dict(bos_token_id=1, eos_token_id=2, use_cache=False, attn_implementation="eager")
    return GPT2Model(GPT2Config(**shape, **ways))


class Shared(nn.Module):
    """One block that is applied twice: four sites, or two that are applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


@dataclass(frozen=True, eq=False)
class Form:
    """Options of a conversion, the model and the dtype of its streams, and constraints of single sites.

    kind: forms of one kind are alternatives, and do not go together.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    model: Callable[[], nn.Module] = Plain
    site_constraints: Mapping[str, str] | None = None

    @property
    def config(self) -> MHCConfig:
        """The options, validated."""
        return MHCConfig(**{"n": 4, **self.options})

    def plain(self, seed: int = 0) -> nn.Module:
        """The model before its conversion."""
        torch.manual_seed(seed)
        return self.model().to(self.dtype).eval()

    def inputs(self) -> Tensor:
        """[2, tokens, width], or token ids [2, tokens]."""
        if self.model is pretrained:
            return torch.arange(2 * TOKENS).reshape(2, TOKENS)
        generator = torch.Generator().manual_seed(5)
        return torch.randn(2, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(self.dtype)

    def convert(self, backend: str = "eager", recompute: Any = None, seed: int = 0, **options: Any) -> nn.Module:
        """The converted model, with every mHC parameter moved off its initial value.

        options: in place of the form's own. With these the step-0 promise hides nothing: wrong and right differ.
        """
        model = self.plain(seed)
        given: dict[str, Any] = {"n": 4, **self.options, "backend": backend, **options}
        if self.site_constraints is not None:
            given.setdefault("site_constraints", self.site_constraints)
        mhc_compile(model, example_inputs=self.inputs(), recompute=recompute, **given)
        if given["n"] > 1:
            randomize(model, scale=0.5)
        return model


def legal(**options: Any) -> bool:
    """The options make a conversion."""
    try:
        MHCConfig(**options)
    except ConfigError:
        return False
    return True


def _fixed() -> Iterator[tuple[str, Form]]:
    """Each coefficient that may be fixed, alone and in pairs, with the first constraint that takes it."""
    for count in (1, 2):
        for parts in combinations(PARTS, count):
            constraint = next((name for name in CONSTRAINTS if legal(constraint=name, fixed=parts)), None)
            if constraint is not None:
                yield f"{' and '.join(parts)} fixed", Form("fixed", {"fixed": parts, "constraint": constraint})


# Of each option that decides what weights compute, and of the others but `backend`, which is a door's.
FORMS: dict[str, Form] = {
    **{name: Form("constraint", {"constraint": name}) for name in CONSTRAINTS},
    **dict(_fixed()),
    "static": Form("dynamic", {"dynamic": False}),
    "single pass": Form("single_pass", {"single_pass": True}),
    "tied": Form("tie_shared", {"tie_shared": True}, model=Shared),
    "shared": Form("tie_shared", {"tie_shared": False}, model=Shared),
    **{f"n = {n}": Form("n", {"n": n}) for n in (1, 2, 3, 8)},
    "lite, n = 5": Form("n", {"n": 5, "constraint": "lite"}),
    "iterations": Form("iterations", {"iterations": 3}),
    "eps": Form("eps", {"eps": 0.25}),
    "implicit gradient": Form("implicit_gradient", {"implicit_gradient": True}),
    "paper": Form("init", {"init": "paper"}),
    "deepseek_v4": Form("init", {"init": "deepseek_v4"}),
    "some sites": Form("site_constraints", site_constraints={"*.0": "lite", "*.mlp": "orthogonal"}),
    "float32": Form("dtype", dtype=torch.float32),
    "bfloat16": Form("dtype", dtype=torch.bfloat16),
}


def gaps() -> list[str]:
    """What no form exercises; empty."""
    used: dict[str, set[Any]] = {one.name: set() for one in fields(MHCConfig)}
    for form in FORMS.values():
        for name in used:
            used[name].add(getattr(form.config, name))
    needed: dict[str, set[Any]] = {
        "constraint": {*CONSTRAINTS},
        "init": {*INITS},
        "fixed": {parts for count in (0, 1, 2) for parts in combinations(PARTS, count) if _takes(parts)},
    }
    found = [f"{name}={value!r}" for name, values in needed.items() for value in sorted(values - used[name], key=repr)]
    return found + [f"another {name} than the default" for name in used if name != "backend" and len(used[name]) < 2]


def _takes(parts: tuple[str, ...]) -> bool:
    return any(legal(constraint=name, fixed=parts) for name in CONSTRAINTS)


def both(first: Form, second: Form) -> Form | None:
    """The form that is both; None where they are alternatives, or no conversion is both."""
    if first.kind == second.kind or (first.site_constraints and second.site_constraints):
        return None
    if any(first.options[name] != second.options[name] for name in first.options.keys() & second.options.keys()):
        return None
    options = {**first.options, **second.options}
    sites = first.site_constraints or second.site_constraints
    model = next((one.model for one in (first, second) if one.model is not Plain), Plain)
    if (sites is not None and model is not Plain) or not legal(**options):
        return None
    if sites is not None and not all(legal(**{**options, "constraint": one}) for one in sites.values()):
        return None
    dtype = next((one.dtype for one in (first, second) if one.dtype != torch.float64), torch.float64)
    return Form(f"{first.kind} and {second.kind}", options, dtype, model, sites)


def pairs() -> dict[str, Form]:
    """Every two forms that go together."""
    made = {f"{left} + {right}": both(FORMS[left], FORMS[right]) for left, right in combinations(FORMS, 2)}
    return {name: form for name, form in made.items() if form is not None}


# One other value than the default of each option that decides what weights compute.
OTHER: dict[str, Any] = {
    "n": 2,
    "constraint": "spectral",
    "iterations": 3,
    "eps": 0.25,
    "tie_shared": True,
    "fixed": ("pre",),
    "dynamic": False,
    "single_pass": True,
}
