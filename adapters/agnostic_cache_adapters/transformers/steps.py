"""One forward as ``generate`` does it: with positions, masks and names by the model's own preparation."""

import inspect
from typing import Any

import torch

from agnostic_cache_adapters.transformers import release


def prepared(model: Any, ids: torch.Tensor, cache: Any, start: int = 0, **settings: Any) -> dict[str, Any]:
    """Return what ``generate`` passes to ``forward`` to compute the columns of `ids` from `start` on.

    A model without it may count positions from zero again, or from elsewhere than ``generate`` does.

    Args:
        model: The model that has ``generate``, no wrapper.
        ids: All tokens, shape (batch, tokens), without padding in front.
        cache: What stands for the first `start` of them; None to compute without one.
        start: How many tokens `cache` stands for.
        **settings: Of ``forward``, such as ``logits_to_keep``.
    """
    taken = inspect.signature(type(model).forward).parameters
    given = {} if cache is None else release.generate_argument(model, cache)
    settings = {"use_cache": cache is not None, **given, **settings}
    if "attention_mask" in taken:
        settings["attention_mask"] = None  # as generate drops one that hides nothing
    if not tells_length(cache):
        return _of_model(model, ids[:, start:], settings)
    if "position_ids" in taken:
        mask = {"attention_mask": torch.ones_like(ids), **given}
        settings["position_ids"] = model._prepare_position_ids_for_generation(ids, mask)  # noqa: SLF001 - as generate
    return _of_model(model, ids, {**settings, "next_sequence_length": ids.shape[1] - start})


def _of_model(model: Any, ids: torch.Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **settings)
    return {**made, "return_dict": True}


def tells_length(cache: Any) -> bool:
    """Say whether a cache tells how many tokens it stands for, as it must where ``generate`` goes on from it."""
    if cache is None:
        return True
    try:
        cache.get_seq_length()
    except ValueError:  # none of its layers has tokens
        return False
    return True
