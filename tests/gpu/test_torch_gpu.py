"""PyTorch on a CUDA device: memory is free before the call returns, and never under a kernel that reads it."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from agnostic_cache import KVLayout, KVState, StateCache, wrap
from agnostic_cache.eviction import PutStatus
from agnostic_cache.state.layout import TOKENS
from agnostic_cache_adapters.torch import WATERMARK_BYTES

ROWS = 4096
NBYTES = 2 * ROWS * 1024 * 4
"""Bytes of a state: 32 MiB."""
CYCLES = 200_000_000
"""Of a kernel that does nothing, for about a tenth of a second."""
LAYOUT = KVLayout({"*": TOKENS(1)})


@pytest.fixture(autouse=True)
def nothing_else() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield
    torch.cuda.synchronize()


def kv(value: float = 0.0, rows: int = ROWS) -> dict[str, torch.Tensor]:
    return {name: torch.full((1, rows, 1024), value, device="cuda") for name in "kv"}


def allocated() -> int:
    return torch.cuda.memory_allocated()


def wait() -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]  # noqa: SLF001 - a kernel that only takes time


def stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def scribble() -> list[torch.Tensor]:
    """Take what memory is free on the main stream, and write to it."""
    return [torch.full((1, ROWS, 1024), -1.0, device="cuda") for _ in range(8)]


# --- freeing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", [False, True])
def test_the_memory_of_what_is_evicted_is_free_when_put_returns(*, move: bool) -> None:
    before = allocated()
    cache = StateCache(2 * NBYTES)
    for key in range(5):
        assert cache.put(key, kv(key), move=move) is PutStatus.LEGAL
        assert allocated() - before == cache.current_bytes == min(key + 1, 2) * NBYTES
    cache.remove(4)
    assert allocated() - before == NBYTES
    cache.clear()
    assert allocated() == before


def test_what_is_borrowed_is_free_on_the_last_return() -> None:
    before = allocated()
    cache = StateCache(NBYTES)
    cache.put("a", kv(2.0), move=True)
    with cache.borrow("a") as lent:
        cache.remove("a")
        assert allocated() - before == NBYTES
        assert bool((lent["k"] == 2).all())  # type: ignore[index]
        del lent
    assert allocated() == before


def test_more_than_the_watermark_goes_back_to_the_device() -> None:
    states = WATERMARK_BYTES // NBYTES + 4
    cache = StateCache(states * NBYTES)
    for key in range(states):
        cache.put(key, kv(), move=True)
    cache.clear()
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() <= WATERMARK_BYTES


def test_the_budget_is_of_the_device() -> None:
    cache = StateCache({"cuda:0": NBYTES, "cpu": 1})
    assert cache.put("a", kv()) is PutStatus.LEGAL
    assert cache.put("b", {"x": torch.zeros(8)}) is PutStatus.ILLEGAL


# --- while kernels read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["remove", "evict"])
def test_a_kernel_in_flight_reads_what_it_was_given(end: str) -> None:
    cache = StateCache(NBYTES)
    cache.put("a", kv(3.0), move=True)
    with cache.borrow("a") as lent:
        wait()
        total = lent["k"].sum()  # type: ignore[index]
        del lent
    if end == "remove":
        cache.remove("a")
    else:
        cache.put("b", kv(4.0), move=True)
    rubbish = scribble()
    assert float(total) == 3.0 * ROWS * 1024
    del rubbish


READS: dict[str, Callable[[StateCache, torch.Tensor], None]] = {}


def reads(read: Callable[[StateCache, torch.Tensor], None]) -> Callable[[StateCache, torch.Tensor], None]:
    READS[read.__name__] = read
    return read


@reads
def borrow(cache: StateCache, into: torch.Tensor) -> None:
    with cache.borrow("a") as lent:
        wait()
        into.copy_(lent["k"])  # type: ignore[index]


@reads
def borrow_raw(cache: StateCache, into: torch.Tensor) -> None:
    with cache.borrow("a", raw=True) as lent:
        wait()
        into.copy_(lent.unwrap()["k"])  # type: ignore[union-attr]


@reads
def get(cache: StateCache, into: torch.Tensor) -> None:
    wait()
    into.copy_(cache.get("a")["k"])  # type: ignore[index]


@reads
def cut(cache: StateCache, into: torch.Tensor) -> None:
    with cache.borrow("a", raw=True) as lent:
        wait()
        into.copy_(lent.cut(0, ROWS).leaves["k"].array)  # type: ignore[union-attr]


@reads
def fill(cache: StateCache, into: torch.Tensor) -> None:
    with cache.borrow("a", raw=True) as lent:
        wait()
        lent.unwrap(like={"k": into, "v": torch.empty_like(into)})  # type: ignore[union-attr]


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_another_stream_that_reads_is_waited_for(read: Callable[[StateCache, torch.Tensor], None]) -> None:
    cache, side = StateCache(NBYTES), stream()
    into = torch.zeros(1, ROWS, 1024, device="cuda")
    cache.put("a", wrap(kv(3.0), layout=LAYOUT) if read is not borrow and read is not get else kv(3.0), move=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        read(cache, into)
    assert not side.query()  # it reads still
    cache.remove("a")
    rubbish = scribble()
    torch.cuda.synchronize()
    assert bool((into == 3).all())
    del rubbish


# --- to the host -----------------------------------------------------------------------------------------------------


def test_host_memory_is_pinned_and_equal() -> None:
    state = wrap({"k": torch.randn(1, 64, 32, device="cuda"), "v": torch.randn(1, 64, 32, device="cuda")[:, ::2]})
    host = state.to("host")
    back = host.to("torch", device="cuda:0").unwrap()
    for name, leaf in state.leaves.items():
        array = host.leaves[name].array
        assert torch.frombuffer(array.memory, dtype=torch.uint8).is_pinned()
        assert torch.equal(back[name], leaf.array)


def test_a_copy_to_the_host_waits_for_what_computes_it_and_for_no_other_stream() -> None:
    state, busy = kv(0.0), stream()
    with torch.cuda.stream(busy):
        for _ in range(20):
            wait()
    wait()
    for tensor in state.values():
        tensor.fill_(5)
    host = wrap(state).to("host")
    assert not busy.query()
    assert {name: leaf.array.memory[:4].tobytes() for name, leaf in host.leaves.items()} == dict.fromkeys(
        "kv", b"\x00\x00\xa0@"
    )


def test_a_copy_to_the_host_runs_at_the_speed_of_pinned_memory() -> None:
    def plain() -> None:
        pinned.copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()

    def ours() -> None:
        state.to("host")

    tensor = torch.zeros(64 << 20, device="cuda")
    pinned = torch.empty(tensor.shape, pin_memory=True)
    state = wrap({"x": tensor}).copy()
    best: dict[str, float] = {}
    for _ in range(10):
        for call in (plain, ours):
            begin = time.perf_counter()
            call()
            best[call.__name__] = min(best.get(call.__name__, 1e9), time.perf_counter() - begin)
    assert best["plain"] / best["ours"] > 0.7


# --- what holds everywhere -------------------------------------------------------------------------------------------


def test_rows_are_cut_joined_and_filled_in_place() -> None:
    state = wrap({"k": torch.randn(1, 11, 8, device="cuda")}, layout=LAYOUT)
    joined = KVState.join([state.cut(0, 4), state.cut(4, 11)])
    buffer = torch.zeros(1, 16, 8, device="cuda")
    filled: Any = joined.unwrap(like={"k": buffer})
    assert filled["k"].data_ptr() == buffer.data_ptr()
    assert torch.equal(filled["k"][:, :11], state.leaves["k"].array)
    assert not bool(filled["k"][:, 11:].any())
