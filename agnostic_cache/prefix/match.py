"""Match: what a prefix cache has of a prompt, borrowed until it is loaded or closed."""

from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from agnostic_cache.errors import ReleasedError
from agnostic_cache.lease import Borrows
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.template import fill_template

if TYPE_CHECKING:
    from agnostic_cache.prefix.single_flight import Claim


class Match:
    """The longest prefix of a prompt that a `PrefixCache` has. Falsy where that is nothing.

    Use it in a ``with`` block, or close it; `load` closes it too. For one thread.

    Attributes:
        length: Tokens of the prompt that it covers: fewer than the prompt has, so that one is left to compute.
        known: Tokens up to which whole blocks are here. More than `length` where a state cannot end there yet: the
            prompt parts from another one, and a state stored there would serve both.
    """

    __slots__ = ("_claim", "_count", "_layout", "_leases", "_rows", "known", "length")

    def __init__(self, leases: list[Borrows], count: int, rows: int, length: int, layout: KVLayout | None) -> None:
        """Take over leases on blocks, of which `count` matter, the last one up to `rows`, and on a snapshot."""
        self._leases = leases
        self._count = count
        self._rows = rows
        self._layout = layout
        self._claim: Claim | None = None
        self.length = length
        self.known = length

    def __bool__(self) -> bool:
        """Whether there is something to load."""
        return self.length > 0

    def __enter__(self) -> Self:
        """Return the match itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """Close it."""
        self.close()
        return False

    def load(self, like: Any = None, *, to: str | None = None, layout: KVLayout | None = None) -> Any:
        """Return the state of the matched tokens: private, assembled, yours to write, donate or delete.

        Blocks that the result may share without ever being seen to change are shared, all others copied once. The
        match is closed afterwards.

        Args:
            like: A template, consumed: buffers are filled in place, containers filled; see `KVState.unwrap`. By default
                the native type that was stored is built.
            to: Return a `KVState` of this framework instead.
            layout: Names and roles of the template's leaves; by default the cache's own layout.

        Returns:
            The state; of an empty match, `like`.

        Raises:
            ReleasedError: It was loaded or closed before.
            StructureMismatchError: The template does not fit.
        """
        if not self.length:
            return like
        parts = self._parts()
        try:
            if like is not None:
                return fill_template(parts, like, layout if layout is not None else self._layout)
            if to is None:
                return KVState.join(parts).unwrap()
            return KVState.join([part.to(to) for part in parts] if parts[0].framework != to else parts)
        finally:
            self._release()

    def _parts(self) -> list[KVState]:
        if not self._leases:
            msg = "this Match was loaded or closed; ask the cache for another"
            raise ReleasedError(msg)
        blocks, *snapshot = self._leases
        parts = blocks.states()[: self._count]
        if parts[-1].length > self._rows:
            parts[-1]._length = self._rows  # lent to us alone; rows beyond the length do not count
        return [*parts, *(state for lease in snapshot for state in lease.states())]

    def close(self) -> None:
        """Give the blocks back, and let others compute what it lacks. Idempotent."""
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.end()
        self._release()

    def _release(self) -> None:
        leases, self._leases = self._leases, []
        for lease in leases:
            lease.close()

    def __del__(self) -> None:
        """Let others compute what it lacks; the leases give themselves back."""
        if self._claim is not None:
            self._claim.end()
