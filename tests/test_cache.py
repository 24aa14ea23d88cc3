"""Cache and SimpleLRUCache: mellea's behaviour, errors in callbacks, threads."""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from threading import Barrier, Event, Thread
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnostic_cache.cache import Cache, SimpleLRUCache

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

HANG_SECONDS = 10  # how long a test waits for a thread that should not be blocked


class Value:
    """A state that can be weakly referenced."""


def filled(capacity: int, keys: str, **callbacks: Callable[[Any], object]) -> SimpleLRUCache:
    """Return a cache that holds each of `keys`, with the key in capitals as its value."""
    cache = SimpleLRUCache(capacity, **callbacks)
    for key in keys:
        cache.put(key, key.upper())
    return cache


def test_cache_has_exactly_three_abstract_methods() -> None:
    assert Cache.__abstractmethods__ == {"put", "get", "current_size"}
    assert issubclass(SimpleLRUCache, Cache)
    with pytest.raises(TypeError):
        Cache()  # type: ignore[abstract]


def test_starts_empty_with_its_arguments_as_attributes() -> None:
    cache = SimpleLRUCache(3, print, on_replace=repr)
    assert (cache.capacity, cache.on_evict, cache.on_replace) == (3, print, repr)
    assert cache.cache == OrderedDict()
    assert isinstance(cache.cache, OrderedDict)
    assert cache.current_size() == 0
    bare = SimpleLRUCache(capacity=3)
    assert (bare.on_evict, bare.on_replace) == (None, None)
    assert SimpleLRUCache(capacity=3, on_evict=print).on_evict is print


def test_on_replace_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        SimpleLRUCache(3, print, print)  # type: ignore[call-arg]


def test_get_returns_the_very_object_and_none_for_a_missing_key() -> None:
    cache, value = SimpleLRUCache(2), Value()
    cache.put("a", value)
    assert cache.get("a") is value
    assert cache.get("b") is None
    assert list(cache.cache) == ["a"]


@pytest.mark.parametrize("key", ["a", "", 0, -1, 2**70, b"a", ("a", 1), None], ids=repr)
def test_any_hashable_is_a_key(key: Hashable) -> None:
    cache = SimpleLRUCache(1)
    cache.put(key, "value")
    assert cache.get(key) == "value"


def test_a_key_that_is_not_hashable_changes_nothing() -> None:
    cache = filled(2, "ab")
    with pytest.raises(TypeError):
        cache.put(["c"], "C")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        cache.get(["c"])  # type: ignore[arg-type]
    assert list(cache.cache) == ["a", "b"]


@pytest.mark.parametrize("capacity", [0, -1])
def test_without_capacity_put_does_nothing(capacity: int) -> None:
    calls: list[str] = []
    cache = filled(2, "ab", on_evict=calls.append, on_replace=calls.append)
    cache.capacity = capacity
    cache.put("a", "new")
    cache.put("c", "C")
    assert list(cache.cache.items()) == [("a", "A"), ("b", "B")]
    assert calls == []
    empty = SimpleLRUCache(capacity, calls.append, on_replace=calls.append)
    empty.put("a", "A")
    assert (empty.get("a"), empty.current_size(), calls) == (None, 0, [])


def test_evicts_the_least_recently_used_once_and_oldest_first() -> None:
    evicted: list[str] = []
    cache = filled(2, "ab", on_evict=evicted.append)
    assert cache.get("a") == "A"
    cache.put("c", "C")
    assert evicted == ["B"]
    cache.put("d", "D")
    assert evicted == ["B", "A"]
    assert list(cache.cache.items()) == [("c", "C"), ("d", "D")]
    assert cache.current_size() == 2


def test_evicts_without_a_callback() -> None:
    assert list(filled(2, "abc").cache) == ["b", "c"]


def test_overwriting_keeps_the_count_renews_the_key_and_calls_on_replace_only() -> None:
    evicted: list[str] = []
    replaced: list[str] = []
    cache = filled(2, "ab", on_evict=evicted.append, on_replace=replaced.append)
    cache.put("a", "A2")
    assert list(cache.cache.items()) == [("b", "B"), ("a", "A2")]
    assert (evicted, replaced) == ([], ["A"])
    cache.on_replace = None
    cache.put("b", "B2")
    assert list(cache.cache.items()) == [("a", "A2"), ("b", "B2")]
    assert (evicted, replaced) == ([], ["A"])


