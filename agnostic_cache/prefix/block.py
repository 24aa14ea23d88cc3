"""Block: what a match needs to know of one stored block, without touching its arrays."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from agnostic_cache.arrays.roles import SNAPSHOT, TOKENS, WINDOW
from agnostic_cache.fingerprint import same_weights
from agnostic_cache.prefix.chain import TOKEN_BYTES, Marks
from agnostic_cache.state.kv_state import KVState

Windows = tuple[tuple[int, int], ...]
"""Width of each kind of window in a state, and how many rows of it end where a block ends, in tokens."""


class Kind(NamedTuple):
    """What blocks have in common that one model wrote.

    Attributes:
        framework: Of their arrays.
        fingerprint: Of the model's weights; None where the writer did not say.
        leaves: Of each leaf but snapshots: dtype, extents but for tokens, role, axes.
        snapshots: Names of the `SNAPSHOT` leaves. With any, a state can only end where one is stored.
    """

    framework: str
    fingerprint: str | None
    leaves: Mapping[str, tuple[Any, ...]]
    snapshots: frozenset[str]

    @classmethod
    def of(cls, state: KVState, framework: str, fingerprint: str | None) -> "Kind":
        """Describe a state of `framework`, whose arrays may have come to the host meanwhile."""
        leaves, snapshots = {}, set(state.missing)
        for name, leaf in state.leaves.items():
            if leaf.role is SNAPSHOT:
                snapshots.add(name)
                continue
            spec = state.adapter.describe(leaf.array)
            shape = list(spec.shape)
            if isinstance(leaf.role, TOKENS | WINDOW):
                shape[leaf.role.axis] = -1
            leaves[name] = (spec.dtype, shape, leaf.role, leaf.axes)
        return cls(framework, fingerprint, leaves, frozenset(snapshots))

    def joins(self, other: "Kind") -> bool:
        """Say whether blocks of both can be joined: of the same leaves, or of two frameworks in one dtype.

        How the leaves nest is not compared: containers carry settings, which change as a model goes on.
        """
        if self is other or self[2:] == other[2:]:
            return True
        return self.framework != other.framework and self.dtypes() == other.dtypes()

    def dtypes(self) -> set[Any]:
        """Return the dtypes of what has rows."""
        return {dtype for dtype, _, role, _ in self.leaves.values() if isinstance(role, TOKENS | WINDOW)}


class Block:
    """One stored block of tokens. Never changes, but for its deadline.

    Attributes:
        key: Its key, under which the state cache has its rows.
        parent: Key of the block before it, or the root.
        tokens: Its tokens, encoded.
        marks: What else enters the chain within it, by place in the block.
        windows: See `Windows`.
        kind: What the blocks of its writer have in common.
        deadline: When it stops being valid, by the cache's clock, or None.
    """

    __slots__ = ("deadline", "key", "kind", "marks", "parent", "tokens", "windows")

    def __init__(
        self,
        key: bytes,
        parent: bytes,
        tokens: bytes,
        windows: Windows,
        kind: Kind,
        *,
        marks: Marks = (),
        deadline: float | None = None,
    ) -> None:
        """Take the parts as they are."""
        self.key = key
        self.parent = parent
        self.tokens = tokens
        self.marks = marks
        self.windows = windows
        self.kind = kind
        self.deadline = deadline

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def granular(self) -> bool:
        """Whether a state may end at any of its tokens."""
        return not self.windows and not self.kind.snapshots

    def serves_for(self, other: "Block") -> bool:
        """Say whether this block makes `other`, of the same key, superfluous."""
        same = self.is_of(other.tokens, other.marks) and self.kind.joins(other.kind)
        return same and same_weights(self.kind.fingerprint, other.kind.fingerprint) and not other.adds_to(self)

    def is_of(self, tokens: bytes, marks: Marks) -> bool:
        """Say whether it is the block of just these."""
        return self.tokens == tokens and self.marks == marks

    def adds_to(self, other: "Block") -> bool:
        """Whether this block's windows have rows that `other`, of the same key, lacks."""
        there = dict(other.windows)
        return any(run > there.get(width, 0) for width, run in self.windows)

    def covers(self, other: "Block") -> bool:
        """Whether this block, which begins with all of `other`, makes that one superfluous."""
        return self.granular and other.granular and self.kind.joins(other.kind)


def windows_of(state: KVState, start: int, stop: int) -> Windows:
    """Return what the block ``[start, stop)`` of `state` will have of each kind of window."""
    found: dict[int, int] = {}
    for leaf in state.leaves.values():
        if isinstance(leaf.role, WINDOW):
            there = min(leaf.first + state.adapter.describe(leaf.array).shape[leaf.role.axis], state.length) >= stop
            run = max(0, stop - max(start, leaf.first)) if there else 0
            found[leaf.role.width] = min(run, found.get(leaf.role.width, run))
    return tuple(sorted(found.items()))


def windows_complete(blocks: Sequence[Block]) -> bool:
    """Say whether blocks hold every row that a window needs at their end."""
    end = total_length(blocks)
    for kind, (width, _) in enumerate(blocks[-1].windows):
        rows = 0
        for block in reversed(blocks):
            run = block.windows[kind][1] if kind < len(block.windows) else 0
            rows += run
            if run < block.length or rows >= width:
                break
        if rows < min(end, width):
            return False
    return True


def total_length(blocks: Iterable[Block]) -> int:
    """Return the tokens of several blocks."""
    return sum(block.length for block in blocks)
