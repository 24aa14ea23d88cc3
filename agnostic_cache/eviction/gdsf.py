"""GDSF: what is cheap to compute again, per byte, leaves first."""

from agnostic_cache.eviction.lfu import LFU, _Node


class GDSF(LFU):
    """Evict by priority = uses * cost / bytes + priority of the last victim.

    The cost is what the container says when it adds a key, by default the bytes: then this is `LFU`. For blocks of a
    prompt, `recompute_cost` gives one.

    Source: L. Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs
    1998; P. Cao, S. Irani, "Cost-aware WWW proxy caching algorithms", USITS 1997.
    """

    def _worth(self, node: _Node) -> float:
        return node.uses * node.density


def recompute_cost(start: int, stop: int, *, balance: int = 32768) -> float:
    """Return what it takes to prefill tokens ``[start, stop)`` when those before them are there, in tokens.

    Each token costs 1 for the weights, and ``position / balance`` for attending to what is before it: the end of a long
    prefix costs more per byte than the beginning of a short one.

    >>> recompute_cost(0, 512), recompute_cost(65536, 66048)
    (516.0, 1540.0)

    Args:
        start: First token.
        stop: The one after the last.
        balance: The position at which attention costs as much as the weights: for a decoder of P parameters, L layers
            and width d, about ``P / (2 * L * d)``; some 27,000 for 7 billion parameters, 53,000 for 70 billion.

    Returns:
        The cost in tokens at position 0.
    """
    return (stop - start) * (1 + (start + stop) / 2 / balance)
