"""StateCache with real tensors: what is freed is seen to be free."""

from typing import Any

import pytest
import torch
from peak import RESET, peak_bytes
from stress import check, survive
from torch_subject import live_bytes

from agnostic_cache import StateCache
from agnostic_cache.errors import BorrowViolationError, UnsupportedArrayError
from agnostic_cache.eviction import PutStatus
from agnostic_cache_adapters.torch import on_evict

LAYER = 2 * 1 * 2 * 16 * 8 * 4  # bytes of keys and values


def kv(layers: int = 2, value: float = 0.0) -> dict[str, list[dict[str, torch.Tensor]]]:
    def one() -> torch.Tensor:
        return torch.full((1, 2, 16, 8), value)

    return {"layers": [{"key": one(), "value": one()} for _ in range(layers)]}


def write(state: Any) -> None:
    """What generation with fixed buffers does to the state that it is given."""
    for layer in state["layers"]:
        layer["key"].add_(1)
        layer["value"].zero_()


def same(state: Any, value: float) -> bool:
    return all(bool((tensor == value).all()) for layer in state["layers"] for tensor in layer.values())


@pytest.mark.parametrize("move", [False, True])
def test_eviction_frees_the_storages(*, move: bool) -> None:
    before = live_bytes()
    cache = StateCache(4 * LAYER)
    for key in range(5):
        assert cache.put(key, kv(value=float(key)), move=move) is PutStatus.LEGAL
        assert live_bytes() - before == cache.current_bytes == min(key + 1, 2) * 2 * LAYER
    cache.remove(4)
    assert live_bytes() - before == cache.current_bytes == 2 * LAYER
    cache.clear()
    assert live_bytes() == before


def test_what_get_gives_may_be_written() -> None:
    cache = StateCache("1MiB")
    state = kv(value=1.0)
    cache.put("a", state)
    write(state)
    for _ in range(3):
        mine = cache.get("a")
        assert same(mine, 1.0)
        write(mine)


def test_what_is_borrowed_is_the_memory_of_the_entry() -> None:
    cache = StateCache("1MiB")
    state = kv()
    pointers = [tensor.data_ptr() for layer in state["layers"] for tensor in layer.values()]
    cache.put("a", state, move=True)
    del state
    with cache.borrow("a") as lent:
        assert [tensor.data_ptr() for layer in lent["layers"] for tensor in layer.values()] == pointers  # type: ignore[index]
    mine: Any = cache.pop("a")
    assert [tensor.data_ptr() for layer in mine["layers"] for tensor in layer.values()] == pointers


def test_memory_is_free_on_the_last_return() -> None:
    before = live_bytes()
    cache = StateCache("1MiB")
    cache.put("a", kv(value=2.0))
    with cache.borrow("a") as lent:
        cache.remove("a")
        assert same(lent, 2.0)
        assert cache.stats().deferred_bytes == live_bytes() - before == 2 * LAYER
        del lent
    assert live_bytes() == before


def test_a_view_counts_as_what_it_keeps_alive() -> None:
    slab = torch.zeros(8, 1024)
    cache = StateCache("1MiB")
    cache.put("moved", {"a": slab[0], "b": slab[1, ::2]}, move=True)
    assert cache.current_bytes == slab.nbytes
    cache.put("copied", {"a": slab[2], "b": slab[3, ::2]})
    assert cache.current_bytes == slab.nbytes + 4096 + 2048
    del slab
    cache.remove("moved")
    assert cache.current_bytes == 4096 + 2048


def test_views_of_one_storage_in_two_entries_count_once() -> None:
    before = live_bytes()
    slab = torch.zeros(2, 1024)
    cache = StateCache("1MiB")
    cache.put("a", {"x": slab[0]}, move=True)
    cache.put("b", {"x": slab[1]}, move=True)
    del slab
    assert cache.current_bytes == 8192
    cache.remove("a")
    assert live_bytes() - before == cache.current_bytes == 8192
    mine: Any = cache.pop("b")
    assert mine["x"].untyped_storage().nbytes() == 8192
    del mine
    assert live_bytes() == before


def test_who_pops_does_not_write_to_another_entry() -> None:
    cache = StateCache("1MiB")
    shared = torch.ones(64)
    cache.put("a", {"x": shared}, move=True)
    cache.put("b", {"x": shared}, move=True)
    mine: Any = cache.pop("a")
    mine["x"].zero_()
    assert bool((cache.get("b")["x"] == 1).all())  # type: ignore[index]


@pytest.mark.parametrize("move", [False, True])
def test_a_tensor_that_cannot_be_kept_changes_nothing(*, move: bool) -> None:
    cache = StateCache(2 * LAYER)
    cache.put("a", kv())
    before = cache.stats()
    with pytest.raises(UnsupportedArrayError):
        cache.put("a", {"x": torch.ones(3), "y": torch.ones(3, requires_grad=True)}, move=move)
    assert cache.stats() == before
    assert same(cache.get("a"), 0.0)


def test_debug_finds_a_write_in_place() -> None:
    cache = StateCache("1MiB", debug=True)
    cache.put("a", kv())
    with pytest.raises(BorrowViolationError), cache.borrow("a") as lent:
        write(lent)
    assert not cache.contains("a")
    assert cache.current_bytes == 0


def test_on_evict_frees_what_leaves() -> None:
    before = live_bytes()
    freed: list[int] = []
    cache = StateCache(2 * LAYER, on_evict=lambda state: freed.append(on_evict(state)))
    for _ in range(3):
        cache.put("a", kv())
        cache.put("b", kv())
    assert freed == [2 * LAYER] * 5
    assert live_bytes() - before == 2 * LAYER


@pytest.mark.skipif(not RESET.exists(), reason="the kernel does not tell")
def test_a_put_takes_one_copy_and_no_more() -> None:
    state = {"layers": [{"key": torch.ones(1 << 20), "value": torch.ones(1 << 20)} for _ in range(8)]}
    nbytes = 16 << 22
    cache = StateCache(2 * nbytes)
    cache.put("warm", kv())
    assert peak_bytes(lambda: cache.put("a", state)) < 1.1 * nbytes
    assert peak_bytes(lambda: cache.put("a", state)) < 0.1 * nbytes  # the old one makes room first
    assert peak_bytes(lambda: cache.put("b", state, move=True)) < 0.1 * nbytes
    assert cache.current_bytes == 2 * nbytes


def test_threads_read_what_others_evict() -> None:
    check(survive("stress_torch"))
