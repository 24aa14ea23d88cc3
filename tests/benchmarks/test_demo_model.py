"""Warm time to first token on a real model: a hit of `StateCache` against a fork made by hand."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import DynamicCache

from agnostic_cache import KVState, StateCache, wrap
from agnostic_cache.blob.state_blob import encode
from agnostic_cache.eviction import PutStatus
from agnostic_cache.storage.file import FileStorage
from agnostic_cache.storage.memory import MemoryStorage
from agnostic_cache.storage.tiered import TieredStorage
from agnostic_cache_adapters.transformers.release import forward_argument, generate_argument

if TYPE_CHECKING:
    from pathlib import Path

    from tests.benchmarks.conftest import Demo, Race, Report


@pytest.mark.parametrize("new", [8, 32, 128])
def test_warm_time_to_first_token(new: int, demo: Demo, race: Race, report: Report) -> None:
    model, _, tokens, state = demo
    cache = StateCache("1GiB")
    cache.put("document", state)
    prompt = torch.tensor([tokens[: 2048 + new]])

    def first_token(fork: DynamicCache | None) -> int:
        with torch.inference_mode():
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                **generate_argument(model, fork),
                max_new_tokens=1,
                do_sample=False,
            )
        return int(ids[0, -1])

    def by_hand() -> int:
        fork = copy.copy(state)
        fork.layers = [copy.copy(layer) for layer in state.layers]
        return first_token(fork)

    def by_cache() -> int:
        return first_token(cache.get("document"))

    assert by_cache() == by_hand()
    seconds = race({"ours": by_cache, "peer": by_hand}, rounds=15)
    report(f"warm first token, {new} new, against a hand-made fork", seconds["ours"], seconds["peer"], 1.05)
    assert by_cache() == by_hand()


def bf16_block(state: DynamicCache, start: int, stop: int) -> KVState:
    """Rows of a state in bf16."""
    rows = DynamicCache()
    for i, (keys, values, _) in enumerate(state):
        assert keys is not None
        assert values is not None
        rows.update(keys[:, :, start:stop].bfloat16(), values[:, :, start:stop].bfloat16(), i)
    return wrap(rows).copy()


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # it is a size that is measured
def test_compression(demo: Demo, report: Report, tmp_path: Path) -> None:
    state = demo.state
    with FileStorage(tmp_path, compress="byteplanes+zstd") as storage:
        blobs = [bytes(encode(bf16_block(state, i, i + 256))) for i in range(0, 2048, 256)]
        for i, blob in enumerate(blobs):
            assert storage.put(str(i), blob) is PutStatus.LEGAL
        packed, plain = storage.stats().current_bytes, sum(map(len, blobs))
        report("keys and values in bf16, byteplanes+zstd / plain", packed, plain, 1 / 1.4, unit="B")
        for i, blob in enumerate(blobs):
            assert bytes(storage.get(str(i)) or b"") == blob


def test_decoding_while_states_are_written(demo: Demo, race: Race, report: Report, tmp_path: Path) -> None:
    """A block of 256 tokens is put for every 32 that are decoded: eight times what a loop has to store."""
    model, _, tokens, state = demo
    parts = encode(bf16_block(state, 0, 256))
    turn = iter(range(10**9))

    def decode() -> None:
        fork = copy.copy(state)
        fork.layers = [copy.copy(layer) for layer in state.layers]
        with torch.inference_mode():
            for token in tokens[2048 : 2048 + 32]:
                model(torch.tensor([[token]]), **forward_argument(model, fork))

    def decode_and_store() -> None:
        storage.put(f"block {next(turn)}", parts)
        decode()

    with TieredStorage([MemoryStorage("256MiB"), FileStorage(tmp_path, "1GiB")]) as storage:
        seconds = race({"storing": decode_and_store, "plain": decode}, rounds=7)
        storage.flush()
        assert storage.tier_stats()[1].skipped == 0
    report("decoding with write-back to a disk / without", seconds["storing"], seconds["plain"], 1.05)
