"""Hugging Face caches: every class of layer that transformers has, and any other layer as a snapshot.

`DynamicLayer` and its kin grow by concatenation and never write in place, so that a fork shares their tensors; what
writes in place is copied whenever it is handed out. `layers.py` knows the classes, `strangers.py` walks the others.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import cache_utils

from agnostic_cache.arrays.adapter import Opened
from agnostic_cache.arrays.registry import offer_adapter
from agnostic_cache.arrays.roles import SNAPSHOT, TOKENS, Hint, axis_names
from agnostic_cache.errors import StructureMismatchError
from agnostic_cache_adapters.torch import TorchAdapter, on_evict
from agnostic_cache_adapters.transformers import layers as classes
from agnostic_cache_adapters.transformers import strangers
from agnostic_cache_adapters.transformers.blocks import BlockLayer, Pieces
from agnostic_cache_adapters.transformers.generation import cached, generate, reuse
from agnostic_cache_adapters.transformers.scoring import score

__all__ = ["TransformersAdapter", "adapter", "cached", "generate", "on_evict", "reuse", "score"]

_CACHES = {"DynamicCache": cache_utils.DynamicCache}
_DYNAMIC = {"class": "DynamicLayer"}
_GROWING: dict[str, Hint] = dict.fromkeys(("key", "value"), Hint(TOKENS(2), classes.AXES, frozen=True))
_PLAIN = {cache_utils.DynamicLayer}
_CACHE, _LAYER, _STRANGER = "transformers.cache", "transformers.layer", "transformers.stranger"
_PAIR = "transformers.encoder_decoder"
_SELF, _CROSS = "self_attention_cache", "cross_attention_cache"


class TransformersAdapter(TorchAdapter):
    """PyTorch, with the containers of Hugging Face transformers 5."""

    def open(self, value: Any) -> Opened | None:
        """Take a cache or a layer apart; canonical leaf names are ``layers.0.key`` and ``layers.0.value``."""
        kind = type(value)
        if kind is BlockLayer:
            _ = value.keys  # joins its blocks, which makes it a plain one
            kind = type(value)
        if kind is cache_utils.DynamicLayer:
            return _open_dynamic(value)
        if isinstance(value, cache_utils.EncoderDecoderCache):
            return _open_pair(value)
        if isinstance(value, cache_utils.Cache):
            return _open_cache(value)
        if isinstance(value, strangers.LAYERS):
            plan = classes.plan(value)
            return _open_stranger(value) if plan is None else _open_known(value, plan)
        if kind is _Cross:
            return self._open_cross(value.value)
        return None

    def _open_cross(self, value: Any) -> Opened | None:
        opened = self.open(value)
        if opened is None:
            return None
        if isinstance(value, cache_utils.Cache):
            crossed = [_Cross(layer) for layer in value.layers]
            return opened._replace(children={**opened.children, "layers": crossed}, length=None)
        hints = {name: hint._replace(role=SNAPSHOT) for name, hint in opened.hints.items()}
        return opened._replace(hints=hints, length=None)

    def hold_together(self, arrays: Sequence[torch.Tensor], axis: int) -> Any:
        """Return the tensors as they are: a layer that grows by concatenation joins them with its first new rows."""
        return Pieces(tuple(arrays), axis)

    def close(self, kind: str, children: Mapping[str, Any], data: Any, length: int, native: Any) -> object:
        """Put a cache or a layer together."""
        if kind == _LAYER:
            return _close_layer(children, data, length, native)
        if kind == _PAIR:
            return _pair(children, data, native)
        if kind not in {_CACHE, _STRANGER}:
            return super().close(kind, children, data, length, native)
        if native is not None:
            return strangers.filled(native, children)
        if data not in _CACHES:
            raise _no_name(data)
        cache = _CACHES[data]()
        vars(cache).update(children)
        return cache

    def prepare_like(self, like: Any, length: int, layers: int) -> object:
        """Give a bare ``DynamicCache()`` as many layers as the state has."""
        if isinstance(like, cache_utils.EncoderDecoderCache):
            for half in (like.self_attention_cache, like.cross_attention_cache):
                self.prepare_like(half, length, layers)
        elif isinstance(like, cache_utils.Cache):
            if not like.layers and like.layer_class_to_replicate is not None:
                like.layers.extend(like.layer_class_to_replicate() for _ in range(layers))
            for layer in like.layers:
                classes.rewind(layer)
        return super().prepare_like(like, length, layers)

    def take_apart(self, value: object) -> list[Any] | None:
        """Empty caches and layers, whatever their class."""
        if not isinstance(value, (cache_utils.Cache, *strangers.LAYERS)):
            return super().take_apart(value)
        held = [name for name, child in vars(value).items() if isinstance(child, torch.Tensor | dict | list | tuple)]
        held += [name for name, child in vars(value).items() if isinstance(child, cache_utils.Cache)]
        children = [vars(value)[name] for name in held]
        for name in held:
            setattr(value, name, None)
        return children


class _Cross:
    """The cross-attention of an encoder-decoder, or a layer of it: rows of the encoder, not of the decoder's tokens."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


