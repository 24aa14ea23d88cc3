"""What happens to processes and disks, not to code: entries are whole or absent, and nothing else is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_server import Server

from agnostic_cache import open_storage
from agnostic_cache.errors import StorageFullError
from agnostic_cache.eviction import PutStatus
from agnostic_cache.storage.file import FileStorage
from agnostic_cache.testing.storage_suite import read

MIB = 1024 * 1024
SECONDS = 30 if "CI" in os.environ else 5  # of hammering


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# --- kill -9 ---------------------------------------------------------------------------------------------------------

WRITER = """
    import random, sys
    from agnostic_cache.storage.file import FileStorage

    path, first = sys.argv[1], int(sys.argv[2])
    with FileStorage(path, "64MiB") as storage:
        print("open", flush=True)
        for i in range(first, 200):
            storage.put(f"key {i}", random.Random(i).randbytes(200_000 + i))
            print(i, flush=True)
"""


def test_a_process_that_is_killed_at_random_points_of_200_writes(tmp_path: Path) -> None:
    source, done, kills = random.Random(0), -1, 0
    while done < 199:
        writer = run(WRITER, tmp_path / "kv", done + 1)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        time.sleep(source.uniform(0, 0.05))
        writer.kill()
        said = writer.communicate()[0].split()
        kills += writer.returncode == -signal.SIGKILL
        done = max([done, *map(int, said)])
        with FileStorage(tmp_path / "kv", "64MiB") as storage:
            keys = storage.list_keys()
            assert {f"key {i}" for i in range(done + 1)} <= set(keys)  # nothing that was acknowledged is lost
            for key in keys[-3:]:
                i = int(key.split()[1])
                assert read(storage, key) == random.Random(i).randbytes(200_000 + i)
            on_disk = {path.name: path.stat().st_size for path in (tmp_path / "kv").iterdir() if path.name != ".total"}
            assert (len(on_disk), sum(on_disk.values())) == (storage.stats().entries, storage.stats().current_bytes)
            assert int((tmp_path / "kv" / ".total").read_text()) == storage.stats().current_bytes
            assert storage.stats().corrupt == 0
    assert kills > 3
    with FileStorage(tmp_path / "kv") as storage:
        for i in range(200):
            assert read(storage, f"key {i}") == random.Random(i).randbytes(200_000 + i)


# --- a disk that is full ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, mounted for this test alone."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    assert mount, "mount is not installed"
    subprocess.run([mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S607 - found beside mount


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount; tests/core has a disk that only says it is full")
def test_a_disk_that_is_full(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_storage(f"file://{small_disk}/kv") as storage:
        statuses = [storage.put(f"key {i}", bytes([i]) * MIB) for i in range(20)]
        kept = [f"key {i}" for i in range(20) if statuses[i] is PutStatus.LEGAL]
        assert 5 <= len(kept) < 8
        assert all(read(storage, key) == bytes([int(key[4:])]) * MIB for key in kept)  # the loop goes on
        assert storage.remove(kept[0])
        assert storage.put("again", bytes(MIB // 2)) is PutStatus.LEGAL
        assert not list(small_disk.rglob("*.new"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with FileStorage(small_disk / "kv") as strict, pytest.raises(StorageFullError):
        for i in range(8):
            strict.put(f"more {i}", bytes(MIB))


# --- eight processes -------------------------------------------------------------------------------------------------

HAMMER = """
    import random, sys, time
    from agnostic_cache import open_storage

    url, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    source, wrong, hits = random.Random(seed), 0, 0
    with open_storage(url, strict=True) as storage:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            key, act = str(source.randrange(40)), source.random()
            if act < 0.5:
                found = storage.get(key)
                if found is not None:
                    hits += 1
                    wrong += found.nbytes < 50_000 or bytes(found) != bytes([found[0]]) * found.nbytes
            elif act < 0.95:
                storage.put(key, bytes([source.randrange(256)]) * source.randrange(50_000, 400_000))
            else:
                storage.remove(key)
        print(wrong, hits, storage.stats().corrupt)
"""


def hammer(url: str) -> Iterator[None]:
    """Yield while eight processes are at work, and judge them in the end."""
    processes = [run(HAMMER, url, seed, SECONDS) for seed in range(8)]
    while any(process.poll() is None for process in processes):
        yield
    for process in processes:
        wrong, hits, corrupt = map(int, process.communicate()[0].split())
        assert process.returncode == 0
        assert (wrong, corrupt) == (0, 0)
        assert hits > 10


def test_eight_processes_on_one_directory(tmp_path: Path) -> None:
    most = 0
    for _ in hammer(f"file://{tmp_path}?max_bytes=3000000"):
        sizes = []
        for path in tmp_path.glob("*.kv"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes))
    assert 2_000_000 < most <= 3_000_000 + 8 * 400_500  # within one entry per process
    with FileStorage(tmp_path, 3_000_000) as storage:
        assert storage.stats().current_bytes <= 3_000_000
        assert not list(tmp_path.glob("*.new")) + list(tmp_path.glob("*.damaged"))


def test_eight_processes_on_one_redis(server: Server) -> None:
    for _ in hammer(f"{server.url}?timeout=20&prefix=hammer"):
        time.sleep(0.1)
    with open_storage(f"{server.url}?timeout=20&prefix=hammer", strict=True) as storage, server.client() as client:
        keys = storage.list_keys()
        for key in keys:
            storage.remove(key)
        # Of two that overwrite one entry, each removes what it replaced: nothing is left behind.
        assert list(client.scan_iter(match="hammer:{*")) == []
