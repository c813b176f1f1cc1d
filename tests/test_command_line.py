"""`mhc-compile explain|verify|convert|demo`: every form of MODEL, exit status, JSON, and every refusal in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_compile import load, trace
from mhc_compile.__main__ import main
from mhc_compile.hugging_face_source import make_config, model_class
from mhc_compile.record import Record

ROOT = Path(__file__).parents[1]
FAR = 1e-4  # of outputs about 1: more than rounding

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

# What a user has in the current directory.
SOURCES = {
    "my_models": """
import torch
from torch import nn

built = []  # the device of each build

class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        x = x + self.first(self.norm(x))
        return x + self.second(torch.tanh(x))

def plain():
    print("my own words")
    built.append(torch.empty(0).device.type)
    return nn.Sequential(Block(), Block())

def inputs():
    return (torch.ones(2, 3, 16),)

def pair():
    return plain(), {"input": torch.linspace(-1, 1, 96).reshape(2, 3, 16)}

def reads_a_value():
    model, x = pair()
    torch.linspace(0, 0.1, 2).tolist()
    return model, x

class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.constants = Block(), [torch.ones(16)]

    def forward(self, x):
        return self.block(x + self.constants[0])

def hidden_tensor():
    return Constants(), inputs()

def huge():
    return nn.Sequential(Block(1_000_000)), torch.ones(1, 1_000_000)

def no_site():
    return nn.Sequential(nn.Linear(16, 16)), inputs()

class Presets:
    small = staticmethod(pair)

def raises():
    return _inner()

def _inner():
    raise ValueError("no such width")

def stops():
    raise SystemExit(0)

def takes(width):
    return plain()

def text():
    return "a model"

instance = Block()
number = 3
""",
    "broken_models": "import a_package_that_nobody_has\n",
    "my_script": "raise SystemExit(3)\n",
}
TINY = ["vocab_size=64", "n_positions=32", "n_embd=32", "n_layer=1", "n_head=2", "bos_token_id=0", "eos_token_id=0"]
SETS = [word for field in TINY for word in ("--set", field)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Compiled frames of one test must not steer another; one thread, as the models are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with the user's modules in it."""
    for name, source in SOURCES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in SOURCES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def gpt2_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain GPT-2 that save_pretrained wrote, with weights that no seed of a command gives."""
    path = tmp_path_factory.mktemp("saved") / "gpt2"
    torch.manual_seed(11)
    config = make_config({"model_type": "gpt2"}, TINY)
    model_class(config)(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted_directory(gpt2_directory: Path) -> Path:
    out = gpt2_directory.parent / "converted"
    assert main(["convert", str(gpt2_directory), "--init", "paper", "--n", "2", "--out", str(out)]) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    status = main(arguments)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def devices() -> list[str]:
    found: list[str] = sys.modules["my_models"].built
    return found


# ---------------------------------------------------------------------------------------------- explain


def test_explain_a_factory(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "explain", "my_models:pair")
    assert status == 0 and err == ""
    assert "Sequential: 4 sites on 1 trunk, 0 adds refused" in out
    assert "1.second" in out and "[2, 3, C=16] float32" in out and "my_models.py" in out
    assert devices() == ["meta"], "built once, without weights"


def test_explain_takes_inputs_from_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "my_models:plain", "--inputs", "my_models:inputs")
    assert status == 0 and "4 sites" in out


def test_explain_finds_a_factory_in_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "my_models:Presets.small")
    assert status == 0 and "4 sites" in out


def test_explain_needs_no_memory_for_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Each matrix would take four terabytes."""
    status, out, _ = run(capsys, "explain", "my_models:huge")
    assert status == 0 and "2 sites" in out and "C=1000000" in out


def test_a_model_that_cannot_be_built_without_values_gets_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "explain", "my_models:reads_a_value")
    assert status == 0 and "4 sites" in out
    assert devices() == ["meta", "cpu"]
    assert err.startswith("mhc-compile: my_models:reads_a_value is built with its weights; without: ")


