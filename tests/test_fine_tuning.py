"""Converted models in the hands of Trainer, accelerate and PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import zoo
from graphs import first_output, randomize, small_model
from hf_pairs import BERT, GPT2, LLAMA, T5, VIT, Pair, distance, greedy
from mhc_compile import RewriteError, load, mhc_compile, param_groups, restore
from mhc_compile.conversion import is_converted

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    # PEFT reads every attribute of a model, also those that transformers deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

EXACT = 1e-5  # of the largest value: the same function, compiled for another call
FAR = 0.05  # of the largest value: no rounding


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    """Compiled frames of one test must not steer another; dropping them also keeps memory down."""
    yield
    torch._dynamo.reset()
    AcceleratorState._reset_state(True)


def text(rows: int, length: int = 16) -> list[dict[str, Tensor]]:
    """Lines of Python's own help, a character a token."""
    from pydoc_data.topics import topics

    letters = "".join(topics[name] for name in sorted(topics))[: rows * length]
    ids = torch.tensor([ord(letter) % (zoo.VOCAB - 3) + 3 for letter in letters]).view(rows, length)
    return [dict(input_ids=row, labels=row) for row in ids]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def assert_equal(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert torch.equal(value, actual[key]), key


# ---------------------------------------------------------------------------------------------- Trainer


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1, seed=1)
    usual = dict(per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no")
    return TrainingArguments(output_dir=str(folder), **{**quiet, **usual, **options})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """With evaluation in between, gradients of two batches a step, and the best weights loaded at the end."""
    steps = dict(max_steps=4, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2)
    evaluation = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    data = dict(train_dataset=text(32), eval_dataset=text(8))
    pair = Pair(LLAMA)
    first = weights(pair.model)
    whole = Trainer(pair.model, arguments(tmp_path / "whole", **steps, **evaluation), **data)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    assert all(not torch.equal(value, first[key]) for key, value in pair.model.named_parameters())

    other = Pair(LLAMA)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1.0)  # all of it comes from the checkpoint
    resumed = Trainer(other.model, arguments(tmp_path / "resumed", **steps, **evaluation), **data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert_equal(weights(pair.model), weights(other.model))

    best = load(whole.state.best_model_checkpoint)
    assert is_converted(best)
    assert_equal(weights(pair.model), weights(best))


class NoDecayOnSites(Trainer):
    """What the README shows."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith("mhc.")]


@pytest.mark.parametrize("how", ["trainer", "optimizer"])
def test_sites_take_no_weight_decay_under_trainer(how: str, tmp_path: Path) -> None:
    """Trainer by itself excludes biases and norms by name, and so would decay phi and alpha."""
    pair = Pair(LLAMA)
    options = arguments(tmp_path, weight_decay=0.1)
    if how == "trainer":
        trainer: Trainer = NoDecayOnSites(pair.model, options)
    else:
        optimizer = torch.optim.AdamW(param_groups(pair.model, weight_decay=0.1), lr=options.learning_rate)
        trainer = Trainer(pair.model, options, optimizers=(optimizer, None))
    trainer.create_optimizer()
    decay = {id(one): group["weight_decay"] for group in trainer.optimizer.param_groups for one in group["params"]}
    assert {decay[id(one)] for one in pair.model.mhc.parameters()} == {0.0}
    assert decay[id(pair.model.lm_head.weight)] == 0.1
    assert decay.keys() == {id(one) for one in pair.model.parameters()}


def test_trainer_with_bfloat16_and_activation_checkpointing(tmp_path: Path) -> None:
    pair = Pair(GPT2)
    before = weights(pair.model.mhc)
    options = arguments(tmp_path, max_steps=2, bf16=True, activation_checkpointing=True)
    trainer = Trainer(pair.model, options, train_dataset=text(8))
    trainer.train()
    assert all(torch.tensor(losses(trainer)).isfinite())
    for key, value in pair.model.mhc.named_parameters():
        assert value.dtype == torch.float32 and not torch.equal(value, before[key]), key


# ------------------------------------------------------------------------------------------- accelerate


def train(model: nn.Module, optimizer: Any, ids: Tensor, steps: int, backward: Any = Tensor.backward) -> list[float]:
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model), lr=1e-2)


def test_accelerate_trains_saves_and_loads(tmp_path: Path) -> None:
    pair = Pair(LLAMA)
    twin, ids = copy.deepcopy(pair.model), pair.inputs["input_ids"]
    by_hand = train(twin, adam(twin), ids, 4)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(pair.model, adam(pair.model))
    found = train(model, optimizer, ids, 2, accelerator.backward)
    accelerator.save_state(str(tmp_path))
    found += train(model, optimizer, ids, 2, accelerator.backward)
    assert found == by_hand
    accelerator.load_state(str(tmp_path))
    assert train(model, optimizer, ids, 2, accelerator.backward) == by_hand[2:]
    assert accelerator.unwrap_model(model) is pair.model
    written = load_file(tmp_path / "model.safetensors")
    assert {f"mhc.{key}" for key, _ in pair.model.mhc.named_parameters()} <= written.keys()
    plain = train(pair.plain, adam(pair.plain), ids, 1)
    assert abs(plain[0] - by_hand[0]) > 0.01


def test_accelerate_accumulates_gradients() -> None:
    pair = Pair(GPT2)
    ids = torch.randint(3, zoo.VOCAB, (4, 8))
    expected = pair.model(input_ids=ids, labels=ids).loss
    expected.backward()
    wanted = {key: one.grad.clone() for key, one in pair.model.named_parameters()}
    pair.model.zero_grad()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(pair.model, torch.optim.SGD(pair.model.parameters(), lr=0.0))
    for part in ids.split(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=part, labels=part).loss)
            optimizer.step()
    for key, parameter in pair.model.named_parameters():
        assert distance(wanted[key], parameter.grad) <= 1e-4, key


def test_accelerate_in_bfloat16() -> None:
    """It sets a forward of its own on the model, around the converted one."""
    pair = Pair(LLAMA)
    expected, ids = pair.expected, pair.inputs["input_ids"]
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(pair.model)
    with torch.no_grad(), accelerator.autocast():
        actual = model(**pair.inputs).logits
    assert actual.dtype == torch.float32  # accelerate casts outputs
    assert 1e-4 < distance(expected, actual) <= 6e-2
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    for key, parameter in pair.model.mhc.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), key
    with pytest.raises(RewriteError, match="unwrap_model"):
        restore(pair.model)
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert unwrapped is pair.model
    with torch.no_grad():
        assert distance(expected, unwrapped(**pair.inputs).logits) <= EXACT
    restore(unwrapped)


def test_accelerate_takes_its_forward_off_a_model_that_holds_the_trunk_itself() -> None:
    """It walks what decorators wrapped down to the innermost forward, which must not be the plain one."""
    model, inputs = small_model("parallel")
    plain = first_output(lambda: model(**inputs))
    mhc_compile(model, 4, backend="eager", example_inputs=inputs)
    randomize(model)
    expected = first_output(lambda: model(**inputs))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    unwrapped = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    assert distance(plain, expected) > FAR
    assert torch.equal(first_output(lambda: unwrapped(**inputs)), expected)


def test_a_model_that_accelerate_prepared_is_not_converted() -> None:
    """The forward that it set on the model would go on running the plain one."""
    pair = Pair(LLAMA)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(pair.plain)
    with pytest.raises(RewriteError, match="convert the model first"):
        mhc_compile(prepared, 4, backend="eager")
    assert not is_converted(prepared)


# ------------------------------------------------------------------------------------------------ PEFT


def lora(targets: Any = "all-linear", **options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=targets, **options)


def wrapped(model: nn.Module, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's Conv1D, which PEFT adapts to
        made: PeftModel = get_peft_model(model, config).eval()
    return made


@torch.no_grad()
def logits(model: nn.Module, pair: Pair) -> Tensor:
    found: Tensor = model(**pair.inputs).logits
    return found


def fit(model: nn.Module, pair: Pair, steps: int = 4) -> list[float]:
    """A few large steps on what requires grad."""
    model.train()
    ids = pair.inputs["input_ids"]
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-2)
    found = train(model, optimizer, ids, steps)
    model.eval()
    return found


# A site that is named after a Linear layer itself, as BERT's are, has a path that ends as the layer's does.
ADAPTED = [(GPT2, {}), (T5, {}), (VIT, {}), (BERT, dict(exclude_modules=r"mhc\..*"))]


@pytest.mark.parametrize(("name", "options"), ADAPTED)
@pytest.mark.cases(1)
def test_adapters_that_are_zero_change_nothing(name: str, options: dict[str, Any]) -> None:
    pair = Pair(name)
    model = wrapped(pair.model, lora(**options))
    assert distance(pair.expected, logits(model, pair)) <= EXACT
    assert not any(one.requires_grad for one in pair.model.mhc.parameters())
    trained = {key for key, one in model.named_parameters() if one.requires_grad}
    assert trained and all("lora_" in key for key in trained)
    assert not any(".mhc." in key for key in trained)


def test_adapters_are_trained_switched_saved_and_merged(tmp_path: Path) -> None:
    pair = Pair(LLAMA)
    model = wrapped(pair.model, lora())
    sites = weights(pair.model.mhc)
    found = fit(model, pair)
    assert found[-1] < found[0]
    expected = logits(model, pair)
    assert distance(pair.expected, expected) > FAR
    assert_equal(sites, weights(pair.model.mhc))
    with model.disable_adapter():
        assert distance(pair.expected, logits(model, pair)) <= EXACT

    model.save_pretrained(tmp_path)
    assert not any("mhc." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(Pair(LLAMA).model, tmp_path).eval()
    assert distance(expected, logits(again, pair)) <= EXACT

    merged = model.merge_and_unload()
    assert merged is pair.model and is_converted(merged)
    assert distance(expected, logits(merged, pair)) <= EXACT


def test_sites_are_trained_beside_adapters_when_asked_for() -> None:
    pair = Pair(LLAMA)
    model = wrapped(pair.model, lora(["q_proj", "v_proj"]))
    pair.model.mhc.requires_grad_(True)
    before = weights(pair.model)
    found = fit(model, pair)
    assert found[-1] < found[0]
    moved = {key for key, value in pair.model.named_parameters() if not torch.equal(value, before[key])}
    assert {key for key in moved if "lora_" not in key} == {key for key in before if key.startswith("mhc.")}


@pytest.mark.parametrize(("copied", "target"), [("mhc", "q_proj"), ("mlp", "q_proj"), ("self_attn", "up_proj")])
def test_copies_of_sites_are_refused(copied: str, target: str) -> None:
    """PEFT would train copies of the modules of these names, among them sites, beside the ones the graph reads."""
    pair = Pair(LLAMA)
    model = wrapped(pair.model, lora([target], modules_to_save=[copied]))
    with pytest.raises(RewriteError, match="modules_to_save"):
        model(**pair.inputs)


@pytest.mark.sweep
def test_a_peft_model_is_converted_inside() -> None:
    pair = Pair(LLAMA)
    model = wrapped(copy.deepcopy(pair.plain), lora())
    with pytest.raises(RewriteError, match=r"mhc_compile\(model\.get_base_model\(\)\)"):
        mhc_compile(model, 4, backend="eager")
    inner = mhc_compile(model.get_base_model(), 4, backend="eager")
    inner.mhc.load_state_dict(pair.model.mhc.state_dict())
    assert distance(pair.expected, logits(model, pair)) <= EXACT
    ids = pair.inputs["input_ids"]
    made = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(made, greedy(pair.model, ids, 4))
    assert not torch.equal(made, greedy(pair.plain, ids, 4))
