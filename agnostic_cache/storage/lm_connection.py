"""LMConnection: one connection to a server that speaks lm://, and a pool of them."""

import socket
import ssl
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

from agnostic_cache.errors import StorageError, WireError
from agnostic_cache.process.forks import watch
from agnostic_cache.process.lock import Lock
from agnostic_cache.wire import ServerMetaMessage

_PIECE = 1024 * 1024  # bytes sent at a time, so that the time-out is one of a piece and not of a whole body

_T = TypeVar("_T")


class Address(NamedTuple):
    """Where a server is, and how long it may take.

    Attributes:
        host: Its name or address; or the path of its unix socket.
        port: Its port; None for a unix socket.
        timeout_seconds: Time to connect, and for each sign of life.
        tls: What the connection is encrypted with, or None.
    """

    host: str
    port: int | None
    timeout_seconds: float
    tls: ssl.SSLContext | None = None

    def connect(self) -> socket.socket:
        """Connect.

        Raises:
            OSError: It cannot be reached, or its certificate is not to be trusted.
        """
        if self.port is None:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connected.settimeout(self.timeout_seconds)
            try:
                connected.connect(self.host)
            except OSError:
                connected.close()
                raise
            return connected
        connected = socket.create_connection((self.host, self.port), self.timeout_seconds)
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connected if self.tls is None else self.tls.wrap_socket(connected, server_hostname=self.host)
        except OSError:
            connected.close()
            raise

    def __str__(self) -> str:
        """Return what a person would call it."""
        return self.host if self.port is None else f"{self.host}:{self.port}"


class LMConnection:
    """One connection; used by one thread at a time. Any `OSError` leaves it useless: close it."""

    def __init__(self, address: Address) -> None:
        """Connect.

        Raises:
            OSError: The server cannot be reached.
        """
        self._socket = address.connect()
        self._header = bytearray(ServerMetaMessage.packlength())
        self.is_fresh = True  # nothing was asked on it yet

    def send(self, *pieces: Iterable[bytes | memoryview]) -> None:
        """Send bytes, one behind the other."""
        for piece in (piece for part in pieces for piece in part):
            view = memoryview(piece)
            for at in range(0, view.nbytes, _PIECE):
                self._socket.sendall(view[at : at + _PIECE])

    def header(self) -> ServerMetaMessage:
        """Receive the header of an answer.

        Raises:
            OSError: It does not come, or means nothing.
        """
        self.fill(memoryview(self._header))
        try:
            return ServerMetaMessage.deserialize(self._header)
        except WireError as error:
            msg = f"the server does not speak lm:// ({error})"
            raise OSError(msg) from error

    def fill(self, buffer: memoryview) -> None:
        """Receive as many bytes as `buffer` holds.

        Raises:
            OSError: They do not come.
        """
        at, nbytes = 0, buffer.nbytes
        while at < nbytes:
            count = self._socket.recv_into(buffer[at:])
            if not count:
                msg = f"the server closed the connection, {nbytes - at} bytes too early"
                raise ConnectionResetError(msg)
            at += count

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


class LMPool:
    """Connections to one server. Safe to use from several threads, and after a fork."""

    def __init__(self, address: Address, max_connections: int) -> None:
        """Connect to nobody yet.

        Args:
            address: The server.
            max_connections: Connections at a time; who wants one more waits.
        """
        self.address = address
        self._max_connections = max_connections
        self._closed = False
        self.after_fork()
        watch(self)

    def after_fork(self) -> None:
        """Have no connection: those are the parent's."""
        self._places: SimpleQueue[None] = SimpleQueue()  # one item for each connection that may still be used
        for _ in range(self._max_connections):
            self._places.put(None)
        self._lock = Lock()  # guards everything below, and `_closed`
        self._idle: list[LMConnection] = []  # the last used last

    def use(self, work: Callable[[LMConnection], _T]) -> _T:
        """Do `work` on a connection of its own; a second time, where the first had been lost meanwhile.

        Raises:
            StorageError: It failed, or no connection came free.
        """
        places = self._places
        try:
            places.get(timeout=self.address.timeout_seconds)
        except Empty:
            msg = f"all connections to {self.address} are in use; raise connections in the URL"
            raise StorageError(msg) from None
        try:
            return self._use(work)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            msg = f"the server at {self.address} failed: {error}"
            raise StorageError(msg) from error
        finally:
            places.put(None)

    def _use(self, work: Callable[[LMConnection], _T]) -> _T:
        while True:
            connection = self._take() or LMConnection(self.address)
            try:
                done = work(connection)
            except ConnectionError:
                connection.close()
                if connection.is_fresh:
                    raise
            except BaseException:
                connection.close()
                raise
            else:
                connection.is_fresh = False
                self._give(connection)
                return done

    def _take(self) -> LMConnection | None:
        with self._lock:
            if self._closed:
                msg = f"this storage of {self.address} is closed; open another"
                raise StorageError(msg)
            return self._idle.pop() if self._idle else None

    def _give(self, connection: LMConnection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close every connection; those in use, when their work is done. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
