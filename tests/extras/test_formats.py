"""Our blobs and the safetensors library's files are the same format, and xxh3-128 is the checksum where it is there."""

import ctypes
import zlib

import pytest
import xxhash
from safetensors import TensorSpec, deserialize, serialize

from agnostic_cache import wrap
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.blob.checksum import best_algorithm, checksum
from agnostic_cache.blob.safetensors import parse_header
from agnostic_cache.blob.state_blob import Blob, encode
from agnostic_cache.errors import BlobError
from agnostic_cache.testing import pattern

SHAPES = [(), (0,), (3, 5), (2, 64)]
STAND_INS = {Dtype.INT4: "I8", Dtype.UINT4: "U8", Dtype.COMPLEX128: "F64"}


def array(shape: tuple[int, ...], dtype: Dtype) -> HostArray:
    made = HostArray.empty(shape, dtype)
    made.memory[:] = pattern(shape, dtype, 0)
    return made


@pytest.mark.parametrize("dtype", Dtype, ids=str)
def test_the_library_reads_ours(dtype: Dtype) -> None:
    kept = {str(shape): array(shape, dtype) for shape in SHAPES}
    read = dict(deserialize(bytes(encode(wrap(kept), tokens=[1, 2, 3]))))  # type: ignore[no-untyped-call]
    for name, held in kept.items():
        assert bytes(read[name]["data"]) == bytes(held.memory)
        assert read[name]["dtype"] == (dtype.safetensors or STAND_INS[dtype])
        assert tuple(read[name]["shape"]) == (*held.shape, *((2,) if dtype is Dtype.COMPLEX128 else ()))


@pytest.mark.parametrize("dtype", [dtype for dtype in Dtype if dtype.safetensors], ids=str)
def test_we_read_the_library_s(dtype: Dtype) -> None:
    kept = {str(shape): array(shape, dtype) for shape in SHAPES}
    buffers = {name: ctypes.create_string_buffer(bytes(held.memory)) for name, held in kept.items()}
    specs = {
        name: TensorSpec(
            dtype=dtype.value, shape=list(held.shape), data_ptr=ctypes.addressof(buffers[name]), data_len=held.nbytes
        )
        for name, held in kept.items()
    }
    state = Blob(serialize(specs, {"some": "text"})).state()
    for name, held in kept.items():
        found = state.leaves[name].array
        assert (found.dtype, found.shape, bytes(found.memory)) == (dtype, held.shape, bytes(held.memory))


def test_the_checksum_is_that_of_the_bytes_before_it() -> None:
    data = bytes(encode(wrap(array((100,), Dtype.FLOAT32))))
    assert best_algorithm() == parse_header(memoryview(data)).algorithm == "xxh3-128"
    assert data[-16:] == xxhash.xxh3_128(data[:-16]).digest()
    Blob(data).verify()


def test_a_changed_byte_is_found() -> None:
    data = bytearray(encode(wrap(array((100,), Dtype.FLOAT32))).__bytes__())
    data[-100] ^= 1
    with pytest.raises(BlobError):
        Blob(data).verify()


@pytest.mark.parametrize(("name", "digest"), [
    ("crc32", zlib.crc32(b"hello world").to_bytes(4, "little")),
    ("xxh3-128", xxhash.xxh3_128(b"hello world").digest()),
])  # fmt: skip
def test_checksums_run_over_pieces(name: str, digest: bytes) -> None:
    running = checksum(name)
    running.update(memoryview(b"hello "))
    running.update(memoryview(b"world"))
    assert running.digest() == digest
