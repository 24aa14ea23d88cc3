"""What policies cost per access, how long a replay takes, and what it finds.

The whole conversation trace is taken by path, from AGNOSTIC_CACHE_TRACE; without it, the sample of the tests is.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest

from agnostic_cache.eviction import make_evictor
from agnostic_cache.replay import ceiling, read_trace, replay, replay_belady
from agnostic_cache.testing.shelf import Item

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.conftest import Race, Report

TESTS = Path(__file__).parents[1]
BESIDE = TESTS.parents[1] / "shared" / "traces" / "mooncake_conversation.jsonl"
FOUND = os.environ.get("AGNOSTIC_CACHE_TRACE") or (BESIDE if BESIDE.exists() else None)
TRACE = read_trace([FOUND or TESTS / "traces" / "mooncake_sample.jsonl"])
CONVERSATION = TRACE.blocks == 288_500
BLOCK_BYTES = 10 * 1024**2
CAPACITIES = [913, 1827, 9139, 18279, 36558]
TABLE = {
    "fifo": [0.0430, 0.0506, 0.1746, 0.2478, 0.3131],
    "lru": [0.0440, 0.0525, 0.1958, 0.2789, 0.3453],
    "belady": [0.1829, 0.2464, 0.3664, 0.3664, 0.3664],
}
COST = {
    "lru": 1e-6,
    "fifo": 1e-6,
    "s3fifo": 1e-6,
    "adaptive": 4e-6,
    "lfu": 4e-6,
    "gdsf": 4e-6,
    "ttl": 4e-6,
    "quota": 4e-6,
}


def block_hit_ratio(policy: str, capacity: int) -> float:
    if policy == "belady":
        return replay_belady(TRACE, capacity=capacity).block_hit_ratio
    evictor = make_evictor(policy, capacity * BLOCK_BYTES)
    return replay(TRACE, policy, evictor, capacity=capacity, block_bytes=BLOCK_BYTES).block_hit_ratio


@pytest.mark.parametrize("policy", COST)
def test_cost_per_access(policy: str, race: Race, report: Report) -> None:
    """Accesses of which some half hit: the policy over a dict that nobody is told of."""
    source, room = Random(1), 1000
    keys = [min(int(source.paretovariate(0.15)), 10**6) for _ in range(20_000)]
    item, nbytes = Item(1), 1
    evictor = make_evictor(policy, 2 * room if policy == "quota" else room)
    entries: OrderedDict[int, Item] = OrderedDict()
    known: dict[int, Item] = {}

    def with_policy() -> int:
        hits, get, put = 0, evictor.update_on_get, evictor.update_on_put
        for key in keys:
            if key in entries:
                get(key, entries)
                hits += 1
            else:
                for victim in put(entries, nbytes, key=key)[0]:
                    del entries[victim]
                entries[key] = item
        return hits

    def look_up() -> int:
        hits = 0
        for key in keys:
            if key in known:
                hits += 1
            else:
                known[key] = item
        return hits

    contenders: dict[str, Callable[[], object]] = {"policy": with_policy, "dict": look_up}
    seconds = race(contenders, rounds=15, of=min)
    report(
        f"{policy}, per access on top of a dict", (seconds["policy"] - seconds["dict"]) / len(keys), None, COST[policy]
    )
    assert len(entries) == room
    assert 0.3 < with_policy() / len(keys) < 0.8


@pytest.mark.parametrize("policy", ["lru", "fifo", "s3fifo", "adaptive", "lfu", "gdsf", "ttl", "quota", "belady"])
def test_replay(policy: str, race: Race, report: Report) -> None:
    """Seconds at 9,139 blocks; the hit ratio at each capacity."""
    capacity = CAPACITIES[2]
    seconds = race({policy: lambda: block_hit_ratio(policy, capacity)}, rounds=3, of=min)
    goal = 1.0 if policy == "lru" else 4.0
    report(f"replay of {TRACE.blocks:,} blocks, {policy}", seconds[policy], None, goal if CONVERSATION else None)
    if not CONVERSATION:
        assert block_hit_ratio(policy, 913) <= ceiling(TRACE).block_hit_ratio
        return
    found = {blocks: round(block_hit_ratio(policy, blocks), 4) for blocks in CAPACITIES}
    for blocks, ratio in found.items():
        report(f"block hit ratio at {blocks:,} blocks, {policy}", ratio, None, None, unit="")
    assert list(found.values()) == TABLE.get(policy, list(found.values()))
    if policy == "adaptive":  # at least as good as the better of lru and s3fifo
        best = [max(pair) for pair in zip(TABLE["lru"], [0.0551, 0.0767, 0.1908, 0.2447, 0.3279], strict=True)]
        assert all(ratio >= other for ratio, other in zip(found.values(), best, strict=True))
    if policy == "s3fifo":
        assert found[913] >= 0.0549
