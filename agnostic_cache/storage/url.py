"""StorageURL: a storage's URL taken apart, every option of it used or refused."""

from collections.abc import Mapping
from typing import NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from agnostic_cache.errors import StorageURLError

_SWITCH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class StorageURL(NamedTuple):
    """The parts of ``scheme://host/path?option=value``.

    Attributes:
        scheme: In lower case.
        netloc: User, password, hosts and ports, as they stand; never shown in an error.
        path: Percent signs decoded.
        options: What stands behind the question mark.
        used: Options that somebody has asked for.
    """

    scheme: str
    netloc: str
    path: str
    options: Mapping[str, str]
    used: set[str]

    @classmethod
    def parse(cls, url: str) -> Self:
        """Take a URL apart.

        Raises:
            StorageURLError: It is none, or an option stands in it twice.
        """
        try:
            parts = urlsplit(url)
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except (ValueError, AttributeError, TypeError) as error:
            msg = f"a storage URL cannot be read ({error}); write it like file:///path?max_bytes=100GiB"
            raise StorageURLError(msg) from error
        options = dict(pairs)
        if not parts.scheme or len(options) < len(pairs):
            msg = "a storage URL has no scheme, or an option twice; write it like file:///path?max_bytes=100GiB"
            raise StorageURLError(msg)
        return cls(parts.scheme, parts.netloc, unquote(parts.path), options, set())

    def text(self, option: str, default: str = "") -> str:
        """Return an option."""
        self.used.add(option)
        return self.options.get(option, default)

    def switch(self, option: str, *, default: bool) -> bool:
        """Return an option that is on or off.

        Raises:
            StorageURLError: It is neither.
        """
        found = self.text(option, str(default)).lower()
        if found not in _SWITCH:
            msg = f"{option}={found!r} in a {self.scheme}:// URL; write true or false"
            raise StorageURLError(msg)
        return _SWITCH[found]

    def seconds(self, option: str, default: float) -> float:
        """Return an option that is a time of more than zero seconds.

        Raises:
            StorageURLError: It is none.
        """
        text = self.text(option, str(default))
        try:
            found = float(text)
        except ValueError:
            found = 0.0
        if not 0 < found < 1e9:  # noqa: PLR2004 - thirty years
            msg = f"{option}={text!r} in a {self.scheme}:// URL; write a number of seconds, such as 0.25"
            raise StorageURLError(msg)
        return found

    def check_used(self) -> None:
        """Refuse options that nobody has asked for.

        Raises:
            StorageURLError: There are some.
        """
        if unknown := sorted(self.options.keys() - self.used):
            msg = f"{self.scheme}:// has no option {unknown}; known: {', '.join(sorted(self.used))}"
            raise StorageURLError(msg)
