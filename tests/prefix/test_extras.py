"""What stands at places of a prompt, and whose it is from a place on: shared before, apart behind, never cut inside."""

from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import LAYOUTS

from agnostic_cache import PrefixCache
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.errors import InvalidExtrasError, InvalidNamespaceError, InvalidTokensError

BLOCK = 8
Extra = tuple[int, int, bytes, bool]
TEXT = list(range(100, 140))


def symbols(tokens: Sequence[int], extras: Sequence[Extra] = (), salt: bytes = b"", salt_from: int = 0) -> list[bytes]:
    """What each row depends on besides the rows before it."""
    found = []
    for at, token in enumerate(tokens):
        parts = [array("Q", [token]).tobytes(), salt if at >= salt_from else b""]
        for start, stop, digest, atomic in extras:
            if start <= at < stop:
                parts += [digest, bytes([at - start])]
                if atomic:  # rows see all of it
                    parts.append(array("Q", [stop, *tokens[start:stop]]).tobytes())
        found.append(b"".join(len(part).to_bytes(8, "little") + part for part in parts))
    return found


def state_of(seen: Sequence[bytes], kind: str = "tokens") -> dict[str, Any]:
    """Compute the state of a prompt whose tokens and extras are seen as `symbols`."""
    running, rows = blake2b(digest_size=8), []
    for one in seen:
        running.update(one)
        rows.append(running.copy().digest())
    leaves = {"key": host(rows)}
    if kind in {"window", "all"}:
        leaves["window"] = host([b"w" + row[1:] for row in rows])
    if kind in {"snapshot", "all"}:
        leaves["state"] = host([b"s" + rows[-1][1:]])
    return leaves


def host(rows: list[bytes]) -> HostArray:
    made = HostArray.empty((len(rows), 2), Dtype.FLOAT32)
    made.memory[:] = b"".join(rows)
    return made


def make(kind: str = "tokens", **settings: Any) -> PrefixCache:
    return PrefixCache("1MiB", **{"namespace": "toy", "block_size": BLOCK, "layout": LAYOUTS[kind], **settings})


def put(cache: PrefixCache, tokens: Sequence[int], kind: str = "tokens", **where: Any) -> int:
    return cache.insert(tokens, state_of(symbols(tokens, **where), kind), **where)


def hit(cache: PrefixCache, tokens: Sequence[int], kind: str = "tokens", **where: Any) -> int:
    """Match, check that what is loaded is what computing it would give, and return its length."""
    with cache.match(tokens, **where) as match:
        length = match.length
        if match:
            expected, loaded = state_of(symbols(tokens, **where)[:length], kind), match.load()
            for name, rows in expected.items():
                found = bytes(loaded[name].memory)
                assert found == bytes(rows.memory)[-len(found) :]
            assert loaded["key"].shape[0] == length
    return length


@pytest.mark.parametrize("start", [0, 3, 8, 12, 16, 21])
@pytest.mark.parametrize("atomic", [False, True])
def test_what_stands_before_an_extra_is_shared_and_nothing_behind(start: int, *, atomic: bool) -> None:
    cache = make()
    put(cache, TEXT, extras=[(start, start + 10, b"A", atomic)])
    assert hit(cache, TEXT, extras=[(start, start + 10, b"A", atomic)]) == 39
    assert hit(cache, TEXT, extras=[(start, start + 10, b"B", atomic)]) == start
    assert hit(cache, TEXT) == start
    assert hit(cache, [*TEXT[:35], 1, 2], extras=[(start, start + 10, b"A", atomic)]) == 35
    put(cache, TEXT, extras=[(start, start + 10, b"B", atomic)])
    put(cache, TEXT)
    for extras in ([(start, start + 10, b"A", atomic)], [(start, start + 10, b"B", atomic)], []):
        assert hit(cache, [*TEXT, 1], extras=extras) == 40


def test_text_that_is_known_is_shared_with_a_prompt_that_has_an_image() -> None:
    cache = make()
    put(cache, TEXT)
    assert hit(cache, TEXT, extras=[(19, 29, b"A", False)]) == 19
    assert put(cache, TEXT, extras=[(19, 29, b"A", False)]) == 3  # of five blocks
    second = [*TEXT, *range(20)]
    assert hit(cache, second, extras=[(19, 29, b"A", False), (45, 50, b"B", False)]) == 40


def test_an_extra_that_is_not_atomic_may_be_cut_and_ends_where_it_says() -> None:
    cache = make()
    put(cache, TEXT[:20], extras=[(10, 20, b"A", False)])  # an adapter, which goes on
    assert hit(cache, TEXT, extras=[(10, 40, b"A", False)]) == 20
    assert hit(cache, TEXT, extras=[(10, 15, b"A", False)]) == 15
    assert hit(cache, TEXT[:13], extras=[(10, 13, b"A", False)]) == 12


