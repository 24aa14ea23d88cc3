"""A plain jitted JAX loop that donates its cache, and still computes a document once."""

from collections.abc import Callable

import llama_jax as model
from agnostic_cache import StateCache

cache = StateCache("4GiB")


def answer(
    params: model.Params, init_kv: Callable[[], model.KV], document: list[int], question: list[int]
) -> list[int]:
    """Continue the token ids `document` + `question` greedily; return 16 new ids."""
    kv = cache.get(tuple(document))  # a copy of your own: donate it, the entry stays
    if kv is None:
        _, kv = model.prefill(params, document, init_kv(), 0)  # donates what it is given
        cache.put(tuple(document), kv)  # copied in: from here on kv may be donated again
    return model.generate(params, question, kv, len(document), max_new_tokens=16, eos=-1)
