"""What a model's weights add to the context of its states: nothing, while they are those of the namespace."""

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from agnostic_cache.fingerprint import PREFIX


class Weights:
    """The weights that one namespace has met. Safe to use from several threads."""

    def __init__(self, namespace: str) -> None:
        """Have met none."""
        self._namespace = namespace
        self._lock = threading.Lock()  # guards what follows
        self._named: str | None = None  # the fingerprint that the namespace stands for
        self._known: weakref.WeakKeyDictionary[Any, dict[Hashable, str]] = weakref.WeakKeyDictionary()

    def context(self, model: object, stamp: Hashable, fingerprint: Callable[[], str]) -> bytes:
        """Return what to put into the context; see `PrefixCache.weights_context`."""
        known = self._known.get(model)
        if known is None or stamp not in known:
            found = fingerprint()
            with self._lock:
                if self._named is None:
                    self._named = self._namespace if self._namespace.startswith(PREFIX) else found
                known = self._known.setdefault(model, {})
                # A fingerprint is a sample: of weights that changed under way, it may not tell.
                name = "" if not known and found == self._named else f"{found} {stamp if known else ''}"
                known.setdefault(stamp, name)
        return known[stamp].encode()
