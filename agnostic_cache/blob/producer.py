"""Who writes our files, as their metadata says."""

from importlib import metadata
from typing import Final

# Read once, on import: reading it imports more, and a process that forks meanwhile leaves its child a lock for ever.
PRODUCER: Final = f"agnostic-cache {metadata.version('agnostic-cache')}"
"""Name and version of this package."""
