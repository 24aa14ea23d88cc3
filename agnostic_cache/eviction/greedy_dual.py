"""GreedyDualEvictor: what lfu and gdsf share, an order by worth that ages."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any

from agnostic_cache.eviction.budget import BudgetEvictor
from agnostic_cache.eviction.evictor import Entries


class _Node:
    """What is known of an entry."""

    __slots__ = ("density", "gone", "key", "place", "uses")

    place: "_Place"  # as last used; that in the heap may be older

    def __init__(self, key: Any) -> None:
        self.key = key
        self.uses = 0
        self.density = 1.0  # cost per byte
        self.gone = False


_Place = tuple[float, int, _Node]
"""A place in the order: priority, when it was given, and to whom."""


class GreedyDualEvictor(BudgetEvictor):
    """Evicts the lowest priority first: an entry's worth, plus the priority of the last victim when it was last used.

    That sum is the ageing: what was worth much long ago falls behind what is worth less now. Of equals, the one that
    was used longest ago leaves first. A use costs O(1), an eviction O(log n).

    Source: N. E. Young, "The k-server dual and loose competitiveness for paging", Algorithmica 1994; M. Arlitt et al.,
    "Evaluating content management techniques for Web proxy caches", 2000.
    """

    def reset(self) -> None:
        """Forget every entry."""
        super().reset()
        self._age = 0.0  # priority of the last victim
        self._turns = count()
        self._nodes: dict[Any, _Node] = {}
        self._heap: list[_Place] = []  # one place per node; nodes that are gone stay until they come up
        self._popped: list[_Place] = []  # in the middle of a decision

    @abstractmethod
    def _worth(self, uses: int, density: float) -> float:
        """Say what an entry is worth: how often it was used, and what a byte of it costs to compute again."""

    def update_on_get(self, key: Any, cache_dict: Entries) -> None:
        """Raise the entry's priority."""
        if key not in self._nodes:
            self._learn(key, cache_dict)
        self._use(self._nodes[key])

    def _use(self, node: _Node) -> None:
        node.uses += 1
        node.place = (self._age + self._worth(node.uses, node.density), next(self._turns), node)

    def _enter(self, key: Any, size: int, cost: float | None) -> None:
        node = self._nodes.get(key)
        is_new = node is None
        if node is None:
            node = self._nodes[key] = _Node(key)
        node.density = 1.0 if cost is None or not size else cost / size
        self._use(node)
        if is_new:
            heappush(self._heap, node.place)

    def _leave(self, key: Any) -> None:
        self._nodes.pop(key).gone = True
        if len(self._heap) > 64 + 2 * len(self._nodes):
            self._heap = [node.place for node in self._nodes.values()]
            heapify(self._heap)

    def _order(self, cache_dict: Entries, leaving: Sequence[Any]) -> Iterator[Any]:  # noqa: ARG002
        heap, popped = self._heap, self._popped
        while heap:
            place = heappop(heap)
            node = place[2]
            if node.gone:
                continue
            if node.place is not place:
                heappush(heap, node.place)  # it was used since
                continue
            popped.append(place)
            yield node.key

    def _decided(self, leaving: Sequence[Any]) -> None:
        for key in leaving:
            node = self._nodes.pop(key)
            node.gone = True
            self._age = node.place[0]
        for place in self._popped:
            if not place[2].gone:
                heappush(self._heap, place)
        self._popped.clear()
