"""BudgetEvictor: a maximum of bytes, and exact accounting, for every policy that is an order of entries."""

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from agnostic_cache.errors import InvalidSizeError
from agnostic_cache.eviction.evictor import BaseEvictor, Entries, PutStatus, Room, check_size

_logger = logging.getLogger("agnostic_cache.eviction")
_GIB = 1024**3


class BudgetEvictor(BaseEvictor):
    """Holds the sum of sizes under a maximum; a subclass says in which order entries leave.

    A subclass implements `update_on_get` and `_order`; one that keeps an order of its own also `_decided`, `_enter` and
    `_leave`, and starts it in `reset`, which is called at construction.

    Args:
        max_cache_size: The maximum in GiB.

    Attributes:
        MAX_CACHE_SIZE: The maximum in bytes; may be changed, then `evict` says who leaves.
        current_cache_size: Bytes of all entries, each once, when the container has done what it was told. Where puts
            name no keys, one that overwrote counts twice until the next call.

    Raises:
        InvalidSizeError: The maximum is less than one byte, or no finite number.
    """

    def __init__(self, max_cache_size: float = 10.0) -> None:
        if not (math.isfinite(max_cache_size) and max_cache_size * _GIB >= 1):
            msg = f"max_cache_size={max_cache_size!r}; give the maximum in GiB, at least one byte"
            raise InvalidSizeError(msg)
        self.MAX_CACHE_SIZE = int(max_cache_size * _GIB)
        self.reset()

    def reset(self) -> None:
        """Forget every entry."""
        self._sizes: dict[Any, int] = {}  # of every entry, and of every put that was told and is not done yet
        self.current_cache_size = 0  # holds: the sum of _sizes, and of what is pending
        self._pending: int | None = None  # bytes of a put without a key, of which the dict will tell what became

    # --- the order: what a policy implements --------------------------------------------------------------------------

    @abstractmethod
    def _order(self, cache_dict: Entries, leaving: Sequence[Any]) -> Iterator[Any]:
        """Yield keys, the next to leave first. Changes no `cache_dict`.

        Args:
            cache_dict: The entries.
            leaving: Who was chosen so far. Whoever is yielded is at its end when the next one is asked for, or was
                passed over and stays.
        """

    def _decided(self, leaving: Sequence[Any]) -> None:
        """Take out who leaves, and undo what looking for them did to others; undo all of it where nobody leaves."""

    def _enter(self, key: Any, size: int, cost: float | None) -> None:
        """Take in a newcomer, or what an entry is overwritten with."""

    def _leave(self, key: Any) -> None:
        """Take out an entry that the container removed."""

    # --- the contract -------------------------------------------------------------------------------------------------

    def update_on_put(
        self,
        cache_dict: Entries,
        cache_size: int,
        *,
        key: Any = None,
        cost: float | None = None,
        room: Room | None = None,
    ) -> tuple[list[Any], PutStatus]:
        """See `BaseEvictor.update_on_put`."""
        if cache_size < 0:
            check_size(cache_size)
        if key is None or self._pending is not None:
            self._settle(cache_dict)
        leaving: list[Any] = []
        sizes, maximum = self._sizes, self.MAX_CACHE_SIZE
        before = sizes.get(key, 0)
        if room is not None:
            enough = not room.short() or self._choose(cache_dict, room, leaving, key)
        elif cache_size > maximum:
            _logger.warning("a put of %d bytes exceeds the maximum of %d", cache_size, maximum)
            return leaving, PutStatus.ILLEGAL
        else:
            over = self.current_cache_size + cache_size - before - maximum
            enough = over <= 0 or self._choose_by_size(cache_dict, over, leaving, key)
        if not enough:
            leaving.clear()
            self._decided(leaving)
            return leaving, PutStatus.ILLEGAL
        if leaving:
            self._decided(leaving)
            for victim in leaving:
                self.current_cache_size -= sizes.pop(victim, 0)
        if key is None:
            self._pending = cache_size
            self.current_cache_size += cache_size
        else:
            self.current_cache_size += cache_size - before
            sizes[key] = cache_size
            self._enter(key, cache_size, cost)
        return leaving, PutStatus.LEGAL

    def evict(self, cache_dict: Entries, *, room: Room | None = None) -> list[Any]:
        """See `BaseEvictor.evict`."""
        if self._pending is not None:
            self._settle(cache_dict)
        leaving: list[Any] = []
        over = self.current_cache_size - self.MAX_CACHE_SIZE
        if room is None and over > 0:
            self._choose_by_size(cache_dict, over, leaving, None)
        elif room is not None and room.short():
            self._choose(cache_dict, room, leaving, None)
        self._decided(leaving)
        for victim in leaving:
            self.current_cache_size -= self._sizes.pop(victim, 0)
        return leaving

    def update_on_remove(self, key: Any, cache_dict: Entries | None = None) -> None:
        """See `BaseEvictor.update_on_remove`."""
        if self._pending is not None and cache_dict is not None:
            self._settle(cache_dict)
        if key in self._sizes:
            self.current_cache_size -= self._sizes.pop(key)
            self._leave(key)

    def rollback(self, cache_dict: Entries, *, key: Any = None) -> None:
        """See `BaseEvictor.rollback`."""
        if key is None:
            self._settle(cache_dict)
            return
        self.update_on_remove(key)
        for there in cache_dict:
            self._learn(there, cache_dict)

    # --- choosing and counting ----------------------------------------------------------------------------------------

    def room(self, cache_dict: Entries, cache_size: int = 0, *, key: Any = None) -> Room:
        """Return the room for a newcomer as this evictor counts it where it is given none: for who wraps a policy."""
        over = self.current_cache_size + cache_size - self._sizes.get(key, 0) - self.MAX_CACHE_SIZE
        return _SumOfSizes(self, cache_dict, over)

    def _size_of(self, key: Any, cache_dict: Entries) -> int:
        size = self._sizes.get(key)
        return self.get_size(cache_dict[key]) if size is None else size

    def _choose(self, cache_dict: Entries, room: Room, leaving: list[Any], newcomer: Any) -> bool:
        """Fill `leaving` until the room suffices; say whether it does."""
        passed = []
        for candidates in (self._order, self._strangers):
            for key in candidates(cache_dict, leaving):
                if key == newcomer or key not in cache_dict or getattr(cache_dict[key], "is_pinned", False):
                    continue
                if not room.let_go(key):
                    passed.append(key)
                    continue
                leaving.append(key)
                if not room.short():
                    return True
        # Once more, as long as it changes something: who left may have made others worth leaving.
        again: list[Any] = []
        while len(again) != len(passed):
            again, passed = passed, []
            for key in again:
                if not room.let_go(key):
                    passed.append(key)
                    continue
                leaving.append(key)
                if not room.short():
                    return True
        return False

    def _choose_by_size(self, cache_dict: Entries, over: int, leaving: list[Any], newcomer: Any) -> bool:
        """Do `_choose` in a `_SumOfSizes`, twice as fast."""
        sizes = self._sizes
        for candidates in (self._order, self._strangers):
            for key in candidates(cache_dict, leaving):
                if key == newcomer or key not in cache_dict or getattr(cache_dict[key], "is_pinned", False):
                    continue
                over -= sizes[key] if key in sizes else self.get_size(cache_dict[key])
                leaving.append(key)
                if over <= 0:
                    return True
        return False

    def _strangers(self, cache_dict: Entries, leaving: Sequence[Any]) -> Iterator[Any]:  # noqa: ARG002
        """Yield entries that no put told of, or that a put overtook: known from now on. Nobody stays for ever."""
        for key in [key for key in cache_dict if key not in self._sizes]:
            self._learn(key, cache_dict)
            yield key

    def _learn(self, key: Any, cache_dict: Entries) -> None:
        """Take in an entry that is there and not known. KeyError where it is not there."""
        if self._pending is not None:
            self._settle(cache_dict)
        if key not in self._sizes:
            self._count(key, self.get_size(cache_dict[key]), None)

    def _settle(self, cache_dict: Entries) -> None:
        """Learn from the dict what became of a put without a key, and what else changed."""
        pending, self._pending = self._pending, None
        sizes, overwrote = self._sizes, False
        if pending is not None:
            self.current_cache_size -= pending
            newest = next(reversed(cache_dict), None)
            overwrote = newest is None or newest in sizes
            if not overwrote:
                self._count(newest, pending, None)
        if overwrote or len(sizes) != len(cache_dict):
            for key in [key for key in sizes if key not in cache_dict]:
                self.update_on_remove(key)
            for key, value in cache_dict.items():
                if sizes.get(key) != self.get_size(value):
                    self._count(key, self.get_size(value), None)

    def _count(self, key: Any, size: int, cost: float | None) -> None:
        self.current_cache_size += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self._enter(key, size, cost)


class _SumOfSizes:
    """The `Room` of a container whose bytes are the sum of its entries' sizes."""

    __slots__ = ("_dict", "_evictor", "over")

    def __init__(self, evictor: BudgetEvictor, cache_dict: Entries, over: int) -> None:
        """Start with `over` bytes above the maximum."""
        self._evictor, self._dict, self.over = evictor, cache_dict, over

    def short(self) -> bool:
        """See `Room.short`."""
        return self.over > 0

    def let_go(self, key: Any) -> bool:
        """See `Room.let_go`."""
        self.over -= self._evictor._size_of(key, self._dict)
        return True
