"""Eviction: which entry leaves when the budget is full."""

from agnostic_cache.eviction.budget import BudgetEvictor
from agnostic_cache.eviction.evictor import BaseEvictor, DummyEvictor, PutStatus, Room
from agnostic_cache.eviction.fifo import FIFOEvictor
from agnostic_cache.eviction.lru import LRUEvictor
from agnostic_cache.eviction.registry import POLICIES, make_evictor

__all__ = [
    "POLICIES",
    "BaseEvictor",
    "BudgetEvictor",
    "DummyEvictor",
    "FIFOEvictor",
    "LRUEvictor",
    "PutStatus",
    "Room",
    "make_evictor",
]
