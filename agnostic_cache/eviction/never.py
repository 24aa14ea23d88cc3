"""Never: no entry leaves; a full container refuses."""

from collections.abc import Iterator
from typing import Any

from agnostic_cache.eviction.policy import Policy


class Never(Policy):
    """Evict nothing, and remember nothing."""

    def reset(self) -> None:
        """See `Policy.reset`."""

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
        """See `Policy.added`."""

    def used(self, key: Any) -> None:
        """Do nothing, whatever the key."""

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """See `Policy.gone`."""

    def order(self) -> Iterator[Any]:
        """Yield nothing."""
        return iter(())
