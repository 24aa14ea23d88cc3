"""TTLEvictor: another policy, whose entries also leave when they are too old."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from agnostic_cache.errors import InvalidSizeError
from agnostic_cache.eviction.budget import BudgetEvictor
from agnostic_cache.eviction.evictor import Entries, PutStatus, Room
from agnostic_cache.eviction.wrapping import Without, WrappingEvictor


class TTLEvictor(WrappingEvictor):
    """Let an entry live for a while after it was put, whether it is used or not.

    The container asks `has_expired` before it hands an entry out; whatever has expired is among the victims of the next
    put, needed or not, unless it is pinned.

    Args:
        inner: Chooses among the living.
        ttl_seconds: How long an entry lives.
        clock: Returns seconds, never fewer than before.

    Raises:
        InvalidSizeError: `ttl_seconds` is not a positive number.

    Source: the time to live of HTTP caches, as in cachetools' ``TTLCache``: counted from the put, never renewed by use.
    """

    def __init__(
        self,
        inner: BudgetEvictor | WrappingEvictor,
        *,
        ttl_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not (math.isfinite(ttl_seconds) and ttl_seconds > 0):
            msg = f"ttl_seconds={ttl_seconds!r}; give a positive number of seconds"
            raise InvalidSizeError(msg)
        super().__init__(inner)
        self.ttl_seconds = ttl_seconds
        self._clock = clock
        self._put_at: OrderedDict[Any, float] = OrderedDict()  # oldest first

    def update_on_put(
        self,
        cache_dict: Entries,
        cache_size: int,
        *,
        key: Any = None,
        cost: float | None = None,
        room: Room | None = None,
    ) -> tuple[list[Any], PutStatus]:
        """See `BaseEvictor.update_on_put`. Whatever has expired is among the victims."""
        expired = self._expired(cache_dict, key)
        if expired:
            room = self._let_go(expired, room or self.room(cache_dict, cache_size, key=key))
        victims, status = super().update_on_put(cache_dict, cache_size, key=key, cost=cost, room=room)
        if status is PutStatus.ILLEGAL:
            return victims, status
        self._forget(expired, victims)
        self._put_at[key] = self._clock()
        self._put_at.move_to_end(key)
        return expired + victims, status

    def evict(self, cache_dict: Entries, *, room: Room | None = None) -> list[Any]:
        """See `BaseEvictor.evict`. Whatever has expired is among the victims."""
        expired = self._expired(cache_dict, None)
        if expired:
            room = self._let_go(expired, room or self.room(cache_dict))
        victims = super().evict(cache_dict, room=room)
        self._forget(expired, victims)
        return expired + victims

    def has_expired(self, key: Any) -> bool:
        """See `BaseEvictor.has_expired`."""
        put_at = self._put_at.get(key)
        return put_at is not None and self._clock() - put_at >= self.ttl_seconds

    def update_on_remove(self, key: Any, cache_dict: Entries | None = None) -> None:
        """See `BaseEvictor.update_on_remove`."""
        self._put_at.pop(key, None)
        super().update_on_remove(key, cache_dict)

    def rollback(self, cache_dict: Entries, *, key: Any = None) -> None:
        """See `BaseEvictor.rollback`. Victims that are still there live anew."""
        self._put_at.pop(key, None)
        super().rollback(cache_dict, key=key)
        for there in cache_dict:
            if there not in self._put_at:
                self._put_at[there] = self._clock()

    def reset(self) -> None:
        """Forget every entry."""
        super().reset()
        self._put_at = OrderedDict()

    def _expired(self, cache_dict: Entries, newcomer: Any) -> list[Any]:
        born = self._clock() - self.ttl_seconds
        expired = []
        for key, put_at in self._put_at.items():
            if put_at > born:
                break
            if key != newcomer and key in cache_dict and not getattr(cache_dict[key], "is_pinned", False):
                expired.append(key)
        return expired

    def _let_go(self, expired: list[Any], room: Room) -> Room:
        for key in expired:
            room.let_go(key)  # whether it helps or not
        return Without(room, frozenset(expired))

    def _forget(self, expired: Iterable[Any], victims: Iterable[Any]) -> None:
        for key in expired:
            self.inner.update_on_remove(key)
            del self._put_at[key]
        for key in victims:
            self._put_at.pop(key, None)
