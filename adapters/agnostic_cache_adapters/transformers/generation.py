"""``generate`` that computes no prompt twice: as a function, as a decoding method, and under a ``with`` block."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.generation.utils import GENERATION_MODES_MAPPING

from agnostic_cache.prefix import PrefixCache
from agnostic_cache_adapters.transformers import calls, prefill, release

_OF_GENERATE = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "trust_remote_code",
    "custom_generate",
    "tokenizer",
    "assistant_tokenizer",
)
_REFUSED = ("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate")


def generate(
    model: Any,
    cache: PrefixCache,
    /,
    inputs: torch.Tensor | None = None,
    *,
    checkpoints: Sequence[int] = (),
    read: bool = True,
    write: bool = True,
    single_flight: bool = False,
    ttl_seconds: float | None = None,
    **arguments: Any,
) -> Any:
    """Do what ``model.generate`` does, from the longest part of the prompt that is already computed.

    What is new of prompt and answer is stored. Calls whose state does not follow from their tokens alone are keyed by
    what else it follows from, or go past the cache with one warning (`CacheBypassWarning`).

    Args:
        model: A causal language model of transformers, in eval mode.
        cache: Where to look and to store; its namespace names the model's weights.
        inputs: ``input_ids``, shape (batch, tokens), as ``model.generate`` takes them by position.
        checkpoints: Lengths in tokens after which other prompts will part, where a recurrent model should keep its
            state: the end of a document, say.
        read: Whether to look.
        write: Whether to store.
        single_flight: Whether to wait where another thread computes the same prefix.
        ttl_seconds: How long what is stored stays valid.
        **arguments: Of ``model.generate``. A KV cache of your own, by the name that transformers gives it (``cache=``,
            ``past_key_values=``), empty or not, bypasses ours: ``model.generate`` fills it.

    Returns:
        What ``model.generate`` returns.
    """
    plain: Callable[..., Any] = functools.partial(type(model).generate, model)
    if inputs is not None:
        arguments["input_ids"] = inputs
    given = {name: arguments[name] for name in _OF_GENERATE if arguments.get(name) is not None}
    rest = {name: value for name, value in arguments.items() if name not in _OF_GENERATE}
    config, of_model = model._prepare_generation_config(given.get("generation_config"), **rest)  # noqa: SLF001
    asked = {**of_model, **{name: given[name] for name in _REFUSED if name in given}}
    use = prefill.Use(cache, b"", checkpoints, read, write, single_flight, ttl_seconds)
    ids, mask = asked.get("input_ids"), asked.get("attention_mask")
    if mask is None and isinstance(ids, torch.Tensor):
        mask = calls.implied_mask(ids, config)
    plan = _Plan.of(model, use, config, asked, mask)
    if plan is None:
        return plain(**arguments)
    result = plain(**plan.reduced(arguments), **release.generate_argument(model, plan.kv))
    plan.store(result)
    return result


def cached(cache: PrefixCache, /, **settings: Any) -> Callable[..., Any]:
    """Return a decoding method: ``model.generate(**inputs, custom_generate=cached(cache))``.

    transformers hands no ``streamer`` and no ``tokenizer`` to such methods; where these are wanted, use `generate`.
    A KV cache that ``model.generate`` is given bypasses ours, as in `generate`.

    Args:
        cache: As in `generate`.
        **settings: Of `generate`: ``checkpoints``, ``read``, ``write``, ``single_flight``, ``ttl_seconds``.
    """

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        inputs_tensor: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        name = GENERATION_MODES_MAPPING[generation_config.get_generation_mode(None)]
        method = getattr(type(model), name)
        if name == "_assisted_decoding":
            kwargs["inputs_tensor"] = inputs_tensor
        kv_name = release.generate_name(model)
        asked = {name: value for name, value in kwargs.items() if name != "inputs_tensor"}
        if not release.is_callers(asked.get(kv_name)):
            asked.pop(kv_name, None)
        plan = _Plan.of(
            model,
            prefill.Use(cache, **settings),
            generation_config,
            {**asked, "input_ids": input_ids},
            kwargs.get("attention_mask"),
            expanded=True,
        )
        if plan is not None:
            kwargs = {**plan.reduced(kwargs), kv_name: plan.kv}
        result = method(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **kwargs,
        )
        if plan is not None:
            plan.store(result)
        return result

    return decode


@contextlib.contextmanager
def reuse(model: Any, cache: PrefixCache, /, **settings: Any) -> Iterator[None]:
    """Let every ``model.generate`` in a ``with`` block be `generate`: pipelines and agents work unmodified.

    A call that passes a KV cache of its own bypasses ours, as in `generate`.

    Args:
        model: As in `generate`.
        cache: As in `generate`.
        **settings: Of `generate`: ``checkpoints``, ``read``, ``write``, ``single_flight``, ``ttl_seconds``.
    """
    before = vars(model).get("generate")
    model.generate = functools.partial(generate, model, cache, **settings)
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before


class _Plan:
    """How one call is served: the cache it goes on from, and what is stored when it is done."""

    def __init__(self, use: prefill.Use, prompts: calls.Prompts, kv: Any, dropped: Sequence[str]) -> None:
        self.use = use
        self.prompts = prompts
        self.kv = kv
        self.dropped = dropped

    @classmethod
    def of(
        cls,
        model: Any,
        use: prefill.Use,
        config: Any,
        asked: dict[str, Any],
        mask: torch.Tensor | None,
        *,
        expanded: bool = False,
    ) -> "_Plan | None":
        """Plan a call; None, with a warning, where it goes past the cache."""
        reason = calls.reason_to_bypass(model, config, asked)
        prompts = None if reason else calls.prompts_of(asked["input_ids"], mask)
        kv = None if reason else calls.fresh_cache(model)
        kinds = calls.kinds_of(kv)
        if prompts is None or kinds is None:
            unclear = "a mask that is not zeros and then ones" if prompts is None else calls.UNKNOWN_KIND
            use.cache.bypass(reason or unclear)
            return None
        if use.cache.block_size % kinds.stride:
            use.cache.bypass(f"block_size={use.cache.block_size} is no multiple of {kinds.stride} tokens per row")
            return None
        use = use._replace(context=calls.context_of(model, use.cache, asked))
        copies = 1 if expanded else max(config.num_beams, config.num_return_sequences)
        rows = [row for row in prompts.rows for _ in range(copies)]
        pads = [pad for pad in prompts.pads for _ in range(copies)]
        prompts, tokens = calls.Prompts(rows, pads), rows[0]
        alone = all(row == tokens for row in rows) and not any(pads)
        dropped: Sequence[str] = ()
        if calls.keyed(asked):
            if not alone or kinds.windows or kinds.snapshots or use.cache.exact:
                use.cache.bypass("images, audio or own positions in a batch, or where a prompt is computed in parts")
                return None
            kv = prefill.loaded(model, use, tokens, kv)
            dropped = calls.prefill_only(asked) if kv.get_seq_length() else ()
            if dropped and calls.has_placeholders(model, tokens[kv.get_seq_length() :]):
                kv, dropped = calls.fresh_cache(model), ()
        elif alone:
            kv = prefill.state_of(model, use, tokens, kv, kinds)
        else:
            kv = prefill.common_state(model, use, prompts, kv, kinds)
        if alone and len(rows) > 1 and kv.get_seq_length():
            prefill.repeat(kv.layers, len(rows))
        return cls(use, prompts, kv, dropped)

    def reduced(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments without what the loaded prefix has taken up already."""
        gone = {*self.dropped, *release.CACHE_NAMES}  # a cache of None is in the way of ours
        return {name: value for name, value in arguments.items() if name not in gone}

    def store(self, result: Any) -> None:
        """Store what is new after a call: prompt and answer of one row, the prompts of several."""
        if not self.use.write or self.use.cache.exact:
            return
        rows, pads = self.prompts
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        if len(rows) == 1 and not pads[0]:
            length = min(self.kv.get_seq_length(), sequences.shape[1])
            if self.kv.get_seq_length() == length:
                self.use.insert(sequences[0, :length].tolist(), self.kv)
            return
        seen: set[tuple[int, ...]] = set()
        for i, (row, pad) in enumerate(zip(rows, pads, strict=True)):
            if tuple(row) not in seen:
                seen.add(tuple(row))
                own = prefill.row_of(self.kv, i, pad, pad + len(row))
                if own is not None:
                    self.use.insert(row, own)
