"""StateCache: states under keys of one's own, within a budget of bytes, freed the moment they leave.

Requirements that shape it: accounting is exact after any sequence of calls, failed and interrupted ones included; no
lock is held during a copy, a device call or a callback; an entry that is borrowed is never freed under its reader.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from agnostic_cache.arrays.adapter import Adapter
from agnostic_cache.cache import Cache
from agnostic_cache.errors import CacheCopyError, ReleasedError
from agnostic_cache.eviction.evictor import BaseEvictor, PutStatus
from agnostic_cache.eviction.policy import Policy
from agnostic_cache.eviction.registry import make_policy
from agnostic_cache.held.entry import Entry, Key, Operation, check_key, total
from agnostic_cache.held.exits import Exits, raise_all
from agnostic_cache.held.holdings import Holdings
from agnostic_cache.held.lease import Borrow, Borrows
from agnostic_cache.process.lock import Lock
from agnostic_cache.sizes import parse_size
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.wrapping import adopt
from agnostic_cache.trace import Trace


class StateCacheStats(NamedTuple):
    """What a `StateCache` holds and did. Sizes in bytes, the rest counts.

    Attributes:
        entries: Entries that can be found.
        current_bytes: Physical bytes of them and of what is deferred, each byte once.
        listed_bytes: Of these, bytes of entries that can be found.
        deferred_bytes: Of these, bytes that left the listing and are still borrowed.
        borrowed_bytes: Bytes of entries that somebody borrows now.
        shared_bytes: Bytes that outstanding forks handed out by `get` keep alive too; an eviction leaves them to the
            fork.
        hits: Lookups that found their key.
        misses: Lookups that did not.
        puts: Values taken in.
        refused: Values that did not fit.
        evictions: Entries that left to make room.
    """

    entries: int
    current_bytes: int
    listed_bytes: int
    deferred_bytes: int
    borrowed_bytes: int
    shared_bytes: int
    hits: int
    misses: int
    puts: int
    refused: int
    evictions: int


class StateCache(Cache):
    """A bounded cache of model states that owns what it keeps.

    >>> cache = StateCache("1MiB")
    >>> from agnostic_cache.arrays.host import HostArray
    >>> from agnostic_cache.arrays.dtypes import Dtype
    >>> cache.put("greeting", {"key": HostArray.empty((1, 8, 4), Dtype.FLOAT32)})
    <PutStatus.LEGAL: 1>
    >>> with cache.borrow("greeting") as state:
    ...     state["key"].shape
    (1, 8, 4)
    >>> cache.current_bytes
    128

    Native in, native out: `put` takes a native value or a `KVState`, and the other methods hand back the type that was
    put. Safe to use from several threads, and from finalisers: what one of these gives back, removes, clears or pins in
    the middle of another call of its thread is done before the next call, and the rest finds nothing there. An
    interrupt (Ctrl-C) may come anywhere: what it keeps a call from freeing is freed by the next. In a forked child the
    cache is empty and frees nothing.
    """

    def __init__(
        self,
        max_bytes: int | str | Mapping[str, int | str],
        *,
        evictor: str | Policy | BaseEvictor = "adaptive",
        on_evict: Callable[[Any], object] | None = None,
        adapter: Adapter | str | None = None,
        trace: Trace | None = None,
        debug: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty cache.

        Args:
            max_bytes: Budget of physical bytes, such as ``"4GiB"``; a mapping gives one per device name, and a device
                that it does not name has no limit.
            evictor: Eviction policy, by name (see `agnostic_cache.eviction.POLICIES`) or as an instance that serves no
                other cache. The default is LRU that learns to keep what comes back again and again.
            on_evict: Called with each native value that leaves (by eviction, `remove`, `clear` or overwriting) once
                nobody borrows it, instead of the owning adapter's release; the value is then the callback's to free.
                When it raises, the operation completes, other victims leave too, and the error reaches the caller;
                several come as one ``BaseExceptionGroup``.
            adapter: Adapter, or name of one; by default that of each value's first array.
            trace: Hook that is told of puts, evictions and releases.
            debug: Check at the end of each borrow that the borrower neither wrote, donated nor deleted. Slow: reads
                every byte.
            clock: Seconds, for pins that end by themselves.

        Raises:
            InvalidSizeError: `max_bytes` is no size.
            UnknownPolicyError: `evictor` is unknown.
        """
        budgets: Mapping[Any, int | str] = max_bytes if isinstance(max_bytes, Mapping) else {None: max_bytes}
        limits: dict[str | None, int] = {device: parse_size(size) for device, size in budgets.items()}
        self._holdings = Holdings(limits, make_policy(evictor, sum(limits.values())), clock)
        self._exits = Exits(self._holdings, on_evict, trace)
        self._adapter = adapter
        self._trace = trace
        self._debug = debug

    @property
    def _lock(self) -> Lock:
        return self._holdings.lock

    # --- in ----------------------------------------------------------------------------------------------------------

    def put(self, key: Key, value: Any, *, move: bool = False, cost: float | None = None) -> PutStatus:
        """Take `value` in under `key`, in place of what is there, and make room for it.

        Args:
            key: A str, int, bytes or tuple of these.
            value: A native state or a `KVState`. Copied: the cache owns a compact private copy, and the copy is the
                only extra memory at any time.
            move: Take the value itself instead of a copy; the caller gives it up and must not use it again.
            cost: What it takes to compute it again, for policies that ask: any unit that all entries share, by default
                the bytes. For blocks of a prompt, see `agnostic_cache.eviction.recompute_cost`.

        Returns:
            ``LEGAL``, or ``ILLEGAL`` where it is larger than the budget or where what could leave is borrowed or
            pinned: then nothing changed and the caller still owns the value.

        Raises:
            InvalidKeyError: `key` is no key.
            PinLimitError: `key` is pinned, and with this value pins would keep more than half of the budget.
            AgnosticCacheError: The value cannot be kept; see `wrap`. The cache is as it was.
        """
        check_key(key)
        as_state = isinstance(value, KVState)
        state: KVState = value if as_state else adopt(value, adapter=self._adapter)
        if as_state:
            state.leaves  # noqa: B018 - raises where it is gone
        if self._lock.is_mine():
            return PutStatus.ILLEGAL
        take = self._move_in if move else self._copy_in
        kept = self._exits.do(lambda operation: take(operation, key, state, cost, as_state))
        return PutStatus.LEGAL if kept else PutStatus.ILLEGAL

    def _move_in(self, operation: Operation, key: Key, state: KVState, cost: float | None, as_state: bool) -> bool:  # noqa: FBT001
        storages = state.storages()
        kept = self._holdings.run(
            self._holdings.admit, operation, key, storages, cost,
            lambda: Entry(key, state.move(), storages, cost, as_state=as_state),
        )  # fmt: skip
        if kept:
            self._exits.evict(operation, key)
            self._tell_put(key, total(storages), moved=True)
        return kept

    def _copy_in(self, operation: Operation, key: Key, state: KVState, cost: float | None, as_state: bool) -> bool:  # noqa: FBT001
        holdings = self._holdings
        if not holdings.run(holdings.admit, operation, key, state.compact_nbytes(), cost, None):
            return False
        self._exits.evict(operation, key)
        copied = state.copy()
        storages = copied.storages()
        holdings.run(holdings.arrive, operation, Entry(key, copied, storages, cost, as_state=as_state))
        self._exits.finish(operation)
        self._tell_put(key, total(storages), moved=False)
        return True

    def _tell_put(self, key: Key, nbytes: int, *, moved: bool) -> None:
        if self._trace is not None:
            self._trace("state_cache.put", {"key": key, "nbytes": nbytes, "moved": moved})

    # --- out ---------------------------------------------------------------------------------------------------------

    def get(self, key: Key) -> Any | None:
        """Return a state that is yours to mutate, donate and delete, or None where `key` is not there.

        It is a copy; or, where the structure never writes in place (Hugging Face dynamic layers), a fork that shares
        memory without ever being seen to change. Makes the entry the newest.
        """
        check_key(key)
        if self._lock.is_mine():
            return None

        def fork(operation: Operation) -> Any | None:
            for entry in self._holdings.run(self._holdings.lend, operation, (key,), True):  # noqa: FBT003
                if entry.state is not None:
                    forked = entry.state.fork()
                    return forked if entry.as_state else forked.unwrap()
            return None

        return self._exits.do(fork)

    def borrow(self, key: Key, *, raw: bool = False) -> Borrow:
        """Lend the state for the length of a ``with`` block: the native type in fresh containers, arrays shared.

        Do not donate, delete or write the arrays. The entry is not freed before the block ends. In the block the value
        is None where `key` is not there.

        Args:
            key: The key.
            raw: Give a `KVState` that raises `ReleasedError` after the block, and build no containers.
        """
        return Borrow(self._exits, key, raw, self._debug)

    def borrow_all(self, keys: Sequence[Key], *, use: bool = True) -> Borrows:
        """Lend what is under the first keys, up to the first that is not there, as raw `KVState`s.

        For entries that only make sense one after another: the last key becomes newer first and the first key last, so
        that what the others hang on leaves last. ``debug=True`` does not watch these leases.

        Args:
            keys: The keys.
            use: Whether this counts as a use of the entries; without it they are only kept from leaving.
        """
        raise_all(self._exits.drain())
        return Borrows(self._exits, keys, use)

    def pop(self, key: Key) -> Any | None:
        """Take the state out without releasing it: it is the caller's. None where `key` is not there.

        Raises:
            BorrowedError: Somebody borrows it; it stays.
        """
        check_key(key)
        if self._lock.is_mine():
            return None

        def take(operation: Operation) -> Any | None:
            operation.hands_out = True
            entry = self._holdings.run(self._holdings.take, operation, key)
            if entry is None:
                return None
            self._exits.unwrap(entry)
            return entry.handed.pop() if entry.handed else None

        return self._exits.do(take)

    def remove(self, key: Key) -> bool:
        """Unlist the entry at once and release it, on the last return where somebody borrows it.

        Returns:
            Whether it was there.
        """
        check_key(key)
        if self._lock.is_mine():
            self._holdings.later.put((self.remove, key))
            return key in self._holdings.entries
        return self._remove([key], pins=False) > 0

    def clear(self) -> None:
        """Do `remove` to every entry, the least recently used first, pinned ones included, and end every pin."""
        keys = [key for key, _ in sorted(self._holdings.entries.items(), key=lambda item: item[1].tick)]
        if self._lock.is_mine():
            self._holdings.later.put((lambda keys: self._remove(keys, pins=True), keys))
        else:
            self._remove(keys, pins=True)

    def _remove(self, keys: Sequence[Key], *, pins: bool) -> int:
        return self._exits.do(lambda operation: self._holdings.run(self._holdings.remove, operation, keys, pins))

    # --- keeping -----------------------------------------------------------------------------------------------------

    def contains(self, key: Key) -> bool:
        """Say whether `key` is there, without making it newer."""
        check_key(key)
        raise_all(self._exits.drain())
        return key in self._holdings.entries and not self._holdings.has_expired(key)

    def pin(self, key: Key, *, ttl_seconds: float | None = None) -> bool:
        """Keep what is under `key`, now or later, from being evicted until as many `unpin`, or `clear`.

        The pin is the key's: whatever is put under it is protected, also where nothing is there yet.

        Args:
            key: The key.
            ttl_seconds: How long the pin holds; by default until it is taken back.

        Returns:
            Whether the key is there.

        Raises:
            PinLimitError: Pinned entries would fill more than half of the budget. The key is not pinned.
        """
        return self.pin_all([key], ttl_seconds=ttl_seconds) > 0

    def pin_all(self, keys: Sequence[Key], *, ttl_seconds: float | None = None) -> int:
        """Do `pin` to all keys, or, where that raises, to none. Returns how many of them are there."""
        for key in keys:
            check_key(key)
        if self._lock.is_mine():
            self._holdings.later.put((lambda keys: self.pin_all(keys, ttl_seconds=ttl_seconds), keys))
            return sum(key in self._holdings.entries for key in keys)
        raise_all(self._exits.drain())
        return self._holdings.run(self._holdings.pin, keys, ttl_seconds)

    def unpin(self, key: Key) -> bool:
        """Take one `pin` back, of several the one that would hold longest. Returns whether the key is there."""
        return self.unpin_all([key]) > 0

    def unpin_all(self, keys: Sequence[Key]) -> int:
        """Do `unpin` to all keys. Returns how many of them are there."""
        for key in keys:
            check_key(key)
        if self._lock.is_mine():
            self._holdings.later.put((self.unpin_all, keys))
            return sum(key in self._holdings.entries for key in keys)
        raise_all(self._exits.drain())
        return self._holdings.run(self._holdings.unpin, keys)

    def current_size(self) -> int:
        """Return the number of entries."""
        raise_all(self._exits.drain())
        return len(self._holdings.entries)

    @property
    def current_bytes(self) -> int:
        """Physical bytes of the entries and of what is deferred, each byte once."""
        raise_all(self._exits.drain())
        return self._holdings.look(self._holdings.nbytes)

    def stats(self) -> StateCacheStats:
        """Return what the cache holds and did. Takes as long as there are entries lent, or read by `get` of forks."""
        raise_all(self._exits.drain())
        held = self._holdings
        entries, current, deferred, orphans, counts = held.look(
            lambda: (
                len(held.entries), held.nbytes(), held.deferred_nbytes(), held.orphan_nbytes(),
                (held.hits, held.misses, held.puts, held.refused, held.evictions),
            )
        )  # fmt: skip
        borrowed = total(list({storage.key: storage for entry in held.lent() for storage in entry.storages}.values()))
        shared = orphans + self._forked_nbytes()
        return StateCacheStats(entries, current, current - deferred, deferred, borrowed, shared, *counts)

    def _forked_nbytes(self) -> int:
        """Bytes that forks keep alive besides entries. Looks at arrays, so without the lock."""
        shared, forked = 0, self._holdings.forked
        for entry in list(forked):
            try:
                nbytes = entry.state.shared_nbytes() if entry.state is not None else 0
            except ReleasedError:  # another thread frees it just now
                nbytes = 0
            shared += nbytes
            if not nbytes and not entry.borrows:
                forked.pop(entry, None)
        return shared

    # --- process life ------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            CacheCopyError: Always.
        """
        msg = (
            "a StateCache owns device memory and cannot be pickled or copied; make a new one, or share it by reference"
        )
        raise CacheCopyError(msg)
