"""``generate`` with a cache gives the tokens that it gives without one, whatever the model keeps."""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hf_structures
import pytest
import torch

from agnostic_cache import PrefixCache, model_fingerprint
from agnostic_cache_adapters.transformers import cached, generate, reuse
from agnostic_cache_adapters.transformers.release import cache_of, generate_argument

NEW = 3
BLOCK = 8
TOKENS = ("llama", "deepseek_v3", "deepseek_v32")
WINDOWS = ("mistral", "gemma3")
SNAPSHOTS = ("qwen3_next", "falcon_h1", "lfm2", "deepseek_v4")
DOCUMENT = hf_structures.tokens(20, seed=3)[0].tolist()


@pytest.fixture(scope="module", params=[*TOKENS, *WINDOWS, *SNAPSHOTS])
def model(request: pytest.FixtureRequest) -> Any:
    made = getattr(hf_structures, request.param)().model
    made.name_here = request.param
    return made


@pytest.fixture(scope="module")
def llama() -> Any:
    return hf_structures.llama().model


def make(model: Any, **settings: Any) -> PrefixCache:
    return PrefixCache("64MiB", namespace=model_fingerprint(model), **{"block_size": BLOCK, **settings})


def plain(model: Any, prompt: list[int], **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": NEW, "do_sample": False, **settings}
    )
    tokens: list[int] = out[0].tolist()
    return tokens


def ask(model: Any, cache: PrefixCache, prompt: list[int], **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    out = generate(model, cache, input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    tokens: list[int] = out[0].tolist()
    return tokens


def hits(cache: PrefixCache, call: Callable[[], object]) -> int:
    before = cache.stats().hit_tokens
    call()
    return cache.stats().hit_tokens - before


def test_every_length_that_is_stored_and_asked(model: Any) -> None:
    prompt = DOCUMENT[:18]
    for stored in (1, 7, 8, 9, 17, 18):
        cache = make(model)
        ask(model, cache, prompt[:stored])
        for asked in range(1, 19, 1 if stored == 18 else 4):
            assert ask(model, cache, prompt[:asked], write=False) == plain(model, prompt[:asked])
    assert cache.stats().bypassed == 0
    assert cache.stats().hit_tokens > 0


def test_the_next_process_goes_on_from_what_is_stored(model: Any, tmp_path: Path) -> None:
    # As if to compute took long: so small a model computes faster than any storage answers.
    settings: Any = {"storage": f"file://{tmp_path}/kv", "clock": lambda: time.monotonic() * 1e6}
    with make(model, **settings) as cache:
        ask(model, cache, [*DOCUMENT, 5, 6])
    for turn in range(2):
        with make(model, **settings) as cache:
            for question in ([7, 8, 9], [9, 8, 7, 6, 5, turn]):
                prompt = [*DOCUMENT, *question]
                expected = plain(model, prompt)
                before = cache.stats().hit_tokens
                assert ask(model, cache, prompt) == expected
                assert cache.stats().hit_tokens - before >= 16


def test_a_document_and_another_question_hit(model: Any) -> None:
    cache = make(model)
    chance = random.Random(0)
    for turn in range(10):
        prompt = DOCUMENT + [chance.randrange(2, 30) for _ in range(chance.randrange(1, 5))]
        assert hits(cache, partial(ask, model, cache, prompt)) >= (16 if turn else 0)
        assert ask(model, cache, prompt) == plain(model, prompt)


def test_prompts_that_part_anywhere(model: Any) -> None:
    cache = make(model)
    ask(model, cache, DOCUMENT)
    for at in range(0, 20, 3):
        other = [*DOCUMENT[:at], (DOCUMENT[at] + 1) % 28 + 2, *DOCUMENT[at + 1 :]]
        for _ in range(2):
            assert ask(model, cache, other) == plain(model, other)


def test_where_two_prompts_parted_the_third_hits(model: Any) -> None:
    cache = make(model)
    for last in range(2, 5):
        prompt = [*DOCUMENT[:9], last, *DOCUMENT[:10]]
        found = hits(cache, partial(ask, model, cache, prompt))
        assert ask(model, cache, prompt) == plain(model, prompt)
    assert found >= 8


def test_five_turns_of_a_chat(model: Any) -> None:
    cache = make(model)
    prompt = DOCUMENT[:6]
    for turn in range(5):
        before = cache.stats().hit_tokens
        answer = ask(model, cache, prompt)
        assert answer == plain(model, prompt)
        if turn:  # all but what is new: the last token of the answer, and two more
            assert cache.stats().hit_tokens == before + len(prompt) - 3
        prompt = [*answer, 2 + turn, 9]


def test_exact_runs_the_same_kernels_on_hit_and_miss(model: Any) -> None:
    cache = make(model, exact=True)
    prompt = DOCUMENT[:19]
    settings: dict[str, Any] = {
        "return_dict_in_generate": True,
        "output_logits": True,
        "max_new_tokens": 2,
        "do_sample": False,
    }
    ids = torch.tensor([prompt])
    miss = generate(model, cache, ids, **settings)
    hit = generate(model, cache, ids, **settings)
    assert cache.stats().hit_tokens == 16
    assert all(map(torch.equal, miss.logits, hit.logits))
    assert hit.sequences[0].tolist() == plain(model, prompt, max_new_tokens=2)


def test_what_comes_back_is_what_generate_gives(model: Any) -> None:
    cache = make(model)
    ids = torch.tensor([DOCUMENT])
    settings: dict[str, Any] = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "max_new_tokens": NEW,
        "do_sample": False,
    }
    expected = model.generate(ids, **settings)
    for _ in range(2):
        out = generate(model, cache, ids, **settings)
        assert type(out) is type(expected)
        assert torch.equal(out.sequences, expected.sequences)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(out.scores, expected.scores, strict=True))
        assert cache_of(out).get_seq_length() == cache_of(expected).get_seq_length()
    more = model.generate(
        torch.cat([out.sequences, ids[:, :2]], dim=1),
        **generate_argument(model, cache_of(out)),
        max_new_tokens=2,
        do_sample=False,
    )
    assert more[0].tolist() == plain(model, [*out.sequences[0].tolist(), *DOCUMENT[:2]], max_new_tokens=2)


