"""What the devices of a testbed really do: the rate at which each computes, and what their links carry."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.fleet.channel import Channel, Message
from harness.fleet.processes import enter
from harness.profile.core import Core
from harness.transport import Frame, Transport

#: Under a quota, several periods: what it has saved up is used up then.
WARM_UP_S = 0.05
FRAME_BYTES = 2**16
ROUNDS = 20
CONNECT_S = 30.0


@dataclass(frozen=True)
class ComputeProbe:
    """Train a layer for `seconds` (see `harness.profile.core`). Answers `{"probed": {"flops_per_s": ...}}`."""

    seconds: float
    enter: tuple[str, ...] = ()


@dataclass(frozen=True)
class LinkProbe:
    """Send `nbytes` to the next device of the ring while receiving as much, then pass a token round `ROUNDS` times.

    Answers `{"probed": {"bytes_per_s": what came in, "hop_s": mean time of a token from one device to the next}}`.
    """

    device: str
    ring: tuple[str, ...]
    nbytes: int
    generation: int
    secret: str
    host: str
    latency_s: float = 0.0
    send_buffer_bytes: int | None = None


def compute(channel: Channel, probe: ComputeProbe) -> None:
    enter(probe.enter)
    core = Core()
    core.flops_per_s(WARM_UP_S)
    channel.send({"ready": True})
    channel.receive()
    channel.send({"probed": {"flops_per_s": core.flops_per_s(probe.seconds)}})
    channel.receive()


class _Inbox:
    """Counts what comes, and says when all of it is there."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(FRAME_BYTES))
        self.changed = threading.Condition()
        self.num_frames = 0
        self.first_s = self.last_s = 0.0
        self.error: BaseException | None = None

    def admit(self, source: str, frame: Frame) -> Sequence[memoryview]:
        return [self.memory[: frame.nbytes]]

    def arrived(self, source: str, frame: Frame, start_s: float, end_s: float) -> None:
        with self.changed:
            if not self.num_frames:
                self.first_s = end_s
            self.num_frames, self.last_s = self.num_frames + 1, end_s
            self.changed.notify_all()

    def lost(self, error: BaseException) -> None:
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def wait_for(self, num_frames: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.num_frames >= num_frames or self.error is not None)
            if self.error is not None:
                raise self.error


def links(channel: Channel, probe: LinkProbe) -> None:
    rank = probe.ring.index(probe.device)
    right, left = probe.ring[(rank + 1) % len(probe.ring)], probe.ring[rank - 1]
    transport = Transport(
        probe.device,
        bytes.fromhex(probe.secret),
        probe.generation,
        latency_s=probe.latency_s,
        send_buffer_bytes=probe.send_buffer_bytes,
    )
    try:
        channel.send({"listening": transport.listen(probe.host)})
        addresses: Mapping[str, tuple[str, int]] = channel.receive()["peers"]
        transport.connect({right: (addresses[right][0], addresses[right][1])}, [left], CONNECT_S)
        inbox = _Inbox()
        transport.start(inbox)
        channel.send({"ready": True})
        channel.receive()
        num_frames = max(2, probe.nbytes // FRAME_BYTES)
        for _ in range(num_frames):
            _send(transport, probe, right, FRAME_BYTES)
        inbox.wait_for(num_frames)
        rate = (num_frames - 1) * FRAME_BYTES / (inbox.last_s - inbox.first_s)
        began = time.perf_counter()
        for turn in range(ROUNDS):
            if rank:
                inbox.wait_for(num_frames + turn + 1)
            _send(transport, probe, right, 1)
            if not rank:
                inbox.wait_for(num_frames + turn + 1)
        hop = (time.perf_counter() - began) / ROUNDS / len(probe.ring)
        channel.send({"probed": {"bytes_per_s": rate, "hop_s": hop}})
        channel.receive()
    finally:
        transport.close()


def _send(transport: Transport, probe: LinkProbe, peer: str, nbytes: int) -> None:
    frame = Frame(probe.generation, 0, 0, "uint8", (nbytes,), nbytes)
    transport.send(peer, frame, [memoryview(bytes(nbytes))])


def work(channel: Channel, message: Message) -> None:
    """Do what the message asks for: fields of one of the probes, under its name."""
    if "compute" in message:
        compute(channel, ComputeProbe(**message["compute"]))
    else:
        links(channel, LinkProbe(**message["links"]))
