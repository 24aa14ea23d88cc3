"""Each policy against itself in plain lines, on random accesses: hit for hit the same."""

from collections.abc import Iterator
from random import Random
from typing import Any, Protocol

import pytest

from agnostic_cache.eviction import LRUEvictor, TTLEvictor, choose, make_evictor, make_policy, recompute_cost
from agnostic_cache.eviction.adaptive import Adaptive
from agnostic_cache.eviction.choose import CountingRoom
from agnostic_cache.eviction.limits import Limits, first_part
from agnostic_cache.eviction.lru import LRU
from agnostic_cache.eviction.s3fifo import S3FIFO
from agnostic_cache.testing.shelf import Shelf

ROOM = 60


class Plain(Protocol):
    """A cache of `ROOM` entries of one byte."""

    def access(self, key: int, cost: float) -> bool:
        """Say whether the key is there, and take it in where it is not."""
        ...


class PlainLRU:
    def __init__(self) -> None:
        self.keys: list[int] = []

    def access(self, key: int, cost: float) -> bool:  # noqa: ARG002
        hit = key in self.keys
        self.keys = [other for other in self.keys if other != key]
        self.keys = [*self.keys[-ROOM + 1 :], key]
        return hit


class PlainFIFO:
    def __init__(self) -> None:
        self.keys: list[int] = []

    def access(self, key: int, cost: float) -> bool:  # noqa: ARG002
        hit = key in self.keys
        self.keys = self.keys if hit else [*self.keys[-ROOM + 1 :], key]
        return hit


class PlainGDSF:
    """Priority and last use by key; with a cost of 1, LFU with dynamic ageing."""

    def __init__(self, *, costs: bool) -> None:
        self.costs, self.age, self.now = costs, 0.0, 0
        self.uses: dict[int, int] = {}
        self.priority: dict[int, tuple[float, int]] = {}

    def access(self, key: int, cost: float) -> bool:
        hit, self.now = key in self.uses, self.now + 1
        if not hit and len(self.uses) == ROOM:
            victim = min(self.priority, key=self.priority.__getitem__)
            self.age = self.priority.pop(victim)[0]
            del self.uses[victim]
        self.uses[key] = self.uses.get(key, 0) + 1
        self.priority[key] = (self.age + self.uses[key] * (cost if self.costs else 1), self.now)
        return hit


class PlainS3FIFO:
    """Lists, the oldest first."""

    def __init__(self) -> None:
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: list[int] = []
        self.uses: dict[int, int] = {}

    def access(self, key: int, cost: float) -> bool:  # noqa: ARG002
        if key in self.uses:
            self.uses[key] = min(3, self.uses[key] + 1)
            return True
        while len(self.uses) == ROOM:
            if len(self.main) > 0.9 * ROOM or not self.small:
                self.look_at_main()
            else:
                self.look_at_small()
        (self.main if key in self.ghosts else self.small).append(key)
        self.ghosts = [ghost for ghost in self.ghosts if ghost != key]
        self.uses[key] = 0
        return False

    def look_at_main(self) -> None:
        key = self.main.pop(0)
        if self.uses[key]:
            self.uses[key] -= 1
            self.main.append(key)
        else:
            del self.uses[key]

    def look_at_small(self) -> None:
        key = self.small.pop(0)
        if self.uses[key] > 1:
            self.uses[key] = 0
            self.main.append(key)
        else:
            del self.uses[key]
            self.ghosts = [*self.ghosts, key][-ROOM:]


class PlainAdaptive:
    """Last use by key, in two halves; ghosts as lists of (key, how many had left)."""

    def __init__(self) -> None:
        self.live: list[dict[int, int]] = [{}, {}]  # new, returned
        self.ghosts: list[list[tuple[int, int]]] = [[], []]
        self.left, self.now, self.patience = [0, 0], 0, 1.0

    def access(self, key: int, cost: float) -> bool:  # noqa: ARG002
        hit = any(key in half for half in self.live)
        if not hit and sum(map(len, self.live)) == ROOM:
            self.evict()
        self.now += 1
        half = 1 if key in self.live[1] or (not hit and self.came_back(key)) else 0
        self.live[half][key] = self.now
        return hit

    def came_back(self, key: int) -> bool:
        for half, direction in ((0, -1), (1, 1)):
            for ghost, at in self.ghosts[half]:
                if ghost == key:
                    self.ghosts[half].remove((ghost, at))
                    if self.left[half] - at <= 0.2 * ROOM:
                        self.patience = min(100, max(1, self.patience * (1 + 100 / ROOM) ** direction))
                    return True
        return False

    def evict(self) -> None:
        ages = [max((self.now - used, key) for key, used in half.items()) if half else (-1, 0) for half in self.live]
        half = 0 if self.live[0] and (not self.live[1] or ages[1][0] <= self.patience * ages[0][0]) else 1
        victim = ages[half][1]
        del self.live[half][victim]
        self.left[half] += 1
        self.ghosts[half] = [*self.ghosts[half], (victim, self.left[half])][-2 * ROOM :]


class Learning(Adaptive):
    """Also from entries that take a 60th of the room."""

    largest = 1.0


