"""LMCache's evictors by name: each a facade over a `Policy`, with a budget and exact accounting.

Source: ``lmcache.storage_backend.evictor`` (0.3.0): names, the unit (GiB), the order of victims and the one ``ILLEGAL``
case of ``LRUEvictor`` are kept. Mended: an overwritten or removed entry is counted right, pinned entries are passed
over, and a put can be rolled back. Callers that name no keys are served, too: at its next call, the evictor learns from
the dict what became of a put.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from agnostic_cache.errors import InvalidKeyError, InvalidSizeError
from agnostic_cache.eviction.adaptive import Adaptive
from agnostic_cache.eviction.choose import CountingRoom, choose
from agnostic_cache.eviction.evictor import BaseEvictor, Entries, PutStatus, check_size
from agnostic_cache.eviction.evictor_policy import EvictorPolicy, GivenRoom
from agnostic_cache.eviction.fifo import FIFO
from agnostic_cache.eviction.gdsf import GDSF
from agnostic_cache.eviction.lfu import LFU
from agnostic_cache.eviction.limits import Limits, first_part
from agnostic_cache.eviction.lru import LRU
from agnostic_cache.eviction.policy import Policy, Room
from agnostic_cache.eviction.s3fifo import S3FIFO

_logger = logging.getLogger("agnostic_cache.eviction")
_GIB = 1024**3


class BudgetEvictor(BaseEvictor):
    """Holds the sum of sizes under a maximum; victims leave in the order of a policy.

    Args:
        max_cache_size: The maximum in GiB.
        policy: The order; by default that of the class.

    Attributes:
        policy: The order of the victims.
        current_cache_size: Bytes of all entries, each once, when the container has done what it was told. Where puts
            name no keys, one that overwrote counts twice until the next call.

    Raises:
        InvalidSizeError: The maximum is less than one byte, or no finite number.
    """

    make_order: ClassVar[type[Policy]] = LRU
    by_dict: ClassVar[bool] = False
    """The dict is in the order of the policy, and stands for it: its owner may reorder it."""
    reorders: bool = False
    """A use makes an entry the newest of the dict."""
    needs_keys: ClassVar[bool] = False
    """Puts must name their keys."""

    def __init__(self, max_cache_size: float = 10.0, *, policy: Policy | None = None) -> None:
        if not (math.isfinite(max_cache_size) and max_cache_size * _GIB >= 1):
            msg = f"max_cache_size={max_cache_size!r}; give the maximum in GiB, at least one byte"
            raise InvalidSizeError(msg)
        self.policy = policy or type(self).make_order()
        for name in self.policy.settings:
            if hasattr(self, name):  # a subclass sets it
                setattr(self.policy, name, getattr(self, name))
        self.MAX_CACHE_SIZE = int(max_cache_size * _GIB)
        self.reset()

    @property
    def MAX_CACHE_SIZE(self) -> int:  # noqa: N802 - the name is LMCache's
        """The maximum in bytes; may be changed, then `evict` names who leaves."""
        return self.policy.max_bytes

    @MAX_CACHE_SIZE.setter
    def MAX_CACHE_SIZE(self, nbytes: int) -> None:  # noqa: N802
        self.policy.max_bytes = nbytes

    def reset(self) -> None:
        """Forget every entry."""
        self.policy.reset()
        self._sizes: dict[Any, int] = {}  # of every entry, and of every put that was told and is not done yet
        self.current_cache_size = 0  # holds: the sum of _sizes, and of what is pending
        self._pending: int | None = None  # bytes of a put without a key, of which the dict will tell what became

    def update_on_get(self, key: Any, cache_dict: Entries) -> None:
        """See `BaseEvictor.update_on_get`."""
        if self._pending is not None:
            self._settle(cache_dict)  # while its newest entry still is the one that was put last
        if key not in self._sizes:
            self._learn(key, cache_dict)
        if self.reorders:
            cache_dict.move_to_end(key)
        self.policy.used(key)

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
            InvalidKeyError: The put names no key, and the policy needs it.
            InvalidSizeError: `cache_size` is negative.
        """
        check_size(cache_size)
        if key is None and self.needs_keys:
            msg = f"{type(self).__qualname__} must know the key of a put; call update_on_put(..., key=...)"
            raise InvalidKeyError(msg)
        if key is None or self._pending is not None:
            self._settle(cache_dict)
        if room is None and cache_size > self.MAX_CACHE_SIZE:
            _logger.warning("a put of %d bytes exceeds the maximum of %d", cache_size, self.MAX_CACHE_SIZE)
            return [], PutStatus.ILLEGAL
        before = self._sizes.get(key, 0)
        asked = self._room(cache_dict, room, cache_size - before)
        victims = self._choose(cache_dict, asked, newcomer=key, nbytes=cache_size, cost=cost)
        if victims is None:
            return [], PutStatus.ILLEGAL
        self._let_go(victims)
        if key is None:
            self._pending = cache_size
            self.current_cache_size += cache_size
        else:
            self._count(key, cache_size, cost)
        return victims, PutStatus.LEGAL

    def evict(self, cache_dict: Entries, *, room: Room | None = None) -> list[Any]:
        """See `BaseEvictor.evict`."""
        if self._pending is not None:
            self._settle(cache_dict)
        asked = self._room(cache_dict, room, 0)
        self._choose(cache_dict, asked)
        victims = list(asked.released)
        self._let_go(victims)
        return victims

    def update_on_remove(self, key: Any, cache_dict: Entries | None = None) -> None:
        """See `BaseEvictor.update_on_remove`."""
        if self._pending is not None and cache_dict is not None:
            self._settle(cache_dict)
        self.current_cache_size -= self._sizes.pop(key, 0)
        self.policy.gone(key)

    def rollback(self, cache_dict: Entries, *, key: Any = None) -> None:
        """See `BaseEvictor.rollback`. Victims that are still there are the newest now."""
        if key is None:
            self._settle(cache_dict)
            return
        self.update_on_remove(key)
        for there in cache_dict:
            self._learn(there, cache_dict)

    def has_expired(self, key: Any) -> bool:
        """See `BaseEvictor.has_expired`."""
        return self.policy.has_expired(key)

    def _candidates(self, cache_dict: Entries) -> Iterator[Any]:
        """Yield who may leave; at the end, and from now on known, entries that no put told of."""
        if self.by_dict:
            yield from cache_dict
            return
        yield from self.policy.order()
        for key in [key for key in cache_dict if key not in self._sizes]:
            self._learn(key, cache_dict)
            yield key

    def _room(self, cache_dict: Entries, given: Room | None, more: int) -> CountingRoom | GivenRoom:
        """Return the room that a caller gave, or that of a sum of sizes which `more` bytes come to."""
        if given is not None:
            return GivenRoom(given)
        over = self.current_cache_size + more - self.MAX_CACHE_SIZE
        return CountingRoom(
            over, lambda key: self._sizes[key] if key in self._sizes else self.get_size(cache_dict[key])
        )

    def _choose(self, cache_dict: Entries, room: Room, **newcomer: Any) -> list[Any] | None:
        expired, candidates = self.policy.expired(), self._candidates(cache_dict)
        return choose(self.policy, cache_dict, room, expired=expired, order=candidates, **newcomer)

    def _let_go(self, victims: list[Any]) -> None:
        for victim in victims:
            self.current_cache_size -= self._sizes.pop(victim, 0)
            self.policy.gone(victim, evicted=True)

    def _count(self, key: Any, size: int, cost: float | None = None) -> None:
        self.policy.added(key, size, cost)
        self.current_cache_size += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _learn(self, key: Any, cache_dict: Entries) -> None:
        """Take in an entry that is there and not known. KeyError where it is not there."""
        if key not in self._sizes:
            self._count(key, self.get_size(cache_dict[key]))

    def _settle(self, cache_dict: Entries) -> None:
        """Learn from the dict what became of a put without a key, and what else changed."""
        pending, self._pending = self._pending, None
        overwrote = False
        if pending is not None:
            self.current_cache_size -= pending
            newest = next(reversed(cache_dict), None)
            overwrote = newest is None or newest in self._sizes
            if not overwrote:
                self._count(newest, pending)
        if overwrote or len(self._sizes) != len(cache_dict):
            for key in [key for key in self._sizes if key not in cache_dict]:
                self.update_on_remove(key)
            for key, value in cache_dict.items():
                size = self.get_size(value)
                if self._sizes.get(key) != size:
                    self._count(key, size)


