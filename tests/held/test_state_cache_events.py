"""StateCache: what it tells: callbacks, errors, statistics, traces, violations."""

import gc
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from host_memory import Forking, Growing, HostMemory, Waiting, check, fills, found, keys, letter

from agnostic_cache import KVState, StateCache, wrap
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.errors import (
    BorrowViolationError,
)
from agnostic_cache.eviction import PutStatus

LEGAL, ILLEGAL = PutStatus.LEGAL, PutStatus.ILLEGAL


# --- on_evict --------------------------------------------------------------------------------------------------------


def test_on_evict_gets_each_value_that_leaves_once(memory: HostMemory) -> None:
    left: list[str] = []
    cache = memory.cache("abcd", on_evict=lambda state: left.append(letter(state)))
    cache.put("d", memory.state(64, fill=ord("D")))
    assert left == ["d"]
    cache.put("e", memory.state(128, fill=ord("e")), move=True)
    assert left == ["d", "a", "b"]
    cache.pop("c")
    cache.put("no", memory.state(512))
    assert left == ["d", "a", "b"]
    with cache.borrow("D") as missing, cache.borrow("d"), cache.borrow("d"):
        assert missing is None
        cache.remove("d")
        assert left == ["d", "a", "b"]
    assert left == ["d", "a", "b", "D"]
    cache.clear()
    assert left == ["d", "a", "b", "D", "e"]
    check(cache, memory)


def test_on_evict_owns_what_it_gets(memory: HostMemory) -> None:
    kept: list[Any] = []
    cache = StateCache(64, adapter=memory, on_evict=kept.append)
    cache.put("a", memory.state(64, fill=1))
    cache.put("b", wrap(memory.state(64, fill=2), adapter=memory))
    cache.clear()
    assert fills(kept[0]) == [1]
    assert isinstance(kept[1], KVState)
    assert fills(kept[1].unwrap()) == [2]
    check(cache, memory, elsewhere=128)
    kept.clear()
    check(cache, memory)


def test_on_evict_is_the_last_that_holds_its_value(memory: HostMemory) -> None:
    def on_evict(state: dict[str, HostArray]) -> None:
        before = memory.live_bytes()
        state.clear()
        freed.append(before - memory.live_bytes())

    freed: list[int] = []
    cache = memory.cache("a", on_evict=on_evict)
    cache.put("b", memory.state(128), move=True)
    cache.clear()
    assert freed == [64, 128]


def test_on_evict_does_not_get_what_another_entry_holds(memory: HostMemory) -> None:
    def spoil(state: dict[str, HostArray]) -> None:
        for array in state.values():
            array.memory[:] = bytes(64)

    cache = StateCache(1024, adapter=memory, on_evict=spoil)
    shared = memory.array(64, 1)
    cache.put("a", {"x": shared, "y": memory.array(64)}, move=True)
    cache.put("b", {"x": shared}, move=True)
    del shared
    cache.remove("a")
    assert fills(cache.get("b")) == [1]
    check(cache, memory)
    assert cache.current_bytes == 64
    cache.clear()
    check(cache, memory)


def test_on_evict_may_use_the_cache(memory: HostMemory) -> None:
    def on_evict(state: dict[str, HostArray]) -> None:
        seen.append((letter(state), letter(cache.get("d"))))
        cache.remove("c")

    seen: list[tuple[str, str]] = []
    cache = memory.cache("abcd", on_evict=on_evict)
    cache.put("e", memory.state(128))
    assert seen == [("a", "d"), ("c", "d"), ("b", "d")]
    assert keys(cache) == "de"
    check(cache, memory)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["put", "move", "overwrite", "remove", "clear", "return"])
