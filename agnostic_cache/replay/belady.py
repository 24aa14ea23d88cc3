"""Belady: the offline optimum, which knows the future."""

from collections.abc import Callable
from heapq import heappop, heappush

from agnostic_cache.replay.simulate import Result, _result
from agnostic_cache.replay.traces import Trace


def replay_belady(trace: Trace, *, capacity: int, progress: Callable[[int], object] | None = None) -> Result:
    """Replay a trace as `replay` does, evicting the block whose next use is farthest away, the deepest of equals first.

    Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 1966.

    Args:
        trace: The requests.
        capacity: Blocks that the cache holds.
        progress: Called now and then with the number of requests done since.
    """
    nexts = _next_uses(trace)
    when: dict[int | str, int] = {}  # next use of each block that is there
    heap: list[tuple[int, int, int | str]] = []  # (- next use, - depth, block); older ones of a block are skipped
    hit_blocks = hit_tokens = 0
    for number, (tokens, blocks) in enumerate(trace.requests):
        hits = 0
        for block in blocks:
            if block not in when:
                break
            hits += 1
        hit_blocks += hits
        hit_tokens += min(hits * trace.block_tokens, tokens)
        for depth, (block, next_use) in enumerate(zip(blocks, nexts[number], strict=True)):
            when[block] = next_use
            heappush(heap, (-next_use, -depth, block))
        while len(when) > capacity:
            next_use, _, block = heappop(heap)
            if when.get(block) == -next_use:
                del when[block]
        if progress is not None:
            progress(1)
    return _result(trace, "belady", capacity, hit_blocks, hit_tokens)


def _next_uses(trace: Trace) -> list[list[int]]:
    """Return for each block of each request the number of the next request that uses it."""
    never = len(trace.requests)
    ahead: dict[int | str, int] = {}
    nexts: list[list[int]] = []
    for number in range(never - 1, -1, -1):
        blocks = trace.requests[number].blocks
        nexts.append([ahead.get(block, never) for block in blocks])
        ahead.update(dict.fromkeys(blocks, number))
    nexts.reverse()
    return nexts
