"""``generate`` that computes no prompt twice: as a function, as a decoding method, and under a ``with`` block."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.generation.utils import GENERATION_MODES_MAPPING

from agnostic_cache.prefix import PrefixCache
from agnostic_cache_adapters.transformers import calls, prefill, release
from agnostic_cache_adapters.transformers.attempt import attempt
from agnostic_cache_adapters.transformers.model_copy import generating, uncompiled
from agnostic_cache_adapters.transformers.plan import Plan

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
    *positional: Any,
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
        *positional: As of ``model.generate``: ``input_ids``, shape (batch, tokens), a generation config.
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
    model = uncompiled(model)
    plain = _plain(model)
    arguments |= zip(("input_ids", *_OF_GENERATE[1:]), positional, strict=False)
    if arguments.get("inputs") is not None and arguments.get("input_ids") is None:
        arguments["input_ids"] = arguments.pop("inputs")
    use = prefill.Use(cache, b"", checkpoints, read, write, single_flight, ttl_seconds)
    plan = None
    with attempt(cache, "looking for a prefix", _device(model)):
        plan = _planned(model, use, arguments)
    if plan is None:
        return plain(**arguments)
    result = plain(**plan.reduced(arguments))
    with attempt(cache, "storing an answer", _device(model)):
        plan.store(result)
    return result


def _planned(model: Any, use: prefill.Use, arguments: dict[str, Any]) -> Plan | None:
    given = {name: arguments[name] for name in _OF_GENERATE if arguments.get(name) is not None}
    rest = {name: value for name, value in arguments.items() if name not in _OF_GENERATE}
    inner = generating(model)
    config, of_model = inner._prepare_generation_config(given.get("generation_config"), **rest)  # noqa: SLF001
    if (given.get("generation_config") or inner.generation_config).cache_implementation is not None:
        use.cache.bypass("a generation config that names a cache_implementation")  # generate refuses a cache beside it
        return None
    asked = {**of_model, **{name: given[name] for name in _REFUSED if name in given}}
    ids, mask = asked.get("input_ids"), asked.get("attention_mask")
    if mask is None and isinstance(ids, torch.Tensor):
        mask = calls.implied_mask(ids, config)
    return Plan.of(model, use, config, asked, mask)


def _plain(model: Any) -> Callable[..., Any]:
    """Return ``generate`` of a model's class: what `reuse` puts in its place is ours. A wrapper may only hand it on."""
    if hasattr(type(model), "generate"):
        return functools.partial(type(model).generate, model)
    inner = generating(model)
    return functools.partial(type(inner).generate, inner)


def _device(model: Any) -> torch.device:
    return getattr(model, "device", torch.device("cpu"))


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
        plan = None
        with attempt(cache, "looking for a prefix", model.device):
            plan = Plan.of(
                model,
                prefill.Use(cache, **settings),
                generation_config,
                {**asked, "input_ids": input_ids},
                kwargs.get("attention_mask"),
                expanded=True,
            )
        if plan is not None:
            kwargs = plan.reduced(kwargs)
        result = method(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **kwargs,
        )
        if plan is not None:
            with attempt(cache, "storing an answer", model.device):
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
    model = uncompiled(model)
    before = vars(model).get("generate")
    model.generate = functools.partial(generate, model, cache, **settings)
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before
