"""What the design takes for granted of the caches of transformers. A failure says that these have changed."""

import copy
from typing import Any

import pytest
import torch
from torch.utils import _pytree
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen3NextConfig, StaticCache

from agnostic_cache_adapters.transformers.release import (
    cache_of,
    forward_argument,
    generate_argument,
    generate_name,
    is_callers,
)

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=256,
)


def rows(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.rand(2, 1, 2, count, 16)
    return keys, values


def bits(*tensors: torch.Tensor) -> list[bytes]:
    return [bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) for tensor in tensors]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.mark.parametrize(
    "config", [None, MistralConfig(num_hidden_layers=1, sliding_window=6)], ids=["full", "sliding"]
)
def test_dynamic_layers_bind_new_tensors_and_never_write_the_old(config: Any) -> None:
    cache = DynamicCache(config=config)
    cache.update(*rows(), 0)
    layer: Any = cache.layers[0]
    for count in (1, 1, 4, 1):
        held = layer.keys, layer.values
        before = bits(*held)
        cache.update(*rows(count), 0)
        assert layer.keys is not held[0]
        assert layer.values is not held[1]
        assert bits(*held) == before


def test_static_layers_write_in_place() -> None:
    cache: Any = StaticCache(CONFIG, max_cache_len=16)
    cache.update(*rows(), 0)
    layer = cache.layers[0]
    keys, counter = layer.keys, layer.cumulative_length
    before = bits(keys)
    cache.update(*rows(1), 0)
    assert layer.keys is keys
    assert layer.cumulative_length is counter
    assert int(counter) == 6
    assert bits(keys) != before
    cache.reset()
    assert layer.keys is keys
    assert not keys.any()


def test_recurrent_layers_write_in_place() -> None:
    cache: Any = DynamicCache(config=Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"]))
    cache.update_conv_state(torch.zeros(1, 4, 3), 0)
    cache.update_recurrent_state(torch.zeros(1, 2, 4, 4), 0)
    layer = cache.layers[0]
    held = [next(iter(states.values())) for states in (layer.conv_states, layer.recurrent_states)]
    cache.update_conv_state(torch.ones(1, 4, 3), 0)
    cache.update_recurrent_state(torch.ones(1, 2, 4, 4), 0)
    assert all(bool(tensor.all()) for tensor in held)


def test_cropping_takes_a_count_of_what_to_remove_and_leaves_views() -> None:
    cache = DynamicCache()
    cache.update(*rows(), 0)
    layer: Any = cache.layers[0]
    where = layer.keys.data_ptr()
    with pytest.raises(ValueError):
        cache.crop(3)
    cache.crop(-2)
    assert layer.keys.shape[2] == 3
    assert layer.keys.data_ptr() == where
    assert layer.keys.untyped_storage().nbytes() == 2 * 5 * 16 * 4


def test_a_dynamic_cache_is_a_leaf_to_torch() -> None:
    assert _pytree.tree_flatten(DynamicCache())[0][0] is not None


def test_making_a_cache_of_tensors_copies_them() -> None:
    keys, values = rows()
    cache = DynamicCache([(keys, values)])
    layer: Any = cache.layers[0]
    assert layer.keys.data_ptr() != keys.data_ptr()


def test_generation_changes_the_cache_that_it_is_given_and_feeds_a_full_prompt_again(model: Any) -> None:
    prompt = torch.arange(20)[None] % 64
    with torch.no_grad():
        cache = cache_of(model(prompt, use_cache=True))
    asked = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0, "max_new_tokens": 4}
    short = copy.copy(cache)
    short.layers = [copy.copy(layer) for layer in cache.layers]
    short.crop(-1)
    model.generate(prompt, **generate_argument(model, short), **asked)
    assert short.get_seq_length() == 20 + 3
    assert cache.get_seq_length() == 20  # a copy of its containers is a fork
    model.generate(prompt, **generate_argument(model, cache), **asked)
    assert cache.get_seq_length() == 2 * 20 + 3  # silently, and the answer is wrong


def test_a_step_writes_after_the_rows_that_a_cache_has(model: Any) -> None:
    prompt = torch.arange(12)[None] % 64
    with torch.no_grad():
        wanted = model(prompt).logits[0, -1]
        cache = cache_of(model(prompt[:, :7], use_cache=True))
        found = model(prompt[:, 7:], **forward_argument(model, cache)).logits[0, -1]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_generate_marks_a_cache_that_its_caller_passed_and_none_that_it_made(model: Any) -> None:
    seen: list[Any] = []

    def look(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs[generate_name(model)])
        return input_ids

    prompt = torch.arange(5)[None]
    filled = cache_of(model(prompt[:, :3], use_cache=True))
    own = [DynamicCache(), DynamicCache(config=CONFIG), StaticCache(CONFIG, max_cache_len=16), filled]
    for passed in [None, *own, None]:
        given = {} if passed is None else generate_argument(model, passed)
        model.generate(prompt, **given, custom_generate=look, max_new_tokens=2, do_sample=False)
    assert all(found is passed for found, passed in zip(seen[1:-1], own, strict=True))
    assert list(map(is_callers, seen)) == [False, True, True, True, True, False]
