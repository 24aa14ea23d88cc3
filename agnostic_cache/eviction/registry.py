"""Policies by name, and how a container makes the one that it was asked to use."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from agnostic_cache.errors import UnknownPolicyError
from agnostic_cache.eviction.evictor import BaseEvictor
from agnostic_cache.eviction.lmcache import (
    AdaptiveEvictor,
    BudgetEvictor,
    FIFOEvictor,
    GDSFEvictor,
    LFUEvictor,
    LRUEvictor,
    QuotaEvictor,
    S3FIFOEvictor,
    TTLEvictor,
    policy_of,
)
from agnostic_cache.eviction.policy import Policy
from agnostic_cache.sizes import parse_size

POLICIES: Mapping[str, Callable[[], BudgetEvictor]] = MappingProxyType(
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
"""Makes an evictor of each name, with what it takes by default: ``ttl`` and ``quota`` wrap ``lru``."""


def make_evictor(policy: str | BaseEvictor | Policy, max_bytes: int | str) -> BaseEvictor:
    """Return an evictor of LMCache's kind.

    >>> make_evictor("lru", "4KiB").MAX_CACHE_SIZE
    4096

    Args:
        policy: The name of one of `POLICIES`, an evictor, or a policy that serves nobody else. The maximum of the
            evictor, if it has one, is set to `max_bytes`.
        max_bytes: The budget, such as ``"4GiB"``.

    Raises:
        UnknownPolicyError: There is no policy of that name, or `policy` is none.
        InvalidSizeError: `max_bytes` is no size.
    """
    nbytes = parse_size(max_bytes)
    if isinstance(policy, str) and policy in POLICIES:
        evictor: object = POLICIES[policy]()
    else:
        evictor = BudgetEvictor(policy=policy) if isinstance(policy, Policy) else policy
    if not isinstance(evictor, BaseEvictor):
        msg = (
            f"evictor={policy!r} is unknown; known: {', '.join(map(repr, POLICIES))}, or pass a Policy or a BaseEvictor"
        )
        raise UnknownPolicyError(msg)
    if isinstance(evictor, BudgetEvictor):
        evictor.MAX_CACHE_SIZE = nbytes
    return evictor


def make_policy(evictor: str | BaseEvictor | Policy, max_bytes: int | str) -> Policy:
    """Return the policy that a container was asked to use, with its budget.

    Args:
        evictor: As in `make_evictor`. One of ours gives its policy; one whose class overrides what ours do is asked
            itself, by an `EvictorPolicy`.
        max_bytes: The budget of the container, such as ``"4GiB"``.

    Raises:
        UnknownPolicyError: There is no policy of that name, or `evictor` is none.
        InvalidSizeError: `max_bytes` is no size.
    """
    made = policy_of(make_evictor(evictor, max_bytes))
    made.max_bytes = parse_size(max_bytes)
    return made
