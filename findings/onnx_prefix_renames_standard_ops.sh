#!/usr/bin/env bash
# onnx.compose.merge_models with a prefix renames standard ops that share their name with a local function.
#
# onnx 1.23.2. A model has a function `Expand` in a domain of its own, and calls ONNX's standard `Expand` as well: two
# ops, told apart by their domain, and onnx.checker takes the file. One would expect `add_prefix`, and `merge_models`
# with prefix1, to rename the function's calls alone. Seen: every node whose op_type is that name is renamed, whatever
# its domain, and the standard one becomes `first/Expand` of the standard domain, which no runtime knows.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnx==1.23.2
cat > "$folder/run.py" <<'PYTHON'
import onnx
from onnx import compose, parser

model = parser.parse_model("""
<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
graph (float[2] x) => (float[3, 2] y) {
    doubled = own.Expand (x)
    shape = Constant <value_ints = [3, 2]> ()
    y = Expand (doubled, shape)
}
<domain: "own", opset_import: ["" : 20]>
Expand (a) => (b) {
    b = Add (a, a)
}
""")
onnx.checker.check_model(model)
renamed = compose.add_prefix(model, "first/")
nodes = [(node.domain, node.op_type) for node in renamed.graph.node]
print(f"onnx {onnx.__version__}: {nodes}")
assert ("own", "first/Expand") in nodes, "the function's call has another name now"
assert ("", "first/Expand") in nodes and ("", "Expand") not in nodes, "the standard op keeps its name now"
try:
    onnx.checker.check_model(renamed)
except onnx.checker.ValidationError as error:
    print("checker:", str(error).splitlines()[0])
else:
    raise SystemExit("the checker takes the file now")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
echo "as described"
