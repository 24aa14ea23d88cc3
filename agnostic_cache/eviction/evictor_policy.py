"""EvictorPolicy: an evictor of a user's own class, which decides and counts by itself, as a `Policy`."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from agnostic_cache.eviction.choose import CountingRoom
from agnostic_cache.eviction.evictor import BaseEvictor, PutStatus
from agnostic_cache.eviction.policy import Policy, Room


class EvictorPolicy(Policy):
    """Ask the evictor once a put, in `narrow`; the victims that it names are the order.

    The evictor sees a dict of its own, of values that have ``nbytes`` and ``is_pinned``, which it may reorder. It
    counts a newcomer from the decision on: the container says `added` or `gone` of each newcomer that was not refused.
    """

    def __init__(self, evictor: BaseEvictor) -> None:
        """Wrap an evictor that serves nobody else."""
        self.evictor = evictor
        super().__init__()

    def reset(self) -> None:
        """See `Policy.reset`."""
        self.evictor.reset()
        self._mirror: OrderedDict[Any, _Mirrored] = OrderedDict()
        self._entries: Mapping[Any, Any] = {}  # as last seen
        self._coming: set[Any] = set()  # newcomers that the evictor counts already
        self._victims: dict[Any, None] = {}  # what the evictor named last, in order, and counts no more

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
        """See `Policy.added`."""
        if key not in self._coming:
            self.evictor.update_on_put(self._mirror, nbytes, key=key, cost=cost, room=CountingRoom(0, lambda _: 0))
        self._coming.discard(key)
        self._mirror.pop(key, None)
        self._mirror[key] = _Mirrored(nbytes, lambda: getattr(self._entries.get(key), "is_pinned", False))

    def used(self, key: Any) -> None:
        """See `Policy.used`."""
        self.evictor.update_on_get(key, self._mirror)

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """See `Policy.gone`."""
        known, named = self._mirror.pop(key, None), key in self._victims
        self._victims.pop(key, None)
        if key in self._coming:
            self._coming.discard(key)
            self.evictor.rollback(self._mirror, key=key)
        elif known and not (evicted and named):
            self.evictor.update_on_remove(key, self._mirror)

    def order(self) -> Iterator[Any]:
        """See `Policy.order`. First the victims that were named last."""
        return chain(self._victims, (key for key in self._mirror if key not in self._victims))

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
        leaving: Sequence[Any],  # noqa: ARG002
    ) -> Room:
        """Have the evictor decide. Where its victims do not suffice, its decision is rolled back."""
        self._entries, self._victims = entries, {}
        if newcomer in self._coming:  # asked for again
            self._coming.discard(newcomer)
            self.evictor.rollback(self._mirror, key=newcomer)
        asked, status = GivenRoom(room), PutStatus.LEGAL
        if newcomer is None:
            victims = self.evictor.evict(self._mirror, room=asked)
        else:
            victims, status = self.evictor.update_on_put(self._mirror, nbytes, key=newcomer, cost=cost, room=asked)
        mirror = self._mirror
        victims = [key for key in victims if key in mirror and key != newcomer and not mirror[key].is_pinned]
        for key in victims:
            asked.release(key)  # it may have decided without asking
        if status is PutStatus.LEGAL and not room.short():
            self._victims = dict.fromkeys(victims)
            if newcomer is not None:
                self._coming.add(newcomer)
            return CountingRoom(len(victims), lambda _: 1)
        if status is PutStatus.LEGAL:
            self.evictor.rollback(mirror, key=newcomer)
        return CountingRoom(1, lambda _: 0)  # short for ever: refused


class _Mirrored:
    """What the evictor sees of an entry."""

    __slots__ = ("_is_pinned", "nbytes")

    def __init__(self, nbytes: int, is_pinned: Callable[[], bool]) -> None:
        self.nbytes, self._is_pinned = nbytes, is_pinned

    @property
    def is_pinned(self) -> bool:
        return self._is_pinned()


class GivenRoom:
    """A `Room` of somebody else, in which each entry counts once. `let_go` is what `release` was called before.

    Attributes:
        released: What was released.
    """

    def __init__(self, room: Any) -> None:
        """Wrap a room with either name."""
        self.short: Callable[[], bool] = room.short
        self._release: Callable[[Any], bool] = getattr(room, "let_go", None) or room.release
        self.released: dict[Any, None] = {}

    def release(self, key: Any) -> bool:
        """See `Room.release`."""
        if key in self.released or not self._release(key):
            return False
        self.released[key] = None
        return True

    let_go = release
