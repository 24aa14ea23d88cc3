"""Every error that this package raises.

One root, `AgnosticCacheError`; each subclass also derives from the built-in that a Python user would catch. A message
says what was asked, what was found, and what to do. A miss is never an error: it is ``None``.
"""


class AgnosticCacheError(Exception):
    """Root of every error that this package raises."""


class UnknownValueError(AgnosticCacheError, TypeError):
    """A value holds something that no loaded adapter knows, or holds no array at all."""


class MixedFrameworksError(AgnosticCacheError, TypeError):
    """One value, or one join, mixes arrays of several frameworks."""


class UnsupportedArrayError(AgnosticCacheError, ValueError):
    """An array cannot be kept: it requires grad, or is sparse, meta, conjugated, or not addressable from here."""


class UnsupportedDtypeError(AgnosticCacheError, TypeError):
    """A dtype is unknown, or the target framework cannot hold it without changing values."""


class DeletedArrayError(AgnosticCacheError, RuntimeError):
    """An array was deleted or donated before it reached us."""


class LengthMismatchError(AgnosticCacheError, ValueError):
    """A state's `length` disagrees with what its leaves hold."""


class LayoutUnknownError(AgnosticCacheError, ValueError):
    """A layout is needed, or could not be inferred, or names leaves that are not there."""


class CutRangeError(AgnosticCacheError, IndexError):
    """A cut reaches outside ``[0, length]``, or does not fall on a row of a strided leaf."""


class MissingLeavesError(AgnosticCacheError, LookupError):
    """A state lacks leaves that a cut had to leave behind, so no native value can be built from it."""


class StructureMismatchError(AgnosticCacheError, ValueError):
    """Two states, or a state and a template, differ in leaves, axes, dtypes or containers."""


class ReleasedError(AgnosticCacheError, RuntimeError):
    """A state was used after it was released, moved into a cache, or after its borrow ended."""


class BorrowedError(AgnosticCacheError, RuntimeError):
    """An entry cannot leave the cache by `pop`: somebody borrows it."""


class LeaseUsedError(AgnosticCacheError, RuntimeError):
    """A borrow was entered while it is open already; each ``with`` block takes a borrow of its own."""


class PinLimitError(AgnosticCacheError, ValueError):
    """A pin would keep more than half of the budget from being evicted."""


class BorrowViolationError(AgnosticCacheError, RuntimeError):
    """A borrower wrote, donated or deleted what it had borrowed (found with ``debug=True``)."""


class InvalidKeyError(AgnosticCacheError, TypeError):
    """A key is not a str, int, bytes, or a tuple of these."""


class InvalidSizeError(AgnosticCacheError, ValueError):
    """A size is not a positive number of bytes, nor a string such as ``"4GiB"``."""


class UnknownPolicyError(AgnosticCacheError, ValueError):
    """An eviction policy is asked for by a name that the house does not have."""


class TraceFormatError(AgnosticCacheError, ValueError):
    """A line of a request trace does not parse; names the file and the line."""


class MissingAdapterError(AgnosticCacheError, ImportError):
    """An adapter is asked for by name and its framework, or the adapter itself, is not installed."""


class BlobError(AgnosticCacheError, ValueError):
    """Bytes are no whole blob: truncated, changed, foreign, of an unknown version, or lying about lengths."""


class StorageError(AgnosticCacheError, OSError):
    """A storage cannot be reached, answered too late, or failed. `open_storage` without ``strict`` makes it a miss."""


class StorageFullError(StorageError):
    """A storage has no room for an entry; what it holds can still be read."""


class BusyError(StorageError):
    """A finaliser called a cache or storage in the middle of another call of its own thread."""


StorageBusyError = BusyError
"""What `BusyError` was called while only storages raised it."""


class StorageURLError(AgnosticCacheError, ValueError):
    """A storage is asked for by a URL whose scheme or option nobody knows."""


class MissingExtraError(AgnosticCacheError, ImportError):
    """A feature is asked for whose extra is not installed."""


class CacheCopyError(AgnosticCacheError, TypeError):
    """A cache or a storage was pickled or deep-copied; what it owns has one owner."""


class WireError(AgnosticCacheError, ValueError):
    """A message or key of the lm:// wire means nothing, or cannot be said on it."""


class InvalidTokensError(AgnosticCacheError, ValueError, TypeError):
    """Tokens are not a one-dimensional sequence of integers in ``[0, 2**32)``."""


class InvalidNamespaceError(AgnosticCacheError, ValueError, TypeError):
    """A namespace is no str or empty, or a salt or context is no bytes."""


class InvalidExtrasError(InvalidTokensError, InvalidNamespaceError):
    """Extras are not ``(start, stop, digest, atomic)`` in order and within the prompt, or ``salt_from`` is no place."""


class CacheBypassWarning(UserWarning):
    """A call went past the cache, because something that it depends on cannot be put into a key."""


class ServerStartError(AgnosticCacheError, RuntimeError):
    """A server cannot start as asked: the port is taken, a certificate is missing, or anyone could connect to it."""