@pytest.mark.parametrize("end", range(1, 40))
def test_no_match_ends_inside_an_atomic_extra(end: int) -> None:
    cache = make()
    extras = [(5, 20, b"A", True), (20, 27, b"B", True)]
    put(cache, TEXT, extras=extras)
    asked = [*TEXT[:end], 7, 7]
    inside = [extra for extra in extras if extra[1] <= end + 2]
    assert hit(cache, asked, extras=inside) in {0, 5, 20, 27, *range(27, 40), *range(5)}
    assert hit(cache, TEXT[: end + 1], extras=[e for e in extras if e[1] <= end + 1]) == (
        end if end <= 5 or end >= 27 else 20 if end >= 20 else 5
    )


def test_the_tokens_of_an_atomic_extra_belong_to_its_first_row() -> None:
    """Rows of a block inside depend on tokens of blocks behind it."""
    cache = make()
    put(cache, TEXT, extras=[(5, 20, b"A", True)])
    other = [*TEXT[:18], 1, *TEXT[19:]]
    assert hit(cache, other, extras=[(5, 20, b"A", True)]) == 5
    assert hit(cache, other, extras=[(5, 20, b"A", False)]) == 5


@pytest.mark.parametrize("kind", ["window", "snapshot", "all"])
def test_a_boundary_inside_an_atomic_extra_is_no_stop(kind: str) -> None:
    cache = make(kind)
    extras = [(13, 20, b"A", True)]
    for end in (8, 16, 24):
        where: dict[str, Any] = {"extras": extras if end >= 20 else []}
        cache.insert(TEXT[:end], state_of(symbols(TEXT[:end], **where), kind), **where)
    put(cache, TEXT, kind, extras=extras)
    assert [hit(cache, [*TEXT[:end], 1], kind, extras=extras) for end in (20, 23, 24, 30)] == [8, 8, 24, 24]
    with cache.match([*TEXT[:23], 1], extras=extras) as match:
        assert match.known == 8
    exact = make(exact=True)
    assert exact.insert(TEXT, state_of(symbols(TEXT)), length=36, extras=[(13, 38, b"A", True)]) == 1
    assert put(exact, TEXT, extras=[(13, 38, b"A", True)]) == 4


def test_a_state_that_ends_inside_an_atomic_extra_is_kept_up_to_it() -> None:
    cache = make()
    assert cache.insert(TEXT, state_of(symbols(TEXT)[:18]), length=18, extras=[(11, 30, b"A", True)]) == 2
    assert cache.stats().inserted_tokens == 11
    assert hit(cache, TEXT) == 11
    assert cache.insert(TEXT, state_of(symbols(TEXT)[:18]), length=18, extras=[(0, 30, b"A", True)]) == 0


@pytest.mark.parametrize("salt_from", [0, 5, 8, 20])
def test_salts_meet_before_their_place_and_never_behind(salt_from: int) -> None:
    cache = make()
    put(cache, TEXT, salt=b"alice", salt_from=salt_from)
    assert hit(cache, TEXT, salt=b"alice", salt_from=salt_from) == 39
    assert hit(cache, TEXT, salt=b"bob", salt_from=salt_from) == salt_from
    assert hit(cache, TEXT) == salt_from
    put(cache, TEXT)  # everybody's
    assert hit(cache, TEXT, salt=b"bob", salt_from=salt_from) == salt_from
    assert hit(cache, TEXT, salt=b"bob", salt_from=99) == 39


def test_the_salt_of_the_cache_is_the_default_of_each_call() -> None:
    cache = make(salt=b"alice")
    cache.insert(TEXT, state_of(symbols(TEXT)))
    assert hit(cache, TEXT) == 39
    assert hit(cache, TEXT, salt=b"") == hit(cache, TEXT, salt=b"bob") == 0
    for tokens in (cache.warm([TEXT]), cache.pin(TEXT), cache.unpin(TEXT), cache.remove(TEXT)):
        assert tokens == 40
    for tokens in (cache.warm([TEXT], salt=b""), cache.pin(TEXT, salt=b""), cache.remove(TEXT, salt=b"")):
        assert tokens == 0


