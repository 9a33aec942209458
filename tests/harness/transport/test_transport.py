"""What arrives, in which order and when; and how it ends."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest

from harness.transport import DTYPES, HEADER_BYTES, PeerLost, TransportError
from harness.transport.frames import pack
from tests.harness.transport.wire import (
    GENERATION,
    TIMEOUT_S,
    Basket,
    background,
    frame_of,
    typed,
    wired,
)

PAIR = [("device0", "device1")]


def raw(transport, peer="device1"):
    """The connection below `transport`, for saying what it would never say."""
    return transport._outgoing[peer]


def test_frames_of_all_types_and_shapes_both_ways():
    shapes = [(), (0,), (1,), (5, 0, 2), (3, 4), (2, 1, 2, 1, 2, 3), (1000, 7), (257, 129, 3)]
    frames = [typed(tag, dtype, shape) for tag, (dtype, shape) in enumerate((d, s) for d in DTYPES for s in shapes)]
    data = [random.Random(frame.tag).randbytes(frame.nbytes) for frame in frames]
    with wired([("device0", "device1"), ("device1", "device0")]) as transports:
        baskets = {name: Basket(pieces=3) for name in transports}
        for name, transport in transports.items():
            transport.start(baskets[name])

        def send_all(name, peer):
            for frame, payload in zip(frames, data, strict=True):
                third = len(payload) // 3
                view = memoryview(payload)
                transports[name].send(peer, frame, [view[:third], view[third : 2 * third], view[2 * third :]])

        with background(send_all, "device0", "device1"), background(send_all, "device1", "device0"):
            for basket in baskets.values():
                basket.wait(len(frames))
        expected = list(zip(frames, data, strict=True))
        assert [kept[1:] for kept in baskets["device0"].frames] == expected
        assert [kept[1:] for kept in baskets["device1"].frames] == expected
        total = sum(frame.nbytes for frame in frames)
        assert transports["device0"].sent_bytes == transports["device0"].received_bytes == {"device1": total}
        assert transports["device1"].sent_bytes == transports["device1"].received_bytes == {"device0": total}
        assert not baskets["device0"].errors + baskets["device1"].errors


def test_a_payload_of_more_pieces_than_one_system_call_takes():
    payload = random.Random(0).randbytes(5000)
    view = memoryview(payload)
    with wired(PAIR) as transports:
        basket = Basket(pieces=2500)
        transports["device1"].start(basket)
        transports["device0"].send("device1", frame_of(0, 5000), [view[i : i + 1] for i in range(5000)])
        basket.wait(1)
        assert basket.frames[0][2] == payload


def test_typed_views_are_sent_as_their_bytes():
    numbers = memoryview(bytearray(range(24))).cast("f", (2, 3))
    with wired(PAIR) as transports:
        basket = Basket()
        transports["device1"].start(basket)
        transports["device0"].send("device1", typed(0, "float32", (2, 3)), [numbers])
        basket.wait(1)
        assert basket.frames[0][2] == bytes(range(24))


def test_two_sources_take_turns():
    """A frame passes while a bigger one of another device is half way."""
    with wired([("device0", "device2"), ("device1", "device2")]) as transports:
        basket = Basket()
        transports["device2"].start(basket)
        slow = frame_of(0, 100_000)
        raw(transports["device0"], "device2").sendall(pack(slow) + bytes(50_000))
        for tag in range(1, 20):
            transports["device1"].send("device2", frame_of(tag, 1000), [memoryview(bytes(1000))])
        basket.wait(19)
        assert {source for source, *_ in basket.frames} == {"device1"}
        raw(transports["device0"], "device2").sendall(bytes(50_000))
        basket.wait(20)
        assert basket.frames[-1][:2] == ("device0", slow)
        assert transports["device2"].received_bytes == {"device0": 100_000, "device1": 19_000}


def test_what_is_not_admitted_blocks_its_sender_alone():
    """The kernel's buffers fill up, and then the sender waits; other sources go on."""
    total, size = 32 << 20, 1 << 15
    with wired([("device0", "device2"), ("device1", "device2")], send_buffer_bytes=1 << 16) as transports:
        basket = Basket()
        basket.open = False
        transports["device2"].start(basket)

        def send_much():
            for tag in range(total // size):
                transports["device0"].send("device2", frame_of(tag, size), [memoryview(bytes(size))])

        with background(send_much) as errors:
            samples = [-2, -1]
            while samples[-1] != samples[-2] and samples[-1] < total / 2:
                time.sleep(0.2)
                samples.append(transports["device0"].sent_bytes["device2"])
            before = samples[-1]
            assert before < total / 2
            assert basket.asked == 1
            basket.open = True  # for device1, whose frame is asked about anew; device0 is held
            transports["device1"].send("device2", frame_of(0, 3), [memoryview(b"abc")])
            basket.wait(1)
            assert basket.frames == [("device1", frame_of(0, 3), b"abc")]
            assert transports["device0"].sent_bytes["device2"] == before
            basket.frames.clear()
            transports["device2"].resume()
            basket.wait(total // size)
        assert not errors
        assert [frame.tag for _, frame, _ in basket.frames] == list(range(total // size))
        assert transports["device2"].received_bytes["device0"] == total


def test_resume_asks_again_and_may_be_told_not_yet_again():
    with wired(PAIR) as transports:
        basket = Basket()
        basket.open = False
        transports["device1"].resume()  # before the start: nothing to ask
        transports["device1"].start(basket)
        transports["device0"].send("device1", frame_of(0, 3), [memoryview(b"abc")])
        transports["device0"].send("device1", frame_of(1, 0), [])
        for asked in (1, 2, 3):
            deadline = time.monotonic() + TIMEOUT_S
            while basket.asked < asked and time.monotonic() < deadline:
                time.sleep(0.001)
            assert basket.asked == asked
            basket.open = asked == 3
            transports["device1"].resume()
        basket.wait(2)
        assert [payload for *_, payload in basket.frames] == [b"abc", b""]


@pytest.mark.parametrize("latency_s", [0.0003, 0.05])
def test_latency_delays_and_does_not_slow_down(latency_s):
    """Every frame is late by the latency, all together no more than that: reading goes on meanwhile."""
    count = 200
    with wired(PAIR, latency_s=latency_s) as transports:
        basket = Basket()
        transports["device1"].start(basket)
        began = time.perf_counter()
        for tag in range(count):
            transports["device0"].send("device1", frame_of(tag, 1000), [memoryview(bytes(1000))])
        basket.wait(count)
        took = time.perf_counter() - began
    assert [frame.tag for _, frame, _ in basket.frames] == list(range(count))
    late = sorted(handed - end for _, end, handed in basket.times)
    assert late[0] >= latency_s
    assert late[count // 2] < latency_s + 0.02
    assert all(start <= end for start, end, _ in basket.times)
    assert latency_s <= took < count * latency_s / 4 + 1


def test_the_end_of_a_peer_comes_after_what_it_sent():
    with wired(PAIR, latency_s=0.05) as transports:
        basket = Basket()
        transports["device1"].start(basket)
        transports["device0"].send("device1", frame_of(0, 3), [memoryview(b"abc")])
        transports["device0"].close()
        basket.wait(num_errors=1)
        assert len(basket.frames) == 1


def test_a_peer_that_closes_is_lost_and_the_others_go_on():
    with wired([("device0", "device2"), ("device1", "device2")]) as transports:
        basket = Basket()
        transports["device2"].start(basket)
        transports["device0"].close()
        basket.wait(num_errors=1)
        transports["device1"].send("device2", frame_of(0, 3), [memoryview(b"abc")])
        basket.wait(1)
        (error,) = basket.errors
        assert isinstance(error, PeerLost)
        assert str(error) == "device2 lost device0: it closed the connection"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (pack(frame_of(0, 9))[:20], f"it closed the connection with 32 of {HEADER_BYTES} bytes of a header missing"),
        (pack(frame_of(5, 9)) + b"abc", "with 6 bytes missing of tag 5 of iteration 0"),
    ],
)
def test_an_end_amid_a_frame_is_told(said, text):
    with wired(PAIR) as transports:
        basket = Basket()
        transports["device1"].start(basket)
        raw(transports["device0"]).sendall(said)
        transports["device0"].close()
        basket.wait(num_errors=1)
        assert isinstance(basket.errors[0], PeerLost)
        assert "device1 lost device0" in str(basket.errors[0])
        assert text in str(basket.errors[0])
        assert not basket.frames


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (pack(frame_of(4, 9, generation=GENERATION - 1)), "a frame of generation 2 came .* device1 is of generation 3"),
        (b"HTTP" + pack(frame_of(4, 9))[4:], "begins with b'HTTP'"),
        (pack(frame_of(4, 9))[:27] + b"\x08" + pack(frame_of(4, 9))[28:], "in 8 bytes, and that shape has 9"),
    ],
)
def test_a_wrong_frame_is_an_error_naming_both_devices(header, text):
    with wired(PAIR) as transports:
        basket = Basket()
        transports["device1"].start(basket)
        raw(transports["device0"]).sendall(header + bytes(9))
        basket.wait(num_errors=1)
        (error,) = basket.errors
        assert type(error) is TransportError
        assert str(error).startswith("device0 -> device1: ")
        with pytest.raises(TransportError, match=text):
            raise error
        with pytest.raises(PeerLost, match="device0 lost device1 while sending tag 1 "):
            for _ in range(1000):
                transports["device0"].send("device1", frame_of(1, 1 << 16), [memoryview(bytes(1 << 16))])


def test_an_inbox_with_room_for_another_size_or_that_refuses_is_told():
    class Wrong(Basket):
        def admit(self, source, frame):
            if frame.tag == 0:
                return [memoryview(bytearray(8))]
            raise TransportError(f"device1 expected tag 0 of {source}")

    for tag, text in ((0, "device0 -> device1: tag 0 .* and there is room for 8 bytes"), (1, "device1 expected tag 0")):
        with wired(PAIR) as transports:
            basket = Wrong()
            transports["device1"].start(basket)
            transports["device0"].send("device1", frame_of(tag, 9), [memoryview(bytes(9))])
            basket.wait(num_errors=1)
            with pytest.raises(TransportError, match=text):
                raise basket.errors[0]


def test_an_inbox_that_breaks_is_told_once():
    class Broken(Basket):
        def arrived(self, source, frame, start_s, end_s):
            raise KeyError("no such value")

    with wired(PAIR) as transports:
        basket = Broken()
        transports["device1"].start(basket)
        # At once: the receiver may hang up after the first.
        raw(transports["device0"]).sendall(b"".join(pack(frame_of(tag, 0)) for tag in range(3)))
        basket.wait(num_errors=1)
        transports["device1"].close()
        assert [type(error) for error in basket.errors] == [KeyError]


def test_what_is_sent_must_be_what_is_said():
    with wired(PAIR) as transports:
        sender = transports["device0"]
        with pytest.raises(TransportError, match=r"device0 -> device1: tag 0 .* payload of 2 bytes"):
            sender.send("device1", frame_of(0, 3), [memoryview(b"ab")])
        with pytest.raises(TransportError, match=r"generation 2, can't be sent .* of generation 3"):
            sender.send("device1", frame_of(0, 2, generation=2), [memoryview(b"ab")])
        with pytest.raises(TransportError, match=r"device0 has no connection to device7, only to \['device1'\]"):
            sender.send("device7", frame_of(0, 2), [memoryview(b"ab")])
        assert sender.sent_bytes == {"device1": 0}


def test_close_ends_a_blocked_send():
    with wired(PAIR) as transports:
        basket = Basket()
        basket.open = False
        transports["device1"].start(basket)
        size = 64 << 20
        with background(transports["device0"].send, "device1", frame_of(0, size), [memoryview(bytes(size))]) as errors:
            time.sleep(0.3)
            assert not errors
            began = time.monotonic()
            transports["device0"].close()
        assert time.monotonic() - began < 1
        assert [str(error) for error in errors] == ["device0 has closed its transport"]
        assert transports["device0"].sent_bytes == {"device1": 0}


def test_close_of_the_receiver_ends_a_blocked_send_and_is_no_error_there():
    with wired(PAIR) as transports:
        basket = Basket()
        basket.open = False
        transports["device1"].start(basket)
        size = 64 << 20
        with background(transports["device0"].send, "device1", frame_of(0, size), [memoryview(bytes(size))]) as errors:
            time.sleep(0.2)
            transports["device1"].close()
        assert isinstance(errors[0], PeerLost)
        assert "device0 lost device1 while sending tag 0" in str(errors[0])
        assert not basket.errors


def test_close_while_waiting_reports_nothing_and_may_be_called_by_the_inbox():
    class Closing(Basket):
        def arrived(self, source, frame, start_s, end_s):
            transports["device1"].close()
            super().arrived(source, frame, start_s, end_s)

    for basket in (Basket(), Closing()):
        with wired(PAIR) as transports:
            transports["device1"].start(basket)
            if isinstance(basket, Closing):
                transports["device0"].send("device1", frame_of(0, 0), [])
                deadline = time.monotonic() + TIMEOUT_S
                while any(t.name == "device1 receiving" for t in threading.enumerate()):
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
            began = time.monotonic()
            for _ in range(3):
                transports["device1"].close()
            assert time.monotonic() - began < 1
            assert not [t for t in threading.enumerate() if t.name.startswith("device1")]
            assert not basket.errors
        transports["device1"].resume()


def test_a_receiver_that_does_not_read_is_not_taken_for_dead(monkeypatch):
    """Its kernel answers, so a sender that is held back longer than a dead peer is waited for goes on waiting."""
    with wired(PAIR) as transports:
        monkeypatch.setattr("harness.transport.sockets.SILENCE_S", 0.5)
        assert not raw(transports["device0"]).getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        basket = Basket()
        basket.open = False
        transports["device1"].start(basket)
        size = 32 << 20
        with background(transports["device0"].send, "device1", frame_of(0, size), [memoryview(bytes(size))]) as errors:
            time.sleep(1.5)
            basket.open = True
            transports["device1"].resume()
            basket.wait(1)
        assert not errors
