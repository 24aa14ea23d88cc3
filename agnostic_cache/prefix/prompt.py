"""Prompt: tokens and what else their states depend on, from the first token or from some place on.

An *extra* is ``(start, stop, digest, atomic)``: what stands at tokens ``[start, stop)`` besides the tokens, such as an
image behind its placeholders. It is a mark in the chain at `start`, so that prompts share what stands before it and
nothing behind. Within an atomic extra, whose tokens attend to each other in both directions, no match ends.
"""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from operator import index
from typing import Any, NoReturn

from agnostic_cache.errors import InvalidExtrasError
from agnostic_cache.prefix.chain import KEY_BYTES, TOKEN_BYTES, Marks, cut, encode, fields, marks_in, root_key

Extra = tuple[int, int, bytes, bool]
"""First token, the one behind the last, digest of what stands there, and whether nothing is cut inside."""


class Prompt:
    """A prompt, ready to be looked up. Never changes.

    Attributes:
        data: Its tokens, encoded.
        root: The key that its first block hangs on.
        marks: What enters the chain within it.
    """

    __slots__ = ("_atoms", "data", "marks", "root")

    def __init__(
        self,
        tokens: Any,
        namespace: str,
        salt: bytes = b"",
        context: bytes = b"",
        salt_from: int = 0,
        extras: Iterable[Extra] = (),
    ) -> None:
        """Encode a prompt.

        Args:
            tokens: See `chain.encode`.
            namespace: Names the weights.
            salt: Whose tokens they are, from `salt_from` on.
            context: What the whole state depends on besides tokens.
            salt_from: How many of the first tokens are everybody's.
            extras: What stands at places of the prompt, in order.

        Raises:
            InvalidTokensError: The tokens are no prompt.
            InvalidNamespaceError: `salt` or `context` is no bytes.
            InvalidExtrasError: `salt_from` is no place, or an extra is not in the prompt, or not behind the one before.
        """
        self.data = encode(tokens)
        shared = _place(salt_from)
        self.root = root_key(namespace, salt, context, salted=not shared)
        places: dict[int, list[bytes]] = {shared: [fields(b"salt", salt)]} if shared and salt else {}
        self._atoms = self._take(extras, places) if extras else ()
        self.marks: Marks = tuple((at, _digest(parts)) for at, parts in sorted(places.items()) if at < self.count)

    def _take(self, extras: Iterable[Extra], places: dict[int, list[bytes]]) -> tuple[tuple[int, int], ...]:
        """Check extras and add what each adds to the chain; return the spans of the atomic ones."""
        atoms, end = [], 0
        for extra in extras:
            start, stop, digest, atomic = _checked(extra)
            if not end <= start < stop <= self.count:
                _refuse(f"an extra at [{start}, {stop}) of {self.count} tokens, behind one that ends at {end}")
            # Rows of an atomic extra depend on all of its tokens, of whom the chain would tell only in later blocks.
            inside = (self.data[start * TOKEN_BYTES : stop * TOKEN_BYTES],) if atomic else ()
            places.setdefault(start, []).append(fields(b"extra", digest, *inside))
            if atomic:
                atoms.append((start, stop))
            else:
                places.setdefault(stop, []).append(b"end")
            end = stop
        return tuple(atoms)

    @property
    def count(self) -> int:
        """How many tokens it has."""
        return len(self.data) // TOKEN_BYTES

    def part(self, begin: int, end: int) -> tuple[bytes, Marks]:
        """Return tokens ``[begin, end)`` and the marks among them."""
        tokens = self.data[begin * TOKEN_BYTES : end * TOKEN_BYTES]
        return tokens, marks_in(self.marks, begin, end) if self.marks else ()

    def cut(
        self, block_size: int, *, begin: int = 0, end: int | None = None, parent: bytes | None = None
    ) -> Iterator[tuple[bytes, bytes, Marks]]:
        """Yield key, tokens and marks of each block of tokens ``[begin, end)``, which hang on `parent`."""
        tokens, marks = self.part(begin, self.count if end is None else end)
        return cut(tokens, self.root if parent is None else parent, block_size, marks)

    def stop(self, length: int) -> int:
        """Return the greatest length up to `length` at which a state can be cut: not inside an atomic extra."""
        return next((start for start, stop in self._atoms if start < length < stop), length)

    def boundary(self, length: int, block_size: int) -> int:
        """Return the greatest multiple of `block_size` up to `length` at which a state can be cut."""
        while (at := self.stop(length - length % block_size)) % block_size:
            length = at
        return at


def _checked(extra: Any) -> Extra:
    try:
        start, stop, digest, atomic = extra
        wrong = not isinstance(digest, bytes) or isinstance(start, bool) or isinstance(stop, bool)
        found = index(start), index(stop), digest, bool(atomic)
    except (TypeError, ValueError):
        wrong = True
    if wrong:
        _refuse(f"an extra {type(extra).__qualname__} that is no (start, stop, digest as bytes, atomic)")
    return found


def _place(salt_from: Any) -> int:
    if isinstance(salt_from, bool) or not hasattr(salt_from, "__index__") or index(salt_from) < 0:
        msg = f"salt_from={salt_from!r}; pass how many of the first tokens are everybody's"
        raise InvalidExtrasError(msg)
    return index(salt_from)


def _digest(parts: list[bytes]) -> bytes:
    return blake2b(fields(*parts), digest_size=KEY_BYTES).digest()


def _refuse(found: str) -> NoReturn:
    msg = f"{found} was given; pass (start, stop, digest, atomic) in order, within the prompt, not overlapping"
    raise InvalidExtrasError(msg) from None
