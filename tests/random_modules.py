"""Random residual modules as Python source: for hypothesis, or by seed.

A module is a list of (kind, variant) blocks at one width, in one layout and dtype. `write` and `render` turn
it into the text of a `class M(nn.Module)` with `build()` and `inputs()`, so a failing case prints as code
that reproduces it; shrinking removes blocks and lowers variants. Each kind knows how many sites it adds and
whether it ends the trunk, by the conventions of `models.py`, so a case carries its own expected counts.

`make(seed)` gives one case, `cases()` a hypothesis strategy; `python tests/random_modules.py SEED` prints it.
"""

from __future__ import annotations

import hashlib
import linecache
import random
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn
from hypothesis import strategies as st

BATCH, SEQ, SIDE = 2, 5, 4
LAYOUTS = ("tokens", "flat", "signal", "image")  # [B, S, C], [T, C], [B, C, S], [B, C, H, W]
DTYPES = ("float32", "float64")
VARIANTS = 12

Block = tuple[str, int]  # kind, variant


@dataclass(frozen=True)
class Spec:
    """What a random module is made of."""

    blocks: tuple[Block, ...]
    layout: str = "tokens"
    width: int = 4
    dtype: str = "float32"
    stem: bool = False


@dataclass(frozen=True, repr=False)
class Case:
    """One module: its source, how to make it and its inputs, and what a finder should find."""

    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    sites: int
    trunks: int
    exact: bool  # no bf16 section: float32 comparisons make sense

    def __repr__(self) -> str:
        return f"# {self.sites} sites, {self.trunks} trunks\n{self.source}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"\n{self!r}")  # what hypothesis prints of a failure


@dataclass
class Writer:
    """Collects the lines of `__init__` and `forward`, and counts."""

    spec: Spec
    width: int
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    counter: int = 0
    sites: list[int] = field(default_factory=lambda: [0])
    second: int = 0  # sites of the second trunk
    saved: str = ""
    exact: bool = True

    def name(self) -> str:
        self.counter += 1
        return f"{self.counter}"

    def module(self, expression: str) -> str:
        """A submodule; returns how `forward` calls it."""
        name = f"m{self.name()}"
        self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def parameter(self, expression: str) -> str:
        name = f"p{self.name()}"
        self.init.append(f"self.{name} = nn.Parameter({expression})")
        return f"self.{name}"

    def add(self, *lines: str) -> None:
        self.body.extend(lines)

    def let(self, expression: str) -> str:
        """A new variable of `forward`."""
        name = f"h{self.name()}"
        self.add(f"{name} = {expression}")
        return name

    def site(self, count: int = 1) -> None:
        self.sites[-1] += count

    def end_trunk(self) -> None:
        self.sites.append(0)
        self.saved = ""

    @property
    def channels_first(self) -> bool:
        return self.spec.layout in ("signal", "image")

    @property
    def positions(self) -> str:
        """The dimensions of the positions of one sample, for pooling."""
        return {"tokens": "1", "signal": "2", "image": "(2, 3)", "flat": "0"}[self.spec.layout]

    def vector(self, expression: str) -> str:
        """A [C] parameter, shaped to be broadcast over the layout."""
        tail = {"signal": "[:, None]", "image": "[:, None, None]"}.get(self.spec.layout, "")
        return expression + tail

    def linear(self, width: int, out: int) -> str:
        """A learned map of the features in the layout at hand."""
        if self.spec.layout == "signal":
            return self.module(f"nn.Conv1d({width}, {out}, 1)")
        if self.spec.layout == "image":
            return self.module(f"nn.Conv2d({width}, {out}, 1)")
        return self.module(f"nn.Linear({width}, {out})")

    def norm(self, width: int) -> str:
        if self.channels_first:
            return self.module(f"nn.GroupNorm(1, {width})")
        return self.module(f"nn.LayerNorm({width})")

    def trunk_norm(self) -> str:
        """A norm over the features alone, whichever axis they are on."""
        norm = self.module(f"nn.LayerNorm({self.width})")
        return f"{norm}(x.movedim(1, -1)).movedim(-1, 1)" if self.channels_first else f"{norm}(x)"


