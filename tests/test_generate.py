"""`generate` of a converted Hugging Face model: the tokens that whole forwards of it give, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, StaticCache

import zoo
from benchmarks.fusion import cache_name
from hf_pairs import (
    GPT2,
    LLAMA,
    T5,
    Pair,
    beam_searched,
    captures,
    distance,
    greedy,
    lively,
    sampled,
)

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

DECODERS = [LLAMA, GPT2]
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": dict(cache_implementation="static"),
    "none": dict(use_cache=False),
}
EXACT = 1e-5  # of the largest value: attention over a padded cache adds in another order


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    """Compiled frames of one test must not steer another; dropping them also keeps memory down."""
    yield
    torch._dynamo.reset()


def prompt(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(3, zoo.VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def generated(model: nn.Module, ids: Tensor, tokens: int, **options: Any) -> Tensor:
    made: Tensor = model.generate(ids, max_new_tokens=tokens, **{"do_sample": False, **options})
    return made


def varied(tokens: Tensor) -> bool:
    """Not one token for ever, which a wrong model could give as well."""
    return all(len(set(row.tolist())) > 3 for row in tokens)


# ------------------------------------------------------------------------------------------ decoder-only


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.cases(1)
def test_greedy_text_of_64_tokens_takes_few_graphs(name: str) -> None:
    """Prefill, the first token behind it (one position: sizes of 1 are constants to Dynamo), and all others."""
    pair, ids = Pair(name), prompt()
    actual = generated(pair.model, ids, 64)
    assert captures(pair.model) <= 4
    assert torch.equal(actual, greedy(pair.model, ids, 64)) and varied(actual[:, 5:])
    assert not torch.equal(actual, greedy(pair.plain, ids, 64))


@pytest.mark.parametrize(("name", "cache"), [(LLAMA, "none"), (GPT2, "static")])
@pytest.mark.cases(1)
def test_greedy_text_with_another_cache(name: str, cache: str) -> None:
    pair, ids = Pair(name), prompt()
    actual = generated(pair.model, ids, 16, **CACHES[cache])
    assert captures(pair.model) <= 3
    assert torch.equal(actual, greedy(pair.model, ids, 16)) and varied(actual[:, 5:])
    assert not torch.equal(actual, generated(pair.plain, ids, 16))


def test_sampling() -> None:
    pair, ids = Pair(LLAMA), prompt()
    texts = []
    for run in (
        lambda: generated(pair.model, ids, 12, do_sample=True, top_k=0, **CACHES["static"]),
        lambda: sampled(pair.model, ids, 12),
        lambda: sampled(pair.plain, ids, 12),
    ):
        torch.manual_seed(11)
        texts.append(run())
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.sweep
def test_beam_search() -> None:
    """The cache is reordered between the steps."""
    pair, ids = Pair(LLAMA), prompt()
    actual = generated(pair.model, ids, 8, num_beams=3)
    assert torch.equal(actual, beam_searched(pair.model, ids, 8, beams=3))
    assert not torch.equal(actual, generated(pair.model, ids, 8)), "no beam was better than greedy"
    assert not torch.equal(actual, beam_searched(pair.plain, ids, 8, beams=3))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one batch, padded in front, and its mask."""
    longest = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return ids, mask


@pytest.mark.parametrize(("name", "cache"), [(LLAMA, "static"), (GPT2, "dynamic")])
def test_rows_padded_in_front_generate_what_they_do_alone(name: str, cache: str) -> None:
    pair, rows = Pair(name), [prompt()[0], prompt()[1, :3]]
    ids, mask = left_padded(rows)
    actual = generated(pair.model, ids, 8, attention_mask=mask, **CACHES[cache])
    for row, text in zip(rows, actual, strict=True):
        alone = row.repeat(2, 1)  # a batch of 1 would be another graph
        assert torch.equal(text[5 - len(row) :], greedy(pair.model, alone, 13 - len(row))[0, : len(row) + 8])
    assert not torch.equal(actual, generated(pair.plain, ids, 8, attention_mask=mask))


def dynamic_cache(model: nn.Module) -> DynamicCache:
    return DynamicCache(config=model.config)


def static_cache(model: nn.Module) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=16)


