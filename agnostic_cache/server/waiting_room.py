"""WaitingRoom: back-pressure. Bodies on their way to a slow storage take turns, so that their sum has a limit."""

from collections import deque
from collections.abc import Callable

Turn = Callable[[], None]
"""Called when it is one's turn."""


class WaitingRoom:
    """Lets bodies in, first come, first served, while their sum is within a limit. For one thread."""

    def __init__(self, max_bytes: int) -> None:
        """Start empty."""
        self._max_bytes = max_bytes
        self._taken = 0
        self._queue: deque[tuple[int, Turn]] = deque()

    def enter(self, nbytes: int, turn: Turn) -> None:
        """Have `turn` called once there is room for `nbytes`, which the limit holds: now, or when others leave."""
        self._queue.append((nbytes, turn))
        self._let_in()

    def leave(self, nbytes: int) -> None:
        """Give back the room of one who was let in."""
        self._taken -= nbytes
        self._let_in()

    def withdraw(self, turn: Turn) -> None:
        """Take back an `enter` whose turn has not come; nothing where it has."""
        self._queue = deque(waiting for waiting in self._queue if waiting[1] != turn)
        self._let_in()

    def _let_in(self) -> None:
        while self._queue and self._taken + self._queue[0][0] <= self._max_bytes:
            nbytes, turn = self._queue.popleft()
            self._taken += nbytes
            turn()
