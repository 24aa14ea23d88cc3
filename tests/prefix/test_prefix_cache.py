"""PrefixCache: what it finds of a prompt, that it is right, and what it keeps."""

import copy
import os
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import LAYOUTS, WIDTH, contents, state_of

from agnostic_cache import PrefixCache, wrap
from agnostic_cache.errors import (
    CacheBypassWarning,
    CacheCopyError,
    InvalidNamespaceError,
    InvalidSizeError,
    InvalidTokensError,
    LengthMismatchError,
    ReleasedError,
    UnsupportedArrayError,
)
from agnostic_cache.prefix.index import Index

BLOCK = 8
KINDS = list(LAYOUTS)
DOCUMENT = list(range(100, 130))  # 30 tokens: three blocks and six more


def make(kind: str = "tokens", max_bytes: int | str = "1MiB", **settings: Any) -> PrefixCache:
    return PrefixCache(max_bytes, namespace="toy", block_size=BLOCK, layout=LAYOUTS[kind], **settings)


def hit(cache: PrefixCache, tokens: list[int], kind: str = "tokens", **settings: Any) -> int:
    """Match, check that what is loaded is what computing it would give, and return its length."""
    with cache.match(tokens, **settings) as match:
        length = match.length
        assert bool(match) == (length > 0)
        if match:
            loaded = match.load()
            expected = state_of(tokens[:length], kind)
            assert contents(loaded, kind) == contents(expected, kind)
    return length


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", range(1, 31))
def test_the_longest_usable_prefix_is_found_and_right(kind: str, stored: int) -> None:
    cache = make(kind)
    cache.insert(DOCUMENT[:stored], state_of(DOCUMENT[:stored], kind, rows=99))
    for length in range(1, 31):
        common = min(stored, length - 1)
        ends = [end for end in (*range(BLOCK, stored + 1, BLOCK), stored) if end <= common]
        if kind in {"snapshot", "all"}:
            ends = [stored] if stored <= common else []
        expected = common if kind == "tokens" else max(ends, default=0)
        assert hit(cache, DOCUMENT[:length], kind) == expected


@pytest.mark.parametrize("at", range(30))
def test_a_prompt_that_diverges_anywhere_hits_up_to_there(at: int) -> None:
    cache = make()
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    assert hit(cache, [*DOCUMENT[:at], 7, *DOCUMENT[at + 1 :], 8]) == at


@settings(max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 40), st.integers(0, 2)), max_size=12),
)
def test_no_wrong_hit_after_any_prompts(kind: str, steps: list[tuple[int, int, int, int]]) -> None:
    cache = make(kind, max_bytes=2500)  # some must leave
    prompts: list[list[int]] = [DOCUMENT]
    for source, keep, more, salt in steps:
        prompt = prompts[source % len(prompts)][:keep] + [200 + salt + i for i in range(more)]
        prompts.append(prompt)
        hit(cache, prompt, kind)
        cache.insert(prompt, state_of(prompt, kind, rows=WIDTH + 3 * salt))
        assert cache.stats().current_bytes <= 2500
        for known in prompts:
            hit(cache, known, kind)


def test_what_prompts_share_is_stored_once() -> None:
    cache = make()
    for tail in range(10):
        prompt = [*DOCUMENT[:24], 500 + tail, 600, 601]
        assert cache.insert(prompt, state_of(prompt)) == (4 if tail == 0 else 1)
        assert cache.insert(prompt, state_of(prompt)) == 0
    assert cache.stats().inserted_tokens == 24 + 10 * 3
    assert cache.stats().entries == 3 + 10
    assert all(hit(cache, [*DOCUMENT[:24], 500 + tail, 600, 601, 1]) == 27 for tail in range(10))


