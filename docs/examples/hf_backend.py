"""A Hugging Face backend that computes no prompt twice, whatever its prompts share."""

from typing import Any

import torch

from agnostic_cache import PrefixCache, model_fingerprint
from agnostic_cache_adapters.transformers import generate


class Backend:
    """Answers prompts with a model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Make the cache for these weights: others never meet its entries."""
        self.model, self.tokenizer = model, tokenizer
        self.cache = PrefixCache("4GiB", namespace=model_fingerprint(model))

    @torch.inference_mode()
    def answer(self, prompt: str, max_new_tokens: int = 64) -> str:
        """Continue `prompt` greedily."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        out = generate(self.model, self.cache, **inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return str(self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
