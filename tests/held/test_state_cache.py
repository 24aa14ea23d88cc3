"""StateCache: what goes in, what comes out, and whose it is. In host memory, without a framework."""

from collections.abc import Sequence
from typing import Any

import pytest
from host_memory import Forking, Growing, HostMemory, check, fills, found, keys, letter

from agnostic_cache import Cache, KVState, StateCache, wrap
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.errors import (
    BorrowedError,
    InvalidKeyError,
    InvalidSizeError,
    LeaseUsedError,
    ReleasedError,
    UnknownPolicyError,
    UnknownValueError,
)
from agnostic_cache.eviction import PutStatus
from agnostic_cache.state.kv_state import Ownership
from agnostic_cache.state.layout import TOKENS, KVLayout

LEGAL, ILLEGAL = PutStatus.LEGAL, PutStatus.ILLEGAL


def test_is_a_cache_and_starts_empty() -> None:
    cache = StateCache("1KiB")
    assert isinstance(cache, Cache)
    assert (cache.current_size(), cache.current_bytes) == (0, 0)
    assert set(cache.stats()) == {0}


@pytest.mark.parametrize("max_bytes", [0, -1, "much", "", "1KB and more", 1.5, None, True, {"host": "0B"}])
def test_a_budget_that_is_no_size_is_refused(max_bytes: Any) -> None:
    with pytest.raises(InvalidSizeError):
        StateCache(max_bytes)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UnknownPolicyError):
        StateCache(64, evictor="unheard of")


# --- in and out ------------------------------------------------------------------------------------------------------


def test_put_copies(memory: HostMemory) -> None:
    cache = StateCache(1024, adapter=memory)
    state = memory.state(64, 64, fill=1)
    assert cache.put("a", state) is LEGAL
    check(cache, memory, elsewhere=128)
    state["0"].memory[0] = 9
    assert fills(cache.get("a")) == [1, 1]
    assert fills(state) == [None, 1]
    del state
    check(cache, memory)


def test_what_is_copied_is_compact(memory: HostMemory) -> None:
    cache = StateCache(1024, adapter=memory)
    slab = HostArray.empty_block([((64,), memory.array(1).dtype)] * 8)
    cache.put("copied", {"a": slab[0]})
    assert cache.current_bytes == 64
    cache.put("moved", {"a": slab.pop()}, move=True)
    assert cache.current_bytes == 64 + 512  # it keeps the whole block alive


def test_put_moves(memory: HostMemory) -> None:
    cache = StateCache(1024, adapter=memory)
    state = memory.state(64, 64, fill=1)
    arrays = list(state.values())
    assert cache.put("a", state, move=True) is LEGAL
    assert memory.copies == 0
    with cache.borrow("a") as lent:
        assert list(found(lent).values()) == arrays
        assert lent is not state
    del state, arrays, lent
    check(cache, memory)


def test_get_gives_a_state_of_ones_own(memory: HostMemory) -> None:
    cache = memory.cache("a")
    mine = found(cache.get("a"))
    check(cache, memory, elsewhere=64)
    mine["0"].memory[:] = bytes(64)
    assert letter(cache.get("a")) == "a"


def test_get_gives_a_fork_where_the_container_never_writes_in_place() -> None:
    memory = Forking()
    cache = StateCache(1024, adapter=memory)
    cache.put("a", Growing(memory.array(64, 7)))
    assert memory.copies == 1
    mine, yours = found(cache.get("a")), found(cache.get("a"))
    assert memory.copies == 1
    assert mine is not yours
    assert mine.array is yours.array
    mine.array = memory.array(64, 8)
    assert yours.array.memory[0] == found(cache.get("a")).array.memory[0] == 7


def test_borrow_lends_the_arrays_in_fresh_containers(memory: HostMemory) -> None:
    cache = memory.cache("a")
    with cache.borrow("a") as one, cache.borrow("a") as other:
        assert letter(one) == "a"
        assert one is not other
        assert found(one)["0"] is found(other)["0"]
        found(one).clear()
    assert letter(cache.get("a")) == "a"
    check(cache, memory)


