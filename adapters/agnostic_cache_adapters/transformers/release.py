"""What differs between releases of transformers: each difference is asked of a signature or of a fresh object.

No version number is read, so that a pre-release or a fork counts for what it can do. The other modules of this package
name nothing that differs; they ask here.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from transformers import GenerationMixin, cache_utils

CACHE_NAMES: Final = ("cache", "past_key_values", "cache_params")
"""The names of the argument that holds a KV cache, newest first: 5.24 renamed the other two to the first."""


@functools.lru_cache(maxsize=256)
def _name_in(function: Callable[..., Any], names: tuple[str, ...]) -> str | None:
    taken = inspect.signature(function).parameters  # of what decorators wrap
    return next((name for name in names if name in taken), None)


_GENERATE: Final = _name_in(GenerationMixin.prepare_inputs_for_generation, CACHE_NAMES) or CACHE_NAMES[0]
# Until 5.23 `cache` means something else: XLM takes a dict of its own by it.
_NAMES: Final = CACHE_NAMES[CACHE_NAMES.index(_GENERATE) :]


def forward_name(model: Any) -> str | None:
    """Return the name of the argument by which a model's ``forward`` takes a KV cache, or None where it takes none.

    The name is read from the signature, since a ``forward`` may swallow a wrong one in its ``**kwargs`` and compute
    without the cache.
    """
    return _name_in(_class_that_generates(model).forward, _NAMES)


def forward_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return a KV cache as the keyword argument by which a model's ``forward`` takes it; none where it takes none."""
    name = forward_name(model)
    return {} if name is None else {name: cache}


def generate_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return a KV cache as the keyword argument by which ``generate`` takes it."""
    return {generate_name(model): cache}


def generate_name(model: Any) -> str:
    """Return the name by which ``generate`` takes a KV cache and hands it to the model, or to a decoding method."""
    if len(_NAMES) == len(CACHE_NAMES):  # a release that renames all others, whatever the model's methods call it
        return _GENERATE
    return _name_in(_class_that_generates(model).prepare_inputs_for_generation, _NAMES) or _GENERATE


def cache_of(outputs: Any) -> Any:
    """Return the KV cache in a ``ModelOutput`` of ``forward`` or ``generate``, or None where there is none."""
    fields = type(outputs).__dataclass_fields__  # to ask for a former name is to be warned of it
    return next((getattr(outputs, name) for name in CACHE_NAMES if name in fields), None)


def is_callers(cache: Any) -> bool:
    """Say whether ``generate`` was passed this KV cache by its caller, or made it for this call.

    An empty cache looks the same either way, but ``generate`` marks those that it is passed.
    """
    return bool(getattr(cache, "_is_user_defined", False))


def _class_that_generates(model: Any) -> Any:
    """Return the class of a model, or of the model in a wrapper: PEFT's, or that of ``torch.compile``."""
    return type(next((module for module in model.modules() if isinstance(module, GenerationMixin)), model))


def _notes_dtype() -> bool:
    layer = cache_utils.DynamicLayer()
    empty = torch.empty(0)
    layer.lazy_initialization(empty, empty)
    return hasattr(layer, "dtype")


NOTES_DTYPE: Final = _notes_dtype()
"""Whether a layer notes one dtype beside its keys and values; since 5.24 these may have different ones."""
