"""Eviction: which entry leaves when the budget is full."""

from agnostic_cache.eviction.adaptive import AdaptiveEvictor
from agnostic_cache.eviction.budget import BudgetEvictor
from agnostic_cache.eviction.evictor import BaseEvictor, DummyEvictor, PutStatus, Room
from agnostic_cache.eviction.fifo import FIFOEvictor
from agnostic_cache.eviction.gdsf import GDSFEvictor, recompute_cost
from agnostic_cache.eviction.lfu import LFUEvictor
from agnostic_cache.eviction.lru import LRUEvictor
from agnostic_cache.eviction.quota import QuotaEvictor
from agnostic_cache.eviction.registry import POLICIES, make_evictor
from agnostic_cache.eviction.s3fifo import S3FIFOEvictor
from agnostic_cache.eviction.ttl import TTLEvictor

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
    "PutStatus",
    "QuotaEvictor",
    "Room",
    "S3FIFOEvictor",
    "TTLEvictor",
    "make_evictor",
    "recompute_cost",
]
