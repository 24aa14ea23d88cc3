"""Shelf: a container that uses its evictor as the contract says, and looks whether that keeps it."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from agnostic_cache.eviction.evictor import PutStatus


class Item:
    """A value of some bytes, which may be pinned."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.is_pinned = False


class Shelf:
    """A container that does what the contract asks of one, and looks whether its evictor does.

    Attributes:
        evictor: Its evictor.
        items: Its entries.
        left: Keys of all victims, in order.
    """

    def __init__(self, evictor: Any, *, named: bool = True) -> None:
        """Start empty; with `named` false it names no keys, as callers of LMCache's evictors do."""
        self.evictor = evictor
        self.named = named
        self.items: OrderedDict[Any, Item] = OrderedDict()
        self.left: list[Any] = []

    def put(self, key: Any, nbytes: int, **more: Any) -> PutStatus:
        """Put an item of that size; `more` goes to the evictor."""
        before = list(self.items.items())
        names = {"key": key} if self.named else {}
        status: PutStatus
        victims, status = self.evictor.update_on_put(self.items, nbytes, **names, **more)
        assert list(self.items.items()) == before  # who leaves is the container's to take out
        assert status in {PutStatus.LEGAL, PutStatus.ILLEGAL}
        if status is PutStatus.ILLEGAL:
            assert victims == []
            return status
        if self.named:
            assert key not in victims
        self.lose(victims)
        self.items.pop(key, None)
        self.items[key] = Item(nbytes)
        return status

    def lose(self, victims: list[Any]) -> None:
        """Take victims out."""
        assert len(set(victims)) == len(victims)
        for victim in victims:
            assert not self.items.pop(victim).is_pinned
        self.left += victims

    def get(self, key: Any) -> bool:
        """Use an item; return whether it is there."""
        if key not in self.items:
            return False
        self.evictor.update_on_get(key, self.items)
        return True

    def remove(self, key: Any) -> None:
        """Take an item out."""
        del self.items[key]
        self.evictor.update_on_remove(key, self.items)

    def pin(self, keys: Iterable[Any]) -> None:
        """Keep items from leaving."""
        for key in keys:
            self.items[key].is_pinned = True

    @property
    def nbytes(self) -> int:
        """Bytes of its entries."""
        return sum(item.nbytes for item in self.items.values())

    def counted(self) -> int:
        """Return the bytes that the evictor counts."""
        return int(self.evictor.current_cache_size)


class SomeRoom:
    """A `Room` that needs `over` bytes, and lets `keys` go alone."""

    def __init__(self, shelf: Shelf, over: int, keys: Iterable[Any]) -> None:
        self.shelf, self.over, self.keys = shelf, over, set(keys)
        self.gone: list[Any] = []

    def short(self) -> bool:
        """See `Room.short`."""
        return self.over > 0

    def release(self, key: Any) -> bool:
        """See `Room.release`."""
        assert key in self.shelf.items
        assert key not in self.gone
        if key not in self.keys:
            return False
        self.gone.append(key)
        self.over -= self.shelf.items[key].nbytes
        return True
