"""What the kernels of a site move through memory, counted on the arguments of their launches, and its least time.

python -m benchmarks.kernel_traffic [--tokens 8192] [--streams 4] [--bandwidth 4.3] [--launches]

A unit is one stream of all tokens, T C elements.  Streams before and after the site, the branch's input and output,
and their gradients are counted in units; the rest (coefficients, phi, shares of sums) in bytes, and as a share of the
units' bytes.  A floor is bytes over bandwidth.  Nothing runs: the launches are recorded with tensors that have no
memory, and each tensor of a launch counts once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.convention import PAPER, Before, Convention

WIDTHS = (1280, 2560, 4096, 7168)


@dataclass(frozen=True)
class Moved:
    """What one direction of a site moves."""

    units: float
    unit_bytes: int
    other_bytes: int

    @property
    def bytes(self) -> float:
        return self.units * self.unit_bytes + self.other_bytes

    @property
    def other_share(self) -> float:
        return self.other_bytes / (self.units * self.unit_bytes)

    def floor_us(self, bandwidth: float) -> float:
        """Microseconds at ``bandwidth`` bytes a second."""
        return self.bytes / bandwidth * 1e6


def site_launches(
    tokens: int, features: int, n: int = 4, dtype: torch.dtype = torch.bfloat16, convention: Convention = PAPER
) -> dict[str, list[Any]]:
    """The launches of a site's forward (read and merge) and of its backward, by itself and in a chain of sites.

    In a chain the merge of one site and the read of the next are fused, and the backward goes over their border: it
    writes df of the site before, and not its own.  With single-pass reads the chain's merges are read with the pre of
    the site before.  All tensors are on the meta device.
    """
    from mhc_compile.kernels.triton_coefficients import read
    from mhc_compile.kernels.triton_launch import record
    from mhc_compile.kernels.triton_merge import merge
    from mhc_compile.kernels.triton_merge_backward import merge_backward
    from mhc_compile.kernels.triton_merge_read import merge_read
    from mhc_compile.kernels.triton_single_pass import merge_read_early
    from mhc_compile.kernels.triton_site_backward import crosses, site_backward

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    columns = convention.columns(n)
    parameters = meta(n * features, columns), meta(convention.groups), meta(columns)
    streams, grad = (meta(tokens, n, features, dtype=dtype) for _ in range(2))
    f, du = (meta(tokens, features, dtype=dtype) for _ in range(2))
    with record(run=False) as forward:
        _, site = read(streams, *parameters, convention)
        assert site.post is not None
        merge(streams, f, site.post, site.res, convention.mix)
    with record(run=False) as chained:
        merge_read((streams, f, site.post, site.res), parameters, convention.mix, False, convention)
    with record(run=False) as early:
        merge_read_early((streams, f, site.post, site.res), site.pre, parameters, convention.mix, False, convention)
    with record(run=False) as backward:
        _, dpost, dres = merge_backward(grad, streams, f, site.post, convention.mix)
        site_backward(streams, parameters, site, convention, grad=grad, du=du, grad_post=dpost, grad_res=dres)
    found = {"forward": forward, "in a chain": chained, "single pass": early, "backward": backward}
    if not crosses(streams, convention.mix):
        return found
    more = {"grad": grad, "du": du, "f": f, "before": Before(site.post, convention.rounded, dtype)}
    with record(run=False) as crossing:
        site_backward(streams, parameters, site, convention, **more)
    with record(run=False) as early_crossing:
        site_backward(streams, parameters, site, convention, **more, weights=site.pre, grad_pre=site.pre)
    return {**found, "backward in a chain": crossing, "backward, single pass": early_crossing}


def site_traffic(tokens: int, features: int, n: int = 4, dtype: torch.dtype = torch.bfloat16) -> dict[str, Moved]:
    """What a site moves, by direction."""
    from mhc_compile.kernels.triton_traffic import traffic

    unit_bytes = tokens * features * dtype.itemsize
    moved = {}
    for direction, launches in site_launches(tokens, features, n, dtype).items():
        total = traffic(launches, tokens, features)[-1]
        moved[direction] = Moved(total.units, unit_bytes, total.other_bytes)
    return moved


def report(tokens: int, n: int, bandwidth: float) -> str:
    """The table of all widths, one line a direction."""
    lines = [
        f"T = {tokens}, n = {n}, bfloat16; floors at {bandwidth / 1e12:g} TB/s",
        f"{'C':>6s}  {'direction':22s}{'units':>6s}{'units MB':>10s}{'rest MB':>9s}{'rest':>7s}{'floor us':>10s}",
    ]
    for features in WIDTHS:
        for direction, moved in site_traffic(tokens, features, n).items():
            main, rest = moved.units * moved.unit_bytes / 1e6, moved.other_bytes / 1e6
            lines.append(
                f"{features:6d}  {direction:22s}{moved.units:6g}{main:10.1f}{rest:9.1f}{moved.other_share:7.1%}"
                f"{moved.floor_us(bandwidth):10.1f}"
            )
    return "\n".join(lines)


def launch_report(tokens: int, features: int, n: int) -> str:
    """Each launch of a site by itself."""
    from mhc_compile.kernels.triton_traffic import table, traffic

    launches = site_launches(tokens, features, n)
    return "\n".join(
        f"C = {features}, {name}\n{table(traffic(found, tokens, features))}" for name, found in launches.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s; 4.3 is what an H200 copies")
    parser.add_argument("--launches", action="store_true", help="also every launch by itself")
    options = parser.parse_args()
    print(report(options.tokens, options.streams, options.bandwidth * 1e12))
    if options.launches:
        for features in WIDTHS:
            print("\n" + launch_report(options.tokens, features, options.streams))


if __name__ == "__main__":
    main()
