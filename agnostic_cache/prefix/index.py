"""The blocks that a prefix cache can find: what a match needs to know of each, without touching its arrays."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from operator import attrgetter

from agnostic_cache.arrays.roles import SNAPSHOT, WINDOW
from agnostic_cache.prefix.chain import TOKEN_BYTES
from agnostic_cache.state.kv_state import KVState

Windows = tuple[tuple[int, int], ...]
"""Width of each kind of window in a state, and how many rows of it end where a block ends, in tokens."""


class Block:
    """One stored block of tokens. Never changes, but for its deadline.

    Attributes:
        key: Its key, under which the state cache has its rows.
        parent: Key of the block before it, or the root.
        tokens: Its tokens, encoded.
        length: How many they are.
        windows: See `Windows`.
        snapshots: Its state has `SNAPSHOT` leaves: it can only end where one is stored.
        deadline: When it stops being valid, by the cache's clock, or None.
    """

    __slots__ = ("deadline", "key", "length", "parent", "snapshots", "tokens", "windows")

    def __init__(
        self, key: bytes, parent: bytes, tokens: bytes, windows: Windows, *, snapshots: bool, deadline: float | None
    ) -> None:
        """Take the parts as they are."""
        self.key = key
        self.parent = parent
        self.tokens = tokens
        self.length = len(tokens) // TOKEN_BYTES
        self.windows = windows
        self.snapshots = snapshots
        self.deadline = deadline

    @property
    def granular(self) -> bool:
        """Whether a state may end at any of its tokens."""
        return not self.windows and not self.snapshots

    def adds_to(self, other: "Block") -> bool:
        """Whether this block's windows have rows that `other`, of the same key, lacks."""
        there = dict(other.windows)
        return any(run > there.get(width, 0) for width, run in self.windows)


def windows_of(state: KVState, start: int, stop: int) -> Windows:
    """Return what the block ``[start, stop)`` of `state` will have of each kind of window."""
    found: dict[int, int] = {}
    for leaf in state.leaves.values():
        if isinstance(leaf.role, WINDOW):
            rows = state.adapter.describe(leaf.array).shape[leaf.role.axis]
            there = min(leaf.first + rows, state.length) >= stop
            run = max(0, stop - max(start, leaf.first)) if there else 0
            found[leaf.role.width] = min(run, found.get(leaf.role.width, run))
    return tuple(sorted(found.items()))


def has_snapshots(state: KVState) -> bool:
    """Say whether some leaf of `state` is valid at its very end only."""
    return bool(state.missing) or any(leaf.role is SNAPSHOT for leaf in state.leaves.values())


def windows_complete(blocks: list[Block], count: int) -> bool:
    """Say whether the first `count` blocks hold every row that a window needs at their end."""
    end = sum(block.length for block in blocks[:count])
    for kind, (width, _) in enumerate(blocks[count - 1].windows):
        rows = 0
        for block in reversed(blocks[:count]):
            run = block.windows[kind][1] if kind < len(block.windows) else 0
            rows += run
            if run < block.length or rows >= width:
                break
        if rows < min(end, width):
            return False
    return True


_tokens_of = attrgetter("tokens")


class Index:
    """Blocks by key, and those after each in the order of their tokens. A hint: the state cache knows what is there.

    The blocks that have most in common with a prompt lie next to where it would stand among them, so that a question
    takes the logarithm of their number: every prompt of a model may begin with the same token.

    Not thread-safe for writing: its owner holds a lock. Reading is safe beside one writer.
    """

    __slots__ = ("_blocks", "_children")

    def __init__(self) -> None:
        """Start empty."""
        self._blocks: dict[bytes, Block] = {}
        self._children: dict[bytes, tuple[Block, ...]] = {}  # by parent, in order; replaced, never changed

    def __iter__(self) -> Iterator[Block]:
        """Iterate over all blocks, as they are now."""
        return iter(list(self._blocks.values()))

    def get(self, key: bytes) -> Block | None:
        """Return the block under a key, or None."""
        return self._blocks.get(key)

    def add(self, block: Block) -> None:
        """Add a block, in place of one of its key."""
        self.discard(block.key)
        self._blocks[block.key] = block
        siblings, at = self._place(block.parent, block.tokens)
        self._children[block.parent] = (*siblings[:at], block, *siblings[at:])

    def discard(self, key: bytes) -> None:
        """Forget a block, if it is there."""
        block = self._blocks.pop(key, None)
        if block is None:
            return
        siblings, end = self._place(block.parent, block.tokens)
        left = (*siblings[: end - 1], *siblings[end:])
        if left:
            self._children[block.parent] = left
        else:
            del self._children[block.parent]

    def child(self, parent: bytes, tokens: bytes) -> Block | None:
        """Return the block after `parent` of exactly these tokens, or None. Takes no hash."""
        siblings, end = self._place(parent, tokens)
        return siblings[end - 1] if end and siblings[end - 1].tokens == tokens else None

    def best_child(self, parent: bytes, tokens: bytes) -> tuple[Block | None, int]:
        """Return the block after `parent` that is of most use for `tokens`, and how many it has in common with them.

        A block whose state cannot end at any token is of use only as a whole.
        """
        siblings, end = self._place(parent, tokens)
        best, most = None, 0
        for child in siblings[max(end - 1, 0) : end + 1]:
            common = common_tokens(child.tokens, tokens)
            if common > most and child.granular:
                best, most = child, common
        if best is None:
            best = next(self.beginnings(parent, tokens), None)
            most = 0 if best is None else best.length
        return best, most

    def beginnings(self, parent: bytes, tokens: bytes) -> Iterator[Block]:
        """Yield the blocks after `parent` that `tokens` begin with, the longest first."""
        while tokens:
            siblings, end = self._place(parent, tokens)
            if not end:
                return
            child = siblings[end - 1]
            common = common_tokens(child.tokens, tokens)
            if common == child.length:
                yield child
                tokens = tokens[: common * TOKEN_BYTES - 1]
            else:
                tokens = tokens[: common * TOKEN_BYTES]

    def extensions(self, parent: bytes, tokens: bytes) -> Iterator[Block]:
        """Yield the blocks after `parent` that begin with `tokens` and go on."""
        siblings, end = self._place(parent, tokens)
        while end < len(siblings) and siblings[end].tokens.startswith(tokens):
            yield siblings[end]
            end += 1

    def _place(self, parent: bytes, tokens: bytes) -> tuple[tuple[Block, ...], int]:
        """The blocks after `parent`, and where the first is that stands behind `tokens`."""
        siblings = self._children.get(parent, ())
        return siblings, bisect_right(siblings, tokens, key=_tokens_of)


def common_tokens(one: bytes, other: bytes) -> int:
    """Return how many tokens two encoded sequences begin with in common."""
    low, high = 0, min(len(one), len(other)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * TOKEN_BYTES] == other[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def total_length(blocks: Iterable[Block]) -> int:
    """Return the tokens of several blocks."""
    return sum(block.length for block in blocks)
