"""The C++ bodies for a CPU: the values of plain torch, and few compilations.

What is compiled is kept on disk and by the module, so each library costs its seconds once in this file.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_oracles
from mhc_compile.kernels import cpu, cpu_library, plain, site_ops, site_plain
from mhc_compile.kernels.convention import DEEPSEEK_V4, HEAD, HUNYUAN_V4, PAPER, Convention
from tolerances import TOLERANCES, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHORT = replace(DEEPSEEK_V4, iterations=3, rms_eps=0.1)
LONG = replace(PAPER, rms_eps=0.1)  # a large eps: at C = 1 the gradient of the streams is proportional to it
INPUTS = ("streams", "phi", "alpha", "bias", "f")


def inputs(t: int, n: int, c: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of a site, and the gradients of what it gives."""
    torch.manual_seed(0)
    wide, k = plain.coefficient_dtype(dtype), n * n + 2 * n
    shapes = {"streams": (t, n, c), "f": (t, c), "grad_u": (t, c), "grad_merged": (t, n, c)}
    made = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    made["phi"] = torch.randn(n * c, k).to(wide) / (n * c) ** 0.5
    return {**made, "alpha": torch.tensor([0.5, 1.5, -2.0], dtype=wide), "bias": torch.randn(k).to(wide)}


def site(read: Any, merge: Any, given: dict[str, Tensor], convention: Convention) -> dict[str, Tensor]:
    """All that a site computes, forward and backward."""
    x, f, g = given["streams"], given["f"], given["grad_merged"]
    parameters = given["phi"], given["alpha"], given["bias"]
    u, pre, post, res, z, r = read.read(x, *parameters, convention)
    matrix = None if convention.res == "none" else res
    merged = merge.merge(x, f, post, matrix, convention.transposed, convention.rounded)
    df, dpost, dres = merge.branch_backward(g, x, f, post, convention.mix, convention.rounded)
    grads = (given["grad_u"], None, dpost, None if matrix is None else dres, g)
    dx, *others = read.read_backward(*grads, x, *parameters, pre, post, res, z, r, convention, True)
    outputs = {"u": u, "pre": pre, "post": post, "res": res, "merged": merged, "z": z, "r": r}
    gradients = dict(zip(INPUTS, (dx, *others, df), strict=True))
    return {**outputs, **{f"gradient of {name}": one for name, one in gradients.items()}}


def with_columns(given: dict[str, Tensor], n: int, convention: Convention) -> dict[str, Tensor]:
    """The inputs with the parameters that a convention has."""
    columns = convention.columns(n)
    parameters = {"phi": given["phi"][:, :columns].contiguous(), "bias": given["bias"][:columns]}
    return {**given, **parameters, "alpha": given["alpha"][: convention.groups]}


def ours(given: dict[str, Tensor], convention: Convention) -> dict[str, Tensor]:
    return site(cpu, cpu, given, convention)


def in_plain_torch(given: dict[str, Tensor], convention: Convention) -> dict[str, Tensor]:
    return site(site_plain, plain, given, convention)


def oracle(given: dict[str, Tensor], convention: Convention) -> dict[str, Tensor]:
    exact = {name: tensor.double() for name, tensor in given.items()}
    leaves = [exact[name].requires_grad_() for name in INPUTS]
    x, phi, alpha, bias, f = leaves
    pre, post, res = kernel_oracles.coefficients(x, phi, alpha, bias, convention)
    u = (pre.unsqueeze(-1) * x).sum(-2)
    assert post is not None
    merged = kernel_oracles.merge(x, f, post, res, convention)
    grads = torch.autograd.grad([u, merged], leaves, [exact["grad_u"], exact["grad_merged"]])
    outputs = {"u": u, "pre": pre, "post": post, "merged": merged}
    return {**outputs, **{f"gradient of {name}": one for name, one in zip(INPUTS, grads, strict=True)}}


