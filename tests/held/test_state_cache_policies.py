"""StateCache under every policy: the right ones leave, and nothing else changes."""

from collections import OrderedDict
from random import Random
from typing import Any

import pytest
from host_memory import Devices, HostMemory, check, fills, keys

from agnostic_cache import StateCache
from agnostic_cache.eviction import (
    POLICIES,
    DummyEvictor,
    LRUEvictor,
    PutStatus,
    QuotaEvictor,
    S3FIFOEvictor,
    TTLEvictor,
    make_evictor,
)
from agnostic_cache.testing.shelf import Shelf

LEGAL, ILLEGAL = PutStatus.LEGAL, PutStatus.ILLEGAL


class Clock:
    """A clock that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Liar(LRUEvictor):
    """Promises room without making any."""

    def update_on_put(self, *arguments: Any, room: Any = None, **more: Any) -> Any:
        del room
        return super().update_on_put(*arguments, room=None, **more)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_the_same_leave_as_from_a_plain_container(memory: HostMemory, policy: str, seed: int, *, move: bool) -> None:
    cache = StateCache(64 * 128, adapter=memory, evictor=policy)
    shelf = Shelf(make_evictor(policy, 64 * 128))
    source = Random(seed)
    for _ in range(1500):
        key, act = min(int(source.paretovariate(0.5)), 400), source.random()
        if act < 0.9:
            with cache.borrow(key, raw=True) as state:
                assert (state is not None) == shelf.get(key)
            if key not in shelf.items:
                nbytes = 64 * (1 + key % 3)
                assert cache.put(key, memory.state(nbytes, fill=key % 256), move=move) is shelf.put(key, nbytes)
        elif key in shelf.items:
            assert cache.remove(key)
            shelf.remove(key)
        assert cache.current_bytes == shelf.nbytes
    assert cache.stats().evictions == len(shelf.left) > 50
    assert {key for key in range(401) if cache.contains(key)} == set(shelf.items)
    for key in shelf.items:
        assert fills(cache.get(key)) == [key % 256]
    cache.clear()
    check(cache, memory)


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_borrowed_and_shared_under_every_policy(memory: HostMemory, policy: str) -> None:
    evictor = QuotaEvictor(LRUEvictor(), quota=1024) if policy == "quota" else policy
    cache = StateCache(512, adapter=memory, evictor=evictor)
    shared = memory.array(64)
    for key in "ab":
        cache.put(key, {"x": shared, "y": memory.array(64)}, move=True)
    del shared
    for key in "cdefg":
        cache.put(key, memory.state(64))
    cache.pin("a")
    with cache.borrow("c", raw=True):
        assert cache.put("h", memory.state(384)) is ILLEGAL
        assert cache.put("h", memory.state(320)) is LEGAL
        assert keys(cache) == "ach"
        assert cache.put("d", memory.state(384)) is ILLEGAL
        check(cache, memory)
    cache.unpin("a")
    assert cache.put("d", memory.state(512)) is LEGAL
    assert keys(cache) == "d"
    check(cache, memory)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "quota"])
def test_a_budget_per_device_under_every_policy(policy: str) -> None:
    memory = Devices()
    cache = StateCache({"near": 128, "far": "1KiB"}, adapter=memory, evictor=policy)
    for i in range(5):
        assert cache.put(i, {"x": memory.on("near", 64)}) is LEGAL
        assert cache.put(f"far {i}", {"x": memory.on("far", 64)}) is LEGAL
    assert sum(cache.contains(i) for i in range(5)) == 2
    assert all(cache.contains(f"far {i}") for i in range(5))
    assert cache.put("both", {"x": memory.on("near", 128), "y": memory.on("far", 1024)}) is LEGAL
    assert cache.current_size() == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_copy_that_fails_leaves_the_policy_as_good_as_new(memory: HostMemory, policy: str) -> None:
    cache = memory.cache("abcd", 512, evictor=policy)
    for key in "ea":
        memory.fails = MemoryError()
        with pytest.raises(MemoryError):
            cache.put(key, memory.state(64))
        memory.fails = None
    assert keys(cache) == "bcd"
    check(cache, memory)
    for i in range(30):
        assert cache.put(i, memory.state(64)) is LEGAL
    assert cache.current_bytes <= 512
    assert cache.stats().evictions >= 25
    check(cache, memory)


def test_an_evictor_that_never_evicts_refuses_what_does_not_fit(memory: HostMemory) -> None:
    for evictor in (DummyEvictor(), Liar()):
        cache = memory.cache("abcd", evictor=evictor)
        cache.pin("a")
        assert cache.put("e", memory.state(192)) is (ILLEGAL if isinstance(evictor, DummyEvictor) else LEGAL)
        assert cache.put("f", memory.state(256)) is ILLEGAL
        cache.clear()
        check(cache, memory)


def test_what_has_expired_is_a_miss_and_is_freed(memory: HostMemory) -> None:
    clock = Clock()
    evictor = TTLEvictor(S3FIFOEvictor(), ttl_seconds=10, clock=clock)
    cache = memory.cache("abcdefg", 512, evictor=evictor)
    clock.now = 10
    cache.put("h", memory.state(64))
    with cache.borrow("h"):
        clock.now = 20
    assert not cache.contains("h")
    assert cache.get("h") is None
    assert (cache.current_bytes, cache.stats().misses) == (0, 1)
    cache.put("a", memory.state(64))
    clock.now = 40
    lease = cache.borrow_all(["a"])
    assert len(lease) == 0
    lease.close()
    assert cache.pop("a") is None
    cache.put("b", memory.state(64))
    assert keys(cache) == "b"
    check(cache, memory)


def test_what_expires_while_it_is_borrowed_is_freed_by_the_last_return(memory: HostMemory) -> None:
    clock = Clock()
    cache = memory.cache("a", 512, evictor=TTLEvictor(LRUEvictor(), ttl_seconds=10, clock=clock))
    with cache.borrow("a", raw=True):
        clock.now = 10
        assert cache.get("a") is None
        assert cache.stats().deferred_bytes == 64
    assert cache.current_bytes == 0
    check(cache, memory)


def test_no_tenant_evicts_everyone_else(memory: HostMemory) -> None:
    cache = StateCache(1024, adapter=memory, evictor=QuotaEvictor(LRUEvictor(), quota=256))
    for i in range(4):
        cache.put(("calm", i), memory.state(64))
    for i in range(50):
        assert cache.put(("greedy", i), memory.state(64)) is LEGAL
    assert all(cache.contains(("calm", i)) for i in range(4))
    assert cache.current_bytes == 512
    assert cache.put(("greedy", "much"), memory.state(320)) is ILLEGAL
    check(cache, memory)


def test_what_is_dear_to_compute_stays(memory: HostMemory) -> None:
    cache = StateCache(256, adapter=memory, evictor="gdsf")
    for key, cost in (("dear", 30.0), ("cheap", 10.0), ("middling", 20.0), ("other", 25.0)):
        cache.put(key, memory.state(64), cost=cost)
    for key in ("new", "newer"):
        cache.put(key, memory.state(64), cost=28.0)
    assert [key for key in ("dear", "cheap", "middling", "other", "new", "newer") if cache.contains(key)] == [
        "dear",
        "other",
        "new",
        "newer",
    ]


def test_one_and_the_same_order_of_uses_as_a_dict(memory: HostMemory) -> None:
    """The default is LRU where few entries fit."""
    cache, plain = StateCache(640, adapter=memory), OrderedDict[int, None]()
    source = Random(3)
    for _ in range(2000):
        key = source.randrange(25)
        if cache.get(key) is None:
            cache.put(key, memory.state(64))
        plain[key] = None
        plain.move_to_end(key)
        while len(plain) > 10:
            plain.popitem(last=False)
        assert all(cache.contains(key) for key in plain)