class LRUEvictor(BudgetEvictor):
    """Evict the least recently used first. The order is that of the dict.

    >>> from collections import OrderedDict
    >>> evictor, entries = LRUEvictor(1000 / 1024**3), OrderedDict()
    >>> for key in "ab":
    ...     evictor.update_on_put(entries, 400, key=key)
    ...     entries[key] = bytes(400)
    ([], <PutStatus.LEGAL: 1>)
    ([], <PutStatus.LEGAL: 1>)
    >>> evictor.update_on_get("a", entries)
    >>> evictor.update_on_put(entries, 400, key="c")
    (['b'], <PutStatus.LEGAL: 1>)
    """

    by_dict = reorders = True


class FIFOEvictor(BudgetEvictor):
    """See `FIFO`. The order is that of the dict."""

    make_order = FIFO
    by_dict = True


class LFUEvictor(BudgetEvictor):
    """See `LFU`."""

    make_order = LFU


class GDSFEvictor(BudgetEvictor):
    """See `GDSF`."""

    make_order = GDSF


class S3FIFOEvictor(BudgetEvictor):
    """See `S3FIFO`."""

    make_order = S3FIFO


class AdaptiveEvictor(BudgetEvictor):
    """See `Adaptive`."""

    make_order = Adaptive
    reorders = True

    @property
    def patience(self) -> float:
        """See `Adaptive`."""
        return self.policy.patience if isinstance(self.policy, Adaptive) else 1.0


