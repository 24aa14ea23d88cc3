"""The law of reuse: a state that is handed back gives the tokens that computing it again gives, and does not change."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, ClassVar

import pytest

from agnostic_cache import KVLayout, KVState, StateCache, wrap

VOCABULARY = 32
ROOM = 16
"""Tokens that a cache of fixed length has room for."""
NEW = 3
"""Tokens that are generated."""


class Loop(ABC):
    """A greedy decoding loop around a tiny model, whose caches have room for `ROOM` tokens.

    Attributes:
        layout: Roles of the leaves, where the structure alone does not tell.
        cuts: Whether all leaves can be cut at any token; else a state is only good at its own length.
        traces: How often the step was traced.
    """

    layout: KVLayout | None = None
    cuts = True
    traces = 0

    @abstractmethod
    def fresh(self) -> Any:
        """Make an empty cache."""

    @abstractmethod
    def extend(self, cache: Any, tokens: Sequence[int], start: int) -> tuple[int, Any]:
        """Use up a cache that stands for `start` tokens; return the next token and the cache with `tokens` in it."""

    @abstractmethod
    def live_bytes(self) -> int:
        """Return the bytes of all arrays that live in this process."""

    def generate(self, cache: Any, tokens: Sequence[int], start: int) -> list[int]:
        """Continue greedily; `cache` is used up."""
        answer: list[int] = []
        while len(answer) < NEW:
            token, cache = self.extend(cache, tokens, start)
            start += len(tokens)
            tokens = [token]
            answer.append(token)
        return answer

    def cold(self, tokens: Sequence[int]) -> list[int]:
        """Continue greedily from nothing."""
        return self.generate(self.fresh(), tokens, 0)

    def state(self, tokens: Sequence[int]) -> KVState:
        """Return what a cache would keep of a prompt."""
        cache = self.extend(self.fresh(), tokens, 0)[1]
        return wrap(cache, layout=self.layout, length=len(tokens)).copy()


def prompt(length: int, seed: int = 0) -> list[int]:
    random = Random(seed)
    return [random.randrange(VOCABULARY) for _ in range(length)]


def bits(state: KVState) -> dict[str, int]:
    """A checksum of each leaf, made by the host."""
    leaves = state.copy().to("host").leaves
    return {name: zlib.crc32(leaf.array.memory) for name, leaf in leaves.items()}


class ReuseLaw:
    """What holds of every structure; a test class inherits it and says how to make its loop."""

    make: ClassVar[Callable[..., Loop]]
    longest = 11
    suffixes = tuple(prompt(2, seed) for seed in range(1, 11))

    @pytest.fixture(scope="class")
    @classmethod
    def loop(cls) -> Loop:
        return cls.make()

    def lengths(self, loop: Loop) -> Sequence[int]:
        return range(self.longest + 1) if loop.cuts else [self.longest]

    def test_every_prefix_answers_as_if_it_were_computed(self, loop: Loop) -> None:
        tokens = prompt(self.longest)
        whole = loop.state(tokens)
        loop.cold(tokens)
        traces = loop.traces
        for length in self.lengths(loop):
            kept = whole.cut(0, length)
            before = bits(kept)
            for suffix in self.suffixes[:: 1 if length == self.longest else 5]:
                cache = kept.unwrap(like=loop.fresh(), layout=loop.layout)
                assert loop.generate(cache, suffix, length) == loop.cold(tokens[:length] + suffix)
                assert bits(kept) == before
            kept.release()
        assert loop.traces == traces  # a restored cache looks like any other to `jit`

    def test_joined_parts_answer_as_if_they_were_computed(self, loop: Loop) -> None:
        tokens = prompt(self.longest, 3)
        whole = loop.state(tokens)
        for cut in self.lengths(loop) if loop.cuts else ():
            joined = KVState.join([whole.cut(0, cut), whole.cut(cut, self.longest)])
            answer = loop.generate(joined.unwrap(like=loop.fresh(), layout=loop.layout), self.suffixes[0], self.longest)
            assert answer == loop.cold(tokens + self.suffixes[0])

    def test_a_tail_that_ends_with_the_buffer_is_not_shifted(self, loop: Loop) -> None:
        tokens = prompt(ROOM - NEW + 1, 4)  # the last token that is generated is not computed
        for length in (len(tokens) - 1, len(tokens) - 2) if loop.cuts else ():
            kept = loop.state(tokens).cut(0, length)
            cache = kept.unwrap(like=loop.fresh(), layout=loop.layout)
            assert loop.generate(cache, tokens[length:], length) == loop.cold(tokens)
        full = loop.state(prompt(ROOM, 5))
        again = wrap(full.unwrap(like=loop.fresh(), layout=loop.layout), layout=loop.layout, length=ROOM)
        assert bits(again) == bits(full)

    def test_ten_reuses_leave_the_entry_as_it_was(self, loop: Loop) -> None:
        tokens = prompt(self.longest, 6)
        cache = StateCache("16MiB")
        cache.put("prompt", loop.extend(loop.fresh(), tokens, 0)[1])
        with cache.borrow("prompt", raw=True) as lent:
            before = bits(lent)  # type: ignore[arg-type]
        loop.generate(cache.get("prompt"), self.suffixes[0], self.longest)
        traces = loop.traces
        for suffix in self.suffixes:
            assert loop.generate(cache.get("prompt"), suffix, self.longest) == loop.cold(tokens + suffix)
            with cache.borrow("prompt", raw=True) as lent:
                assert bits(lent) == before  # type: ignore[arg-type]
        assert loop.traces == traces
        answer = loop.generate(cache.pop("prompt"), self.suffixes[0], self.longest)
        assert answer == loop.cold(tokens + self.suffixes[0])

    def test_bytes_are_those_kept_alive_and_eviction_frees_them(self, loop: Loop) -> None:
        loop.cold(prompt(self.longest))  # what is allocated once
        before = loop.live_bytes()
        kept = loop.state(prompt(self.longest))
        assert kept.nbytes == loop.live_bytes() - before > 0
        cache = StateCache(2 * kept.nbytes)
        for key in range(4):
            cache.put(key, kept)
            assert loop.live_bytes() - before == kept.nbytes + cache.current_bytes
        assert cache.current_size() == 2
        nbytes = kept.nbytes
        assert kept.release() == nbytes
        for move in (False, True):
            cache.put("native", loop.extend(loop.fresh(), prompt(3), 0)[1], move=move)
            assert loop.live_bytes() - before == cache.current_bytes
        cache.clear()
        assert loop.live_bytes() == before
