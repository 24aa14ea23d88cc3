"""Log-likelihoods of continuations, from a context that is computed once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from agnostic_cache.errors import InvalidTokensError
from agnostic_cache.prefix import PrefixCache
from agnostic_cache_adapters.transformers import calls, prefill
from agnostic_cache_adapters.transformers.attempt import attempt
from agnostic_cache_adapters.transformers.model_copy import generating, uncompiled
from agnostic_cache_adapters.transformers.steps import prepared
from agnostic_cache_adapters.transformers.verdicts import verdict_of


class Score(NamedTuple):
    """What a model says of one continuation.

    Attributes:
        log_likelihood: Natural logarithm of its probability after the context.
        is_greedy: Whether greedy decoding would have given it.
    """

    log_likelihood: float
    is_greedy: bool


def score(
    model: Any,
    cache: PrefixCache,
    /,
    context: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
) -> list[float]:
    """Return the log-likelihood of each continuation of a context; compute what is known of the context only once.

    Args:
        model: A causal language model of transformers, in eval mode.
        cache: Where to look and to store.
        context: Token ids, at least one.
        continuations: Token ids of each, at least one.
        batch_size: How many continuations are computed at once, each beside a copy of the context's state.

    Returns:
        Sums of log-probabilities in natural logarithms, in fp32 of full logits.

    Raises:
        InvalidTokensError: Context or a continuation is empty.
    """
    return [found.log_likelihood for found in scores(model, cache, context, continuations, batch_size=batch_size)]


@torch.no_grad()
def scores(
    model: Any,
    cache: PrefixCache,
    /,
    context: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
) -> list[Score]:
    """Do what `score` does, and also tell which continuations are greedy."""
    tokens, wanted = list(context), list(map(list, continuations))
    if not tokens or not all(wanted):
        msg = f"a context of {len(tokens)} tokens, continuations of {list(map(len, wanted))}; each has one"
        raise InvalidTokensError(msg)
    ids = torch.zeros((1, len(tokens) + max(map(len, wanted), default=0)), dtype=torch.long)  # as long as it will get
    model = uncompiled(model)
    inner, kinds = generating(model), None
    with attempt(cache, "looking for a context", inner.device):
        config = inner._prepare_generation_config(None)[0]  # noqa: SLF001 - what generate asks
        reason = calls.reason_to_bypass(model, config, {"input_ids": ids})
        kinds = calls.kinds_of(None if reason else calls.fresh_cache(inner))
        if kinds is not None:
            reason = calls.not_proven(verdict_of(inner), {"input_ids": ids})
        if reason or kinds is None or cache.block_size % kinds.stride:
            cache.bypass(reason or f"{calls.UNKNOWN_KIND}, or blocks that cut its rows")
            kinds = None
    found: list[Score] = []
    for i in range(0, len(wanted), batch_size):
        kv, batch = None, wanted[i : i + batch_size]
        if kinds is not None:
            with attempt(cache, "looking for a context", inner.device):
                calls.forget_deltas(inner)
                use = prefill.Use(cache, calls.context_of(model, cache, {}))
                limit = None if cache.exact else len(tokens) - 1
                kv = prefill.state_of(inner, use, tokens, calls.fresh_cache(inner), kinds, limit=limit)
        for group in [batch] if kv is not None else [[one] for one in batch]:
            found += _scored(inner, tokens, group, kv)
    return found


def _scored(model: Any, context: list[int], continuations: list[list[int]], kv: Any) -> list[Score]:
    """Compute what `kv` does not hold of context and continuations; `kv` is used up."""
    known = 0 if kv is None else kv.get_seq_length()
    # Of a continuation, all but the last token goes in: those of one token are all scored by one row.
    rows = {row: i for i, row in enumerate(dict.fromkeys(tuple(one[:-1]) for one in continuations))}
    longest = max(map(len, rows)) + 1
    ids = torch.tensor([[*context, *row, *[0] * (longest - 1 - len(row))] for row in rows], device=model.device)
    if kv is not None and known and len(rows) > 1:
        prefill.repeat(kv.layers, len(rows))
    keep = {"logits_to_keep": longest} if model._supports_logits_to_keep() else {}  # noqa: SLF001 - what generate asks
    # What stands behind a shorter row changes nothing before it.
    logits = model(**{**prepared(model, ids, kv, known), **keep}).logits[:, -longest:].float()
    found = []
    for one in continuations:
        mine = logits[rows[tuple(one[:-1])], : len(one)]
        asked = torch.tensor(one, device=logits.device)
        chosen = mine.log_softmax(dim=-1).gather(1, asked[:, None])
        found.append(Score(float(chosen.sum()), bool((mine.argmax(dim=-1) == asked).all())))
    return found
