"""What the design takes for granted of Flax's caches. A failure here says that Flax has changed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

ROOM, FEATURES = 8, 8


def token(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (1, 1, FEATURES))


class Linen:
    def __init__(self) -> None:
        self.module = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
        variables = self.module.init(jax.random.key(0), jnp.ones((1, ROOM, FEATURES)))
        self.params, self.empty = variables["params"], variables["cache"]

    def step(self, cache: Any, seed: int) -> tuple[Any, Any]:
        found, updated = self.module.apply({"params": self.params, "cache": cache}, token(seed), mutable=["cache"])
        return found, updated["cache"]

    def steps(self, cache: Any, *seeds: int) -> tuple[Any, Any]:
        found = None
        for seed in seeds:
            found, cache = self.step(cache, seed)
        return found, cache


@pytest.fixture(scope="module")
def linen() -> Linen:
    return Linen()


@pytest.fixture
def module() -> Any:
    module = nnx.MultiHeadAttention(2, FEATURES, decode=True, rngs=nnx.Rngs(0))
    module.init_cache((1, ROOM, FEATURES))
    return module


def test_linen_never_writes_the_cache_that_it_is_given(linen: Linen) -> None:
    _, cache = linen.steps(linen.empty, 1, 2)
    held = {name: np.asarray(array).copy() for name, array in cache.items()}
    linen.steps(cache, 3)
    assert sorted(cache) == ["cache_index", "cached_key", "cached_value"]
    assert all(np.array_equal(cache[name], array) for name, array in held.items())


def test_setting_the_counter_back_is_enough(linen: Linen) -> None:
    _, cache = linen.steps(linen.empty, 1, 2)
    wanted, _ = linen.steps(cache, 3)
    _, further = linen.steps(cache, 4, 5, 6)
    found, _ = linen.steps({**further, "cache_index": cache["cache_index"]}, 3)
    assert np.array_equal(found, wanted)


def test_the_end_of_the_buffer_is_passed_silently(linen: Linen) -> None:
    _, cache = linen.steps(linen.empty, *range(ROOM + 1))
    assert int(cache["cache_index"]) == ROOM + 1


def test_a_state_of_nnx_is_live(module: Any) -> None:
    live: Any = nnx.state(module, nnx.Cache)
    snapshot: Any = jax.tree.map(lambda a: a, live)
    held = jax.tree.leaves(snapshot)
    module(token(1))
    assert int(live["cache_index"][...]) == 1
    assert int(snapshot["cache_index"][...]) == 0
    assert all(one is other for one, other in zip(jax.tree.leaves(snapshot), held, strict=True))
    assert not any(array.is_deleted() for array in held)  # nnx binds new arrays


def test_a_snapshot_dies_when_its_arrays_are_donated(module: Any) -> None:
    snapshot = jax.tree.map(lambda a: a, nnx.state(module, nnx.Cache))
    nnx.jit(lambda m, x: m(x), donate_argnums=0)(module, token(1))
    assert any(array.is_deleted() for array in jax.tree.leaves(snapshot))


def test_a_variable_is_a_pytree_of_one_array(module: Any) -> None:
    variable = nnx.state(module, nnx.Cache)["cached_key"]
    assert len(jax.tree.leaves(variable)) == 1
    assert isinstance(jax.tree.map(lambda a: a, variable), nnx.Cache)
