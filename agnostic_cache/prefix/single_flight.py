"""SingleFlight: who computes what is missing, so that others who miss the same can wait for it."""

import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

_LOOK_AGAIN = 0.05  # seconds: a waiter whom an interrupt kept from being woken notices after that


class Claim:
    """The right of one thread to compute what stands under a key, until its `end`, or until nobody refers to it.

    Attributes:
        ended: Held until the end: who takes it and gives it back has waited for that.
        keys: What it is for.
        thread: Whose it is.
    """

    __slots__ = ("__weakref__", "_claims", "ended", "keys", "thread")

    def __init__(self, claims: "dict[bytes, weakref.ref[Claim]]", key: bytes) -> None:
        """Be a claim that nobody knows of yet."""
        self._claims = claims
        self.ended = threading.Lock()
        self.ended.acquire()
        self.keys = [key]
        self.thread = threading.get_ident()

    def end(self) -> None:
        """Let others claim its keys. Idempotent; a key that another has claimed since stays that one's."""
        for key in self.keys:
            known = self._claims.get(key)
            if known is not None and known() in (self, None):
                self._claims.pop(key, None)
        with suppress(RuntimeError):  # it had ended
            self.ended.release()

    def __del__(self) -> None:
        """End, if it ever was one."""
        if hasattr(self, "thread"):
            self.end()


class SingleFlight:
    """Claims on keys that are being computed. Safe to use from several threads: each step is one of a dict."""

    __slots__ = ("_claims",)

    def __init__(self) -> None:
        """Start without a claim."""
        self._claims: dict[bytes, weakref.ref[Claim]] = {}  # weak: a claim that an interrupt lost has ended

    def claim(self, key: bytes) -> Claim | None:
        """Claim a key, or wait until whoever has it lets go.

        A thread that has a claim never waits, for itself or others: two that wait for each other would do so for ever.
        It is given a claim that nobody waits for, and computes.

        Returns:
            The claim; or None after a wait: look again, it may be computed now.
        """
        mine = Claim(self._claims, key)
        known = self._claims.setdefault(key, weakref.ref(mine))
        other = known()
        if other is mine:
            return mine
        if other is None:
            if self._claims.get(key) is known:
                self._claims.pop(key, None)
            return None
        if any(_owner(claim) == mine.thread for claim in list(self._claims.values())):
            return mine
        ended = other.ended
        del other  # a claim that only its waiters know of has ended
        while self._claims.get(key) is known and known() is not None:
            if ended.acquire(timeout=_LOOK_AGAIN):
                ended.release()  # for the next one who waits
        return None

    def spread(self, keys: Sequence[bytes]) -> None:
        """Extend a claim on one of `keys` to all that nobody claims: they come one after another, and land together."""
        if not self._claims:
            return
        known = next((self._claims[key] for key in keys if key in self._claims), None)
        claim = None if known is None else known()
        if claim is not None and known is not None:
            for key in keys:
                claim.keys.append(key)  # first: it is let go with the claim, whatever comes between
                self._claims.setdefault(key, known)

    def land(self, keys: Sequence[bytes]) -> None:
        """End the claims on `keys`, whoever has them."""
        if not self._claims:
            return
        for key in keys:
            known = self._claims.pop(key, None)
            claim = None if known is None else known()
            if claim is not None:
                claim.end()


def _owner(claim: "weakref.ref[Claim]") -> int | None:
    found = claim()
    return None if found is None else found.thread
