"""The wire between devices: one TCP connection per pair and direction, one thread that writes, one that reads."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Collection, Mapping, Sequence

from harness.transport import sockets
from harness.transport.acceptor import Acceptor
from harness.transport.frames import Frame, PeerLost, TransportError, advance, flat, pack
from harness.transport.handshake import Identity, introduce
from harness.transport.receiver import Inbox, Receiver
from harness.transport.sockets import Address
from harness.transport.tls import TLS, contexts, wrap


class Transport:
    """A device's connections in one generation: `listen`, `connect`, `start`, then `send` and receive, `close`.

    After a failure it is closed and another one is made for the next generation; nothing is used twice.
    latency_s: what arrives is handed over so much later, where the kernel can't delay packets.
    send_buffer_bytes: how much `send` may leave to the kernel (which doubles it); None: as much as the kernel likes.
    """

    def __init__(
        self,
        device: str,
        secret: bytes,
        generation: int,
        *,
        latency_s: float = 0.0,
        send_buffer_bytes: int | None = None,
        tls: TLS | None = None,
    ) -> None:
        self.device = device
        #: Payload bytes per peer, without headers. Of frames that were sent, or received, as a whole.
        self.sent_bytes: dict[str, int] = {}
        self.received_bytes: dict[str, int] = {}
        self.generation = generation
        self._me = Identity(device, generation, secret)
        self._latency_s, self._send_buffer_bytes = latency_s, send_buffer_bytes
        self._client: ssl.SSLContext | None = None
        self._server: ssl.SSLContext | None = None
        if tls is not None:
            self._client, self._server = contexts(tls)
        self._lock = threading.Lock()  # of what `close` ends
        self._sending = threading.Lock()  # held while a descriptor is written to, so that it isn't closed meanwhile
        self._closed = False
        self._listener: socket.socket | None = None
        self._acceptor: Acceptor | None = None
        self._receiver: Receiver | None = None
        self._outgoing: dict[str, socket.socket] = {}
        self._incoming: dict[str, socket.socket] = {}

    def listen(self, host: str, port: int = 0) -> Address:
        """Listen there; returns where (port 0 takes a free one). `host` is an address that peers reach. OrreryError."""
        listener = sockets.listen(self.device, host, port)
        with self._lock:
            self._listener = listener
        found: tuple[str, int] = listener.getsockname()[:2]
        return found

    def connect(self, outgoing: Mapping[str, Address], incoming: Collection[str], timeout_s: float) -> None:
        """Connect to every peer of `outgoing` and be connected to by every one of `incoming`, in any order.

        Peers do the same at the same time. Raises TransportError that says which peer is missing, refused or strange,
        PeerLost if one does not answer; then all is closed.
        """
        deadline = time.monotonic() + timeout_s
        try:
            if incoming:
                self._begin_accepting(incoming, deadline)
            for peer, address in outgoing.items():
                self._dial(peer, address, deadline)
            if self._acceptor is not None:
                self._incoming = self._acceptor.wait()
            self._end_accepting()
        except BaseException as error:
            called_off = self._closed
            self.close()
            if called_off:
                raise TransportError(f"{self.device} closed its transport while it connected") from error
            raise
        self.received_bytes.update(dict.fromkeys(incoming, 0))

    def start(self, inbox: Inbox) -> None:
        """Start the receiving thread. What came before waits in the kernel."""
        with self._lock:
            self._check_open()
            self._receiver = Receiver(self._me, self._latency_s, self._incoming, self.received_bytes, inbox)
            self._receiver.start()

    def send(self, peer: str, frame: Frame, payload: Sequence[memoryview]) -> None:
        """Write a frame; returns when the kernel has all of it. `payload`: contiguous, `frame.nbytes` together.

        Called by one thread. Raises PeerLost, TransportError for a frame that is not of this generation or size, or
        when `close` is called meanwhile.
        """
        pieces = flat(payload)
        num_bytes = sum(map(len, pieces))
        if frame.generation != self._me.generation or frame.nbytes != num_bytes:
            raise TransportError(
                f"{self.device} -> {peer}: {frame}, generation {frame.generation}, can't be sent with a payload of "
                f"{num_bytes} bytes by a transport of generation {self._me.generation}"
            )
        with self._sending:
            self._check_open()
            if peer not in self._outgoing:
                raise TransportError(f"{self.device} has no connection to {peer}, only to {sorted(self._outgoing)}")
            try:
                _write(self._outgoing[peer], [memoryview(pack(frame)), *pieces])
            except OSError as error:
                self._check_open()
                raise PeerLost(f"{self.device} lost {peer} while sending {frame}: {error.strerror or error}") from error
        self.sent_bytes[peer] += frame.nbytes

    def resume(self) -> None:
        """Ask the inbox again for all sources that it held. From any thread; cheap where none is held."""
        if self._receiver is not None:
            self._receiver.resume()

    def close(self) -> None:
        """End everything; who is blocked in `connect` or `send` comes back with TransportError. From any thread.

        When it returns the inbox isn't called any more: so don't hold a lock that the inbox takes. What was sent
        is still brought to the peer by the kernel, as long as this machine and its addresses live.
        """
        with self._lock:
            self._closed = True
            acceptor, receiver, listener = self._acceptor, self._receiver, self._listener
            for sock in self._outgoing.values():
                sockets.shut(sock)
        if acceptor is not None:
            acceptor.close() if receiver is None else acceptor.stop()
        if receiver is not None:
            receiver.stop()
        with self._sending:
            for sock in self._outgoing.values():
                sock.close()
        if listener is not None:
            listener.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"{self.device} has closed its transport")

    def _begin_accepting(self, incoming: Collection[str], deadline: float) -> None:
        with self._lock:
            self._check_open()
            if self._listener is None:
                raise TransportError(f"{self.device} does not listen, and {sorted(incoming)} are to connect to it")
            self._acceptor = Acceptor(self._listener, self._me, incoming, self._server, deadline)
            self._acceptor.start()

    def _end_accepting(self) -> None:
        if self._acceptor is not None:
            self._acceptor.stop()
        if self._listener is not None:
            self._listener.close()

    def _dial(self, peer: str, address: Address, deadline: float) -> None:
        where = f"{self.device} can't reach {peer} at {address[0]}:{address[1]}"
        try:
            sock = sockets.dial(address, deadline, self._send_buffer_bytes, lambda: self._closed)
            sock = wrap(sock, self._client, accepting=False)
            with self._lock:
                self._outgoing[peer] = sock
                self.sent_bytes[peer] = 0
                self._check_open()
            sockets.tune(sock)
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            introduce(sock, self._me, peer, deadline)
            sockets.write_patiently(sock)
        except ssl.SSLCertVerificationError as error:
            raise TransportError(
                f"{where}: {error.verify_message}. Both need the same certificate of this run, and clocks that agree "
                "to a few days"
            ) from error
        except TimeoutError as error:
            raise PeerLost(f"{where}: it did not answer in time") from error
        except OSError as error:
            raise PeerLost(f"{where}: {error.strerror or error}") from error


def _write(sock: socket.socket, pieces: list[memoryview]) -> None:
    """All of `pieces`. Raises OSError, TimeoutError for a peer that fell silent."""
    while pieces:
        num_bytes = sockets.write(sock, pieces)
        if num_bytes == 0 and sockets.silent(sock):
            raise TimeoutError(f"no answer for {sockets.SILENCE_S:g} s")
        advance(pieces, num_bytes)
