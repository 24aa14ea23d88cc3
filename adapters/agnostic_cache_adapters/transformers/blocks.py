"""A layer that holds its rows in blocks, and joins them where `DynamicLayer` concatenates anyway: in its first update.

A prefix comes out of a cache in blocks. Joined at once, they would be copied twice: then, and with the first new rows.
"""

from typing import Any, NamedTuple

import torch
from transformers import cache_utils

from agnostic_cache_adapters.transformers import release


class Pieces(NamedTuple):
    """Adjacent pieces of one tensor, which nobody writes: `torch.cat(tensors, axis)`, not done yet."""

    tensors: tuple[torch.Tensor, ...]
    axis: int

    def joined(self) -> torch.Tensor:
        """Return the tensor."""
        return torch.cat(self.tensors, dim=self.axis)


class BlockLayer(cache_utils.DynamicLayer):
    """A `DynamicLayer` whose rows are not joined yet. Becomes a plain one when they are first updated or looked at."""

    def __init__(self, keys: Pieces, values: Pieces) -> None:
        """Share the pieces; writes none of them."""
        first = keys.tensors[0]
        vars(self).update(pieces=(keys, values), is_initialized=True, device=first.device)
        if release.NOTES_DTYPE:
            self.dtype = first.dtype

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002 - of the method that this one replaces
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Join the pieces and the new rows, in one step."""
        keys, values = vars(self).pop("pieces")
        self.__class__ = cache_utils.DynamicLayer  # type: ignore[assignment]
        self.keys = torch.cat([*keys.tensors, key_states], dim=keys.axis)
        self.values = torch.cat([*values.tensors, value_states], dim=values.axis)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of rows, without joining them."""
        keys: Pieces = vars(self)["pieces"][0]
        return sum(piece.shape[keys.axis] for piece in keys.tensors)

    def __getattr__(self, name: str) -> Any:
        """Join the pieces when the rows are asked for."""
        if name not in {"keys", "values"}:
            raise AttributeError(name)
        keys, values = vars(self).pop("pieces")
        self.__class__ = cache_utils.DynamicLayer  # type: ignore[assignment]
        self.keys, self.values = keys.joined(), values.joined()
        return vars(self)[name]
