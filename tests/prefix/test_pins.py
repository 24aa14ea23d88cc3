"""Pins on prompts: they are the prompt's, before it is there, while it is continued, until they are taken back."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import LAYOUTS, contents, state_of

from agnostic_cache import PrefixCache
from agnostic_cache.errors import PinLimitError

BLOCK, ROW = 8, 8
SYSTEM = list(range(100, 113))  # a block and five tokens


def make(blocks: int = 8, kind: str = "tokens", **settings: Any) -> PrefixCache:
    return PrefixCache(blocks * 64, **{"namespace": "toy", "block_size": BLOCK, "layout": LAYOUTS[kind], **settings})


def insert(cache: PrefixCache, tokens: list[int], kind: str = "tokens") -> int:
    return cache.insert(tokens, state_of(tokens, kind))


def left(cache: PrefixCache, tokens: list[int] = SYSTEM, kind: str = "tokens") -> int:
    with cache.match([*tokens, 1]) as match:
        if match:
            assert contents(match.load(), kind) == contents(state_of([*tokens, 1][: match.length], kind), kind)
        return match.length


def crowd(cache: PrefixCache) -> None:
    """Insert more than the budget holds."""
    for first in range(30):
        insert(cache, [5000 + first] * 16)


@pytest.mark.parametrize("order", ["before", "after", "continued"])
def test_a_pinned_prompt_stays_whenever_it_is_pinned_and_continued(order: str) -> None:
    cache = make()
    if order == "before":
        assert cache.pin(SYSTEM) == 0
    else:
        insert(cache, SYSTEM if order == "after" else [*SYSTEM, *range(20)])
        assert cache.pin(SYSTEM) == 13
    insert(cache, [*SYSTEM, *range(7)])
    insert(cache, [*SYSTEM, *range(50, 57)])
    crowd(cache)
    assert left(cache) == 13
    assert cache.stats().current_bytes <= 8 * 64
    assert left(cache, [*SYSTEM, *range(7)]) == 13  # what goes on from it is not pinned
    assert cache.unpin(SYSTEM) == 13
    crowd(cache)
    assert left(cache) == 0


def test_as_many_unpins_as_pins() -> None:
    cache = make()
    insert(cache, SYSTEM)
    assert cache.pin(SYSTEM) == cache.pin(SYSTEM) == 13
    cache.unpin(SYSTEM)
    insert(cache, [*SYSTEM, *range(7)])
    crowd(cache)
    assert left(cache) == 13
    cache.unpin(SYSTEM)
    crowd(cache)
    assert left(cache) == 0
    assert cache.unpin(SYSTEM) == 0  # nothing to take back


def test_a_pin_ends_when_its_time_is_over() -> None:
    now = 0.0
    cache = make(clock=lambda: now)
    insert(cache, [*SYSTEM, *range(7)])
    cache.pin(SYSTEM, ttl_seconds=300)
    now = 299.0
    crowd(cache)
    assert left(cache) == 13
    now = 300.0
    crowd(cache)
    assert left(cache) == 0


@pytest.mark.parametrize(("at", "entries"), [(299.0, 4), (300.0, 3)])
def test_the_end_of_a_prompt_is_kept_apart_while_it_is_pinned(at: float, entries: int) -> None:
    now = 0.0
    cache = make(clock=lambda: now)
    cache.pin(SYSTEM, ttl_seconds=300)
    now = at
    assert insert(cache, [*SYSTEM, *range(7)]) == 3
    assert cache.stats().entries == entries


def test_clear_ends_pins() -> None:
    cache = make()
    insert(cache, SYSTEM)
    cache.pin(SYSTEM)
    cache.clear()
    insert(cache, [*SYSTEM, *range(7)])
    crowd(cache)
    assert left(cache) == 0


def test_a_pin_outlives_remove() -> None:
    cache = make()
    insert(cache, SYSTEM)
    cache.pin(SYSTEM)
    assert cache.remove(SYSTEM) == 13
    assert left(cache) == 0
    insert(cache, SYSTEM)
    crowd(cache)
    assert left(cache) == 13


def test_pins_take_half_of_the_budget_at_most() -> None:
    cache = make(blocks=8)
    prompt = list(range(40))
    insert(cache, prompt)
    before = cache.stats()
    with pytest.raises(PinLimitError):
        cache.pin(prompt)
    assert cache.stats() == before
    crowd(cache)
    assert left(cache, prompt) == 0  # nothing of it was pinned
    assert cache.pin(prompt[:32]) == 0
    assert insert(cache, prompt[:32]) == 4
    crowd(cache)
    assert left(cache, prompt[:32]) == 32
    cache.pin([7] * 8)
    with pytest.raises(PinLimitError):
        insert(cache, [7] * 9)
    assert left(cache, prompt[:32]) == 32
    assert cache.stats().current_bytes <= 8 * 64


@pytest.mark.parametrize("kind", ["window", "snapshot", "all"])
def test_the_end_of_a_pinned_prompt_stays_whatever_its_leaves(kind: str) -> None:
    cache = make(32, kind)
    insert(cache, SYSTEM, kind)
    assert cache.pin(SYSTEM) == 13
    insert(cache, [*SYSTEM, *range(7)], kind)
    for first in range(40):
        insert(cache, [5000 + first] * 16, kind)
    assert left(cache, SYSTEM, kind) == 13


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["pin", "unpin", "insert", "crowd", "match"]), st.integers(1, 13)), max_size=12)
)
def test_what_is_pinned_and_was_stored_is_there(steps: list[tuple[str, int]]) -> None:
    cache = make(blocks=16)
    pins = dict.fromkeys(range(1, 14), 0)
    there: dict[int, bool] = dict.fromkeys(pins, False)  # pinned, and stored since
    for what, length in steps:
        prompt = SYSTEM[:length]
        if what == "pin":
            there[length] |= cache.pin(prompt) == length
            pins[length] += 1
        elif what == "unpin":
            cache.unpin(prompt)
            pins[length] = max(0, pins[length] - 1)
        elif what == "insert":
            insert(cache, [*prompt, 7, 7])
            there |= {n: True for n, count in pins.items() if count and n <= length}
        elif what == "crowd":
            crowd(cache)
        for n, count in pins.items():
            if count and there[n]:
                assert left(cache, SYSTEM[:n]) == n
            there[n] = there[n] and count > 0
        assert cache.stats().current_bytes <= 16 * 64
