"""What a stream of high priority does for merges beside a busy stream: their latency, and the time of a training step.

python -m benchmarks.priority_merge [--rounds 20] [--seconds N] [--out FILE]
python -m benchmarks.priority_merge --dry          tiny, on a CPU, without streams: everything but figures

A second stream is kept busy meanwhile: by nothing, by large products (another microbatch), by copies (communication).
The merge is launched as usual, and on a stream of high priority, in turn; both must give the same bits. Latency is from
an event in front of the call to one behind it, on the stream that calls. A step is forward, loss and backward of a
decoder of Llama's shape, whose MLP sites have it or not; behind it stands the time until the busy stream was done too,
which is what the priority may cost the others. Medians; the file is saved after each row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.llama import Llama, Shape
from benchmarks.turns import environment, now, reason
from mhc_compile import high_priority_merges, mhc_compile
from mhc_compile.conversion import conversion
from mhc_compile.kernels import site_ops

mhc = torch.ops.mhc
N = 4
KINDS = "nothing", "products", "copies"
WAYS = {"usual": False, "high priority": True}
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The device and the sizes: of a merge, of the model, and of what keeps the second stream busy."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    features: int
    shape: Shape
    product: int  # rows and columns of a product
    copied: int  # bytes of a copy

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


REAL = Setting(
    torch.device("cuda"),
    torch.bfloat16,
    8192,
    2560,
    Shape(layers=4, width=2560, heads=20, hidden=6912, vocabulary=1024, batch=1, length=4096),
    8192,
    1 << 30,
)
DRY = Setting(
    torch.device("cpu"),
    torch.float32,
    6,
    8,
    Shape(layers=1, width=16, heads=2, hidden=24, vocabulary=20, batch=1, length=6),
    8,
    1 << 10,
)


# --- the second stream ------------------------------------------------------------------------------------


class Busy:
    """A stream of usual priority, and work for it that lasts as long as asked for."""

    def __init__(self, kind: str, setting: Setting) -> None:
        self.kind, self.setting = kind, setting
        self.stream = torch.cuda.Stream() if setting.on_gpu else None
        if kind == "products":
            a = torch.randn(setting.product, setting.product, device=setting.device, dtype=setting.dtype)
            made = torch.empty_like(a)
            self.work: Callable[[], Any] = lambda: torch.mm(a, a, out=made)
        elif kind == "copies":
            source = torch.empty(setting.copied, device=setting.device, dtype=torch.uint8)
            target = torch.empty_like(source)
            self.work = lambda: target.copy_(source)
        else:
            self.work = lambda: None
        for _ in range(3):
            self.work()
        start = now()
        for _ in range(5):
            self.work()
        self.each = max((now() - start) / 5, 1e-6)

    @contextmanager
    def around(self, seconds: float) -> Iterator[Callable[[], bool]]:
        """Queue work for so long; gives a function that says whether it is still going on."""
        done = torch.cuda.Event() if self.setting.on_gpu else None
        if self.stream is not None and done is not None and self.kind != "nothing":
            with torch.cuda.stream(self.stream):
                for _ in range(max(2, int(seconds / self.each))):
                    self.work()
                done.record()
        yield lambda: done is not None and self.kind != "nothing" and not done.query()
        now()


# --- latency ----------------------------------------------------------------------------------------------


def merges(setting: Setting) -> dict[str, Callable[[bool], list[Tensor]]]:
    """The merge of a site by itself and fused with the read behind it, and both backward."""

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=setting.device, dtype=dtype)

    torch.manual_seed(0)
    tokens, features, columns = setting.tokens, setting.features, N * N + 2 * N
    x, f = random(tokens, N, features, dtype=setting.dtype), random(tokens, features, dtype=setting.dtype)
    parameters = 0.02 * random(N * features, columns), random(3), random(columns)
    _, _, post, res, carrier = site_ops.read(x, *parameters, 1e-6, 20)
    given = x.clone().requires_grad_(), f.clone().requires_grad_()
    grad = random(tokens, N, features, dtype=setting.dtype)

    def forward(high: bool) -> list[Tensor]:
        return [mhc.merge_carried(x, f, carrier, post, res, high_priority=high)]

    def fused(high: bool) -> list[Tensor]:
        merging = (x, f, carrier, None, post, res, False, False)
        return list(mhc.merge_read(*merging, *parameters, 1e-6, 20, high_priority=high)[:5])

    graphs = {high: mhc.merge_carried(*given, carrier, post, res, high_priority=high) for high in (False, True)}

    def backward(high: bool) -> list[Tensor]:
        return list(torch.autograd.grad(graphs[high], given[1:], grad, retain_graph=True))

    return {"merge": forward, "merge and read": fused, "backward of a merge": backward}


def latency(call: Callable[[], Any], busy: Busy, expected: float) -> tuple[float, bool]:
    """Microseconds of one call beside the busy stream, and whether that was still busy behind it."""
    if not busy.setting.on_gpu:
        start = now()
        call()
        return 1e6 * (now() - start), False
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with busy.around(20 * expected + 4 * busy.each) as going_on:
        first.record()
        call()
        last.record()
        last.synchronize()
        beside = going_on()
    return 1e3 * first.elapsed_time(last), beside


def latencies(setting: Setting, rounds: int, results: Results) -> None:
    """Of each op, beside each kind of work."""
    beside = {kind: Busy(kind, setting) for kind in KINDS}
    for op, call in merges(setting).items():
        bits = {way: call(high) for way, high in WAYS.items()}
        if not all(map(torch.equal, *bits.values())):
            results.note("latencies", op, reason="the two ways give other bits")
            continue
        usual = latency(partial(call, False), beside["nothing"], 0.0)[0] / 1e6
        for kind, busy in beside.items():
            if results.is_over("latencies", f"{op}, beside {kind}"):
                continue
            times = {way: list[tuple[float, bool]]() for way in WAYS}
            for _ in range(rounds):
                for way, high in WAYS.items():
                    times[way].append(latency(partial(call, high), busy, usual))
            found = {way: summary(one) for way, one in times.items()}
            results.note("latencies", f"{op}, beside {kind}", **found, ratio=ratio(found, "us"))


def summary(times: list[tuple[float, bool]]) -> Row:
    """beside: the share of calls behind which the other stream was still busy, as it has to be."""
    micros = [time for time, _ in times]
    high = quantiles(micros, n=10)[-1] if len(micros) > 1 else micros[0]
    beside = sum(going_on for _, going_on in times) / len(times)
    return {"us": round(median(micros), 2), "high_us": round(high, 2), "beside": round(beside, 2)}


# --- steps ------------------------------------------------------------------------------------------------


class Model:
    """A converted decoder whose streams differ, and a step of it."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        with torch.device(setting.device):
            plain = Llama(setting.shape).to(setting.dtype)
        self.ids = torch.randint(setting.shape.vocabulary, (setting.shape.batch, setting.shape.length))
        self.ids = self.ids.to(setting.device)
        self.setting = setting
        self.model: nn.Module = mhc_compile(plain, N, example_inputs=(self.ids,), backend="eager")
        with torch.no_grad():
            for parameter in self.model.mhc.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        names = [site.name for site in conversion(self.model).record.sites]
        self.of_mlps = frozenset(names[1::2])  # attention and MLP take turns

    def prioritize(self, high: bool) -> None:
        """The MLP sites, as the paper does."""
        if self.setting.on_gpu:
            high_priority_merges(self.model, (lambda site: site.name in self.of_mlps) if high else None)
        else:  # which has no streams, and would be refused
            conversion(self.model).high_priority = self.of_mlps if high else frozenset()
            conversion(self.model).forget_compiled()
        self.step()

    def step(self) -> list[Tensor]:
        self.model.zero_grad()
        logits = self.model(self.ids)
        F.cross_entropy(logits.flatten(0, 1).float(), self.ids.flatten()).backward()
        return [logits.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)]