def test_putting_the_same_object_again_renews_the_key_and_calls_nothing() -> None:
    calls: list[Value] = []
    cache, value = SimpleLRUCache(2, calls.append, on_replace=calls.append), Value()
    cache.put("a", value)
    cache.put("b", None)
    cache.put("a", value)
    cache.put("b", None)
    assert list(cache.cache) == ["a", "b"]
    assert calls == []


def test_an_equal_object_is_another_object() -> None:
    replaced: list[list[int]] = []
    cache, old = SimpleLRUCache(1, on_replace=replaced.append), [1]
    cache.put("a", old)
    cache.put("a", [1])
    assert [value is old for value in replaced] == [True]


def test_none_is_a_value() -> None:
    calls: list[str | None] = []
    cache = SimpleLRUCache(2, calls.append, on_replace=calls.append)
    cache.put("a", None)
    cache.put("b", "B")
    assert cache.get("a") is None
    assert list(cache.cache) == ["b", "a"]
    cache.put("c", "C")
    cache.put("d", "D")
    cache.put("c", None)
    cache.put("c", "C2")
    assert calls == ["B", None, "C", None]


def test_a_value_under_two_keys_is_evicted_with_each() -> None:
    evicted: list[Value] = []
    cache, value = SimpleLRUCache(2, evicted.append), Value()
    for key in range(4):
        cache.put(key, value)
    assert evicted == [value, value]


def test_the_next_put_evicts_what_a_lowered_capacity_leaves_over() -> None:
    evicted: list[str] = []
    cache = filled(5, "abcde", on_evict=evicted.append)
    cache.capacity = 2
    assert cache.current_size() == 5
    cache.put("f", "F")
    assert evicted == ["A", "B", "C", "D"]
    assert list(cache.cache) == ["e", "f"]


def test_overwriting_under_a_lowered_capacity_evicts_the_others() -> None:
    evicted: list[str] = []
    replaced: list[str] = []
    cache = filled(4, "abcd", on_evict=evicted.append, on_replace=replaced.append)
    cache.capacity = 2
    cache.put("a", "A2")
    assert (evicted, replaced) == (["B", "C"], ["A"])
    assert list(cache.cache.items()) == [("d", "D"), ("a", "A2")]


def test_the_next_put_evicts_what_was_written_to_the_dictionary() -> None:
    evicted: list[str] = []
    cache = SimpleLRUCache(2, evicted.append)
    cache.cache.update(a="A", b="B", c="C")
    cache.put("d", "D")
    assert evicted == ["A", "B"]
    cache.cache = OrderedDict(x="X", y="Y")
    assert cache.get("x") == "X"
    cache.put("z", "Z")
    assert evicted == ["A", "B", "Y"]
    assert list(cache.cache) == ["x", "z"]


def test_an_error_of_on_evict_reaches_the_caller_with_the_new_value_stored() -> None:
    def on_evict(value: str) -> None:
        evicted.append(value)
        if value == failing:
            raise error

    evicted: list[str] = []
    failing, error = "A", RuntimeError("cannot free")
    cache = filled(3, "abc", on_evict=on_evict)
    with pytest.raises(RuntimeError) as raised:
        cache.put("d", "D")
    assert raised.value is error
    assert list(cache.cache) == ["b", "c", "d"]
    cache.capacity, failing = 1, "B"
    with pytest.raises(RuntimeError):
        cache.put("e", "E")
    assert list(cache.cache.items()) == [("e", "E")]
    assert evicted == ["A", "B", "C", "D"]


def test_errors_of_several_callbacks_reach_the_caller_together() -> None:
    def fail(value: str) -> None:
        raise errors[value]

    errors = {"A": KeyError(), "B": ValueError(), "C": OSError()}
    cache = filled(3, "abc", on_evict=fail, on_replace=fail)
    cache.capacity = 1
    with pytest.raises(ExceptionGroup) as raised:
        cache.put("a", "A2")
    assert raised.value.exceptions == (errors["A"], errors["B"], errors["C"])
    assert list(cache.cache.items()) == [("a", "A2")]


