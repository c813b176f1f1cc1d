#!/usr/bin/env bash
# Everything that needs a GPU, in one command: tests, memory checks, and the measurements of benchmarks/kernel_times.py,
# train_step.py and fusion.py.
#
#     bash benchmarks/gpu_session.sh [first | rest | steps | tests]
#
# Run it in the root of the repository, on a machine with a CUDA device, PyTorch, Triton and pytest.  Results go to $OUT
# (./gpu_session unless set) and are saved as they come; LIMIT is how many seconds it may take (560).
#
#   first   compile; a site at the headline shapes; tests; memory checks; every op there; other shapes, if time is left
#   rest    go on with the measurements of $OUT/kernels.json or benchmarks/results/kernels_$NAME.json where they ended
#   steps   merges on a stream of high priority (priority_merge.json), then whole models: training steps of 1B parameters
#           (train_step.json), and models that are mHC (fusion.json)
#   tests   tests and memory checks alone
#
# The peers come from .peers/peers.tar.xz, where benchmarks/pack_peers.sh puts them; without that file they are reported
# as missing; it has to travel with the working tree, although git ignores it.  Afterwards copy kernels.json to
# benchmarks/results/kernels_$NAME.json and run `python -m benchmarks.kernel_table --write`, and the other results to
# benchmarks/results/priority_merge_$NAME.json, train_step_$NAME.json and fusion_$NAME.json.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:-first}
NAME=${NAME:-h200}
LIMIT=${LIMIT:-560}
started=$SECONDS
if [ -z "${OUT:-}" ]; then
    OUT=gpu_session
    mkdir -p "$OUT" && echo '*' >"$OUT/.gitignore"
fi
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$work"' EXIT
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PATH="$PATH:/usr/local/cuda/bin"
if [ -z "${CUDA_HOME:-}" ] && [ -d /usr/local/cuda ]; then export CUDA_HOME=/usr/local/cuda; fi

left() { echo $((LIMIT - (SECONDS - started))); }
say() { echo "== $((SECONDS - started)) s: $*"; }
within() { # SECONDS COMMAND...: at most so long, and never longer than what is left
    local most=$1
    shift
    [ "$(left)" -gt 5 ] || { say "no time left for: $*"; return 124; }
    timeout -k 5 "$((most < $(left) ? most : $(left)))" "$@"
}

{
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
    python3 -c 'import platform, torch, triton; print(platform.python_version(), torch.__version__, triton.__version__)'
} 2>&1 | tee "$OUT/machine.txt"

with_peers=$PYTHONPATH
if [ -f .peers/peers.tar.xz ]; then
    # By Python, as not every machine has xz.
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
        .peers/peers.tar.xz "$work/peers" && with_peers="$PWD:$work/peers"
fi
kernels() { PYTHONPATH=$with_peers python3 -m benchmarks.kernel_times "$@"; }
export -f kernels
export with_peers

compile_ahead() { # SHAPES: every kernel once at each shape, many at a time: fills the caches on disk
    export work
    for shape in "$@"; do
        for who in "mhc_compile,mhc_compile (site by site)" torch.compile liger-kernel "tile-kernels,tile-kernels (no grad)"; do
            printf '%s\0' "$shape" "$who"
        done
    done | within 160 xargs -0 -n 2 -P 10 bash -c \
        'kernels --compile --only "$1" --implementations "$2" >"$work/compile-$1-${2%%,*}.log" 2>&1' _
    cat "$work"/compile-*.log >"$OUT/compile.log"
    say "compiled for $*"
}
headline=(T8192-C2560-n4-bf16 T8192-C4096-n4-bf16 T8192-C7168-n4-bf16)
others=(T8192-C1280-n4-bf16 T4096-C2560-n4-bf16 T16384-C2560-n4-bf16 T8192-C2560-n2-bf16 T8192-C2560-n8-bf16
    T8192-C2560-n4-fp32 T64-C2560-n4-bf16)

measure() { # SECONDS OPTIONS...: starts again after the device was lost
    local most=$1 code
    shift
    for _ in 1 2 3 4; do
        within "$most" bash -c "kernels --out '$OUT/kernels.json' --resume $*" 2>&1 | tee -a "$OUT/kernels.log"
        code=${PIPESTATUS[0]}
        [ "$code" = 3 ] || break
    done
    say "measured $* (exit code $code)"
}

run_tests() {
    # Plugins by name alone, and no warning is an error: other packages and versions than ours warn.
    local workers=()
    python3 -c 'import xdist' 2>/dev/null && workers=(-p xdist -n 10)
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 within 170 python3 -m pytest -m gpu -q --tb=short -W default \
        -p no:cacheprovider "${workers[@]}" tests/test_kernels_*.py tests/test_gpu.py >"$OUT/pytest.log" 2>&1
    say "tests (exit code $?): $(tail -1 "$OUT/pytest.log")"
}

check_memory() { # one case of each family of kernels, with an allocation for each tensor
    command -v compute-sanitizer >/dev/null || { say "no compute-sanitizer"; return; }
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 60 compute-sanitizer --tool $tool --error-exitcode 9 \
            python3 -m benchmarks.kernel_times --check --only dry --implementations mhc_compile >"$work/$tool.log" 2>&1
        say "$tool (exit code $?): $(grep -a 'SUMMARY' "$work/$tool.log" | tail -1)"
        tail -c 200000 "$work/$tool.log" >>"$OUT/sanitizer.log"
    done
}

case $what in
first)
    rm -f "$OUT/kernels.json" "$OUT/kernels.log"
    compile_ahead "${headline[@]}" dry
    measure 100 --only headline --ops site,merge+read,chain --seconds 90
    compile_ahead "${others[@]}" &
    run_tests
    check_memory
    wait
    measure "$(left)" --only headline --seconds $(($(left) - 20))
    measure "$(left)" --only rest --seconds $(($(left) - 20))
    ;;
rest)
    [ -f "$OUT/kernels.json" ] || cp "benchmarks/results/kernels_$NAME.json" "$OUT/kernels.json" || exit 1
    compile_ahead "${headline[@]}"
    compile_ahead "${others[@]}"
    measure "$(left)" --seconds $(($(left) - 20))
    ;;
steps)
    # What follows from time and memory first; a model of transformers is named as missing where the package is.
    within 70 python3 -m benchmarks.priority_merge --seconds 50 --out "$OUT/priority_merge.json" 2>&1 |
        tee "$OUT/priority_merge.log"
    say "merges of high priority (exit code ${PIPESTATUS[0]})"
    within 350 python3 -m benchmarks.train_step --seconds 290 --out "$OUT/train_step.json" 2>&1 |
        tee "$OUT/train_step.log"
    say "training steps (exit code ${PIPESTATUS[0]})"
    within "$(left)" python3 -m benchmarks.fusion --layers 1 --seconds $(($(left) - 60)) --out "$OUT/fusion.json" \
        2>&1 | tee "$OUT/fusion.log"
    say "fusion (exit code ${PIPESTATUS[0]})"
    ;;
tests)
    compile_ahead dry
    run_tests
    check_memory
    ;;
*)
    echo "gpu_session.sh $what: legal are first, rest, steps, tests" >&2
    exit 2
    ;;
esac
[ ! -f "$OUT/kernels.json" ] || python3 -m benchmarks.kernel_table "$OUT/kernels.json"
say "done; results in $OUT"
