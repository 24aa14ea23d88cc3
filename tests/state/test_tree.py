"""Taking values apart into named arrays and a structure, and putting them together."""

import dataclasses
import enum
import json
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
from host_memory import HostMemory
from hypothesis import given
from hypothesis import strategies as st

from agnostic_cache.errors import StructureMismatchError, UnknownValueError
from agnostic_cache.state.tree import Flat, Node, build, flatten, strip

MEMORY = HostMemory()


class Pair(NamedTuple):
    key: Any
    value: Any


class Kind(enum.Enum):
    FULL = 1


@dataclasses.dataclass
class Record:
    key: Any
    name: str = "x"
    kind: Kind = Kind.FULL
    later: Any = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        assert self.key is not None
        assert self.name != "broken"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    key: Any


def again(flat: Flat) -> Any:
    return build(flat.node, flat.arrays, 7, flat.adapter)


def test_arrays_are_named_by_their_paths() -> None:
    a = MEMORY.array(1)
    value = {"layers": [{"k": a, "v": (a, None)}, Pair(a, 2)], 3: {"": a}, "r": Record(a), "o": OrderedDict(x=a)}
    flat = flatten(value)
    assert list(flat.arrays) == [
        "layers.0.k", "layers.0.v.0", "layers.1.key", "3", "r.key", "o.x",
    ]  # fmt: skip
    assert all(array is a for array in flat.arrays.values())
    assert list(flatten(a).arrays) == ["value"]
    assert list(flatten([a]).arrays) == ["0"]


def test_no_two_paths_read_alike() -> None:
    a = MEMORY.array(1)
    value = {"a.b": a, "a": {"b": a, "b.c": a, "%": a, "%2E": a}, "a%2Eb": a}
    flat = flatten(value)
    assert len(flat.arrays) == 6
    assert again(flat) == value
    for clash in ({1: a, "1": a}, {"x": [a], "x.0": a, 0: a, "0": a}, {True: a, "True": a}):
        with pytest.raises(UnknownValueError):
            flatten(clash)


def test_keys_keep_their_kind() -> None:
    a = MEMORY.array(1)
    for keys in ([1, 2], [True, False], ["1", "2"], [True, 2], [Number.ONE, 2]):
        value = again(flatten(dict.fromkeys(keys, a)))
        assert [(key, type(key)) for key in value] == [(key, type(key)) for key in keys]
    assert [*flatten({True: a}).arrays, *flatten({1: a}).arrays] == ["True", "1"]


class Number(enum.IntEnum):
    ONE = 1


def test_every_container_comes_back_fresh_and_of_its_type() -> None:
    a, b = MEMORY.array(1), MEMORY.array(2)
    value = {
        "list": [a, [b]],
        "tuple": (a, (), None),
        "ordered": OrderedDict(z=a, y=b),
        "named": Pair(a, "text"),
        "record": Record([a]),
        "frozen": Frozen({"x": b}),
        "scalars": [1, 1.5, True, "s", None, Kind.FULL],
        "empty": [{}, [], ()],
    }
    back = again(flatten(value))
    assert back == value
    for name in ("list", "ordered", "record", "frozen", "scalars"):
        assert back[name] is not value[name]
        assert type(back[name]) is type(value[name])
    assert list(back["ordered"]) == ["z", "y"]
    assert back["list"][0] is a
    assert back["scalars"][2] is True
    assert not hasattr(back["record"], "later")


def test_a_record_is_put_together_without_its_constructor() -> None:
    value = Record(MEMORY.array(1))
    value.name = "broken"
    value.later = 3
    assert again(flatten(value)) == value


def test_an_int_of_a_known_name_is_the_length() -> None:
    a = MEMORY.array(1)
    flat = flatten({"k": a, "end_index": 5, "n": {"cache_index": 5}, "cumulative_length": True, "other": 5})
    assert flat.lengths == [5, 5]
    assert again(flat) == {"k": a, "end_index": 7, "n": {"cache_index": 7}, "cumulative_length": True, "other": 5}


@pytest.mark.parametrize(
    "bad", [{1.5: None}, {None: 1}, {("a",): 1}, object(), {1, 2}, b"x", range(3), bytearray(2), 1j]
)
def test_what_nobody_knows_is_an_error(bad: object) -> None:
    with pytest.raises(UnknownValueError):
        flatten({"a": MEMORY.array(1), "b": [bad]})


def test_a_structure_can_be_written_down() -> None:
    a = MEMORY.array(1)
    value = {"layers": [{"k": a}, (a, None, 1.5)], 3: "x", "end_index": 4}
    flat = flatten(value)
    node = Node.from_json(json.loads(json.dumps(flat.node.to_json())))
    assert node == flat.node
    assert build(node, flat.arrays, 4, MEMORY) == value


@pytest.mark.parametrize("value", [Pair(1, 2), Record(1), Frozen(1), Kind.FULL], ids=lambda value: type(value).__name__)
def test_no_class_is_found_by_its_name(value: object) -> None:
    flat = flatten([MEMORY.array(1), value])
    node = Node.from_json(json.loads(json.dumps(flat.node.to_json())))
    with pytest.raises(StructureMismatchError):
        build(node, flat.arrays, 0, MEMORY)


NAMES = st.text(st.sampled_from("ab.%0"), max_size=3) | st.integers(0, 3)
VALUES = st.recursive(
    st.just("array") | st.none() | st.integers() | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(NAMES, inner, max_size=3)
        | st.builds(Pair, inner, inner)
        | st.builds(Frozen, inner)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_any_nesting_comes_back(pattern: Any) -> None:
    arrays: list[Any] = []

    def fill(value: Any) -> Any:
        if value == "array":
            arrays.append(MEMORY.array(1))
            return arrays[-1]
        if isinstance(value, dict):
            return {key: fill(child) for key, child in value.items()}
        if isinstance(value, Pair):
            return Pair(*map(fill, value))
        if isinstance(value, Frozen):
            return Frozen(fill(value.key))
        return type(value)(map(fill, value)) if isinstance(value, list | tuple) else value

    value = fill(pattern)
    try:
        flat = flatten(value, MEMORY)
    except UnknownValueError:
        return  # names that read alike
    assert list(flat.arrays.values()) == arrays  # each, in order
    assert again(flat) == value


def test_stripping_empties_what_can_be_emptied() -> None:
    a, b, c = (MEMORY.array(n) for n in (1, 2, 3))
    record, inner = Record([a], name="kept"), {"x": b, "n": 3}
    value = [record, inner, (a, [c]), {"again": inner}, Kind.FULL, "text", a]
    assert {id(array) for array in strip(value, MEMORY)} == {id(a), id(b), id(c)}
    assert value == []
    assert inner == {}
    assert (record.key, record.name) == (None, "kept")


def test_stripping_ends_where_a_value_holds_itself() -> None:
    a = MEMORY.array(1)
    value: list[Any] = [a]
    value.append({"self": value})
    assert strip(value, MEMORY) == [a]
    assert strip(object(), MEMORY) == []
