"""StateCache with real JAX arrays: what is freed is deleted, and nobody who reads finds it deleted."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax_subject import live_bytes
from peak import RESET, peak_bytes
from stress import check, survive

from agnostic_cache import StateCache
from agnostic_cache.errors import BorrowViolationError, DeletedArrayError, UnsupportedArrayError
from agnostic_cache.eviction import PutStatus
from agnostic_cache_adapters.jax import on_evict

SIZE = 2 * 16 * 2 * 8 * 4  # bytes of one state


def kv(value: float = 0.0) -> dict[str, jax.Array]:
    return {"k": jnp.full((1, 16, 2, 8), value), "v": jnp.full((1, 16, 2, 8), value)}


step = jax.jit(lambda kv: jax.tree.map(lambda a: a + 1, kv), donate_argnums=0)


def same(state: Any, value: float) -> bool:
    return all(bool((np.array(array) == value).all()) for array in state.values())


def deleted(*arrays: jax.Array) -> list[bool]:
    return [array.is_deleted() for array in arrays]


@pytest.mark.parametrize("move", [False, True])
def test_eviction_deletes_the_arrays(*, move: bool) -> None:
    before = live_bytes()
    cache = StateCache(2 * SIZE)
    for key in range(5):
        assert cache.put(key, kv(key), move=move) is PutStatus.LEGAL
        gc.collect()
        assert live_bytes() - before == cache.current_bytes == min(key + 1, 2) * SIZE
    cache.clear()
    assert live_bytes() == before


def test_what_is_moved_in_is_deleted_when_it_leaves() -> None:
    cache = StateCache(SIZE)
    state = kv()
    arrays = list(state.values())
    cache.put("a", state, move=True)
    assert deleted(*arrays) == [False, False]
    cache.put("b", kv())
    assert deleted(*arrays) == [True, True]


def test_what_was_put_may_be_donated() -> None:
    cache = StateCache("1MiB")
    state = kv(1.0)
    cache.put("a", state)
    step(state)
    assert same(cache.get("a"), 1.0)


def test_what_get_gives_may_be_donated_and_deleted() -> None:
    cache = StateCache("1MiB")
    cache.put("a", kv(1.0))
    for _ in range(3):
        mine: Any = cache.get("a")
        assert same(mine, 1.0)
        after = step(mine)
        assert deleted(*mine.values()) == [True, True]
        assert same(after, 2.0)
    on_evict(cache.get("a"))
    assert same(cache.pop("a"), 1.0)


def test_nothing_is_deleted_under_a_reader() -> None:
    cache = StateCache(SIZE)
    cache.put("a", kv(3.0))
    with cache.borrow("a") as lent, cache.borrow("a", raw=True) as raw:
        arrays = list(lent.values())  # type: ignore[union-attr]
        assert cache.put("b", kv()) is PutStatus.ILLEGAL
        cache.remove("a")
        assert cache.stats().deferred_bytes == SIZE
        assert same(lent, 3.0)
        assert same(raw.copy().unwrap(), 3.0)  # type: ignore[union-attr]
    assert deleted(*arrays) == [True, True]
    assert cache.current_bytes == 0


def test_an_array_in_two_entries_is_deleted_with_the_last() -> None:
    cache = StateCache("1MiB")
    shared, one, other = (jnp.full(64, value) for value in (1.0, 2.0, 3.0))
    cache.put("a", {"x": shared, "y": one}, move=True)
    cache.put("b", {"x": shared, "y": other}, move=True)
    assert cache.current_bytes == 3 * 256
    cache.remove("a")
    assert deleted(shared, one, other) == [False, True, False]
    assert cache.current_bytes == 2 * 256
    cache.remove("b")
    assert deleted(shared, one, other) == [True] * 3


def test_an_array_of_no_bytes_in_two_entries_is_left_to_the_other() -> None:
    cache = StateCache("1MiB")
    empty = jnp.zeros((0, 8))
    cache.put("a", {"x": empty, "y": jnp.ones(8)}, move=True)
    cache.put("b", {"x": empty, "y": jnp.ones(8)}, move=True)
    cache.remove("a")
    assert deleted(empty) == [False]
    assert cache.get("b") is not None


def test_who_pops_may_donate_what_another_entry_holds_too() -> None:
    cache = StateCache("1MiB")
    shared, one = jnp.full(64, 1.0), jnp.full(64, 2.0)
    cache.put("a", {"x": shared, "y": one}, move=True)
    cache.put("b", {"x": shared}, move=True)
    mine: Any = cache.pop("a")
    step(mine)
    assert same(cache.get("b"), 1.0)
    assert deleted(shared, one) == [False, True]
    assert cache.current_bytes == 256


def test_on_evict_may_delete_what_another_entry_holds_too() -> None:
    cache = StateCache("1MiB", on_evict=on_evict)
    shared = jnp.full(64, 1.0)
    cache.put("a", {"x": shared}, move=True)
    cache.put("b", {"x": shared}, move=True)
    cache.remove("a")
    assert same(cache.get("b"), 1.0)
    cache.remove("b")
    assert deleted(shared) == [True]


@pytest.mark.parametrize("move", [False, True])
def test_an_array_that_cannot_be_kept_changes_nothing(*, move: bool) -> None:
    cache = StateCache(SIZE)
    cache.put("a", kv(1.0))
    before = cache.stats()
    state = kv()
    state["v"].delete()
    with pytest.raises(DeletedArrayError):
        cache.put("a", state, move=move)
    with pytest.raises(UnsupportedArrayError):
        jax.jit(lambda x: cache.put("a", {"x": x}, move=move))(jnp.ones(3))
    assert cache.stats() == before
    assert same(cache.get("a"), 1.0)


@pytest.mark.parametrize("how", ["donate", "delete"])
def test_debug_finds_who_donated_or_deleted(how: str) -> None:
    cache = StateCache("1MiB", debug=True)
    cache.put("a", kv())
    with cache.borrow("a"):
        pass
    lease = cache.borrow("a")
    lent: Any = lease.__enter__()
    if how == "donate":
        step(lent)
    else:
        lent["k"].delete()
    with pytest.raises(BorrowViolationError):
        lease.__exit__(None, None, None)
    assert not cache.contains("a")
    assert cache.current_bytes == 0


@pytest.mark.parametrize("callback", [False, True])
def test_an_entry_that_a_borrower_deleted_does_no_more_harm(*, callback: bool) -> None:
    cache = StateCache(SIZE, on_evict=on_evict if callback else None)
    cache.put("a", kv())
    with cache.borrow("a") as lent:
        lent["k"].delete()  # type: ignore[index]
    with pytest.raises(DeletedArrayError):
        cache.get("a")
    assert cache.put("b", kv(1.0)) is PutStatus.LEGAL
    assert not cache.contains("a")
    assert same(cache.get("b"), 1.0)
    assert cache.current_bytes == SIZE


def test_each_device_counts_its_shards() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.device_put(jnp.zeros((2, 128)), NamedSharding(mesh, PartitionSpec("x")))
    replicated = jax.device_put(jnp.zeros(128), NamedSharding(mesh, PartitionSpec()))
    cache = StateCache({"cpu:0": 2048, "cpu:1": 1024})
    assert cache.put("a", {"x": sharded, "y": replicated}) is PutStatus.LEGAL
    assert cache.current_bytes == 4 * 512
    assert cache.put("near", {"x": jnp.zeros(256)}) is PutStatus.LEGAL
    assert cache.contains("a")
    assert cache.put("b", {"x": sharded}) is PutStatus.LEGAL
    assert [cache.contains(key) for key in ("a", "near", "b")] == [False, True, True]
    mine: Any = cache.get("b")
    assert mine["x"].sharding == sharded.sharding


@pytest.mark.skipif(not RESET.exists(), reason="the kernel does not tell")
def test_a_put_takes_one_copy_and_no_more() -> None:
    state = [jnp.ones(1 << 20) for _ in range(16)]
    nbytes = 16 << 22
    cache = StateCache(2 * nbytes)

    def put() -> None:
        cache.put("a", state)
        with cache.borrow("a") as lent:
            jax.block_until_ready(lent)

    jax.block_until_ready(state)
    assert peak_bytes(put) < 1.1 * nbytes
    assert peak_bytes(lambda: cache.put("b", state, move=True)) < 0.1 * nbytes


def test_threads_read_what_others_evict() -> None:
    check(survive("stress_jax"))
