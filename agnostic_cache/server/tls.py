"""Who may connect: this machine alone, whoever shows a certificate, or, where that is asked for, everyone."""

import ipaddress
import logging
import socket
import ssl
from pathlib import Path

from agnostic_cache.errors import ServerStartError

_logger = logging.getLogger("agnostic_cache.server")


def server_context(cert: Path, key: Path, client_ca: Path) -> ssl.SSLContext:
    """Return what encrypts, by TLS 1.3, and lets in clients alone whose certificate `client_ca` has signed.

    Raises:
        ServerStartError: A file is missing, or is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(cert, key)
        context.load_verify_locations(client_ca)
    except OSError as error:  # `ssl.SSLError` is one
        missing = [str(path) for path in (cert, key, client_ca) if not path.is_file()]
        what = f"missing: {', '.join(missing)}" if missing else str(error)
        msg = f"cannot use certificate {cert}, key {key} and client CA {client_ca}: {what}"
        raise ServerStartError(msg) from error
    return context


def check_exposed(host: str, *, tls: bool, insecure: bool) -> None:
    """Refuse an address that others can reach, without certificates.

    Args:
        host: Address or name; each address that it stands for counts.
        tls: Whether clients must show a certificate.
        insecure: Whether it is meant all the same; then it is logged.

    Raises:
        ServerStartError: Anyone could connect, or there is no such host.
    """
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host or None, 0, flags=socket.AI_PASSIVE)}
    except OSError as error:
        msg = f"cannot listen at {host!r}: {error.strerror or error}"
        raise ServerStartError(msg) from error
    if tls or all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
        return
    if not insecure:
        msg = (
            f"{host!r} can be reached from other machines, and whoever connects may read and write everything; "
            "use --tls-cert, --tls-key and --client-ca, or say --insecure where the network itself keeps others out"
        )
        raise ServerStartError(msg)
    _logger.warning("%r can be reached from other machines: anyone there may read and write everything", host)
