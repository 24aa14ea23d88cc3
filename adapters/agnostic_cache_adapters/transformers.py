"""Hugging Face caches: `DynamicCache` and its layers, and any other layer as a snapshot.

Layers are known by their exact class. `DynamicLayer` and `DynamicSlidingWindowLayer` grow by concatenation and never
write in place, so that a fork shares their tensors; a layer that nobody here has seen is walked attribute by attribute,
kept whole, and copied whenever it is handed out.
"""

import copy
import functools
from collections.abc import Container, Mapping
from typing import Any

import torch
from transformers import cache_utils

from agnostic_cache.errors import StructureMismatchError
from agnostic_cache.state.adapter import Opened
from agnostic_cache.state.roles import SNAPSHOT, TOKENS, WINDOW, Hint, axis_names
from agnostic_cache_adapters.torch import TorchAdapter, on_evict

__all__ = ["TransformersAdapter", "adapter", "on_evict"]

_AXES = ("batch", "heads", "tokens", "dim")
_CACHES = {"DynamicCache": cache_utils.DynamicCache}
_DYNAMIC = {"class": "DynamicLayer"}
_GROWING: dict[str, Hint] = dict.fromkeys(("key", "value"), Hint(TOKENS(2), _AXES, frozen=True))
_FLAGS = (dict, list)
_CACHE, _LAYER = "transformers.cache", "transformers.layer"
_LAYERS = (cache_utils.CacheLayerMixin, cache_utils.LinearAttentionCacheLayerMixin, cache_utils.DummyLayer)


class TransformersAdapter(TorchAdapter):
    """PyTorch, with the containers of Hugging Face transformers 5."""

    def open(self, value: Any) -> Opened | None:
        """Take a cache or a layer apart; canonical leaf names are ``layers.0.key`` and ``layers.0.value``."""
        kind = type(value)
        if kind is cache_utils.DynamicLayer:
            return _open_attention(value, _GROWING, _DYNAMIC, None)
        if isinstance(value, cache_utils.Cache) and not isinstance(value, cache_utils.EncoderDecoderCache):
            held = {name: child for name, child in vars(value).items() if name == "layers" or _holds_tensor(child)}
            return Opened(_CACHE, held, kind.__name__, native=_shell(value, held))
        if kind is cache_utils.DynamicSlidingWindowLayer:
            layer: Any = value
            # The window counts the current token, so one row less of the past is needed.
            hint = Hint(WINDOW(2, layer.sliding_window - 1), _AXES, frozen=True)
            data = {
                "class": "DynamicSlidingWindowLayer",
                "sliding_window": layer.sliding_window,
                "record_past": layer.record_past,
            }
            return _open_attention(layer, {"key": hint, "value": hint}, data, layer.cumulative_length)
        if isinstance(value, _LAYERS):
            return _open_unknown(value)
        return None

    def close(self, kind: str, children: Mapping[str, Any], data: Any, length: int, native: Any) -> object:
        """Put a cache or a layer together."""
        if kind == _CACHE:
            if native is None and data not in _CACHES:
                msg = f"a {data} cannot be rebuilt from its name alone; pass like= with a fresh one"
                raise StructureMismatchError(msg)
            return _filled(native if native is not None else _CACHES[data](), children)
        if kind != _LAYER:
            return super().close(kind, children, data, length, native)
        if native is not None:
            return _filled(native, children)
        name = data["class"]
        if name == "DynamicLayer":
            return _attention(cache_utils.DynamicLayer(), children)
        if name == "DynamicSlidingWindowLayer":
            layer = cache_utils.DynamicSlidingWindowLayer(sliding_window=data["sliding_window"])
            layer.record_past = data["record_past"]
            layer.cumulative_length = length
            return _attention(layer, children)
        msg = f"a layer of class {name} cannot be rebuilt from its name alone; pass like= with a fresh one"
        raise StructureMismatchError(msg)

    def prepare_like(self, like: Any, length: int, layers: int) -> object:
        """Give a bare ``DynamicCache()`` as many layers as the state has."""
        if isinstance(like, cache_utils.DynamicCache) and not like.layers and like.layer_class_to_replicate is not None:
            like.layers.extend(like.layer_class_to_replicate() for _ in range(layers))
        return super().prepare_like(like, length, layers)

    def take_apart(self, value: object) -> list[Any] | None:
        """Empty caches and layers, whatever their class."""
        if not isinstance(value, (cache_utils.Cache, *_LAYERS)):
            return super().take_apart(value)
        held = [name for name, child in vars(value).items() if isinstance(child, torch.Tensor | dict | list | tuple)]
        held += [name for name, child in vars(value).items() if isinstance(child, cache_utils.Cache)]
        children = [vars(value)[name] for name in held]
        for name in held:
            setattr(value, name, None)
        return children


_opened = functools.partial(tuple.__new__, Opened)  # takes all six fields, at a third of the time of Opened(...)


def _open_attention(layer: Any, hints: Mapping[str, Hint], data: Mapping[str, Any], length: int | None) -> Opened:
    if (
        layer.is_initialized and layer.keys is not None and layer.keys.ndim == len(_AXES)
    ):  # ready early: one axis, empty
        return _opened((_LAYER, {"key": layer.keys, "value": layer.values}, data, hints, length, None))
    return Opened(_LAYER, {"key": None, "value": None}, data, hints)


def _attention(layer: Any, children: Mapping[str, Any]) -> object:
    keys = children["key"]
    if keys is not None:
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.keys, layer.values = keys, children["value"]
        layer.is_initialized = True
    return layer


def _open_unknown(layer: Any) -> Opened:
    held = {name: child for name, child in vars(layer).items() if _holds_tensor(child)}
    hints = {
        name: Hint(SNAPSHOT, axis_names(child.ndim)) for name, child in held.items() if isinstance(child, torch.Tensor)
    }
    return Opened(_LAYER, held, {"class": type(layer).__name__}, hints, native=_shell(layer, held))


def _shell(value: Any, held: Container[str]) -> Any:
    """A copy of a cache or layer without what `held` names, and with flags of its own: layers write those in place."""
    shell = object.__new__(type(value))  # copy.copy takes six times as long, and these have nothing but attributes
    for name, child in vars(value).items():
        vars(shell)[name] = None if name in held else copy.copy(child) if isinstance(child, _FLAGS) else child
    return shell


def _filled(shell: Any, children: Mapping[str, Any]) -> Any:
    filled = _shell(shell, ())
    vars(filled).update(children)
    return filled


def _holds_tensor(value: object) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensor(child) for child in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(child) for child in value)
    return isinstance(value, torch.Tensor)


adapter = TransformersAdapter()
