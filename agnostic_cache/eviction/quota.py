"""Quota: another policy, in which no namespace holds more than its share."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agnostic_cache.eviction.policy import Policy, Room
from agnostic_cache.eviction.wrapping import WrappingPolicy
from agnostic_cache.sizes import parse_size


def first_part(key: Any) -> Any:
    """Return the namespace of a key: the first element of a tuple; all other keys share one, None."""
    return key[0] if isinstance(key, tuple) and key else None


class Quota(WrappingPolicy):
    """Keep each namespace within a number of bytes: over it, a namespace evicts its own entries, and no others.

    So a tenant takes at most its quota from the others. Quotas may add up to more than the budget. They count sizes as
    they are put: memory that two entries share counts for both.

    Args:
        inner: The order of the victims, among all entries or those of one namespace. Looking for one of a namespace is
            linear in the entries of the others that come before it.
        quota: Bytes of each namespace, such as ``"1GiB"``; by default half of the budget.
        quotas: Bytes of single namespaces, instead of `quota`.
        namespace: Returns the namespace of a key. What it raises reaches the caller of the put, and nothing changed.

    Raises:
        InvalidSizeError: A quota is no size.

    Source: the partitions of multi-tenant caches, such as memcached's slabs per tenant in A. Cidon et al., "Memshare",
    USENIX ATC 2017; here a limit, without reservations.
    """

    def __init__(
        self,
        inner: Policy,
        *,
        quota: int | str | None = None,
        quotas: Mapping[Any, int | str] | None = None,
        namespace: Callable[[Any], Any] = first_part,
    ) -> None:
        self._quota = None if quota is None else parse_size(quota)
        self._quotas = {name: parse_size(size) for name, size in (quotas or {}).items()}
        self._namespace = namespace
        super().__init__(inner)

    def reset(self) -> None:
        """See `Policy.reset`."""
        super().reset()
        self._held: dict[Any, tuple[Any, int]] = {}  # namespace and bytes by key
        self._used: Counter[Any] = Counter()  # holds: the sum of the bytes in _held, per namespace

    def quota_of(self, namespace: Any) -> int:
        """Return the most bytes that a namespace may hold."""
        default = self.max_bytes // 2 if self._quota is None else self._quota
        return self._quotas.get(namespace, default)

    def used_by(self, namespace: Any) -> int:
        """Return the bytes that a namespace holds."""
        return self._used[namespace]

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
        """See `Policy.added`."""
        namespace = self._namespace(key)
        super().added(key, nbytes, cost)
        self._drop(key)
        self._held[key] = (namespace, nbytes)
        self._used[namespace] += nbytes

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """See `Policy.gone`."""
        super().gone(key, evicted=evicted)
        self._drop(key)

    def _drop(self, key: Any) -> None:
        if key in self._held:
            namespace, nbytes = self._held.pop(key)
            self._used[namespace] -= nbytes
            if not self._used[namespace]:
                del self._used[namespace]

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
        if newcomer is not None:
            namespace = self._namespace(newcomer)
            going = sum(self._bytes_in(namespace, key) for key in {newcomer, *leaving})
            over = self.used_by(namespace) + nbytes - going - self.quota_of(namespace)
            if over > 0:
                room = _QuotaRoom(room, over, lambda key: self._bytes_in(namespace, key))
        return super().narrow(room, entries, newcomer, nbytes, cost, leaving)

    def _bytes_in(self, namespace: Any, key: Any) -> int:
        """Return the bytes that `namespace` holds under `key`."""
        owner, nbytes = self._held.get(key, (None, 0))
        return nbytes if owner == namespace else 0


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
