"""Evictors of a user's own class, in containers that know policies alone."""

from collections import OrderedDict
from pathlib import Path
from random import Random
from typing import Any

import pytest

from agnostic_cache.eviction import (
    BaseEvictor,
    DummyEvictor,
    LRUEvictor,
    PutStatus,
    QuotaEvictor,
    S3FIFOEvictor,
    choose,
    make_evictor,
    make_policy,
)
from agnostic_cache.eviction.choose import CountingRoom
from agnostic_cache.eviction.evictor_policy import EvictorPolicy
from agnostic_cache.eviction.lru import LRU
from agnostic_cache.eviction.s3fifo import S3FIFO
from agnostic_cache.storage.file import FileStorage
from agnostic_cache.storage.memory import MemoryStorage

LEGAL, ILLEGAL = PutStatus.LEGAL, PutStatus.ILLEGAL
PAGE = 4096


class MostRecent(BaseEvictor):
    """The newest leaves first; counts by itself, as LMCache's did, and asks nobody. Two methods, as in its document."""

    MAX = 4 * PAGE

    def __init__(self) -> None:
        self.current = 0
        self.told: list[tuple[str, Any]] = []

    def update_on_get(self, key: Any, cache_dict: Any) -> None:
        cache_dict.move_to_end(key)

    def update_on_put(self, cache_dict: Any, cache_size: int, **more: Any) -> Any:
        if cache_size > self.MAX:
            return [], ILLEGAL
        victims = []
        for key in reversed(cache_dict):
            if self.current + cache_size <= self.MAX:
                break
            if not cache_dict[key].is_pinned:
                victims.append(key)
                self.current -= self.get_size(cache_dict[key])
        self.told.append(("put", more["key"]))
        self.current += cache_size
        return victims, LEGAL

    def update_on_remove(self, key: Any, cache_dict: Any = None) -> None:
        self.told.append(("remove", key))
        self.current = sum(item.nbytes for item in cache_dict.values())

    def rollback(self, cache_dict: Any, *, key: Any = None) -> None:
        self.told.append(("rollback", key))
        self.current = sum(item.nbytes for item in cache_dict.values())

    def reset(self) -> None:
        self.current = 0


class Liar(LRUEvictor):
    """Promises room without making any."""

    def update_on_put(self, *arguments: Any, room: Any = None, **more: Any) -> Any:
        del room
        return super().update_on_put(*arguments, room=None, **more)


class AtMost(LRUEvictor):
    """Refuses what is larger than a page, and counts its answers."""

    refused = 0

    def update_on_put(self, cache_dict: Any, cache_size: int, **more: Any) -> Any:
        if cache_size > PAGE:
            self.refused += 1
            return [], ILLEGAL
        return super().update_on_put(cache_dict, cache_size, **more)


def test_which_evictors_are_asked_themselves() -> None:
    class Knob(S3FIFOEvictor):
        small_share = 0.5

    mine = MostRecent()
    assert isinstance(make_policy(LRUEvictor(), 100), LRU)
    assert isinstance(make_policy(S3FIFOEvictor(), 100), S3FIFO)
    for evictor in (mine, Liar(), AtMost(), DummyEvictor(), Knob()):
        assert isinstance(make_policy(evictor, 100), EvictorPolicy)
    inner, policy = Knob().policy, LRU()
    assert isinstance(inner, S3FIFO)
    assert inner.small_share == 0.5
    assert make_policy(policy, 100) is policy
    assert make_policy(make_evictor(policy, 100), 100) is policy
    assert policy.max_bytes == 100


def test_two_methods_decide_in_a_storage() -> None:
    evictor = MostRecent()
    storage = MemoryStorage(8 * PAGE, evictor=evictor)
    for key in "abcd":
        assert storage.put(key, bytes(PAGE)) is LEGAL
    storage.get("a")
    assert storage.put("e", bytes(PAGE)) is LEGAL
    assert sorted(storage.list_keys()) == ["b", "c", "d", "e"]  # a was read last
    assert storage.put("much", bytes(5 * PAGE)) is ILLEGAL
    held = storage.get("e")
    assert storage.put("f", bytes(PAGE)) is LEGAL  # what is being read does not leave
    assert sorted(storage.list_keys()) == ["b", "c", "e", "f"]
    del held
    storage.remove("b")
    assert storage.put("g", bytes(PAGE)) is LEGAL
    assert sorted(storage.list_keys()) == ["c", "e", "f", "g"]
    assert evictor.current == 4 * PAGE
    assert ("rollback", "much") not in evictor.told


