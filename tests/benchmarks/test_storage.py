"""What it costs to keep a state outside of its framework: in host memory, and in files.

A block is 256 tokens of [32 layers, 8 heads, 128 dim] in bf16, which is 32 MiB.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import pytest
from redis_server import Server

from agnostic_cache import KVLayout, KVState, open_storage, wrap
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.blob.state_blob import Blob, encode
from agnostic_cache.eviction import PutStatus
from agnostic_cache.state.layout import TOKENS
from agnostic_cache.storage.file import FileStorage
from agnostic_cache.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.benchmarks.conftest import Race, Report

LAYERS, SHAPE = 32, (1, 8, 256, 128)
NBYTES = LAYERS * 2 * 8 * 256 * 128 * 2


def block() -> KVState:
    """A block whose memory has been touched."""
    arrays = HostArray.empty_block([(SHAPE, Dtype.BFLOAT16)] * (2 * LAYERS))
    for array in arrays:
        array.memory[:] = os.urandom(64 * 1024) * (array.nbytes // 65536)
    layers = [{"key": arrays[2 * i], "value": arrays[2 * i + 1]} for i in range(LAYERS)]
    return wrap({"layers": layers}, layout=KVLayout({"*": TOKENS(2)}))


def warm(nbytes: int) -> memoryview:
    """Memory that has been touched."""
    memory = memoryview(mmap.mmap(-1, nbytes))
    memory[:] = b"\x01" * nbytes
    return memory


def test_encode(race: Race, report: Report) -> None:
    state = block()
    parts = encode(state, tokens=range(256))
    target, source = warm(parts.nbytes), warm(parts.nbytes)

    def copy() -> None:
        target[:] = source

    seconds = race({"encode": lambda: encode(state, tokens=range(256)).write_into(target), "memcpy": copy}, rounds=30)
    report("encode to a warm buffer, checksum included, 32 MiB / memcpy", seconds["encode"], seconds["memcpy"], 2.0)

    parts.write_into(target)
    blob = Blob(target)
    blob.verify()
    assert blob.state().length == 256


@pytest.mark.parametrize("blocks", [1, 4])
def test_parse(blocks: int, tmp_path: Path, race: Race, report: Report) -> None:
    path = tmp_path / "blob"
    state = KVState.join([block()] * blocks)
    with path.open("wb") as file:
        file.writelines(encode(state))
    with path.open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    seconds = race({"parse": lambda: Blob(mapped), "state": lambda: Blob(mapped).state()}, rounds=100)
    report(f"parse from an mmap, {32 * blocks} MiB", seconds["parse"], None, 1e-3)
    report(f"parse from an mmap to a KVState, {32 * blocks} MiB", seconds["state"], None, None)
    assert Blob(mapped).state().length == 256 * blocks


def test_host_memory(race: Race, report: Report) -> None:
    """Steady state: each put takes the memory of the entry that leaves for it."""
    source, target = warm(NBYTES), warm(NBYTES)
    storage = MemoryStorage(4 * NBYTES)
    turn = iter(range(10**9))

    def put() -> None:
        assert storage.put(f"key {next(turn)}", source) is PutStatus.LEGAL

    def copy() -> None:
        target[:] = source

    for _ in range(6):
        put()
    storage.put("kept", source)

    def get() -> None:
        assert storage.get_into("kept", target) == NBYTES

    seconds = race({"put": put, "get": get, "memcpy": copy}, rounds=30)
    report("memory:// put, 32 MiB / memcpy", seconds["put"], seconds["memcpy"], 1 / 0.7)
    report("memory:// get into a buffer, 32 MiB / memcpy", seconds["get"], seconds["memcpy"], 1 / 0.7)


@pytest.fixture(params=["disk", "shm"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on the disk, and one in shared memory."""
    if request.param == "disk":
        yield tmp_path
        return
    import tempfile  # noqa: PLC0415 - for this alone
    from pathlib import Path  # noqa: PLC0415

    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def test_files(folder: Path, race: Race, report: Report) -> None:
    """Without fsync; from the page cache. A plain file is written aside and renamed, too."""
    source, target = warm(NBYTES), warm(NBYTES)
    storage = FileStorage(folder / "kv")
    plain, aside = folder / "plain", folder / "aside"

    def write() -> None:
        file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        left = source
        while left.nbytes:
            left = left[os.write(file, left) :]
        os.close(file)
        aside.rename(plain)

    def read() -> None:
        with plain.open("rb", buffering=0) as file:
            at = 0
            while at < NBYTES:
                at += file.readinto(target[at:]) or 0

    def get() -> None:
        found = storage.get("a")
        assert found is not None
        assert found.nbytes == NBYTES

    write()
    storage.put("a", source)
    contenders = {"put": lambda: storage.put("a", source), "write": write, "get": get, "readinto": read}
    seconds = race(contenders, rounds=20)
    where = "/dev/shm" if folder.is_relative_to("/dev/shm") else "disk"  # noqa: S108 - as above
    report(f"file:// put on {where}, 32 MiB / write", seconds["put"], seconds["write"], 1 / 0.8)
    report(f"file:// verified get on {where}, 32 MiB / readinto", seconds["get"], seconds["readinto"], 1 / 0.65)
    assert bytes(storage.get("a") or b"") == source


def test_restart(tmp_path: Path, race: Race, report: Report, request: pytest.FixtureRequest) -> None:
    """Open a directory of 10,000 entries, and hit one of them."""
    count = 10_000 if not request.config.getoption("benchmark_disable") else 100
    with FileStorage(tmp_path) as storage:
        for i in range(count):
            storage.put(f"key {i}", b"x" * 1000)

    def restart() -> None:
        with FileStorage(tmp_path, "1GiB") as storage:
            assert storage.get("key 7") is not None

    seconds = race({"restart": restart}, rounds=3)
    report("open a directory of 10,000 entries and hit one", seconds["restart"], None, 2.0)
    with FileStorage(tmp_path) as storage:
        assert len(storage.list_keys()) == count


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def test_redis(server: Server, race: Race, report: Report) -> None:
    """Over TCP on this machine; raw is one SET and one GET of as many bytes."""
    source = bytes(warm(NBYTES))
    with open_storage(f"{server.url}?timeout=20", strict=True) as storage, server.client() as client:
        contenders: dict[str, Callable[[], object]] = {
            "put": lambda: storage.put("a", source),
            "SET": lambda: client.set("raw", source),
            "get": lambda: storage.get("a"),
            "GET": lambda: client.get("raw"),
        }
        for contender in contenders.values():
            contender()
        seconds = race(contenders, rounds=15)
        report("redis:// put, 32 MiB / SET of raw bytes", seconds["put"], seconds["SET"], 1 / 0.8)
        report("redis:// verified get, 32 MiB / GET of raw bytes", seconds["get"], seconds["GET"], 1 / 0.8)
        assert bytes(storage.get("a") or b"") == source
