"""A cache server in a thread of the test's own process, and a client that sends it bytes."""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from agnostic_cache.server.cache_server import CacheServer
from agnostic_cache.server.limits import Limits
from agnostic_cache.server.storage_backend import CreateStorageBackend

KEY = b"meta/llama@2@1@be23@bfloat16"
YES = struct.pack("<9i", 200, 0, 1, 2, 0, 0, 0, 0, 0)
NO = struct.pack("<9i", 400, 0, 1, 2, 0, 0, 0, 0, 0)
PUT, GET, EXIST, LIST, HEALTH = range(1, 6)


def request(command: int, key: bytes = KEY, **changes: Any) -> bytes:
    """Pack a request field by field, as the description of the wire says."""
    fields: dict[str, Any] = {"length": 0, "fmt": 1, "dtype": 2, "location": 0, "shape": (0, 0, 0, 0)} | changes
    shape = fields.pop("shape")
    return struct.pack("<9i", command, *fields.values(), *shape) + key.ljust(150, b" ")


class Client:
    """A raw client: what it is told to send, it sends."""

    def __init__(self, address: tuple[str, int] | str) -> None:
        kind = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(kind, socket.SOCK_STREAM)
        self.socket.settimeout(20)
        self.socket.connect(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, nbytes: int) -> bytes:
        """Return so many bytes, or those that come before the end."""
        found = bytearray()
        while len(found) < nbytes:
            more = self.socket.recv(nbytes - len(found))
            if not more:
                break
            found += more
        return bytes(found)

    def ask(self, command: int, key: bytes = KEY) -> bytes:
        self.send(request(command, key))
        return self.read(36)

    def put(self, body: bytes, key: bytes = KEY, **changes: Any) -> bool:
        """Put, and return whether it is there."""
        self.send(request(PUT, key, length=len(body), **changes) + body)
        return self.ask(EXIST, key) == YES

    def get(self, key: bytes = KEY) -> bytes | None:
        header = struct.unpack("<9i", self.ask(GET, key))
        return self.read(header[1]) if header[0] == 200 else None

    def is_closed(self) -> bool:
        """Wait for the server to close the connection."""
        try:
            return not self.socket.recv(1)
        except ConnectionError:
            return True


class ServerThread:
    """A server that runs."""

    def __init__(self, url: str, limits: Limits | None = None, port: int = 0, **options: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self._port = port
        self._made = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(url, limits, options),))
        self._thread.start()
        assert self._made.wait(20)

    async def _run(self, url: str, limits: Limits | None, options: dict[str, Any]) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self.backend = CreateStorageBackend(url)
        self.server = CacheServer(self.backend, limits=limits, trace=self._trace, **options)
        self.address = await self.server.listen("127.0.0.1", self._port)
        self._made.set()
        await self._end.wait()
        await self.server.stop()

    def _trace(self, event: str, facts: Any) -> None:
        self.events.append({"event": event, **facts})

    @property
    def url(self) -> str:
        return "lm://{}:{}".format(*self.address)

    def listen_unix(self, path: Path) -> None:
        asyncio.run_coroutine_threadsafe(self.server.listen_unix(path), self.loop).result(20)

    def client(self) -> Client:
        return Client(self.address)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what must come."""
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            threading.Event().wait(0.005)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._end.set)
            self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def running(
    url: str = "memory://?max_bytes=64MiB", limits: Limits | None = None, **options: Any
) -> Iterator[ServerThread]:
    server = ServerThread(url, limits, **options)
    try:
        yield server
    finally:
        server.stop()
