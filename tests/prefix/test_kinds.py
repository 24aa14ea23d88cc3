"""One namespace, several writers: other dtypes, structures, weights and formats are never mixed, and never an error."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from toy_model import LAYOUTS, contents, state_of

from agnostic_cache import KVLayout, PrefixCache
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.blob.state_blob import StoredState
from agnostic_cache.errors import CacheBypassWarning
from agnostic_cache.state.layout import TOKENS
from agnostic_cache.storage.memory import MemoryStorage

BLOCK = 8
DOCUMENT = list(range(100, 130))
LAYOUT = KVLayout({"*": TOKENS(0)})


def make(**settings: Any) -> PrefixCache:
    defaults: dict[str, Any] = {"namespace": "toy", "block_size": BLOCK, "layout": LAYOUT, "clock": lambda: 1.0}
    return PrefixCache("1MiB", **(defaults | settings))


def plain(count: int, dtype: Dtype = Dtype.FLOAT32, width: int = 2, **names: Any) -> dict[str, Any]:
    return {name: HostArray.empty((count, width), dtype) for name in names or {"key": 1}}


def length(cache: PrefixCache, tokens: list[int], **where: Any) -> int:
    """Match and load: whatever is found can be joined."""
    with cache.match(tokens, **where) as match:
        loaded = match.load()
        assert match.length == (0 if loaded is None else next(iter(loaded.values())).shape[0])
        return match.length


OTHERS = {
    "dtype": lambda count: plain(count, Dtype.BFLOAT16),
    "extents": lambda count: plain(count, width=3),
    "leaves": lambda count: plain(count, key=1, value=1),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_state_of_another_kind_is_not_put_behind_what_is_there(other: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache = make()
    assert cache.insert(DOCUMENT[:16], plain(16)) == 2
    assert cache.insert(DOCUMENT, other(30)) == cache.insert(DOCUMENT, other(30)) == 0
    assert len(caplog.messages) == 1
    assert length(cache, DOCUMENT) == 16
    assert cache.insert(DOCUMENT, plain(30)) == 2
    assert length(cache, DOCUMENT) == 29
    assert cache.remove(DOCUMENT) == 30
    assert cache.insert(DOCUMENT, other(30)) == 4
    assert length(cache, DOCUMENT) == 29


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_chain_is_never_of_two_kinds(other: Any) -> None:
    cache = make()
    cache.insert(DOCUMENT, plain(30))
    cache.remove(DOCUMENT[:8])  # the others hang on a block that is gone
    assert cache.insert(DOCUMENT[:8], other(8)) == 1
    assert length(cache, DOCUMENT) == 8
    assert cache.insert(DOCUMENT, other(30)) == 3
    assert length(cache, DOCUMENT) == 29
    cache.insert([1, 2, 3], plain(3))
    cache.insert([1, 2, 3, 4, 5], other(5))
    assert length(cache, [1, 2, 3, 4, 5, 6]) in {3, 5}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_chain_is_never_of_two_kinds_where_some_lie_in_a_storage(other: Any) -> None:
    with make(storage="memory://") as cache:
        cache.insert(DOCUMENT, plain(30))
        cache.clear()
        cache.insert(DOCUMENT[:8], other(8))
        assert length(cache, DOCUMENT) == 8
        assert length(cache, DOCUMENT[:8]) == 7


def test_states_of_one_model_join_whether_their_snapshots_came_along_or_not() -> None:
    cache = make(layout=LAYOUTS["all"])
    cache.insert(DOCUMENT[:16], state_of(DOCUMENT[:16], "all", rows=99))
    cache.insert(DOCUMENT, state_of(DOCUMENT, "all", rows=99), length=24)
    cache.insert(DOCUMENT, state_of(DOCUMENT, "all", rows=99))
    with cache.match([*DOCUMENT, 1]) as match:
        assert match.length == 30
        assert contents(match.load(), "all") == contents(state_of(DOCUMENT, "all"), "all")


def test_blocks_whose_containers_differ_are_joined_in_those_of_the_last() -> None:
    layout = KVLayout({"0.key": TOKENS(0)})
    cache = make(layout=layout)
    cache.insert(DOCUMENT[:16], [plain(16)])
    cache.insert(DOCUMENT, (plain(30),))
    with cache.match([*DOCUMENT, 1]) as match:
        loaded = match.load()
    assert type(loaded) is tuple
    assert loaded[0]["key"].shape == (30, 2)


ONE, OTHER, JAX = "weights-torch-1", "weights-torch-2", "weights-jax-3"


@pytest.mark.parametrize("where", ["memory", "storage", "namespace"])
def test_blocks_of_other_weights_are_misses_and_one_warning(where: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {} if where == "memory" else {"storage": f"file://{tmp_path}/kv"}
    writer = make(**settings, fingerprint=ONE)
    assert writer.insert(DOCUMENT, plain(30)) == 4
    if where != "memory":
        writer.close()
        writer = make(**settings, fingerprint=OTHER)
    with pytest.warns(CacheBypassWarning):
        assert length(writer, DOCUMENT, fingerprint=OTHER) == 0
    assert length(writer, DOCUMENT, fingerprint=OTHER) == 0  # warned of already: a second warning would be an error
    assert writer.stats().mismatches == 2
    assert writer.stats().bypassed == 0
    assert length(writer, DOCUMENT, fingerprint=JAX) == (29 if where == "memory" else 24)  # names differ by framework
    assert length(writer, DOCUMENT, fingerprint=ONE) == (29 if where == "memory" else 24)
    assert writer.insert(DOCUMENT, plain(30), fingerprint=OTHER) == 4  # the later weights are those in use
    assert length(writer, DOCUMENT, fingerprint=OTHER) == 29
    assert length(writer, DOCUMENT, fingerprint=ONE) == 0
    writer.close()


def test_a_namespace_that_is_a_fingerprint_and_the_weights_that_are_met_name_the_reader() -> None:
    storage = MemoryStorage("1MiB")
    writer = make(storage=storage, namespace=ONE)
    writer.insert(DOCUMENT, plain(30))
    blobs = [StoredState(bytes(storage.get(key) or b"")) for key in storage.list_keys()]
    assert {blob.fingerprint for blob in blobs} == {ONE}
    assert {blob.framework for blob in blobs} == {"host"}

    class Model:
        pass

    model, other = Model(), Model()
    cache = make()
    assert cache.weights_context(model, 0, lambda: ONE) == b""
    cache.insert(DOCUMENT, plain(30))
    assert cache.weights_context(other, 0, lambda: OTHER) != b""
    assert length(cache, DOCUMENT) == 29
    with pytest.warns(CacheBypassWarning):
        assert length(cache, DOCUMENT, fingerprint=OTHER) == 0
    named = make(fingerprint=ONE)
    assert named.weights_context(other, 0, lambda: OTHER) != b""
    assert named.weights_context(model, 0, lambda: ONE) == b""


def test_who_says_nothing_of_weights_reads_and_is_read() -> None:
    cache = make()
    cache.insert(DOCUMENT, plain(30))
    assert length(cache, DOCUMENT, fingerprint=ONE) == 29
    cache.insert([1, 2, 3], plain(3), fingerprint=ONE)
    assert length(cache, [1, 2, 3]) == 2


def test_a_chain_is_never_of_two_weights_even_for_who_names_none() -> None:
    cache = make()
    cache.insert(DOCUMENT, plain(30), fingerprint=ONE)
    cache.remove(DOCUMENT[:8])
    cache.insert(DOCUMENT[:8], plain(8), fingerprint=OTHER)
    with pytest.warns(CacheBypassWarning):
        assert length(cache, DOCUMENT) == 8


def test_a_warning_that_is_an_error_leaves_nothing_borrowed() -> None:
    cache = make(fingerprint=ONE)
    cache.insert(DOCUMENT, plain(30))
    cache.insert(DOCUMENT[:8], plain(8), fingerprint=OTHER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CacheBypassWarning) as error:
            cache.match(DOCUMENT)
    cache.clear()
    assert cache.stats().current_bytes == 0, error


def test_a_block_of_an_older_format_is_a_miss_that_is_counted_and_goes() -> None:
    storage = MemoryStorage("1MiB")
    cache = make(storage=storage)
    cache.insert(DOCUMENT[:8], plain(8))
    (key,) = storage.list_keys()
    raw = bytes(storage.get(key) or b"")
    storage.put(key, raw.replace(b'"agnostic_cache.format":"2"', b'"agnostic_cache.format":"1"'))
    cache.clear()
    assert length(cache, DOCUMENT) == 0
    assert cache.stats().mismatches == 1
    assert storage.list_keys() == []
    assert cache.insert(DOCUMENT[:8], plain(8)) == 1
    cache.clear()
    assert length(cache, DOCUMENT) == 8
