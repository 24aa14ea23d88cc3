"""CacheServer: listens, keeps track of its connections, and stops without losing what it has acknowledged."""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from agnostic_cache.errors import ServerStartError
from agnostic_cache.server.connection import Connection
from agnostic_cache.server.limits import Limits
from agnostic_cache.server.waiting_room import WaitingRoom
from agnostic_cache.trace import Trace

if TYPE_CHECKING:
    from agnostic_cache.server.storage_backend import LMSLocalBackend

_logger = logging.getLogger("agnostic_cache.server")
_BACKLOG: Final = 1024
_LOOKS: Final = 4  # how often in `read_seconds` the deadlines are looked at
_T = TypeVar("_T")


class CacheServer:
    """A server of one storage backend, in the event loop that runs `listen` and `stop`.

    Its clients are not told apart: who may connect may read and write everything. See ``docs/security.md``.

    Attributes:
        backend: Where the entries are; closed by `stop`.
        limits: What clients may cost.
        scratch: Memory for bytes that are thrown away; of all connections.
        trace: What is told of each request, or None.
        waiting_room: Where bodies wait that a slow storage has no room for.
        turned_away: Connections that were one too many.
    """

    def __init__(
        self,
        backend: "LMSLocalBackend",
        *,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
        trace: Trace | None = None,
    ) -> None:
        """Make a server that does not listen yet; needs a running event loop.

        Args:
            backend: Where the entries are.
            limits: What clients may cost.
            tls: What TCP connections are encrypted with, and their clients known by; see `tls.server_context`.
            trace: Called as ``trace("server.request", {"op", "result", "seconds"})``.
        """
        self.backend = backend
        self.limits = limits or Limits()
        self.scratch = memoryview(bytearray(256 * 1024))
        self.waiting_room = WaitingRoom(self.limits.max_waiting_bytes)
        self.turned_away = 0
        self._loop = asyncio.get_running_loop()
        self.clock: Callable[[], float] = self._loop.time
        self._tls = tls
        self.trace = trace
        self._threads = ThreadPoolExecutor(self.limits.threads, "agnostic-cache-storage")
        self._listening: list[asyncio.Server] = []
        self._connections: set[Connection] = set()
        self._empty = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._stopping = False

    # --- its life -----------------------------------------------------------------------------------------------------

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Accept clients at a TCP address.

        Args:
            host: Address or name; whether it may be open to others is for `tls.check_exposed` to say.
            port: Port, or 0 for any that is free.

        Returns:
            The address and the port.

        Raises:
            ServerStartError: The address is in use, or not of this machine.
        """
        try:
            server = await self._loop.create_server(
                lambda: Connection(self),
                host,
                port,
                ssl=self._tls,
                backlog=_BACKLOG,
                reuse_address=True,
                ssl_handshake_timeout=self.limits.read_seconds if self._tls else None,
            )
        except OSError as error:
            what = "in use by another program; stop it, or choose another port"
            why = what if error.errno == errno.EADDRINUSE else error.strerror or str(error)
            msg = f"cannot listen at {host}:{port}: {why}"
            raise ServerStartError(msg) from error
        found: tuple[str, int] = server.sockets[0].getsockname()[:2]
        self._listens(server)
        return found

    async def listen_unix(self, path: str | Path) -> None:
        """Accept clients at a unix socket, which only the owner of this process may open.

        Raises:
            ServerStartError: The path cannot be made.
        """
        path = Path(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:  # it is bound here, for nobody must be able to connect before its mode is set
            if path.is_socket():
                path.unlink()  # left behind by a server that was killed
            listener.bind(str(path))
            path.chmod(0o600)
            server = await self._loop.create_unix_server(lambda: Connection(self), sock=listener, backlog=_BACKLOG)
        except OSError as error:
            listener.close()
            msg = f"cannot listen at {path}: {error.strerror or error}"
            raise ServerStartError(msg) from error
        self._listens(server)

    def _listens(self, server: asyncio.Server) -> None:
        self._listening.append(server)
        if self._looking is None:
            self._looking = self._loop.create_task(self._look_at_deadlines())

    async def stop(self) -> None:
        """Stop: take no one in, let requests that are under way end, then close the storage, which writes what it has.

        Requests that take longer than ``limits.grace_seconds`` are cut off.
        """
        self._stopping = True
        for server in self._listening:
            server.close()
        for connection in list(self._connections):
            connection.finish()
        try:
            async with asyncio.timeout(self.limits.grace_seconds):
                await self._all_gone()
        except TimeoutError:
            _logger.warning("%d connections are cut off", len(self._connections))
            for connection in list(self._connections):
                connection.abort()
            await self._all_gone()
        if self._looking is not None:
            self._looking.cancel()
        await self._loop.run_in_executor(None, self._threads.shutdown)
        await self._loop.run_in_executor(None, self.backend.close)

    async def _all_gone(self) -> None:
        while self._connections:
            self._empty.clear()
            await self._empty.wait()

    async def _look_at_deadlines(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.limits.read_seconds / _LOOKS))
            now = self.clock()
            for connection in list(self._connections):
                if connection.deadline is not None and connection.deadline < now:
                    connection.expire()

    @property
    def connections(self) -> int:
        """Connections at this time."""
        return len(self._connections)

    # --- for its connections ------------------------------------------------------------------------------------------

    def admits(self, connection: Connection) -> bool:
        """Take a connection in, or answer False where there are too many."""
        if self._stopping or len(self._connections) >= self.limits.max_connections:
            self.turned_away += 1
            _logger.warning("%s is turned away: %d connections are all there may be", connection.peer, self.connections)
            return False
        self._connections.add(connection)
        return True

    def lost(self, connection: Connection) -> None:
        """Note that a connection is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def run(self, call: Callable[[], _T]) -> asyncio.Future[_T]:
        """Make a call that may block, from a thread."""
        return self._loop.run_in_executor(self._threads, call)

    def traced(self, op: str, result: str, began: float) -> None:
        """Tell what was done since a time of the clock."""
        if self.trace is not None:
            self.trace("server.request", {"op": op, "result": result, "seconds": self.clock() - began})
