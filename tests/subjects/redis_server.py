"""Real redis servers for tests: started on loopback, stopped by their process ids."""

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

_PATIENCE = 30.0


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is not installed; on Debian: apt-get install redis-server"
    return found


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port if port < 55_000 else port - 10_000  # a node of a cluster also takes the port 10,000 above


class Server:
    """One redis-server, up when the ``with`` block begins.

    Attributes:
        port: On 127.0.0.1.
        socket: Path of its unix socket.
    """

    def __init__(self, folder: Path, *settings: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.socket = folder / "socket"
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            _program("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly",
            "no", "--dir", str(self.folder), "--unixsocket", str(self.socket), *self._settings,
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers)

    def _answers(self) -> bool:
        try:
            with redis.Redis(
                unix_socket_path=str(self.socket), socket_timeout=1, retry=Retry(NoBackoff(), 0)
            ) as client:
                client.ping()
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False
        return True

    def client(self) -> redis.Redis:
        """Return a client of it that is patient."""
        return redis.Redis(port=self.port, socket_timeout=_PATIENCE)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """Kill it, and wait until it is gone. What it held is lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Cluster:
    """Three masters without replicas, which share the slots when the ``with`` block begins."""

    def __init__(self, folder: Path) -> None:
        settings = (
            "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "2000",
            "--cluster-announce-ip", "127.0.0.1", "--cluster-require-full-coverage", "no",
        )  # fmt: skip
        self.servers = [Server(folder / str(i), *settings) for i in range(3)]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers)

    def __enter__(self) -> Self:
        for server in self.servers:
            server.start()
        nodes = [f"127.0.0.1:{server.port}" for server in self.servers]
        command = [_program("redis-cli"), "--cluster", "create", *nodes, "--cluster-replicas", "0", "--cluster-yes"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        until(lambda: all(_knows_all_slots(server) for server in self.servers))
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.stop()


def _knows_all_slots(server: Server) -> bool:
    with server.client() as client:
        info = client.execute_command("CLUSTER INFO")
    text = info.decode() if isinstance(info, bytes) else str(info)
    return "cluster_slots_ok:16384" in text or ("16384" in text and "'ok'" in text)


def until(ready: object, seconds: float = _PATIENCE) -> None:
    """Wait for something outside of this process that tells nobody when it is there."""
    assert callable(ready)
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not come up"
        time.sleep(0.02)
