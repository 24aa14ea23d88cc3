"""Our server against LMCache's own, and against the least that asyncio can do: one client, in turn, on loopback.

Runs in the session `bench_server`, where lmcache is. The client leaves Nagle's algorithm on, as LMCache's does.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

import pytest
from server_thread import EXIST, GET, PUT, YES, Client, request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

    from tests.benchmarks.conftest import Race, Report

MIB = 1024 * 1024
ECHO = Path(__file__).parents[1] / "subjects" / "echo_server.py"
PROGRAMS = {
    "ours": ["-m", "agnostic_cache.cli", "serve", "--tier", "memory://?max_bytes=1GiB", "--port"],
    "theirs": ["-m", "lmcache.v1.server", "127.0.0.1"],
    "echo": [str(ECHO)],
}


@contextmanager
def running(name: str) -> Iterator[tuple[int, int]]:
    """Run one of `PROGRAMS`; return its process and its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *PROGRAMS[name], str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"LMCACHE_TRACK_USAGE": "false"},
    )
    try:
        for _ in range(600):
            with closing(socket.socket()) as trying:
                if not trying.connect_ex(("127.0.0.1", port)):
                    break
            threading.Event().wait(0.1)
        yield process.pid, port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def clients() -> Iterator[dict[str, Client]]:
    with running("ours") as ours, running("theirs") as theirs, running("echo") as echo:
        made = {"ours": Client(("127.0.0.1", ours[1])), "theirs": Client(("127.0.0.1", theirs[1]))}
        made["echo"] = Client(("127.0.0.1", echo[1]))
        yield made
        for client in made.values():
            client.socket.close()


def fill(client: Client, buffer: memoryview) -> None:
    at = 0
    while at < len(buffer):
        at += client.socket.recv_into(buffer[at:])


class Worst:
    """The longest turn of a contender."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, turn: float) -> None:
        self.seconds = max(self.seconds, turn)


@pytest.mark.parametrize("size", [1, 8, 64])
def test_bodies(clients: dict[str, Client], race: Race, report: Report, size: int) -> None:
    nbytes = size * MIB
    body, buffer = memoryview(os.urandom(nbytes)), memoryview(bytearray(nbytes))
    head, worst = memoryview(bytearray(36)), {name: Worst() for name in clients}

    def put(name: str) -> None:
        client, start = clients[name], perf_counter()
        if name == "echo":
            client.send(struct.pack("<q", nbytes))
            client.socket.sendall(body)
        else:
            client.send(request(PUT, length=nbytes, dtype=3, shape=(size, MIB, 1, 1)))
            client.socket.sendall(body)
            client.send(request(EXIST))
        fill(client, head)
        assert name == "echo" or head == YES
        worst[name](perf_counter() - start)

    def get(name: str) -> None:
        client, start = clients[name], perf_counter()
        client.send(struct.pack("<q", -nbytes) if name == "echo" else request(GET))
        if name != "echo":
            fill(client, head)
        fill(client, buffer)
        worst[name](perf_counter() - start)

    turns = {f"{op.__name__} {name}": partial(op, name) for name in clients for op in (put, get)}
    found = race(turns, rounds=max(10, 200 // size))
    get("ours")
    assert buffer == body
    for op in ("put", "get"):
        ours = found[f"{op} ours"]
        report(f"server: {op} of {size} MiB, against LMCache's server", ours, found[f"{op} theirs"], 1 / 1.5)
        report(f"server: {op} of {size} MiB, against a bare asyncio server", ours, found[f"{op} echo"], 1 / 0.7)
        report(f"a bare asyncio server: {op} of {size} MiB, against LMCache's server", found[f"{op} echo"],
               found[f"{op} theirs"], None)  # fmt: skip
    if size == 1:
        report("server: longest round trip at 1 MiB", worst["ours"].seconds, None, 0.020)
        report("LMCache's server: longest round trip at 1 MiB", worst["theirs"].seconds, None, None)


def test_exist(clients: dict[str, Client], race: Race, report: Report) -> None:
    def echo() -> None:
        clients["echo"].send(struct.pack("<q", -36))
        clients["echo"].read(36)

    asked = {name: client for name, client in clients.items() if name != "echo"}
    for client in asked.values():
        assert client.put(b"body")
    turns = {name: partial(one.ask, EXIST) for name, one in asked.items()}
    found = race({**turns, "echo": echo}, rounds=500, inner=4)
    report("server: exist, against LMCache's server", found["ours"], found["theirs"], 0.5)
    report("a bare asyncio server: 36 bytes, against LMCache's exist", found["echo"], found["theirs"], None)


def test_thirty_two_clients(benchmark: BenchmarkFixture, report: Report) -> None:
    """80 % reads of 1 MiB: the slowest hundredth against the middle, and the memory after the first third."""
    seconds = 60.0 if benchmark.enabled else 2.0
    body = os.urandom(MIB)
    keys = [b"m@1@0@%x@half" % i for i in range(64)]

    with running("ours") as (process, port):
        took: list[list[float]] = [[] for _ in range(32)]
        wrong: list[object] = []

        def work(number: int) -> None:
            buffer, head = memoryview(bytearray(MIB)), memoryview(bytearray(36))
            with Client(("127.0.0.1", port)) as client:
                for i, key in enumerate(cycle(keys[number:] + keys[:number])):
                    start = perf_counter()
                    if i % 5:
                        client.send(request(GET, key))
                        fill(client, head)
                        fill(client, buffer)
                    else:
                        client.send(request(PUT, key, length=MIB))
                        client.send(body)
                        client.send(request(EXIST, key))
                        fill(client, head)
                    took[number].append(perf_counter() - start)
                    if head[:4] != YES[:4]:
                        wrong.append((number, i))
                    if monotonic() > end:
                        return

        def resident() -> int:
            return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        with Client(("127.0.0.1", port)) as first:
            for key in keys:
                assert first.put(body, key)
        start, end = monotonic(), monotonic() + seconds
        threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
        warm: list[int] = []

        def load() -> None:
            for thread in threads:
                thread.start()
            while monotonic() < start + seconds / 3:
                threading.Event().wait(0.05)
            warm.append(resident())
            for thread in threads:
                thread.join()

        benchmark.pedantic(load, rounds=1)  # type: ignore[no-untyped-call]
        assert not wrong
        grown = resident() - warm[0]
        assert grown < 8 * MIB
    times = sorted(one for each in took for one in each)
    report("server: 32 clients, p99 against p50", quantiles(times, n=100)[98], median(times), 10.0)
    report("server: 32 clients, memory after warm-up", max(grown, 0), None, 8.0 * MIB, unit="B")
