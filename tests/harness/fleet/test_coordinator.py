"""A fleet of real processes: what it answers, and whom it blames, in which words, how soon."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from harness.errors import OrreryError, Unsupported
from harness.fleet import coordinator
from harness.fleet.coordinator import Fleet, Lost, Saved
from harness.fleet.job import Job
from tests.harness.fleet.crew import crew

#: No iteration of a test takes so long.
STALL_S = 20.0
TIMEOUT_S = 0.8


@dataclass(frozen=True)
class Crew:
    fleet: Fleet
    pids: dict[str, int]

    def run(
        self, *parts: str, stall_s: float = STALL_S, saved: Saved = lambda epochs, digests: None
    ) -> list[tuple[float, ...]]:
        """Every device's part, in rank order; what they answer."""
        generation, secret = self.fleet.new_generation()
        jobs = [
            Job(device, part, {}, "", generation, secret, "127.0.0.1")
            for device, part in zip(self.fleet.supervisors, parts, strict=True)
        ]
        return [report.losses for report in self.fleet.run(jobs, stall_s, saved=saved)]


class Crews(contextlib.ExitStack):
    """One crew for many tests, and another one where a test has broken it."""

    def __init__(self) -> None:
        super().__init__()
        self.crew: Crew | None = None

    def whole(self) -> Crew:
        if self.crew is None or self.crew.fleet.broken or self.crew.fleet.gone:
            self.close()
            supervisors = self.enter_context(crew(["device0", "device1", "device2"], patience_s=TIMEOUT_S))
            fleet = Fleet({name: channel for name, (_, channel) in supervisors.items()}, TIMEOUT_S)
            self.crew = Crew(fleet, {name: pid for name, (pid, _) in supervisors.items()})
        return self.crew


@pytest.fixture(scope="module")
def crews() -> Iterator[Crews]:
    with Crews() as crews:
        yield crews


@pytest.fixture
def three(crews: Crews) -> Crew:
    return crews.whole()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def works(three: Crew) -> bool:
    """Whether a run succeeds: (generation, number of peers) from each."""
    answers = three.run("answer", "answer", "answer")
    return answers == [(three.fleet.generation, 3.0)] * 3


def test_run_after_run_each_of_its_own_generation(three: Crew) -> None:
    before = three.fleet.generation
    for generation in (before + 1, before + 2, before + 3):
        assert three.run("answer", "steps 3 0.02", "answer") == [(generation, 3.0)] * 3
    assert not three.fleet.broken


def test_secrets_are_long_and_never_used_twice(three: Crew) -> None:
    made = [three.fleet.new_generation() for _ in range(20)]
    assert [generation - made[0][0] for generation, _ in made] == list(range(20))
    assert len({secret for _, secret in made}) == 20 and {len(secret) for _, secret in made} == {64}


@pytest.mark.parametrize(
    ("part", "cause", "exit_code"),
    [
        ("exit 3", "its worker ended with exit code 3", 3),
        ("early exit 0", "its worker ended with exit code 0", 0),
        ("kill SIGKILL", "its worker was killed by SIGKILL", -signal.SIGKILL),
        ("early kill SIGABRT", "its worker was killed by SIGABRT", -signal.SIGABRT),
        ("fail ValueError", "ValueError: it was so", None),
    ],
)
def test_a_dead_worker_is_named_within_a_second(three: Crew, part: str, cause: str, exit_code: int | None) -> None:
    with within(1.0), pytest.raises(Lost) as lost:
        three.run("steps 1 15", part, "steps 1 15")
    assert str(lost.value) == f"device1: {cause}"
    assert (lost.value.device, lost.value.exit_code) == ("device1", exit_code)
    assert not three.fleet.broken and works(three)


def test_the_cause_counts_not_who_came_first(three: Crew) -> None:
    """Neighbours lose their peer, and may say so before the peer's own news arrive."""
    with within(1.0), pytest.raises(Lost, match=r"^device2: RuntimeError: it was so$") as lost:
        three.run("fail PeerLost", "fail PeerLost", "fail RuntimeError 0.15")
    assert "Traceback: line 7" in str(lost.value.__cause__), "the worker's own"
    with within(1.0), pytest.raises(Lost, match=r"^device1: its worker was killed by SIGKILL$"):
        three.run("fail PeerLost", "kill SIGKILL", "fail PeerLost")


