"""StateCache: in threads, in finalisers, in forked processes, and not in copies."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from host_memory import HostMemory, Waiting, check, fills, keys

from agnostic_cache import KVState, StateCache
from agnostic_cache.errors import BorrowedError, CacheCopyError
from agnostic_cache.eviction import PutStatus
from agnostic_cache.process import lock

LEGAL, ILLEGAL = PutStatus.LEGAL, PutStatus.ILLEGAL
HANG_SECONDS = 10  # how long a test waits for a thread that should not be blocked


# --- life of a process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copier", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_cache_is_not_copied(copier: Callable[[object], object]) -> None:
    with pytest.raises(CacheCopyError):
        copier(StateCache(64))


FORK = """
import os, sys, threading, weakref
from agnostic_cache import KVState, StateCache
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.dtypes import Dtype

freed = []
cache = StateCache(1024, on_evict=freed.append)
memory = []
for key in "abc":
    array = HostArray.empty((64,), Dtype.UINT8)
    memory.append(weakref.ref(array.memory.obj))
    cache.put(key, {"x": array}, move=True)
del array
held = threading.Event()
release = threading.Event()
def hold():
    with cache.borrow("c"):
        held.set()
        release.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
lease = cache.borrow("a")
lease.__enter__()
gone = cache.borrow("b")
gone.__enter__()
cache.remove("b")
child = os.fork()
if child == 0:
    ok = (cache.current_size(), cache.current_bytes, cache.stats().borrowed_bytes) == (0, 0, 0)
    ok = ok and cache.get("a") is None and cache.pop("b") is None and not cache.remove("a")
    lease.__exit__(None, None, None)
    gone.__exit__(None, None, None)
    cache.clear()
    ok = ok and all(mapping() is not None for mapping in memory)  # freed by the parent, and by it alone
    ok = ok and cache.put("a", {"x": HostArray.empty((1024,), Dtype.UINT8)}).name == "LEGAL" and not freed
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0, "child"
release.set()
thread.join()
assert (cache.current_size(), cache.current_bytes) == (2, 192) and not freed
gone.__exit__(None, None, None)
lease.__exit__(None, None, None)
assert (cache.current_bytes, len(freed)) == (128, 1)
freed.clear()
assert [mapping() is not None for mapping in memory] == [True, False, True]
"""


def test_a_forked_child_finds_an_empty_cache_and_frees_nothing() -> None:
    # 3.12 warns of any fork with threads around; that is what is tried here.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(9) as pool:
        yield pool
    sys.setswitchinterval(interval)


def work(cache: StateCache, memory: HostMemory, random: Random) -> None:
    """Do everything that can be done to a cache, of which the values are filled with their keys."""

    def read(state: Any) -> None:
        assert state is None or set(fills(state)) == {key}

    for step in range(400):
        key, choice = random.randrange(12), random.randrange(10)
        if choice < 4:
            cache.put(key, memory.state(*[64] * random.randint(1, 3), fill=key), move=choice < 2)
        elif choice < 6:
            with cache.borrow(key, raw=choice == 4) as lent:
                if step % 3 == 0:
                    cache.remove(key)
                read(lent.unwrap() if isinstance(lent, KVState) else lent)
        elif choice == 6:
            read(cache.get(key))
        elif choice == 7:
            with suppress(BorrowedError):
                read(cache.pop(key))
        elif choice == 8:
            cache.pin(key)
            cache.unpin(key)
        elif step % 50:
            cache.remove(key)
        else:
            cache.clear()


@pytest.mark.parametrize("on_evict", [False, True])
def test_threads(memory: HostMemory, pool: ThreadPoolExecutor, *, on_evict: bool) -> None:
    def sample() -> None:
        while not done.is_set():
            assert cache.current_bytes <= limit
            stats = cache.stats()
            assert stats.listed_bytes <= stats.current_bytes <= limit

    left: list[set[int | None]] = []
    limit, done = 1024, threading.Event()
    callback = (lambda state: left.append(set(fills(state)))) if on_evict else None
    cache = StateCache(limit, adapter=memory, on_evict=callback)
    sampler = pool.submit(sample)
    try:
        for worker in [pool.submit(work, cache, memory, Random(n)) for n in range(8)]:
            worker.result()
    finally:
        done.set()
    sampler.result()
    stats = cache.stats()
    assert (stats.deferred_bytes, stats.borrowed_bytes) == (0, 0)
    assert stats.puts > stats.entries
    check(cache, memory)
    cache.clear()
    assert cache.current_bytes == 0
    check(cache, memory)
    assert all(len(values) == 1 for values in left)


def test_statistics_do_not_look_like_a_borrow(memory: HostMemory, pool: ThreadPoolExecutor) -> None:
    def sample() -> None:
        while not done.is_set():
            cache.stats()

    cache = StateCache(64, adapter=memory)
    done = threading.Event()
    samplers = [pool.submit(sample) for _ in range(3)]
    try:
        for i in range(500):
            assert cache.put(i, memory.state(64)) is LEGAL
            if i % 2:
                cache.pop(i)
    finally:
        done.set()
    for sampler in samplers:
        sampler.result()


@pytest.mark.parametrize("where", ["copy in", "copy out", "on_evict"])
def test_no_lock_is_held_during_a_copy_or_a_callback(pool: ThreadPoolExecutor, where: str) -> None:
    def wait(_: object = None) -> None:
        entered.set()
        assert leave.wait(HANG_SECONDS)

    memory = Waiting()
    cache = StateCache(128, adapter=memory, on_evict=wait if where == "on_evict" else None)
    cache.put("a", memory.state(64))
    entered, leave = threading.Event(), threading.Event()
    memory.wait = wait if where != "on_evict" else None
    call: Callable[[], object] = {
        "copy in": lambda: cache.put("b", memory.state(64)),
        "copy out": lambda: cache.get("a"),
        "on_evict": lambda: cache.remove("a"),
    }[where]
    busy = pool.submit(call)
    assert entered.wait(HANG_SECONDS)
    memory.wait = None

    def others() -> None:
        cache.put("c", memory.state(64), move=True)
        cache.get("c")
        with cache.borrow("c"):
            cache.stats()
        cache.pop("c")

    try:
        pool.submit(others).result(HANG_SECONDS)
    finally:
        leave.set()
    busy.result(HANG_SECONDS)
    cache.clear()
    assert cache.current_bytes == 0


def test_what_is_being_freed_is_no_room_yet(memory: HostMemory, pool: ThreadPoolExecutor) -> None:
    def wait(_: object) -> None:
        entered.set()
        assert leave.wait(HANG_SECONDS)

    cache = memory.cache("a", 64, on_evict=wait)
    entered, leave = threading.Event(), threading.Event()
    busy = pool.submit(cache.remove, "a")
    try:
        assert entered.wait(HANG_SECONDS)
        assert cache.put("b", memory.state(64)) is ILLEGAL
    finally:
        leave.set()
    assert busy.result(HANG_SECONDS)
    assert cache.put("b", memory.state(64)) is LEGAL


def test_of_two_that_put_one_key_at_a_time_one_is_kept(pool: ThreadPoolExecutor) -> None:
    def wait() -> None:
        both.wait(HANG_SECONDS)

    def put(number: int) -> PutStatus:
        return cache.put("a", memory.state(64, fill=number))  # gone when it returns: a future keeps arguments longer

    memory = Waiting()
    cache = StateCache(256, adapter=memory)
    both = threading.Barrier(2)
    memory.wait = wait
    for done in [pool.submit(put, number) for number in range(2)]:
        assert done.result(HANG_SECONDS) is LEGAL
    memory.wait = None
    check(cache, memory)
    assert cache.current_bytes == 64


# --- finalisers ------------------------------------------------------------------------------------------------------


def in_time(do: Callable[[], object]) -> None:
    """Run it in a thread of its own, that need not be waited for where it blocks itself."""
    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()


@pytest.mark.parametrize("call", ["borrow", "give back", "borrow_all", "give back all"])
def test_who_is_interrupted_while_another_has_the_lock_leaves_it_free(
    memory: HostMemory, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    cache = memory.cache("ab")
    lease, leases = cache.borrow("a", raw=True), cache.borrow_all(["a"])
    if call == "give back":
        lease.__enter__()
    calls: dict[str, Callable[[], object]] = {
        "borrow": lambda: cache.borrow("b", raw=True).__enter__(),
        "give back": lambda: lease.__exit__(None, None, None),
        "borrow_all": lambda: cache.borrow_all(["b"]),
        "give back all": leases.close,
    }
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with cache._lock:  # noqa: SLF001
            held.set()
            done.wait(HANG_SECONDS)

    def interrupt(_: float) -> None:
        done.set()
        raise KeyboardInterrupt

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    monkeypatch.setattr(lock, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calls[call]()
    holder.join()
    monkeypatch.undo()
    in_time(lambda: cache.put("c", memory.state(64)))
    assert cache.contains("c")


def interrupt(cache: StateCache, finaliser: Callable[[], object]) -> None:
    """Have a finaliser called in the middle of a change, as the garbage collector may."""
    with cache._lock:  # noqa: SLF001
        finaliser()


def test_a_finaliser_may_call_in_the_middle_of_a_call(memory: HostMemory) -> None:
    def finaliser() -> None:
        seen.append((cache.remove("a"), cache.remove("x"), cache.contains("b"), cache.pin("b"), cache.unpin("b")))
        with cache.borrow("b") as lent:
            seen.append((cache.get("b"), lent, cache.pop("b"), cache.put("d", memory.state(64))))
        lease.__exit__(None, None, None)  # of a generator that is closed, say
        seen.append(cache.stats().entries)

    cache = memory.cache("abc")
    lease = cache.borrow("c", raw=True)
    lease.__enter__()
    seen: list[object] = []
    in_time(lambda: interrupt(cache, finaliser))
    assert seen == [(True, False, True, True, True), (None, None, None, ILLEGAL), 3]
    assert keys(cache) == "bc"
    assert cache.stats().borrowed_bytes == 0
    check(cache, memory)


def test_a_finaliser_may_clear_in_the_middle_of_a_call(memory: HostMemory) -> None:
    cache = memory.cache("abc")
    in_time(lambda: interrupt(cache, cache.clear))
    assert cache.current_size() == 0
    check(cache, memory)


def test_the_garbage_collector_may_run_finalisers_anywhere(memory: HostMemory) -> None:
    class Session:
        def __init__(self) -> None:
            self.itself = self

    def work() -> None:
        for i in range(2000):
            cache.put(i, memory.state(64), move=bool(i % 2))
            weakref.finalize(Session(), cache.remove, i).atexit = False
            with cache.borrow(i - 1):
                cache.stats()

    cache = StateCache(64 * 50, adapter=memory)
    thresholds = gc.get_threshold()
    gc.set_threshold(37, 2, 2)
    try:
        in_time(work)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert cache.current_size() == 0
    check(cache, memory)
