"""LRUEvictor: the least recently used entry leaves first."""

from collections.abc import Iterator, Sequence
from typing import Any

from agnostic_cache.eviction.budget import BudgetEvictor
from agnostic_cache.eviction.evictor import Entries


class LRUEvictor(BudgetEvictor):
    """Evict the least recently used first. The order is that of the dict.

    Source: LMCache's ``LRUEvictor``: its unit, its order of victims and its one ``ILLEGAL`` case are kept. Mended: an
    overwritten or removed entry is counted right, pinned entries are passed over, and a put can be rolled back.

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

    def update_on_get(self, key: Any, cache_dict: Entries) -> None:
        """Make the entry the newest of the dict."""
        if self._pending is not None:
            self._settle(cache_dict)  # while its newest entry still is the one that was put last
        cache_dict.move_to_end(key)

    def _order(self, cache_dict: Entries, leaving: Sequence[Any]) -> Iterator[Any]:  # noqa: ARG002
        return iter(cache_dict)

    def _strangers(self, cache_dict: Entries, leaving: Sequence[Any]) -> Iterator[Any]:  # noqa: ARG002
        return iter(())  # the dict knows everybody
