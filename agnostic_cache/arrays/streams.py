"""Streams: devices whose computations go on after the call that starts them has returned."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class SupportsStreams(Protocol):
    """Capability of an adapter: it tells its framework which memory a stream still reads.

    A framework that keeps such memory by itself, as JAX does, needs none of this.
    """

    def is_queued(self, device: str) -> bool:
        """Say whether computations on `device` may still read memory that was freed after they were started.

        Then `mark_read` is called at the end of each borrow.
        """
        ...

    def mark_read(self, arrays: Sequence[Any]) -> None:
        """Keep the memory of `arrays` from other use until what the current stream was asked to do is done."""
