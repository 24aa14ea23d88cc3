"""No line of ours makes transformers warn of a name that it gives up: neither by a warning, nor in its log.

It warns of an argument's former name, and says once a process, in its log alone, that an output has another name now.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hf_structures
import pytest
import torch
from hf_structures import STRUCTURES
from transformers.utils import logging

from agnostic_cache import PrefixCache, wrap
from agnostic_cache_adapters.transformers import cached, generate, reuse, score
from agnostic_cache_adapters.transformers.release import cache_of, forward_argument

DOCUMENT = hf_structures.tokens(20, seed=3)
QUESTIONS = [torch.cat([DOCUMENT, hf_structures.tokens(3, seed=seed)], dim=1) for seed in (4, 5, 4)]
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
LOG: Any = logging.get_logger("transformers")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers' loggers say, whatever has been said once before."""
    said: list[str] = []

    def say(_self: Any, message: object, *_args: Any, **_settings: Any) -> None:
        said.append(str(message))

    for name in ("warning", "warning_once", "warning_advice"):
        monkeypatch.setattr(type(LOG), name, say)
    return said


@pytest.fixture(autouse=True)
def silence(log: list[str]) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert [message for message in log if "deprecat" in message] == []


def by_generate(model: Any, cache: PrefixCache) -> None:
    for ids in QUESTIONS:
        generate(model, cache, ids, **SETTINGS)
    batch = torch.cat(QUESTIONS)
    generate(model, cache, batch, **SETTINGS)
    generate(model, cache, batch[:1], **SETTINGS, num_beams=2)


def by_cached(model: Any, cache: PrefixCache) -> None:
    for ids in QUESTIONS:
        model.generate(ids, **SETTINGS, custom_generate=cached(cache))


def by_reuse(model: Any, cache: PrefixCache) -> None:
    with reuse(model, cache):
        for ids in QUESTIONS:
            model.generate(ids, **SETTINGS)


def by_score(model: Any, cache: PrefixCache) -> None:
    for _ in range(2):
        score(model, cache, DOCUMENT[0].tolist(), [[4], [5, 6], [7, 8, 9]])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("structure", ["llama", "gemma3", "qwen3_next", "falcon_h1", "deepseek_v4"])
@pytest.mark.parametrize("verb", [by_generate, by_cached, by_reuse, by_score])
def test_a_verb_is_silent(verb: Callable[..., None], structure: str, *, exact: bool) -> None:
    cache = PrefixCache("64MiB", namespace="m", block_size=8, exact=exact)
    verb(STRUCTURES[structure]().model, cache)
    assert cache.stats().hit_tokens > 0
    assert cache.stats().bypassed == 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_cache_is_wrapped_and_unwrapped_silently(structure: str) -> None:
    made = STRUCTURES[structure]()
    state = wrap(made.prefill(DOCUMENT))
    made.answer(QUESTIONS[0], state.unwrap())


def test_a_former_name_is_told(log: list[str]) -> None:
    """These tests hear what they listen for, where a release has a former name to warn of."""
    model = hf_structures.llama().model
    out = model(DOCUMENT, use_cache=True)
    assert cache_of(out).get_seq_length() == DOCUMENT.shape[1]
    assert log == []
    if "cache" not in forward_argument(model, None):
        return
    out.past_key_values  # noqa: B018 - is a property that warns
    assert any("deprecat" in message for message in log)
    log.clear()
    for call, settings in ((model, {}), (model.generate, SETTINGS)):
        held = cache_of(model(DOCUMENT[:, :3], use_cache=True))
        with pytest.warns(FutureWarning):
            call(DOCUMENT, past_key_values=held, **settings)
