"""PrefixCache under several threads: no wrong hit, exact accounting, and one computation where that is asked for."""

import functools
import gc
import random
import threading
from collections.abc import Callable

import pytest
from toy_model import LAYOUTS, contents, state_of

from agnostic_cache import PrefixCache

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
