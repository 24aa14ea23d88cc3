"""A Hugging Face backend that computes a document once, however many questions follow."""

from typing import Any

import torch
from transformers import DynamicCache

from agnostic_cache import StateCache

cache = StateCache("4GiB")


@torch.inference_mode()
def answer(model: Any, document: list[int], question: list[int], new_tokens: int = 16) -> list[int]:
    """Continue the token ids `document` + `question` greedily; return the new ids."""
    state = cache.get(tuple(document))  # a fork: grows as it likes, the entry never changes
    if state is None:
        state = DynamicCache(config=model.config)
        model(torch.tensor([document]), past_key_values=state)
        cache.put(tuple(document), state)  # copied in; room is made, and memory freed, before this returns
    prompt = torch.tensor([document + question])
    tokens = model.generate(prompt, past_key_values=state, max_new_tokens=new_tokens, do_sample=False)
    return list(tokens[0, prompt.shape[1] :].tolist())