def test_a_model_that_cannot_be_traced_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "explain", "my_models:hidden_tensor")
    assert (status, out) == (2, "") and "--with-weights" in err
    status, out, _ = run(capsys, "explain", "my_models:hidden_tensor", "--with-weights")
    assert status == 0 and "2 sites" in out


def test_explain_without_a_site(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "my_models:no_site")
    assert status == 1 and "0 sites" in out


def test_explain_prints_json_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "explain", "my_models:pair", "--json")
    found = json.loads(out)
    assert status == 0 and err == "my own words\n"
    assert [site["name"] for site in found["sites"]] == ["0.first", "0.second", "1.first", "1.second"]
    assert found["sites"][0]["features"] == 16 and found["refused"] == []


def test_explain_draws(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "explain", "my_models:pair", "--draw", "pair.svg")[0] == 0
    assert Path("pair.svg").read_text().startswith("<?xml")
    status, _, err = run(capsys, "explain", "my_models:pair", "--draw", "pair.txt")
    assert status == 2 and "the picture's path is 'pair.txt'" in err


def test_convert_writes_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "convert", "my_models:pair", "--out", "written", "--source")
    assert status == 0 and "model.pt, model.py" in out
    names: dict[str, Any] = {"__file__": "model.py", "__name__": "written"}
    exec(Path("written/model.py").read_text(), names)
    again = names["Sequential"]()
    again.load_state_dict(torch.load("written/model.pt"))
    assert again(torch.ones(2, 3, 16)).isfinite().all()


def test_explain_a_model_type(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "gpt2", *SETS, "--set", "num_hidden_layers=2")
    assert status == 0
    assert "GPT2LMHeadModel: 4 sites on 1 trunk" in out and "[2, 8, C=32]" in out


def test_explain_a_config_file(capsys: pytest.CaptureFixture[str], gpt2_directory: Path) -> None:
    fields = json.loads((gpt2_directory / "config.json").read_text())
    Path("small.json").write_text(json.dumps({**fields, "architectures": ["GPT2Model"]}))
    status, out, _ = run(capsys, "explain", "small.json", "--set", "hidden_size=48")
    assert status == 0
    assert "GPT2Model: 2 sites" in out and "C=48" in out


def test_explain_a_directory_reads_no_weights(capsys: pytest.CaptureFixture[str], gpt2_directory: Path) -> None:
    Path("copy").mkdir()
    Path("copy/config.json").write_bytes((gpt2_directory / "config.json").read_bytes())
    Path("copy/model.safetensors").write_text("no weights")
    status, out, _ = run(capsys, "explain", "copy")
    assert status == 0 and "GPT2LMHeadModel: 2 sites" in out
    status, out, err = run(capsys, "convert", "copy", "--out", "out")
    assert (status, out) == (2, "") and "the weights in copy do not load into GPT2LMHeadModel" in err
    assert not Path("out").exists()


def test_explain_a_converted_directory(capsys: pytest.CaptureFixture[str], converted_directory: Path) -> None:
    status, out, _ = run(capsys, "explain", str(converted_directory))
    assert status == 0 and "GPT2LMHeadModel: 2 sites" in out


def test_a_directory_without_config_does_not_hide_a_model_type(capsys: pytest.CaptureFixture[str]) -> None:
    Path("gpt2").mkdir()
    status, out, _ = run(capsys, "explain", "gpt2", *SETS)
    assert status == 0 and "GPT2LMHeadModel: 2 sites" in out


# ---------------------------------------------------------------------------------------------- verify


def test_verify_a_factory(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "verify", "my_models:pair", "--n", "3", "--backend", "eager")
    assert status == 0 and "Sequential: verified" in out
    assert "n = 3, step 0: outputs" in out and "compiled (eager)" in out
    assert devices() == ["cpu"]


