"""Directory: files that are whole or absent, and one count of their bytes for all processes that share them.

A file is written aside, under a lock of its own, and then renamed. What nobody holds the lock of was left by a process
that died. The count stands in ``.total``, which is locked while a file comes in or leaves: for a rename, never for
writing. Where a process dies between the two, the count is off until somebody looks at the directory again.
"""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

from agnostic_cache.errors import StorageError, StorageFullError
from agnostic_cache.process.forks import watch
from agnostic_cache.process.lock import Lock

_NAME = re.compile(r"[0-9a-f]{40}\.kv")
_ASIDE, _DAMAGED, _TOTAL = ".new", ".damaged", ".total"
_DIGITS = 32
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def name_of(key: str) -> str:
    """Return the name of the file of a key: a hash, so that no key can leave the directory."""
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest() + ".kv"


class Total:
    """Bytes of all files, while the directory is locked.

    Attributes:
        nbytes: The count, to be changed by whoever holds it.
    """

    __slots__ = ("nbytes",)

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class Directory:
    """One directory of files, named by `name_of`. Others in it are left alone.

    Methods raise OSError, which `translated` turns into errors of this package.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        """Make the directory where it is not there, for its owner alone."""
        self.path = path
        self._locked: set[int] = set()  # open files that this process has locked
        self.after_fork()
        watch(self)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._prefix = os.path.join(path, "")  # noqa: PTH118 - joining Paths takes longer than opening files

    def after_fork(self) -> None:
        """Hold no lock."""
        # A lock belongs to an open file, which the child has, too: closed here, it is the parent's alone again.
        for file in self._locked:
            os.close(file)
        self._locked = set()
        # Held by a thread, as the lock of the count is held by a process: for renaming and unlinking. Readers need
        # neither.
        self._door = Lock()

    @contextmanager
    def locked(self) -> Iterator[Total]:
        """Keep every other thread and process from changing what is there. The count is written down at the end."""
        with self._door:
            file = os.open(self.path / _TOTAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._locked.add(file)
                fcntl.flock(file, fcntl.LOCK_EX)
                text = os.pread(file, _DIGITS, 0)
                total = Total(int(text) if text.isdigit() else 0)
                try:
                    yield total
                finally:
                    os.pwrite(file, b"%0*d" % (_DIGITS, max(total.nbytes, 0)), 0)
            finally:
                self._unlock(file)

    def _unlock(self, file: int) -> None:
        """Unlock and close a file; closing alone would leave the lock to children that were forked meanwhile."""
        fcntl.flock(file, fcntl.LOCK_UN)
        self._locked.discard(file)
        os.close(file)

    # --- in -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def aside(self, name: str) -> Iterator[tuple[Path, int]]:
        """Open a new file to write to, which is not one of the directory's yet, and of which nothing is left."""
        path = self.path / f"{name}.{secrets.token_hex(8)}{_ASIDE}"
        while True:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._locked.add(file)
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:
                break
            self._unlock(file)  # another process was sweeping, between these two calls
        try:
            yield path, file
        finally:
            path.unlink(missing_ok=True)
            self._unlock(file)

    def bring_in(self, aside: Path, name: str, *, sync: bool) -> None:
        """Give a written file its name, in place of what has it. The directory is locked."""
        aside.rename(self.path / name)
        if sync:
            folder = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    # --- out ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, name: str) -> Iterator[int | None]:
        """Open a file for reading, or give None where it is not there."""
        try:
            file = os.open(self._prefix + name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            yield None
            return
        try:
            yield file
        finally:
            os.close(file)

    def contains(self, name: str) -> bool:
        """Say whether a file is there."""
        return os.access(self._prefix + name, os.F_OK)

    def size(self, name: str) -> int:
        """Return the size of a file, 0 where it is not there."""
        try:
            return os.stat(self._prefix + name).st_size  # noqa: PTH116 - as above
        except FileNotFoundError:
            return 0

    def unlink(self, name: str) -> int:
        """Remove a file; return its size, 0 where it was not there. The directory is locked."""
        nbytes = self.size(name)
        (self.path / name).unlink(missing_ok=True)
        return nbytes

    def put_away(self, name: str) -> Path:
        """Take a damaged file out of the way, and return where it is now. The directory is locked."""
        away = self.path / f"{name}{_DAMAGED}"
        with suppress(FileNotFoundError):
            (self.path / name).rename(away)
        return away

    def sweep(self) -> None:
        """Remove what was left half-written. The directory is locked."""
        for path in self.path.glob(f"*{_ASIDE}"):
            with self.opened(path.name) as file, suppress(BlockingIOError):
                if file is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)

    def scan(self, total: Total) -> Mapping[str, int]:
        """Return the size of every file, that used last at the end, and count them anew. The directory is locked."""
        there: dict[str, os.stat_result] = {}
        with os.scandir(self.path) as found:
            for item in found:
                if _NAME.fullmatch(item.name):
                    with suppress(FileNotFoundError):
                        there[item.name] = item.stat(follow_symlinks=False)
        total.nbytes = sum(status.st_size for status in there.values())
        return {name: there[name].st_size for name in sorted(there, key=lambda name: there[name].st_mtime_ns)}

    @contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """Turn errors of the system into ours.

        Raises:
            StorageFullError: There is no room on the disk.
            StorageError: Anything else.
        """
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            kind = StorageFullError if error.errno in _FULL else StorageError
            msg = f"{what} in {self.path} failed: {error}; make room, or pass a directory that can be written"
            raise kind(msg) from error
