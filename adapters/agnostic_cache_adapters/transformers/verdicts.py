"""The verdict on a model: whether a prefix of it may be reused. Looked up, read from disk, or proven.

The shipped table has the models of transformers, by the digest of the source that computes them. What is not there
(remote code, another release, a patched class) is proven on the model itself, once, and the verdict is kept on disk.
"""

import contextlib
import functools
import json
import logging
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Mapping
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch

from agnostic_cache.process import forks
from agnostic_cache_adapters.transformers import windows
from agnostic_cache_adapters.transformers.model_copy import generating
from agnostic_cache_adapters.transformers.modeling_source import digest_of, marks_of, rope_switch
from agnostic_cache_adapters.transformers.proof import SENTENCES, Proof, Why, prove

_log = logging.getLogger("agnostic_cache.transformers")
_FORMAT: Final = 1
_LARGEST_BYTES: Final = 16 * 1024  # of a verdict on disk
_PASSING: Final = frozenset({Why.FAILED, Why.SHARDED})  # another time, or another process, may do better


class Verdict(NamedTuple):
    """What may be reused of a model.

    Attributes:
        prefix: Whether the state after a prefix may be reused by prompts that begin with it.
        rows: Whether that state may stand in a row behind left padding, and be taken from there.
        limit: The tokens up to which that holds; beyond, a caller has to compare once. None: any length.
        reason: Why not, in a sentence; None where all is right.
        source: Where the verdict is from.
        why: The same as the reason, for programs.
        marked: Whether a prefix may also be reused by calls that pass ``token_type_ids`` that are not zero.
    """

    prefix: bool
    rows: bool
    limit: int | None
    reason: str | None
    source: Literal["table", "disk", "proof"]
    why: Why | None = None
    marked: bool = True


class Verdicts:
    """Verdicts on models, remembered per model object for as long as that lives.

    Safe for threads: one proves, the others wait for it.

    Args:
        table: Records by `digest_of`; None for the shipped ones.
        directory: Where proven verdicts are kept; None for `default_directory`.
    """

    def __init__(self, table: Mapping[str, Mapping[str, Any]] | None = None, directory: Path | None = None) -> None:
        self._table = table
        self._directory = directory
        self._seen: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], Verdict]] = weakref.WeakKeyDictionary()

    def of(self, model: Any) -> Verdict:
        """Return the verdict on a model; never raises but for what interrupts a program.

        The first call for a class of models that is not in the table computes a dozen forwards of 48 tokens. The model,
        its hooks, and random numbers are as if that had not happened. A change of code, dtype or attention asks anew.
        """
        try:
            return self._of(generating(model))
        except Exception as error:  # noqa: BLE001 - nothing of ours fails a call that would succeed
            return _verdict(_failed(model, error), "proof")

    def _of(self, model: Any) -> Verdict:
        marks = marks_of(model)
        seen = self._seen.get(model)
        if seen is None or seen[0] != marks:
            with _turn.lock:  # held while the model computes
                seen = self._seen.get(model)
                if seen is None or seen[0] != marks:
                    try:
                        verdict = self._found(model)
                    except Exception as error:  # noqa: BLE001 - as in `of`; noted, so that it is not tried at each call
                        verdict = _verdict(_failed(model, error), "proof")
                    seen = self._seen[model] = (marks, verdict)
        return seen[1]

    def _found(self, model: Any) -> Verdict:
        digest = digest_of(model)
        table = _shipped() if self._table is None else self._table
        known = _proof_of(table.get(digest))
        if known is not None:
            return _of_config(known, "table", model.config)
        key = _key(model, digest)
        path = (self._directory or default_directory()) / f"{key}.json"
        known = _proof_of(_read(path, key))
        if known is not None:
            return _of_config(known, "disk", model.config)
        proof = prove(model)
        if proof.why not in _PASSING:
            _write(path, {"key": key, **record_of(proof)})
        return _of_config(proof, "proof", model.config)


