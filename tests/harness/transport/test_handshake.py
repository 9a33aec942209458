"""Who is let in, who is not, and what each side is told."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import OrreryError
from harness.transport import PeerLost, Transport, TransportError, acceptor
from harness.transport.handshake import Identity, introduce, welcome
from tests.harness.transport.wire import GENERATION, SECRET, TIMEOUT_S, Basket, background, frame_of


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def make():
    made = []

    def transport(device="device0", secret=SECRET, generation=GENERATION):
        made.append(Transport(device, secret, generation))
        return made[-1]

    yield transport
    for each in made:
        each.close()


@pytest.mark.parametrize(
    ("stranger", "text"),
    [
        (dict(secret=b"the secret of another run"), "does not know this run's secret"),
        (dict(generation=GENERATION - 1), "device0 is of generation 2, and device1 of generation 3"),
        (dict(device="device9"), "device1 expects device0, and not device9"),
    ],
)
def test_who_is_wrong_is_refused_and_the_right_one_is_let_in(make, pool, stranger, text):
    receiver = make("device1")
    address = receiver.listen("127.0.0.1")
    waiting = pool.submit(receiver.connect, {}, ["device0"], TIMEOUT_S)
    with pytest.raises(TransportError, match=text) as refused:
        make(**stranger).connect({"device1": address}, [], TIMEOUT_S)
    assert "device1" in str(refused.value)
    assert not waiting.done()
    sender = make()
    sender.connect({"device1": address}, [], TIMEOUT_S)
    waiting.result(TIMEOUT_S)
    basket = Basket()
    receiver.start(basket)
    sender.send("device1", frame_of(1, 3), [memoryview(b"abc")])
    basket.wait(1)
    assert basket.frames == [("device0", frame_of(1, 3), b"abc")]


def test_the_second_of_a_name_is_refused(make, pool):
    receiver = make("device2")
    address = receiver.listen("127.0.0.1")
    waiting = pool.submit(receiver.connect, {}, ["device0", "device1"], TIMEOUT_S)
    make().connect({"device2": address}, [], TIMEOUT_S)
    with pytest.raises(TransportError, match="device2 refused device0: device0 is connected to device2 already"):
        make().connect({"device2": address}, [], TIMEOUT_S)
    make("device1").connect({"device2": address}, [], TIMEOUT_S)
    waiting.result(TIMEOUT_S)


def test_whoever_answers_at_the_wrong_address_is_named(make, pool):
    receiver = make("device2")
    address = receiver.listen("127.0.0.1")
    waiting = pool.submit(receiver.connect, {}, ["device0"], TIMEOUT_S)
    with pytest.raises(TransportError, match="device0 wanted device1, and this is device2"):
        make().connect({"device1": address}, [], TIMEOUT_S)
    receiver.close()
    with pytest.raises(TransportError, match="closed its transport while it connected"):
        waiting.result(TIMEOUT_S)


@pytest.mark.parametrize("said", [b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", b"\0\5hello", b"\4\0" + bytes(1024)])
def test_strangers_block_nobody(make, pool, said):
    receiver = make("device1")
    address = receiver.listen("127.0.0.1")
    with socket.create_connection(address, TIMEOUT_S) as stranger:
        stranger.sendall(said)
        waiting = pool.submit(receiver.connect, {}, ["device0"], TIMEOUT_S)
        make().connect({"device1": address}, [], TIMEOUT_S)
        waiting.result(TIMEOUT_S)
        try:
            assert stranger.recv(1024) == b""
        except ConnectionResetError:
            return


def test_more_silent_strangers_than_handshakes_at_once(make, pool, monkeypatch):
    monkeypatch.setattr(acceptor, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(acceptor, "_MOST_HANDSHAKES", 2)
    receiver = make("device1")
    address = receiver.listen("127.0.0.1")
    strangers = [socket.create_connection(address, TIMEOUT_S) for _ in range(5)]
    waiting = pool.submit(receiver.connect, {}, ["device0"], TIMEOUT_S)
    make().connect({"device1": address}, [], TIMEOUT_S)
    waiting.result(TIMEOUT_S)
    for stranger in strangers:
        stranger.close()


def test_who_is_missing_is_named_with_whom_was_turned_away(make, pool):
    receiver = make("device2")
    address = receiver.listen("127.0.0.1")
    waiting = pool.submit(receiver.connect, {}, ["device0", "device1", "device3"], 0.5)
    make("device1").connect({"device2": address}, [], TIMEOUT_S)
    with pytest.raises(TransportError):
        make(secret=b"the secret of another run").connect({"device2": address}, [], TIMEOUT_S)
    with pytest.raises(TransportError, match="device2 waited in vain for device0, device3; it turned away 1 conn"):
        waiting.result(TIMEOUT_S)


def test_who_does_not_answer_is_lost(make):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = mute.getsockname()
        began = time.monotonic()
        with pytest.raises(PeerLost, match=f"device0 can't reach device1 at 127.0.0.1:{address[1]}: it did not answer"):
            make().connect({"device1": address}, [], 0.2)
        assert 0.15 < time.monotonic() - began < 2
    with pytest.raises(PeerLost, match=r"device0 can't reach device1 .* Connection refused"):
        make().connect({"device1": address}, [], TIMEOUT_S)


def test_who_hangs_up_is_lost(make):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_S)

        def hang_up():
            sock, _ = server.accept()
            sock.recv(65536)
            sock.close()

        with background(hang_up), pytest.raises(PeerLost, match="device0 -> device1: the connection was closed"):
            make().connect({"device1": server.getsockname()}, [], TIMEOUT_S)


@pytest.mark.parametrize("answers", [False, True], ids=["mute peer", "nobody comes"])
def test_close_ends_connect(make, pool, answers):
    transport = make()
    transport.listen("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        outgoing = {} if answers else {"device1": mute.getsockname()}
        waiting = pool.submit(transport.connect, outgoing, ["device1"], 60)
        time.sleep(0.1)
        began = time.monotonic()
        transport.close()
        with pytest.raises(TransportError, match="device0 closed its transport while it connected"):
            waiting.result(TIMEOUT_S)
        assert time.monotonic() - began < 1
    with pytest.raises(TransportError, match="has closed"):
        transport.start(Basket())


def test_a_taken_port_and_a_foreign_address_are_explained(make):
    host, port = make().listen("127.0.0.1")
    with pytest.raises(OrreryError, match=f"device1 can't listen at 127.0.0.1:{port}: .*in use.*ss -ltnp.*choose"):
        make("device1").listen(host, port)
    with pytest.raises(OrreryError, match=r"device1 can't listen at 203.0.113.7:0: .*No interface of this machine"):
        make("device1").listen("203.0.113.7")
    with pytest.raises(OrreryError, match=r"device1 can't listen at 127.0.0.1:70000"):
        make("device1").listen("127.0.0.1", 70000)


@pytest.mark.parametrize(
    "wrong", [dict(device=""), dict(device="x" * 256), dict(secret=b"short"), dict(generation=-1)], ids=str
)
def test_what_proves_nothing_is_no_identity(wrong):
    with pytest.raises(ValueError, match=r"has|lies"):
        Identity(**{"device": "device0", "generation": 0, "secret": SECRET, **wrong})


def test_the_secret_is_not_printed():
    assert "secret" not in repr(Identity("device0", 0, SECRET))


@settings(max_examples=50)
@given(st.binary(max_size=100), st.booleans())
def test_random_bytes_end_a_handshake_with_an_error(said, framed):
    me = Identity("device0", 0, SECRET)
    said = len(said).to_bytes(2, "big") + said if framed else said
    for end in (
        lambda sock: introduce(sock, me, "device1", time.monotonic() + TIMEOUT_S),
        lambda sock: welcome(sock, me, lambda peer: "", time.monotonic() + TIMEOUT_S),
    ):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(said)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(TransportError):
                end(ours)


def test_a_mirrored_proof_is_refused():
    """A stranger who sends everything back to where it came from has proved nothing."""
    me = Identity("device0", 0, SECRET)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(TIMEOUT_S)

        def mirror():
            while part := theirs.recv(65536):
                theirs.sendall(part)

        thread = threading.Thread(target=mirror)
        thread.start()
        with pytest.raises(TransportError, match="does not know this run's secret"):
            introduce(ours, me, "device0", time.monotonic() + TIMEOUT_S)
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT_S)


def test_no_thread_is_left(make, pool):
    receiver = make("device1")
    address = receiver.listen("127.0.0.1")
    waiting = pool.submit(receiver.connect, {}, ["device0"], TIMEOUT_S)
    sender = make()
    sender.connect({"device1": address}, [], TIMEOUT_S)
    waiting.result(TIMEOUT_S)
    receiver.start(Basket())
    receiver.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("device1")]
