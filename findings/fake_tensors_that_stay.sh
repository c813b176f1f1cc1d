#!/usr/bin/env bash
# torch.compile never frees the fake tensors of a graph whose parameters have gradients, or one of whose inputs is a view.
#
# torch 2.13.0, CPU build. One would expect `torch._dynamo.reset()` and a garbage collection to give back what a
# compilation has made: of a model whose gradients are None and an input that owns its memory they do. Seen:
# - When the parameters have a gradient (every compilation but the first of a training), each compilation leaves the fake
#   parameters and their fake gradients alive for good. A fake parameter holds its gradient in C++, where no collector
#   looks, and the gradient holds the fake mode, which holds the parameter.
# - When an input is a view (a slice of the data, a reshaped range), each leaves the fake tensors of all inputs and
#   parameters. A fake view holds its mode in C++ by what makes it from its base, and the shape environment of the mode
#   lists every fake input, to write guards for.
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


def alive_after_each(set_to_none, given=x):
    found = []
    for _ in range(4):
        if set_to_none:
            model.zero_grad(set_to_none=True)
        torch._dynamo.reset()
        torch.compile(model, backend="aot_eager")(given).sum().backward()
        torch._dynamo.reset()
        gc.collect()
        found.append(sum(type(one) is FakeTensor for one in gc.get_objects()))
    return found


none, view, there = alive_after_each(True), alive_after_each(True, torch.randn(4, 8)[:2]), alive_after_each(False)
print(f"torch {torch.__version__}: fake tensors after each of four compilations and resets")
print(f"gradients None: {none}; and a view for an input: {view}; gradients there: {there}")
assert none[1] == none[3] and there[0] < there[1] < there[2] < there[3], "this changed"
assert view[0] < view[1] < view[2] < view[3], "a view leaves nothing now"
PYTHON
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/run.py"
echo "as described"