def test_a_promise_that_makes_no_room_is_rolled_back() -> None:
    evictor = MostRecent()
    storage = MemoryStorage(2 * PAGE, evictor=evictor)
    for key in "ab":
        assert storage.put(key, bytes(PAGE)) is LEGAL
    assert storage.put("c", bytes(PAGE)) is ILLEGAL  # it counts to four, and names nobody
    assert evictor.told[-2:] == [("put", "c"), ("rollback", "c")]
    assert evictor.current == 2 * PAGE
    assert sorted(storage.list_keys()) == ["a", "b"]


def test_a_put_that_failed_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    evictor = MostRecent()
    storage = MemoryStorage(8 * PAGE, evictor=evictor)
    storage.put("a", bytes(PAGE))

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("agnostic_cache.storage.memory.copy_into", fail)
        for key in ("b", "a"):  # a newcomer, and one that is overwritten: its old bytes are gone
            with pytest.raises(MemoryError):
                storage.put(key, bytes(PAGE))
            assert evictor.told[-1] == ("rollback", key)
    assert storage.list_keys() == []
    assert evictor.current == 0


def test_a_refusal_of_the_evictor_is_one_of_the_storage() -> None:
    evictor = AtMost()
    storage = MemoryStorage(8 * PAGE, evictor=evictor)
    assert storage.put("a", bytes(2 * PAGE)) is ILLEGAL
    assert evictor.refused == 1
    assert storage.put("a", bytes(PAGE)) is LEGAL


def test_one_that_never_evicts_refuses_what_does_not_fit() -> None:
    storage = MemoryStorage(2 * PAGE, evictor=DummyEvictor())
    assert [storage.put(key, bytes(PAGE)) for key in "abc"] == [LEGAL, LEGAL, ILLEGAL]
    assert storage.put("a", bytes(2 * PAGE)) is ILLEGAL
    assert storage.put("a", bytes(PAGE)) is LEGAL


@pytest.mark.parametrize("seed", range(3))
def test_a_subclass_that_changes_nothing_names_the_same_victims(seed: int) -> None:
    class Same(LRUEvictor):
        def update_on_get(self, key: Any, cache_dict: Any) -> None:
            super().update_on_get(key, cache_dict)

    source = Random(seed)
    storages = [MemoryStorage(20 * PAGE, evictor=evictor) for evictor in (Same(), LRUEvictor())]
    for _ in range(600):
        key, act, pages = str(source.randrange(30)), source.random(), source.randrange(1, 4)
        for storage in storages:
            if act < 0.5:
                storage.get(key)
            elif act < 0.9:
                assert storage.put(key, bytes(pages * PAGE)) is LEGAL
            else:
                storage.remove(key)
        one, other = (storage.list_keys() for storage in storages)
        assert one == other
    assert storages[0].stats().evictions == storages[1].stats().evictions > 100


def test_files_too(tmp_path: Path) -> None:
    with FileStorage(tmp_path, 10 * PAGE, evictor=AtMost()) as storage:
        assert storage.put("much", bytes(PAGE)) is ILLEGAL  # with its header it is larger
        for i in range(30):
            assert storage.put(str(i), bytes(PAGE // 2)) is LEGAL
            storage.get("0")
        assert storage.contains("0")
        assert storage.stats().evictions > 10
    with FileStorage(tmp_path, 10 * PAGE, evictor=AtMost()) as storage:
        assert storage.contains("0")
        assert storage.put("new", bytes(PAGE // 2)) is LEGAL


def test_an_evictor_that_raises_leaves_the_storage_as_it_was() -> None:
    evictor = QuotaEvictor(LRUEvictor(), quota=PAGE, namespace=lambda key: key.split(":")[1])
    storage = MemoryStorage(2 * PAGE, evictor=evictor)
    assert storage.put("user:1", bytes(PAGE)) is LEGAL
    for _ in range(3):
        with pytest.raises(IndexError):
            storage.put("nobody", bytes(PAGE))
    assert storage.list_keys() == ["user:1"]
    assert storage.put("user:1", bytes(PAGE)) is LEGAL
    assert storage.put("user:2", bytes(PAGE)) is LEGAL
    assert (evictor.used_by("1"), evictor.used_by("2")) == (PAGE, PAGE)


def test_it_may_be_asked_twice_for_one_newcomer() -> None:
    evictor = MostRecent()
    policy, entries = make_policy(evictor, 10 * PAGE), OrderedDict[str, Any]()
    for _ in range(2):
        assert choose(policy, entries, CountingRoom(0, len), newcomer="a", nbytes=PAGE) == []
        assert evictor.current == PAGE
    policy.gone("a")
    assert evictor.current == 0
