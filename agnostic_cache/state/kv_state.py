"""KVState: named leaves, a structure and a length. The currency of the house.

An adapter wraps a native cache into one; a cache holds it; prefix reuse cuts and joins it; another framework unwraps
it.

Who owns the memory is part of a state, because that is what hand-made reuse gets wrong:

- *borrowed*: the memory is the caller's, who may write, donate or free it (what `wrap` gives);
- *owned*: this state alone refers to it (what `copy`, `cut` and `join` give);
- *shared*: other states refer to it too, so nobody may write it (what a zero-copy `to` leaves on both sides).
"""

import enum
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from agnostic_cache.arrays.adapter import Adapter, Array, ArraySpec, Storage, SupportsDLPack
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.registry import adapter_named
from agnostic_cache.arrays.roles import LENGTH, TOKENS, WINDOW
from agnostic_cache.errors import LengthMismatchError, MissingLeavesError, ReleasedError
from agnostic_cache.state.batch import check_row_lengths, split_leaves, stack_leaves
from agnostic_cache.state.cutting import check_joinable, cut_leaves, join_leaves
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.template import fill_template
from agnostic_cache.state.tree import Node, build


class Ownership(enum.Enum):
    """Who else may touch the memory of a state; see the module."""

    BORROWED = "borrowed"
    OWNED = "owned"
    SHARED = "shared"


