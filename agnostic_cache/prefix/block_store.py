"""BlockStore: prompts' states block by block in one `StateCache`, and which block follows which.

The state cache does the accounting, the eviction and the lending; `lookup.py` finds blocks.
"""

import logging
from typing import TYPE_CHECKING

from agnostic_cache.arrays.roles import SNAPSHOT
from agnostic_cache.errors import StorageError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.eviction.gdsf import recompute_cost
from agnostic_cache.prefix.block import Block, Kind, total_length, windows_of
from agnostic_cache.prefix.chain import TOKEN_BYTES
from agnostic_cache.prefix.index import Index, common_tokens, content_of
from agnostic_cache.prefix.lookup import SNAPSHOT_KEY, Chain, Lookup
from agnostic_cache.prefix.match import Lease
from agnostic_cache.prefix.pinned_ends import End, PinnedEnds
from agnostic_cache.prefix.prompt import Prompt
from agnostic_cache.state.kv_state import KVState

if TYPE_CHECKING:
    from agnostic_cache.prefix.stored_blocks import StoredBlocks  # few have a storage: it is imported with one

_logger = logging.getLogger("agnostic_cache.prefix")


class BlockStore(Lookup):
    """The blocks that a prefix cache has: what comes in, stays and is removed. Safe to use from several threads."""

    def start(self) -> None:
        """Know no block."""
        super().start()
        self._ends = PinnedEnds(self._clock)
        self._kinds: list[Kind] = []
        self._refused = False

    # --- in ----------------------------------------------------------------------------------------------------------

    def plan(
        self, prompt: Prompt, state: KVState, count: int, fingerprint: str | None, deadline: float | None
    ) -> list[Block]:
        """Return the blocks that stand for the first `count` tokens of a state; nothing comes in yet."""
        kind, parent, start = self.kind_of(state, state.framework, fingerprint), prompt.root, 0
        blocks: list[Block] = []
        for key, tokens, marks in prompt.cut(self._block_size, end=count):
            windows = windows_of(state, start, min(start + self._block_size, count))
            blocks.append(Block(key, parent, tokens, windows, kind, marks=marks, deadline=deadline))
            parent, start = key, start + self._block_size
        return blocks

    def kind_of(self, state: KVState, framework: str, fingerprint: str | None) -> Kind:
        """Return the kind of a state, one object for all that are equal."""
        kind = Kind.of(state, framework, fingerprint)
        with self._lock:
            known = next((known for known in self._kinds if known == kind), None)
            if known is None:
                self._kinds.append(kind)
        return known or kind

    def insert(self, prompt: Prompt, blocks: list[Block], state: KVState) -> int:
        """Copy in what is not here of the blocks planned for a prompt; return how many that were."""
        with self._lock:
            self._index.mend()
        first = self._index.get(blocks[0].key)
        if first is not None and not first.kind.joins(blocks[0].kind) and self.states.contains(first.key):
            if not self._refused:
                self._refused = True
                _logger.warning("states of two kinds under one namespace: the later ones are not kept")
            return 0
        stored, leases = self.stored, list[Lease]()
        try:
            made = self._insert_blocks(blocks, state, stored, leases)
            if blocks[-1].kind.snapshots and total_length(blocks) == state.length and not state.missing:
                self._insert_snapshot(blocks[-1], state, stored)
        except StorageError:
            if self.stored is stored:
                raise
            made = self.insert(prompt, blocks, state)  # it was closed meanwhile
        finally:
            for lease in leases:
                lease.close()
        if stored is not None:
            stored.computed(prompt.data)  # only now: what was stored is computed, also where that was still under way
        self.states.borrow_all([block.key for block in blocks]).close()  # the first becomes the newest
        return made

    def _insert_blocks(
        self, blocks: list[Block], state: KVState, stored: "StoredBlocks | None", leases: list[Lease]
    ) -> int:
        """Copy in the blocks that are not here; `leases` takes all, so that none leaves to make room for another."""
        rows, made = state.without(SNAPSHOT), 0
        room = True
        for i, block in enumerate(blocks):
            start = i * self._block_size
            lease = self.states.borrow_all([block.key], use=False)
            leases.append(lease)
            known = self._index.get(block.key) if len(lease) else None
            if known is not None and known.serves_for(block):
                known.deadline = block.deadline
            elif not self._is_hidden(block, stored):
                storing = stored is not None and self._lasts(block) and stored.lacks(block)
                if room or storing:
                    piece = rows.cut(start, start + block.length)
                    if stored is not None and storing:
                        stored.put(block, piece)
                    lease.close()  # of the one that it replaces, if there is one
                    room = room and self._put(block, start, piece, leases)
                    made += room or storing
                    with self._lock:
                        self.inserted_tokens += block.length * (room or storing)
            if room and block.granular:
                self._keep_ends(block, start, rows, start, leases)
            if not room and stored is None:
                break  # what hangs on it would never be found
        return made

    def _put(self, block: Block, start: int, piece: KVState, leases: list[Lease]) -> bool:
        """Take in and hold the rows of a block, if there is room for them."""
        cost = recompute_cost(start, start + block.length)
        if self.states.put(block.key, piece, move=True, cost=cost) is not PutStatus.LEGAL:
            return False
        with self._lock:
            self._index.add(block)
        leases.append(self.states.borrow_all([block.key], use=False))
        for child in self._index.beginnings(block.parent, content_of(block.tokens, block.marks)):
            if child is not block and block.covers(child) and not self._ends.holds(child.parent, child.key):
                self._drop(child)
        return True

    def _keep_ends(self, block: Block, start: int, rows: KVState, at: int, leases: list[Lease]) -> None:
        """Take in the ends of pinned prompts that `block` begins with: `start` in its prompt is `at` in `rows`."""
        for key, tokens, marks in self._ends.of(block.parent):
            end = Block(key, block.parent, tokens, (), block.kind, marks=marks, deadline=block.deadline)
            common = common_tokens(content_of(tokens, marks), content_of(block.tokens, block.marks))
            if common == end.length < block.length and not self.states.contains(key):
                self._put(end, start, rows.cut(at, at + common), leases)

    def _is_hidden(self, block: Block, stored: "StoredBlocks | None") -> bool:
        """Whether a longer block has the rows of this one, or the storage has rows that it would hide."""
        if block.length < self._block_size and not self._ends.holds(block.parent, block.key):
            longer = self._index.extensions(block.parent, content_of(block.tokens, block.marks))
            if any(child.covers(block) for child in longer):
                return True
        return stored is not None and stored.surpasses(block)

    def _insert_snapshot(self, last: Block, state: KVState, stored: "StoredBlocks | None") -> None:
        """Keep what is valid at the end of the last block, which is the end of the state, only."""
        key, known = last.key + SNAPSHOT_KEY, self._index.get(last.key)
        fits = known is not None and known.serves_for(last)
        here = fits and self.states.contains(last.key) and not self.states.contains(key)
        storing = stored is not None and self._lasts(last) and stored.lacks_snapshot(last)
        if not here and not storing:
            return
        snapshot = state.cut(state.length, state.length)
        if stored is not None and storing:
            stored.put_snapshot(last, snapshot)
        if here:
            self.states.put(key, snapshot, move=True, cost=recompute_cost(0, state.length))

    def _lasts(self, block: Block) -> bool:
        """Whether a block is worth storing: the next process can find whole ones only, and knows no deadline."""
        return block.length == self._block_size and block.deadline is None

    # --- keeping -----------------------------------------------------------------------------------------------------

    def pin(self, prompt: Prompt, seconds: float | None) -> int:
        """Keep what is here of a prompt, now or later, from being evicted; return how many tokens that are now.

        Raises:
            PinLimitError: More than half of the budget would be kept. Nothing is pinned.
        """
        keys, parent, end = self._keys_and_end(prompt)
        if end is not None:
            with self._lock:
                self._ends.add(parent, end, seconds)
        try:
            self.states.pin_all(keys, ttl_seconds=seconds)
            try:
                self._cut_end(prompt)
            except BaseException:
                self.states.unpin_all(keys)
                raise
        except BaseException:
            if end is not None:
                with self._lock:
                    self._ends.take_back(parent, end)
            raise
        return self._kept(prompt)

    def unpin(self, prompt: Prompt) -> int:
        """Take one `pin` back; return how many tokens of the prompt are here."""
        keys, parent, end = self._keys_and_end(prompt)
        self.states.unpin_all(keys)
        if end is not None:
            with self._lock:
                self._ends.take_back(parent, end)
        return self._kept(prompt)

    def _keys_and_end(self, prompt: Prompt) -> tuple[list[bytes], bytes, End | None]:
        """Every key that an entry of the prompt can have; the parent of its last block, and that if it is short."""
        pieces = list(prompt.cut(self._block_size))
        keys = [key for key, *_ in pieces]
        parent = keys[-2] if len(keys) > 1 else prompt.root
        short = prompt.count % self._block_size
        return keys + [key + SNAPSHOT_KEY for key in keys], parent, pieces[-1] if short else None

    def _cut_end(self, prompt: Prompt) -> None:
        """Make the end of a prompt an entry of its own, where only a longer block has its rows."""
        blocks, rows = self.known(prompt, prompt.count)
        if rows < prompt.count or total_length(blocks) == rows:
            return
        lease = self.states.borrow_all([blocks[-1].key], use=False)
        leases: list[Lease] = [lease]
        try:
            for state in lease.states():
                self._keep_ends(blocks[-1], rows - rows % self._block_size, state, 0, leases)
        finally:
            for one in leases:
                one.close()

    def _kept(self, prompt: Prompt) -> int:
        """How many tokens of a prompt are here in blocks of its own."""
        chain, (*_, end) = Chain(None), self._keys_and_end(prompt)
        self._whole(prompt, prompt.count, chain)
        whole = len(chain.blocks) * self._block_size
        return prompt.count if end and prompt.count - whole < self._block_size and self._index.get(end[0]) else whole

    def remove(self, prompt: Prompt, *, below: bool) -> int:
        """Drop the blocks that lie wholly within a prompt, whoever shares them; return how many tokens that were.

        Args:
            prompt: The prompt.
            below: Whether the storage drops them too.
        """
        parent, removed, stored = prompt.root, 0, self.stored if below else None
        for key, tokens, marks in prompt.cut(self._block_size):
            lengths = [0]
            for block in list(self._index.beginnings(parent, content_of(tokens, marks))):
                lengths.append(block.length)
                self._drop(block)
            if stored is not None and stored.remove(key):
                lengths.append(len(tokens) // TOKEN_BYTES)
            removed, parent = removed + max(lengths), key
        return removed

    def clear(self) -> None:
        """Drop everything; what is borrowed leaves when it is given back."""
        self.states.clear()
        with self._lock:
            self._index, self._ends = Index(), PinnedEnds(self._clock)
