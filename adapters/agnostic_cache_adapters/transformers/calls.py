"""Which calls of ``generate`` a prefix may serve, and what else than tokens their state depends on.

An allow-list decides: what nobody here has thought of goes past the cache. Each case was seen to give wrong tokens,
without an error, on a cache that does not look.
"""

import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from transformers import cache_utils
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from agnostic_cache.arrays.roles import SNAPSHOT, TOKENS, WINDOW
from agnostic_cache.fingerprint import model_fingerprint
from agnostic_cache.prefix import PrefixCache
from agnostic_cache.prefix.chain import fields
from agnostic_cache_adapters.transformers import layers, release
from agnostic_cache_adapters.transformers.model_copy import generating
from agnostic_cache_adapters.transformers.training import acts_differently
from agnostic_cache_adapters.transformers.verdicts import Verdict
from agnostic_cache_adapters.transformers.weights import stamp

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
_STEERING = {"input_ids", "attention_mask", "use_cache", "logits_to_keep", "synced_gpus", "streamer", "tokenizer"}
_KEYED = {"position_ids", "token_type_ids", "mm_token_type_ids", *MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL}
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index")


UNKNOWN_KIND = "a cache of a kind that is not known, or that keeps no rows of tokens"


class Prompts(NamedTuple):
    """The tokens of a call.

    Attributes:
        rows: Those of each row, padding left out.
        pads: How many are left out in front of each row.
    """

    rows: list[list[int]]
    pads: list[int]


class Kinds(NamedTuple):
    """What the layers of a model keep.

    Attributes:
        windows: Some keep a window of the past.
        snapshots: Some keep what is valid at its own length only.
        stride: Tokens that a row stands for, in all of them: blocks hold a multiple of it.
    """

    windows: bool
    snapshots: bool
    stride: int


def fresh_cache(model: Any) -> Any:
    """Make the empty cache that ``generate`` would make; None where that is none that grows."""
    if not model._supports_default_dynamic_cache():  # noqa: SLF001 - what generate asks
        return None
    return cache_utils.DynamicCache(config=model.config.get_text_config(decoder=True))


def kinds_of(kv: Any) -> Kinds | None:
    """Say what the layers of an empty cache keep; None where one of them is not known, or none keeps rows of tokens.

    Without rows of tokens, as in Mamba, a cache does not tell its length: ``generate`` feeds it the whole prompt again.
    """
    if kv is None:
        return None
    plans = [layers.plan(layer) for layer in kv.layers]
    if None in plans:
        return None
    # Plans are made once per kind of layer: most layers have the same.
    different = {id(plan): plan for plan in plans if plan is not None}.values()
    roles = [part.hint.role for plan in different for part in plan.parts.values()]
    if not any(isinstance(role, TOKENS | WINDOW) for role in roles):
        return None
    stride = math.lcm(*(role.stride for role in roles if isinstance(role, TOKENS)))
    return Kinds(any(isinstance(role, WINDOW) for role in roles), SNAPSHOT in roles, stride)


def reason_to_bypass(model: Any, config: Any, inputs: Mapping[str, Any]) -> str | None:  # noqa: PLR0911, PLR0912
    """Say why a call cannot be served, or None where it can.

    Args:
        model: The model.
        config: The call's whole generation config.
        inputs: What else the call was given: arguments of the model, and those of ``generate`` that are not None.
    """
    outer, model = model, generating(model)
    if outer.training and acts_differently(outer):
        return "the model is in training mode, where dropout or noise acts"
    if model.config.is_encoder_decoder:
        return "the model has an encoder"
    if inputs.get("assistant_model") is not None or config.get_generation_mode(None) not in _MODES:
        return "assisted, prompt-lookup and other decoding that rolls its cache back"
    if any(getattr(getattr(each, "active_peft_config", None), "is_prompt_learning", False) for each in (outer, model)):
        return "virtual tokens stand before the prompt"
    if any(_is_activated(each) for each in (outer, model)):
        return "an adapter that is activated by tokens of the prompt (aLoRA) acts behind the last of them only"
    if not config.use_cache:
        return "use_cache=False"
    own = [name for name in release.CACHE_NAMES if inputs.get(name) is not None]
    if own:
        return f"{own[0]} of the caller"
    if release.forward_name(model) != release.generate_name(model):
        return "the model's forward takes no cache by the name that generate passes it by"
    if config.cache_implementation not in {None, "dynamic"}:
        return f"cache_implementation={config.cache_implementation!r}"
    if config.token_healing:
        return "token healing changes the prompt"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states of the whole prompt are asked for"
    if config.guidance_scale not in {None, 1.0}:
        return "classifier-free guidance"
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.shape[1]:  # noqa: PLR2004 - batch, tokens
        return "no input_ids of shape (batch, tokens)"
    unknown = sorted(name for name, value in inputs.items() if value is not None and name not in _STEERING | _KEYED)
    if unknown:
        return f"argument {', '.join(unknown)}"
    if any(name in inputs for name in _KEYED) and _with_deltas(model):
        return "positions depend on images"
    return None


