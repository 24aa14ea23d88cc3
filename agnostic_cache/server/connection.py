"""Connection: one client. Reads requests, one after the other, and answers each before it reads the next.

A body is received into the memory where it will stay, and sent from it. What cannot be kept is read and thrown away,
for there is no way to say so on this wire; a header that means nothing ends the connection, for nobody knows what
follows it.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, TypeVarTuple

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.errors import StorageError, WireError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.wire import (
    ClientCommand,
    ClientMetaMessage,
    MemoryFormat,
    ServerMetaMessage,
    ServerReturnCode,
    is_removal,
)

if TYPE_CHECKING:
    from agnostic_cache.server.cache_server import CacheServer
    from agnostic_cache.server.storage_backend import Room

_logger = logging.getLogger("agnostic_cache.server")
_PIECE: Final = 512 * 1024  # bytes given to the transport at a time: before Python 3.12 it copies what it cannot send
_QUICKACK: Final[int] = getattr(socket, "TCP_QUICKACK", 0)  # of Linux
_NOTHING: Final = memoryview(b"")
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


def _short(code: ServerReturnCode, length: int = 0) -> bytes:
    """Return an answer as LMCache's server fills it in where there is no entry."""
    return ServerMetaMessage(code, length, MemoryFormat.KV_2LTD, Dtype.FLOAT16, (0, 0, 0, 0)).serialize()


_OPS: Final = {command: command.name.lower() for command in ClientCommand}
_YES: Final = _short(ServerReturnCode.SUCCESS)
_NO: Final = _short(ServerReturnCode.FAIL)


