"""The handshake: both ends of a new connection prove that they know the run's secret, and who they are.

    connecting -> accepting   hello: magic, version, generation, nonce, own name, name of whom it wants
    accepting -> connecting   reply: nonce, own name, proof = HMAC-SHA256(secret, "accepting" hello reply)
    connecting -> accepting   proof = HMAC-SHA256(secret, "connecting" hello reply)
    accepting -> connecting   verdict: why it is refused, empty if it is not

Every message has a length of two bytes in front, and at most `MAX_MESSAGE_BYTES`. The secret never travels, both
nonces are fresh, and the role is part of what is proved, so neither replaying nor mirroring a proof helps a stranger.
Who knows the secret is trusted. What follows is neither encrypted nor signed: that is what TLS is for.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from harness.transport.frames import PeerLost, TransportError

MAGIC = b"ORHS"
VERSION = 1
MAX_MESSAGE_BYTES = 1024
MAX_NAME_BYTES = 255
MIN_SECRET_BYTES = 16
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_HELLO = struct.Struct(f"!4sBI{_NONCE_BYTES}s")
_LENGTH = struct.Struct("!H")


@dataclass(frozen=True)
class Identity:
    """What this end proves: a device of one generation of one run. Raises ValueError for what proves nothing."""

    device: str
    generation: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 0 < len(self.device.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"A device's name has 1 to {MAX_NAME_BYTES} bytes, and {self.device!r} has not.")
        if len(self.secret) < MIN_SECRET_BYTES:
            raise ValueError(f"A secret has at least {MIN_SECRET_BYTES} bytes, and this one has {len(self.secret)}.")
        if not 0 <= self.generation < 2**32:
            raise ValueError(f"A generation lies between 0 and {2**32 - 1}, and {self.generation} does not.")


def introduce(sock: socket.socket, me: Identity, peer: str, deadline: float) -> None:
    """The connecting end. Raises TransportError with the reason if refused, PeerLost if the connection ends.

    `deadline` is a time of `time.monotonic`. Also raises OSError.
    """
    wire = _Wire(sock, f"{me.device} -> {peer}", deadline)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    hello = _HELLO.pack(MAGIC, VERSION, me.generation, nonce) + _named(me.device) + _named(peer)
    wire.send(hello)
    answer = wire.receive()
    reply, proof = answer[:-_PROOF_BYTES], answer[-_PROOF_BYTES:]
    if not hmac.compare_digest(proof, _proof(me, b"accepting", hello, reply)):
        raise TransportError(
            f"{me.device} wanted {peer}, and what answers does not know this run's secret: it is of another run, "
            "or no device at all"
        )
    wire.send(_proof(me, b"connecting", hello, reply))
    verdict = wire.receive().decode(errors="replace")
    if verdict:
        raise TransportError(f"{peer} refused {me.device}: {verdict}")


def welcome(sock: socket.socket, me: Identity, judge: Callable[[str], str], deadline: float) -> str:
    """The accepting end; returns the name of the peer. `judge(name)` says why it is not wanted, or "".

    Raises TransportError if the peer is refused, PeerLost if the connection ends, OSError.
    """
    wire = _Wire(sock, f"somebody -> {me.device}", deadline)
    hello = wire.receive()
    generation, peer, wanted = _read_hello(me, hello)
    reply = secrets.token_bytes(_NONCE_BYTES) + _named(me.device)
    wire.send(reply + _proof(me, b"accepting", hello, reply))
    if not hmac.compare_digest(wire.receive(), _proof(me, b"connecting", hello, reply)):
        reason = f"who came as {peer} does not know the secret of {me.device}'s run"
    elif wanted != me.device:
        reason = f"{peer} wanted {wanted}, and this is {me.device}"
    elif generation != me.generation:
        reason = f"{peer} is of generation {generation}, and {me.device} of generation {me.generation}"
    else:
        reason = judge(peer)
    wire.send(reason.encode()[:MAX_MESSAGE_BYTES])
    if reason:
        raise TransportError(reason)
    return peer


def _read_hello(me: Identity, hello: bytes) -> tuple[int, str, str]:
    """Generation, name and wanted name. Raises TransportError for what is no hello."""
    try:
        magic, version, generation, _ = _HELLO.unpack_from(hello)
        peer, rest = _name(hello[_HELLO.size :])
        wanted, rest = _name(rest)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise TransportError(f"{me.device} was sent what is no hello: {hello[:32]!r}") from error
    if (magic, version, rest) != (MAGIC, VERSION, b""):
        raise TransportError(f"{me.device} speaks version {VERSION} of the handshake, and was sent {hello[:32]!r}")
    return generation, peer, wanted


def _named(name: str) -> bytes:
    text = name.encode()
    return bytes([len(text)]) + text


def _name(data: bytes) -> tuple[str, bytes]:
    """The name at the front of `data`, and what follows it."""
    end = 1 + data[0]
    if len(data) < end:
        raise IndexError(end)
    return data[1:end].decode(), data[end:]


def _proof(me: Identity, role: bytes, hello: bytes, reply: bytes) -> bytes:
    """Both messages with their lengths: no two pairs of messages are proved by the same bytes."""
    said = b"".join(_LENGTH.pack(len(part)) + part for part in (role, hello, reply))
    return hmac.digest(me.secret, said, "sha256")


class _Wire:
    """Messages of bounded size over a socket, until a deadline."""

    def __init__(self, sock: socket.socket, who: str, deadline: float) -> None:
        self._sock, self._who, self._deadline = sock, who, deadline

    def send(self, message: bytes) -> None:
        self._sock.settimeout(self._left())
        self._sock.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self) -> bytes:
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > MAX_MESSAGE_BYTES:
            raise TransportError(
                f"{self._who}: a message of {length} bytes was announced, and the handshake has none over "
                f"{MAX_MESSAGE_BYTES}: the other end is no device, or of another version"
            )
        return self._exactly(length)

    def _exactly(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            self._sock.settimeout(self._left())
            part = self._sock.recv(num_bytes - len(data))
            if not part:
                raise PeerLost(
                    f"{self._who}: the connection was closed during the handshake. The other end failed, or is no "
                    "device of this version, or one of the two uses TLS and the other does not"
                )
            data += part
        return data

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        return left