# --------------------------------------------------------------------------------------- branches


def mlp(w: Writer, x: str, width: int) -> str:
    up, down = w.linear(width, width + 3), w.linear(width + 3, width)
    return w.let(f"{down}(F.gelu({up}({w.norm(width)}({x}))))")


def plain(w: Writer, x: str, width: int) -> str:
    """No norm before the learned op."""
    return w.let(f"torch.tanh({w.linear(width, width)}({x}))")


def mixing(w: Writer, x: str, width: int) -> str:
    """Mixes positions: attention, a transposed linear, or a convolution."""
    normed = w.let(f"{w.norm(width)}({x})")
    if w.spec.layout == "signal":
        conv = w.module(f"nn.Conv1d({width}, {width}, 3, padding=1)")
        return w.let(f"{conv}({normed})")
    if w.spec.layout == "image":
        conv = w.module(f"nn.Conv2d({width}, {width}, 3, padding=1, groups={width})")
        last = w.module(f"nn.Linear({width}, {width})")
        return w.let(f"{last}(F.silu({conv}({normed})).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)")
    q, k, v = (w.let(f"{w.linear(width, width)}({normed})") for _ in range(3))
    scores = w.let(f"({q} @ {k}.transpose(-1, -2) / {width} ** 0.5).softmax(-1)")
    return w.let(f"{w.linear(width, width)}({scores} @ {v})")


def gated(w: Writer, x: str, width: int) -> str:
    normed = w.let(f"{w.norm(width)}({x})")
    a, b, c = (w.linear(width, width) for _ in range(3))
    return w.let(f"{c}(F.silu({a}({normed})) * {b}({normed}))")


def post(w: Writer, x: str, width: int) -> str:
    """The norm comes after the learned op and belongs to the branch."""
    return w.let(f"0.5 * {w.norm(width)}({w.linear(width, width)}(F.silu({x})))")


def context(w: Writer, x: str, width: int) -> str:
    """One vector for all positions, broadcast."""
    normed = w.let(f"{w.norm(width)}({x})")
    return w.let(f"{w.linear(width, width)}({normed}.mean({w.positions}, keepdim=True))")


BRANCHES = (mlp, plain, mixing, gated, post, context)


def branch(w: Writer, x: str, variant: int, width: int | None = None) -> str:
    return BRANCHES[variant % len(BRANCHES)](w, x, width or w.width)


# ----------------------------------------------------------------------------- adds that are no merge


def gelu_new(w: Writer, h: str) -> str:
    return w.let(f"0.5 * {h} * (1.0 + torch.tanh(0.79788456 * ({h} + 0.044715 * {h}.pow(3))))")


def local_skip(w: Writer, h: str) -> str:
    return w.let(f"{h} * torch.sigmoid({w.linear(w.width, w.width)}({h})) + {h}")


def rotary(w: Writer, h: str) -> str:
    """Halves rotated by position on the feature axis; an odd width keeps its last feature."""
    axis = 1 if w.channels_first else -1
    half = w.width // 2
    a, b = w.let(f"{h}.narrow({axis}, 0, {half})"), w.let(f"{h}.narrow({axis}, {half}, {half})")
    rest = f", {h}.narrow({axis}, {2 * half}, 1)" if w.width % 2 else ""
    turned = w.let(f"torch.cat([-{b}, {a}{rest}], {axis})")
    angle = w.let(f"torch.arange({w.width}, device={h}.device).to({h}.dtype)")
    return w.let(f"{h} * {w.vector(f'{angle}.cos()')} + {turned} * {w.vector(f'{angle}.sin()')}")


def biases(w: Writer, h: str) -> str:
    return w.let(f"{h} + {w.vector(w.parameter(f'torch.randn({w.width}) * 0.3'))}")


