"""Every policy of the house keeps the contract; what is special about each."""

from collections import OrderedDict
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from agnostic_cache.errors import InvalidSizeError, UnknownPolicyError
from agnostic_cache.eviction import (
    POLICIES,
    AdaptiveEvictor,
    BaseEvictor,
    DummyEvictor,
    FIFOEvictor,
    GDSFEvictor,
    LFUEvictor,
    LRUEvictor,
    Policy,
    PutStatus,
    QuotaEvictor,
    S3FIFOEvictor,
    TTLEvictor,
    make_evictor,
)
from agnostic_cache.eviction.adaptive import Adaptive
from agnostic_cache.testing import EvictorSuite
from agnostic_cache.testing.shelf import Shelf

LEGAL, ILLEGAL = PutStatus.LEGAL, PutStatus.ILLEGAL


class Clock:
    """A clock that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class TestLRU(EvictorSuite):
    def make(self, max_bytes: int) -> Any:
        return make_evictor("lru", max_bytes)


class TestFIFO(EvictorSuite):
    def make(self, max_bytes: int) -> Any:
        return make_evictor("fifo", max_bytes)


class TestLFU(EvictorSuite):
    def make(self, max_bytes: int) -> Any:
        return make_evictor("lfu", max_bytes)


class TestS3FIFO(EvictorSuite):
    def make(self, max_bytes: int) -> Any:
        return make_evictor("s3fifo", max_bytes)


class TestGDSF(EvictorSuite):
    def make(self, max_bytes: int) -> Any:
        return make_evictor("gdsf", max_bytes)


class Eager(AdaptiveEvictor):
    """Learns from entries of any size, and from few."""

    largest = 1.0
    window = 1.0


class TestAdaptive(EvictorSuite):
    def make(self, max_bytes: int) -> Any:
        return make_evictor("adaptive", max_bytes)


class TestEagerlyAdaptive(EvictorSuite):
    def make(self, max_bytes: int) -> Any:
        return make_evictor(Eager(), max_bytes)


class LargestFirst(Policy):
    """That of the page on choosing a policy."""

    def reset(self) -> None:
        self.sizes: dict[Any, int] = {}

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:  # noqa: ARG002
        self.sizes[key] = nbytes

    def used(self, key: Any) -> None:
        self.sizes[key]

    def gone(self, key: Any, *, evicted: bool = False) -> None:  # noqa: ARG002
        self.sizes.pop(key, None)

    def order(self) -> Iterator[Any]:
        return iter(sorted(self.sizes, key=self.sizes.__getitem__, reverse=True))


class TestAPolicyOfOnesOwn(EvictorSuite):
    def make(self, max_bytes: int) -> Any:
        return make_evictor(LargestFirst(), max_bytes)


class TestTTL(EvictorSuite):
    needs_keys = True

    def make(self, max_bytes: int) -> Any:
        return make_evictor(TTLEvictor(S3FIFOEvictor(), ttl_seconds=60, clock=Clock()), max_bytes)


class TestQuota(EvictorSuite):
    needs_keys = True

    def make(self, max_bytes: int) -> Any:
        return make_evictor(QuotaEvictor(LRUEvictor(), quota=100 * max_bytes), max_bytes)


class TestQuotaOfTTL(EvictorSuite):
    needs_keys = True

    def make(self, max_bytes: int) -> Any:
        return make_evictor(QuotaEvictor(TTLEvictor(LFUEvictor(), clock=Clock()), quota=100 * max_bytes), max_bytes)


# --- by name ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_has_a_name_and_takes_the_budget(name: str) -> None:
    evictor: Any = make_evictor(name, "3KiB")
    assert evictor.MAX_CACHE_SIZE == 3072
    shelf = Shelf(evictor)
    assert shelf.put("a", 1024) is LEGAL
    assert shelf.get("a")


def test_an_unknown_policy_lists_the_known_ones() -> None:
    for strange in ("LRU ", "", None, LRUEvictor):
        with pytest.raises(UnknownPolicyError) as caught:
            make_evictor(strange, 64)  # type: ignore[arg-type]
        assert all(repr(name) in str(caught.value) for name in POLICIES)


def test_an_instance_takes_the_budget_of_its_container() -> None:
    mine = LRUEvictor(1.0)
    assert make_evictor(mine, 100) is mine
    assert mine.MAX_CACHE_SIZE == 100


def test_a_subclass_sets_what_its_policy_goes_by() -> None:
    policy = Eager().policy
    assert isinstance(policy, Adaptive)
    assert (policy.largest, policy.window, policy.rate) == (1.0, 1.0, Adaptive.rate)


@pytest.mark.parametrize("size", [0, -1, -0.5, 1e-12, float("nan"), float("inf")])
@pytest.mark.parametrize("policy", [LRUEvictor, FIFOEvictor, LFUEvictor, S3FIFOEvictor, GDSFEvictor, AdaptiveEvictor])
def test_a_maximum_that_is_none_is_refused(policy: Any, size: float) -> None:
    with pytest.raises(InvalidSizeError):
        policy(size)
    with pytest.raises(InvalidSizeError):
        make_evictor("lru", 0)


# --- as LMCache's ----------------------------------------------------------------------------------------------------


def test_the_dummy_takes_everything() -> None:
    dummy, entries = DummyEvictor(), OrderedDict(a=bytes(10))
    assert dummy.update_on_put(entries, 10**15) == ([], LEGAL)
    assert dummy.update_on_put(entries, 10, key="a") == ([], LEGAL)
    dummy.update_on_get("nobody", entries)
    dummy.update_on_remove("nobody", entries)
    dummy.rollback(entries, key="a")
    dummy.reset()
    assert dummy.evict(entries) == []
    assert not dummy.has_expired("a")
    with pytest.raises(InvalidSizeError):
        dummy.update_on_put(entries, -1)


def test_two_methods_make_an_evictor() -> None:
    class Mine(BaseEvictor):
        def update_on_get(self, key: Any, cache_dict: Any) -> None:
            pass

        def update_on_put(
            self, cache_dict: Any, cache_size: int, *, key: Any = None, cost: Any = None, room: Any = None
        ) -> Any:
            del cache_dict, cache_size, key, cost, room
            return [], LEGAL

    with pytest.raises(TypeError):
        BaseEvictor()  # type: ignore[abstract]
    mine = Mine()
    mine.update_on_remove("a", OrderedDict())
    mine.rollback(OrderedDict())
    assert mine.get_size(b"abc") == 3


def test_the_unit_is_gib() -> None:
    assert LRUEvictor().MAX_CACHE_SIZE == 10 * 1024**3
    assert LRUEvictor(0.5).MAX_CACHE_SIZE == 512 * 1024**2
    assert LRUEvictor(max_cache_size=2).MAX_CACHE_SIZE == 2 * 1024**3
    assert (PutStatus.LEGAL.value, PutStatus.ILLEGAL.value) == (1, 2)


def test_a_caller_of_the_original_sees_what_it_saw() -> None:
    evictor, entries = LRUEvictor(), OrderedDict[str, bytearray]()
    evictor.MAX_CACHE_SIZE = 1024

    def put(key: str, nbytes: int) -> list[str] | PutStatus:
        victims, status = evictor.update_on_put(entries, nbytes)
        if status is ILLEGAL:
            assert victims == []
            return status
        for victim in victims:
            entries.pop(victim)
        entries[key] = bytearray(nbytes)
        return victims

    assert put("a", 400) == []
    assert evictor.current_cache_size == 400
    assert put("b", 400) == []
    evictor.update_on_get("a", entries)
    assert put("c", 400) == ["b"]
    assert put("much", 1025) is ILLEGAL
    assert evictor.current_cache_size == 800
    assert put("d", 1024) == ["a", "c"]
    assert put("nothing", 0) == []
    assert put("e", 1000) == ["d"]
    assert list(entries) == ["nothing", "e"]
    assert evictor.current_cache_size == 1000


def test_the_count_is_there_before_the_caller_inserts() -> None:
    evictor = LRUEvictor()
    evictor.update_on_put(OrderedDict(), 400)
    assert evictor.current_cache_size == 400


class Original:
    """LMCache's LRUEvictor 0.3.0 in ten lines."""

    def __init__(self, maximum: int) -> None:
        self.maximum, self.current = maximum, 0

    def put(self, entries: OrderedDict[int, bytes], size: int) -> list[int] | None:
        if size > self.maximum:
            return None
        keys: list[int] = []
        for key, value in entries.items():
            if size + self.current <= self.maximum:
                break
            self.current -= len(value)
            keys.append(key)
        self.current += size
        return keys


