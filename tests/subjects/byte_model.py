"""A tokenizer of bytes, and a model of as many words: text goes in and comes out without a download."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_END = "<eos>"


def byte_model(max_positions: int = 2048) -> tuple[Any, PreTrainedTokenizerFast]:
    """Make a model of random weights that takes so many tokens at the most, and its tokenizer."""
    words = {word: i for i, word in enumerate([_END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    plain = Tokenizer(models.BPE(vocab=words, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=max_positions,
        initializer_range=0.3,  # far from ties
        eos_token_id=None,
        pad_token_id=0,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=_END, pad_token=_END)
    return LlamaForCausalLM(config).eval(), tokenizer
