"""Caches and layers that nobody here has seen: walked attribute by attribute, kept whole, never shared.

What holds tensors becomes leaves; all else is the *shell*, copied for each hand-out, since layers write their flags in
place. What can be neither walked nor copied is refused: sharing it would let a reader change what is kept.
"""

import copy
import enum
import gc
import types
from collections.abc import Container, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, cache_utils

from agnostic_cache.arrays.records import field_names
from agnostic_cache.errors import UnknownValueError

LAYERS = (cache_utils.CacheLayerMixin, cache_utils.LinearAttentionCacheLayerMixin, cache_utils.DummyLayer)
_HOLDERS = (torch.Tensor, cache_utils.Cache, *LAYERS)
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type})
_SHARED = (
    type,
    enum.Enum,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    PreTrainedConfig,
    torch.Stream,
)


def held(value: Any, *but: str) -> dict[str, Any]:
    """Return the attributes of a cache or layer that hold tensors, `but` some.

    Raises:
        UnknownValueError: One holds tensors where nobody can walk.
    """
    return {name: child for name, child in vars(value).items() if name not in but and _holds_tensor(child, value, name)}


def shell(value: Any, without: Container[str]) -> Any:
    """Return a copy of a cache or layer without some of its attributes, nothing in which is shared.

    Raises:
        UnknownValueError: An attribute cannot be copied.
    """
    made = object.__new__(type(value))  # these classes have nothing but attributes
    attributes = vars(made)
    for name, child in vars(value).items():
        attributes[name] = None if name in without else _private(child, value, name)
    return made


def filled(empty: Any, children: Mapping[str, Any]) -> Any:
    """Return a copy of a shell with its children."""
    made = shell(empty, ())
    vars(made).update(children)
    return made


def _private(child: Any, owner: Any, name: str) -> Any:
    if type(child) in _PLAIN or isinstance(child, _SHARED):
        return child
    try:
        return copy.deepcopy(child)
    except TypeError as error:
        msg = (
            f"{type(child).__qualname__} at {name!r} of a {type(owner).__qualname__} cannot be copied, so that a "
            "hand-out would share it; write an adapter for this class"
        )
        raise UnknownValueError(msg) from error


def _holds_tensor(value: Any, owner: Any, name: str) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return False
    if isinstance(value, _HOLDERS):
        return True
    if isinstance(value, dict):
        return any(_holds_tensor(child, owner, name) for child in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensor(child, owner, name) for child in value)
    if isinstance(value, _SHARED) or not _reaches_tensor(value):
        return False
    if field_names(value) is not None:
        return True
    msg = (
        f"{kind.__module__}.{kind.__qualname__} at {name!r} of a {type(owner).__qualname__} holds tensors where nobody "
        "here can walk; keep them in attributes, dicts, lists or dataclasses, or write an adapter for this class"
    )
    raise UnknownValueError(msg)


def _reaches_tensor(value: object) -> bool:
    seen: set[int] = set()
    found = [value]
    while found:
        thing = found.pop()
        if isinstance(thing, _HOLDERS):
            return True
        if id(thing) not in seen and type(thing) not in _PLAIN and not isinstance(thing, _SHARED):
            seen.add(id(thing))
            found += gc.get_referents(thing)
    return False
