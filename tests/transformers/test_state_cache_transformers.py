"""StateCache with Hugging Face caches: forks without a copy, and whose their memory is."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_structures import SIZES
from torch_subject import live_bytes
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from agnostic_cache import StateCache
from agnostic_cache_adapters.transformers.release import cache_of, forward_argument, generate_argument

LAYERS, TOKENS = 3, 12
SIZE = LAYERS * 2 * 2 * TOKENS * 8 * 4  # bytes of one cache
CONFIG = LlamaConfig(**{**SIZES, "num_hidden_layers": LAYERS})


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(CONFIG).eval()
    with torch.inference_mode():
        yield model


def kv(value: float = 0.0) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        keys, values = torch.full((2, 1, 2, TOKENS, 8), value)
        cache.update(keys, values, layer)
    return cache


def tensors(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def test_what_is_put_comes_back_as_the_same_type() -> None:
    cache = StateCache("1MiB")
    cache.put("a", kv(1.0))
    with cache.borrow("a") as lent:
        for state in (cache.get("a"), lent):
            assert type(state) is DynamicCache
            assert state.get_seq_length() == TOKENS
    assert type(cache.pop("a")) is DynamicCache


def test_generation_on_what_get_gives_leaves_the_entry_alone(model: Any) -> None:
    cache = StateCache("1MiB")
    ids = torch.arange(2, 2 + TOKENS)[None]
    cache.put("a", cache_of(model(ids, use_cache=True)))
    with cache.borrow("a") as lent:
        before = [tensor.clone() for tensor in tensors(lent)]
    for last in range(3, 9):
        asked = torch.cat([ids, torch.tensor([[last]])], dim=1)
        plain = model.generate(asked, max_new_tokens=4, do_sample=False)
        fork = generate_argument(model, cache.get("a"))
        reused = model.generate(asked, **fork, max_new_tokens=4, do_sample=False)
        assert torch.equal(plain, reused)
    with cache.borrow("a") as lent:
        assert all(map(torch.equal, tensors(lent), before))


def test_a_fork_shares_memory_until_it_is_let_go() -> None:
    cache = StateCache("1MiB")
    cache.put("a", kv())
    before = live_bytes()
    assert cache.stats().shared_bytes == 0
    fork, other = cache.get("a"), cache.get("a")
    assert live_bytes() == before
    assert cache.stats().shared_bytes == cache.current_bytes == SIZE  # each byte once
    del fork
    assert cache.stats().shared_bytes == SIZE
    del other
    assert cache.stats().shared_bytes == 0


def test_a_fork_keeps_what_was_evicted() -> None:
    before = live_bytes()
    cache = StateCache(SIZE)
    cache.put("a", kv(1.0))
    fork: Any = cache.get("a")
    cache.put("b", kv(2.0))
    assert not cache.contains("a")
    assert (cache.current_bytes, cache.stats().shared_bytes) == (SIZE, SIZE)
    assert live_bytes() - before == 2 * SIZE
    assert all(bool((tensor == 1).all()) for tensor in tensors(fork))
    fork.layers.pop()
    assert cache.stats().shared_bytes == SIZE * (LAYERS - 1) // LAYERS
    del fork
    assert cache.stats().shared_bytes == 0
    assert live_bytes() - before == SIZE


@pytest.mark.parametrize("evicted", [False, True])
def test_a_fork_that_has_grown_shares_nothing_any_more(model: Any, *, evicted: bool) -> None:
    cache = StateCache("1MiB")
    ids = torch.arange(2, 2 + TOKENS)[None]
    cache.put("a", cache_of(model(ids, use_cache=True)))
    fork: Any = cache.get("a")
    if evicted:
        cache.remove("a")
    assert cache.stats().shared_bytes == SIZE
    asked = torch.cat([ids, ids[:, :1]], dim=1)
    model.generate(asked, **generate_argument(model, fork), max_new_tokens=2, do_sample=False)
    assert fork.get_seq_length() > TOKENS
    assert cache.stats().shared_bytes == 0


@pytest.mark.parametrize("move", [False, True])
def test_eviction_frees_the_storages(*, move: bool) -> None:
    before = live_bytes()
    cache = StateCache(2 * SIZE)
    for key in range(5):
        cache.put(key, kv(), move=move)
        assert live_bytes() - before == cache.current_bytes == min(key + 1, 2) * SIZE
    cache.clear()
    assert live_bytes() == before
    assert cache.stats().shared_bytes == 0


def test_a_fork_may_be_moved_in_beside_its_source() -> None:
    cache = StateCache("1MiB")
    cache.put("a", kv(1.0))
    cache.put("b", cache.get("a"), move=True)
    assert cache.current_bytes == SIZE
    mine: Any = cache.pop("a")
    mine.update(*torch.zeros(2, 1, 2, 1, 8), 0)
    cache.remove("a")
    left: Any = cache.get("b")
    assert left.get_seq_length() == TOKENS
    assert all(bool((tensor == 1).all()) for tensor in tensors(left))
    assert cache.current_bytes == SIZE


def test_a_cache_that_is_written_in_place_is_copied(model: Any) -> None:
    cache = StateCache("1MiB")
    static: Any = StaticCache(config=CONFIG, max_cache_len=TOKENS + 8)
    ids = torch.arange(2, 2 + TOKENS)[None]
    model(ids, **forward_argument(model, static), use_cache=True)
    cache.put("a", static)
    one: Any = cache.get("a")
    assert type(one) is StaticCache
    assert cache.stats().shared_bytes == 0
    for tensor in tensors(one):
        tensor.zero_()
    two: Any = cache.get("a")
    assert all(map(torch.equal, tensors(two), tensors(static)))
