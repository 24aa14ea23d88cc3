"""LMCache's storage backend over the storages of this house."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agnostic_cache import open_storage
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.errors import StorageError, WireError
from agnostic_cache.server.storage_backend import (
    CreateStorageBackend,
    LMSBackendInterface,
    LMSLocalBackend,
    LMSMemoryObj,
)
from agnostic_cache.storage.memory import MemoryStorage
from agnostic_cache.wire import CacheEngineKey, ClientCommand, ClientMetaMessage, LayerCacheEngineKey, MemoryFormat

MIB = 1024 * 1024
CODED = [None, *(dtype for dtype in Dtype if dtype.lm_code is not None)]


def key(chunk_hash: int = 1) -> CacheEngineKey:
    return CacheEngineKey("org/model", 1, 0, chunk_hash, Dtype.BFLOAT16)


def meta(chunk_hash: int = 1, length: int = 12, **changes: Any) -> ClientMetaMessage:
    fields: dict[str, Any] = {"fmt": MemoryFormat.KV_2LTD, "dtype": Dtype.BFLOAT16, "shape": (2, 1, 3, 1)}
    fields |= {"key": key(chunk_hash), "length": length} | changes
    return ClientMetaMessage(ClientCommand.PUT, **fields)


@pytest.fixture(params=["cpu", "memory://?max_bytes=64MiB", "file://"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made = CreateStorageBackend(f"{request.param}{tmp_path}/data" if request.param == "file://" else request.param)
    yield made
    made.close()


class TestLMSLocalBackend:
    @pytest.mark.parametrize("fmt", MemoryFormat)
    def test_what_is_put_comes_back(self, backend: LMSLocalBackend, fmt: MemoryFormat) -> None:
        for dtype in CODED:
            backend.put(meta(fmt=fmt, dtype=dtype), bytearray(b"twelve bytes"))
            found = backend.get(key())
            assert isinstance(found, LMSMemoryObj)
            assert found.data == bytearray(b"twelve bytes")
            assert (found.length, found.fmt, found.dtype, found.shape) == (12, fmt, dtype, (2, 1, 3, 1))
            assert found.dtype is None or found.dtype == dtype

    @pytest.mark.parametrize("shape", [(), (0,), (12,), (3, 0), (1, 2, 3, 2), (0, 0, 0, 0)], ids=str)
    @pytest.mark.parametrize("fmt", [MemoryFormat.KV_2LTD, MemoryFormat.BINARY], ids=str)
    def test_shapes_come_back_as_they_were(self, backend: LMSLocalBackend, shape: Any, fmt: MemoryFormat) -> None:
        backend.put(meta(shape=shape, fmt=fmt), bytearray(12))
        found = backend.get(key())
        assert found is not None
        assert found.shape == shape

    def test_what_is_of_torch_is_taken(self, backend: LMSLocalBackend) -> None:
        class Size(tuple[int, ...]):
            __slots__ = ()

        backend.put(meta(dtype=SimpleNamespace(name="torch.float16"), shape=Size((6, 1))), bytearray(12))
        found = backend.get(key())
        assert found is not None
        assert (found.dtype, found.shape, type(found.shape)) == ("float16", (6, 1), tuple)

    def test_the_last_put_counts(self, backend: LMSLocalBackend) -> None:
        for body in (b"first", b"", b"a longer one"):
            backend.put(meta(length=len(body)), bytearray(body))
            found = backend.get(key())
            assert found is not None
            assert bytes(found.data) == body
        assert backend.list_keys() == [key()]

    def test_what_is_there(self, backend: LMSLocalBackend) -> None:
        layer = LayerCacheEngineKey("m", 2, 1, -5, Dtype.INT8, {"lmcache.tag.user": "a%b"}, layer_id=3)
        assert not backend.contains(layer)
        assert backend.get(layer) is None
        backend.put(meta(key=layer), bytearray(12))
        backend.put(meta(2), bytearray(12))
        assert backend.contains(layer)
        assert not backend.contains(key())
        assert set(backend.list_keys()) == {layer, key(2)}
        backend.remove(layer)
        assert backend.list_keys() == [key(2)]

    def test_removing_what_is_missing(self, backend: LMSLocalBackend) -> None:
        with pytest.raises(KeyError):
            backend.remove(key())

    @pytest.mark.parametrize("length", [0, 11, 13, 2**31 - 1])
    def test_a_body_of_another_length_changes_nothing(self, backend: LMSLocalBackend, length: int) -> None:
        backend.put(meta(), bytearray(b"twelve bytes"))
        with pytest.raises(WireError):
            backend.put(meta(length=length), bytearray(12))
        found = backend.get(key())
        assert found is not None
        assert bytes(found.data) == b"twelve bytes"

    def test_what_cannot_be_said_changes_nothing(self, backend: LMSLocalBackend) -> None:
        backend.put(meta(), bytearray(b"twelve bytes"))
        wrong: list[dict[str, Any]] = [{"dtype": Dtype.INT8}, {"shape": (1, 1, 1, 1, 12)}]
        for changes in wrong:
            with pytest.raises(WireError):
                backend.put(meta(**changes), bytearray(12))
        found = backend.get(key())
        assert found is not None
        assert bytes(found.data) == b"twelve bytes"

    def test_what_was_handed_out_stays_as_it_was(self, backend: LMSLocalBackend) -> None:
        body = bytearray(b"twelve bytes")
        backend.put(meta(), body)
        held = backend.get(key())
        assert held is not None
        body[:] = bytes(12)
        for i in range(4):
            backend.put(meta(), bytearray([i]) * 12)
        assert bytes(held.data) == b"twelve bytes"


class TestTheBudget:
    def test_who_was_used_last_stays(self) -> None:
        backend = LMSLocalBackend(MemoryStorage(4 * MIB))
        for i in range(40):
            backend.put(meta(i, MIB - 64), bytearray(MIB - 64))
            assert backend.get(key(0)) is not None
        assert set(backend.list_keys()) == {key(0), key(37), key(38), key(39)}

    def test_what_is_too_large_changes_nothing(self) -> None:
        backend = LMSLocalBackend(MemoryStorage(4 * MIB))
        for i in range(3):
            backend.put(meta(i), bytearray(b"twelve bytes"))
        backend.put(meta(0, 4 * MIB), bytearray(4 * MIB))
        assert backend.list_keys() == [key(0), key(1), key(2)]
        found = backend.get(key(0))
        assert found is not None
        assert bytes(found.data) == b"twelve bytes"

    def test_room_that_is_dropped_changes_nothing(self, tmp_path: Path) -> None:
        for url in ("memory://?max_bytes=4MiB", f"file://{tmp_path}/data?max_bytes=4MiB"):
            backend = CreateStorageBackend(url)
            assert isinstance(backend, LMSLocalBackend)
            for i in range(3):
                backend.put(meta(i, MIB), bytearray(MIB))
            before = backend.storage.stats()
            room = backend.reserve(meta(0, 2 * MIB))
            assert room is not None
            room.body[:] = bytes([1]) * 2 * MIB
            assert len(backend.list_keys()) == 3
            room.drop()
            room.drop()
            assert backend.storage.stats() == before
            assert len(backend.list_keys()) == 3


class TestCreateStorageBackend:
    def test_memory(self) -> None:
        backend = CreateStorageBackend("cpu")
        assert isinstance(backend, LMSBackendInterface)
        assert isinstance(backend, LMSLocalBackend)

    def test_a_url_is_that_storage(self, tmp_path: Path) -> None:
        url = f"file://{tmp_path}/data"
        backend = CreateStorageBackend(url)
        backend.put(meta(), bytearray(b"twelve bytes"))
        backend.close()
        with open_storage(url) as storage:
            storage.put("of somebody else", b"no record")
            storage.put(key(2).to_string(), b"no record")
        backend = CreateStorageBackend(url)
        assert set(backend.list_keys()) == {key(), key(2)}
        found = backend.get(key())
        assert found is not None
        assert bytes(found.data) == b"twelve bytes"
        assert backend.get(key(2)) is None

    @pytest.mark.parametrize("device", ["gpu", "", "cuda:0", "/var/cache", "nowhere://", "memory://?colour=red"])
    def test_anything_else(self, device: str) -> None:
        with pytest.raises(ValueError, match=rf"^Unsupported device: {device.replace('?', '[?]')}$"):
            CreateStorageBackend(device)

    def test_a_storage_that_cannot_be_opened(self) -> None:
        with pytest.raises(StorageError):
            CreateStorageBackend("file:///proc/nowhere")
