"""A converted Hugging Face model is an ordinary one: outputs, dtypes, embeddings, checkpointing, saving."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from hf_pairs import BERT, BUILD, GPT2, LLAMA, T5, VIT, Pair, captures, distance, lively, zoo_inputs
from mhc_compile import RewriteError, load, mhc_compile, param_groups

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

EXACT = 1e-5  # of the largest value: the same function, compiled for another call
NARROW = 6e-2  # of the largest value, in bfloat16
FAR = 0.1  # of the largest value: no rounding


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    """Compiled frames of one test must not steer another; dropping them also keeps memory down."""
    yield
    torch._dynamo.reset()


def labels(name: str, inputs: dict[str, Any]) -> Tensor:
    """What a model of this name can be trained on."""
    if name == VIT:
        return torch.tensor([1, 3])
    wanted: Tensor = inputs.get("decoder_input_ids", inputs["input_ids"] if name != T5 else None)
    return wanted.contiguous()


def stepped(model: nn.Module, name: str, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and all gradients of one training step."""
    model.zero_grad()
    output = model(**inputs, labels=labels(name, inputs))
    output.loss.backward()
    return output.logits.detach(), {k: one.grad.clone() for k, one in model.named_parameters() if one.grad is not None}


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Between two sets of gradients, each as one vector."""
    assert a.keys() == b.keys()
    flat = [torch.cat([one[key].double().flatten() for key in sorted(a)]) for one in (a, b)]
    return nn.functional.cosine_similarity(*flat, dim=0).item()


# ------------------------------------------------------------------------- hidden states and attentions


def llama_by_hand(model: nn.Module, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and attentions of a converted Llama, written out: nothing is traced or rewritten."""
    trunk = model.model
    x = trunk.embed_tokens(ids)
    length = ids.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    rotary = trunk.rotary_emb(x, torch.arange(length)[None])
    streams = x.unsqueeze(-2).expand(-1, -1, 4, -1)
    hidden, attentions = [x], []

    def site(connection: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        pre, post, res = connection(streams)
        read = (pre.unsqueeze(-1) * streams).sum(-2)
        return res @ streams + post.unsqueeze(-1) * branch(read).unsqueeze(-2)

    for layer, sites in zip(trunk.layers, model.mhc.model.layers.children(), strict=True):

        def attention(read: Tensor, layer: nn.Module = layer) -> Tensor:
            normed = layer.input_layernorm(read)
            made, weights = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)
            attentions.append(weights)
            return made

        def mlp(read: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer.mlp(layer.post_attention_layernorm(read))

        streams = site(sites.self_attn, attention)
        streams = site(sites.mlp, mlp)
        hidden.append(streams.mean(-2))
    hidden[-1] = trunk.norm(hidden[-1])
    return hidden, attentions


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_formula() -> None:
    """As the very first call: transformers sets its hooks within it."""
    pair = Pair(LLAMA)
    output = pair.model(**pair.inputs, output_hidden_states=True, output_attentions=True)
    hidden, attentions = llama_by_hand(pair.model, pair.inputs["input_ids"])
    assert len(output.hidden_states) == len(hidden) and len(output.attentions) == len(attentions)
    for expected, actual in zip([*hidden, *attentions], [*output.hidden_states, *output.attentions], strict=True):
        assert distance(expected, actual) <= EXACT
    plain = pair.plain(**pair.inputs, output_hidden_states=True, output_attentions=True)
    assert distance(plain.hidden_states[1], output.hidden_states[1]) > FAR
    assert distance(plain.attentions[1], output.attentions[1]) > FAR
    assert distance(pair.expected, output.logits) <= EXACT


@pytest.mark.parametrize("name", [GPT2, T5, VIT, BERT])
@torch.no_grad()
def test_hidden_states_and_attentions_at_the_first_call(name: str) -> None:
    pair = Pair(name)
    flags = dict(output_hidden_states=True, output_attentions=True)
    output, plain = pair.model(**pair.inputs, **flags), pair.plain(**pair.inputs, **flags)
    assert list(output.keys()) == list(plain.keys())
    collected = [key for key, value in plain.items() if isinstance(value, tuple) and value]
    assert len(collected) >= 2
    for key in collected:
        assert [one.shape for one in output[key]] == [one.shape for one in plain[key]], key
        if len(plain[key]) > 1:  # equal streams and a norm: the first layer's attention is the plain one
            assert distance(plain[key][-1], output[key][-1]) > 0.01, f"{key} is that of the plain model"
    assert distance(pair.expected, output.logits) <= EXACT


@torch.no_grad()
def test_hidden_states_that_one_half_was_asked_for_before_the_conversion() -> None:
    """That half has its hooks then, and the other one has not; a second set would double the states."""
    plain, inputs = lively(BUILD[T5]()), zoo_inputs(T5)
    plain.get_encoder()(inputs["input_ids"], output_hidden_states=True)
    output = Pair(T5, plain, inputs).model(**inputs, output_hidden_states=True)
    assert len(output.encoder_hidden_states) == len(output.decoder_hidden_states) == 2


@torch.no_grad()
def test_hidden_states_that_the_config_asks_for() -> None:
    plain = lively(BUILD[VIT]())
    plain.config.output_hidden_states = True
    pair = Pair(VIT, plain, zoo_inputs(VIT))
    assert len(pair.model(**pair.inputs).hidden_states) == len(plain(**pair.inputs).hidden_states) == 3


def test_a_model_that_gave_no_hidden_states_yet_can_be_pickled() -> None:
    """transformers' hooks are local functions, which have no pickled form."""
    pair = Pair(GPT2)
    twin = pickle.loads(pickle.dumps(pair.model))
    for model in (twin, copy.deepcopy(twin)):  # a copy of one that has the hooks, after its call
        with torch.no_grad():
            output = model(**pair.inputs, output_hidden_states=True)
        assert distance(pair.expected, output.logits) <= EXACT and len(output.hidden_states) == 3


@pytest.mark.parametrize("name", [LLAMA, BERT])
@torch.no_grad()
def test_the_trunk_below_the_head_called_by_itself_has_its_streams(name: str) -> None:
    pair = Pair(name)
    inner, plain = pair.model.base_model(**pair.inputs), pair.plain.base_model(**pair.inputs)
    whole = pair.model(**pair.inputs, output_hidden_states=True).hidden_states[-1]
    assert distance(whole, inner.last_hidden_state) <= EXACT
    assert distance(plain.last_hidden_state, inner.last_hidden_state) > FAR


# ------------------------------------------------------------------------------------------------ dtypes


def narrow(inputs: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def cast_after(pair: Pair) -> nn.Module:
    return pair.model.to(torch.bfloat16)


def cast_before(pair: Pair) -> nn.Module:
    return _converted_alike(copy.deepcopy(pair.plain).to(torch.bfloat16), pair)


def built_narrow(pair: Pair) -> nn.Module:
    made = type(pair.plain)._from_config(pair.plain.config, dtype=torch.bfloat16)
    made.load_state_dict(pair.plain.state_dict())
    return _converted_alike(made.eval(), pair)


def _converted_alike(model: nn.Module, pair: Pair) -> nn.Module:
    mhc_compile(model, 4, backend="eager").mhc.load_state_dict(pair.model.mhc.state_dict())
    return model


def check_narrow(pair: Pair, model: nn.Module, inputs: dict[str, Any], wide: tuple[Tensor, dict[str, Tensor]]) -> None:
    """bfloat16 with coefficients in float32: near the float32 step, in outputs and in the gradients of the sites."""
    actual, gradients = stepped(model, pair.name, inputs)
    assert distance(wide[0], actual) <= NARROW
    with torch.no_grad():
        assert distance(pair.plain(**pair.inputs).logits, actual) > FAR
    for key, parameter in model.mhc.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, key
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, key
    sites = [key for key in gradients if key.startswith("mhc.")]
    assert cosine({key: wide[1][key] for key in sites}, {key: gradients[key] for key in sites}) > 0.98


NARROWED = [(LLAMA, cast_after), (BERT, cast_after), (T5, cast_before), (VIT, built_narrow)]


@pytest.mark.parametrize(("name", "how"), NARROWED)
def test_bfloat16(name: str, how: Callable[[Pair], nn.Module]) -> None:
    pair = Pair(name)
    wide = stepped(pair.model, name, pair.inputs)
    model = how(pair)
    assert next(model.parameters()).dtype == torch.bfloat16
    check_narrow(pair, model, narrow(pair.inputs), wide)


@pytest.mark.parametrize("name", [GPT2, T5])
def test_autocast(name: str) -> None:
    pair = Pair(name)
    wide = stepped(pair.model, name, pair.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_narrow(pair, pair.model, pair.inputs, wide)


# ---------------------------------------------------------------------------------------------- training


def test_training_over_five_batch_shapes_takes_few_graphs() -> None:
    pair = Pair(GPT2)
    optimizer = torch.optim.AdamW(param_groups(pair.model), lr=1e-3)
    pair.model.train()
    before = {key: value.clone() for key, value in pair.model.mhc.named_parameters()}
    for batch, length in ((2, 8), (3, 8), (3, 12), (5, 17), (4, 32)):
        ids = torch.randint(3, zoo.VOCAB, (batch, length))
        pair.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert captures(pair.model) <= 3
    assert all(not torch.equal(value, before[key]) for key, value in pair.model.mhc.named_parameters())


def test_gradients_of_parts_of_a_batch_add_up() -> None:
    pair = Pair(LLAMA)
    ids = torch.randint(3, zoo.VOCAB, (4, 8))
    _, whole = stepped(pair.model, LLAMA, dict(input_ids=ids, use_cache=False))
    pair.model.zero_grad()
    for part in ids.split(2):
        (pair.model(input_ids=part, labels=part, use_cache=False).loss / 2).backward()
    for key, parameter in pair.model.named_parameters():
        assert distance(whole[key], parameter.grad) <= 1e-4, key
    _, plain = stepped(pair.plain, LLAMA, dict(input_ids=ids, use_cache=False))
    assert cosine(plain, {key: whole[key] for key in plain}) < 0.98


@pytest.mark.parametrize(("name", "reentrant"), [(LLAMA, False), (GPT2, True)])
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    """Switched on after the conversion, and off again; the gradients stay the same."""
    pair = Pair(name)
    for module in pair.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    pair.model.train()
    inputs = {**pair.inputs, "use_cache": False}
    _, expected = stepped(pair.model, name, inputs)
    # Up to 5.12 transformers calls it by its other name alone.
    kind = "activation" if hasattr(pair.model, "activation_checkpointing_enable") else "gradient"
    for options in (dict(use_reentrant=reentrant), None):
        if options is None:
            getattr(pair.model, f"{kind}_checkpointing_disable")()
        else:
            getattr(pair.model, f"{kind}_checkpointing_enable")(options)
        _, actual = stepped(pair.model, name, inputs)
        assert actual.keys() == expected.keys()
        for key, gradient in expected.items():
            assert distance(gradient, actual[key]) <= EXACT, key


def test_training_after_a_call_in_inference_mode() -> None:
    pair = Pair(GPT2)
    with torch.inference_mode():
        quiet = pair.model(**pair.inputs).logits.clone()
    logits, made = stepped(pair.model, GPT2, pair.inputs)
    assert distance(quiet, logits) <= EXACT
    assert made.keys() == dict(pair.model.named_parameters()).keys()


@torch.no_grad()
def test_evaluation_after_training_has_no_dropout() -> None:
    pair = Pair(GPT2)
    noisy = pair.model.train()(**pair.inputs).logits
    assert distance(pair.expected, noisy) > 0.05
    assert torch.equal(pair.model.eval()(**pair.inputs).logits, pair.expected)


# -------------------------------------------------------------------------------------------- embeddings


@pytest.mark.filterwarnings("ignore:The new embeddings will be initialized")
@torch.no_grad()
def test_the_vocabulary_can_grow_and_shrink() -> None:
    pair = Pair(GPT2)
    for size in (zoo.VOCAB + 13, zoo.VOCAB):
        pair.model.resize_token_embeddings(size)
        logits = pair.model(**pair.inputs).logits
        assert logits.shape[-1] == size
        assert distance(pair.expected, logits[..., : zoo.VOCAB]) <= EXACT


@torch.no_grad()
def test_tied_weights_stay_tied() -> None:
    pair = Pair(GPT2)
    pair.model.tie_weights()
    assert pair.model.lm_head.weight is pair.model.transformer.wte.weight
    assert torch.equal(pair.model(**pair.inputs).logits, pair.expected)
    pair.model.transformer.wte.weight.mul_(1.5)
    assert distance(pair.expected, pair.model(**pair.inputs).logits) > FAR


# ---------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", [VIT, BERT])
def test_save_pretrained_and_load(name: str, tmp_path: Path) -> None:
    """transformers writes a ViT under other names than it has here, the mHC weights too."""
    pair = Pair(name)
    pair.model.save_pretrained(tmp_path)
    loaded = load(tmp_path, attn_implementation="eager").eval()
    assert loaded.state_dict().keys() == pair.model.state_dict().keys()
    with torch.no_grad():
        assert distance(pair.expected, loaded(**pair.inputs).logits) <= EXACT


def test_a_checkpoint_in_shards(tmp_path: Path) -> None:
    """With tied embeddings, which are written once."""
    pair = Pair(GPT2)
    pair.model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    written = {key: value for shard in shards for key, value in load_file(shard).items()}
    for key, value in pair.model.mhc.named_parameters():
        assert torch.equal(written[f"mhc.{key}"], value), key
    for options, limit in (({}, EXACT), (dict(dtype=torch.bfloat16), NARROW)):
        loaded = load(tmp_path, attn_implementation="eager", **options).eval()
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert {one.dtype for one in loaded.mhc.parameters()} == {torch.float32}
        with torch.no_grad():
            assert distance(pair.expected, loaded(**pair.inputs).logits) <= limit


def test_a_plain_model_from_the_checkpoint_of_a_converted_one(tmp_path: Path) -> None:
    """transformers has no place for the mHC weights; a new conversion would hide that they are gone."""
    pair = Pair(BERT)
    pair.model.save_pretrained(tmp_path)
    stripped = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert distance(pair.plain(**pair.inputs).logits, stripped(**pair.inputs).logits) <= EXACT
    with pytest.raises(RewriteError, match=r"mhc_compile\.load"):
        mhc_compile(stripped, 4)
