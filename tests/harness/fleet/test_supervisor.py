"""A supervisor with real workers: what it passes on, what it says of their ends, and that none outlives it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.fleet.channel import Channel, Closed, Message, ready
from harness.fleet.supervisor import HEARTBEAT_S
from tests.harness.fleet.crew import crew

WAIT_S = 10.0


@pytest.fixture(scope="module")
def one() -> Iterator[tuple[int, Channel]]:
    with crew(["device0"], patience_s=WAIT_S) as supervisors:
        yield supervisors["device0"]


@pytest.fixture
def mortal() -> Iterator[tuple[int, Channel]]:
    """A supervisor that does not survive its test."""
    with crew(["device0"], patience_s=WAIT_S) as supervisors:
        yield supervisors["device0"]


def start(channel: Channel, plan: str) -> None:
    """A new worker; what the one before has said is read."""
    while ready([channel], 0.0):
        channel.receive()
    job = {"device": "device0", "generation": 1, "host": "here", "plan": plan}
    channel.send({"run": {"plan": job}})


def until(channel: Channel, word: str) -> Any:
    """The next thing said under the word, by the supervisor or the worker."""
    give_up = time.monotonic() + WAIT_S
    while time.monotonic() < give_up:
        message = channel.receive()
        for said in (message, message.get("worker", {})):
            if word in said:
                return said[word]
    raise AssertionError(f"nobody said {word}")


def begin(channel: Channel, plan: str) -> int:
    """Bring a worker to where its part begins; returns its process id."""
    start(channel, plan)
    _, pid = until(channel, "listening")
    channel.send({"worker": {"peers": {}}})
    until(channel, "ready")
    channel.send({"worker": {"go": 0.0}})
    return pid


def gone(pid: int) -> bool:
    """Within a second: no such process, or only its exit code."""
    give_up = time.monotonic() + 1
    while time.monotonic() < give_up:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.005)
    return False


def test_a_worker_answers_and_ends(one: tuple[int, Channel]) -> None:
    _, channel = one
    pid = begin(channel, "answer")
    assert until(channel, "done")["losses"] == [1.0, 0.0]
    channel.send({"worker": {"close": True}})
    assert until(channel, "ended") == 0
    assert gone(pid)


def test_one_worker_after_the_other(one: tuple[int, Channel]) -> None:
    _, channel = one
    pids = set()
    for _ in range(5):
        pids.add(begin(channel, "answer"))
        until(channel, "done")
        channel.send({"worker": {"close": True}})
        assert until(channel, "ended") == 0
    assert len(pids) == 5


@pytest.mark.parametrize(
    ("plan", "code"),
    [("exit 3", 3), ("kill SIGKILL", -signal.SIGKILL), ("kill SIGSEGV", -signal.SIGSEGV), ("fail ValueError", 1)],
)
def test_it_says_how_a_worker_ended(one: tuple[int, Channel], plan: str, code: int) -> None:
    _, channel = one
    begin(channel, plan)
    began = time.monotonic()
    assert until(channel, "ended") == code
    assert time.monotonic() - began < 1


def test_what_a_worker_said_last_comes_before_its_end(one: tuple[int, Channel]) -> None:
    _, channel = one
    begin(channel, "fail ValueError")
    messages: list[Message] = []
    while not messages or "ended" not in messages[-1]:
        messages.append(channel.receive())
    assert [m["worker"]["failed"]["message"] for m in messages if "worker" in m] == ["it was so"]


def test_large_messages_pass(one: tuple[int, Channel]) -> None:
    _, channel = one
    begin(channel, "talk 5000000")
    assert len(until(channel, "said")) == 5_000_000


def test_its_heart_beats_while_there_is_a_worker(one: tuple[int, Channel]) -> None:
    _, channel = one
    begin(channel, "steps 3 0.4")
    beats = []
    while "worker" not in (message := channel.receive()):
        beats.append(message["alive"])
    assert len(beats) >= 4 and {beat["progress"] for beat in beats} >= {0, 1, 2}
    assert max(beat["silent_s"] for beat in beats) < 5 * HEARTBEAT_S


def test_a_stopped_worker_falls_silent_and_can_be_ended(one: tuple[int, Channel]) -> None:
    _, channel = one
    pid = begin(channel, "kill SIGSTOP")
    while until(channel, "alive")["silent_s"] < 4 * HEARTBEAT_S:
        pass
    channel.send({"stop": True})
    assert until(channel, "ended") == -signal.SIGKILL
    assert gone(pid)


def test_long_c_code_is_no_silence(one: tuple[int, Channel]) -> None:
    """Under a small quota loading a plan may keep the thread that beats waiting for seconds."""
    _, channel = one
    began = time.monotonic()
    begin(channel, "compute 3000000")
    loudest = 0.0
    while "worker" not in (message := channel.receive()):
        loudest = max(loudest, message["alive"]["silent_s"])
    assert "done" in message["worker"] and time.monotonic() - began > 4 * HEARTBEAT_S
    assert loudest < 3 * HEARTBEAT_S


def test_a_new_job_ends_the_worker_before(one: tuple[int, Channel]) -> None:
    _, channel = one
    first = begin(channel, "steps 1 20")
    second = begin(channel, "answer")
    assert second != first and gone(first)
    assert until(channel, "done")["losses"] == [1.0, 0.0]


def test_to_stop_nobody_is_no_matter(one: tuple[int, Channel]) -> None:
    _, channel = one
    channel.send({"stop": True})
    channel.send({"worker": {"late": True}})
    begin(channel, "answer")
    until(channel, "done")


def test_the_coordinators_death_ends_supervisor_and_worker(mortal: tuple[int, Channel]) -> None:
    supervisor, channel = mortal
    pid = begin(channel, "steps 1 20")
    channel.close()
    assert gone(pid) and gone(supervisor)


def test_a_worker_dies_with_its_supervisor(mortal: tuple[int, Channel]) -> None:
    supervisor, channel = mortal
    pid = begin(channel, "steps 1 20")
    os.kill(supervisor, signal.SIGKILL)
    assert gone(pid)
    with pytest.raises(Closed):
        until(channel, "done")
