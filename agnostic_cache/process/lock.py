"""Lock: one that refuses a finaliser that comes at a bad time, where a plain lock would wait for ever.

The garbage collector runs finalisers in the middle of anything, on the thread that it interrupts. One that calls a
storage whose lock that thread is holding can neither wait for it nor go on with what is half done.
"""

import threading
from contextlib import AbstractContextManager

from agnostic_cache.errors import StorageBusyError


class Lock:
    """A lock, taken by ``with lock.taken():``."""

    __slots__ = ("_is_mine", "_lock")

    def __init__(self) -> None:
        """Make one that nobody holds."""
        self._lock = threading.RLock()
        self._is_mine = getattr(self._lock, "_is_owned")  # noqa: B009 - as threading.Condition

    def taken(self) -> AbstractContextManager[bool]:
        """Return what takes the lock and gives it back, whatever interrupts that.

        Raises:
            StorageBusyError: This thread holds it already.
        """
        if self._is_mine():
            msg = "a finaliser called a storage that it had interrupted; have it leave the call to another thread"
            raise StorageBusyError(msg)
        return self._lock
