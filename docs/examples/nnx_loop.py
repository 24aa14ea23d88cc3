"""A Flax nnx model with ``decode=True`` attention, whose modules hold their caches."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from agnostic_cache import PrefixCache
from agnostic_cache_adapters.flax import resume, store


def run(model: Any, cache: PrefixCache, tokens: Sequence[int]) -> Any:
    """Feed `tokens` one by one to a model whose caches are empty; return its last output."""
    kv, start = resume(cache, tokens, nnx.state(model, nnx.Cache))
    nnx.update(model, kv)  # what the model held was used up
    output = None
    for token in tokens[start:]:
        output = model(token)
    store(cache, tokens, nnx.state(model, nnx.Cache))
    return output
