"""Tiny real models (transformers, random weights, CPU) with hand-counted residual sites.

ZOO        (name, build, inputs): models that a conversion is tried on
EXPECT     name -> (sites, trunks), counted from the models' sources
REFERENCE  models that are mHC already: a conversion refuses them, the "mhc" backend makes them fast

`python tests/zoo.py` builds and runs all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

Build = Callable[[], nn.Module]
Inputs = Callable[[], dict[str, Any]]
Model = tuple[str, Build, Inputs]

BATCH, SEQ, VOCAB, WIDTH = 2, 8, 99, 32


def token_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))


def image(channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(BATCH, channels, size, size, generator=torch.Generator().manual_seed(0))


def decoder_inputs() -> dict[str, Any]:
    return dict(input_ids=token_ids(), use_cache=False)


def encoder_inputs() -> dict[str, Any]:
    return dict(input_ids=token_ids())


def encoder_decoder_inputs() -> dict[str, Any]:
    return dict(input_ids=token_ids(), decoder_input_ids=token_ids()[:, :5], use_cache=False)


def short_inputs() -> dict[str, Any]:
    """For a scan, which a graph holds once for each position."""
    return dict(input_ids=token_ids()[:, :4], use_cache=False)


def pixel_inputs() -> dict[str, Any]:
    return dict(pixel_values=image())


def hf(model: str, config: str, **options: Any) -> Build:
    """A builder of one `transformers` model with random weights, eager attention, in eval mode."""

    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, config)(**options)
        with contextlib.suppress(Exception):  # models with no choice of attention
            made._attn_implementation = "eager"
        return getattr(transformers, model)(made).eval()

    return build


SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHAPE = dict(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4)
FEED = dict(intermediate_size=64)
POSITIONS = dict(max_position_embeddings=64)
ENCODER = dict(vocab_size=VOCAB, **SHAPE, **FEED, **POSITIONS)
DECODER = dict(ENCODER, num_key_value_heads=2, **SPECIAL)

ZOO: list[Model] = [
    ("llama", hf("LlamaForCausalLM", "LlamaConfig", **DECODER), decoder_inputs),
    (
        "gpt2",
        hf(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=WIDTH,
            n_layer=3,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
        ),
        decoder_inputs,
    ),
    ("bert", hf("BertForMaskedLM", "BertConfig", **ENCODER), encoder_inputs),
    (
        "gemma2",
        hf(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            **DECODER,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=4,
        ),
        decoder_inputs,
    ),
    (
        "gpt_neox",
        hf(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            **ENCODER,
            use_parallel_residual=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
        decoder_inputs,
    ),
    (
        "falcon",
        hf(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=VOCAB,
            **SHAPE,
            ffn_hidden_size=64,
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
            alibi=False,
            bias=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        decoder_inputs,
    ),
    (
        "granite",
        hf(
            "GraniteForCausalLM",
            "GraniteConfig",
            **DECODER,
            residual_multiplier=0.22,
            embedding_multiplier=12.0,
            logits_scaling=8.0,
        ),
        decoder_inputs,
    ),
    ("olmo2", hf("Olmo2ForCausalLM", "Olmo2Config", **DECODER), decoder_inputs),
    (
        "t5",
        hf(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        encoder_decoder_inputs,
    ),
    (
        "mixtral",
        hf("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4, num_experts_per_tok=2),
        decoder_inputs,
    ),
    (
        "mamba",
        hf(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            state_size=4,
            num_hidden_layers=2,
            conv_kernel=4,
            expand=2,
            time_step_rank=4,
            residual_in_fp32=True,
            **SPECIAL,
        ),
        short_inputs,
    ),
    (
        "albert",
        hf("AlbertForMaskedLM", "AlbertConfig", **ENCODER, embedding_size=16, num_hidden_groups=1),
        encoder_inputs,
    ),
    (
        "vit",
        hf(
            "ViTForImageClassification",
            "ViTConfig",
            **SHAPE,
            **FEED,
            image_size=32,
            patch_size=8,
            num_labels=5,
        ),
        pixel_inputs,
    ),
    (
        "dinov2",
        hf(
            "Dinov2ForImageClassification",
            "Dinov2Config",
            **SHAPE,
            mlp_ratio=2,
            image_size=32,
            patch_size=8,
            drop_path_rate=0.1,
            layerscale_value=0.5,
            num_labels=5,
        ),
        pixel_inputs,
    ),
    (
        "resnet",
        hf(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[2, 2],
            layer_type="basic",
            num_labels=5,
        ),
        pixel_inputs,
    ),
]

EXPECT: dict[str, tuple[int, int]] = {
    "llama": (6, 1),
    "gpt2": (6, 1),
    "bert": (6, 1),
    "gemma2": (6, 1),
    "gpt_neox": (3, 1),  # attention and MLP are parallel: one site a layer
    "falcon": (3, 1),  # parallel as well
    "granite": (6, 1),
    "olmo2": (6, 1),
    "t5": (10, 2),  # 2 x 2 in the encoder, 2 x 3 in the decoder
    "mixtral": (6, 1),
    "mamba": (2, 1),
    "albert": (6, 1),  # shared layers: one site an application
    "vit": (6, 1),
    "dinov2": (6, 1),
    "resnet": (3, 2),  # the projected shortcut stays a plain add and starts the second trunk
}

_LATENT = dict(qk_nope_head_dim=8, v_head_dim=8, q_lora_rank=16, kv_lora_rank=16)
_INDEXER = dict(index_n_heads=2, index_head_dim=16, index_topk=4)
_EXPERTS = dict(moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2)

REFERENCE: list[Model] = [
    (
        "deepseek_v4",
        hf(
            "DeepseekV4ForCausalLM",
            "DeepseekV4Config",
            vocab_size=VOCAB,
            **SHAPE,
            **POSITIONS,
            **SPECIAL,
            **_EXPERTS,
            **_INDEXER,
            num_key_value_heads=1,
            head_dim=16,
            q_lora_rank=16,
            o_lora_rank=8,
            o_groups=2,
            hc_mult=4,
            sliding_window=8,
        ),
        decoder_inputs,
    ),
    (
        "glm5_next",  # no causal-LM class: the text trunk by itself
        hf(
            "Glm5NextTextModel",
            "Glm5NextTextConfig",
            **ENCODER,
            **SPECIAL,
            **_EXPERTS,
            **_INDEXER,
            **_LATENT,
            num_key_value_heads=4,
            index_kpool=2,
            linear_head_dim=8,
            linear_num_heads=4,
            layer_types=["linear_attention", "linear_attention", "indexed_attention"],
            mlp_layer_types=["dense", "sparse", "sparse"],
            indexer_types=["full", "full", "full"],
            hc_mult=4,
        ),
        decoder_inputs,
    ),
    (
        "hy_v4",
        hf(
            "HYV4ForCausalLM",
            "HYV4Config",
            **ENCODER,
            **SPECIAL,
            **_EXPERTS,
            **_INDEXER,
            **_LATENT,
            num_key_value_heads=4,
            qk_rope_head_dim=8,
            hc_mult=4,
        ),
        decoder_inputs,
    ),
    (
        "qwen4_exp",
        hf(
            "Qwen4ExpForCausalLM",
            "Qwen4ExpTextConfig",
            vocab_size=VOCAB,
            **SHAPE,
            **POSITIONS,
            **SPECIAL,
            num_key_value_heads=2,
            head_dim=16,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            layer_types=["linear_attention"] * 3,  # the indexed layers branch on data: no single graph
            hc_count=4,
            hc_lowrank=8,
        ),
        decoder_inputs,
    ),
]


def main() -> None:
    for name, build, inputs in ZOO + REFERENCE:
        with torch.no_grad():
            out = build()(**inputs())
        first = next(v for v in out.values() if torch.is_tensor(v) and v.is_floating_point())
        print(f"{name:12s} {tuple(first.shape)}")


if __name__ == "__main__":
    main()
