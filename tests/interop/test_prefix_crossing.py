"""A prefix that one framework stored is resumed by the other, under one explicit namespace."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agnostic_cache import KVLayout, PrefixCache
from agnostic_cache_adapters.jax import resume, store
from agnostic_cache_adapters.transformers import generate

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NEW, ROOM = 6, 64
DOCUMENT = list(range(3, 40))


@pytest.fixture(scope="module")
def llama_jax() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import llama_jax  # noqa: PLC0415 - an example, found by its path
    finally:
        sys.path.remove(str(EXAMPLES))
    return llama_jax


class Loop:
    """The same weights in JAX, with a cache of its own buffers."""

    def __init__(self, llama_jax: Any, model: Any, cache: PrefixCache) -> None:
        self.module, self.cache = llama_jax, cache
        config = SimpleNamespace(
            layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, rope_theta=10000.0, norm_eps=model.config.rms_norm_eps
        )
        arrays = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        self.params = llama_jax.init_params((config, arrays))
        self.init_kv = partial(llama_jax.init_kv, config)
        names = {"{i}.key": "layers.{i}.key", "{i}.value": "layers.{i}.value"}
        self.layout = KVLayout.infer(self.init_kv, names=names, rotary="half")

    def answer(self, tokens: list[int]) -> tuple[list[int], int]:
        kv, start = resume(self.cache, tokens, self.init_kv(ROOM), layout=self.layout)
        logits, kv = self.module.prefill(self.params, tokens[start:], kv, start)
        store(self.cache, tokens, kv, layout=self.layout)
        return self.module.decode(self.params, logits, kv, len(tokens), NEW, -1)[0], start


def plain(model: Any, tokens: list[int]) -> list[int]:
    out = model.generate(torch.tensor([tokens]), max_new_tokens=NEW, do_sample=False)
    return list(out[0, len(tokens) :].tolist())


def ask(model: Any, cache: PrefixCache, tokens: list[int]) -> list[int]:
    out = generate(model, cache, torch.tensor([tokens]), max_new_tokens=NEW, do_sample=False)
    return list(out[0, len(tokens) :].tolist())


@pytest.mark.parametrize("first", ["torch", "jax"])
def test_each_goes_on_from_what_the_other_stored(first: str, llama_jax: Any, model: Any) -> None:
    cache = PrefixCache("16MiB", namespace="llama, by its name", block_size=8)
    loop = Loop(llama_jax, model, cache)
    if first == "torch":
        ask(model, cache, DOCUMENT)
    else:
        loop.answer(DOCUMENT)
    for turn in range(4):  # blocks of both follow one another
        for question in ([50 + turn, 51], [60, 61 + turn % 2, 7]):
            tokens = DOCUMENT + question * (turn + 1)
            answer, start = loop.answer(tokens)
            assert start >= len(DOCUMENT)
            assert answer == plain(model, tokens)
            tokens = [*tokens, *answer, 9]
            before = cache.stats().hit_tokens
            assert ask(model, cache, tokens) == plain(model, tokens)
            assert cache.stats().hit_tokens - before >= len(DOCUMENT)
    assert cache.stats().bypassed == 0
