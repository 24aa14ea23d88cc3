"""Which program writes our files."""

from typing import Final

from agnostic_cache.version import __version__

PRODUCER: Final = f"agnostic-cache {__version__}"
"""Name and version of this package."""
