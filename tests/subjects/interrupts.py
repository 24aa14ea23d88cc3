"""Ctrl-C at every line: an exception raised where a program would be interrupted, line by line."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

PACKAGE = "agnostic_cache"


class Interrupt(BaseException):
    """What Ctrl-C raises, by a name that nobody else uses."""


def interrupted_at(line: int, do: Callable[[], object]) -> bool:
    """Call `do`, and raise `Interrupt` before the n-th line of the package that it runs, the first being 1.

    Lines of ``__del__`` itself do not count: Python swallows what is raised there.

    Returns:
        Whether it came so far. What it raised is gone, and with it all that its frames referred to.
    """
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if event == "call":
            return trace if PACKAGE in frame.f_code.co_filename and frame.f_code.co_name != "__del__" else None
        if event == "line":
            seen += 1
            if seen == line:
                sys.settrace(None)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        do()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return seen >= line
