"""PrefixCache: prompts go in block by block, the longest known prefix of another prompt comes out.

Here is what a user calls; `block_store.py` keeps the blocks, in one `StateCache`, and `stored_blocks.py` those in a
storage below it.
"""

import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self

from agnostic_cache.errors import CacheBypassWarning, CacheCopyError
from agnostic_cache.eviction.evictor import BaseEvictor
from agnostic_cache.held.state_cache import StateCache
from agnostic_cache.prefix.arguments import check_settings, take_state
from agnostic_cache.prefix.block_store import BlockStore
from agnostic_cache.prefix.match import Match
from agnostic_cache.prefix.prompt import Extra, Prompt
from agnostic_cache.prefix.single_flight import SingleFlight
from agnostic_cache.prefix.stats import PrefixCacheStats
from agnostic_cache.prefix.weights import Weights
from agnostic_cache.process import forks
from agnostic_cache.process.lock import Lock
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.trace import Trace

if TYPE_CHECKING:
    from agnostic_cache.storage.backend import StorageBackend  # few have one: it is imported with the first
    from agnostic_cache.storage.tier import TierStats


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
        strict: Whether ``generate`` and its kin raise an error of ours, as tests want it. Otherwise the call bypasses
            the cache, with one warning, a log record and a count in `stats`.
    """

    def __init__(  # noqa: PLR0913 - configured once, by keywords
        self,
        max_bytes: int | str | Mapping[str, int | str],
        *,
        namespace: str,
        salt: bytes = b"",
        fingerprint: str | None = None,
        block_size: int = 256,
        layout: KVLayout | None = None,
        evictor: str | BaseEvictor = "adaptive",
        storage: "str | StorageBackend | Sequence[str] | None" = None,
        exact: bool = False,
        ttl_seconds: float | None = None,
        trace: Trace | None = None,
        strict: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty cache.

        Args:
            max_bytes: Budget of physical bytes; see `StateCache`.
            namespace: Names the weights that states are computed with: `model_fingerprint` of the model, or a name that
                several processes or frameworks agree on.
            salt: Separates tenants where a call names none: whoever has another salt never meets these entries, nor
                learns of them by time. Comes from whom a server has authenticated, never from the request.
            fingerprint: `model_fingerprint` of the model, where `namespace` is a name that was chosen. Blocks that
                another model of the same framework stored under it are misses, with one warning. By default that of
                the model that the verbs of PyTorch meet first; without a model, nothing is compared.
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
            strict: Raise errors of ours; see the attribute.
            clock: Seconds, for `ttl_seconds` and to measure how long the caller computes.

        Raises:
            InvalidNamespaceError: `namespace` is no str or empty, or `salt` is no bytes.
            InvalidSizeError: `max_bytes` or `block_size` is no size.
            UnknownPolicyError: No such policy.
            AgnosticCacheError: The storage cannot be opened; see `open_storage`.
        """
        check_settings(namespace, salt, block_size)
        self.namespace = namespace
        self.block_size = block_size
        self.layout = layout
        self.exact = exact
        self.strict = strict
        self._salt = salt
        self._fingerprint = fingerprint
        self._ttl_seconds = ttl_seconds
        self._trace = trace
        self._clock = clock
        states = StateCache(max_bytes, evictor=evictor, trace=self._on_event, clock=clock)
        self._blocks = BlockStore(states, block_size, layout, granular=not exact, clock=clock)
        if storage is not None:
            from agnostic_cache.prefix.stored_blocks import StoredBlocks, open_tiers  # noqa: PLC0415 - few need them

            kind_of = self._blocks.kind_of
            self._blocks.stored = StoredBlocks(open_tiers(storage), block_size, layout, clock, kind_of)
        self._start()
        forks.watch(self)

    def _start(self) -> None:
        self._lock = Lock()  # guards the counts
        self._flights = SingleFlight()
        self._weights = Weights(self.namespace, self._fingerprint)
        self._warned: set[str] = set()
        self._lookup_tokens = self._hit_tokens = self._bypassed = 0

    def after_fork(self) -> None:
        """Be empty in a forked child."""
        self._start()
        self._blocks.start()

    def _prompt(
        self, tokens: Any, context: bytes, salt: bytes | None, salt_from: int, extras: Iterable[Extra]
    ) -> Prompt:
        return Prompt(tokens, self.namespace, self._salt if salt is None else salt, context, salt_from, extras)

    # --- out ---------------------------------------------------------------------------------------------------------

    def match(
        self,
        tokens: Any,
        *,
        context: bytes = b"",
        salt: bytes | None = None,
        salt_from: int = 0,
        extras: Iterable[Extra] = (),
        fingerprint: str | None = None,
        read: bool = True,
        single_flight: bool = False,
    ) -> Match:
        """Find the longest prefix of a prompt that is here, and borrow it. Copies nothing.

        Where all leaves are `TOKENS` it may end at any token, where some are `WINDOW` at the end of a block, and where
        some are `SNAPSHOT` where one was stored. It never covers the last token, whose logits the caller needs, and
        never ends inside an atomic extra. In a finaliser that interrupts another call of its thread it finds nothing.

        Args:
            tokens: The prompt: see `prefix.chain.encode`.
            context: What else the whole state depends on: adapters, custom positions ...
            salt: Whose tokens they are; by default the cache's.
            salt_from: How many of the first tokens are everybody's: a system prompt that tenants share.
            extras: What stands at places of the prompt besides tokens, such as an image, in order:
                ``(start, stop, digest, atomic)``. Prompts share what stands before an extra, and what stands behind it
                only where the digests are equal. Within an `atomic` one, whose tokens attend to each other in both
                directions, nothing is cut.
            fingerprint: Of the model that will read the state; by default what the namespace stands for. Blocks that
                another model of the same framework stored are misses, with one warning.
            read: False gives an empty match, as if nothing were here.
            single_flight: Where another thread has matched and not yet inserted what this one lacks, wait for it. The
                match then stands for the claim to compute it: close it when that fails. A thread that has such a match
                open does not wait.

        Raises:
            InvalidTokensError: They are no prompt.
            InvalidNamespaceError: `context` or `salt` is no bytes.
            InvalidExtrasError: `extras` or `salt_from` do not fit the prompt.
        """
        prompt = self._prompt(tokens, context, salt, salt_from, extras)
        limit, size = max(prompt.count - 1, 0), self.block_size
        if self.exact:
            limit -= limit % size
        while True:
            match = self._blocks.find(prompt, limit, fingerprint or self._weights.named) if read else Match()
            if not single_flight or match.length == limit:
                break
            end = match.length - match.length % size + size
            *_, (lacking, _, _) = prompt.cut(size, end=end)
            match.claim = self._flights.claim(lacking)
            if match.claim is not None:
                break
            match.close()
        if not self._lock.is_mine():
            with self._lock:
                self._lookup_tokens += prompt.count
                self._hit_tokens += match.length
        if match.other_weights:
            try:
                self._warn(f"other weights stored states under namespace {self.namespace!r}: misses; choose another")
            except BaseException:  # warnings are errors here
                match.close()
                raise
        if self._trace is not None:
            self._trace("prefix_cache.match", {"tokens": prompt.count, "hit": match.length})
        return match

    def warm(
        self,
        prompts: Iterable[Any],
        *,
        context: bytes = b"",
        salt: bytes | None = None,
        salt_from: int = 0,
        extras: Iterable[Extra] = (),
    ) -> int:
        """Make what is here of each prompt the newest, so that it leaves last; return how many tokens that are.

        Keywords are those of `match`, for every prompt.
        """
        found, extras = 0, tuple(extras)
        for tokens in prompts:
            prompt = self._prompt(tokens, context, salt, salt_from, extras)
            match = self._blocks.find(prompt, prompt.count, below=False)
            found += match.length
            match.close()
        return found

    def prefetch(
        self,
        tokens: Any,
        *,
        context: bytes = b"",
        salt: bytes | None = None,
        salt_from: int = 0,
        extras: Iterable[Extra] = (),
    ) -> None:
        """Bring what lies in slow tiers of the storage of a prompt to the fast one, in the background; do not wait.

        Keywords are those of `match`.
        """
        prompt, stored = self._prompt(tokens, context, salt, salt_from, extras), self._blocks.stored
        if stored is not None:
            stored.prefetch(prompt)

    # --- in ----------------------------------------------------------------------------------------------------------

    def insert(  # noqa: PLR0913 - what a state depends on is said by keywords
        self,
        tokens: Any,
        state: Any,
        *,
        length: int | None = None,
        context: bytes = b"",
        salt: bytes | None = None,
        salt_from: int = 0,
        extras: Iterable[Extra] = (),
        fingerprint: str | None = None,
        layout: KVLayout | None = None,
        write: bool = True,
        ttl_seconds: float | None = None,
    ) -> int:
        """Copy in what is not here yet of a prompt's state; `state` stays the caller's.

        A state of another structure or dtype than what is here of the prompt is not kept: blocks of both could not be
        joined. Blocks that other weights computed are replaced.

        Args:
            tokens: What `state` was computed from.
            state: A native state or a `KVState`.
            length: How many of the first tokens and rows to take, where `state` stands for more or fewer than `tokens`;
                by default it stands for all of them and no more. Where that is inside an atomic extra, what stands
                before the extra is taken.
            context: As in `match`.
            salt: As in `match`.
            salt_from: As in `match`.
            extras: As in `match`.
            fingerprint: Of the model that computed the state; by default what the namespace stands for.
            layout: Roles and names of the leaves of a native state; by default the cache's own.
            write: False takes nothing in.
            ttl_seconds: How long the blocks stay valid; by default as the cache was told.

        Returns:
            How many blocks were copied. Fewer than are missing where the budget is too small: the first ones go in.

        Raises:
            LengthMismatchError: The state stands for another number of tokens. Nothing is stored.
            PinLimitError: The prompt is pinned and takes more than half of the budget. What fits there is kept.
            InvalidExtrasError: `extras` or `salt_from` do not fit the prompt.
            AgnosticCacheError: The state cannot be kept; see `wrap`.
        """
        prompt = self._prompt(tokens, context, salt, salt_from, extras)
        held, count = take_state(state, prompt.count, length, layout or self.layout)
        count = prompt.boundary(count, self.block_size) if self.exact else prompt.stop(count)
        if not write or not count:
            return 0
        seconds = self._ttl_seconds if ttl_seconds is None else ttl_seconds
        deadline = None if seconds is None else self._clock() + seconds
        blocks = self._blocks.plan(prompt, held, count, fingerprint or self._weights.named, deadline)
        keys = [block.key for block in blocks]
        try:
            self._flights.spread(keys)
            made = self._blocks.insert(prompt, blocks, held)
        finally:
            self._flights.land(keys)
        if self._trace is not None:
            self._trace("prefix_cache.insert", {"tokens": count, "blocks": len(keys), "copied": made})
        return made

    # --- keeping -----------------------------------------------------------------------------------------------------

    def pin(
        self,
        tokens: Any,
        *,
        ttl_seconds: float | None = None,
        context: bytes = b"",
        salt: bytes | None = None,
        salt_from: int = 0,
        extras: Iterable[Extra] = (),
    ) -> int:
        """Keep a prompt from being evicted, until as many `unpin`, or `clear`; return how many tokens of it are here.

        The pin is the prompt's: it may come before the first insert, and holds when the prompt goes on. Nothing is
        pinned that a longer prompt adds. It holds for `ttl_seconds`, by default until it is taken back. The other
        keywords are those of `match`.

        Raises:
            PinLimitError: Pinned prompts would fill more than half of the budget. This one is not pinned. `insert`
                raises it where a prompt comes in that was pinned before.
        """
        return self._blocks.pin(self._prompt(tokens, context, salt, salt_from, extras), ttl_seconds)

    def unpin(
        self,
        tokens: Any,
        *,
        context: bytes = b"",
        salt: bytes | None = None,
        salt_from: int = 0,
        extras: Iterable[Extra] = (),
    ) -> int:
        """Take one `pin` of a prompt back; return how many tokens of it are here. Keywords are those of `match`."""
        return self._blocks.unpin(self._prompt(tokens, context, salt, salt_from, extras))

    def remove(
        self,
        tokens: Any,
        *,
        context: bytes = b"",
        salt: bytes | None = None,
        salt_from: int = 0,
        extras: Iterable[Extra] = (),
        stored: bool = False,
    ) -> int:
        """Drop the blocks that lie wholly within a prompt, pinned or not; return how many tokens that were.

        Blocks that other prompts share are dropped too. A longer prompt's block that begins with the last tokens of
        this one stays. What is borrowed is freed when it is given back. Blocks in the storage stay and are found there,
        unless ``stored=True``. The other keywords are those of `match`.
        """
        return self._blocks.remove(self._prompt(tokens, context, salt, salt_from, extras), below=stored)

    def clear(self) -> None:
        """Drop everything, pinned blocks included; what is borrowed leaves when it is given back.

        What is in the storage stays, and is found there.
        """
        self._blocks.clear()

    def flush(self) -> None:
        """Wait until all that was inserted is in every tier of the storage, but for what `tier_stats` calls skipped."""
        stored = self._blocks.stored
        if stored is not None:
            stored.tiers.flush()

    def close(self) -> None:
        """Flush, close the storage, and drop everything. Idempotent; the cache goes on without a storage."""
        stored, self._blocks.stored = self._blocks.stored, None
        if stored is not None:
            stored.tiers.close()
        self.clear()

    def __enter__(self) -> Self:
        """Close at the end of a ``with`` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def stats(self) -> PrefixCacheStats:
        """Return what the cache holds and did."""
        inner, blocks, stored = self._blocks.states.stats(), self._blocks, self._blocks.stored
        below = 0 if stored is None else stored.mismatches
        with self._lock:
            tokens = (self._lookup_tokens, self._hit_tokens, blocks.inserted_tokens)
            rest = (inner.entries, inner.current_bytes, inner.evictions, self._bypassed, blocks.mismatches + below)
            return PrefixCacheStats(*tokens, *rest)

    def tier_stats(self) -> "list[TierStats]":
        """Return what each tier of the storage holds and did, the fastest first; nothing where there is none."""
        stored = self._blocks.stored
        return [] if stored is None else stored.tiers.tier_stats()

    # --- for the verbs of frameworks ---------------------------------------------------------------------------------

    def bypass(self, reason: str) -> None:
        """Count a call that goes past the cache, and warn of the first for each reason."""
        with self._lock:
            self._bypassed += 1
        self._warn(f"PrefixCache is bypassed: {reason}")

    def _warn(self, message: str) -> None:
        """Warn of the first of each kind."""
        with self._lock:
            new = message not in self._warned
            self._warned.add(message)
        if new:
            warnings.warn(message, CacheBypassWarning, stacklevel=4)

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

    def _on_event(self, event: str, facts: Mapping[str, object]) -> None:
        self._blocks.on_event(event, facts)
        if self._trace is not None:
            self._trace(event, facts)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            CacheCopyError: Always.
        """
        msg = "a PrefixCache owns device memory and cannot be pickled or copied; share it by reference"
        raise CacheCopyError(msg)
