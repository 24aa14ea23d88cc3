"""StateCache: who leaves, and when what left is free."""

import gc
from contextlib import ExitStack
from typing import Any

import pytest
from host_memory import Devices, Forking, Growing, HostMemory, check, fills, found, keys, letter

from agnostic_cache import StateCache, wrap
from agnostic_cache.eviction import PutStatus

LEGAL, ILLEGAL = PutStatus.LEGAL, PutStatus.ILLEGAL


# --- who leaves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["get", "borrow", "overwrite", "contains", "pin and unpin"])
def test_the_least_recently_used_leaves_first(memory: HostMemory, use: str) -> None:
    cache = memory.cache("abcd")
    if use == "get":
        cache.get("a")
    elif use == "borrow":
        with cache.borrow("a"):
            pass
    elif use == "overwrite":
        cache.put("a", memory.state(64))
    elif use == "contains":
        cache.contains("a")
    else:
        cache.pin("a")
        cache.unpin("a")
    cache.put("e", memory.state(64))
    assert keys(cache) == ("bcde" if use in {"contains", "pin and unpin"} else "acde")
    cache.put("f", memory.state(128))
    assert keys(cache) == ("def" if use in {"contains", "pin and unpin"} else "aef")
    assert cache.stats().evictions == 3
    check(cache, memory)


def test_no_more_leaves_than_must(memory: HostMemory) -> None:
    cache = memory.cache("abcd", 256 + 63)
    cache.put("e", memory.state(64))
    assert keys(cache) == "bcde"
    cache.put("f", memory.state(64, 64))
    assert keys(cache) == "def"
    assert cache.current_bytes == 256


@pytest.mark.parametrize("move", [False, True])
def test_the_memory_of_what_leaves_is_free_when_put_returns(memory: HostMemory, *, move: bool) -> None:
    cache = memory.cache("abcd")
    cache.put("e", memory.state(256), move=move)
    assert keys(cache) == "e"
    check(cache, memory)


def test_what_leaves_is_released_by_its_adapter(memory: HostMemory) -> None:
    cache = memory.cache("ab", 384)
    cache.put("c", memory.state(128, 128), move=True)
    cache.put("a", memory.state(64))
    assert memory.released == [64]
    cache.put("no", memory.state(1024))
    cache.get("c")
    cache.pop("a")
    assert memory.released == [64]
    cache.put("e", memory.state(128))
    assert memory.released == [64, 64]
    with cache.borrow("c", raw=True):
        cache.remove("c")
        assert memory.released == [64, 64]
    assert memory.released == [64, 64, 128, 128]
    cache.clear()
    assert memory.released == [64, 64, 128, 128, 128]


def test_borrowed_and_pinned_entries_are_passed_over(memory: HostMemory) -> None:
    cache = memory.cache("abcd")
    assert cache.pin("b")
    with cache.borrow("a", raw=True):
        assert cache.put("e", memory.state(128)) is LEGAL
        assert keys(cache) == "abe"
        assert cache.put("f", memory.state(192)) is ILLEGAL
    assert cache.put("f", memory.state(192)) is LEGAL
    assert keys(cache) == "bf"
    assert cache.put("g", memory.state(256)) is ILLEGAL
    assert cache.unpin("b")
    assert cache.put("g", memory.state(256)) is LEGAL
    assert keys(cache) == "g"
    check(cache, memory)


def test_pins_are_counted(memory: HostMemory) -> None:
    cache = memory.cache("a", 128)
    cache.unpin("a")  # of nothing: no debt
    cache.pin("a")
    cache.pin("a")
    cache.unpin("a")
    assert cache.put("b", memory.state(128)) is ILLEGAL
    cache.unpin("a")
    assert cache.put("b", memory.state(128)) is LEGAL


@pytest.mark.parametrize("why", ["larger than the budget", "borrowed", "pinned"])
@pytest.mark.parametrize("key", ["a", "e"])
@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_a_refused_put_changes_nothing(memory: HostMemory, why: str, key: str, *, move: bool, raw: bool) -> None:
    cache = memory.cache("abcd", on_evict=pytest.fail)
    with ExitStack() as leases:
        if why == "borrowed":
            leases.enter_context(cache.borrow("b"))
        elif why == "pinned":
            cache.pin("b")
        nbytes = 320 if why == "larger than the budget" else 256
        native = memory.state(nbytes, fill=1)
        value: Any = wrap(native, adapter=memory) if raw else native
        before, copies = cache.stats(), memory.copies
        assert cache.put(key, value, move=move) is ILLEGAL
        assert memory.copies == copies
        assert cache.stats() == before._replace(refused=1)
        assert keys(cache) == "abcd"
        assert letter(cache.get("a")) == "a"
        check(cache, memory, elsewhere=nbytes)
        assert fills(value.unwrap() if raw else value) == [1]  # still the caller's


