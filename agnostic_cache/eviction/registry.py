"""Policies by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from agnostic_cache.errors import UnknownPolicyError
from agnostic_cache.eviction.adaptive import AdaptiveEvictor
from agnostic_cache.eviction.budget import BudgetEvictor
from agnostic_cache.eviction.evictor import BaseEvictor
from agnostic_cache.eviction.fifo import FIFOEvictor
from agnostic_cache.eviction.gdsf import GDSFEvictor
from agnostic_cache.eviction.lfu import LFUEvictor
from agnostic_cache.eviction.lru import LRUEvictor
from agnostic_cache.eviction.quota import QuotaEvictor
from agnostic_cache.eviction.s3fifo import S3FIFOEvictor
from agnostic_cache.eviction.ttl import TTLEvictor
from agnostic_cache.eviction.wrapping import WrappingEvictor
from agnostic_cache.sizes import parse_size

POLICIES: Mapping[str, Callable[[], BudgetEvictor | WrappingEvictor]] = MappingProxyType(
    {
        "adaptive": AdaptiveEvictor,
        "fifo": FIFOEvictor,
        "gdsf": GDSFEvictor,
        "lfu": LFUEvictor,
        "lru": LRUEvictor,
        "quota": lambda: QuotaEvictor(LRUEvictor()),
        "s3fifo": S3FIFOEvictor,
        "ttl": lambda: TTLEvictor(LRUEvictor()),
    }
)
"""Makes a policy of each name, with what it takes by default: ``ttl`` and ``quota`` wrap ``lru``."""


def make_evictor(policy: str | BaseEvictor, max_bytes: int | str) -> BaseEvictor:
    """Return the evictor that a container was asked to use.

    >>> make_evictor("lru", "4KiB").MAX_CACHE_SIZE
    4096

    Args:
        policy: The name of one of `POLICIES`, or an instance that serves no other container. Its maximum, if it has
            one, is set to `max_bytes`: a container has one budget.
        max_bytes: The budget of the container, such as ``"4GiB"``.

    Raises:
        UnknownPolicyError: There is no policy of that name, or `policy` is no evictor.
        InvalidSizeError: `max_bytes` is no size.
    """
    nbytes = parse_size(max_bytes)
    if isinstance(policy, str) and policy in POLICIES:
        policy = POLICIES[policy]()
    if not isinstance(policy, BaseEvictor):
        msg = f"evictor={policy!r} is unknown; known: {', '.join(map(repr, POLICIES))}, or pass a BaseEvictor"
        raise UnknownPolicyError(msg)
    if isinstance(policy, BudgetEvictor | WrappingEvictor):
        policy.MAX_CACHE_SIZE = nbytes
    return policy
