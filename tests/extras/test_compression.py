"""Compressed files: smaller, and the same bytes."""

import random
import struct
from pathlib import Path

import pytest

from agnostic_cache import open_storage
from agnostic_cache.errors import BlobError
from agnostic_cache.storage.codec import decode, encode
from agnostic_cache.storage.file import FileStorage
from agnostic_cache.testing import StorageSuite
from agnostic_cache.testing.storage_suite import read

CODEC = "byteplanes+zstd"


class TestCompressed(StorageSuite):
    outlives = True
    bounded = False  # what fits depends on what it is

    def make(self, place: Path, max_bytes: int | None = None) -> FileStorage:
        return FileStorage(place / "kv", max_bytes, compress=CODEC)


def floats(count: int) -> bytes:
    """Numbers in bf16, as keys and values are: of a few exponents, and of any mantissa."""
    source = random.Random(0)
    return b"".join(struct.pack("<f", source.gauss(0, 1))[2:] for _ in range(count))


def test_floats_take_less_room(tmp_path: Path) -> None:
    data = floats(100_000)
    with open_storage(f"file://{tmp_path}?compress={CODEC}") as storage:
        storage.put("a", data)
        assert storage.stats().current_bytes < len(data) / 1.3
        assert read(storage, "a") == data


def test_entries_of_either_kind_are_read(tmp_path: Path) -> None:
    with FileStorage(tmp_path) as plain, FileStorage(tmp_path, compress=CODEC) as packed:
        plain.put("a", b"plain")
        packed.put("b", b"packed")
        assert (read(packed, "a"), read(plain, "b")) == (b"plain", b"packed")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1001])
def test_odd_sizes(size: int) -> None:
    data = random.Random(size).randbytes(size)
    packed = encode(data, CODEC)
    assert isinstance(packed, bytes)
    assert bytes(decode(memoryview(packed), CODEC)) == data


def test_what_was_not_packed_is_refused_without_allocation() -> None:
    packed = encode(b"some bytes" * 100, CODEC)
    assert isinstance(packed, bytes)
    claims = [struct.pack("<Q", size) + packed[8:] for size in (0, 999, 1001, 2**40, 2**63, 2**64 - 1)]
    for wrong in (b"", b"short", bytes(100), packed[:-1], packed + b"x", packed[:16], *claims):
        with pytest.raises(BlobError):
            decode(memoryview(wrong), CODEC)
