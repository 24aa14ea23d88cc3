"""Simulate: requests against a cache of blocks that evicts by a policy."""

from collections.abc import Callable
from typing import NamedTuple

from agnostic_cache.eviction.choose import CountingRoom, choose
from agnostic_cache.eviction.evictor import BaseEvictor
from agnostic_cache.eviction.gdsf import recompute_cost
from agnostic_cache.eviction.policy import Policy
from agnostic_cache.eviction.registry import make_policy
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


def replay(
    trace: Trace,
    name: str,
    evictor: BaseEvictor | Policy,
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
        evictor: The policy, new; its budget becomes ``capacity * block_bytes``.
        capacity: Blocks that the cache holds.
        block_bytes: Bytes of a block; the same for each, also a short last one.
        progress: Called now and then with the number of requests done since.
    """
    policy = make_policy(evictor, capacity * block_bytes)
    entries: dict[int | str, None] = {}
    longest = max((len(request.blocks) for request in trace.requests), default=0)
    size = trace.block_tokens
    costs = [recompute_cost(depth * size, (depth + 1) * size) for depth in range(longest)]

    def evict(over: int, newcomer: int | str | None = None, nbytes: int = 0) -> bool:
        """Evict `over` blocks, and what exceeds a quota; say whether that could be done."""
        room, expired = CountingRoom(over, lambda _: 1), policy.expired()
        victims = choose(policy, entries, room, newcomer=newcomer, nbytes=nbytes, expired=expired)
        for victim in victims or ():
            del entries[victim]
            policy.gone(victim, evicted=True)
        return victims is not None

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
                policy.used(block)
            elif evict(0, block, block_bytes):  # the capacity is enforced below
                entries[block] = None
                policy.added(block, block_bytes, costs[depth])
        evict(len(entries) - capacity)
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
