"""Eviction: which entry leaves when the budget is full."""

from agnostic_cache.eviction.evictor import PutStatus

__all__ = ["PutStatus"]
