"""StateCache with real JAX arrays: what is freed is deleted, and nobody who reads finds it deleted."""

import gc
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
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


def spread(array: jax.Array, *axes: str | None) -> jax.Array:
    """Shard it over four devices, or where no axis is named, replicate it."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    placed: jax.Array = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
    return placed


def test_each_device_counts_its_shards() -> None:
    sharded, replicated = spread(jnp.zeros((4, 64)), "x"), spread(jnp.zeros(64))
    cache = StateCache({"cpu:0": 1024, "cpu:1": 512, "cpu:2": "1KiB"})
    assert cache.put("a", {"x": sharded, "y": replicated}) is PutStatus.LEGAL
    assert cache.current_bytes == 4 * 512
    assert cache.put("near", {"x": jnp.zeros(128)}) is PutStatus.LEGAL
    assert cache.contains("a")
    assert cache.put("too much", {"x": jnp.zeros(129), "y": replicated}) is PutStatus.LEGAL
    assert [cache.contains(key) for key in ("a", "near", "too much")] == [False, False, True]
    assert cache.put("b", {"x": spread(jnp.zeros((4, 32)), "x")}) is PutStatus.LEGAL
    assert cache.contains("too much")
    assert cache.put("c", {"x": spread(jnp.zeros(128))}) is PutStatus.LEGAL
    assert [cache.contains(key) for key in ("too much", "b", "c")] == [False, False, True]
    assert cache.put("refused", {"x": spread(jnp.zeros(129))}) is PutStatus.ILLEGAL
    mine: Any = cache.get("c")
    assert mine["x"].sharding == spread(jnp.zeros(128)).sharding
    far = {"x": jax.device_put(jnp.zeros(1 << 16), jax.devices()[3])}
    assert cache.put("a device without a limit", far) is PutStatus.LEGAL


def test_a_sharded_array_is_deleted_whole_and_never_by_its_shards() -> None:
    before = live_bytes()
    cache = StateCache("1MiB")
    whole, other = spread(jnp.arange(256.0).reshape(4, 64), "x"), spread(jnp.zeros(64))
    shards = [shard.data for shard in whole.addressable_shards]  # which JAX keeps, and which somebody may have
    cache.put("a", {"x": whole}, move=True)
    cache.put("b", {"x": whole, "y": other}, move=True)
    assert cache.current_bytes == live_bytes() - before == 4 * (256 + 256)
    cache.remove("a")
    assert deleted(whole, *shards) == [False] * 5
    assert float(jax.jit(jnp.sum)(whole)) == 255 * 128  # with a shard deleted this would crash
    cache.remove("b")
    assert deleted(whole, other, *shards) == [True] * 6
    assert live_bytes() == before


SPANNING = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from agnostic_cache import StateCache, wrap
from agnostic_cache.errors import UnsupportedArrayError

jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
cache = StateCache(1024)
local = {"x": jax.device_put(np.ones(8, np.float32), jax.local_devices()[0])}
cache.put("local", local)
for spec in (PartitionSpec("x"), PartitionSpec()):
    sharding = NamedSharding(mesh, spec)
    spanning = {"x": jax.make_array_from_callback((4, 8), sharding, lambda index: np.zeros((4, 8), np.float32)[index])}
    assert not spanning["x"].is_fully_addressable
    asks = [
        lambda: wrap(spanning),
        lambda: wrap(local).unwrap(like=spanning),
        lambda: cache.put("local", spanning),
        lambda: cache.put("local", spanning, move=True),
    ]
    for ask in asks:
        try:
            ask()
        except UnsupportedArrayError:
            pass
        else:
            sys.exit("accepted")
    assert cache.current_bytes == 32 and not spanning["x"].is_deleted()
    parts = {"x": [shard.data for shard in spanning["x"].addressable_shards]}
    assert cache.put("part", parts).name == "LEGAL"
    cache.remove("part")
"""


def test_shards_of_other_hosts_are_named() -> None:
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", SPANNING, address]
    hosts = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True) for i in range(2)]
    said = [host.communicate(timeout=120)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said


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
