"""KVLayout: what is declared of a leaf, and what two shapes tell."""

from collections.abc import Callable, Iterator, Mapping

import pytest

from agnostic_cache import KVLayout
from agnostic_cache.arrays.adapter import ArraySpec
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host_adapter import HostAdapter
from agnostic_cache.arrays.registry import register_adapter, unregister_adapter
from agnostic_cache.arrays.roles import axis_names
from agnostic_cache.errors import LayoutUnknownError, StructureMismatchError
from agnostic_cache.state.layout import LENGTH, SNAPSHOT, TOKENS, WINDOW


class Shapes(HostAdapter):
    """Takes what ``init_fn`` returns for the shapes of its leaves."""

    framework = "shapes"

    def abstract_specs(self, init_fn: Callable[[int], object], length: int) -> Mapping[str, ArraySpec]:
        shapes = init_fn(length)
        assert isinstance(shapes, dict)
        return {name: ArraySpec(shape, dtype, "abstract") for name, (shape, dtype) in shapes.items()}


@pytest.fixture(autouse=True, scope="module")
def shapes() -> Iterator[None]:
    register_adapter("shapes", Shapes())
    yield
    unregister_adapter("shapes")


def roles(layout: KVLayout, ndim: int, *names: str) -> list[object]:
    return [layout.describe(name, ndim)[1].role for name in names]


# --- declared --------------------------------------------------------------------------------------------------------


def test_a_layer_number_and_a_star_stand_for_what_they_should() -> None:
    layout = KVLayout({"layers.{i}.k": TOKENS(1), "*.state": WINDOW(1, 4), "n.*": LENGTH})
    assert roles(layout, 3, "layers.0.k", "layers.12.k") == [TOKENS(1)] * 2
    assert roles(layout, 3, "a.state", "a.b.state", "n.x") == [WINDOW(1, 4)] * 2 + [LENGTH]
    assert roles(layout, 3, "layers.x.k", "layers.0.k.v", "0.layers.0.k", "layers.0_k", "state") == [SNAPSHOT] * 5
    assert layout.declares("layers.3.k")
    assert not layout.declares("layers.3.v")


def test_the_first_pattern_that_matches_counts() -> None:
    assert roles(KVLayout({"a.*": TOKENS(0), "*.b": LENGTH}), 1, "a.b", "c.b") == [TOKENS(0), LENGTH]


def test_a_number_that_comes_twice_is_the_same_twice() -> None:
    layout = KVLayout({"{i}.block_{i}": LENGTH})
    assert roles(layout, 1, "3.block_3", "3.block_4") == [LENGTH, SNAPSHOT]


def test_patterns_are_no_regular_expressions() -> None:
    assert roles(KVLayout({"a(.)+[k]": LENGTH}), 1, "a(.)+[k]", "abk") == [LENGTH, SNAPSHOT]


def test_names_are_mapped_with_their_layer_numbers() -> None:
    layout = KVLayout(names={"layer_{i}.k": "layers.{i}.key", "all": "layers.*.key"})
    assert [layout.describe(name, 4)[0] for name in ("layer_7.k", "all", "else")] == [
        "layers.7.key",
        "layers.*.key",
        "else",
    ]


def test_an_axis_may_be_counted_from_the_end() -> None:
    assert roles(KVLayout({"k": TOKENS(-3)}), 4, "k") == [TOKENS(1)]
    assert roles(KVLayout({"k": WINDOW(-1, 7)}), 2, "k") == [WINDOW(1, 7)]


@pytest.mark.parametrize("role", [TOKENS(2), TOKENS(-3), WINDOW(5, 1)])
def test_an_axis_that_is_not_there_is_an_error(role: TOKENS | WINDOW) -> None:
    with pytest.raises(StructureMismatchError):
        KVLayout({"k": role}).describe("k", 2)


def test_axes_are_named_where_their_number_fits() -> None:
    layout = KVLayout({"k": TOKENS(1)}, axes={"k": ("batch", "tokens", "rank")})
    assert layout.describe("k", 3)[1].axes == ("batch", "tokens", "rank")
    with pytest.raises(StructureMismatchError):
        layout.describe("k", 4)


