"""Leads the workers of all devices through a run, and says at once which device failed, and of what."""

from __future__ import annotations

import contextlib
import secrets
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from harness.engine import DeviceReport
from harness.errors import Broken, OrreryError, Unsupported
from harness.faults import HEARTBEAT_TIMEOUT_S, Fault
from harness.fleet.channel import Channel, Closed, Message, ready
from harness.fleet.job import REPORT, Job
from harness.fleet.probe import ComputeProbe, LinkProbe

#: After the first bad news: how long the others have to tell theirs, which may be the cause.
GRACE_S = 0.3
#: How long a killed worker may take to be gone.
FAREWELL_S = 5.0


#: (epochs, digest of each device's state).
Saved = Callable[[int, Mapping[str, str]], None]


@dataclass(frozen=True)
class Agreed:
    """A snapshot that all devices have: after so many rounds, with the loss of each of them."""

    trained: int
    losses: tuple[float, ...]


class Recovers(Protocol):
    """What goes on where a device is lost, and the run is not over with it."""

    def struck(self, fault: Fault, at: float) -> bool:
        """What was asked for happens, at that time of `time.monotonic`. Returns whether the device can't be heard any
        more."""
        ...

    def turn(self, agreed: Agreed, seconds: Mapping[str, float]) -> Sequence[Job] | None:
        """All devices have a snapshot. The jobs of the next generation where the run goes on from it with others, or
        otherwise; None: it just goes on. `seconds`: what each computed in the round before."""
        ...

    def recover(self, lost: Lost, agreed: Agreed | None) -> Sequence[Job]:
        """The jobs of the next generation, of the devices that are left, which go back to what is `agreed`. Raises
        where there is no way."""
        ...

    def regrouped(self) -> None:
        """They are about to begin."""
        ...


class Lost(Broken):
    """A device is gone or has failed: the run is over. `device` names it, `exit_code` is its worker's if it ended."""

    def __init__(self, device: str, cause: str, exit_code: int | None = None) -> None:
        super().__init__(f"{device}: {cause}")
        self.device, self.exit_code = device, exit_code


class _Turn(Exception):
    """From a snapshot on the run goes on with a new generation, and nobody is lost."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__("a new generation")
        self.jobs = jobs


class _Remote(Exception):
    """The traceback of a worker, shown as the cause of what is raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class _Bad:
    """One device's bad news."""

    device: str
    cause: str
    secondary: bool = False
    exit_code: int | None = None
    failed: Message | None = None

    def error(self) -> Exception:
        """What to raise for it: what a worker can't do or read is no crash."""
        if self.failed is not None and self.failed["unsupported"]:
            return Unsupported(self.failed["message"])
        if self.failed is not None and self.failed["refused"]:
            return OrreryError(f"{self.device}: {self.failed['message']}")
        return Lost(self.device, self.cause, self.exit_code)


@dataclass
class Fleet:
    """The supervisors of all devices, by device, in rank order. Runs one plan after the other.

    One that is not heard of for the timeout is lost.
    `gone` are devices whose supervisor is gone, or may be. `broken` says that nothing can run here any more.
    """

    supervisors: dict[str, Channel]
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    generation: int = 0
    gone: set[str] = field(default_factory=set)
    broken: bool = False

    def run(
        self,
        jobs: Sequence[Job],
        stall_s: float,
        begun: Callable[[float], None] = lambda origin: None,
        meanwhile: Callable[[], None] = lambda: None,
        saved: Saved = lambda epochs, digests: None,
        recovers: Recovers | None = None,
    ) -> list[DeviceReport]:
        """Run a plan's jobs, one per device. `stall_s`: no iteration takes so long, unless something is wrong.

        `begun(origin)` is called when the clock has started, `meanwhile()` now and then from then on, and
        `saved(epochs, digests)` when every device has written its state after so many epochs. Raises Lost when
        a worker or supervisor dies, fails or hangs, and Unsupported or OrreryError where a worker did; every worker is
        gone then, too. With `recovers` Lost is for it to deal with: the reports are of those that are there in the end.
        """
        jobs_of = {job.device: {"plan": asdict(job)} for job in jobs}
        done = self._lead(jobs_of, "done", stall_s, begun, meanwhile, saved, recovers)
        return [REPORT.validate_python(done[device]) for device in self.supervisors if device in done]

    def probe(self, probes: Mapping[str, ComputeProbe | LinkProbe], stall_s: float) -> dict[str, dict[str, float]]:
        """Measure on several devices at once; answers by device. Raises like `run`."""
        names = {ComputeProbe: "compute", LinkProbe: "links"}
        messages = {device: {"probe": {names[type(probe)]: asdict(probe)}} for device, probe in probes.items()}
        return self._lead(messages, "probed", stall_s)

    def _lead(
        self,
        messages: Mapping[str, Message],
        result: str,
        stall_s: float,
        begun: Callable[[float], None] = lambda origin: None,
        meanwhile: Callable[[], None] = lambda: None,
        saved: Saved = lambda epochs, digests: None,
        recovers: Recovers | None = None,
    ) -> dict[str, Any]:
        """Workers from fork to exit, through all generations; what each says under the word `result`."""
        channels = {device: self.supervisors[device] for device in messages}
        run = _Run(self, channels, stall_s, saved, recovers)
        try:
            for device, message in messages.items():
                run.tell_supervisor(device, {"run": message})
            while True:
                try:
                    return self._generation(run, result, begun, meanwhile)
                except Lost as lost:
                    if recovers is None:
                        raise
                    run.regroup(recovers.recover(lost, run.agreed))
                except _Turn as turn:
                    run.regroup(turn.jobs)
        finally:
            run.end()

    @staticmethod
    def _generation(
        run: _Run, result: str, begun: Callable[[float], None], meanwhile: Callable[[], None]
    ) -> dict[str, Any]:
        """From the workers' first word to their last."""
        said = run.gather("listening", "ready")
        if addresses := {device: m["listening"] for device, m in said.items() if "listening" in m}:
            run.tell_all({"peers": addresses})
            run.gather("ready")
        origin = time.perf_counter()
        if run.recovers is not None:
            run.recovers.regrouped()
        run.tell_all({"go": origin})
        begun(origin)
        answers = {device: message[result] for device, message in run.gather(result, meanwhile=meanwhile).items()}
        run.tell_all({"close": True})
        return answers

    def new_generation(self) -> tuple[int, str]:
        """A generation that was never used, and its secret."""
        self.generation += 1
        return self.generation, secrets.token_hex(32)

    def close(self) -> None:
        """The supervisors end, and their workers with them."""
        for channel in self.supervisors.values():
            channel.close()