def record_of(proof: Proof) -> dict[str, Any]:
    """Return a proof as a record of the table, JSON-able."""
    return {
        "format": _FORMAT,
        "prefix": proof.prefix,
        "rows": proof.rows,
        "marked": proof.marked,
        "limit": proof.limit,
        "selected": proof.selected,
        "why": proof.why and proof.why.value,
        "detail": proof.detail[:200],
    }


def default_directory() -> Path:
    """Return the folder of verdicts: in ``AGNOSTIC_CACHE_DIR``, or where the platform keeps caches of a user."""
    own = os.environ.get("AGNOSTIC_CACHE_DIR")
    if own:
        return Path(own).expanduser() / "verdicts"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "agnostic-cache" / "verdicts"


class _Turn:
    """One proof at a time in a process: random numbers, which it puts back, are the process's."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def after_fork(self) -> None:
        """See `SupportsFork`: the thread that proved is not there."""
        self.lock = threading.RLock()


_turn = _Turn()
forks.watch(_turn)


@functools.cache
def _shipped() -> Mapping[str, Mapping[str, Any]]:
    file = resources.files("agnostic_cache_adapters.transformers") / "verdicts.json"
    found: Mapping[str, Mapping[str, Any]] = json.loads(file.read_text("utf-8"))["verdicts"]
    return found


def _failed(model: Any, error: Exception) -> Proof:
    _log.warning("a %s could not be tried; its prefixes are not reused", type(model).__name__, exc_info=error)
    return Proof(prefix=False, why=Why.FAILED, detail=type(error).__name__)


def _verdict(proof: Proof, source: Literal["table", "disk", "proof"]) -> Verdict:
    reason = None if proof.why is None else SENTENCES[proof.why] + (f" ({proof.detail})" if proof.detail else "")
    return Verdict(proof.prefix, proof.rows, proof.limit, reason, source, proof.why, proof.marked)


def _of_config(proof: Proof, source: Literal["table", "disk", "proof"], config: Any) -> Verdict:
    """Return the verdict on a model of this config, limited to where it begins to compute what was not proven."""
    selected = None if proof.selected else windows.selected(config)
    limits = [limit for limit in (proof.limit, rope_switch(config), selected) if limit is not None]
    return _verdict(proof._replace(limit=min(limits, default=None)), source)


def _key(model: Any, digest: str) -> str:
    """Name what a proof was about: sources and kinds, the whole config, dtype, attention, device and torch."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures", "id2label", "label2id"):
        config.pop(name, None)
    about = [_FORMAT, digest, config, str(model.dtype), str(model.config._attn_implementation)]  # noqa: SLF001
    about += [torch.__version__, model.device.type]
    return blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _proof_of(record: Any) -> Proof | None:
    """Return a record as a proof; None where it is none."""
    try:
        prefix, rows, marked, selected = (record[name] for name in ("prefix", "rows", "marked", "selected"))
        limit, why, detail = record["limit"], record["why"] and Why(record["why"]), record["detail"]
    except (KeyError, TypeError, ValueError):
        return None
    right = all(type(one) is bool for one in (prefix, rows, marked, selected)) and isinstance(detail, str)
    right = right and record.get("format") == _FORMAT and (limit is None or (type(limit) is int and limit >= 0))
    return Proof(prefix, rows, marked, limit, selected, why, detail) if right and (prefix or why) else None


def _read(path: Path, key: str) -> Any:
    """Return the record in a file; None where it is not there, unreadable or of something else."""
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_LARGEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("key") == key else None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside.write_text(json.dumps(record, sort_keys=True), "utf-8")
        aside.replace(path)
    except OSError:
        _log.debug("a verdict could not be kept in %s", path.parent, exc_info=True)
        with contextlib.suppress(OSError):
            aside.unlink()


VERDICTS: Final = Verdicts()
verdict_of = VERDICTS.of
