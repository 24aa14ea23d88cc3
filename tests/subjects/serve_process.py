"""``agnostic-cache serve`` in a process of its own, which can be killed and looked at."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server_thread import Client

PAGE = os.sysconf("SC_PAGE_SIZE")


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


class ServeProcess:
    """A server that runs.

    Attributes:
        line: What it said when it was ready.
        port: Where it listens.
    """

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "agnostic_cache.cli", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert "listening" in self.line, self.process.communicate()[1]
        found = re.search(r"lm(?:\+tls)?://[^:]+:(\d+)", self.line)
        assert found is not None
        self.port = int(found[1])

    @property
    def url(self) -> str:
        return f"lm://127.0.0.1:{self.port}"

    def client(self) -> Client:
        return Client(("127.0.0.1", self.port))

    @property
    def resident(self) -> int:
        """Bytes of memory that the process has."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * PAGE

    @property
    def most_resident(self) -> int:
        """Bytes of memory that the process had at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    @property
    def files(self) -> int:
        """Files that the process has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def end(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal, and return the exit status and what was logged."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        _, logged = self.process.communicate(timeout=30)
        return self.process.returncode, logged


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Any]:
    """Run a server for the time of a ``with`` block."""
    server = ServeProcess(*arguments, **environment)
    try:
        yield server
    finally:
        server.end(signal.SIGKILL)
