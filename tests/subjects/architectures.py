"""A tiny model with random weights of every type that transformers maps, made from its config alone.

The config of a type is shrunk field by field: `LARGEST` says what a field of a name may have at most, and
`architecture_fields` what names do not tell. Weights are drawn so that logits spread and every token of the past
counts.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from architecture_fields import AFTER, DELETE, FIELDS, IMAGES, INPUTS, PREFIX, START
from transformers.models.auto import modeling_auto

VOCABULARY = 128
FIRST_WORD = 40  # words are FIRST_WORD to VOCABULARY - 1; special tokens lie below
LAYERS = 12  # at most, where fewer would not have every kind
_names: Any = modeling_auto  # typed as dicts of literals
CLASSES: Mapping[str, Mapping[str, Any]] = {
    "causal": _names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": _names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "seq2seq": _names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

# Fields that count layers; lists of one item per layer are cut to the same number.
_COUNTS = re.compile(
    r"(num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|num_blocks|depth|layers|"
    r"(\w+_)?encoder_layers|num_encoder_layers|\w+_num_hidden_layers|t2u_\w+_layers|resampler_depth|depths)"
)
# The largest value of a field, by its whole name; the first line that fits decides.
LARGEST = tuple(
    (re.compile(names), largest)
    for names, largest in (
        (r"vocab_size|vocab_size_per_layer_input|unpadded_vocab_size|(src|tgt|decoder|text)_vocab_size", VOCABULARY),
        (r"(chunk_size_feed_forward|type_vocab_size|additional_vocab_size)", None),
        (r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions", 512),
        (r"max_(encoder|decoder)_position_embeddings|encoder_max_position_embeddings|model_max_length", 512),
        (r"max_(sequence_)?length|context_length|position_embedding_size", 512),
        (r"index_topk", 512),  # as many as there are: what is chosen among more may tie
        (r"hidden_size|d_model|n_embd|(emb|embed|embedding|model|input)_(size|dim)|dim_model|embedding_dim", 32),
        (r"word_embed_proj_dim|(input|output)_embedding_size|text_embed_dim|(text|cross|out|vision)_hidden_size", 32),
        (r"(projector|encoder|decoder|attention|projection|audio|router|backbone|cross_attention)_hidden_size", 32),
        (r"(projection|output|input|hidden|adapter_in|adapter_out|vision_output)_dim|hidden_size_global", 32),
        (r"image_text_hidden_size|lru_width|conv_dim_out|adapter_input_size", 32),
        (r"hidden_size_per_layer_input|laurel_rank|hc_lowrank|ple_embed_dim|low_rank_dim", 8),
        (r"\w*(moe|expert|shared)\w*_(intermediate_size|ffn|dim|hidden_size)", 16),
        (r"(\w+_)?intermediate_size\w*|(\w+_)?ffn_(dim|hidden_size)|n_inner|d_ff|dff|dim_ff|\w*mlp_dim|d_inner", 32),
        (r"feed_forward_\w*size|feedforward_size|dim_feedforward|moe_hidden_size|\w+_ffn_dim", 32),
        (r"(\w+_)?num_attention_heads|n_heads?|num_heads|(\w+_)?attention_heads|num_(en|de)coder_attention_heads", 4),
        (r"\w*resampler_\w*heads|heads|num_sliding_attention_heads", 4),
        (r"((global|swa|attention|linear|resampler)_)?head_dim|swa_v_head_dim|kv_channels|dim_head|d_kv|d_head", 8),
        (r"attention_head_size|resampler_dim_head|qk_(rope|nope)_head_dim|v_head_dim|index(er)?_head_dim|d_rel", 8),
        (r"qk_head_dim", 16),
        (r"rotary_dim|\w*lora_rank|linear_(key|value)_head_dim", 8),
        (r"index_n_heads|linear_num_value_heads|linear_num_heads", 4),
        (r"linear_num_key_heads", 2),
        (r"n_groups?|topk_groups?|num_expert_groups?|mamba_n_groups|num_query_groups", 1),
        (r"n_routed_experts|num_(local_|moe_)?experts|moe_num_experts|n_experts|zero_expert_num", 4),
        (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|num_selected_experts", 2),
        (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
        (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
        (r"sliding_window(_size)?|attention_chunk_size|attention_window(_size)?|local_attention|\w*window_size", 16),
        (r"(mamba_)?d_state|ssm_state_size|state_size|mamba_d_head|mamba_head_?dim", 8),
        (r"mamba_(n|num)_heads", 8),
        (r"(mamba_)?chunk_size", 16),
        (r"mamba_dt_rank|time_step_rank|dt_rank", 4),
        (r"max_window_layers", 0),
        (r"num_mtp_layers|num_nextn_predict_layers", 0),
        (r"image_size|crop_size|resolution", 28),
        (r"base_channels|num_mel_bins|pooler_output_size|codebook_dim", 32),
    )
)
_KEY_HEADS = re.compile(r"(swa_|global_)?num_key_value_heads|(num|n)_kv_heads|num_global_key_value_heads")


def types(family: str) -> list[str]:
    """Return the model types of a family that transformers maps, by name."""
    return sorted(CLASSES[family])


def tiny(model_type: str, family: str, fields: Mapping[str, Any] | None = None) -> Any:
    """Build the tiny model of a type, in eval mode, with float32 weights that are the same in every process.

    `fields` of its config are set as given.
    """
    settings, kind = config(model_type, fields or {}), getattr(transformers, CLASSES[family][model_type])
    if not isinstance(settings, kind.config_class):  # the class may be the decoder of a model of more parts
        parts = (part for part in vars(settings).values() if type(part) is kind.config_class)
        settings = next(parts, settings)
    if family == "causal" and hasattr(settings, "is_decoder") and not settings.is_encoder_decoder:
        settings.is_decoder = True
    torch.manual_seed(0)
    model = kind(settings).float().eval()
    _spread(model)
    own = model.generation_config
    own.pad_token_id, own.bos_token_id, own.eos_token_id = 0, 1, None  # no answer ends early
    for name in ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        setattr(own, name, None)
    own.max_length, own.min_length, own.num_beams, own.no_repeat_ngram_size = None, None, 1, None
    own.decoder_start_token_id = 1
    return model


def inputs(model: Any, rows: int = 1) -> dict[str, Any]:
    """Return what every call of a model must be given besides tokens: an image, say, the same for each row."""
    make = INPUTS.get(model.config.model_type)
    needed = {} if make is None else make(model.config)
    return {name: value.expand(rows, *value.shape[1:]) for name, value in needed.items()}


def prefix(model: Any) -> list[int]:
    """Return the tokens that every prompt of a model must begin with: where its image stands, say."""
    return PREFIX.get(model.config.model_type, [])


def image(model: Any) -> tuple[list[int], dict[str, torch.Tensor]] | None:
    """Return a prompt with an image, and what the call must be given besides; None where nobody wrote one."""
    kind = model.config.model_type
    if kind not in IMAGES or not hasattr(model.config, "vision_config"):
        return None
    vision = model.config.vision_config
    rows = 64  # patches of an image of 8 by 8, of which the model makes 16 tokens
    size = (getattr(vision, "in_channels", 0) or 3) * vision.temporal_patch_size * vision.patch_size**2
    token = model.config.image_token_id
    before = [50, 51, *(one for one in [getattr(model.config, "vision_start_token_id", None)] if one is not None)]
    prompt = [*before, *[token] * 16, *range(60, 90)]
    return prompt, {
        "pixel_values": torch.randn(rows, size, generator=torch.Generator().manual_seed(5)),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": torch.tensor([[int(one == token) for one in prompt]]),
    }


def config(model_type: str, own: Mapping[str, Any]) -> Any:
    """Return the shrunk config of a type, with some fields as given."""
    kind = transformers.CONFIG_MAPPING[model_type]
    fields = _shrunk(kind(**copy.deepcopy(START.get(model_type, {}))).to_dict())
    _number_tokens(fields, {})
    _fit_rope(fields)
    _merge(fields, copy.deepcopy(FIELDS.get(model_type, {})))
    _merge(fields, own)
    for name in ("architectures", "dtype", "transformers_version"):
        fields.pop(name, None)
    made = kind(**fields)
    if model_type in AFTER:
        AFTER[model_type](made)
    return made


def _shrunk(fields: Mapping[str, Any]) -> dict[str, Any]:
    count = next((v for name, v in fields.items() if _COUNTS.fullmatch(name) and isinstance(v, int)), 0)
    layers = _enough_layers(fields, count)
    made: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "quantization_config":
            continue
        if name == "per_layer_config" and isinstance(value, dict):
            made[name] = {i: _shrunk(own) for i, own in value.items() if int(i) < layers}
        elif isinstance(value, dict):
            made[name] = _shrunk(value) if name.endswith("config") or name in {"decoder", "encoder"} else value
        elif isinstance(value, list | tuple) and len(value) == count > layers:
            made[name] = list(value)[:layers]
        elif type(value) is int:
            made[name] = min(value, layers) if _COUNTS.fullmatch(name) else _smaller(name, value, fields)
        else:
            made[name] = value
    return made


def _enough_layers(fields: Mapping[str, Any], count: int) -> int:
    """Return how many layers have each kind that the lists of a config name; two at least."""
    enough = 2
    for value in fields.values():
        if isinstance(value, list | tuple) and len(value) == count and all(isinstance(x, str | int) for x in value):
            kinds = set(value)
            if len(kinds) <= count // 2:
                enough = max(enough, *(value.index(kind) + 1 for kind in kinds))
    return min(enough, LAYERS)


def _smaller(name: str, value: int, fields: Mapping[str, Any]) -> int:
    if _KEY_HEADS.fullmatch(name):
        heads = fields.get("swa_num_attention_heads" if name.startswith("swa") else "num_attention_heads")
        return min(value, 4 if value == heads else 2)
    for pattern, largest in LARGEST:
        if pattern.fullmatch(name):
            return value if largest is None else min(value, largest)
    return value


def _number_tokens(fields: dict[str, Any], taken: dict[str, int]) -> None:
    """Give each special token an id below the words: its own, and the same wherever its name occurs."""
    known = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2}
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith(("config", "coder")):
            _number_tokens(value, taken)
        elif name == "eos_token_id":
            fields[name] = 2
        elif name.startswith("forced_") and name.endswith("_token_id"):
            fields[name] = None
        elif type(value) is int and re.fullmatch(r"\w*token(_id|_index)?", name):
            fields[name] = known[name] if name in known else taken.setdefault(name, 3 + len(taken))


def _fit_rope(fields: dict[str, Any]) -> None:
    """Cut the sections of a rotary embedding of several axes to the size of a head."""
    heads = fields.get("num_attention_heads") or 1
    size = fields.get("head_dim") or (fields.get("hidden_size") or 0) // heads
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name)
        for one in [rope, *rope.values()] if isinstance(rope, dict) else []:
            if isinstance(one, dict) and one.get("mrope_section"):
                share = one.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1
                count = len(one["mrope_section"])
                half = int(size * share) // 2
                rest = [half // count] * (count - 1)
                one["mrope_section"] = [half - sum(rest), *rest]
    for value in fields.values():
        if isinstance(value, dict):
            _fit_rope(value)


def _merge(fields: dict[str, Any], own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        if value is DELETE:
            fields.pop(name, None)
        elif isinstance(value, dict) and isinstance(fields.get(name), dict):
            _merge(fields[name], value)
        else:
            fields[name] = value


@torch.no_grad()
def _spread(model: Any) -> None:
    """Draw every matrix so that it keeps the size of what goes through it; small numbers where there were zeros."""
    random = torch.Generator().manual_seed(0)
    for name, weights in _matrices(model):
        fan_in = weights[0].numel() if "conv" in name else weights.shape[-1]
        scale = 1.0 if "embed" in name or "wte" in name else 1 / math.sqrt(max(fan_in, 1))
        weights.copy_(torch.randn(weights.shape, generator=random) * scale)
    for weights in model.parameters():
        if weights.ndim < 2 and not weights.any():
            weights.copy_(torch.randn(weights.shape, generator=random) * 0.1)


def _matrices(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weights in model.named_parameters():
        if weights.ndim > 1 and weights.is_floating_point():
            yield name.lower(), weights
