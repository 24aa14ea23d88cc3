"""FIFOEvictor: the oldest entry leaves first, however much it is used."""

from collections.abc import Iterator, Sequence
from typing import Any

from agnostic_cache.eviction.budget import BudgetEvictor
from agnostic_cache.eviction.evictor import Entries


class FIFOEvictor(BudgetEvictor):
    """Evict in the order of insertion. The order is that of the dict.

    Source: the textbook's first-in first-out; the yardstick that another policy must beat.
    """

    def update_on_get(self, key: Any, cache_dict: Entries) -> None:
        """Look that the entry is there, and change nothing."""
        cache_dict[key]

    def _order(self, cache_dict: Entries, leaving: Sequence[Any]) -> Iterator[Any]:  # noqa: ARG002
        return iter(cache_dict)

    def _strangers(self, cache_dict: Entries, leaving: Sequence[Any]) -> Iterator[Any]:  # noqa: ARG002
        return iter(())  # the dict knows everybody
