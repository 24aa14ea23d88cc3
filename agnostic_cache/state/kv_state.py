"""KVState: named leaves, a structure and a length.

An adapter wraps a native cache into one; a cache holds it; prefix caching cuts and joins it; another framework unwraps
it. It is `Rows`, which are plain data, with an owner and a life.

Who owns the memory is part of a state, because that is what hand-made reuse gets wrong:

- *borrowed*: the memory is the caller's, who may write, donate or free it (what `wrap` gives);
- *owned*: this state alone refers to it (what `copy`, `cut` and `join` give);
- *shared*: other states refer to it too, so nobody may write it (what a zero-copy `to` leaves on both sides).
"""

import enum
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from agnostic_cache.arrays.adapter import Adapter, Array, Storage
from agnostic_cache.arrays.dlpack import SupportsDLPack
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.registry import adapter_for, adapter_named
from agnostic_cache.arrays.roles import LENGTH, SNAPSHOT, Role
from agnostic_cache.errors import CutRangeError, ReleasedError
from agnostic_cache.state.batch import split_rows, stack_rows
from agnostic_cache.state.cutting import cut_rows, join_rows
from agnostic_cache.state.fill import Source, fill_template
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.length import read_length
from agnostic_cache.state.rows import Rows, check_complete
from agnostic_cache.state.tree import build


class Ownership(enum.Enum):
    """Who else may touch the memory of a state; see the module."""

    BORROWED = "borrowed"
    OWNED = "owned"
    SHARED = "shared"


