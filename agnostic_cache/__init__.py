"""agnostic-cache: keep a language model's state and give it back, in PyTorch, in JAX, and across the two.

Each name is imported when it is first used: who wants a `SimpleLRUCache` does not wait for storages and servers.
"""

TYPE_CHECKING = False  # as type checkers know it; typing's own takes a third of the time of all imports
if TYPE_CHECKING:
    from agnostic_cache.cache import Cache, SimpleLRUCache
    from agnostic_cache.fingerprint import model_fingerprint
    from agnostic_cache.held.state_cache import StateCache
    from agnostic_cache.prefix.prefix_cache import PrefixCache
    from agnostic_cache.state.kv_state import KVState
    from agnostic_cache.state.layout import KVLayout
    from agnostic_cache.state.wrapping import wrap
    from agnostic_cache.storage.registry import open_storage
    from agnostic_cache.version import __version__ as __version__

__all__ = [
    "Cache",
    "KVLayout",
    "KVState",
    "PrefixCache",
    "SimpleLRUCache",
    "StateCache",
    "model_fingerprint",
    "open_storage",
    "wrap",
]

_HOMES = {
    "__version__": "version",
    "Cache": "cache",
    "KVLayout": "state.layout",
    "KVState": "state.kv_state",
    "PrefixCache": "prefix.prefix_cache",
    "SimpleLRUCache": "cache",
    "StateCache": "held.state_cache",
    "model_fingerprint": "fingerprint",
    "open_storage": "storage.registry",
    "wrap": "state.wrapping",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib import import_module  # noqa: PLC0415 - as above

    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
