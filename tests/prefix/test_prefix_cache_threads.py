"""PrefixCache under several threads: no wrong hit, exact accounting, and one computation where that is asked for."""

import functools
import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from toy_model import LAYOUTS, contents, state_of

from agnostic_cache import PrefixCache
from agnostic_cache.blob.pieces import Blob
from agnostic_cache.eviction import PutStatus
from agnostic_cache.storage.memory import MemoryStorage

THREADS = 6


def run(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own; raise the first error."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("kind", ["tokens", "all"])
def test_threads_that_match_insert_and_evict_never_get_a_wrong_state(kind: str) -> None:
    cache = PrefixCache(3000, namespace="toy", block_size=8, layout=LAYOUTS[kind])
    roots = [[100 * i + j for j in range(30)] for i in range(4)]
    hits = [0] * THREADS

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            prompt = chance.choice(roots)[: chance.randrange(1, 31)] + [chance.randrange(3)] * chance.randrange(5)
            with cache.match(prompt) as match:
                length = match.length
                if match:
                    hits[seed] += 1
                    assert contents(match.load(), kind) == contents(state_of(prompt[:length], kind), kind)
            cache.insert(prompt, state_of(prompt, kind, rows=99))
            if chance.random() < 0.02:
                cache.clear()

    run(*(functools.partial(work, seed) for seed in range(THREADS)))
    assert all(hits)
    assert cache.stats().current_bytes <= 3000
    cache.clear()
    assert cache.stats().current_bytes == cache.stats().entries == 0


def test_who_misses_the_same_waits_for_the_first() -> None:
    cache = PrefixCache("1MiB", namespace="toy", block_size=8, layout=LAYOUTS["tokens"])
    prompt = list(range(30))
    computed: list[int] = []
    start = threading.Barrier(THREADS)

    def work() -> None:
        start.wait()
        with cache.match(prompt, single_flight=True) as match:
            if match.length < 29:
                computed.append(match.length)
                cache.insert(prompt, state_of(prompt))

    run(*[work] * THREADS)
    assert computed == [0]


def test_where_the_first_fails_the_next_computes() -> None:
    cache = PrefixCache("1MiB", namespace="toy", block_size=8, layout=LAYOUTS["tokens"])
    prompt = list(range(30))
    attempts: list[int] = []
    lock = threading.Lock()

    def work() -> None:
        with cache.match(prompt, single_flight=True) as match:
            if match.length == 29:
                return
            with lock:
                attempts.append(match.length)
                fails = len(attempts) < 3
            if not fails:
                cache.insert(prompt, state_of(prompt))

    run(*[work] * THREADS)
    assert attempts == [0, 0, 0]


def test_a_claim_that_is_forgotten_does_not_block() -> None:
    cache = PrefixCache("1MiB", namespace="toy", block_size=8, layout=LAYOUTS["tokens"])
    prompt = list(range(30))

    def forget() -> None:
        cache.match(prompt, single_flight=True)
        gc.collect()

    run(forget)
    run(lambda: cache.match(prompt, single_flight=True).close())
    with cache.match(prompt, single_flight=True), cache.match(prompt, single_flight=True):
        pass  # a thread never waits for itself


def test_threads_that_hold_a_claim_each_do_not_wait_for_each_other() -> None:
    cache = PrefixCache("1MiB", namespace="toy", block_size=8, layout=LAYOUTS["tokens"])
    prompts, met = [list(range(30)), list(range(100, 130))], threading.Barrier(2)

    def work(first: list[int], second: list[int]) -> None:
        with cache.match(first, single_flight=True):
            met.wait(30)
            with cache.match(second, single_flight=True) as match:
                assert not match

    run(lambda: work(*prompts), lambda: work(*reversed(prompts)))


def test_a_claim_that_ended_ends_no_other() -> None:
    cache = PrefixCache("1MiB", namespace="toy", block_size=8, layout=LAYOUTS["tokens"])
    prompt = list(range(30))
    first = cache.match(prompt, single_flight=True)
    cache.insert(prompt, state_of(prompt))  # ends the claim
    cache.clear()
    second = cache.match(prompt, single_flight=True)
    first.close()
    waits, looked = threading.Event(), threading.Event()

    def wait() -> None:
        waits.set()
        with cache.match(prompt, single_flight=True) as match:
            looked.set()
            assert match.length == 29

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert waits.wait(30)
    assert not looked.wait(0.3)  # the second claim stands
    cache.insert(prompt, state_of(prompt))
    waiter.join(30)
    assert looked.is_set()
    second.close()


def test_a_claim_that_nobody_refers_to_lets_waiters_go() -> None:
    cache = PrefixCache("1MiB", namespace="toy", block_size=8, layout=LAYOUTS["tokens"])
    prompt, matches = list(range(30)), []
    matches.append(cache.match(prompt, single_flight=True))
    waiter = threading.Thread(target=lambda: cache.match(prompt, single_flight=True).close())
    waiter.start()
    matches.clear()
    waiter.join(30)
    assert not waiter.is_alive()


class Calling:
    """Calls when it is finalised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def __del__(self) -> None:
        self.call()


@pytest.mark.parametrize("held", ["states", "index", "counts"])
def test_a_finaliser_that_comes_in_the_middle_of_a_call_finds_nothing(held: str) -> None:
    cache = PrefixCache("1MiB", namespace="toy", block_size=8, layout=LAYOUTS["tokens"], clock=lambda: 0.0)
    prompt, found = list(range(30)), []
    cache.insert(prompt, state_of(prompt), ttl_seconds=0)  # what has expired is removed by whoever comes by
    cache.insert(prompt, state_of(prompt))
    lock = {"states": cache._blocks.states._lock, "index": cache._blocks._lock, "counts": cache._lock}[held]  # noqa: SLF001
    with lock:
        Calling(lambda: found.append(cache.match(prompt).length))
        Calling(lambda: found.append(cache.warm([prompt])))
    assert all(length in {0, 29, 30} for length in found)
    assert len(found) == 2
    with cache.match(prompt) as match:
        assert match.length == 29


@pytest.mark.parametrize("call", ["match", "insert"])
def test_a_storage_that_is_closed_in_the_middle_of_a_call_is_a_miss(call: str) -> None:
    prompt = list(range(30))
    closing: list[PrefixCache] = []

    class Closing(MemoryStorage):
        def get(self, key: str) -> memoryview | None:
            self.close_cache("match")
            return super().get(key)

        def put(self, key: str, blob: Blob) -> PutStatus:
            self.close_cache("insert")
            return super().put(key, blob)

        def close_cache(self, now: str) -> None:
            if closing and now == call:
                run(closing.pop().close)

    settings: Any = {"namespace": "toy", "block_size": 8, "layout": LAYOUTS["tokens"]}
    cache = PrefixCache("1MiB", storage=Closing("1MiB"), **settings)
    cache.insert(prompt, state_of(prompt))
    cache.remove(prompt)
    closing.append(cache)
    if call == "match":
        assert cache.match(prompt).length == 0
    else:
        other = [7, *prompt]
        assert cache.insert(other, state_of(other)) == 4
        with cache.match(other) as match:
            assert contents(match.load(), "tokens") == contents(state_of(other[:-1]), "tokens")
    assert not closing