def forget_deltas(model: Any) -> None:
    """Let a call without images begin as ``generate`` does: deltas of positions belong to the call before it."""
    for module in _with_deltas(model):
        module.rope_deltas = None


def _with_deltas(model: Any) -> list[Any]:
    return [each for each in (model, getattr(model, "model", None)) if hasattr(each, "rope_deltas")]


def _is_activated(model: Any) -> bool:
    adapters = getattr(model, "peft_config", None)
    adapters = adapters if isinstance(adapters, Mapping) else {}
    return any(getattr(each, "alora_invocation_tokens", None) for each in adapters.values())


def not_proven(verdict: Verdict, inputs: Mapping[str, Any]) -> str | None:
    """Say why the verdict on a model rules a call out that could be served otherwise, or None where it does not."""
    if not verdict.prefix:
        return verdict.reason or "the model is not proven"
    tokens = inputs["input_ids"].shape[1]
    if verdict.limit is not None and tokens >= verdict.limit:
        return f"from {verdict.limit} tokens on a window or another rotary embedding acts, which is not proven"
    if not verdict.marked and any(name.endswith("token_type_ids") for name in keyed(inputs)):
        return "token_type_ids, within which the model attends in both directions"
    return None


def prompts_of(ids: torch.Tensor, mask: torch.Tensor | None) -> Prompts | None:
    """Return the tokens of each row; None where the mask is not zeros and then ones in each."""
    if mask is None:
        return Prompts(ids.tolist(), [0] * len(ids))
    if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    kept = mask.to(torch.int64)
    if not bool((kept[:, 1:] >= kept[:, :-1]).all()) or not bool(kept[:, -1].all()):
        return None
    pads = (ids.shape[1] - kept.sum(dim=1)).tolist()
    return Prompts([row[pad:] for row, pad in zip(ids.tolist(), pads, strict=True)], pads)


def implied_mask(ids: torch.Tensor, config: Any) -> torch.Tensor | None:
    """Return the mask that ``generate`` infers where it is given none: padding is what no mask needs to say."""
    pad, eos = config.pad_token_id, config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in ends or not bool((ids == pad).any()):
        return None
    mask: torch.Tensor = ids.ne(pad).long()
    return mask


def context_of(model: Any, cache: PrefixCache, inputs: Mapping[str, Any]) -> bytes:
    """Return what the states of a call depend on besides tokens; empty where that is the namespace alone."""
    parts: list[bytes] = []
    weights = cache.weights_context(model, stamp(model), lambda: model_fingerprint(model))
    if weights:
        parts += [b"weights", weights]
    device = model.device.type
    if torch.is_autocast_enabled(device):
        parts += [b"autocast", str(torch.get_autocast_dtype(device)).encode()]
    for name in keyed(inputs):
        parts += [name.encode(), _digest(inputs[name])]
    return fields(*parts) if parts else b""


def keyed(inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of arguments, besides tokens, that a state depends on."""
    given = {name: inputs[name] for name in sorted(_KEYED & inputs.keys()) if inputs[name] is not None}
    return [name for name, value in given.items() if not _says_nothing(name, value)]


def prefill_only(inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of arguments that a prefix takes up: images, audio."""
    return [name for name in MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL if inputs.get(name) is not None]


def has_placeholders(model: Any, tokens: list[int]) -> bool:
    """Say whether a token stands for an image or audio."""
    known = {getattr(model.config, name, None) for name in _PLACEHOLDERS} - {None}
    return not known or not known.isdisjoint(tokens)


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a tensor is what its absence means: positions that count, types that are all zero."""
    if not isinstance(value, torch.Tensor):
        return False
    if name == "position_ids":
        count = torch.arange(value.shape[-1], device=value.device)
        return bool((value == count).all())
    return name.endswith("token_type_ids") and not bool(value.any())


def _digest(value: Any) -> bytes:
    digest = blake2b(digest_size=32)
    for tensor in value if isinstance(value, list | tuple) else [value]:
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
        else:
            digest.update(repr(tensor).encode())
    return digest.digest()
