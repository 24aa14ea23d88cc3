"""Warm time to first token on a real model: a hit of `StateCache` against a fork made by hand."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache

from agnostic_cache import StateCache

if TYPE_CHECKING:
    from tests.benchmarks.conftest import Race, Report

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def prefilled() -> tuple[Any, list[int], DynamicCache]:
    """SmolLM2, a document of 2,048 tokens and text to go on with, and the state of the document."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import smollm2  # noqa: PLC0415 - an example, found by its path
    finally:
        sys.path.remove(str(EXAMPLES))
    model, tokenizer = smollm2.load_torch()
    tokens = smollm2.document(tokenizer, 2048 + 128)
    state = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([tokens[:2048]]), past_key_values=state, logits_to_keep=1)
    return model, tokens, state


@pytest.mark.parametrize("new", [8, 32, 128])
def test_warm_time_to_first_token(
    new: int, prefilled: tuple[Any, list[int], DynamicCache], race: Race, report: Report
) -> None:
    model, tokens, state = prefilled
    cache = StateCache("1GiB")
    cache.put("document", state)
    prompt = torch.tensor([tokens[: 2048 + new]])

    def first_token(fork: DynamicCache | None) -> int:
        with torch.inference_mode():
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=fork,
                max_new_tokens=1,
                do_sample=False,
            )
        return int(ids[0, -1])

    def by_hand() -> int:
        fork = copy.copy(state)
        fork.layers = [copy.copy(layer) for layer in state.layers]
        return first_token(fork)

    def by_cache() -> int:
        return first_token(cache.get("document"))

    assert by_cache() == by_hand()
    seconds = race({"ours": by_cache, "peer": by_hand}, rounds=15)
    report(f"warm first token, {new} new, against a hand-made fork", seconds["ours"], seconds["peer"], 1.05)
    assert by_cache() == by_hand()
