"""The law of prefix reuse: a loop that resumes from what others stored answers as if it had computed everything."""

import random
import time
from collections.abc import Sequence
from typing import Any

from reuse_law import NEW, ROOM, Loop, prompt

from agnostic_cache import PrefixCache
from agnostic_cache_adapters.jax import resume, store


def answer(loop: Loop, cache: PrefixCache, tokens: Sequence[int]) -> tuple[list[int], int]:
    """Continue greedily from the longest known prefix, store the prompt; return the answer and where it began."""
    kv, start = resume(cache, tokens, loop.fresh(), layout=loop.layout)
    token, kv = loop.extend(kv, tokens[start:], start)
    store(cache, tokens, kv, layout=loop.layout)
    return [token, *loop.generate(kv, [token], len(tokens))[: NEW - 1]], start


class PrefixLaw:
    """What holds of every structure whose layout is known; a test class inherits it and says which loop."""

    longest = 11

    def empty(self) -> PrefixCache:
        return PrefixCache("16MiB", namespace="tiny", block_size=4)

    def test_every_length_that_is_stored_and_asked(self, loop: Loop) -> None:
        tokens = prompt(self.longest)
        expected = {asked: loop.cold(tokens[:asked]) for asked in range(1, self.longest + 1)}
        for stored in range(1, self.longest + 1):
            cache = self.empty()
            answer(loop, cache, tokens[:stored])
            for asked in range(1, self.longest + 1, 1 if stored in {4, 6} else 5):
                # A part alone would be hit by longer prompts that follow.
                kv, start = resume(cache, tokens[:asked], loop.fresh(), layout=loop.layout)
                assert isinstance(start, int)
                common = min(stored, asked - 1)
                assert start == (common if loop.cuts else stored if stored == common else 0)
                assert loop.generate(kv, tokens[start:asked], start) == expected[asked]

    def test_prompts_that_part_anywhere(self, loop: Loop) -> None:
        cache = self.empty()
        tokens = prompt(self.longest, 1)
        answer(loop, cache, tokens)
        for at in range(self.longest):
            other = [*tokens[:at], (tokens[at] + 1) % 32, *tokens[at + 1 :]]
            found, start = answer(loop, cache, other)
            assert found == loop.cold(other)
            assert start == at or not loop.cuts

    def test_ten_reuses_of_one_prefix(self, loop: Loop) -> None:
        cache = self.empty()
        document = prompt(8, 2)
        answer(loop, cache, document)
        for seed in range(10):
            tokens = document + prompt(3, 10 + seed)
            assert answer(loop, cache, tokens)[0] == loop.cold(tokens)
        assert cache.stats().hit_tokens >= 80

    def test_five_turns_of_a_chat(self, loop: Loop) -> None:
        cache = self.empty()
        tokens: list[int] = prompt(2, 3)
        for turn in range(5):
            found, start = answer(loop, cache, tokens)
            assert found == loop.cold(tokens)
            assert start == max(0, len(tokens) - 2) or turn == 0
            tokens = [*tokens, found[0], turn]

    def test_a_prefix_that_leaves_no_room_is_shortened(self, loop: Loop) -> None:
        cache = self.empty()
        tokens = prompt(ROOM, 4)
        kv = loop.extend(loop.fresh(), tokens, 0)[1]
        store(cache, tokens, kv, layout=loop.layout)
        _, start = resume(cache, [*tokens, 1, 2, 3], loop.fresh(), layout=loop.layout)
        assert start == (ROOM - 1 if loop.cuts else 0)

    def test_any_prompts_under_a_small_budget(self, loop: Loop) -> None:
        chance = random.Random(0)
        cache = PrefixCache(6000, namespace="tiny", block_size=4)
        for _ in range(15):
            tokens = prompt(chance.randrange(1, 8), 5)[: chance.randrange(1, 8)] + prompt(chance.randrange(1, 4), 6)
            assert answer(loop, cache, tokens)[0] == loop.cold(tokens)
            assert cache.stats().current_bytes <= 6000

    def test_what_leaves_memory_comes_back_from_a_storage(self, loop: Loop) -> None:
        # As if to compute took long: so small a model computes faster than any storage answers.
        settings: Any = {"storage": "memory://", "clock": lambda: time.monotonic() * 1e6}
        with PrefixCache(1, namespace="tiny", block_size=4, **settings) as cache:
            document = prompt(8, 7)
            for seed in range(3):
                tokens = document + prompt(3, 20 + seed)
                kv, start = resume(cache, tokens, loop.fresh(), layout=loop.layout)
                assert start == (8 if seed else 0)
                kv = loop.extend(kv, document[start:], start)[1] if start < len(document) else kv
                store(
                    cache, document, kv, layout=loop.layout
                )  # at the end of a block, so that any state can be cut there
                token, kv = loop.extend(kv, tokens[8:], 8)
                assert [token, *loop.generate(kv, [token], len(tokens))[: NEW - 1]] == loop.cold(tokens)
