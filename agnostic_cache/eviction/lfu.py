"""LFUEvictor: the least frequently used entry leaves first, and old fame fades."""

from agnostic_cache.eviction.greedy_dual import GreedyDualEvictor


class LFUEvictor(GreedyDualEvictor):
    """Evict what was used the least, with dynamic ageing: priority = uses + priority of the last victim.

    Source: M. Arlitt et al., "Evaluating content management techniques for Web proxy caches", 2000 (LFU-DA).
    """

    def _worth(self, uses: int, density: float) -> float:  # noqa: ARG002
        return uses
