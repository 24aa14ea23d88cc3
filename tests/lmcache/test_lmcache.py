"""LMCache's own client against our server, our client against LMCache's own server, and both servers side by side."""

# pyright: reportMissingImports=false

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import closing
from itertools import product
from typing import Any

import lmcache.v1.protocol as theirs
import pytest
import torch
from lmcache.utils import CacheEngineKey, LayerCacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_allocators.ad_hoc_memory_allocator import AdHocMemoryAllocator
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from server_thread import LIST, Client, ServerThread, running

from agnostic_cache import wire as ours
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.errors import StorageError
from agnostic_cache.eviction import PutStatus
from agnostic_cache.storage.lm import LMStorage
from agnostic_cache.testing.storage_suite import read

MIB = 1024 * 1024
DTYPES = [dtype for dtype in theirs.DTYPE_TO_INT if dtype not in {None, torch.half}] + [torch.half]
SHAPES = {"KV_MLA_FMT": (1, 3, 4, 8), "EC_TD": (12, 8), "HS_TD": (12, 8), "KV_T2D": (6, 2, 8), "KV_2TD": (2, 6, 8)}
KV_FORMATS = [fmt for fmt in MemoryFormat if fmt.name not in {"UNDEFINED", "BINARY", "BINARY_BUFFER"}]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with running("memory://?max_bytes=512MiB") as server:
        yield server


