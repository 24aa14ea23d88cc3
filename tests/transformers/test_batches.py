"""Batches that were padded on the left: what is kept of each row begins at its first true token."""

import itertools
from typing import Any

import pytest
import torch
from hf_structures import STRUCTURES, WINDOW, Structure, tokens
from transformers import DynamicCache, StaticCache

from agnostic_cache import KVState, StateCache, wrap
from agnostic_cache.errors import LengthMismatchError, StructureMismatchError
from agnostic_cache_adapters.transformers.release import generate_argument

LENGTHS = [5, 12, 9, 1]
LONGEST = max(LENGTHS)
PROMPTS = [tokens(count, seed) for seed, count in enumerate(LENGTHS)]
ASKED = tokens(3, seed=9)
KINDS = [
    "llama",
    "llama_static",
    "mistral",
    "mistral_recorded",
    "gemma3",
    "gemma3_static",
    "qwen3_next",
    "falcon_h1",
    "lfm2",
    "deepseek_v3",
    "deepseek_v32",
]


@pytest.fixture(scope="module", params=KINDS)
def structure(request: pytest.FixtureRequest) -> Structure:
    return STRUCTURES[request.param]()


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the left; return tokens and attention mask, shape (batch, tokens)."""
    longest = max(row.shape[1] for row in rows)
    blanks = [row.new_zeros(1, longest - row.shape[1]) for row in rows]
    ids = torch.cat([torch.cat(pair, dim=1) for pair in zip(blanks, rows, strict=True)])
    masks = [torch.cat([blank, torch.ones_like(row)], dim=1) for blank, row in zip(blanks, rows, strict=True)]
    return ids, torch.cat(masks)


@torch.no_grad()
def prefill(structure: Structure, rows: list[torch.Tensor], count: int = 1) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Let ``generate`` fill a cache with padded rows; return it with what it answered and its attention mask."""
    ids, mask = padded(rows)
    cache = structure.fresh()
    given = generate_argument(structure.model, cache)
    out = structure.model.generate(ids, attention_mask=mask, **given, max_new_tokens=count, do_sample=False)
    return cache, out[:, ids.shape[1] :], mask


def test_rows_are_kept_at_their_true_lengths(structure: Structure) -> None:
    cache, _, mask = prefill(structure, PROMPTS)
    kept = StateCache("1MiB")
    for i, row in enumerate(wrap(cache).split_batch(mask.sum(1).tolist())):
        assert row.length == LENGTHS[i]
        kept.put(i, row.unwrap(), move=True)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.cat([prompt, ASKED], dim=1)
        native = kept.get(i)
        assert native is not None
        assert int(native.get_seq_length()) == LENGTHS[i]
        assert structure.answer(ids, native) == structure.answer(ids)


def test_rows_that_have_answered(structure: Structure) -> None:
    cache, answers, mask = prefill(structure, PROMPTS, count=5)
    rows = wrap(cache).split_batch([int(count) + 4 for count in mask.sum(1)])  # the last token is not computed yet
    for prompt, answer, row in zip(PROMPTS, answers, rows, strict=True):
        ids = torch.cat([prompt, answer[None], ASKED], dim=1)
        assert structure.answer(ids, row.unwrap()) == structure.answer(ids)


def test_rows_are_stacked_into_a_padded_batch(structure: Structure) -> None:
    rows = [wrap(structure.prefill(prompt)) for prompt in PROMPTS]
    stacked = KVState.stack(rows, length=LONGEST)
    assert stacked.length == LONGEST
    ids, mask = padded([torch.cat([prompt, ASKED], dim=1) for prompt in PROMPTS])
    with torch.no_grad():
        given = generate_argument(structure.model, stacked.unwrap())
        out = structure.model.generate(ids, attention_mask=mask, **given, max_new_tokens=4, do_sample=False)
    for prompt, found in zip(PROMPTS, out[:, ids.shape[1] :].tolist(), strict=True):
        assert found == structure.answer(torch.cat([prompt, ASKED], dim=1))


