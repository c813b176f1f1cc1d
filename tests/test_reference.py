"""The oracle against independent spellings, and the facts of the mathematics that the rest relies on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_compile.kernels import reference

DOUBLE = torch.float64


def random_logits(n: int, std: float, count: int = 2000, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, n, dtype=DOUBLE, generator=generator) * std


def exp_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """The definition, with no protection against overflow."""
    m = logits.exp()
    for _ in range(iterations):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def deepseek_sinkhorn(logits: Tensor, iterations: int, e: float) -> Tensor:
    """[in, out]: softmax of rows, columns, then rows and columns in turn."""
    comb = logits.softmax(-1) + e
    comb = comb / (comb.sum(-2, keepdim=True) + e)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + e)
        comb = comb / (comb.sum(-2, keepdim=True) + e)
    return comb


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn_is_its_definition(n: int, iterations: int) -> None:
    logits = random_logits(n, 2.0, count=50)
    torch.testing.assert_close(
        reference.sinkhorn(logits, iterations), exp_sinkhorn(logits, iterations), rtol=1e-12, atol=1e-14
    )


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 8), std=st.floats(0.1, 1000), iterations=st.integers(1, 25), seed=st.integers(0, 99))
def test_rows_sum_to_one(n: int, std: float, iterations: int, seed: int) -> None:
    m = reference.sinkhorn(random_logits(n, std, 20, seed), iterations)
    assert (m >= 0).all()
    assert (m.sum(-1) - 1).abs().max() < 1e-14


def test_column_shift_is_free_and_row_shift_is_not() -> None:
    logits = random_logits(4, 3.0)
    expected = exp_sinkhorn(logits, 20)
    by_column = exp_sinkhorn(logits - logits.amax(-2, keepdim=True), 20)
    by_row = exp_sinkhorn(logits - logits.amax(-1, keepdim=True), 20)
    assert (by_column - expected).abs().max() < 1e-12
    assert (by_row - expected).abs().max() > 1e-3


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_spectral_norm_is_at_most_one(n: int) -> None:
    m = reference.sinkhorn(random_logits(n, 1.0, 200), 500)
    product = m[0::2] @ m[1::2]
    for matrix in (m, product):
        assert torch.linalg.matrix_norm(matrix, 2).max() < 1 + 1e-9
        assert (matrix.sum(-2) - 1).abs().max() < 1e-9
        assert (matrix.sum(-1) - 1).abs().max() < 1e-12


def test_mean_over_streams_is_conserved() -> None:
    torch.manual_seed(0)
    res = reference.sinkhorn(random_logits(4, 1.0, 7), 500)
    x, f, post = (
        torch.randn(7, 4, 5, dtype=DOUBLE),
        torch.randn(7, 5, dtype=DOUBLE),
        torch.rand(7, 4, dtype=DOUBLE),
    )
    merged = reference.merge(x, f, post, res)
    expected = x.mean(-2) + post.mean(-1, keepdim=True) * f
    torch.testing.assert_close(merged.mean(-2), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("std", [1.0, 3.0])
def test_deepseek_form_transposed_is_the_paper_order(std: float) -> None:
    logits = random_logits(4, std)
    ours = reference.sinkhorn(logits, 20)
    theirs = deepseek_sinkhorn(logits.mT, 20, e=0.0).mT
    assert (ours - theirs).abs().max() < 1e-13
    # Their constant is no rounding error: a matcher has to read it.
    assert (ours - deepseek_sinkhorn(logits.mT, 20, e=1e-6).mT).abs().max() > 1e-8


def test_one_stream_is_the_plain_residual() -> None:
    torch.manual_seed(0)
    x, f = torch.randn(5, 7), torch.randn(5, 7)
    res = reference.sinkhorn(torch.randn(5, 1, 1) * 100, 20)
    assert torch.equal(res, torch.ones(5, 1, 1))
    streams, ones = reference.expand(x, 1), torch.ones(5, 1)
    assert torch.equal(reference.aggregate(streams, ones), x)
    assert torch.equal(reference.readout(reference.merge(streams, f, ones, res)), x + f)


def test_coefficients_by_hand() -> None:
    """Against loops over single numbers, so that the layout of phi's columns is pinned."""
    torch.manual_seed(0)
    n, c, eps = 2, 3, 0.5
    x, phi = torch.randn(n, c, dtype=DOUBLE), torch.randn(n * c, n * n + 2 * n, dtype=DOUBLE)
    alpha, bias = torch.randn(3, dtype=DOUBLE), torch.randn(n * n + 2 * n, dtype=DOUBLE)
    pre, post, logits = reference.coefficients(x, phi, alpha, bias, eps)
    r = (sum(x[i, k] ** 2 for i in range(n) for k in range(c)) / (n * c) + eps) ** 0.5
    z = [sum(x[i, k] * phi[i * c + k, m] for i in range(n) for k in range(c)) for m in range(n * n + 2 * n)]
    for i in range(n):
        torch.testing.assert_close(pre[i], 1 / (1 + torch.exp(-(alpha[0] * z[i] / r + bias[i]))))
        torch.testing.assert_close(post[i], 2 / (1 + torch.exp(-(alpha[1] * z[n + i] / r + bias[n + i]))))
        for j in range(n):
            m = 2 * n + n * i + j
            torch.testing.assert_close(logits[i, j], alpha[2] * z[m] / r + bias[m])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_readout_undoes_expand(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 50).to(dtype)
    streams = reference.expand(x, n)
    assert streams.shape == (3, 2, n, 50)
    torch.testing.assert_close(reference.readout(streams), x)
    if dtype.itemsize == 2:  # equal streams give back what they hold, because the sum is made in fp32
        assert torch.equal(reference.readout(streams), x)
