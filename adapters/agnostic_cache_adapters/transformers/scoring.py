"""Log-likelihoods of continuations, from a context that is computed once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from agnostic_cache.errors import InvalidTokensError
from agnostic_cache.prefix import PrefixCache
from agnostic_cache_adapters.transformers import calls, prefill


class Score(NamedTuple):
    """What a model says of one continuation.

    Attributes:
        log_likelihood: Natural logarithm of its probability after the context.
        is_greedy: Whether greedy decoding would have given it.
    """

    log_likelihood: float
    is_greedy: bool


def score(
    model: Any, cache: PrefixCache, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """Return the log-likelihood of each continuation of a context; compute what is known of the context only once.

    Args:
        model: A causal language model of transformers, in eval mode.
        cache: Where to look and to store.
        context: Token ids, at least one.
        continuations: Token ids of each, at least one.

    Returns:
        Sums of log-probabilities in natural logarithms, in fp32 of full logits.

    Raises:
        InvalidTokensError: Context or a continuation is empty.
    """
    return [found.log_likelihood for found in scores(model, cache, context, continuations)]


@torch.no_grad()
def scores(
    model: Any, cache: PrefixCache, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Score]:
    """Do what `score` does, and also tell which continuations are greedy."""
    tokens = list(context)
    if not tokens or not all(map(len, continuations)):
        msg = f"a context of {len(tokens)} tokens, continuations of {[len(one) for one in continuations]}; each has one"
        raise InvalidTokensError(msg)
    ids = torch.tensor([tokens], device=model.device)
    config = model._prepare_generation_config(None)[0]  # noqa: SLF001 - what generate asks
    reason = calls.reason_to_bypass(model, config, {"input_ids": ids})
    kinds = None if reason else calls.kinds_of(model)
    if kinds is None or cache.block_size % kinds.stride:
        cache.bypass(reason or f"{calls.UNKNOWN_KIND}, or blocks that cut its rows")
        return [_score(model, tokens, list(one), None) for one in continuations]
    use = prefill.Use(cache, calls.context_of(model, cache, {}))
    found = []
    for one in continuations:
        kv = prefill.state_of(model, use, tokens, kinds, limit=None if cache.exact else len(tokens) - 1)
        found.append(_score(model, tokens, list(one), kv))
    return found


def _score(model: Any, context: list[int], continuation: list[int], kv: Any) -> Score:
    """Compute what `kv` does not hold of both; `kv` is used up."""
    known = kv.get_seq_length() if kv is not None else 0
    ids = torch.tensor([(context + continuation)[known:-1]], device=model.device)
    logits = model(input_ids=ids, past_key_values=kv, use_cache=kv is not None).logits[0, -len(continuation) :].float()
    wanted = torch.tensor(continuation, device=logits.device)
    chosen = logits.log_softmax(dim=-1).gather(1, wanted[:, None])
    return Score(float(chosen.sum()), bool((logits.argmax(dim=-1) == wanted).all()))
