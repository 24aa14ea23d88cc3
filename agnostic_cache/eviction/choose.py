"""`choose`: the one way in which every container finds its victims."""

from collections.abc import Iterable, Mapping
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

    def can_leave(key: Any) -> bool:
        return key != newcomer and key in entries and not getattr(entries[key], "is_pinned", False)

    victims = [key for key in expired if can_leave(key)]
    for key in victims:
        room.release(key)
    room = policy.narrow(room, entries, newcomer, nbytes, cost, victims)
    if not room.short():
        return victims
    dead = frozenset(victims)
    found = policy.order() if order is None else order
    candidates: Iterable[Any] = (key for key in found if key not in dead and can_leave(key))
    while True:
        passed, before = [], len(victims)
        for key in candidates:
            if not room.release(key):
                passed.append(key)
                continue
            victims.append(key)
            if not room.short():
                return victims
        if len(victims) == before:
            return None
        candidates = passed  # who left may have made these worth leaving
