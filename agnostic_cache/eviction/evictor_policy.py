"""EvictorPolicy: an evictor of a user's own class, which decides and counts by itself, as a `Policy`."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agnostic_cache.eviction.evictor import BaseEvictor, PutStatus
from agnostic_cache.eviction.policy import Policy, Room


class EvictorPolicy(Policy):
    """Ask the evictor once a put, in `narrow`; its victims are the order.

    The evictor sees a dict of its own, of values that have ``nbytes`` and ``is_pinned``, which it may reorder. It
    counts a newcomer from the decision on: the container says `added` or `gone` for each newcomer that was not refused.
    """

    def __init__(self, evictor: BaseEvictor) -> None:
        """Wrap an evictor that serves nobody else. A maximum that it has, in bytes, becomes the container's budget."""
        self.evictor = evictor
        super().__init__()

    @property
    def max_bytes(self) -> int:
        """See `Policy`."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, nbytes: int) -> None:
        self._max_bytes = nbytes
        if hasattr(self.evictor, "MAX_CACHE_SIZE"):
            self.evictor.MAX_CACHE_SIZE = nbytes

    def reset(self) -> None:
        """See `Policy.reset`."""
        self.evictor.reset()
        self._mirror: OrderedDict[Any, _Mirrored] = OrderedDict()
        self._entries: Mapping[Any, Any] = {}  # as last seen
        self._coming: set[Any] = set()  # newcomers that the evictor counts already
        self._leaving: dict[Any, None] = {}  # victims that the evictor counts no more, first to leave first

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
        """See `Policy.added`."""
        if key not in self._coming:
            self.evictor.update_on_put(self._mirror, nbytes, key=key, cost=cost, room=_Enough())
        self._coming.discard(key)
        self._mirror.pop(key, None)
        self._mirror[key] = _Mirrored(self, key, nbytes)

    def used(self, key: Any) -> None:
        """See `Policy.used`."""
        self.evictor.update_on_get(key, self._mirror)

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """See `Policy.gone`."""
        known = self._mirror.pop(key, None)
        if evicted and key in self._leaving:
            del self._leaving[key]
        elif key in self._coming:
            self._coming.discard(key)
            self.evictor.rollback(self._mirror, key=key)
        elif known is not None:
            self.evictor.update_on_remove(key, self._mirror)

    def order(self) -> Iterator[Any]:
        """Yield the victims that were named last."""
        return iter(self._leaving)

    def has_expired(self, key: Any) -> bool:
        """See `Policy.has_expired`."""
        return self.evictor.has_expired(key)

    def narrow(
        self,
        room: Room,
        entries: Mapping[Any, Any],
        newcomer: Any,
        nbytes: int,
        cost: float | None,
        leaving: Sequence[Any],
    ) -> Room:
        """Have the evictor decide. Where its victims do not suffice, its decision is rolled back."""
        self._entries, self._leaving = entries, {}
        asked = _Asked(room, {newcomer, *leaving})
        if newcomer is None:
            victims, status = self.evictor.evict(self._mirror, room=asked), PutStatus.LEGAL
        else:
            victims, status = self.evictor.update_on_put(self._mirror, nbytes, key=newcomer, cost=cost, room=asked)
        victims = [key for key in victims if key in self._mirror and not self._mirror[key].is_pinned]
        for key in victims:
            asked.release(key)
        if status is PutStatus.ILLEGAL:
            return _Decided(len(entries) + 1)
        if room.short():
            self.evictor.rollback(self._mirror, key=newcomer)
            return _Decided(len(entries) + 1)
        self._leaving = dict.fromkeys(victims)
        if newcomer is not None:
            self._coming.add(newcomer)
        return _Decided(len(victims))

    def is_pinned(self, key: Any) -> bool:
        """Say whether the container's entry cannot leave."""
        return bool(getattr(self._entries.get(key), "is_pinned", False))


class _Mirrored:
    """What the evictor sees of an entry."""

    __slots__ = ("_key", "_policy", "nbytes")

    def __init__(self, policy: EvictorPolicy, key: Any, nbytes: int) -> None:
        self._policy, self._key, self.nbytes = policy, key, nbytes

    @property
    def is_pinned(self) -> bool:
        return self._policy.is_pinned(self._key)


class _Asked:
    """The container's room as the evictor sees it: each key counts once. ``let_go`` is the old name of `release`."""

    def __init__(self, room: Room, counted: set[Any]) -> None:
        self._counted = counted
        self._room = room
        self.short = room.short

    def release(self, key: Any) -> bool:
        if key in self._counted:
            return False
        found = self._room.release(key)
        if found:
            self._counted.add(key)
        return found

    let_go = release


class _Enough:
    """The room of what is there already."""

    def short(self) -> bool:
        return False

    def release(self, key: Any) -> bool:  # noqa: ARG002
        return False

    let_go = release


class _Decided:
    """A room that is short until each victim that the evictor named is released."""

    def __init__(self, victims: int) -> None:
        self._victims = victims

    def short(self) -> bool:
        return self._victims > 0

    def release(self, key: Any) -> bool:  # noqa: ARG002
        self._victims -= 1
        return True
