"""Flax caches: the linen ``cache`` collection and the nnx ``Cache`` state.

Both are pytrees of JAX arrays under known names. An nnx state read from a module holds live Variables; taking it apart
takes the arrays they hold at that moment, and putting it together makes fresh Variables, so that a kept state is a
snapshot, not a view.
"""

from collections.abc import Sequence

import flax.core  # noqa: F401 - importing this module is what says that Flax is here
from flax import nnx

from agnostic_cache.arrays.adapter import Opened
from agnostic_cache.arrays.registry import offer_adapter
from agnostic_cache.state.layout import LENGTH, TOKENS, KVLayout
from agnostic_cache_adapters.jax import JaxAdapter, on_evict, resume, store

__all__ = ["DECODE", "FlaxAdapter", "adapter", "on_evict", "resume", "store"]

DECODE = KVLayout({"*cached_key": TOKENS(-3), "*cached_value": TOKENS(-3), "*cache_index": LENGTH})
"""``decode=True`` attention of linen and nnx: keys and values of shape (batch, tokens, heads, dim)."""


class FlaxAdapter(JaxAdapter):
    """JAX, with the containers and the names of Flax linen and nnx."""

    def open(self, value: object) -> Opened | None:
        """Take a Variable apart as the array that it holds, anything else as JAX does."""
        opened = super().open(value)
        if opened is not None and isinstance(value, nnx.Variable):
            [held] = opened.children.values()
            return opened._replace(children={"": held})
        return opened

    def known_layout(self, names: Sequence[str]) -> KVLayout | None:
        """Know caches of ``decode=True`` attention by their names."""
        return DECODE if all(DECODE.declares(name) for name in names) else super().known_layout(names)


adapter = FlaxAdapter()
offer_adapter("flax", adapter)
