"""What clients may cost: connections, time, and bodies on their way to a slow storage."""

import asyncio
import socket
import threading
from pathlib import Path

import pytest
from server_thread import EXIST, GET, KEY, NO, PUT, YES, Client, ServerThread, request, running

from agnostic_cache.errors import ServerStartError
from agnostic_cache.server.limits import Limits
from agnostic_cache.server.waiting_room import WaitingRoom

MIB = 1024 * 1024
HASTY = Limits(read_seconds=0.2, min_bytes_per_second=100 * MIB)


class TestTime:
    @pytest.mark.parametrize(
        "start", [b"\1", request(PUT)[:185], request(PUT, length=9) + b"part", request(PUT, length=65 * MIB)],
        ids=["a byte", "a part of a header", "a part of a body", "a part of what is too large"],
    )  # fmt: skip
    def test_a_client_that_stops_in_the_middle_is_disconnected(self, start: bytes) -> None:
        with running(limits=HASTY) as server, server.client() as slow, server.client() as other:
            slow.send(start)
            assert slow.is_closed()
            assert other.put(b"body")
            server.until(lambda: server.server.connections == 1)

    def test_a_client_that_drips_is_disconnected(self) -> None:
        with running(limits=HASTY) as server, server.client() as slow:

            def drip() -> None:
                try:
                    while True:
                        slow.send(b"\0")
                        threading.Event().wait(0.02)
                except OSError:
                    pass

            thread = threading.Thread(target=drip)
            thread.start()
            assert slow.is_closed()
            thread.join()

    def test_a_client_that_never_reads_is_disconnected(self) -> None:
        with running(limits=HASTY) as server, server.client() as greedy, server.client() as other:
            assert other.put(bytes(20 * MIB))
            greedy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            greedy.send(request(GET) * 4)
            server.until(lambda: server.server.connections == 1)
            assert other.ask(EXIST) == YES
            assert server.backend.storage.stats().deferred_bytes == 0

    def test_who_takes_a_large_answer_has_the_time_of_its_size(self) -> None:
        limits = Limits(read_seconds=0.2, min_bytes_per_second=4 * MIB)
        with running(limits=limits) as server, server.client() as slow:
            assert slow.put(bytes(20 * MIB))
            slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * 1024)
            slow.send(request(GET))
            threading.Event().wait(1.0)
            assert len(slow.read(36 + 20 * MIB)) == 36 + 20 * MIB

    def test_idle_clients_stay(self) -> None:
        with running(limits=HASTY) as server, server.client() as idle:
            idle.put(b"body")
            threading.Event().wait(0.6)
            assert idle.get() == b"body"

    def test_idle_clients_go_where_that_is_asked_for(self) -> None:
        with running(limits=Limits(read_seconds=0.2, idle_seconds=0.2)) as server, server.client() as idle:
            idle.put(b"body")
            assert idle.is_closed()
            with server.client() as never:
                assert never.is_closed()


class TestNumbers:
    def test_a_thousand_idle_clients(self) -> None:
        with running() as server:
            idle = [server.client() for _ in range(400)]
            with server.client() as client:
                assert client.put(b"body")
                assert client.get() == b"body"
            assert threading.active_count() < 20
            for one in idle:
                one.socket.close()
            server.until(lambda: server.server.connections == 0)

    def test_one_too_many_is_turned_away(self) -> None:
        with running(limits=Limits(max_connections=2)) as server:
            with server.client() as first, server.client() as second:
                first.put(b"body")
                assert second.get() == b"body"
                with server.client() as third:
                    assert third.is_closed()
                assert server.server.turned_away == 1
                assert first.get() == b"body"
            server.until(lambda: server.server.connections == 0)
            with server.client() as fourth:
                assert fourth.get() == b"body"


def test_who_has_taken_his_answer_holds_nothing() -> None:
    with running("memory://?max_bytes=8MiB") as server, server.client() as client, server.client() as other:
        assert client.put(bytes(6 * MIB))
        assert client.get() == bytes(6 * MIB)
        assert other.put(bytes([1]) * 6 * MIB)
        assert other.get() == bytes([1]) * 6 * MIB
        assert server.backend.storage.stats().deferred_bytes == 0


