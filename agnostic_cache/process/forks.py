"""What a forked child finds: locks that nobody holds, and no memory or queue of its parent's."""

import os
import weakref
from typing import Protocol


class SupportsFork(Protocol):
    """Something that starts anew in a forked child."""

    def after_fork(self) -> None:
        """Make locks anew, and forget what is the parent's. No thread but this one lives."""
        ...


# What a process has forked is state of the process.
_watched: "weakref.WeakSet[SupportsFork]" = weakref.WeakSet()
_kept: list[object] = []


def watch(thing: SupportsFork) -> None:
    """Start `thing` anew in each forked child, as long as it lives."""
    _watched.add(thing)


def keep(*things: object) -> None:
    """Keep what is the parent's from ever being freed in this child."""
    _kept.extend(things)


def _start_anew() -> None:
    for thing in list(_watched):
        thing.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which forks nothing
    os.register_at_fork(after_in_child=_start_anew)