def test_a_tail_that_is_a_prefix_of_what_comes_goes() -> None:
    cache = make()
    for length in (10, 12, 15, 16, 19):
        cache.insert(DOCUMENT[:length], state_of(DOCUMENT[:length]))
        assert cache.stats().entries == -(-length // BLOCK)
    assert cache.insert(DOCUMENT[:13], state_of(DOCUMENT[:13])) == 0  # in the second block
    assert hit(cache, DOCUMENT) == 19


def test_tails_that_hold_a_snapshot_stay() -> None:
    cache = make("snapshot")
    for length in (10, 12, 15):
        cache.insert(DOCUMENT[:length], state_of(DOCUMENT[:length], "snapshot"))
    assert [hit(cache, DOCUMENT[:length], "snapshot") for length in (11, 12, 13, 16, 30)] == [10, 10, 12, 15, 15]


def test_a_snapshot_at_a_boundary_comes_to_rows_that_are_there() -> None:
    cache = make("snapshot")
    cache.insert(DOCUMENT, state_of(DOCUMENT, "snapshot"))
    branch = [*DOCUMENT[:20], 1, 2, 3]
    assert hit(cache, branch, "snapshot") == 0
    assert cache.insert(DOCUMENT[:16], state_of(DOCUMENT[:16], "snapshot")) == 0  # no rows, but a snapshot
    assert hit(cache, branch, "snapshot") == 16


def test_rows_of_a_window_that_were_not_there_are_added() -> None:
    cache = make("window")
    cache.insert(DOCUMENT, state_of(DOCUMENT, "window"))  # the last six rows
    assert [hit(cache, DOCUMENT[:n], "window") for n in (17, 25, 30)] == [0, 0, 0]
    assert hit(cache, [*DOCUMENT, 1], "window") == 30
    cache.insert(DOCUMENT[:16], state_of(DOCUMENT[:16], "window"))
    assert [hit(cache, DOCUMENT[:n], "window") for n in (17, 25, 30)] == [16, 16, 16]
    assert hit(cache, [*DOCUMENT, 1], "window") == 30


def test_the_last_token_is_never_covered() -> None:
    cache = make()
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    assert hit(cache, DOCUMENT) == 29
    assert hit(cache, [*DOCUMENT, 5]) == 30
    assert hit(cache, DOCUMENT[:16]) == 15
    assert hit(cache, DOCUMENT[:1]) == hit(cache, []) == 0


def test_exact_matches_whole_blocks_only() -> None:
    cache = make(exact=True)
    assert cache.insert(DOCUMENT, state_of(DOCUMENT)) == 3
    assert [hit(cache, DOCUMENT[:n]) for n in (8, 9, 16, 17, 24, 25, 30)] == [0, 8, 8, 16, 16, 24, 24]


@pytest.mark.parametrize("separated", ["salt", "namespace", "context"])
def test_tenants_never_meet(separated: str) -> None:
    caches = [
        PrefixCache(
            "1MiB",
            namespace="toy" if separated != "namespace" else name,
            salt=name.encode() if separated == "salt" else b"",
            block_size=BLOCK,
            layout=LAYOUTS["tokens"],
        )
        for name in ("a", "b")
    ]
    contexts = [b"a", b"b"] if separated == "context" else [b"", b""]
    shared = caches[0]
    shared.insert(DOCUMENT, state_of(DOCUMENT), context=contexts[0])
    # One store for both: what one tenant wrote must not be found under the other's keys.
    caches[1]._blocks = shared._blocks  # noqa: SLF001
    assert hit(caches[0], DOCUMENT, context=contexts[0]) == 29
    assert hit(caches[1], DOCUMENT, context=contexts[1]) == 0


def test_other_tokens_under_the_right_key_are_a_miss_and_go() -> None:
    cache = make()
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    second = next(block for block in cache._blocks._index if block.length == BLOCK and block.tokens[0] == 108)  # noqa: SLF001
    second.tokens = second.tokens[:-1] + b"\7"
    assert hit(cache, DOCUMENT) == 8
    assert cache.stats().mismatches == 1
    assert hit(cache, DOCUMENT) == 8
    assert cache.stats().mismatches == 1
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    assert hit(cache, DOCUMENT) == 29


def test_a_block_that_comes_in_while_it_is_looked_for_is_no_mismatch() -> None:
    class Behind(Index):
        __slots__ = ()

        def child(self, parent: bytes, tokens: bytes) -> None:  # noqa: ARG002
            return None

    cache = make()
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    cache._blocks._index.__class__ = Behind  # noqa: SLF001
    hit(cache, DOCUMENT)
    cache._blocks._index.__class__ = Index  # noqa: SLF001
    assert cache.stats().mismatches == 0
    assert hit(cache, DOCUMENT) == 29


def test_a_state_of_another_length_is_refused_and_nothing_stored() -> None:
    cache = make()
    for length, given_length in ((5, None), (35, 31), (30, -1), (20, 25)):
        state = wrap(state_of((DOCUMENT * 2)[:length]), layout=LAYOUTS["tokens"])
        with pytest.raises(LengthMismatchError):
            cache.insert(DOCUMENT, state, length=given_length)
    with pytest.raises(LengthMismatchError):
        cache.insert(DOCUMENT, state_of(DOCUMENT[:20]))
    assert cache.stats().entries == cache.stats().inserted_tokens == 0


def test_length_says_how_much_is_the_prompt() -> None:
    cache = make("snapshot")
    cache.insert(DOCUMENT, state_of(DOCUMENT[:20], "snapshot"), length=20)  # tokens go on, the state does not
    assert hit(cache, DOCUMENT, "snapshot") == 20
    cache = make("tokens")
    cache.insert(DOCUMENT[:20], state_of(DOCUMENT, room=6), length=20)  # buffers have room for more
    assert hit(cache, DOCUMENT) == 20
    state = wrap(state_of(DOCUMENT), layout=LAYOUTS["tokens"])
    cache = make("tokens")
    cache.insert(DOCUMENT, state, length=11)
    assert hit(cache, DOCUMENT) == 11


def test_a_snapshot_of_another_length_is_not_kept() -> None:
    cache = make("snapshot")
    state = wrap(state_of(DOCUMENT, "snapshot"), layout=LAYOUTS["snapshot"])
    cache.insert(DOCUMENT, state, length=16)
    assert hit(cache, DOCUMENT, "snapshot") == 0


def test_what_is_loaded_is_private() -> None:
    cache = make("all")
    cache.insert(DOCUMENT, state_of(DOCUMENT, "all"))
    for _ in range(3):
        with cache.match([*DOCUMENT, 1]) as match:
            loaded = match.load()
        assert contents(loaded, "all") == contents(state_of(DOCUMENT, "all"), "all")
        for held in loaded.values():
            held.memory[:] = bytes(held.nbytes)


def test_a_template_is_filled_from_every_block() -> None:
    cache = make("window")
    cache.insert(DOCUMENT, state_of(DOCUMENT, "window", rows=99))
    like = {"key": state_of([0] * 40)["key"], "window": state_of([0] * WIDTH)["key"]}
    with cache.match([*DOCUMENT[:24], 9, 9]) as match:
        filled = match.load(like=like)
    assert filled["key"] is like["key"]
    expected = state_of(DOCUMENT[:24], "window")
    assert bytes(filled["key"].memory[: 24 * 8]) == bytes(expected["key"].memory)
    assert bytes(filled["key"].memory[24 * 8 :]) == bytes(state_of([0] * 40)["key"].memory[24 * 8 :])
    assert bytes(filled["window"].memory) == bytes(expected["window"].memory)


def test_a_match_is_used_once() -> None:
    cache = make()
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    with cache.match(DOCUMENT) as match:
        state = match.load(to="host")
        assert state.length == match.length == 29
        with pytest.raises(ReleasedError):
            match.load()
    with cache.match([1, 2]) as match:
        assert match.load() is None
        assert match.load(like="template") == "template"


def test_a_match_borrows_its_blocks() -> None:
    size = len(DOCUMENT[:24]) * 8
    small = make(max_bytes=3 * BLOCK * 8)
    small.insert(DOCUMENT[:24], state_of(DOCUMENT[:24]))
    other = list(range(24))
    with small.match(DOCUMENT) as match:
        assert small.insert(other, state_of(other)) == 0  # nothing can leave
        assert contents(match.load(), "tokens") == contents(state_of(DOCUMENT[:24]), "tokens")
    assert small.insert(other, state_of(other)) == 3
    assert small.stats().current_bytes == size
    assert small.stats().evictions == 3


def test_parents_outlive_children() -> None:
    cache = make(max_bytes=4 * BLOCK * 8)
    cache.insert(DOCUMENT[:24], state_of(DOCUMENT[:24]))
    other = [1, 2, 3, 4, 5, 6, 7, 8]
    cache.insert(other, state_of(other))
    cache.insert(other[::-1], state_of(other[::-1]))
    assert hit(cache, DOCUMENT) == 16
    cache.insert([9] * 8, state_of([9] * 8))  # the oldest is now `other`
    assert hit(cache, [*other, 1]) == 0
    assert hit(cache, DOCUMENT) == 16


def test_a_prompt_larger_than_the_budget_keeps_its_beginning() -> None:
    cache = make(max_bytes=2 * BLOCK * 8)
    assert cache.insert(DOCUMENT, state_of(DOCUMENT)) == 2
    assert hit(cache, DOCUMENT) == 16


def test_pinned_prompts_stay() -> None:
    cache = make(max_bytes=4 * BLOCK * 8)
    cache.insert(DOCUMENT[:16], state_of(DOCUMENT[:16]))
    assert cache.pin(DOCUMENT) == 16
    for i in range(5):
        cache.insert([i] * 8, state_of([i] * 8))
        cache.insert([50 + i] * 8, state_of([50 + i] * 8))
    assert hit(cache, DOCUMENT) == 16
    assert cache.unpin(DOCUMENT) == 16
    for i in range(5):
        cache.insert([i] * 8, state_of([i] * 8))
    assert hit(cache, DOCUMENT) == 0


def test_warm_makes_prompts_the_newest() -> None:
    cache = make(max_bytes=2 * BLOCK * 8)
    cache.insert([1] * 8, state_of([1] * 8))
    cache.insert([2] * 8, state_of([2] * 8))
    assert cache.warm([[1] * 8]) == 8
    cache.insert([3] * 8, state_of([3] * 8))
    assert [hit(cache, [i] * 9) for i in (1, 2, 3)] == [8, 0, 8]


def test_an_orphan_is_found_again_with_its_parent() -> None:
    cache = make()
    cache.insert(DOCUMENT[:24], state_of(DOCUMENT[:24]))
    first = next(block for block in cache._blocks._index if block.tokens[0] == 100)  # noqa: SLF001
    cache._blocks.remove(first)  # noqa: SLF001 - what an eviction does
    assert hit(cache, DOCUMENT) == 0
    assert cache.insert(DOCUMENT[:24], state_of(DOCUMENT[:24])) == 1
    assert hit(cache, DOCUMENT) == 24


def test_what_has_expired_is_gone() -> None:
    now = 0.0
    cache = make(ttl_seconds=10, clock=lambda: now)
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    now = 9.0
    assert hit(cache, DOCUMENT) == 29
    cache.insert(DOCUMENT[:8], state_of(DOCUMENT[:8]), ttl_seconds=100)  # prolongs the first block
    now = 11.0
    assert hit(cache, DOCUMENT) == 8
    now = 200.0
    assert hit(cache, DOCUMENT) == 0
    assert cache.stats().entries == 2  # the third block and the tail hang on a block that left


def test_read_and_write_can_be_declined_per_call() -> None:
    cache = make()
    assert cache.insert(DOCUMENT, state_of(DOCUMENT), write=False) == 0
    assert cache.stats().entries == 0
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    assert hit(cache, DOCUMENT, read=False) == 0
    assert hit(cache, DOCUMENT) == 29


def test_stats_count_tokens_and_never_change() -> None:
    events: list[str] = []
    cache = make(trace=lambda event, _: events.append(event))
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    hit(cache, DOCUMENT)
    hit(cache, [1, 2, 3])
    before = cache.stats()
    assert (before.lookup_tokens, before.hit_tokens, before.inserted_tokens, before.entries) == (33, 29, 30, 4)
    assert before.current_bytes == 30 * 8 + 2 * 8  # the tail is padded to 64 bytes
    with pytest.warns(CacheBypassWarning):
        cache.bypass("a reason")
    cache.bypass("a reason")
    cache.clear()
    assert cache.stats().bypassed == 2
    assert cache.stats().entries == cache.stats().current_bytes == 0
    assert before.entries == 4
    assert hit(cache, DOCUMENT) == 0
    assert {"prefix_cache.match", "prefix_cache.insert", "state_cache.put", "state_cache.release"} <= set(events)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"namespace": ""}, InvalidNamespaceError),
        ({"namespace": b"x"}, InvalidNamespaceError),
        ({"salt": "x"}, InvalidNamespaceError),
        ({"block_size": 0}, InvalidSizeError),
        ({"max_bytes": "x"}, InvalidSizeError),
    ],
)
def test_what_no_cache_can_be_made_of(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        PrefixCache(**{"max_bytes": 1000, "namespace": "toy", **wrong})
    with pytest.raises(TypeError):
        PrefixCache("1MiB")  # type: ignore[call-arg]


def test_bad_input_leaves_the_cache_as_it_was() -> None:
    cache = make()
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    before = cache.stats()
    calls: list[tuple[Any, type[Exception]]] = [
        (lambda: cache.match([-1]), InvalidTokensError),
        (lambda: cache.match([1], context="x"), InvalidNamespaceError),  # type: ignore[arg-type]
        (lambda: cache.insert([1.5], state_of([1])), InvalidTokensError),
        (lambda: cache.insert([1], {"key": 5}), TypeError),
        (lambda: cache.pin("x"), InvalidTokensError),
    ]
    for call, error in calls:
        with pytest.raises(error):
            call()
    assert cache.stats() == before
    assert not issubclass(UnsupportedArrayError, InvalidTokensError)


def test_a_cache_is_neither_copied_nor_pickled() -> None:
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(CacheCopyError):
            attempt(make())


def test_a_forked_child_finds_it_empty_and_usable() -> None:
    cache = make()
    cache.insert(DOCUMENT, state_of(DOCUMENT))
    child = os.fork()
    if child == 0:
        ok = hit(cache, DOCUMENT) == 0 and cache.insert(DOCUMENT, state_of(DOCUMENT)) == 4
        os._exit(0 if ok and hit(cache, DOCUMENT) == 29 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert hit(cache, DOCUMENT) == 29