def test_an_entry_to_be_overwritten_makes_room_first(memory: HostMemory) -> None:
    cache = memory.cache("abcd")
    assert cache.put("d", memory.state(64, fill=1)) is LEGAL
    assert (keys(cache), cache.stats().evictions) == ("abcd", 0)
    assert cache.put("d", memory.state(128, fill=2)) is LEGAL
    assert (keys(cache), cache.stats().evictions) == ("bcd", 1)
    assert fills(cache.get("d")) == [2]
    check(cache, memory)


def test_a_budget_per_device() -> None:
    memory = Devices()
    cache = StateCache({"near": 128, "far": "1KiB"}, adapter=memory)
    for i in range(4):
        assert cache.put(i, {"x": memory.on("near", 64)}) is LEGAL
        assert cache.put(f"far {i}", {"x": memory.on("far", 64)}) is LEGAL
        assert cache.put(f"free {i}", {"x": memory.on("unlimited", 640)}) is LEGAL
    assert [cache.contains(i) for i in range(4)] == [False, False, True, True]
    assert all(cache.contains(f"{where} {i}") for where in ("far", "free") for i in range(4))
    assert cache.put("both", {"x": memory.on("near", 64), "y": memory.on("far", 640)}) is LEGAL
    assert [cache.contains(i) for i in range(4)] == [False, False, False, True]
    assert cache.put("much", {"x": memory.on("near", 192)}) is ILLEGAL
    assert cache.put("much", {"x": memory.on("far", 1024)}) is LEGAL
    assert not cache.contains("both")
    assert [cache.contains(f"far {i}") for i in range(4)] == [False] * 4
    assert cache.contains(3)


# --- leaving while it is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["remove", "clear", "overwrite", "overwrite by move"])
@pytest.mark.parametrize("raw", [False, True])
def test_what_leaves_while_it_is_borrowed_is_freed_by_the_last_return(
    memory: HostMemory, how: str, *, raw: bool
) -> None:
    cache = memory.cache("a")
    first, second = cache.borrow("a", raw=raw), cache.borrow("a", raw=raw)
    lent = first.__enter__(), found(second.__enter__())
    if how == "remove":
        assert cache.remove("a")
        assert not cache.remove("a")
    elif how == "clear":
        cache.clear()
    else:
        cache.put("a", memory.state(128, fill=1), move=how.endswith("move"))
    listed = 128 * how.startswith("overwrite")
    for lease in (first, second):
        stats = cache.stats()
        assert (stats.deferred_bytes, stats.borrowed_bytes, stats.listed_bytes) == (64, 64, listed)
        check(cache, memory)
        assert letter(lent[1].unwrap() if raw else lent[1]) == "a"
        if lease is second:
            del lent
        lease.__exit__(None, None, None)
    assert (cache.stats().deferred_bytes, cache.current_bytes) == (0, listed)
    check(cache, memory)


def test_deferred_bytes_are_part_of_the_budget(memory: HostMemory) -> None:
    cache = memory.cache("abcd")
    with cache.borrow("a"):
        cache.remove("a")
        assert cache.put("e", memory.state(256)) is ILLEGAL
        assert cache.put("e", memory.state(192)) is LEGAL
        assert cache.current_bytes == 256
    assert cache.current_bytes == 192
    check(cache, memory)


def test_overwriting_what_is_borrowed_takes_room_for_both(memory: HostMemory) -> None:
    cache = memory.cache("ab", 128)
    with cache.borrow("a"):
        assert cache.put("a", memory.state(128)) is ILLEGAL
        assert cache.put("a", memory.state(64, fill=ord("A"))) is LEGAL
        assert keys(cache) == "a"
        assert cache.stats().deferred_bytes == 64
        with cache.borrow("a") as new:
            assert letter(new) == "A"
    assert cache.current_bytes == 64
    del new
    check(cache, memory)


def test_an_abandoned_borrow_is_given_back_with_a_warning(memory: HostMemory) -> None:
    cache = memory.cache("abcd")
    lease = cache.borrow("a")
    lease.__enter__()
    cache.remove("a")
    assert cache.stats().deferred_bytes == 64
    with pytest.warns(ResourceWarning):
        del lease
    assert cache.current_bytes == 192
    check(cache, memory)


def test_a_borrow_that_only_the_garbage_collector_finds_is_given_back(memory: HostMemory) -> None:
    cache = memory.cache("a", 64)
    lease: list[Any] = [cache.borrow("a")]
    lease.append(lease)
    lease[0].__enter__()
    del lease
    assert cache.put("b", memory.state(64)) is ILLEGAL
    with pytest.warns(ResourceWarning):
        gc.collect()
    assert cache.stats().borrowed_bytes == 0
    assert cache.put("b", memory.state(64)) is LEGAL
    check(cache, memory)