class _Run:
    """One generation: what each worker has said so far, and whether it still lives."""

    def __init__(
        self,
        fleet: Fleet,
        channels: Mapping[str, Channel],
        stall_s: float,
        saved: Saved,
        recovers: Recovers | None = None,
    ) -> None:
        self.fleet, self.channels, self.stall_s, self.saved = fleet, dict(channels), stall_s, saved
        self.recovers = recovers
        self.agreed: Agreed | None = None
        self.unheard: set[str] = set()
        self.generation = fleet.generation
        self.digests: dict[int, dict[str, str]] = defaultdict(dict)
        self.device_of = {id(channel): device for device, channel in channels.items()}
        now = time.monotonic()
        self.heard = dict.fromkeys(channels, now)
        self.moved = dict.fromkeys(channels, now)
        self.progress = dict.fromkeys(channels, 0)
        self.alive = dict.fromkeys(channels, True)
        self.closing = False
        self.said: dict[str, list[Message]] = {device: [] for device in channels}
        self.bad: list[_Bad] = []
        #: When a worker first said that it had lost a peer, and what it said.
        self.lost_peer: tuple[float, _Bad] | None = None

    def regroup(self, jobs: Sequence[Job]) -> None:
        """The next generation of workers: in the same processes, and new ones of devices that join."""
        members = [job.device for job in jobs]
        for device in set(self.channels).difference(members):
            self.fleet.gone.add(device)
            self.alive[device] = False
            with contextlib.suppress(Closed):
                self.channels[device].send({"stop": True})
        before, now = self.channels, time.monotonic()
        self.channels = {device: self.fleet.supervisors[device] for device in members}
        self.device_of = {id(channel): device for device, channel in self.channels.items()}
        self.generation, self.bad, self.lost_peer = jobs[0].generation, [], None
        self.heard, self.moved = dict.fromkeys(members, now), dict.fromkeys(members, now)
        self.progress = {device: self.progress.get(device, 0) for device in members}
        self.said = {device: [] for device in members}
        for job in jobs:
            if job.device in before:
                self.tell_supervisor(job.device, {"worker": {"regroup": asdict(job)}})
            else:
                self.alive[job.device] = True
                self.unheard.discard(job.device)
                self.tell_supervisor(job.device, {"run": {"plan": asdict(job)}})

    def tell_supervisor(self, device: str, message: Message) -> None:
        try:
            self.channels[device].send(message)
        except Closed as closed:
            self._supervisor_gone(device, closed)
            if self.bad:
                self._fail()

    def tell_all(self, message: Message) -> None:
        self.closing = self.closing or "close" in message
        for device in self.channels:
            self.tell_supervisor(device, {"worker": message})

    def gather(self, *words: str, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Message]:
        """Wait until every worker has said one of the words; a barrier on the way is passed together."""
        while True:
            found = {device: m for device, said in self.said.items() for m in said if any(word in m for word in words)}
            if len(found) == len(self.said):
                return found
            if all(said and "reached" in said[-1] for said in self.said.values()):
                self._agree({device: said.pop()["reached"] for device, said in self.said.items()})
                self.tell_all({"proceed": True})
            self._listen(0.05)
            if self.bad:
                self._fail()
            self._check_silence()
            meanwhile()

    def _agree(self, reached: Mapping[str, Any]) -> None:
        """Where the barrier is one at which a snapshot counts from now on, remember it, and turn if that is wanted."""
        if not all(isinstance(about, dict) for about in reached.values()):
            return
        losses = tuple(map(sum, zip(*(about["losses"] for about in reached.values()), strict=True)))
        self.agreed = Agreed(next(iter(reached.values()))["trained"], losses)
        if self.recovers is None:
            return
        jobs = self.recovers.turn(self.agreed, {device: about["seconds"] for device, about in reached.items()})
        if jobs is not None:
            raise _Turn(jobs)

    def end(self) -> None:
        """Every worker is gone when this returns."""
        limit = time.monotonic() + FAREWELL_S
        if self.closing and not self.bad:
            patience = time.monotonic() + 1.0  # they were told to close, and are on their way out
            while any(self.alive.values()) and time.monotonic() < patience:
                self._listen(0.02)
        self.closing = True
        for device, channel in self.channels.items():
            if self.alive[device]:
                try:
                    channel.send({"stop": True})
                except Closed as closed:
                    self._supervisor_gone(device, closed)
        while any(self.alive.values()) and time.monotonic() < limit:
            self._listen(0.02)
        self.fleet.broken = self.fleet.broken or any(self.alive.values())

    def _listen(self, timeout_s: float) -> None:
        """Take in what has come; one message per device."""
        listening = [c for device, c in self.channels.items() if self.alive[device]]
        for channel in ready(listening, timeout_s):
            device = self.device_of[id(channel)]
            try:
                message = channel.receive()
            except Closed as closed:
                if device in self.unheard:
                    self.alive[device] = False
                else:
                    self._supervisor_gone(device, closed)
                continue
            if device not in self.unheard:
                self.heard[device] = time.monotonic()
                self._take(device, message)

    def _take(self, device: str, message: Message) -> None:
        if "ended" in message:
            self.alive[device] = False
            if not self.closing and all(bad.device != device for bad in self.bad):  # else it has told why
                self.bad.append(_Bad(device, _how(message["ended"]), exit_code=message["ended"]))
        elif "alive" in message:
            self._pulse(device, message["alive"])
        elif message["worker"].get("generation", self.generation) != self.generation:
            return  # of a generation that is over
        elif "fault" in message["worker"]:
            assert self.recovers is not None
            about = dict(message["worker"]["fault"])
            at = about.pop("at")
            if self.recovers.struck(Fault(**about), at):
                self.unheard.add(device)
        elif "lost" in message["worker"]:
            if self.lost_peer is None:
                self.lost_peer = time.monotonic(), _Bad(device, message["worker"]["lost"])
        elif "failed" in message["worker"]:
            failed = message["worker"]["failed"]
            cause = f"{failed['kind']}: {failed['message']}"
            self.bad.append(_Bad(device, cause, failed["secondary"], failed=failed))
        elif "saved" in message["worker"]:
            self._saved(device, **message["worker"]["saved"])
        else:
            self.said[device].append(message["worker"])
            self.moved[device] = time.monotonic()

    def _saved(self, device: str, epochs: int, digest: str) -> None:
        """An epoch counts when the last device has written its state."""
        self.moved[device] = time.monotonic()
        self.digests[epochs][device] = digest
        if len(self.digests[epochs]) == len(self.channels):
            self.saved(epochs, self.digests.pop(epochs))

    def _pulse(self, device: str, alive: Message) -> None:
        if alive["progress"] != self.progress[device]:
            self.progress[device] = alive["progress"]
            self.moved[device] = time.monotonic()
        if alive["silent_s"] > self.fleet.heartbeat_timeout_s and not self.closing:
            cause = f"its worker hangs: no sign of life for {alive['silent_s']:.1f} s"
            self.bad.append(_Bad(device, cause))

    def _check_silence(self) -> None:
        now = time.monotonic()
        if self.lost_peer is not None and now - self.lost_peer[0] > self.fleet.heartbeat_timeout_s + GRACE_S:
            self.bad.append(self.lost_peer[1])  # all can be heard: it is no device that is lost
        for device, heard in self.heard.items():
            if now - heard > self.fleet.heartbeat_timeout_s:
                self.bad.append(_Bad(device, f"its supervisor has been silent for {now - heard:.1f} s"))
        if not self.bad and now - max(self.moved.values()) > self.stall_s:
            device = min(self.progress, key=self.progress.__getitem__)
            self.bad.append(
                _Bad(device, f"nothing has moved for {self.stall_s:.0f} s, in iteration {self.progress[device] + 1}")
            )
        if self.bad:
            self._fail()

    def _supervisor_gone(self, device: str, closed: Closed) -> None:
        self.alive[device] = False
        self.fleet.gone.add(device)
        if not self.closing:
            self.bad.append(_Bad(device, f"its supervisor {closed}"))

    def _fail(self) -> None:
        """Hear the others out, then name the cause: who only lost a peer is not it."""
        limit = time.monotonic() + (GRACE_S if self.recovers is None else 0.0)
        while (left := limit - time.monotonic()) > 0 and any(self.alive.values()):
            self._listen(left)
        cause = min(self.bad, key=lambda bad: bad.secondary)
        raise cause.error() from (_Remote(cause.failed["traceback"]) if cause.failed else None)


def _how(exit_code: int) -> str:
    if exit_code < 0:
        return f"its worker was killed by {signal.Signals(-exit_code).name}"
    return f"its worker ended with exit code {exit_code}"
