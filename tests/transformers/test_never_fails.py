"""What works without a cache works with one: with reuse where that is right, else past the cache, by a reason."""

import logging
from collections.abc import Callable
from typing import Any

import architectures
import hf_structures
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from agnostic_cache import PrefixCache
from agnostic_cache.errors import CacheBypassWarning
from agnostic_cache_adapters.transformers import cached, generate, prefill, reuse, score
from agnostic_cache_adapters.transformers.release import cache_of

PROMPT = [*range(40, 65)]
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 4,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**hf_structures.SIZES, "vocab_size": 128})).eval()


def make(**settings: Any) -> PrefixCache:
    return PrefixCache("8MiB", namespace="m", block_size=8, **settings)


def inputs(*rows: list[int], **more: Any) -> dict[str, Any]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), **SETTINGS, **more}


def same(got: Any, wanted: Any) -> None:
    """Check that two answers have the same tokens and logits."""
    assert torch.equal(got.sequences, wanted.sequences)
    for one, other in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- models and wrappers of every kind -----------------------------------------------------------------------------

REUSED = ["bamba", "roberta", "xlm-roberta", "qwen3_next", "gemma3_text", "llama", "falcon_h1"]
BYPASSED = ["mamba", "mamba2", "falcon_mamba", "openai-gpt", "xlm", "cpmant", "rwkv", "minimax"]
CALLS = [[PROMPT], [[*PROMPT[:20], 90, 91, 92]], [PROMPT, [*PROMPT[:18], 99]], [PROMPT[::-1], PROMPT], [PROMPT]]


def check(model: Any, cache: PrefixCache) -> None:
    plain = [model.generate(**inputs(*rows)) for rows in CALLS]
    for rows, wanted in zip(CALLS, plain, strict=True):
        same(generate(model, cache, **inputs(*rows)), wanted)
        if len(rows) == 1:
            same(model.generate(**inputs(*rows), custom_generate=cached(cache)), wanted)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("model_type", REUSED)
def test_models_that_are_reused(model_type: str, *, exact: bool) -> None:
    cache = make(exact=exact)
    check(architectures.tiny(model_type, "causal"), cache)
    assert cache.stats().hit_tokens > 0
    assert cache.stats().bypassed == 0


@pytest.mark.filterwarnings("ignore::agnostic_cache.errors.CacheBypassWarning")
@pytest.mark.parametrize("model_type", BYPASSED)
def test_models_that_are_bypassed(model_type: str) -> None:
    cache = make()
    check(architectures.tiny(model_type, "causal"), cache)
    assert cache.stats().hit_tokens == 0
    assert cache.stats().bypassed == 2 * len(CALLS) - 2


@pytest.mark.parametrize("model_type", ["llama", "mistral", "roberta", "bamba"])
def test_scores_have_the_positions_of_generate(model_type: str) -> None:
    model = architectures.tiny(model_type, "causal")
    answers = [[70], [71, 72], [73, 74, 75]]
    for _ in range(2):
        for answer, found in zip(answers, score(model, cache := make(), PROMPT, answers), strict=True):
            wanted = 0.0
            for i, token in enumerate(answer):
                logits = model.generate(**inputs(PROMPT + answer[:i])).logits[0][0]
                wanted += float(logits.log_softmax(-1)[token])
            assert found == pytest.approx(wanted, abs=1e-4)
        assert cache.stats().bypassed == 0


