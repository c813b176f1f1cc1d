#!/usr/bin/env bash
# Triton's interpreter computes bfloat16 wrong and says nothing.
#
# triton 3.9.0 (3.6.0, 3.7.1 and 3.8.0 as well) with torch 2.13.0, TRITON_INTERPRET=1, on a CPU. One would expect the
# numbers of a GPU, or an error. Seen: sums, products and tl.dot of bfloat16 take the bit patterns of their operands as
# integers, and a cast from float32 truncates where a GPU rounds to nearest. A kernel that passes its tests in float32
# or float16 in the interpreter is tested by nothing in bfloat16, and a failure there says nothing of the kernel.
#
#   1.5 + 2.25: nan
#   dot of 16 x 16 ones: 4.23e+09, right is 16
#   1.005 cast from float32: 1.0, to nearest is 1.0078125
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def add(x, y, out):
    tl.store(out, tl.load(x) + tl.load(y))


@triton.jit
def dot(x, y, out, size: tl.constexpr):
    at = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def cast(x, out):
    tl.store(out, tl.load(x).to(tl.bfloat16))


def bf16(*values):
    return torch.tensor(values, dtype=torch.bfloat16)


total, rounded = bf16(0.0), bf16(0.0)
add[(1,)](bf16(1.5), bf16(2.25), total)
product = torch.zeros(16, 16)
dot[(1,)](torch.ones(16, 16, dtype=torch.bfloat16), torch.ones(16, 16, dtype=torch.bfloat16), product, 16)
value = torch.tensor([1.005])
cast[(1,)](value, rounded)
print(f"triton {triton.__version__}: 1.5 + 2.25 = {total.item():.3g}; dot of ones {product[0, 0].item():.3g}, right 16; "
      f"1.005 -> {rounded.item()}, torch {value.bfloat16().item()}")
assert total.item() != 3.75, "the sum is right now"
assert product[0, 0].item() != 16, "the product is right now"
assert rounded.item() == 1.0 and value.bfloat16().item() == 1.0078125, "the cast rounds to nearest now"
PYTHON
TRITON_INTERPRET=1 "$folder/env/bin/python" "$folder/run.py"
echo "as described"
