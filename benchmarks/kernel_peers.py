"""The libraries that have mHC kernels, called as their authors do.

benchmarks/pack_peers.sh brings their packages to a machine without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import torch
from torch import Tensor

from benchmarks.kernel_implementations import (
    ByAutograd,
    Compiled,
    Eager,
    Function,
    Implementation,
    NotOffered,
    Ours,
    Outputs,
    SiteBySite,
)
from benchmarks.kernel_samples import Sample
from mhc_compile.kernels.convention import HEAD, PAPER, Convention

R, EPS = PAPER.iterations, 1e-6


class Liger(ByAutograd):
    """Liger-Kernel: ``liger_mhc_coeffs``, ``liger_mhc_pre`` and ``liger_mhc_post_res``."""

    name = "liger-kernel"
    convention = Convention(rows_first=True, divisor_eps=EPS)

    def __init__(self) -> None:
        from liger_kernel.transformers import functional

        self.library = functional
        self.note = f"{version('liger-kernel')}; phi in bfloat16 beside bfloat16 streams, which is its fast path"
        self.half_phi = True

    def adapted(self, name: str, value: Tensor) -> list[Tensor]:
        if name == "phi" and self.half_phi:
            return [value.bfloat16()]
        return [part.clone() for part in value] if name == "alpha" else [value]

    def restored(self, name: str, values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)) if name == "alpha" else values[0]

    def check(self, sample: Sample) -> None:
        self.half_phi = sample["streams"].dtype == torch.bfloat16

    def functions(self, n: int) -> Mapping[str, Function]:
        library, wide = self.library, not self.half_phi

        def coefficients(streams: Tensor, phi: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            *alphas, bias = rest
            found: tuple[Tensor, Tensor, Tensor] = library.liger_mhc_coeffs(
                streams, phi, bias, *alphas, allow_fp32=wide, tmax=R, rms_eps=EPS, sinkhorn_eps=EPS
            )
            return found

        def site(streams: Tensor, f: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            pre, post, res = coefficients(streams, *rest)
            return library.liger_mhc_post_res(streams, f, post, res), library.liger_mhc_pre(streams, pre)

        def merge_read(streams: Tensor, f: Tensor, post: Tensor, res: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            merged = library.liger_mhc_post_res(streams, f, post, res)
            return merged, library.liger_mhc_pre(merged, coefficients(merged, *rest)[0])

        return {
            "site": site,
            "merge+read": merge_read,
            "coefficients": coefficients,
            "aggregate": lambda streams, pre: (library.liger_mhc_pre(streams, pre),),
            "merge": lambda *given: (library.liger_mhc_post_res(*given),),
        }


class TileKernels(ByAutograd):
    """TileKernels: its functions for training, one or several kernels each."""

    name = "tile-kernels"
    convention = Convention(rows_first=True, divisor_eps=EPS, transposed=True, pre_eps=EPS)

    def __init__(self) -> None:
        from tile_kernels.modeling.mhc import functional, ops

        self.functional, self.ops = functional, ops
        self.note = version("tile-kernels")

    def adapted(self, name: str, value: Tensor) -> list[Tensor]:
        if name in ("phi", "head_phi"):
            return [value.t().contiguous()]
        if name in ("streams", "f", "pre", "post", "res"):  # [sequences, tokens, ...], and a column for weights
            value = value.unsqueeze(0)
        return [value.unsqueeze(-1) if name in ("pre", "post") else value]

    def restored(self, name: str, values: Sequence[Tensor]) -> Tensor:
        (value,) = values
        if name in ("phi", "head_phi"):
            return value.t()
        if name in ("pre", "post"):
            value = value.squeeze(-1)
        return value.squeeze(0) if name in ("streams", "f", "pre", "post", "res") else value

    def check(self, sample: Sample) -> None:
        streams = sample["streams"]
        # With another n its kernels write outside of their arrays.
        if streams.shape[-2] != 4 or streams.dtype != torch.bfloat16:
            raise NotOffered("made for n = 4 and bfloat16")
        if streams.shape[-1] % 128:
            raise NotOffered("made for multiples of 128 features")

    def functions(self, n: int) -> Mapping[str, Function]:
        ops = self.ops

        def coefficients(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mixes = ops.mhc_pre_norm_fn(streams, phi, None, EPS, fuse_grad_acc=False)
            pre, post, logits = ops.mhc_pre_split_mixes(mixes, alpha, bias, n, PAPER.post_scale, EPS)
            return pre, post, ops.sinkhorn_normalize(logits, R, EPS)

        def head(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor]:
            # Its own mhc_head, but for the flag: with it the backward wants a gradient that only a merge leaves.
            padded = torch.nn.functional.pad(phi, (0, 0, 0, PAPER.columns(n) - len(phi)))
            mixes = ops.mhc_pre_norm_fn(streams, padded, None, EPS, fuse_grad_acc=False)[..., :n]
            weights = ops.mhc_head_compute_mix(mixes, alpha, bias, HEAD.pre_eps)
            return (ops.mhc_pre_apply_mix(streams, weights.unsqueeze(-1)),)

        return {
            "site": self.site,
            "merge+read": self.merge_read,
            "coefficients": coefficients,
            "sinkhorn": lambda logits: (ops.sinkhorn_normalize(logits, R, EPS),),
            "aggregate": lambda streams, pre: (ops.mhc_pre_apply_mix(streams, pre),),
            "merge": lambda streams, f, post, res: (ops.mhc_post(f, streams, post, res),),
            "expand": lambda f: (ops.expand_to_mhc(f, n),),
            "head": head,
        }

    def read(self, streams: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        constants = {"norm_eps": EPS, "pre_eps": EPS, "sinkhorn_eps": EPS, "sinkhorn_repeat": R}
        u, (post, res) = self.functional.mhc_pre(streams, *parameters, post_mult_value=PAPER.post_scale, **constants)
        return u, (post, res)

    def site(self, streams: Tensor, f: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        u, weights = self.read(streams, *parameters)
        return self.ops.mhc_post(f, streams, *weights), u

    def merge_read(
        self, streams: Tensor, f: Tensor, post: Tensor, res: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        merged = self.ops.mhc_post(f, streams, post, res)
        return merged, self.read(merged, *parameters)[0]


class TileKernelsInference(TileKernels):
    """Its fused kernel, which it takes where no gradient is asked for."""

    name = "tile-kernels (no grad)"

    def functions(self, n: int) -> Mapping[str, Function]:
        return {"site": torch.no_grad()(self.site), "merge+read": torch.no_grad()(self.merge_read)}

    def backward(self, op: str, sample: Sample) -> Callable[[], Outputs]:
        raise NotOffered("has no gradients")


NAMES = (
    "mhc_compile",
    "mhc_compile (site by site)",
    "torch eager",
    "torch.compile",
    "liger-kernel",
    "tile-kernels",
    "tile-kernels (no grad)",
)


def load(names: Sequence[str], dry: bool) -> tuple[list[Implementation], dict[str, str]]:
    """The implementations of these names that can be had here, and why the others cannot."""
    makers: dict[str, Callable[[], Implementation]] = {
        "mhc_compile": Ours,
        "mhc_compile (site by site)": SiteBySite,
        "torch eager": Eager,
        "torch.compile": lambda: Compiled("aot_eager" if dry else "inductor"),
        "liger-kernel": Liger,
        "tile-kernels": TileKernels,
        "tile-kernels (no grad)": TileKernelsInference,
    }
    found: list[Implementation] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            found.append(makers[name]())
        except Exception as error:  # whatever a library raises when it is imported
            missing[name] = f"{type(error).__name__}: {error}"[:300]
    return found, missing