@pytest.mark.parametrize("call", ["put", "pop", "remove", "clear", "get", "stats"])
def test_an_abandoned_borrow_does_not_hold_up_the_next_call(memory: HostMemory, call: str) -> None:
    cache = memory.cache("a", 64)
    lease = cache.borrow("a", raw=True)
    lease.__enter__()
    with pytest.warns(ResourceWarning):
        del lease
    if call == "put":
        assert cache.put("b", memory.state(64)) is LEGAL
    elif call == "pop":
        assert cache.pop("a") is not None
    elif call == "stats":
        assert cache.stats().borrowed_bytes == 0
    elif call == "clear":
        cache.clear()
        assert cache.current_bytes == 0
    else:
        assert getattr(cache, call)("a")
        assert cache.stats().borrowed_bytes == cache.stats().deferred_bytes == 0
    check(cache, memory)


def test_a_borrow_that_cannot_be_built_leaves_nothing_borrowed() -> None:
    memory = Forking()
    cache = StateCache(1024, adapter=memory)
    cache.put("a", Growing(memory.array(64)))
    memory.closes = False
    with pytest.raises(ZeroDivisionError), cache.borrow("a"):
        pass
    assert cache.stats().borrowed_bytes == 0
    assert cache.remove("a")
    check(cache, memory)


# --- arrays in two entries -------------------------------------------------------------------------------------------


def test_an_array_in_two_entries_counts_once_and_goes_with_the_last(memory: HostMemory) -> None:
    cache = StateCache(1024, adapter=memory)
    shared = memory.array(64, 1)
    cache.put("a", {"x": shared, "y": memory.array(64)}, move=True)
    cache.put("b", {"x": shared, "y": [shared]}, move=True)
    cache.put("c", {"x": shared}, move=True)
    del shared
    assert cache.current_bytes == 128
    with cache.borrow("a", raw=True), cache.borrow("b", raw=True):
        assert cache.stats().borrowed_bytes == 128
    cache.remove("a")
    check(cache, memory)
    assert cache.current_bytes == 64
    assert memory.released == [64]  # not what another entry holds
    with cache.borrow("b") as lent:
        assert found(lent)["x"] is found(lent)["y"][0]
        cache.clear()
        assert (cache.current_bytes, cache.stats().deferred_bytes) == (64, 64)
        del lent
    assert cache.current_bytes == 0
    check(cache, memory)


def test_deferred_bytes_leave_out_what_a_listed_entry_holds_too(memory: HostMemory) -> None:
    cache = StateCache(1024, adapter=memory)
    shared = memory.array(64)
    cache.put("a", {"x": shared, "y": memory.array(64)}, move=True)
    cache.put("b", {"x": shared}, move=True)
    with cache.borrow("a", raw=True):
        cache.remove("a")
        stats = cache.stats()
        assert (stats.listed_bytes, stats.deferred_bytes, stats.borrowed_bytes) == (64, 64, 128)
    assert cache.current_bytes == 64


def test_who_pops_does_not_share_with_another_entry(memory: HostMemory) -> None:
    cache = StateCache(1024, adapter=memory)
    shared = memory.array(64, 1)
    cache.put("a", {"x": shared, "y": memory.array(64)}, move=True)
    cache.put("b", {"x": shared}, move=True)
    del shared
    mine = found(cache.pop("a"))
    assert memory.released == [64]  # the one that it was alone with was copied too
    mine["x"].memory[:] = bytes(64)
    assert fills(cache.get("b")) == [1]
    assert cache.current_bytes == 64
    check(cache, memory, elsewhere=128)
    del mine
    check(cache, memory)


def test_evicting_one_holder_of_a_shared_array_frees_nothing(memory: HostMemory) -> None:
    cache = StateCache(192, adapter=memory)
    shared = memory.array(128)
    cache.put("a", {"x": shared}, move=True)
    cache.put("b", {"x": shared}, move=True)
    del shared
    assert cache.put("c", memory.state(64)) is LEGAL
    assert keys(cache) == "abc"
    assert cache.put("d", memory.state(64)) is LEGAL
    assert keys(cache) == "cd"
    check(cache, memory)


def test_moving_in_what_an_overwritten_entry_holds_keeps_it(memory: HostMemory) -> None:
    cache = StateCache(128, adapter=memory)
    array = memory.array(128, 1)
    cache.put("a", {"x": array}, move=True)
    assert cache.put("a", {"x": array, "y": array}, move=True) is LEGAL
    assert cache.put("b", {"z": array}, move=True) is LEGAL
    del array
    assert keys(cache) == "ab"
    assert cache.current_bytes == 128
    cache.remove("a")
    assert fills(cache.get("b")) == [1]
    check(cache, memory)
