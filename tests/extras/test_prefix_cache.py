"""A loop over a PrefixCache on a Redis that stops, stalls and comes back empty: never a wrong state."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_server import Cluster, Server, until
from toy_model import LAYOUTS, contents, state_of

from agnostic_cache import PrefixCache, open_storage
from agnostic_cache.storage.memory import MemoryStorage
from agnostic_cache.storage.tiered import TieredStorage

BLOCK, ROWS = 8, 20
PROMPTS = [[tenant, *range(100, 100 + BLOCK * ROWS), 7] for tenant in range(4)]
PATIENCE = 5.0  # for a whole prompt: a time-out or two of 250 ms, on a busy machine


def over(url: str) -> PrefixCache:
    """A cache that keeps two blocks above the storage that a URL names."""
    storage = TieredStorage([MemoryStorage(2 * 4096), open_storage(url)])
    return PrefixCache(
        200,
        namespace="toy",
        block_size=BLOCK,
        layout=LAYOUTS["tokens"],
        storage=storage,
        clock=lambda: time.monotonic() * 1e6,  # as if to compute took long: else nothing would be loaded
    )


def turn(cache: PrefixCache) -> tuple[int, float]:
    """Answer each prompt; return the tokens that need not be computed, and the longest time that one took."""
    found, longest = 0, 0.0
    for prompt in PROMPTS:
        begin = time.monotonic()
        with cache.match(prompt) as match:
            length = match.length
            if match:
                assert contents(match.load(), "tokens") == contents(state_of(prompt[:length]), "tokens")
        cache.insert(prompt, state_of(prompt))
        longest = max(longest, time.monotonic() - begin)
        found += length
    cache.flush()
    return found, longest


WHOLE = len(PROMPTS) * BLOCK * ROWS


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis") as server:
        yield server


@pytest.mark.parametrize("fault", ["stopped", "stalled", "emptied"])
def test_a_loop_goes_on_while_its_redis_does_not(fault: str, redis: Server) -> None:
    cache = over(redis.url)
    assert turn(cache)[0] == 0
    assert turn(cache)[0] == WHOLE
    if fault == "stopped":
        redis.stop()
    elif fault == "stalled":
        redis.send(signal.SIGSTOP)
    else:
        with redis.client() as client:
            client.flushall()
    found, longest = turn(cache)
    assert found < WHOLE
    assert longest < PATIENCE
    if fault == "stopped":
        redis.start()  # empty
    elif fault == "stalled":
        redis.send(signal.SIGCONT)
    until(lambda: turn(cache)[0] == WHOLE)  # by itself
    cache.close()


def test_a_loop_goes_on_without_a_master_of_its_cluster(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cache = over(cluster.url)
        turn(cache)
        assert turn(cache)[0] == WHOLE
        cluster.servers[1].stop()
        for _ in range(5):
            found, longest = turn(cache)
            assert found < WHOLE
            assert longest < PATIENCE
        cache.close()
