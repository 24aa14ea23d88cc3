"""Eviction: which entry leaves when the budget is full."""

from agnostic_cache.eviction.choose import choose
from agnostic_cache.eviction.evictor import BaseEvictor, DummyEvictor, PutStatus
from agnostic_cache.eviction.gdsf import recompute_cost
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
)
from agnostic_cache.eviction.policy import Policy, Room
from agnostic_cache.eviction.registry import POLICIES, make_evictor, make_policy

__all__ = [
    "POLICIES",
    "AdaptiveEvictor",
    "BaseEvictor",
    "BudgetEvictor",
    "DummyEvictor",
    "FIFOEvictor",
    "GDSFEvictor",
    "LFUEvictor",
    "LRUEvictor",
    "Policy",
    "PutStatus",
    "QuotaEvictor",
    "Room",
    "S3FIFOEvictor",
    "TTLEvictor",
    "choose",
    "make_evictor",
    "make_policy",
    "recompute_cost",
]
