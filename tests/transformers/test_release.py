"""Names and attributes that differ between releases are those that this release has, for every model."""

import functools
from collections.abc import Callable
from typing import Any

import hf_structures
import pytest
import torch
from hf_structures import STRUCTURES, Structure
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StaticCache,
    XLMConfig,
    XLMWithLMHeadModel,
)
from transformers.cache_utils import Cache, DynamicCache, StaticSlidingWindowLayer

from agnostic_cache import PrefixCache, wrap
from agnostic_cache.errors import CacheBypassWarning
from agnostic_cache_adapters.transformers import cached, generate, release, score

IDS = hf_structures.tokens(9)
MAMBA: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(**MAMBA))


def falcon_mamba() -> Any:
    return FalconMambaForCausalLM(FalconMambaConfig(**MAMBA))


def mamba2() -> Any:
    return Mamba2ForCausalLM(Mamba2Config(**MAMBA, num_heads=4, head_dim=16, n_groups=1))


def gpt() -> Any:
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("made", STRUCTURES)
def test_forward_and_generate_fill_a_cache_of_that_name(made: str) -> None:
    structure: Structure = STRUCTURES[made]()
    model = structure.model
    assert wrap(structure.prefill(IDS)).length == IDS.shape[1]
    given = structure.fresh()
    structure.answer(IDS, given, count=2)
    assert wrap(given).length == IDS.shape[1] + 1 + bool(structure.encoded)  # a decoder begins with a token of its own
    with torch.no_grad():
        outputs = model(
            **structure.encoded, **({"decoder_input_ids": IDS} if structure.encoded else {"input_ids": IDS})
        )
    assert isinstance(release.cache_of(outputs), Cache)


@pytest.mark.parametrize("made", [mamba, falcon_mamba, mamba2])
def test_a_recurrent_model_fills_a_cache_of_that_name(made: Callable[[], Any]) -> None:
    model = made().eval()
    for call, name in ((model, release.forward_name(model)), (model.generate, release.generate_name(model))):
        cache = DynamicCache(config=model.config)
        call(IDS, **{name: cache, **({} if call is model else {"max_new_tokens": 1})})
        assert all(layer.has_previous_state[0] for layer in cache.layers)


@pytest.mark.parametrize("made", [mamba, falcon_mamba, mamba2])
def test_a_model_that_is_recurrent_alone_goes_past_ours(made: Callable[[], Any]) -> None:
    model = made().eval()
    cache = PrefixCache("1MiB", namespace="m", block_size=4)
    expected = model.generate(IDS, max_new_tokens=3, do_sample=False)
    with pytest.warns(CacheBypassWarning):
        assert torch.equal(generate(model, cache, IDS, max_new_tokens=3, do_sample=False), expected)
    for _ in range(2):
        out = model.generate(IDS, max_new_tokens=3, do_sample=False, custom_generate=cached(cache))
        assert torch.equal(out, expected)
    with pytest.warns(CacheBypassWarning):
        score(model, cache, IDS[0].tolist(), [[3], [4, 5]])
    assert (cache.stats().bypassed, cache.stats().entries) == (4, 0)


class Wrapper(torch.nn.Module):
    """Holds a model, and hands on whatever it is given: as PEFT does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def test_a_wrapper_takes_what_its_model_takes() -> None:
    for model in (hf_structures.llama().model, mamba2()):
        wrapped = Wrapper(model)
        assert release.forward_name(wrapped) == release.forward_name(model) is not None
        assert release.generate_name(wrapped) == release.generate_name(model)


def test_outputs_without_a_cache_have_none() -> None:
    model = hf_structures.llama().model
    assert release.cache_of(model(IDS, use_cache=False)) is None
    assert release.cache_of(gpt()(IDS)) is None


def test_a_model_whose_forward_takes_no_cache_goes_past_ours() -> None:
    model = gpt().eval()
    assert release.forward_name(model) is None
    assert release.forward_argument(model, DynamicCache()) == {}
    cache = PrefixCache("1MiB", namespace="m", block_size=4)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.warns(CacheBypassWarning, match="forward"):
        found = generate(model, cache, IDS, **settings)
    assert torch.equal(found, model.generate(IDS, **settings))
    assert len(score(model, cache, IDS[0].tolist(), [[3], [4]])) == 2
    assert cache.stats().bypassed == 2


def test_a_cache_is_a_cache_by_whatever_name_xlm_takes_another_thing() -> None:
    model = XLMWithLMHeadModel(XLMConfig(vocab_size=64, emb_dim=32, n_layers=1, n_heads=4))
    assert release.forward_name(model) in {None, release.generate_name(model)}


class Former(LlamaForCausalLM):
    """A model written for another release: ``generate`` does not pass a cache by this name."""

    def forward(self, input_ids: Any = None, cache_params: Any = None, **kwargs: Any) -> Any:
        assert cache_params is None
        return super().forward(input_ids, **kwargs)


def test_a_model_that_generate_cannot_pass_a_cache_goes_past_ours() -> None:
    model = hf_structures.llama().model
    expected = model.generate(IDS, max_new_tokens=3, do_sample=False)
    model.__class__ = Former
    cache = PrefixCache("1MiB", namespace="m", block_size=4)
    with pytest.warns(CacheBypassWarning, match="forward"):
        assert torch.equal(generate(model, cache, IDS, max_new_tokens=3, do_sample=False), expected)
    assert (cache.stats().bypassed, cache.stats().entries) == (1, 0)


def test_a_layer_that_is_made_here_has_the_attributes_of_one_that_was_filled() -> None:
    for made in STRUCTURES.values():
        structure = made()
        if structure.model.config.is_encoder_decoder:
            continue
        filled = structure.prefill(IDS)
        for ours, theirs in zip(wrap(filled).copy().unwrap().layers, filled.layers, strict=True):
            assert vars(ours).keys() == vars(theirs).keys()
            assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None)


def test_a_layer_that_joined_its_blocks_has_the_attributes_of_one_that_was_filled() -> None:
    model = hf_structures.llama().model
    cache = PrefixCache("1MiB", namespace="m", block_size=4)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    expected, *found = (
        release.cache_of(call(IDS, **settings))
        for call in (model.generate, *[functools.partial(generate, model, cache)] * 2)
    )
    assert cache.stats().hit_tokens > 0
    for one in found:
        for ours, theirs in zip(one.layers, expected.layers, strict=True):
            assert (type(ours), vars(ours).keys()) == (type(theirs), vars(theirs).keys())


def test_a_static_window_remembers_whether_it_can_be_cropped() -> None:
    config = hf_structures.gemma3().model.config
    for room in (hf_structures.WINDOW, hf_structures.ROOM):  # the one never loses a row
        filled: Any = StaticCache(config=config, max_cache_len=room)
        hf_structures.gemma3().prefill(IDS[:, :5], filled)
        ours: Any = wrap(filled).copy().unwrap()
        sliding = [type(layer) for layer in ours.layers].index(StaticSlidingWindowLayer)
        theirs = filled.layers[sliding]
        assert ours.layers[sliding].is_croppable == theirs.is_croppable
        if theirs.is_croppable:
            ours.crop(-2)
            assert ours.get_seq_length() == 3
