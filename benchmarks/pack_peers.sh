#!/usr/bin/env bash
# The libraries that benchmarks/kernel_times.py is compared with, packed for a machine without a network.
#
#     benchmarks/pack_peers.sh [FILE]        FILE is .peers/peers.tar.xz unless given
#
# Liger-Kernel and TileKernels, with what TileKernels needs beyond PyTorch, for Python 3.12 on x86-64 Linux, without
# their other dependencies (torch, triton, numpy, psutil, cloudpickle, ml_dtypes and tqdm are taken from the machine).
# The versions are those that work together: TileKernels 1.0.0 imports tilelang.utils.target, which tilelang dropped
# after 0.1.9, and tilelang 0.1.9 does not load with apache-tvm-ffi from 0.1.10 on; TileKernels 2 has no autograd ops
# for mHC and needs torch 2.13. Unpack with `tar xJf FILE -C FOLDER` and put FOLDER on PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-.peers/peers.tar.xz}
packages=(liger-kernel==0.8.5 tile-kernels==1.0.0 tilelang==0.1.9 apache-tvm-ffi==0.1.9 torch-c-dlpack-ext==0.1.5 z3-solver==4.15.4.0)
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${tag}_x86_64")
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for package in "${packages[@]}"; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d "$work/wheels" "$package"
done
python3 - "$work" <<'PYTHON'
import sys, zipfile
from pathlib import Path

work = Path(sys.argv[1])
for wheel in (work / "wheels").glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
# z3's Python bindings look for their library where pip would have put it; tilelang loads it from there too.
for data in (work / "site").glob("*.data"):
    for kind in ("purelib", "platlib"):
        if (data / kind).is_dir():
            for entry in (data / kind).iterdir():
                entry.rename(work / "site" / entry.name)
PYTHON
rm -rf "$work"/site/*.data "$work"/site/z3/include
mkdir -p "$(dirname "$target")"
[ "$(dirname "$target")" != .peers ] || echo '*' >.peers/.gitignore
tar -C "$work/site" -c . | xz -T0 -9 >"$target"
echo "wheels $(du -sm "$work/wheels" | cut -f1) MiB, unpacked $(du -sm "$work/site" | cut -f1) MiB, $target $(du -sm "$target" | cut -f1) MiB"
