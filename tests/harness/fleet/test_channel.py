"""Messages between processes: whole or not at all, and an end that is gone or hangs is noticed."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from harness.fleet.channel import Channel, Closed, ready


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    a, b = socket.socketpair()
    both = Channel.of_socket(a.detach()), Channel.of_socket(b.detach())
    yield both
    for channel in both:
        channel.close()


@pytest.mark.parametrize("message", [{}, {"a": [1, 2.5, None, "ü\n"]}, {"big": "x" * 3_000_000}])
def test_a_message_arrives_as_it_was_sent(ends: tuple[Channel, Channel], message: dict[str, object]) -> None:
    sender = threading.Thread(target=ends[0].send, args=(message,))
    sender.start()
    assert ends[1].receive() == message
    sender.join(5)


def test_messages_stay_in_order_and_apart(ends: tuple[Channel, Channel]) -> None:
    for number in range(100):
        ends[0].send({"number": number})
    assert [ends[1].receive()["number"] for _ in range(100)] == list(range(100))


def test_a_message_is_passed_on_unread(ends: tuple[Channel, Channel]) -> None:
    ends[0].send({"a": 1})
    ends[1].pass_on(b'{"worker": ' + ends[1].take() + b"}")
    assert ends[0].receive() == {"worker": {"a": 1}}


def test_what_was_sent_before_the_end_is_still_read(ends: tuple[Channel, Channel]) -> None:
    ends[0].send({"last": True})
    ends[0].close()
    assert ends[1].receive() == {"last": True}
    with pytest.raises(Closed, match="is gone"):
        ends[1].receive()


def test_a_closed_end_is_noticed_by_both_sides(ends: tuple[Channel, Channel]) -> None:
    ends[1].close()
    ends[1].close()
    for act in (lambda: ends[0].send({}), ends[0].receive, lambda: ends[1].send({}), ends[1].receive):
        with pytest.raises(Closed):
            act()


def test_ready_names_the_channels_with_a_message_or_an_end(ends: tuple[Channel, Channel]) -> None:
    began = time.monotonic()
    assert ready(ends, 0.05) == []
    assert 0.04 < time.monotonic() - began < 1
    ends[0].send({})
    assert ready(ends, 1.0) == [ends[1]]
    ends[1].receive()
    ends[0].close()
    assert ready([ends[1]], 1.0) == [ends[1]]
    assert ready([], 0.0) == []


def test_two_pipes_are_a_channel_too() -> None:
    """As over SSH, whose standard input and output are two."""
    (in_a, out_b), (in_b, out_a) = os.pipe(), os.pipe()
    a = Channel(Connection(in_a, writable=False), Connection(out_a, readable=False))
    b = Channel(Connection(in_b, writable=False), Connection(out_b, readable=False))
    a.send({"to": "b"})
    b.send({"to": "a"})
    assert (a.receive(), b.receive()) == ({"to": "a"}, {"to": "b"})
    a.close()
    with pytest.raises(Closed):
        b.receive()
    b.close()


def test_who_hangs_amid_a_message_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel.of_socket(ours.detach(), patience_s=0.2)
    with theirs:
        theirs.sendall(b"\x00\x00\x00\x10half")  # of 16 bytes
        began = time.monotonic()
        with pytest.raises(Closed, match="hangs"):
            channel.receive()
        with pytest.raises(Closed, match="hangs"):
            channel.send({"more than": "x" * 10_000_000})  # and nobody reads
        assert time.monotonic() - began < 3
    channel.close()
