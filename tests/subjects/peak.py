"""How much memory a call takes at its peak, seen by the kernel."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

RESET = Path("/proc/self/clear_refs")
"""Exists on Linux only."""


def peak_bytes(call: Callable[[], object]) -> int:
    """Return how far the resident memory of this process rises above what it is now, in the course of `call`."""
    trim()
    RESET.write_text("5")  # the peak, to what it is now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def resident_bytes() -> int:
    """Return the resident memory of this process, or 0 where the kernel does not tell."""
    return _status("VmRSS") if RESET.exists() else 0


def trim() -> None:
    """Give memory that is free back to the system, so that who allocates next gets it fresh."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