class KVState:
    """Named arrays of one framework, how they nest, and how many tokens they stand for.

    Make one with `wrap`. Methods neither mutate nor block unless they say so. Not safe to use from several threads
    while one of them releases or unwraps it.
    """

    __slots__ = ("__weakref__", "_gone", "_is_read", "_ownership", "_rows")

    def __init__(self, rows: Rows, ownership: Ownership, *, is_read: bool = True) -> None:
        """Take rows as they are; `wrap` is the public door.

        Args:
            rows: What the state consists of.
            ownership: Who else may touch the memory.
            is_read: Whether ``rows.length`` is known. Otherwise the counters are read when it is first asked for.
        """
        self._rows = rows
        self._ownership = ownership
        self._is_read = is_read
        self._gone: str | None = None

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> Rows:
        """The state as plain data, its length read. Borrowed: do not keep past `release`.

        Raises:
            ReleasedError: The state is gone.
            LengthMismatchError: Counters disagree.
        """
        rows = self._alive()
        if not self._is_read:
            self._rows = rows = rows._replace(length=read_length(rows.leaves, rows.adapter, None))
            self._is_read = True
        return rows

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """The leaves by canonical name, in the order of the structure. Borrowed: do not keep past `release`.

        Raises:
            ReleasedError: The state is gone.
        """
        return MappingProxyType(self._alive().leaves)

    @property
    def length(self) -> int:
        """Tokens that the state stands for. May read counters from the device once, and then blocks for them.

        Raises:
            LengthMismatchError: Counters disagree.
        """
        return self._rows.length if self._is_read else self.rows.length

    @property
    def missing(self) -> frozenset[str]:
        """Names of `SNAPSHOT` leaves that a cut had to leave behind. Such a state joins, but does not unwrap."""
        return self._rows.missing

    @property
    def layout(self) -> KVLayout | None:
        """The layout that named its leaves, or None where their containers did. Not part of `structure`."""
        return self._rows.layout

    @property
    def structure(self) -> Mapping[str, Any]:
        """How the leaves nest, as plain JSON-able dicts and lists."""
        return self._rows.node.to_json()

    @property
    def framework(self) -> str:
        """``"torch"``, ``"jax"``, ``"host"`` or a third party's name."""
        return self._rows.adapter.framework

    @property
    def adapter(self) -> Adapter:
        """The adapter of the leaves."""
        return self._rows.adapter

    @property
    def rotary(self) -> str | None:
        """Convention of the rotary embedding in the keys, ``"half"`` or ``"interleaved"``, or None where unknown."""
        return self._rows.rotary

    @property
    def ownership(self) -> Ownership:
        """Who else may touch the memory."""
        return self._ownership

    @property
    def nbytes(self) -> int:
        """Physical bytes kept alive: shared storage once, views at full size, all addressable shards."""
        return sum(storage.nbytes for storage in self.storages())

    def storages(self) -> list[Storage]:
        """Return each piece of memory that the leaves keep alive, once."""
        return self.adapter.storages_all([leaf.array for leaf in self._alive().leaves.values()])

    def compact_nbytes(self) -> Mapping[str, int]:
        """Return the bytes per device that a `copy` of this state will keep alive."""
        return self.adapter.compact_nbytes(self._alive().arrays())

    def __repr__(self) -> str:
        """Show what it is, never what is in it."""
        if self._gone is not None:
            return f"KVState({self._gone})"
        length = self._rows.length if self._is_read else "?"
        shown = f"length={length}, leaves={len(self._rows.leaves)}, {self._ownership.value}"
        return f"KVState(framework={self.framework!r}, {shown})"

    def _alive(self) -> Rows:
        if self._gone is not None:
            msg = f"this KVState was {self._gone}; get or borrow the entry again"
            raise ReleasedError(msg)
        return self._rows

    def _is_lasting(self) -> bool:
        """Whether nobody writes the arrays in place from now on."""
        return self._ownership is not Ownership.BORROWED or not self.adapter.mutable

    def _around(self, arrays: Mapping[int, Array], adapter: Adapter | None = None) -> Rows:
        """The rows with other arrays in place of those whose ids are given."""
        rows = self._rows
        leaves = {
            name: leaf._replace(array=arrays.get(id(leaf.array), leaf.array)) for name, leaf in rows.leaves.items()
        }
        return rows._replace(leaves=leaves, adapter=adapter or rows.adapter)

    # --- copy, cut, join ---------------------------------------------------------------------------------------------

    def copy(self) -> "KVState":
        """Return an independent, compact copy on the same device. Leaves that were one array stay one array."""
        return self._copied(self._alive().arrays())

    def fork(self) -> "KVState":
        """Return a state to use up: frozen leaves are shared where several may own one, all others copied."""
        leaves, forkable = self._alive().leaves, self.adapter.forkable
        thawed = {id(leaf.array): leaf.array for leaf in leaves.values() if not (leaf.frozen and forkable)}
        return self._copied(list(thawed.values()))

    def _copied(self, arrays: list[Array]) -> "KVState":
        """The state with copies of some of its arrays, each named once."""
        copies = self.adapter.copy_all(arrays) if arrays else []
        rows = self._around(dict(zip(map(id, arrays), copies, strict=True)))
        return KVState(rows, Ownership.OWNED, is_read=self._is_read)

    def cut(self, start: int, stop: int) -> "KVState":
        """Return an independent, compact copy of tokens ``[start, stop)``.

        `SNAPSHOT` leaves come along only where `stop` is the end of the state; otherwise they are listed in `missing`
        of the result. `WINDOW` leaves give the rows of the cut that are there. `KEEP` leaves are left out.

        Raises:
            CutRangeError: Not ``0 <= start <= stop <= length``, or not on a row of a strided leaf.
        """
        return KVState(cut_rows(self.rows, start, stop), Ownership.OWNED)

    @classmethod
    def join(cls, parts: Sequence["KVState"]) -> "KVState":
        """Return an independent state that stands for the tokens of all `parts` in order.

        `SNAPSHOT` leaves, and what is `missing`, come from the last part; `WINDOW` leaves keep what its end needs;
        `KEEP` leaves are left out.

        Raises:
            StructureMismatchError: No parts, or they differ in structure, leaves, axes, shapes or dtypes.
            MixedFrameworksError: They are of different frameworks.
        """
        return cls(join_rows([part.rows for part in parts]), Ownership.OWNED)

    # --- batches -----------------------------------------------------------------------------------------------------

    def split_batch(self, lengths: Sequence[int] | None = None) -> list["KVState"]:
        """Return one independent state per row of the batch, each of a batch of one.

        Args:
            lengths: True tokens of each row, counted from the end: what a left-padded batch has in front of them is
                left behind (``attention_mask.sum(1).tolist()``). By default every row is whole. A snapshot is taken as
                it is, which is right where the model keeps padding out of it, as those of transformers do.

        Raises:
            StructureMismatchError: A leaf has no axis ``batch``, or rows that stand for several tokens and begin with
                padding.
            LengthMismatchError: `lengths` are not one per row within ``[0, length]``.
        """
        return [KVState(rows, Ownership.OWNED) for rows in split_rows(self.rows, lengths)]

    @classmethod
    def stack(cls, states: Sequence["KVState"], *, length: int | None = None) -> "KVState":
        """Return an independent state that holds the batches of all `states`, in order.

        Args:
            states: States of one model, equally long unless `length` is given.
            length: Tokens of the result. States that are shorter get rows of zeros in front, as in a batch that is
                padded on the left; the attention mask that the model is called with must hide them.

        Raises:
            LengthMismatchError: They are not equally long, or longer than `length`.
            StructureMismatchError: No states, or they differ in structure, leaves, shapes or dtypes, or a leaf has no
                axis ``batch``, or rows that stand for several tokens and would begin with padding.
            MixedFrameworksError: They are of different frameworks.
            MissingLeavesError: The rows of a window are not there.
        """
        return cls(stack_rows([state.rows for state in states], length), Ownership.OWNED)

    # --- crossing ----------------------------------------------------------------------------------------------------

    def to(self, framework: str, *, device: str | None = None) -> "KVState":
        """Return the state as arrays of `framework`; the structure stays that of the source.

        Arrays cross through DLPack without a copy where they are dense, aligned to 64 bytes, and nobody may write them
        under the result; otherwise with one copy. Who may write: the holder of a torch tensor or host array that `wrap`
        borrowed (unless its container never writes in place, as Hugging Face dynamic layers). Nobody writes a JAX
        array, and donating or deleting it leaves a view valid. After a crossing without a copy both states are
        *shared*: what `unwrap` then hands to an owner who could write in place is a copy.

        Args:
            framework: ``"torch"``, ``"jax"``, ``"host"`` or a third party's name.
            device: Device name in that framework; by default where DLPack puts it, the host for ``"host"``.

        Raises:
            UnsupportedDtypeError: That framework cannot hold a leaf's dtype without changing values (64-bit in JAX
                without ``jax_enable_x64``): values never change silently.
            MissingAdapterError: No such framework here.
            StructureMismatchError: No such device in it.
        """
        rows, source, target = self._alive(), self.adapter, adapter_named(framework)
        if target.framework == source.framework and (device is None or not source.forkable):
            moved = self.copy()
            if device is None:
                return moved
            placed = {id(array): target.place(array, device) for array in moved.rows.arrays()}
            return KVState(moved._around(placed), Ownership.OWNED, is_read=self._is_read)
        lasting = self._is_lasting()
        exposed = {id(leaf.array): leaf.array for leaf in rows.leaves.values() if not (lasting or leaf.frozen)}
        private = dict(zip(exposed, source.copy_all(list(exposed.values())), strict=True)) if exposed else {}
        crossed: dict[int, Array] = {}
        for array in rows.arrays():
            made = _cross(private.pop(id(array), array), source, target)
            crossed[id(array)] = made if device is None else target.place(made, device)
        self.share()
        return KVState(self._around(crossed, target), Ownership.SHARED, is_read=self._is_read)

    # --- doors -------------------------------------------------------------------------------------------------------

    def unwrap(self, like: object = None, *, layout: KVLayout | None = None) -> Any:
        """Return the native value: fresh containers around the arrays, which become the caller's.

        Afterwards this state only borrows them. Leaves that other states share, and that their container might write in
        place, are copied first.

        Args:
            like: A template whose containers and buffers are consumed: each leaf of the state is written into the leaf
                of that name, rows ``[0, length)`` of longer buffers, axes matched by name; counters are set to
                `length`. It may be of another framework than the state. Use the returned value, also where buffers are
                written in place.
            layout: Names and roles of the template's leaves; by default those that its structure is known by, else the
                state's own.

        Raises:
            MissingLeavesError: A cut left leaves behind, or the rows of a window are not there.
            StructureMismatchError: The template lacks a leaf of the state or has one more, or axes, dtypes, batch or
                room differ, or the structure cannot be rebuilt without a template. Nothing is paired by position.
        """
        rows = self._alive()
        check_complete(rows)
        if like is not None:
            return KVState.fill([self], like, layout)
        if self._ownership is Ownership.SHARED and self.adapter.mutable:
            return self.fork().unwrap()
        # Where no container or counter has stated a length, none needs one: it is not read from the device for this.
        native = build(rows.node, {n: leaf.array for n, leaf in rows.leaves.items()}, rows.length, rows.adapter)
        self._ownership = Ownership.BORROWED
        return native

    @classmethod
    def fill(cls, parts: Sequence["KVState"], like: object, layout: KVLayout | None = None) -> Any:
        """Write the state that adjacent `parts` make up into a template: ``join(parts).unwrap(like)``, without joining.

        Args:
            parts: Parts of one state, in order.
            like: As in `unwrap`: consumed.
            layout: As in `unwrap`.

        Raises:
            StructureMismatchError: As `unwrap`.
        """
        adapter = adapter_for(like)
        parts = [part if part.framework == adapter.framework else part.to(adapter.framework) for part in parts]
        sources = [Source(part.rows, part._is_lasting()) for part in parts]
        native, shared = fill_template(sources, like, layout)
        if shared:
            for part in parts:
                part.share()
        return native

    # --- for the cache that keeps it ---------------------------------------------------------------------------------

    def move(self) -> "KVState":
        """Return a state that owns the leaves; this one is gone, and raises `ReleasedError` from now on."""
        ownership = Ownership.SHARED if self._ownership is Ownership.SHARED else Ownership.OWNED
        moved = KVState(self._alive(), ownership, is_read=self._is_read)
        self.end("moved into a cache")
        return moved

    def lend(self) -> "KVState":
        """Return a state that borrows the leaves until `end` is called on it. Constant time."""
        return KVState(self._alive(), Ownership.BORROWED, is_read=self._is_read)

    def trimmed(self, length: int) -> "KVState":
        """Return a state that borrows the rows of the first `length` tokens. Copies nothing but counters.

        Rows beyond the length stay where they are and do not count; `SNAPSHOT` leaves are `missing`.

        Raises:
            CutRangeError: Not ``0 <= length <= self.length``.
        """
        rows = self.rows
        if not 0 <= length <= rows.length:
            msg = f"trim of a state of {rows.length} tokens to {length}; stay within [0, {rows.length}]"
            raise CutRangeError(msg)
        trimmed = self if length == rows.length else self.without(SNAPSHOT)
        leaves = {
            name: leaf._replace(array=self.adapter.with_counter(leaf.array, length)) if leaf.role is LENGTH else leaf
            for name, leaf in trimmed.rows.leaves.items()
        }
        return KVState(trimmed.rows._replace(leaves=leaves, length=length), Ownership.BORROWED)

    def without(self, role: Role) -> "KVState":
        """Return a state that borrows all leaves but those of a role, which are `missing` in it. Copies nothing."""
        rows = self.rows
        left = {name: leaf for name, leaf in rows.leaves.items() if leaf.role != role}
        missing = rows.missing | (rows.leaves.keys() - left.keys())
        return KVState(rows._replace(leaves=left, missing=missing), Ownership.BORROWED)

    def nested_as(self, other: "KVState") -> "KVState":
        """Return a state that borrows these leaves in the containers of `other`, which has the same. Copies nothing."""
        return KVState(self.rows._replace(node=other.rows.node), Ownership.BORROWED)

    def end(self, reason: str) -> None:
        """Let go of the leaves without freeing them; any later use raises `ReleasedError` with `reason`."""
        self._gone, self._rows = reason, Rows({}, *self._rows[1:])

    def is_queued(self, devices: Iterable[str]) -> bool:
        """Say whether computations on one of `devices` may still read the leaves after a borrow of them has ended."""
        streams = self.adapter.streams
        return streams is not None and any(map(streams.is_queued, devices))

    def mark_read(self) -> None:
        """Say that the current stream reads the leaves; see `SupportsStreams.mark_read`."""
        if self.adapter.streams is not None:
            self.adapter.streams.mark_read(self._alive().arrays())

    def share(self) -> None:
        """Say that somebody else refers to the memory from now on, so that nobody may write it."""
        if self._ownership is Ownership.OWNED:
            self._ownership = Ownership.SHARED

    def checksums(self) -> dict[str, int | None]:
        """Return a checksum per leaf, None where it was deleted or donated."""
        arrays, adapter = {name: leaf.array for name, leaf in self._alive().leaves.items()}, self.adapter
        return {name: None if adapter.is_deleted(a) else adapter.checksum(a) for name, a in arrays.items()}

    def shared_nbytes(self) -> int:
        """Return the bytes of frozen leaves that forks keep alive too."""
        leaves = [leaf for leaf in self._alive().leaves.values() if leaf.frozen]
        held = self.adapter.held_elsewhere([leaf.array for leaf in leaves])
        found = {s.key: s.nbytes for array in held for s in self.adapter.storages(array)}
        return sum(found.values())

    # --- freeing -----------------------------------------------------------------------------------------------------

    def release(self) -> int:
        """Free what the state owns. Idempotent. A borrowed state frees nothing and only lets go.

        Returns:
            The bytes that were seen to be freed: memory that somebody else keeps alive is not counted.
        """
        if self._gone is not None:
            return 0
        arrays, borrowed = self._rows.arrays(), self._ownership is Ownership.BORROWED
        self.end("released")
        return 0 if borrowed else self.adapter.release(arrays)

    def release_alone(self, keys: frozenset[Hashable] | None) -> list[tuple[int, Callable[[], bool]]]:
        """Free the arrays all of whose storages are in `keys`, and let go of the others, which somebody else holds.

        Args:
            keys: Storages that nobody else holds; None where that is all of them, which need not be looked at then.

        Returns:
            Size, and a function that says whether it still lives, for each storage that outlived this because a fork
            keeps it.
        """
        arrays = [array for array in self._rows.arrays() if not self.adapter.is_deleted(array)]
        if keys is None:  # an array of no bytes has no storage: somebody else may hold it, and nothing is freed
            alone = [a for a, shape in zip(arrays, self.adapter.shapes(arrays), strict=True) if 0 not in shape]
        else:
            held = [{storage.key for storage in self.adapter.storages(array)} for array in arrays]
            alone = [array for array, own in zip(arrays, held, strict=True) if own and own <= keys]
        del arrays
        watched = self.adapter.watch(alone) if any(leaf.frozen for leaf in self._rows.leaves.values()) else []
        self.end("released")
        self.adapter.release(alone)
        return [(nbytes, alive) for nbytes, alive in watched if alive()]


def _cross(array: Array, source: Adapter, target: Adapter) -> Array:
    if isinstance(source, SupportsDLPack) and isinstance(target, SupportsDLPack):
        return target.import_dlpack(source.export_dlpack(array))
    return target.from_host(source.to_host(array))