@pytest.mark.parametrize("seed", range(5))
def test_victims_are_those_of_the_original(seed: int) -> None:
    """As long as nothing is overwritten or removed, which the original counts wrong."""
    source, entries = Random(seed), OrderedDict[int, bytes]()
    original, evictor = Original(1000), make_evictor("lru", 1000)
    for key in range(500):
        size = source.choice((0, 1, 30, 200, 999, 1000, 1001))
        wanted, (victims, status) = original.put(entries, size), evictor.update_on_put(entries, size)
        assert (victims, status) == (([], ILLEGAL) if wanted is None else (wanted, LEGAL))
        if wanted is not None:
            for victim in victims:
                del entries[victim]
            entries[key] = bytes(size)
        if entries:
            evictor.update_on_get(source.choice(list(entries)), entries)


class Record:
    """As LMCache's KVObj and DiskCacheMetadata: a size in bytes, and no nbytes."""

    size = 7


def test_records_of_lmcache_have_a_size() -> None:
    assert LRUEvictor().get_size(Record()) == 7


# --- ttl and quota ---------------------------------------------------------------------------------------------------


def test_what_has_expired_is_not_handed_out_and_leaves_with_the_next_put() -> None:
    clock = Clock()
    evictor = make_evictor(TTLEvictor(LRUEvictor(), ttl_seconds=10, clock=clock), 1000)
    shelf = Shelf(evictor)
    shelf.put("a", 100)
    shelf.put("b", 100)
    clock.now = 5
    shelf.put("c", 100)
    shelf.get("a")
    clock.now = 9.9
    assert not evictor.has_expired("a")
    clock.now = 10
    assert evictor.has_expired("a")
    assert not evictor.has_expired("c")
    shelf.pin("b")
    assert shelf.put("d", 100) is LEGAL
    assert shelf.left == ["a"]
    shelf.items["b"].is_pinned = False
    clock.now = 15
    shelf.lose(evictor.evict(shelf.items))
    assert shelf.left == ["a", "b", "c"]
    assert shelf.counted() == 100


