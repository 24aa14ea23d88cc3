"""`choose`: the one way in which every container finds its victims; and the `Room` of a plain sum of sizes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from agnostic_cache.eviction.policy import Policy, Room


def choose(
    policy: Policy,
    entries: Mapping[Any, Any],
    room: Room,
    *,
    newcomer: Any = None,
    nbytes: int = 0,
    cost: float | None = None,
    expired: Iterable[Any] = (),
    order: Iterable[Any] | None = None,
) -> list[Any] | None:
    """Return the keys that must leave so that `room` is no longer short, first to leave first; None where it stays so.

    Changes neither `entries` nor `policy`: a refusal has nothing to undo. Passes over `newcomer`, and over entries
    whose `is_pinned` is true. What `room` does not release at first is asked for again once others are released.

    Args:
        policy: The order of the victims.
        entries: The container's entries by key.
        room: What the container lacks; used up by this call.
        newcomer: Key of what comes in, or None. An entry that it overwrites is `room`'s to count.
        nbytes: Bytes of the newcomer.
        cost: Cost of the newcomer, as in `Policy.added`.
        expired: Keys that leave first, whether that is needed or not; usually ``policy.expired()``.
        order: Candidates instead of ``policy.order()``.
    """
    victims: list[Any] = []
    for key in expired:
        if key != newcomer and key in entries and not getattr(entries[key], "is_pinned", False):
            room.release(key)
            victims.append(key)
    room = policy.narrow(room, entries, newcomer, nbytes, cost, victims)
    if not room.short():
        return victims
    dead = frozenset(victims)
    candidates = policy.order() if order is None else order
    while True:
        passed, before = [], len(victims)
        for key in candidates:
            if key == newcomer or key not in entries or key in dead or getattr(entries[key], "is_pinned", False):
                continue
            if not room.release(key):
                passed.append(key)
                continue
            victims.append(key)
            if not room.short():
                return victims
        if len(victims) == before:
            return None
        candidates = passed  # who left may have made these worth leaving


class CountingRoom:
    """A `Room` that lacks a sum of sizes.

    Attributes:
        released: What was released.
    """

    def __init__(self, over: int, size_of: Callable[[Any], int]) -> None:
        """Lack `over`."""
        self._over, self._size_of = over, size_of
        self.released: list[Any] = []

    def short(self) -> bool:
        """See `Room.short`."""
        return self._over > 0

    def release(self, key: Any) -> bool:
        """See `Room.release`."""
        self._over -= self._size_of(key)
        self.released.append(key)
        return True

    let_go = release
