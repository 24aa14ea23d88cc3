"""Limits: another policy, in which entries grow too old, and no namespace holds more than its share."""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, takewhile
from typing import Any, NamedTuple

from agnostic_cache.errors import InvalidSizeError
from agnostic_cache.eviction.policy import Policy, Room
from agnostic_cache.sizes import parse_size


def first_part(key: Any) -> Any:
    """Return the namespace of a key: the first element of a tuple; all other keys share one, None."""
    return key[0] if isinstance(key, tuple) and key else None


class _Held(NamedTuple):
    namespace: Any
    nbytes: int
    put_at: float


class Limits(Policy):
    """Victims leave in the order of `inner`, within a time to live (TTL), a quota for each namespace, or both.

    TTL: an entry lives for a while after it was put, whether it is used or not. The container asks `has_expired` before
    it hands an entry out, and passes `expired` to `choose`: those leave with the next put, needed or not, unless they
    are pinned.

    Quota: a namespace that exceeds it evicts its own entries and no others, so that a tenant takes at most its quota
    from the others. Quotas may add up to more than the budget. They count sizes as they are put: memory that two
    entries share counts for both. Looking for a victim of one namespace is linear in the entries of others that stand
    before it.

    Args:
        inner: The order; serves nobody else.
        ttl_seconds: How long an entry lives; by default for ever.
        clock: Returns seconds, never fewer than before.
        namespace: Returns the namespace of a key; None for no quotas. What it raises reaches the caller of the put, and
            nothing changed.
        quota: Bytes of each namespace, such as ``"1GiB"``; by default half of the budget.
        quotas: Bytes of single namespaces, instead of `quota`.

    Raises:
        InvalidSizeError: `ttl_seconds` is not a positive number, or a quota is no size.

    Source: the TTL of HTTP caches, counted from the put and never renewed by use; the partitions of multi-tenant
    caches, as in A. Cidon et al., "Memshare", USENIX ATC 2017, here a limit, without reservations.
    """

    def __init__(
        self,
        inner: Policy,
        *,
        ttl_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        namespace: Callable[[Any], Any] | None = None,
        quota: int | str | None = None,
        quotas: Mapping[Any, int | str] | None = None,
    ) -> None:
        if ttl_seconds is not None and not (math.isfinite(ttl_seconds) and ttl_seconds > 0):
            msg = f"ttl_seconds={ttl_seconds!r}; give a positive number of seconds"
            raise InvalidSizeError(msg)
        self.inner = inner
        self._ttl, self._clock, self._namespace = ttl_seconds, clock, namespace
        self._quota = None if quota is None else parse_size(quota)
        self._quotas = {name: parse_size(size) for name, size in (quotas or {}).items()}
        super().__init__()

    @property
    def max_bytes(self) -> int:
        """See `Policy`."""
        return self.inner.max_bytes

    @max_bytes.setter
    def max_bytes(self, nbytes: int) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.inner.max_bytes = nbytes

    def reset(self) -> None:
        """See `Policy.reset`."""
        self.inner.reset()
        self._held: OrderedDict[Any, _Held] = OrderedDict()  # by key, the one put first at the front
        self._used = Counter[Any]()  # holds: the sum of the bytes in _held, per namespace

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
        """See `Policy.added`. An overwritten entry lives anew."""
        held = _Held(self._namespace(key) if self._namespace else None, nbytes, self._clock())
        self.inner.added(key, nbytes, cost)
        self._drop(key)
        self._held[key] = held
        self._used[held.namespace] += nbytes

    def used(self, key: Any) -> None:
        """See `Policy.used`."""
        self.inner.used(key)

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """See `Policy.gone`. To the inner policy, an expired entry was not evicted."""
        self.inner.gone(key, evicted=evicted and not self.has_expired(key))
        self._drop(key)

    def _drop(self, key: Any) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._used[held.namespace] -= held.nbytes
            if not self._used[held.namespace]:
                del self._used[held.namespace]

    def order(self) -> Iterator[Any]:
        """See `Policy.order`."""
        return self.inner.order()

    def has_expired(self, key: Any) -> bool:
        """See `Policy.has_expired`."""
        held = self._held.get(key)
        return (held is not None and self._is_over(held)) or self.inner.has_expired(key)

    def expired(self) -> Iterator[Any]:
        """See `Policy.expired`. The oldest first."""
        over = takewhile(lambda item: self._is_over(item[1]), self._held.items())
        return chain((key for key, _ in over), self.inner.expired())

    def _is_over(self, held: _Held) -> bool:
        return self._ttl is not None and self._clock() - held.put_at >= self._ttl

    def quota_of(self, namespace: Any) -> int:
        """Return the most bytes that a namespace may hold."""
        return self._quotas.get(namespace, self.max_bytes // 2 if self._quota is None else self._quota)

    def used_by(self, namespace: Any) -> int:
        """Return the bytes that a namespace holds."""
        return self._used[namespace]

    def narrow(
        self,
        room: Room,
        entries: Mapping[Any, Any],
        newcomer: Any,
        nbytes: int,
        cost: float | None,
        leaving: Sequence[Any],
    ) -> Room:
        """See `Policy.narrow`. A newcomer larger than its quota is refused."""
        if newcomer is not None and self._namespace is not None:
            namespace = self._namespace(newcomer)

            def own_bytes(key: Any) -> int:
                held = self._held.get(key)
                return held.nbytes if held is not None and held.namespace == namespace else 0

            kept = self.used_by(namespace) - sum(map(own_bytes, {newcomer, *leaving}))
            over = kept + nbytes - self.quota_of(namespace)
            if over > 0:
                room = _QuotaRoom(room, over, own_bytes)
        return self.inner.narrow(room, entries, newcomer, nbytes, cost, leaving)


class _QuotaRoom:
    """The room of a newcomer whose namespace is `over` its quota: until it no longer is, only its own entries leave."""

    def __init__(self, room: Room, over: int, own_bytes: Callable[[Any], int]) -> None:
        self._room, self._over, self._own_bytes = room, over, own_bytes

    def short(self) -> bool:
        return self._over > 0 or self._room.short()

    def release(self, key: Any) -> bool:
        if self._over <= 0:
            return self._room.release(key)
        own = self._own_bytes(key)
        if own:
            self._room.release(key)  # whether it helps there or not
            self._over -= own
        return bool(own)
