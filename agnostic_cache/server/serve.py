"""serve: a server from its configuration, from start to SIGTERM."""

import asyncio
import concurrent.futures
import logging
import resource
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from agnostic_cache.errors import MissingExtraError, ServerStartError, StorageError
from agnostic_cache.server.cache_server import CacheServer
from agnostic_cache.server.limits import Limits
from agnostic_cache.server.storage_backend import CreateStorageBackend, LMSLocalBackend
from agnostic_cache.server.tls import check_exposed, server_context
from agnostic_cache.storage.registry import open_storage
from agnostic_cache.storage.tiered import TieredStorage
from agnostic_cache.storage.url import StorageURL

_logger = logging.getLogger("agnostic_cache.server")
_FILES = 128  # that a server has open besides its connections
_LIVELY_SECONDS = 2.0  # an event loop that answers within that is healthy


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What to serve, where, and to whom.

    Attributes:
        tiers: URLs of storages, the fastest first; or ``"cpu"``.
        host: Address to listen at.
        port: Its port, or 0 for any that is free.
        unix: Path of a unix socket to listen at too.
        tls_cert: Certificate of the server, in PEM; with `tls_key` and `client_ca`, or none of them.
        tls_key: Its key.
        client_ca: Who signs the certificates of clients.
        insecure: Whether others may connect without a certificate.
        metrics_port: Loopback port for ``/metrics`` and ``/healthz``, or None.
        limits: What clients may cost.
    """

    tiers: tuple[str, ...] = ("memory://?max_bytes=4GiB",)
    host: str = "127.0.0.1"
    port: int = 65432
    unix: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    insecure: bool = False
    metrics_port: int | None = None
    limits: Limits = field(default_factory=Limits)


async def serve(config: ServeConfig, *, ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is under way, write what is not written, and return.

    Args:
        config: What to serve.
        ready: Called once, with a line that says what listens where, with which budget.

    Raises:
        ServerStartError: It cannot start as asked.
        StorageError: A tier cannot be opened.
        MissingExtraError: A library is not installed.
    """
    paths = config.tls_cert, config.tls_key, config.client_ca
    context = server_context(*map(_given, paths)) if any(paths) else None
    check_exposed(config.host, tls=context is not None, insecure=config.insecure)
    _allow_files(config.limits.max_connections + _FILES)
    backend = _open(config.tiers)
    with ExitStack() as stack:
        stack.callback(backend.close)
        server = CacheServer(backend, limits=config.limits, tls=context)
        monitor = _monitor(config, server, stack)
        try:
            host, port = await server.listen(config.host, config.port)
            where = [f"{'lm+tls' if context else 'lm'}://{host}:{port}"]
            if config.unix is not None:
                await server.listen_unix(config.unix)
                where.append(f"lm+unix://{config.unix.absolute()}")
            where += [f"http://127.0.0.1:{monitor}/metrics"] if monitor is not None else []
            stop = asyncio.Event()
            for name in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(name, stop.set)
            ready(f"listening at {', '.join(where)}; {_budgets(config.tiers, backend)}")
            await stop.wait()
            _logger.info("stopping: %d connections", server.connections)
        finally:
            await server.stop()
            if config.unix is not None and config.unix.is_socket():
                config.unix.unlink()


def _given(path: Path | None) -> Path:
    if path is None:
        msg = "of --tls-cert, --tls-key and --client-ca one is missing; give all three: clients must be known"
        raise ServerStartError(msg)
    return path


def _open(tiers: tuple[str, ...]) -> LMSLocalBackend:
    """Open what is asked for; of several tiers all have an entry before it is acknowledged."""
    try:
        if len(tiers) == 1:
            return CreateStorageBackend(tiers[0])
        opened = [open_storage(tier) for tier in tiers]
        return LMSLocalBackend(TieredStorage(opened, write_through=range(1, len(tiers))))
    except (StorageError, MissingExtraError):
        raise
    except ValueError as error:  # a URL, or a size in it; it may hold a password, and is not shown
        why = error.__cause__ or error
        msg = f"a tier cannot be used: {why}"
        raise ServerStartError(msg) from error


def _names(tiers: tuple[str, ...]) -> list[str]:
    """Return what each tier is called: its scheme, numbered where there are several of one."""
    names: list[str] = []
    for tier in tiers:
        scheme = StorageURL.parse(tier).scheme if "://" in tier else "memory"
        count = sum(name.rstrip("0123456789") == scheme for name in names)
        names.append(scheme if not count else f"{scheme}{count + 1}")
    return names


def _budgets(tiers: tuple[str, ...], backend: LMSLocalBackend) -> str:
    said = []
    for name, stats in zip(_names(tiers), backend.tiers, strict=True):
        found = stats()
        most = "no budget" if found.max_bytes is None else f"{found.max_bytes / 1024**3:,.2f} GiB"
        said.append(f"{name} tier, {most}, {found.entries:,} entries")
    return "; ".join(said)


def _allow_files(count: int) -> None:
    """Raise the limit of open files, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < count:
        _logger.warning("only %d files may be open, %d fewer than connections may need", wanted, count - wanted)


def _monitor(config: ServeConfig, server: CacheServer, stack: ExitStack) -> int | None:
    """Start what tells of the server, where that is asked for; return its port."""
    if config.metrics_port is None:
        return None
    try:
        from agnostic_cache.metrics import Metrics  # noqa: PLC0415 - needs an extra
        from agnostic_cache.server.monitor import Monitor  # noqa: PLC0415 - needs the same
    except ModuleNotFoundError as error:
        msg = f"metrics need a library that is not installed ({error}); pip install 'agnostic-cache[metrics]'"
        raise MissingExtraError(msg) from error
    metrics = Metrics()
    for name, tier, stats in zip(_names(config.tiers), config.tiers, server.backend.tiers, strict=True):
        policy = StorageURL.parse(tier).options.get("evictor", "adaptive") if "://" in tier else "adaptive"
        metrics.watch(name, policy, stats)
    metrics.watch_connections(lambda: server.connections)
    server.trace = metrics.trace
    loop = asyncio.get_running_loop()

    def is_healthy() -> bool:
        turn: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            loop.call_soon_threadsafe(turn.set_result, None)
            turn.result(_LIVELY_SECONDS)
        except (RuntimeError, concurrent.futures.TimeoutError):
            return False
        return True

    monitor = Monitor(config.metrics_port, metrics, is_healthy)
    stack.callback(monitor.close)
    return monitor.port
