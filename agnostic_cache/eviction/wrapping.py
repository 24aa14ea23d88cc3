"""WrappingEvictor: a policy around another one, through the contract alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agnostic_cache.errors import InvalidKeyError
from agnostic_cache.eviction.evictor import BaseEvictor, Entries, PutStatus, Room

if TYPE_CHECKING:
    from collections.abc import Container

    from agnostic_cache.eviction.budget import BudgetEvictor


class WrappingEvictor(BaseEvictor):
    """Hands everything on to `inner`; a subclass changes what it must. Its callers name the keys of their puts.

    Attributes:
        inner: The policy that chooses.
    """

    def __init__(self, inner: BudgetEvictor | WrappingEvictor) -> None:
        self.inner = inner

    @property
    def MAX_CACHE_SIZE(self) -> int:  # noqa: N802 - the name is LMCache's
        """The maximum in bytes, that of `inner`."""
        return self.inner.MAX_CACHE_SIZE

    @MAX_CACHE_SIZE.setter
    def MAX_CACHE_SIZE(self, nbytes: int) -> None:  # noqa: N802
        self.inner.MAX_CACHE_SIZE = nbytes

    @property
    def current_cache_size(self) -> int:
        """Bytes of all entries."""
        return self.inner.current_cache_size

    def room(self, cache_dict: Entries, cache_size: int = 0, *, key: Any = None) -> Room:
        """See `BudgetEvictor.room`."""
        return self.inner.room(cache_dict, cache_size, key=key)

    def update_on_get(self, key: Any, cache_dict: Entries) -> None:
        """See `BaseEvictor.update_on_get`."""
        self.inner.update_on_get(key, cache_dict)

    def update_on_put(
        self,
        cache_dict: Entries,
        cache_size: int,
        *,
        key: Any = None,
        cost: float | None = None,
        room: Room | None = None,
    ) -> tuple[list[Any], PutStatus]:
        """See `BaseEvictor.update_on_put`.

        Raises:
            InvalidKeyError: The put names no key.
        """
        if key is None:
            msg = f"{type(self).__qualname__} must know the key of a put; call update_on_put(..., key=...)"
            raise InvalidKeyError(msg)
        return self.inner.update_on_put(cache_dict, cache_size, key=key, cost=cost, room=room)

    def update_on_remove(self, key: Any, cache_dict: Entries | None = None) -> None:
        """See `BaseEvictor.update_on_remove`."""
        self.inner.update_on_remove(key, cache_dict)

    def rollback(self, cache_dict: Entries, *, key: Any = None) -> None:
        """See `BaseEvictor.rollback`."""
        self.inner.rollback(cache_dict, key=key)

    def evict(self, cache_dict: Entries, *, room: Room | None = None) -> list[Any]:
        """See `BaseEvictor.evict`."""
        return self.inner.evict(cache_dict, room=room)

    def has_expired(self, key: Any) -> bool:
        """See `BaseEvictor.has_expired`."""
        return self.inner.has_expired(key)

    def reset(self) -> None:
        """See `BaseEvictor.reset`."""
        self.inner.reset()


class Without:
    """A `Room` in which some entries are gone already."""

    __slots__ = ("_gone", "_room")

    def __init__(self, room: Room, gone: Container[Any]) -> None:
        """Wrap `room`, that has been told of who is gone."""
        self._room, self._gone = room, gone

    def short(self) -> bool:
        """See `Room.short`."""
        return self._room.short()

    def let_go(self, key: Any) -> bool:
        """See `Room.let_go`."""
        return key not in self._gone and self._room.let_go(key)
