"""A plain jitted JAX loop that donates its cache, and still computes a document once."""

import llama_jax as model
from agnostic_cache import StateCache
from smollm2 import Config

cache = StateCache("4GiB")


def answer(params: model.Params, config: Config, document: list[int], question: list[int], eos: int = -1) -> list[int]:
    """Continue the token ids `document` + `question` greedily; return up to 16 new ids."""
    kv = cache.get(tuple(document))  # a copy of your own: donate it, the entry stays
    if kv is None:
        kv = model.init_kv(config, max_len=len(document) + 256)
        _, kv = model.prefill(params, document, kv, 0)  # donates kv
        cache.put(tuple(document), kv)  # copied in: from here on kv may be donated again
    return model.generate(params, question, kv, len(document), 16, eos)
