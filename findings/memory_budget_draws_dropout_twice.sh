#!/usr/bin/env bash
# Under a small activation memory budget, torch.compile's backward uses another dropout mask than its forward.
#
# torch 2.13.0 and 2.15.0, CPU build, inductor. torch._functorch.config.activation_memory_budget says how much the
# forward may keep for the backward; 0 is a checkpoint of everything. torch.utils.checkpoint brings the state of the
# random numbers back before it computes again, so one would expect the same mask here. Seen: at a budget of 0 dropout is
# drawn anew in the backward. Half of the gradients that should be zero are not, and the other way round; outputs are
# right, the loss falls, and nothing warns. At 1 (the default) the masks are equal. Backend aot_eager does it from 0.5 on.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import torch
import torch._functorch.config as config
import torch.nn.functional as F

torch.manual_seed(0)
first, second = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
x = torch.randn(32, 64)


def model(bias):
    hidden = torch.relu(x @ first) @ second + bias
    return torch.sin(F.dropout(torch.sin(hidden), 0.5))


def disagreeing(budget):
    """How many elements were dropped in the forward and have a gradient, or were kept and have none."""
    torch._dynamo.reset()
    bias = torch.zeros(32, 64, requires_grad=True)
    with config.patch(activation_memory_budget=budget):
        output = torch.compile(model)(bias)
        output.sum().backward()
    return int(((output != 0) != (bias.grad != 0)).sum()), output.numel()


for budget in (1.0, 0.0):
    wrong, all_elements = disagreeing(budget)
    print(f"torch {torch.__version__}, budget {budget}: {wrong} of {all_elements} gradients are of another mask")
    assert (wrong == 0) == (budget == 1.0), "this changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/run.py"
echo "as described"
