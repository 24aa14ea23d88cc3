"""Choosing victims: what the container judges, what expires, what exceeds a quota; and that looking changes nothing."""

from collections.abc import Container, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from agnostic_cache.eviction import POLICIES, choose, make_policy
from agnostic_cache.eviction.choose import CountingRoom
from agnostic_cache.eviction.limits import Limits
from agnostic_cache.eviction.lru import LRU
from agnostic_cache.eviction.s3fifo import S3FIFO


def entries(keys: Iterable[Any], pinned: Container[Any] = ()) -> dict[Any, SimpleNamespace]:
    return {key: SimpleNamespace(is_pinned=key in pinned) for key in keys}


def room(over: int) -> CountingRoom:
    """Lack `over` entries."""
    return CountingRoom(over, lambda _: 1)


def filled(policy: Any, keys: Iterable[Any], nbytes: int = 1) -> Any:
    for key in keys:
        policy.added(key, nbytes)
    return policy


class PerDevice:
    """A room that lacks entries of single devices; an entry is named after its device."""

    def __init__(self, **over: int) -> None:
        self.over = over

    def short(self) -> bool:
        return any(over > 0 for over in self.over.values())

    def release(self, key: str) -> bool:
        device = key[0]
        if self.over.get(device, 0) <= 0:
            return False
        self.over[device] -= 1
        return True


def test_only_what_helps_leaves() -> None:
    keys = ["a1", "b1", "a2", "b2", "a3"]
    policy = filled(LRU(), keys)
    assert choose(policy, entries(keys), PerDevice(b=1)) == ["b1"]
    assert choose(policy, entries(keys), PerDevice(a=2, b=1)) == ["a1", "b1", "a2"]
    assert choose(policy, entries(keys), PerDevice(c=1)) is None
    assert choose(policy, entries(keys), PerDevice(b=0)) == []


class Chain:
    """A room of which each key is released after the next one only: a chain, its end first."""

    def __init__(self, keys: list[str], over: int) -> None:
        self.keys, self.over = list(keys), over

    def short(self) -> bool:
        return self.over > 0

    def release(self, key: str) -> bool:
        if key != self.keys[-1]:
            return False
        self.over -= 1
        del self.keys[-1]
        return True


def test_what_was_passed_over_is_asked_again_when_others_left() -> None:
    assert choose(filled(LRU(), "abcd"), entries("abcd"), Chain(list("abcd"), 3)) == ["d", "c", "b"]


def test_the_newcomer_the_pinned_and_the_unlisted_do_not_leave() -> None:
    policy = filled(LRU(), "abcde")
    there = entries("abce", pinned="b")
    assert choose(policy, there, room(2), newcomer="a") == ["c", "e"]
    assert choose(policy, there, room(3), newcomer="a") is None
    assert choose(policy, there, room(3)) == ["a", "c", "e"]


@pytest.mark.parametrize("name", POLICIES)
def test_neither_looking_nor_a_refusal_changes_anything(name: str) -> None:
    asked, other = (filled(make_policy(name, 100), range(50)) for _ in range(2))
    for policy in (asked, other):
        for key in range(0, 50, 3):
            policy.used(key)
    before = list(asked.order())
    for _ in range(3):
        assert choose(asked, entries(range(50)), room(51), newcomer=99, nbytes=1) is None
        victims = choose(asked, entries(range(50)), room(20), newcomer=99, nbytes=1)
        assert victims == before[:20]
    assert list(asked.order()) == before
    for policy in (asked, other):
        for victim in before[:20]:
            policy.gone(victim, evicted=True)
        filled(policy, range(100, 130))
    assert list(asked.order()) == list(other.order())


def test_expired_keys_leave_first_needed_or_not_unless_they_are_pinned() -> None:
    policy = filled(LRU(), "abcd")
    assert choose(policy, entries("abcd"), room(0), expired=["c", "x"]) == ["c"]
    assert choose(policy, entries("abcd"), room(1), expired=["c"]) == ["c"]
    assert choose(policy, entries("abcd", pinned="c"), room(1), expired=["c"]) == ["a"]
    assert choose(policy, entries("abcd"), room(2), newcomer="c", expired=["c", "d"]) == ["d", "a"]


# --- limits ----------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_that_is_gone_lives_anew_when_it_comes_back() -> None:
    clock = Clock()
    policy = filled(Limits(LRU(), ttl_seconds=10, clock=clock), "ab")
    clock.now = 9
    policy.gone("a")
    policy.added("a", 1)
    policy.used("b")  # a use does not renew
    clock.now = 10
    assert (policy.has_expired("a"), policy.has_expired("b"), list(policy.expired())) == (False, True, ["b"])
    policy.added("b", 1)
    assert not policy.has_expired("b")
    clock.now = 19
    policy.gone("a")
    assert not policy.has_expired("a")
    assert list(policy.expired()) == []
    policy.reset()
    clock.now = 1000
    assert list(policy.expired()) == []


def test_to_the_inner_policy_what_expired_was_not_evicted() -> None:
    clock, inner = Clock(), S3FIFO()
    policy = filled(Limits(inner, ttl_seconds=10, clock=clock), "ab")
    policy.gone("a", evicted=True)
    clock.now = 10
    policy.gone("b", evicted=True)
    filled(policy, "xyab")
    clock.now = 11
    assert list(policy.order()) == ["x", "y", "b", "a"]  # of the two, a is a ghost that came back


def test_a_limit_within_a_limit() -> None:
    clock = Clock()
    inner = Limits(LRU(), ttl_seconds=10, clock=clock)
    policy = filled(Limits(inner, namespace=lambda key: key[0], quota=2), ["a1", "a2", "b1"])
    policy.max_bytes = 100
    there = entries(["a1", "a2", "b1"])

    def ask(key: str) -> list[str] | None:
        return choose(policy, there, room(0), newcomer=key, nbytes=1, expired=policy.expired())

    assert ask("a3") == ["a1"]
    assert ask("b2") == []
    assert choose(policy, there, room(0), newcomer="a3", nbytes=3) is None
    there["a1"].is_pinned = there["a2"].is_pinned = True
    assert ask("a3") is None
    assert ask("a2") == []  # overwritten: it takes no more than before
    there["a1"].is_pinned = there["a2"].is_pinned = False
    clock.now = 10
    assert ask("a3") == ["a1", "a2", "b1"]  # expired ones, and they count for the quota
    assert choose(policy, there, room(3), newcomer="a3", nbytes=1, expired=policy.expired()) == ["a1", "a2", "b1"]
    policy.gone("a1", evicted=True)
    assert policy.used_by("a") == 1


def test_a_namespace_that_raises_changes_nothing() -> None:
    policy = filled(Limits(LRU(), namespace=lambda key: key.split(":")[0], quota=2), ["a:1", "a:2"])
    with pytest.raises(AttributeError):
        choose(policy, entries(["a:1", "a:2"]), room(0), newcomer=7, nbytes=1)
    with pytest.raises(AttributeError):
        policy.added(7, 1)
    assert list(policy.order()) == ["a:1", "a:2"]
    assert policy.used_by("a") == 2
