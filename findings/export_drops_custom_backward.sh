#!/usr/bin/env bash
# torch.export keeps the forward of an autograd.Function and drops its backward.
#
# torch 2.13.0, CPU build. An exported program can be trained: its module takes gradients. One would expect those of the
# model, as under torch.compile, which keeps the function's own backward. Seen: the ops of its forward stand in the
# program, and gradients are theirs: for a straight-through round() they are all zero, without a warning. With strict=True
# they stand in a region without gradients instead, and the output takes none.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch import nn


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return Round.apply(self.linear(x))


def gradient(run, model):
    model.zero_grad()
    run(x).sum().backward()
    return float(next(model.parameters()).grad.abs().sum())


torch.manual_seed(0)
model, x = Model(), torch.randn(3, 4)
eager, compiled = gradient(model, model), gradient(torch.compile(model, backend="aot_eager"), model)
print(f"torch {torch.__version__}: eager {eager:.3f}, torch.compile {compiled:.3f}")
assert eager == compiled > 0
exported = torch.export.export(model, (x,), strict=False).module()
found = gradient(exported, exported)
strict = torch.export.export(model, (x,), strict=True).module()(x).requires_grad
print(f"torch.export {found:.3f}; with strict=True the output requires_grad is {strict}")
assert found == 0 and not strict, "the backward is kept now"
PYTHON
"$folder/env/bin/python" "$folder/run.py"
echo "as described"
