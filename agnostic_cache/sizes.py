"""Byte sizes as people write them: ``"4GiB"``, ``"500MB"``, ``4096``."""

import re

from agnostic_cache.errors import InvalidSizeError

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}iB": 1024 ** (i + 1) for i, prefix in enumerate("KMGTP")},
    **{f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGTP")},
}
_SIZE = re.compile(r"\s*(\d{1,20})(?:\.(\d{1,20}))?\s*([KMGTP]?i?B?)\s*", re.ASCII)


def parse_size(size: int | str) -> int:
    """Turn a size into a number of bytes.

    >>> parse_size("4GiB"), parse_size("1.5 MB"), parse_size(4096)
    (4294967296, 1500000, 4096)

    Args:
        size: Bytes as an int, or a number with a unit: ``B``, ``KiB`` to ``PiB`` (powers of 1024), ``KB`` to ``PB``
            (powers of 1000).

    Returns:
        The size in bytes, at least 1.

    Raises:
        InvalidSizeError: It is neither, or less than one byte.
    """
    found = None
    if isinstance(size, int) and not isinstance(size, bool):
        found = size
    elif isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is not None and match[3] in _UNITS:
            whole, part = match[1], match[2] or ""
            found = int(whole + part) * _UNITS[match[3]] // 10 ** len(part)  # exact, unlike a float
    if found is None or found < 1:
        msg = f"{size!r} is not a size in bytes; pass a positive int, or a string such as '512MiB' or '4GiB'"
        raise InvalidSizeError(msg)
    return found
