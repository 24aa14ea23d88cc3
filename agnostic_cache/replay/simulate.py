"""Simulate: requests against a cache of blocks that evicts by a policy."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from agnostic_cache.eviction.evictor import BaseEvictor, PutStatus
from agnostic_cache.eviction.gdsf import recompute_cost
from agnostic_cache.replay.traces import Trace


class Result(NamedTuple):
    """What a policy hit at a capacity.

    Attributes:
        policy: Its name.
        capacity: In blocks.
        block_hit_ratio: Hit blocks of all blocks.
        token_hit_ratio: Hit tokens of all tokens.
    """

    policy: str
    capacity: int
    block_hit_ratio: float
    token_hit_ratio: float


class _Block:
    """An entry: nobody looks into it."""

    is_pinned = False


class _Later:
    """The `Room` of a request: its blocks come in first, and then the capacity is enforced."""

    def short(self) -> bool:
        return False

    def release(self, key: Any) -> bool:  # noqa: ARG002
        return False


_BLOCK, _LATER = _Block(), _Later()


def replay(
    trace: Trace,
    name: str,
    evictor: BaseEvictor,
    *,
    capacity: int,
    block_bytes: int,
    progress: Callable[[int], object] | None = None,
) -> Result:
    """Replay a trace. A request hits its longest prefix that is there; then its blocks are used, the deepest first.

    The capacity is enforced once after each request.

    Args:
        trace: The requests.
        name: Name of the policy, for the result.
        evictor: The policy, new, with a maximum of ``capacity * block_bytes``.
        capacity: Blocks that the cache holds.
        block_bytes: Bytes of a block; the same for each, also a short last one.
        progress: Called now and then with the number of requests done since.
    """
    entries: OrderedDict[int | str, _Block] = OrderedDict()
    longest = max((len(request.blocks) for request in trace.requests), default=0)
    size = trace.block_tokens
    costs = [recompute_cost(depth * size, (depth + 1) * size) for depth in range(longest)]
    get, put, evict = evictor.update_on_get, evictor.update_on_put, evictor.evict
    hit_blocks = hit_tokens = done = 0
    for tokens, blocks in trace.requests:
        hits = 0
        for block in blocks:
            if block not in entries:
                break
            hits += 1
        hit_blocks += hits
        hit_tokens += min(hits * size, tokens)
        for depth in range(len(blocks) - 1, -1, -1):
            block = blocks[depth]
            if block in entries:
                get(block, entries)
            else:
                victims, status = put(entries, block_bytes, key=block, cost=costs[depth], room=_LATER)
                for victim in victims:
                    del entries[victim]
                if status is PutStatus.LEGAL:
                    entries[block] = _BLOCK
        if len(entries) > capacity:
            for victim in evict(entries):
                del entries[victim]
        done += 1
        if progress is not None and done % 256 == 0:
            progress(256)
    if progress is not None:
        progress(done % 256)
    return _result(trace, name, capacity, hit_blocks, hit_tokens)


def ceiling(trace: Trace) -> Result:
    """Return what a cache without a limit hits."""
    seen: set[int | str] = set()
    hit_blocks = hit_tokens = 0
    for tokens, blocks in trace.requests:
        hits = next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))
        hit_blocks += hits
        hit_tokens += min(hits * trace.block_tokens, tokens)
        seen.update(blocks)
    return _result(trace, "no limit", len(seen), hit_blocks, hit_tokens)


def _result(trace: Trace, name: str, capacity: int, hit_blocks: int, hit_tokens: int) -> Result:
    return Result(name, capacity, hit_blocks / max(trace.blocks, 1), hit_tokens / max(trace.tokens, 1))
