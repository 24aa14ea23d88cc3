"""An entry of a `StateCache`, and the lease on it that `StateCache.borrow` gives."""

import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from agnostic_cache.arrays.adapter import Storage
from agnostic_cache.errors import BorrowViolationError
from agnostic_cache.state.kv_state import KVState

if TYPE_CHECKING:
    from agnostic_cache.held.state_cache import StateCache

Key = str | int | bytes | tuple[Any, ...]
"""A key: a str, int or bytes, or a tuple of keys."""


class Entry:
    """One state in a cache. Guarded by the cache's lock, but for `state` itself, which never changes.

    Attributes:
        key: Its key.
        state: What is kept. Deleted when it is handed out.
        storages: The memory that the entry counts for.
        as_state: A `KVState` was put: such are handed out.
        borrows: Open leases on it.
        pins: `pin` calls that no `unpin` has taken back.
        listed: It can be found.
        shares: It left, and other entries hold some of its arrays.
        queued: Computations may still read it when a borrow of it has ended; see `SupportsStreams`.
    """

    __slots__ = ("as_state", "borrows", "key", "listed", "pins", "queued", "shares", "state", "storages")

    def __init__(self, key: Key, state: KVState, storages: list[Storage], *, as_state: bool) -> None:
        """Make an entry that is not listed yet."""
        self.key = key
        self.state = state
        self.storages = storages
        self.as_state = as_state
        self.borrows = 0
        self.pins = 0
        self.listed = False
        self.shares = False
        self.queued = state.is_queued({storage.device for storage in storages})

    @property
    def is_pinned(self) -> bool:
        """Whether eviction passes it over."""
        return bool(self.borrows or self.pins)

    @property
    def nbytes(self) -> int:
        """Bytes of its memory, whoever else holds some of it."""
        return sum(storage.nbytes for storage in self.storages)


class Borrow:
    """A lease on one entry, from `StateCache.borrow`: a context manager, used once."""

    __slots__ = ("_cache", "_entry", "_key", "_lent", "_marks", "_raw")

    def __init__(self, cache: "StateCache", key: Key, raw: bool) -> None:  # noqa: FBT001 - a keyword costs 0.1 us
        """Lease nothing yet: that is done on entering."""
        self._cache = cache
        self._key = key
        self._raw = raw
        self._entry: Entry | None = None

    def __enter__(self) -> Any | None:
        """Lend the state, or None where the key is not there."""
        entry = self._cache._acquire(self._key)
        if entry is None:
            return None
        try:
            self._lent = lent = entry.state.lend()
            if self._cache._debug:
                self._marks = entry.state.checksums()
            given = lent if self._raw or entry.as_state else lent.unwrap()
        except BaseException:
            self._cache._give_back(entry)
            raise
        self._entry = entry
        return given

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """End the lease.

        Raises:
            BorrowViolationError: ``debug=True``, and the borrower wrote, donated or deleted; the entry is dropped.
        """
        entry = self._entry
        if entry is None:
            return False
        self._entry = None
        try:
            if self._cache._debug:
                self._check(entry)
            if entry.queued:
                entry.state.mark_read()
        finally:
            self._lent.end("borrowed, and its borrow has ended")
            self._cache._give_back(entry)
        return False

    def _check(self, entry: Entry) -> None:
        found = entry.state.checksums()
        changed = sorted(name for name, mark in self._marks.items() if found[name] != mark)
        if changed:
            self._cache._drop(entry)
            what = "deleted or donated" if any(found[name] is None for name in changed) else "wrote"
            msg = (
                f"the borrower of {self._key!r} {what} {changed[:4]}; use get() for a state to change. The entry is "
                "dropped"
            )
            raise BorrowViolationError(msg)

    def __del__(self) -> None:
        """Give back what was never closed, and say so."""
        entry = getattr(self, "_entry", None)
        if entry is not None:
            self._cache._abandon(entry)
            warnings.warn(
                f"a borrow of {self._key!r} was never closed; use a with block", ResourceWarning, stacklevel=1
            )


class Borrows:
    """A lease on several entries at once, from `StateCache.borrow_all`: closed once, by whoever is done with it."""

    __slots__ = ("_cache", "_entries", "_lent")

    def __init__(self, cache: "StateCache", entries: list[Entry]) -> None:
        """Take over entries whose borrows are counted already."""
        self._cache = cache
        self._entries = entries
        self._lent: list[KVState] = []

    def __len__(self) -> int:
        """How many entries are lent."""
        return len(self._entries)

    def states(self) -> list[KVState]:
        """Return the state under each key, raising `ReleasedError` once the lease is closed. Copies nothing."""
        if not self._lent:
            self._lent = [entry.state.lend() for entry in self._entries]
        return self._lent

    def close(self) -> None:
        """End the lease. Idempotent."""
        entries, self._entries = self._entries, []
        for lent in self._lent:
            lent.end("borrowed, and its borrow has ended")
        self._lent = []
        if entries:
            self._cache._give_back_all(entries)

    def __del__(self) -> None:
        """Give back what was never closed."""
        for entry in self._entries:
            self._cache._abandon(entry)
