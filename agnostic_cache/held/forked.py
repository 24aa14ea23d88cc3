"""Forked: memory that outstanding forks of entries, which `get` and `load` gave, keep alive besides the cache."""

from collections.abc import Callable, Iterable

from agnostic_cache.errors import ReleasedError
from agnostic_cache.held.entry import Entry  # noqa: TC001 - no import is for checkers alone


class Forked:
    """What forks may keep. Needs no lock: each step is one operation of a dict or list.

    Attributes:
        entries: Entries that were lent since they were last found to have no fork. Only those can have one.
    """

    def __init__(self) -> None:
        """Know of no fork."""
        self.entries: dict[Entry, None] = {}
        self._orphans: list[tuple[int, Callable[[], bool]]] = []  # of evicted entries: bytes, and whether they live

    def add_orphans(self, orphans: Iterable[tuple[int, Callable[[], bool]]]) -> None:
        """Take note of memory that outlived its entry: bytes, and a function that says whether it is alive."""
        self._orphans.extend(orphans)

    def nbytes(self) -> int:
        """Return the bytes that forks keep alive. Linear in what was lent and evicted since the last time."""
        shared = 0
        for entry in list(self.entries):
            try:
                nbytes = entry.state.shared_nbytes() if entry.state is not None else 0
            except ReleasedError:  # another thread frees it just now
                nbytes = 0
            shared += nbytes
            if not nbytes and not entry.borrows:
                self.entries.pop(entry, None)
        for orphan in list(self._orphans):
            if orphan[1]():
                shared += orphan[0]
            elif orphan in self._orphans:
                self._orphans.remove(orphan)
        return shared
