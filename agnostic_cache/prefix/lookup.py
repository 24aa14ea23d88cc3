"""Lookup: which blocks of a prompt are here or in the storage below, and up to where a state can end.

Holds: what the index says is a hint; a block that the state cache no longer has is a miss, or comes from the storage.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from agnostic_cache.errors import BusyError, StorageError
from agnostic_cache.fingerprint import same_weights
from agnostic_cache.held.state_cache import StateCache
from agnostic_cache.prefix.block import Block, Kind, windows_complete
from agnostic_cache.prefix.chain import TOKEN_BYTES, marks_in, next_key
from agnostic_cache.prefix.index import Index, content_of
from agnostic_cache.prefix.match import Lease, Loaded, Match
from agnostic_cache.prefix.prompt import Prompt
from agnostic_cache.process.lock import Lock
from agnostic_cache.state.layout import KVLayout

if TYPE_CHECKING:
    from agnostic_cache.prefix.stored_blocks import StoredBlocks  # few have a storage: it is imported with one

SNAPSHOT_KEY: Final = b"/snapshot"
"""Behind the key of a block: what is valid at its end only."""

_TRIES = 8  # of a match, while the index is behind


class Chain:
    """Blocks of one kind that follow one another, for a reader of some weights.

    Attributes:
        blocks: The blocks.
        other_weights: One of other weights stood in the way.
    """

    __slots__ = ("_fingerprint", "_kind", "blocks", "other_weights")

    def __init__(self, fingerprint: str | None) -> None:
        """Have no block yet."""
        self.blocks: list[Block] = []
        self.other_weights = False
        self._fingerprint = fingerprint
        self._kind: Kind | None = None

    def takes(self, kind: Kind) -> bool:
        """Say whether a block of that kind may follow."""
        if kind is self._kind:
            return True
        if not same_weights(kind.fingerprint, self._fingerprint):
            self.other_weights = True
            return False
        if self._kind is not None and not self._kind.joins(kind):
            return False
        self._kind, self._fingerprint = kind, self._fingerprint or kind.fingerprint
        return True


class Lookup:
    """The blocks that a prefix cache can find. Safe to use from several threads.

    Attributes:
        states: Where the blocks are: rows under the key of the block, snapshots beside them.
        stored: The blocks in a storage below, or None.
        inserted_tokens: Tokens whose rows were copied in.
        mismatches: Blocks under the right key with other tokens, which are dropped, or of other weights: never handed
            out.
    """

    def __init__(
        self,
        states: StateCache,
        block_size: int,
        layout: KVLayout | None,
        *,
        granular: bool,
        clock: Callable[[], float],
    ) -> None:
        """Keep blocks in an empty state cache.

        Args:
            states: Where; nobody else puts anything there.
            block_size: Tokens per block.
            layout: For `Match.load`.
            granular: Whether a match may end within a block.
            clock: Seconds, for the deadlines of blocks.
        """
        self.states = states
        self.stored: StoredBlocks | None = None
        self._block_size = block_size
        self._layout = layout
        self._granular = granular
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Know no block."""
        self._lock = Lock()  # guards the index, the kinds and the counts; held for dict operations only
        self._index = Index()
        self.inserted_tokens = self.mismatches = 0

    # --- out ---------------------------------------------------------------------------------------------------------

    def find(self, prompt: Prompt, limit: int, fingerprint: str | None = None, *, below: bool = True) -> Match:
        """Borrow what is here of the first `limit` tokens.

        Args:
            prompt: The prompt.
            limit: How much of it to look for.
            fingerprint: Of the reader's weights.
            below: Whether to look in the storage too.
        """
        stored = self.stored if below else None
        for _ in range(_TRIES):
            try:
                match = self._find(prompt, limit, fingerprint, stored)
            except BusyError:  # a finaliser, in the middle of a call of its thread
                break
            except StorageError:
                if self.stored is stored:
                    raise
                match, stored = None, None  # it was closed meanwhile
            if match is not None:
                return match
        return Match()

    def _find(self, prompt: Prompt, limit: int, fingerprint: str | None, stored: "StoredBlocks | None") -> Match | None:
        """Match once; None where the index was behind."""
        size, chain = self._block_size, Chain(fingerprint)
        self._whole(prompt, limit, chain)
        here, loaded = len(chain.blocks), Loaded([])
        if stored is not None:
            here, loaded = self._lengthen(stored, prompt, limit, chain)
        blocks, known = chain.blocks, len(chain.blocks)
        rows = self._tail(prompt, limit, chain)
        leases: list[Lease] = [loaded]
        try:
            for at, part in ((1, blocks[known:]), (0, blocks[:here])):  # the beginning becomes the newest
                lease = self.states.borrow_all([block.key for block in part])
                leases.insert(at, lease)
                if len(lease) < len(part):
                    self.forget(part[len(lease)])
                    return None
            length, snapshot = self._end(prompt, blocks, known * size + rows, stored)
            if chain.other_weights:
                with self._lock:
                    self.mismatches += 1
            if stored is not None:
                stored.found(length)
            count = -(-length // size)
            match = Match(
                [*leases, snapshot],
                count=count,
                rows=length - (count - 1) * size,
                length=length,
                known=prompt.boundary(known * size, size),
                framework=blocks[0].kind.framework if count else "host",
                layout=self._layout,
                other_weights=chain.other_weights,
            )
            if count:
                leases = []  # they are the match's
            return match
        finally:
            for one in leases:
                one.close()

    def _end(
        self, prompt: Prompt, blocks: list[Block], length: int, stored: "StoredBlocks | None"
    ) -> tuple[int, Lease]:
        """The greatest length up to `length` at which a state can end, and what is valid at that end only."""
        size, snapshot = self._block_size, Loaded([])
        while length := prompt.stop(length):
            count = -(-length // size)
            last = blocks[count - 1]
            if last.granular and (self._granular or length % size == 0):
                return length, snapshot
            if length == (count - 1) * size + last.length and windows_complete(blocks[:count]):
                if not last.kind.snapshots:
                    return length, snapshot
                found = self._snapshot(blocks[:count], stored)
                if found is not None:
                    return length, found
            length = (count - 1) * size
        return 0, snapshot

    def known(self, prompt: Prompt, limit: int) -> tuple[list[Block], int]:
        """The chain of blocks here for the first `limit` tokens, and how many tokens that are."""
        chain = Chain(None)
        self._whole(prompt, limit, chain)
        whole = len(chain.blocks) * self._block_size
        return chain.blocks, whole + self._tail(prompt, limit, chain)

    def _whole(self, prompt: Prompt, limit: int, chain: Chain) -> None:
        """Add the blocks that are here and wholly within the first `limit` tokens."""
        index, data, parent, size, kind = self._index, prompt.data, prompt.root, self._block_size, None
        for begin in range(0, limit // size * size, size):
            tokens = data[begin * TOKEN_BYTES : (begin + size) * TOKEN_BYTES]
            marks = marks_in(prompt.marks, begin, begin + size) if prompt.marks else ()
            block = index.child(parent, tokens, marks) if marks else index.child(parent, tokens)
            if block is None:
                other = index.get(next_key(parent, tokens, marks))
                if other is not None and not other.is_of(tokens, marks):  # equal ones have come in since
                    with self._lock:
                        self.mismatches += 1
                    self._drop(other)
                break
            if block.deadline is not None and self._expired(block):
                break
            if block.kind is not kind and not chain.takes(kind := block.kind):
                break
            parent = block.key
            chain.blocks.append(block)

    def _tail(self, prompt: Prompt, limit: int, chain: Chain) -> int:
        """Add the block that begins like what is left, if there is one; return how many tokens are in common."""
        begin = len(chain.blocks) * self._block_size
        parent = chain.blocks[-1].key if chain.blocks else prompt.root
        content = content_of(*prompt.part(begin, limit))
        for _ in range(_TRIES if self._granular and begin < limit else 0):
            child, rows = self._index.best_child(parent, content)
            if child is not None and child.deadline is not None and self._expired(child):
                continue
            if child is None or not chain.takes(child.kind):
                break
            chain.blocks.append(child)
            return rows
        return 0

    def _lengthen(self, stored: "StoredBlocks", prompt: Prompt, limit: int, chain: Chain) -> tuple[int, Loaded]:
        """Add the whole blocks that follow in the storage; return how many are here, and the states of the others."""
        stored.begin(prompt.data)
        guard = self.states.borrow_all([block.key for block in chain.blocks], use=False)
        try:
            here, size = len(guard), self._block_size
            del chain.blocks[here:]
            parent = chain.blocks[-1].key if here else prompt.root
            found = stored.load(prompt, here * size, limit // size * size, parent, chain.takes)
        finally:
            guard.close()
        chain.blocks += [block for block, _ in found]
        return here, Loaded([state for _, state in found])

    def _snapshot(self, blocks: list[Block], stored: "StoredBlocks | None") -> Lease | None:
        """What is valid at the end of these blocks only, from here or from below."""
        lease = self.states.borrow_all([blocks[-1].key + SNAPSHOT_KEY])
        if len(lease):
            return lease
        state = stored.load_snapshot(blocks) if stored is not None else None
        return None if state is None else Loaded([state])

    # --- leaving -----------------------------------------------------------------------------------------------------

    def _drop(self, block: Block) -> None:
        """Drop a block, and the snapshot at its end."""
        self.states.remove(block.key)
        self.states.remove(block.key + SNAPSHOT_KEY)
        self.forget(block)

    def forget(self, block: Block) -> None:
        """Find a block no more, if it is gone."""
        gone = not self.states.contains(block.key)
        with self._lock:
            if gone and self._index.get(block.key) is block:
                self._index.discard(block.key)

    def on_event(self, event: str, facts: Mapping[str, object]) -> None:
        """Hear of the state cache's events: what left cannot be found any more."""
        if event == "state_cache.release" and not self._lock.is_mine():  # else a finaliser: a match will notice
            block = self._index.get(facts["key"])  # type: ignore[arg-type]
            if block is not None:
                self.forget(block)

    def _expired(self, block: Block) -> bool:
        if block.deadline is None or self._clock() < block.deadline:
            return False
        self._drop(block)
        return True
