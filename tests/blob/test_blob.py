"""A state as bytes, and back: whole, or not at all."""

import json
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnostic_cache import KVLayout, KVState, wrap
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.registry import adapter_named
from agnostic_cache.blob.checksum import checksum
from agnostic_cache.blob.safetensors import Part, Parts, parse_header
from agnostic_cache.blob.state_blob import Blob, StoredState, encode
from agnostic_cache.errors import AgnosticCacheError, BlobError, ReleasedError, StructureMismatchError
from agnostic_cache.state.layout import KEEP, LENGTH, SNAPSHOT, TOKENS, WINDOW
from agnostic_cache.testing import pattern

LAYOUT = KVLayout({"layers.{i}.k": TOKENS(1), "short": TOKENS(0, stride=4), "window": WINDOW(0, 3)}, rotary="half")


def array(shape: tuple[int, ...], dtype: Dtype = Dtype.FLOAT32, seed: int = 0) -> HostArray:
    made = HostArray.empty(shape, dtype)
    made.memory[:] = pattern(shape, dtype, seed)
    return made


def state() -> KVState:
    """One leaf of every role, an array that stands in two places, and one that a cut left behind."""
    twice = array((2, 8, 3), seed=1)
    native = {
        "layers": [{"k": twice}, {"k": array((2, 8, 3), Dtype.BFLOAT16, seed=2)}],
        "again": (twice, {"x.y": array((5,), Dtype.INT8)}),
        "short": array((2, 3)),
        "window": array((3, 2), Dtype.FLOAT16),
        "cache_index": 8,
        "note": None,
    }
    return wrap(native, layout=LAYOUT)


def said(of: KVState) -> dict[str, Any]:
    """Everything that a state says of itself, bytes included."""
    leaves = {name: (*leaf[1:], leaf.array.dtype, leaf.array.shape) for name, leaf in of.leaves.items()}
    values = {name: bytes(leaf.array.memory) for name, leaf in of.leaves.items()}
    return {
        "leaves": leaves, "values": values, "length": of.length, "missing": of.missing, "structure": of.structure,
        "rotary": of.rotary,
    }  # fmt: skip


def test_a_state_comes_back_as_it_was() -> None:
    blob = Blob(bytes(encode(state(), tokens=range(8))))
    blob.verify()
    assert said(blob.state()) == said(state())
    assert list(blob.tokens() or ()) == list(range(8))
    assert (blob.length, blob.framework) == (8, "host")
    assert blob.state().unwrap()["cache_index"] == 8


def test_every_role_comes_back_as_it_was() -> None:
    roles: dict[str, Any] = {"k": TOKENS(0, 2), "w": WINDOW(0, 3), "n": LENGTH, "mask": KEEP, "s": SNAPSHOT}
    native = {name: array((3,), Dtype.UINT8, i) for i, name in enumerate(roles)}
    native["n"] = adapter_named("host").with_counter(native["n"], 7)
    kept = wrap(native, layout=KVLayout(roles), length=7)
    back = Blob(bytes(encode(kept))).state()
    assert {name: leaf.role for name, leaf in back.leaves.items()} == roles
    assert said(back) == said(kept)
    assert said(Blob(bytes(encode(kept.cut(2, 7)))).state()) == said(kept.cut(2, 7))


def test_what_a_cut_left_behind_stays_missing() -> None:
    cut = state().cut(0, 4)
    blob = Blob(bytes(encode(cut)))
    assert said(blob.state()) == said(cut)
    assert blob.state().missing
    assert blob.tokens() is None


@pytest.mark.parametrize("dtype", Dtype, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (5, 7)], ids=str)
def test_every_dtype_and_shape(dtype: Dtype, shape: tuple[int, ...]) -> None:
    one, other = array(shape, dtype, 1), array((3,), dtype, 2)
    held = Blob(bytes(encode(wrap({"one": one, "other": other})))).state()
    for name, wanted in (("one", one), ("other", other)):
        found = held.leaves[name].array
        assert (found.dtype, found.shape, bytes(found.memory)) == (dtype, wanted.shape, bytes(wanted.memory))


def test_names_that_the_format_keeps_for_itself() -> None:
    native = {"__metadata__": array((2,)), "agnostic_cache": {"checksum": array((3,)), "padding": [array((1,))] * 3}}
    blob = Blob(bytes(encode(wrap(native))))
    blob.verify()
    assert said(blob.state()) == said(wrap(native))


def test_an_array_is_stored_once() -> None:
    big = array((4, 1024))
    assert encode(wrap({"a": big, "b": big})).nbytes < encode(wrap({"a": big, "b": array((4, 1024))})).nbytes - 16_000
    held = Blob(bytes(encode(wrap({"a": big, "b": big})))).state()
    assert held.leaves["a"].array is held.leaves["b"].array


