"""A plain jitted JAX loop that donates its cache, and computes no prompt twice."""

from collections.abc import Callable, Sequence

import llama_jax as model
from agnostic_cache import KVLayout, PrefixCache, model_fingerprint
from agnostic_cache_adapters.jax import resume, store


def make_cache(params: model.Params, init_kv: Callable[[int], model.KV]) -> PrefixCache:
    """Make the cache for these weights and buffers."""
    return PrefixCache("4GiB", namespace=model_fingerprint(params), layout=KVLayout.infer(init_kv))


def answer(
    params: model.Params, cache: PrefixCache, tokens: Sequence[int], kv: model.KV, max_new_tokens: int = 16
) -> list[int]:
    """Continue the token ids `tokens` greedily in the empty buffers `kv`, which are used up."""
    kv, start = resume(cache, tokens, kv)  # fills the longest known prefix
    logits, kv = model.prefill(params, tokens[start:], kv, start)
    store(cache, tokens, kv)  # copies what is new; from here on kv may be donated
    ids, _ = model.decode(params, logits, kv, len(tokens), max_new_tokens, eos=-1)
    return ids