def test_a_lost_peer_is_the_cause_where_there_is_no_other(three: Crew) -> None:
    with pytest.raises(Lost, match=r"^device0: PeerLost: it was so$"):
        three.run("fail PeerLost", "steps 1 15", "steps 1 15")


def test_what_a_worker_cannot_do_or_read_is_no_crash(three: Crew) -> None:
    with pytest.raises(Unsupported, match=r"^it was so$"):
        three.run("steps 1 15", "fail Unsupported", "fail PeerLost")
    with pytest.raises(OrreryError, match=r"^device1: it was so$"):
        three.run("steps 1 15", "early fail OrreryError", "fail PeerLost")
    assert works(three)


def test_a_worker_that_hangs_is_named(three: Crew) -> None:
    with within(TIMEOUT_S + 2), pytest.raises(Lost, match=r"^device2: its worker hangs: no sign of life for 0\.\d s$"):
        three.run("steps 1 15", "steps 1 15", "kill SIGSTOP")
    assert works(three)


def test_a_standstill_names_who_is_behind(three: Crew) -> None:
    """All are alive, and nothing moves: a dead lock."""
    with within(4), pytest.raises(Lost, match=r"^device1: nothing has moved for 1 s, in iteration 1$"):
        three.run("steps 15 0.05", "barriers 3 0", "steps 4 0.05", stall_s=1)
    assert works(three)


def test_slow_steps_are_no_standstill(three: Crew) -> None:
    assert len(three.run("steps 3 0.6", "answer", "answer", stall_s=1)) == 3


def test_barriers_are_passed_together(three: Crew) -> None:
    with within(3):
        three.run("barriers 3 0.1", "barriers 3 0", "barriers 3 0.05")


def test_a_dead_supervisor_is_gone_and_no_other(three: Crew) -> None:
    timer = threading.Timer(0.3, os.kill, (three.pids["device1"], signal.SIGKILL))
    timer.start()
    with within(1.5), pytest.raises(Lost, match=r"^device1: its supervisor is gone$"):
        three.run("steps 1 15", "steps 1 15", "steps 1 15")
    timer.join(5)
    assert three.fleet.gone == {"device1"} and not three.fleet.broken
    os.kill(three.pids["device0"], 0)  # lives


def test_a_stopped_supervisor_is_silent(three: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "FAREWELL_S", 0.5)
    timer = threading.Timer(0.3, os.kill, (three.pids["device1"], signal.SIGSTOP))
    timer.start()
    try:
        with within(4), pytest.raises(Lost, match=r"^device1: its supervisor has been silent for \d\.\d s$"):
            three.run("steps 1 15", "steps 1 15", "steps 1 15")
        assert three.fleet.broken
    finally:
        timer.join(5)
        os.kill(three.pids["device1"], signal.SIGCONT)


def test_a_supervisor_that_stopped_between_runs_is_not_waited_for(three: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that does not fit into the kernel's buffer would be written for ever."""
    monkeypatch.setattr(coordinator, "FAREWELL_S", 0.5)
    os.kill(three.pids["device0"], signal.SIGSTOP)
    try:
        with within(5), pytest.raises(Lost, match=r"^device0: its supervisor hangs$"):
            three.run("answer" + " " * 3_000_000, "answer", "answer")
    finally:
        os.kill(three.pids["device0"], signal.SIGCONT)


def test_interrupted_no_worker_goes_on(three: Crew) -> None:
    """Ctrl-C in the middle of a run: every worker is gone when it is over, and the supervisors live."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    jobs = [Job(device, "steps 1 15", {}, "", 1, "", "127.0.0.1") for device in three.fleet.supervisors]
    with within(2), pytest.raises(KeyboardInterrupt):
        three.fleet.run(jobs, STALL_S, meanwhile=interrupt)
    assert works(three)


def test_the_clock_starts_when_all_are_ready(three: Crew) -> None:
    origins: list[float] = []
    jobs = [Job(device, "steps 1 0.1", {}, "", 1, "", "127.0.0.1") for device in three.fleet.supervisors]
    before = time.perf_counter()
    three.fleet.run(jobs, STALL_S, begun=origins.append)
    assert before < origins[0] < time.perf_counter() - 0.1


def test_an_epoch_counts_when_every_device_has_written_its_state(three: Crew) -> None:
    counted: list[tuple[int, set[str]]] = []
    three.run("save 3", "save 2", "save 4", saved=lambda epochs, digests: counted.append((epochs, set(digests))))
    assert counted == [(1, set(three.pids)), (2, set(three.pids))]
