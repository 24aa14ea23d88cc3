"""LFU: the least frequently used entry leaves first, and old fame fades."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Any

from agnostic_cache.eviction.policy import Policy


class _Node:
    """What is known of a key."""

    __slots__ = ("density", "key", "place", "uses")

    place: "_Place | None"  # that in the heap may be older, and lower; None where the key is gone

    def __init__(self, key: Any) -> None:
        self.key = key
        self.uses = 0
        self.density = 1.0  # cost per byte


_Place = tuple[float, int, _Node]
"""A place in the order: priority, when it was given, and to which key."""


class LFU(Policy):
    """Evict what was used the least, with dynamic ageing: priority = uses + priority of the last victim.

    The second summand, taken at each use, is the ageing: what was used much long ago falls behind what is used less
    now. Of equals, the one that was used longest ago leaves first. A use costs O(1), an eviction O(log n).

    Source: M. Arlitt et al., "Evaluating content management techniques for Web proxy caches", 2000 (LFU-DA); N. E.
    Young, "The k-server dual and loose competitiveness for paging", Algorithmica 1994.
    """

    def reset(self) -> None:
        """See `Policy.reset`."""
        self._age = 0.0  # priority of the last victim
        self._turns = count()
        self._nodes: dict[Any, _Node] = {}
        self._heap: list[_Place] = []  # holds: one place per node, and some of nodes that are gone

    def _worth(self, node: _Node) -> float:
        """Return what an entry is worth, before ageing."""
        return node.uses

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
        """See `Policy.added`. Counts as a use, of an overwritten entry too."""
        node, old = _Node(key), self._nodes.get(key)
        if old is not None:  # its priority may be lower from now on: it gets a new place in the heap
            node.uses, old.place = old.uses, None
        node.density = 1.0 if cost is None or not nbytes else cost / nbytes
        self._nodes[key] = node
        heappush(self._heap, self._use(node))
        self._tidy()

    def used(self, key: Any) -> None:
        """See `Policy.used`. Raises the priority, of which the heap learns when the old place comes up."""
        self._use(self._nodes[key])

    def _use(self, node: _Node) -> _Place:
        node.uses += 1
        node.place = place = (self._age + self._worth(node), next(self._turns), node)
        return place

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """See `Policy.gone`. Where it is evicted, its priority is what later uses start from."""
        node = self._nodes.pop(key, None)
        if node is None or node.place is None:
            return
        if evicted:
            self._age = max(self._age, node.place[0])
        node.place = None
        self._tidy()

    def _tidy(self) -> None:
        """Have a place on top of the heap that holds, and few that do not."""
        heap = self._heap
        if len(heap) > 64 + 2 * len(self._nodes):
            heap[:] = [there.place for there in self._nodes.values() if there.place]
            heapify(heap)
        while heap and heap[0][2].place is not heap[0]:
            if newer := heap[0][2].place:
                heapreplace(heap, newer)
            else:
                heappop(heap)

    def order(self) -> Iterator[Any]:
        """See `Policy.order`. Walks down the heap, and puts where it belongs what was used since."""
        heap = self._heap
        ahead: list[tuple[_Place, int]] = [(heap[0], 0)] if heap else []  # and its index in the heap
        while ahead:
            place, at = heappop(ahead)
            node = place[2]
            if node.place is place:
                yield node.key
            elif node.place:
                heappush(ahead, (node.place, -1))
            if at >= 0:
                for child in range(2 * at + 1, min(2 * at + 3, len(heap))):
                    heappush(ahead, (heap[child], child))
