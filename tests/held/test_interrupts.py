"""StateCache: Ctrl-C at any line, and a policy that raises anywhere, cost nothing.

Each call is made again and again, interrupted at its first line, its second, and so on. Afterwards the next call has
freed what left, and bytes, pins, keys and the order of use are what they were before the call or what it makes them.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from host_memory import HostMemory, fills

import agnostic_cache
from agnostic_cache.eviction import Policy, PutStatus

LEGAL = PutStatus.LEGAL
PACKAGE = str(Path(agnostic_cache.__file__).parent)
SIZE, COUNT = 64, 4
LETTERS = "abcd"


class World:
    """A full cache of four entries, of which `b` is pinned, and `a` was used last."""

    def __init__(self, evictor: str | Policy, *, on_evict: bool = False) -> None:
        self.memory = HostMemory()
        self.left: list[int | None] = []  # what on_evict was given
        leave = (lambda state: self.left.extend(fills(state))) if on_evict else None
        self.cache = self.memory.cache(LETTERS, SIZE * COUNT, evictor=evictor, on_evict=leave)
        self.cache.pin("b")
        self.cache.get("a")
        self.value: Any = None

    def put(self, key: str, nbytes: int = 2 * SIZE, *, move: bool = False) -> None:
        self.value = self.memory.state(nbytes, fill=1)
        try:
            self.cache.put(key, self.value, move=move)
        finally:
            self.value = None

    def check(self, *orders: str) -> None:
        """Look whether all is well, and whether the keys leave in one of these orders, what is pinned last."""
        cache, memory = self.cache, self.memory
        assert cache.current_size() == sum(map(cache.contains, [*LETTERS, "new"]))
        stats = cache.stats()
        assert stats.current_bytes == memory.live_bytes() == cache.current_bytes
        assert (stats.deferred_bytes, stats.borrowed_bytes) == (0, 0)
        assert len(set(self.left)) == len(self.left)
        assert " ".join(self.order()) in orders
        cache.clear()
        assert memory.live_bytes() == cache.current_bytes == 0
        assert cache.put("all", memory.state(SIZE * COUNT)) is LEGAL
        assert memory.live_bytes() == cache.current_bytes == SIZE * COUNT

    def order(self) -> list[str]:
        """Evict everything, and return the keys in the order in which they left; what is pinned last."""
        cache, there = self.cache, [key for key in (*LETTERS, "new") if self.cache.contains(key)]
        order: list[str] = []
        for i in range(COUNT):
            assert cache.put(i, self.memory.state(SIZE), move=True) is LEGAL
            order += [key for key in there if key not in order and not cache.contains(key)]
        pinned = [key for key in there if key not in order]
        assert pinned in ([], ["b"])
        return order + pinned


def interrupts(make: Callable[[], World], call: Callable[[World], object]) -> Iterator[World]:
    """Yield a world for each line that a call of the package runs, in which the call was interrupted there."""
    left = at = 0  # lines to go

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            left -= 1
            if not left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    while left <= 0:
        at += 1
        world, left = make(), at
        sys.settrace(trace)
        try:
            call(world)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        if left <= 0:
            yield world
    assert at > 20


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in a finaliser goes nowhere but here."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


def borrow(world: World) -> None:
    with world.cache.borrow("d"):
        pass


def borrow_and_remove(world: World) -> None:
    with world.cache.borrow("d", raw=True):
        world.cache.remove("d")


def unpin(world: World) -> None:
    world.cache.unpin("b")
    world.cache.pin("b")


def pin_for_a_while(world: World) -> None:
    world.cache.pin_all(["b", "x"], ttl_seconds=60)


BEFORE = "c d a b"
CALLS: dict[str, tuple[Callable[[World], object], list[str]]] = {  # and the orders that an interrupt may leave behind
    "put": (lambda world: world.put("new"), ["a b", "a new b"]),
    "move": (lambda world: world.put("new", move=True), ["a new b"]),
    "overwrite": (lambda world: world.put("d"), ["a b", "a d b"]),
    "overwrite a pinned key": (lambda world: world.put("b"), ["d a", "d a b"]),
    "overwrite and move": (lambda world: world.put("d", move=True), ["a d b"]),
    "be refused": (lambda world: world.put("new", SIZE * COUNT), []),
    "get": (lambda world: world.cache.get("d"), ["c a d b"]),
    "miss": (lambda world: world.cache.get("x"), []),
    "pop": (lambda world: world.cache.pop("d"), ["c a b"]),
    "remove": (lambda world: world.cache.remove("d"), ["c a b"]),
    "clear": (lambda world: world.cache.clear(), [""]),
    "borrow": (borrow, ["c a d b"]),
    "borrow and remove": (borrow_and_remove, ["c a d b", "c a b"]),
    "borrow all": (lambda world: world.cache.borrow_all(["d", "c"]).close(), ["d a c b", "a c d b"]),
    "stats": (lambda world: world.cache.stats(), []),
    "pin": (pin_for_a_while, []),
    "unpin": (unpin, ["b c d a"]),
}


@pytest.mark.filterwarnings("ignore:a borrow of:ResourceWarning")
@pytest.mark.parametrize("evictor", ["lru", "adaptive"])
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_line_costs_nothing(evictor: str, call: str) -> None:
    do, orders = CALLS[call]
    for world in interrupts(lambda: World(evictor), do):
        world.check(BEFORE, *orders)


@pytest.mark.parametrize("call", ["move", "overwrite", "remove", "pop"])
def test_an_interrupt_gives_no_value_to_on_evict_twice(call: str) -> None:
    do, orders = CALLS[call]
    for world in interrupts(lambda: World("lru", on_evict=True), do):
        world.check(BEFORE, *orders)