@pytest.mark.parametrize(
    ("ndim", "tokens", "stack", "named"),
    [
        (4, 1, None, ("batch", "tokens", "heads", "dim")),
        (4, 2, None, ("batch", "heads", "tokens", "dim")),
        (4, -2, None, ("batch", "heads", "tokens", "dim")),
        (5, 2, 0, ("layers", "batch", "tokens", "heads", "dim")),
        (3, 1, None, ("batch", "tokens", "dim")),
        (2, 0, None, ("tokens", "axis_1")),
        (3, None, None, ("axis_0", "axis_1", "axis_2")),
        (0, None, None, ()),
    ],
)
def test_axes_are_guessed_from_the_tokens(
    ndim: int, tokens: int | None, stack: int | None, named: tuple[str, ...]
) -> None:
    assert axis_names(ndim, tokens, stack) == named


def test_a_stacked_leaf_has_an_axis_of_layers() -> None:
    layout = KVLayout({"k": TOKENS(2)}, stack_axis=0)
    assert layout.describe("k", 5)[1].axes[0] == "layers"
    assert "layers" not in layout.describe("other", 5)[1].axes


def test_an_unknown_rotary_convention_is_an_error() -> None:
    assert [KVLayout(rotary=name).rotary for name in ("half", "interleaved", None)] == ["half", "interleaved", None]
    with pytest.raises(LayoutUnknownError):
        KVLayout(rotary="thirds")


# --- inferred --------------------------------------------------------------------------------------------------------


def test_one_axis_that_follows_the_length_is_that_of_the_tokens() -> None:
    f32, i32 = Dtype.FLOAT32, Dtype.INT32
    layout = KVLayout.infer(
        lambda n: {
            "a.key": ((1, n, 2, 8), f32),
            "a.value": ((1, 2, n, 8), f32),
            "stacked": ((6, 1, n, 2, 8), f32),
            "a.cache_index": ((), i32),
            "end_index": ((3,), i32),
            "cumulative_length": ((), f32),  # no integer
            "counter": ((), i32),  # no known name
            "ring": ((1, 64, 2, 8), f32),
            "compressed": ((1, n // 4, 8), f32),
            "padded": ((1, n + 8, 8), f32),
            "mask": ((n, n), f32),
            "{i}.*": ((n,), f32),
        },
        framework="shapes",
    )
    assert roles(layout, 4, "a.key", "a.value") == [TOKENS(1), TOKENS(2)]
    assert roles(layout, 5, "stacked") == [TOKENS(2)]
    assert roles(layout, 1, "a.cache_index", "end_index") == [LENGTH] * 2
    snapshots = ("cumulative_length", "counter", "ring", "compressed", "padded", "mask", "else", "3.x")
    assert roles(layout, 3, *snapshots) == [SNAPSHOT] * len(snapshots)
    assert roles(layout, 1, "{i}.*") == [TOKENS(0)]  # a name, not a pattern


def test_what_is_said_of_names_is_kept() -> None:
    layout = KVLayout.infer(
        lambda n: {"l_2.k": ((1, n), Dtype.INT8)},
        framework="shapes",
        names={"l_{i}.k": "layers.{i}.key"},
        rotary="half",
        lengths=(7, 9),
    )
    assert layout.describe("l_2.k", 2)[0] == "layers.2.key"
    assert layout.rotary == "half"


@pytest.mark.parametrize(
    "init_fn",
    [
        lambda n: {"x": ((n // n,), Dtype.INT8)},
        lambda n: {f"x{n}": ((n,), Dtype.INT8)},
        lambda n: {"x": ((n, *(1,) * (n % 3)), Dtype.INT8)},
        lambda _: {},
    ],
    ids=["nothing follows", "other leaves", "other rank", "no leaves"],
)
def test_what_cannot_be_inferred_is_an_error(init_fn: Callable[[int], object]) -> None:
    with pytest.raises(LayoutUnknownError):
        KVLayout.infer(init_fn, framework="shapes")
