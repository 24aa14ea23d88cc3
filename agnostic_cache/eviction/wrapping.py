"""WrappingPolicy: a policy around another one, through its contract alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from agnostic_cache.eviction.policy import Policy, Room


class WrappingPolicy(Policy):
    """Hands everything on to `inner`; a subclass changes what it must.

    Attributes:
        inner: The policy that says the order.
    """

    def __init__(self, inner: Policy) -> None:
        """Wrap a policy that serves nobody else."""
        self.inner = inner
        super().__init__()

    @property
    def max_bytes(self) -> int:
        """See `Policy`: that of `inner`."""
        return self.inner.max_bytes

    @max_bytes.setter
    def max_bytes(self, nbytes: int) -> None:
        self.inner.max_bytes = nbytes

    def reset(self) -> None:
        """See `Policy.reset`."""
        self.inner.reset()

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
        """See `Policy.added`."""
        self.inner.added(key, nbytes, cost)

    def used(self, key: Any) -> None:
        """See `Policy.used`."""
        self.inner.used(key)

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """See `Policy.gone`."""
        self.inner.gone(key, evicted=evicted)

    def order(self) -> Iterator[Any]:
        """See `Policy.order`."""
        return self.inner.order()

    def has_expired(self, key: Any) -> bool:
        """See `Policy.has_expired`."""
        return self.inner.has_expired(key)

    def expired(self) -> Iterable[Any]:
        """See `Policy.expired`."""
        return self.inner.expired()

    def narrow(
        self,
        room: Room,
        entries: Mapping[Any, Any],
        newcomer: Any,
        nbytes: int,
        cost: float | None,
        leaving: Sequence[Any],
    ) -> Room:
        """See `Policy.narrow`."""
        return self.inner.narrow(room, entries, newcomer, nbytes, cost, leaving)
