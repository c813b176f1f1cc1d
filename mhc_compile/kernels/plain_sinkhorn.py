"""Sinkhorn in plain torch with tokens innermost, [n, n, T]: ten times the speed of [T, n, n] on a CPU.

Both orders and both divisors (``convention.Convention``), forward and backward by formula.  ``iterate`` is the loop
over one tile of tokens; who calls it cuts the tokens into tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.kernels.convention import Convention


def sinkhorn(logits: Tensor, convention: Convention) -> Tensor:
    """The matrices for logits [n, n, T], a new tensor.

    The first iteration is in log space, after which every divisor is in [1 / n^2, n] and exp is safe; with
    ``divisor_eps`` it is a softmax.
    """
    e, (first, second) = convention.divisor_eps, _axes(convention)
    if e == 0:
        m = _log_normalised(_log_normalised(logits, first), second).exp_()
    else:
        m = logits.softmax(first).add_(e)
        _normalise(m, second, e)
    for _ in range(convention.iterations - 1):
        _normalise(m, first, e)
        _normalise(m, second, e)
    return m


def sinkhorn_backward(grad: Tensor, logits: Tensor, convention: Convention) -> None:
    """Turn the gradient of the matrices into that of their logits, in place; [n, n, T] both.

    With ``G = dP * P`` and P the matrix after a half-step over an axis, from the last half-step to the first:
    ``G -= P * sum(G, axis)``.  (A constant in the divisor leaves this form as it is.)  The half-steps are computed
    again from the logits.
    """
    if convention.implicit:
        return _implicit_backward(grad, sinkhorn(logits, convention))
    e, (first, second) = convention.divisor_eps, _axes(convention)
    firsts, seconds = _half_steps(logits, convention)
    grad.mul_(seconds[-1])
    for k in reversed(range(1, convention.iterations)):
        grad.addcmul_(seconds[k], grad.sum(second, keepdim=True), value=-1)
        grad.addcmul_(firsts[k], grad.sum(first, keepdim=True), value=-1)
    grad.addcmul_(seconds[0], grad.sum(second, keepdim=True), value=-1)
    softmax = firsts[0]
    if e != 0:
        softmax = firsts[0] - e
        grad.mul_(softmax).div_(firsts[0])
    grad.addcmul_(softmax, grad.sum(first, keepdim=True), value=-1)


def _axes(convention: Convention) -> tuple[int, int]:
    return (1, 0) if convention.rows_first else (0, 1)


def _normalise(m: Tensor, axis: int, e: float) -> None:
    total = m.sum(axis, keepdim=True)
    m.div_(total if e == 0 else total.add_(e))


def _log_normalised(a: Tensor, axis: int) -> Tensor:
    # Not a - logsumexp(a): that is rounded at the size of the maximum, 1e-4 for logits of a thousand.
    a = a - a.amax(axis, keepdim=True)
    return a.sub_(a.exp().sum(axis, keepdim=True).log_())


def _half_steps(logits: Tensor, convention: Convention) -> tuple[Tensor, Tensor]:
    """The matrices after each first and after each second half-step, [iterations, n, n, T] each."""
    e, (first, second) = convention.divisor_eps, _axes(convention)
    firsts = logits.new_empty((convention.iterations, *logits.shape))
    seconds = torch.empty_like(firsts)
    if e == 0:
        a = _log_normalised(logits, first)
        torch.exp(a, out=firsts[0])
        torch.exp(_log_normalised(a, second), out=seconds[0])
    else:
        firsts[0].copy_(logits.softmax(first)).add_(e)
        torch.div(firsts[0], firsts[0].sum(second, keepdim=True).add_(e), out=seconds[0])
    for k in range(1, convention.iterations):
        torch.div(seconds[k - 1], _total(seconds[k - 1], first, e), out=firsts[k])
        torch.div(firsts[k], _total(firsts[k], second, e), out=seconds[k])
    return firsts, seconds


def _total(m: Tensor, axis: int, e: float) -> Tensor:
    total = m.sum(axis, keepdim=True)
    return total if e == 0 else total.add_(e)


def _implicit_backward(grad: Tensor, p: Tensor) -> None:
    """The gradient at the fixed point, as if Sinkhorn had converged.

    ``[[I, P], [P^T, I]] [u; v] = [G 1; G^T 1]`` with ``G = dP * P``, then ``dA = P * (dP - u 1^T - 1 v^T)``.  The
    system is singular by one: its Schur complement, with ``1 1^T / n`` added, is not.
    """
    n = p.shape[0]
    g = grad * p
    matrix = p.permute(2, 0, 1)
    rows, columns = g.sum(1).t().unsqueeze(2), g.sum(0).t().unsqueeze(2)
    schur = torch.eye(n, dtype=p.dtype, device=p.device) + 1 / n - matrix.mT @ matrix
    v = torch.linalg.solve_ex(schur, columns - matrix.mT @ rows).result
    u = rows - matrix @ v
    grad.sub_(u.squeeze(2).t().unsqueeze(1)).sub_(v.squeeze(2).t().unsqueeze(0)).mul_(p)
