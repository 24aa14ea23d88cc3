"""States in host memory, of which every block is watched from the moment that it is allocated."""

import mmap
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agnostic_cache import StateCache
from agnostic_cache.arrays.adapter import ArraySpec, Opened, Storage
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.host_adapter import HostAdapter
from agnostic_cache.arrays.roles import SNAPSHOT, Hint
from agnostic_cache.eviction import PutStatus

State = dict[str, HostArray]


class HostMemory(HostAdapter):
    """The host adapter, which also makes states and says how many bytes of all that it allocated are alive.

    Attributes:
        copies: How many arrays it copied.
        released: What it was told to release, by the size of each array.
        fails: What the next copies raise.
    """

    def __init__(self) -> None:
        self.blocks: list[tuple[weakref.ref[mmap.mmap], int]] = []
        self.copies = 0
        self.released: list[int] = []
        self.fails: BaseException | None = None

    def array(self, nbytes: int, fill: int = 0) -> HostArray:
        """Return an array in a block of its own."""
        array = HostArray.empty((nbytes,), Dtype.UINT8)
        array.memory[:] = bytes([fill]) * nbytes
        self._remember(array)
        return array

    def state(self, *sizes: int, fill: int = 0) -> State:
        """Return arrays ``"0"``, ``"1"`` ... of as many bytes, each in a block of its own."""
        return {str(i): self.array(size, fill) for i, size in enumerate(sizes)}

    def cache(self, letters: str, max_bytes: int = 256, **settings: Any) -> StateCache:
        """Return a cache with a state of 64 bytes for each of the letters, oldest first, filled with its code."""
        cache = StateCache(max_bytes, adapter=self, **settings)
        for key in letters:
            assert cache.put(key, self.state(64, fill=ord(key))) is PutStatus.LEGAL
        return cache

    def copy_all(self, arrays: Sequence[HostArray]) -> list[HostArray]:
        self.copies += len(arrays)
        copies = super().copy_all(arrays)
        for copy in copies[:1]:  # one block for all
            self._remember(copy)
        if self.fails is not None:  # in the middle of it: there is memory already
            raise self.fails
        return copies

    def release(self, arrays: Sequence[HostArray]) -> int:
        self.released += [array.nbytes for array in arrays]
        return super().release(arrays)

    def live_bytes(self) -> int:
        """The size of the blocks that are alive; no garbage is collected for that."""
        self.blocks = [(block, nbytes) for block, nbytes in self.blocks if block() is not None]
        return sum(nbytes for _, nbytes in self.blocks)

    def _remember(self, array: HostArray) -> None:
        self.blocks.append((weakref.ref(_mapping(array)), array.block[1]))


class Growing:
    """A container that never writes its array in place."""

    def __init__(self, array: HostArray | None) -> None:
        self.array = array


class Forking(HostMemory):
    """Knows that containers of class `Growing` may share their arrays.

    Attributes:
        closes: Whether it can put such a container together.
    """

    closes = True

    def open(self, value: object) -> Opened | None:
        if not isinstance(value, Growing):
            return None
        return Opened("host.growing", {"x": value.array}, hints={"x": Hint(SNAPSHOT, ("axis_0",), frozen=True)})

    def close(self, kind: str, children: Mapping[str, Any], data: Any, length: int, native: Any) -> object:  # noqa: ARG002
        if not self.closes:
            raise ZeroDivisionError
        return Growing(children["x"])

    def watch(self, arrays: Sequence[HostArray]) -> list[tuple[int, Callable[[], bool]]]:
        return [(array.block[1], _is_alive(weakref.ref(_mapping(array)))) for array in arrays]


def _mapping(array: HostArray) -> mmap.mmap:
    assert isinstance(array.memory.obj, mmap.mmap)
    return array.memory.obj


def _is_alive(reference: Callable[[], object | None]) -> Callable[[], bool]:
    return lambda: reference() is not None


class Devices(HostMemory):
    """Host memory that says it lies on the device that the first byte of an array stands for."""

    names = ("near", "far", "unlimited")

    def on(self, device: str, nbytes: int) -> HostArray:
        return self.array(nbytes, fill=self.names.index(device))

    def describe(self, array: HostArray) -> ArraySpec:
        return super().describe(array)._replace(device=self.names[array.memory[0]])

    def storages(self, array: HostArray) -> Sequence[Storage]:
        return (Storage(id(array), array.nbytes, self.names[array.memory[0]]),)

    def compact_nbytes(self, arrays: Sequence[HostArray]) -> Mapping[str, int]:
        return {self.names[array.memory[0]]: array.nbytes for array in arrays}


class Waiting(HostMemory):
    """Calls `wait` in the middle of a copy."""

    wait: Callable[[], object] | None = None

    def copy_all(self, arrays: Sequence[HostArray]) -> list[HostArray]:
        if self.wait is not None:
            self.wait()
        return super().copy_all(arrays)


def found(value: Any | None) -> Any:
    """The value, which is not None."""
    assert value is not None
    return value


def fills(state: Any) -> list[int | None]:
    """The first byte of each array of a state, where all its bytes are that."""
    return [array.memory[0] if len(set(array.memory)) == 1 else None for array in state.values()]


def letter(state: Any) -> str:
    """Which letter a state of `HostMemory.cache` stands for."""
    [code] = {code for code in fills(state) if code is not None}
    return chr(code)


def keys(cache: StateCache) -> str:
    """Which letters are there."""
    return "".join(key for key in "abcdefgh" if cache.contains(key))


def check(cache: StateCache, memory: HostMemory, elsewhere: int = 0) -> None:
    """What holds of a cache at any time, while `elsewhere` bytes are held by something else."""
    stats = cache.stats()
    assert stats.entries == cache.current_size()
    assert stats.current_bytes == cache.current_bytes == stats.listed_bytes + stats.deferred_bytes
    assert min(stats.listed_bytes, stats.deferred_bytes) >= 0
    assert memory.live_bytes() == stats.current_bytes + elsewhere