def accesses(seed: int, count: int = 6000) -> Iterator[int]:
    """Popular keys, keys that come once, and a window that moves."""
    source = Random(seed)
    for step in range(count):
        kind = source.random()
        if kind < 0.5:
            yield min(int(source.paretovariate(0.8)), 300)
        elif kind < 0.75:
            yield 1000 + step
        else:
            yield 500 + step // 40 + source.randrange(50)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("policy", "plain"),
    [
        ("lru", PlainLRU),
        ("fifo", PlainFIFO),
        ("lfu", lambda: PlainGDSF(costs=False)),
        ("gdsf", lambda: PlainGDSF(costs=True)),
        ("s3fifo", PlainS3FIFO),
        (Learning, PlainAdaptive),
        (lambda: Limits(LRU(), namespace=first_part, quota=ROOM), PlainLRU),
        (lambda: Limits(S3FIFO(), ttl_seconds=3600), PlainS3FIFO),
    ],
    ids=["lru", "fifo", "lfu", "gdsf", "s3fifo", "adaptive", "quota of lru", "ttl of s3fifo"],
)
def test_hit_for_hit(policy: Any, plain: Any, seed: int) -> None:
    ours, entries = make_policy(policy if isinstance(policy, str) else policy(), ROOM), dict[int, None]()
    peer: Plain = plain()
    hits = 0
    for step, key in enumerate(accesses(seed)):
        cost, hit = 1.0 + key % 7, key in entries
        if hit:
            ours.used(key)
        else:
            room = CountingRoom(len(entries) + 1 - ROOM, lambda _: 1)
            victims = choose(ours, entries, room, newcomer=key, nbytes=1, cost=cost, expired=ours.expired())
            assert victims is not None
            for victim in victims:
                del entries[victim]
                ours.gone(victim, evicted=True)
            entries[key] = None
            ours.added(key, 1, cost)
        assert hit == peer.access(key, cost), step
        hits += hit
    assert 1000 < hits < 4000


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["lru", "fifo", "lfu", "gdsf", "s3fifo", "adaptive"])
def test_an_evictor_hits_what_its_policy_hits(name: str, seed: int) -> None:
    shelf, ours, entries = Shelf(make_evictor(name, ROOM)), make_policy(name, ROOM), dict[int, None]()
    for key in accesses(seed, 2000):
        assert shelf.get(key) == (key in entries)
        if key in entries:
            ours.used(key)
            continue
        shelf.put(key, 1)
        for victim in choose(ours, entries, CountingRoom(len(entries) + 1 - ROOM, lambda _: 1), newcomer=key) or ():
            del entries[victim]
            ours.gone(victim, evicted=True)
        entries[key] = None
        ours.added(key, 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["lfu", "gdsf"])
def test_the_order_is_that_of_priorities(name: str, seed: int) -> None:
    """Also where an entry is overwritten by a cheaper one, and where a victim was passed over."""
    source, policy, age = Random(seed), make_policy(name, 1000), 0.0
    plain: dict[int, tuple[float, int]] = {}  # priority and time of last use
    facts: dict[int, tuple[int, float]] = {}  # uses and cost per byte
    for now in range(3000):
        key, act = source.randrange(60), source.random()
        if act < 0.3:
            nbytes, cost = source.choice((0, 1, 10)), source.choice((None, 1.0, 50.0))
            policy.added(key, nbytes, cost)
            facts[key] = (facts.get(key, (0, 0))[0], 1.0 if cost is None or not nbytes else cost / nbytes)
        elif key not in plain:
            continue
        elif act < 0.8:
            policy.used(key)
        else:
            evicted = act < 0.95
            victim = source.choice(sorted(plain, key=plain.__getitem__)[:3]) if evicted else key
            policy.gone(victim, evicted=evicted)
            priority, _ = plain.pop(victim)
            del facts[victim]
            age = max(age, priority) if evicted else age
        if key in facts and act < 0.8:
            uses, density = facts[key]
            facts[key] = (uses + 1, density)
            plain[key] = (age + (uses + 1) * (density if name == "gdsf" else 1), now)
        if now % 10 == 0:
            assert list(policy.order()) == sorted(plain, key=plain.__getitem__)
    assert len(plain) > 10


@pytest.mark.parametrize("seed", range(3))
def test_expiry_entry_for_entry(seed: int) -> None:
    now, put_at = 0.0, dict[int, float]()
    shelf = Shelf(make_evictor(TTLEvictor(LRUEvictor(), ttl_seconds=5, clock=lambda: now), 10**6))
    source = Random(seed)
    for _ in range(2000):
        now += source.random()
        key = source.randrange(20)
        if source.random() < 0.5:
            shelf.put(key, 1)
            put_at[key] = now
            put_at = {other: at for other, at in put_at.items() if now - at < 5}
            assert set(shelf.items) == set(put_at)
        else:
            expired = key in put_at and now - put_at[key] >= 5
            assert shelf.evictor.has_expired(key) == expired


def test_the_end_of_a_long_prefix_costs_more_per_token() -> None:
    costs = [recompute_cost(start, start + 512) for start in range(0, 100_000, 512)]
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(512, rel=0.01)
    assert recompute_cost(32768 - 256, 32768 + 256) == pytest.approx(2 * 512)
    assert recompute_cost(0, 1000) == pytest.approx(recompute_cost(0, 400) + recompute_cost(400, 1000))
