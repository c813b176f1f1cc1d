#!/usr/bin/env bash
# torch.compile never frees the fake tensors of parameters that have gradients.
#
# torch 2.13.0, CPU build. One would expect `torch._dynamo.reset()` and a garbage collection to give back what a
# compilation has made: of a model whose gradients are None they do. Seen: when the parameters have a gradient (every
# compilation but the first of a training), each compilation leaves the fake parameters and their fake gradients alive for
# good, with the fake mode and the shape environment that belong to them. A fake parameter holds its gradient in C++, where
# no collector looks, and the gradient holds the mode, which holds the parameter.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import gc

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(2, 8)


def alive_after_each(set_to_none):
    found = []
    for _ in range(4):
        if set_to_none:
            model.zero_grad(set_to_none=True)
        torch._dynamo.reset()
        torch.compile(model, backend="aot_eager")(x).sum().backward()
        torch._dynamo.reset()
        gc.collect()
        found.append(sum(type(one) is FakeTensor for one in gc.get_objects()))
    return found


none, there = alive_after_each(True), alive_after_each(False)
print(f"torch {torch.__version__}: fake tensors after each of four compilations and resets")
print(f"gradients None: {none}; gradients there: {there}")
assert none[1] == none[3] and there[0] < there[1] < there[2] < there[3], "this changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/run.py"
echo "as described"
