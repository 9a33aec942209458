"""A cable that is cut: the loopback interface of a network namespace of its own goes down while a frame is sent."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from harness.transport import Transport
from tests.harness.transport.wire import Basket, frame_of, wired

NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]
UP, DOWN = (["ip", "link", "set", "lo", state] for state in ("up", "down"))


def possible() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return not subprocess.run([*NAMESPACE, *UP], capture_output=True, timeout=10).returncode


@pytest.mark.skipif(not possible(), reason="needs `unshare`, `ip` and user namespaces")
def test_a_sender_notices_that_nothing_is_acknowledged_any_more():
    program = f"import sys; sys.path[:] = {sys.path}; from {__name__} import cut; cut()"
    done = subprocess.run([*NAMESPACE, sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    frame = "tag 1 of iteration 0, uint8[8388608] in 8388608 bytes"
    assert done.stdout == f"device0 lost device1 while sending {frame}: no answer for 1 s\n"


def cut() -> None:
    """In the namespace: one frame arrives, then the link goes down and the next one is sent."""
    from harness.transport import PeerLost, sockets

    subprocess.run(UP, check=True, timeout=10)
    with wired([("device0", "device1")]) as transports:
        sockets.SILENCE_S = 1
        basket = Basket()
        transports["device1"].start(basket)
        sender: Transport = transports["device0"]
        sender.send("device1", frame_of(0, 3), [memoryview(b"abc")])
        basket.wait(1)
        subprocess.run(DOWN, check=True, timeout=10)
        size = 8 << 20
        try:
            sender.send("device1", frame_of(1, size), [memoryview(bytes(size))])
        except PeerLost as error:
            print(error)
    assert "torch" not in sys.modules
