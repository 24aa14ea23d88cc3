"""The entry points of installed packages, by name: how third parties add adapters and storages.

The project's own adapters and storages stand in tables and need no entry point, so that a source tree on PYTHONPATH, a
vendored copy, a zip and a frozen program have them all.
"""

import logging

TYPE_CHECKING = False  # as in `agnostic_cache`: typing costs more than all else here
if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_logger = logging.getLogger("agnostic_cache.entry_points")
# A frozen program may lack importlib.metadata, and a damaged installation has metadata that does not parse.
_UNREADABLE = (ImportError, AttributeError, KeyError, OSError, TypeError, ValueError)


def entry_points(group: str) -> "dict[str, EntryPoint]":
    """Return the entry points of a group by name, none where the metadata of this Python cannot be read.

    Where two packages claim a name, the one that comes first on ``sys.path`` has it, as with modules.
    """
    try:
        from importlib import metadata  # noqa: PLC0415 - half the time of importing this package

        found = list(metadata.entry_points(group=group))
    except _UNREADABLE as error:
        _logger.warning("entry points of %s cannot be read (%r); only what this package brings is there", group, error)
        return {}
    return {point.name: point for point in reversed(found)}
