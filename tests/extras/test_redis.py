"""Blobs on a real Redis: all schemes, and a storage that stays a cache whatever becomes of the server."""

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from redis_server import Cluster, Server, free_port

from agnostic_cache import open_storage
from agnostic_cache.errors import StorageError, StorageFullError, StorageURLError
from agnostic_cache.eviction import PutStatus
from agnostic_cache.storage.backend import StorageBackend
from agnostic_cache.storage.guard import GuardedStorage
from agnostic_cache.testing import StorageSuite
from agnostic_cache.testing.storage_suite import read

MIB = 1024 * 1024
PATIENT = "timeout=20"  # for what is not about time


class RedisSuite(StorageSuite):
    outlives = True
    bounded = False
    address: ClassVar[str]

    def make(self, place: Path, max_bytes: int | None = None) -> StorageBackend:  # noqa: ARG002
        """Open a storage with a prefix of the test's own, so that the server looks empty."""
        prefix = f"{place.parent.name}-{place.name}"[-64:]
        return open_storage(
            f"{self.address}{'&' if '?' in self.address else '?'}{PATIENT}&prefix={prefix}", strict=True
        )


class TestRedis(RedisSuite):
    @pytest.fixture(autouse=True)
    def find(self, server: Server) -> None:
        type(self).address = server.url


class TestUnixSocket(RedisSuite):
    @pytest.fixture(autouse=True)
    def find(self, server: Server) -> None:
        type(self).address = f"redis+unix://{server.socket}?db=1"


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with a certificate of its own making."""
    folder, port = tmp_path_factory.mktemp("tls"), free_port()
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout {key} -out {certificate}"
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command.split(), *names], check=True, stderr=subprocess.DEVNULL)
    files = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate)]
    with Server(folder / "redis", "--tls-port", str(port), "--tls-auth-clients", "no", *files):
        yield f"rediss://127.0.0.1:{port}?ca={certificate}"


class TestTLS(RedisSuite):
    @pytest.fixture(autouse=True)
    def find(self, tls: str) -> None:
        type(self).address = tls

    def test_a_certificate_that_nobody_vouches_for_is_refused(self) -> None:
        with pytest.raises(StorageError):
            open_storage(self.address.partition("?")[0])


class TestCluster(RedisSuite):
    @pytest.fixture(autouse=True)
    def find(self, cluster: Cluster) -> None:
        type(self).address = cluster.url

    def test_entries_lie_on_all_masters_and_each_on_one(self, storage: StorageBackend, cluster: Cluster) -> None:
        def keys() -> list[set[bytes]]:
            found = []
            for server in cluster.servers:
                with server.client() as client:
                    found.append(set(client.scan_iter(match="*lie_on_all*:{*")))
            return found

        for i in range(40):
            storage.put(f"key {i}", bytes(2 * MIB))
        tags = [{name[name.index(b"{") : name.index(b"}")] for name in names} for names in keys()]
        assert all(tags)
        assert sum(map(len, tags)) == len(set().union(*tags)) == 40


def entry_keys(server: Server) -> list[bytes]:
    with server.client() as client:
        return sorted(client.scan_iter(match="agnostic-cache:{*"))


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server that this test may treat as it likes."""
    with Server(tmp_path / "redis") as server:
        yield server


# --- what lies on the server -----------------------------------------------------------------------------------------


def test_parts_of_what_was_overwritten_or_removed_are_gone(own: Server) -> None:
    with open_storage(f"{own.url}?{PATIENT}", strict=True) as storage:
        for size in (5 * MIB, 20 * MIB, 100, 12 * MIB):
            storage.put("a", random.Random(size).randbytes(size))
            assert read(storage, "a") == random.Random(size).randbytes(size)
            assert len(entry_keys(own)) == 2 + size // MIB
        storage.remove("a")
        assert entry_keys(own) == []


def test_everything_expires(own: Server) -> None:
    with open_storage(f"{own.url}?{PATIENT}&ttl=1000", strict=True) as storage, own.client() as client:
        storage.put("a", bytes(3 * MIB))
        assert all(900 < client.ttl(name) <= 1000 for name in entry_keys(own))
        for name in entry_keys(own):
            client.pexpire(name, 1)
        while client.dbsize() > 1:
            assert client.ping()
        assert storage.get("a") is None
        assert storage.stats().corrupt == 0


def test_a_part_that_was_evicted_is_a_miss(own: Server) -> None:
    with open_storage(f"{own.url}?{PATIENT}", strict=True) as storage, own.client() as client:
        storage.put("a", bytes(3 * MIB))
        client.delete(entry_keys(own)[2])
        assert storage.get("a") is None
        assert storage.stats().corrupt == 0
        assert storage.put("a", b"anew") is PutStatus.LEGAL
        assert read(storage, "a") == b"anew"


@pytest.mark.parametrize("which", [0, 1, -1])
def test_damage_is_a_miss_and_removed(own: Server, which: int) -> None:
    with open_storage(f"{own.url}?{PATIENT}", strict=True) as storage, own.client() as client:
        for damage in (b"", b"foreign", b"\xff" * MIB, b"a 999999999 key", b"a 99999999999999999999 key"):
            storage.put("a", random.Random(0).randbytes(2 * MIB))
            client.set(entry_keys(own)[which], damage)
            assert storage.get("a") is None
            assert storage.put("a", b"anew") is PutStatus.LEGAL
            assert read(storage, "a") == b"anew"
            storage.remove("a")


