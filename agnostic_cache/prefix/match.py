"""Match: what a prefix cache has of a prompt, borrowed until it is loaded or closed."""

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from agnostic_cache.arrays.registry import adapter_for
from agnostic_cache.errors import ReleasedError
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout

if TYPE_CHECKING:
    from agnostic_cache.prefix.single_flight import Claim


class Lease(Protocol):
    """States that stay as they are until `close`."""

    def states(self) -> list[KVState]:
        """Return them, in order."""
        ...

    def close(self) -> None:
        """Let go of them. Idempotent."""
        ...


class Loaded:
    """The lease on states that a storage gave: host memory that nobody writes, for one match."""

    __slots__ = ("_states",)

    def __init__(self, states: list[KVState]) -> None:
        """Take the states."""
        self._states = states

    def states(self) -> list[KVState]:
        """Return them, in order."""
        return self._states

    def close(self) -> None:
        """Let go of them."""
        self._states = []


class Match:
    """The longest prefix of a prompt that a `PrefixCache` has. Falsy where that is nothing.

    Use it in a ``with`` block, or close it; `load` closes it too. For one thread.

    Attributes:
        length: Tokens of the prompt that it covers: fewer than the prompt has, so that one is left to compute.
        known: Tokens up to which whole blocks are here. More than `length` where a state cannot end there yet: the
            prompt parts from another one, and a state stored there would serve both.
        other_weights: Blocks that other weights computed were passed over.
        claim: The right to compute what is lacking, which ends with the match.
    """

    __slots__ = ("_count", "_framework", "_layout", "_leases", "_rows", "claim", "known", "length", "other_weights")

    def __init__(
        self,
        leases: Sequence[Lease] = (),
        *,
        count: int = 0,
        rows: int = 0,
        length: int = 0,
        known: int = 0,
        framework: str = "host",
        layout: KVLayout | None = None,
        other_weights: bool = False,
    ) -> None:
        """Take over leases on blocks, in order, and on what is valid at their end only.

        Args:
            leases: On blocks, of which `count` matter, and last on a snapshot.
            count: See `leases`.
            rows: How many tokens of the last block matter.
            length: See the attribute.
            known: See the attribute.
            framework: Of the arrays that the first block was stored from.
            layout: That of the cache.
            other_weights: See the attribute.
        """
        self._leases = leases
        self._count = count
        self._rows = rows
        self._framework = framework
        self._layout = layout
        self.claim: Claim | None = None
        self.length = length
        self.known = max(length, known)
        self.other_weights = other_weights

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

    def load(
        self, like: Any = None, *, to: str | None = None, layout: KVLayout | None = None, device: str | None = None
    ) -> Any:
        """Return the state of the matched tokens: private, assembled, yours to write, donate or delete.

        Blocks that the result may share without ever being seen to change are shared, all others copied once. The
        match is closed afterwards, but for its claim on what it lacks.

        Args:
            like: A template, consumed: buffers are filled in place, containers filled; see `KVState.unwrap`. By default
                the native type that was stored is built.
            to: Return a `KVState` of this framework instead.
            layout: Names and roles of the template's leaves; by default the cache's own layout.
            device: Where to put what comes from a storage; by default where the framework puts host memory.

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
            framework = to or (self._framework if like is None else adapter_for(like).framework)
            parts = [part if part.framework == framework else part.to(framework, device=device) for part in parts]
            if like is not None:
                return KVState.fill(parts, like, layout if layout is not None else self._layout)
            # Containers may differ in settings where leaves do not.
            joined = KVState.join([part.nested_as(parts[-1]) for part in parts])
            return joined.unwrap() if to is None else joined
        finally:
            self._release()

    def _parts(self) -> list[KVState]:
        if not self._leases:
            msg = "this Match was loaded or closed; ask the cache for another"
            raise ReleasedError(msg)
        *blocks, snapshot = (lease.states() for lease in self._leases)
        parts = [state for states in blocks for state in states][: self._count]
        if parts[-1].length > self._rows:
            parts[-1] = parts[-1].trimmed(self._rows)
        return [*parts, *snapshot]

    def close(self) -> None:
        """Give the blocks back, and let others compute what it lacks. Idempotent."""
        claim, self.claim = self.claim, None
        if claim is not None:
            claim.end()
        self._release()

    def _release(self) -> None:
        leases, self._leases = self._leases, ()
        for lease in leases:
            lease.close()
