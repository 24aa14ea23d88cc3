"""Index: which blocks follow which, so that the one with most in common with a prompt is found among any number."""

from bisect import bisect_right
from collections.abc import Iterator

from agnostic_cache.prefix.block import Block
from agnostic_cache.prefix.chain import TOKEN_BYTES, Marks, next_key

Content = tuple[bytes, ...]
"""Tokens, and between them the digest of each mark. Its order is that of the tokens, a mark before any of them."""

_RUN = 128  # blocks in a run: so many are copied to add one


def content_of(tokens: bytes, marks: Marks) -> Content:
    """Return what blocks are ordered by."""
    if not marks:
        return (tokens,)
    parts, begin = [], 0
    for at, digest in marks:
        parts += [tokens[begin : at * TOKEN_BYTES], digest]
        begin = at * TOKEN_BYTES
    return (*parts, tokens[begin:])


def common_tokens(one: Content, other: Content) -> int:
    """Return how many tokens two contents begin with in common, the marks before them included."""
    total = 0
    for i, (left, right) in enumerate(zip(one, other, strict=False)):
        if i % 2 == 0:
            total += (same := _common(left, right))
            if same * TOKEN_BYTES < max(len(left), len(right)):
                break
        elif left != right:
            break
    return total


def _common(one: bytes, other: bytes) -> int:
    low, high = 0, min(len(one), len(other)) // TOKEN_BYTES
    if one[: high * TOKEN_BYTES] == other[: high * TOKEN_BYTES]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * TOKEN_BYTES] == other[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def _truncated(content: Content, nbytes: int) -> Content:
    """The first `nbytes` bytes of the tokens, and the marks between them."""
    parts: list[bytes] = []
    for i, part in enumerate(content):
        if i % 2 == 0:
            if nbytes <= len(part):
                return (*parts, part[:nbytes])
            nbytes -= len(part)
        parts.append(part)
    return content


def _content(block: Block) -> Content:
    return content_of(block.tokens, block.marks) if block.marks else (block.tokens,)


def _first(run: tuple[Block, ...]) -> Content:
    return _content(run[0])


class Index:
    """Blocks by key, and those after each in the order of their content. A hint: the state cache knows what is there.

    The blocks that have most in common with a prompt lie next to where it would stand among them. They are kept in
    runs, of which one is replaced when a block comes in or leaves: neither a question nor a change takes longer where
    there are many (every prompt of a model may begin with the same token).

    Its owner holds a lock to change it. Reading is safe beside one writer. A change that is interrupted is made good by
    the next one, or by `mend`.
    """

    __slots__ = ("_blocks", "_children", "_torn")

    def __init__(self) -> None:
        """Start empty."""
        self._blocks: dict[bytes, Block] = {}
        self._children: dict[bytes, list[tuple[Block, ...]]] = {}  # by parent; runs are replaced, never changed
        self._torn = False  # a change was interrupted: _blocks is right, _children may not be

    def __iter__(self) -> Iterator[Block]:
        """Iterate over all blocks, as they are now."""
        return iter(list(self._blocks.values()))

    def get(self, key: bytes) -> Block | None:
        """Return the block under a key, or None."""
        return self._blocks.get(key)

    def add(self, block: Block) -> None:
        """Add a block, in place of one of its key."""
        self.discard(block.key)
        self._torn = True
        self._blocks[block.key] = block
        self._list(block)
        self._torn = False

    def discard(self, key: bytes) -> None:
        """Forget a block, if it is there."""
        self.mend()
        self._torn = True
        block = self._blocks.pop(key, None)
        if block is not None:
            self._unlist(block)
        self._torn = False

    def mend(self) -> None:
        """Make good a change that was interrupted."""
        if self._torn:
            self._children = {}
            for block in self._blocks.values():
                self._list(block)
            self._torn = False

    def _list(self, block: Block) -> None:
        runs, at, end = self._place(block.parent, _content(block))
        if not runs:
            self._children[block.parent] = [(block,)]
            return
        block.parent = runs[0][0].parent  # one object for all
        run = runs[at]
        longer = (*run[:end], block, *run[end:])
        if len(longer) <= _RUN:
            runs[at] = longer
        else:
            self._children[block.parent] = [*runs[:at], longer[: _RUN // 2], longer[_RUN // 2 :], *runs[at + 1 :]]

    def _unlist(self, block: Block) -> None:
        runs, at, end = self._place(block.parent, _content(block))
        run = runs[at]
        left = (*run[: end - 1], *run[end:])
        if left:
            runs[at] = left
        elif len(runs) > 1:
            self._children[block.parent] = [*runs[:at], *runs[at + 1 :]]
        else:
            del self._children[block.parent]

    def child(self, parent: bytes, tokens: bytes, marks: Marks = ()) -> Block | None:
        """Return the block after `parent` of exactly these tokens and marks, or None."""
        runs = self._children.get(parent)
        if runs is None:
            return None
        if len(runs) == 1 and len(runs[0]) == 1:  # within a long prompt: hashes nothing
            only = runs[0][0]
            return only if only.tokens == tokens and only.marks == marks else None
        found = self._blocks.get(next_key(parent, tokens, marks))
        return found if found is not None and found.is_of(tokens, marks) else None

    def best_child(self, parent: bytes, content: Content) -> tuple[Block | None, int]:
        """Return the block after `parent` that is of most use for `content`, and how many tokens they have in common.

        A block whose state cannot end at any token is of use only as a whole.
        """
        best, most = None, 0
        for child in self._around(parent, content):
            common = 0 if child is None else common_tokens(_content(child), content)
            if child is not None and common > most and child.granular:
                best, most = child, common
        if best is None:
            best = next(self.beginnings(parent, content), None)
            most = 0 if best is None else best.length
        return best, most

    def beginnings(self, parent: bytes, content: Content) -> Iterator[Block]:
        """Yield the blocks after `parent` that `content` begins with, the longest first."""
        while True:
            child, _ = self._around(parent, content)
            common = 0 if child is None else common_tokens(_content(child), content)
            if child is None or not common:
                return
            whole = common == child.length
            if whole:
                yield child
            content = _truncated(content, common * TOKEN_BYTES - whole)  # next: what stands before all that have these

    def extensions(self, parent: bytes, content: Content) -> Iterator[Block]:
        """Yield the blocks after `parent` that begin with `content` and go on."""
        count = sum(map(len, content[::2])) // TOKEN_BYTES
        runs, at, end = self._place(parent, content)
        for i in range(at, len(runs)):
            for child in runs[i][end if i == at else 0 :]:
                if common_tokens(_content(child), content) < count:
                    return
                yield child

    def _around(self, parent: bytes, content: Content) -> tuple[Block | None, Block | None]:
        """The blocks after `parent` that stand before, or at, and behind `content`."""
        runs, at, end = self._place(parent, content)
        if not runs:
            return None, None
        run = runs[at]
        behind = run[end] if end < len(run) else runs[at + 1][0] if at + 1 < len(runs) else None
        return run[end - 1] if end else None, behind

    def _place(self, parent: bytes, content: Content) -> tuple[list[tuple[Block, ...]], int, int]:
        """The blocks after `parent` in runs, the run where `content` belongs, and the first block behind it there."""
        runs = self._children.get(parent, [])
        at = max(bisect_right(runs, content, key=_first) - 1, 0) if len(runs) > 1 else 0
        return runs, at, bisect_right(runs[at], content, key=_content) if runs else 0
