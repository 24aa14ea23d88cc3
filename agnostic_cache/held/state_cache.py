"""StateCache: states under keys of one's own, within a budget of bytes, freed the moment they leave.

Requirements that shape it: accounting is exact after any sequence of calls, failed ones included; no lock is held
during a copy, a device call or a callback; an entry that is borrowed is never freed under its reader.
"""

import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from time import sleep
from typing import Any, NamedTuple, NoReturn

from agnostic_cache.arrays.adapter import Adapter, Storage
from agnostic_cache.cache import Cache
from agnostic_cache.errors import BorrowedError, CacheCopyError, InvalidKeyError
from agnostic_cache.eviction.evictor import BaseEvictor, PutStatus
from agnostic_cache.eviction.registry import make_evictor
from agnostic_cache.held.lease import Borrow, Borrows, Entry, Key
from agnostic_cache.held.ledger import Ledger
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


class _Room:
    """The `Room` of a newcomer: limits per device, and memory that entries share."""

    __slots__ = ("_entries", "_gone", "_ledger")

    def __init__(self, ledger: Ledger, entries: Mapping[Key, Entry]) -> None:
        self._ledger = ledger
        self._entries = entries
        self._gone: dict[Entry, None] = {}

    def short(self) -> bool:
        return bool(self._ledger.over())

    def release(self, key: Key) -> bool:
        entry, over = self._entries[key], self._ledger.over()
        helps = None in over or any(storage.device in over for storage in entry.storages)
        if helps:
            self.count_gone(entry)
        return helps

    def count_gone(self, entry: Entry) -> None:
        if entry not in self._gone:
            self._ledger.drop(entry.storages)
            self._gone[entry] = None

    def forget(self) -> None:
        for entry in self._gone:
            self._ledger.add(entry.storages)


