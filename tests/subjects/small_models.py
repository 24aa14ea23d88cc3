"""Small models with random weights, far from ties, of the types that a test names."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA: dict[str, Any] = {"num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
_BART: dict[str, Any] = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
OWN: dict[str, dict[str, Any]] = {  # an ellipsis: what the type has not
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "bart": {**_BART, "is_decoder": True},
    "gemma2": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "mamba": _MAMBA,
    "mamba2": {"num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "moshi": {"head_dim": 8, "ffn_dim": 32, "sliding_window": 3000},
    "prophetnet": {
        "num_hidden_layers": ...,
        "num_decoder_layers": 2,
        "num_attention_heads": ...,
        "num_decoder_attention_heads": 4,
        "decoder_ffn_dim": 32,
        "is_decoder": True,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1, "attention_window_size": 16},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
}


def small_model(kind: str, **settings: Any) -> Any:
    """Build a model of a type, in eval mode; the same in every process."""
    torch.manual_seed(0)
    fields = {**SIZES, **OWN.get(kind, {}), **settings}
    config = AutoConfig.for_model(kind, **{name: value for name, value in fields.items() if value is not ...})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    return loud(model)


def loud(model: Any) -> Any:
    """Draw weights by which every token of the past counts."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=random) * weight.shape[-1] ** -0.5)
        model.get_input_embeddings().weight.copy_(
            torch.randn(model.get_input_embeddings().weight.shape, generator=random)
        )
    return model