def adapter(w: Writer, h: str) -> str:
    """A nested residual at the same width behind the branch's first learned op."""
    return w.let(f"{h} + {w.linear(2, w.width)}(F.gelu({w.linear(w.width, 2)}({h})))")


def film(w: Writer, h: str) -> str:
    """Scale and shift by a condition that does not come from the trunk."""
    scale, shift = (w.vector(w.parameter(f"torch.randn({w.width}) * 0.3")) for _ in range(2))
    return w.let(f"{h} * {scale} + {h} + {shift}")


def side_value(w: Writer, h: str) -> str:
    size = f"h{w.name()}"
    w.add("with torch.no_grad():", f"    {size} = ({h} + {h}.tanh()).abs().mean()")
    return w.let(f"{h} / (1 + {size})")


DECOYS = (gelu_new, local_skip, rotary, biases, adapter, film, side_value)


# ------------------------------------------------------------------------------------------ blocks


def residual(w: Writer, variant: int) -> None:
    """`x + f(x)`."""
    w.add(f"x = x + {branch(w, 'x', variant)}")
    w.site()


SUMS = (
    "x = torch.add(x, {h}, alpha=0.3)",
    "x = x - {h}",
    "x = torch.sub(x, {h}, alpha=0.5)",
    "x = torch.addcmul(x, {h}, {gate}, value=0.7)",
    "{h} = {h} * 1.0\n{h} += x\nx = {h}",
    "x = x.clone()\nx.add_({h}, alpha=0.5)",
    "x = 0.9 * x + 0.4 * {h}",
    "x = {a} * x + {b} * {h}",
    "x = ({h} + x) * 0.8",
    "x = {h} - x",
    "x = x + {h} * {gate}",
    "x = (x + {h}) / 1.25",
)