class KVState:
    """Named arrays of one framework, how they nest, and how many tokens they stand for.

    Make one with `wrap`. Methods neither mutate nor block unless they say so. Not safe to use from several threads
    while one of them releases or unwraps it.

    Attributes:
        missing: Names of `SNAPSHOT` leaves that a cut had to leave behind. Such a state joins, but does not unwrap.
        layout: The layout that named its leaves, or None where their containers did. Not part of `structure`.
    """

    __slots__ = (
        "__weakref__",
        "_adapter",
        "_gone",
        "_leaves",
        "_length",
        "_node",
        "_ownership",
        "_specs",
        "layout",
        "missing",
    )

    def __init__(
        self,
        leaves: dict[str, Leaf],
        node: Node,
        adapter: Adapter,
        *,
        length: int | None,
        ownership: Ownership,
        missing: frozenset[str] = frozenset(),
        layout: KVLayout | None = None,
    ) -> None:
        """Take the parts as they are; `wrap` is the public door."""
        self._leaves = leaves
        self._node = node
        self._adapter = adapter
        self._length = length
        self._ownership = ownership
        self._gone: str | None = None
        # Of each leaf that was asked for. Arrays that are the caller's may become others behind our back.
        self._specs: dict[str, ArraySpec] | None = None if ownership is Ownership.BORROWED else {}
        self.missing = missing
        self.layout = layout

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """The leaves by canonical name, in the order of the structure. Borrowed: do not keep past `release`.

        Raises:
            ReleasedError: The state is gone.
        """
        return MappingProxyType(self._alive())

    @property
    def length(self) -> int:
        """Tokens that the state stands for. May read counters from the device once, and then blocks for them.

        Raises:
            LengthMismatchError: Counters disagree.
        """
        if self._length is None:
            self._length = read_length(self._alive(), self._adapter, None)
        return self._length

    @property
    def structure(self) -> Mapping[str, Any]:
        """How the leaves nest, as plain JSON-able dicts and lists."""
        return self._node.to_json()

    @property
    def framework(self) -> str:
        """``"torch"``, ``"jax"``, ``"host"`` or a third party's name."""
        return self._adapter.framework

    @property
    def adapter(self) -> Adapter:
        """The adapter of the leaves."""
        return self._adapter

    @property
    def rotary(self) -> str | None:
        """Convention of the rotary embedding in the keys, ``"half"`` or ``"interleaved"``, or None where unknown."""
        return self.layout.rotary if self.layout is not None else None

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
        return self._adapter.storages_all([leaf.array for leaf in self._alive().values()])

    def spec(self, name: str) -> ArraySpec:
        """Return shape, dtype and device of a leaf. A state that is kept looks at each array once."""
        known = self._specs
        if known is None:
            return self._adapter.describe(self._alive()[name].array)
        found = known.get(name)
        return found or known.setdefault(name, self._adapter.describe(self._alive()[name].array))

    def compact_nbytes(self) -> Mapping[str, int]:
        """Return the bytes per device that a `copy` of this state will keep alive."""
        return self._adapter.compact_nbytes(self._arrays())

    def same_structure(self, other: "KVState") -> bool:
        """Say whether both nest their leaves alike."""
        return self._node is other._node or self._node.to_json() == other._node.to_json()

    def shareable(self, leaf: Leaf) -> bool:
        """Say whether another state may refer to the memory of `leaf` without seeing it written."""
        return leaf.frozen or self._ownership is not Ownership.BORROWED or not self._adapter.mutable

    def __repr__(self) -> str:
        """Show what it is, never what is in it."""
        if self._gone is not None:
            return f"KVState({self._gone})"
        length = "?" if self._length is None else self._length
        shown = f"length={length}, leaves={len(self._leaves)}, {self._ownership.value}"
        return f"KVState(framework={self.framework!r}, {shown})"

    def _alive(self) -> dict[str, Leaf]:
        if self._gone is not None:
            msg = f"this KVState was {self._gone}; get or borrow the entry again"
            raise ReleasedError(msg)
        return self._leaves

    def _arrays(self) -> list[Array]:
        """Every array once, in order."""
        return list({id(leaf.array): leaf.array for leaf in self._alive().values()}.values())

    def _with(self, leaves: dict[str, Leaf], ownership: Ownership, **changes: Any) -> "KVState":
        settings: dict[str, Any] = {"length": self._length, "missing": self.missing, "layout": self.layout, **changes}
        return KVState(leaves, self._node, self._adapter, ownership=ownership, **settings)

    # --- copy, cut, join ---------------------------------------------------------------------------------------------

    def copy(self) -> "KVState":
        """Return an independent, compact copy on the same device. Leaves that were one array stay one array."""
        leaves = self._alive()
        arrays = self._arrays()
        copies = dict(zip(map(id, arrays), self._adapter.copy_all(arrays), strict=True))
        copied = {name: leaf._replace(array=copies[id(leaf.array)]) for name, leaf in leaves.items()}
        return self._with(copied, Ownership.OWNED)

    def fork(self) -> "KVState":
        """Return a state to use up: frozen leaves are shared where several may own one, all others copied."""
        leaves, forkable = self._alive(), self._adapter.forkable
        thawed = {id(leaf.array): leaf.array for leaf in leaves.values() if not (leaf.frozen and forkable)}
        copies = dict(zip(thawed, self._adapter.copy_all(list(thawed.values())), strict=True)) if thawed else {}
        forked = {name: leaf._replace(array=copies.get(id(leaf.array), leaf.array)) for name, leaf in leaves.items()}
        return self._with(forked, Ownership.OWNED)

    def cut(self, start: int, stop: int) -> "KVState":
        """Return an independent, compact copy of tokens ``[start, stop)``.

        `SNAPSHOT` leaves come along only where `stop` is the end of the state; otherwise they are listed in `missing`
        of the result. `WINDOW` leaves give the rows of the cut that are there.

        Raises:
            CutRangeError: Not ``0 <= start <= stop <= length``, or not on a row of a strided leaf.
        """
        leaves, lost = cut_leaves(self._alive(), self._adapter, self.length, start, stop)
        missing = self.missing | lost
        return self._with(leaves, Ownership.OWNED, length=stop - start, missing=missing)

    @classmethod
    def join(cls, parts: Sequence["KVState"]) -> "KVState":
        """Return an independent state that stands for the tokens of all `parts` in order.

        `SNAPSHOT` leaves, and what is `missing`, come from the last part; `WINDOW` leaves keep what its end needs.

        Raises:
            StructureMismatchError: No parts, or they differ in structure, leaves, axes, shapes or dtypes.
            MixedFrameworksError: They are of different frameworks.
        """
        check_joinable(parts)
        last, length = parts[-1], sum(part.length for part in parts)
        leaves = join_leaves([part._alive() for part in parts], [part.length for part in parts], last._adapter)
        return last._with(leaves, Ownership.OWNED, length=length)

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
        rows = [self._with(leaves, Ownership.OWNED) for leaves in split_leaves(self._alive(), self._adapter)]
        if lengths is None:
            return rows
        check_row_lengths(self._leaves, len(rows), self.length, lengths)
        return [
            row if count == self.length else row.cut(self.length - count, self.length)
            for row, count in zip(rows, lengths, strict=True)
        ]

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
        lengths = sorted({state.length for state in states})
        wanted = length if length is not None or not lengths else lengths[-1]
        if length is None and len(lengths) > 1:
            msg = f"stack of states of {lengths} tokens; cut them to {lengths[0]}, or pass length={lengths[-1]} to pad"
            raise LengthMismatchError(msg)
        if lengths and wanted is not None and lengths[-1] > wanted:
            msg = f"stack of states of {lengths} tokens into length={wanted}; pass at least {lengths[-1]}"
            raise LengthMismatchError(msg)
        leaves = stack_leaves(states, wanted or 0)
        return states[0]._with(leaves, Ownership.OWNED, length=wanted)

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
        leaves, source = self._alive(), self._adapter
        target = adapter_named(framework)
        if target.framework == source.framework and (device is None or not source.forkable):
            moved = self.copy()
            placed = {
                name: leaf if device is None else leaf._replace(array=target.place(leaf.array, device))
                for name, leaf in moved._leaves.items()
            }
            return moved._with(placed, Ownership.OWNED)
        exposed = {id(leaf.array): leaf.array for leaf in leaves.values() if not self.shareable(leaf)}
        private = dict(zip(exposed, source.copy_all(list(exposed.values())), strict=True)) if exposed else {}
        crossed: dict[int, Array] = {}
        for leaf in leaves.values():
            if id(leaf.array) not in crossed:
                array = _cross(private.pop(id(leaf.array), leaf.array), source, target)
                crossed[id(leaf.array)] = array if device is None else target.place(array, device)
        result = {name: leaf._replace(array=crossed[id(leaf.array)]) for name, leaf in leaves.items()}
        self.share()
        length, shared = self._length, Ownership.SHARED
        return KVState(
            result, self._node, target, length=length, ownership=shared, missing=self.missing, layout=self.layout
        )

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
        leaves = self._alive()
        self._check_complete()
        if like is not None:
            return fill_template([self], like, layout)
        if self._ownership is Ownership.SHARED and self._adapter.mutable:
            return self.fork().unwrap()
        arrays = {name: leaf.array for name, leaf in leaves.items()}
        # Where no container or counter has stated a length, none needs one: it is not read from the device for this.
        native = build(self._node, arrays, self._length or 0, self._adapter)
        self._ownership, self._specs = Ownership.BORROWED, None
        return native

    def _check_complete(self) -> None:
        if self.missing:
            shown = ", ".join(sorted(self.missing)[:4])
            msg = (
                f"{len(self.missing)} leaves are only valid at another length and were left behind by a cut: "
                f"{shown}; join up to a stored boundary"
            )
            raise MissingLeavesError(msg)
        for name, leaf in self._leaves.items():
            if type(leaf.role) is WINDOW:
                rows = self._adapter.describe(leaf.array).shape[leaf.role.axis]
                if leaf.first > max(0, self.length - leaf.role.width) or leaf.first + rows < self.length:
                    msg = (
                        f"window {name!r} holds tokens [{leaf.first}, {leaf.first + rows}) of {self.length}, and "
                        f"needs the last {leaf.role.width}"
                    )
                    raise MissingLeavesError(msg)

    # --- for the cache that keeps it ---------------------------------------------------------------------------------

    def move(self) -> "KVState":
        """Return a state that owns the leaves; this one is gone, and raises `ReleasedError` from now on."""
        ownership = Ownership.SHARED if self._ownership is Ownership.SHARED else Ownership.OWNED
        moved = self.lend()
        moved._ownership = ownership
        self.end("moved into a cache")
        return moved

    def lend(self) -> "KVState":
        """Return a state that borrows the leaves until `end` is called on it. Constant time."""
        lent = object.__new__(KVState)  # a call of the class, and of __init__ with keywords, takes 0.5 us more
        lent._leaves = self._alive()
        lent._node = self._node
        lent._adapter = self._adapter
        lent._length = self._length
        lent._ownership = Ownership.BORROWED
        lent._gone = None
        lent._specs = self._specs
        lent.missing = self.missing
        lent.layout = self.layout
        return lent

    def narrowed(
        self, *, length: int | None = None, without: frozenset[str] = frozenset(), nested_as: "KVState | None" = None
    ) -> "KVState":
        """Return a state that borrows the leaves and stands for less. Copies nothing.

        Args:
            length: Its tokens; rows behind them stay where they are and do not count.
            without: Names of leaves that are `missing` in it.
            nested_as: A state of the same leaves, in whose containers they are to stand.
        """
        lent = self.lend()
        if self._ownership is Ownership.SHARED:
            lent._ownership = Ownership.SHARED
        if length is not None:
            lent._length = length
        if without:
            lent._leaves = {name: leaf for name, leaf in lent._leaves.items() if name not in without}
            lent.missing |= without
        if nested_as is not None:
            lent._node = nested_as._node
        return lent

    def end(self, reason: str) -> None:
        """Let go of the leaves without freeing them; any later use raises `ReleasedError` with `reason`."""
        self._gone, self._leaves = reason, {}

    def mark_read(self) -> None:
        """Say that the current stream reads the leaves; see `Adapter.mark_read`."""
        self._adapter.mark_read(self._arrays())

    def share(self) -> None:
        """Say that somebody else refers to the memory from now on, so that nobody may write it."""
        if self._ownership is Ownership.OWNED:
            self._ownership = Ownership.SHARED

    def checksums(self) -> dict[str, int | None]:
        """Return a checksum per leaf, None where it was deleted or donated."""
        deleted, checksum = self._adapter.is_deleted, self._adapter.checksum
        return {n: None if deleted(leaf.array) else checksum(leaf.array) for n, leaf in self._alive().items()}

    def shared_nbytes(self) -> int:
        """Return the bytes of frozen leaves that forks keep alive too."""
        leaves = [leaf for leaf in self._alive().values() if leaf.frozen]
        held = self._adapter.held_elsewhere([leaf.array for leaf in leaves])
        found = {s.key: s.nbytes for array in held for s in self._adapter.storages(array)}
        return sum(found.values())

    # --- freeing -----------------------------------------------------------------------------------------------------

    def release(self) -> int:
        """Free what the state owns. Idempotent. A borrowed state frees nothing and only lets go.

        Returns:
            The bytes that were seen to be freed: memory that somebody else keeps alive is not counted.
        """
        if self._gone is not None:
            return 0
        arrays, borrowed = self._arrays(), self._ownership is Ownership.BORROWED
        self.end("released")
        return 0 if borrowed else self._adapter.release(arrays)

    def release_alone(self, keys: frozenset[Hashable] | None) -> list[tuple[int, Callable[[], bool]]]:
        """Free the arrays all of whose storages are in `keys`, and let go of the others, which somebody else holds.

        Args:
            keys: Storages that nobody else holds; None where that is all of them, which need not be looked at then.

        Returns:
            Size, and a function that says whether it still lives, for each storage that outlived this because a fork
            keeps it.
        """
        deleted = self._adapter.is_deleted
        arrays = [array for array in self._arrays() if not deleted(array)]
        if keys is None:  # an array of no bytes has no storage: somebody else may hold it, and nothing is freed
            alone = [a for a, shape in zip(arrays, self._adapter.check_all(arrays), strict=True) if 0 not in shape]
        else:
            alone = [array for array in arrays if self._lies_in(array, keys)]
        del arrays
        watched = self._adapter.watch(alone) if any(leaf.frozen for leaf in self._leaves.values()) else []
        self.end("released")
        self._adapter.release(alone)
        return [(nbytes, alive) for nbytes, alive in watched if alive()]

    def _lies_in(self, array: Array, keys: frozenset[Hashable]) -> bool:
        held = {storage.key for storage in self._adapter.storages(array)}
        return bool(held) and held <= keys


