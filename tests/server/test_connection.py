"""What the server answers to bytes, against answers written out from the description of the wire."""

import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_thread import EXIST, GET, HEALTH, KEY, LIST, NO, PUT, YES, Client, ServerThread, request, running

MIB = 1024 * 1024
DTYPES = [0, 1, 2, 3, 4, 5, 6, 7, 8]
FORMATS = range(9)


@pytest.fixture(params=["memory://?max_bytes=64MiB", "file://"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerThread]:
    """One whose storage answers at once, and one whose storage waits for a device."""
    place = f"{tmp_path}/data?max_bytes=64MiB" if request.param == "file://" else ""
    with running(request.param + place) as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[Client]:
    with server.client() as client:
        yield client


class TestRequests:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_is_put_comes_back(self, client: Client, dtype: int) -> None:
        for fmt in FORMATS:
            body = random.Random(fmt).randbytes(96)
            client.send(request(PUT, length=96, fmt=fmt, dtype=dtype, shape=(2, 3, 4, 2), location=1) + body)
            said = 2 if dtype == 1 else dtype  # two codes of one dtype
            assert client.ask(GET) == struct.pack("<9i", 200, 96, fmt, said, 2, 3, 4, 2, 0)
            assert client.read(96) == body

    @pytest.mark.parametrize("size", [0, 1, 4096, MIB, 9 * MIB + 1])
    def test_bodies_of_any_size(self, client: Client, size: int) -> None:
        body = random.Random(size).randbytes(size)
        assert client.put(body, dtype=3)
        assert client.get() == body

    def test_misses(self, client: Client) -> None:
        assert client.ask(GET) == NO
        assert client.ask(EXIST) == NO
        assert client.ask(HEALTH) == YES

    def test_existing(self, client: Client) -> None:
        assert client.put(b"body")
        assert client.ask(EXIST) == YES
        assert client.ask(EXIST, b"meta/llama@2@1@be24@bfloat16") == NO
        assert client.ask(EXIST, b"meta/llama@2@1@0BE23@bfloat16") == YES

    def test_the_last_put_counts(self, client: Client) -> None:
        for body in (b"first", b"", b"a longer one"):
            assert client.put(body)
            assert client.get() == body

    def test_listing(self, client: Client) -> None:
        client.send(request(LIST))
        assert client.read(36) == YES
        keys = {KEY, b"m@1@0@-5@half@3", b"user@host/m@1@0@1@int8@a%1@b%2"}
        for key in keys:
            assert client.put(b"x", key)
        client.send(request(LIST))
        code, length, *_ = struct.unpack("<9i", client.read(36))
        assert code == 200
        assert set(client.read(length).split(b"\n")) == keys

    def test_removing(self, client: Client) -> None:
        client.put(b"body")
        client.send(request(PUT, fmt=0, dtype=0))
        assert client.ask(EXIST) == NO
        assert client.put(b"", fmt=0, dtype=2)
        assert client.get() == b""

    def test_requests_that_come_at_once_are_answered_in_order(self, client: Client) -> None:
        parts = [
            request(PUT, length=4) + b"body",
            request(EXIST),
            request(GET),
            request(HEALTH),
            request(GET, b"m@1@0@1@half"),
        ]
        client.send(b"".join(parts * 50))
        for _ in range(50):
            assert client.read(36) == YES
            assert client.read(36)[:8] == struct.pack("<2i", 200, 4)
            assert client.read(4) == b"body"
            assert client.read(36) == YES
            assert client.read(36) == NO

    def test_requests_that_come_byte_by_byte(self, client: Client) -> None:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request(PUT, length=4) + b"body" + request(GET):
            client.send(bytes((byte,)))
        assert client.read(40)[36:] == b"body"

    def test_a_header_comes_in_one_piece(self, client: Client) -> None:
        """LMCache's client asks for 36 bytes once, and fails where it gets fewer."""
        client.put(bytes(MIB))
        for command in (EXIST, GET, HEALTH) * 20:
            client.send(request(command))
            assert len(client.socket.recv(36)) == 36
            if command == GET:
                client.read(MIB)

    def test_many_clients_at_once(self, server: ServerThread) -> None:
        def work(seed: int) -> None:
            source = random.Random(seed)
            with server.client() as client:
                for _ in range(30):
                    key = b"m@1@0@%x@half" % source.randrange(4)
                    if source.randrange(2):
                        client.send(request(PUT, key, length=300_000) + bytes([seed]) * 300_000)
                    found = client.get(key)
                    if found is not None:
                        whole.append(found == found[:1] * 300_000)

        whole: list[bool] = []
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(whole) > 100
        assert all(whole)


MEANINGLESS = {
    "command 0": request(0),
    "command 6": request(6),
    "command -1": request(-1),
    "dtype 9": request(PUT, dtype=9),
    "dtype -1": request(GET, dtype=-1),
    "format 9": request(PUT, fmt=9),
    "location 3": request(PUT, location=3),
    "negative length": request(PUT, length=-1),
    "most negative length": request(PUT, length=-(2**31)),
    "negative extent": request(PUT, length=4, shape=(-1, 1, 1, 1)),
    "no key": request(GET, b""),
    "no hash": request(GET, b"m@1@0@@half"),
    "not UTF-8": request(GET, b"\xff\xfe@1@0@1@half"),
    "over 150 bytes": request(GET, b"m" * 150),  # what is left of a longer one
    "zeros": bytes(186),
    "text": b"GET / HTTP/1.1\r\n\r\n".ljust(186, b"x"),
}
STRANGE = [
    b"m" * 137 + b"@1@0@ff@half",  # 150 bytes
    b"user@host@1@0@ff@half",
    b"../../etc/passwd@1@0@ff@half",
    b"m/..@1@0@ff@half",
    b"nul\x00nul@1@0@ff@half",
    "ключ@1@0@ff@half".encode(),
]


class TestBadRequests:
    @pytest.mark.parametrize("header", MEANINGLESS.values(), ids=MEANINGLESS)
    def test_what_means_nothing_ends_the_connection(self, server: ServerThread, header: bytes) -> None:
        with server.client() as good, server.client() as bad:
            good.put(b"body")
            bad.send(header)
            assert bad.is_closed()
            assert good.get() == b"body"
            good.send(request(LIST))
            assert struct.unpack("<9i", good.read(36))[1] == len(good.read(len(KEY)))

    @pytest.mark.parametrize("key", STRANGE, ids=[f"{key[:16]!r}" for key in STRANGE])
    def test_strange_keys_are_keys(self, client: Client, key: bytes) -> None:
        assert client.put(b"of the strange one", key)
        assert client.put(b"body")
        assert client.get(key) == b"of the strange one"

    @pytest.mark.parametrize("sent", [0, 1, 3 * MIB])
    def test_a_body_that_breaks_off_changes_nothing(self, server: ServerThread, sent: int) -> None:
        with server.client() as other:
            for i in range(8):
                assert other.put(bytes([i]) * 7 * MIB, b"m@1@0@%x@half" % i)
            before = server.backend.storage.stats()
            with server.client() as client:
                client.send(request(PUT, b"m@1@0@1@half", length=7 * MIB) + bytes(sent))
            with server.client() as client:
                client.send(request(PUT, length=7 * MIB) + bytes(sent))
            assert other.ask(EXIST) == NO
            assert other.get(b"m@1@0@1@half") == bytes([1]) * 7 * MIB
            after = server.backend.storage.stats()
            assert (after.entries, after.current_bytes, after.evictions) == (8, before.current_bytes, before.evictions)

    def test_a_body_beyond_the_budget_changes_nothing(self, client: Client) -> None:
        assert client.put(b"old")
        body = bytes(65 * MIB)
        client.send(request(PUT, length=len(body)) + body)
        assert client.get() == b"old"

    def test_a_body_of_two_gibibytes_takes_no_memory(self, server: ServerThread) -> None:
        if server.backend.blocks:
            return  # its memory is that of the mapping, and never touched
        with server.client() as client, server.client() as other:
            client.send(request(PUT, length=2**31 - 1) + bytes(MIB))
            assert other.put(b"body")
            assert server.backend.storage.stats().current_bytes < MIB
