"""agnostic-cache: keep a language model's state and give it back, in PyTorch, in JAX, and across the two."""

from agnostic_cache.cache import Cache, SimpleLRUCache
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.wrapping import wrap
from agnostic_cache.state_cache import StateCache
from agnostic_cache.storage.registry import open_storage

__all__ = ["Cache", "KVLayout", "KVState", "SimpleLRUCache", "StateCache", "open_storage", "wrap"]
