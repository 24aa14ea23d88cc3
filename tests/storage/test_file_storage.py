"""Blobs as files: whole or absent, whatever happens to the process, the disk or the directory."""

import errno
import json
import os
import random
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agnostic_cache import open_storage
from agnostic_cache.blob.safetensors import Part, Parts
from agnostic_cache.errors import StorageError, StorageFullError
from agnostic_cache.eviction import FIFOEvictor, PutStatus
from agnostic_cache.storage.directory import name_of
from agnostic_cache.storage.file import FileStorage
from agnostic_cache.testing import StorageSuite
from agnostic_cache.testing.storage_suite import read


class TestFileStorage(StorageSuite):
    outlives = True

    def make(self, place: Path, max_bytes: int | None = None) -> FileStorage:
        return FileStorage(place / "kv", max_bytes)


class TestSynced(StorageSuite):
    outlives = True

    def make(self, place: Path, max_bytes: int | None = None) -> FileStorage:
        return FileStorage(place / "kv", max_bytes, sync=True)


def files(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()} - {".total"}


def total(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.kv"))


def put_at(second: int, storage: FileStorage, key: str, blob: bytes) -> None:
    """Put a blob as if at that time: two that are really put one after the other may have one time."""
    assert storage.put(key, blob) is PutStatus.LEGAL
    os.utime(storage.path / name_of(key), (second, second))


def only(path: Path) -> Path:
    [file] = path.glob("*.kv")
    return file


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# --- the directory ---------------------------------------------------------------------------------------------------


def test_no_key_leaves_the_directory_and_nobody_else_may_read(tmp_path: Path) -> None:
    os.umask(os.umask(0))
    with FileStorage(tmp_path / "a" / "kv") as storage:
        for key in ("../x", "/etc/x", "a/../../x", "x" * 10_000):
            storage.put(key, b"1")
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {"a", "kv"}
    assert all(path.parent.name == "kv" for path in tmp_path.rglob("*") if path.is_file())
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a" / "kv").iterdir()} == {0o600}
    assert stat.S_IMODE((tmp_path / "a" / "kv").stat().st_mode) == 0o700


def test_recency_outlives_the_process(tmp_path: Path) -> None:
    with FileStorage(tmp_path, 1_000_000) as storage:
        for second, key in enumerate("abc"):
            put_at(second, storage, key, bytes(300_000))
        storage.get("a")
    with FileStorage(tmp_path, 1_000_000) as storage:
        assert storage.list_keys() == ["b", "c", "a"]
        storage.put("d", bytes(300_000))
        assert storage.list_keys() == ["c", "a", "d"]


def test_another_policy(tmp_path: Path) -> None:
    with FileStorage(tmp_path, 1_000_000, evictor=FIFOEvictor()) as storage:
        for key in "abc":
            storage.put(key, bytes(300_000))
        storage.get("a")
        storage.put("d", bytes(300_000))
        assert storage.list_keys() == ["b", "c", "d"]


def test_a_lower_budget_at_the_next_start(tmp_path: Path) -> None:
    with FileStorage(tmp_path) as storage:
        for second, key in enumerate("abcdef"):
            put_at(second, storage, key, bytes(100_000))
    with FileStorage(tmp_path, 250_000) as storage:
        assert storage.put("g", bytes(100_000)) is PutStatus.LEGAL
        assert storage.list_keys() == ["f", "g"]
        assert total(tmp_path) <= 250_000


def test_two_that_have_one_directory_open(tmp_path: Path) -> None:
    with FileStorage(tmp_path, 1_000_000) as one, FileStorage(tmp_path, 1_000_000) as other:
        one.put("a", b"from one")
        assert other.contains("a")
        assert read(other, "a") == b"from one"
        other.put("b", b"from other")
        assert sorted(one.list_keys()) == ["a", "b"]
        other.put("a", b"overwritten")
        assert read(one, "a") == b"overwritten"
        assert other.remove("a")
        assert one.get("a") is None
        for i in range(30):
            (one if i % 3 else other).put(f"key {i}", bytes(90_000))
            assert total(tmp_path) <= 1_000_000
        assert one.stats().corrupt == other.stats().corrupt == 0


def test_what_another_process_wrote_leaves_where_nothing_else_is_known(tmp_path: Path) -> None:
    with FileStorage(tmp_path, 1_000_000) as one, FileStorage(tmp_path, 1_000_000) as other:
        for i in range(10):
            one.put(f"key {i}", bytes(90_000))
        assert other.put("new", bytes(90_000)) is PutStatus.LEGAL
        assert other.put("newer", bytes(950_000)) is PutStatus.LEGAL
        assert other.list_keys() == ["newer"]
        assert one.list_keys() == ["newer"]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("README", "a.kv", "f" * 39 + ".kv", "f" * 41 + ".kv", "x.new.txt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder.kv").mkdir()
    before = files(tmp_path)
    with FileStorage(tmp_path, 10_000) as storage:
        for i in range(20):
            storage.put(str(i), bytes(1000))
    with FileStorage(tmp_path, 10_000) as storage:
        assert before <= files(tmp_path)
        assert storage.stats().corrupt == 0


@pytest.mark.parametrize("place", ["file", "file/below", "dangling"])
def test_what_is_no_directory_is_refused_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(StorageError):
        open_storage(f"file://{tmp_path}/{place}")


def test_a_directory_that_cannot_be_written_is_refused_at_once() -> None:
    with pytest.raises(StorageError):
        open_storage("file:///proc/agnostic-cache")


# --- damage ----------------------------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def foreign(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(5000))


def claiming(**claims: object) -> Callable[[Path], None]:
    """Lie in the header, so that nothing else is wrong with it."""

    def lie(path: Path) -> None:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        for name, value in claims.items():
            if name == "blob":
                header["blob"].update(value)
            else:
                header["__metadata__"][f"agnostic_cache.{name}"] = value
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return lie


def huge_header(path: Path) -> None:
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut off": cut_off,
    "emptied": emptied,
    "longer": longer,
    "foreign": foreign,
    "shape": claiming(blob={"shape": [2**63]}),
    "offsets": claiming(blob={"data_offsets": [0, 2**63]}),
    "header": huge_header,
    "version": claiming(entry="99"),
    "key": claiming(key=b"another".hex()),
    "no key": claiming(key="xyz"),
    "codec": claiming(codec="rar"),
    "checksum": claiming(checksum="md5"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_damaged_file_is_a_miss_and_set_aside(
    tmp_path: Path, damage: Callable[[Path], None], *, restarted: bool
) -> None:
    storage = FileStorage(tmp_path, 100_000)
    storage.put("a", random.Random(0).randbytes(10_000))
    damage(only(tmp_path))
    if restarted:
        storage = FileStorage(tmp_path, 100_000)
    assert storage.get("a") is None
    assert storage.get("a") is None
    assert storage.stats().corrupt == 1
    assert [name.rpartition(".")[2] for name in files(tmp_path)] == ["damaged"]
    assert not storage.contains("a")
    assert storage.put("a", b"anew") is PutStatus.LEGAL
    assert read(storage, "a") == b"anew"
    assert storage.stats().current_bytes == total(tmp_path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(bit=st.integers(0))
def test_a_flipped_bit_is_a_miss(tmp_path: Path, bit: int) -> None:
    with FileStorage(tmp_path) as storage:
        storage.put("a", b"some bytes" * 20)
        path = only(tmp_path)
        data = bytearray(path.read_bytes())
        bit %= len(data) * 8
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert storage.get("a") is None
        assert storage.stats().corrupt == 1


def test_a_file_that_is_cut_off_while_it_is_read_is_a_miss(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.put("a", bytes(5_000_000))
    view = storage.get("a")
    assert view is not None
    os.truncate(only(tmp_path), 1_000_000)
    assert bytes(view) == bytes(5_000_000)  # what was handed out does not lie in the file
    assert storage.get("a") is None


# --- a process that dies, a disk that is full ------------------------------------------------------------------------


def test_what_was_left_half_written_is_swept(tmp_path: Path) -> None:
    child = run(
        """
        import os, sys
        from agnostic_cache.blob.safetensors import Part, Parts
        from agnostic_cache.storage.file import FileStorage

        def die():
            yield memoryview(bytes(100_000))
            os.kill(os.getpid(), 9)

        storage = FileStorage(sys.argv[1])
        storage.put("whole", b"1")
        storage.put("half", Parts([Part("x", "U8", (300_000,), 300_000, die)], {}, algorithm=None))
        """,
        tmp_path,
    )
    child.communicate(timeout=60)
    assert child.returncode == -9
    assert len(files(tmp_path)) == 2
    with FileStorage(tmp_path) as storage:
        assert storage.list_keys() == ["whole"]
        assert len(files(tmp_path)) == 1


def test_what_is_being_written_is_not_swept(tmp_path: Path) -> None:
    def pieces() -> list[memoryview]:
        FileStorage(tmp_path).close()  # sweeps
        return [memoryview(b"x" * 100)]

    with FileStorage(tmp_path) as storage:
        blob = Parts([Part("x", "U8", (100,), 100, pieces)], {}, algorithm=None)
        assert storage.put("a", blob) is PutStatus.LEGAL
        assert storage.contains("a")


def test_a_put_that_fails_leaves_nothing_and_loses_nothing(tmp_path: Path) -> None:
    def fail() -> list[memoryview]:
        raise KeyboardInterrupt

    with FileStorage(tmp_path, 100_000) as storage:
        storage.put("a", b"old")
        before = storage.stats()
        with pytest.raises(KeyboardInterrupt):
            storage.put("a", Parts([Part("x", "U8", (90_000,), 90_000, fail)], {}, algorithm=None))
        assert read(storage, "a") == b"old"
        assert len(files(tmp_path)) == 1
        assert storage.stats().current_bytes == before.current_bytes == total(tmp_path)


def test_a_full_disk_is_a_miss_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: int, data: bytes) -> int:
        if len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    write = os.write
    with open_storage(f"file://{tmp_path}") as storage, FileStorage(tmp_path) as strict:
        storage.put("a", b"1")
        monkeypatch.setattr(os, "write", full)
        for i in range(10):
            assert storage.put(f"b {i}", bytes(100_000)) is PutStatus.ILLEGAL
            assert read(storage, "a") == b"1"
        with pytest.raises(StorageFullError):
            strict.put("b", bytes(100_000))
        monkeypatch.undo()
        assert storage.put("b", bytes(100_000)) is PutStatus.LEGAL
        assert len(files(tmp_path)) == 2
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_a_forked_child_and_its_parent_keep_one_budget(tmp_path: Path) -> None:
    child = run(
        """
        import os, sys
        from agnostic_cache.storage.file import FileStorage

        with FileStorage(sys.argv[1], 1_000_000) as storage:
            child = os.fork()
            for i in range(100):
                storage.put(f"{child == 0} {i}", bytes(90_000))
            if child == 0:
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        """,
        tmp_path,
    )
    child.communicate(timeout=120)
    assert child.returncode == 0
    assert 800_000 < total(tmp_path) <= 1_000_000
    with FileStorage(tmp_path, 1_000_000) as storage:
        assert all(read(storage, key) == bytes(90_000) for key in storage.list_keys())
