"""The adapter of Flax keeps the contract of adapters, and a rewound cache decodes as if it had never gone further."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze
from jax_subject import JaxSubject, live_bytes, values
from no_metadata import check_adapter

from agnostic_cache import KVLayout, KVState, wrap
from agnostic_cache.errors import LengthMismatchError, StructureMismatchError
from agnostic_cache.state.layout import LENGTH, TOKENS
from agnostic_cache.testing import AdapterSuite
from agnostic_cache_adapters.flax import DECODE, FlaxAdapter, on_evict

HEADS, FEATURES, ROOM = 2, 8, 12


class TestFlaxAdapter(JaxSubject, AdapterSuite):
    dtypes = JaxSubject.dtypes[:3]  # the arrays are those of JAX, whose own tests take every dtype

    def test_the_most_derived_adapter_serves_jax(self) -> None:
        assert isinstance(self.adapter, FlaxAdapter)


def tokens(seed: int, count: int = ROOM) -> Any:
    """Return the inputs of a sequence, shape (tokens, batch, 1, features)."""
    return np.random.default_rng(seed).normal(size=(count, 1, 1, FEATURES)).astype(np.float32)


class Linen:
    """Two attention layers of linen that decode token by token."""

    def __init__(self) -> None:
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                for name in ("first", "second"):
                    x = nn.MultiHeadDotProductAttention(num_heads=HEADS, decode=True, name=name)(x)
                return x

        self.model = Model()
        variables = jax.jit(self.model.init)(jax.random.key(0), jnp.ones((1, ROOM, FEATURES)))
        self.params, self.empty = variables["params"], variables["cache"]
        self.step = jax.jit(
            lambda cache, x: self.model.apply({"params": self.params, "cache": cache}, x, mutable=["cache"])
        )

    def fresh(self) -> Any:
        return jax.tree.map(jnp.zeros_like, self.empty)

    def decode(self, cache: Any, inputs: Any) -> tuple[list[Any], Any]:
        outputs = []
        for x in inputs:
            y, updated = self.step(cache, x)
            cache = updated["cache"]
            outputs.append(np.asarray(y))
        return outputs, cache


class Nnx:
    """The same with nnx, whose modules hold their caches."""

    def __init__(self) -> None:
        class Model(nnx.Module):
            def __init__(self, rngs: nnx.Rngs) -> None:
                self.first = nnx.MultiHeadAttention(HEADS, FEATURES, decode=True, rngs=rngs)
                self.second = nnx.MultiHeadAttention(HEADS, FEATURES, decode=True, rngs=rngs)

            def __call__(self, x: Any) -> Any:
                return self.second(self.first(x))

        self.model = Model(nnx.Rngs(0))
        self.fresh()
        self.step = nnx.jit(lambda model, x: model(x))

    def fresh(self) -> Any:
        for layer in (self.model.first, self.model.second):
            layer.init_cache((1, ROOM, FEATURES))
        return nnx.state(self.model, nnx.Cache)

    def decode(self, cache: Any, inputs: Any) -> tuple[list[Any], Any]:
        nnx.update(self.model, cache)
        outputs = [np.asarray(self.step(self.model, x)) for x in inputs]
        return outputs, nnx.state(self.model, nnx.Cache)


@pytest.fixture(scope="module")
def linen() -> Linen:
    return Linen()


@pytest.fixture(scope="module")
def module() -> Nnx:
    return Nnx()


@pytest.fixture(params=["linen", "module"])
def flax_model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


class TestDecoding:
    def test_the_layout_is_known(self, flax_model: Any) -> None:
        _, cache = flax_model.decode(flax_model.fresh(), tokens(0, 7))
        state = wrap(cache)
        assert state.length == 7
        assert state.layout is DECODE
        names = ("cache_index", "cached_key", "cached_value")
        assert set(state.leaves) == {f"{layer}.{name}" for layer in ("first", "second") for name in names}
        assert {leaf.role for leaf in state.leaves.values()} == {TOKENS(1), LENGTH}
        assert {leaf.axes for leaf in state.leaves.values()} == {("batch", "tokens", "heads", "dim"), ()}

    def test_a_kept_state_does_not_move(self, flax_model: Any) -> None:
        _, cache = flax_model.decode(flax_model.fresh(), tokens(0, 5))
        states = [wrap(cache), wrap(cache).copy()]
        before = [values(leaf.array) for leaf in states[0].leaves.values()]
        flax_model.decode(cache, tokens(1, 3))  # nnx moves what `cache` shows
        for state in states:
            assert state.length == 5
            assert [values(leaf.array) for leaf in state.leaves.values()] == before

    @pytest.mark.parametrize("rewind", ["whole", "cut", "cut and copied", "joined", "host"])
    def test_a_rewound_cache_decodes_as_before(self, flax_model: Any, rewind: str) -> None:
        inputs, other = tokens(0), tokens(2)
        wanted, _ = flax_model.decode(flax_model.fresh(), inputs)
        _, cache = flax_model.decode(flax_model.fresh(), np.concatenate([inputs[:5], other[5:9]]))  # strays after 5
        state = wrap(cache)
        assert state.length == 9
        kept = {
            "whole": lambda: state.copy().cut(0, 5),
            "cut": lambda: state.cut(0, 5),
            "cut and copied": lambda: state.cut(0, 5).copy(),
            "joined": lambda: KVState.join([state.cut(0, 2), state.cut(2, 5)]),
            "host": lambda: state.cut(0, 5).to("host"),
        }[rewind]()
        for _ in range(2):
            loaded = kept.unwrap(like=flax_model.fresh())
            assert wrap(loaded).length == 5
            again, _ = flax_model.decode(loaded, inputs[5:])
            assert same(again, wanted[5:])

    def test_what_is_unwrapped_is_what_was_wrapped(self, flax_model: Any) -> None:
        inputs = tokens(0)
        wanted, _ = flax_model.decode(flax_model.fresh(), inputs)
        _, cache = flax_model.decode(flax_model.fresh(), inputs[:6])
        kept = wrap(cache).copy()
        for _ in range(2):
            native = kept.copy().unwrap()
            assert type(native) is type(cache)
            again, _ = flax_model.decode(native, inputs[6:])
            assert same(again, wanted[6:])

    def test_a_template_of_another_model_is_refused(self, flax_model: Any) -> None:
        _, cache = flax_model.decode(flax_model.fresh(), tokens(0, 5))
        state = wrap(cache).copy()
        narrow = {"first": {"cached_key": jnp.zeros((1, ROOM, 1, 4)), "cached_value": jnp.zeros((1, ROOM, 1, 4))}}
        for like in (narrow, {"first": narrow["first"], "second": narrow["first"]}):
            with pytest.raises(StructureMismatchError):
                state.unwrap(like=like, layout=DECODE)

    def test_counters_that_disagree_are_refused(self, linen: Linen) -> None:
        _, cache = linen.decode(linen.fresh(), tokens(0, 5))
        cache = {**cache, "second": {**cache["second"], "cache_index": jnp.array(4, jnp.int32)}}
        with pytest.raises(LengthMismatchError):
            wrap(cache)

    def test_linen_and_nnx_load_each_others_states(self, linen: Linen, module: Nnx) -> None:
        _, cache = linen.decode(linen.fresh(), tokens(0, 5))
        into = wrap(cache).unwrap(like=module.fresh())
        nnx.update(module.model, into)
        assert module.model.second.cache_index is not None
        assert int(module.model.second.cache_index[...]) == 5
        back = wrap(nnx.state(module.model, nnx.Cache)).unwrap(like=linen.fresh())
        assert same([np.asarray(a) for a in jax.tree.leaves(back)], [np.asarray(a) for a in jax.tree.leaves(cache)])


@flax.struct.dataclass
class Struct:
    """A dataclass of Flax, which JAX takes apart."""

    key: Any
    size: int = flax.struct.field(pytree_node=False, default=3)


def nnx_state(a: Any, b: Any) -> Any:
    module = nnx.Dict(a=nnx.Cache(a), b=nnx.Cache(b))
    return nnx.state(module, nnx.Cache)


CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "FrozenDict": lambda a, b: freeze({"a": a, "b": {"c": b}}),
    "struct": lambda a, b: Struct({"a": a, "b": b}),
    "nnx state": nnx_state,
    "variables": lambda a, b: {"cache": {"a": a, "b": nnx.Cache(b)}},
    "nnx module": lambda a, b: nnx.Dict(a=nnx.Cache(a), b=nnx.Cache(b)),
}


class TestContainers:
    @pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
    def test_they_come_back(self, container: Callable[[Any, Any], Any]) -> None:
        value = container(jnp.arange(3.0), jnp.arange(4))
        state = wrap(value)
        assert len(state.leaves) == 2
        for back in (state.unwrap(), state.copy().unwrap()):
            assert type(back) is type(value)
            assert str(jax.tree.structure(back)) == str(jax.tree.structure(value))
            assert same(jax.tree.leaves(back), jax.tree.leaves(value))

    @pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
    def test_what_is_evicted_is_free(self, container: Callable[[Any, Any], Any]) -> None:
        before = live_bytes()
        value = container(jnp.zeros(100), jnp.zeros(50))
        assert live_bytes() - before == 600
        assert on_evict(value) == 600
        assert live_bytes() == before

    def test_a_fresh_variable_holds_the_copy(self) -> None:
        module = nnx.Dict(a=nnx.Cache(jnp.arange(3.0)))
        live = nnx.state(module, nnx.Cache)
        native = wrap(live).copy().unwrap()
        module.a[...] = jnp.zeros(3)
        assert isinstance(native["a"], nnx.Cache)
        assert native["a"][...].tolist() == [0, 1, 2]

    def test_roles_are_inferred_through_containers(self) -> None:
        layout = KVLayout.infer(
            lambda length: freeze({"k": jnp.zeros((1, length, 2)), "cache_index": jnp.zeros((), jnp.int32)})
        )
        value: FrozenDict[str, Any] = FrozenDict({"k": jnp.ones((1, 8, 2)), "cache_index": jnp.array(5)})
        state = wrap(value, layout=layout)
        assert [state.leaves[name].role for name in ("k", "cache_index")] == [TOKENS(1), LENGTH]
        assert state.length == 5


def test_no_metadata_is_needed() -> None:
    check_adapter("flax", "__import__('jax').numpy.ones(2)")
