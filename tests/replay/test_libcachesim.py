"""Policies against libCacheSim, the simulator of the authors of S3-FIFO."""

from collections.abc import Callable
from random import Random
from typing import Any

import libcachesim  # pyright: ignore[reportMissingImports]
import pytest

from agnostic_cache.eviction import make_evictor
from agnostic_cache.testing.shelf import Shelf

Accesses = list[tuple[int, int]]


def accesses(seed: int, largest: int) -> Accesses:
    """Return keys with their sizes: a popular few, and many that come once."""
    source = Random(seed)
    sizes = [source.randint(1, largest) for _ in range(5000)]
    keys = [
        min(int(source.paretovariate(0.7)), 400) if source.random() < 0.8 else 500 + step % 4500
        for step in range(20_000)
    ]
    return [(key, sizes[key]) for key in keys]


def ours(policy: str, room: int, trace: Accesses) -> list[bool]:
    shelf, hits = Shelf(make_evictor(policy, room)), []
    for key, nbytes in trace:
        hits.append(shelf.get(key))
        if not hits[-1]:
            shelf.put(key, nbytes, cost=1)
    return hits


def theirs(make: Callable[..., Any], room: int, trace: Accesses) -> list[bool]:
    cache, hits = make(room), []
    for step, (key, nbytes) in enumerate(trace):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time = key, nbytes, step
        hits.append(cache.get(request))
    return hits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("largest", "room"), [(1, 60), (20, 600)])
@pytest.mark.parametrize(("policy", "make"), [("lru", libcachesim.LRU), ("fifo", libcachesim.FIFO)])
def test_hit_for_hit(policy: str, make: Callable[..., Any], largest: int, room: int, seed: int) -> None:
    trace = accesses(seed, largest)
    assert ours(policy, room, trace) == theirs(make, room, trace)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("largest", "room"), [(1, 60), (20, 600)])
@pytest.mark.parametrize(
    ("policy", "make"),
    [("gdsf", libcachesim.GDSF), ("s3fifo", lambda room: libcachesim.S3FIFO(room, ghost_size_ratio=1.0))],
)
def test_hit_ratio(policy: str, make: Callable[..., Any], largest: int, room: int, seed: int) -> None:
    """Theirs break ties in another way, and round; the ratio is the same."""
    trace = accesses(seed, largest)
    found, wanted = ours(policy, room, trace), theirs(make, room, trace)
    assert sum(found) / len(trace) == pytest.approx(sum(wanted) / len(trace), abs=0.005)
    assert sum(one == other for one, other in zip(found, wanted, strict=True)) > 0.98 * len(trace)
