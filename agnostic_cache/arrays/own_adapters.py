"""The adapters of this project: a table, so that no installed metadata is needed to find them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

OWN_ADAPTERS: Final[Mapping[str, str]] = MappingProxyType({
    "torch": "agnostic_cache_adapters.torch",
    "transformers": "agnostic_cache_adapters.transformers",
    "jax": "agnostic_cache_adapters.jax",
    "flax": "agnostic_cache_adapters.flax",
})  # fmt: skip
"""Top-level module of each framework, and the module whose ``adapter`` serves it."""