@pytest.fixture(scope="module", autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Libraries of this file are compiled in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(cpu_library, "_libraries", {})
        yield


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The commands that compile a library during a test."""
    found: list[list[str]] = []

    def noted(command: list[str], run: Any = cpu_library._run) -> Any:
        if "-o" in command:
            found.append(command)
        return run(command)

    monkeypatch.setattr(cpu_library, "_run", noted)
    yield found


# --- values -----------------------------------------------------------------------------------------------

CASES = [
    (4, LONG, torch.float32),
    (2, SHORT, torch.float32),
    (2, SHORT, torch.bfloat16),
    (2, SHORT, torch.float16),
    (5, replace(LONG, iterations=70), torch.float32),
    (8, SHORT, torch.float32),
    (4, replace(LONG, transposed=True, rounded=True), torch.bfloat16),
    (4, HUNYUAN_V4, torch.float32),
]
NAMES = ["paper", "deepseek", "bf16", "fp16", "n5", "n8", "rounded", "hunyuan"]


@pytest.mark.parametrize(("n", "convention", "dtype"), CASES, ids=NAMES)
@pytest.mark.cases(2)
def test_against_plain_torch_and_the_oracle(n: int, convention: Convention, dtype: torch.dtype) -> None:
    for t in (1, 7, 16, 129):
        for c in (1, 7, 32, 129):
            given = with_columns(inputs(t, n, c, dtype), n, convention)
            found, expected = ours(given, convention), in_plain_torch(given, convention)
            for name in expected:
                assert found[name].dtype == expected[name].dtype and found[name].is_contiguous(), name
                assert_close(f"{name}, {t} x {c}", found[name], expected[name].double())
            if not (convention.rounded and dtype != torch.float32):  # the oracle does not round
                for name, value in oracle(given, convention).items():
                    assert_close(f"{name}, {t} x {c}, oracle", found[name], value)
    assert all(one is not None for one in cpu_library._libraries.values())


def test_bodies_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(70, 4, 5, torch.float32)
    for module in (plain, site_plain):
        for name in ("merge", "branch_backward", "read", "read_backward"):
            monkeypatch.setattr(module, name, None, raising=False)
    ours(given, LONG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_few_tokens_and_of_many(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In C++ and by torch."""
    for t, c in ((3, 5), (9, 33), (70, 16)):
        given = inputs(t, 4, c, dtype)
        expected = in_plain_torch(given, LONG)
        for limit in (0, 1 << 60):
            monkeypatch.setattr(cpu, "FEW", limit)
            for name, found in ours(given, LONG).items():
                assert_close(f"{name}, {t} x {c}", found, expected[name].double())


def test_a_head() -> None:
    """It has no merge."""
    given = with_columns(inputs(21, 4, 6, torch.float32), 4, HEAD)
    x, rest = given["streams"], (given["phi"], given["alpha"], given["bias"])
    results = [m.read(x, *rest, HEAD) for m in (cpu, site_plain)]
    for found, expected in zip(*results, strict=True):
        assert_close("output", found, expected.double())
    grads = (given["grad_u"], None, None, None, None)
    results = [m.read_backward(*grads, x, *rest, *results[1][1:], HEAD, True) for m in (cpu, site_plain)]
    for name, found, expected in zip(INPUTS, *results, strict=False):
        assert_close(name, found, expected.double())


@pytest.mark.parametrize("missing", ["grad_u", "grad_merged", "dpost", "dres", "all"])
@pytest.mark.parametrize("wants_streams", [True, False])
def test_some_gradients_are_missing(missing: str, wants_streams: bool) -> None:
    given = inputs(70, 4, 5, torch.float32)
    x, rest = given["streams"], (given["phi"], given["alpha"], given["bias"])
    _, *kept = site_plain.read(x, *rest, LONG)
    grads = {"grad_u": given["grad_u"], "pre": torch.randn(70, 4), "dpost": torch.randn(70, 4)}
    grads |= {"dres": torch.randn(70, 4, 4), "grad_merged": given["grad_merged"]}
    sent = [None if name == missing or missing == "all" else one for name, one in grads.items()]
    results = [m.read_backward(*sent, x, *rest, *kept, LONG, wants_streams) for m in (cpu, site_plain)]
    for name, found, expected in zip(INPUTS, *results, strict=False):
        assert_close(name, found, expected.double())


def test_leading_dimensions_and_layout() -> None:
    given = inputs(70, 4, 6, torch.float32)
    expected = in_plain_torch(given, LONG)

    def turned(tensor: Tensor) -> Tensor:
        """[70, ...] -> [7, 10, ...], not contiguous."""
        lead = tensor.view(7, 10, *tensor.shape[1:])
        return torch.stack([lead, lead], -1)[..., 0]

    per_token = {name: turned(one) if len(one) == 70 else one for name, one in given.items()}
    found = ours(per_token, LONG)
    for name, value in expected.items():
        lead = (name == "z") if value.shape[-1:] == (70,) and value.dim() == 2 else False
        wanted = value.view(len(value), 7, 10) if lead else value
        wanted = wanted.view(found[name].shape)
        assert_close(name, found[name], wanted.double())


def test_copies_of_strided_tensors_live_through_the_call() -> None:
    """What is not contiguous is copied; memory of a copy that is let go is taken by the next."""
    given = inputs(40, 4, 24, torch.float32)
    made = ours(given, DEEPSEEK_V4)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]

    parameters = [strided(given[name]) for name in ("phi", "alpha", "bias")]
    x, f, g, du = (strided(given[name]) for name in ("streams", "f", "grad_merged", "grad_u"))
    pre, post, res, z, r = (strided(made[name]) for name in ("pre", "post", "res", "z", "r"))
    variant = DEEPSEEK_V4.transposed, DEEPSEEK_V4.rounded
    df, dpost, dres = cpu.branch_backward(g, x, f, post, DEEPSEEK_V4.mix, DEEPSEEK_V4.rounded)
    grads = du, None, strided(dpost), strided(dres), g
    dx, *others = cpu.read_backward(*grads, x, *parameters, pre, post, res, z, r, DEEPSEEK_V4, True)
    found = dict(zip(INPUTS, (dx, *others, df), strict=True))
    assert torch.equal(cpu.merge(x, f, post, res, *variant), made["merged"])
    for name, one in zip(("u", "pre", "post", "res", "z", "r"), cpu.read(x, *parameters, DEEPSEEK_V4), strict=True):
        assert torch.equal(one, made[name]), name
    for name in INPUTS:
        assert torch.equal(found[name], made[f"gradient of {name}"]), name


