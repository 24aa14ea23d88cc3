"""States of one row each, put together as a batch whose shorter rows stand behind left padding."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from agnostic_cache.arrays.roles import SNAPSHOT, TOKENS, WINDOW
from agnostic_cache.errors import UnknownValueError
from agnostic_cache_adapters.transformers import layers


class UnknownLayerError(UnknownValueError):
    """A cache or a layer of it is of a class whose rows cannot be moved."""


def stacked(caches: Sequence[Any], width: int) -> Any:
    """Return one cache of `width` tokens for a batch: each row's state at its right end, behind padding.

    Args:
        caches: A ``DynamicCache`` of one row each, of any lengths up to `width`; they are left as they are.
        width: Tokens of a row, padding included.

    Raises:
        UnknownLayerError: A class that is not known, or one whose rows stand for several tokens each.
    """
    if any(type(cache) is not DynamicCache for cache in caches):
        kinds = sorted({type(cache).__name__ for cache in caches})
        msg = f"rows of a {', '.join(kinds)} cannot be moved; compute the batch as it is"
        raise UnknownLayerError(msg)
    made = copy.copy(caches[0])
    made.layers = [_layer(rows, width) for rows in zip(*(cache.layers for cache in caches), strict=True)]
    return made


def _layer(rows: Sequence[Any], width: int) -> Any:
    plan = layers.plan(rows[0])
    if plan is None or any(layers.plan(row) != plan for row in rows):
        msg = f"rows of a {type(rows[0]).__name__} cannot be moved; compute the batch as it is"
        raise UnknownLayerError(msg)
    arrays = {name: _array([layers.get(row, part) for row in rows], part, width) for name, part in plan.parts.items()}
    return layers.make(plan, arrays, width)


def _array(rows: Sequence[torch.Tensor | None], part: layers.Part, width: int) -> torch.Tensor | None:
    there = [row for row in rows if row is not None]
    if not there:
        return None
    role = part.hint.role
    moves = role is SNAPSHOT or (isinstance(role, TOKENS) and role.stride == 1) or isinstance(role, WINDOW)
    if len(there) < len(rows) or not moves:
        msg = f"rows of {part.attribute} cannot be moved; compute the batch as it is"
        raise UnknownLayerError(msg)
    batch = part.hint.axes.index("batch") if part.hint.axes else 0
    if isinstance(role, TOKENS | WINDOW):
        count = min(width, role.width) if isinstance(role, WINDOW) else width
        there = [_at_the_end(row, role.axis, count) for row in there]
    return torch.cat(there, batch)


def _at_the_end(rows: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    """Return the last `count` rows, behind zeros where there are fewer."""
    have = min(rows.shape[axis], count)
    shape = list(rows.shape)
    shape[axis] = count
    made = rows.new_zeros(shape)
    made.narrow(axis, count - have, have).copy_(rows.narrow(axis, rows.shape[axis] - have, have))
    return made