def _cross(array: Array, source: Adapter, target: Adapter) -> Array:
    if isinstance(source, SupportsDLPack) and isinstance(target, SupportsDLPack):
        return target.import_dlpack(source.export_dlpack(array))
    return target.from_host(source.to_host(array))


def check_room(rows: Iterable[tuple[str, int, int]], length: int) -> None:
    """Raise where a `TOKENS` leaf, given as name, rows and stride, has fewer rows than `length` tokens take.

    Raises:
        LengthMismatchError: It has, or `length` is negative.
    """
    if length < 0:
        msg = f"length={length} is negative; pass the number of tokens that the state stands for"
        raise LengthMismatchError(msg)
    for name, count, stride in rows:
        if (count + 1) * stride <= length:
            msg = (
                f"length={length}, but leaf {name!r} has {count} rows of {stride} tokens; pass the state that these "
                "tokens were computed into"
            )
            raise LengthMismatchError(msg)


def read_length(leaves: Mapping[str, Leaf], adapter: Adapter, known: int | None) -> int:
    """Read the length from counters, or from token axes that all agree where there are none.

    Args:
        leaves: The leaves of a state.
        adapter: Their adapter.
        known: What somebody says the length is, or None.

    Raises:
        LengthMismatchError: Counters, rows and `known` disagree.
    """
    rows = [
        (name, adapter.describe(leaf.array).shape[leaf.role.axis], leaf.role.stride)
        for name, leaf in leaves.items()
        if isinstance(leaf.role, TOKENS)
    ]
    counters = {
        name: adapter.counter(leaf.array)
        for name, leaf in leaves.items()
        if leaf.role is LENGTH and 0 not in adapter.describe(leaf.array).shape
    }
    found = set(counters.values()) | ({known} if known is not None else set())
    values = found or {count * stride for _, count, stride in rows}
    length = values.pop() if len(values) == 1 else None
    if length is None:
        shown = dict(list(counters.items())[:4]) or {name: count * stride for name, count, stride in rows[:4]}
        msg = f"the leaves disagree on the length in tokens: {shown}, asked for {known}; pass length="
        raise LengthMismatchError(msg)
    check_room(rows, length)
    return length
