"""`exact=True` on a real model: what it gives in bf16, and what it costs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from agnostic_cache import PrefixCache
from agnostic_cache_adapters.transformers import generate

if TYPE_CHECKING:
    from tests.benchmarks.conftest import Demo, Race, Report

PROMPTS = 20
BLOCK = 64  # small, as the prompts are: a CPU without bf16 takes a second for each pass of any length
LENGTH = 80
"""Tokens of a prompt: a block, and some of the next."""
REST = 5
"""Tokens of it that a cache has not seen yet."""


@pytest.fixture(scope="module")
def bf16(demo: Demo) -> Any:
    """The model in bf16, as it would be served."""
    return copy.deepcopy(demo.model).to(torch.bfloat16)


@torch.inference_mode()
def logits(model: Any, prompt: list[int], cache: PrefixCache) -> torch.Tensor:
    """What a model thinks of the token after a prompt, shape (1, vocabulary)."""
    ids = torch.tensor([prompt])
    settings: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1}
    out = generate(model, cache, ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    found: torch.Tensor = out.logits[0]
    return found


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # it is answers that are compared
def test_hit_and_miss_in_bf16(demo: Demo, bf16: Any, report: Report) -> None:
    unequal = {True: 0, False: 0}
    largest = 0.0
    for i in range(3 if report.benchmark.disabled else PROMPTS):
        prompt = demo.tokens[100 * i : 100 * i + LENGTH]
        for exact in unequal:
            cache = PrefixCache("1GiB", namespace="m", block_size=BLOCK, exact=exact)
            miss = logits(bf16, prompt, PrefixCache("1GiB", namespace="m", block_size=BLOCK, exact=exact))
            logits(bf16, prompt[:-REST], cache)
            hit = logits(bf16, prompt, cache)
            assert cache.stats().hit_tokens == (BLOCK if exact else LENGTH - REST)
            unequal[exact] += not torch.equal(miss, hit)
            largest = max(largest, float((miss - hit).abs().max()))
    assert unequal[True] == 0
    asked = f"bf16: of {PROMPTS} prompts, hit and miss unequal in a bit"
    report(f"exact=True, {asked}", unequal[True], None, 0, unit="")
    report(f"exact=False, {asked}", unequal[False], None, None, unit="")
    report("exact=False, bf16: largest difference of a logit", largest, None, None, unit="")


def test_a_cold_prompt_in_exact_chunks(demo: Demo, race: Race, report: Report) -> None:
    prompt = torch.tensor([demo.tokens])
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 1, "do_sample": False}

    @torch.inference_mode()
    def in_chunks() -> int:
        cache = PrefixCache("4GiB", namespace="m", exact=True)
        return int(generate(demo.model, cache, prompt, **settings)[0, -1])

    @torch.inference_mode()
    def in_one() -> int:
        return int(demo.model.generate(prompt, **settings)[0, -1])

    answers: dict[str, int] = {}
    contenders = {"ours": lambda: answers.update(ours=in_chunks()), "peer": lambda: answers.update(peer=in_one())}
    seconds = race(contenders, rounds=3)
    assert answers["ours"] == answers["peer"]
    report("exact=True, 2,176 tokens from nothing, against one pass", seconds["ours"], seconds["peer"], 1.1)
