"""StoredState: a `KVState` as a blob, and back, in one valid safetensors file.

The arrays are its tensors, under their leaf names, each on a 64-byte boundary, so that every framework takes them from
a buffer or a mapped file as they lie. What they mean is JSON in the metadata; the tokens are one more tensor. Leaves
that are one array are stored once. No class is named in it, and nothing of it is run.
"""

import functools
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from agnostic_cache.arrays.adapter import Adapter, Array
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray, row_major_bytes
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.registry import adapter_named
from agnostic_cache.arrays.roles import SNAPSHOT, TOKENS, WINDOW, Role, Whole, axis_names
from agnostic_cache.blob.checksum import best_algorithm
from agnostic_cache.blob.producer import PRODUCER
from agnostic_cache.blob.safetensors import RESERVED, Header, Part, Parts, Tensor, parse_header, verify
from agnostic_cache.errors import AgnosticCacheError, BlobError, StructureMismatchError
from agnostic_cache.state.kv_state import KVState, Ownership
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.length import read_length
from agnostic_cache.state.rows import Rows
from agnostic_cache.state.tree import Node

FORMAT: Final = "2"
"""Version of what stands in the metadata; a reader knows exactly the ones it was written for."""

_FORMAT, _PRODUCER = f"{RESERVED}format", f"{RESERVED}producer"
_STATE, _STRUCTURE = f"{RESERVED}state", f"{RESERVED}structure"
_TOKENS = f"{RESERVED}tokens"
_DTYPES = {dtype.safetensors: dtype for dtype in Dtype if dtype.safetensors is not None}
_MEMORABLE = 64 * 1024  # characters of a structure that is worth remembering
_STAND_INS = {Dtype.INT4: "I8", Dtype.UINT4: "U8", Dtype.COMPLEX128: "F64"}  # the format has no name for these