def test_tensors_are_aligned_and_nothing_is_copied() -> None:
    parts = encode(state())
    [block] = HostArray.empty_block([((parts.nbytes,), Dtype.UINT8)])
    parts.write_into(block.memory)
    held = Blob(block.memory).state()
    header = parse_header(block.memory)
    assert header.nbytes % 64 == 0
    assert all(tensor.start % 64 == 0 for tensor in header.tensors.values())
    assert all(leaf.array.memory.obj is block.memory.obj for leaf in held.leaves.values())


def test_parts_are_the_arrays_themselves() -> None:
    kept = array((2, 300_000))
    pieces = list(encode(wrap({"a": kept})))
    assert sum(piece.nbytes for piece in pieces if piece.obj is kept.memory.obj) == kept.nbytes
    assert max(piece.nbytes for piece in pieces) < kept.nbytes


def test_parts_can_be_read_twice() -> None:
    parts = encode(state())
    first = bytes(parts)
    assert bytes(parts) == first
    assert len(first) == parts.nbytes


def test_without_a_checksum() -> None:
    blob = Blob(bytes(encode(state(), checksum=False)))
    assert blob.algorithm is None
    with pytest.raises(BlobError):
        blob.verify()
    assert said(blob.state()) == said(state())


def test_a_state_that_is_gone_is_refused() -> None:
    gone = state()
    gone.release()
    with pytest.raises(ReleasedError):
        encode(gone)


@pytest.mark.parametrize("tokens", [[-1], [2**32], ["a"], [1.5]])
def test_tokens_out_of_range_are_refused(tokens: list[Any]) -> None:
    with pytest.raises(BlobError):
        encode(state(), tokens=tokens)


def test_keys_that_are_rotated_otherwise_are_refused() -> None:
    blob = Blob(bytes(encode(state())))
    assert blob.state(layout=LAYOUT).layout is LAYOUT
    with pytest.raises(StructureMismatchError):
        blob.state(layout=KVLayout(rotary="interleaved"))


# --- bytes that are no whole blob ------------------------------------------------------------------------------------

WHOLE = bytes(encode(state(), tokens=range(8)))


def read(data: bytes, *, verified: bool) -> KVState:
    blob = Blob(data)
    if verified:
        blob.verify()
    return blob.state()


def test_every_cut_is_found() -> None:
    for size in range(0, len(WHOLE), 7):
        with pytest.raises(BlobError):
            read(WHOLE[:size], verified=False)


@settings(max_examples=500)
@given(at=st.integers(0, len(WHOLE) * 8 - 1))
def test_every_flipped_bit_is_found(at: int) -> None:
    data = bytearray(WHOLE)
    data[at // 8] ^= 1 << at % 8
    with pytest.raises(BlobError):
        read(bytes(data), verified=True)


@settings(max_examples=500)
@given(st.data())
def test_changed_bytes_are_refused_or_read_within_the_blob(data: st.DataObject) -> None:
    """Without the checksum: what the header claims is never trusted."""
    changed = bytearray(WHOLE)
    header = int.from_bytes(WHOLE[:8], "little")
    for at in data.draw(st.lists(st.integers(0, header + 7), min_size=1, max_size=4)):
        changed[at] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(changed), verified=False)
    except BlobError:
        return
    assert all(leaf.array.memory.nbytes <= len(WHOLE) for leaf in found.leaves.values())