@pytest.mark.parametrize(("name", "make_cache"), [(LLAMA, dynamic_cache), (GPT2, static_cache)])
@pytest.mark.cases(1)
def test_prefill_and_decode_agree_with_one_forward(name: str, make_cache: Callable[[nn.Module], Any]) -> None:
    """Logits, for a batch that is padded in front: 5 tokens at once, then 4 one by one, against all 9 at once."""
    pair = Pair(name)
    ids, mask = left_padded([prompt(length=9)[0], prompt(length=9)[1, :6]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = [
            model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            for model in (pair.model, pair.plain)
        ]
        cache, steps = make_cache(pair.model), []
        for start, stop in [(0, 5), (5, 6), (6, 7), (7, 8), (8, 9)]:
            step = pair.model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                use_cache=True,
                **{cache_name(pair.model): cache},
            )
            steps.append(step.logits)
    seen = mask.bool()
    expected, plain = (logits[seen] for logits in whole)
    assert distance(expected, torch.cat(steps, dim=1)[seen]) <= EXACT
    assert distance(expected, plain) > 0.05


def test_generation_that_compiles_the_model_once_more() -> None:
    """On accelerators transformers compiles the decoding steps with a static cache, around our own compilation."""
    pair, ids = Pair(LLAMA), prompt()
    options = CompileConfig(backend="eager", mode="default")
    options._compile_all_devices = True
    actual = generated(pair.model, ids, 8, cache_implementation="static", compile_config=options)
    assert torch.equal(actual, greedy(pair.model, ids, 8))
    assert not torch.equal(actual, greedy(pair.plain, ids, 8))


# -------------------------------------------------------------------------------------- encoder and decoder


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_an_encoder_and_a_decoder_generate(cache: str) -> None:
    """transformers calls the encoder once and by itself, and then the model with what it gave."""
    pair, source = Pair(T5), prompt(length=7)
    actual = generated(pair.model, source, 10, **CACHES[cache])
    start = torch.zeros(2, 1, dtype=torch.long)
    assert torch.equal(actual, greedy(pair.model, start, 10, input_ids=source))
    assert not torch.equal(actual, greedy(pair.plain, start, 10, input_ids=source))


def test_an_encoder_called_by_itself_has_its_streams() -> None:
    pair = Pair(T5)
    source, target = pair.inputs["input_ids"], pair.inputs["decoder_input_ids"]
    with torch.no_grad():
        whole = pair.model(**pair.inputs)
        encoded = pair.model.get_encoder()(input_ids=source)
        plain = pair.plain.get_encoder()(input_ids=source)
        given = pair.model(encoder_outputs=encoded, decoder_input_ids=target, use_cache=False)
    assert torch.equal(encoded.last_hidden_state, whole.encoder_last_hidden_state)
    assert distance(plain.last_hidden_state, encoded.last_hidden_state) > 0.05
    assert distance(pair.expected, given.logits) <= EXACT


# ------------------------------------------------------------------------------------- images and language


def llava() -> nn.Module:
    """Two layers of CLIP that read four patches, two of Llama."""
    image = dict(model_type="clip_vision_model", image_size=16, patch_size=8, projection_dim=zoo.WIDTH)
    image.update(hidden_size=zoo.WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    text = dict(zoo.DECODER, num_hidden_layers=2, model_type="llama")
    config = dict(vision_config=image, text_config=text, image_token_index=5)
    return lively(zoo.hf("LlavaForConditionalGeneration", "LlavaConfig", **config)())


@pytest.mark.sweep
def test_a_model_of_images_and_language_generates() -> None:
    """transformers calls the vision tower once and by itself."""
    ids, pixels = prompt(length=9).clamp(min=6), zoo.image(size=16)
    ids[:, 1:5] = 5
    pair = Pair("llava", llava(), dict(input_ids=ids, pixel_values=pixels))
    actual = generated(pair.model, ids, 8, pixel_values=pixels)
    assert torch.equal(actual, greedy(pair.model, ids, 8, pixel_values=pixels)) and varied(actual[:, 9:])
    assert not torch.equal(actual, greedy(pair.plain, ids, 8, pixel_values=pixels))
    features = [model.model.get_image_features(pixels).pooler_output[0] for model in (pair.model, pair.plain)]
    assert distance(*features) > 0.01, "the vision tower ran without its streams"


# ---------------------------------------------------------------------------------------------- pipeline


def tokenizer() -> Any:
    """Of the words of Python's own help, built here."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]"]
    made.train_from_iterator(topics.values(), trainers.BpeTrainer(vocab_size=zoo.VOCAB, special_tokens=special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def test_the_text_generation_pipeline() -> None:
    pair, words = Pair(LLAMA), tokenizer()
    text = "The for statement"
    ids = words(text, return_tensors="pt").input_ids
    pipeline = transformers.pipeline("text-generation", model=pair.model, tokenizer=words, device="cpu")
    made = pipeline(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    behind = greedy(pair.model, ids, 8)[0, ids.shape[1] :]
    assert made == [{"generated_text": words.decode(behind)}]
    assert not torch.equal(behind, greedy(pair.plain, ids, 8)[0, ids.shape[1] :])
