"""StoredBlocks: a prefix cache's blocks in a storage, where they outlive eviction, the process and the machine.

A block goes down when it comes in, so that its eviction has nothing to wait for: one copy to host memory, from where
slower tiers are written in the background. It comes up when a match lacks it, with all that follow it, as far as that
is faster than computing them.
"""

import logging
import threading
from array import array
from collections.abc import Callable, Sequence

from agnostic_cache.blob.safetensors import Parts
from agnostic_cache.blob.state_blob import StoredState, encode
from agnostic_cache.errors import BlobError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.prefix.block import Block, Kind, windows_of
from agnostic_cache.prefix.chain import TOKEN_BYTES
from agnostic_cache.prefix.prompt import Prompt
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.storage.backend import StorageBackend
from agnostic_cache.storage.guard import GuardedStorage
from agnostic_cache.storage.memory import MemoryStorage
from agnostic_cache.storage.registry import open_storage
from agnostic_cache.storage.tiered import TieredStorage

_logger = logging.getLogger("agnostic_cache.prefix")
_STAGING = "1GiB"  # of memory before a storage that is none: nobody waits for a disk or a network

_COMPUTING = 0.01  # seconds; who took less had the state already


def open_tiers(storage: str | StorageBackend | Sequence[str]) -> TieredStorage:
    """Return a storage as tiers, of which the first is host memory.

    Args:
        storage: A URL, several from fast to slow, or a storage, which is taken over.

    Raises:
        AgnosticCacheError: See `open_storage`.
    """
    if isinstance(storage, TieredStorage):
        return storage
    urls = [storage] if isinstance(storage, str) else storage
    tiers = [urls] if isinstance(urls, StorageBackend) else list(map(open_storage, urls))
    first = tiers[0].backend if isinstance(tiers[0], GuardedStorage) else tiers[0]
    if not isinstance(first, MemoryStorage):
        tiers.insert(0, MemoryStorage(_STAGING))
    return TieredStorage(tiers, max_pending_bytes=_STAGING)


class _Look(threading.local):
    """What a thread's last match found in the storage, and when.

    Attributes:
        data: The prompt.
        hit: Tokens of it that need not be computed.
        at: When their computation began.
        blocks: Blocks that are in the storage, by key.
        ends: Keys of blocks at whose end a snapshot is in the storage; None before anybody asked.
    """

    def __init__(self) -> None:
        """Have found nothing."""
        self.data, self.hit, self.at = b"", 0, 0.0
        self.blocks: dict[bytes, Block] = {}
        self.ends: set[bytes] | None = None


