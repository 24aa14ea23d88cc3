"""Lock: mutual exclusion that a finaliser cannot deadlock and that no interrupt leaves held.

The garbage collector runs finalisers in the middle of anything, on the thread that it interrupts. A finaliser that
calls a cache whose lock its own thread holds can neither wait nor work on what is half changed: it gets `BusyError`.

Ctrl-C raises between any two steps of a program. Both ways to hold this lock give it back whatever raises where:
``with lock:``, and `run`, which is for short changes on a hot path.
"""

import threading
from collections.abc import Callable
from time import sleep
from typing import NoReturn, TypeVar, TypeVarTuple

from agnostic_cache.errors import BusyError

_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")


class Lock:
    """A lock that its own thread cannot take twice.

    >>> lock = Lock()
    >>> with lock:
    ...     lock.is_mine()
    True

    Attributes:
        is_mine: Says whether this thread holds the lock.
    """

    __slots__ = ("_acquire", "_release", "is_mine")

    def __init__(self) -> None:
        """Make one that no thread holds."""
        lock = threading.RLock()  # the only lock that knows its owner; `is_mine` keeps it from being taken twice
        self._acquire, self._release = lock.acquire, lock.release
        self.is_mine: Callable[[], bool] = getattr(lock, "_is_owned")  # noqa: B009 - as threading.Condition

    def run(self, do: Callable[[*_Args], _T], *args: *_Args) -> _T:
        """Return ``do(*args)``, called with the lock held.

        Threads that find the lock taken let others run and look again. Standing in line, each is handed the lock while
        another has the interpreter: eight threads that borrow would take four times as long as one.

        Raises:
            BusyError: This thread holds the lock already.
        """
        if self.is_mine():
            _refuse()
        try:
            while not self._acquire(False):  # noqa: FBT003 - a keyword costs as much as the call
                sleep(0)
            done = do(*args)
            self._release()
        except BaseException:
            if self.is_mine():
                self._release()
            raise
        return done

    def __enter__(self) -> None:
        """Wait for the lock, and take it.

        Raises:
            BusyError: This thread holds it already.
        """
        self._acquire()

    def _turn(self) -> "_Turn":
        if self.is_mine():
            _refuse()
        return _Turn(self.is_mine, self._release)

    __exit__ = property(_turn)  # `with` asks for it before it enters; nothing else refers to it, so it dies with it


class _Turn:
    """Gives a lock back when its ``with`` block ends, or is left by an interrupt just before it ends."""

    __slots__ = ("_is_mine", "_release")

    def __init__(self, is_mine: Callable[[], bool], release: Callable[[], None]) -> None:
        self._is_mine, self._release = is_mine, release

    def __call__(self, *_: object) -> None:
        self._release()

    def __del__(self) -> None:
        if self._is_mine():
            self._release()


def _refuse() -> NoReturn:
    msg = "a finaliser called a cache or storage in the middle of another call of its thread; have another thread call"
    raise BusyError(msg)
