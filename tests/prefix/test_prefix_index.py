"""The index of a prefix cache against a list of blocks that is read from end to end."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from agnostic_cache.prefix.chain import encode, next_key
from agnostic_cache.prefix.index import Block, Index, Windows, common_tokens

PARENTS = (b"root", b"other")
tokens_lists = st.lists(st.sampled_from([0, 1, 255, 256, 70_000]), min_size=1, max_size=5)  # bytes that are no order


def block(parent: bytes, tokens: bytes, windows: Windows) -> Block:
    return Block(next_key(parent, tokens), parent, tokens, windows, snapshots=False, deadline=None)


@given(
    st.sampled_from([(), ((4, 2),)]),
    st.lists(st.tuples(st.booleans(), st.sampled_from(PARENTS), tokens_lists), max_size=30),
    st.sampled_from(PARENTS),
    tokens_lists,
)
def test_it_answers_as_a_list_of_all_blocks_would(
    windows: Windows, steps: list[tuple[bool, bytes, list[int]]], parent: bytes, asked: list[int]
) -> None:
    index = Index()
    blocks: dict[bytes, Block] = {}
    for add, under, tokens in steps:
        one = block(under, encode(tokens), windows)
        if add:
            index.add(one)
            blocks[one.key] = one
        else:
            index.discard(one.key)
            blocks.pop(one.key, None)
    data = encode(asked)
    siblings = [one for one in blocks.values() if one.parent == parent]
    begin = [one for one in siblings if data.startswith(one.tokens)]
    assert sorted(index, key=id) == sorted(blocks.values(), key=id)
    assert index.child(parent, data) is blocks.get(next_key(parent, data))
    assert list(index.beginnings(parent, data)) == sorted(begin, key=lambda one: -one.length)
    longer = {one for one in siblings if one.tokens.startswith(data) and one.tokens != data}
    assert set(index.extensions(parent, data)) == longer
    usable = begin if windows else siblings
    most = max([common_tokens(one.tokens, data) for one in usable], default=0)
    found, common = index.best_child(parent, data)
    assert common == most
    assert (found is None) == (most == 0)
    if found is not None:
        assert found in usable
        assert common_tokens(found.tokens, data) == most


@given(tokens_lists, tokens_lists)
def test_tokens_in_common_are_counted_whole(one: list[int], other: list[int]) -> None:
    naive = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert common_tokens(array("I", one).tobytes(), encode(other)) == naive