def test_when_on_evict_raises_everything_else_happens(memory: HostMemory, how: str, error: type[BaseException]) -> None:
    def on_evict(state: dict[str, HostArray]) -> None:
        left.append(letter(state))
        if left == ["a"]:
            raise error

    left: list[str] = []
    cache = memory.cache("abcd", on_evict=on_evict)

    def borrow_and_remove() -> None:
        with cache.borrow("a", raw=True):
            cache.remove("a")

    calls: dict[str, Callable[[], object]] = {
        "put": lambda: cache.put("e", memory.state(192, fill=1)),
        "move": lambda: cache.put("e", memory.state(192, fill=1), move=True),
        "overwrite": lambda: cache.put("a", memory.state(256, fill=1)),
        "remove": lambda: cache.remove("a"),
        "clear": cache.clear,
        "return": borrow_and_remove,
    }
    with pytest.raises(error):
        calls[how]()
    left_then, there = {
        "put": ("abc", "de"), "move": ("abc", "de"), "overwrite": ("abcd", "a"), "clear": ("abcd", ""),
    }.get(how, ("a", "bcd"))  # fmt: skip
    assert ("".join(left), keys(cache)) == (left_then, there)
    check(cache, memory)
    assert cache.current_bytes == {"": 0, "a": 256, "de": 256, "bcd": 192}[there]
    cache.clear()
    check(cache, memory)


def test_errors_of_several_callbacks_reach_the_caller_together(memory: HostMemory) -> None:
    errors = {"a": KeyError(), "b": OSError(), "c": KeyError()}

    def on_evict(state: dict[str, HostArray]) -> None:
        raise errors[letter(state)]

    with pytest.raises(ExceptionGroup) as raised:
        memory.cache("abc", on_evict=on_evict).clear()
    assert raised.value.exceptions == tuple(errors.values())


@pytest.mark.parametrize("victims", [1, 2])
def test_an_error_keeps_no_memory_alive(memory: HostMemory, victims: int) -> None:
    """Nor any cycle, which only the garbage collector would find."""

    def on_evict(_: Mapping[str, HostArray]) -> None:
        raise ZeroDivisionError

    cache = memory.cache("ab", on_evict=on_evict)
    gc.disable()
    try:
        with suppress(ZeroDivisionError, ExceptionGroup):
            cache.remove("a") if victims == 1 else cache.clear()
        check(cache, memory)
    finally:
        gc.enable()


def test_an_error_that_is_kept_keeps_no_memory_alive(memory: HostMemory) -> None:
    def on_evict(state: object) -> None:
        del state
        raise ZeroDivisionError

    cache = memory.cache("ab", on_evict=on_evict)
    with pytest.raises(ExceptionGroup) as raised:
        cache.clear()
    check(cache, memory)
    assert raised.value.exceptions[0].__traceback__ is not None


# --- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a", "e"])
def test_an_interrupt_in_the_middle_of_a_copy_leaves_the_count_exact(memory: HostMemory, key: str) -> None:
    cache = memory.cache("abcd")
    memory.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        cache.put(key, memory.state(64))
    memory.fails.__traceback__ = None
    with pytest.raises(KeyboardInterrupt):
        cache.get("b")
    memory.fails = None
    assert keys(cache) == "bcd"
    assert cache.current_bytes == 192
    check(cache, memory)
    assert cache.put("e", memory.state(256)) is LEGAL  # the whole budget is there again
    check(cache, memory)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Let SIGINT interrupt, also where these tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("call", ["put", "overwrite", "get", "pop"])
