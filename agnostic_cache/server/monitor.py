"""Monitor: ``/metrics`` and ``/healthz`` by HTTP, at a loopback port of their own. Needs the extra ``metrics``."""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

from prometheus_client import CONTENT_TYPE_LATEST

from agnostic_cache.errors import ServerStartError
from agnostic_cache.metrics import Metrics


class _Loopback(ThreadingHTTPServer):
    daemon_threads = True
    metrics: Metrics
    is_healthy: Callable[[], bool]


class _Pages(BaseHTTPRequestHandler):
    timeout = 5

    def do_GET(self) -> None:
        server = cast("_Loopback", self.server)
        if self.path == "/metrics":
            self._answer(HTTPStatus.OK, server.metrics.text(), CONTENT_TYPE_LATEST)
        elif self.path == "/healthz":
            healthy = server.is_healthy()
            status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, b"ok\n" if healthy else b"not serving\n", "text/plain")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"/metrics or /healthz\n", "text/plain")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Log nothing."""


class Monitor:
    """Answers in threads of its own until it is closed."""

    def __init__(self, port: int, metrics: Metrics, is_healthy: Callable[[], bool]) -> None:
        """Listen at 127.0.0.1.

        Args:
            port: Port, or 0 for any that is free.
            metrics: What to tell.
            is_healthy: Called from a thread of the monitor; answers soon, whatever the server does.

        Raises:
            ServerStartError: The port is in use.
        """
        try:
            self._server = _Loopback(("127.0.0.1", port), _Pages)
        except OSError as error:
            msg = f"cannot show metrics at 127.0.0.1:{port}: {error.strerror or error}; choose another port"
            raise ServerStartError(msg) from error
        self._server.metrics, self._server.is_healthy = metrics, is_healthy
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="agnostic-cache-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