def test_narrower_branch() -> None:
    given = inputs(70, 2, 6, torch.float32)
    given["f"] = given["f"].bfloat16()
    found, expected = ours(given, SHORT), in_plain_torch(given, SHORT)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert_close(name, found[name], expected[name].double())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_token_stays_alone(bad: float) -> None:
    given = inputs(70, 4, 6, torch.float32)
    clean = ours(given, LONG)
    given["streams"][66, 2, 1] = bad
    dirty = ours(given, LONG)
    others = [i for i in range(70) if i != 66]
    for name in ("u", "pre", "post", "res", "merged", "gradient of streams", "gradient of f"):
        assert torch.equal(clean[name][others], dirty[name][others]), name


def test_huge_logits() -> None:
    given = inputs(70, 4, 6, torch.float32)
    given["bias"] = 1000 * given["bias"]
    found, expected = ours(given, LONG), in_plain_torch(given, LONG)
    for name in expected:
        assert found[name].isfinite().all(), name
        assert_close(name, found[name], expected[name].double())


def test_products_stay_fp32() -> None:
    given = inputs(70, 4, 65, torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = ours(given, LONG)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, value in oracle(given, LONG).items():
        assert_close(name, found[name], value)


def test_the_same_every_time() -> None:
    given = inputs(333, 4, 16, torch.float32)
    first = ours(given, LONG)
    for _ in range(3):
        for name, again in ours(given, LONG).items():
            assert torch.equal(first[name], again), name


# --- how much is compiled ---------------------------------------------------------------------------------


def test_sizes_and_conventions_compile_nothing(compilations: list[Any]) -> None:
    ours(inputs(70, 4, 6, torch.float32), LONG)  # compiled by now, also where this test runs alone
    compilations.clear()
    for t in (1, 2, 7, 63, 64, 65, 100, 129, 200, 333):
        ours(inputs(t, 4, 1 + t % 50, torch.float32), replace(LONG, iterations=1 + t % 5))
    assert compilations == []


def test_libraries_are_kept_on_disk(monkeypatch: pytest.MonkeyPatch, compilations: list[Any]) -> None:
    given = inputs(7, 2, 6, torch.float32)
    first = ours(given, SHORT)
    compilations.clear()
    monkeypatch.setattr(cpu_library, "_libraries", {})
    second = ours(given, SHORT)
    assert compilations == [] and cpu_library._libraries.keys() == {(2, torch.float32)}
    assert all(torch.equal(first[name], second[name]) for name in first)
    path = cpu_library.compiled(2, torch.float32)
    assert [path] == [one for one in path.parent.iterdir() if one == path] and path.suffix == ".so"
    monkeypatch.setattr(cpu_library, "_FLAGS", (*cpu_library._FLAGS, "-O0"))
    assert cpu_library.compiled(2, torch.float32) != path and len(compilations) == 1


def of_each_number_of_threads(call: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    return found


def same_bits(found: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("product", ["of one thread", "of torch"])
def test_the_number_of_threads_changes_no_bit(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ours. On some processors (an AMD EPYC) three threads of torch.mm give other bits than one; see limits.md."""
    given = inputs(333, 4, 64, torch.float32)
    x, parameters = given["streams"], (given["phi"], given["alpha"], given["bias"])
    assert x.numel() > cpu.ALONE and 333 * given["phi"].numel() > cpu.FEW
    rows = x.reshape(333, -1)
    products = of_each_number_of_threads(lambda: [cpu._product_with_phi(rows, given["phi"])])
    if product == "of one thread":
        monkeypatch.setattr(cpu, "_product_with_phi", lambda *_: products[0][0])

    def site() -> list[Tensor]:
        read = cpu.read(x, *parameters, LONG)
        merged = cpu.merge(x, given["f"], read[2], read[3])
        return [*read, merged, *cpu.branch_backward(given["grad_merged"], x, given["f"], read[2], "given", False)]

    found = of_each_number_of_threads(site)
    if product == "of one thread" or same_bits(products):
        assert same_bits(found)


def test_many_features() -> None:
    given = inputs(3, 4, 9000, torch.float32)
    found = ours(given, LONG)
    for name, value in oracle(given, LONG).items():
        assert_close(name, found[name], value)


OUTSIDE = [
    (inputs(5, 2, 3, torch.float64), SHORT),
    (inputs(5, 1, 3, torch.float32), SHORT),
    (inputs(5, 9, 3, torch.float32), SHORT),
    (inputs(0, 2, 3, torch.float32), SHORT),
]


@pytest.mark.parametrize(("given", "convention"), OUTSIDE, ids=["fp64", "n1", "n9", "empty"])
def test_plain_torch_for_the_rest(given: dict[str, Tensor], convention: Convention, compilations: list[Any]) -> None:
    found, expected = ours(given, convention), in_plain_torch(given, convention)
    assert compilations == []
    for name in expected:
        assert_close(name, found[name], expected[name].double())


# --- as ops -----------------------------------------------------------------------------------------------


def through_ops(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor, compiled: bool = True) -> Tensor:
    u, _, post, res, carrier = site_ops.read(x, phi, alpha, bias, LONG.rms_eps, LONG.iterations, compiled=compiled)
    return site_ops.merge_carried(x, torch.tanh(u) * f, carrier, post, res, compiled=compiled)


def trained(function: Any, given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = [given[name].clone().requires_grad_() for name in INPUTS]
    merged = function(*leaves, **options)
    return [merged.detach(), *torch.autograd.grad(merged, leaves, given["grad_merged"])]


def test_ops_use_the_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """By themselves, inside an outer compilation, and without gradients."""
    given = inputs(70, 4, 6, torch.float32)
    expected = trained(through_ops, given, compiled=False)
    monkeypatch.setattr(plain, "merge", None)
    monkeypatch.setattr(site_plain, "read", None)
    outer = torch.compile(through_ops, backend="aot_eager", fullgraph=True)
    for function in (through_ops, outer):
        for name, found, value in zip(("merged", *INPUTS), trained(function, given), expected, strict=True):
            assert_close(name, found, value.double())
    with torch.no_grad():
        assert_close("merged", outer(*(given[name] for name in INPUTS)), expected[0].double())
    torch._dynamo.reset()


# --- where it runs ----------------------------------------------------------------------------------------


def test_compiled_under_the_modes_of_a_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[Any]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_library, "_libraries", {})
    given = inputs(70, 2, 6, torch.float32)
    expected = in_plain_torch(given, SHORT)
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"), torch.compiler.set_stance("force_eager"):
        merged = cpu.merge(given["streams"], given["f"], expected["post"], expected["res"], True)
    torch._dynamo.reset()
    with torch.compiler.set_stance("fail_on_recompile"):
        again = cpu.merge(given["streams"].requires_grad_(), given["f"], expected["post"], expected["res"], True)
    assert len(compilations) == 1
    assert_close("merged", merged.clone(), expected["merged"].double())
    assert torch.equal(merged, again)


def test_threads_share_a_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[Any]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_library, "_libraries", {})
    given = inputs(70, 2, 6, torch.float32)
    expected = in_plain_torch(given, SHORT)
    args = given["streams"], given["f"], expected["post"], expected["res"], True
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cpu.merge(*args), range(8)))
    assert len(compilations) == 1
    for merged in results:
        assert_close("merged", merged, expected["merged"].double())


def test_switched_off(monkeypatch: pytest.MonkeyPatch, compilations: list[Any]) -> None:
    monkeypatch.setattr(cpu_library, "_libraries", {})
    given = inputs(70, 2, 6, torch.float32)
    with torch._dynamo.config.patch(disable=True):  # what TORCHDYNAMO_DISABLE=1 sets
        found, expected = ours(given, SHORT), in_plain_torch(given, SHORT)
    assert compilations == [] and cpu_library._libraries == {}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_failure_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(cpu_library, "_libraries", {})
    monkeypatch.setattr(cpu_library, "_warned", set())
    monkeypatch.setattr(cpu_library, "compiled", fail)
    given = inputs(70, 2, 6, torch.float32)
    with pytest.warns(UserWarning, match="RuntimeError: no compiler") as caught:
        found = ours(given, SHORT)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(inputs(7, 2, 3, torch.float32), SHORT)
        ours(inputs(7, 2, 3, torch.bfloat16), SHORT)
    expected = in_plain_torch(given, SHORT)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_a_compiler(tmp_path: Path) -> None:
    program = (
        "import torch; from mhc_compile.kernels import cpu, plain\n"
        "x, f, p, m = torch.ones(3, 2, 4), torch.ones(3, 4), torch.ones(3, 2), torch.ones(3, 2, 2)\n"
        "assert torch.equal(cpu.merge(x, f, p, m), plain.merge(x, f, p, m))"
    )
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    root = str(Path(cpu.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("compiling the CPU bodies of mHC is not possible here") == 1, done.stderr


def test_tolerances_cover_the_dtypes() -> None:
    assert set(cpu_library.ELEMENTS) < set(TOLERANCES)
