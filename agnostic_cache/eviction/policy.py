"""Policy: the order in which keys leave, and nothing else. `Room`: how much a container lacks.

A policy counts no bytes against a budget, holds no lock, and sees no entry. The container (`StateCache`, a storage)
keeps the entries, tells its policy what happens to their keys, and asks `choose` for the victims:

    victims = choose(policy, entries, room, newcomer=key, nbytes=nbytes, cost=cost, expired=policy.expired())
    if victims is None:
        return PutStatus.ILLEGAL                    # refused: nothing changed, and there is nothing to undo
    for victim in victims:                          # in this order, and before the newcomer is added
        del entries[victim]
        policy.gone(victim, evicted=True)
    entries[key] = value
    policy.added(key, nbytes, cost)                 # or, where the value does not come in: policy.gone(key)
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

Key = Hashable
"""A key of the container."""


class Room(Protocol):
    """What a container lacks, judged by the container itself: it knows of devices and of shared memory.

    Used up in one call of `choose`. Where that refuses, the container forgets what it counted as gone.
    """

    def short(self) -> bool:
        """Say whether more must leave, given what is counted as gone so far."""
        ...

    def release(self, key: Any) -> bool:
        """Count an entry as gone; or answer False where that would help nothing, and the entry stays."""
        ...


class Policy(ABC):
    """An order of keys, the next victim first. A subclass implements the five abstract methods.

    Looking at the order changes nothing: what an eviction means to the policy (ghosts, ageing, queues that move on) is
    done in `gone`. Not thread-safe: the container calls it under its own lock.

    Attributes:
        max_bytes: Budget of the container, in bytes; for policies that size their queues by it. `make_policy` sets it.
        settings: Names of the class attributes that a subclass may change.
    """

    max_bytes: int = sys.maxsize
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        """Start without keys."""
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Forget every key, and what was learnt."""

    @abstractmethod
    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
        """Take in a key as the newest; also where its entry is overwritten, without a `gone` before.

        Args:
            key: The key.
            nbytes: Bytes of the entry.
            cost: What it takes to compute the entry again, in any unit that all entries share; by default its bytes.
        """

    @abstractmethod
    def used(self, key: Any) -> None:
        """Note that an entry was read.

        Raises:
            KeyError: The policy does not have the key.
        """

    @abstractmethod
    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """Take out a key; do nothing where the policy does not have it.

        Args:
            key: The key.
            evicted: The entry was a victim of `choose`. Victims are taken out in the order in which they were chosen.
        """

    @abstractmethod
    def order(self) -> Iterator[Any]:
        """Yield every key, the next victim first. Lazy, and without side effects.

        Whoever iterates may stop anywhere, and stops before the next call of any other method.
        """

    # --- what few policies need ---------------------------------------------------------------------------------------

    def has_expired(self, key: Any) -> bool:  # noqa: ARG002
        """Say whether an entry is too old to be handed out: the container then removes it, and answers a miss."""
        return False

    def expired(self) -> Iterable[Any]:
        """Yield the keys of entries that are too old, for `choose`."""
        return ()

    def narrow(
        self,
        room: Room,
        entries: Mapping[Any, Any],  # noqa: ARG002
        newcomer: Any,  # noqa: ARG002
        nbytes: int,  # noqa: ARG002
        cost: float | None,  # noqa: ARG002
        leaving: Sequence[Any],  # noqa: ARG002
    ) -> Room:
        """Return `room`, or one with a limit of the policy's own on top, such as a quota. `choose` calls it first.

        Args:
            room: What the container lacks.
            entries: The container's entries.
            newcomer: Key of what comes in, or None.
            nbytes: Bytes of the newcomer.
            cost: Cost of the newcomer, as in `added`.
            leaving: Expired keys, which `room` counts as gone already.
        """
        return room
