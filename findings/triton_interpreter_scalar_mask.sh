#!/usr/bin/env bash
# Triton 3.9's interpreter refuses a mask that is made of a comparison of vectors and one of scalars.
#
# triton 3.9.0 with torch 2.13.0, TRITON_INTERPRET=1, on a CPU. `mask=(rows < n) & (tl.program_id(0) == 0)` has the type
# int1 in the language, compiles for a GPU, and ran in the interpreter of 3.8.0. Seen in 3.9.0: ValueError, "mask has
# unsupported dtype". The interpreter keeps the type of a comparison's operands beside its result; spread over the vector,
# a scalar result takes that type, and the mask is an array of int32, which loads and stores took and now do not.
# `tl.where(first, rows < n, False)` or an `if` around the store runs.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def mark(out, n, size: tl.constexpr):
    rows = tl.arange(0, size)
    tl.store(out + rows, tl.full((size,), 1.0, tl.float32), mask=(rows < n) & (tl.program_id(0) == 0))


out = torch.zeros(8)
try:
    mark[(1,)](out, 5, 8)
    seen = out.tolist()
except Exception as error:
    seen = str(error)
print(f"triton {triton.__version__}: {seen}")
if triton.__version__.startswith("3.8"):
    assert seen == [1.0] * 5 + [0.0] * 3
else:
    assert "mask has unsupported dtype" in seen, "it runs now"
PYTHON
for version in 3.8.0 3.9.0; do
    "$folder/env/bin/pip" install -q --no-deps triton==$version
    TRITON_INTERPRET=1 "$folder/env/bin/python" "$folder/run.py"
done
echo "as described"
