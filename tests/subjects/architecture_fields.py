"""What the names of a config's fields do not tell about the tiny model of a type."""

import functools
from collections.abc import Callable
from typing import Any

import torch

DELETE: Any = ...  # leave a field to the config's own default
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [2, 1, 1]}  # of heads of 8
FOUR_HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
FULL_SLIDING = {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}
EIGHT_BY_EIGHT = {"mamba_n_heads": 8, "mamba_d_head": 8}
_SHORT_AUDIO = {"num_filters": 2, "depths": [1] * 7}

# Arguments of a config whose defaults do not construct.
START: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": False,
            "use_double_wide_mlp": False,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
        }
    },
}

FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 35, "num_query_tokens": 4},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGAZ": 6}},
    "cohere_compass_text": {
        **FULL_SLIDING,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "num_key_value_heads": 2,
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots1": {**FULL_SLIDING, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "num_hidden_layers": 4,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "head_dim": 16,
        "per_layer_config": {},
    },
    "emu3": {"vocabulary_map": {"<image>": 5, "<|visual token 000000|>": 6, "<|extra_200|>": 7}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}},
    "falcon_h1": {**EIGHT_BY_EIGHT, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [32] * 6,
        "activation_sparsity_pattern": [0.9, *[0.0] * 5],
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 0]}}},
    "granite4_vision": {"vision_config": {"hidden_size": 64}, "qformer_config": {"hidden_size": 64}, "deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [0, 1], "downsample_rate": "1/2"},
    "granitemoehybrid": {
        **EIGHT_BY_EIGHT,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "layers_block_type": DELETE,
    },
    "hrm_text": {"num_layers_per_stack": DELETE, "layer_types": DELETE, "L_cycles": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": MROPE}},
    "instructblip": {"image_token_index": 35, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 35, "num_query_tokens": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "mistral4": {"rope_parameters": ROPE},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "mpt": {"use_cache": True},
    "musicgen": {"decoder": {"num_codebooks": 1}},  # or a prompt is no row of tokens
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 200,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "heads_per_ngram": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},  # recurrent, recurrent, attention
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "is_decoder": True,
        "num_buckets": 4,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "hash_seed": 1,
    },
    "step3p7": {"text_config": {**FULL_SLIDING, "sliding_window": 16, "num_sliding_attention_heads": 4}},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _SHORT_AUDIO, "semantic_tokenizer_encoder_config": _SHORT_AUDIO},
    "xlstm": {"chunk_size": 16, "num_blocks": 2, "embedding_dim": 64, "hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **FOUR_HYBRID,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        **FOUR_HYBRID,
        "head_dim": DELETE,
        "layer_types": DELETE,
        "hybrid_layer_ids": DELETE,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
    },
}
for _whole, _text in (("cohere_compass", "cohere_compass_text"), ("dots3_note", "dots3_note_text"), ("qwen4_exp", "qwen4_exp_text")):
    FIELDS[_whole] = {"text_config": FIELDS[_text]}
for _kind in (
    *("glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
):
    FIELDS.setdefault(_kind, {}).setdefault("text_config", {})["rope_parameters"] = MROPE
FIELDS["qwen2_5_vl"]["vision_config"] = {"window_size": 112}


def _vision_start(config: Any) -> None:
    config.vision_start_token_id = 30


# Changes of a config that has been made.
AFTER: dict[str, Callable[[Any], None]] = {
    "qwen2_5_omni_thinker": _vision_start,
    "qwen3_omni_moe_thinker": _vision_start,
}


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


# What the calls of a type must be given besides tokens, for one row: its model has no text-only call.
INPUTS: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "blip": lambda _: {"pixel_values": _pixels(1, 3, 28, 28)},
    "blip-2": lambda _: {"pixel_values": _pixels(1, 3, 28, 28)},
    "instructblip": lambda _: {"pixel_values": _pixels(1, 3, 28, 28), "qformer_input_ids": torch.tensor([[50, 51]])},
    "instructblipvideo": lambda _: {"pixel_values": _pixels(1, 1, 3, 28, 28), "qformer_input_ids": torch.tensor([[50, 51]])},
}

# The tokens that every prompt of a type must begin with.
PREFIX: dict[str, list[int]] = {kind: [35] * 4 for kind in ("blip-2", "instructblip", "instructblipvideo")}

# Types whose images `architectures.image` knows how to write; their models keep `rope_deltas` of the last call.
IMAGES = {
    "cosmos3_omni",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
}
