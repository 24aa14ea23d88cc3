"""The state that a call goes on from: loaded as far as it is known, computed and stored as far as others can use it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import cache_utils

from agnostic_cache.prefix import PrefixCache
from agnostic_cache_adapters.transformers import layers
from agnostic_cache_adapters.transformers.blocks import BlockLayer
from agnostic_cache_adapters.transformers.calls import Kinds, Prompts, fresh_cache
from agnostic_cache_adapters.transformers.steps import prepared

_ANY_PADDING = {cache_utils.DynamicLayer}
_EQUAL_PADDING = {cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer}


class Use(NamedTuple):
    """How one call uses a cache.

    Attributes:
        cache: The cache.
        context: What the call's states depend on besides tokens.
        checkpoints: Lengths at which states that cannot be cut are kept too.
        read: Whether to look.
        write: Whether to store.
        single_flight: Whether to wait for another thread that computes the same.
        ttl_seconds: How long what is stored stays valid.
    """

    cache: PrefixCache
    context: bytes = b""
    checkpoints: Sequence[int] = ()
    read: bool = True
    write: bool = True
    single_flight: bool = False
    ttl_seconds: float | None = None

    def insert(self, tokens: Sequence[int], state: Any, length: int | None = None) -> None:
        """Store what is new of a state."""
        if self.write:
            self.cache.insert(list(tokens), state, length=length, context=self.context, ttl_seconds=self.ttl_seconds)


def state_of(model: Any, use: Use, tokens: list[int], kv: Any, kinds: Kinds, *, limit: int | None = None) -> Any:
    """Return a private cache that stands for a prefix of `tokens`, as long as is worth it, and store its boundaries.

    Args:
        model: The model.
        use: How the cache is used.
        tokens: The prompt, of which at least the last token is left to compute.
        kv: An empty cache, to fill.
        kinds: What its layers keep.
        limit: Compute that many tokens, whether their states can be cut or not.
    """
    with use.cache.match(tokens, context=use.context, read=use.read, single_flight=use.single_flight) as match:
        start = match.length
        stops = _stops(use, len(tokens), start, match.known, kinds)
        kv = match.load(like=kv, device=str(model.device))
        if limit is not None and limit > start:
            stops = sorted({stop for stop in stops if stop < limit} | {limit})
        for stop in stops:
            start = _advance(model, use, kv, tokens, start, stop)
        return kv


def loaded(model: Any, use: Use, tokens: list[int], kv: Any) -> Any:
    """Return a private cache that stands for the longest known prefix of `tokens`; compute nothing."""
    with use.cache.match(tokens, context=use.context, read=use.read) as match:
        return match.load(like=kv, device=str(model.device))


def _stops(use: Use, count: int, start: int, known: int, kinds: Kinds) -> list[int]:
    """Lengths up to which the prompt is computed apart, so that a state is stored there."""
    size = use.cache.block_size
    last = (count - 1) // size * size
    if use.cache.exact:
        return list(range(start + size, last + 1, size))
    wanted: set[int] = set()
    if kinds.snapshots:
        # Two boundaries: the end of a question often stands in the block that the document's end began.
        wanted = {last - size, last, known, *use.checkpoints}
    elif kinds.windows:
        wanted = {last}
    return sorted(stop for stop in wanted if start < stop < count)


@torch.no_grad()
def _advance(model: Any, use: Use, kv: Any, tokens: list[int], start: int, stop: int) -> int:
    """Compute tokens ``[start, stop)`` into `kv` and store it, with every row of a window."""
    recorded: list[Any] = [layer for layer in kv.layers if type(layer) is cache_utils.DynamicSlidingWindowLayer]
    for layer in recorded:
        layer.activate_past_recording()
    ids = torch.tensor([tokens[:stop]], device=model.device)
    keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}  # noqa: SLF001 - what generate asks
    model(**prepared(model, ids, kv, start, **keep))
    use.insert(tokens[:stop], kv)
    for layer in recorded:
        layer.record_past = False
        layer.keys, layer.values = (rows[:, :, -layer.sliding_window + 1 :, :] for rows in (layer.keys, layer.values))
    return stop


def common_state(model: Any, use: Use, prompts: Prompts, batch: Any, kinds: Kinds) -> Any:
    """Fill a private, empty cache for a batch: what its rows have in common, computed once.

    Row r of the result has its padding in front, and then as much of the prefix as makes all rows equally long: what
    ``generate`` would have computed there.
    """
    first, pads = prompts.rows[0], prompts.pads
    common = min(_common(first, row) for row in prompts.rows)
    common = min(common, *(len(row) - 1 for row in prompts.rows))
    ragged = len(set(pads)) > 1
    allowed = _ANY_PADDING if ragged else _EQUAL_PADDING
    if any(pads) and not all(type(layer) in allowed for layer in batch.layers):
        common = 0
    if kinds.windows or kinds.snapshots or use.cache.exact:
        common -= common % use.cache.block_size
    if not common:
        return batch
    alone = state_of(model, use, first[: common + 1], fresh_cache(model), kinds, limit=common)
    length = alone.get_seq_length()
    columns = min(pad + length for pad in pads)
    for i, layer in enumerate(alone.layers):
        if type(layer) in {cache_utils.DynamicLayer, BlockLayer}:
            if any(pads):
                keys, values = (_spread(rows, pads, columns) for rows in (layer.keys, layer.values))
            else:
                keys, values = (rows.expand(len(pads), -1, -1, -1) for rows in (layer.keys, layer.values))
            batch.layers[i].update(keys, values)
        else:
            batch.layers[i] = _padded(layer, pads[0])
            repeat(batch.layers[i : i + 1], len(pads))
    return batch


def repeat(rows: Sequence[Any], count: int) -> None:
    """Give layers of one row `count` equal rows: as for beams, since not every layer has a method of its own for it."""
    for layer in rows:
        layer.reorder_cache(torch.zeros(count, dtype=torch.long))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


def _spread(rows: torch.Tensor, pads: list[int], columns: int) -> torch.Tensor:
    """Rows of one prefix for a batch, shape (batch, heads, columns, dim): behind the padding of each."""
    _, heads, _, dim = rows.shape
    batch = rows.new_zeros((len(pads), heads, columns, dim))
    for row, pad in zip(batch, pads, strict=True):
        if pad < columns:
            row[:, pad:] = rows[0, :, : columns - pad]
    return batch


def _padded(layer: Any, pad: int) -> Any:
    """A sliding layer with `pad` more tokens in front."""
    if pad and isinstance(layer, cache_utils.DynamicSlidingWindowLayer):
        layer.cumulative_length += pad
        for name in ("keys", "values"):
            rows: torch.Tensor = getattr(layer, name)
            padded = torch.nn.functional.pad(rows, (0, 0, pad, 0))
            setattr(layer, name, padded[:, :, -layer.sliding_window + 1 :])
    return layer


def row_of(kv: Any, row: int, pad: int, stop: int) -> Any | None:
    """Return one row of a batch as a cache of its own, columns ``[pad, stop)``: views; None where layers forbid it."""
    if any(type(layer) is not cache_utils.DynamicLayer for layer in kv.layers):
        return None
    alone = cache_utils.DynamicCache()
    alone.layers = [
        layers.dynamic_layer(*(rows[row : row + 1, :, pad:stop] for rows in (layer.keys, layer.values)))
        for layer in kv.layers
    ]
    return alone
