"""The index of a prefix cache against a list of blocks that is read from end to end."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnostic_cache.prefix.block import Block, Kind, Windows
from agnostic_cache.prefix.chain import Marks, encode, next_key
from agnostic_cache.prefix.index import Index, common_tokens, content_of

PARENTS = (b"root", b"other")
KIND = Kind("host", None, {}, frozenset())
tokens_lists = st.lists(st.sampled_from([0, 1, 255, 256, 70_000]), min_size=1, max_size=5)  # bytes that are no order
places = st.dictionaries(st.integers(0, 4), st.sampled_from([b"a" * 32, b"b" * 32]), max_size=2)
contents = st.tuples(tokens_lists, places).map(
    lambda drawn: (encode(drawn[0]), tuple(sorted((at, mark) for at, mark in drawn[1].items() if at < len(drawn[0]))))
)
Content = tuple[bytes, Marks]


def block(parent: bytes, content: Content, windows: Windows = ()) -> Block:
    tokens, marks = content
    return Block(next_key(parent, tokens, marks), parent, tokens, windows, KIND, marks=marks)


def symbols(content: Content) -> list[object]:
    """What a block is read as: each mark stands before its token."""
    tokens, marks = content
    found: list[object] = []
    for at, token in enumerate(memoryview(tokens).cast("I").tolist()):
        found.append((dict(marks).get(at), token))
    return found


def in_common(one: Content, other: Content) -> int:
    pairs = zip(symbols(one), symbols(other), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(symbols(one)), len(symbols(other))))


def content(of: Block) -> Content:
    return of.tokens, of.marks


@given(
    st.sampled_from([(), ((4, 2),)]),
    st.lists(st.tuples(st.booleans(), st.sampled_from(PARENTS), contents), max_size=30),
    st.sampled_from(PARENTS),
    contents,
)
def test_it_answers_as_a_list_of_all_blocks_would(
    windows: Windows, steps: list[tuple[bool, bytes, Content]], parent: bytes, asked: Content
) -> None:
    index = Index()
    blocks: dict[bytes, Block] = {}
    for add, under, drawn in steps:
        one = block(under, drawn, windows)
        if add:
            index.add(one)
            blocks[one.key] = one
        else:
            index.discard(one.key)
            blocks.pop(one.key, None)
    check(index, blocks, parent, asked, granular=not windows)


def check(index: Index, blocks: dict[bytes, Block], parent: bytes, asked: Content, *, granular: bool = True) -> None:
    siblings = [one for one in blocks.values() if one.parent == parent]
    begin = [one for one in siblings if in_common(content(one), asked) == one.length]
    assert sorted(index, key=id) == sorted(blocks.values(), key=id)
    assert index.child(parent, *asked) is blocks.get(next_key(parent, *asked))
    assert list(index.beginnings(parent, content_of(*asked))) == sorted(begin, key=lambda one: -one.length)
    count = len(asked[0]) // 4
    longer = {one for one in siblings if in_common(content(one), asked) == count < one.length}
    assert set(index.extensions(parent, content_of(*asked))) == longer
    usable = siblings if granular else begin
    most = max([in_common(content(one), asked) for one in usable], default=0)
    found, common = index.best_child(parent, content_of(*asked))
    assert common == most
    assert (found is None) == (most == 0)
    if found is not None:
        assert found in usable
        assert in_common(content(found), asked) == most


@given(contents, contents)
def test_tokens_in_common_are_counted_whole(one: Content, other: Content) -> None:
    assert common_tokens(content_of(*one), content_of(*other)) == in_common(one, other)


def test_many_siblings_stay_in_order_in_whatever_order_they_come_and_leave() -> None:
    index, blocks = Index(), {}
    for i in range(2000):
        one = block(b"root", (encode([1, i * 7919 % 2000]), ()))
        index.add(one)
        blocks[one.key] = one
    for i in range(0, 2000, 3):
        key = next_key(b"root", encode([1, i]))
        index.discard(key)
        del blocks[key]
    for i in range(0, 2000, 37):
        for asked in ([1, i], [1, i, 5], [1], [2, i]):
            check(index, blocks, b"root", (encode(asked), ()))
    for key in blocks:
        index.discard(key)
    assert index.best_child(b"root", (encode([1, 2]),)) == (None, 0)


class Stop(Exception):  # noqa: N818 - raised where an interrupt would be
    pass


@pytest.mark.parametrize("at", range(1, 40))
def test_a_change_that_is_interrupted_is_made_good_by_the_next(at: int) -> None:
    from interrupts import interrupted_at  # noqa: PLC0415

    index = Index()
    blocks = [block(b"root", (encode([1, i]), ())) for i in range(3)]
    index.add(blocks[0])
    index.add(blocks[1])

    def change() -> None:
        index.discard(blocks[0].key)
        index.add(blocks[2])

    interrupted_at(at, change)
    index.add(other := block(b"other", (encode([5]), ())))
    left = {one.key: one for one in index}
    assert left[other.key] is other
    for one in blocks:
        check(index, left, b"root", content(one))


def test_arrays_of_other_integers_have_tokens_in_common() -> None:
    assert common_tokens((array("I", [1, 2]).tobytes(),), (encode([1, 2, 3]),)) == 2
