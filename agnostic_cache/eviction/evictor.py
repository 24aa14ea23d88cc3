"""BaseEvictor: LMCache's contract of eviction, which code written for it calls and subclasses; and `PutStatus`.

Our containers use a `Policy`, and turn an evictor that they are given into one (`make_policy`). A container of
LMCache's kind keeps its entries in an ``OrderedDict`` and tells its evictor what happens, under its own lock. The
evictor never changes the dict: it names the victims, and the container lets them go.

    # put: decides and counts; afterwards the container does as it was told
    victims, status = evictor.update_on_put(entries, nbytes, key=key)
    if status is PutStatus.ILLEGAL:
        return status                               # nothing changed
    left = [entries.pop(victim) for victim in victims]
    entries.pop(key, None)                          # overwriting makes an entry the newest
    entries[key] = value                            # or, where it fails: evictor.rollback(entries, key=key)

    # get
    if key not in entries or evictor.has_expired(key):
        return None                                 # an expired entry: remove it
    evictor.update_on_get(key, entries)

    # remove
    del entries[key]
    evictor.update_on_remove(key, entries)

Source: ``lmcache.storage_backend.evictor`` (0.3.0), whose names, units and answers are kept.
"""

import enum
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any

from agnostic_cache.errors import InvalidSizeError, UnknownValueError
from agnostic_cache.eviction.policy import Room

Entries = OrderedDict[Any, Any]
"""The entries of a container by key. New ones are appended; the values are whatever `BaseEvictor.get_size` takes."""


class PutStatus(enum.Enum):
    """Answer of a put. Source: LMCache's evictors, names and values kept."""

    LEGAL = 1
    """The value is in."""
    ILLEGAL = 2
    """The value was refused: it does not fit, and nothing changed."""


class BaseEvictor(ABC):
    """Names the victims of one container. A new eviction policy is better written as a `Policy`."""

    @abstractmethod
    def update_on_get(self, key: Any, cache_dict: Entries) -> None:
        """Note that an entry was used.

        Args:
            key: The key of the entry.
            cache_dict: The entries. Their order may be changed, nothing else.

        Raises:
            KeyError: There is no such entry.
        """

    @abstractmethod
    def update_on_put(
        self,
        cache_dict: Entries,
        cache_size: int,
        *,
        key: Any = None,
        cost: float | None = None,
        room: Room | None = None,
    ) -> tuple[list[Any], PutStatus]:
        """Decide whether an entry comes in and which leave for it, and count both as done.

        Args:
            cache_dict: The entries without the newcomer; not changed. Those with a true ``is_pinned`` cannot leave.
            cache_size: Bytes of the newcomer.
            key: Its key. A caller gives one always, or never: then it must insert before its next call.
            cost: What it takes to compute it again, in any unit that all entries share; by default its size.
            room: How the container counts, instead of by sum of sizes against a maximum.

        Returns:
            The keys that must leave, first to leave first, and ``LEGAL``; or none and ``ILLEGAL``, and nothing
            changed: the newcomer is larger than the maximum, or too much is pinned.

        Raises:
            InvalidSizeError: `cache_size` is negative.
        """

    def update_on_remove(self, key: Any, cache_dict: Entries | None = None) -> None:  # noqa: B027 - a correct default
        """Note that the container itself took an entry out, or is about to; nothing where there was none.

        Args:
            key: The key of the entry.
            cache_dict: The entries; may be left out by callers that name the keys of their puts.
        """

    def rollback(self, cache_dict: Entries, *, key: Any = None) -> None:  # noqa: B027 - a correct default
        """Note that a put that was ``LEGAL`` did not happen. Victims that are still there count again.

        Args:
            cache_dict: The entries as they are now.
            key: The key of that put; left out where the put named none.
        """

    def evict(self, cache_dict: Entries, *, room: Room | None = None) -> list[Any]:  # noqa: ARG002
        """Decide which entries leave now, with no newcomer: a maximum was lowered, or entries expired.

        Args:
            cache_dict: The entries; not changed.
            room: As in `update_on_put`.

        Returns:
            The keys that must leave; fewer than the budget needs where the rest is pinned.
        """
        return []

    def has_expired(self, key: Any) -> bool:  # noqa: ARG002
        """Say whether an entry may no longer be handed out."""
        return False

    def reset(self) -> None:  # noqa: B027 - a correct default
        """Forget every entry."""

    def get_size(self, kv_obj: Any) -> int:
        """Return the bytes of a value.

        Args:
            kv_obj: bytes, bytearray, memoryview, or what has an int ``nbytes`` (a `KVState`, a tensor or array of any
                framework: logical bytes of a view) or, failing that, an int ``size`` in bytes (the records of LMCache).

        Raises:
            UnknownValueError: It is none of these.
        """
        if isinstance(kv_obj, bytes | bytearray):
            return len(kv_obj)
        for name in ("nbytes", "size"):
            size = getattr(kv_obj, name, None)
            if isinstance(size, int):
                return size
        msg = (
            f"the size of a {type(kv_obj).__qualname__} is unknown; put bytes, bytearray, memoryview, KVState, or an "
            "object with nbytes"
        )
        raise UnknownValueError(msg)


class DummyEvictor(BaseEvictor):
    """Never evicts, counts nothing, refuses nothing. Source: LMCache's, for a container that has no limit."""

    def update_on_get(self, key: Any, cache_dict: Entries) -> None:
        """Do nothing."""

    def update_on_put(
        self,
        cache_dict: Entries,  # noqa: ARG002
        cache_size: int,
        *,
        key: Any = None,  # noqa: ARG002
        cost: float | None = None,  # noqa: ARG002
        room: Room | None = None,  # noqa: ARG002
    ) -> tuple[list[Any], PutStatus]:
        """Answer ``LEGAL``, and that no entry need leave."""
        check_size(cache_size)
        return [], PutStatus.LEGAL


def check_size(cache_size: int) -> None:
    """Refuse a negative size.

    Raises:
        InvalidSizeError: It is negative.
    """
    if cache_size < 0:
        msg = f"a put of {cache_size} bytes; a size cannot be negative"
        raise InvalidSizeError(msg)
