"""QuotaEvictor: another policy, in which no namespace holds more than its share."""

from collections.abc import Callable, Mapping
from typing import Any

from agnostic_cache.eviction.budget import BudgetEvictor
from agnostic_cache.eviction.evictor import Entries, PutStatus, Room
from agnostic_cache.eviction.wrapping import WrappingEvictor
from agnostic_cache.sizes import parse_size


def first_part(key: Any) -> Any:
    """Return the namespace of a key: the first element of a tuple; all other keys share one, None."""
    return key[0] if isinstance(key, tuple) and key else None


class QuotaEvictor(WrappingEvictor):
    """Keep each namespace within a number of bytes: over it, a namespace evicts its own entries, and nobody else's.

    So a tenant takes at most its quota from the others. Quotas may add up to more than the maximum. They count sizes as
    they are put: memory that two entries share counts for both.

    Args:
        inner: Chooses, among all entries or those of one namespace.
        quota: Bytes of each namespace, such as ``"1GiB"``; by default half of the maximum.
        quotas: Bytes of single namespaces, instead of `quota`.
        namespace: Returns the namespace of a key.

    Raises:
        InvalidSizeError: A quota is no size.

    Source: the partitions of multi-tenant caches, such as memcached's slabs per tenant in A. Cidon et al., "Memshare",
    USENIX ATC 2017; here a limit, without reservations.
    """

    def __init__(
        self,
        inner: BudgetEvictor | WrappingEvictor,
        *,
        quota: int | str | None = None,
        quotas: Mapping[Any, int | str] | None = None,
        namespace: Callable[[Any], Any] = first_part,
    ) -> None:
        super().__init__(inner)
        self._quota = None if quota is None else parse_size(quota)
        self._quotas = {name: parse_size(size) for name, size in (quotas or {}).items()}
        self._namespace = namespace
        self._start()

    def _start(self) -> None:
        self._sizes: dict[Any, int] = {}
        self._used: dict[Any, int] = {}  # holds: sum of _sizes, per namespace

    def quota_of(self, namespace: Any) -> int:
        """Return the most bytes that a namespace may hold."""
        default = self.MAX_CACHE_SIZE // 2 if self._quota is None else self._quota
        return self._quotas.get(namespace, default)

    def used_by(self, namespace: Any) -> int:
        """Return the bytes that a namespace holds."""
        return self._used.get(namespace, 0)

    def update_on_put(
        self,
        cache_dict: Entries,
        cache_size: int,
        *,
        key: Any = None,
        cost: float | None = None,
        room: Room | None = None,
    ) -> tuple[list[Any], PutStatus]:
        """See `BaseEvictor.update_on_put`. ``ILLEGAL`` also where the newcomer is larger than the quota."""
        namespace = self._namespace(key)
        over = self.used_by(namespace) + cache_size - self._sizes.get(key, 0) - self.quota_of(namespace)
        if over > 0:
            room = _QuotaRoom(self, room or self.room(cache_dict, cache_size, key=key), namespace, over)
        victims, status = super().update_on_put(cache_dict, cache_size, key=key, cost=cost, room=room)
        if status is PutStatus.LEGAL:
            for victim in victims:
                self._count(victim, 0)
            self._count(key, cache_size)
        return victims, status

    def evict(self, cache_dict: Entries, *, room: Room | None = None) -> list[Any]:
        """See `BaseEvictor.evict`."""
        victims = super().evict(cache_dict, room=room)
        for victim in victims:
            self._count(victim, 0)
        return victims

    def update_on_remove(self, key: Any, cache_dict: Entries | None = None) -> None:
        """See `BaseEvictor.update_on_remove`."""
        self._count(key, 0)
        super().update_on_remove(key, cache_dict)

    def rollback(self, cache_dict: Entries, *, key: Any = None) -> None:
        """See `BaseEvictor.rollback`."""
        self._count(key, 0)
        super().rollback(cache_dict, key=key)
        for there, value in cache_dict.items():
            if there not in self._sizes:
                self._count(there, self.get_size(value))

    def reset(self) -> None:
        """Forget every entry."""
        super().reset()
        self._start()

    def _count(self, key: Any, size: int) -> None:
        """Let the key hold `size` bytes from now on; none where that is 0."""
        namespace = self._namespace(key)
        used = self.used_by(namespace) + size - self._sizes.pop(key, 0)
        if size:
            self._sizes[key] = size
        if used:
            self._used[namespace] = used
        else:
            self._used.pop(namespace, None)


class _QuotaRoom:
    """The room of a newcomer whose namespace is `over` its quota: until it no longer is, only its own entries leave."""

    __slots__ = ("_evictor", "_namespace", "_over", "_room")

    def __init__(self, evictor: QuotaEvictor, room: Room, namespace: Any, over: int) -> None:
        self._evictor, self._room, self._namespace, self._over = evictor, room, namespace, over

    def short(self) -> bool:
        return self._over > 0 or self._room.short()

    def let_go(self, key: Any) -> bool:
        if self._over <= 0:
            return self._room.let_go(key)
        if self._evictor._namespace(key) != self._namespace:
            return False
        self._room.let_go(key)  # whether it helps there or not
        self._over -= self._evictor._sizes.get(key, 0)
        return True