def test_a_raw_borrow_is_a_state_that_ends_with_its_block(memory: HostMemory) -> None:
    cache = memory.cache("a")
    with cache.borrow("a", raw=True) as state:
        assert isinstance(state, KVState)
        assert state.nbytes == 64
        assert state.ownership is Ownership.BORROWED
        assert letter(state.unwrap()) == "a"
    for use in (state.unwrap, state.copy, state.fork, state.move, state.storages, lambda: state.leaves):
        with pytest.raises(ReleasedError):
            use()
    with pytest.raises(ReleasedError):
        cache.put("b", state)
    assert state.release() == 0
    assert letter(cache.get("a")) == "a"


def test_releasing_a_raw_borrow_frees_nothing(memory: HostMemory) -> None:
    cache = memory.cache("a")
    with cache.borrow("a", raw=True) as state:
        assert found(state).release() == 0
    assert letter(cache.get("a")) == "a"


def test_a_borrow_ends_when_its_block_raises(memory: HostMemory) -> None:
    cache = memory.cache("a")
    with pytest.raises(ZeroDivisionError), cache.borrow("a", raw=True) as state:
        raise ZeroDivisionError
    with pytest.raises(ReleasedError):
        found(state).unwrap()
    assert cache.stats().borrowed_bytes == 0


def test_pop_moves_out(memory: HostMemory) -> None:
    cache = memory.cache("ab")
    with cache.borrow("a") as lent:
        array = found(lent)["0"]
    state = found(cache.pop("a"))
    assert state["0"] is array
    assert keys(cache) == "b"
    check(cache, memory, elsewhere=64)
    del state, array, lent
    check(cache, memory)


def test_pop_refuses_what_somebody_borrows(memory: HostMemory) -> None:
    cache = memory.cache("a")
    with cache.borrow("a", raw=True):
        with pytest.raises(BorrowedError):
            cache.pop("a")
        assert keys(cache) == "a"
    assert letter(cache.pop("a")) == "a"
    check(cache, memory)


def test_what_is_not_there_is_none(memory: HostMemory) -> None:
    cache = memory.cache("a")
    assert cache.get("b") is None
    assert cache.pop("b") is None
    for raw in (False, True):
        with cache.borrow("b", raw=raw) as state:
            assert state is None
    assert not cache.remove("b")
    assert not cache.contains("b")
    assert not cache.pin("b")
    assert not cache.unpin("b")
    assert cache.stats().misses == 4


def test_native_in_native_out(memory: HostMemory) -> None:
    cache = StateCache(1024, adapter=memory)
    array = memory.array(64, 3)
    native = {"layers": [(array, None), {"x": array}], "step": 4}
    for move in (False, True):
        cache.put("a", native, move=move)
        with cache.borrow("a") as lent:
            for state in (found(cache.get("a")), found(lent)):
                assert state["layers"][0] == (state["layers"][1]["x"], None)
                assert (type(state["layers"][0]), state["step"]) == (tuple, 4)
        assert cache.current_bytes == 64
    assert found(cache.pop("a"))["layers"][0][0] is array


def test_a_kvstate_in_gives_kvstates_out(memory: HostMemory) -> None:
    cache = StateCache(1024)
    layout = KVLayout({"0": TOKENS(0)})
    cache.put("a", wrap(memory.state(64, fill=5), adapter=memory, layout=layout))
    mine = cache.get("a")
    with cache.borrow("a") as lent:
        for state in (mine, lent):
            assert isinstance(state, KVState)
            assert (state.length, state.nbytes) == (64, 64)
            assert fills({"0": state.cut(10, 20).leaves["0"].array}) == [5]
    assert isinstance(cache.pop("a"), KVState)


def test_a_kvstate_that_is_moved_in_is_gone(memory: HostMemory) -> None:
    cache = StateCache(1024)
    state = wrap(memory.state(64), adapter=memory)
    cache.put("copied", state)
    assert state.nbytes == 64
    cache.put("moved", state, move=True)
    with pytest.raises(ReleasedError):
        state.unwrap()
    with pytest.raises(ReleasedError):
        cache.put("again", state, move=True)
    check(cache, memory)


