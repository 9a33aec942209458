"""A switch with devices plugged into it, obeying a test: JSON in, one line per order, JSON out.

Run as `python -m tests.testbeds.emulation.yard DEVICES`. Every process of it ends with its parent.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import OrreryError
from harness.fleet.processes import die_with_parent
from testbeds.emulation import namespaces, shaping

ROOT = Path(__file__).resolve().parents[3]
PORT = 5000
TIMEOUT_S = 20.0


class Yard:
    """The test's end."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.pids: list[int] = self._hear()

    def ask(self, *order: Any) -> Any:
        """`("send", src, dst, bytes, *orders meanwhile)` -> seconds; `("shape", rank, ...)` and the like."""
        self.tell(*order)
        return self._hear()

    def tell(self, *order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def _hear(self) -> Any:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.stderr.read())
        answer = json.loads(line)
        if "refused" in answer:
            raise OrreryError(answer["refused"])
        return answer["done"]


@contextmanager
def yard(
    devices: int, user: int | None = None, python: str = sys.executable, environ: Mapping[str, str] | None = None
) -> Iterator[Yard]:
    """The yard of a process that is killed when the test is done with it."""
    process = subprocess.Popen(
        [python, "-m", "tests.testbeds.emulation.yard", str(devices)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **(environ or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        user=user,
        group=user,
        extra_groups=[] if user else None,
    )
    try:
        yield Yard(process)
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def main(num_devices: int) -> None:
    owner = os.getppid()
    try:
        namespaces.enter_switch()
        die_with_parent(owner)  # the kernel may forget it when the rights of a process change
        links = [_start(rank) for rank in range(num_devices)]
    except OrreryError as error:
        _say({"refused": str(error)})
        return
    _say({"done": [pid for pid, _ in links]})
    pids = [pid for pid, _ in links]
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            _say({"done": _obey(name, arguments, pids, [link for _, link in links])})
        except OrreryError as error:
            _say({"refused": str(error)})


def _obey(name: str, arguments: list[Any], pids: list[int], links: list[socket.socket]) -> Any:
    shape: dict[str, Callable[..., Any]] = {"shape": shaping.shape, "set_rate": shaping.set_rate}
    if name in shape:
        rank, *rest = arguments
        return shape[name](pids[rank], rank, *rest)
    if name == "unshape":
        return shaping.unshape(pids[arguments[0]], arguments[0])
    if name == "set_link":
        return shaping.set_link(*arguments)
    if name == "has_netem":
        return shaping.has_netem()
    if name == "show":
        return namespaces.in_namespace(pids[arguments[0]], arguments[1])
    if name == "path":
        os.environ["PATH"], namespaces.SYSTEM_FOLDERS = arguments[0], ()  # type: ignore[assignment]
        return None
    if name == "sleep":
        return time.sleep(*arguments)
    src, dst, num_bytes, *events = arguments
    links[src].sendall(json.dumps([dst, num_bytes]).encode() + b"\n")
    for event, *rest in events:  # while the transfer is on its way
        _obey(event, rest, pids, links)
    return json.loads(links[src].makefile().readline())


def _start(rank: int) -> tuple[int, socket.socket]:
    """A forked device in its namespace, plugged in, and the socket to it."""
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent(parent)
            namespaces.enter_device()
            theirs.sendall(b"\n")
            _device(theirs.makefile("rw"))
        finally:
            os._exit(0)
    ours.recv(1)
    namespaces.plug(rank, pid)
    return pid, ours


def _device(orders: Any) -> None:
    """Takes what it is sent and acknowledges it; sends, when told, and says how long it took."""
    server = socket.create_server(("", PORT))
    threading.Thread(target=_serve, args=(server,), daemon=True).start()
    for line in orders:
        dst, num_bytes = json.loads(line)
        with socket.create_connection((namespaces.address(dst), PORT), timeout=TIMEOUT_S) as connection:
            connection.sendall(b"warm")
            connection.recv(1)
            start = time.monotonic()
            connection.sendall(bytes(num_bytes))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
            orders.write(json.dumps(time.monotonic() - start) + "\n")
            orders.flush()


def _serve(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        connection.recv(4, socket.MSG_WAITALL)
        connection.sendall(b"!")
        buffer = bytearray(1 << 20)
        while connection.recv_into(buffer):
            pass
        connection.sendall(b"!")
        connection.close()


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
