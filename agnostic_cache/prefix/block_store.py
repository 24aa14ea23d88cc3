"""BlockStore: prompts' states block by block in one `StateCache`, and which block follows which.

The state cache does the accounting, the eviction and the lending. Holds: what the index says is a hint; a block that
the state cache no longer has is a miss, or comes from the storage below.
"""

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from agnostic_cache.arrays.roles import SNAPSHOT
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.eviction.gdsf import recompute_cost
from agnostic_cache.held.lease import Borrows
from agnostic_cache.held.state_cache import StateCache
from agnostic_cache.prefix.chain import TOKEN_BYTES, cut, next_key
from agnostic_cache.prefix.index import Block, Index, has_snapshots, total_length, windows_complete, windows_of
from agnostic_cache.prefix.match import Loaded, Match
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout

if TYPE_CHECKING:
    from agnostic_cache.prefix.stored_blocks import StoredBlocks

SNAPSHOT_KEY: Final = b"/snapshot"
"""Behind the key of a block: what is valid at its end only."""


class BlockStore:
    """The blocks that a prefix cache has. Safe to use from several threads.

    Tokens come encoded: see `prefix.chain.encode`. A `root` is the key that a prompt's first block hangs on.

    Attributes:
        states: Where the blocks are: rows under the key of the block, snapshots beside them.
        stored: The blocks in a storage below, or None.
        inserted_tokens: Tokens whose rows were copied in.
        mismatches: Blocks under the right key with other tokens: dropped, never handed out.
    """

    def __init__(
        self,
        states: StateCache,
        block_size: int,
        layout: KVLayout | None,
        *,
        granular: bool,
        clock: Callable[[], float],
        stored: "StoredBlocks | None",
    ) -> None:
        """Keep blocks in an empty state cache.

        Args:
            states: Where; nobody else puts anything there.
            block_size: Tokens per block.
            layout: For `Match.load`.
            granular: Whether a match may end within a block.
            clock: Seconds, for the deadlines of blocks.
            stored: What lies below.
        """
        self.states = states
        self.stored = stored
        self._block_size = block_size
        self._layout = layout
        self._granular = granular
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Know no block."""
        self._lock = threading.RLock()  # guards the index and the counts; held for dict operations only
        self._index = Index()
        self.inserted_tokens = self.mismatches = 0

    # --- out ---------------------------------------------------------------------------------------------------------

    def find(self, data: bytes, root: bytes, limit: int, *, below: bool = True) -> tuple[Match, bytes]:
        """Borrow what is here of the first `limit` tokens; return it and the key of its last whole block.

        Args:
            data: The prompt.
            root: What it hangs on.
            limit: How much of it to look for.
            below: Whether to look in the storage too.
        """
        stored = self.stored if below else None
        blocks, loaded = self._whole(data, root, limit), Loaded([])
        if stored is not None:
            blocks, loaded = self._lengthened(stored, data, root, limit, blocks)
        tail, rows = self._tail(data, root, limit, blocks)
        here = len(blocks) - len(loaded)
        borrowed = [*blocks[:here], *tail]
        lease = self.states.borrow_all([block.key for block in borrowed])
        if len(lease) < len(borrowed):  # the index is behind
            self.forget(borrowed[len(lease)])
            lease.close()
            return self.find(data, root, limit, below=below)
        known = len(blocks)
        blocks += tail
        try:
            count, snapshot = self._end(blocks, stored)
        except BaseException:  # a strict storage
            lease.close()
            raise
        rows = rows if count == len(blocks) else self._block_size
        length = (count - 1) * self._block_size + rows if count else 0
        match = Match(lease, here, loaded, snapshot, count, rows, length, self._layout)
        match.known = max(length, known * self._block_size)
        if stored is not None:
            stored.found(length)
        if not count:
            match.close()
        end = length // self._block_size
        return match, blocks[end - 1].key if end else root

    def _end(self, blocks: list[Block], stored: "StoredBlocks | None") -> "tuple[int, Borrows | Loaded | None]":
        """How many of the blocks a state can end behind, and what is valid at that end only."""
        for count in range(len(blocks), 0, -1):
            last = blocks[count - 1]
            if last.granular:
                return count, None
            if last.windows and not windows_complete(blocks, count):
                continue
            if not last.snapshots:
                return count, None
            snapshot = self._snapshot(blocks[:count], stored)
            if snapshot is not None:
                return count, snapshot
        return 0, None

    def known(self, data: bytes, root: bytes, limit: int) -> tuple[list[Block], int]:
        """The chain of blocks for the first `limit` tokens, and how many tokens of the last one are in common."""
        blocks = self._whole(data, root, limit)
        tail, rows = self._tail(data, root, limit, blocks)
        return [*blocks, *tail], rows

    def _whole(self, data: bytes, root: bytes, limit: int) -> list[Block]:
        """The chain of blocks that are wholly within the first `limit` tokens."""
        index, blocks, parent, size = self._index, [], root, self._block_size * TOKEN_BYTES
        for begin in range(0, limit // self._block_size * size, size):
            tokens = data[begin : begin + size]
            block = index.child(parent, tokens)
            if block is None:
                other = index.get(next_key(parent, tokens))
                if other is not None and other.tokens != tokens:  # equal ones have come in since
                    with self._lock:
                        self.mismatches += 1
                    self.remove(other)
                break
            if block.deadline is not None and self._expired(block):
                break
            parent = block.key
            blocks.append(block)
        return blocks

    def _tail(self, data: bytes, root: bytes, limit: int, blocks: list[Block]) -> tuple[list[Block], int]:
        """The block behind whole `blocks` that begins like what is left, if there is one, and how far it does."""
        rest = data[len(blocks) * self._block_size * TOKEN_BYTES : limit * TOKEN_BYTES]
        parent = blocks[-1].key if blocks else root
        while rest and self._granular:
            child, rows = self._index.best_child(parent, rest)
            if child is None:
                break
            if child.deadline is None or not self._expired(child):
                return [child], rows
        return [], self._block_size

    def _lengthened(
        self, stored: "StoredBlocks", data: bytes, root: bytes, limit: int, blocks: list[Block]
    ) -> tuple[list[Block], Loaded]:
        """What is here of whole `blocks`, and what the storage has of those that follow, which are host states."""
        stored.begin(data)
        guard = self.states.borrow_all([block.key for block in blocks], use=False)
        try:
            blocks = blocks[: len(guard)]
            size = self._block_size * TOKEN_BYTES
            parent = blocks[-1].key if blocks else root
            found = stored.load(parent, data[len(blocks) * size : limit // self._block_size * size])
        finally:
            guard.close()
        loaded = Loaded([each.state for each in found], found[0].framework if found else "host")
        return [*blocks, *(each.block for each in found)], loaded

    def _snapshot(self, blocks: list[Block], stored: "StoredBlocks | None") -> "Borrows | Loaded | None":
        """What is valid at the end of these blocks only, from here or from below."""
        lease = self.states.borrow_all([blocks[-1].key + SNAPSHOT_KEY])
        if len(lease):
            return lease
        state = stored.load_snapshot(blocks) if stored is not None else None
        return None if state is None else Loaded([state])

    # --- in ----------------------------------------------------------------------------------------------------------

    def plan(self, data: bytes, root: bytes, state: KVState, count: int, deadline: float | None) -> list[Block]:
        """Return the blocks that stand for the first `count` tokens of a state; nothing comes in yet."""
        snapshots, parent, start = has_snapshots(state), root, 0
        blocks: list[Block] = []
        for key, tokens in cut(data[: count * TOKEN_BYTES], root, self._block_size):
            windows = windows_of(state, start, min(start + self._block_size, count))
            blocks.append(Block(key, parent, tokens, windows, snapshots=snapshots, deadline=deadline))
            parent, start = key, start + self._block_size
        return blocks

    def insert(self, data: bytes, blocks: list[Block], state: KVState) -> int:
        """Copy in what is not here of the blocks planned for a prompt; return how many that were."""
        keys = [block.key for block in blocks]
        leases = [self.states.borrow_all(keys, use=False)]  # what the new ones hang on does not leave to make room
        try:
            made = self._insert_blocks(blocks, state, leases)
            if blocks[-1].snapshots and total_length(blocks) == state.length and not state.missing:
                self._insert_snapshot(blocks[-1], state)
        finally:
            for lease in leases:
                lease.close()
        if self.stored is not None:
            self.stored.computed(data)  # only now: what was stored is computed, also where that was still under way
        self.states.borrow_all(keys).close()  # the first becomes the newest
        return made

    def _insert_blocks(self, blocks: list[Block], state: KVState, leases: list[Borrows]) -> int:
        """Copy in the blocks that are not here; `leases` begins with those that are, and takes the new ones."""
        rows, made, there, room = state.without(SNAPSHOT), 0, len(leases[0]), True
        for i, block in enumerate(blocks):
            known = self._index.get(block.key)
            if i >= there and known is not None:  # an orphan, maybe: its parent had left before it
                orphan = self.states.borrow_all([block.key], use=False)
                leases.append(orphan)
                known = known if len(orphan) else None
            if known is not None and known.tokens == block.tokens and not block.adds_to(known):
                known.deadline = block.deadline
                continue
            if block.length < self._block_size and self._is_covered(block):
                continue
            if self.stored is not None and self.stored.surpasses(block):
                continue  # this one would hide rows that the one below has
            storing = self.stored is not None and self._lasts(block) and self.stored.lacks(block)
            if not room and not storing:
                continue
            start = i * self._block_size
            stop = start + block.length
            piece, cost = rows.cut(start, stop), recompute_cost(start, stop)
            if self.stored is not None and storing:
                self.stored.put(block, piece)
            room = room and self.states.put(block.key, piece, move=True, cost=cost) is PutStatus.LEGAL
            if room:
                with self._lock:
                    self._index.add(block)
                leases.append(self.states.borrow_all([block.key], use=False))
                self._drop_covered(block)
            if room or storing:
                made += 1
                with self._lock:
                    self.inserted_tokens += block.length
            if not room and self.stored is None:
                break  # what hangs on it would never be found
        return made

    def _insert_snapshot(self, last: Block, state: KVState) -> None:
        """Keep what is valid at the end of the last block, which is the end of the state, only."""
        key = last.key + SNAPSHOT_KEY
        here = self.states.contains(last.key) and not self.states.contains(key)
        storing = self.stored is not None and self._lasts(last) and self.stored.lacks_snapshot(last)
        if not here and not storing:
            return
        snapshot = state.cut(state.length, state.length)
        if self.stored is not None and storing:
            self.stored.put_snapshot(last, snapshot)
        if here:
            self.states.put(key, snapshot, move=True, cost=recompute_cost(0, state.length))

    def _lasts(self, block: Block) -> bool:
        """Whether a block is worth storing: the next process can find whole ones only, and knows no deadline."""
        return block.length == self._block_size and block.deadline is None

    def _is_covered(self, block: Block) -> bool:
        """Whether a longer block has the rows of this one, and a match may end anywhere in it."""
        return block.granular and any(child.granular for child in self._index.extensions(block.parent, block.tokens))

    def _drop_covered(self, block: Block) -> None:
        """Remove the shorter blocks whose rows this one has."""
        for child in self._index.beginnings(block.parent, block.tokens):
            if child is not block and child.granular and block.granular:
                self.remove(child)

    # --- keeping -----------------------------------------------------------------------------------------------------

    def pin(self, data: bytes, root: bytes, do: Callable[[bytes], bool]) -> int:
        """Do something to the key of each entry of a prompt, up to the first that is gone; return its tokens."""
        blocks, rows = self.known(data, root, len(data) // TOKEN_BYTES)
        for i, block in enumerate(blocks):
            if not do(block.key):
                return total_length(blocks[:i])
            if block.snapshots:
                do(block.key + SNAPSHOT_KEY)
        return total_length(blocks[:-1]) + rows if blocks else 0

    def remove(self, block: Block) -> None:
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

    def clear(self) -> None:
        """Drop everything; what is borrowed leaves when it is given back."""
        self.states.clear()
        with self._lock:
            self._index = Index()

    def told(self, event: str, facts: Mapping[str, object]) -> None:
        """Hear of the state cache's events: what left cannot be found any more."""
        if event == "state_cache.release":
            block = self._index.get(facts["key"])  # type: ignore[arg-type]
            if block is not None:
                self.forget(block)

    def _expired(self, block: Block) -> bool:
        if block.deadline is None or self._clock() < block.deadline:
            return False
        self.remove(block)
        return True
