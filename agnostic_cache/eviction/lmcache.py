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
from agnostic_cache.eviction.choose import choose
from agnostic_cache.eviction.evictor import BaseEvictor, Entries, PutStatus, check_size
from agnostic_cache.eviction.evictor_policy import EvictorPolicy
from agnostic_cache.eviction.fifo import FIFO
from agnostic_cache.eviction.gdsf import GDSF
from agnostic_cache.eviction.lfu import LFU
from agnostic_cache.eviction.lru import LRU
from agnostic_cache.eviction.never import Never
from agnostic_cache.eviction.policy import Policy, Room
from agnostic_cache.eviction.quota import Quota, first_part
from agnostic_cache.eviction.s3fifo import S3FIFO
from agnostic_cache.eviction.ttl import TTL

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

    make_order: ClassVar[Callable[[], Policy]] = LRU
    by_dict: ClassVar[bool] = False
    """The dict is in the order of the policy, and stands for it: its owner may reorder it."""
    reorders: ClassVar[bool] = False
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
        over = self.current_cache_size + cache_size - before - self.MAX_CACHE_SIZE
        asked = _Given(room) if room else _SumOfSizes(self._size_of(cache_dict), over)
        victims = choose(
            self.policy,
            cache_dict,
            asked,
            newcomer=key,
            nbytes=cache_size,
            cost=cost,
            expired=self.policy.expired(),
            order=self._candidates(cache_dict),
        )
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
        over = self.current_cache_size - self.MAX_CACHE_SIZE
        asked = _Given(room) if room else _SumOfSizes(self._size_of(cache_dict), over)
        expired = self.policy.expired()
        choose(self.policy, cache_dict, asked, expired=expired, order=self._candidates(cache_dict))
        self._let_go(asked.released)
        return asked.released

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

    def _size_of(self, cache_dict: Entries) -> Callable[[Any], int]:
        return lambda key: self._sizes[key] if key in self._sizes else self.get_size(cache_dict[key])

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


class _SumOfSizes:
    """The `Room` of a container whose bytes are the sum of its entries' sizes."""

    def __init__(self, size_of: Callable[[Any], int], over: int) -> None:
        self._size_of, self._over = size_of, over
        self.released: list[Any] = []

    def short(self) -> bool:
        return self._over > 0

    def release(self, key: Any) -> bool:
        self._over -= self._size_of(key)
        self.released.append(key)
        return True


class _Given:
    """The `Room` of a caller, whose `release` may still be called ``let_go``."""

    def __init__(self, room: Any) -> None:
        self.short: Callable[[], bool] = room.short
        self._release: Callable[[Any], bool] = getattr(room, "let_go", None) or room.release
        self.released: list[Any] = []

    def release(self, key: Any) -> bool:
        found = self._release(key)
        if found:
            self.released.append(key)
        return found


class DummyEvictor(BaseEvictor):
    """Never evicts, counts nothing, refuses nothing. Source: LMCache's, for a container that has no limit."""

    def __init__(self) -> None:
        self.policy = Never()

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
    """See `TTL`. Puts must name their keys.

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
        self.inner = inner
        super().__init__(policy=TTL(policy_of(inner), ttl_seconds=ttl_seconds, clock=clock))


class QuotaEvictor(BudgetEvictor):
    """See `Quota`. Puts must name their keys.

    Args:
        inner: Evictor or policy whose order holds.
        quota: Bytes of each namespace, such as ``"1GiB"``; by default half of the maximum.
        quotas: Bytes of single namespaces, instead of `quota`.
        namespace: Returns the namespace of a key.
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
        self.inner = inner
        own = Quota(policy_of(inner), quota=quota, quotas=quotas, namespace=namespace)
        self.quota_of, self.used_by = own.quota_of, own.used_by
        super().__init__(policy=own)


_CONTRACT = [name for name in vars(BaseEvictor) if not name.startswith("_")]


def policy_of(evictor: BaseEvictor | Policy) -> Policy:
    """Return the order behind an evictor; one whose class overrides what ours do is asked itself."""
    if isinstance(evictor, Policy):
        return evictor
    if isinstance(evictor, BudgetEvictor | DummyEvictor):
        theirs = (
            vars(kind) for kind in type(evictor).__mro__ if kind.__module__ != __name__ and kind is not BaseEvictor
        )
        if not any(name in names for names in theirs for name in _CONTRACT):
            return evictor.policy
    return EvictorPolicy(evictor)