def test_expired_entries_make_room_before_living_ones() -> None:
    clock = Clock()
    shelf = Shelf(make_evictor(TTLEvictor(LRUEvictor(), ttl_seconds=10, clock=clock), 300))
    shelf.put("old", 100)
    clock.now = 5
    shelf.put("young", 100)
    shelf.put("newer", 100)
    shelf.get("old")
    clock.now = 11
    assert shelf.put("new", 100) is LEGAL
    assert shelf.left == ["old"]
    clock.now = 30
    assert shelf.put("much", 301) is ILLEGAL
    assert shelf.put("new", 300) is LEGAL  # overwritten: it does not leave, and lives anew
    assert shelf.left == ["old", "young", "newer"]
    assert not shelf.evictor.has_expired("new")


@pytest.mark.parametrize("ttl_seconds", [0, -1, float("nan"), float("inf")])
def test_a_life_that_is_none_is_refused(ttl_seconds: float) -> None:
    with pytest.raises(InvalidSizeError):
        TTLEvictor(LRUEvictor(), ttl_seconds=ttl_seconds)


def test_nobody_takes_more_than_a_quota_from_the_others() -> None:
    evictor = QuotaEvictor(LRUEvictor(), quota=300, quotas={"rich": 800})
    shelf = Shelf(make_evictor(evictor, 1000))
    for i in range(7):
        shelf.put(("rich", i), 100)
    for i in range(100):
        assert shelf.put(("greedy", i), 100) is LEGAL
    assert [key for key in shelf.items if key[0] == "greedy"] == [("greedy", i) for i in (97, 98, 99)]
    assert len([key for key in shelf.items if key[0] == "rich"]) == 7
    assert (evictor.used_by("greedy"), evictor.used_by("rich"), evictor.used_by("nobody")) == (300, 700, 0)
    assert shelf.put(("greedy", "much"), 301) is ILLEGAL
    assert shelf.put(("rich", "much"), 801) is ILLEGAL
    assert shelf.put(("other", 0), 100) is LEGAL  # the budget of all: the least recently used leaves
    assert shelf.left[-1] == ("rich", 0)
    shelf.pin([("greedy", i) for i in (97, 98, 99)])
    assert shelf.put(("greedy", 100), 100) is ILLEGAL
    assert shelf.nbytes == shelf.counted() == 1000


