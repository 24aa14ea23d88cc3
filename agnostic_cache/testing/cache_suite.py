"""CacheSuite: a StateCache of the framework's arrays: who may write, when memory is free, and that counts are exact."""

import copy
import gc
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from agnostic_cache.arrays.adapter import Adapter, Array
from agnostic_cache.errors import BorrowedError, BorrowViolationError
from agnostic_cache.eviction import PutStatus
from agnostic_cache.held.state_cache import StateCache
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.wrapping import wrap
from agnostic_cache.testing.grid import Grid
from agnostic_cache.testing.subject import KV, Subject

ROWS = 4


class CacheSuite(Subject):
    """What a cache does with native states of the framework, through its adapter."""

    def test_what_was_put_and_what_get_gives_are_the_callers(self) -> None:
        cache, state = StateCache("1MiB"), self.kv(ROWS)
        wanted = self._read(state)
        assert cache.put("a", state) is PutStatus.LEGAL
        self._spoil(state)
        for _ in range(3):
            mine = cache.get("a")
            assert self._read(mine) == wanted
            self._spoil(mine)
        popped = cache.pop("a")
        cache.clear()
        assert self._read(popped) == wanted

    def test_a_state_goes_in_and_out_as_what_it_was(self) -> None:
        cache = StateCache("1MiB")
        cache.put("native", self.kv(ROWS))
        cache.put("state", wrap(self.kv(ROWS), layout=KV))
        for key, kind in (("native", dict), ("state", KVState)):
            with cache.borrow(key) as lent:
                assert isinstance(lent, kind)
            assert isinstance(cache.get(key), kind)
            assert isinstance(cache.pop(key), kind)

    @pytest.mark.parametrize("move", [False, True])
    def test_what_is_evicted_is_free_when_put_returns(self, *, move: bool) -> None:
        before = self._live()
        cache = StateCache(2 * self._kept_bytes())
        for key in range(5):
            assert cache.put(key, self.kv(ROWS, seed=key), move=move) is PutStatus.LEGAL
            self._check(cache, before)
        assert cache.current_size() == 2
        cache.clear()
        assert cache.current_bytes == 0
        self._check(cache, before)

    def test_what_leaves_while_it_is_borrowed_is_read_and_then_free(self) -> None:
        before = self._live()
        cache, wanted = StateCache(self._kept_bytes()), self._read(self.kv(ROWS))
        cache.put("a", self.kv(ROWS))
        with cache.borrow("a") as lent, cache.borrow("a", raw=True) as raw:
            assert cache.put("b", self.kv(ROWS, seed=9)) is PutStatus.ILLEGAL
            with pytest.raises(BorrowedError):
                cache.pop("a")
            assert cache.remove("a")
            assert cache.stats().deferred_bytes == cache.current_bytes > 0
            assert self._read(lent) == wanted
            assert raw is not None
            assert self._read(raw.copy().unwrap()) == wanted
            del lent
        assert cache.current_bytes == 0
        self._check(cache, before)

    def test_a_refused_put_changes_nothing(self) -> None:
        cache, large = StateCache(self._kept_bytes()), self.kv(2 * ROWS)
        cache.put("a", self.kv(ROWS))
        wanted, stats = self._read(large), cache.stats()
        for move in (False, True):
            assert cache.put("a", large, move=move) is PutStatus.ILLEGAL
        assert cache.stats() == stats._replace(refused=2)
        assert self._read(large) == wanted
        assert self._read(cache.get("a")) == self._read(self.kv(ROWS))

    def test_an_array_in_two_entries_counts_once_and_goes_with_the_last(self) -> None:
        before = self._live()
        cache, state = StateCache("1MiB"), self.kv(ROWS)
        wanted = self._read(state)
        cache.put("a", state, move=True)
        nbytes = cache.current_bytes
        cache.put("b", {"again": state, "layers": state["layers"]}, move=True)
        del state
        assert cache.current_bytes == nbytes
        cache.remove("a")
        assert cache.current_bytes == nbytes
        self._check(cache, before)
        with cache.borrow("b") as lent:
            assert lent is not None
            assert self._read(lent["again"]) == wanted
            del lent
        cache.remove("b")
        assert cache.current_bytes == 0
        self._check(cache, before)

    def test_a_callback_that_raises_keeps_nothing_alive(self) -> None:
        def on_evict(state: Any) -> None:
            left.append(self._read(state))
            self.adapter.release([leaf.array for leaf in wrap(state).leaves.values()])
            raise ZeroDivisionError

        before = self._live()
        left: list[list[Grid]] = []
        cache = StateCache(2 * self._kept_bytes(), on_evict=on_evict)
        for key in range(2):
            cache.put(key, self.kv(ROWS, seed=key))
        with pytest.raises(ZeroDivisionError):
            cache.put(2, self.kv(ROWS, seed=2))
        assert [cache.contains(key) for key in range(3)] == [False, True, True]
        self._check(cache, before)
        with pytest.raises(ExceptionGroup):
            cache.clear()
        assert left == [self._read(self.kv(ROWS, seed=key)) for key in range(3)]
        assert cache.current_bytes == 0
        self._check(cache, before)

    def test_an_interrupt_in_the_middle_of_a_copy_leaves_the_count_exact(self) -> None:
        before = self._live()
        cache = StateCache(2 * self._kept_bytes(), adapter=_interrupted(self.adapter))
        for key in range(2):
            cache.put(key, self.kv(ROWS), move=True)
        for call in (lambda: cache.put(2, self.kv(ROWS)), lambda: cache.get(1)):
            with pytest.raises(KeyboardInterrupt):
                call()
            gc.collect()
            self._check(cache, before)
        assert [cache.contains(key) for key in range(3)] == [False, True, False]
        assert cache.stats().borrowed_bytes == 0
        assert cache.put(2, self.kv(ROWS), move=True) is PutStatus.LEGAL
        assert cache.contains(1)

    def test_debug_finds_a_borrower_that_wrote_or_deleted(self) -> None:
        cache = StateCache("1MiB", debug=True)
        cache.put("a", self.kv(ROWS))
        for raw in (False, True):
            with cache.borrow("a", raw=raw):
                pass
        lease = cache.borrow("a")
        lent: Any = lease.__enter__()
        self.spoil(lent["layers"][1]["value"])
        with pytest.raises(BorrowViolationError):
            lease.__exit__(None, None, None)
        assert not cache.contains("a")
        assert cache.current_bytes == 0

    def test_a_borrower_that_never_closes_or_raises_pins_nothing(self) -> None:
        cache = StateCache(self._kept_bytes())
        cache.put("a", self.kv(ROWS))
        with pytest.raises(ZeroDivisionError), cache.borrow("a"):
            raise ZeroDivisionError
        lease: list[Any] = [cache.borrow("a")]
        lease.append(lease)
        lease[0].__enter__()
        del lease
        with pytest.warns(ResourceWarning):
            gc.collect()
        assert cache.put("b", self.kv(ROWS)) is PutStatus.LEGAL

    def test_threads_read_what_others_evict(self) -> None:
        def write() -> None:
            number = 0
            while not done.is_set():
                key = number % 3
                cache.put(key, self.kv(ROWS, seed=10 * key), move=number % 2 == 0)
                number += 1

        def read() -> None:
            for number in range(200):
                key = number % 3
                with cache.borrow(key, raw=number % 2 == 0) as lent:
                    if (
                        lent is not None
                        and self._read(lent if isinstance(lent, dict) else lent.unwrap()) != wanted[key]
                    ):
                        wrong.append(key)

        def guarded() -> None:
            try:
                read()
            except BaseException as error:  # noqa: BLE001 - asserted below
                wrong.append(error)

        before = self._live()
        wanted = [self._read(self.kv(ROWS, seed=10 * key)) for key in range(3)]
        wrong: list[Any] = []
        cache, done = StateCache(2 * self._kept_bytes()), threading.Event()
        writer, readers = threading.Thread(target=write), [threading.Thread(target=guarded) for _ in range(3)]
        for thread in (writer, *readers):
            thread.start()
        for thread in readers:
            thread.join()
        done.set()
        writer.join()
        assert wrong == []
        assert cache.stats().deferred_bytes == cache.stats().borrowed_bytes == 0
        self._check(cache, before)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _read(self, kv: Any) -> list[Grid]:
        return list(map(self.grid, self.arrays_of(kv)))

    def _spoil(self, kv: Any) -> None:
        for array in self.arrays_of(kv):
            self.spoil(array)

    def _kept_bytes(self) -> int:
        """Bytes of `kv` as it is moved in, or copied: the larger."""
        state = wrap(self.kv(ROWS), layout=KV)
        return max(state.nbytes, sum(state.compact_nbytes().values()))

    def _live(self) -> int | None:
        return self.live_bytes()

    def _check(self, cache: StateCache, before: int | None) -> None:
        """What the framework says is alive is what the cache says it keeps."""
        stats = cache.stats()
        assert stats.current_bytes == cache.current_bytes == stats.listed_bytes + stats.deferred_bytes
        if before is not None:
            assert self._live() == before + cache.current_bytes


def _interrupted(adapter: Adapter) -> Adapter:
    """The adapter, every copy of which is interrupted when it has been made."""
    kind = type(adapter)

    class Interrupted(kind):  # type: ignore[misc, valid-type]
        def copy_all(self, arrays: Sequence[Array]) -> list[Array]:
            super().copy_all(arrays)
            raise KeyboardInterrupt

    changed = copy.copy(adapter)
    changed.__class__ = Interrupted
    return changed