def test_shared_states_are_copied_before_an_owner_may_write(memory: HostMemory) -> None:
    cache = StateCache(1024)
    state = wrap(memory.state(64, fill=1), adapter=memory).copy()
    state.share()
    array = state.leaves["0"].array
    cache.put("a", state, move=True)
    mine = found(cache.pop("a")).unwrap()
    assert mine["0"] is not array


@pytest.mark.parametrize("key", ["", "x", 0, -7, b"k", (), ("a", 1, b"x", ("b", ())), True])
def test_keys(memory: HostMemory, key: Any) -> None:
    cache = StateCache(1024, adapter=memory)
    cache.put(key, memory.state(64, fill=1))
    assert cache.contains(key)
    assert fills(cache.get(key)) == [1]
    assert cache.remove(key)


@pytest.mark.parametrize("key", [1.5, None, ["a"], {"a"}, ("a", [1]), ("a", None), object()])
def test_other_keys_are_refused(memory: HostMemory, key: Any) -> None:
    cache = memory.cache("a")
    for call in (cache.get, cache.pop, cache.remove, cache.contains, cache.pin, cache.unpin):
        with pytest.raises(InvalidKeyError):
            call(key)
    with pytest.raises(InvalidKeyError):
        cache.put(key, memory.state(64))
    with pytest.raises(InvalidKeyError), cache.borrow(key):
        pass
    assert keys(cache) == "a"


@pytest.mark.parametrize("value", [None, 3, "text", [], {}, object(), {"a": object()}, {1.5: None}])
@pytest.mark.parametrize("move", [False, True])
def test_a_value_that_cannot_be_kept_changes_nothing(memory: HostMemory, value: object, *, move: bool) -> None:
    cache = memory.cache("abcd")
    before = cache.stats()
    with pytest.raises(UnknownValueError):
        cache.put("a", value, move=move)
    assert cache.stats() == before
    check(cache, memory)


def test_a_borrow_that_is_open_is_not_entered_again(memory: HostMemory) -> None:
    cache = memory.cache("a")
    lease = cache.borrow("a")
    with lease:
        with pytest.raises(LeaseUsedError), lease:
            pytest.fail("entered twice")
        assert cache.stats().borrowed_bytes == 64
        with pytest.raises(BorrowedError):
            cache.pop("a")
    assert cache.stats().borrowed_bytes == 0
    with lease as again:  # it is closed
        assert letter(again) == "a"
    assert letter(cache.pop("a")) == "a"


@pytest.mark.parametrize("how", ["borrow", "borrow raw", "borrow all", "get", "never closed"])
def test_each_kind_of_borrow_says_at_its_end_what_was_read(how: str) -> None:
    class Queued(HostMemory):
        marks = 0

        def is_queued(self, device: str) -> bool:  # noqa: ARG002
            return True

        def mark_read(self, arrays: Sequence[HostArray]) -> None:
            self.marks += len(arrays)

    memory = Queued()
    cache = memory.cache("ab")
    if how.startswith("borrow") and how != "borrow all":
        with cache.borrow("a", raw="raw" in how):
            assert memory.marks == 0
    elif how == "get":
        cache.get("a")
    else:
        lease = cache.borrow_all(["a"])
        lease.states()
        assert memory.marks == 0
        if how == "borrow all":
            lease.close()
        del lease
        cache.current_size()
    assert memory.marks == 1


def test_a_mark_that_fails_keeps_no_lease_open() -> None:
    class Failing(HostMemory):
        def is_queued(self, device: str) -> bool:  # noqa: ARG002
            return True

        def mark_read(self, arrays: Sequence[HostArray]) -> None:  # noqa: ARG002
            raise ZeroDivisionError

    cache = Failing().cache("a")
    with pytest.raises(ZeroDivisionError), cache.borrow("a"):
        pass
    with pytest.raises(ZeroDivisionError):
        cache.get("a")
    assert cache.stats().borrowed_bytes == 0
    assert cache.pop("a") is not None
