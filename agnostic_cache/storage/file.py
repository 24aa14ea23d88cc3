"""``file:///path``: one file per entry in one directory, which outlives the process and which several may share.

What is read is compared with its checksum; what is damaged is a miss, counted, and set aside under ``*.damaged``. Each
process evicts from the entries that it knows, and looks at the directory again where those do not suffice.

What is acknowledged has reached the kernel: it survives the process. With ``sync=True`` it has reached the disk.
"""

import logging
import os
import sys
import time
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from agnostic_cache.blob.entry import seal
from agnostic_cache.blob.pieces import Blob
from agnostic_cache.errors import BlobError, MissingExtraError, StorageError, StorageURLError
from agnostic_cache.eviction.choose import CountingRoom, choose
from agnostic_cache.eviction.evictor import BaseEvictor, PutStatus
from agnostic_cache.eviction.policy import Policy
from agnostic_cache.eviction.registry import make_policy
from agnostic_cache.process.forks import watch
from agnostic_cache.process.lock import Lock
from agnostic_cache.sizes import parse_size
from agnostic_cache.storage.backend import EntryFacts, StorageBackend, StorageStats, check_key, hand_over
from agnostic_cache.storage.blocks import BlockPool
from agnostic_cache.storage.codec import encode
from agnostic_cache.storage.directory import Directory, Total, name_of
from agnostic_cache.storage.entry_file import read_entry, read_key, write_entry
from agnostic_cache.storage.url import StorageURL

_logger = logging.getLogger("agnostic_cache.storage")


class _File(NamedTuple):
    """An entry that this process knows."""

    key: str
    nbytes: int  # of the file


