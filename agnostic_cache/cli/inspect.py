"""``agnostic-cache inspect``: what is in a storage, how old it is, whether it is whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table

from agnostic_cache.errors import AgnosticCacheError, StorageURLError
from agnostic_cache.storage.backend import StorageBackend, SupportsDescribe
from agnostic_cache.storage.registry import open_storage
from agnostic_cache.storage.url import StorageURL

_SHOWN = 100  # characters of a key
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def inspect(
    url: Annotated[str, typer.Argument(help="Such as file:///var/cache/kv or redis://host:6379.")],
    *,
    match: Annotated[str, typer.Option(help="Only keys like this: * and ? stand for anything.")] = "*",
    verify: Annotated[bool, typer.Option("--verify", help="Read each entry; damaged ones are set aside.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove them.")] = False,
) -> None:
    """List the entries of a storage, with size and age; check or remove them.

    Exit code 1 where an entry was found damaged, 2 where the storage cannot be used.
    """
    console, errors = Console(), Console(stderr=True)
    with _told(errors), _open(url) as storage:
        keys = sorted(key for key in storage.list_keys() if fnmatchcase(key, match))
        table = _list(storage, keys, errors, verify=verify, remove=remove)
        damaged = storage.stats().corrupt
        console.print(table)
        console.print(f"{len(keys)} entries" + (f", {damaged} damaged" if damaged else ""))
    if damaged:
        raise typer.Exit(1)


def _open(url: str) -> StorageBackend:
    """Open what is there: a directory that is not is not made.

    Raises:
        StorageURLError: There is no such directory.
        AgnosticCacheError: It cannot be opened.
    """
    parsed = StorageURL.parse(url)
    if parsed.scheme == "file" and not Path(parsed.path).is_dir():
        msg = f"there is no directory {parsed.path}; give the one that the storage was opened with"
        raise StorageURLError(msg)
    return open_storage(url, strict=True)


def _list(storage: StorageBackend, keys: Sequence[str], progress: Console, *, verify: bool, remove: bool) -> Table:
    table = Table("key", "size", "age", "state")
    for key in track(keys, "reading", console=progress, transient=True, disable=not progress.is_terminal):
        known = storage.describe(key) if isinstance(storage, SupportsDescribe) else None
        state = ""
        if verify:
            state = "whole" if storage.get(key) is not None else "damaged or gone"
        if remove and storage.remove(key):
            state = "removed"
        size, age = (decimal(known.nbytes), _age(known.age_seconds)) if known is not None else ("", "")
        table.add_row(_shown(key), size, age, state)
    return table


def _shown(key: str) -> str:
    """Return a key as it may go to a terminal: keys are anybody's bytes."""
    text = key.encode("unicode_escape").decode().replace("[", r"\[")
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _age(seconds: float) -> str:
    size, unit = next((unit for unit in _UNITS if seconds >= unit[0]), _UNITS[-1])
    return f"{seconds / size:.0f} {unit}"


@contextmanager
def _told(errors: Console) -> Iterator[None]:
    """Say what is wrong in one line, and end with exit code 2."""
    try:
        yield
    except AgnosticCacheError as error:
        errors.print(f"agnostic-cache: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
