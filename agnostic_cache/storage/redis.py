"""``redis://``, ``rediss://``, ``redis+unix://``, ``redis+cluster://``: blobs on a Redis server or cluster.

An entry is cut into parts of 1 MiB, which a pipeline sends, and a record that names them, which is written last: nobody
finds parts of an entry that is not whole, and an overwritten one has parts of its own. All keys of an entry carry one
hash-tag, so that they lie on one node. Everything expires; beyond that, eviction is the server's, by its
``maxmemory-policy``.

Needs the extra ``redis``. The library is redis-py with hiredis, which serves all four schemes wherever Python runs.
valkey-glide-sync was measured to write up to twice as fast, and to read half as fast again; see ``docs/storage.md``.
"""

import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, NamedTuple, Self

from redis.exceptions import OutOfMemoryError

from agnostic_cache.blob.entry import seal, unseal
from agnostic_cache.blob.pieces import Blob, copy_into
from agnostic_cache.blob.safetensors import Parts
from agnostic_cache.errors import BlobError, StorageError, StorageFullError, StorageURLError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.process.forks import watch
from agnostic_cache.process.lock import Lock
from agnostic_cache.storage.backend import EntryFacts, StorageBackend, StorageStats, check_key, hand_over
from agnostic_cache.storage.blocks import BlockPool
from agnostic_cache.storage.redis_client import FAILURES, make_client, without_password
from agnostic_cache.storage.url import StorageURL

_PART = 1024 * 1024
_AT_ONCE = 8  # parts per round trip, so that a time-out is one of 8 MiB and not of a whole entry
_OVERWRITTEN = 10  # times in the middle of one read, after which it is a miss
_IDLE = 64 * 1024 * 1024  # bytes of blocks that are kept for the next reads
_PREFIX = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class _Record(NamedTuple):
    """What is written of an entry, besides its parts."""

    generation: str
    parts: int
    key: str

    def to_bytes(self) -> bytes:
        return f"{self.generation} {self.parts} ".encode() + self.key.encode("utf-8", "surrogatepass")

    @classmethod
    def of(cls, data: bytes) -> "_Record":
        """Read a record.

        Raises:
            BlobError: It is none.
        """
        generation, _, rest = data.partition(b" ")
        count, space, key = rest.partition(b" ")
        if not space or not count.isdigit() or len(count) > 9 or not generation.isalnum():  # noqa: PLR2004 - an int
            msg = f"{len(data)} bytes on the server are no record of an entry"
            raise BlobError(msg)
        return cls(generation.decode(), int(count), key.decode("utf-8", "surrogatepass"))


