"""Every structure in which JAX programs keep their caches keeps the law of reuse, also in loops that donate."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from prefix_law import PrefixLaw
from reuse_law import ROOM, ReuseLaw
from tiny_jax import LAYERS, Rows, TinyLoop, buffers

from agnostic_cache import KVLayout, wrap
from agnostic_cache.errors import LengthMismatchError
from agnostic_cache.state.layout import LENGTH, SNAPSHOT, TOKENS

RING = 6


class Pair(NamedTuple):
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    layers: list[Pair]
    cache_index: Any
    room: int = dataclasses.field(default=ROOM, metadata={"static": True})


class Dicts(TinyLoop):
    layout = KVLayout.infer(lambda length: [{"key": k, "value": v} for k, v in buffers(length)])

    def fresh(self) -> Any:
        return [{"key": k, "value": v} for k, v in buffers(ROOM)]

    def open(self, cache: Any) -> Rows:
        return [(layer["key"], layer["value"]) for layer in cache]

    def close(self, cache: Any, rows: Rows, length: jax.Array) -> Any:  # noqa: ARG002
        return [{"key": k, "value": v} for k, v in rows]


class Tuples(TinyLoop):
    layout = KVLayout.infer(buffers)

    def fresh(self) -> Any:
        return buffers(ROOM)

    def open(self, cache: Any) -> Rows:
        return list(cache)

    def close(self, cache: Any, rows: Rows, length: jax.Array) -> Any:  # noqa: ARG002
        return rows


class Dataclass(TinyLoop):
    """NamedTuples in a dataclass that counts its tokens."""

    layout = KVLayout({"layers.*": TOKENS(1), "cache_index": LENGTH})

    def fresh(self) -> Any:
        return Registered([Pair(*layer) for layer in buffers(ROOM)], jnp.int32(0))

    def open(self, cache: Any) -> Rows:
        return [(layer.key, layer.value) for layer in cache.layers]

    def close(self, cache: Any, rows: Rows, length: jax.Array) -> Any:  # noqa: ARG002
        return dataclasses.replace(cache, layers=[Pair(*layer) for layer in rows], cache_index=cache.cache_index + 1)


class Stacked(TinyLoop):
    """One buffer of shape (layers, batch, tokens, heads, dim), as `jax.lax.scan` likes it."""

    layout = KVLayout(
        {"k": TOKENS(2), "v": TOKENS(2)}, names={"k": "layers.*.key", "v": "layers.*.value"}, stack_axis=0
    )

    def fresh(self) -> Any:
        keys, values = zip(*buffers(ROOM), strict=True)
        return {"k": jnp.stack(keys), "v": jnp.stack(values)}

    def open(self, cache: Any) -> Rows:
        return list(zip(cache["k"], cache["v"], strict=True))

    def close(self, cache: Any, rows: Rows, length: jax.Array) -> Any:  # noqa: ARG002
        keys, values = zip(*rows, strict=True)
        return {"k": jnp.stack(keys), "v": jnp.stack(values)}


class HeadsFirst(TinyLoop):
    """Shape (batch, heads, tokens, dim), in an array per layer for both."""

    layout = KVLayout({"*": TOKENS(3)}, axes={"*": ("pair", "batch", "heads", "tokens", "dim")})

    def fresh(self) -> Any:
        return tuple(self.close(None, buffers(ROOM), jnp.int32(0)))

    def open(self, cache: Any) -> Rows:
        return [(both[0].swapaxes(1, 2), both[1].swapaxes(1, 2)) for both in cache]

    def close(self, cache: Any, rows: Rows, length: jax.Array) -> Any:  # noqa: ARG002
        return tuple(jnp.stack([k.swapaxes(1, 2), v.swapaxes(1, 2)]) for k, v in rows)


class Tunix(TinyLoop):
    """The dict of google-tunix, which is known by its names."""

    rows: ClassVar[tuple[int, ...]] = (ROOM,) * LAYERS

    def fresh(self) -> Any:
        layers = [buffers(rows, 1)[0] for rows in self.rows]
        return {f"layer_{i}": {"k": k, "v": v, "end_index": jnp.zeros(1, jnp.int32)} for i, (k, v) in enumerate(layers)}

    def open(self, cache: Any) -> Rows:
        return [(layer["k"], layer["v"]) for layer in cache.values()]

    def close(self, cache: Any, rows: Rows, length: jax.Array) -> Any:  # noqa: ARG002
        layers = zip(cache.items(), rows, strict=True)
        return {name: {"k": k, "v": v, "end_index": old["end_index"] + 1} for (name, old), (k, v) in layers}


class Ring(Tunix):
    """Its local layers: token i is in row ``i % rows``, so that only the whole is of use."""

    layout = KVLayout({"layer_0.k": SNAPSHOT, "layer_0.v": SNAPSHOT, "*.k": TOKENS(1), "*.v": TOKENS(1), "*": LENGTH})
    cuts = False
    rows = (RING, ROOM)


class Positions(TinyLoop):
    """A leaf that nobody has heard of beside the buffers: what each row stands for."""

    cuts = False

    def fresh(self) -> Any:
        return {"kv": buffers(ROOM), "positions": jnp.full(ROOM, -1, jnp.int32)}

    def open(self, cache: Any) -> Rows:
        return list(cache["kv"])

    def close(self, cache: Any, rows: Rows, length: jax.Array) -> Any:
        return {"kv": rows, "positions": cache["positions"].at[length - 1].set(length - 1)}


class Sharded(Dicts):
    """Heads spread over four devices."""

    def __init__(self, kind: AxisType) -> None:
        super().__init__()
        mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
        self.params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        self.sharding = NamedSharding(mesh, PartitionSpec(None, None, "model"))

    def fresh(self) -> Any:
        fresh: Any = jax.device_put(super().fresh(), self.sharding)
        return fresh

    def close(self, cache: Any, rows: Rows, length: jax.Array) -> Any:
        closed: Any = jax.lax.with_sharding_constraint(super().close(cache, rows, length), self.sharding)
        return closed


class JaxLaw(ReuseLaw, PrefixLaw):
    """Of structures whose layout is known."""


class TestDicts(JaxLaw):
    make = Dicts


class TestTuples(JaxLaw):
    make = Tuples


class TestDataclass(JaxLaw):
    make = Dataclass


class TestStacked(JaxLaw):
    make = Stacked


class TestHeadsFirst(JaxLaw):
    make = HeadsFirst


class TestTunix(JaxLaw):
    make = Tunix


class TestRing(JaxLaw):
    make = Ring

    def test_what_is_left_of_a_ring_is_named(self) -> None:
        state = Ring().state([1, 2, 3, 4, 5, 6, 7, 8])
        assert state.cut(0, 4).missing == {"layer_0.k", "layer_0.v"}
        assert not state.cut(4, 8).missing

    def test_a_ring_that_is_not_declared_is_refused(self) -> None:
        loop = Ring()
        cache = loop.extend(loop.fresh(), [1] * (RING + 1), 0)[1]
        with pytest.raises(LengthMismatchError):
            wrap(cache)


class TestPositions(ReuseLaw):
    make = Positions


class TestSharded(JaxLaw):
    make = staticmethod(lambda: Sharded(AxisType.Auto))
