"""The blocks that a prefix cache can find: what a match needs to know of each, without touching its arrays."""

from collections.abc import Callable, Iterable, Iterator

from agnostic_cache.prefix.chain import TOKEN_BYTES
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.roles import SNAPSHOT, WINDOW

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


class Index:
    """Blocks by key, and by parent and first token. A hint: the state cache knows what is really there.

    Not thread-safe for writing: its owner holds a lock. Reading is safe beside one writer.
    """

    __slots__ = ("_blocks", "_children", "get")

    def __init__(self) -> None:
        """Start empty."""
        self._blocks: dict[bytes, Block] = {}
        self._children: dict[bytes, tuple[Block, ...]] = {}  # by key of the parent + first token
        self.get: Callable[[bytes], Block | None] = self._blocks.get
        """Return the block under a key, or None. The method of the dict: a match asks for every block of a prompt."""

    def __iter__(self) -> Iterator[Block]:
        """Iterate over all blocks, as they are now."""
        return iter(list(self._blocks.values()))

    def add(self, block: Block) -> None:
        """Add a block, in place of one of its key."""
        self.discard(block.key)
        self._blocks[block.key] = block
        place = block.parent + block.tokens[:TOKEN_BYTES]
        self._children[place] = (*self._children.get(place, ()), block)

    def discard(self, key: bytes) -> None:
        """Forget a block, if it is there."""
        block = self._blocks.pop(key, None)
        if block is None:
            return
        place = block.parent + block.tokens[:TOKEN_BYTES]
        left = tuple(child for child in self._children[place] if child is not block)
        if left:
            self._children[place] = left
        else:
            del self._children[place]

    def children(self, parent: bytes, tokens: bytes) -> tuple[Block, ...]:
        """Return the blocks after `parent` that begin with the first of `tokens`."""
        return self._children.get(parent + tokens[:TOKEN_BYTES], ())

    def best_child(self, parent: bytes, tokens: bytes) -> tuple[Block | None, int]:
        """Return the block after `parent` that is of most use for `tokens`, and how many it has in common with them.

        A block whose state cannot end at any token is of use only as a whole.
        """
        best, most = None, 0
        for child in self.children(parent, tokens):
            common = common_tokens(child.tokens, tokens)
            if common > most and (child.granular or common == child.length):
                best, most = child, common
        return best, most


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
