"""Pins: which keys eviction passes over. A pin is the key's, and protects whatever is put under it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf

from agnostic_cache.arrays.adapter import Storage
from agnostic_cache.errors import PinLimitError
from agnostic_cache.held.entry import Entry, Key
from agnostic_cache.held.ledger import Ledger, LedgerRoom


class Pins:
    """Pins of keys, and what the pinned entries hold: at most half of each budget. Guarded by the lock of `Holdings`.

    What is true is when each pin ends; the bytes, and `Entry.is_kept`, are counted from that.
    """

    __slots__ = ("_clock", "_entries", "_kept", "_limits", "_next_end", "_until")

    def __init__(
        self, limits: Mapping[str | None, int], entries: Mapping[Key, Entry], clock: Callable[[], float]
    ) -> None:
        """Pin nothing.

        Args:
            limits: Budgets of the cache.
            entries: The entries that are listed, as they are at any time.
            clock: Seconds.
        """
        self._limits = {device: nbytes // 2 for device, nbytes in limits.items()}
        self._entries = entries
        self._clock = clock
        self.clear()

    def clear(self) -> None:
        """End every pin; its entries are to leave, or to be recounted."""
        self._until: dict[Key, tuple[float, ...]] = {}  # when each pin of a key ends
        self._next_end = inf
        self._kept = Ledger(self._limits)

    def recount(self) -> None:
        """Count anew which entries are pinned, and their bytes."""
        kept = Ledger(self._limits)
        for key, entry in self._entries.items():
            entry.is_kept = key in self._until
            if entry.is_kept:
                kept.add(entry.storages)
        self._kept = kept

    def have_ended(self) -> bool:
        """Say whether the time of a pin is over, which `end` then has to take note of."""
        return self._next_end != inf and self._next_end <= self._clock()

    def end(self) -> None:
        """End the pins whose time is over."""
        now = self._clock()
        for key, until in list(self._until.items()):
            self._set(key, [end for end in until if end > now])
        self._next_end = min((end for until in self._until.values() for end in until), default=inf)

    def add(self, keys: Iterable[Key], ttl_seconds: float | None) -> None:
        """Pin each key once more."""
        end = inf if ttl_seconds is None else self._clock() + ttl_seconds
        self._next_end = min(self._next_end, end)
        self._until |= {key: (*self._until.get(key, ()), end) for key in keys}
        for key in keys:
            if key in self._entries:
                self.came(self._entries[key])

    def take_back(self, keys: Iterable[Key]) -> None:
        """Take one pin of each key back, the one that would end last."""
        for key in keys:
            self._set(key, sorted(self._until.get(key, ()))[:-1])

    def _set(self, key: Key, until: Sequence[float]) -> None:
        if until:
            self._until[key] = tuple(until)
        elif self._until.pop(key, None) and key in self._entries:
            self.left(self._entries[key])

    def came(self, entry: Entry) -> None:
        """Count an entry that was listed, if its key is pinned."""
        if entry.key in self._until and not entry.is_kept:
            self._kept.add(entry.storages)
            entry.is_kept = True

    def left(self, entry: Entry) -> None:
        """Count an entry that was unlisted no more."""
        if entry.is_kept:
            self._kept.drop(entry.storages)
            entry.is_kept = False

    def check_keys(self, keys: Iterable[Key]) -> None:
        """Raise where these keys cannot be pinned.

        Raises:
            PinLimitError: Pinned entries would hold more than half of a budget.
        """
        new = [self._entries[key] for key in keys if key in self._entries and not self._entries[key].is_kept]
        self._check({}, [storage for entry in new for storage in entry.storages], None)

    def check_newcomer(self, key: Key, sizes: Mapping[str, int], storages: Sequence[Storage]) -> None:
        """Raise where an entry cannot come in under `key`, because that is pinned.

        Args:
            key: The key.
            sizes: Bytes per device of a copy that is to come in.
            storages: Memory that is to come in as it is.

        Raises:
            PinLimitError: As `check_keys`.
        """
        if key in self._until:
            self._check(sizes, storages, self._entries.get(key))

    def _check(self, sizes: Mapping[str, int], storages: Sequence[Storage], old: Entry | None) -> None:
        unique = list({storage.key: storage for storage in storages}.values())
        room = LedgerRoom(self._kept, self._entries, sizes, unique)
        if old is not None and old.is_kept:
            room.leave(old)
        if room.short():
            limits = {device or "all devices": self._limits[device] for device, over in room.over.items() if over > 0}
            msg = f"pins may keep half of the budget, in bytes {limits}; unpin something, or raise max_bytes"
            raise PinLimitError(msg)
