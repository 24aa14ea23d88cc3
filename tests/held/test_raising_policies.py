"""StateCache: a policy that raises, wherever it does, costs nothing: the cache is as it was."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from host_memory import HostMemory, check, keys

from agnostic_cache import StateCache
from agnostic_cache.eviction import Policy, PutStatus, Room
from agnostic_cache.eviction.lru import LRU

LEGAL = PutStatus.LEGAL


class Fault(Exception):  # noqa: N818 - a fault of the test's own, not an error
    """What a policy raises."""


class Raising(LRU):
    """LRU that raises in one of its methods, before or after that did its work."""

    method, after = "", False

    def _do(self, method: str, do: Callable[[], Any]) -> Any:
        if method == self.method and not self.after:
            raise Fault
        done = do()
        if method == self.method:
            raise Fault
        return done

    def reset(self) -> None:
        self._do("reset", super().reset)

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
        self._do("added", lambda: LRU.added(self, key, nbytes, cost))

    def used(self, key: Any) -> None:
        self._do("used", lambda: LRU.used(self, key))

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        self._do("gone", lambda: LRU.gone(self, key, evicted=evicted))

    def order(self) -> Iterator[Any]:
        yield from self._do("order", lambda: list(LRU.order(self)))

    def has_expired(self, key: Any) -> bool:  # noqa: ARG002
        return bool(self._do("has_expired", lambda: False))

    def expired(self) -> list[Any]:
        return list(self._do("expired", list))

    def narrow(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, room: Room, *args: Any
    ) -> Room:
        found: Room = self._do("narrow", lambda: LRU.narrow(self, room, *args))
        return found


def borrow(cache: StateCache, _: HostMemory) -> None:
    with cache.borrow("c", raw=True):
        pass


CALLS: dict[str, Callable[[StateCache, HostMemory], object]] = {
    "put": lambda cache, memory: cache.put("e", memory.state(128)),
    "move": lambda cache, memory: cache.put("e", memory.state(128), move=True),
    "overwrite": lambda cache, memory: cache.put("c", memory.state(128)),
    "get": lambda cache, _: cache.get("c"),
    "borrow": borrow,
    "borrow all": lambda cache, _: cache.borrow_all(["c", "d"]).close(),
    "pop": lambda cache, _: cache.pop("c"),
    "remove": lambda cache, _: cache.remove("c"),
    "clear": lambda cache, _: cache.clear(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("method", ["added", "used", "gone", "order", "has_expired", "expired", "narrow"])
@pytest.mark.parametrize("after", [False, True])
def test_a_policy_that_raises_costs_nothing(memory: HostMemory, call: str, method: str, *, after: bool) -> None:
    policy = Raising()
    cache = memory.cache("abcd", evictor=policy)
    cache.pin("b")
    cache.get("a")
    policy.after, policy.method = after, method
    raised = False
    for _ in range(3):
        try:
            CALLS[call](cache, memory)
        except Fault:
            raised = True
        if not raised:
            return  # this call does not ask that
    policy.method = ""
    assert keys(cache) == "abcd"
    check(cache, memory)
    assert cache.stats().borrowed_bytes == 0
    order = []
    for i in range(3):
        assert cache.put(i, memory.state(64), move=True) is LEGAL
        order += [key for key in "acd" if not cache.contains(key) and key not in order]
    assert "".join(order) in {"cda", "dac", "cad"}  # a use may have counted before the policy raised
    assert cache.contains("b")
    cache.clear()
    assert cache.put("all", memory.state(256)) is LEGAL
    check(cache, memory)


def test_a_policy_that_raises_while_it_learns_anew_is_asked_again(memory: HostMemory) -> None:
    policy = Raising()
    cache = memory.cache("abcd", evictor=policy)
    policy.method = "added"
    with pytest.raises(Fault):
        cache.put("e", memory.state(64))
    for _ in range(2):  # it has not learnt yet
        with pytest.raises(Fault):
            cache.get("a")
    assert cache.stats().entries == 4  # which asks no policy
    policy.method = ""
    assert cache.put("e", memory.state(64)) is LEGAL
    assert keys(cache) == "bcde"
    check(cache, memory)


def test_a_policy_of_a_users_own_that_only_knows_some_keys(memory: HostMemory) -> None:
    class Namespaces(LRU):
        def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
            key.split(":")  # an int has none
            super().added(key, nbytes, cost)

    cache = StateCache(256, adapter=memory, evictor=Namespaces())
    cache.put("user:1", memory.state(64))
    for _ in range(5):
        with pytest.raises(AttributeError):
            cache.put(7, memory.state(64))
    assert cache.put("user:2", memory.state(192)) is LEGAL
    assert cache.current_size() == 2
    check(cache, memory)


def test_policies_are_abstract() -> None:
    with pytest.raises(TypeError):
        Policy()  # type: ignore[abstract]
