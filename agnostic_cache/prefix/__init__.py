"""Prefix reuse: from the tokens of a prompt to the longest part of it that is already computed."""

from agnostic_cache.prefix.match import Match
from agnostic_cache.prefix.prefix_cache import PrefixCache
from agnostic_cache.prefix.stats import PrefixCacheStats

__all__ = ["Match", "PrefixCache", "PrefixCacheStats"]
