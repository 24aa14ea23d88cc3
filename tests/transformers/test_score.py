"""Log-likelihoods are those that one forward pass gives; the context is computed once."""

from typing import Any

import hf_structures
import pytest
import torch

from agnostic_cache import PrefixCache
from agnostic_cache.errors import CacheBypassWarning, InvalidTokensError
from agnostic_cache_adapters.transformers import score
from agnostic_cache_adapters.transformers.scoring import scores

CONTEXT = hf_structures.tokens(20, seed=3)[0].tolist()
CONTINUATIONS = [[4], [5, 6], [7, 8, 9], [5]]


@torch.no_grad()
def expected(model: Any, context: list[int], continuation: list[int]) -> float:
    logits = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    return float(sum(logits[len(context) - 1 + i, token] for i, token in enumerate(continuation)))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("exact", [False, True])
def test_scores_are_those_of_one_pass(name: str, *, exact: bool) -> None:
    model = getattr(hf_structures, name)().model
    cache = PrefixCache("16MiB", namespace="m", block_size=8, exact=exact)
    for context in (CONTEXT, CONTEXT[:13], CONTEXT[:1], [*CONTEXT[:15], 3, 3, 3]):
        wanted = [expected(model, context, one) for one in CONTINUATIONS]
        for batch_size in (8, 3):
            found = score(model, cache, context, CONTINUATIONS, batch_size=batch_size)
            assert found == pytest.approx(wanted, abs=1e-4)
    assert cache.stats().hit_tokens > 0
    assert cache.stats().bypassed == 0


def test_the_context_is_computed_once() -> None:
    model = hf_structures.llama().model
    cache = PrefixCache("16MiB", namespace="m", block_size=8)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _module, given, _out: seen.append(given[0].numel()))
    score(model, cache, CONTEXT, CONTINUATIONS)
    # One batch: the last token of the context, and all but the last of each continuation; those of one token share it.
    assert seen == [len(CONTEXT) - 1, 3 * 3]


def test_greedy_continuations_are_told() -> None:
    model = hf_structures.llama().model
    cache = PrefixCache("16MiB", namespace="m", block_size=8)
    ids = torch.tensor([CONTEXT])
    greedy = model.generate(ids, max_new_tokens=3, do_sample=False)[0, len(CONTEXT) :].tolist()
    other = [*greedy[:2], (greedy[2] + 1) % 64]
    assert [found.is_greedy for found in scores(model, cache, CONTEXT, [greedy, other])] == [True, False]


def test_what_cannot_be_scored() -> None:
    model = hf_structures.llama().model
    cache = PrefixCache("16MiB", namespace="m", block_size=8)
    for context, continuations in (([], [[1]]), ([1], [[1], []])):
        with pytest.raises(InvalidTokensError):
            score(model, cache, context, continuations)
    model.unused = torch.nn.BatchNorm1d(2)
    model.train()
    with pytest.warns(CacheBypassWarning):
        found = score(model, cache, CONTEXT, CONTINUATIONS)
    assert found == pytest.approx([expected(model, CONTEXT, one) for one in CONTINUATIONS], abs=1e-4)
