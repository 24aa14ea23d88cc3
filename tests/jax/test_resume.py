"""The verbs of a JAX loop: what they compile, what they own, what they refuse."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax_subject import live_bytes

from agnostic_cache import KVLayout, PrefixCache, model_fingerprint, wrap
from agnostic_cache.errors import (
    DeletedArrayError,
    InvalidTokensError,
    LayoutUnknownError,
    LengthMismatchError,
    StructureMismatchError,
)
from agnostic_cache_adapters.jax import resume, store

ROWS, LAYERS = 80, 3


def init_kv(rows: int = ROWS) -> list[dict[str, jax.Array]]:
    return [{"key": jnp.zeros((1, rows, 2, 4)), "value": jnp.zeros((1, rows, 2, 4))} for _ in range(LAYERS)]


def computed(tokens: list[int], rows: int = ROWS) -> list[dict[str, jax.Array]]:
    """Buffers whose row i tells the token i; what is behind the prompt is garbage."""
    values = np.full((1, rows, 2, 4), -1, np.float32)
    values[0, : len(tokens)] = np.asarray(tokens, np.float32)[:, None, None]
    return [{"key": jnp.asarray(values + i), "value": jnp.asarray(values - i)} for i in range(LAYERS)]


LAYOUT = KVLayout.infer(init_kv)


def make(**settings: Any) -> PrefixCache:
    return PrefixCache("64MiB", namespace="m", block_size=16, layout=LAYOUT, **settings)


@contextmanager
def compilations() -> Iterator[list[str]]:
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:  # noqa: ARG001
        if "compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_fifty_lengths_compile_nothing() -> None:
    """The last of them fills the buffers, where a write of whole blocks would be shifted."""
    tokens = list(range(ROWS))
    lengths = range(ROWS - 49, ROWS + 1)
    buffers = [init_kv() for _ in range(2 * len(lengths) + 2)]
    states = {length: computed(tokens[:length]) for length in lengths}
    whole, inserted = computed(tokens), make()
    cache = make()
    for length in (40, 50):  # the warm-up
        store(cache, tokens[:length], states[length])
        resume(cache, tokens[:length], buffers.pop())
    with compilations() as events:
        jnp.ones(3)[:2].sum()
        assert events  # the listener hears
        events.clear()
        for length in lengths:
            cache.clear()
            store(cache, [*tokens[: length - 1], 99], states[length])
            inserted.clear()
            inserted.insert(tokens, whole, length=length)
            for held, known in ((cache, length - 1), (inserted, min(length, ROWS - 1))):
                kv, start = resume(held, [*tokens[:length], 199], buffers.pop())
                assert not events
                assert start == known
                rows = np.asarray(kv[2]["key"])[0, :, 0, 0]
                assert rows[:start].tolist() == [token + 2 for token in tokens[:start]]
                assert not rows[start:].any()


def test_buffers_are_used_up_and_the_entry_is_not() -> None:
    cache = make()
    tokens = list(range(40))
    kept = computed(tokens)
    store(cache, tokens, kept)
    jax.tree.map(lambda array: array.delete(), kept)
    for _ in range(3):
        given = init_kv()
        kv, start = resume(cache, tokens, given)
        assert start == 39
        assert all(array.is_deleted() for array in jax.tree.leaves(given))
        donated = clear(kv)
        assert not np.asarray(donated[0]["key"]).any()


@partial(jax.jit, donate_argnums=0)
def clear(kv: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, kv)


def test_what_is_stored_once_is_stored_once_and_freed() -> None:
    cache = make()
    tokens = list(range(40))
    kept = computed(tokens)
    gc.collect()
    before = live_bytes()
    assert store(cache, tokens, kept) == 3
    assert store(cache, tokens, kept) == 0
    assert live_bytes() - before == cache.stats().current_bytes == LAYERS * 2 * 40 * 32
    cache.clear()
    assert live_bytes() == before


def test_length_and_numpy_tokens() -> None:
    cache = make()
    tokens = np.arange(40, dtype=np.int64)
    store(cache, tokens, computed(tokens.tolist()), length=20)
    for asked in (tokens, jnp.asarray(tokens, jnp.int32), tokens.astype(np.uint16), tokens.tolist()):
        _, start = resume(cache, asked, init_kv())
        assert start == 20
        assert type(start) is int


@pytest.mark.parametrize("kind", ["<i8", ">i8", "<u8", ">u8", "<i4", ">u2"])
def test_numpy_tokens_of_any_integer_type(kind: str) -> None:
    cache = make()
    tokens = list(range(40))
    store(cache, tokens, computed(tokens))
    assert resume(cache, np.array(tokens, kind), init_kv())[1] == 39
    assert resume(cache, np.repeat(np.array(tokens, kind), 2)[::2], init_kv())[1] == 39
    assert resume(cache, np.array([], kind), init_kv())[1] == 0
    for bad in (-1, 2**32, 2**40):
        if np.iinfo(kind).min <= bad <= np.iinfo(kind).max:
            with pytest.raises(InvalidTokensError):
                resume(cache, np.array([*tokens, bad], kind), init_kv())
    if kind.endswith("8"):
        assert resume(cache, np.array([*tokens, 2**32 - 1], kind), init_kv())[1] == 40


def test_a_layout_that_nobody_knows_is_asked_for() -> None:
    cache = PrefixCache("1MiB", namespace="m")
    for call in (
        lambda: resume(cache, [1, 2], init_kv()),
        lambda: store(cache, [1, 2], init_kv()),
    ):
        with pytest.raises(LayoutUnknownError):
            call()
    assert cache.stats().entries == 0


def test_what_does_not_fit_is_refused() -> None:
    cache = make()
    tokens = list(range(40))
    with pytest.raises(LengthMismatchError):
        store(cache, tokens, computed(tokens[:20], rows=39))
    with pytest.raises(InvalidTokensError):
        resume(cache, [1.5], init_kv())
    store(cache, tokens, computed(tokens))
    other = [{"key": jnp.zeros((1, ROWS, 2, 5)), "value": jnp.zeros((1, ROWS, 2, 5))} for _ in range(LAYERS)]
    with pytest.raises(StructureMismatchError):
        resume(cache, tokens, other)
    assert not any(array.is_deleted() for array in jax.tree.leaves(other))


def test_a_state_that_was_deleted_is_named_before_buffers_are_given_up() -> None:
    native, buffers = computed(list(range(20)), rows=20), init_kv()
    for state in (wrap(native, layout=LAYOUT).copy(), wrap(native, layout=LAYOUT)):
        state.unwrap(like=init_kv())
        state.leaves["2.value"].array.delete()
        with pytest.raises(DeletedArrayError):
            state.unwrap(like=buffers)
    assert not any(array.is_deleted() for array in jax.tree.leaves(buffers))


def test_a_fingerprint_names_the_weights() -> None:
    def params(value: float = 1.0, dtype: Any = jnp.float32) -> dict[str, Any]:
        return {"a": jnp.full((64, 64), value, dtype), "b": [jnp.arange(5)]}

    name = model_fingerprint(params())
    assert name == model_fingerprint(params())
    others = [
        params(2.0),
        params(dtype=jnp.bfloat16),
        {**params(), "b": [jnp.arange(6)]},
        {"c": params()["a"], "b": params()["b"]},
        {**params(), "a": params()["a"].at[63, 0].set(3.0)},
    ]
    assert len({name, *map(model_fingerprint, others)}) == len(others) + 1
