"""The same wire under TLS. Needs the program `openssl`."""

from __future__ import annotations

import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness.errors import OrreryError
from harness.transport import TLS, PeerLost, Transport, TransportError, make_certificate
from harness.transport.frames import pack
from tests.harness.transport.wire import GENERATION, SECRET, TIMEOUT_S, Basket, background, frame_of, wired

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")
PAIR = [("device0", "device1")]


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("run"))


def test_frames_arrive_whole_and_in_order_in_any_size(tls):
    sizes = [0, 1, 52, 1000, 16384, 16385, 100_000, 3, 0, 2_000_000, 7] * 3
    data = [random.Random(tag).randbytes(size) for tag, size in enumerate(sizes)]
    links = [("device0", "device2"), ("device1", "device2"), ("device2", "device0")]
    with wired(links, tls=tls) as transports:
        baskets = {name: Basket(pieces=3) for name in ("device0", "device2")}
        for name, basket in baskets.items():
            transports[name].start(basket)

        def send_all(name, peer):
            for tag, payload in enumerate(data):
                transports[name].send(peer, frame_of(tag, len(payload)), [memoryview(payload)])

        with (
            background(send_all, "device0", "device2"),
            background(send_all, "device1", "device2"),
            background(send_all, "device2", "device0"),
        ):
            baskets["device2"].wait(2 * len(data))
            baskets["device0"].wait(len(data))
        for source, name in (("device0", "device2"), ("device1", "device2"), ("device2", "device0")):
            assert [payload for who, _, payload in baskets[name].frames if who == source] == data
            assert transports[name].received_bytes[source] == sum(sizes)


def test_small_frames_that_lie_decrypted_need_no_further_byte(tls):
    """Many frames in one TLS record: a selector sees the record once."""
    with wired(PAIR, tls=tls) as transports:
        basket = Basket()
        transports["device1"].start(basket)
        transports["device0"]._outgoing["device1"].sendall(
            b"".join(pack(frame_of(tag, 3)) + b"abc" for tag in range(100))
        )
        basket.wait(100)


def test_frames_held_in_a_record_come_with_resume(tls):
    with wired(PAIR, tls=tls) as transports:
        basket = Basket()
        basket.open = False
        transports["device1"].start(basket)
        transports["device0"]._outgoing["device1"].sendall(
            b"".join(pack(frame_of(tag, 3)) + b"abc" for tag in range(5))
        )
        deadline = time.monotonic() + TIMEOUT_S
        while not basket.asked and time.monotonic() < deadline:
            time.sleep(0.001)
        basket.open = True
        transports["device1"].resume()
        basket.wait(5)


def test_what_was_sent_last_outlives_the_sender(tls):
    """Nothing unread lies at the sender's end, so that closing is no reset."""
    size = 8 << 20
    with wired(PAIR, tls=tls) as transports:
        with background(transports["device0"].send, "device1", frame_of(0, size), [memoryview(bytes(size))]):
            basket = Basket()
            transports["device1"].start(basket)
        transports["device0"].close()
        basket.wait(1, num_errors=1)
        assert str(basket.errors[0]) == "device1 lost device0: it closed the connection"


def test_close_ends_a_blocked_send(tls):
    with wired(PAIR, tls=tls) as transports:
        basket = Basket()
        basket.open = False
        transports["device1"].start(basket)
        size = 64 << 20
        with background(transports["device0"].send, "device1", frame_of(0, size), [memoryview(bytes(size))]) as errors:
            time.sleep(1.3)  # longer than one patient write
            assert not errors
            transports["device0"].close()
        assert [str(error) for error in errors] == ["device0 has closed its transport"]


def test_a_certificate_of_another_run_is_refused(tls, tmp_path):
    other = make_certificate(tmp_path)
    receiver, sender = Transport("device1", SECRET, GENERATION, tls=tls), Transport("device0", SECRET, 3, tls=other)
    plain = Transport("device0", SECRET, GENERATION)
    right = Transport("device0", SECRET, GENERATION, tls=tls)
    address = receiver.listen("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(receiver.connect, {}, ["device0"], TIMEOUT_S)
        with pytest.raises(TransportError, match=r"device0 can't reach device1 .*self-signed.*same certificate"):
            sender.connect({"device1": address}, [], TIMEOUT_S)
        with pytest.raises(PeerLost, match="device0"):
            plain.connect({"device1": address}, [], TIMEOUT_S)
        right.connect({"device1": address}, [], TIMEOUT_S)
        waiting.result(TIMEOUT_S)
    for transport in (receiver, sender, plain, right):
        transport.close()


def test_the_key_is_its_owners_alone(tls):
    assert tls.key.stat().st_mode & 0o777 == 0o600


def test_files_without_a_certificate_are_explained(tmp_path):
    for tls in (TLS(tmp_path / "none.pem", tmp_path / "none.key"), TLS(tmp_path / "empty.pem", tmp_path / "empty.pem")):
        (tmp_path / "empty.pem").touch()
        with pytest.raises(
            OrreryError, match=r"The certificate .*pem with the key .* can't be used: .*Make a new pair"
        ):
            Transport("device0", SECRET, GENERATION, tls=tls)


def test_a_missing_program_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OrreryError, match=r"`openssl` was not found.*Install the package openssl"):
        make_certificate(tmp_path)
