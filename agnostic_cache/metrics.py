"""Metrics: what happened, as Prometheus counts it. Needs the extra ``metrics``."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS: Final = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Stats(Protocol):
    """What a storage says of itself, as `StorageStats` does. Sizes in bytes."""

    @property
    def entries(self) -> int:
        """Entries that can be found."""
        ...

    @property
    def current_bytes(self) -> int:
        """Bytes that they take."""
        ...

    @property
    def max_bytes(self) -> int | None:
        """The budget, or None."""
        ...

    @property
    def evictions(self) -> int:
        """Entries that left to make room."""
        ...


class Metrics(Collector):
    """Metrics of one program, in a registry of their own. Safe to use from several threads.

    >>> metrics = Metrics()
    >>> metrics.trace("server.request", {"op": "get", "result": "hit", "seconds": 0.001})
    >>> b'agnostic_cache_requests_total{op="get",result="hit",tier="server"} 1.0' in metrics.text()
    True
    """

    def __init__(self) -> None:
        """Start at zero."""
        self._registry = CollectorRegistry()
        self._tiers: dict[str, tuple[str, Callable[[], Stats]]] = {}
        self._connections: Callable[[], int] | None = None
        self._requests = Counter(
            "agnostic_cache_requests", "Requests answered.", ("op", "tier", "result"), registry=self._registry
        )
        self._seconds = Histogram(
            "agnostic_cache_op_duration_seconds",
            "From the first byte of a request to the last of its answer.",
            ("op",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(self)

    def trace(self, event: str, facts: Mapping[str, object]) -> None:
        """Count what happened; see `agnostic_cache.trace.Trace`. Events that it does not know are left out."""
        if event == "server.request":
            op, result, seconds = (facts[name] for name in ("op", "result", "seconds"))
            self._requests.labels(str(op), "server", str(result)).inc()
            self._seconds.labels(str(op)).observe(float(str(seconds)))

    def watch(self, tier: str, policy: str, stats: Callable[[], Stats]) -> None:
        """Tell of a storage too, as it is whenever somebody asks.

        Args:
            tier: What it is called, such as ``"memory"``.
            policy: Who leaves when it is full, such as ``"lru"``.
            stats: Says what it holds.
        """
        self._tiers[tier] = policy, stats

    def watch_connections(self, count: Callable[[], int]) -> None:
        """Tell of a server's connections too: `count` says how many there are."""
        self._connections = count

    def collect(self) -> Iterable[Metric]:
        """Return what the storages say now."""
        held = GaugeMetricFamily("agnostic_cache_bytes", "Bytes of the entries.", labels=("tier",))
        most = GaugeMetricFamily("agnostic_cache_max_bytes", "The budget.", labels=("tier",))
        entries = GaugeMetricFamily("agnostic_cache_entries", "Entries.", labels=("tier",))
        left = CounterMetricFamily(
            "agnostic_cache_evictions", "Entries that left to make room.", labels=("tier", "policy", "reason")
        )
        for tier, (policy, stats) in self._tiers.items():
            found = stats()
            held.add_metric((tier,), found.current_bytes)
            entries.add_metric((tier,), found.entries)
            left.add_metric((tier, policy, "budget"), found.evictions)
            if found.max_bytes is not None:
                most.add_metric((tier,), found.max_bytes)
        if self._connections is None:
            return held, most, entries, left
        clients = GaugeMetricFamily("agnostic_cache_connections", "Open connections.", value=self._connections())
        return held, most, entries, left, clients

    def text(self) -> bytes:
        """Return everything in the text format of Prometheus."""
        return generate_latest(self._registry)
