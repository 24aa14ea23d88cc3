"""Our client, against our server."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_thread import ServerThread, running

from agnostic_cache import open_storage
from agnostic_cache.errors import StorageError, StorageURLError
from agnostic_cache.eviction import PutStatus
from agnostic_cache.server.limits import Limits
from agnostic_cache.storage.lm import LMStorage
from agnostic_cache.testing import StorageSuite
from agnostic_cache.testing.storage_suite import read

MIB = 1024 * 1024


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with running() as server:
        yield server


class TestLMStorage(StorageSuite):
    outlives = True
    bounded = False  # the budget is the server's

    @pytest.fixture(autouse=True)
    def _server(self, server: ServerThread) -> None:
        self.server = server

    def make(self, place: Path, max_bytes: int | None = None) -> LMStorage:  # noqa: ARG002
        return LMStorage.from_url(f"{self.server.url}?timeout=20")


class TestConnections:
    def test_a_server_that_comes_back_is_found_again(self, tmp_path: Path) -> None:
        with running(f"file://{tmp_path}/data") as first:
            storage = LMStorage.from_url(first.url)
            storage.put("a", b"blob")
        with pytest.raises(StorageError):
            storage.get("a")
        with running(f"file://{tmp_path}/data", port=first.address[1]):
            assert read(storage, "a") == b"blob"
        storage.close()

    def test_a_connection_that_was_lost_is_made_again(self) -> None:
        with running(limits=Limits(read_seconds=0.1, idle_seconds=0.1)) as server:
            storage = LMStorage.from_url(server.url)
            for i in range(3):
                assert storage.put("a", bytes([i])) is PutStatus.LEGAL
                server.until(lambda: server.server.connections == 0)
                assert read(storage, "a") == bytes([i])
            storage.close()

    def test_threads_share_a_few(self, server: ServerThread) -> None:
        def work(i: int) -> None:
            for _ in range(20):
                storage.put(str(i), bytes([i]) * 10_000)
                found.append(read(storage, str(i)) == bytes([i]) * 10_000)
                most.append(server.server.connections)

        found: list[bool] = []
        most: list[int] = []
        with LMStorage.from_url(f"{server.url}?connections=3&timeout=20") as storage:
            threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(found) == 160
        assert all(found)
        assert max(most) <= 3

    def test_a_child_has_its_own(self, server: ServerThread) -> None:
        with LMStorage.from_url(f"{server.url}?timeout=20") as storage:
            storage.put("a", b"blob")
            child = os.fork()
            if not child:
                os._exit(0 if all(read(storage, "a") == b"blob" for _ in range(50)) else 1)
            mine = [read(storage, "a") == b"blob" for _ in range(50)]
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert all(mine)

    def test_a_server_that_says_nothing_is_a_time_out(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"lm://127.0.0.1:{silent.getsockname()[1]}?timeout=0.1"
            with pytest.raises(StorageError):
                open_storage(url)

    def test_a_server_that_says_something_else(self) -> None:
        def answer() -> None:
            client, _ = other.accept()
            with client:
                client.recv(186)
                client.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

        with socket.create_server(("127.0.0.1", 0)) as other:
            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(StorageError):
                open_storage(f"lm://127.0.0.1:{other.getsockname()[1]}")
            thread.join()

    def test_nobody_there(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            with pytest.raises(StorageError):
                open_storage(f"lm://127.0.0.1:{taken.getsockname()[1]}")

    def test_a_server_that_dies_is_a_miss(self) -> None:
        with running() as server:
            storage = open_storage(server.url)
            assert storage.put("a", b"blob") is PutStatus.LEGAL
        assert storage.get("a") is None
        assert storage.put("a", b"blob") is PutStatus.ILLEGAL
        assert storage.stats().errors == 2
        storage.close()

    @pytest.mark.parametrize(
        "url",
        ["lm://", "lm://:1", "lm://host:x", "lm://host:99999", "lm://user@host", "lm+unix://", "lm://h?connections=0",
         "lm://h?connections=x", "lm://h?colour=red", "lm://h?cert=x", "lm://h?timeout=0"],
    )  # fmt: skip
    def test_urls_that_name_no_server(self, url: str) -> None:
        with pytest.raises(StorageURLError):
            open_storage(url)


def test_what_the_server_has_no_room_for_is_refused(server: ServerThread) -> None:
    with LMStorage.from_url(f"{server.url}?timeout=20") as storage:
        assert storage.put("a", bytes(65 * MIB)) is PutStatus.ILLEGAL
        assert storage.put_many({"b": b"1", "c": bytes(65 * MIB), "d": b"2"}) == [
            PutStatus.LEGAL, PutStatus.ILLEGAL, PutStatus.LEGAL,
        ]  # fmt: skip
        assert (storage.stats().puts, storage.stats().refused) == (2, 2)
        assert sorted(storage.list_keys()) == ["b", "d"]


def test_what_is_no_entry_is_a_miss(server: ServerThread) -> None:
    with LMStorage.from_url(server.url) as storage, server.client() as client:
        storage.put("a", b"blob")
        [key] = server.backend.list_keys()
        client.put(b"of somebody else", key.to_string().encode())
        client.put(b"of somebody else", b"m@1@0@1@half")
        assert storage.get("a") is None
        assert storage.stats().corrupt == 1
        assert storage.list_keys() == ["a"]


def test_a_unix_socket(server: ServerThread, tmp_path: Path) -> None:
    server.listen_unix(tmp_path / "socket")
    with open_storage(f"lm+unix://{tmp_path}/socket", strict=True) as storage:
        storage.put("a", b"blob")
        assert read(storage, "a") == b"blob"
