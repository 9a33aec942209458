"""The transport beside what else could carry tensors: plain sockets, multiprocessing.connection, ZeroMQ.

Two processes on the loopback interface. All wires take turns, round by round; the table shows medians.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import queue
import shutil
import socket
import statistics
import struct
import time
from multiprocessing import connection

import pytest

from harness.transport import Frame, Transport, make_certificate

pytestmark = pytest.mark.benchmark

ROUNDS = 9
PINGS, PING_BYTES = 300, 1024
STREAMS = {"64 KiB": (1 << 16, 512), "1 MiB": (1 << 20, 64), "16 MiB": (1 << 24, 6)}
LARGEST = max(size for size, _ in STREAMS.values())
HERE = "127.0.0.1"
TIMEOUT_S = 30
SECRET = b"the secret of one benchmark"


class Sockets:
    """The floor: a length and the bytes, read into place by the thread that waits for them."""

    def __init__(self, parent, tls):
        self.parent = parent

    def listen(self):
        self.listener = socket.create_server((HERE, 0)) if self.parent else None
        return self.listener.getsockname() if self.parent else None

    def connect(self, address):
        if self.parent:
            self.sock, _ = self.listener.accept()
            self.listener.close()
        else:
            self.sock = socket.create_connection(address, TIMEOUT_S)
        self.sock.settimeout(None)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, view):
        header = struct.pack("!Q", len(view))
        sent = self.sock.sendmsg([header, view]) - len(header)
        if sent < len(view):
            self.sock.sendall(view[sent:])

    def receive_into(self, view):
        header = memoryview(bytearray(8))
        self._exactly(header)
        self._exactly(view[: struct.unpack("!Q", header)[0]])

    def _exactly(self, view):
        while view:
            view = view[self.sock.recv_into(view) :]

    def close(self):
        self.sock.close()


class Multiprocessing:
    """`multiprocessing.connection` over TCP."""

    def __init__(self, parent, tls):
        self.parent = parent

    def listen(self):
        self.listener = connection.Listener((HERE, 0), authkey=SECRET) if self.parent else None
        return self.listener.address if self.parent else None

    def connect(self, address):
        if self.parent:
            self.end = self.listener.accept()
            self.listener.close()
        else:
            self.end = connection.Client(address, authkey=SECRET)

    def send(self, view):
        self.end.send_bytes(view)

    def receive_into(self, view):
        self.end.recv_bytes_into(view)

    def close(self):
        self.end.close()


class ZeroMQ:
    """A pair of sockets. What it receives lies in its own memory, and is copied to where it belongs."""

    def __init__(self, parent, tls):
        import zmq

        self.parent = parent
        self.context = zmq.Context()
        self.end = self.context.socket(zmq.PAIR)
        self.end.linger = 0
        self.end.rcvtimeo = TIMEOUT_S * 1000

    def listen(self):
        return self.end.bind_to_random_port(f"tcp://{HERE}") if self.parent else None

    def connect(self, port):
        if not self.parent:
            self.end.connect(f"tcp://{HERE}:{port}")

    def send(self, view):
        self.end.send(view, copy=False)

    def receive_into(self, view):
        frame = self.end.recv(copy=False)
        view[: len(frame)] = frame.buffer

    def close(self):
        self.end.close()
        self.context.term()


class Ours:
    """As the engine uses it: the receiving thread reads into room that is there, and tells a thread that waits."""

    def __init__(self, parent, tls):
        me, self.peer = ("parent", "child") if parent else ("child", "parent")
        self.transport = Transport(me, SECRET, 0, tls=tls)
        self.room, self.arrivals = memoryview(bytearray(LARGEST)), queue.SimpleQueue()

    def listen(self):
        return self.transport.listen(HERE)

    def connect(self, address):
        self.transport.connect({self.peer: address}, [self.peer], TIMEOUT_S)
        self.transport.start(self)

    def admit(self, source, frame):
        return [self.room[: frame.nbytes]]

    def arrived(self, source, frame, start_s, end_s):
        self.arrivals.put(frame.nbytes)

    def lost(self, error):
        self.arrivals.put(error)

    def send(self, view):
        self.transport.send(self.peer, Frame(0, 0, 0, "uint8", (len(view),), len(view)), [view])

    def receive_into(self, view):
        found = self.arrivals.get(timeout=TIMEOUT_S)
        if isinstance(found, BaseException):
            raise found
        if found == 8:  # the answer of a stream, which somebody looks at
            view[:] = self.room[:8]

    def close(self):
        self.transport.close()


def child(kind, tls, pipe):
    """Echoes pings, swallows streams; answers a stream with the processor seconds that it took here."""
    wire = connected(kind, False, tls, pipe)
    buffer = memoryview(bytearray(LARGEST))
    while (command := pipe.recv()) is not None:
        size, count = command
        began = time.process_time()
        for _ in range(count):
            wire.receive_into(buffer)
            if size == PING_BYTES:
                wire.send(buffer[:size])
        if size != PING_BYTES:
            wire.send(memoryview(struct.pack("d", time.process_time() - began)))
    wire.close()


def connected(kind, parent, tls, pipe):
    wire = kind(parent, tls)
    pipe.send(wire.listen())
    assert pipe.poll(TIMEOUT_S)
    wire.connect(pipe.recv())
    return wire


class Bench:
    """One kind of wire to a child process."""

    def __init__(self, kind, tls=None):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=child, args=(kind, tls, theirs), daemon=True)
        self.process.start()
        self.wire = connected(kind, True, tls, self.pipe)
        self.buffer = memoryview(bytearray(LARGEST))

    def ping_us(self):
        """Half of the median round trip."""
        self.pipe.send((PING_BYTES, PINGS))
        trips = []
        for _ in range(PINGS):
            began = time.perf_counter()
            self.wire.send(self.buffer[:PING_BYTES])
            self.wire.receive_into(self.buffer)
            trips.append(time.perf_counter() - began)
        return statistics.median(trips) / 2 * 1e6

    def stream(self, size, count):
        """GB/s, and processor seconds per GB, both ends together."""
        self.pipe.send((size, count))
        began, began_cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            self.wire.send(self.buffer[:size])
        answer = memoryview(bytearray(8))
        self.wire.receive_into(answer)
        took, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        gigabytes = size * count / 1e9
        return gigabytes / took, (cpu + struct.unpack("d", answer)[0]) / gigabytes

    def close(self):
        self.pipe.send(None)
        self.wire.close()
        self.process.join(TIMEOUT_S)
        self.process.kill()


def test_wires_side_by_side(tmp_path, capsys):
    """The receiving thread may cost a message some time, and a large tensor next to nothing."""
    benches = {}
    try:
        benches["plain sockets"] = Bench(Sockets)
        benches["multiprocessing.connection"] = Bench(Multiprocessing)
        if importlib.util.find_spec("zmq"):
            benches["ZeroMQ"] = Bench(ZeroMQ)
        benches["harness.transport"] = Bench(Ours)
        if shutil.which("openssl"):
            benches["harness.transport, TLS"] = Bench(Ours, make_certificate(tmp_path))
        measured = {name: [] for name in benches}
        for _ in range(ROUNDS):
            for name, bench in benches.items():
                row = [bench.ping_us()]
                for size, count in STREAMS.values():
                    row += bench.stream(size, count)
                measured[name].append(row)
    finally:
        for bench in benches.values():
            bench.close()
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in measured.items()
    }
    with capsys.disabled():
        print("\n\n| wire | 1 KB one way, us | " + " | ".join(f"{size}, GB/s (CPU s/GB)" for size in STREAMS) + " |")
        print("|---|" + "---|" * (1 + len(STREAMS)))
        for name, (ping, *streams) in medians.items():
            cells = [f"{rate:.2f} ({cpu:.2f})" for rate, cpu in zip(streams[::2], streams[1::2], strict=True)]
            print(f"| {name} | {ping:.0f} | " + " | ".join(cells) + " |")
    ours, plain = medians["harness.transport"], medians["plain sockets"]
    assert ours[0] < plain[0] + 200
    assert ours[-2] > plain[-2] / 2  # the rate of the largest
