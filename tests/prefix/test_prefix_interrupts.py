"""Ctrl-C at every line of match, load, insert and remove: what is there afterwards is right, and nothing is lost."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from interrupts import interrupted_at
from toy_model import LAYOUTS, contents
from toy_model import state_of as computed

from agnostic_cache import PrefixCache

BLOCK = 8


@functools.cache
def known(tokens: tuple[int, ...], kind: str) -> dict[str, Any]:
    return computed(list(tokens), kind, rows=99)


def state_of(tokens: list[int], kind: str = "tokens", **_: int) -> dict[str, Any]:
    """A state of the toy model, computed once: a cache copies what it is given."""
    return known(tuple(tokens), kind)


BUDGETS = {"tokens": 8 * 64, "all": 24 * 64}
SYSTEM = list(range(100, 113))
QUESTION = [*SYSTEM, *range(7)]
OTHER = [*SYSTEM[:10], 5, 5, 5, 5]


def make(kind: str) -> PrefixCache:
    cache = PrefixCache(BUDGETS[kind], namespace="toy", block_size=BLOCK, layout=LAYOUTS[kind], evictor="lru")
    cache.pin(SYSTEM[:8])
    cache.insert(SYSTEM, state_of(SYSTEM, kind, rows=99))
    return cache


def insert(cache: PrefixCache, kind: str) -> None:
    cache.insert(QUESTION, state_of(QUESTION, kind, rows=99))


def load(cache: PrefixCache, _: str) -> None:
    with cache.match([*SYSTEM, 1]) as match:
        match.load()


def claim(cache: PrefixCache, _: str) -> None:
    with cache.match(OTHER, single_flight=True):
        pass


def remove(cache: PrefixCache, _: str) -> None:
    cache.remove(SYSTEM)


CALLS: dict[str, Callable[[PrefixCache, str], None]] = {
    "insert": insert,
    "load": load,
    "claim": claim,
    "remove": remove,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what is raised in finalisers
@pytest.mark.parametrize("kind", ["tokens", "all"])
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_line_leaves_everything_right(call: str, kind: str) -> None:
    line, came_so_far = 0, True
    while came_so_far:
        line += 1
        cache = make(kind)
        came_so_far = interrupted_at(line, lambda cache=cache: CALLS[call](cache, kind))  # type: ignore[misc]
        check(cache, kind, f"{call} of {kind}, line {line}")
    assert line > 100


def check(cache: PrefixCache, kind: str, where: str) -> None:
    """Match, insert, evict, unpin and clear, as if nothing had been."""
    assert hit(cache, [*SYSTEM, 1], kind) <= 13, where
    assert cache.stats().current_bytes <= BUDGETS[kind], where
    cache.insert(QUESTION, state_of(QUESTION, kind, rows=99))
    assert hit(cache, [*QUESTION, 1], kind) == 20, where  # is found again, and no lock or claim is left
    with cache.match(OTHER, single_flight=True):
        pass
    for first in range(5):
        crowd = [5000 + first] * 16
        cache.insert(crowd, state_of(crowd, kind, rows=99))
    assert hit(cache, [*QUESTION, 1], kind) == (8 if kind == "tokens" else 0), where  # what is pinned stays
    assert cache._blocks.states.contains(first_key(cache)), where  # noqa: SLF001
    cache.clear()
    assert cache.stats().entries == cache.stats().current_bytes == 0, where  # nothing is borrowed for ever
    full = list(range(BUDGETS[kind] // 8))
    if kind == "tokens":
        assert cache.insert(full, state_of(full)) == len(full) // 8, where  # the whole budget is there
        assert hit(cache, [*full, 1], kind) == len(full), where


def first_key(cache: PrefixCache) -> bytes:
    prompt: Any = cache._prompt(SYSTEM[:8], b"", None, 0, ())  # noqa: SLF001
    return bytes(next(prompt.cut(BLOCK))[0])


def hit(cache: PrefixCache, tokens: list[int], kind: str) -> int:
    with cache.match(tokens) as match:
        if match:
            assert contents(match.load(), kind) == contents(state_of(tokens[: match.length], kind), kind)
        return match.length
