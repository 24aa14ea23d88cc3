"""ContainerSuite: the round-trip law, and what a value that is no state gets."""

import dataclasses
import enum
import json
import random
from collections import OrderedDict
from typing import Any, ClassVar, NamedTuple

import pytest

from agnostic_cache.arrays.adapter import Array
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.roles import LENGTH, TOKENS
from agnostic_cache.errors import (
    CutRangeError,
    LengthMismatchError,
    MissingAdapterError,
    MixedFrameworksError,
    StructureMismatchError,
    UnknownValueError,
)
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.wrapping import adopt, wrap
from agnostic_cache.testing.subject import KV, Subject


class Pair(NamedTuple):
    """A NamedTuple that holds arrays."""

    key: Any
    value: Any


@dataclasses.dataclass
class Entry:
    """A dataclass that holds arrays, and fields that are none."""

    state: Any
    tokens: Any
    count: int = 3
    scores: tuple[Any, ...] = ()
    built: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Count what is built by its constructor: a state is put together without."""
        type(self).built += 1


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenEntry:
    """A dataclass that cannot be written."""

    state: Any
    name: str = "frozen"


class Mode(enum.Enum):
    """A constant that containers may carry."""

    GREEDY = 1


class ContainerSuite(Subject):
    """Values taken apart by `wrap` and put together by `KVState.unwrap`."""

    def test_containers_come_back_fresh_around_the_same_arrays(self) -> None:
        a, b, c = (self.make((2, 3), Dtype.FLOAT32, seed) for seed in range(3))
        for value in (
            {"a": a, "b": b},
            {1: a, 0: b, "x": {}},
            [a, [], b],
            (a, (b,), ()),
            OrderedDict(z=a, y=b),
            Pair(a, [b, None]),
            Entry(Pair(a, b), c, scores=(a, b)),
            FrozenEntry({"a": a}),
            {
                "a": [a, {"b": (b, OrderedDict(c=c))}],
                "n": 1,
                "s": "x",
                "f": 0.5,
                "t": True,
                "o": None,
                "m": Mode.GREEDY,
            },
        ):
            built = Entry.built
            assert_same(wrap(value).unwrap(), value)
            assert Entry.built == built

    @pytest.mark.parametrize("seed", range(20))
    def test_any_nesting_comes_back(self, seed: int) -> None:
        source = random.Random(seed)
        arrays = [self.make((2,), Dtype.INT32, i) for i in range(3)]
        value = [arrays[0], _nesting(source, arrays, 4)]
        state = wrap(value)
        assert_same(state.unwrap(), value)
        assert state.copy().structure == json.loads(json.dumps(state.structure))
        copied = state.copy().unwrap()
        assert [self.values(array) for array in _leaves(copied)] == [self.values(array) for array in _leaves(value)]

    def test_an_array_alone_is_a_state(self) -> None:
        array = self.make((2, 3), Dtype.FLOAT32, 0)
        assert wrap(array).unwrap() is array

    def test_leaves_are_named_by_their_path(self) -> None:
        a, b, c = (self.make((2, 3), Dtype.FLOAT32, seed) for seed in range(3))
        assert list(wrap({"x": [a, Pair(b, 1)], "dotted.name": c}).leaves) == ["x.0", "x.1.key", "dotted%2Ename"]

    @pytest.mark.parametrize("value", [None, 1, "text", b"bytes", object(), [], {}, {"a": 1}, Entry(None, None)])
    def test_a_value_without_arrays_is_refused(self, value: object) -> None:
        with pytest.raises(UnknownValueError):
            wrap(value)

    def test_an_unknown_thing_beside_an_array_is_refused(self) -> None:
        array = self.make((2, 3), Dtype.FLOAT32, 0)
        for value in ({"a": array, "b": object()}, [object(), array], (array, {1, 2}), Entry(array, lambda: None)):
            with pytest.raises(UnknownValueError):
                wrap(value)

    def test_keys_that_cannot_be_written_down_are_refused(self) -> None:
        array = self.make((2, 3), Dtype.FLOAT32, 0)
        for value in ({(0, 1): array}, {1: array, "1": array}):
            with pytest.raises(UnknownValueError):
                wrap(value)

    def test_frameworks_do_not_mix_in_a_value(self) -> None:
        array, other = self.make((2, 3), Dtype.FLOAT32, 0), self.make_foreign()
        for value in ([array, other], {"a": {"b": other}, "c": array}, Entry(array, other)):
            with pytest.raises(MixedFrameworksError):
                wrap(value)

    def make_foreign(self) -> Array:
        """Return an array of another framework than the one that is tested."""
        return HostArray.empty((2, 3), Dtype.FLOAT32)

    def test_an_adapter_is_asked_for_by_name(self) -> None:
        array = self.make((2, 3), Dtype.FLOAT32, 0)
        assert wrap([array], adapter=self.framework).framework == self.framework
        with pytest.raises(MissingAdapterError):
            wrap([array], adapter="no such framework")
        with pytest.raises(MissingAdapterError):
            wrap([array]).to("no such framework")

    def test_a_length_that_the_leaves_cannot_have_is_refused(self) -> None:
        for length in (-1, 6, 1000):
            with pytest.raises(LengthMismatchError):
                wrap(self.kv(5), layout=KV, length=length)
            with pytest.raises(LengthMismatchError):
                adopt(self.kv(5), layout=KV, length=length)
        ragged = self.kv(5)
        ragged["layers"][1] = self.kv(4)["layers"][1]
        with pytest.raises(LengthMismatchError):
            wrap(ragged, layout=KV)
        assert wrap(ragged, layout=KV, length=4).length == 4

    def test_counters_say_the_length_and_must_agree(self) -> None:
        layout = KVLayout({"k": TOKENS(0), "cache_index": LENGTH, "end_index": LENGTH})
        counter = self.adapter.with_counter(self.make((2,), Dtype.INT32, 0), 3)
        value = {"k": self.make((8, 2), Dtype.FLOAT32, 0), "cache_index": counter}
        assert wrap(value, layout=layout).length == 3
        assert wrap({**value, "end_index": 3}, layout=layout).length == 3
        for extra in ({"end_index": self.adapter.with_counter(counter, 4)}, {"end_index": 4}):
            with pytest.raises(LengthMismatchError):
                wrap({**value, **extra}, layout=layout)
        with pytest.raises(LengthMismatchError):
            wrap(value, layout=layout, length=4)
        with pytest.raises(LengthMismatchError):
            wrap({**value, "cache_index": self.adapter.with_counter(counter, 9)}, layout=layout)

    def test_a_layout_that_does_not_fit_is_refused(self) -> None:
        array = self.make((2, 3), Dtype.FLOAT32, 0)
        for layout in (
            KVLayout({"a": TOKENS(2)}),
            KVLayout({"a": TOKENS(0)}, axes={"a": ("tokens",)}),
            KVLayout({"*": TOKENS(0)}, names={"*": "one"}),
        ):
            with pytest.raises(StructureMismatchError):
                wrap({"a": array, "b": array}, layout=layout)

    def test_a_cut_stays_within_the_state(self) -> None:
        state = wrap(self.kv(5), layout=KV)
        for start, stop in ((-1, 2), (0, 6), (3, 2), (6, 6), (-2, -1)):
            with pytest.raises(CutRangeError):
                state.cut(start, stop)


def assert_same(got: Any, wanted: Any) -> None:
    """Assert equal containers that are not the same objects, around the same arrays and constants."""
    assert type(got) is type(wanted)
    if isinstance(wanted, dict):
        assert list(got) == list(wanted)
        pairs = list(zip(got.values(), wanted.values(), strict=True))
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted)
        pairs = list(zip(got, wanted, strict=True))
    elif dataclasses.is_dataclass(wanted) and not isinstance(wanted, type):
        names = [field.name for field in dataclasses.fields(wanted)]
        pairs = [(getattr(got, name), getattr(wanted, name)) for name in names]
    elif isinstance(wanted, str | int | float | None):
        assert got == wanted
        return
    else:
        assert got is wanted
        return
    assert got is not wanted or wanted == ()
    for part, other in pairs:
        assert_same(part, other)


def _leaves(value: Any) -> list[Array]:
    if isinstance(value, dict):
        return [leaf for child in value.values() for leaf in _leaves(child)]
    if isinstance(value, list | tuple):
        return [leaf for child in value for leaf in _leaves(child)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [leaf for field in dataclasses.fields(value) for leaf in _leaves(getattr(value, field.name))]
    return [] if value is None or isinstance(value, str | int | float | enum.Enum) else [value]


def _nesting(source: random.Random, arrays: list[Array], depth: int) -> Any:
    """A random value of containers, constants and arrays."""
    if depth == 0:
        return source.choice([*arrays, None, 7, "text", 0.25, True])
    children = [_nesting(source, arrays, depth - 1) for _ in range(source.randrange(3))]
    named = {source.choice(["a", "b.c", 5]): child for child in children}
    ordered = OrderedDict((str(i), child) for i, child in enumerate(children))
    first = children[0] if children else None
    return source.choice([children, tuple(children), named, ordered, Pair(first, children), Entry(named, first)])
