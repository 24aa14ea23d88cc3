"""Match: what a prefix cache has of a prompt, borrowed until it is loaded or closed."""

from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from agnostic_cache.arrays.registry import adapter_for
from agnostic_cache.errors import ReleasedError
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout

if TYPE_CHECKING:
    from agnostic_cache.held.lease import Borrows
    from agnostic_cache.prefix.single_flight import Claim


class Loaded:
    """States that a storage gave: host memory that nobody writes, for one match.

    Attributes:
        framework: Of the arrays that they were stored from.
    """

    __slots__ = ("_states", "framework")

    def __init__(self, states: list[KVState], framework: str = "host") -> None:
        """Take the states."""
        self._states = states
        self.framework = framework

    def __len__(self) -> int:
        """How many they are."""
        return len(self._states)

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
    """

    __slots__ = ("_claim", "_count", "_here", "_layout", "_leases", "_rows", "known", "length")

    def __init__(
        self,
        lease: "Borrows | None",
        here: int,
        loaded: "Loaded | None",
        snapshot: "Borrows | Loaded | None",
        count: int,
        rows: int,
        length: int,
        layout: KVLayout | None,
    ) -> None:
        """Take over what is lent and what was loaded, which comes behind the first `here` of what is lent.

        Of all these blocks `count` matter, the last one up to `rows`.
        """
        self._leases = [lease, loaded, snapshot]
        self._here = here
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

    def load(
        self, like: Any = None, *, to: str | None = None, layout: KVLayout | None = None, device: str | None = None
    ) -> Any:
        """Return the state of the matched tokens: private, assembled, yours to write, donate or delete.

        Blocks that the result may share without ever being seen to change are shared, all others copied once. The
        match is closed afterwards.

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
            framework = to or (adapter_for(like).framework if like is not None else self._native(parts[0]))
            parts = [part if part.framework == framework else part.to(framework, device=device) for part in parts]
            if like is not None:
                return KVState.fill(parts, like, layout if layout is not None else self._layout)
            joined = KVState.join(parts)
            return joined.unwrap() if to is None else joined
        finally:
            self._release()

    def _parts(self) -> list[KVState]:
        if not self._leases:
            msg = "this Match was loaded or closed; ask the cache for another"
            raise ReleasedError(msg)
        lent, loaded, snapshot = ([] if lease is None else lease.states() for lease in self._leases)
        parts = [*lent[: self._here], *loaded, *lent[self._here :]][: self._count]
        if parts[-1].length > self._rows:
            parts[-1] = parts[-1].trimmed(self._rows)
        return [*parts, *snapshot]

    def _native(self, first: KVState) -> str:
        """The framework that the first block was stored from."""
        loaded = self._leases[1]
        return loaded.framework if isinstance(loaded, Loaded) and not self._here and len(loaded) else first.framework

    def close(self) -> None:
        """Give the blocks back, and let others compute what it lacks. Idempotent."""
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.end()
        self._release()

    def _release(self) -> None:
        leases, self._leases = self._leases, []
        for lease in leases:
            if lease is not None:
                lease.close()

    def __del__(self) -> None:
        """Let others compute what it lacks; the leases give themselves back."""
        if self._claim is not None:
            self._claim.end()
