"""``memory://``: blobs in host memory, within a budget of bytes, freed the moment they leave."""

import mmap
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import Final, NamedTuple, Self

from agnostic_cache.blob.pieces import Blob, copy_into, pieces_of
from agnostic_cache.errors import StorageError
from agnostic_cache.eviction.choose import CountingRoom, choose
from agnostic_cache.eviction.evictor import BaseEvictor, PutStatus
from agnostic_cache.eviction.policy import Policy
from agnostic_cache.eviction.registry import make_policy
from agnostic_cache.process.forks import watch
from agnostic_cache.process.lock import Lock
from agnostic_cache.sizes import parse_size
from agnostic_cache.storage.backend import StorageBackend, StorageStats, check_key, hand_over
from agnostic_cache.storage.blocks import BlockPool, is_read
from agnostic_cache.storage.url import StorageURL

RESERVED_BEYOND: Final = 16 * 1024 * 1024
"""Bytes of reservations that may exceed the budget, so that nobody leaves for what may never come."""

_IDLE_AFTER_RECEIVING = 128 * 1024 * 1024  # within the budget, for the next one: who sends a blob sends more
_IDLE_SHARE = 32  # at most this fraction of what is listed lies idle in the pool, so that what is freed is freed


class _Entry:
    """A blob in a block of its own."""

    __slots__ = ("block", "nbytes")

    def __init__(self, block: mmap.mmap, nbytes: int) -> None:
        self.block = block
        self.nbytes = nbytes  # of the blob

    @property
    def is_pinned(self) -> bool:
        """Whether somebody reads it: letting it go would free nothing."""
        return is_read(self.block)


class _Arrival(NamedTuple):
    """A blob that a thread is copying."""

    size: int  # promised to it
    replaces: bool  # an entry, whose memory it may be taking
    thread: int
    done: threading.Event


def _whole_pages(nbytes: int) -> int:
    return -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE


class MemoryReservation:
    """A block that is being written; see `agnostic_cache.storage.backend.Reservation`."""

    def __init__(self, storage: "MemoryStorage", block: mmap.mmap, nbytes: int) -> None:
        """Stand for a block that `storage` has counted."""
        self.buffer = memoryview(block)[:nbytes]
        self._storage = storage
        self._block: mmap.mmap | None = block

    def publish(self, key: str) -> PutStatus:
        """See `Reservation.publish`.

        Raises:
            InvalidKeyError: `key` is no str.
            StorageError: The storage is closed, or this was published or dropped already.
        """
        check_key(key)
        nbytes, block = self._end()
        if block is None:
            msg = "a reservation was published or dropped already; reserve again"
            raise StorageError(msg)
        return self._storage._publish(key, block, nbytes)

    def drop(self) -> None:
        """See `Reservation.drop`."""
        _, block = self._end()
        if block is not None:
            self._storage._take_back(block)

    def _end(self) -> tuple[int, mmap.mmap | None]:
        nbytes, block = self.buffer.nbytes, self._block
        self.buffer, self._block = memoryview(b""), None
        return nbytes, block


