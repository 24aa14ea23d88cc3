"""Every structure in which Flax programs keep their caches keeps the law of reuse, also in loops that donate."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax_subject import live_bytes
from reuse_law import ROOM, VOCABULARY, Loop, ReuseLaw
from tiny_jax import Rows, TinyLoop, buffers

from agnostic_cache import KVLayout, wrap
from agnostic_cache.state.layout import LENGTH, TOKENS

HEADS, FEATURES = 2, 8


@flax.struct.dataclass
class Layer:
    """A dataclass of Flax around the buffers of a layer."""

    key: Any
    value: Any
    cache_index: Any
    name: str = flax.struct.field(pytree_node=False)


class Structs(TinyLoop):
    layout = KVLayout({"*.key": TOKENS(1), "*.value": TOKENS(1), "*.cache_index": LENGTH})

    def fresh(self) -> Any:
        return {str(i): Layer(k, v, jnp.int32(0), f"layer {i}") for i, (k, v) in enumerate(buffers(ROOM))}

    def open(self, cache: Any) -> Rows:
        return [(layer.key, layer.value) for layer in cache.values()]

    def close(self, cache: Any, rows: Rows, length: jax.Array) -> Any:  # noqa: ARG002
        layers = zip(cache.items(), rows, strict=True)
        return {name: old.replace(key=k, value=v, cache_index=old.cache_index + 1) for (name, old), (k, v) in layers}


class Attending(Loop):
    """Two attention layers with ``decode=True``, token by token, between an embedding and its transpose."""

    def __init__(self) -> None:
        self.embedding = jax.random.normal(jax.random.key(2), (VOCABULARY, FEATURES)) * 2

    @abstractmethod
    def empty(self) -> Any:
        """Make a cache of a new model."""

    @abstractmethod
    def attend(self, cache: Any, hidden: jax.Array) -> tuple[jax.Array, Any]:
        """Compute one token, of shape (batch, 1, features), under ``jit``."""

    def fresh(self) -> Any:
        return jax.tree.map(jnp.zeros_like, self.empty())

    @cached_property
    def step(self) -> Any:
        def step(token: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            self.traces += 1
            hidden, cache = self.attend(cache, self.embedding[token][None, None])
            return (self.embedding @ hidden[0, 0]).argmax(), cache

        return jax.jit(step, donate_argnames="cache")

    def extend(self, cache: Any, tokens: Sequence[int], start: int) -> tuple[int, Any]:  # noqa: ARG002 - the cache knows
        chosen: Any = -1
        for token in tokens:
            given = jax.tree.leaves(cache)
            chosen, cache = self.step(jnp.int32(token), cache)
            assert all(array.is_deleted() for array in given)
        return int(chosen), cache

    def live_bytes(self) -> int:
        return live_bytes()


class Linen(Attending):
    """The `cache` collection: a dict."""

    def __init__(self) -> None:
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                for name in ("first", "second"):
                    x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, decode=True, name=name)(x)
                return x

        super().__init__()
        self.model = Model()
        variables = jax.jit(self.model.init)(jax.random.key(0), jnp.ones((1, ROOM, FEATURES)))
        self.params, self.cache = variables["params"], variables["cache"]

    def empty(self) -> Any:
        return self.cache

    def attend(self, cache: Any, hidden: jax.Array) -> tuple[jax.Array, Any]:
        found, updated = self.model.apply({"params": self.params, "cache": cache}, hidden, mutable=["cache"])
        return found, updated["cache"]


class Nnx(Attending):
    """The state of the `Cache` variables of a module."""

    def __init__(self) -> None:
        class Model(nnx.Module):
            def __init__(self, rngs: nnx.Rngs) -> None:
                self.first = nnx.MultiHeadAttention(HEADS, FEATURES, decode=True, rngs=rngs)
                self.second = nnx.MultiHeadAttention(HEADS, FEATURES, decode=True, rngs=rngs)

            def __call__(self, x: Any) -> Any:
                x = x + self.first(x)
                return x + self.second(x)

        super().__init__()
        model = Model(nnx.Rngs(0))
        for layer in (model.first, model.second):
            layer.init_cache((1, ROOM, FEATURES))
        parts: Any = nnx.split(model, nnx.Cache, ...)
        self.graph, self.cache, self.rest = parts

    def empty(self) -> Any:
        return self.cache

    def attend(self, cache: Any, hidden: jax.Array) -> tuple[jax.Array, Any]:
        model: Any = nnx.merge(self.graph, cache, self.rest)
        found = model(hidden)
        return found, nnx.state(model, nnx.Cache)


class TestStructs(ReuseLaw):
    make = Structs


class TestLinen(ReuseLaw):
    make = Linen


class TestNnx(ReuseLaw):
    make = Nnx

    def test_a_kept_state_is_a_snapshot_of_live_variables(self) -> None:
        loop = Nnx()
        cache = loop.extend(loop.fresh(), [1, 2, 3], 0)[1]
        module: Any = nnx.merge(loop.graph, cache, loop.rest)
        live: Any = nnx.state(module, nnx.Cache)
        kept = wrap(live)
        before = {name: np.asarray(leaf.array).copy() for name, leaf in kept.leaves.items()}
        module(loop.embedding[4][None, None])
        assert int(module.first.cache_index[...]) == int(live["first"]["cache_index"][...]) == 4  # these are live
        assert kept.length == 3
        assert all(np.array_equal(kept.leaves[name].array, array) for name, array in before.items())
        restored = kept.unwrap()
        nnx.update(module, restored)
        restored["first"]["cache_index"][...] = jnp.int32(9)
        assert int(module.first.cache_index[...]) == 3
