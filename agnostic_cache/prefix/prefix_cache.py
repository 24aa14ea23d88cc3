"""PrefixCache: prompts go in block by block, the longest known prefix of another prompt comes out.

Here is what a user calls; `block_store.py` keeps the blocks, in one `StateCache`, and `stored_blocks.py` those in a
storage below it.
"""

import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from agnostic_cache.errors import (
    CacheBypassWarning,
    CacheCopyError,
    InvalidNamespaceError,
    InvalidSizeError,
    LengthMismatchError,
)
from agnostic_cache.eviction.evictor import BaseEvictor
from agnostic_cache.held.state_cache import StateCache
from agnostic_cache.prefix.block_store import BlockStore
from agnostic_cache.prefix.chain import TOKEN_BYTES, encode, next_key, root_key
from agnostic_cache.prefix.match import Match
from agnostic_cache.prefix.single_flight import SingleFlight
from agnostic_cache.prefix.weights import Weights
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.wrapping import wrap
from agnostic_cache.trace import Trace

if TYPE_CHECKING:
    from agnostic_cache.storage.backend import StorageBackend
    from agnostic_cache.storage.tier import TierStats


class PrefixCacheStats(NamedTuple):
    """What a `PrefixCache` holds and did.

    Attributes:
        lookup_tokens: Tokens of all prompts that were matched.
        hit_tokens: Tokens of these that were there.
        inserted_tokens: Tokens whose rows were copied in.
        entries: Blocks and snapshots that can be found.
        current_bytes: Physical bytes of them and of what is deferred, each byte once.
        evictions: Blocks and snapshots that left to make room.
        bypassed: Calls that went past the cache.
        mismatches: Blocks under the right key with other tokens: dropped, never handed out.
    """

    lookup_tokens: int
    hit_tokens: int
    inserted_tokens: int
    entries: int
    current_bytes: int
    evictions: int
    bypassed: int
    mismatches: int


