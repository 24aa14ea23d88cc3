"""StateCache: a pin is the key's; it holds for what comes under it, for a time or until it is taken back."""

from typing import Any

import pytest
from host_memory import Devices, HostMemory, check, keys

from agnostic_cache import StateCache
from agnostic_cache.errors import AgnosticCacheError, InvalidKeyError, PinLimitError
from agnostic_cache.eviction import PutStatus

LEGAL, ILLEGAL = PutStatus.LEGAL, PutStatus.ILLEGAL


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fill(cache: StateCache, memory: HostMemory) -> None:
    """Put more than fits, so that what may leave does."""
    for i in range(8):
        assert cache.put(i, memory.state(64)) is LEGAL


@pytest.mark.parametrize("move", [False, True])
def test_a_pin_holds_for_the_next_value_of_its_key(memory: HostMemory, *, move: bool) -> None:
    cache = memory.cache("abcd")
    cache.pin("a")
    assert cache.put("a", memory.state(64, fill=1), move=move) is LEGAL
    fill(cache, memory)
    assert keys(cache) == "a"
    cache.remove("a")
    assert cache.put("a", memory.state(64, fill=2), move=move) is LEGAL
    fill(cache, memory)
    assert keys(cache) == "a"
    cache.unpin("a")
    fill(cache, memory)
    assert keys(cache) == ""
    check(cache, memory)


@pytest.mark.parametrize("move", [False, True])
def test_a_pin_may_come_before_the_first_put(memory: HostMemory, *, move: bool) -> None:
    cache = StateCache(256, adapter=memory)
    assert not cache.pin("a")
    assert cache.put("a", memory.state(64), move=move) is LEGAL
    fill(cache, memory)
    assert keys(cache) == "a"
    assert cache.unpin("a")
    fill(cache, memory)
    assert keys(cache) == ""


def test_clear_ends_every_pin(memory: HostMemory) -> None:
    cache = memory.cache("abcd")
    cache.pin("a")
    cache.pin("not here")
    cache.clear()
    for key in ("a", "not here"):
        assert cache.put(key, memory.state(64)) is LEGAL
    fill(cache, memory)
    assert not cache.contains("a")
    assert not cache.contains("not here")


def test_a_pin_ends_when_its_time_is_over(memory: HostMemory) -> None:
    clock = Clock()
    cache = memory.cache("abcd", clock=clock)
    cache.pin("a", ttl_seconds=300)
    cache.pin("b", ttl_seconds=100)
    clock.now = 299.0
    fill(cache, memory)
    assert keys(cache) == "a"
    clock.now = 300.0
    fill(cache, memory)
    assert keys(cache) == ""


def test_unpin_takes_back_the_pin_that_would_hold_longest(memory: HostMemory) -> None:
    clock = Clock()
    cache = memory.cache("abcd", clock=clock)
    cache.pin("a")
    cache.pin("a", ttl_seconds=10)
    cache.unpin("a")
    fill(cache, memory)
    assert keys(cache) == "a"
    clock.now = 10.0
    fill(cache, memory)
    assert keys(cache) == ""


def test_pins_keep_at_most_half_of_the_budget(memory: HostMemory) -> None:
    cache = memory.cache("abcd")
    cache.pin("a")
    cache.pin("b")
    with pytest.raises(PinLimitError) as raised:
        cache.pin("c")
    assert isinstance(raised.value, AgnosticCacheError)
    assert isinstance(raised.value, ValueError)
    assert cache.pin("a")  # again: no byte more
    cache.unpin("b")
    assert cache.pin("c")
    fill(cache, memory)
    assert keys(cache) == "ac"


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("key", ["a", "e"])
def test_a_value_that_pins_cannot_keep_is_an_error_and_nothing_changed(
    memory: HostMemory, key: str, *, move: bool
) -> None:
    cache = memory.cache("abcd")
    cache.pin("a")
    cache.pin("e")
    before, value = cache.stats(), memory.state(192)
    with pytest.raises(PinLimitError):
        cache.put(key, value, move=move)
    assert cache.stats() == before
    assert keys(cache) == "abcd"
    check(cache, memory, elsewhere=192)
    assert cache.put("a", memory.state(128)) is LEGAL  # in place of what is pinned, half of the budget


def test_the_pins_of_a_device_keep_half_of_its_budget() -> None:
    memory = Devices()
    cache = StateCache({"near": 256, "far": 1024}, adapter=memory)
    for key, device, nbytes in (("a", "near", 128), ("b", "near", 64), ("c", "far", 512), ("d", "unlimited", 4096)):
        assert cache.put(key, {"x": memory.on(device, nbytes)}) is LEGAL
    assert cache.pin("a")
    assert cache.pin("c")
    assert cache.pin("d")
    with pytest.raises(PinLimitError):
        cache.pin("b")


def test_memory_that_pinned_entries_share_counts_once(memory: HostMemory) -> None:
    cache, shared = StateCache(256, adapter=memory), memory.array(128)
    for key in "ab":
        cache.put(key, {"x": shared}, move=True)
    del shared
    assert cache.pin_all(["a", "b"]) == 2
    cache.unpin("a")
    cache.put("c", memory.state(64))
    with pytest.raises(PinLimitError):
        cache.pin("c")
    check(cache, memory)


def test_all_keys_are_pinned_or_none(memory: HostMemory) -> None:
    cache = memory.cache("abcd")
    with pytest.raises(PinLimitError):
        cache.pin_all(["a", "x", "b", "c"])
    with pytest.raises(InvalidKeyError):
        not_a_key: Any = None
        cache.pin_all(["a", not_a_key])
    fill(cache, memory)
    assert keys(cache) == ""
    assert cache.pin_all([0, "x"]) == (cache.contains(0) is True)
    assert cache.unpin_all([0, "x"]) == cache.contains(0)


def test_a_finaliser_pins_and_unpins_before_the_next_call(memory: HostMemory) -> None:
    cache = memory.cache("abcd")
    cache.pin("b")
    with cache._lock:  # noqa: SLF001 - in the middle of a change
        assert cache.pin("a")
        assert cache.unpin("b")
    fill(cache, memory)
    assert keys(cache) == "a"
