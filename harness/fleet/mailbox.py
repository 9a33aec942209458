"""A worker's end of its channel, read as messages come: so that a worker can be called off while it computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from harness.fleet.channel import Channel, Closed, Message


class Regroup(Exception):
    """A device is lost: this generation is over, and the next one begins with `job`."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__("a device is lost")
        self.job = job


class Mailbox:
    """Receives for a worker, and sends with the number of its generation.

    `called_off(error)` is called from another thread when the generation is over.
    """

    def __init__(self, channel: Channel, generation: int) -> None:
        self._channel, self._generation = channel, generation
        self._sending = threading.Lock()
        self._messages: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._regroup: Regroup | None = None
        self._called_off: Callable[[Regroup], None] | None = None
        threading.Thread(target=self._read, name="mailbox", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                if "regroup" not in message:
                    self._messages.put(message)
                    continue
                regroup = Regroup(message["regroup"])
                with self._lock:
                    self._regroup = regroup
                    called_off = self._called_off
                if called_off is not None:
                    called_off(regroup)
                self._messages.put(regroup)
        except Closed as closed:
            self._messages.put(closed)

    def on_call_off(self, called_off: Callable[[Regroup], None]) -> None:
        """What ends the generation; at once where it is over already."""
        with self._lock:
            self._called_off = called_off
            regroup = self._regroup
        if regroup is not None:
            called_off(regroup)

    def check(self) -> None:
        """Raises Regroup where the generation is over."""
        with self._lock:
            if self._regroup is not None:
                raise self._regroup

    def send(self, message: Message) -> None:
        """Raises Closed when nobody reads it."""
        with self._sending:
            self._channel.send({**message, "generation": self._generation})

    def receive(self) -> Message:
        """The next message of this generation. Raises Regroup, and Closed at the end."""
        found = self._messages.get()
        if isinstance(found, Exception):
            self._messages.put(found)  # for `begin`, or whoever asks next
            raise found
        return found

    def begin(self, regroup: Regroup) -> None:
        """Go over to the generation that it is the beginning of. Raises Closed at the end."""
        while (found := self._messages.get()) is not regroup:  # those before are of the one that is over
            if isinstance(found, Closed):
                raise found
        with self._lock:
            self._called_off = None
            if self._regroup is regroup:
                self._regroup = None
        self._generation = regroup.job["generation"]
