"""Keys of blocks: equal tokens give equal keys, whatever they come in; nothing else does."""

import subprocess
import sys
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.errors import AgnosticCacheError, InvalidTokensError
from agnostic_cache.prefix.chain import encode, fields, next_key, root_key


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_tokens_are_four_little_endian_bytes_each(tokens: list[int]) -> None:
    expected = b"".join(token.to_bytes(4, "little") for token in tokens)
    assert encode(tokens) == encode(tuple(tokens)) == expected
    for code in "IqQL":
        assert encode(array(code, tokens)) == expected


@pytest.mark.parametrize("code", list("bBhHiIlLqQ"))
def test_every_integer_type_gives_the_same(code: str) -> None:
    tokens = [0, 1, 7, 100, 127]
    assert encode(array(code, tokens)) == encode(tokens)
    assert encode(memoryview(array(code, [v for t in tokens for v in (t, 99)]))[::2]) == encode(tokens)


def test_a_host_array_and_a_range_are_tokens_too() -> None:
    host = HostArray.empty((3,), Dtype.INT64)
    host.memory[:] = array("q", [3, 4, 5]).tobytes()
    assert encode(host) == encode(range(3, 6)) == encode([3, 4, 5])
    assert encode([]) == b""


@pytest.mark.parametrize(
    "bad",
    [
        [1.5],
        [-1],
        [2**32],
        [1, "2"],
        [None],
        (1, -(2**70)),
        "123",
        None,
        {1},
        5,
        array("d", [1.0]),
        array("h", [-1]),
        array("i", [3, -3]),
        array("q", [-1]),
        array("q", [2**32]),
        array("Q", [2**63]),
        memoryview(bytes(4)).cast("B", (2, 2)),
        HostArray.empty((2, 2), Dtype.INT32),
        HostArray.empty((2,), Dtype.FLOAT32),
    ],
)
def test_what_is_no_prompt_is_refused(bad: object) -> None:
    with pytest.raises(InvalidTokensError) as raised:
        encode(bad)
    assert isinstance(raised.value, AgnosticCacheError)


@given(st.lists(st.binary(max_size=6), min_size=2, max_size=4), st.lists(st.binary(max_size=6), min_size=2, max_size=4))
def test_fields_that_are_split_differently_never_meet(one: list[bytes], other: list[bytes]) -> None:
    assert (fields(*one) == fields(*other)) == (one == other)


@given(st.tuples(st.text(max_size=4), st.binary(max_size=4), st.binary(max_size=4)), st.data())
def test_namespace_salt_and_context_each_separate(one: tuple[str, bytes, bytes], data: st.DataObject) -> None:
    other = data.draw(st.tuples(st.text(max_size=4), st.binary(max_size=4), st.binary(max_size=4)))
    assert (root_key(*one) == root_key(*other)) == (one == other)


def test_a_key_stands_for_everything_before_it() -> None:
    root = root_key("m")
    a, b = encode([1, 2]), encode([3, 4])
    assert next_key(next_key(root, a), b) != next_key(root, b)
    assert next_key(next_key(root, a), b) != next_key(next_key(root, b), a)
    assert next_key(root, a + b) != next_key(next_key(root, a), b)


def test_keys_are_the_same_in_every_process() -> None:
    program = (
        "from agnostic_cache.prefix.chain import encode, next_key, root_key\n"
        "print(next_key(root_key('m', b's', b'c'), encode([1, 2, 3])).hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {next_key(root_key("m", b"s", b"c"), encode([1, 2, 3])).hex()}
