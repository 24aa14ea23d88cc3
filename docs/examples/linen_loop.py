"""A Flax linen model with ``decode=True`` attention: the ``cache`` collection resumed and stored."""

from collections.abc import Callable, Sequence
from typing import Any

from agnostic_cache import PrefixCache
from agnostic_cache_adapters.flax import resume, store


def run(
    step: Callable[[Any, int], tuple[Any, Any]], cache: PrefixCache, tokens: Sequence[int], kv: Any
) -> tuple[Any, Any]:
    """Feed `tokens` one by one to ``step(kv, token) -> (output, kv)``; return the last output and the collection."""
    kv, start = resume(cache, tokens, kv)  # sets cache_index too
    output = None
    for token in tokens[start:]:
        output, kv = step(kv, token)
    store(cache, tokens, kv)
    return output, kv