class TTLEvictor(BudgetEvictor):
    """See `Limits`. Puts must name their keys.

    Args:
        inner: Evictor or policy whose order holds among the entries that live.
        ttl_seconds: How long an entry lives.
        clock: Returns seconds, never fewer than before.
    """

    needs_keys = True

    def __init__(
        self,
        inner: BaseEvictor | Policy,
        *,
        ttl_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(policy=Limits(policy_of(inner), ttl_seconds=ttl_seconds, clock=clock))
        self.inner, self.reorders = inner, getattr(inner, "reorders", False)


class QuotaEvictor(BudgetEvictor):
    """See `Limits`. Puts must name their keys.

    Args:
        inner: Evictor or policy whose order holds.
        quota: Bytes of each namespace, such as ``"1GiB"``; by default half of the maximum.
        quotas: Bytes of single namespaces, instead of `quota`.
        namespace: Returns the namespace of a key; by default the first element of a tuple.
    """

    needs_keys = True

    def __init__(
        self,
        inner: BaseEvictor | Policy,
        *,
        quota: int | str | None = None,
        quotas: Mapping[Any, int | str] | None = None,
        namespace: Callable[[Any], Any] = first_part,
    ) -> None:
        limits = Limits(policy_of(inner), namespace=namespace, quota=quota, quotas=quotas)
        super().__init__(policy=limits)
        self.inner, self.reorders = inner, getattr(inner, "reorders", False)
        self.quota_of, self.used_by = limits.quota_of, limits.used_by


def policy_of(evictor: BaseEvictor | Policy) -> Policy:
    """Return the order behind one of our evictors; an evictor of another class is asked itself."""
    if isinstance(evictor, Policy):
        return evictor
    if isinstance(evictor, BudgetEvictor) and type(evictor).__module__ == __name__:
        return evictor.policy
    return EvictorPolicy(evictor)
