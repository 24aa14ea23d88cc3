"""PrefixCache with very many prompts: no call may cost more for it, and each block only so much of Python's memory."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from agnostic_cache import KVLayout, PrefixCache
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.state.layout import TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.conftest import Race, Report

BLOCK = 16
FEW = 1000
REST = range(BLOCK - 2)


def prompt(number: int) -> list[int]:
    """A prompt of one block that shares none; all begin with the same token, as a tokenizer's do."""
    return [1, 10 + number, *REST]


def state(leaves: int = 1) -> dict[str, Any]:
    return {f"{i}.key": HostArray.empty((BLOCK, 1), Dtype.FLOAT16) for i in range(leaves)}


def filled(count: int, leaves: int = 1) -> PrefixCache:
    cache = PrefixCache("8GiB", namespace="m", block_size=BLOCK, layout=KVLayout({"*": TOKENS(0)}))
    one = state(leaves)
    for number in range(count):
        cache.insert(prompt(number), one)
    assert cache.stats().entries == count
    return cache


@pytest.fixture(scope="module")
def many(request: pytest.FixtureRequest) -> int:
    """How many prompts; few where nothing is timed."""
    return FEW * 2 if request.config.getoption("benchmark_disable") else FEW * 100


def test_calls_among_many_prompts_that_share_no_block(many: int, race: Race, report: Report) -> None:
    caches = {"few": filled(FEW), "many": filled(many)}
    one, fresh = state(), {name: itertools.count(many) for name in caches}

    def insert(name: str) -> Callable[[], int]:
        return lambda: caches[name].insert(prompt(next(fresh[name])), one)

    def match(name: str, count: int) -> Callable[[], int]:
        numbers = itertools.cycle(range(0, count, 7))

        def found() -> int:
            with caches[name].match([*prompt(next(numbers)), 5]) as match:
                return match.length

        return found

    inserts = {name: insert(name) for name in caches}
    matches = {"few": match("few", FEW), "many": match("many", many)}
    assert [call() for call in inserts.values()] == [1, 1]
    assert [call() for call in matches.values()] == [BLOCK, BLOCK]
    calls: dict[str, Callable[[], object]] = {f"insert {name}": call for name, call in inserts.items()}
    calls |= {f"match {name}": call for name, call in matches.items()}
    calls |= {"stats": caches["many"].stats}
    seconds = race(calls, rounds=400)
    for what in ("insert", "match"):
        report(f"{what} among {many:,} prompts, against {FEW:,}", seconds[f"{what} many"], seconds[f"{what} few"], 1.5)
    report(f"stats of {many:,} blocks", seconds["stats"], None, 1e-3)
    assert caches["many"].stats().entries > many


def test_python_objects_of_a_block(race: Race, report: Report) -> None:
    def nbytes(leaves: int) -> float:
        filled(2, leaves)  # what is imported, or made once
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        cache = filled(FEW, leaves)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert cache.stats().entries == FEW
        return taken / FEW

    one, five = nbytes(1), nbytes(5)
    race({"ours": lambda: None}, rounds=1)
    report("Python objects of a block of one leaf", one, None, 1500, unit="B")
    report("Python objects of each more leaf", (five - one) / 4, None, 250, unit="B")