def test_an_interrupt_in_a_callback_does_not_spare_the_others() -> None:
    def on_evict(value: str) -> None:
        evicted.append(value)
        if value == "A":
            raise KeyboardInterrupt
        if value == "C":
            raise ValueError

    evicted: list[str] = []
    cache = filled(2, "ab", on_evict=on_evict)
    cache.capacity = 1
    with pytest.raises(KeyboardInterrupt):
        cache.put("c", "C")
    assert evicted == ["A", "B"]
    cache.cache = OrderedDict(a="A", c="C")
    with pytest.raises(BaseExceptionGroup) as raised:
        cache.put("d", "D")
    assert [type(e) for e in raised.value.exceptions] == [KeyboardInterrupt, ValueError]
    assert list(cache.cache) == ["d"]


def test_an_error_of_on_replace_reaches_the_caller_with_the_new_value_stored() -> None:
    def fail(value: str) -> None:
        raise LookupError(value)

    cache = filled(2, "ab", on_replace=fail)
    with pytest.raises(LookupError):
        cache.put("a", "A2")
    assert list(cache.cache.items()) == [("b", "B"), ("a", "A2")]


@pytest.mark.parametrize("errors", [0, 1, 2])
def test_what_has_left_is_freed_at_once(errors: int) -> None:
    def on_evict(_: Value) -> None:
        if next(calls) < errors:
            raise ValueError

    calls = count()
    cache = SimpleLRUCache(2, on_evict)
    cache.put("a", Value())
    cache.put("b", Value())
    alive = [weakref.ref(value) for value in cache.cache.values()]
    cache.capacity = 1
    with suppress(ValueError, ExceptionGroup):
        cache.put("new", None)
    assert next(calls) == 2
    assert [ref() for ref in alive] == [None, None]


def test_a_callback_may_use_the_cache() -> None:
    def on_evict(value: str) -> None:
        evicted.append((value, cache.current_size(), cache.get("c")))
        if value == "A":
            cache.put("again", value)

    evicted: list[tuple[str, int, str | None]] = []
    cache = filled(2, "ab", on_evict=on_evict)
    cache.put("c", "C")
    assert evicted == [("A", 2, "C"), ("B", 2, "C")]
    assert list(cache.cache) == ["again", "c"]


def test_subclasses_may_override_and_call_what_they_extend() -> None:
    class Counting(SimpleLRUCache):
        hits = 0

        def get(self, key: Hashable) -> Any | None:
            value = super().get(key)
            self.hits += value is not None
            return value

    cache = Counting(1)
    cache.put("a", "A")
    assert (cache.get("a"), cache.get("b"), cache.hits) == ("A", None, 1)


@given(
    st.integers(0, 4),
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 5)),
            st.tuples(st.just("get"), st.integers(0, 5)),
            st.tuples(st.just("capacity"), st.integers(-1, 4)),
        )
    ),
)
def test_behaves_as_the_model(capacity: int, steps: list[tuple[str, int]]) -> None:
    model: list[tuple[int, int]] = []  # (key, value), oldest first
    expected: list[tuple[str, int]] = []
    calls: list[tuple[str, int]] = []
    cache = SimpleLRUCache(
        capacity,
        lambda value: calls.append(("evict", value)),
        on_replace=lambda value: calls.append(("replace", value)),
    )
    for value, (step, number) in enumerate(steps):
        old = [entry for entry in model if entry[0] == number]
        rest = [entry for entry in model if entry[0] != number]
        if step == "capacity":
            cache.capacity = number
        elif step == "get":
            assert cache.get(number) == (old[0][1] if old else None)
            model = rest + old
        else:
            cache.put(number, value)
            if cache.capacity > 0:
                surplus = max(0, len(rest) + 1 - cache.capacity)
                expected += [("replace", v) for _, v in old]
                expected += [("evict", v) for _, v in rest[:surplus]]
                model = [*rest[surplus:], (number, value)]
        assert list(cache.cache.items()) == model
        assert cache.current_size() == len(model)
        assert calls == expected


# Threads. A dictionary of the test's own stands for what another thread does in between.