def rewritten(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A blob whose header lies, and is padded and counted as it should be."""
    size = int.from_bytes(WHOLE[:8], "little")
    header = json.loads(WHOLE[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + WHOLE[8 + size :]


def about_state(**facts: Any) -> Callable[[dict[str, Any]], object]:
    def change(header: dict[str, Any]) -> None:
        said = json.loads(header["__metadata__"]["agnostic_cache.state"]) | facts
        header["__metadata__"]["agnostic_cache.state"] = json.dumps(said)

    return change


def about_tensor(name: str, **facts: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].update(facts)


def about_file(**facts: Any) -> Callable[[dict[str, Any]], object]:
    named = {f"agnostic_cache.{name}": value for name, value in facts.items()}
    return lambda header: header["__metadata__"].update(named)


BIG = 2**63
KIND = {"role": "snapshot", "axes": ["a", "b"], "dtype": "float16", "frozen": False, "first": 0}
LIES = {
    "shape": about_tensor("window", shape=[BIG, 2]),
    "shapes that cancel": about_tensor("window", shape=[-3, -2]),
    "shape of floats": about_tensor("window", shape=[3.0, 2]),
    "shape is no list": about_tensor("window", shape=7),
    "offsets": about_tensor("window", data_offsets=[0, BIG]),
    "offsets backwards": about_tensor("window", data_offsets=[BIG, 0]),
    "no offsets": about_tensor("window", data_offsets=[]),
    "dtype": about_tensor("window", dtype="F128"),
    "a tensor is a number": lambda header: header.update(window=3),
    "a tensor too few": lambda header: header.pop("window"),
    "metadata is a list": lambda header: header.update(__metadata__=[]),
    "metadata is no text": about_file(state=3),
    "unknown format": about_file(format="99"),
    "the format before": about_file(format="1"),
    "a framework that is no name": about_state(framework=["torch"]),
    "a fingerprint that is no name": about_state(fingerprint=7),
    "state is no JSON": about_file(state="{"),
    "state is deep": about_file(state="[" * 100_000),
    "structure is deep": about_file(structure='{"kind":"list","keys":[0],"children":[' * 5000),
    "structure is a number": about_file(structure="3"),
    "length": about_state(length=BIG),
    "length is negative": about_state(length=-1),
    "length is true": about_state(length=True),
    "leaves of nothing": about_state(leaves={"nothing": 0}),
    "leaves of no kind": about_state(leaves={"window": 77}),
    "kinds": about_state(kinds=[{}]),
    "axis": about_state(kinds=[KIND | {"role": "tokens", "axis": 9, "stride": 1}], leaves={"window": 0}),
    "stride": about_state(kinds=[KIND | {"role": "tokens", "axis": 0, "stride": 0}], leaves={"window": 0}),
    "axes": about_state(kinds=[KIND | {"axes": ["a"]}], leaves={"window": 0}),
    "another dtype": about_state(kinds=[KIND | {"dtype": "float64"}], leaves={"window": 0}),
    "rotary": about_state(rotary="sideways"),
    "checksum": about_file(checksum="crc32c"),
}  # fmt: skip


@pytest.mark.parametrize("change", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_an_error_without_allocation(change: Callable[[dict[str, Any]], object]) -> None:
    data = rewritten(change)
    tracemalloc.start()
    try:
        with pytest.raises(BlobError):
            read(data, verified=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(data) + 1_000_000


@pytest.mark.parametrize("length", [9, 12, 2**40])
def test_a_length_that_its_rows_do_not_have_is_refused(length: int) -> None:
    blob = StoredState(rewritten(about_state(length=length)))
    with pytest.raises(BlobError):
        blob.state()


@pytest.mark.parametrize("behind", [b"\x00", b"x" * 64])
def test_something_behind_a_file_without_a_checksum_is_found(behind: bytes) -> None:
    data = bytes(encode(state(), checksum=False))
    with pytest.raises(BlobError):
        StoredState(data + behind)
    with pytest.raises(BlobError):
        parse_header(memoryview(data + behind))


def test_the_writer_of_a_blob_is_named() -> None:
    assert StoredState(bytes(encode(state()))).fingerprint is None
    assert StoredState(bytes(encode(state(), fingerprint="weights-host-1"))).fingerprint == "weights-host-1"
    assert Blob is StoredState  # what it was called


@pytest.mark.parametrize("claimed", [0, 1, 2**20, 2**31, 2**62, 2**63, 2**64 - 1])
def test_a_header_of_another_size(claimed: int) -> None:
    with pytest.raises(BlobError):
        Blob(claimed.to_bytes(8, "little") + WHOLE[8:])


@pytest.mark.parametrize("data", [b"", b"\x00" * 8, b"{}", b"PK\x03\x04" * 100, b"\xff" * 4096])
def test_foreign_bytes(data: bytes) -> None:
    with pytest.raises(BlobError):
        Blob(data)


def test_something_behind_a_blob_is_found() -> None:
    with pytest.raises(BlobError):
        Blob(WHOLE + b"\x00")


def test_a_plain_safetensors_file_is_a_state_of_which_nothing_is_known() -> None:
    def part(name: str, data: bytes) -> Part:
        return Part(name, "I16", (len(data) // 2,), len(data), lambda: (memoryview(data),))

    held = Blob(bytes(Parts([part("b.c", b"1234"), part("a", b"56")], {"by": "others"}, algorithm=None)))
    assert (held.framework, held.producer, held.length) == (None, None, 0)
    native: Mapping[str, HostArray] = held.state().unwrap()
    assert {name: bytes(value.memory) for name, value in native.items()} == {"b.c": b"1234", "a": b"56"}


def test_an_unknown_checksum_is_refused() -> None:
    with pytest.raises(AgnosticCacheError):
        checksum("md5")
