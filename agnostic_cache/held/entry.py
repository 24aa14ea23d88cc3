"""What a cache keeps under a key, and what a call has under way."""

from collections.abc import Mapping, Sequence
from typing import Any

from agnostic_cache.arrays.adapter import Storage
from agnostic_cache.errors import InvalidKeyError
from agnostic_cache.state.kv_state import KVState

Key = str | int | bytes | tuple[Any, ...]
"""A key: a str, int or bytes, or a tuple of keys."""

_PLAIN_KEYS = (str, int, bytes)


class Entry:
    """One state in a cache. Guarded by the lock of its `Holdings`, but for `state`.

    Attributes:
        key: Its key.
        state: What is kept; None once it is freed or handed out.
        storages: The memory that the entry refers to.
        cost: What it takes to compute it again, or None.
        as_state: A `KVState` was put: such are handed out.
        queued: Computations may still read it when a borrow of it has ended; see `SupportsStreams`.
        may_fork: Its arrays may live on in what a borrower made of them.
        born: When it was put, counted in puts and uses.
        tick: When it was used last, as `born`.
        borrows: Open leases on it.
        is_kept: A pin protects it.
        alone: Memory that no other entry held when it left; None until that is counted.
        handed: Its native value on the way to `on_evict` or the caller of `pop`, in a list; empty once it is there.
        original: The state that `state` is a fork of, until it has let go of what others hold.
    """

    __slots__ = (
        "alone", "as_state", "born", "borrows", "cost", "handed", "is_kept", "key", "may_fork", "original",
        "queued", "state", "storages", "tick",
    )  # fmt: skip

    def __init__(
        self, key: Key, state: KVState, storages: Sequence[Storage], cost: float | None, *, as_state: bool
    ) -> None:
        """Make an entry that is not listed yet."""
        self.key = key
        self.state: KVState | None = state
        self.storages = storages
        self.cost = cost
        self.as_state = as_state
        self.queued = state.is_queued({storage.device for storage in storages})
        self.may_fork = state.adapter.forkable and any(leaf.frozen for leaf in state.leaves.values())
        self.born = self.tick = self.borrows = 0
        self.is_kept = False
        self.alone: Sequence[Storage] | None = None
        self.handed: list[Any] | None = None
        self.original: KVState | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether eviction passes it over."""
        return self.is_kept or self.borrows > 0

    @property
    def is_freed(self) -> bool:
        """Whether its memory is free, or somebody else's."""
        return self.state is None if self.handed is None else not self.handed

    @property
    def nbytes(self) -> int:
        """Bytes of its memory, whoever else holds some of it."""
        return total(self.storages)


class Operation:
    """What a call of the cache has under way. If an interrupt ends the call early, the next call finishes this.

    Attributes:
        hands_out: Entries that leave by it are handed to somebody, and not freed.
        lent: Entries that are on loan to it.
        leaving: Entries that it takes out of the cache and frees, first to leave first.
        arriving: The entry that it lists.
        reserved: Bytes per device of the copy that it is about to make.
        key: The key of that copy, which the policy knows already.
        version: `Holdings.version` when the policy was told of the key.
        errors: What callbacks raised.
    """

    hands_out = False
    lent: Sequence[Entry] = ()
    leaving: Sequence[Entry] = ()
    arriving: Entry | None = None
    reserved: Mapping[str, int] = {}
    key: Key | None = None
    version = 0
    errors: Sequence[BaseException] = ()

    @property
    def is_open(self) -> bool:
        """Whether something is left to do."""
        return bool(self.lent or self.leaving or self.reserved or self.arriving)


def check_key(key: object) -> None:
    """Raise where `key` is no key.

    Raises:
        InvalidKeyError: It is not a str, int, bytes, or a tuple of these.
    """
    if not _is_key(key):
        msg = f"a key of type {type(key).__qualname__} was given; use a str, int, bytes, or a tuple of these"
        raise InvalidKeyError(msg)


def _is_key(key: object) -> bool:
    return isinstance(key, _PLAIN_KEYS) or (isinstance(key, tuple) and all(map(_is_key, key)))


def total(storages: Sequence[Storage]) -> int:
    """Return the bytes of some pieces of memory."""
    return sum(storage.nbytes for storage in storages)


def by_device(storages: Sequence[Storage]) -> dict[str, int]:
    """Return the bytes of some pieces of memory, per device."""
    sizes: dict[str, int] = {}
    for _, nbytes, device in storages:
        sizes[device] = sizes.get(device, 0) + nbytes
    return sizes