def test_a_flipped_bit_is_a_miss_and_counted(own: Server) -> None:
    source = random.Random(0)
    with open_storage(f"{own.url}?{PATIENT}", strict=True) as storage, own.client() as client:
        for i in range(50):
            storage.put("a", b"some bytes" * 20)
            [_, part] = entry_keys(own)
            bit = source.randrange(8 * client.strlen(part))
            client.setbit(part, bit, 1 - client.getbit(part, bit))
            assert storage.get("a") is None
            assert storage.stats().corrupt == i + 1
        assert entry_keys(own) == []


def test_a_server_without_memory_is_a_miss_and_can_be_read(tmp_path: Path) -> None:
    with Server(tmp_path / "redis", "--maxmemory", "20mb", "--maxmemory-policy", "noeviction") as server:
        with open_storage(f"{server.url}?{PATIENT}") as storage:
            storage.put("a", b"1")
            for i in range(6):
                status = storage.put(f"b {i}", bytes(8 * MIB))
            assert status is PutStatus.ILLEGAL
            assert read(storage, "a") == b"1"
        with open_storage(f"{server.url}?{PATIENT}", strict=True) as storage, pytest.raises(StorageFullError):
            for i in range(6):
                storage.put(f"c {i}", bytes(8 * MIB))


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "rediss"])
def test_a_server_that_is_not_there_is_refused_at_once(scheme: str) -> None:
    with pytest.raises(StorageError):
        open_storage(f"{scheme}://127.0.0.1:1")


def test_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with Server(tmp_path / "redis", "--requirepass", "se/cret") as server:
        for login in ("", ":wrong@", "nobody:se%2Fcret@"):
            with pytest.raises(StorageError) as caught:
                open_storage(f"redis://{login}127.0.0.1:{server.port}")
            assert "wrong" not in str(caught.value)
        with open_storage(f"redis://:se%2Fcret@127.0.0.1:{server.port}?{PATIENT}") as storage:
            assert storage.put("a", b"1") is PutStatus.LEGAL
            server.stop()
            assert storage.get("a") is None
            assert "cret" not in caplog.text
            server.start()
        monkeypatch.setenv("AGNOSTIC_CACHE_REDIS_PASSWORD", "se/cret")
        with open_storage(f"redis://127.0.0.1:{server.port}?{PATIENT}") as storage:
            assert storage.put("a", b"1") is PutStatus.LEGAL


@pytest.mark.parametrize(
    "url",
    [
        "redis://", "redis://a:1,b:2", "redis://a:port", "redis://a/base", "redis://a:6379?timeout=soon",
        "redis://a?ttl=-1", "redis://a?nonsense=1", "redis://127.0.0.1:6379?prefix=*", "redis+cluster://a,,b",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_understood(url: str) -> None:
    with pytest.raises((StorageURLError, StorageError)):
        open_storage(url)


# --- a server that fails ---------------------------------------------------------------------------------------------


def recovered(storage: StorageBackend) -> bool:
    """Whether a put goes through and is read back: what a loop would see sooner or later."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if storage.put("again", b"here") is PutStatus.LEGAL and read(storage, "again") == b"here":
            return True
    return False


def test_a_server_that_stalls_costs_a_bounded_time_and_recovers(own: Server) -> None:
    storage = open_storage(own.url)
    assert isinstance(storage, GuardedStorage)
    storage.put("a", b"1")
    own.send(signal.SIGSTOP)
    start, slowest = time.monotonic(), 0.0
    for _ in range(50):
        before = time.monotonic()
        assert storage.get("a") is None
        assert storage.put("b", bytes(MIB)) is PutStatus.ILLEGAL
        slowest = max(slowest, time.monotonic() - before)
    assert storage.breaker.is_open
    assert slowest < 5  # twice 250 ms on a machine that has nothing else to do
    assert time.monotonic() - start < 20  # and not 100 times that
    own.send(signal.SIGCONT)
    assert recovered(storage)
    assert read(storage, "a") == b"1"
    storage.close()


def test_a_server_that_stalls_raises_where_asked_to(own: Server) -> None:
    with open_storage(own.url, strict=True) as storage:
        own.send(signal.SIGSTOP)
        calls = (storage.get, storage.contains, storage.remove, lambda key: storage.put(key, b"1"))
        for call in (*calls, lambda _: storage.list_keys()):
            with pytest.raises(StorageError):
                call("a")
        own.send(signal.SIGCONT)


def test_a_server_that_is_restarted_empty(own: Server) -> None:
    storage = open_storage(own.url)
    storage.put("a", b"1")
    own.stop()
    for _ in range(10):
        assert storage.get("a") is None
    own.start()
    assert recovered(storage)
    assert storage.get("a") is None
    storage.close()


def test_a_server_that_is_emptied(own: Server) -> None:
    with open_storage(f"{own.url}?{PATIENT}") as storage, own.client() as client:
        storage.put("a", b"1")
        client.flushall()
        assert storage.get("a") is None
        assert storage.put("a", b"2") is PutStatus.LEGAL
        assert read(storage, "a") == b"2"
        assert storage.stats().errors == 0


def test_a_master_that_is_killed(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster") as cluster, open_storage(cluster.url) as storage:
        blobs = {f"key {i}": bytes([i]) * 1000 for i in range(60)}
        for key, blob in blobs.items():
            assert storage.put(key, blob) is PutStatus.LEGAL
        cluster.servers[1].stop()
        start = time.monotonic()
        for key, blob in blobs.items():
            assert read(storage, key) in {blob, None}  # never wrong
        assert time.monotonic() - start < 60
        cluster.servers[1].start()
        end, found = time.monotonic() + 60, set[str]()
        while len(found) < 60 and time.monotonic() < end:
            found = {key for key, blob in blobs.items() if storage.put(key, blob) is PutStatus.LEGAL}
        assert len(found) == 60
        assert all(read(storage, key) == blob for key, blob in blobs.items())
