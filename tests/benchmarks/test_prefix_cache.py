"""PrefixCache: what a look-up, an insert and a warm start cost, each against the memory traffic that it must have."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agnostic_cache import KVLayout, PrefixCache, model_fingerprint
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.state.layout import TOKENS
from agnostic_cache_adapters.jax import resume, store
from agnostic_cache_adapters.transformers import generate
from agnostic_cache_adapters.transformers.release import generate_argument

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.conftest import Demo, Race, Report

PREFIX = 2048


@pytest.mark.parametrize(("kind", "target"), [("numpy", 2e-3), ("list", 3e-3)])
def test_match_of_131072_tokens(kind: str, target: float, race: Race, report: Report) -> None:
    tokens = np.arange(131_072) % 50_000
    layout = KVLayout({"key": TOKENS(0)})
    cache = PrefixCache("1GiB", namespace="m", layout=layout)
    cache.insert(tokens, {"key": HostArray.empty((len(tokens), 1), Dtype.FLOAT16)})
    asked: Any = tokens if kind == "numpy" else tokens.tolist()

    def match() -> int:
        with cache.match(asked) as found:
            return found.length

    assert match() == len(tokens) - 1
    seconds = race({"ours": match}, rounds=40)
    report(f"match of 131,072 tokens from a {kind}", seconds["ours"], None, target)


def test_match_of_a_new_prompt_among_many(race: Race, report: Report) -> None:
    """All begin with the same token, as a tokenizer's prompts do."""

    def match_among(count: int) -> Callable[[], int]:
        cache = PrefixCache("1GiB", namespace="m", layout=KVLayout({"key": TOKENS(0)}))
        for first in range(count):
            prompt = [1, 10 + first, *range(298)]
            cache.insert(prompt, {"key": HostArray.empty((300, 1), Dtype.FLOAT16)})

        def match() -> int:
            with cache.match([1, 9, *range(298)]) as found:
                return found.length

        assert match() == 1
        return match

    seconds = race({"ours": match_among(10_000), "peer": match_among(10)}, rounds=200)
    report("match of a new prompt among 10,000 against 10", seconds["ours"], seconds["peer"], 1.5)


@pytest.mark.parametrize("new", [8, 32, 128])
def test_warm_time_to_first_token(new: int, demo: Demo, race: Race, report: Report) -> None:
    model, _, tokens, state = demo
    cache = PrefixCache("4GiB", namespace=model_fingerprint(model))
    cache.insert(tokens[:PREFIX], state)
    prompt = torch.tensor([tokens[: PREFIX + new]])
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 1, "do_sample": False}

    @torch.inference_mode()
    def by_cache() -> int:
        # Stores nothing: else the second round would find its own prompt.
        return int(generate(model, cache, prompt, write=False, **settings)[0, -1])

    @torch.inference_mode()
    def by_hand() -> int:
        fork = copy.copy(state)
        fork.layers = [copy.copy(layer) for layer in state.layers]
        return int(model.generate(prompt, **generate_argument(model, fork), **settings)[0, -1])

    @torch.inference_mode()
    def by_recipe() -> int:
        fork = copy.deepcopy(state)
        return int(model.generate(prompt, **generate_argument(model, fork), **settings)[0, -1])

    assert by_cache() == by_hand() == by_recipe()
    assert cache.stats().hit_tokens == PREFIX
    seconds = race({"ours": by_cache, "fork": by_hand, "recipe": by_recipe}, rounds=11)
    report(f"generate, {new} new tokens, against a fork by hand", seconds["ours"], seconds["fork"], 1.05)
    report(f"generate, {new} new tokens, against copy.deepcopy", seconds["ours"], seconds["recipe"], 1.0)


def test_insert_after_a_cold_prefill(demo: Demo, race: Race, report: Report) -> None:
    _, _, tokens, state = demo
    cache = PrefixCache("4GiB", namespace="m")
    sources = [rows.numpy() for layer in state.layers for rows in (layer.keys, layer.values)]  # type: ignore[union-attr]

    def insert() -> int:
        return cache.insert(tokens[:PREFIX], state)

    def copied() -> int:
        return len([np.copy(source) for source in sources])

    assert insert() == math.ceil(PREFIX / cache.block_size)
    assert insert() == 0
    seconds = race({"ours": insert, "peer": copied}, rounds=11, before=cache.clear)
    report("insert of 94 MB, against np.copy", seconds["ours"], seconds["peer"], 1.3)
    insert()
    assert insert() == 0