@pytest.mark.parametrize("seed", range(5))
def test_quotas_are_counted_through_anything(seed: int) -> None:
    evictor = make_evictor(QuotaEvictor(S3FIFOEvictor(), quota=400, namespace=lambda key: key % 3), 1000)
    shelf = Shelf(evictor)
    for step in range(40):
        TestQuota().some_life(shelf, seed * 100 + step, steps=20)
        for tenant in range(3):
            used = sum(item.nbytes for key, item in shelf.items.items() if key % 3 == tenant)
            assert evictor.used_by(tenant) == used <= 400  # type: ignore[attr-defined]


def test_a_quota_that_is_none_is_refused() -> None:
    for wrong in (0, -1, "much"):
        with pytest.raises(InvalidSizeError):
            QuotaEvictor(LRUEvictor(), quota=wrong)
        with pytest.raises(InvalidSizeError):
            QuotaEvictor(LRUEvictor(), quotas={"a": wrong})


# --- the others ------------------------------------------------------------------------------------------------------


def test_what_costs_more_per_byte_stays_longer() -> None:
    shelf = Shelf(make_evictor("gdsf", 300))
    for key, cost in (("dear", 300), ("cheap", 100), ("middling", 200)):
        shelf.put(key, 100, cost=cost)
    shelf.put("next", 100, cost=250)
    shelf.put("last", 100, cost=250)
    assert shelf.left == ["cheap", "middling"]


def test_old_fame_fades() -> None:
    shelf = Shelf(make_evictor("lfu", 300))
    shelf.put("famous", 100)
    for _ in range(5):
        shelf.get("famous")
    for i in range(20):
        shelf.put(i, 100)
    assert "famous" not in shelf.items
    assert shelf.left.index("famous") >= 5


def test_large_entries_teach_nothing() -> None:
    """Where few entries fit, the adaptive policy is LRU, whatever comes back."""
    lru, adaptive = Shelf(make_evictor("lru", 1000)), Shelf(make_evictor("adaptive", 1000))
    source = Random(1)
    for _ in range(5000):
        key, nbytes = source.randrange(60), source.choice((16, 60, 100))
        for shelf in (lru, adaptive):
            _ = shelf.get(key) or shelf.put(key, nbytes)
    assert lru.left == adaptive.left
    assert adaptive.evictor.patience == 1.0


def test_patience_is_learnt() -> None:
    """A few that come again and again, among many that come once: the few stay, where LRU loses them."""
    hits = dict.fromkeys(("lru", "adaptive"), 0)
    for name in hits:
        shelf, source = Shelf(make_evictor(name, 100)), Random(1)
        for step in range(20_000):
            key = source.randrange(80) if step % 3 == 0 else 1000 + step
            if shelf.get(key):
                hits[name] += 1
            else:
                shelf.put(key, 1)
    assert hits["adaptive"] > 2 * hits["lru"]