_opened = functools.partial(tuple.__new__, Opened)  # takes all six fields, at a third of the time of Opened(...)


def _open_dynamic(layer: Any) -> Opened:
    keys = layer.keys
    if not layer.is_initialized or keys is None or keys.ndim != len(classes.AXES):  # ready early: one axis, empty
        return Opened(_LAYER, {"key": None, "value": None}, _DYNAMIC, _GROWING)
    return _opened((_LAYER, {"key": keys, "value": layer.values}, _DYNAMIC, _GROWING, None, None))


def _close_layer(children: Mapping[str, Any], data: Any, length: int, native: Any) -> object:
    if data is _DYNAMIC or data["class"] == "DynamicLayer":
        keys, values = children["key"], children["value"]
        if type(keys) is Pieces:
            return BlockLayer(keys, values)
        return cache_utils.DynamicLayer() if keys is None else classes.dynamic_layer(keys, values)
    joined = {name: child.joined() if type(child) is Pieces else child for name, child in children.items()}
    return classes.make(native or classes.planned(data), joined, length)


def _open_known(layer: Any, plan: classes.Plan) -> Opened:
    children: dict[str, Any] = {}
    hints: dict[str, Hint] = {}
    for name, part in plan.parts.items():
        array = children[name] = classes.get(layer, part)
        hints[name] = part.hint
        if array is not None and not part.hint.axes:
            hints[name] = part.hint._replace(axes=_batch_first(array.ndim))
    length = classes.stated_length(layer) if children.get("key") is not None else None
    return Opened(_LAYER, children, plan.data, hints, length, plan)


def _open_cache(cache: Any) -> Opened:
    held = {"layers": cache.layers, **strangers.held(cache, "layers")}
    kinds = set(map(type, cache.layers))
    length = None if kinds <= _PLAIN or all(map(classes.plan, cache.layers)) else _asked(cache)
    return Opened(_CACHE, held, type(cache).__name__, length=length, native=strangers.shell(cache, held))


def _asked(cache: Any) -> int | None:
    """The length that ``generate`` goes on from: a layer that nobody knows says it in no other way."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # none of its layers has tokens
        return None


def _open_stranger(layer: Any) -> Opened:
    held = strangers.held(layer)
    hints = {
        name: Hint(SNAPSHOT, axis_names(child.ndim)) for name, child in held.items() if isinstance(child, torch.Tensor)
    }
    return Opened(_STRANGER, held, type(layer).__name__, hints, native=strangers.shell(layer, held))


def _open_pair(pair: Any) -> Opened:
    children = {_SELF: pair.self_attention_cache, _CROSS: _Cross(pair.cross_attention_cache)}
    native = None if type(pair) is cache_utils.EncoderDecoderCache else strangers.shell(pair, children)
    return Opened(_PAIR, children, type(pair).__name__, native=native)


def _pair(children: Mapping[str, Any], name: str, native: Any) -> object:
    pair: Any = cache_utils.EncoderDecoderCache(children[_SELF], children[_CROSS])
    if native is not None:
        updated = pair.is_updated
        pair = strangers.filled(native, children)
        pair.is_updated = updated
    elif name != "EncoderDecoderCache":
        raise _no_name(name)
    return pair


def _no_name(name: str) -> StructureMismatchError:
    return StructureMismatchError(f"a {name} cannot be rebuilt from its name alone; pass like= with a fresh one")


@functools.cache
def _batch_first(ndim: int) -> tuple[str, ...]:
    return ("batch", *axis_names(ndim)[1:])[:ndim]  # a counter has no axis at all


adapter = TransformersAdapter()
offer_adapter("transformers", adapter)