_Errors = list[BaseException]
"""What callbacks raised, to be raised when the operation is done."""


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
    put. Safe to use from several threads, and from finalisers: what one of these gives back, removes or clears in the
    middle of another call of its thread is done before the next call, and the rest finds nothing there. In a forked
    child the cache is empty and frees nothing.
    """

    def __init__(
        self,
        max_bytes: int | str | Mapping[str, int | str],
        *,
        evictor: str | BaseEvictor = "adaptive",
        on_evict: Callable[[Any], object] | None = None,
        adapter: Adapter | str | None = None,
        trace: Trace | None = None,
        debug: bool = False,
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

        Raises:
            InvalidSizeError: `max_bytes` is no size.
            UnknownPolicyError: `evictor` is none of the house.
        """
        budgets: Mapping[Any, int | str] = max_bytes if isinstance(max_bytes, Mapping) else {None: max_bytes}
        self._limits: dict[str | None, int] = {device: parse_size(size) for device, size in budgets.items()}
        self._evictor = make_evictor(evictor, sum(self._limits.values()))
        never = type(self._evictor).has_expired is BaseEvictor.has_expired
        self._has_expired = None if never else self._evictor.has_expired  # a borrow takes 2 us: no call that says no
        self._on_evict = on_evict
        self._adapter = adapter
        self._trace = trace
        self._debug = debug
        self._start()
        _caches.add(self)

    def _start(self) -> None:
        # Guards everything below; held for dict operations and counting only. Where many threads come at once, it is
        # taken by `_take_in_turn`, in a try that gives it back whatever interrupts.
        self._lock = threading.RLock()
        # The garbage collector runs finalisers anywhere, also in a thread that holds the lock. What these ask of the
        # cache is put off where nobody waits for an answer (to give back, to remove, to clear), and denied otherwise.
        self._in_finaliser: Callable[[], bool] = getattr(self._lock, "_is_owned")  # noqa: B009 - as threading.Condition
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._evictor.reset()
        self._unlisted: set[Entry] = set()  # left the listing, still borrowed
        self._ledger = Ledger(self._limits)  # holds: one holder per entry of _entries and _unlisted
        self._put_off: deque[tuple[Callable[[StateCache, Any], object], Any]] = deque()  # appended without the lock
        self._orphans: list[tuple[int, Callable[[], bool]]] = []  # evicted storages that forks keep: (size, alive)
        self._hits = self._misses = self._puts = self._refused = self._evictions = 0

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
            AgnosticCacheError: The value cannot be kept; see `wrap`. The cache is as it was.
        """
        _check_key(key)
        as_state = isinstance(value, KVState)
        state: KVState = value if as_state else adopt(value, adapter=self._adapter)
        if as_state:
            state.leaves  # noqa: B018 - raises where it is gone
        if self._in_finaliser():
            return PutStatus.ILLEGAL
        errors = self._drain()
        take = self._move_in if move else self._copy_in
        entry = take(key, state, errors, as_state, cost)
        if entry is not None and self._trace is not None:
            self._trace("state_cache.put", {"key": key, "nbytes": _nbytes(entry.storages), "moved": move})
        _raise_all(errors)
        return PutStatus.LEGAL if entry is not None else PutStatus.ILLEGAL

    def _move_in(
        self,
        key: Key,
        state: KVState,
        errors: _Errors,
        as_state: bool,  # noqa: FBT001
        cost: float | None,
    ) -> Entry | None:
        storages = state.storages()
        with self._lock:
            self._ledger.add(storages)
            leaving = self._make_room(key, _nbytes(storages), cost)
            if leaving is None:
                self._ledger.drop(storages)
                return None
            entry = Entry(key, state.move(), storages, as_state=as_state)
            self._list(entry)
        self._evict(leaving, key, errors)
        return entry

    def _copy_in(
        self,
        key: Key,
        state: KVState,
        errors: _Errors,
        as_state: bool,  # noqa: FBT001
        cost: float | None,
    ) -> Entry | None:
        sizes = state.compact_nbytes().items()
        with self._lock:
            self._ledger.promise(sizes)
            leaving = self._make_room(key, sum(nbytes for _, nbytes in sizes), cost)
            if leaving is None:
                self._ledger.settle(sizes)
                return None
        try:
            self._evict(leaving, key, errors)
            copied = state.copy()
            entry = Entry(key, copied, copied.storages(), as_state=as_state)
        except BaseException as error:  # noqa: BLE001 - also an interrupt; raised with what callbacks raised
            with self._lock:
                self._ledger.settle(sizes)
                self._evictor.rollback(self._entries, key=key)
            errors.append(error)
            return None
        with self._lock:
            self._ledger.settle(sizes)
            overtaken = self._unlist(key)  # another thread may have put the same key meanwhile
            self._ledger.add(entry.storages)
            self._list(entry)
        self._free(overtaken, errors)
        return entry

    def _list(self, entry: Entry) -> None:
        entry.listed = True
        self._entries[entry.key] = entry
        self._puts += 1

    def _make_room(self, key: Key, nbytes: int, cost: float | None) -> list[Entry] | None:
        """Unlist what must leave so that the budget holds, the entry under `key` first; None where it cannot.

        The newcomer is already counted. Decides first, then acts, so that a refusal changes nothing.
        """
        old = self._entries.get(key)
        room = _Room(self._ledger, self._entries)
        if old is not None and not old.borrows:
            room.count_gone(old)
        victims, status = self._evictor.update_on_put(self._entries, nbytes, key=key, cost=cost, room=room)
        chosen = [self._entries[victim] for victim in victims]
        for entry in chosen:
            room.count_gone(entry)
        fits = status is PutStatus.LEGAL and not room.short()
        room.forget()  # _unlist drops them again, and says what is to be freed
        if not fits:
            if status is PutStatus.LEGAL:
                self._evictor.rollback(self._entries, key=key)
            self._refused += 1
            return None
        self._evictions += len(chosen)
        return [left for entry in (old, *chosen) if entry is not None for left in self._unlist(entry.key)]

    # --- out ---------------------------------------------------------------------------------------------------------

    def get(self, key: Key) -> Any | None:
        """Return a state that is yours to mutate, donate and delete, or None where `key` is not there.

        It is a copy; or, where the structure never writes in place (Hugging Face dynamic layers), a fork that shares
        memory without ever being seen to change. Makes the entry the newest.
        """
        entry = self._acquire(key)
        if entry is None:
            return None
        try:
            forked = entry.state.fork()
            return forked if entry.as_state else forked.unwrap()
        finally:
            self._give_back(entry)

    def borrow(self, key: Key, *, raw: bool = False) -> Borrow:
        """Lend the state for the length of a ``with`` block: the native type in fresh containers, arrays shared.

        Do not donate, delete or write the arrays. The entry is not freed before the block ends. In the block the value
        is None where `key` is not there.

        Args:
            key: The key.
            raw: Give a `KVState` that raises `ReleasedError` after the block, and build no containers.
        """
        return Borrow(self, key, raw)

    def borrow_all(self, keys: Sequence[Key], *, use: bool = True) -> Borrows:
        """Lend what is under the first keys, up to the first that is not there, as raw `KVState`s.

        For entries that only make sense one after another: the last key becomes newer first and the first key last, so
        that what the others hang on leaves last. ``debug=True`` does not watch these leases.

        Args:
            keys: The keys.
            use: Whether this counts as a use of the entries; without it they are only kept from leaving.
        """
        if self._in_finaliser():
            return Borrows(self, [])
        if self._put_off:
            _raise_all(self._drain())
        found: list[Entry] = []
        lease = Borrows(self, found)  # first: from now on nothing can come between a count and who takes it back
        lock = self._lock
        try:
            if not lock.acquire(blocking=False):
                _take_in_turn(lock)
            for key in keys:
                entry = self._entries.get(key)
                if entry is None or (self._has_expired and self._has_expired(key)):
                    self._misses += 1
                    break
                entry.borrows += 1
                found.append(entry)
            for entry in reversed(found if use else ()):
                self._evictor.update_on_get(entry.key, self._entries)
            self._hits += len(found)
        finally:
            lock.release()
        return lease

    def pop(self, key: Key) -> Any | None:
        """Take the state out without releasing it: it is the caller's. None where `key` is not there.

        Raises:
            BorrowedError: Somebody borrows it; it stays.
        """
        _check_key(key)
        if self._in_finaliser():
            return None
        _raise_all(self._drain())
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or (self._has_expired and self._has_expired(key)):
                self._misses += 1
                return None
            if entry.borrows:
                msg = f"pop({key!r}): {entry.borrows} borrow(s) are open; close them first, or use remove()"
                raise BorrowedError(msg)
            del self._entries[key]
            self._evictor.update_on_remove(key, self._entries)
            entry.listed = False
            alone = self._ledger.drop(entry.storages)
            entry.shares = len(alone) < len(entry.storages)
            if entry.shares:
                self._ledger.add(entry.storages)  # until `_hand_out` has copied what other entries hold too
            self._hits += 1
        return self._hand_out(entry)

    def remove(self, key: Key) -> bool:
        """Unlist the entry at once and release it, on the last return where somebody borrows it.

        Returns:
            Whether it was there.
        """
        _check_key(key)
        if self._in_finaliser():
            self._put_off.append((StateCache.remove, key))
            return key in self._entries
        errors = self._drain()
        with self._lock:
            found = key in self._entries
            leaving = self._remove(key)
        self._free(leaving, errors)
        _raise_all(errors)
        return found

    def clear(self) -> None:
        """Do `remove` to every entry, pinned ones included."""
        if self._in_finaliser():
            self._put_off.extend((StateCache.remove, key) for key in list(self._entries))
            return
        errors = self._drain()
        with self._lock:
            leaving = [entry for key in list(self._entries) for entry in self._remove(key)]
        self._free(leaving, errors)
        _raise_all(errors)

    # --- keeping -----------------------------------------------------------------------------------------------------

    def contains(self, key: Key) -> bool:
        """Say whether `key` is there, without making it newer."""
        _check_key(key)
        _raise_all(self._drain())
        with self._lock:
            return key in self._entries and not (self._has_expired and self._has_expired(key))

    def pin(self, key: Key) -> bool:
        """Keep the entry from being evicted until as many `unpin`. Returns whether it is there."""
        return self._pin(key, 1)

    def unpin(self, key: Key) -> bool:
        """Take one `pin` back. Returns whether the entry is there."""
        return self._pin(key, -1)

    def _pin(self, key: Key, step: int) -> bool:
        _check_key(key)
        _raise_all(self._drain())
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.pins = max(0, entry.pins + step)
            return entry is not None

    def current_size(self) -> int:
        """Return the number of entries."""
        _raise_all(self._drain())
        return len(self._entries)

    @property
    def current_bytes(self) -> int:
        """Physical bytes of the entries and of what is deferred, each byte once."""
        _raise_all(self._drain())
        with self._lock:
            return self._ledger.total

    def stats(self) -> StateCacheStats:
        """Return what the cache holds and did. Linear in entries and arrays; other threads wait meanwhile."""
        _raise_all(self._drain())
        with self._lock:
            entries = self._entries.values()
            total, listed = self._ledger.total, _unique_nbytes(entries)
            borrowed = _unique_nbytes(entry for entry in (*entries, *self._unlisted) if entry.borrows)
            self._orphans = [(nbytes, alive) for nbytes, alive in self._orphans if alive()]
            shared = sum(entry.state.shared_nbytes() for entry in entries) + sum(nbytes for nbytes, _ in self._orphans)
            counts = (self._hits, self._misses, self._puts, self._refused, self._evictions)
            return StateCacheStats(len(entries), total, listed, total - listed, borrowed, shared, *counts)

    # --- leases ------------------------------------------------------------------------------------------------------

    def _acquire(self, key: Key) -> Entry | None:
        if type(key) is not str:
            _check_key(key)
        if self._in_finaliser():
            return None
        if self._put_off:
            _raise_all(self._drain())
        lock = self._lock
        try:
            if not lock.acquire(blocking=False):
                _take_in_turn(lock)
            entry = self._entries.get(key)
            if entry is not None and not (self._has_expired and self._has_expired(key)):
                self._evictor.update_on_get(key, self._entries)
                entry.borrows += 1
                self._hits += 1
                return entry
            self._misses += 1
        finally:
            lock.release()
        if entry is not None:
            self._expire(entry)
        return None

    def _give_back(self, entry: Entry) -> None:
        if self._in_finaliser():
            self._put_off.append((StateCache._give_back, entry))
            return
        lock = self._lock
        try:
            if not lock.acquire(blocking=False):
                _take_in_turn(lock)
            entry.borrows -= 1
            if entry.listed or entry.borrows or entry not in self._unlisted:
                return
            self._unlisted.discard(entry)
            self._count_leaving(entry)
        finally:
            lock.release()
        errors: _Errors = []
        self._free([entry], errors)
        _raise_all(errors)

    def _give_back_all(self, entries: Iterable[Entry]) -> None:
        if self._in_finaliser():
            for entry in entries:
                self._abandon(entry)
            return
        left = []
        lock = self._lock
        try:
            if not lock.acquire(blocking=False):
                _take_in_turn(lock)
            for entry in entries:
                entry.borrows -= 1
                if not (entry.listed or entry.borrows) and entry in self._unlisted:
                    left.append(entry)
            for entry in left:
                self._unlisted.discard(entry)
                self._count_leaving(entry)
        finally:
            lock.release()
        errors: _Errors = []
        self._free(left, errors)
        _raise_all(errors)

    def _abandon(self, entry: Entry) -> None:
        """Give back later: the collector may call this where its thread holds the lock."""
        self._put_off.append((StateCache._give_back, entry))

    def _drain(self) -> _Errors:
        """Do what finalisers asked for; return what callbacks raised at that."""
        errors: _Errors = []
        while self._put_off and not self._in_finaliser():
            try:
                do, what = self._put_off.popleft()
            except IndexError:  # another thread was faster
                break
            try:
                do(self, what)
            except BaseException as error:  # noqa: BLE001 - raised when the operation is done
                errors.append(error)
        return errors

    # --- leaving -----------------------------------------------------------------------------------------------------

    def _unlist(self, key: Key) -> list[Entry]:
        """Take the entry out of the listing; return it where it can be freed now. The lock is held."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return []
        entry.listed = False
        if entry.borrows:
            self._unlisted.add(entry)
            return []
        self._count_leaving(entry)
        return [entry]

    def _remove(self, key: Key) -> list[Entry]:
        """Do `_unlist`, and tell the evictor, who did not ask for it. The lock is held."""
        self._evictor.update_on_remove(key, self._entries)
        return self._unlist(key)

    def _expire(self, entry: Entry) -> None:
        """Unlist and free an entry that is too old, unless another has taken its place."""
        errors: _Errors = []
        with self._lock:
            leaving = self._remove(entry.key) if entry.listed else []
        self._free(leaving, errors)
        _raise_all(errors)

    def _drop(self, entry: Entry) -> None:
        """Unlist an entry that is borrowed, unless another has taken its place."""
        if self._in_finaliser():
            self._put_off.append((StateCache._drop, entry))
            return
        with self._lock:
            if entry.listed:
                self._remove(entry.key)

    def _count_leaving(self, entry: Entry) -> None:
        """Move the bytes that only this entry holds from the ledger to what is being freed. The lock is held."""
        alone = self._ledger.drop(entry.storages)
        entry.shares = len(alone) < len(entry.storages)
        if entry.shares and self._on_evict is not None:
            self._ledger.add(entry.storages)  # until `_hand_out` has copied what other entries hold too
            return
        entry.storages = alone
        self._ledger.promise(_sizes(alone))

    def _hand_out(self, entry: Entry) -> Any:
        """Return the value of an entry that left, to somebody who will use it up: other entries keep their arrays."""
        state = entry.state
        del entry.state  # a traceback may keep the entry, and must not keep its memory
        if entry.shares:
            try:
                forked = state.fork()
            finally:
                with self._lock:
                    entry.storages = self._ledger.drop(entry.storages)
                state.release_alone(_keys(entry.storages))
            state = forked
        if entry.as_state:
            return state
        native = state.unwrap()
        state.end("handed out")
        return native

    def _evict(self, leaving: list[Entry], key: Key, errors: _Errors) -> None:
        """Free what `_make_room` unlisted for `key`."""
        if self._trace is not None:
            for entry in leaving:
                if entry.key != key:
                    self._trace("state_cache.evict", {"key": entry.key, "nbytes": _nbytes(entry.storages)})
        self._free(leaving, errors)

    def _free(self, entries: list[Entry], errors: _Errors) -> None:
        """Release what `_unlist` and `_give_back` let go. Without the lock."""
        for entry in entries:
            try:
                if self._on_evict is not None:
                    self._on_evict(self._hand_out(entry))
                else:
                    self._release(entry)
            except BaseException as error:  # noqa: BLE001 - must not keep other victims in memory
                errors.append(error)
            finally:
                if self._on_evict is None or not entry.shares:
                    with self._lock:
                        self._ledger.settle(_sizes(entry.storages))
            if self._trace is not None:
                self._trace("state_cache.release", {"key": entry.key, "nbytes": _nbytes(entry.storages)})

    def _release(self, entry: Entry) -> None:
        outliving = entry.state.release_alone(_keys(entry.storages) if entry.shares else None)
        if outliving:
            with self._lock:
                self._orphans = [(nbytes, alive) for nbytes, alive in self._orphans if alive()] + outliving

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

    def _forget(self) -> None:
        """Be empty in a forked child, and free nothing: the memory, and its device, are the parent's."""
        _inherited.append((self._entries, self._unlisted, self._lock))
        self._start()


