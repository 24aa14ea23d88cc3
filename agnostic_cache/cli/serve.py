"""``agnostic-cache serve``: the cache server."""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from agnostic_cache.errors import AgnosticCacheError
from agnostic_cache.server.limits import Limits
from agnostic_cache.server.serve import ServeConfig
from agnostic_cache.server.serve import serve as run
from agnostic_cache.sizes import parse_size

_LIMITS = Limits()
_TIER = "memory://?max_bytes=4GiB"


def serve(  # noqa: PLR0913 - each argument is an option
    *,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            envvar="AGNOSTIC_CACHE_TIER",
            help="URL of a storage; several, the fastest first.",
            show_default=_TIER,
            metavar="URL",
        ),
    ] = None,
    host: Annotated[str, typer.Option(envvar="AGNOSTIC_CACHE_HOST", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="AGNOSTIC_CACHE_PORT", min=0, max=65535, help="Its port; 0 for any that is free.")
    ] = 65432,
    unix: Annotated[
        Path | None, typer.Option(envvar="AGNOSTIC_CACHE_UNIX", help="A unix socket to listen at too.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="AGNOSTIC_CACHE_TLS_CERT", help="Certificate of the server, in PEM.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="AGNOSTIC_CACHE_TLS_KEY", help="Its key.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(envvar="AGNOSTIC_CACHE_CLIENT_CA", help="Who signs the certificates of clients.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="AGNOSTIC_CACHE_INSECURE", help="Let others in without certificates.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            envvar="AGNOSTIC_CACHE_METRICS_PORT", min=0, max=65535, help="Loopback port of /metrics and /healthz."
        ),
    ] = None,
    max_connections: Annotated[
        int, typer.Option(envvar="AGNOSTIC_CACHE_MAX_CONNECTIONS", min=1, help="Clients at a time.")
    ] = _LIMITS.max_connections,
    read_timeout: Annotated[
        float,
        typer.Option(
            envvar="AGNOSTIC_CACHE_READ_TIMEOUT",
            min=0.001,
            help="Seconds for a request once it has begun, and 1 per MiB.",
        ),
    ] = _LIMITS.read_seconds,
    idle_timeout: Annotated[
        float | None,
        typer.Option(
            envvar="AGNOSTIC_CACHE_IDLE_TIMEOUT", min=0.001, help="Seconds without a request; none by default."
        ),
    ] = None,
    grace: Annotated[
        float, typer.Option(envvar="AGNOSTIC_CACHE_GRACE", min=0, help="Seconds for what is under way at the end.")
    ] = _LIMITS.grace_seconds,
    max_waiting: Annotated[
        str,
        typer.Option(
            envvar="AGNOSTIC_CACHE_MAX_WAITING",
            help="Memory for bodies on their way to a slow tier; larger ones are refused.",
        ),
    ] = "64MiB",
) -> None:
    """Serve a cache to the clients of LMCache, and to ours (lm://).

    Whoever connects may read and write everything. Until SIGTERM, which lets requests under way end first.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        limits = Limits(
            max_connections=max_connections,
            read_seconds=read_timeout,
            idle_seconds=idle_timeout,
            grace_seconds=grace,
            max_waiting_bytes=parse_size(max_waiting),
        )
        config = ServeConfig(
            tiers=tuple(tier or (_TIER,)),
            host=host,
            port=port,
            unix=unix,
            tls_cert=tls_cert,
            tls_key=tls_key,
            client_ca=client_ca,
            insecure=insecure,
            metrics_port=metrics_port,
            limits=limits,
        )
        asyncio.run(run(config, ready=_say))
    except AgnosticCacheError as error:
        typer.secho(f"agnostic-cache serve: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


def _say(line: str) -> None:
    sys.stdout.write(f"agnostic-cache serve: {line}\n")
    sys.stdout.flush()
