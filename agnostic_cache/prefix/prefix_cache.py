"""PrefixCache: prompts go in block by block, the longest known prefix of another prompt comes out.

All that is kept lies in one `StateCache`, a block per entry, which does the accounting, the eviction and the lending.
Here is only which block follows which. Holds: what the index says is a hint; a block that the state cache no longer
has is a miss.
"""

import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from agnostic_cache.errors import (
    CacheBypassWarning,
    CacheCopyError,
    InvalidNamespaceError,
    InvalidSizeError,
    LengthMismatchError,
)
from agnostic_cache.eviction.evictor import BaseEvictor, PutStatus
from agnostic_cache.eviction.gdsf import recompute_cost
from agnostic_cache.fingerprint import PREFIX
from agnostic_cache.lease import Borrows
from agnostic_cache.prefix.chain import TOKEN_BYTES, encode, next_key, root_key
from agnostic_cache.prefix.index import Block, Index, has_snapshots, total_length, windows_complete, windows_of
from agnostic_cache.prefix.match import Match
from agnostic_cache.prefix.single_flight import SingleFlight
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.roles import SNAPSHOT
from agnostic_cache.state.wrapping import wrap
from agnostic_cache.state_cache import StateCache
from agnostic_cache.trace import Trace

_SNAPSHOT = b"/snapshot"  # behind the key of a block: what is valid at its end only


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
    >>> from agnostic_cache.state.dtypes import Dtype
    >>> from agnostic_cache.state.host import HostArray
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
        storage: None = None,
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
            storage: Tier below memory; none yet.
            exact: Match whole blocks only; see the attribute.
            ttl_seconds: How long what is inserted stays valid, unless `insert` says otherwise; by default for ever.
            trace: Hook that is told of matches, inserts, and what the state cache tells.
            clock: Seconds for `ttl_seconds`.

        Raises:
            InvalidNamespaceError: `namespace` is no str or empty, or `salt` is no bytes.
            InvalidSizeError: `max_bytes` or `block_size` is no size.
            UnknownPolicyError: No such policy.
        """
        _check(namespace, salt, block_size, storage)
        self.namespace = namespace
        self.block_size = block_size
        self.layout = layout
        self.exact = exact
        self._salt = salt
        self._ttl_seconds = ttl_seconds
        self._trace = trace
        self._clock = clock
        self._states = StateCache(max_bytes, evictor=evictor, trace=self._told)
        self._start()
        _caches.add(self)

    def _start(self) -> None:
        self._lock = threading.RLock()  # guards everything below; held for dict operations and counting only
        self._index = Index()
        self._flights = SingleFlight()
        # What each model's weights add to the context, by what verbs saw of them.
        self._weights: weakref.WeakKeyDictionary[Any, dict[Hashable, str]] = weakref.WeakKeyDictionary()
        self._named: str | None = None  # the fingerprint that the namespace stands for
        self._warned: set[str] = set()
        self._lookup_tokens = self._hit_tokens = self._inserted_tokens = self._bypassed = self._mismatches = 0

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
            match, parent = self._find(data, root, limit) if read else (_empty(), root)
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

    def _find(self, data: bytes, root: bytes, limit: int) -> tuple[Match, bytes]:
        """Borrow what is here of the first `limit` tokens; return it and the key of its last whole block."""
        blocks, rows = self._known(data, root, limit)
        if not blocks:
            return _empty(), root
        lease = self._states.borrow_all([block.key for block in blocks])
        if len(lease) < len(blocks):  # the index is behind
            self._forget(blocks[len(lease)])
            del blocks[len(lease) :]
            rows = self.block_size
        known = sum(block.length == self.block_size for block in blocks)
        count, leases = len(blocks), [lease]
        while count and not blocks[count - 1].granular:
            last = blocks[count - 1]
            if not last.windows or windows_complete(blocks, count):
                if not last.snapshots:
                    break
                snapshot = self._states.borrow_all([last.key + _SNAPSHOT])
                leases.append(snapshot)
                if len(snapshot):
                    break
            count, rows = count - 1, self.block_size
        if not count:
            for one in leases:
                one.close()
            match = _empty()
            match.known = known * self.block_size
            return match, root
        length = (count - 1) * self.block_size + rows
        whole = length // self.block_size
        match = Match([lease, *(one for one in leases[1:] if len(one))], count, rows, length, self.layout)
        match.known = max(length, known * self.block_size)
        return match, blocks[whole - 1].key if whole else root

    def _known(self, data: bytes, root: bytes, limit: int) -> tuple[list[Block], int]:
        """The chain of blocks for the first `limit` tokens, and how many tokens of the last one are in common."""
        size, key, get, blocks = self.block_size * TOKEN_BYTES, root, self._index.get, []
        for begin in range(0, limit // self.block_size * size, size):
            tokens = data[begin : begin + size]
            key = next_key(key, tokens)
            block = get(key)
            if block is None or (block.deadline is not None and self._expired(block)):
                break
            if block.tokens != tokens:
                with self._lock:
                    self._mismatches += 1
                self._remove(block)
                break
            blocks.append(block)
        rest = data[len(blocks) * size : limit * TOKEN_BYTES]
        parent = blocks[-1].key if blocks else root
        while rest and not self.exact:
            child, rows = self._index.best_child(parent, rest)
            if child is None:
                break
            if child.deadline is None or not self._expired(child):
                return [*blocks, child], rows
        return blocks, self.block_size

    def warm(self, prompts: Iterable[Any], *, context: bytes = b"") -> int:
        """Make what is here of each prompt the newest, so that it leaves last; return how many tokens that are."""
        root = self._root(context)
        found = 0
        for prompt in prompts:
            data = encode(prompt)
            match, _ = self._find(data, root, len(data) // TOKEN_BYTES)
            found += match.length
            match.close()
        return found

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
        blocks = self._plan(data, held, count, root, deadline)
        keys = [block.key for block in blocks]
        self._flights.spread(keys)
        leases = [self._states.borrow_all(keys, use=False)]  # what the new ones hang on does not leave to make room
        try:
            made = self._insert_blocks(blocks, held, leases)
            complete = all(map(self._states.contains, keys[-1:])) and count == held.length and not held.missing
            if blocks[-1].snapshots and complete and not self._states.contains(keys[-1] + _SNAPSHOT):
                cost = recompute_cost(0, count)
                self._states.put(keys[-1] + _SNAPSHOT, held.cut(count, count), move=True, cost=cost)
        finally:
            for lease in leases:
                lease.close()
            for key in keys:
                self._flights.land(key)
        self._states.borrow_all(keys).close()  # the first becomes the newest
        if self._trace is not None:
            self._trace("prefix_cache.insert", {"tokens": count, "blocks": len(blocks), "copied": made})
        return made

    def _plan(self, data: bytes, state: KVState, count: int, root: bytes, deadline: float | None) -> list[Block]:
        """The blocks that stand for the first `count` tokens of a state."""
        snapshots, key, blocks = has_snapshots(state), root, []
        for start in range(0, count, self.block_size):
            stop = min(start + self.block_size, count)
            tokens = data[start * TOKEN_BYTES : stop * TOKEN_BYTES]
            windows = windows_of(state, start, stop)
            parent, key = key, next_key(key, tokens)
            blocks.append(Block(key, parent, tokens, windows, snapshots=snapshots, deadline=deadline))
        return blocks

    def _insert_blocks(self, blocks: list[Block], state: KVState, leases: list[Borrows]) -> int:
        """Copy in the blocks that are not here; `leases` begins with those that are, and takes the new ones."""
        rows, made, there = _without_snapshots(state), 0, len(leases[0])
        for i, block in enumerate(blocks):
            known = self._index.get(block.key)
            if i >= there and known is not None:  # an orphan, maybe: its parent had left before it
                orphan = self._states.borrow_all([block.key], use=False)
                leases.append(orphan)
                known = known if len(orphan) else None
            if known is not None and known.tokens == block.tokens and not block.adds_to(known):
                known.deadline = block.deadline
                continue
            if block.length < self.block_size and self._is_covered(block):
                continue
            start = i * self.block_size
            stop = start + block.length
            piece, cost = rows.cut(start, stop), recompute_cost(start, stop)
            if self._states.put(block.key, piece, move=True, cost=cost) is not PutStatus.LEGAL:
                break  # what hangs on it would never be found
            with self._lock:
                self._index.add(block)
                self._inserted_tokens += block.length
            leases.append(self._states.borrow_all([block.key], use=False))
            made += 1
            self._drop_covered(block)
        return made

    def _is_covered(self, block: Block) -> bool:
        """Whether a longer block has the rows of this one, and a match may end anywhere in it."""
        return block.granular and any(
            child.length > block.length and child.granular and child.tokens.startswith(block.tokens)
            for child in self._index.children(block.parent, block.tokens)
        )

    def _drop_covered(self, block: Block) -> None:
        """Remove the shorter blocks whose rows this one has."""
        for child in self._index.children(block.parent, block.tokens):
            shorter = child.length < block.length and child.granular and block.granular
            if shorter and block.tokens.startswith(child.tokens):
                self._remove(child)

    # --- keeping -----------------------------------------------------------------------------------------------------

    def pin(self, tokens: Any, *, context: bytes = b"") -> int:
        """Keep what is here of a prompt from being evicted until as many `unpin`; return how many tokens that are."""
        return self._pin(tokens, context, self._states.pin)

    def unpin(self, tokens: Any, *, context: bytes = b"") -> int:
        """Take one `pin` back; return how many tokens it was for."""
        return self._pin(tokens, context, self._states.unpin)

    def _pin(self, tokens: Any, context: bytes, do: Callable[[bytes], bool]) -> int:
        data = encode(tokens)
        blocks, rows = self._known(data, self._root(context), len(data) // TOKEN_BYTES)
        for i, block in enumerate(blocks):
            if not do(block.key):
                return total_length(blocks[:i])
            if block.snapshots:
                do(block.key + _SNAPSHOT)
        return total_length(blocks[:-1]) + rows if blocks else 0

    def clear(self) -> None:
        """Drop everything, pinned blocks included; what is borrowed leaves when it is given back."""
        self._states.clear()
        with self._lock:
            self._index = Index()

    def stats(self) -> PrefixCacheStats:
        """Return what the cache holds and did. Linear in entries."""
        inner = self._states.stats()
        with self._lock:
            tokens = (self._lookup_tokens, self._hit_tokens, self._inserted_tokens)
            rest = (inner.entries, inner.current_bytes, inner.evictions, self._bypassed, self._mismatches)
            return PrefixCacheStats(*tokens, *rest)

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
        known = self._weights.get(model)
        if known is None or stamp not in known:
            found = fingerprint()
            with self._lock:
                if self._named is None:
                    self._named = self.namespace if self.namespace.startswith(PREFIX) else found
                known = self._weights.setdefault(model, {})
                # A fingerprint is a sample: of weights that changed under way, it may not tell.
                name = "" if not known and found == self._named else f"{found} {stamp if known else ''}"
                known.setdefault(stamp, name)
        return known[stamp].encode()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _root(self, context: bytes) -> bytes:
        return root_key(self.namespace, self._salt, context)

    def _expired(self, block: Block) -> bool:
        if block.deadline is None or self._clock() < block.deadline:
            return False
        self._remove(block)
        return True

    def _remove(self, block: Block) -> None:
        self._states.remove(block.key)
        self._states.remove(block.key + _SNAPSHOT)
        self._forget(block)

    def _forget(self, block: Block) -> None:
        gone = not self._states.contains(block.key)
        with self._lock:
            if gone and self._index.get(block.key) is block:
                self._index.discard(block.key)

    def _told(self, event: str, facts: Mapping[str, object]) -> None:
        """Hear of the state cache's events: what left cannot be found any more."""
        if event == "state_cache.release":
            block = self._index.get(facts["key"])  # type: ignore[arg-type]
            if block is not None:
                self._forget(block)
        if self._trace is not None:
            self._trace(event, facts)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            CacheCopyError: Always.
        """
        msg = "a PrefixCache owns device memory and cannot be pickled or copied; share it by reference"
        raise CacheCopyError(msg)


def _check(namespace: object, salt: object, block_size: object, storage: object) -> None:
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
    if storage is not None:
        msg = "storage tiers below memory are not there yet; pass storage=None"
        raise NotImplementedError(msg)


def _empty() -> Match:
    return Match([], 0, 0, 0, None)


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


def _without_snapshots(state: KVState) -> KVState:
    """The state's rows alone, borrowed: what is valid at its end only is kept apart from its last block."""
    rows = state.lend()
    snapshots = {name for name, leaf in state.leaves.items() if leaf.role is SNAPSHOT}
    rows._leaves = {name: leaf for name, leaf in state.leaves.items() if name not in snapshots}
    rows.missing = state.missing | snapshots
    return rows


# What a process has forked is state of the process.
_caches: "weakref.WeakSet[PrefixCache]" = weakref.WeakSet()


def _forget_all() -> None:
    for cache in list(_caches):
        cache._start()


os.register_at_fork(after_in_child=_forget_all)
