"""``lm://host:port``, ``lm+tls://``, ``lm+unix:///path``: blobs on a server that speaks the wire of LMCache.

Ours, or LMCache's own. The wire knows keys of one form and 150 bytes: a key is sent as its hash, and with its name
where there is room. What is sent is an entry with key and checksum, so that nothing else is ever taken for it. A put
has no answer on this wire; it is followed by the question whether the key is there.

What the wire, or LMCache's server, cannot do: a body has at most 2 GiB; where an entry is to be overwritten and the
server has no room, the old one stays and the put looks kept; that server lists nothing, and what is removed from it
stays there as an empty entry, which `contains` takes for one.
"""

import ssl
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Final, Self, TypeVar
from urllib.parse import quote, unquote_to_bytes, urlsplit

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.blob.entry import facts, seal, unseal
from agnostic_cache.blob.pieces import Blob
from agnostic_cache.blob.safetensors import parse_header
from agnostic_cache.errors import BlobError, MissingExtraError, StorageError, StorageURLError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.process.forks import watch
from agnostic_cache.process.lock import Lock
from agnostic_cache.storage.backend import StorageBackend, StorageStats, check_key
from agnostic_cache.storage.blocks import BlockPool
from agnostic_cache.storage.lm_connection import Address, LMConnection, LMPool
from agnostic_cache.storage.url import StorageURL
from agnostic_cache.wire import (
    MAX_KEY_LENGTH,
    MAX_LENGTH,
    CacheEngineKey,
    ClientCommand,
    ClientMetaMessage,
    MemoryFormat,
    ServerReturnCode,
    parse_cache_key,
    removal,
)

DEFAULT_PORT: Final = 65432
"""The port of LMCache's examples, and of our server."""

_MODEL = "agnostic-cache"
_AT_ONCE = 32  # requests that are sent before the first answer is read
_IDLE = 64 * 1024 * 1024  # bytes of blocks that are kept for the next reads
_ESCAPES = "surrogatepass"  # any str is a key

_A = TypeVar("_A")
_B = TypeVar("_B")