def test_a_signal_in_the_middle_of_a_copy_leaves_the_count_exact(call: str) -> None:
    memory = Waiting()
    cache = memory.cache("abc", 256)
    if call == "pop":  # which copies what another entry holds too
        shared = memory.array(64, ord("d"))
        cache.put("d", {"0": shared}, move=True)
        cache.put("a", {"0": shared}, move=True)
        del shared
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: cache.put("e", memory.state(128)),
        "overwrite": lambda: cache.put("a", memory.state(64)),
        "get": lambda: cache.get("a"),
        "pop": lambda: cache.pop("d"),
    }
    memory.wait = partial(signal.raise_signal, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        calls[call]()
    memory.wait = None
    gc.collect()
    check(cache, memory)
    assert keys(cache) == {"put": "bc", "overwrite": "bc", "get": "abc", "pop": "abc"}[call]
    assert cache.put("f", memory.state(256)) is LEGAL  # the whole budget is there again
    check(cache, memory)


def test_an_interrupt_and_errors_of_callbacks_come_together(memory: HostMemory) -> None:
    def on_evict(_: object) -> None:
        raise ZeroDivisionError

    cache = memory.cache("abcd", on_evict=on_evict)
    memory.fails = KeyboardInterrupt()
    with pytest.raises(BaseExceptionGroup) as raised:
        cache.put("e", memory.state(64))
    assert [type(error) for error in raised.value.exceptions] == [ZeroDivisionError, KeyboardInterrupt]
    assert (keys(cache), cache.current_bytes) == ("bcd", 192)


# --- what is told ----------------------------------------------------------------------------------------------------


def test_stats_count_what_happened(memory: HostMemory) -> None:
    cache = memory.cache("abcd")
    cache.get("a")
    cache.get("x")
    with cache.borrow("b"), cache.borrow("c", raw=True), cache.borrow("y"):
        assert cache.stats().borrowed_bytes == 128
    cache.put("e", memory.state(128))
    cache.put("e", memory.state(64))
    cache.put("no", memory.state(512))
    cache.remove("e")
    cache.pop("c")
    cache.pop("c")
    stats = cache.stats()
    assert stats == type(stats)(
        entries=1, current_bytes=64, listed_bytes=64, deferred_bytes=0, borrowed_bytes=0, shared_bytes=0,
        hits=4, misses=3, puts=6, refused=1, evictions=2,
    )  # fmt: skip


def test_shared_bytes_of_what_was_evicted_are_the_forks() -> None:
    memory = Forking()
    cache = StateCache(1024, adapter=memory)
    for key in "ab":
        cache.put(key, Growing(memory.array(64)))
    fork, other = cache.get("a"), found(cache.get("b"))
    cache.clear()
    assert (cache.current_bytes, cache.stats().shared_bytes) == (0, 128)
    del fork
    assert cache.stats().shared_bytes == 64
    other.array = None
    assert cache.stats().shared_bytes == 0
    check(cache, memory)


def test_stats_look_at_no_entry_but_those_that_forks_may_keep() -> None:
    class Counting(Forking):
        looks = 0

        def held_elsewhere(self, arrays: list[HostArray]) -> list[HostArray]:
            self.looks += 1
            return super().held_elsewhere(arrays)

    memory = Counting()
    cache = StateCache(4096, adapter=memory)
    for i in range(20):
        cache.put(i, Growing(memory.array(64)))
        cache.put(f"plain {i}", memory.state(64))
    cache.get("plain 0")
    assert (cache.stats().entries, memory.looks) == (40, 0)
    cache.get(3)
    for _ in range(2):  # the second time it is known that there is no fork any more
        cache.stats()
        assert memory.looks == 1


def test_trace_tells_of_puts_evictions_and_releases(memory: HostMemory) -> None:
    def trace(event: str, facts: Mapping[str, object]) -> None:
        events.append((event.removeprefix("state_cache."), facts["key"], facts["nbytes"]))
        assert cache.current_size() < 3  # no lock is held

    events: list[tuple[str, object, object]] = []
    cache = StateCache(192, adapter=memory, trace=trace)
    cache.put("a", memory.state(64))
    cache.put("b", memory.state(128), move=True)
    assert events == [("put", "a", 64), ("put", "b", 128)]
    events.clear()
    cache.put("a", memory.state(128))
    assert events == [("evict", "b", 128), ("release", "a", 64), ("release", "b", 128), ("put", "a", 128)]
    events.clear()
    with cache.borrow("a"):
        cache.remove("a")
        cache.put("no", memory.state(1024))
        assert events == []
    assert events == [("release", "a", 128)]


# --- debug -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_debug_finds_a_borrower_that_wrote(memory: HostMemory, *, raw: bool) -> None:
    cache = memory.cache("ab", debug=True)
    with cache.borrow("a", raw=raw):
        pass
    with pytest.raises(BorrowViolationError), cache.borrow("a", raw=raw) as lent:
        (found(lent).leaves["0"].array if raw else found(lent)["0"]).memory[3] ^= 1
    del lent
    assert keys(cache) == "b"
    check(cache, memory)


def test_debug_drops_the_entry_that_was_written_and_no_other(memory: HostMemory) -> None:
    cache = memory.cache("a", debug=True)
    lease = cache.borrow("a")
    lent = found(lease.__enter__())
    lent["0"].memory[3] ^= 1
    cache.put("a", memory.state(64, fill=ord("A")))
    with pytest.raises(BorrowViolationError):
        lease.__exit__(None, None, None)
    del lent
    assert letter(cache.get("a")) == "A"
    check(cache, memory)
