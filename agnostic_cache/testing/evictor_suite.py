"""EvictorSuite: the whole contract of a policy, or of an evictor with a budget.

A test class of one's own inherits it and says how to make one:

    class TestMyPolicy(EvictorSuite):
        def make(self, max_bytes):
            return make_evictor(MyPolicy(), max_bytes)
"""

from abc import ABC, abstractmethod
from itertools import islice
from random import Random
from typing import Any, ClassVar

import pytest

from agnostic_cache.errors import InvalidKeyError, InvalidSizeError, UnknownValueError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.eviction.lmcache import BudgetEvictor
from agnostic_cache.eviction.policy import Policy
from agnostic_cache.testing.shelf import Item, Shelf, SomeRoom

LEGAL, ILLEGAL = PutStatus.LEGAL, PutStatus.ILLEGAL
SIZES = (0, 1, 10, 40, 100)


class EvictorSuite(ABC):
    """Every evictor counts right, keeps the budget, passes over what is pinned, and changes nothing when it refuses.

    Attributes:
        needs_keys: It must know the key of a put, and refuses one without; one that does not need it serves callers of
            LMCache's evictors too. Tests of what it does not do are skipped.
    """

    needs_keys: ClassVar[bool] = False

    @abstractmethod
    def make(self, max_bytes: int) -> Any:
        """Return a new evictor with that budget."""

    def shelf(self, max_bytes: int = 1000, keys: str = "", **settings: Any) -> Shelf:
        """Return a container with an item of 100 bytes under each letter."""
        shelf = Shelf(self.make(max_bytes), **settings)
        for key in keys:
            assert shelf.put(key, 100) is LEGAL
        return shelf

    def policy_of(self, shelf: Shelf) -> Policy:
        """Return the policy behind the evictor; skip the test of one that decides by itself."""
        if not isinstance(shelf.evictor, BudgetEvictor):
            pytest.skip("decides by itself: no BudgetEvictor over a Policy")
        return shelf.evictor.policy

    def some_life(self, shelf: Shelf, seed: int, steps: int = 300, keys: int = 30) -> None:
        """Do anything to it, in any order."""
        source = Random(seed)
        for _ in range(steps):
            key, act = source.randrange(keys), source.random()
            if act < 0.5:
                shelf.put(key, source.choice(SIZES))
            elif act < 0.9:
                shelf.get(key)
            elif key in shelf.items:
                shelf.remove(key)

    # --- counting ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", range(8))
    def test_the_count_is_exact_and_the_budget_holds(self, seed: int) -> None:
        shelf, source = self.shelf(), Random(seed)
        for _ in range(60):
            self.some_life(shelf, source.randrange(10**6), steps=20)
            assert shelf.counted() == shelf.nbytes <= 1000

    @pytest.mark.parametrize("seed", range(4))
    def test_who_names_no_keys_is_served_too(self, seed: int) -> None:
        if self.needs_keys:
            pytest.skip("puts must name their keys: needs_keys = True")
        shelf, source = self.shelf(named=False), Random(seed)
        for _ in range(60):
            self.some_life(shelf, source.randrange(10**6), steps=20)
            shelf.items.pop(source.randrange(30), None)  # nor does it tell of everything that it removes
            assert shelf.put("last", 0) is LEGAL
            assert shelf.put("last", 1) is LEGAL  # looks at what was done before
            assert shelf.nbytes <= 1000
            shelf.remove("last")
            assert shelf.counted() == shelf.nbytes

    def test_who_names_no_keys_is_refused_where_they_are_needed(self) -> None:
        if not self.needs_keys:
            pytest.skip("puts need not name their keys: needs_keys = False")
        shelf = self.shelf(1000, "a")
        shelf.named = False
        with pytest.raises(InvalidKeyError):
            shelf.put("b", 100)
        assert shelf.counted() == 100

    def test_overwriting_counts_once(self) -> None:
        shelf = self.shelf(1000)
        for nbytes in (150, 150, 150, 700, 150):
            assert shelf.put("a", nbytes) is LEGAL
            assert shelf.counted() == nbytes
        assert shelf.put("b", 850) is LEGAL
        assert shelf.left == []

    def test_overwriting_near_the_limit_makes_room_for_the_difference(self) -> None:
        shelf = self.shelf(1000, "abcdefghij")
        assert shelf.put("a", 100) is LEGAL
        assert shelf.left == []
        assert shelf.put("a", 200) is LEGAL
        assert len(shelf.left) == 1
        assert shelf.counted() == shelf.nbytes == 1000

    @pytest.mark.parametrize("pop_first", [False, True])
    def test_what_is_removed_counts_no_more(self, *, pop_first: bool) -> None:
        shelf = self.shelf(1000, "abcdefghij")
        for key in "abc":
            if pop_first:
                del shelf.items[key]
            shelf.evictor.update_on_remove(key, shelf.items)
            if not pop_first:
                del shelf.items[key]
        shelf.evictor.update_on_remove("nobody", shelf.items)
        assert shelf.counted() == 700
        assert shelf.put("k", 300) is LEGAL
        assert shelf.left == []

    def test_a_put_that_failed_counts_no_more(self) -> None:
        shelf = self.shelf(1000, "abcdefghij")
        victims, status = shelf.evictor.update_on_put(shelf.items, 300, key="k")
        assert status is LEGAL
        shelf.lose(victims)
        shelf.evictor.rollback(shelf.items, key="k")
        assert shelf.counted() == shelf.nbytes == 700
        assert shelf.put("l", 300) is LEGAL
        assert shelf.left == victims

    def test_a_put_that_failed_before_anybody_left_leaves_all_counted(self) -> None:
        shelf = self.shelf(1000, "abcdefghij")
        for key in ("k", "a"):  # a newcomer, and one that is there
            assert shelf.evictor.update_on_put(shelf.items, 300, key=key)[1] is LEGAL
            shelf.evictor.rollback(shelf.items, key=key)
            assert shelf.counted() == shelf.nbytes == 1000
        assert shelf.put("l", 1000) is LEGAL
        assert set(shelf.left) == set("abcdefghij")  # they can leave as before

    def test_nobody_stays_for_ever(self) -> None:
        shelf = self.shelf(1000, "abcde")
        for key in "vwxyz":
            shelf.items[key] = Item(100)  # of this the evictor was not told
        for key in "vw":
            assert shelf.get(key)
        assert shelf.put("k", 1000, room=SomeRoom(shelf, 1000, shelf.items)) is LEGAL
        assert set(shelf.left) == set("abcdevwxyz")
        assert shelf.put("l", 1000) is LEGAL
        assert list(shelf.items) == ["l"]

    def test_after_a_reset_it_knows_nobody(self) -> None:
        shelf = self.shelf(1000, "abcdefghij")
        shelf.evictor.reset()
        shelf.items.clear()
        assert shelf.counted() == 0
        assert shelf.put("a", 1000) is LEGAL
        assert shelf.left == []

    # --- refusing ----------------------------------------------------------------------------------------------------

    def test_the_maximum_fits_and_a_byte_more_does_not(self) -> None:
        shelf = self.shelf(1000, "abc")
        before = dict(shelf.items)
        assert shelf.put("d", 1001) is ILLEGAL
        assert shelf.put("a", 1001) is ILLEGAL
        assert dict(shelf.items) == before
        assert shelf.counted() == 300
        assert shelf.put("d", 1000) is LEGAL
        assert list(shelf.items) == ["d"]

    def test_what_is_pinned_is_passed_over(self) -> None:
        shelf = self.shelf(1000, "abcdefghij")
        shelf.pin("abcde")
        assert shelf.put("k", 500) is LEGAL
        assert set(shelf.items) == set("abcdek")
        shelf.pin("k")
        assert shelf.put("l", 100) is ILLEGAL
        assert set(shelf.items) == set("abcdek")
        assert shelf.counted() == 1000
        shelf.items["c"].is_pinned = False
        assert shelf.put("l", 100) is LEGAL
        assert set(shelf.items) == set("abdekl")

    @pytest.mark.parametrize("seed", range(6))
    def test_a_refusal_changes_nothing(self, seed: int) -> None:
        asked, other = self.shelf(), self.shelf()
        for shelf in (asked, other):
            self.some_life(shelf, seed)
        keys = list(asked.items)
        asked.pin(keys[::2])
        for key in ("new", keys[0]):
            assert asked.put(key, 1000) is ILLEGAL
        for item in asked.items.values():
            item.is_pinned = False
        for shelf in (asked, other):
            self.some_life(shelf, seed + 1)
        assert asked.left == other.left
        assert list(asked.items) == list(other.items)

    def test_a_negative_size_is_refused(self) -> None:
        shelf = self.shelf(1000, "a")
        with pytest.raises(InvalidSizeError):
            shelf.put("b", -1)
        assert shelf.counted() == 100

    def test_who_is_not_there_was_not_used(self) -> None:
        shelf = self.shelf(1000, "a")
        with pytest.raises(KeyError):
            shelf.evictor.update_on_get("b", shelf.items)
        assert shelf.counted() == 100

    def test_the_size_of_a_value(self) -> None:
        size = self.make(1000).get_size
        assert size(b"four") == size(bytearray(4)) == size(memoryview(bytes(4))) == size(Item(4)) == 4
        for strange in ("text", None, 4, [1], object()):
            with pytest.raises(UnknownValueError):
                size(strange)

    # --- the order, without side effects -----------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", range(4))
    def test_looking_at_the_order_changes_nothing(self, seed: int) -> None:
        looked, other = self.shelf(), self.shelf()
        policy, source = self.policy_of(looked), Random(seed)
        for _ in range(30):
            life = source.randrange(10**6)
            for shelf in (looked, other):
                self.some_life(shelf, life, steps=20)
            order = list(policy.order())
            assert list(islice(policy.order(), 3)) == order[:3]
            assert sorted(order) == sorted(looked.items)
        assert looked.left == other.left

    @pytest.mark.parametrize("seed", range(4))
    def test_victims_leave_in_the_order(self, seed: int) -> None:
        """All at once, and one after the other."""
        shelf, other = self.shelf(), self.shelf()
        for either in (shelf, other):
            self.some_life(either, seed)
        policy = self.policy_of(other)
        order, before = list(policy.order()), len(shelf.left)
        assert shelf.put("all", 1000) is LEGAL
        left = shelf.left[before:]
        assert left == order[: len(left)]
        assert set(order[len(left) :]) < set(shelf.items)  # of no bytes: nothing was short any more
        for key in order:
            assert next(policy.order()) == key
            policy.gone(key, evicted=True)
        assert list(policy.order()) == []

    def test_a_key_that_is_not_there_is_gone_already(self) -> None:
        policy = self.policy_of(self.shelf())
        policy.added("a", 100)
        policy.gone("b")
        policy.gone("b", evicted=True)
        assert list(policy.order()) == ["a"]
        with pytest.raises(KeyError):
            policy.used("b")
        policy.gone("a", evicted=True)
        policy.gone("a", evicted=True)
        assert list(policy.order()) == []

    # --- room --------------------------------------------------------------------------------------------------------

    def test_the_container_may_count_itself(self) -> None:
        shelf = self.shelf(1000, "abcdefghij")
        assert shelf.put("k", 100, room=SomeRoom(shelf, 0, "abc")) is LEGAL
        assert shelf.left == []
        room = SomeRoom(shelf, 250, "bdfh")
        assert shelf.put("l", 5000, room=room) is LEGAL
        assert len(shelf.left) == 3
        assert set(shelf.left) < set("bdfh")
        assert room.gone == shelf.left

    def test_a_refusal_of_the_container_changes_nothing(self) -> None:
        shelf, other = self.shelf(1000, "abcdefghij"), self.shelf(1000, "abcdefghij")
        assert shelf.put("k", 100, room=SomeRoom(shelf, 500, "abcd")) is ILLEGAL
        for either in (shelf, other):
            for i in range(8):
                either.put(i, 100)
        assert shelf.left == other.left
        assert len(shelf.left) == 8

    def test_who_is_passed_over_is_asked_again_when_others_left(self) -> None:
        class Chain(SomeRoom):
            """Each may go after the next one only: a chain, its end first."""

            def release(self, key: str) -> bool:
                self.keys = {chr(ord("j") - len(self.gone))}
                return super().release(key)

        shelf = self.shelf(1000, "abcdefghij")
        assert shelf.put("k", 100, room=Chain(shelf, 300, ())) is LEGAL
        assert shelf.left == ["j", "i", "h"]

    def test_who_leaves_without_a_newcomer(self) -> None:
        shelf = self.shelf(1000, "abcdefghij")
        assert shelf.evictor.evict(shelf.items) == []
        shelf.evictor.MAX_CACHE_SIZE = 450
        shelf.pin("abcd")
        shelf.lose(shelf.evictor.evict(shelf.items))
        assert set(shelf.items) == set("abcd")
        shelf.pin(shelf.items)
        shelf.evictor.MAX_CACHE_SIZE = 150
        assert shelf.evictor.evict(shelf.items) == []
        assert shelf.counted() == 400
