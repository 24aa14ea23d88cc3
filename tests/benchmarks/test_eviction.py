"""What policies cost per access and per eviction, how long a replay takes, and what it finds.

The whole conversation trace is taken by path, from AGNOSTIC_CACHE_TRACE; without it, the sample of the tests is.
"""

from __future__ import annotations

import os
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from agnostic_cache.eviction import choose, make_evictor, make_policy
from agnostic_cache.eviction.choose import CountingRoom
from agnostic_cache.replay import ceiling, read_trace, replay, replay_belady
from agnostic_cache.testing.shelf import Item

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agnostic_cache.eviction import Policy
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
COST = {"lru": 0.6e-6, "fifo": 0.6e-6} | dict.fromkeys(["s3fifo", "adaptive", "lfu", "gdsf", "ttl", "quota"], 2e-6)


def block_hit_ratio(policy: str, capacity: int) -> float:
    if policy == "belady":
        return replay_belady(TRACE, capacity=capacity).block_hit_ratio
    evictor = make_evictor(policy, capacity * BLOCK_BYTES)
    return replay(TRACE, policy, evictor, capacity=capacity, block_bytes=BLOCK_BYTES).block_hit_ratio


class Container:
    """Entries of one byte, in the order of a policy."""

    def __init__(self, name: str, capacity: int) -> None:
        self.policy: Policy = make_policy(name, 2 * capacity if name == "quota" else capacity)
        self.capacity = capacity
        self.entries: dict[int, Item] = {}
        self.item = Item(1)

    def access(self, keys: Iterable[int]) -> int:
        """Use what is there, take in what is not, and return how many were."""
        hits, entries, policy = 0, self.entries, self.policy
        for key in keys:
            if key in entries:
                policy.used(key)
                hits += 1
                continue
            room = CountingRoom(len(entries) + 1 - self.capacity, self.nbytes)
            for victim in choose(policy, entries, room, newcomer=key, nbytes=1, expired=policy.expired()) or ():
                del entries[victim]
                policy.gone(victim, evicted=True)
            entries[key] = self.item
            policy.added(key, 1)
        return hits

    def nbytes(self, key: int) -> int:
        return self.entries[key].nbytes


@pytest.mark.parametrize("policy", COST)
def test_cost_per_access(policy: str, race: Race, report: Report) -> None:
    """Accesses of which some half hit: the policy and its victims, over a dict that nobody is told of."""
    source, container = Random(1), Container(policy, 1000)
    keys = [min(int(source.paretovariate(0.15)), 10**6) for _ in range(20_000)]
    known: dict[int, Item] = {}

    def look_up() -> int:
        hits = 0
        for key in keys:
            if key in known:
                hits += 1
            else:
                known[key] = container.item
        return hits

    contenders: dict[str, Callable[[], object]] = {"policy": lambda: container.access(keys), "dict": look_up}
    seconds = race(contenders, rounds=15, of=min)
    report(
        f"{policy}, per access on top of a dict", (seconds["policy"] - seconds["dict"]) / len(keys), None, COST[policy]
    )
    assert len(container.entries) == 1000
    assert 0.3 < container.access(keys) / len(keys) < 0.8


@pytest.mark.parametrize("policy", COST)
def test_eviction_does_not_grow_with_the_entries(policy: str, race: Race, report: Report) -> None:
    """Newcomers into a full container: one of 10^6 entries over one of 10^4."""
    fresh, contenders = count(10**7), dict[str, Any]()
    for entries in (10**4, 10**6):
        container = Container(policy, entries)
        container.access(range(entries))
        container.access(range(0, entries, 3))
        contenders[f"{entries:,}"] = lambda container=container: container.access(islice(fresh, 1000))
    seconds = race(contenders, rounds=15, of=min)
    report(f"{policy}, an eviction of 10^6 / of 10^4", seconds["1,000,000"] / 1000, seconds["10,000"] / 1000, 2.0)
    assert len(container.entries) == 10**6


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