class MemoryStorage(StorageBackend):
    """Blobs in host memory, one anonymous mapping each, so that evicted memory goes back to the system.

    >>> storage = MemoryStorage("1MiB")
    >>> storage.put("a", b"some bytes")
    <PutStatus.LEGAL: 1>
    >>> bytes(storage.get("a"))
    b'some bytes'

    `get` copies nothing. An entry that is being read is passed over by eviction; one that was removed or overwritten
    meanwhile counts against the budget (``stats().deferred_bytes``) until its last reader lets go. The budget holds at
    any time, what is being copied included: an overwritten entry gives its memory for the new one, and who asks for it
    meanwhile waits for that.
    """

    def __init__(self, max_bytes: int | str = "4GiB", *, evictor: str | BaseEvictor | Policy = "adaptive") -> None:
        """Make an empty storage.

        Args:
            max_bytes: Budget, such as ``"4GiB"``. Each blob takes whole pages of memory, and counts so.
            evictor: Name of a policy, or a policy or an evictor that serves nobody else.

        Raises:
            InvalidSizeError: `max_bytes` is no size.
            UnknownPolicyError: There is no such policy.
        """
        self.max_bytes = parse_size(max_bytes)
        self._policy = make_policy(evictor, self.max_bytes)
        self._pool = BlockPool()
        self._closed = False
        self.after_fork()
        watch(self)

    def after_fork(self) -> None:
        """Be empty: the memory is the parent's."""
        self._policy.reset()
        self._lock = Lock()  # guards everything below; held for dict operations and counting only
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._arriving: dict[str, _Arrival] = {}  # by key
        self._deferred: list[tuple[weakref.ref[mmap.mmap], int]] = []  # left while somebody read them; his to free
        self._reserved = 0  # bytes of the blocks that are being written by those who reserved them
        self._listed = 0  # holds: the sum of the blocks of _entries
        self._counts = Counter[str]()  # of `StorageStats`

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one for ``memory://?max_bytes=4GiB&evictor=adaptive``."""
        parsed = StorageURL.parse(url)
        storage = cls(parsed.text("max_bytes", "4GiB"), evictor=parsed.text("evictor", "adaptive"))
        parsed.check_used()
        return storage

    def put(self, key: str, blob: Blob) -> PutStatus:
        """See `StorageBackend.put`. A put of a key that another thread is putting leaves it to that thread."""
        check_key(key)
        nbytes, pieces = pieces_of(blob)
        size = _whole_pages(nbytes)
        done = threading.Event()
        try:
            with self._lock:
                self._check_open()
                if key in self._arriving:
                    return PutStatus.LEGAL
                replaces = key in self._entries
                leaving = self._make_room(key, size)
                if leaving is None:
                    self._counts["refused"] += 1
                    return PutStatus.ILLEGAL
                self._arriving[key] = _Arrival(size, replaces, threading.get_ident(), done)
            block = self._replace(leaving, size)
            del leaving
            with memoryview(block) as whole:
                copy_into(whole, pieces)
            with self._lock:
                self._arriving.pop(key, None)
                if not self._closed:
                    self._unlist(key)  # what came by a reservation meanwhile
                    self._list(key, block, nbytes)
        except BaseException:
            with self._lock:
                arrival = self._arriving.get(key)
                if arrival is not None and arrival.done is done:
                    del self._arriving[key]
                    if key not in self._entries:  # what came by a reservation meanwhile
                        self._policy.gone(key)
            raise
        finally:
            done.set()
        return PutStatus.LEGAL

    def _make_room(self, key: str, size: int) -> list[mmap.mmap] | None:
        """Unlist who must leave, the entry to be overwritten included, or return None. The lock is held."""
        if size > self.max_bytes:
            return None
        old, over = self._entries.get(key), self._taken() + size - self.max_bytes
        if over > 0 and old is not None and not old.is_pinned:
            over -= len(old.block)
        leaving = self._evict(over, key, size)
        replaced = None if leaving is None else self._unlist(key)
        return leaving if replaced is None else [*(leaving or ()), replaced]

    def _evict(self, over: int, newcomer: str | None = None, size: int = 0) -> list[mmap.mmap] | None:
        """Unlist victims of `over` bytes, and return those of their blocks that nobody reads; None where that fails.

        Where it fails, nothing changed. The lock is held.
        """
        room = CountingRoom(over, lambda key: len(self._entries[key].block))
        expired = self._policy.expired()
        victims = choose(self._policy, self._entries, room, newcomer=newcomer, nbytes=size, expired=expired)
        if victims is None:
            return None
        self._counts["evictions"] += len(victims)
        blocks = [self._unlist(key) for key in victims]
        for key in victims:
            self._policy.gone(key, evicted=True)
        return [block for block in blocks if block is not None]

    def _list(self, key: str, block: mmap.mmap, nbytes: int) -> None:
        """List an entry that there is room for. The lock is held."""
        self._entries[key] = _Entry(block, nbytes)
        self._listed += len(block)
        self._policy.added(key, len(block))
        self._counts["puts"] += 1

    def _unlist(self, key: str) -> mmap.mmap | None:
        """Take an entry out of the listing; return its block where nobody reads it. The lock is held."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._listed -= len(entry.block)
        if entry.is_pinned:
            self._deferred.append((weakref.ref(entry.block), len(entry.block)))
            return None
        return entry.block

    def _taken(self) -> int:
        """Count what is charged to the budget. The lock is held."""
        beyond = max(0, self._reserved - RESERVED_BEYOND)
        arriving = sum(arrival.size for arrival in self._arriving.values()) if self._arriving else 0
        return self._listed + arriving + self._deferred_bytes() + beyond

    # --- a blob that is yet to come -----------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> MemoryReservation | None:
        """See `SupportsReserve.reserve`."""
        size = _whole_pages(nbytes)
        with self._lock:
            self._check_open()
            self._reserved += size
            over = self._taken() - self.max_bytes
            fits = size <= self.max_bytes and over <= self._listed
            leaving = self._evict(over) if fits and over > 0 else []
            if leaving is None or not fits:
                self._reserved -= size
                self._counts["refused"] += 1
                return None
        try:
            block = self._replace(leaving, size)
        except BaseException:
            with self._lock:
                self._reserved -= size
            raise
        return MemoryReservation(self, block, nbytes)

    def _publish(self, key: str, block: mmap.mmap, nbytes: int) -> PutStatus:
        """List a block that was reserved."""
        size = len(block)
        with self._lock:
            self._reserved -= size
            self._check_open()
            leaving = self._make_room(key, size)
            if leaving is None:
                self._counts["refused"] += 1
            else:
                self._list(key, block, nbytes)
            spare = min(self.max_bytes - self._taken(), _IDLE_AFTER_RECEIVING)
        self._pool.give(leaving or (), max(spare, self._listed // _IDLE_SHARE))
        return PutStatus.ILLEGAL if leaving is None else PutStatus.LEGAL

    def _take_back(self, block: mmap.mmap) -> None:
        """Let go of a block that was reserved."""
        with self._lock:
            self._reserved -= len(block)
        self._pool.give((block,), self._listed // _IDLE_SHARE)

    def _replace(self, leaving: Collection[mmap.mmap], size: int) -> mmap.mmap:
        """Return a block of `size`, made of those that leave, if any will do."""
        if leaving:
            self._pool.give(leaving, self.max_bytes)
        try:
            block = self._pool.take(size)
            if len(block) != size:
                block.resize(size)
            return block
        finally:
            if leaving:
                self._pool.trim(self._listed // _IDLE_SHARE)

    def _deferred_bytes(self) -> int:
        """Count what left and is still read. The lock is held."""
        if not self._deferred:
            return 0
        self._deferred = [(block, nbytes) for block, nbytes in self._deferred if block() is not None]
        return sum(nbytes for _, nbytes in self._deferred)

    def get(self, key: str) -> memoryview | None:
        """See `StorageBackend.get`. Copies nothing."""
        check_key(key)
        while True:
            with self._lock:
                self._check_open()
                arrival = None if key in self._entries else self._replacing(key)
                if arrival is None:
                    return self._found(key)
            arrival.done.wait()

    def _found(self, key: str) -> memoryview | None:
        """Return what is listed under a key. The lock is held."""
        entry = self._entries.get(key)
        if entry is None or self._policy.has_expired(key):
            self._counts["misses"] += 1
            return None
        self._counts["hits"] += 1
        self._policy.used(key)
        return memoryview(entry.block)[: entry.nbytes].toreadonly()

    def _replacing(self, key: str) -> _Arrival | None:
        """Return what another thread copies in place of an entry that has left for it. The lock is held."""
        arrival = self._arriving.get(key)
        if arrival is None or not arrival.replaces or arrival.thread == threading.get_ident():
            return None  # who copies reads what he copies from, and would wait for himself
        return arrival

    def get_into(self, key: str, buffer: memoryview) -> int | None:
        """See `SupportsGetInto.get_into`.

        Raises:
            ValueError: `buffer` is too small.
        """
        return hand_over(self.get(key), buffer)

    def contains(self, key: str) -> bool:
        """See `StorageBackend.contains`."""
        check_key(key)
        with self._lock:
            self._check_open()
            found = key in self._entries or self._replacing(key) is not None
            return found and not self._policy.has_expired(key)

    def remove(self, key: str) -> bool:
        """See `StorageBackend.remove`."""
        check_key(key)
        with self._lock:
            self._check_open()
            found = key in self._entries
            if found:
                self._policy.gone(key)
            block = self._unlist(key)
        del block  # unmapped here, without the lock
        self._pool.trim(self._listed // _IDLE_SHARE)
        return found

    def list_keys(self) -> list[str]:
        """See `StorageBackend.list_keys`. In the order of the policy, the next victim first."""
        with self._lock:
            self._check_open()
            return [key for key in self._policy.order() if key in self._entries]

    def close(self) -> None:
        """Let go of every entry. Idempotent."""
        with self._lock:
            self._closed = True
            gone, self._entries = self._entries, OrderedDict()
            self._listed, self._deferred = 0, []
            self._policy.reset()
        gone.clear()  # unmapped here, without the lock
        self._pool.trim(0)

    def stats(self) -> StorageStats:
        """Return what the storage holds and did."""
        with self._lock:
            return StorageStats(
                entries=len(self._entries),
                current_bytes=self._listed,
                deferred_bytes=self._deferred_bytes(),
                max_bytes=self.max_bytes,
                **self._counts,
            )

    def _check_open(self) -> None:
        if self._closed:
            msg = "this memory:// storage is closed; open another"
            raise StorageError(msg)
