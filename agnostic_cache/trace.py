"""The one hook that tells what happens inside: free when it is not set."""

from collections.abc import Callable, Mapping

Trace = Callable[[str, Mapping[str, object]], None]
"""Called as ``trace(event, facts)``, e.g. ``trace("state_cache.evict", {"nbytes": 4096})``.

It is called without a lock held, in the thread that did it, after the fact. It must be quick and must not raise. Facts
are numbers, names and keys: never tokens, never arrays.
"""