def test_a_batch_comes_apart_and_together(structure: Structure) -> None:
    ids = torch.cat([tokens(LONGEST, seed) for seed in range(3)])
    whole = wrap(structure.prefill(ids)).copy()
    rows = whole.split_batch()
    assert [row.length for row in rows] == [LONGEST] * 3
    before = {name: leaf.array.clone() for name, leaf in whole.leaves.items()}
    again = KVState.stack([KVState.stack(rows[:2]), rows[2]])
    assert again.length == whole.length
    assert wrap(again.unwrap()).leaves.keys() == whole.leaves.keys()
    for i, row in enumerate(rows):
        asked = torch.cat([ids[i : i + 1], ASKED], dim=1)
        assert structure.answer(asked, row.unwrap()) == structure.answer(asked)
    assert all(torch.equal(leaf.array, before[name]) for name, leaf in whole.leaves.items())


def test_short_rows_pad_a_window() -> None:
    structure = STRUCTURES["mistral"]()
    rows = [wrap(structure.prefill(tokens(count, count))) for count in (2, 3)]
    for length in (3, WINDOW, 12):
        keys = KVState.stack(rows, length=length).leaves["layers.0.key"]
        assert keys.array.shape[2] == min(length, WINDOW - 1)
        assert keys.first + keys.array.shape[2] == length


def test_lengths_that_differ_need_a_word() -> None:
    structure = STRUCTURES["llama"]()
    rows = [wrap(structure.prefill(prompt)) for prompt in PROMPTS]
    for length in (None, LONGEST - 1):
        with pytest.raises(LengthMismatchError):
            KVState.stack(rows, length=length)
    with pytest.raises(StructureMismatchError):
        KVState.stack([])
    state = wrap(structure.prefill(torch.cat([tokens(6), tokens(6, 1)])))
    for lengths in ([6], [6, 7], [-1, 6], [6, 6, 6]):
        with pytest.raises(LengthMismatchError):
            state.split_batch(lengths)


@pytest.mark.parametrize("name", ["llama_fp8", "llama_own_layer", "minimax"])
def test_what_nobody_knows_has_no_rows(name: str) -> None:
    structure = STRUCTURES[name]()
    state = wrap(structure.prefill(torch.cat([tokens(6), tokens(6, 1)])))
    with pytest.raises(StructureMismatchError):
        state.split_batch()
    with pytest.raises(StructureMismatchError):
        KVState.stack([state, state])


def test_rows_of_several_tokens_split_where_nothing_is_padded() -> None:
    structure = STRUCTURES["deepseek_v4"]()
    ids = torch.cat([tokens(13), tokens(13, 1)])
    state = wrap(structure.prefill(ids))
    for i, row in enumerate(state.split_batch([13, 13])):
        asked = torch.cat([ids[i : i + 1], ASKED], dim=1)
        assert structure.answer(asked, row.unwrap()) == structure.answer(asked)
    with pytest.raises(StructureMismatchError):
        state.split_batch([13, 9])
    with pytest.raises(StructureMismatchError):
        KVState.stack([state], length=16)


def test_an_encoder_decoder_keeps_the_encoders_rows() -> None:
    structure = STRUCTURES["t5"]()
    one = wrap(structure.prefill(tokens(7)))
    both = KVState.stack([one, wrap(structure.prefill(tokens(7, 1)))])
    assert {leaf.array.shape[0] for leaf in both.leaves.values()} == {2}
    for row, seed in zip(both.split_batch(), itertools.count(), strict=False):
        ids = torch.cat([tokens(7, seed), ASKED], dim=1)
        assert structure.answer(ids, row.unwrap()) == structure.answer(ids)


def test_static_and_dynamic_rows_do_not_mix() -> None:
    structure = STRUCTURES["llama"]()
    static: Any = StaticCache(config=structure.model.config, max_cache_len=20)
    rows = [wrap(structure.prefill(tokens(6), cache)) for cache in (static, DynamicCache())]
    with pytest.raises(StructureMismatchError):
        KVState.stack(rows)