_PLAIN_KEYS = (str, int, bytes)


def _take_in_turn(lock: "threading.RLock") -> None:
    """Take a lock that another thread holds, without standing in line for it.

    Who stands in line is given the lock while somebody else has the interpreter, so that soon all stand in line, and
    eight threads that borrow take four times as long as one. Letting the others run and looking again costs nothing.

    Interrupted, it takes the lock before it says so: the caller's ``finally`` gives it back.
    """
    try:
        while not lock.acquire(blocking=False):
            sleep(0)
    except BaseException:
        lock.acquire()
        raise


def _check_key(key: object) -> None:
    if not _is_key(key):
        msg = f"a key of type {type(key).__qualname__} was given; use a str, int, bytes, or a tuple of these"
        raise InvalidKeyError(msg)


def _is_key(key: object) -> bool:
    return isinstance(key, _PLAIN_KEYS) or (isinstance(key, tuple) and all(map(_is_key, key)))


def _unique_nbytes(entries: Iterable[Entry]) -> int:
    return _nbytes({storage.key: storage for entry in entries for storage in entry.storages}.values())


def _nbytes(storages: Iterable[Storage]) -> int:
    return sum(storage.nbytes for storage in storages)


def _sizes(storages: Iterable[Storage]) -> list[tuple[str, int]]:
    return [(storage.device, storage.nbytes) for storage in storages]


def _keys(storages: Iterable[Storage]) -> frozenset[Hashable]:
    return frozenset(storage.key for storage in storages)


def _raise_all(errors: _Errors) -> None:
    if not errors:
        return
    try:
        if len(errors) == 1:
            raise errors[0]
        msg = f"{len(errors)} on_evict callbacks raised"
        raise BaseExceptionGroup(msg, errors)
    finally:
        # Their tracebacks hold frames that hold this list. Would it hold them too, what those frames refer to would
        # live until the garbage collector comes by.
        errors.clear()


# What a process has forked is state of the process.
_caches: "weakref.WeakSet[StateCache]" = weakref.WeakSet()
_inherited: list[object] = []  # entries of the parent: never freed in a child


def _forget_all() -> None:
    for cache in list(_caches):
        cache._forget()


os.register_at_fork(after_in_child=_forget_all)