class FileStorage(StorageBackend):
    """Blobs as files in a directory.

    Safe to use from several threads and after a fork, and several processes may have one directory open, with one and
    the same budget. A budget counts what is in the files, not blocks of the file system; each writer needs room for one
    entry more while it writes. ``file:///dev/shm/name`` is shared memory for the workers of one machine.
    """

    def __init__(
        self,
        path: str | Path,
        max_bytes: int | str | None = None,
        *,
        evictor: str | BaseEvictor | Policy = "adaptive",
        compress: str = "",
        sync: bool = False,
    ) -> None:
        """Open a directory, make it where it is not there, and learn from the headers of its files what it holds.

        What processes that died left half-written is removed.

        Args:
            path: The directory; made with access for its owner alone, as are the files.
            max_bytes: Budget of all processes together, such as ``"100GiB"``; None for none.
            evictor: Name of a policy, or a policy or an evictor that serves nobody else.
            compress: ``"byteplanes+zstd"``, or "" for no compression. Entries of either kind can be read.
            sync: Wait for the disk at each put.

        Raises:
            StorageError: The directory cannot be made, or not be written to.
            StorageURLError: There is no such compression.
            MissingExtraError: The library of the compression is not installed.
            InvalidSizeError: `max_bytes` is no size.
            UnknownPolicyError: There is no such policy.
        """
        self.path = Path(path)
        self.max_bytes = None if max_bytes is None else parse_size(max_bytes)
        self._codec, self._sync = compress, sync
        encode(b"", compress)  # refuses now what it would refuse later
        self._policy = make_policy("fifo" if max_bytes is None else evictor, max_bytes or sys.maxsize)
        self._pool = BlockPool()
        self._closed = False
        self.after_fork()
        watch(self)
        try:
            self._directory = Directory(self.path)
        except OSError as error:
            msg = f"the directory {self.path} cannot be made: {error}; pass one that can be written"
            raise StorageError(msg) from error
        with self._directory.translated("open"), self._directory.locked() as total:
            self._directory.sweep()
            self._look(total)

    def after_fork(self) -> None:
        """Know nothing yet of the directory, which is as much the child's as its parent's."""
        self._policy.reset()
        self._lock = Lock()  # guards everything below; held for dict operations and counting only
        self._files: OrderedDict[str, _File] = OrderedDict()  # by name
        self._known = 0  # holds: the sum of the sizes in _files
        self._counts = Counter[str]()  # of `StorageStats`

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one for ``file:///path?max_bytes=100GiB&evictor=adaptive&compress=byteplanes%2Bzstd&sync=true``.

        Without the third slash the path is relative to the working directory, as fsspec has it.
        """
        parsed = StorageURL.parse(url)
        path = parsed.path if parsed.netloc in {"", "localhost"} else f"{os.curdir}/{parsed.netloc}{parsed.path}"
        if not parsed.path.startswith("/") or "\x00" in path or {"@", ":"} & set(parsed.netloc):
            msg = f"file:{parsed.path} names no directory of this machine; write file:///path, or file://relative/path"
            raise StorageURLError(msg)
        max_bytes = parsed.text("max_bytes") or None
        policy, sync = parsed.text("evictor", "adaptive"), parsed.switch("sync", default=False)
        compress = parsed.text("compress").replace(" ", "+")  # in a query, a plus is a space
        parsed.check_used()
        return cls(path, max_bytes, evictor=policy, compress=compress, sync=sync)

    # --- in -----------------------------------------------------------------------------------------------------------

    def put(self, key: str, blob: Blob) -> PutStatus:
        """See `StorageBackend.put`.

        Raises:
            StorageFullError: The disk is full.
        """
        check_key(key)
        self._check_open()
        entry = seal(key, encode(blob, self._codec), codec=self._codec)
        name, new = name_of(key), _File(key, entry.nbytes)
        status = PutStatus.ILLEGAL
        if self.max_bytes is None or new.nbytes <= self.max_bytes:
            with self._directory.translated("put"), self._directory.aside(name) as (aside, file):
                write_entry(file, entry)
                if self._sync:
                    os.fsync(file)
                status = self._bring_in(aside, name, new)
        with self._lock:
            self._counts["puts"] += status is PutStatus.LEGAL
            self._counts["refused"] += status is PutStatus.ILLEGAL
        return status

    def _bring_in(self, aside: Path, name: str, new: _File) -> PutStatus:
        """Give a written file its name, once there is room for it."""
        with self._directory.locked() as total:
            if not self._make_room(name, new, total):
                return PutStatus.ILLEGAL
            nbytes = self._directory.size(name)
            try:
                self._directory.bring_in(aside, name, sync=self._sync)
            except BaseException:
                with self._lock:
                    old = self._files.get(name)
                    self._unlist(name)
                    if old is not None:
                        self._list(name, old)
                raise
            total.nbytes += new.nbytes - nbytes
            with self._lock:
                self._list(name, new)
        return PutStatus.LEGAL

    def _make_room(self, name: str, new: _File, total: Total) -> bool:
        """Evict until all processes together are within the budget; say whether they are. The directory is locked."""
        has_looked = False
        while True:
            over = total.nbytes + new.nbytes - self._directory.size(name) - (self.max_bytes or sys.maxsize)
            room = CountingRoom(over, lambda victim: self._files[victim].nbytes)
            with self._lock:
                expired = self._policy.expired()
                victims = choose(self._policy, self._files, room, newcomer=name, nbytes=new.nbytes, expired=expired)
                for victim in victims or ():
                    self._unlist(victim, evicted=True)
                self._counts["evictions"] += len(victims or ())
            if victims:
                for victim in victims:
                    total.nbytes -= self._directory.unlink(victim)  # others may have done it before
            elif victims is not None:
                return True
            elif has_looked:
                return False
            else:  # other processes have entries that this one does not know
                self._look(total)
                has_looked = True

    # --- out ----------------------------------------------------------------------------------------------------------

    def get(self, key: str) -> memoryview | None:
        """See `StorageBackend.get`. The bytes are read and compared with their checksum."""
        check_key(key)
        self._check_open()
        name = name_of(key)
        found = None
        try:
            with self._directory.translated("get"), self._directory.opened(name) as file:
                if file is not None and not self._policy.has_expired(name):
                    found = read_entry(file, key, self._pool)
                    with suppress(OSError):  # recency, for other processes and for later ones
                        os.utime(file)
        except MissingExtraError as error:
            _logger.warning("an entry in %s cannot be read here, which is a miss: %s", self.path, error)
        except BlobError as error:
            with self._directory.translated("set aside"), self._directory.locked() as total:
                total.nbytes -= self._directory.size(name)
                self._put_away(name, error)
        with self._lock:
            if found is None:
                self._counts["misses"] += 1
                return None
            nbytes, blob = found
            self._counts["hits"] += 1
            # One that this process did not know may be gone again; whoever removes it unlists it after this.
            if self._files.get(name) == _File(key, nbytes) or self._directory.contains(name):
                if self._files.get(name) != _File(key, nbytes):
                    self._list(name, _File(key, nbytes))
                self._policy.used(name)
            return blob

    def get_into(self, key: str, buffer: memoryview) -> int | None:
        """See `SupportsGetInto.get_into`.

        Raises:
            ValueError: `buffer` is too small.
        """
        return hand_over(self.get(key), buffer)

    def contains(self, key: str) -> bool:
        """See `StorageBackend.contains`."""
        check_key(key)
        self._check_open()
        name = name_of(key)
        with self._directory.translated("contains"):
            return self._directory.contains(name) and not self._policy.has_expired(name)

    def describe(self, key: str) -> EntryFacts | None:
        """See `SupportsDescribe.describe`. The age counts from the last put or get of any process."""
        check_key(key)
        self._check_open()
        with self._directory.translated("describe"), self._directory.opened(name_of(key)) as file:
            if file is None:
                return None
            status = os.fstat(file)
            return EntryFacts(status.st_size, max(0.0, time.time() - status.st_mtime))

    def remove(self, key: str) -> bool:
        """See `StorageBackend.remove`."""
        check_key(key)
        self._check_open()
        name = name_of(key)
        with self._directory.translated("remove"), self._directory.locked() as total:
            found = self._directory.contains(name)
            total.nbytes -= self._directory.unlink(name)
            with self._lock:
                self._unlist(name)
        return found

    def list_keys(self) -> list[str]:
        """See `StorageBackend.list_keys`. Looks at the directory, and reads the headers of files that are new to it.

        In the order of the policy, the next victim first.
        """
        self._check_open()
        with self._directory.translated("list"), self._directory.locked() as total:
            self._look(total)
        with self._lock:
            return [self._files[name].key for name in self._policy.order() if name in self._files]

    def close(self) -> None:
        """Let go of the directory, which keeps its entries. Idempotent."""
        self._closed = True
        self._pool.trim(0)

    def stats(self) -> StorageStats:
        """Return what this process knows of the directory, and did in it."""
        with self._lock:
            return StorageStats(
                entries=len(self._files),
                current_bytes=self._known,
                max_bytes=self.max_bytes,
                **self._counts,
            )

    # --- what this process knows of the directory ---------------------------------------------------------------------

    def _look(self, total: Total) -> None:
        """Learn what is in the directory, and count it anew. The directory is locked."""
        there = self._directory.scan(total)
        with self._lock:
            for name in self._files.keys() - there.keys():
                self._unlist(name)
            known = {name: file.nbytes for name, file in self._files.items()}
        for name, nbytes in there.items():
            if known.get(name) == nbytes:
                continue
            try:
                with self._directory.opened(name) as file:
                    key = read_key(file) if file is not None else ""
                if name_of(key) != name:
                    msg = "the file is not named after its key"
                    raise BlobError(msg)  # noqa: TRY301 - one way for every damage
            except BlobError as error:
                total.nbytes -= nbytes
                self._put_away(name, error)
            else:
                with self._lock:
                    self._list(name, _File(key, nbytes))

    def _put_away(self, name: str, error: BlobError) -> None:
        """Take a damaged file out of the way, and keep it for whoever wants to know. The directory is locked."""
        away = self._directory.put_away(name)
        _logger.warning("an entry is damaged, which is a miss, and now at %s: %s", away, error)
        with self._lock:
            self._counts["corrupt"] += 1
            self._unlist(name)

    def _list(self, name: str, file: _File) -> None:
        """List a file. The lock is held."""
        old = self._files.pop(name, None)
        self._files[name] = file
        self._known += file.nbytes - (old.nbytes if old else 0)
        self._policy.added(name, file.nbytes)

    def _unlist(self, name: str, *, evicted: bool = False) -> None:
        """Unlist a file. The lock is held."""
        gone = self._files.pop(name, None)
        self._known -= gone.nbytes if gone else 0
        self._policy.gone(name, evicted=evicted)

    def _check_open(self) -> None:
        if self._closed:
            msg = f"the storage in {self.path} is closed; open another"
            raise StorageError(msg)