class Handed(torch.nn.Module):
    """A wrapper that hands ``generate`` on and nothing else."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def generate(self, *args: Any, **given: Any) -> Any:
        return self.inner.generate(*args, **given)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def with_nothing_in_a_place(model: Any) -> Any:
    model.tower = torch.nn.Linear(2, 2)
    model.tower = None
    return model


def named(model: Any) -> Any:
    model.generation_config.cache_implementation = "dynamic"
    return model


@pytest.mark.parametrize("wrap", [compiled, Handed, with_nothing_in_a_place])
def test_models_in_wrappers(model: Any, wrap: Callable[[Any], Any]) -> None:
    wanted = model.generate(**inputs(PROMPT))
    wrapped, cache = wrap(model), make()
    for _ in range(2):
        same(generate(wrapped, cache, **inputs(PROMPT)), wanted)
        with reuse(wrapped, cache), reuse(wrapped, cache):
            same(wrapped.generate(**inputs(PROMPT)), wanted)
    assert cache.stats().hit_tokens == 3 * (len(PROMPT) - 1)
    assert "generate" not in vars(model)
    assert "generate" not in vars(wrapped)


def test_a_cache_implementation_that_is_ours(model: Any) -> None:
    wanted, cache = model.generate(**inputs(PROMPT)), make()
    for _ in range(2):
        same(generate(model, cache, **inputs(PROMPT, cache_implementation="dynamic")), wanted)
    assert cache.stats().hit_tokens == len(PROMPT) - 1
    with pytest.warns(CacheBypassWarning):
        same(generate(named(model), cache, **inputs(PROMPT)), wanted)


def test_a_config_by_position(model: Any) -> None:
    config = GenerationConfig(**SETTINGS)
    ids, cache = torch.tensor([PROMPT]), make()
    wanted = model.generate(ids, config)
    with reuse(model, cache):
        for _ in range(2):
            same(model.generate(ids, config), wanted)
    assert cache.stats().hit_tokens == len(PROMPT) - 1


# --- what belongs to the call before -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v"])
@pytest.mark.filterwarnings("ignore::agnostic_cache.errors.CacheBypassWarning")
def test_positions_of_the_call_before(model_type: str) -> None:
    model = architectures.tiny(model_type, "image-text")
    calls = [inputs(PROMPT), inputs([*PROMPT[:20], 90, 91]), inputs(PROMPT[::-1], PROMPT, PROMPT), inputs(PROMPT)]
    image = architectures.image(model)
    assert image is not None
    calls.insert(1, {**inputs(image[0]), **image[1]})
    plain = [model.generate(**given) for given in calls]
    cache = make()
    for given, wanted in zip(calls, plain, strict=True):
        same(generate(model, cache, **given), wanted)
    assert cache.stats().hit_tokens > 0


def test_an_adapter_that_tokens_activate(model: Any) -> None:
    model.peft_config = {"one": type("Config", (), {"alora_invocation_tokens": [5]})()}
    cache = make()
    with pytest.warns(CacheBypassWarning, match="aLoRA"):
        same(generate(model, cache, **inputs(PROMPT)), model.generate(**inputs(PROMPT)))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2", "qwen3_moe", "granitemoe"])
def test_training_mode_in_which_nothing_acts(model_type: str) -> None:
    model = architectures.tiny(model_type, "causal")
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, value in vars(model.config).items():
        if "drop" in name or name.endswith("pdrop"):
            setattr(model.config, name, 0.0 if isinstance(value, float) else value)
    wanted, cache = model.eval().generate(**inputs(PROMPT)), make()
    model.train()
    for _ in range(2):
        same(generate(model, cache, **inputs(PROMPT)), wanted)
    assert cache.stats().hit_tokens == len(PROMPT) - 1
    assert model.training


@pytest.mark.parametrize("act", ["dropout", "attention", "checkpoints"])
def test_training_mode_in_which_something_acts(model: Any, act: str) -> None:
    if act == "dropout":
        model.model.layers[1].mlp.act_fn = torch.nn.Dropout(0.1)
    elif act == "attention":
        model.model.layers[1].self_attn.attention_dropout = 0.1
    else:
        model.model.layers[1].gradient_checkpointing = True
        model.model.layers[1].__dict__["_gradient_checkpointing_func"] = lambda call, *given: call(*given)
    model.train()
    cache = make()
    with pytest.warns(CacheBypassWarning, match="training"):
        generate(model, cache, **inputs(PROMPT))


# --- errors of ours ------------------------------------------------------------------------------------------------


class BrokenError(Exception):
    """Of ours."""


def broken(error: BaseException) -> Callable[..., Any]:
    def fail(*_args: Any, **_given: Any) -> Any:
        torch.rand(3)
        raise error

    return fail


PLACES = ["match", "insert"]


@pytest.mark.parametrize("error", [BrokenError("x"), torch.OutOfMemoryError("x"), AssertionError("x")], ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_an_error_of_ours_is_a_bypass(
    model: Any, place: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make(strict=False)
    monkeypatch.setattr(cache, place, broken(error))
    ran: list[int] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    settings = {**inputs(PROMPT), "do_sample": True}
    torch.manual_seed(3)
    wanted = model.generate(**settings)
    ran.clear()
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING), pytest.warns(CacheBypassWarning, match=type(error).__name__) as heard:
        same(generate(model, cache, **settings), wanted)
    assert len(heard) == 1
    assert len(ran) == SETTINGS["max_new_tokens"]  # once, and not twice
    assert cache.stats().bypassed == 1
    assert any(record.exc_info for record in caplog.records if record.name == "agnostic_cache.transformers")
    torch.manual_seed(3)
    same(generate(model, cache, **settings), wanted)  # no second warning
    torch.manual_seed(3)
    same(model.generate(**settings, custom_generate=cached(cache)), wanted)
    assert cache.stats().bypassed == 3


@pytest.mark.parametrize("place", PLACES)
def test_a_strict_cache_raises_it(model: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(strict=True)
    monkeypatch.setattr(cache, place, broken(BrokenError("x")))
    with pytest.raises(BrokenError):
        generate(model, cache, **inputs(PROMPT))
    assert cache.stats().bypassed == 0


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_is_never_caught(model: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(strict=False)
    monkeypatch.setattr(cache, place, broken(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        generate(model, cache, **inputs(PROMPT))


def test_what_was_loaded_is_freed_before_the_call(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(strict=False)
    generate(model, cache, **inputs(PROMPT))
    held: list[Any] = []
    state_of = prefill.state_of

    def loads_and_fails(*args: Any, **given: Any) -> Any:
        kv = state_of(*args, **given)
        keys = kv.layers[0].keys
        reductions: Any = torch.multiprocessing.reductions
        held.append(reductions.StorageWeakRef(keys.untyped_storage()))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(prefill, "state_of", loads_and_fails)
    freed: list[bool] = []
    model.register_forward_pre_hook(lambda *_: freed.append(held[0].expired()))
    with pytest.warns(CacheBypassWarning):
        generate(model, cache, **inputs([*PROMPT, 90]))
    assert freed[0]


def test_an_error_of_the_model_comes_through(model: Any) -> None:
    cache = make(strict=False)
    ran: list[int] = []

    def fail(*_: Any) -> None:
        ran.append(1)
        raise BrokenError

    model.register_forward_pre_hook(fail)
    with pytest.raises(BrokenError):
        generate(model, cache, **inputs(PROMPT))
    assert len(ran) == 1
    assert cache.stats().bypassed == 0


def test_scores_are_computed_without_us(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = score(model, make(), PROMPT, [[70], [71, 72]])
    cache = make(strict=False)
    monkeypatch.setattr(cache, "match", broken(BrokenError("x")))
    with pytest.warns(CacheBypassWarning, match="Broken"):
        assert score(model, cache, PROMPT, [[70], [71, 72]]) == pytest.approx(wanted, abs=1e-5)


def test_what_comes_back_is_what_the_model_gives(model: Any) -> None:
    cache = make()
    for _ in range(2):
        assert cache_of(generate(model, cache, **inputs(PROMPT))).get_seq_length() == len(PROMPT) + 3