class TestBackPressure:
    def test_first_come_first_served(self) -> None:
        room, let_in = WaitingRoom(100), list[str]()
        turns = {name: (lambda name=name: let_in.append(name)) for name in "abcdef"}
        for name, nbytes in {"a": 60, "b": 60, "c": 10, "d": 100, "e": 50, "f": 10}.items():
            room.enter(nbytes, turns[name])
        assert let_in == ["a"]
        room.withdraw(turns["c"])
        room.leave(60)
        assert let_in == ["a", "b"]
        room.leave(60)  # d needs all there is
        assert let_in == ["a", "b", "d"]
        room.leave(100)
        assert let_in == ["a", "b", "d", "e", "f"]

    def test_bodies_take_turns(self, tmp_path: Path) -> None:
        limits = Limits(max_waiting_bytes=2 * MIB)
        with running(f"file://{tmp_path}/data", limits) as server, server.client() as slow, server.client() as other:
            slow.send(request(PUT, length=2 * MIB))
            other.send(request(PUT, b"m@1@0@1@half", length=MIB) + bytes(MIB) + request(EXIST, b"m@1@0@1@half"))
            other.socket.settimeout(0.3)
            with pytest.raises(TimeoutError):
                other.read(1)
            with server.client() as reader:
                assert reader.ask(EXIST) == NO
            slow.send(bytes(2 * MIB))
            other.socket.settimeout(20)
            assert other.read(36) == YES
            assert slow.ask(EXIST) == YES

    def test_a_body_that_is_too_large_to_wait_takes_no_memory(self, tmp_path: Path) -> None:
        with running(f"file://{tmp_path}/data", Limits(max_waiting_bytes=MIB)) as server, server.client() as client:
            assert client.put(b"old")
            assert not client.put(bytes(2 * MIB), b"m@1@0@1@half")
            client.send(request(PUT, length=2 * MIB) + bytes(2 * MIB))
            assert client.get() == b"old"
            assert client.put(bytes(MIB), b"m@1@0@2@half")

    def test_who_waits_too_long_is_refused_and_not_disconnected(self, tmp_path: Path) -> None:
        limits = Limits(read_seconds=0.2, max_waiting_bytes=40 * MIB)  # a body of which has 40 seconds
        with running(f"file://{tmp_path}/data", limits) as server, server.client() as slow, server.client() as other:
            slow.send(request(PUT, length=40 * MIB))
            assert not other.put(bytes(MIB), b"m@1@0@1@half")
            slow.socket.close()
            server.until(lambda: server.server.connections == 1)
            assert other.put(bytes(MIB), b"m@1@0@1@half")


class TestStopping:
    def test_requests_under_way_end_first(self, tmp_path: Path) -> None:
        with running(f"file://{tmp_path}/data") as server, server.client() as busy, server.client() as idle:
            idle.put(b"body")
            busy.send(request(PUT, length=MIB, key=b"m@1@0@1@half") + bytes(MIB // 2))
            server.until(lambda: server.server.connections == 2)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            assert idle.is_closed()
            busy.send(bytes(MIB // 2))
            assert busy.is_closed()
            stopping.join()
        with running(f"file://{tmp_path}/data") as server, server.client() as client:
            assert client.get() == b"body"
            assert client.get(b"m@1@0@1@half") == bytes(MIB)

    def test_what_takes_too_long_is_cut_off(self) -> None:
        with running(limits=Limits(grace_seconds=0.1)) as server, server.client() as slow:
            slow.send(request(PUT, length=9) + b"part")
            server.until(lambda: server.server.connections == 1)
            server.stop()
            assert slow.is_closed()

    def test_the_port_is_free_at_once(self) -> None:
        with running() as server, server.client() as client:
            client.put(b"body")
            port = server.address[1]
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))


class TestListening:
    def test_a_port_in_use(self) -> None:
        with running() as server:
            future = asyncio.run_coroutine_threadsafe(server.server.listen(*server.address), server.loop)
            with pytest.raises(ServerStartError):
                future.result(20)

    def test_a_unix_socket_of_ones_own(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with running() as server:
            for _ in range(2):  # the second time it is there already, as after a crash
                server.listen_unix(path)
            assert path.stat().st_mode & 0o777 == 0o600
            with Client(str(path)) as client:
                assert client.put(b"body")
                assert client.get() == b"body"
            with pytest.raises(ServerStartError):
                server.listen_unix(tmp_path / "missing" / "socket")


def test_what_is_done_is_told() -> None:
    with running() as server, server.client() as client:
        client.put(b"body")
        client.get()
        client.get(b"m@1@0@1@half")
        client.send(request(PUT, length=65 * MIB) + bytes(65 * MIB))
        client.send(request(PUT, fmt=0, dtype=0))
        assert client.ask(EXIST) == NO
    told = [(event["op"], event["result"]) for event in server.events]
    assert told == [("put", "stored"), ("exist", "hit"), ("get", "hit"), ("get", "miss"), ("put", "refused"),
                    ("remove", "hit"), ("exist", "miss")]  # fmt: skip
    assert all(event["event"] == "server.request" and event["seconds"] >= 0 for event in server.events)
    assert KEY.decode() not in str(server.events)


def test_server_thread_has_a_url() -> None:
    with running() as server:
        assert isinstance(server, ServerThread)
        assert server.url.startswith("lm://127.0.0.1:")