class PrefixCache:
    """A bounded cache of prompts' states that finds the longest prefix which is already computed.

    >>> from agnostic_cache import KVLayout
    >>> from agnostic_cache.arrays.dtypes import Dtype
    >>> from agnostic_cache.arrays.host import HostArray
    >>> from agnostic_cache.state.layout import TOKENS
    >>> layout = KVLayout({"*": TOKENS(1)})
    >>> cache = PrefixCache("1MiB", namespace="my-model", block_size=4, layout=layout)
    >>> cache.insert([5, 6, 7, 8, 9, 10], {"key": HostArray.empty((1, 6, 4), Dtype.FLOAT32)})
    2
    >>> with cache.match([5, 6, 7, 8, 9, 11, 12]) as match:
    ...     match.length, match.load()["key"].shape
    (5, (1, 5, 4))

    Blocks that prompts share are stored once. Safe to use from several threads. In a forked child it is empty.

    Attributes:
        namespace: Names the weights.
        block_size: Tokens per block.
        layout: Roles and names of leaves, where a structure alone does not tell.
        exact: Matches end at whole blocks, so that a prefill in such chunks runs the same kernels on hit and miss.
    """

    def __init__(  # noqa: PLR0913 - configured once, by keywords
        self,
        max_bytes: int | str | Mapping[str, int | str],
        *,
        namespace: str,
        salt: bytes = b"",
        block_size: int = 256,
        layout: KVLayout | None = None,
        evictor: str | BaseEvictor = "adaptive",
        storage: "str | StorageBackend | Sequence[str] | None" = None,
        exact: bool = False,
        ttl_seconds: float | None = None,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty cache.

        Args:
            max_bytes: Budget of physical bytes; see `StateCache`.
            namespace: Names the weights that states are computed with: `model_fingerprint` of the model, or a name that
                several processes or frameworks agree on.
            salt: Separates tenants: whoever has another salt never meets these entries, nor learns of them by time.
                Comes from whom a server has authenticated, never from the request.
            block_size: Tokens per block; a multiple of every stride in the state.
            layout: Roles and names of leaves; by default what containers and adapters know.
            evictor: Eviction policy; see `StateCache`.
            storage: Where blocks outlive eviction, the process and the machine: a URL of `open_storage`, several from
                fast to slow, or a storage, which is taken over. Whole blocks without a time to live go there when they
                come in, through host memory, so that nobody waits for a disk or a network; a match takes from it what
                is faster to load than to compute. Before the process ends, call `close` or `flush`.
            exact: Match whole blocks only; see the attribute.
            ttl_seconds: How long what is inserted stays valid, unless `insert` says otherwise; by default for ever.
            trace: Hook that is told of matches, inserts, and what the state cache tells.
            clock: Seconds, for `ttl_seconds` and to measure how long the caller computes.

        Raises:
            InvalidNamespaceError: `namespace` is no str or empty, or `salt` is no bytes.
            InvalidSizeError: `max_bytes` or `block_size` is no size.
            UnknownPolicyError: No such policy.
            AgnosticCacheError: The storage cannot be opened; see `open_storage`.
        """
        _check(namespace, salt, block_size)
        self.namespace = namespace
        self.block_size = block_size
        self.layout = layout
        self.exact = exact
        self._salt = salt
        self._ttl_seconds = ttl_seconds
        self._trace = trace
        self._clock = clock
        stored = None
        if storage is not None:
            from agnostic_cache.prefix.stored_blocks import StoredBlocks, open_tiers  # noqa: PLC0415 - few need them

            stored = StoredBlocks(open_tiers(storage), block_size, layout, clock)
        states = StateCache(max_bytes, evictor=evictor, trace=self._told)
        self._blocks = BlockStore(states, block_size, layout, granular=not exact, clock=clock, stored=stored)
        self._start()
        _caches.add(self)

    def _start(self) -> None:
        self._lock = threading.RLock()  # guards the counts; a finaliser may come in the middle
        self._flights = SingleFlight()
        self._weights = Weights(self.namespace)
        self._warned: set[str] = set()
        self._lookup_tokens = self._hit_tokens = self._bypassed = 0

    # --- out ---------------------------------------------------------------------------------------------------------

    def match(self, tokens: Any, *, context: bytes = b"", read: bool = True, single_flight: bool = False) -> Match:
        """Find the longest prefix of a prompt that is here, and borrow it. Copies nothing.

        Where all leaves are `TOKENS` it may end at any token, where some are `WINDOW` at the end of a block, and where
        some are `SNAPSHOT` where one was stored. It never covers the last token, whose logits the caller needs.

        Args:
            tokens: The prompt: see `prefix.chain.encode`.
            context: What else the state depends on: images, adapters, custom positions ...
            read: False gives an empty match, as if nothing were here.
            single_flight: Where another thread has matched and not yet inserted what this one lacks, wait for it. The
                match then stands for the claim to compute it: close it when that fails.

        Raises:
            InvalidTokensError: They are no prompt.
            InvalidNamespaceError: `context` is no bytes.
        """
        data = encode(tokens)
        root = self._root(context)
        limit = max(len(data) // TOKEN_BYTES - 1, 0)
        if self.exact:
            limit -= limit % self.block_size
        while True:
            match, parent = self._blocks.find(data, root, limit) if read else (_empty(), root)
            if not single_flight or match.length == limit:
                break
            begin = match.length - match.length % self.block_size
            lacking = next_key(parent, data[begin * TOKEN_BYTES : (begin + self.block_size) * TOKEN_BYTES])
            match._claim = self._flights.claim(lacking)
            if match._claim is not None:
                break
            match.close()
        with self._lock:
            self._lookup_tokens += len(data) // TOKEN_BYTES
            self._hit_tokens += match.length
        if self._trace is not None:
            self._trace("prefix_cache.match", {"tokens": len(data) // TOKEN_BYTES, "hit": match.length})
        return match

    def warm(self, prompts: Iterable[Any], *, context: bytes = b"") -> int:
        """Make what is here of each prompt the newest, so that it leaves last; return how many tokens that are."""
        root = self._root(context)
        found = 0
        for prompt in prompts:
            data = encode(prompt)
            match, _ = self._blocks.find(data, root, len(data) // TOKEN_BYTES, below=False)
            found += match.length
            match.close()
        return found

    def prefetch(self, tokens: Any, *, context: bytes = b"") -> None:
        """Bring what lies in slow tiers of the storage of a prompt to the fast one, in the background; do not wait."""
        data, root = encode(tokens), self._root(context)
        if self._blocks.stored is not None:
            self._blocks.stored.prefetch(root, data)

    # --- in ----------------------------------------------------------------------------------------------------------

    def insert(
        self,
        tokens: Any,
        state: Any,
        *,
        length: int | None = None,
        context: bytes = b"",
        layout: KVLayout | None = None,
        write: bool = True,
        ttl_seconds: float | None = None,
    ) -> int:
        """Copy in what is not here yet of a prompt's state; `state` stays the caller's.

        Args:
            tokens: What `state` was computed from.
            state: A native state or a `KVState`.
            length: How many of the first tokens and rows to take, where `state` stands for more or fewer than `tokens`;
                by default it stands for all of them and no more.
            context: As in `match`.
            layout: Roles and names of the leaves of a native state; by default the cache's own.
            write: False takes nothing in.
            ttl_seconds: How long the blocks stay valid; by default as the cache was told.

        Returns:
            How many blocks were copied. Fewer than are missing where the budget is too small: the first ones go in.

        Raises:
            LengthMismatchError: The state stands for another number of tokens. Nothing is stored.
            AgnosticCacheError: The state cannot be kept; see `wrap`.
        """
        data = encode(tokens)
        held, count = _take(state, len(data) // TOKEN_BYTES, length, layout or self.layout)
        root = self._root(context)
        if self.exact:
            count -= count % self.block_size
        if not write or not count:
            return 0
        seconds = self._ttl_seconds if ttl_seconds is None else ttl_seconds
        deadline = None if seconds is None else self._clock() + seconds
        blocks = self._blocks.plan(data, root, held, count, deadline)
        keys = [block.key for block in blocks]
        self._flights.spread(keys)
        try:
            made = self._blocks.insert(data, blocks, held)
        finally:
            self._flights.land(keys)
        if self._trace is not None:
            self._trace("prefix_cache.insert", {"tokens": count, "blocks": len(keys), "copied": made})
        return made

    # --- keeping -----------------------------------------------------------------------------------------------------

    def pin(self, tokens: Any, *, context: bytes = b"") -> int:
        """Keep what is here of a prompt from being evicted until as many `unpin`; return how many tokens that are."""
        return self._blocks.pin(encode(tokens), self._root(context), self._blocks.states.pin)

    def unpin(self, tokens: Any, *, context: bytes = b"") -> int:
        """Take one `pin` back; return how many tokens it was for."""
        return self._blocks.pin(encode(tokens), self._root(context), self._blocks.states.unpin)

    def clear(self) -> None:
        """Drop everything, pinned blocks included; what is borrowed leaves when it is given back.

        What is in the storage stays, and is found there.
        """
        self._blocks.clear()

    def flush(self) -> None:
        """Wait until all that was inserted is in every tier of the storage, but for what `tier_stats` calls skipped."""
        if self._blocks.stored is not None:
            self._blocks.stored.tiers.flush()

    def close(self) -> None:
        """Flush, close the storage, and drop everything. Idempotent; the cache goes on without a storage."""
        stored, self._blocks.stored = self._blocks.stored, None
        if stored is not None:
            stored.tiers.close()
        self.clear()

    def __enter__(self) -> Self:
        """Close at the end of a ``with`` block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def stats(self) -> PrefixCacheStats:
        """Return what the cache holds and did. Linear in entries."""
        inner, blocks = self._blocks.states.stats(), self._blocks
        below = blocks.stored.mismatches if blocks.stored is not None else 0
        with self._lock:
            tokens = (self._lookup_tokens, self._hit_tokens, blocks.inserted_tokens)
            rest = (inner.entries, inner.current_bytes, inner.evictions, self._bypassed, blocks.mismatches + below)
            return PrefixCacheStats(*tokens, *rest)

    def tier_stats(self) -> "list[TierStats]":
        """Return what each tier of the storage holds and did, the fastest first; nothing where there is none."""
        return [] if self._blocks.stored is None else self._blocks.stored.tiers.tier_stats()

    # --- for the verbs of frameworks ---------------------------------------------------------------------------------

    def bypass(self, reason: str) -> None:
        """Count a call that goes past the cache, and warn of the first for each reason."""
        with self._lock:
            self._bypassed += 1
            new = reason not in self._warned
            self._warned.add(reason)
        if new:
            warnings.warn(f"PrefixCache is bypassed: {reason}", CacheBypassWarning, stacklevel=3)

    def weights_context(self, model: object, stamp: Hashable, fingerprint: Callable[[], str]) -> bytes:
        """Return what to put into `context` for the weights of a model: nothing while they are those of the namespace.

        A namespace that is a fingerprint names those weights; any other names the weights that are seen first. Changed
        weights, another adapter or another model never meet their states.

        Args:
            model: Whose weights; not kept alive.
            stamp: Changes whenever they may have.
            fingerprint: Computes their fingerprint; called once per stamp.
        """
        return self._weights.context(model, stamp, fingerprint)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _root(self, context: bytes) -> bytes:
        return root_key(self.namespace, self._salt, context)

    def _told(self, event: str, facts: Mapping[str, object]) -> None:
        self._blocks.told(event, facts)
        if self._trace is not None:
            self._trace(event, facts)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            CacheCopyError: Always.
        """
        msg = "a PrefixCache owns device memory and cannot be pickled or copied; share it by reference"
        raise CacheCopyError(msg)


def _check(namespace: object, salt: object, block_size: object) -> None:
    """Raise where a cache cannot be made of what it was given."""
    if not isinstance(namespace, str) or not namespace or not isinstance(salt, bytes):
        msg = (
            f"namespace={namespace!r}, salt of type {type(salt).__qualname__}; pass a name of the weights, such as "
            "model_fingerprint(model), and the salt as bytes"
        )
        raise InvalidNamespaceError(msg)
    if not isinstance(block_size, int) or block_size < 1:
        msg = f"block_size={block_size!r} is no number of tokens; pass a positive int, such as 256"
        raise InvalidSizeError(msg)


def _empty() -> Match:
    return Match(None, 0, None, None, 0, 0, 0, None)


def _take(state: Any, count: int, length: int | None, layout: KVLayout | None) -> tuple[KVState, int]:
    """The state, and how many tokens of it to keep."""
    wanted = count if length is None else length
    if isinstance(state, KVState):
        held = state
    else:
        try:
            held = wrap(state, layout=layout, length=wanted)
        except LengthMismatchError:
            if length is None:
                raise
            held = wrap(state, layout=layout)  # it stands for more
    if not 0 <= wanted <= min(count, held.length) or (length is None and held.length != count):
        msg = (
            f"a state of {held.length} tokens for a prompt of {count}, length={length}; pass the tokens that it "
            "was computed from, or length= where only the first ones are to be kept"
        )
        raise LengthMismatchError(msg)
    return held, wanted


# What a process has forked is state of the process.
_caches: "weakref.WeakSet[PrefixCache]" = weakref.WeakSet()


def _forget_all() -> None:
    for cache in list(_caches):
        cache._start()
        cache._blocks.start()


os.register_at_fork(after_in_child=_forget_all)