class LMStorage(StorageBackend):
    """Blobs on a server that speaks lm://.

    Safe to use from several threads, and after a fork. A connection that was lost is made again.
    """

    def __init__(self, address: Address, *, max_connections: int = 8) -> None:
        """Connect, and see that the server answers.

        Args:
            address: The server.
            max_connections: Connections at a time.

        Raises:
            StorageError: It cannot be reached, or does not speak lm://.
        """
        self._pool = LMPool(address, max_connections)
        self._blocks = BlockPool()
        self.after_fork()
        watch(self)
        self._counts = Counter[str]()  # of `StorageStats`
        health = _request(ClientCommand.HEALTH, "")
        try:
            self._pool.use(lambda connection: _is_there(connection, health))
        except BaseException:
            self._pool.close()
            raise

    def after_fork(self) -> None:
        """Hold no lock; the connections are made anew, too."""
        self._lock = Lock()  # guards the counts

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one for ``lm://host:65432?timeout=1&connections=8``."""
        parsed = StorageURL.parse(url)
        timeout, count = parsed.seconds("timeout", 1.0), parsed.text("connections", "8")
        encrypted = parsed.scheme == "lm+tls"
        ca, cert, key = [parsed.text(name) for name in ("ca", "cert", "key")] if encrypted else [""] * 3
        parsed.check_used()
        host: str | None = parsed.path
        port = None
        try:
            if parsed.scheme != "lm+unix":
                where = urlsplit(f"//{parsed.netloc}")
                host, port = where.hostname, where.port or DEFAULT_PORT
            wrong = not host or "@" in parsed.netloc or not 0 < int(count) <= 1024  # noqa: PLR2004 - plenty
        except ValueError:
            wrong = True
        if wrong or not host:
            msg = (
                f"{parsed.scheme}:// names no server; write lm://host:65432?timeout=1&connections=8, or lm+unix:///path"
            )
            raise StorageURLError(msg)
        context = _tls(ca, cert, key) if encrypted else None
        return cls(Address(host, port, timeout, context), max_connections=int(count))

    # --- one entry ----------------------------------------------------------------------------------------------------

    def put(self, key: str, blob: Blob) -> PutStatus:
        """See `StorageBackend.put`; ``ILLEGAL`` where the server did not keep it, or it is larger than 2 GiB."""
        return self.put_many({key: blob})[0]

    def get(self, key: str) -> memoryview | None:
        """See `StorageBackend.get`."""
        return self.get_many([key])[0]

    def contains(self, key: str) -> bool:
        """See `StorageBackend.contains`."""
        return self.contains_many([key])[0]

    def remove(self, key: str) -> bool:
        """See `StorageBackend.remove`."""
        check_key(key)
        question = _request(ClientCommand.EXIST, key)

        def ask(connection: LMConnection) -> bool:
            connection.send((question, removal(_wire_key(key)).serialize(), question))
            found = _is_there(connection)
            _is_there(connection)  # so that it is gone when this returns
            return found

        return self._pool.use(ask)

    def list_keys(self) -> list[str]:
        """See `StorageBackend.list_keys`. A key that is too long for the wire is read from its entry.

        Raises:
            StorageError: The server lists nothing, as LMCache's does.
        """
        listing = self._pool.use(self._list)
        keys, unnamed = [], []
        for text in bytes(listing).decode("utf-8", "replace").split("\n") if listing else ():
            wire_key = parse_cache_key(text)
            if wire_key.model_name.startswith(_MODEL + "/"):
                keys.append(unquote_to_bytes(wire_key.model_name[len(_MODEL) + 1 :]).decode("utf-8", _ESCAPES))
            elif wire_key.model_name == _MODEL:
                unnamed.append(_message(ClientCommand.GET, wire_key))
        entries = self._each(unnamed, lambda connection, asked: connection.send((asked,)), self._body)
        return keys + [facts(parse_header(whole)).key for whole in entries if whole is not None]

    def _list(self, connection: LMConnection) -> memoryview | None:
        connection.send((_request(ClientCommand.LIST, ""),))
        return self._body(connection)

    # --- several ------------------------------------------------------------------------------------------------------

    def put_many(self, blobs: Mapping[str, Blob]) -> list[PutStatus]:
        """See `SupportsBatch.put_many`."""
        for key in blobs:
            check_key(key)

        def send(connection: LMConnection, item: tuple[str, Blob]) -> None:
            key, blob = item
            entry, question = seal(key, blob), _request(ClientCommand.EXIST, key)
            if entry.nbytes > MAX_LENGTH:
                connection.send((question,))
            else:
                connection.send((_request(ClientCommand.PUT, key, entry.nbytes),), entry, (question,))

        there = self._each(blobs.items(), send, _is_there)
        kept = [
            found and seal(key, blob).nbytes <= MAX_LENGTH
            for found, (key, blob) in zip(there, blobs.items(), strict=True)
        ]
        with self._lock:
            self._counts["puts"] += sum(kept)
            self._counts["refused"] += len(kept) - sum(kept)
        return [PutStatus.LEGAL if one else PutStatus.ILLEGAL for one in kept]

    def get_many(self, keys: Sequence[str]) -> list[memoryview | None]:
        """See `SupportsBatch.get_many`."""
        for key in keys:
            check_key(key)
        found = self._each(
            keys, lambda connection, key: connection.send((_request(ClientCommand.GET, key),)), self._body
        )
        blobs = [self._opened(key, whole) for key, whole in zip(keys, found, strict=True)]
        with self._lock:
            self._counts["hits"] += sum(blob is not None for blob in blobs)
            self._counts["misses"] += sum(blob is None for blob in blobs)
        return blobs

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """See `SupportsBatch.contains_many`."""
        for key in keys:
            check_key(key)
        return self._each(
            keys, lambda connection, key: connection.send((_request(ClientCommand.EXIST, key),)), _is_there
        )

    def close(self) -> None:
        """Close the connections; the server keeps its entries. Idempotent."""
        self._pool.close()
        self._blocks.trim(0)

    def stats(self) -> StorageStats:
        """Return what this process asked for, and got; what the server holds, its own metrics say."""
        with self._lock:
            return StorageStats(**self._counts)

    # --- on the wire --------------------------------------------------------------------------------------------------

    def _each(
        self,
        items: Iterable[_A],
        send: Callable[[LMConnection, _A], None],
        read: Callable[[LMConnection], _B],
    ) -> list[_B]:
        """Ask for each item, on one connection, some before the first answer is read."""
        wanted = list(items)

        def ask(connection: LMConnection) -> list[_B]:
            answers: list[_B] = []
            for at in range(0, len(wanted), _AT_ONCE):
                now = wanted[at : at + _AT_ONCE]
                for item in now:
                    send(connection, item)
                answers += [read(connection) for _ in now]
            return answers

        return self._pool.use(ask)

    def _body(self, connection: LMConnection) -> memoryview | None:
        """Receive an answer, and its body where there is one."""
        header = connection.header()
        if header.code is not ServerReturnCode.SUCCESS or not header.length:
            return None
        block = self._blocks.take(header.length)
        whole = memoryview(block)[: header.length]
        connection.fill(whole)
        self._blocks.give((block,), _IDLE)
        return whole

    def _opened(self, key: str, whole: memoryview | None) -> memoryview | None:
        """Return the blob of an entry; a damaged one, or one of somebody else, is a miss."""
        if whole is None:
            return None
        try:
            blob, codec = unseal(whole, key)
        except (BlobError, MissingExtraError):
            blob, codec = None, ""
        if blob is None or codec:
            with self._lock:
                self._counts["corrupt"] += 1
            return None
        return blob


def _wire_key(key: str) -> CacheEngineKey:
    """Return the key that stands for a key, and names it where there is room."""
    text = key.encode("utf-8", _ESCAPES)
    digest = int.from_bytes(blake2b(text, digest_size=16).digest(), "big")
    named = CacheEngineKey(f"{_MODEL}/{quote(text, safe='')}", 1, 0, digest, Dtype.UINT8)
    if len(named.to_string()) <= MAX_KEY_LENGTH:
        return named
    return CacheEngineKey(_MODEL, 1, 0, digest, Dtype.UINT8)


def _message(command: ClientCommand, key: CacheEngineKey, nbytes: int = 0) -> bytes:
    return ClientMetaMessage(command, key, nbytes, MemoryFormat.BINARY, Dtype.UINT8, (nbytes,)).serialize()


def _request(command: ClientCommand, key: str, nbytes: int = 0) -> bytes:
    return _message(command, _wire_key(key), nbytes)


def _is_there(connection: LMConnection, *requests: bytes) -> bool:
    """Send requests, if any, and return whether the answer to the last is yes."""
    connection.send(requests)
    return connection.header().code is ServerReturnCode.SUCCESS


def _tls(ca: str, cert: str, key: str) -> ssl.SSLContext:
    """Return what trusts the servers of `ca`, or of the system, and shows them `cert`.

    Raises:
        StorageError: A file is missing, or is not what it should be.
    """
    try:
        context = ssl.create_default_context(cafile=ca or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if cert:
            context.load_cert_chain(cert, key or None)
    except (OSError, ssl.SSLError) as error:
        msg = f"ca={ca!r}, cert={cert!r}, key={key!r} of an lm+tls:// URL cannot be read: {error}"
        raise StorageError(msg) from error
    return context
