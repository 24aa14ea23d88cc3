"""What is known of each class of cache layer: where its arrays stand, which roles they have, how to make a new one.

A class is known exactly: what a subclass does with its arrays, nobody here can tell. Roles follow from how a class
writes. Dynamic layers grow by concatenation and never write in place, so that their arrays are frozen; static and
linear layers write in place. Source: ``transformers/cache_utils.py`` and ``models/deepseek_v4``, versions 5.23, 5.24.
"""

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import torch
from transformers import cache_utils

from agnostic_cache.arrays.roles import LENGTH, SNAPSHOT, TOKENS, WINDOW, Hint
from agnostic_cache.errors import StructureMismatchError
from agnostic_cache_adapters.transformers import release

AXES: Final = ("batch", "heads", "tokens", "dim")
_COMPRESSED = {
    "DeepseekV4HCACache": "heavily_compressed_attention",
    "DeepseekV4CSACache": "compressed_sparse_attention",
}
"""Layers that are defined beside their model: their classes exist once the model is imported."""

_CLASSES: Final[dict[str, type]] = {
    kind.__name__: kind
    for kind in (
        cache_utils.DynamicLayer,
        cache_utils.DynamicSlidingWindowLayer,
        cache_utils.DynamicIndexedLayer,
        cache_utils.StaticLayer,
        cache_utils.StaticSlidingWindowLayer,
        cache_utils.StaticIndexedLayer,
        cache_utils.LinearAttentionLayer,
        cache_utils.LinearAttentionAndFullAttentionLayer,
        cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
        cache_utils.LinearAttentionAndStaticFullAttentionLayer,
        cache_utils.LinearAttentionAndStaticSlidingWindowAttentionLayer,
        cache_utils.DummyLayer,
    )
}
_SETTINGS: Final = (
    "sliding_window",
    "max_cache_len",
    "number_of_states",
    "compress_rate",
    "record_past",
    "_is_croppable",
)
_STATE = Hint(SNAPSHOT, ())  # axes as the array has them


class Part(NamedTuple):
    """One array of a layer: ``layer.attribute``, or ``layer.attribute[at]``."""

    attribute: str
    at: str | int | None
    hint: Hint


class Plan(NamedTuple):
    """What is known of layers of one class and settings.

    Attributes:
        kind: The class.
        data: Its name and the settings, JSON-able; `planned` finds the plan again by it.
        parts: The arrays that such a layer has, or has room for, by the last part of their names.
        plain: What a new layer has besides, as it is.
        dicts: What it has in dicts, of which each layer needs its own.
        numbers: What it has in tensors of one number.
    """

    kind: Any
    data: Mapping[str, Any]
    parts: Mapping[str, Part]
    plain: Mapping[str, Any]
    dicts: Mapping[str, Mapping[Any, Any]]
    numbers: Mapping[str, int]


def plan(layer: Any) -> Plan | None:
    """Return the plan of a layer, or None where not every array of it is known."""
    kind = type(layer)
    held = vars(layer)
    found = _plan(kind.__name__, *[held.get(name) for name in _SETTINGS])
    if found is None or found.kind is not kind:
        return None
    # One that records keeps more columns of its convolutions than it needs, and they tell no more how many it needs.
    return None if "conv_states" in held and held["record_past"] else found


def planned(data: Mapping[str, Any]) -> Plan:
    """Return the plan of what was described by `Plan.data`.

    Raises:
        StructureMismatchError: No such class here.
    """
    found = _plan(data["class"], *[data.get(name) for name in _SETTINGS])
    if found is None:
        msg = f"a layer of class {data['class']} cannot be rebuilt from its name alone; pass like= with a fresh one"
        raise StructureMismatchError(msg)
    return found


def stated_length(layer: Any) -> int | None:
    """Return the tokens that a layer says it stands for, or None where only its arrays tell."""
    length = getattr(layer, "cumulative_length_int", getattr(layer, "cumulative_length", None))
    return length if isinstance(length, int) else None