def encode(
    state: KVState, *, tokens: Iterable[int] | None = None, checksum: bool = True, fingerprint: str | None = None
) -> Parts:
    """Lay a state out as a blob. Copies nothing: arrays are read, and brought to the host, as the parts are.

    The state must stay alive and unchanged until then. The parts can be read more than once.

    Args:
        state: Any state, also one with `missing` leaves.
        tokens: The tokens that it stands for, each in ``[0, 2**32)``.
        checksum: End the blob in a checksum of all of it: xxh3-128 where the extra is installed, else crc32. A storage
            that checks what it hands out needs none.
        fingerprint: Of the weights that computed it; see `model_fingerprint`.

    Raises:
        ReleasedError: The state is gone.
        BlobError: A token is out of range.
    """
    adapter = state.adapter
    parts: list[Part] = []
    stored: dict[int, str] = {}  # id of an array: name of its tensor
    kinds: dict[str, int] = {}  # what is said of a leaf, as JSON: its number; most leaves are of one or two kinds
    leaves: dict[str, int] = {}
    tensors: dict[str, str] = {}  # of leaves whose tensor has another name
    for name, leaf in state.leaves.items():
        spec = adapter.describe(leaf.array)
        if id(leaf.array) not in stored:
            tensor = f"{RESERVED}leaf.{len(parts)}" if name.startswith((RESERVED, "__metadata__")) else name
            stored[id(leaf.array)] = tensor
            parts.append(_part(tensor, leaf.array, spec.shape, spec.dtype, adapter))
        if stored[id(leaf.array)] != name:
            tensors[name] = stored[id(leaf.array)]
        kind = _compact(
            {"dtype": spec.dtype, "axes": leaf.axes, "frozen": leaf.frozen, "first": leaf.first}
            | _role_to_json(leaf.role)
        )
        leaves[name] = kinds.setdefault(kind, len(kinds))
    if tokens is not None:
        known = _token_bytes(tokens)
        parts.append(Part(_TOKENS, "U32", (known.nbytes // 4,), known.nbytes, lambda: (known,)))
    described = {
        "framework": state.framework,
        "fingerprint": fingerprint,
        "length": state.length,
        "kinds": list(map(json.loads, kinds)),
        "leaves": leaves,
        "tensors": tensors,
        "missing": sorted(state.missing),
        "rotary": state.rotary,
    }
    facts = {
        _FORMAT: FORMAT,
        _PRODUCER: PRODUCER,
        _STATE: _compact(described),
        _STRUCTURE: _compact(state.structure),
    }
    return Parts(parts, facts, algorithm=best_algorithm() if checksum else None)


def _compact(plain: object) -> str:
    return json.dumps(plain, separators=(",", ":"), ensure_ascii=False)


def _part(name: str, array: Array, shape: Sequence[int], dtype: Dtype, adapter: Adapter) -> Part:
    written = (*shape, 2) if dtype is Dtype.COMPLEX128 else shape
    known = dtype.safetensors or _STAND_INS[dtype]
    return Part(name, known, written, row_major_bytes(shape, dtype), lambda: (adapter.to_host(array).memory,))


def _token_bytes(tokens: Iterable[int]) -> memoryview:
    try:
        return memoryview(array("I", tokens)).cast("B")
    except (OverflowError, TypeError) as error:
        msg = f"a token is not an int in [0, 2**32) ({error}); pass token ids"
        raise BlobError(msg) from error


class StoredState:
    """A state's blob in memory, parsed. Nothing is copied: arrays lie where the blob lies, and keep it alive.

    Attributes:
        memory: The whole of it, a flat view. Nobody writes it while a state of it is in use.
        framework: Name of the framework that the state was stored from, or None where the file is not of this package.
        fingerprint: Names the weights that computed it, or None where the writer did not say.
        producer: Name and version of the program that wrote it, or None.
        length: Tokens that the state stands for.
    """

    __slots__ = ("_described", "_header", "fingerprint", "framework", "length", "memory", "producer")

    def __init__(self, memory: bytes | bytearray | memoryview) -> None:
        """Parse a blob, or any safetensors file. The checksum is not compared: that is `verify`.

        Args:
            memory: The whole file and nothing else; where it is mapped, nobody may truncate the file.

        Raises:
            BlobError: It is cut off, no safetensors file, lies about lengths, or is of an unknown version.
        """
        self.memory = memoryview(memory).cast("B")
        self._header: Header = parse_header(self.memory)
        facts = self._header.metadata
        self.producer = facts.get(_PRODUCER)
        if (version := facts.get(_FORMAT, FORMAT)) != FORMAT:
            msg = f"blob of format {version!r} by {self.producer!r}; this agnostic-cache reads {FORMAT!r}"
            raise BlobError(msg)
        with _Reading():
            self._described: dict[str, Any] = json.loads(facts[_STATE]) if _STATE in facts else _foreign(self._header)
            self.length = _count(self._described["length"])
            self.framework = _text_or_none(self._described["framework"])
            self.fingerprint = _text_or_none(self._described["fingerprint"])

    @property
    def algorithm(self) -> str | None:
        """Name of the checksum that it ends in, or None."""
        return self._header.algorithm

    def verify(self) -> None:
        """Compare the blob with its checksum. Reads every byte.

        Raises:
            BlobError: They differ, or it has none.
            MissingExtraError: The library of its checksum is not installed.
        """
        verify(self.memory, self.algorithm)

    def tokens(self) -> memoryview | None:
        """Return the tokens as a view in format ``"I"``, or None where none were stored."""
        tensor = self._header.tensors.get(_TOKENS)
        return None if tensor is None else self.memory[tensor.start : tensor.stop].cast("I")

    def state(self, *, layout: KVLayout | None = None) -> KVState:
        """Return the state, as host arrays over the blob's memory, which nobody may write from now on.

        ``blob.state().to(blob.framework)`` is what was stored; another framework's name works as well.

        Args:
            layout: Layout that the state shall carry, by which `KVState.unwrap` finds its leaves in a template.

        Raises:
            BlobError: What it says of its leaves does not fit its tensors.
            StructureMismatchError: Its keys are rotated otherwise than `layout` says.
        """
        described, facts = self._described, self._header.metadata
        with _Reading():
            kinds = [_Kind.of(plain) for plain in described["kinds"]]
            names, arrays = described["tensors"], dict[str, HostArray]()
            leaves = {
                name: self._leaf(kinds[_count(kind)], names.get(name, name), arrays)
                for name, kind in described["leaves"].items()
            }
            missing = frozenset(map(str, described["missing"]))
            node = _structure(facts[_STRUCTURE]) if _STRUCTURE in facts else _flat(leaves)
            own = KVLayout(rotary=described["rotary"]) if described["rotary"] is not None else None
            host = adapter_named("host")
            if any(kind.role is not SNAPSHOT for kind in kinds):
                read_length(leaves, host, self.length)
        if layout is not None and own is not None and layout.rotary not in {None, own.rotary}:
            msg = f"the keys are rotated {own.rotary!r}, the layout says {layout.rotary!r}; recompute them"
            raise StructureMismatchError(msg)
        return KVState(Rows(leaves, node, host, self.length, missing, layout or own), Ownership.SHARED)

    def _leaf(self, kind: "_Kind", name: str, arrays: dict[str, HostArray]) -> Leaf:
        array = arrays.get(name)
        if array is None:
            tensor = self._header.tensors[name]
            memory = self.memory[tensor.start : tensor.stop]
            block = (id(self.memory.obj), self.memory.nbytes)
            array = arrays[name] = HostArray(_shape(tensor, kind.dtype), kind.dtype, memory, block)
        if len(kind.axes) != len(array.shape) or kind.dtype is not array.dtype:
            msg = f"tensor {name!r}: {array.dtype} of shape {array.shape} for a leaf that is {kind}"
            raise BlobError(msg)
        return Leaf(array, kind.role, kind.axes, kind.frozen, kind.first)


Blob = StoredState
"""What `StoredState` was called; a storage calls any bytes a blob."""


class _Kind(NamedTuple):
    """What is said of a leaf, apart from its name."""

    dtype: Dtype
    axes: tuple[str, ...]
    role: Role
    frozen: bool
    first: int

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "_Kind":
        axes, role = tuple(map(str, plain["axes"])), _role_from_json(plain)
        if isinstance(role, TOKENS | WINDOW) and role.axis >= len(axes):
            msg = f"{role} in an array of axes {axes}"
            raise BlobError(msg)
        return cls(Dtype.of(plain["dtype"]), axes, role, bool(plain["frozen"]), _count(plain["first"]))


def _shape(tensor: Tensor, dtype: Dtype) -> tuple[int, ...]:
    if tensor.dtype != (dtype.safetensors or _STAND_INS[dtype]):
        msg = f"{dtype} is not stored as {tensor.dtype}"
        raise BlobError(msg)
    return tensor.shape[:-1] if dtype is Dtype.COMPLEX128 else tensor.shape


def _flat(names: Iterable[str]) -> Node:
    keys = tuple(names)
    return Node("dict", None, keys, tuple(Node("leaf", name) for name in keys))


def _structure(text: str) -> Node:
    return _known_structure(text) if len(text) <= _MEMORABLE else Node.from_json(json.loads(text))


@functools.lru_cache(maxsize=64)
def _known_structure(text: str) -> Node:
    """Read a structure once: all blocks of one model have the same, and join faster where it is one object."""
    return Node.from_json(json.loads(text))


def _foreign(header: Header) -> dict[str, Any]:
    """Describe a file that another program wrote: a flat dict, of which nothing is known."""
    known = {name: tensor for name, tensor in header.tensors.items() if tensor.dtype in _DTYPES}
    kinds = [
        {"dtype": _DTYPES[tensor.dtype], "axes": axis_names(len(tensor.shape)), "frozen": False, "first": 0}
        | _role_to_json(SNAPSHOT)
        for tensor in known.values()
    ]
    plain = {"length": 0, "missing": (), "tensors": {}, "kinds": kinds}
    unknown = dict.fromkeys(("framework", "fingerprint", "rotary"))
    return {**unknown, **plain, "leaves": {name: i for i, name in enumerate(known)}}


def _role_to_json(role: Role) -> dict[str, Any]:
    if isinstance(role, TOKENS):
        return {"role": "tokens", "axis": role.axis, "stride": role.stride}
    if isinstance(role, WINDOW):
        return {"role": "window", "axis": role.axis, "width": role.width}
    return {"role": role.value}


def _role_from_json(plain: Mapping[str, Any]) -> Role:
    kind = plain["role"]
    if kind == "tokens":
        return TOKENS(_count(plain["axis"]), _count(plain["stride"], least=1))
    if kind == "window":
        return WINDOW(_count(plain["axis"]), _count(plain["width"]))
    return Whole(kind)


def _text_or_none(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        msg = f"a name of type {type(value).__name__}"
        raise BlobError(msg)
    return value


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        msg = f"{value!r} is no count of at least {least}"
        raise BlobError(msg)
    return value


class _Reading:
    """Turns whatever a lying description runs into, into a `BlobError`."""

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        lies = (ValueError, TypeError, LookupError, AttributeError, RecursionError, AgnosticCacheError)
        if isinstance(error, lies) and not isinstance(error, BlobError):
            msg = f"what the blob says of itself is not consistent ({type(error).__name__}: {error})"
            raise BlobError(msg) from error
