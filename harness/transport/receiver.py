"""The receiving thread of a device: reads all incoming connections in turn, straight into where the payload belongs."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from harness.transport import sockets
from harness.transport.frames import HEADER_BYTES, Frame, PeerLost, TransportError, advance, flat, unpack
from harness.transport.handshake import Identity

_JOIN_S = 10.0


class Inbox(Protocol):
    """Who receives. All three are called by the receiving thread, which reads nothing meanwhile."""

    def admit(self, source: str, frame: Frame) -> Sequence[memoryview] | None:
        """Where the payload goes: contiguous pieces of `frame.nbytes` together. None: not yet.

        Then `source` is not read, so that TCP holds it back, until `resume`. May raise TransportError: the source is
        lost.
        """
        ...

    def arrived(self, source: str, frame: Frame, start_s: float, end_s: float) -> None:
        """The payload was read from `start_s` to `end_s` (`time.perf_counter`), one latency ago."""
        ...

    def lost(self, error: BaseException) -> None:
        """Nothing more comes from a source (at most once each), or from any (an error that is not TransportError)."""
        ...


@dataclass(eq=False)
class _Source:
    name: str
    sock: socket.socket
    header: bytearray = field(default_factory=lambda: bytearray(HEADER_BYTES))
    frame: Frame | None = None  # None while its header is read
    missing: list[memoryview] = field(default_factory=list)  # what is not filled yet, of the header or the payload
    start_s: float = 0.0

    def __post_init__(self) -> None:
        self.expect_header()

    def expect_header(self) -> None:
        self.frame, self.missing = None, [memoryview(self.header)]


class Receiver:
    """Owns the incoming sockets, its selector and its thread from `start` on; the thread closes them when it ends."""

    def __init__(
        self,
        me: Identity,
        latency_s: float,
        incoming: Mapping[str, socket.socket],
        received_bytes: dict[str, int],
        inbox: Inbox,
    ) -> None:
        self._device, self._generation, self._latency_s, self._inbox = me.device, me.generation, latency_s, inbox
        self._received_bytes = received_bytes
        self._stopped = False
        #: Sources that are asked about or wait. Entered before `admit` is asked, so that no `resume` gets lost.
        self._held: set[_Source] = set()
        #: What is due when. One latency for all: what is read first is due first.
        self._due: deque[tuple[float, Callable[[], None]]] = deque()
        # epoll and poll round a timeout up to a millisecond, select does not, and costs a little more a call.
        self._selector = selectors.SelectSelector() if latency_s else selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._sources = [_Source(name, sock) for name, sock in incoming.items()]
        for source in self._sources:
            source.sock.setblocking(False)
            self._selector.register(source.sock, selectors.EVENT_READ, source)
        self._thread = threading.Thread(target=self._run, name=f"{me.device} receiving", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def resume(self) -> None:
        """Ask again for all held sources."""
        if self._held:
            self._wake()

    def stop(self) -> None:
        """End the thread. After it the inbox isn't called any more, unless it is the inbox that calls."""
        self._stopped = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except OSError:
            return  # full: it is about to wake up; closed: it has ended

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._deliver()
                for key, _ in self._selector.select(self._until_due()):
                    if key.data is None:
                        self._ask_again()
                    else:
                        self._read(key.data)
        except Exception as error:
            if not self._stopped:
                self._inbox.lost(error)
        finally:
            self._selector.close()
            for sock in (self._woken, self._waker, *(source.sock for source in self._sources)):
                sock.close()

    def _until_due(self) -> float | None:
        return max(0.0, self._due[0][0] - time.perf_counter()) if self._due else None

    def _deliver(self) -> None:
        while self._due and not self._stopped and self._due[0][0] <= time.perf_counter():
            self._due.popleft()[1]()

    def _later(self, end_s: float, call: Callable[[], None]) -> None:
        """`call` one latency after `end_s`, and after everything that was read before."""
        if self._latency_s:
            self._due.append((end_s + self._latency_s, call))
        else:
            call()

    def _read(self, source: _Source) -> None:
        """At most one header and one payload, for sources take turns; and whatever TLS has decrypted on the way."""
        try:
            self._read_frame(source)
            while source not in self._held and not self._stopped and sockets.decrypted(source.sock):
                self._read_frame(source)
        except TransportError as error:
            self._drop(source, error)

    def _read_frame(self, source: _Source) -> None:
        if source.frame is None:
            if not self._fill(source):
                return
            source.frame = self._unpack(source)
            self._admit(source, source.frame)
        if source not in self._held and self._fill(source):
            self._complete(source, source.frame)

    def _unpack(self, source: _Source) -> Frame:
        try:
            frame = unpack(source.header)
        except TransportError as error:
            raise TransportError(f"{source.name} -> {self._device}: {error}") from error
        if frame.generation != self._generation:
            raise TransportError(
                f"{source.name} -> {self._device}: a frame of generation {frame.generation} came ({frame}), and "
                f"{self._device} is of generation {self._generation}"
            )
        return frame

    def _admit(self, source: _Source, frame: Frame) -> None:
        """Find out where the payload goes; the source is held while nobody knows."""
        known = source in self._held
        self._held.add(source)
        pieces = self._inbox.admit(source.name, frame)
        if pieces is None:
            if not known:
                self._selector.unregister(source.sock)
            return
        source.missing = flat(pieces)
        room = sum(map(len, source.missing))
        if room != frame.nbytes:
            raise TransportError(f"{source.name} -> {self._device}: {frame} came, and there is room for {room} bytes")
        self._held.discard(source)
        if known:
            self._selector.register(source.sock, selectors.EVENT_READ, source)
        source.start_s = time.perf_counter()

    def _ask_again(self) -> None:
        self._woken.recv(4096)
        for source in tuple(self._held):
            assert source.frame is not None
            try:
                self._admit(source, source.frame)
            except TransportError as error:
                self._drop(source, error)
            else:
                if source not in self._held:
                    self._read(source)

    def _fill(self, source: _Source) -> bool:
        """Read once into what is missing; returns whether nothing is missing any more. Raises PeerLost."""
        if not source.missing:
            return True
        try:
            num_bytes = sockets.read(source.sock, source.missing)
        except OSError as error:
            raise PeerLost(f"{self._device} lost {source.name}: {error.strerror or error}{_amid(source)}") from error
        if num_bytes is None:
            return False
        if num_bytes == 0:
            raise PeerLost(f"{self._device} lost {source.name}: it closed the connection{_amid(source)}")
        advance(source.missing, num_bytes)
        return not source.missing

    def _complete(self, source: _Source, frame: Frame) -> None:
        start_s, end_s = source.start_s, time.perf_counter()
        source.expect_header()
        self._received_bytes[source.name] += frame.nbytes
        self._later(end_s, lambda: self._inbox.arrived(source.name, frame, start_s, end_s))

    def _drop(self, source: _Source, error: TransportError) -> None:
        """Read `source` no more, and say so after what it has sent."""
        if source.sock in self._selector.get_map():
            self._selector.unregister(source.sock)
        self._held.discard(source)
        self._sources.remove(source)
        source.sock.close()
        if not self._stopped:
            self._later(time.perf_counter(), lambda: self._inbox.lost(error))


def _amid(source: _Source) -> str:
    """Where in a frame the end came, if not between two."""
    left = sum(map(len, source.missing))
    if source.frame is None:
        return f" with {left} of {HEADER_BYTES} bytes of a header missing" if left < HEADER_BYTES else ""
    return f" with {left} bytes missing of {source.frame}"
