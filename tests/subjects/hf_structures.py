"""Every structure of Hugging Face caches, each with a tiny model of random weights."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer, QuantizedCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from agnostic_cache_adapters.transformers.release import forward_argument, generate_argument

VOCABULARY = 64
PROMPT = 19
WINDOW = 6
ROOM = 48  # of a static cache
RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from ties, so that tokens say something
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT: dict[str, Any] = {
    **{name: size for name, size in SIZES.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


class OwnLayer(CacheLayerMixin):
    """A layer of a user's own: it writes into spare room in place, and counts in a dict."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: dict[str, torch.Tensor] = {}
        self.counts = {"tokens": 0}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for name, new in (("keys", key_states), ("values", value_states)):
            batch, heads, _, dim = new.shape
            self.rows[name] = new.new_zeros(batch, heads, ROOM, dim)
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002 - as its base
        **kwargs: Any,  # noqa: ARG002 - as its base
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.counts["tokens"]
        self.counts["tokens"] = stop = start + key_states.shape[2]
        for rows, new in zip(self.rows.values(), (key_states, value_states), strict=True):
            rows[:, :, start:stop] = new
        return self.rows["keys"][:, :, :stop], self.rows["values"][:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.counts["tokens"] + query_length, 0

    def get_seq_length(self) -> int:
        return self.counts["tokens"]

    def get_max_length(self) -> int:
        return ROOM


class Structure(NamedTuple):
    """One kind of cache.

    Attributes:
        model: What computes it.
        fresh: Makes an empty cache of it.
        reach: How many tokens can be cut off the end of a state; all where every row is kept, none where it is whole.
        exact: Whether the model itself gives the same going on from a state as in one go. With a quantised cache it
            does not, since what comes first is computed with what is not quantised yet; nor does MiniMax, whose linear
            attention goes on by one token at a time.
        shared: Whether a fork shares all memory with what it was forked from.
        known: Whether every class of it is known, so that a fresh cache can be filled.
    """

    model: Any
    fresh: Callable[[], Any]
    reach: int = PROMPT
    exact: bool = True
    shared: bool = True
    known: bool = True

    @property
    def encoded(self) -> dict[str, torch.Tensor]:
        """What an encoder-decoder is asked besides."""
        return {"input_ids": tokens(9, seed=1)} if self.model.config.is_encoder_decoder else {}

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor, cache: Any = None) -> Any:
        """Compute `ids` into a cache, after what it holds."""
        cache = self.fresh() if cache is None else cache
        name = "decoder_input_ids" if self.encoded else "input_ids"
        self.model(**{**self.encoded, name: ids}, **forward_argument(self.model, cache), use_cache=True)
        return cache

    @torch.no_grad()
    def answer(self, ids: torch.Tensor, cache: Any = None, count: int = 4, **options: Any) -> list[int]:
        """Go on from `ids`, of which a cache may hold the beginning, by greedy tokens."""
        name = "decoder_input_ids" if self.encoded else "input_ids"
        out = self.model.generate(
            **{**self.encoded, name: ids},
            **generate_argument(self.model, self.fresh() if cache is None else cache),
            max_new_tokens=count,
            do_sample=False,
            **options,
        )
        found: list[int] = out[0, -count:].tolist()
        return found


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids, shape (1, count)."""
    return torch.randint(2, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def _dynamic(kind: Any, config: Any, *, record: bool = False, **settings: Any) -> Structure:
    def fresh() -> DynamicCache:
        cache = DynamicCache(config=config)
        if record:
            for layer in cache.layers:
                if isinstance(layer, DynamicSlidingWindowLayer):
                    layer.activate_past_recording()
        return cache

    return Structure(_model(kind, config), fresh, **settings)


def _model(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start as zeros, and would hide what goes into them
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model


def llama() -> Structure:
    return _dynamic(LlamaForCausalLM, LlamaConfig(**SIZES))


def llama_without_config() -> Structure:
    return Structure(_model(LlamaForCausalLM, LlamaConfig(**SIZES)), DynamicCache)


def llama_static() -> Structure:
    config = LlamaConfig(**SIZES)
    fresh = functools.partial(StaticCache, config=config, max_cache_len=ROOM)
    return Structure(_model(LlamaForCausalLM, config), fresh, shared=False)


def llama_fp8() -> Structure:
    config = LlamaConfig(**SIZES)
    fresh = functools.partial(QuantizedCache, "fp8", config=config)
    return Structure(_model(LlamaForCausalLM, config), fresh, reach=0, exact=False, shared=False, known=False)


def llama_own_layer() -> Structure:
    config = LlamaConfig(**SIZES)
    fresh = lambda: Cache(layers=[OwnLayer() for _ in range(config.num_hidden_layers)])  # noqa: E731 - as the others
    return Structure(_model(LlamaForCausalLM, config), fresh, reach=0, shared=False, known=False)


def mistral() -> Structure:
    return _dynamic(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=WINDOW), reach=0)


def mistral_recorded() -> Structure:
    return _dynamic(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=WINDOW), record=True)


def gemma3() -> Structure:
    return _dynamic(Gemma3ForCausalLM, _gemma3(), reach=0)


def gemma3_recorded() -> Structure:
    return _dynamic(Gemma3ForCausalLM, _gemma3(), record=True)


def gemma3_static() -> Structure:
    fresh = functools.partial(StaticCache, config=_gemma3(), max_cache_len=ROOM)
    # Buffers hold one row more than the window needs.
    return Structure(_model(Gemma3ForCausalLM, _gemma3()), fresh, reach=1, shared=False)


def _gemma3() -> Gemma3TextConfig:
    return Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])


def qwen3_next() -> Structure:
    config = Qwen3NextConfig(
        **SIZES,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=1,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return _dynamic(Qwen3NextForCausalLM, config, reach=0, shared=False)


def falcon_h1() -> Structure:
    sizes: dict[str, Any] = {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    }
    config = FalconH1Config(**SIZES, **sizes, mamba_n_groups=1)
    return _dynamic(FalconH1ForCausalLM, config, reach=0, shared=False)


def lfm2() -> Structure:
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = Lfm2Config(**sizes, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    return _dynamic(Lfm2ForCausalLM, config, reach=0, shared=False)


def minimax() -> Structure:
    config = MiniMaxConfig(
        **SIZES,
        layer_types=["linear_attention", "full_attention"],
        block_size=4,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return Structure(_model(MiniMaxForCausalLM, config), MiniMaxCache, reach=0, exact=False, shared=False, known=False)


def deepseek_v3() -> Structure:
    return _dynamic(DeepseekV3ForCausalLM, DeepseekV3Config(**LATENT))


def deepseek_v32() -> Structure:
    return _dynamic(DeepseekV32ForCausalLM, _indexed())


def deepseek_v32_static() -> Structure:
    fresh = functools.partial(StaticCache, config=_indexed(), max_cache_len=ROOM)
    return Structure(_model(DeepseekV32ForCausalLM, _indexed()), fresh, shared=False)


def _indexed() -> DeepseekV32Config:
    return DeepseekV32Config(**LATENT, index_topk=4, index_head_dim=8, index_n_heads=16)  # with few heads, ties


def deepseek_v4() -> Structure:
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    config = DeepseekV4Config(
        **{**sizes, "num_hidden_layers": 3, "num_key_value_heads": 1},
        layer_types=["sliding_attention", *RATES],
        compress_rates=RATES,
        sliding_window=WINDOW,
        q_lora_rank=16,
        partial_rotary_factor=0.5,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=2,
        hc_mult=2,
        hc_sinkhorn_iters=2,
        mlp_layer_types=["moe"] * 3,
    )
    return _dynamic(DeepseekV4ForCausalLM, config, reach=0)


def t5() -> Structure:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=None,
    )
    config.decoder_start_token_id = 0
    fresh = lambda: EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))  # noqa: E731 - as above
    return Structure(_model(T5ForConditionalGeneration, config), fresh, reach=0)


STRUCTURES: dict[str, Callable[[], Structure]] = {
    made.__name__: made
    for made in (
        llama,
        llama_without_config,
        llama_static,
        llama_fp8,
        llama_own_layer,
        mistral,
        mistral_recorded,
        gemma3,
        gemma3_recorded,
        gemma3_static,
        qwen3_next,
        falcon_h1,
        lfm2,
        minimax,
        deepseek_v3,
        deepseek_v32,
        deepseek_v32_static,
        deepseek_v4,
        t5,
    )
}
