"""TLS for boards on a network that others share: one certificate per run, which both ends present and trust alone."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harness.errors import OrreryError

_VALID_DAYS = 30
_OPENSSL_TIMEOUT_S = 30


@dataclass(frozen=True)
class TLS:
    """Where the run's certificate and its private key lie (PEM)."""

    certificate: Path
    key: Path


def make_certificate(folder: Path) -> TLS:
    """A self-signed certificate for one run, by the program `openssl`. Raises OrreryError where it can't be made."""
    program = shutil.which("openssl")
    if program is None:
        raise OrreryError(
            "The program `openssl` was not found, and it makes the certificate of an encrypted run. "
            "Install the package openssl, or run without TLS."
        )
    tls = TLS(folder / "certificate.pem", folder / "key.pem")
    request = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=orrery -days {_VALID_DAYS}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tls.key.touch(mode=0o600)
        made = subprocess.run(
            [program, *request.split(), "-keyout", str(tls.key), "-out", str(tls.certificate)],
            capture_output=True,
            text=True,
            timeout=_OPENSSL_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OrreryError(f"No certificate could be made in {folder}: {error}. Is the folder writable?") from error
    if made.returncode:
        raise OrreryError(
            f"`openssl` could not make a certificate in {folder}: {made.stderr.strip()}. "
            "Is the folder writable, and is it OpenSSL 1.1.1 or newer (`openssl version`)?"
        )
    return tls


def contexts(tls: TLS) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For the connecting end, and for the accepting end. Raises OrreryError for files that hold no certificate."""
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # The accepting end would send tickets behind the handshake, which the other end never reads: when it closes, unread
    # bytes turn the end of the connection into a reset, and what was still on its way is lost.
    server.num_tickets = 0
    client.check_hostname = False  # all devices of a run share one certificate; the handshake proves names
    for context in (client, server):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(tls.certificate, tls.key)
            context.load_verify_locations(tls.certificate)
        except OSError as error:
            raise OrreryError(
                f"The certificate {tls.certificate} with the key {tls.key} can't be used: {error.strerror or error}. "
                "Make a new pair for this run, and copy both files to every device."
            ) from error
    return client, server


def wrap(sock: socket.socket, context: ssl.SSLContext | None, accepting: bool) -> socket.socket:
    """`sock` under TLS, nothing said yet; `sock` itself without a context."""
    if context is None:
        return sock
    return context.wrap_socket(sock, server_side=accepting, do_handshake_on_connect=False)