def steps(setting: Setting, rounds: int, results: Results) -> None:
    """Two models, the same but for the priority, take steps in turn."""
    models = {way: Model(setting) for way in WAYS}
    for way, model in models.items():
        model.prioritize(WAYS[way])
    if not all(map(torch.equal, *(model.step() for model in models.values()))):
        results.note("steps", "all", reason="the two ways give other bits")
        return
    start = now()
    models["usual"].step()
    usual = now() - start
    for kind in KINDS:
        if results.is_over("steps", f"beside {kind}"):
            continue
        busy, times = Busy(kind, setting), {way: list[tuple[float, float]]() for way in WAYS}
        for _ in range(rounds):
            for way, model in models.items():
                times[way].append(timed(model, busy, usual))
        found = {
            way: {"ms": round(median(one for one, _ in pairs), 3), "both_ms": round(median(two for _, two in pairs), 3)}
            for way, pairs in times.items()
        }
        results.note("steps", f"beside {kind}", **found, ratio=ratio(found, "ms"))


def timed(model: Model, busy: Busy, usual: float) -> tuple[float, float]:
    """Milliseconds of a step, and until the busy stream was done as well."""
    now()
    with busy.around(1.5 * usual):
        start = time.perf_counter()
        model.step()
        if model.setting.on_gpu:
            torch.cuda.current_stream().synchronize()
        own = time.perf_counter()
    return 1e3 * (own - start), 1e3 * (now() - start)


def ratio(found: dict[str, Row], value: str) -> float:
    """Of high priority over usual."""
    return round(found["high priority"][value] / found["usual"][value], 3)


# --- results ----------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Rows by part, on disk after each change."""

    path: Path | None = None
    data: Row = field(default_factory=dict)
    deadline: float = float("inf")

    def is_over(self, part: str, name: str) -> bool:
        """No time is left to start this row, which then says so."""
        if time.monotonic() > self.deadline:
            self.note(part, name, reason="no time was left")
        return time.monotonic() > self.deadline

    def note(self, part: str, name: str, **values: Any) -> None:
        row = self.data.setdefault(part, {}).setdefault(name, {})
        row |= values
        print(f"{part}, {name}: {json.dumps(values)}", flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")


def main(words: list[str] | None = None) -> None:
    """Measure both, and print each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after so long")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny, without streams")
    options = parser.parse_args(words)
    if not options.dry and not torch.cuda.is_available():
        parser.error("no CUDA device: --dry runs all but the streams on a CPU")
    setting = DRY if options.dry else REAL
    head = {**environment(), "n": N, "tokens": setting.tokens, "features": setting.features}
    results = Results(options.out, head, time.monotonic() + options.seconds)
    for part in (latencies, steps):
        try:
            part(setting, options.rounds, results)
        except Exception as error:  # the other part goes on
            results.note(part.__name__, "all", reason=reason(error))


if __name__ == "__main__":
    main()
