"""JSON messages over a pair of pipes or a socket: what coordinator, supervisors and workers say to each other."""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

Message = Mapping[str, Any]


class Closed(Exception):
    """The other end is gone, or hangs amid a message; the text says which, for "its supervisor ..."."""


class Channel:
    """One end. Over SSH the two directions are standard input and output, on one machine they are one socket."""

    def __init__(self, reading: Connection, writing: Connection) -> None:
        self.reading, self._writing = reading, writing

    @classmethod
    def of_socket(cls, descriptor: int, patience_s: float | None = None) -> Channel:
        """Takes the descriptor over. `patience_s`: in that time a message must go on (default: for ever)."""
        if patience_s is not None:
            limit = struct.pack("ll", int(patience_s), int(patience_s % 1 * 1e6))  # the kernel's struct timeval
            with socket.socket(fileno=descriptor) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
                sock.detach()
        both = Connection(descriptor)
        return cls(both, both)

    @classmethod
    def of_stdio(cls) -> Channel:
        return cls(Connection(sys.stdin.fileno(), writable=False), Connection(sys.stdout.fileno(), readable=False))

    def send(self, message: Message) -> None:
        """Raises Closed when nobody reads it."""
        self.pass_on(json.dumps(message).encode())

    def pass_on(self, packed: bytes) -> None:
        """Send a message that is packed already."""
        try:
            self._writing.send_bytes(packed)
        except OSError as error:
            raise _closed(error) from error

    def receive(self) -> Message:
        """The next message; waits for it. Raises Closed at the end."""
        message: Message = json.loads(self.take())
        return message

    def take(self) -> bytes:
        """The next message as it came."""
        try:
            return self.reading.recv_bytes()
        except (EOFError, OSError) as error:
            raise _closed(error) from error

    def send_descriptor(self, descriptor: int, pid: int) -> None:
        """Hand a file descriptor to process `pid`, at the other end of a socket of this machine."""
        try:
            send_handle(self._writing, descriptor, pid)
        except OSError as error:
            raise _closed(error) from error

    def take_descriptor(self) -> int:
        """One that was sent."""
        try:
            return recv_handle(self.reading)
        except (EOFError, OSError) as error:
            raise _closed(error) from error

    def close(self) -> None:
        for end in {self.reading, self._writing}:
            if not end.closed:
                end.close()


def _closed(error: Exception) -> Closed:
    return Closed("hangs" if isinstance(error, BlockingIOError) else "is gone")


def ready(channels: Iterable[Channel], timeout_s: float) -> list[Channel]:
    """Those with a message, or an end, to read; waits at most `timeout_s`."""
    by_reading = {channel.reading: channel for channel in channels}
    return [by_reading[found] for found in wait(list(by_reading), timeout_s) if isinstance(found, Connection)]