def sum_form(w: Writer, variant: int) -> None:
    """The same merge through another operator; the branch does not depend on the form."""
    h = branch(w, "x", variant // 2)
    text = SUMS[variant % len(SUMS)]
    names = {"h": h}
    if "{gate}" in text:
        names["gate"] = w.vector(w.parameter(f"torch.rand({w.width})"))
    if "{a}" in text:
        names["a"], names["b"] = w.parameter("torch.tensor(0.9)"), w.parameter("torch.tensor(0.5)")
    if "- x" in text:
        w.saved = ""  # a long skip would cancel
    w.add(*text.format(**names).split("\n"))
    w.site()


def parallel(w: Writer, variant: int) -> None:
    """Two branches of one input: one merge, in four orders."""
    f, g = branch(w, "x", variant), branch(w, "x", variant + 1)
    orders = ("({f} + x) + {g}", "x + ({f} + {g})", "{f} + {g} + x", "x + {f} - {g}")
    w.add("x = " + orders[variant % 4].format(f=f, g=g))
    w.site()


def three_leaves(w: Writer, variant: int) -> None:
    """A learned vector in the same sum."""
    bias, h = w.vector(w.parameter(f"torch.randn({w.width}) * 0.3")), branch(w, "x", variant)
    orders = (f"x + {h} + {bias}", f"{bias} + x + {h}", f"x + ({h} + {bias})")
    w.add("x = " + orders[variant % 3])
    w.site()


def decoy(w: Writer, variant: int) -> None:
    """An add that is no merge inside the branch, between learned ops."""
    h = w.let(f"{w.linear(w.width, w.width)}({w.norm(w.width)}(x))")
    h = DECOYS[variant % len(DECOYS)](w, h)
    w.add(f"x = x + {w.linear(w.width, w.width)}({h})")
    w.site()


def highway(w: Writer, variant: int) -> None:
    gate = w.let(f"torch.sigmoid({w.linear(w.width, w.width)}(x))")
    h = branch(w, "x", variant)
    w.add(f"x = {gate} * {h} + (1 - {gate}) * x")
    w.site()


def nested(w: Writer, variant: int) -> None:
    """Residuals at another width inside the branch: only the outer one counts."""
    inner = 2 + variant % 3
    h = w.let(f"{w.linear(w.width, inner)}({w.norm(w.width)}(x))")
    for i in range(1 + variant % 2):
        h = w.let(f"{h} + {branch(w, h, variant + i, inner)}")
    w.add(f"x = x + {w.linear(inner, w.width)}({h})")
    w.site()


def shared(w: Writer, variant: int) -> None:
    """One branch applied two or three times."""
    norm, first = w.norm(w.width), w.linear(w.width, w.width)
    times = 2 + variant % 2
    w.add(f"for _ in range({times}):", f"    x = x + torch.tanh({first}({norm}(x)))")
    if variant % 3 == 2:
        w.add("    outs.append(x)")
    w.site(times)


def checkpointed(w: Writer, variant: int) -> None:
    """The residual inside a checkpoint wrapper."""
    part = Writer(w.spec, w.width, counter=w.counter + 100)
    residual(part, variant)
    w.init.extend(part.init)
    w.counter = part.counter
    name = f"block{w.name()}"
    w.methods.extend([f"def {name}(self, x):", *("    " + line for line in part.body), "    return x", ""])
    w.add(f"x = checkpoint(self.{name}, x, use_reentrant=False)")
    w.site()


def layout(w: Writer, variant: int) -> None:
    """Another layout of the trunk around a residual, and back."""
    if w.spec.layout == "tokens" and variant % 2:
        w.add("x = x.transpose(0, 1)")
        residual(w, variant // 2)
        w.add("x = x.transpose(0, 1)")
        return
    there, back = {
        "tokens": (f"x.reshape(-1, {w.width})", f"x.view({BATCH}, {SEQ}, {w.width})"),
        "flat": ("x.unsqueeze(0)", "x.squeeze(0)"),
        "signal": ("x.transpose(1, 2)", "x.transpose(1, 2)"),
        "image": ("x.permute(0, 2, 3, 1)", "x.permute(0, 3, 1, 2)"),
    }[w.spec.layout]
    up, down = (w.module(f"nn.Linear({w.width}, {w.width})") for _ in range(2))
    w.add(f"x = {there}", f"x = x + {down}(torch.tanh({up}(x)))", f"x = {back}")
    w.site()


TRUNK_OPS = (
    "x = x * 0.9",
    "x = F.dropout(x, 0.1, self.training)",
    "x = x.to(torch.float64).to(torch.{dtype})",
    "x = x + {vector}",
    "x = x.clone()\nx *= torch.arange(x.shape[-1]).ne(1).to(x.dtype)",
    "x = x.masked_fill(torch.arange(x.shape[-1]).eq(2), 0.0)",
    "x = x.to(torch.bfloat16).to(torch.{dtype})",
    "x = F.silu(x)",
    "x = torch.tanh(x) * 1.5",
    "x = F.relu(x + 0.5)",
    "x = {norm}",
    "x = x * (1 + {vector})",
)
LINEAR_OPS = 7  # the first ones: a long skip may cross them and is still plainly a long skip


def trunk_op(w: Writer, variant: int) -> None:
    """An op between the sites that the streams go through."""
    text = TRUNK_OPS[variant % len(TRUNK_OPS)]
    names = {"dtype": w.spec.dtype}
    if "{vector}" in text:
        names["vector"] = w.vector(w.parameter(f"torch.randn({w.width}) * 0.3"))
    if "{norm}" in text:
        names["norm"] = w.trunk_norm()
    if variant % len(TRUNK_OPS) >= LINEAR_OPS:
        w.saved = ""
    w.exact = w.exact and "bfloat16" not in text
    w.add(*text.format(**names).split("\n"))


def half_branch(w: Writer, variant: int) -> None:
    """The branch runs in another float type than the trunk."""
    dtype = "bfloat16" if variant % 4 == 3 else "float64"
    w.exact = w.exact and dtype != "bfloat16"
    weight = w.parameter(f"torch.randn({w.width}, {w.width}) / {w.width}")
    axis = 1 if w.channels_first else -1
    h = w.let(f"x.movedim({axis}, -1).to(torch.{dtype}) @ {weight}.to(torch.{dtype})")
    w.add(f"x = x + torch.tanh({h}).to(x.dtype).movedim(-1, {axis})")
    w.site()


def autocast_off(w: Writer, variant: int) -> None:
    name = f"h{w.name()}"
    first, norm = w.linear(w.width, w.width), w.norm(w.width)
    w.add("with torch.autocast('cpu', enabled=False):", f"    {name} = torch.tanh({first}({norm}(x)))")
    w.add(f"x = x + {name}")
    w.site()


def tap(w: Writer, variant: int) -> None:
    """An extra output: the state, a head on it, or a statistic."""
    head = w.linear(w.width, 2) if variant % 3 == 1 else ""
    w.add("outs.append(" + ("x", f"{head}(x)", "x.square().mean()")[variant % 3] + ")")


def long_skip(w: Writer, variant: int) -> None:
    """The state is kept, or an older state of the same trunk is added: no site."""
    if w.saved:
        w.add(f"x = x + {w.saved}" if variant % 2 else f"x = torch.add({w.saved}, x, alpha=0.5)")
        w.saved = ""
    else:
        w.saved = w.let("x")


def cross(w: Writer, variant: int) -> None:
    """A site of a second trunk that reads the first, and mostly one of the first that reads the second."""
    a, b = w.width, second_width(w.spec)
    w.add(f"y = y + {w.linear(b, b)}({w.norm(b)}(y)) * torch.sigmoid({w.linear(a, b)}(x))")
    w.second += 1
    if variant % 3:
        w.add(f"x = x + {w.linear(a, a)}({w.norm(a)}(x)) * torch.sigmoid({w.linear(b, a)}(y))")
        w.site()


def projected(w: Writer, variant: int) -> None:
    """A projected shortcut: a plain add of another width, a new trunk."""
    out = 3 + (w.width + variant) % 22
    h = w.let(f"{w.linear(w.width, out)}({branch(w, 'x', variant)})")
    w.add(f"x = {w.linear(w.width, out)}(x) + {h}")
    w.end_trunk()
    w.width = out


def concatenated(w: Writer, variant: int) -> None:
    """A concatenated shortcut with a learned join: a new trunk."""
    axis = 1 if w.channels_first else -1
    h = branch(w, "x", variant % 5)  # not the broadcast one
    w.add(f"x = {w.linear(2 * w.width, w.width)}(torch.cat([x, {h}], {axis}))")
    w.end_trunk()


def batch_norm(w: Writer, variant: int) -> None:
    """Running statistics on the trunk end it; tokens get a learned projection instead."""
    kind = {"signal": "BatchNorm1d", "image": "BatchNorm2d", "flat": "BatchNorm1d"}.get(w.spec.layout)
    w.add(f"x = {w.module(f'nn.{kind}({w.width})') if kind else w.linear(w.width, w.width)}(x)")
    w.end_trunk()


KINDS: dict[str, Callable[[Writer, int], None]] = {
    "residual": residual,  # the simplest first: shrinking goes that way
    "sum_form": sum_form,
    "parallel": parallel,
    "three_leaves": three_leaves,
    "trunk_op": trunk_op,
    "tap": tap,
    "layout": layout,
    "decoy": decoy,
    "highway": highway,
    "nested": nested,
    "shared": shared,
    "long_skip": long_skip,
    "half_branch": half_branch,
    "autocast_off": autocast_off,
    "checkpointed": checkpointed,
    "cross": cross,
    "projected": projected,
    "concatenated": concatenated,
    "batch_norm": batch_norm,
}


# --------------------------------------------------------------------------------- source and module

TEMPLATE = """\
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class M(nn.Module):
    def __init__(self):
        super().__init__()
{init}

{methods}\
    def forward(self, {names}):
        outs = []
{body}


def build():
    torch.manual_seed(0)
    return M().to(torch.{dtype}).eval()


def inputs():
    torch.manual_seed(1)
    return ({tensors},)
"""


def second_width(spec: Spec) -> int:
    return 2 + spec.width % 5


def shape(spec: Spec, width: int) -> tuple[int, ...]:
    return {
        "tokens": (BATCH, SEQ, width),
        "flat": (BATCH * SEQ, width),
        "signal": (BATCH, width, SEQ),
        "image": (BATCH, width, SIDE, SIDE),
    }[spec.layout]


def write(spec: Spec) -> Writer:
    w = Writer(spec, spec.width)
    if spec.stem:
        w.add(f"x = {w.linear(spec.width, spec.width)}(x)")
    for kind, variant in spec.blocks:
        KINDS[kind](w, variant)
    w.add(f"outs.insert(0, {w.linear(w.width, 3)}(torch.tanh(x)))")
    if w.second:
        w.add("outs.append(y)")
    w.add("return tuple(outs)")
    return w


def render(w: Writer) -> str:
    """The module as a Python file."""
    widths = [w.spec.width, second_width(w.spec)] if w.second else [w.spec.width]
    sizes = [shape(w.spec, width) for width in widths]
    return TEMPLATE.format(
        init="\n".join("        " + line for line in w.init),
        methods="".join(f"    {line}\n" if line else "\n" for line in w.methods),
        body="\n".join("        " + line for line in w.body),
        dtype=w.spec.dtype,
        names="x, y" if w.second else "x",
        tensors=", ".join(f"torch.randn{size}.to(torch.{w.spec.dtype})" for size in sizes),
    )


def load(source: str) -> types.ModuleType:
    """The source as an imported module, so that tracebacks, pickling and tracing find it."""
    name = "random_module_" + hashlib.sha256(source.encode()).hexdigest()[:12]
    if name in sys.modules:
        return sys.modules[name]
    made = types.ModuleType(name)
    made.__file__ = f"<{name}>"
    linecache.cache[made.__file__] = (len(source), None, source.splitlines(True), made.__file__)
    sys.modules[name] = made
    exec(compile(source, made.__file__, "exec"), made.__dict__)
    return made


def case(spec: Spec) -> Case:
    w = write(spec)
    source = render(w)
    module = load(source)
    counts = [count for count in [*w.sites, w.second] if count]
    return Case(source, module.build, module.inputs, sum(counts), len(counts), w.exact)


def make(seed: int) -> Case:
    """The module of a seed."""
    r = random.Random(seed)
    blocks = tuple((r.choice(list(KINDS)), r.randrange(VARIANTS)) for _ in range(r.randint(1, 8)))
    return case(
        Spec(
            blocks,
            layout=r.choice(("tokens", *LAYOUTS)),
            width=r.randint(3, 24),
            dtype=r.choice((*["float32"] * 4, "float64")),
            stem=r.random() < 0.5,
        )
    )


def specs(max_blocks: int = 7, kinds: tuple[str, ...] = tuple(KINDS)) -> st.SearchStrategy[Spec]:
    block = st.tuples(st.sampled_from(kinds), st.integers(0, VARIANTS - 1))
    return st.builds(
        Spec,
        blocks=st.lists(block, min_size=1, max_size=max_blocks).map(tuple),
        layout=st.sampled_from(LAYOUTS),
        width=st.integers(3, 24),
        dtype=st.sampled_from(DTYPES),
        stem=st.booleans(),
    )


def cases(max_blocks: int = 7, kinds: tuple[str, ...] = tuple(KINDS)) -> st.SearchStrategy[Case]:
    """Hypothesis strategy: shrinking removes blocks and simplifies the rest; a failure prints its source."""

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        return case(draw(specs(max_blocks, kinds)))

    return draw_case()


if __name__ == "__main__":
    print(make(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
