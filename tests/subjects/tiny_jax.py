"""A tiny transformer in JAX whose jitted step donates its cache, in whatever structure that comes."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax_subject import live_bytes
from reuse_law import VOCABULARY, Loop

LAYERS, HEADS, DIM = 2, 4, 4
WIDTH = HEADS * DIM
Rows = list[tuple[jax.Array, jax.Array]]
"""Keys and values per layer, of shape (batch, rows, heads, dim)."""


def weights() -> list[dict[str, jax.Array]]:
    keys = iter(jax.random.split(jax.random.key(0), 4 * LAYERS))
    names = ("query", "key", "value", "out")
    return [{name: jax.random.normal(next(keys), (WIDTH, WIDTH)) * 0.5 for name in names} for _ in range(LAYERS)]


def forward(params: Any, token: jax.Array, rows: Rows, position: jax.Array) -> tuple[jax.Array, Rows]:
    """Compute one token, written to row ``position % rows``: a buffer that is shorter than the text is a ring."""
    layers, embedding = params
    angles = position / 10.0 ** (jnp.arange(WIDTH) / WIDTH)
    hidden = embedding[token] + jnp.sin(angles)
    written: Rows = []
    for layer, (keys, values) in zip(layers, rows, strict=True):
        count = keys.shape[1]
        at = (0, position % count, 0, 0)
        heads = (1, 1, HEADS, DIM)
        keys = jax.lax.dynamic_update_slice(keys, (hidden @ layer["key"]).reshape(heads), at)  # noqa: PLW2901
        values = jax.lax.dynamic_update_slice(values, (hidden @ layer["value"]).reshape(heads), at)  # noqa: PLW2901
        query = (hidden @ layer["query"]).reshape(HEADS, DIM)
        held = position - (position - jnp.arange(count)) % count  # which token each row stands for
        scores = jnp.einsum("hd,rhd->hr", query, keys[0]) / math.sqrt(DIM)
        attention = jax.nn.softmax(jnp.where(held >= 0, scores, -jnp.inf))
        mixed = jnp.einsum("hr,rhd->hd", attention, values[0]).reshape(WIDTH)
        hidden = jnp.tanh(hidden + mixed @ layer["out"])
        written.append((keys, values))
    return (embedding @ hidden).argmax(), written


class TinyLoop(Loop):
    """Greedy decoding, token by token."""

    def __init__(self) -> None:
        self.params = weights(), jax.random.normal(jax.random.key(1), (VOCABULARY, WIDTH))

    @abstractmethod
    def open(self, cache: Any) -> Rows:
        """Take a cache apart, under ``jit``."""

    @abstractmethod
    def close(self, cache: Any, rows: Rows, length: jax.Array) -> Any:
        """Put a cache like `cache` together, under ``jit``."""

    @cached_property
    def step(self) -> Any:
        def step(params: Any, token: jax.Array, cache: Any, position: jax.Array) -> tuple[jax.Array, Any]:
            self.traces += 1
            chosen, rows = forward(params, token, self.open(cache), position)
            return chosen, self.close(cache, rows, position + 1)

        return jax.jit(step, donate_argnames="cache")

    def extend(self, cache: Any, tokens: Sequence[int], start: int) -> tuple[int, Any]:
        chosen: Any = -1
        for i, token in enumerate(tokens):
            given = jax.tree.leaves(cache)
            chosen, cache = self.step(self.params, jnp.int32(token), cache, jnp.int32(start + i))
            assert all(array.is_deleted() for array in given)
        return int(chosen), cache

    def live_bytes(self) -> int:
        return live_bytes()


def buffers(rows: int, layers: int = LAYERS) -> Rows:
    shape = (1, rows, HEADS, DIM)
    return [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(layers)]
