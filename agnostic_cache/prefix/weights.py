"""What a model's weights add to the context of its states: nothing, while they are those of the namespace."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from agnostic_cache.fingerprint import PREFIX
from agnostic_cache.process.lock import Lock


class Weights:
    """The weights that one namespace has met. Safe to use from several threads.

    Attributes:
        named: The fingerprint that the namespace stands for; None before that is known.
    """

    def __init__(self, namespace: str, fingerprint: str | None = None) -> None:
        """Have met none.

        Args:
            namespace: A fingerprint, or a name that was chosen.
            fingerprint: What the chosen name stands for; by default the weights that are met first.
        """
        self.named = fingerprint or (namespace if namespace.startswith(PREFIX) else None)
        self._lock = Lock()  # guards what follows, and `named`
        self._known: weakref.WeakKeyDictionary[Any, dict[Hashable, str]] = weakref.WeakKeyDictionary()

    def context(self, model: object, stamp: Hashable, fingerprint: Callable[[], str]) -> bytes:
        """Return what to put into the context; see `PrefixCache.weights_context`."""
        known = self._known.get(model)
        if known is None or stamp not in known:
            found = fingerprint()
            with self._lock:
                if self.named is None:
                    self.named = found
                known = self._known.setdefault(model, {})
                # A fingerprint is a sample: of weights that changed under way, it may not tell.
                name = "" if not known and found == self.named else f"{found} {stamp if known else ''}"
                known.setdefault(stamp, name)
        return known[stamp].encode()
