"""Who computes what is missing, so that others who miss the same can wait for it."""

import threading
from collections.abc import Sequence


class Claim:
    """The right to compute what stands under a key, until its `end`."""

    __slots__ = ("_flights", "key", "thread")

    def __init__(self, flights: "SingleFlight", key: bytes) -> None:
        """Claim `key` for this thread."""
        self._flights = flights
        self.key = key
        self.thread = threading.get_ident()

    def end(self) -> None:
        """Let others claim the key. Idempotent, and nothing where it landed already."""
        self._flights.give_up(self)


class SingleFlight:
    """Claims on keys that are being computed. Safe to use from several threads."""

    __slots__ = ("_changed", "_claims")

    def __init__(self) -> None:
        """Start without a claim."""
        self._changed = threading.Condition()  # guards _claims
        self._claims: dict[bytes, Claim] = {}

    def claim(self, key: bytes) -> Claim | None:
        """Claim a key, or wait until whoever has it lets go.

        Returns:
            The claim; or None after a wait: look again, it may be computed now. A thread never waits for itself.
        """
        with self._changed:
            other = self._claims.get(key)
            if other is None or other.thread == threading.get_ident():
                return self._claims.setdefault(key, Claim(self, key))
            self._changed.wait_for(lambda: self._claims.get(key) is not other)
            return None

    def spread(self, keys: Sequence[bytes]) -> None:
        """Extend a claim on one of `keys` to all that nobody claims: they come one after another, and land together."""
        if not self._claims:
            return
        with self._changed:
            claim = next((self._claims[key] for key in keys if key in self._claims), None)
            if claim is not None:
                for key in keys:
                    self._claims.setdefault(key, claim)

    def land(self, keys: Sequence[bytes]) -> None:
        """End the claims on `keys`, whoever has them."""
        if not self._claims:
            return
        with self._changed:
            for key in keys:
                self._claims.pop(key, None)
            self._changed.notify_all()

    def give_up(self, claim: Claim) -> None:
        """End a claim, where it did not land."""
        if claim.key not in self._claims:
            return
        with self._changed:
            if self._claims.get(claim.key) is claim:
                del self._claims[claim.key]
                self._changed.notify_all()