def get(layer: Any, part: Part) -> torch.Tensor | None:
    """Return the array of a part, or None where the layer does not hold one yet."""
    attribute, at, hint = part
    array = getattr(layer, attribute)
    if at is not None:
        array = array[at]
    if array is None or (hint.axes and array.ndim != len(hint.axes)):  # initialised early: one axis, empty
        return None
    if attribute == "cumulative_length" and layer.is_sliding and layer.cumulative_length_int > layer.max_cache_len:
        # A static window that is full stops counting on the device.
        return torch.full_like(array, layer.cumulative_length_int)
    return array  # type: ignore[no-any-return]


def make(plan: Plan, arrays: Mapping[str, torch.Tensor | None], length: int) -> object:
    """Make a layer around `arrays`, which stand for `length` tokens."""
    layer = object.__new__(plan.kind)
    held: dict[str, Any] = {**plan.plain, **{name: dict(child) for name, child in plan.dicts.items()}}
    for name, (attribute, at, _) in plan.parts.items():
        array = arrays[name]
        if at is None:
            held[attribute] = array
        else:
            held[attribute][at] = array
    for name, number in plan.numbers.items():
        if held.get(name) is None:
            held[name] = torch.scalar_tensor(number, dtype=torch.long)  # a fifth of torch.tensor's time
    layer.__dict__ = held
    _settle(layer, held, length)
    return layer


def rewind(layer: Any) -> None:
    """Let a static window that is full count on the device again: its content is given up."""
    if isinstance(layer, cache_utils.StaticSlidingWindowLayer):
        layer.cumulative_length_int = 0


def dynamic_layer(keys: torch.Tensor, values: torch.Tensor) -> Any:
    """Make a `DynamicLayer` around keys and values, without its constructor: most layers are of this class."""
    layer: Any = object.__new__(cache_utils.DynamicLayer)
    layer.__dict__ = {"keys": keys, "values": values, "is_initialized": True, "device": keys.device}
    if release.NOTES_DTYPE:
        layer.dtype = keys.dtype
    return layer


def _class(name: str) -> Any:
    if name in _COMPRESSED:
        return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.get(_COMPRESSED[name])
    return _CLASSES.get(name)


@functools.lru_cache(maxsize=256)
def _plan(name: str, *settings: Any) -> Plan | None:
    window, room, states, rate, record, croppable = settings
    kind = _class(name)
    if kind is None:
        return None
    config = SimpleNamespace(sliding_window=window, compress_rates=dict.fromkeys(_COMPRESSED.values(), rate))
    # A static window has no more room than its window.
    fresh = vars(kind(sliding_window=window or room, max_cache_len=room, number_of_states=states or 1, config=config))
    if record is not None:
        fresh["record_past"] = record
    if "_is_croppable" in fresh:  # compares the window with a length that the layer does not keep
        fresh["_is_croppable"] = bool(croppable)
    dicts = {name: child for name, child in fresh.items() if isinstance(child, dict)}
    numbers = {name: int(child) for name, child in fresh.items() if isinstance(child, torch.Tensor)}
    plain = {name: child for name, child in fresh.items() if name not in {*dicts, *numbers}}
    known = {name: value for name, value in zip(_SETTINGS, settings, strict=True) if value is not None}
    data = {"class": name, **known}
    return Plan(kind, data, _parts(kind, window, room, states or 1, rate or 1), plain, dicts, numbers)


