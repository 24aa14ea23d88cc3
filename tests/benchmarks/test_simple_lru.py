"""A hit in SimpleLRUCache against mellea's class and lru-dict."""

from __future__ import annotations

from collections import OrderedDict
from random import Random
from typing import TYPE_CHECKING, Any

from lru import LRU

from agnostic_cache.cache import SimpleLRUCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.conftest import Race, Report

ENTRIES = 128
HITS = 1000  # per turn


class MelleaCache:
    """The shape of mellea's SimpleLRUCache, written from its description."""

    def __init__(self, capacity: int, on_evict: Callable[[Any], None] | None = None) -> None:
        self.capacity = capacity
        self.on_evict = on_evict
        self.cache: OrderedDict[str | int, Any] = OrderedDict()

    def get(self, key: str | int) -> Any | None:
        if key not in self.cache:
            return None
        value = self.cache.pop(key)
        self.cache[key] = value
        return value

    def put(self, key: str | int, value: Any) -> None:
        if self.capacity <= 0:
            return
        if key in self.cache:
            self.cache.pop(key)
        elif len(self.cache) >= self.capacity:
            _, evicted = self.cache.popitem(last=False)
            if self.on_evict is not None:
                self.on_evict(evicted)
        self.cache[key] = value


def test_hit(race: Race, report: Report) -> None:
    ours, mellea = SimpleLRUCache(ENTRIES), MelleaCache(ENTRIES)
    lru: LRU[str, object] = LRU(ENTRIES)
    values = {f"session {n}": object() for n in range(ENTRIES)}
    for key, value in values.items():
        ours.put(key, value)
        mellea.put(key, value)
        lru[key] = value
    order = Random(0).choices(list(values), k=HITS)

    # One loop each, written out: CPython specialises the code of a loop to the types that
    # it meets, so that a loop which all share would slow all of them down.
    def get_ours() -> list[object]:
        return [ours.get(key) for key in order]

    def get_mellea() -> list[object]:
        return [mellea.get(key) for key in order]

    def get_lru() -> list[object]:
        return [lru.get(key) for key in order]

    def subscript_lru() -> list[object]:
        return [lru[key] for key in order]

    contenders = {
        "ours": get_ours,
        "mellea": get_mellea,
        "lru.get": get_lru,
        "lru[]": subscript_lru,
    }
    seconds = race(contenders, rounds=300)
    hit = {name: turn / HITS for name, turn in seconds.items()}
    report("LRU hit / mellea", hit["ours"], hit["mellea"], 0.6)
    report("LRU hit / lru-dict .get(key)", hit["ours"], hit["lru.get"], 1.15)
    # No peer of a method that answers None to a miss: an operator in C, that raises.
    report("LRU hit / lru-dict [key]", hit["ours"], hit["lru[]"], None)

    expected = [values[key] for key in order]
    assert all(get() == expected for get in contenders.values())
    newest = list(dict.fromkeys(reversed(order)))
    assert list(reversed(ours.cache))[: len(newest)] == newest
    assert list(ours.cache) == list(mellea.cache)
    assert list(reversed(ours.cache)) == lru.keys()
