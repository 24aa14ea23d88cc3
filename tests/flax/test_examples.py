"""The Flax examples run, and what they compute does not depend on the cache."""

import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from agnostic_cache import PrefixCache

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
HEADS, FEATURES, ROOM = 2, 8, 24
PROMPTS = [list(range(10, 10 + n)) + [3] * m for n, m in ((12, 1), (12, 2), (5, 3), (12, 2), (1, 0))]


def embedded(token: int) -> Any:
    return jnp.sin(jnp.arange(FEATURES) * (token + 1.0)).reshape(1, 1, FEATURES)


def test_a_linen_model() -> None:
    model = nn.MultiHeadDotProductAttention(num_heads=HEADS, decode=True)
    variables = model.init(jax.random.key(0), jnp.ones((1, ROOM, FEATURES)))

    @jax.jit
    def apply(kv: Any, x: Any) -> Any:
        return model.apply({"params": variables["params"], "cache": kv}, x, mutable=["cache"])

    def step(kv: Any, token: int) -> tuple[Any, Any]:
        output, updated = apply(kv, embedded(token))
        return output, updated["cache"]

    def fresh() -> Any:
        return jax.tree.map(jnp.zeros_like, variables["cache"])

    run = runpy.run_path(str(EXAMPLES / "linen_loop.py"))["run"]
    cache = PrefixCache("1MiB", namespace="linen", block_size=4)
    for prompt in PROMPTS:
        expected, kv = None, fresh()
        for token in prompt:
            expected, kv = step(kv, token)
        output, kv = run(step, cache, prompt, fresh())
        assert np.array_equal(output, expected)  # type: ignore[arg-type]
        assert int(kv["cache_index"]) == len(prompt)
    assert cache.stats().hit_tokens == 13 + 5 + 13  # the last of these was asked before


def test_an_nnx_model() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=True, rngs=nnx.Rngs(0))

        def __call__(self, token: int) -> Any:
            return self.attention(embedded(token))

        def fresh(self) -> "Model":
            self.attention.init_cache((1, ROOM, FEATURES))
            return self

    model = Model()
    run = runpy.run_path(str(EXAMPLES / "nnx_loop.py"))["run"]
    cache = PrefixCache("1MiB", namespace="nnx", block_size=4)
    for prompt in PROMPTS:
        model.fresh()
        expected = [model(token) for token in prompt][-1]
        assert np.array_equal(run(model.fresh(), cache, prompt), expected)
    assert cache.stats().hit_tokens == 13 + 5 + 13  # the last of these was asked before