class StoredBlocks:
    """Blocks under the names of their keys. Safe to use from several threads.

    Attributes:
        tiers: The storage.
        seconds_per_token: What the caller takes to compute a token, as far as was seen; None before that.
        mismatches: Blocks that were damaged, or not what their key says: removed.
    """

    def __init__(
        self,
        tiers: TieredStorage,
        block_size: int,
        layout: KVLayout | None,
        clock: Callable[[], float],
        kind_of: Callable[[KVState, str, str | None], Kind],
    ) -> None:
        """Take over a storage.

        Args:
            tiers: The storage.
            block_size: Tokens per block.
            layout: Layout that states shall carry.
            clock: Seconds, to measure with.
            kind_of: Returns the kind of a state, from it, its framework and its writer's fingerprint.
        """
        self.tiers = tiers
        self.seconds_per_token: float | None = None
        self.mismatches = 0
        self._lock = threading.Lock()  # guards the count
        self._block_size = block_size
        self._layout = layout
        self._clock = clock
        self._kind_of = kind_of
        self._look = _Look()

    # --- out ---------------------------------------------------------------------------------------------------------

    def load(
        self, prompt: Prompt, begin: int, end: int, parent: bytes, takes: Callable[[Kind], bool]
    ) -> list[tuple[Block, KVState]]:
        """Return the first blocks of tokens ``[begin, end)``, as far as they are there and worth it, in host memory.

        Args:
            prompt: The prompt.
            begin: Where a block begins.
            end: Where one ends.
            parent: Key of the block before them.
            takes: Says whether the caller has use for a block of this kind.
        """
        pieces = list(prompt.cut(self._block_size, begin=begin, end=end, parent=parent))
        seconds = self.seconds_per_token
        worth = None if seconds is None else seconds * self._block_size
        blobs = self.tiers.load([_name(key) for key, *_ in pieces], seconds_per_key=worth)
        found: list[tuple[Block, KVState]] = []
        for (key, tokens, marks), blob in zip(pieces, blobs, strict=False):
            read = self._read(_name(key), tokens, self._block_size, blob)
            if read is None or not takes(read[1]):
                break
            state, kind = read
            block = Block(key, parent, tokens, windows_of(state, 0, state.length), kind, marks=marks)
            found.append((block, state))
            self._look.blocks[key] = block
            parent = key
        return found

    def load_snapshot(self, blocks: Sequence[Block]) -> KVState | None:
        """Return what is valid at the end of `blocks` only, in host memory."""
        if self._look.ends is None:  # asked once: a match goes back block by block until there is one
            keys = [block.key for block in blocks]
            there = self.tiers.contains_many(list(map(_snapshot_name, keys)))
            self._look.ends = {key for key, is_there in zip(keys, there, strict=True) if is_there}
        last = blocks[-1]
        if last.key not in self._look.ends:
            return None
        name = _snapshot_name(last.key)
        blob = self.tiers.get(name)
        read = None if blob is None else self._read(name, last.tokens, 0, blob)
        return None if read is None else read[0]

    def prefetch(self, prompt: Prompt) -> None:
        """Bring the blocks of a prompt to the first tier, in the background."""
        self.tiers.prefetch([_name(key) for key, *_ in prompt.cut(self._block_size)])

    def remove(self, key: bytes) -> bool:
        """Drop a block, and the snapshot at its end; return whether it was there."""
        self.tiers.remove(_snapshot_name(key))
        return self.tiers.remove(_name(key))

    def _read(self, name: str, tokens: bytes, length: int, raw: memoryview) -> tuple[KVState, Kind] | None:
        """Parse a blob of these tokens and so many rows; return its state and kind.

        One that is not what its name says is removed.
        """
        try:
            blob = StoredState(raw)
            known = blob.tokens()
            if known is None or known.tobytes() != tokens:
                found: object = "other tokens"
            else:
                state = blob.state(layout=self._layout)
                if state.length == length:
                    return state, self._kind_of(state, blob.framework or "host", blob.fingerprint)
                found = f"{state.length} rows and not {length}"
        except BlobError as error:
            found = error
        with self._lock:
            self.mismatches += 1
        self.tiers.remove(name)
        _logger.warning("a stored block was no block of this prompt, which is a miss: %s", found)
        return None

    # --- in ----------------------------------------------------------------------------------------------------------

    def begin(self, data: bytes) -> None:
        """Begin a match: forget what the last one of this thread found."""
        self._look.blocks, self._look.ends, self._look.data = {}, None, data

    def found(self, tokens: int) -> None:
        """End a match that covers so many tokens: what is not covered is computed from now on."""
        self._look.hit, self._look.at = tokens, self._clock()

    def computed(self, data: bytes) -> None:
        """Hear that the states of a prompt are computed; learn from it how long a token takes, at most.

        The shortest time counts: most prompts also wait for their answer.
        """
        look = self._look
        both, tokens = min(len(data), len(look.data)), len(data) // TOKEN_BYTES - look.hit
        took = self._clock() - look.at
        if both and tokens >= self._block_size and took >= _COMPUTING and data[:both] == look.data[:both]:
            self.seconds_per_token = min(took / tokens, self.seconds_per_token or took)

    def lacks(self, block: Block) -> bool:
        """Whether a block is to be put, as far as this thread's last match knows."""
        known = self._look.blocks.get(block.key)
        return known is None or not known.serves_for(block)

    def surpasses(self, block: Block) -> bool:
        """Whether what is stored has rows of windows that `block`, which is to come in, lacks."""
        known = self._look.blocks.get(block.key)
        return known is not None and known.kind.joins(block.kind) and known.adds_to(block)

    def lacks_snapshot(self, block: Block) -> bool:
        """Whether a snapshot at the end of `block` is to be put, as far as this thread's last match knows."""
        return block.key not in (self._look.ends or ())

    def put(self, block: Block, state: KVState) -> None:
        """Store a block; refused or failed, it is not there."""
        if self.tiers.put(_name(block.key), _blob(block, state)) is PutStatus.LEGAL:
            self._look.blocks[block.key] = block

    def put_snapshot(self, block: Block, state: KVState) -> None:
        """Store what is valid at the end of `block` only."""
        if self.tiers.put(_snapshot_name(block.key), _blob(block, state)) is PutStatus.LEGAL:
            self._look.ends = {*(self._look.ends or ()), block.key}


def _name(key: bytes) -> str:
    return key.hex()


def _snapshot_name(key: bytes) -> str:
    return f"{key.hex()}.snapshot"


def _blob(block: Block, state: KVState) -> Parts:
    tokens = array("I")
    tokens.frombytes(block.tokens)
    # What leaves the process is checked by its storage.
    return encode(state, tokens=tokens, checksum=False, fingerprint=block.kind.fingerprint)
