"""What clients and signals do to a server that runs: afterwards it serves others, and has neither memory nor files left
over."""

import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from serve_process import ServeProcess, serving, until
from server_thread import EXIST, GET, LIST, NO, PUT, YES, Client, request

MIB = 1024 * 1024
BUDGET = 64 * MIB
BAD = [
    request(0), request(6), request(PUT, dtype=9), request(PUT, fmt=-1), request(PUT, length=-1),
    request(PUT, length=2**31 - 1, shape=(-1, 0, 0, 0)), request(GET, b"m" * 150), request(GET, b"\xff" * 150),
    request(GET, b"m@1@0@ff@nothing"), bytes(186), os.urandom(186),
]  # fmt: skip


def key(i: int) -> bytes:
    return b"org/model@1@0@%x@bfloat16" % i


@pytest.fixture
def server() -> Iterator[ServeProcess]:
    """A server that is full, and that must be as good as new after the test."""
    arguments = ("--read-timeout", "0.5", "--max-connections", "1100")
    with serving("--tier", f"memory://?max_bytes={BUDGET}", *arguments) as server:
        files = server.files
        with server.client() as client:
            for i in range(80):
                assert client.put(bytes([i]) * MIB, key(i))
        yield server
        with server.client() as client:
            assert client.put(bytes([7]) * MIB, key(7))
            assert client.get(key(7)) == bytes([7]) * MIB
        assert server.resident <= BUDGET + 64 * MIB
        until(lambda: server.files == files)
        status, logged = server.end()
        assert status == 0
        assert "Traceback" not in logged


def listed(client: Client) -> set[bytes]:
    header = client.ask(LIST)
    return set(client.read(int.from_bytes(header[4:8], "little")).split(b"\n"))


def test_clients_that_die_in_the_middle(server: ServeProcess) -> None:
    with server.client() as other:
        before = listed(other)
        for i in range(60):
            client = server.client()
            if i % 2:
                client.send(request(PUT, key(i + 1000), length=3 * MIB) + bytes(random.Random(i).randrange(3 * MIB)))
            else:
                client.send(request(GET, key(79)) * 3)
                client.read(random.Random(i).randrange(MIB))
            if i % 3:  # with a reset
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.socket.close()
        assert other.ask(EXIST, key(79)) == YES
        assert listed(other) == before


def test_headers_that_mean_nothing(server: ServeProcess) -> None:
    with server.client() as other:
        before = listed(other)
        for header in BAD:
            with server.client() as client:
                client.send(header + bytes(1000))
                assert client.is_closed()
        assert listed(other) == before


def test_a_body_of_two_gibibytes(server: ServeProcess) -> None:
    with server.client() as other, server.client() as client:
        before = listed(other)
        client.send(request(PUT, key(1000), length=2**31 - 1) + bytes(80 * MIB))
        assert server.resident <= BUDGET + 64 * MIB
        assert listed(other) == before


def test_bodies_that_a_disk_has_room_for_and_memory_has_not(tmp_path: Path) -> None:
    with serving("--tier", f"file://{tmp_path}/data", "--max-waiting", "16MiB") as server:
        before = server.most_resident
        with server.client() as client:
            for size in (15, 17, 200):
                client.send(request(PUT, key(size), length=size * MIB) + bytes(size * MIB))
            assert [client.ask(EXIST, key(size)) for size in (15, 17, 200)] == [YES, NO, NO]
        assert server.most_resident <= before + 64 * MIB


def test_a_thousand_idle_clients(server: ServeProcess) -> None:
    idle = [server.client() for _ in range(1000)]
    with server.client() as client:
        assert client.get(key(79)) == bytes([79]) * MIB
        assert idle[500].get(key(79)) == bytes([79]) * MIB
        assert server.resident <= BUDGET + 64 * MIB
    for one in idle:
        one.socket.close()


def test_slow_clients(server: ServeProcess) -> None:
    """They announce much, and send a byte now and then; meanwhile others are served."""

    def drip(client: Client) -> None:
        with suppress(OSError):
            while True:
                client.send(b"\0")
                threading.Event().wait(0.1)

    slow = [server.client() for _ in range(20)]
    for i, one in enumerate(slow):
        one.send(request(PUT, key(1000 + i), length=3 * MIB)[: 186 - i % 2])
    threads = [threading.Thread(target=drip, args=(one,)) for one in slow]
    for thread in threads:
        thread.start()
    with server.client() as client:
        for i in range(20):
            assert client.put(bytes([i]) * MIB, key(i))
            assert client.get(key(i)) == bytes([i]) * MIB
    for thread in threads:
        thread.join()
    for one in slow:
        one.socket.close()


def test_clients_that_never_read(server: ServeProcess) -> None:
    greedy = [server.client() for _ in range(10)]
    for one in greedy:
        with suppress(OSError):
            one.send(b"".join(request(GET, key(i)) for i in range(20, 80)))
    with server.client() as client:
        for i in range(20):
            client.put(bytes([i]) * MIB, key(i))
        assert client.get(key(79)) == bytes([79]) * MIB
        assert server.resident <= BUDGET + 64 * MIB
    until(lambda: server.files < 20)
    for one in greedy:
        one.socket.close()


class Load:
    """Clients that put, and note what was acknowledged: where the question that follows a put is answered with yes."""

    def __init__(self, server: ServeProcess) -> None:
        self.acknowledged: dict[bytes, bytes] = {}
        self._threads = [threading.Thread(target=self._put, args=(server, i)) for i in range(4)]
        for thread in self._threads:
            thread.start()

    def _put(self, server: ServeProcess, seed: int) -> None:
        source = random.Random(seed)
        with suppress(OSError), server.client() as client:
            for i in range(10_000):
                body = source.randbytes(source.randrange(1, 400_000))
                if not client.put(body, key(seed * 100_000 + i)):
                    return
                self.acknowledged[key(seed * 100_000 + i)] = body

    def end(self) -> None:
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_signal_under_load(tmp_path: Path, how: signal.Signals) -> None:
    """What was acknowledged is in the directory, and whole."""
    tier = f"file://{tmp_path}/data"
    with serving("--tier", tier, "--grace", "2") as server:
        load = Load(server)
        until(lambda: len(load.acknowledged) > 100)
        status, logged = server.end(how)
        load.end()
        assert status == (0 if how is signal.SIGTERM else -signal.SIGKILL)
        assert "Traceback" not in logged
    with serving("--tier", tier) as server, server.client() as client:
        for name, body in load.acknowledged.items():
            assert client.get(name) == body
        assert listed(client) >= set(load.acknowledged)