class Connection(asyncio.BufferedProtocol):
    """One client's connection.

    Attributes:
        deadline: Time of the loop's clock by which what goes on must have ended, or None.
        peer: Who it is, for the log.
    """

    deadline: float | None = None
    peer: str = "a client"
    _transport: asyncio.Transport

    def __init__(self, server: "CacheServer") -> None:
        """Serve a client of `server`."""
        self._server = server
        self._backend = server.backend
        self._limits = server.limits
        self._header = memoryview(bytearray(ClientMetaMessage.packlength()))
        self._target = self._header  # what is still to be read, of a header or of a body
        self._meta: ClientMetaMessage | None = None  # the request under way, once its header is whole
        self._room: Room | None = None  # where its body is received
        self._waits: Callable[[], None] | None = None  # for room in the waiting room
        self._waiting_bytes = 0  # that it takes there
        self._to_drain = 0  # bytes of a body that is thrown away
        self._unsent = memoryview(b"")  # of the answer
        self._choked = False  # the transport takes no more for now
        self._result: str | None = None  # what it says, while it is being sent
        self._asking = self._lost = self._stops = False
        self._began = 0.0
        self._tcp: socket.socket | None = None

    # --- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - narrows the type
        self._transport = transport
        found = transport.get_extra_info("socket")
        if found is not None and found.family != socket.AF_UNIX:
            self.peer = "{}:{}".format(*transport.get_extra_info("peername", ("?", 0))[:2])
            found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._tcp = found if _QUICKACK else None
        transport.set_write_buffer_limits(high=1, low=0)  # with 0, TLS would pause for ever: nothing is too much
        if self._server.admits(self):
            self._await_request()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - whyever it was
        """Let go of everything; a body that is not whole was never there."""
        self._lost = True
        self._unsent = memoryview(b"")
        self._give_up_room()
        self._server.lost(self)

    def expire(self) -> None:
        """End what has taken too long."""
        if self._waits is not None and self._meta is not None:
            self._give_up_room()
            self._drain(self._meta.length)
            return
        what = "sent no request" if self._idle else "is too slow"
        _logger.info("%s %s, and is disconnected", self.peer, what)
        self._transport.abort()

    def finish(self) -> None:
        """Close as soon as nothing is under way."""
        self._stops = True
        if self._idle:
            self._transport.close()

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()

    @property
    def _idle(self) -> bool:
        return self._target is self._header

    # --- in -----------------------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Say where the next bytes go."""
        return self._target

    def buffer_updated(self, nbytes: int) -> None:
        """Go on with what has come."""
        if self._meta is not None:
            self._acknowledge()
        if self._to_drain:
            self._to_drain -= nbytes
            if self._to_drain:
                self._target = self._target[: self._to_drain]
            else:
                self._end("put", "refused")
            return
        if self._idle:
            self._began = self._server.clock()
            if nbytes < len(self._header):
                self._allow(0)
        self._target = self._target[nbytes:]
        if self._target:
            return
        if self._meta is None:
            self._begin()
        elif self._room is not None:
            room, self._room = self._room, None
            self._ask(room.publish, self._kept)

    def _acknowledge(self) -> None:
        """Have the system say at once that what was sent is here, also of a part of a body.

        The client of LMCache leaves Nagle's algorithm on: the rest of a body that does not fill a packet, and what it
        sends next, wait for that, up to 40 ms, unless an answer brings the news.
        """
        if self._tcp is not None:
            self._tcp.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)

    def _begin(self) -> None:
        """Do what a whole header asks for."""
        try:
            meta = ClientMetaMessage.deserialize(self._header)
        except WireError as error:
            _logger.warning("%s sent what is no request, and is disconnected: %s", self.peer, error)
            self._server.traced("unknown", "refused", self._began)
            self._transport.abort()
            return
        self._meta, self.deadline = meta, None
        backend = self._backend
        match meta.command:
            case ClientCommand.GET:
                self._ask(backend.response, self._found, meta.key)
            case ClientCommand.EXIST:
                self._ask(backend.contains, self._said, meta.key)
            case ClientCommand.PUT:
                self._acknowledge()
                self._put(meta)
            case ClientCommand.LIST:
                self._ask(backend.list_keys, self._listed)
            case ClientCommand.HEALTH:
                self._send(_YES, "ok")

    def _put(self, meta: ClientMetaMessage) -> None:
        if is_removal(meta):
            self._ask(self._backend.storage.remove, self._removed, meta.key.to_string())
        elif not self._backend.blocks:
            self._receive()
        elif meta.length > self._limits.max_waiting_bytes:
            _logger.warning("no room for %d bytes on their way to a slow tier; raise --max-waiting", meta.length)
            self._drain(meta.length)
        else:
            self._allow(0)
            self._transport.pause_reading()
            self._waits = self._receive
            self._server.waiting_room.enter(meta.length, self._waits)

    def _receive(self) -> None:
        """Receive the body of the ``PUT`` under way, where there is room for it."""
        meta = self._meta
        assert meta is not None  # noqa: S101 - narrows the type
        if self._waits is not None:
            self._waits, self._waiting_bytes = None, meta.length
        try:
            self._room = self._backend.reserve(meta)
        except (StorageError, WireError) as error:
            _logger.warning("no room for %d bytes: %s", meta.length, error)
        if self._room is None:
            self._drain(meta.length)
            return
        self._target = self._room.body
        if meta.length:
            self._allow(meta.length)
            self._transport.resume_reading()
        else:
            room, self._room = self._room, None
            self._ask(room.publish, self._kept)

    def _drain(self, nbytes: int) -> None:
        """Read a body, and keep none of it."""
        self._to_drain = nbytes
        self._target = self._server.scratch[:nbytes]
        self._allow(nbytes)
        if nbytes:
            self._transport.resume_reading()
        else:
            self._end("put", "refused")

    def _kept(self, status: PutStatus | None) -> None:
        self._end("put", "stored" if status is PutStatus.LEGAL else "refused")

    def _removed(self, found: bool | None) -> None:  # noqa: FBT001 - what the storage said
        self._end("remove", "hit" if found else "miss")

    def _give_up_room(self) -> None:
        """Let go of the room for a body, and of the place in the queue for it."""
        if self._room is not None:
            self._room.drop()
            self._room = None
        if self._waits is not None:
            self._server.waiting_room.withdraw(self._waits)
            self._waits = None
        if not self._asking:  # else a thread holds the body still
            self._leave_waiting_room()

    def _leave_waiting_room(self) -> None:
        nbytes, self._waiting_bytes = self._waiting_bytes, 0
        if nbytes:
            self._server.waiting_room.leave(nbytes)

    # --- what is asked of the storage ---------------------------------------------------------------------------------

    def _ask(self, call: Callable[[*_Ts], _T], then: Callable[[_T | None], None], *args: *_Ts) -> None:
        """Call the storage, from a thread where it may block; its failure is None."""
        if not self._backend.blocks:
            then(self._answer_of(call, *args))
            return
        self._asking, self.deadline = True, None
        self._transport.pause_reading()
        future = self._server.run(partial(self._answer_of, call, *args))
        future.add_done_callback(partial(self._go_on, then))

    def _go_on(self, then: Callable[[Any], None], future: "asyncio.Future[Any]") -> None:
        self._asking = False
        if self._lost or future.cancelled():
            self._leave_waiting_room()
            return
        then(future.result())

    @staticmethod
    def _answer_of(call: Callable[[*_Ts], _T], *args: *_Ts) -> _T | None:
        try:
            return call(*args)
        except StorageError as error:
            _logger.warning("the storage failed, which is a miss: %s", error)
        except Exception:  # of a third party's storage; the client would wait for an answer that does not come
            _logger.exception("the storage failed, which is a miss")
        return None

    # --- out ----------------------------------------------------------------------------------------------------------

    def _found(self, response: memoryview | None) -> None:
        self._send(_NO if response is None else response, "miss" if response is None else "hit")

    def _said(self, found: bool | None) -> None:  # noqa: FBT001 - what the storage said
        self._send(_YES if found else _NO, "hit" if found else "miss")

    def _listed(self, keys: list[Any] | None) -> None:
        body = "\n".join(key.to_string() for key in keys or ()).encode()
        self._send(_short(ServerReturnCode.SUCCESS, len(body)) + body, "ok")

    def _send(self, answer: bytes | memoryview, result: str) -> None:
        """Answer; nothing is read until the transport has taken all of it."""
        self._unsent = memoryview(answer)
        self._result = result
        self._push()

    def _push(self) -> None:
        while self._unsent and not self._choked:
            nbytes = _PIECE if len(self._unsent) >= 2 * _PIECE else len(self._unsent)  # nothing small is left over
            piece, self._unsent = self._unsent[:nbytes], self._unsent[nbytes:]
            self._transport.write(piece)
        if self._lost:
            return
        if self._unsent or self._choked:
            self._transport.pause_reading()
            if self.deadline is None:
                self._allow(self._unsent.nbytes)
        elif self._meta is not None and self._result is not None:
            self._end(_OPS[self._meta.command], self._result)

    def pause_writing(self) -> None:
        """Note that the transport takes no more."""
        self._choked = True

    def resume_writing(self) -> None:
        """Go on sending."""
        self._choked = False
        if self._result is not None:
            self._push()

    # --- one request after the other ----------------------------------------------------------------------------------

    def _end(self, op: str, result: str) -> None:
        """Note that a request is done, and wait for the next."""
        if self._waiting_bytes:
            self._leave_waiting_room()
        self._server.traced(op, result, self._began)
        self._await_request()

    def _await_request(self) -> None:
        self._meta, self._result, self._target = None, None, self._header
        self._unsent = _NOTHING  # even an empty view of an entry keeps it from leaving
        self.deadline = None
        if self._stops:
            self._transport.close()
            return
        idle = self._limits.idle_seconds
        if idle is not None:
            self.deadline = self._server.clock() + idle
        self._transport.resume_reading()

    def _allow(self, nbytes: int) -> None:
        """Set the time by which so many bytes must have gone through."""
        self.deadline = self._server.clock() + self._limits.seconds_for(nbytes)