def test_constraints_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--constraint", "lite", "--single-pass")
    assert run(capsys, "verify", "my_models:pair", "--backend", "eager", *options)[0] == 0
    status, out, _ = run(capsys, "convert", "my_models:pair", "--out", str(tmp_path / "out"), *options, "--json")
    assert status == 0
    written = torch.load(tmp_path / "out" / "model.pt")
    config = Record.from_tensor(written["mhc._extra_state"]).config
    assert (config.constraint, config.single_pass) == ("lite", True) and json.loads(out)["n"] == 4
    status, _, error = run(capsys, "convert", "my_models:pair", "--out", "other", "--constraint", "lite", "--n", "6")
    assert status == 2 and "constraint is 'lite' with n=6; legal: n up to 5" in error


def test_verify_sees_streams_that_differ(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}
    module = sys.modules["mhc_compile.verify"]
    original = module.verify

    def verify(model: Any, inputs: Any) -> Any:
        phi = [parameter for name, parameter in model.mhc.named_parameters() if name.endswith("phi")]
        seen["phi"] = min(float(one.detach().abs().max()) for one in phi)
        return original(model, inputs)

    monkeypatch.setattr(module, "verify", verify)
    assert run(capsys, "verify", "my_models:pair", "--backend", "eager")[0] == 0
    assert seen["phi"] > 0


def test_verify_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules["mhc_compile.verify"].OUTPUT_LIMIT, torch.float32, -1.0)
    status, out, _ = run(capsys, "verify", "my_models:pair", "--backend", "eager", "--json")
    report = json.loads(out)
    assert status == 1 and report["passed"] is False
    assert "fail" in {check["status"] for check in report["checks"]}


def test_verify_a_model_type_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n", "2", "--backend", "eager", "--json", "--set", "use_cache=false"]
    status, out, _ = run(capsys, "verify", "gpt2", *SETS, *options)
    report = json.loads(out)
    assert status == 0 and report["model"] == "GPT2LMHeadModel" and report["passed"] is True
    assert {check["status"] for check in report["checks"]} == {"pass"}


def test_verify_a_converted_directory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], converted_directory: Path
) -> None:
    """As it was saved, with its own n; inductor is slow here, so the checks themselves are left out."""
    checked: list[Any] = []
    report = type("Report", (), {"as_dict": lambda self: {}, "__bool__": lambda self: True})()
    verify = lambda model, inputs: checked.append(model) or report  # noqa: E731
    monkeypatch.setattr(sys.modules["mhc_compile.verify"], "verify", verify)
    assert run(capsys, "verify", str(converted_directory))[0] == 0
    saved = load(converted_directory)
    assert checked[0].mhc.transformer.h.get_submodule("0").mlp.phi.shape == (2 * 32, 2 * 2 + 2 * 2)
    for key, value in saved.state_dict().items():
        assert torch.equal(value, checked[0].state_dict()[key]), key
    for option, value in (("--n", "4"), ("--backend", "eager")):
        status, _, err = run(capsys, "verify", str(converted_directory), option, value)
        assert status == 2 and f"leave {option} away" in err


# ---------------------------------------------------------------------------------------------- convert


