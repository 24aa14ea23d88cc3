"""A caller's own KV cache goes to plain ``generate`` and past the prefix cache, empty or filled, through every door."""

import copy
from collections.abc import Callable
from typing import Any

import hf_structures
import pytest
import torch
from hf_structures import STRUCTURES
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedCache

from agnostic_cache import PrefixCache
from agnostic_cache.errors import CacheBypassWarning
from agnostic_cache_adapters.transformers import cached, generate, reuse, score
from agnostic_cache_adapters.transformers.release import CACHE_NAMES, cache_of, forward_argument, generate_name

DOCUMENT = hf_structures.tokens(20, seed=3)
PROMPT = torch.cat([DOCUMENT, hf_structures.tokens(3, seed=4)], dim=1)
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 4,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "disable_compile": True,
}


def through_generate(model: Any, cache: PrefixCache, /, **given: Any) -> Any:
    return generate(model, cache, PROMPT, **SETTINGS, **given)


def through_reuse(model: Any, cache: PrefixCache, /, **given: Any) -> Any:
    with reuse(model, cache):
        return model.generate(PROMPT, **SETTINGS, **given)


def through_cached(model: Any, cache: PrefixCache, /, **given: Any) -> Any:
    return model.generate(PROMPT, **SETTINGS, **given, custom_generate=cached(cache))


Door = Callable[..., Any]
DOORS = pytest.mark.parametrize("door", [through_generate, through_reuse, through_cached])
OWN: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "bare": lambda _: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=48),
    "quantised": lambda config: QuantizedCache("fp8", config=config),
}


def names(model: Any) -> list[str]:
    """Return the names by which ``generate`` of this release takes a cache; of the former ones it warns."""
    name = generate_name(model)
    return list(CACHE_NAMES) if name == CACHE_NAMES[0] else [name]


def primed(model: Any) -> PrefixCache:
    cache = PrefixCache("64MiB", namespace="m", block_size=8)
    generate(model, cache, DOCUMENT, max_new_tokens=1, do_sample=False)
    return cache


def same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.logits, expected.logits))


@DOORS
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("kind", OWN)
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # the caller's own words
def test_it_is_filled_as_generate_fills_it(door: Door, kind: str, *, filled: bool) -> None:
    model = hf_structures.llama().model
    for name in names(model):
        theirs, mine = (OWN[kind](model.config) for _ in range(2))
        if filled:
            with torch.no_grad():
                for own in (theirs, mine):
                    model(PROMPT[:, :7], **forward_argument(model, own))
        expected = model.generate(PROMPT, **SETTINGS, **{name: theirs})
        cache = primed(model)
        before = cache.stats()
        with pytest.warns(CacheBypassWarning, match="of the caller"):
            found = door(model, cache, **{name: mine})
        same(found, expected)
        assert cache_of(found) is mine
        assert mine.get_seq_length() == theirs.get_seq_length() == PROMPT.shape[1] + 3
        for one, other in zip(mine.layers, theirs.layers, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)
        after = cache.stats()
        assert (after.bypassed, after.entries) == (before.bypassed + 1, before.entries)
        assert after.hit_tokens == before.hit_tokens


@DOORS
@pytest.mark.parametrize("structure", ["gemma3", "qwen3_next", "falcon_h1"])
def test_states_that_cannot_be_cut_are_filled_too(door: Door, structure: str) -> None:
    made = STRUCTURES[structure]()
    model, theirs, mine = made.model, made.fresh(), made.fresh()
    name = generate_name(model)
    expected = model.generate(PROMPT, **SETTINGS, **{name: theirs})
    with pytest.warns(CacheBypassWarning, match=f"{name} of the caller"):
        same(door(model, primed(model), **{name: mine}), expected)
    further = hf_structures.tokens(5, seed=6)
    with torch.no_grad():
        one, other = (model(further, **forward_argument(model, own)).logits for own in (mine, theirs))
    assert torch.equal(one, other)


@DOORS
def test_a_cache_that_generate_makes_itself_is_no_callers(door: Door) -> None:
    model = hf_structures.llama().model
    cache = primed(model)
    expected = model.generate(PROMPT, **SETTINGS)
    for _ in range(2):
        before = cache.stats().hit_tokens
        found = door(model, cache)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(found.logits, expected.logits, strict=True))
        assert cache.stats().hit_tokens > before
    door(model, cache, **{generate_name(model): None})  # says nothing
    assert cache.stats().bypassed == 0


@DOORS
def test_what_a_call_returned_is_the_callers_in_the_next(door: Door) -> None:
    model = hf_structures.llama().model
    cache = primed(model)
    own = cache_of(door(model, cache))
    own.crop(8 - own.get_seq_length())
    name = generate_name(model)
    expected = model.generate(PROMPT, **SETTINGS, **{name: copy.deepcopy(own)})
    with pytest.warns(CacheBypassWarning, match=f"{name} of the caller"):
        same(door(model, cache, **{name: own}), expected)


@DOORS
@pytest.mark.filterwarnings("ignore::agnostic_cache.errors.CacheBypassWarning")
def test_a_name_that_this_release_does_not_have_is_refused_as_by_generate(door: Door) -> None:
    model = hf_structures.llama().model
    cache = primed(model)
    for name in set(CACHE_NAMES) - set(names(model)):
        with pytest.raises(ValueError, match=name):
            model.generate(PROMPT, **SETTINGS, **{name: DynamicCache()})
        with pytest.raises(ValueError, match=name):
            door(model, cache, **{name: DynamicCache()})


def test_ours_are_given_by_position_only() -> None:
    model = hf_structures.llama().model
    cache = primed(model)
    context, continuations = DOCUMENT[0].tolist(), [[3, 4]]
    for call in (
        lambda: generate(model=model, cache=cache, inputs=PROMPT),  # type: ignore[call-arg]
        lambda: cached(cache=cache),  # type: ignore[call-arg]
        lambda: score(model=model, cache=cache, context=context, continuations=continuations),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError), reuse(model=model, cache=cache):  # type: ignore[call-arg]
        pass
    assert score(model, cache, context=context, continuations=continuations)