@pytest.fixture(scope="module")
def original() -> Iterator[tuple[str, int]]:
    """LMCache's own server, in a process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port)])
    for _ in range(600):
        with closing(socket.socket()) as trying:
            if not trying.connect_ex(("127.0.0.1", port)):
                break
        threading.Event().wait(0.1)
    yield "127.0.0.1", port
    process.kill()
    process.wait()


class TheirClient:
    """LMCache's connector, with the loop that it asks for."""

    def __init__(self, address: tuple[str, int]) -> None:
        config: Any = LMCacheEngineConfig.from_defaults(chunk_size=256)
        metadata = LMCacheMetadata("m", 1, 1, 0, 0, torch.float16, (2, 2, 256, 2, 8))
        self.memory: Any = LocalCPUBackend(
            config, metadata, dst_device="cpu", memory_allocator=AdHocMemoryAllocator("cpu")
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.connector: Any = LMCServerConnector(*address, self._loop, self.memory)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def put(self, key: CacheEngineKey, data: torch.Tensor, fmt: MemoryFormat) -> None:
        held = self.memory.allocate(data.shape, data.dtype, fmt)
        held.tensor.view(torch.uint8).copy_(data.view(torch.uint8))
        self.run(self.connector.put(key, held))
        held.ref_count_down()

    def get(self, key: CacheEngineKey) -> Any:
        return self.run(self.connector.get(key))

    def exists(self, key: CacheEngineKey) -> bool:
        return bool(self.run(self.connector.exists(key)))

    def close(self) -> None:
        self.run(self.connector.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def client(server: ServerThread) -> Iterator[TheirClient]:
    made = TheirClient(server.address)
    yield made
    made.close()


def bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an array of any bits."""
    source = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=source).view(dtype).squeeze(-1)


class TestTheirClient:
    @pytest.mark.parametrize("fmt", KV_FORMATS, ids=[fmt.name for fmt in KV_FORMATS])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_put_get_exists(self, client: TheirClient, dtype: torch.dtype, fmt: MemoryFormat) -> None:
        key = CacheEngineKey("org/model", 1, 0, hash((str(dtype), fmt.value)), torch.bfloat16)
        data = bits(SHAPES.get(fmt.name, (2, 3, 4, 8)), dtype)
        assert not client.exists(key)
        assert client.get(key) is None
        client.put(key, data, fmt)
        assert client.exists(key)
        assert client.connector.exists_sync(key)
        found = client.get(key)
        assert torch.equal(found.tensor.view(torch.uint8), data.view(torch.uint8))
        said = (found.get_dtype(), found.get_shape(), found.get_memory_format())
        assert said == (dtype, data.shape, fmt)
        found.ref_count_down()

    def test_large_bodies(self, client: TheirClient) -> None:
        for i, size in enumerate((1, 8, 64)):
            key = CacheEngineKey("org/large", 1, 0, i, torch.bfloat16)
            data = bits((2, 1, size * 1024, 256), torch.bfloat16)
            client.put(key, data, MemoryFormat.KV_2LTD)
            found = client.get(key)
            assert torch.equal(found.tensor.view(torch.uint8), data.view(torch.uint8))
            found.ref_count_down()

    def test_keys(self, client: TheirClient, server: ServerThread) -> None:
        configs = {"lmcache.tag.user": "a", "other": 1}
        keys = [
            CacheEngineKey("org/model", 2, 1, -5, torch.int8),
            CacheEngineKey("org/model", 2, 1, 5, torch.float8_e4m3fn, configs),
            LayerCacheEngineKey("org/model", 2, 1, 5, torch.half, None, 7),
            LayerCacheEngineKey("org/model", 2, 1, 5, torch.half, configs, 7),
        ]
        for key in keys:
            client.put(key, bits((2, 1, 4, 8), torch.float16), MemoryFormat.KV_2LTD)
            assert client.exists(key)
            mine = ours.parse_cache_key(key.to_string())
            assert mine.to_string() == key.to_string()
            assert mine in server.backend.list_keys()

    def test_their_list_is_a_stub(self, client: TheirClient) -> None:
        assert client.run(client.connector.list()) is None


class TestSideBySide:
    """The same bytes in, the same bytes out."""

    @pytest.mark.parametrize("dtype", range(9))
    def test_every_code(self, server: ServerThread, original: tuple[str, int], dtype: int) -> None:
        both = [server.client(), Client(original)]
        key = CacheEngineKey("org/both", 1, 0, 255, torch.bfloat16)
        shapes = [(2, 3, 4, 8), (6, 8), (5,), (0, 0, 0, 0), (1, 0, 2, 0)]
        for fmt, shape, location in product(MemoryFormat, shapes, (None, "LocalCPUBackend")):
            element: Any = theirs.INT_TO_DTYPE[dtype]
            body = bytes(bits((64,), torch.uint8).tolist())
            requests = []
            for command in (theirs.ClientCommand.PUT, theirs.ClientCommand.EXIST, theirs.ClientCommand.GET):
                length = 64 if command is theirs.ClientCommand.PUT else 0
                made: Any = theirs.ClientMetaMessage(command, key, length, fmt, element, torch.Size(shape), location)
                header = made.serialize()
                assert ours.ClientMetaMessage.deserialize(header).serialize() == header
                requests.append(header + (body if length else b""))
            answers = []
            for one in both:
                one.send(b"".join(requests))
                answers.append(one.read(36 + 36 + 64))
            assert answers[0] == answers[1]
            assert answers[0][-64:] == body
        for one in both:
            one.socket.close()

    def test_misses_and_health(self, server: ServerThread, original: tuple[str, int]) -> None:
        answers = []
        for one in (server.client(), Client(original)):
            with one:
                answers.append([one.ask(command, b"m@1@0@abc@half") for command in (2, 3, 5)])
        assert answers[0] == answers[1]


class TestOurClient:
    def test_put_get_contains(self, original: tuple[str, int]) -> None:
        blobs = {f"key {i}": bytes([i]) * i * 100_003 for i in range(1, 20)} | {"k" * 5000: b"long", "\ud800@": b"odd"}
        with LMStorage.from_url("lm://{}:{}?timeout=20".format(*original)) as storage:
            assert storage.get("key 1") is None
            assert not storage.contains("key 1")
            assert storage.put_many(blobs) == [PutStatus.LEGAL] * len(blobs)
            assert [bytes(blob or b"") for blob in storage.get_many(list(blobs))] == list(blobs.values())
            assert storage.contains_many(list(blobs)) == [True] * len(blobs)
            assert storage.put("large", bytes(65 * MIB)) is PutStatus.LEGAL
            assert read(storage, "large") == bytes(65 * MIB)

    def test_what_is_removed_is_not_found(self, original: tuple[str, int]) -> None:
        with LMStorage.from_url("lm://{}:{}?timeout=20".format(*original)) as storage:
            storage.put("gone", b"blob")
            assert storage.remove("gone")
            assert storage.get("gone") is None

    def test_it_lists_nothing(self, original: tuple[str, int]) -> None:
        with LMStorage.from_url("lm://{}:{}?timeout=0.5".format(*original)) as storage, pytest.raises(StorageError):
            storage.list_keys()

    @pytest.mark.parametrize("dtype", [dtype for dtype in Dtype if dtype.lm_code is not None], ids=str)
    def test_every_code(self, original: tuple[str, int], dtype: Dtype) -> None:
        with Client(original) as client:
            for fmt in ours.MemoryFormat:
                key = ours.CacheEngineKey("org/ours", 1, 0, int(fmt), dtype)
                body = bytes(range(96))
                put = ours.ClientMetaMessage(ours.ClientCommand.PUT, key, 96, fmt, dtype, (2, 3, 4, 4))
                get = ours.ClientMetaMessage(ours.ClientCommand.GET, key, 0, fmt, dtype, (0,))
                client.send(put.serialize() + body + get.serialize())
                found = ours.ServerMetaMessage.deserialize(client.read(36))
                assert (found.length, found.fmt, found.dtype, found.shape) == (96, fmt, dtype, (2, 3, 4, 4))
                assert client.read(96) == body


def test_listing_what_their_client_put(client: TheirClient, server: ServerThread) -> None:
    key = CacheEngineKey("org/listed", 1, 0, 255, torch.bfloat16)
    client.put(key, bits((2, 1, 4, 8), torch.float16), MemoryFormat.KV_2LTD)
    with server.client() as ours_:
        header = ours_.ask(LIST)
        assert key.to_string().encode() in ours_.read(int.from_bytes(header[4:8], "little")).split(b"\n")
