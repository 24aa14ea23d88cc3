"""Limits: what a client of the server may cost."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client, and all of them together, may take.

    Attributes:
        max_connections: Connections at a time; who comes then is turned away.
        read_seconds: Time for the rest of a request whose first byte is there, and for taking an answer.
        min_bytes_per_second: How fast a body must be, sent or taken; so long it has beyond `read_seconds`.
        idle_seconds: Time without a request, after which a connection is closed, or None. LMCache's clients never
            connect again.
        grace_seconds: Time that requests under way have when the server stops.
        max_waiting_bytes: Memory for bodies on their way to a storage that does not keep them there. Who sends more
            waits; a body that is larger is refused.
        threads: Calls to such a storage at a time.
    """

    max_connections: int = 1024
    read_seconds: float = 10.0
    min_bytes_per_second: int = 1024 * 1024
    idle_seconds: float | None = None
    grace_seconds: float = 10.0
    max_waiting_bytes: int = 64 * 1024 * 1024
    threads: int = 8

    def seconds_for(self, nbytes: int) -> float:
        """Return the time that so many bytes may take."""
        return self.read_seconds + nbytes / self.min_bytes_per_second