def _parts(kind: type, window: int | None, room: int | None, states: int, rate: int) -> Mapping[str, Part]:
    static = issubclass(kind, cache_utils.StaticLayer)
    sliding = issubclass(kind, cache_utils.DynamicSlidingWindowLayer | cache_utils.StaticSlidingWindowLayer)
    found: dict[str, Part] = {}
    if issubclass(kind, cache_utils.CacheLayerMixin):
        # A window counts the current token, so one row less of the past is needed.
        role = WINDOW(2, ((room if static else window) or 1) - 1) if sliding else TOKENS(2)
        hint = Hint(role, AXES, frozen=not static)
        found = {"key": Part("keys", None, hint), "value": Part("values", None, hint)}
        if static:
            found["cumulative_length"] = Part("cumulative_length", None, Hint(LENGTH, ()))
    if issubclass(kind, cache_utils.DynamicIndexedLayer | cache_utils.StaticIndexedLayer):
        rows = Hint(TOKENS(1), ("batch", "tokens", "dim"), frozen=not static)
        positions = Hint(TOKENS(2), ("position_dims", "batch", "tokens"), frozen=True)
        found["indexer_keys"] = Part("indexer_keys", None, rows)
        found["indexer_position_ids"] = Part("indexer_position_ids", None, positions)
        if static:
            found["indexer_cumulative_length"] = Part("indexer_cumulative_length", None, Hint(LENGTH, ()))
    if issubclass(kind, cache_utils.LinearAttentionLayer):
        for i in range(states):
            found[f"conv_states_{i}"] = Part("conv_states", i, _STATE)
            found[f"recurrent_states_{i}"] = Part("recurrent_states", i, _STATE)
    if kind.__name__ in _COMPRESSED:
        del found["value"]  # is its key
        names, rest = ["compressor"], ["buffer_kv", "buffer_gate"]
        if kind.__name__ == "DeepseekV4CSACache":
            names, rest = [*names, "indexer"], [*rest, "overlap_kv", "overlap_gate"]
        rows = Hint(TOKENS(1, rate), ("batch", "tokens", "dim"), frozen=True)
        for name in names:
            found[f"compressed_kv_{name}"] = Part("compressed_kv", name, rows)
            found |= {f"{state}_{name}": Part(state, name, _STATE._replace(frozen=True)) for state in rest}
    return found


def _settle(layer: Any, held: dict[str, Any], length: int) -> None:
    """Set what a layer says of its arrays beside them."""
    keys = held.get("keys")
    if keys is not None:
        held["device"], held["is_initialized"] = keys.device, True
        if release.NOTES_DTYPE:
            held["dtype"] = keys.dtype
        if "max_cache_len" in held:
            _settle_static(layer, length)
        elif "cumulative_length" in held:
            held["cumulative_length"] = length
        if "compressed_kv" in held:
            held["values"] = keys
            held["entry_count"] = {
                name: 0 if rows is None else rows.shape[1] for name, rows in held["compressed_kv"].items()
            }
    if "conv_states" in held:
        for i, conv in held["conv_states"].items():
            recurrent = held["recurrent_states"][i]
            first = conv if conv is not None else recurrent
            if first is not None:
                held["dtype"], held["device"] = first.dtype, first.device
            held["is_conv_states_initialized"][i] = held["has_previous_state"][i] = conv is not None
            held["is_recurrent_states_initialized"][i] = recurrent is not None
            held["conv_kernel_size"][i] = None if conv is None else conv.shape[-1]
    indexer = held.get("indexer_keys")
    if indexer is not None:
        held["is_indexer_initialized"] = True
        held["indexer_dtype"], held["indexer_device"] = indexer.dtype, indexer.device


def _settle_static(layer: Any, length: int) -> None:
    """Give a static layer the rows that a cut, or a dynamic layer, did not have, and the shapes that it notes."""
    sliding = isinstance(layer, cache_utils.StaticSlidingWindowLayer)
    room = layer.max_cache_len
    layer.batch_size, layer.num_heads = layer.keys.shape[:2]
    layer.k_head_dim, layer.v_head_dim = layer.keys.shape[-1], layer.values.shape[-1]
    layer.keys, layer.values = (
        _roomy(rows, 2, room, at_end=sliding and length >= room) for rows in (layer.keys, layer.values)
    )
    layer.cumulative_length = layer.cumulative_length.to(layer.device)
    if sliding:
        layer.cumulative_length_int = length
    if isinstance(layer, cache_utils.StaticIndexedLayer) and layer.indexer_keys is not None:
        layer.indexer_keys = _roomy(layer.indexer_keys, 1, room, at_end=False)
        if layer.indexer_cumulative_length is None:
            layer.indexer_cumulative_length = torch.full_like(layer.cumulative_length, length)


def _roomy(rows: torch.Tensor, axis: int, room: int, *, at_end: bool) -> torch.Tensor:
    """Return `rows` itself where it is a whole buffer, else a buffer with the rows at one end of it."""
    count = rows.shape[axis]
    if count == room:
        return rows
    if count > room:
        msg = f"a static layer of max_cache_len={room} has no room for {count} rows; make a longer one"
        raise StructureMismatchError(msg)
    shape = list(rows.shape)
    shape[axis] = room
    buffer = rows.new_zeros(shape)
    buffer.narrow(axis, room - count if at_end else 0, count).copy_(rows)
    return buffer
