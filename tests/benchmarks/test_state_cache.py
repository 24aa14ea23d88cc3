"""What StateCache costs: one copy where it copies, next to nothing where it does not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peak import RESET, peak_bytes
from transformers import DynamicCache

from agnostic_cache import StateCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.conftest import Race, Report

NBYTES = 256 * 1024 * 1024
LAYERS = 30  # of the demo model
THREADS, READS, ENTRIES = 8, 16_000, 16


def tensors(leaves: int) -> dict[str, torch.Tensor]:
    """A state of 256 MB."""
    return {f"leaf {i}": torch.ones(NBYTES // 4 // leaves) for i in range(leaves)}


def arrays(leaves: int) -> dict[str, jax.Array]:
    """A state of 256 MB."""
    state: dict[str, jax.Array] = jax.block_until_ready(
        {f"leaf {i}": jnp.ones(NBYTES // 4 // leaves) for i in range(leaves)}
    )
    return state


def dynamic(leaves: int) -> DynamicCache:
    """A state of 256 MB."""
    cache = DynamicCache()
    for layer in range(leaves // 2):
        keys, values = torch.ones(2, 1, 4, NBYTES // 4 // 4 // 64 // leaves, 64)
        cache.update(keys, values, layer)
    return cache


MAKERS: dict[str, Callable[[int], Any]] = {"torch": tensors, "JAX": arrays, "DynamicCache": dynamic}


def wait(cache: StateCache) -> None:
    """Wait for the copies of JAX, which are made in the background."""
    with cache.borrow("a") as lent:
        jax.block_until_ready(lent)


@pytest.mark.parametrize("framework", ["torch", "JAX"])
def test_put(framework: str, race: Race, report: Report) -> None:
    def put() -> None:
        cache.put("a", state)
        wait(cache)

    def free() -> None:  # untimed: each contender finds memory as it does in a process that goes on
        cache.clear()
        copies.clear()

    state, plain = MAKERS[framework](32), np.ones(NBYTES // 4, np.float32)
    cache = StateCache(NBYTES)
    copies: list[Any] = []
    contenders: dict[str, Callable[[], object]] = {"put": put, "np.copy": lambda: copies.append(np.copy(plain))}
    seconds = race(contenders, rounds=16, before=free)
    report(f"put, 256 MB of {framework} / np.copy", seconds["put"], seconds["np.copy"], 1.1)

    put()
    assert cache.current_bytes == NBYTES
    with cache.borrow("a") as lent:
        assert lent is not None
        assert all(bool((array == 1).all()) for array in lent.values())


@pytest.mark.skipif(not RESET.exists(), reason="the kernel does not tell")
@pytest.mark.parametrize("framework", ["torch", "JAX"])
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # it is a size that is measured
def test_peak_memory_of_a_put(framework: str, report: Report) -> None:
    def put() -> None:
        cache.put("a", state)
        wait(cache)

    state, cache = MAKERS[framework](32), StateCache(NBYTES)
    took = peak_bytes(put)
    report(f"memory taken by put, 256 MB of {framework} / the state", took, NBYTES, 1.05, unit="B")
    assert cache.current_bytes == NBYTES
    assert took < 2 * NBYTES


@pytest.mark.parametrize("leaves", [2, 32])
@pytest.mark.parametrize("kind", MAKERS)
def test_no_copy(kind: str, leaves: int, race: Race, report: Report) -> None:
    def ready() -> None:
        """One cache is empty, its state in hand; the other holds its state."""
        if not hand:
            hand.append(empty.pop("a"))
        if taken:
            full.put("a", taken.pop(), move=True)

    def borrow() -> None:
        with full.borrow("a", raw=True):
            pass

    empty, full = StateCache(NBYTES), StateCache(NBYTES)
    hand: list[Any] = [MAKERS[kind](leaves)]
    taken: list[Any] = [MAKERS[kind](leaves)]
    contenders: dict[str, Callable[[], object]] = {
        "put(move=True)": lambda: empty.put("a", hand.pop(), move=True),
        "pop": lambda: taken.append(full.pop("a")),
        "borrow(raw=True)": borrow,
    }
    seconds = race(contenders, rounds=300, before=ready)
    for name, took in seconds.items():
        report(f"{name}, 256 MB in {leaves} leaves of {kind}", took, None, 50e-6)

    ready()
    assert (empty.current_bytes, full.current_bytes) == (0, NBYTES)
    assert type(hand[0]) is type(full.pop("a")) is type(MAKERS[kind](leaves))


def test_borrow(race: Race, report: Report) -> None:
    def raw() -> None:
        with cache.borrow("a", raw=True):
            pass

    def native() -> None:
        with cache.borrow("a"):
            pass

    cache, state = StateCache("1GiB"), DynamicCache()
    for layer in range(LAYERS):
        keys, values = torch.ones(2, 1, 3, 8, 64)
        state.update(keys, values, layer)
    cache.put("a", state)
    seconds = race({"raw": raw, "native": native}, rounds=100, inner=20)
    report("borrow(raw=True)", seconds["raw"], None, 3e-6)
    report("borrow, per container of a DynamicCache", seconds["native"] / (LAYERS + 2), None, 3e-6)
    assert cache.stats().borrowed_bytes == 0


def test_readers(race: Race, report: Report) -> None:
    """Eight threads that read entries in use against one thread that reads as often; and the same of a dict."""

    def borrow(key: int) -> None:
        with cache.borrow(key, raw=True):
            pass

    def read(key: int) -> None:
        if key in states:
            states[key]

    def spread(one: Callable[[int], None], threads: int) -> Callable[[], object]:
        def reader(_: int) -> None:
            for i in range(READS // threads):
                one(i % ENTRIES)

        return lambda: list(pool.map(reader, range(threads)))

    cache = StateCache("1GiB")
    states = {key: {"x": jnp.zeros(16)} for key in range(ENTRIES)}
    for key, state in states.items():
        cache.put(key, state)
    kinds: dict[str, Callable[[int], None]] = {"borrow": borrow, "dict": read}
    with ThreadPoolExecutor(THREADS) as pool:
        contenders = {f"{name} {n}": spread(one, n) for name, one in kinds.items() for n in (1, THREADS)}
        seconds = race(contenders, rounds=30)
    ours, peer = (seconds[f"{name} {THREADS}"] / seconds[f"{name} 1"] for name in kinds)
    report(f"slowdown of {THREADS} threads that borrow / of {THREADS} that read a dict", ours, peer, 3.0, unit="x")
    assert cache.stats().borrowed_bytes == 0


def test_eviction(race: Race, report: Report) -> None:
    """Of JAX arrays, over deleting them."""

    def ready() -> None:
        plain[:] = [jnp.zeros(16) for _ in range(count)]
        cache.put("a", [jnp.zeros(16) for _ in range(count)], move=True)

    def delete() -> None:
        for array in plain:
            array.delete()

    count, cache = 32, StateCache("1MiB")
    plain: list[jax.Array] = []
    seconds = race({"remove": lambda: cache.remove("a"), "delete": delete}, rounds=100, before=ready)
    over = (seconds["remove"] - seconds["delete"]) / count
    report("eviction per JAX array, over delete()", over, None, 5e-6)
    assert cache.current_size() <= 1
