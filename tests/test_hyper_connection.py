"""The parameters of a site: their values, what casts do to them, and what they compute."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from mhc_compile.errors import ConfigError, MHCError, ShapeError
from mhc_compile.hyper_connection import HyperConnection
from mhc_compile.kernels import reference

COLUMNS = {2: 8, 3: 15, 4: 24, 8: 80}


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("stream", [0, 1, 9])
def test_identity_keeps_equal_streams(n: int, stream: int) -> None:
    torch.manual_seed(0)
    site = HyperConnection(n, 5, stream=stream)
    x, f = torch.randn(6, 5), torch.randn(6, 5)
    streams = reference.expand(x, n)
    pre, post, res = site(streams)
    torch.testing.assert_close(pre.sum(-1), torch.ones(6))
    assert torch.equal(post, torch.ones(6, n))
    torch.testing.assert_close(res.sum(-1), torch.ones(6, n))
    torch.testing.assert_close(res.diagonal(dim1=-2, dim2=-1), torch.full((6, n), 0.9))
    torch.testing.assert_close(pre[:, stream % n], torch.full((6,), 0.7))
    assert pre.argmax(-1).eq(stream % n).all()
    torch.testing.assert_close(reference.aggregate(streams, pre), x)
    torch.testing.assert_close(reference.merge(streams, f, post, res), reference.expand(x + f, n))


def test_paper_init() -> None:
    torch.manual_seed(0)
    site = HyperConnection(4, 64, init="paper")
    torch.testing.assert_close(site.alpha, nn.Parameter(torch.full((3,), 0.01)))
    assert not site.bias.any()
    assert abs(site.phi.std().item() * 16 - 1) < 0.05
    pre, post, res = site(torch.randn(1000, 4, 64))
    assert (
        (pre - 0.5).abs().max() < 0.02 and (post - 1).abs().max() < 0.04 and (res - 0.25).abs().max() < 0.02
    )


def test_deepseek_init() -> None:
    torch.manual_seed(0)
    site = HyperConnection(4, 64, init="deepseek_v4")
    assert site.alpha.eq(1).all() and not site.bias.any()
    assert abs(site.phi.std().item() / 0.02 - 1) < 0.05


@pytest.mark.parametrize("n", [2, 4])
def test_forward_is_the_oracle(n: int) -> None:
    torch.manual_seed(0)
    site = HyperConnection(n, 7, init="deepseek_v4", iterations=5, eps=1e-3).double()
    streams = torch.randn(3, 2, n, 7, dtype=torch.float64)
    pre, post, logits = reference.coefficients(streams, site.phi, site.alpha, site.bias, 1e-3)
    for ours, theirs in zip(site(streams), (pre, post, reference.sinkhorn(logits, 5)), strict=True):
        torch.testing.assert_close(ours, theirs)


CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
    "through double": lambda m: m.double().bfloat16(),
    "float": lambda m: m.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_narrow_casts_keep_every_bit(cast: object) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"site": HyperConnection(4, 8, init="paper"), "linear": nn.Linear(3, 3)})
    before = copy.deepcopy(model["site"].state_dict())
    model = cast(model)  # type: ignore[operator]
    for name, value in model["site"].state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]), name
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model["site"].parameters())
    pre, _, res = model["site"](torch.randn(2, 4, 8, dtype=torch.bfloat16))
    assert pre.dtype == res.dtype == torch.float32


def test_casts_keep_gradients_and_identity() -> None:
    site = HyperConnection(2, 3)
    phi = site.phi
    site(torch.randn(2, 2, 3))[0].sum().backward()
    assert phi.grad is not None
    grad = phi.grad.clone()
    site.bfloat16()
    assert site.phi is phi and phi.grad is not None
    assert phi.grad.dtype == torch.float32 and torch.equal(phi.grad, grad)


def test_double_is_allowed_and_float_comes_back() -> None:
    site = HyperConnection(2, 3)
    assert site.double().phi.dtype == torch.float64
    assert site(torch.randn(1, 2, 3, dtype=torch.float64))[2].dtype == torch.float64
    assert site.float().phi.dtype == torch.float32


def test_built_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        site = HyperConnection(2, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in site.parameters()} == {torch.float32}
    torch.testing.assert_close(site.bias[0].sigmoid(), torch.tensor(0.7))


def test_meta_device() -> None:
    for site in (HyperConnection(4, 8, stream=2, device="meta"), HyperConnection(4, 8, stream=2).to("meta")):
        assert site.bfloat16().phi.device.type == "meta"
        assert site.phi.dtype == torch.float32
        site.to_empty(device="cpu").reset_parameters()
        for name, value in HyperConnection(4, 8, stream=2).state_dict().items():
            assert torch.equal(site.state_dict()[name], value), name


def test_copies_and_checkpoints() -> None:
    torch.manual_seed(0)
    site = HyperConnection(4, 8, stream=3, init="paper", iterations=7, eps=1e-5)
    buffer = io.BytesIO()
    torch.save(site.state_dict(), buffer)
    buffer.seek(0)
    loaded = HyperConnection(4, 8, init="identity")
    loaded.load_state_dict(torch.load(buffer))
    for other in (copy.deepcopy(site), pickle.loads(pickle.dumps(site)), loaded):
        assert sorted(other.state_dict()) == ["alpha", "bias", "phi"]
        for name, value in site.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_shapes_and_repr(n: int) -> None:
    site = HyperConnection(n, 5, stream=n + 1)
    assert (
        site.phi.shape == (5 * n, COLUMNS[n])
        and site.bias.shape == (COLUMNS[n],)
        and site.alpha.shape == (3,)
    )
    assert f"n={n}, features=5, stream=1, init='identity', iterations=20, eps=1e-06" in repr(site)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 1}, "n is 1; legal: an integer >= 2"),
        ({"features": 0}, "features is 0"),
        ({"init": "zero"}, "init is 'zero'; legal: 'identity', 'paper', 'deepseek_v4'"),
        ({"iterations": 0}, "iterations is 0"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": float("nan")}, "eps is nan"),
    ],
)
def test_illegal_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HyperConnection(**{"n": 4, "features": 8, **options})  # type: ignore[arg-type]


def test_wrong_streams() -> None:
    with pytest.raises(ShapeError, match=r"phi is \[32, 24\]; legal: \[n C, n n \+ 2 n\] = \[36, 24\]"):
        HyperConnection(4, 8)(torch.randn(2, 4, 9))


def test_errors_carry_their_line() -> None:
    error = ConfigError("no", line="model.py:3")
    assert (
        str(error) == "no\n  at model.py:3" and isinstance(error, ValueError) and isinstance(error, MHCError)
    )
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.line == "model.py:3"


def test_streams_diverge_when_trained() -> None:
    """pre is unequal on purpose: a symmetric start would keep all streams equal for ever."""
    torch.manual_seed(0)
    n, c = 4, 8
    sites = nn.ModuleList(HyperConnection(n, c, stream=i) for i in range(3))
    branches = nn.ModuleList(nn.Linear(c, c) for _ in range(3))
    x, y = torch.randn(32, c), torch.randn(32, c)
    optimizer = torch.optim.Adam([*sites.parameters(), *branches.parameters()], lr=1e-2)

    def run() -> torch.Tensor:
        streams = reference.expand(x, n)
        for site, branch in zip(sites, branches, strict=True):
            pre, post, res = site(streams)
            streams = reference.merge(streams, branch(reference.aggregate(streams, pre)).tanh(), post, res)
        return streams

    spread = []
    for _ in range(20):
        streams = run()
        spread.append(streams.std(-2).max().item())
        optimizer.zero_grad()
        (reference.readout(streams) - y).square().mean().backward()
        optimizer.step()
    assert spread[0] < 1e-6 < 1e-3 < spread[-1]
