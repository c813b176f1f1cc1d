"""Who computes the ops: the kernels of this package, torch on the oracle's formulas, eager and compiled.

An implementation gives, for an op and a sample, a function without arguments that does what is to be timed: preparing
arguments, and the forward before a backward, are outside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_samples import OPS, Sample
from mhc_compile.kernels import reference
from mhc_compile.kernels.convention import HEAD, PAPER, Before, Convention

Outputs = tuple[Tensor | None, ...]
Call = Callable[[], Outputs]
Function = Callable[..., Sequence[Tensor]]


class NotOffered(Exception):
    """An implementation has no such op, or not for this shape; the message says why."""


class Implementation:
    """One way to compute the ops.

    ``convention`` is the one whose oracle its results are compared with, ``note`` what a reader of the times has to
    know.
    """

    name = ""
    note = ""
    convention = PAPER

    def values(self, op: str, sample: Sample) -> Sample:
        """The inputs as the implementation gets them, in the layout of the sample; for the oracle."""
        return {name: sample[name] for name in OPS[op].inputs}

    def forward(self, op: str, sample: Sample) -> Call:
        """Gives the outputs of the op."""
        raise NotImplementedError

    def backward(self, op: str, sample: Sample) -> Call:
        """Gives what :meth:`gradients` makes the gradients of the op's inputs of."""
        raise NotImplementedError

    def gradients(self, op: str, sample: Sample, found: Outputs) -> Outputs:
        """The gradients in the layout of the sample; None for what is not computed."""
        return found