def test_convert_a_factory(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n", "3", "--init", "paper", "--skip", "*.first", "--only", "1", "--only", "0.second"]
    status, out, err = run(capsys, "convert", "my_models:pair", "--out", "deep/out", *options, "--json")
    written = json.loads(out)
    assert status == 0 and err == "my own words\n"
    assert written["files"] == ["model.pt"] and written["n"] == 3 and written["init"] == "paper"
    assert written["sites"] == ["0.second", "1.second"]
    assert written["parameters"] == 4 * (16 * 16 + 16) + 2 * 32
    assert written["mhc_parameters"] == 2 * (3 * 16 * (9 + 6) + 3 + 9 + 6)

    names: dict[str, Any] = {}
    sys.path.insert(0, os.getcwd())
    try:
        exec(written["load"], names)
    finally:
        sys.path.remove(os.getcwd())
    saved = torch.load("deep/out/model.pt", weights_only=True)
    assert all(torch.equal(value, saved[key]) for key, value in names["model"].state_dict().items())
    plain, inputs = sys.modules["my_models"].pair()
    plain.load_state_dict({key: value for key, value in saved.items() if not key.startswith("mhc.")})
    with torch.no_grad():
        difference = (trace(names["model"], inputs)(**inputs) - plain(**inputs)).abs().max()
    assert difference > FAR, "mHC is there"


def test_convert_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "convert", "my_models:plain", "--inputs", "my_models:inputs", "--out", "out")
    assert status == 0
    assert "Sequential: 4 sites at n = 4" in out and "written to out: model.pt" in out
    assert "mhc_compile.load('out/model.pt', my_models.plain())" in out


def test_export_converts_first_where_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "export", "my_models:pair", "--n", "2", "--out", "pair.onnx", "--json")
    written = json.loads(out)
    assert status == 0 and Path("pair.onnx").is_file()
    assert written["sites"] == ["0.first", "0.second", "1.first", "1.second"]
    assert written["inputs"] == {"input": ["batch", "input_1", 16]} and written["calls"]["Merge"] == 4
    status, out, err = run(capsys, "export", "my_models:pair", "--out", "plain.onnx")
    assert (status, out) == (2, "my own words\n") and "a model without mHC" in err
    assert not Path("plain.onnx").exists()


