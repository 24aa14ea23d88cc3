"""PrefixCache over a storage: what left, what another process stored, and what is damaged or too slow."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import LAYOUTS, WIDTH, contents, state_of

from agnostic_cache import PrefixCache, open_storage, wrap
from agnostic_cache.blob.pieces import Blob
from agnostic_cache.blob.state_blob import encode
from agnostic_cache.errors import StorageError, StorageURLError
from agnostic_cache.prefix.block_store import SNAPSHOT_KEY
from agnostic_cache.storage.file import FileStorage
from agnostic_cache.storage.guard import GuardedStorage
from agnostic_cache.storage.memory import MemoryStorage
from agnostic_cache.storage.tiered import TieredStorage

BLOCK = 8
KINDS = list(LAYOUTS)
DOCUMENT = list(range(100, 130))  # three blocks and six tokens


def make(storage: Any, kind: str = "tokens", max_bytes: int | str = "1MiB", **settings: Any) -> PrefixCache:
    """Make a cache whose clock stands still: nobody is seen to compute, so that all that is there is worth loading."""
    settings.setdefault("clock", lambda: 1.0)
    return PrefixCache(max_bytes, namespace="toy", block_size=BLOCK, layout=LAYOUTS[kind], storage=storage, **settings)


def hit(cache: PrefixCache, tokens: Sequence[int], kind: str = "tokens") -> int:
    """Match, check that what is loaded is what computing it would give, and return its length."""
    with cache.match(tokens) as match:
        length = match.length
        if match:
            assert contents(match.load(), kind) == contents(state_of(list(tokens[:length]), kind), kind)
    return length


def insert(cache: PrefixCache, tokens: Sequence[int], kind: str = "tokens", **settings: Any) -> int:
    """Insert as the verbs do: at the last boundary of blocks too, with all rows of a window."""
    boundary = len(tokens) // BLOCK * BLOCK
    made = 0
    for end in sorted({boundary, len(tokens)} - {0}):
        made += cache.insert(tokens[:end], state_of(list(tokens[:end]), kind, rows=99), **settings)
    return made


class Counted(MemoryStorage):
    """Counts its puts."""

    def __init__(self) -> None:
        super().__init__("1MiB")
        self.taken: list[str] = []

    def put(self, key: str, blob: Blob) -> Any:
        self.taken.append(key)
        return super().put(key, blob)


@settings(max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([1, 300, 2500]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 40), st.integers(0, 2)), max_size=10),
)
def test_no_wrong_hit_and_no_block_lost_after_any_prompts(
    kind: str, max_bytes: int, steps: list[tuple[int, int, int, int]]
) -> None:
    with make("memory://", kind, max_bytes) as cache:
        prompts: list[list[int]] = [DOCUMENT]
        for source, keep, more, salt in steps:
            prompt = prompts[source % len(prompts)][:keep] + [200 + salt + i for i in range(more)]
            prompts.append(prompt)
            hit(cache, prompt, kind)
            cache.insert(prompt, state_of(prompt, kind, rows=WIDTH + 3 * salt))
            assert cache.stats().current_bytes <= max_bytes
            for known in prompts:
                hit(cache, known, kind)
        if kind == "tokens":
            assert all(hit(cache, [*known, 1]) >= len(known) // BLOCK * BLOCK for known in prompts[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_what_leaves_memory_is_found_below(kind: str) -> None:
    with make("memory://", kind, max_bytes=24 * 24) as cache:
        insert(cache, DOCUMENT, kind)
        for other in range(4):
            insert(cache, [other] * 24, kind)
        assert cache.stats().evictions
        assert hit(cache, [*DOCUMENT[:24], 1], kind) == 24
        assert all(hit(cache, [other] * 25, kind) == 24 for other in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_process_begins_where_the_last_one_ended(kind: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/kv"
    with make(url, kind) as cache:
        insert(cache, DOCUMENT, kind)
    with make(url, kind) as cache:
        assert cache.stats().entries == 0
        assert hit(cache, DOCUMENT, kind) == 24  # a part of a block has no name that others could ask for
        assert hit(cache, [*DOCUMENT[:20], 1], kind) == (0 if kind in {"snapshot", "all"} else 16)
        insert(cache, DOCUMENT, kind)  # as a verb does when it has computed the rest
        assert hit(cache, [*DOCUMENT, 1], kind) == 30


def test_nothing_is_lost_or_there_twice_where_several_threads_match_and_insert() -> None:
    wrong: list[BaseException] = []
    with make("memory://", max_bytes=500) as cache:

        def work(seed: int) -> None:
            try:
                for step in range(60):
                    prompt = [*DOCUMENT[: 8 * (step % 3)], *([seed + step % 5] * 17)]
                    hit(cache, prompt)
                    insert(cache, prompt)
                    assert hit(cache, [*prompt, 1]) >= len(prompt) // BLOCK * BLOCK
            except BaseException as error:  # noqa: BLE001 - the thread that looks raises it
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert cache.stats().current_bytes <= 500


def test_a_prompt_larger_than_memory_is_found_whole() -> None:
    with make("memory://", max_bytes=100) as cache:
        assert insert(cache, list(range(80))) == 10
        assert hit(cache, range(81)) == 80
        assert cache.stats().current_bytes <= 100


def test_what_is_there_already_is_not_written_again() -> None:
    storage = Counted()
    with make(storage, max_bytes=100) as cache:
        for _ in range(3):
            hit(cache, [*DOCUMENT, 1])
            insert(cache, DOCUMENT)
        assert len(storage.taken) == len(set(storage.taken)) == 3


def test_rows_of_a_window_that_are_stored_are_not_hidden_by_fewer() -> None:
    storage = MemoryStorage("1MiB")
    cache = make(storage, "window")
    insert(cache, DOCUMENT[:24], "window")
    cache.clear()
    assert hit(cache, [*DOCUMENT, 1], "window") == 24
    cache.insert(DOCUMENT, state_of(DOCUMENT, "window"))  # the last six rows, as after a loop that went on
    assert hit(cache, [*DOCUMENT, 1], "window") == 30
    assert hit(cache, [*DOCUMENT[:16], 1], "window") == 16
    cache.clear()
    assert hit(cache, [*DOCUMENT, 1], "window") == 24


def test_the_first_tier_is_memory_so_that_nobody_waits_for_a_disk(tmp_path: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Stalled(FileStorage):
        def put(self, key: str, blob: Blob) -> Any:
            began.set()
            assert go_on.wait(30)
            return super().put(key, blob)

    cache = make(Stalled(tmp_path / "kv"))
    insert(cache, DOCUMENT)
    assert began.wait(30)
    cache.clear()
    assert hit(cache, DOCUMENT) == 24  # what waits can be read
    assert [tier.storage.entries for tier in cache.tier_stats()] == [3, 0]
    go_on.set()
    cache.flush()
    assert [tier.storage.entries for tier in cache.tier_stats()] == [3, 3]
    cache.close()


def test_several_urls_are_tiers_and_a_hit_comes_up(tmp_path: Path) -> None:
    urls = ["memory://?max_bytes=1MiB", f"file://{tmp_path}/kv"]
    with make(urls) as cache:
        insert(cache, DOCUMENT)
    with make(urls) as cache:
        cache.prefetch(DOCUMENT)
        cache.flush()
        assert [tier.storage.entries for tier in cache.tier_stats()] == [3, 3]
        assert hit(cache, DOCUMENT) == 24
        assert cache.tier_stats()[0].hits == 3


def test_blocks_with_an_end_stay_in_memory() -> None:
    now = 0.0
    with make("memory://", ttl_seconds=10, clock=lambda: now) as cache:
        insert(cache, DOCUMENT)
        assert hit(cache, DOCUMENT) == 29
        now = 11.0
        assert hit(cache, DOCUMENT) == 0
        insert(cache, DOCUMENT, ttl_seconds=float("inf"))
        now = 1e9
        assert hit(cache, DOCUMENT) == 29


@pytest.mark.parametrize("damage", ["other tokens", "no blob", "another block", "too few rows"])
def test_what_is_not_the_block_of_its_name_is_a_miss_and_goes(damage: str) -> None:
    storage = MemoryStorage("1MiB")
    cache = make(storage)
    insert(cache, DOCUMENT)
    first, second, third = storage.list_keys()
    found = storage.get(second)
    assert found is not None
    raw = bytes(found)
    other = storage.get(third)
    assert other is not None
    tokens = DOCUMENT[BLOCK : 2 * BLOCK]
    damaged: dict[str, Blob] = {
        "other tokens": raw.replace(bytes([108, 0, 0, 0]), bytes([7, 0, 0, 0])),
        "no blob": b"x" * 99,
        "another block": bytes(other),
        "too few rows": encode(wrap(state_of(tokens[:-1]), layout=LAYOUTS["tokens"]), tokens=tokens),
    }
    storage.put(second, damaged[damage])
    cache.clear()
    assert hit(cache, DOCUMENT) == 8
    assert cache.stats().mismatches == 1
    assert storage.list_keys() == [first, third]
    insert(cache, DOCUMENT)
    cache.clear()
    assert hit(cache, DOCUMENT) == 24


def test_only_what_is_faster_than_computing_is_loaded() -> None:
    now = 0.0

    class Slow(MemoryStorage):
        seconds = 1.0

        def get(self, key: str) -> memoryview | None:
            nonlocal now
            now += self.seconds
            return super().get(key)

    slow = Slow("1MiB")
    tiers = TieredStorage([MemoryStorage(4096 * 2), slow], clock=lambda: now)
    cache = make(tiers, clock=lambda: now)
    long = list(range(200, 248))  # six blocks, of which the memory keeps two

    def ask(seconds_per_token: float) -> int:
        nonlocal now
        cache.clear()
        with cache.match([*long, 1]) as match:
            length = match.length
        cache.flush()  # what is measured in the background is not to see the clock move
        now += seconds_per_token * (49 - length)
        cache.insert([*long, 1], state_of([*long, 1]))
        cache.flush()
        return length

    assert ask(0.01) == 0  # nothing there; a token takes 10 ms
    assert ask(0.01) <= 16  # a block from below takes a second, to compute it 80 ms
    slow.seconds = 0.001
    lengths = [ask(0.01) for _ in range(40)]
    assert lengths[-1] == 48  # it is measured again in the background
    cache.close()


def test_a_state_that_was_there_already_says_nothing_of_computing(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/kv"
    prompts = [[i, *DOCUMENT] for i in range(20)]
    with make(url) as cache:
        for prompt in prompts:
            insert(cache, prompt)
    with make(url) as cache:
        for prompt in prompts:
            assert hit(cache, [1000 + prompt[0], *prompt]) == 0
            insert(cache, [1000 + prompt[0], *prompt])  # at once: slower to load than that, but nothing was computed
            assert hit(cache, prompt) == 24


def test_a_strict_storage_that_fails_in_the_middle_of_a_match_leaves_nothing_borrowed() -> None:
    class Broken(MemoryStorage):
        def get(self, key: str) -> memoryview | None:
            if "snapshot" in key:
                msg = "broken"
                raise StorageError(msg)
            return super().get(key)

    cache = make(Broken("1MiB"), "snapshot")
    cache.insert(DOCUMENT[:BLOCK], state_of(DOCUMENT[:BLOCK], "snapshot"))
    (block,) = cache._blocks._index  # noqa: SLF001
    cache._blocks.states.remove(block.key + SNAPSHOT_KEY)  # noqa: SLF001 - what an eviction does
    with pytest.raises(StorageError, match="broken") as error:
        cache.match(DOCUMENT)
    cache.clear()
    assert cache.stats().current_bytes == 0, error


def test_a_storage_that_fails_is_a_miss_unless_it_is_strict() -> None:
    class Broken(MemoryStorage):
        def get(self, key: str) -> memoryview | None:
            msg = f"broken: {key[:4]}"
            raise StorageError(msg)

        def put(self, key: str, blob: Blob) -> Any:  # noqa: ARG002
            msg = f"broken: {key[:4]}"
            raise StorageError(msg)

    guarded = make(GuardedStorage(Broken("1MiB"), name="broken"))
    insert(guarded, DOCUMENT)
    assert hit(guarded, DOCUMENT) == 29
    guarded.clear()
    assert hit(guarded, DOCUMENT) == 0
    strict = make(Broken("1MiB"))
    with pytest.raises(StorageError, match="broken"):
        insert(strict, DOCUMENT)
    assert strict.stats().current_bytes == strict.stats().entries * 64


def test_a_closed_cache_goes_on_in_memory() -> None:
    storage = MemoryStorage("1MiB")
    cache = make(storage)
    insert(cache, DOCUMENT)
    cache.close()
    cache.close()
    with pytest.raises(StorageError, match="closed"):
        storage.list_keys()
    assert cache.tier_stats() == []
    assert cache.stats().entries == hit(cache, DOCUMENT) == 0
    insert(cache, DOCUMENT)
    assert hit(cache, DOCUMENT) == 29
    cache.flush()


def test_a_forked_child_finds_what_is_stored(tmp_path: Path) -> None:
    with make(f"file://{tmp_path}/kv") as cache:
        insert(cache, DOCUMENT)
        cache.flush()
        child = os.fork()
        if not child:
            code = 1
            try:
                code = 0 if cache.stats().entries == 0 and hit(cache, DOCUMENT) == 24 else 1
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0


def test_a_storage_that_does_not_work_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(StorageURLError, match="nowhere"):
        make("nowhere://")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        make(f"file://{tmp_path}/file/kv")
    with open_storage("memory://") as storage, make(storage) as cache:
        insert(cache, DOCUMENT)
        assert len(storage.list_keys()) == 3