class RedisStorage(StorageBackend):
    """Blobs on a Redis server, 6.2 or later, or on a Redis Cluster.

    Safe to use from several threads and after a fork. What is read is compared with its checksum. What was overwritten
    or lost a part is a miss; what is damaged is a miss, counted, and removed.
    """

    def __init__(
        self, client: Any, *, ttl_seconds: float = 86400, prefix: str = "agnostic-cache", where: str = "Redis"
    ) -> None:
        """Use a client of redis-py, which answers bytes, and is closed with this.

        Args:
            client: ``redis.Redis`` or ``redis.cluster.RedisCluster``.
            ttl_seconds: When an entry expires, counted from its put.
            prefix: What all keys on the server begin with; letters, digits, ``_.-``.
            where: What errors call the server.

        Raises:
            StorageURLError: `prefix` is something else.
            StorageError: The server cannot be reached, refuses the password, or takes no writes.
        """
        if not _PREFIX.fullmatch(prefix):
            msg = f"prefix={prefix!r}; use up to 64 letters, digits, '_', '.' and '-'"
            raise StorageURLError(msg)
        self._client, self._where, self._prefix = client, where, prefix
        self._ttl = max(1, int(ttl_seconds * 1000))
        self._pool = BlockPool()
        self._closed = False
        self.after_fork()
        watch(self)
        self._counts = Counter[str]()  # of `StorageStats`
        with self._translated():
            client.set(f"{prefix}:open", b"", px=1000)

    def after_fork(self) -> None:
        """Hold no lock; the library makes connections of the child's own."""
        self._lock = Lock()  # guards the counts

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one for ``redis://user:password@host:6379/0?ttl=86400&timeout=0.25&prefix=agnostic-cache``.

        ``rediss://`` is the same over TLS, with ``ca``, ``cert`` and ``key`` for files in PEM form.
        ``redis+cluster://host:port,host:port`` names some nodes of a cluster, with ``tls=true`` over TLS;
        ``redis+unix:///path/to/socket`` a socket, with ``db=0``. User and password may stand in the environment
        instead, as ``AGNOSTIC_CACHE_REDIS_USERNAME`` and ``AGNOSTIC_CACHE_REDIS_PASSWORD``. `timeout` is that of
        connecting, and of each answer of up to 8 MiB, in seconds.
        """
        parsed = StorageURL.parse(url)
        ttl, prefix = parsed.seconds("ttl", 86400), parsed.text("prefix", "agnostic-cache")
        client = make_client(parsed)
        parsed.check_used()
        try:
            return cls(client, ttl_seconds=ttl, prefix=prefix, where=without_password(parsed))
        except BaseException:
            client.close()
            raise

    # --- one entry ----------------------------------------------------------------------------------------------------

    def put(self, key: str, blob: Blob) -> PutStatus:
        """See `StorageBackend.put`.

        Raises:
            StorageFullError: The server has no memory left, and evicts nothing.
        """
        check_key(key)
        self._check_open()
        name, generation, count = self._name(key), secrets.token_hex(8), 0
        with self._translated():
            for parts in _batches(seal(key, blob)):
                with self._client.pipeline(transaction=False) as pipe:
                    for part in parts:
                        pipe.set(f"{name}:{generation}:{count}", part, px=self._ttl)
                        count += 1
                    pipe.execute()
            record = _Record(generation, count, key)
            self._drop(name, self._client.set(name, record.to_bytes(), px=self._ttl, get=True))
        with self._lock:
            self._counts["puts"] += 1
        return PutStatus.LEGAL

    def get(self, key: str) -> memoryview | None:
        """See `StorageBackend.get`. The bytes are compared with their checksum."""
        check_key(key)
        return self.get_many([key])[0]

    def get_into(self, key: str, buffer: memoryview) -> int | None:
        """See `SupportsGetInto.get_into`.

        Raises:
            ValueError: `buffer` is too small.
        """
        return hand_over(self.get(key), buffer)

    def contains(self, key: str) -> bool:
        """See `StorageBackend.contains`."""
        check_key(key)
        return self.contains_many([key])[0]

    def describe(self, key: str) -> EntryFacts | None:
        """See `SupportsDescribe.describe`. The age counts from the last put."""
        self._check_open()
        name = self._name(key)
        with self._translated():
            data, left = self._client.get(name), self._client.pttl(name)
            if data is None:
                return None
            try:
                record = _Record.of(data)
            except BlobError:
                return EntryFacts(len(data), 0.0)
            last = self._client.strlen(f"{name}:{record.generation}:{record.parts - 1}")
        return EntryFacts(max(0, record.parts - 1) * _PART + last, max(0.0, (self._ttl - left) / 1000))

    def remove(self, key: str) -> bool:
        """See `StorageBackend.remove`."""
        check_key(key)
        self._check_open()
        name = self._name(key)
        with self._translated():
            record = self._client.getdel(name)
            self._drop(name, record)
        return record is not None

    # --- many ---------------------------------------------------------------------------------------------------------

    def get_many(self, keys: Sequence[str]) -> list[memoryview | None]:
        """See `SupportsBatch.get_many`. One round trip for what is there, then one per 8 MiB."""
        self._check_open()
        names = [self._name(key) for key in keys]
        found: list[memoryview | None] = []
        with self._translated():
            for key, name, data in zip(keys, names, self._each("get", names), strict=True):
                try:
                    found.append(self._blob(key, name, data))
                except BlobError:
                    with self._lock:
                        self._counts["corrupt"] += 1
                    self._drop(name, self._client.getdel(name))
                    found.append(None)
        with self._lock:
            hits = sum(blob is not None for blob in found)
            self._counts["hits"] += hits
            self._counts["misses"] += len(found) - hits
        return found

    def put_many(self, blobs: Mapping[str, Blob]) -> list[PutStatus]:
        """See `SupportsBatch.put_many`."""
        return [self.put(key, blob) for key, blob in blobs.items()]

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """See `SupportsBatch.contains_many`. One round trip."""
        self._check_open()
        with self._translated():
            return [bool(count) for count in self._each("exists", [self._name(key) for key in keys])]

    def list_keys(self) -> list[str]:
        """See `StorageBackend.list_keys`. Asks for every key on the server."""
        self._check_open()
        with self._translated():
            pattern = f"{self._prefix}:{{{'?' * 32}}}"
            names = sorted({name.decode() for name in self._client.scan_iter(match=pattern, count=1000)})
            records = [record for record in self._each("get", names) if record is not None]
        return [_Record.of(record).key for record in records]

    # --- its life -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the connections. Idempotent."""
        if not self._closed:
            self._closed = True
            self._client.close()
            self._pool.trim(0)

    def stats(self) -> StorageStats:
        """Return what this process did; what the server holds, the server knows."""
        with self._lock:
            return StorageStats(**self._counts)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        check_key(key)
        tag = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return f"{self._prefix}:{{{tag}}}"

    def _each(self, command: str, names: Sequence[str]) -> list[Any]:
        """Ask the same of several keys, in one round trip."""
        if not names:
            return []
        with self._client.pipeline(transaction=False) as pipe:
            for name in names:
                getattr(pipe, command)(name)
            answers: list[Any] = pipe.execute()
            return answers

    def _blob(self, key: str, name: str, data: bytes | None) -> memoryview | None:
        """Return the blob of a record, or of the one that has overwritten it meanwhile.

        Raises:
            BlobError: It is damaged.
        """
        for _ in range(_OVERWRITTEN):
            if data is None:
                return None
            blob = self._fetch(key, name, _Record.of(data))
            if blob is not None:
                return blob
            before, data = data, self._client.get(name)
            if data == before:  # its parts were evicted
                return None
        return None

    def _fetch(self, key: str, name: str, record: _Record) -> memoryview | None:
        """Return the blob of a record, or None where parts of it are gone.

        Raises:
            BlobError: It is damaged.
        """
        parts: list[bytes] = []
        for first in range(0, record.parts, _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, record.parts))
            answers = self._client.mget([f"{name}:{record.generation}:{i}" for i in numbers])
            if None in answers:
                return None
            parts += answers
        nbytes = sum(map(len, parts))
        block = self._pool.take(nbytes)
        whole = memoryview(block)[:nbytes]
        copy_into(whole, map(memoryview, parts))
        blob, _ = unseal(whole, key)
        self._pool.give((block,), _IDLE)
        return blob

    def _drop(self, name: str, data: bytes | None) -> None:
        """Remove the parts of a record that is no longer there."""
        if data is None:
            return
        try:
            record = _Record.of(data)
        except BlobError:
            return  # they expire
        for first in range(0, record.parts, 1000):
            numbers = range(first, min(first + 1000, record.parts))
            if not self._client.unlink(*(f"{name}:{record.generation}:{i}" for i in numbers)):
                return  # gone already, or never there, whatever the record says

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn errors of the library into ours.

        Raises:
            StorageFullError: The server has no memory left.
            StorageError: Anything else.
        """
        try:
            yield
        except StorageError:
            raise
        except OutOfMemoryError as error:
            msg = f"{self._where} has no memory left: {error}; raise maxmemory, or set a maxmemory-policy"
            raise StorageFullError(msg) from error
        except FAILURES as error:
            msg = f"{self._where} failed: {type(error).__name__}: {error}; see that it runs, and who may use it"
            raise StorageError(msg) from error

    def _check_open(self) -> None:
        if self._closed:
            msg = f"the storage on {self._where} is closed; open another"
            raise StorageError(msg)


def _batches(entry: Parts) -> Iterator[list[memoryview]]:
    """Copy an entry into parts, and give a few at a time."""
    parts: list[memoryview] = []
    left = entry.nbytes
    part, at = memoryview(bytearray(min(left, _PART))), 0
    for piece in entry:
        rest = piece
        while rest.nbytes:
            taken = rest[: part.nbytes - at]
            part[at : at + taken.nbytes] = taken
            at, left, rest = at + taken.nbytes, left - taken.nbytes, rest[taken.nbytes :]
            if at == part.nbytes:
                parts.append(part)
                part, at = memoryview(bytearray(min(left, _PART))), 0
        if len(parts) >= _AT_ONCE:
            yield parts
            parts = []
    if parts:
        yield parts