def test_as_a_decoding_method_and_in_a_block(model: Any) -> None:
    cache = make(model)
    for seed in range(3):
        prompt = [*DOCUMENT, 3 + seed, 5]
        ids = torch.tensor([prompt])
        expected = plain(model, prompt)
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, custom_generate=cached(cache))
        assert out[0].tolist() == expected
        with reuse(model, cache):
            assert model.generate(ids, max_new_tokens=NEW, do_sample=False)[0].tolist() == expected
        assert "generate" not in vars(model)
    assert cache.stats().hit_tokens >= 16 * 5


@pytest.mark.parametrize(
    "steering",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"max_length": 30, "max_new_tokens": None},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_arguments_that_steer_decoding_reuse(model: Any, steering: dict[str, Any]) -> None:
    cache = make(model)
    ids = torch.tensor([[*DOCUMENT, 4, 5]])
    settings = {"max_new_tokens": NEW, "do_sample": False, **steering}
    ask(model, cache, [*DOCUMENT, 7, 8, 9])

    def seeded(call: Callable[..., Any]) -> list[list[int]]:
        torch.manual_seed(1)
        tokens: list[list[int]] = call(input_ids=ids, attention_mask=torch.ones_like(ids), **settings).tolist()
        return tokens

    expected = seeded(model.generate)
    for _ in range(2):
        before = cache.stats().hit_tokens
        assert seeded(lambda **given: generate(model, cache, **given)) == expected
        assert cache.stats().hit_tokens - before >= 16
        assert seeded(lambda **given: model.generate(**given, custom_generate=cached(cache))) == expected
    assert cache.stats().bypassed == 0
    assert ask(model, cache, [*DOCUMENT, 4, 5]) == plain(model, [*DOCUMENT, 4, 5])


@pytest.mark.parametrize("ragged", [False, True])
def test_a_batch_computes_what_its_rows_have_in_common_once(model: Any, *, ragged: bool) -> None:
    cache = make(model)
    questions = [[3, 4], [5, 6, 7] if ragged else [5, 6], [8] if ragged else [8, 9], [3, 4]]
    rows = [DOCUMENT[:17] + question for question in questions]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    computed = count_tokens(model)
    for turn in range(2):
        with computed as seen:
            out = generate(
                model, cache, input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
        assert torch.equal(out, expected)
        if not ragged or model.name_here in {"llama", "deepseek_v3"}:
            assert sum(seen) <= (17 * (turn == 0) + 4 * (4 + 1) + 4 * NEW)
    assert all(ask(model, cache, row) == plain(model, row) for row in rows)
    assert cache.stats().bypassed == 0


class count_tokens:  # noqa: N801 - used like a function
    """Counts the tokens that a model's forward is given."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> list[int]:
        self.seen: list[int] = []
        self.handle = self.model.get_input_embeddings().register_forward_hook(
            lambda _module, given, _out: self.seen.append(given[0].numel())
        )
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_one_padded_row(model: Any) -> None:
    cache = make(model)
    ask(model, cache, DOCUMENT)
    ids = torch.tensor([[0, 0, 0, *DOCUMENT, 4]])
    mask = (ids != 0).long()
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    assert torch.equal(generate(model, cache, ids, **settings), expected)
    del settings["attention_mask"]  # then the padding says it
    assert torch.equal(generate(model, cache, ids, **settings), expected)


def test_blocks_are_shared_until_they_are_updated(llama: Any) -> None:
    cache = make(llama)
    ask(llama, cache, DOCUMENT)
    with cache.match(DOCUMENT) as match:
        kv: Any = match.load(like=hf_structures.llama().fresh())
    before = cache.stats().current_bytes
    assert kv.get_seq_length() == 19
    assert type(kv.layers[0]).__name__ == "BlockLayer"
    keys = kv.layers[0].keys
    assert type(kv.layers[0]).__name__ == "DynamicLayer"
    assert keys.shape[2] == 19
    kv.layers[0].keys.zero_()
    assert ask(llama, cache, DOCUMENT) == plain(llama, DOCUMENT)
    assert cache.stats().current_bytes == before


def test_read_write_and_checkpoints(model: Any) -> None:
    cache = make(model)
    ask(model, cache, DOCUMENT, write=False)
    assert cache.stats().entries == 0
    ask(model, cache, DOCUMENT, checkpoints=[5, 11])
    assert hits(cache, lambda: ask(model, cache, DOCUMENT, read=False)) == 0
    if model.name_here in SNAPSHOTS and model.name_here != "deepseek_v4":
        assert hits(cache, lambda: ask(model, cache, [*DOCUMENT[:11], 3, 4])) == 11
        assert hits(cache, lambda: ask(model, cache, [*DOCUMENT[:6], 3, 4])) == 5
    assert ask(model, cache, [*DOCUMENT[:11], 5]) == plain(model, [*DOCUMENT[:11], 5])