@given(
    st.text("ab", min_size=1, max_size=30), st.binary(max_size=2), st.integers(0, 30),
    st.text("ab", min_size=1, max_size=30), st.binary(max_size=2), st.integers(0, 30),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_two_salts_share_what_both_call_everybodys(
    one: str, salt: bytes, at: int, other: str, salt2: bytes, at2: int
) -> None:
    cache = make()
    first, second = list(one.encode()), list(other.encode())
    put(cache, first, salt=salt, salt_from=at)
    pairs = zip(symbols(first, salt=salt, salt_from=at), symbols(second, salt=salt2, salt_from=at2), strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    if salt == salt2 and at != at2:
        same = min(same, at, at2)  # where one begins, the other goes on: keys differ, though tokens are one tenant's
    assert hit(cache, second, salt=salt2, salt_from=at2) == min(same, len(second) - 1) or not salt


def spans(drawn: list[tuple[int, int, bytes, bool]], count: int) -> list[Extra]:
    found, end = [], 0
    for gap, length, digest, atomic in drawn:
        start, stop = end + gap, end + gap + length
        if stop > count:
            break
        found.append((start, stop, digest, atomic))
        end = stop
    return found


drawn_extras = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 12), st.sampled_from([b"A", b"B"]), st.booleans()), max_size=3
)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(list(LAYOUTS)),
    st.booleans(),
    st.sampled_from(["1MiB", 3000]),
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 40), st.text("ab", max_size=20), drawn_extras,
                  st.sampled_from([b"", b"alice", b"bob"]), st.sampled_from([0, 3, 8, 12])),
        max_size=6,
    ),
)  # fmt: skip
def test_no_wrong_hit_and_all_that_is_shared_whatever_prompts_hold(
    kind: str,
    exact: bool,  # noqa: FBT001
    max_bytes: Any,
    steps: list[Any],
) -> None:
    cache = PrefixCache(max_bytes, namespace="toy", block_size=BLOCK, layout=LAYOUTS[kind], exact=exact)
    stored: list[tuple[list[int], dict[str, Any]]] = []
    for source, keep, more, drawn, salt, salt_from in steps:
        tokens = [*(stored[source % len(stored)][0][:keep] if stored else []), *more.encode()]
        where = {"extras": spans(drawn, len(tokens)), "salt": salt, "salt_from": salt_from}
        if not tokens:
            continue
        found = hit(cache, tokens, kind, **where)
        if kind == "tokens" and not exact and max_bytes == "1MiB":
            assert found >= shared(tokens, where, stored)
        put(cache, tokens, kind, **where)
        stored.append((tokens, where))
    for tokens, where in stored:
        hit(cache, tokens, kind, **where)
        hit(cache, [*tokens, 1], kind, **where)


def shared(tokens: list[int], where: dict[str, Any], stored: list[tuple[list[int], dict[str, Any]]]) -> int:
    """How much of a prompt the others have, up to a place where it may be cut."""
    most, seen = 0, marked(tokens, where)
    for other, its in stored:
        pairs = zip(seen, marked(other, its), strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(other)))
        most = max(most, same)
    most = min(most, len(tokens) - 1)
    return next((start for start, stop, _, atomic in where["extras"] if atomic and start < most < stop), most)


def marked(tokens: list[int], where: dict[str, Any]) -> list[Any]:
    """The symbols, and where an extra or the salt begins."""
    begins = [(start, digest) for start, _, digest, _ in where["extras"]]
    seen: list[Any] = list(symbols(tokens, **where))
    for at, digest in [*begins, *([(where["salt_from"], b"salt")] if where["salt"] else [])]:
        if at < len(seen):
            seen[at] = (seen[at], digest)
    return seen


@pytest.mark.parametrize(
    "wrong",
    [
        {"extras": [(0, 41, b"A", True)]},
        {"extras": [(-1, 4, b"A", True)]},
        {"extras": [(4, 4, b"A", True)]},
        {"extras": [(4, 2, b"A", True)]},
        {"extras": [(4, 9, b"A", True), (8, 12, b"A", True)]},
        {"extras": [(8, 12, b"A", True), (0, 4, b"A", True)]},
        {"extras": [(0, 4, "A", True)]},
        {"extras": [(0, 4, b"A")]},
        {"extras": [(0.0, 4, b"A", True)]},
        {"extras": [("a", 4, b"A", True)]},
        {"extras": [7]},
        {"salt_from": -1},
        {"salt_from": 1.5},
        {"salt_from": True},
    ],
)
def test_extras_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    cache = make()
    before = cache.stats()
    calls: list[Callable[..., object]] = [cache.match, cache.pin, cache.unpin, cache.remove, cache.prefetch]
    for call in [*calls, lambda tokens, **where: cache.warm([tokens], **where)]:
        with pytest.raises(InvalidExtrasError):
            call(TEXT, **wrong)
    with pytest.raises(InvalidExtrasError):
        cache.insert(TEXT, state_of(symbols(TEXT)), **wrong)
    assert cache.stats() == before
    assert issubclass(InvalidExtrasError, InvalidTokensError)
    assert issubclass(InvalidExtrasError, InvalidNamespaceError)
    for name in ("salt", "context"):
        with pytest.raises(InvalidNamespaceError):
            cache.match(TEXT, **cast("Any", {name: "text"}))


def test_prompts_with_extras_are_found_in_a_storage() -> None:
    with make(storage="memory://", clock=lambda: 1.0) as cache:
        where: dict[str, Any] = {
            "extras": [(3, 11, b"A", False), (20, 30, b"B", True)],
            "salt": b"alice",
            "salt_from": 5,
        }
        put(cache, TEXT, **where)
        cache.clear()
        assert hit(cache, TEXT, **where) == 32
        assert hit(cache, TEXT[:32], **where) == 20  # whole blocks are stored, and the third is cut inside
        assert hit(cache, TEXT, **{**where, "salt": b"bob"}) == 0  # a part of a block has no name there
        assert hit(cache, TEXT) == 0
        assert cache.remove(TEXT, **where, stored=True) == 40
        cache.clear()
        assert hit(cache, TEXT, **where) == 0