class Ours(Implementation):
    """The Triton kernels, as the lowered ops of a site call them."""

    name = "mhc_compile"
    note = "merge backward leaves dX to the site's last pass; aggregate has no backward of its own"

    def forward(self, op: str, sample: Sample) -> Call:
        from mhc_compile.kernels.triton_aggregate import aggregate
        from mhc_compile.kernels.triton_coefficients import coefficients, read
        from mhc_compile.kernels.triton_expand import expand, readout
        from mhc_compile.kernels.triton_merge import merge
        from mhc_compile.kernels.triton_merge_read import merge_read
        from mhc_compile.kernels.triton_single_pass import merge_read_early
        from mhc_compile.kernels.triton_sinkhorn import sinkhorn

        arguments = tuple(sample[name] for name in OPS[op].inputs)
        n = sample["streams"].shape[-2]

        def site(streams: Tensor, f: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Outputs:
            u, kept = read(streams, phi, alpha, bias, PAPER)
            assert kept.post is not None
            return merge(streams, f, kept.post, kept.res), u

        def early(*given: Tensor) -> Outputs:
            merged, u, kept = merge_read_early(given[:4], given[4], given[5:], PAPER.mix, False, PAPER)
            return merged, u, kept.pre, kept.post, kept.res

        def parts(*given: Tensor) -> Outputs:
            kept = coefficients(*given, PAPER)
            return kept.pre, kept.post, kept.res

        functions: dict[str, Callable[..., Outputs]] = {
            "site": site,
            "merge+read": lambda *given: merge_read(given[:4], given[4:], PAPER.mix, False, PAPER)[:2],
            "merge+early": early,
            "coefficients": parts,
            "sinkhorn": lambda logits: (sinkhorn(logits, PAPER.iterations),),
            "aggregate": lambda streams, pre: (aggregate(streams, pre),),
            "merge": lambda *given: (merge(*given),),
            "expand": lambda f: (expand(f, n),),
            "readout": lambda streams: (readout(streams),),
            "head": lambda *given: (read(*given, HEAD)[0],),
        }
        return lambda: functions[op](*arguments)

    def backward(self, op: str, sample: Sample) -> Call:
        from mhc_compile.kernels.triton_coefficients import coefficients, read
        from mhc_compile.kernels.triton_expand import expand_backward, readout_backward
        from mhc_compile.kernels.triton_merge_backward import merge_backward
        from mhc_compile.kernels.triton_sinkhorn import sinkhorn_backward
        from mhc_compile.kernels.triton_site_backward import site_backward

        s, n = sample, sample["streams"].shape[-2]
        streams, parameters = s["streams"], (s["phi"], s["alpha"], s["bias"])
        head_parameters = s["head_phi"], s["head_alpha"], s["head_bias"]
        if op == "aggregate":
            raise NotOffered("a part of the site's backward")

        if op == "chain":
            return self.chain(sample)
        if op == "early-chain":
            return self.early_chain(sample)

        def of_merge() -> Outputs:
            df, dpost, dres = merge_backward(s["grad"], streams, s["f"], s["post"])
            return None, df, dpost, dres

        if op == "site":
            _, kept = read(streams, *parameters, PAPER)

            def of_site() -> Outputs:
                assert kept.post is not None
                df, dpost, dres = merge_backward(s["grad"], streams, s["f"], kept.post)
                more = {"grad": s["grad"], "du": s["du"], "grad_post": dpost, "grad_res": dres}
                got = site_backward(streams, parameters, kept, PAPER, **more)
                return got.streams, df, got.phi, got.alpha, got.bias

            return of_site
        if op == "coefficients":
            kept = coefficients(streams, *parameters, PAPER)
            grads = {name: s[name] for name in OPS[op].grads}
            return lambda: _fields(site_backward(streams, parameters, kept, PAPER, **grads))
        if op == "head":
            _, kept = read(streams, *head_parameters, HEAD)
            return lambda: _fields(site_backward(streams, head_parameters, kept, HEAD, du=s["du"]))
        others: dict[str, Call] = {
            "sinkhorn": lambda: (sinkhorn_backward(s["grad_res"], s["logits"], PAPER.iterations),),
            "merge": of_merge,
            "expand": lambda: (expand_backward(s["grad"]),),
            "readout": lambda: (readout_backward(s["du"], n),),
        }
        return others[op]

    def chain(self, s: Sample) -> Call:
        """One site of a chain: df of the site before, and what its own parameters get."""
        from mhc_compile.kernels.triton_merge_read import merge_read
        from mhc_compile.kernels.triton_site_backward import crosses, site_backward

        if not crosses(s["streams"], PAPER.mix):
            raise NotOffered("more than four streams: site by site")
        parameters, merging = (s["phi"], s["alpha"], s["bias"]), (s["streams"], s["f"], s["post"], s["res"])
        merged, _, kept = merge_read(merging, parameters, PAPER.mix, False, PAPER)
        before = Before(s["post"], False, s["f"].dtype)
        more = {"grad": s["grad"], "du": s["du"], "f": s["next_f"], "before": before}

        def of_chain() -> Outputs:
            got = site_backward(merged, parameters, kept, PAPER, **more)
            return None, got.f, None, None, got.phi, got.alpha, got.bias, None

        return of_chain

    def early_chain(self, s: Sample) -> Call:
        """The same with single-pass reads, and what the weights get that u was read with."""
        from mhc_compile.kernels.triton_single_pass import merge_read_early
        from mhc_compile.kernels.triton_site_backward import crosses, site_backward

        if not crosses(s["streams"], PAPER.mix):
            raise NotOffered("more than four streams: site by site")
        parameters, merging = (s["phi"], s["alpha"], s["bias"]), (s["streams"], s["f"], s["post"], s["res"])
        merged, _, kept = merge_read_early(merging, s["pre"], parameters, PAPER.mix, False, PAPER)
        before = Before(s["post"], False, s["f"].dtype)
        more = {"grad": s["grad"], "du": s["du"], "grad_pre": s["grad_pre"], "f": s["next_f"], "before": before}

        def of_chain() -> Outputs:
            got = site_backward(merged, parameters, kept, PAPER, **more, weights=s["pre"])
            return None, got.f, None, None, got.weights, got.phi, got.alpha, got.bias, None

        return of_chain


class SiteBySite(Ours):
    """The same kernels where the backward of a chain stays within each site."""

    name = "mhc_compile (site by site)"
    note = "a chain's backward that does not cross the borders of sites; df is that of the site's own branch"

    def forward(self, op: str, sample: Sample) -> Call:
        raise NotOffered("a chain's backward alone")

    def backward(self, op: str, sample: Sample) -> Call:
        if op != "chain":
            raise NotOffered("a chain's backward alone")
        return self.chain(sample)

    def chain(self, s: Sample) -> Call:
        from mhc_compile.kernels.triton_merge_backward import merge_backward
        from mhc_compile.kernels.triton_merge_read import merge_read
        from mhc_compile.kernels.triton_site_backward import site_backward

        parameters, merging = (s["phi"], s["alpha"], s["bias"]), (s["streams"], s["f"], s["post"], s["res"])
        merged, _, kept = merge_read(merging, parameters, PAPER.mix, False, PAPER)
        post = kept.post
        assert post is not None

        def of_chain() -> Outputs:
            df, dpost, dres = merge_backward(s["grad"], merged, s["next_f"], post)
            more = {"grad": s["grad"], "du": s["du"], "grad_post": dpost, "grad_res": dres}
            got = site_backward(merged, parameters, kept, PAPER, **more)
            return None, None, None, None, got.phi, got.alpha, got.bias, df

        return of_chain


def _fields(gradients: Any) -> Outputs:
    return gradients.streams, gradients.phi, gradients.alpha, gradients.bias


class ByAutograd(Implementation):
    """What has functions, and its backward from autograd."""

    def functions(self, n: int) -> Mapping[str, Function]:
        """The ops for n streams; they take an op's inputs as :meth:`adapted` gives them."""
        raise NotImplementedError

    def adapted(self, name: str, value: Tensor) -> list[Tensor]:
        """An input in the form that the functions take: one tensor, or several."""
        return [value]

    def restored(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """What :meth:`adapted` gave, or gradients of that, as one tensor in the layout of the sample."""
        return values[0]

    def check(self, sample: Sample) -> None:
        """Raise NotOffered for samples that the functions are not made for."""

    def values(self, op: str, sample: Sample) -> Sample:
        self.check(sample)
        return {name: self.restored(name, self.adapted(name, sample[name])) for name in OPS[op].inputs}

    def _prepared(self, op: str, sample: Sample) -> tuple[Function, list[Tensor]]:
        self.check(sample)
        functions = self.functions(sample["streams"].shape[-2])
        if op not in functions:
            raise NotOffered("has no such op")
        adapted = [value for name in OPS[op].inputs for value in self.adapted(name, sample[name])]
        return functions[op], [value.detach().requires_grad_() for value in adapted]

    def forward(self, op: str, sample: Sample) -> Call:
        function, leaves = self._prepared(op, sample)
        return lambda: tuple(function(*leaves))

    def backward(self, op: str, sample: Sample) -> Call:
        function, leaves = self._prepared(op, sample)
        outputs = tuple(function(*leaves))
        grads = [sample[name].view(out.shape) for name, out in zip(OPS[op].grads, outputs, strict=True)]
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    def gradients(self, op: str, sample: Sample, found: Outputs) -> Outputs:
        rest, restored = iter(found), []
        for name in OPS[op].inputs:
            restored.append(self.restored(name, [next(rest) for _ in self.adapted(name, sample[name])]))
        return tuple(restored)


def formulas(convention: Convention, n: int) -> dict[str, Function]:
    """The ops as the oracle has them, in whatever dtype the arguments are."""
    c = convention

    def sinkhorn(logits: Tensor) -> Tensor:
        return reference.sinkhorn(logits, c.iterations, c.divisor_eps, c.rows_first)

    def coefficients(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, logits = reference.coefficients(streams, phi, alpha, bias, c.rms_eps, c.pre_eps)
        return pre, post, sinkhorn(logits)

    def site(streams: Tensor, f: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        pre, post, res = coefficients(streams, phi, alpha, bias)
        return reference.merge(streams, f, post, res, c.transposed), reference.aggregate(streams, pre)

    def head(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor]:
        pre, _, _ = reference.coefficients(streams, phi, alpha, bias, HEAD.rms_eps, HEAD.pre_eps, groups=1)
        return (reference.aggregate(streams, pre),)

    def merge_read(*given: Tensor) -> tuple[Tensor, Tensor]:
        merged = reference.merge(*given[:4], c.transposed)
        return merged, reference.aggregate(merged, coefficients(merged, *given[4:])[0])

    def chain(*given: Tensor) -> tuple[Tensor, Tensor]:
        *before, next_f = given
        streams = reference.merge(*before[:4], c.transposed)
        return site(streams, next_f, *before[4:])

    def early(*given: Tensor) -> tuple[Tensor, ...]:
        merged = reference.merge(*given[:4], c.transposed)
        return merged, reference.aggregate(merged, given[4]), *coefficients(merged, *given[5:])

    def early_chain(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *before, next_f = given
        streams, u, pre, post, res = early(*before)
        return reference.merge(streams, next_f, post, res, c.transposed), u, pre

    return {
        "site": site,
        "merge+read": merge_read,
        "chain": chain,
        "merge+early": early,
        "early-chain": early_chain,
        "coefficients": coefficients,
        "sinkhorn": lambda logits: (sinkhorn(logits),),
        "aggregate": lambda streams, pre: (reference.aggregate(streams, pre),),
        "merge": lambda *given: (reference.merge(*given, c.transposed),),
        "expand": lambda f: (reference.expand(f, n),),
        "readout": lambda streams: (reference.readout(streams),),
        "head": head,
    }


class Eager(ByAutograd):
    """The formulas as they stand, op by op."""

    name = "torch eager"
    note = "the paper's formulas as they stand"

    def functions(self, n: int) -> Mapping[str, Function]:
        return formulas(PAPER, n)


class Compiled(ByAutograd):
    """The same through torch.compile, one graph an op and shape."""

    name = "torch.compile"
    note = "the same formulas, static shapes"

    def __init__(self, backend: str) -> None:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # it is gone after the first backward, and a backward is run many times here
        self.options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
        self.compiled: dict[int, dict[str, Function]] = {}

    def functions(self, n: int) -> Mapping[str, Function]:
        if n not in self.compiled:
            self.compiled[n] = {op: torch.compile(f, **self.options) for op, f in formulas(PAPER, n).items()}
        return self.compiled[n]