def test_export_leaves_a_cache_out(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("n_layer=1", "n_embd=16", "n_head=2", "vocab_size=64", "bos_token_id=1", "eos_token_id=2")
    chosen = [word for size in sizes for word in ("--set", size)]
    status, out, err = run(capsys, "export", "gpt2", "--n", "2", "--out", "gpt2.onnx", "--json", *chosen)
    assert status == 0, err
    assert list(json.loads(out)["outputs"]) == ["logits"]


def test_the_seed_decides_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    weights = []
    for out, seed in (("a", []), ("b", ["--seed", "0"]), ("c", ["--seed", "1"])):
        assert run(capsys, "convert", "my_models:pair", "--out", out, *seed)[0] == 0
        weights.append(torch.load(f"{out}/model.pt", weights_only=True)["0.first.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_convert_a_directory_keeps_its_weights(gpt2_directory: Path, converted_directory: Path) -> None:
    import transformers

    plain = transformers.GPT2LMHeadModel.from_pretrained(gpt2_directory).eval()
    model = load(converted_directory).eval()
    own = plain.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items() if key in own)
    inputs = {"input_ids": torch.arange(16).reshape(2, 8)}
    plain.config.use_cache = model.config.use_cache = False  # torch.export does not give caches
    with torch.no_grad():
        assert (trace(model, inputs)(**inputs).logits - plain(**inputs).logits).abs().max() > FAR, "mHC is there"


def test_a_converted_model_is_not_converted_again(
    capsys: pytest.CaptureFixture[str], converted_directory: Path
) -> None:
    status, _, err = run(capsys, "convert", str(converted_directory), "--out", "out")
    assert status == 2 and "converted model already" in err
    status, _, err = run(capsys, "explain", str(converted_directory / "config.json"))
    assert status == 2 and f"pass {converted_directory}" in err


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_is_there_is_not_overwritten(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    kept = Path("out/kept") if kind == "directory" else Path("out")
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    status, _, err = run(capsys, "convert", "my_models:pair", "--out", "out")
    assert status == 2 and "--out is out, which" in err
    assert "my_models" not in sys.modules, "refused before the work"
    assert kept.read_text() == "mine"


# ---------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("model_type", "overrides", "expected"),
    [
        ("llama", [], "LlamaForCausalLM"),
        ("bert", [], "BertForMaskedLM"),
        ("bert", ["is_decoder=true"], "BertLMHeadModel"),
        ("bart", [], "BartForConditionalGeneration"),
        ("whisper", [], "WhisperForConditionalGeneration"),
        ("vit", [], "ViTForImageClassification"),
        ("clip_text_model", [], "CLIPTextModel"),
        ("vit", ['architectures=["ViTModel"]'], "ViTModel"),
    ],
)
def test_the_class_of_a_config(model_type: str, overrides: list[str], expected: str) -> None:
    assert model_class(make_config({"model_type": model_type}, overrides)).__name__ == expected


def test_overrides_of_inner_configs_keep_the_other_fields() -> None:
    fields = {"model_type": "clip", "text_config": {"num_hidden_layers": 3}}
    config = make_config(fields, ["text_config.hidden_size=64", "text_config.hidden_act=relu"])
    inner = config.text_config
    assert (inner.hidden_size, inner.num_hidden_layers, inner.hidden_act) == (64, 3, "relu")
    assert fields["text_config"] == {"num_hidden_layers": 3}


def test_an_override_wins_over_the_file_under_either_name() -> None:
    assert make_config({"model_type": "gpt2", "n_embd": 96}, ["hidden_size=48"]).n_embd == 48


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["my_model:pair"], "a module 'my_model' that does not exist"),
        (["my_models:pear"], "'pear' in my_models is not there; legal: a name in it: 'pair'"),
        (["my_models:pair()"], "package.module:name"),
        (["my_models:takes"], "is a function of (width)"),
        (["my_models:number"], "is of type int"),
        (["my_models:instance"], "a function that returns it"),
        (["my_models:text"], "what my_models:text returned is a str"),
        (["my_models:plain"], "pass --inputs"),
        (["my_models:plain", "--inputs", "my_models:text"], "legal: a tensor, a tuple"),
        (["my_models:plain", "--inputs", "my_models"], "--inputs is 'my_models'"),
        (["my_models:pair", "--set", "n_layer=1"], "for the configs of Hugging Face models"),
        (["lama"], "'llama'"),
        (["some/model"], "no file or directory here"),
        (["./empty"], "a directory without config.json"),
        (["no.json"], "no file or directory here"),
        (["broken.json"], "broken.json is no JSON"),
        (["list.json"], "list.json is a list"),
        (["untyped.json"], "without a model_type"),
        (["unknown.json"], "the model type is 'lama'; legal: a model type of the installed transformers: 'llama'"),
        (["custom.json"], "the architecture in the config is 'GPT2Modell'"),
        (["gpt2", "--set", "n_leyer=1"], "a field of GPT2Config: 'n_layer'"),
        (["gpt2", "--set", "to_dict=1"], "the field in --set is 'to_dict'"),
        (["gpt2", "--set", "n_layer.x=1"], "the field in --set is 'x'"),
        (["gpt2", "--set", "n_layer"], "name=value"),
        (["gpt2", "--set", "n_layer=two"], "the GPT2Config is refused"),
        (["gpt2", "--set", "activation_function=gelly"], "GPT2LMHeadModel cannot be built from this config: KeyError"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    Path("empty").mkdir()
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("untyped.json").write_text("{}")
    Path("unknown.json").write_text('{"model_type": "lama"}')
    Path("custom.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2Modell"]}')
    status, out, err = run(capsys, "explain", *arguments, "--json")
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("mhc-compile: ") and words in last
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("model", "words", "frame"),
    [
        ("my_models:raises", "my_models:raises raised ValueError: no such width", "in _inner"),
        ("my_models:stops", "my_models:stops raised SystemExit: 0", "in stops"),
        ("broken_models:make", "broken_models cannot be imported: ModuleNotFoundError", "broken_models.py"),
        ("my_script:make", "my_script cannot be imported: SystemExit: 3", "my_script.py"),
    ],
)
def test_errors_of_the_users_code_keep_their_place(
    capsys: pytest.CaptureFixture[str], model: str, words: str, frame: str
) -> None:
    status, _, err = run(capsys, "verify", model)
    assert status == 2
    assert err.splitlines()[-1].startswith(f"mhc-compile: {words}")
    assert "Traceback" in err and frame in err
    assert "model_source.py" not in err, "only the user's own frames"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["verify", "my_models:pair", "--n", "0"], "n is 0"),
        (["verify", "my_models:no_site"], "no residual add to convert"),
        (["convert", "my_models:pair", "--out", "out", "--n", "1"], "--n is 1"),
        (["convert", "my_models:pair", "--out", "out", "--n", "65"], "n is 65"),
        (["convert", "my_models:pair", "--out", "out", "--only", "2"], "'2', which matches no site"),
        (["demo", "--steps", "0"], "--steps"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    status, _, err = run(capsys, *options)
    assert status == 2 and words in err and "Traceback" not in err
    assert not Path("out").exists()


@pytest.mark.parametrize("arguments", [[], ["convert", "gpt2"], ["explain"], ["convert", "a:b", "--init", "zero"]])
def test_wrong_calls(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: mhc-compile" in capsys.readouterr().err


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run(capsys, "explain", "gpt2")
    assert status == 2 and "pip install transformers" in err and "Traceback" not in err
    assert run(capsys, "explain", "my_models:pair")[0] == 0


def test_an_error_that_nobody_expected_is_no_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explain(model: Any, inputs: Any) -> Any:
        raise RuntimeError("out of paper")

    monkeypatch.setattr(sys.modules["mhc_compile.explain"], "explain", explain)
    status, _, err = run(capsys, "explain", "my_models:pair")
    assert status == 2
    assert "RuntimeError: out of paper" in err and err.splitlines()[-1].startswith("mhc-compile: ")


# ---------------------------------------------------------------------------------------------- around the commands


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = run(capsys, "explain", "my_models:pair", "--json")
    assert status == 0 and json.loads(out)["model"] == "Sequential"
    assert "mhc-compile: building my_models:pair ..." in err and "mhc-compile: tracing Sequential: " in err


def test_the_search_path_is_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.path)
    assert run(capsys, "explain", "my_models:pair")[0] == 0
    assert sys.path == before


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_demo(monkeypatch: pytest.MonkeyPatch, passed: bool, status: int) -> None:
    import mhc_compile.demo

    given: list[Any] = []
    monkeypatch.setattr(mhc_compile.demo, "run_demo", lambda options: given.append(options) or passed)
    assert main(["demo", "--steps", "7", "--streams", "3", "--picture", "a.png"]) == status
    assert (given[0].steps, given[0].n, given[0].picture) == (7, 3, Path("a.png"))


def process(script: str, **options: Any) -> subprocess.Popen[str]:
    """A script in a new process, as the installed command runs: the current directory is not on the path (-P)."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


COMMAND = """
import sys
from mhc_compile.__main__ import main
for command in ("explain", "verify", "convert", "demo"):
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
assert not {"transformers", "torch._inductor.compile_fx", "matplotlib"} & set(sys.modules)
print("end of help")
sys.exit(main(["explain", "my_models:no_site", "--json"]))
"""


def test_the_command_in_a_new_process() -> None:
    command = process(COMMAND)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 1, err
    words, found = out.split("end of help\n")
    assert words.count("MODEL is one of") == 3 and words.count("exit status: 0 success") == 3
    assert "mhc-compile convert gpt2 --out gpt2-mhc" in words
    assert json.loads(found)["sites"] == [] and err == ""


def test_a_reader_that_stops_early() -> None:
    command = process(
        "import sys; from mhc_compile.__main__ import main; sys.exit(main(['explain', 'my_models:no_site']))"
    )
    assert command.stdout is not None and command.stderr is not None
    command.stdout.close()
    err = command.stderr.read()
    command.stderr.close()
    assert command.wait(timeout=120) == 2 and err == ""