def test_insert_of_what_is_stored(demo: Demo, race: Race, report: Report) -> None:
    _, _, tokens, state = demo
    cache = PrefixCache("4GiB", namespace="m")
    cache.insert(tokens[:PREFIX], state)

    def insert() -> int:
        return cache.insert(tokens[:PREFIX], state)

    assert insert() == 0
    report("insert of 2,048 tokens that are stored", race({"ours": insert}, rounds=40)["ours"], None, 1e-3)


def test_resume_into_given_buffers(race: Race, report: Report) -> None:
    def init_kv(rows: int) -> list[dict[str, jax.Array]]:
        return [{name: jnp.zeros((1, rows, 3, 64)) for name in ("key", "value")} for _ in range(30)]  # the demo model's

    cache = PrefixCache("1GiB", namespace="m", layout=KVLayout.infer(init_kv))
    tokens = list(range(PREFIX))
    state = jax.tree.map(lambda rows: rows + jnp.arange(PREFIX, dtype=rows.dtype)[:, None, None], init_kv(PREFIX))
    assert store(cache, tokens, state) == PREFIX // cache.block_size
    sources = [np.array(rows) for rows in jax.tree.leaves(state)]
    targets = [np.copy(source) for source in sources]
    given: list[Any] = []

    def make_buffers() -> None:
        given[:] = [jax.block_until_ready(init_kv(PREFIX + 256))]

    def ours() -> Any:
        return resume(cache, [*tokens, 1], given.pop())

    def peer() -> None:
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)

    make_buffers()
    kv, start = ours()
    assert start == PREFIX
    for rows, source in zip(jax.tree.leaves(kv), sources, strict=True):
        assert np.array_equal(np.asarray(rows)[:, :PREFIX], source)
    seconds = race({"ours": ours, "peer": peer}, rounds=21, before=make_buffers)
    report("resume of 94 MB into given buffers, against a warm memcpy", seconds["ours"], seconds["peer"], 1.5)


def test_what_a_fingerprint_takes(demo: Demo, race: Race, report: Report) -> None:
    model = demo.model
    name = model_fingerprint(model)
    seconds = race({"ours": lambda: model_fingerprint(model)}, rounds=11)
    report("model_fingerprint of 135M parameters", seconds["ours"], None, 50e-3)
    assert model_fingerprint(model) == name


def test_bytes_of_prompts_that_share_a_prefix(demo: Demo, race: Race, report: Report) -> None:
    _, _, tokens, state = demo
    cache = PrefixCache("4GiB", namespace="m")
    assert cache.insert(tokens[:PREFIX], state) == PREFIX // cache.block_size
    prefix = cache.stats().current_bytes
    row = prefix // PREFIX
    race({"ours": cache.stats}, rounds=1)
    for i in range(100):
        longer = copy.copy(state)
        longer.layers = [copy.copy(layer) for layer in state.layers]
        for layer in longer.layers:
            new = layer.keys[:, :, :16], layer.values[:, :, :16]  # type: ignore[union-attr, index]
            layer.update(*new)  # type: ignore[union-attr]
        cache.insert([*tokens[:PREFIX], *range(i, i + 16)], longer)
    expected = prefix + 100 * 16 * row
    assert cache.stats().current_bytes <= 1.1 * expected
    report("100 tails on one prefix, against their bytes", cache.stats().current_bytes, expected, 1.1, unit="B")


def test_a_batch_of_questions_on_one_document(demo: Demo, race: Race, report: Report) -> None:
    model, _, tokens, _ = demo
    rows = [tokens[:PREFIX] + tokens[i : i + 8 + i] for i in range(8)]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def ours() -> list[int]:
        cache = PrefixCache("4GiB", namespace="m")
        return list(generate(model, cache, ids, **settings)[:, -1].tolist())

    @torch.inference_mode()
    def peer() -> list[int]:
        return list(model.generate(ids, **settings)[:, -1].tolist())

    answers: dict[str, list[int]] = {}  # one padded batch takes a minute: none is computed for its answers alone
    contenders = {"ours": lambda: answers.update(ours=ours()), "peer": lambda: answers.update(peer=peer())}
    seconds = race(contenders, rounds=2)
    assert answers["ours"] == answers["peer"]
    report("a batch of 8 questions, nothing stored before", seconds["ours"], seconds["peer"], 1 / 5)
