"""Devices on the loopback interface, and inboxes that keep what comes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from harness.transport import ITEM_BYTES, Frame, Transport, TransportError

SECRET = b"the secret of one run, no more"
GENERATION = 3
TIMEOUT_S = 10.0


def frame_of(tag: int, nbytes: int, iteration: int = 0, generation: int = GENERATION) -> Frame:
    return Frame(generation, iteration, tag, "uint8", (nbytes,), nbytes)


def typed(tag: int, dtype: str, shape: tuple[int, ...]) -> Frame:
    return Frame(GENERATION, -1, tag, dtype, shape, math.prod(shape) * ITEM_BYTES[dtype])


class Basket:
    """An inbox that makes room for what it is asked, while `open`, and keeps everything it is told."""

    def __init__(self, pieces: int = 1) -> None:
        self.open = True
        self.frames: list[tuple[str, Frame, bytes]] = []
        self.times: list[tuple[float, float, float]] = []  # start, end, handed over
        self.errors: list[BaseException] = []
        self.asked = 0
        self._pieces = pieces
        self._room: dict[str, bytearray] = {}
        self._changed = threading.Condition()

    def admit(self, source: str, frame: Frame) -> Sequence[memoryview] | None:
        self.asked += 1
        if not self.open:
            return None
        self._room[source] = bytearray(frame.nbytes)
        room, step = memoryview(self._room[source]), max(1, math.ceil(frame.nbytes / self._pieces))
        return [room[first : first + step] for first in range(0, frame.nbytes, step)]

    def arrived(self, source: str, frame: Frame, start_s: float, end_s: float) -> None:
        with self._changed:
            self.frames.append((source, frame, bytes(self._room[source])))
            self.times.append((start_s, end_s, time.perf_counter()))
            self._changed.notify_all()

    def lost(self, error: BaseException) -> None:
        with self._changed:
            self.errors.append(error)
            self._changed.notify_all()

    def wait(self, num_frames: int = 0, num_errors: int = 0) -> None:
        with self._changed:
            done = self._changed.wait_for(
                lambda: len(self.frames) >= num_frames and len(self.errors) >= num_errors, TIMEOUT_S
            )
        assert done, (len(self.frames), self.errors)


@contextmanager
def wired(links: Sequence[tuple[str, str]], **options: object) -> Iterator[Mapping[str, Transport]]:
    """Transports that have connected along `links` (sender, receiver), all at the same time. Closed in the end."""
    names = sorted({name for link in links for name in link})
    transports = {name: Transport(name, SECRET, GENERATION, **options) for name in names}
    try:
        addresses = {name: transport.listen("127.0.0.1") for name, transport in transports.items()}
        with ThreadPoolExecutor(len(names)) as pool:
            futures = [
                pool.submit(
                    transports[name].connect,
                    {to: addresses[to] for sender, to in links if sender == name},
                    [sender for sender, to in links if to == name],
                    TIMEOUT_S,
                )
                for name in names
            ]
            for future in futures:
                future.result(TIMEOUT_S)
        yield transports
    finally:
        for transport in transports.values():
            transport.close()


@contextmanager
def background(function, *arguments) -> Iterator[list[BaseException]]:
    """`function` in a thread that has ended when the block is left; its error is in the list then."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            function(*arguments)
        except TransportError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield errors
    finally:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
