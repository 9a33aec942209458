"""Single sockets: listening, dialling, writing and reading pieces, and telling a silent peer from a busy one."""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Any

from harness.errors import OrreryError

Address = tuple[str, int]

#: How long a wait that nothing can wake up goes on before it looks whether it was called off.
POLL_S = 0.1
#: A peer that has acknowledged nothing for so long is lost.
SILENCE_S = 15.0
#: Whole seconds after which a write that makes no progress comes back.
_PATIENCE_S = 1
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_BACKLOG = 128


def listen(device: str, host: str, port: int) -> socket.socket:
    """A listening socket. Raises OrreryError where the address isn't this machine's, or the port is taken."""
    try:
        if not 0 <= port < 2**16:  # which getaddrinfo would take modulo 65536
            raise OverflowError("there is no such port")
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        found = getattr(error, "strerror", None) or error
        raise OrreryError(f"{device} can't listen at {host}:{port}: {found}. {_advice(error, port)}") from error


def _advice(error: Exception, port: int) -> str:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return f"Another program has the port (`ss -ltnp 'sport = :{port}'` shows it): end it, or choose another port."
    if code == errno.EADDRNOTAVAIL:
        return "No interface of this machine has the address (`ip address` shows those it has): mend the testbed."
    if code == errno.EACCES:
        return "Ports below 1024 are root's: choose port 0 or a higher one."
    return "Give the device an address that this machine has, and port 0 or a free one from 1024 to 65535."


def dial(
    address: Address, deadline: float, send_buffer_bytes: int | None, stopped: Callable[[], bool]
) -> socket.socket:
    """A connection to the first address behind a name that takes it. Raises OSError."""
    failure: OSError = OSError(f"{address[0]} has no address")
    for family, kind, protocol, _, found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            if send_buffer_bytes is not None:  # before connecting: the window's scale is agreed on there
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
            sock.setblocking(False)
            _connect(sock, found, deadline, stopped)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def _connect(sock: socket.socket, address: tuple[Any, ...], deadline: float, stopped: Callable[[], bool]) -> None:
    code = sock.connect_ex(address)
    if code == errno.EINPROGRESS:
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while not poll.poll(POLL_S * 1e3):
            if stopped() or time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def tune(sock: socket.socket) -> None:
    """Frames leave at once, and a peer that fell silent while nothing was on its way is noticed.

    There is no TCP_USER_TIMEOUT: it also ends a connection whose receiver merely does not read for so long, and not
    reading is how a busy device holds its senders back. See `silent`.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    third = int(SILENCE_S / 3)  # asked twice after a third of the time
    for option, value in (("TCP_KEEPIDLE", third), ("TCP_KEEPINTVL", third), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def write_patiently(sock: socket.socket) -> None:
    """Writes block in the kernel, one system call for a frame, and come back in time to ask `silent`."""
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(_PATIENCE_S)  # the ssl module would try again by itself for ever
    else:
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _PATIENCE_S, 0))


def silent(sock: socket.socket) -> bool:
    """Whether the kernel has asked twice or more in vain, and nothing was acknowledged for `SILENCE_S`.

    A peer that lives and does not read answers the kernel's probes, so its count of unanswered ones stays at zero.
    """
    if not hasattr(socket, "TCP_INFO"):
        return False
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)  # struct tcp_info of linux/tcp.h
    _, _, retransmits, probes = struct.unpack_from("4B", info)
    (since_acknowledged_ms,) = struct.unpack_from("I", info, 56)
    return retransmits + probes >= 2 and since_acknowledged_ms > SILENCE_S * 1e3


def write(sock: socket.socket, pieces: list[memoryview]) -> int:
    """Write from the front of `pieces`; returns the bytes taken, 0 if there was no room in `_PATIENCE_S`."""
    try:
        if isinstance(sock, ssl.SSLSocket):
            return sock.send(pieces[0])
        return sock.sendmsg(pieces[:_IOV_MAX])
    except BlockingIOError:
        return 0
    except TimeoutError as error:
        if error.errno is None:  # the ssl module's, not the connection's
            return 0
        raise


def read(sock: socket.socket, pieces: list[memoryview]) -> int | None:
    """Read what is here into the front of `pieces`; returns the bytes, None if there are none, 0 at the end."""
    try:
        if len(pieces) == 1 or isinstance(sock, ssl.SSLSocket):
            return sock.recv_into(pieces[0])
        return sock.recvmsg_into(pieces[:_IOV_MAX])[0]
    except (BlockingIOError, ssl.SSLWantReadError):
        return None


def decrypted(sock: socket.socket) -> bool:
    """Whether TLS holds bytes that no selector sees, for they have left the kernel."""
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0


def shut(sock: socket.socket) -> None:
    """End both directions, so that whoever is blocked on `sock` comes back; the descriptor stays taken."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not SSLSocket's, which would go on unencrypted
    except OSError:
        return  # not connected, or closed already
