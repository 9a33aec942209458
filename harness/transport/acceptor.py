"""Accepting: until every peer that is expected has proved itself. Whoever else comes is turned away."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Collection

from harness.transport import sockets
from harness.transport.frames import TransportError
from harness.transport.handshake import Identity, welcome
from harness.transport.tls import wrap

#: Who has not proved itself after so long makes room for the next.
HANDSHAKE_S = 10.0
#: Handshakes at once; whoever comes meanwhile waits in the kernel.
_MOST_HANDSHAKES = 32


class Acceptor:
    """Handshakes with whoever connects to `listener`, each in a thread, so that a silent stranger blocks nobody."""

    def __init__(
        self,
        listener: socket.socket,
        me: Identity,
        expected: Collection[str],
        context: ssl.SSLContext | None,
        deadline: float,
    ) -> None:
        self._listener, self._me, self._expected = listener, me, frozenset(expected)
        self._context, self._deadline = context, deadline
        self._changed = threading.Condition()
        self._claimed: set[str] = set()
        self._accepted: dict[str, socket.socket] = {}
        self._pending: dict[threading.Thread, socket.socket] = {}
        self._num_refused = 0
        self._last_refused = ""
        self._stopped = False
        self._thread = threading.Thread(target=self._accept, name=f"{me.device} accepting", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> dict[str, socket.socket]:
        """The connection of every expected peer. Raises TransportError that names who is missing at the deadline."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or len(self._accepted) == len(self._expected),
                timeout=max(0.0, self._deadline - time.monotonic()),
            )
            missing = sorted(self._expected - set(self._accepted))
            if missing:
                raise TransportError(
                    f"{self._me.device} waited in vain for {', '.join(missing)}{self._whom_it_refused()}"
                )
            return dict(self._accepted)

    def stop(self) -> None:
        """Accept nobody any more; handshakes under way end. Connections that were accepted stay."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            threads = [self._thread, *self._pending]
            for sock in self._pending.values():
                sockets.shut(sock)
        for thread in threads:
            if thread.ident is not None:
                thread.join(HANDSHAKE_S)

    def close(self) -> None:
        """`stop`, and close what was accepted."""
        self.stop()
        for sock in self._accepted.values():
            sock.close()

    def _whom_it_refused(self) -> str:
        if not self._num_refused:
            return ""
        return f"; it turned away {self._num_refused} connections meanwhile, the last one because {self._last_refused}"

    def _accept(self) -> None:
        self._listener.settimeout(sockets.POLL_S)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._pending) < _MOST_HANDSHAKES)
                if self._stopped:
                    return
            try:
                sock, address = self._listener.accept()
                sock = wrap(sock, self._context, accepting=True)
            except TimeoutError:
                continue
            except OSError:  # the caller left already, or descriptors ran out: the next try may do better
                time.sleep(sockets.POLL_S)
                continue
            thread = threading.Thread(target=self._welcome, args=(address,), daemon=True)
            with self._changed:
                if self._stopped:
                    sock.close()
                    return
                self._pending[thread] = sock
                thread.start()

    def _welcome(self, address: tuple[str, int]) -> None:
        thread = threading.current_thread()
        sock = self._pending[thread]
        claimed: list[str] = []

        def judge(peer: str) -> str:
            """Only one connection may claim a name, and only an expected one."""
            with self._changed:
                if peer not in self._expected:
                    return f"{self._me.device} expects {', '.join(sorted(self._expected))}, and not {peer}"
                if peer in self._claimed:
                    return f"{peer} is connected to {self._me.device} already"
                self._claimed.add(peer)
                claimed.append(peer)
                return ""

        accepted, refused = "", ""
        try:
            deadline = min(self._deadline, time.monotonic() + HANDSHAKE_S)
            sockets.tune(sock)
            sock.settimeout(HANDSHAKE_S)
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            accepted = welcome(sock, self._me, judge, deadline)
        except (TransportError, OSError) as error:
            refused = f"of {address[0]}:{address[1]}: {error}"
            sock.close()
        with self._changed:
            del self._pending[thread]
            if accepted:
                self._accepted[accepted] = sock
            else:
                self._claimed.difference_update(claimed)
                self._num_refused += 1
                self._last_refused = refused
            self._changed.notify_all()