class Meddled(OrderedDict[Any, Any]):
    """Entries that another thread touches in the middle of a call."""

    def __init__(self, *entries: tuple[str, str], **meddle: Callable[[], object]) -> None:
        """Call `read` after an entry is read, `pop` before the oldest is removed."""
        super().__init__(entries)
        self.meddle = meddle

    def __getitem__(self, key: Hashable) -> Any:
        value = super().__getitem__(key)
        self.meddle.get("read", bool)()
        return value

    def popitem(self, last: bool = True) -> tuple[Any, Any]:  # noqa: FBT001, FBT002
        self.meddle.get("pop", bool)()
        return super().popitem(last)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(8) as pool:
        yield pool
    sys.setswitchinterval(interval)


def test_a_hit_that_is_evicted_meanwhile_is_still_a_hit() -> None:
    cache = SimpleLRUCache(2)
    cache.cache = entries = Meddled(("a", "A"))
    entries.meddle["read"] = entries.clear
    assert cache.get("a") == "A"
    assert cache.current_size() == 0


def test_a_new_entry_stays_when_a_hit_promotes_the_others_meanwhile() -> None:
    evicted: list[str] = []
    cache = SimpleLRUCache(1, evicted.append)
    cache.cache = Meddled(("a", "A"), pop=lambda: cache.get("a"))
    cache.put("b", "B")
    assert (cache.get("b"), evicted) == ("B", ["A"])


def test_get_does_not_wait_for_a_put(pool: ThreadPoolExecutor) -> None:
    def wait() -> None:
        entered.set()
        assert leave.wait(HANG_SECONDS)

    entered, leave = Event(), Event()
    cache = SimpleLRUCache(2)
    cache.cache = Meddled(("a", "A"), ("b", "B"), pop=wait)
    put = pool.submit(cache.put, "c", "C")
    assert entered.wait(HANG_SECONDS)
    try:
        assert pool.submit(cache.get, "b").result(HANG_SECONDS) == "B"
    finally:
        leave.set()
    put.result(HANG_SECONDS)
    assert list(cache.cache) == ["b", "c"]


@pytest.mark.parametrize(("callback", "key"), [("on_evict", "b"), ("on_replace", "a")])
def test_a_callback_may_wait_for_the_put_of_another_thread(callback: str, key: str, pool: ThreadPoolExecutor) -> None:
    def wait(value: str) -> None:
        called.append(value)
        if value == "A":
            pool.submit(cache.put, "c", "C").result(HANG_SECONDS)

    called: list[str] = []
    cache = filled(1, "a")
    setattr(cache, callback, wait)
    cache.put(key, "new")
    assert called[0] == "A"
    assert list(cache.cache) == ["c"]


def test_a_finaliser_may_put_in_the_middle_of_put() -> None:
    def finaliser() -> None:
        entries.meddle.clear()
        cache.put("b", "B")

    cache = SimpleLRUCache(1)
    cache.cache = entries = Meddled(("a", "A"), pop=finaliser)
    # A thread of its own, that need not be waited for where it blocks itself.
    put = Thread(target=cache.put, args=("c", "C"), daemon=True)
    put.start()
    put.join(HANG_SECONDS)
    assert not put.is_alive()
    cache.put("d", "D")
    assert list(cache.cache) == ["d"]


@pytest.mark.parametrize("capacity", [1, 16])
@pytest.mark.parametrize("entries", [OrderedDict, Meddled])  # Meddled: more switches
def test_no_value_is_lost_or_handed_over_twice(
    entries: type[OrderedDict[Hashable, Any]], capacity: int, pool: ThreadPoolExecutor
) -> None:
    def work(thread: int) -> None:
        start.wait()
        for i in range(6000):
            key = i * (2 * thread + 1) % 24
            if i % 5 == 0:
                cache.put(key, (thread, i, key))
            else:
                value = cache.get(key)
                assert value is None or value[2] == key
            assert cache.current_size() <= capacity

    left: list[tuple[int, int, int]] = []
    cache = SimpleLRUCache(capacity, left.append, on_replace=left.append)
    cache.cache = entries()
    start = Barrier(8)
    for thread in [pool.submit(work, n) for n in range(8)]:
        thread.result()
    put = {(n, i, i * (2 * n + 1) % 24) for n in range(8) for i in range(0, 6000, 5)}
    found = left + list(cache.cache.values())
    assert len(found) == len(put)
    assert set(found) == put
    assert cache.current_size() == capacity
