"""Emulated mode: the plan for real, one worker process per device, on this machine shaped to behave like the testbed.

On a `loopback` testbed nothing is shaped: that is for correctness, on any machine and without any right.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness import datasets, evaluation, reference, samples
from harness.cluster import Cluster
from harness.costs import Costs
from harness.engine import DeviceReport, Execution, check_samples, execution
from harness.engine.checkpoint import Progress, epoch_ends, file_digest
from harness.errors import OrreryError, OutOfMemory, Unsupported
from harness.faults import CUT, JOIN, LEAVE, SLOW, Fault, joining
from harness.fleet.coordinator import Agreed, Lost
from harness.fleet.job import (
    SAMPLES,
    WEIGHTS,
    Job,
    answers,
    trained,
    trained_buffers,
    trained_parameters,
    trained_pieces,
)
from harness.manifest import identity
from harness.models import shards
from harness.plan import Load, Plan, Store
from harness.plan.actions import COMPUTE
from harness.plan.serial import to_json
from harness.profile.measure import LOCAL, on_this_machine
from harness.recovery import Membership
from harness.registry import Finding
from harness.resume import Committed, Journal
from harness.samples import Dataset
from harness.simulator import estimate, own_seconds
from harness.workload import Workload
from testbeds.emulation import calibration, cgroups, leftovers, namespaces, shaping
from testbeds.emulation.calibration import Cores, Links
from testbeds.emulation.machine import Machine
from testbeds.emulation.quota import quota_for
from testbeds.emulation.rescue import Replan, Rescue
from testbeds.emulation.setting import PACED_HEADROOM, Setting, decide, speeds
from testbeds.library import PACED, QUOTA, Event, Testbed

LOOPBACK = "loopback"
MOST_LOCAL = 32
#: What a worker may have beside its tensors: Python's own objects, threads, buffers of sockets. Assumed, not measured.
PROCESS_BYTES = 96 * 2**20
#: An iteration that takes so much longer than simulated has stopped.
STALL_FACTOR, STALL_S = 20.0, 60.0
RIGHTS = "Run as root, or use a local-N testbed, which needs no rights."
#: Rows of the pass by which a board's speed is compared with this machine's.
PROFILED_ROWS = 2


@contextlib.contextmanager
def opened(testbed: Testbed) -> Iterator[Callable[..., Execution]]:
    """The testbed, for as many runs as wanted. Raises OrreryError where this machine can't be it."""
    if testbed.medium != LOOPBACK and testbed.cluster.duplex != "full":
        duplex = testbed.cluster.duplex
        raise Unsupported(f"links with duplex {duplex!r} are simulated only: the switch here is full duplex")
    if testbed.medium == LOOPBACK and len(testbed.cluster.devices) > MOST_LOCAL:
        raise OrreryError(
            f"{testbed.name} would start {len(testbed.cluster.devices)} processes here, and {MOST_LOCAL} are the most. "
            "Choose a smaller one, or mode simulated."
        )
    with leftovers.only_one() as lock, leftovers.folder() as folder:
        emulation = Emulation(testbed, folder, lock)
        try:
            yield emulation.execute
        finally:
            emulation.close()


def examine(testbed: Testbed) -> list[Finding]:
    """What stands in the way of emulating the testbed here."""
    if testbed.medium == LOOPBACK and not testbed.own_memory:
        return [Finding("emulation", True, "unshaped: needs no rights")]
    limits = cgroups.available()
    found = []
    if testbed.computing == QUOTA:
        found.append(Finding("cpu limit", limits.cpu, "control groups" if limits.cpu else limits.why, RIGHTS))
    if testbed.own_memory:
        found.append(Finding("memory limit", limits.memory, "control groups" if limits.memory else limits.why, RIGHTS))
    for program in ("ip", "tc", "nsenter"):
        try:
            found.append(Finding(program, True, namespaces.program(program)))
        except OrreryError as error:
            found.append(Finding(program, False, "not installed", str(error)))
    try:
        by = "netem" if shaping.has_netem() else "the transport, for this kernel has no netem"
        found.append(Finding("network namespaces", True, f"latency is added by {by}"))
    except OrreryError as error:
        found.append(Finding("network namespaces", False, str(error), RIGHTS))
    return found


class Emulation:
    """A testbed on this machine: its processes, what it is set to, and the files that workers read."""

    def __init__(self, testbed: Testbed, folder: Path, lock: Path) -> None:
        self.testbed, self.folder, self.lock = testbed, folder, lock
        self.shaped = testbed.medium != LOOPBACK
        self.paced = self.shaped and testbed.computing == PACED
        self.quota = self.shaped and testbed.computing == QUOTA
        self.machine: Machine | None = None
        self.setting: Setting | None = None
        self.cores: Cores | None = None
        self.links: Links | None = None
        self.prepared: tuple[Workload, Path | None] | None = None
        self.dataset: Dataset | None = None
        self.generation, self.secret = 0, ""
        self.oom_kills: dict[str, int] = {}

    def execute(
        self,
        plan: Plan,
        workload: Workload,
        costs: Costs,
        data_dir: Path | None = None,
        verify: bool = False,
        evaluate: bool = False,
        keep_trained: bool = False,
        cache_dir: Path | None = None,
        journal: Journal | None = None,
        faults: Sequence[Fault] = (),
        replan: Replan | None = None,
    ) -> Execution:
        """Run the plan. With `verify` the same is done on one device, and the distance of the two is given; with
        `evaluate` the metric of what was trained, on samples that it has not seen. Neither is in any time.

        With `keep_trained` the parameters that were trained are given, too.

        `faults` are what is to happen to devices. Where the plan takes snapshots, and there is a `replan`, a lost
        device is not the end, and others may join.

        `cache_dir` is where activation caches are kept. With a journal the run goes on where it was killed, and its
        state is kept. Raises OutOfMemory for a device over its limit, Broken (a failed row) for one that is lost.
        """
        whole = plan
        asked = self._decide(workload, costs)
        machine = self._machine()
        dataset = self._prepare(workload, data_dir)
        committed = None if journal is None else self._committed(journal)
        done = Progress()
        if committed is not None:
            ends = epoch_ends(plan, workload)
            done = next(progress for progress in ends.values() if progress.epochs == committed.epochs)
            plan = replace(plan, phases=plan.phases[done.phases :])
        machine.ready()
        setting = self._set(machine, asked)
        dilation = setting.dilation if setting else 1.0
        save = verify or evaluate or keep_trained
        make = partial(self._jobs, machine, setting, workload, costs, save)
        rescue = self._rescue(machine, plan, costs, make, faults, replan, done.trained)
        kept = {**self._kept(plan, workload, cache_dir, journal), "done": asdict(done)}
        jobs = [
            replace(
                job,
                state_digest=None if committed is None else committed.digests[job.device],
                recovers=rescue is not None,
                **kept,
            )
            for job in make(plan, faults, {})
        ]
        iteration = max(max(p.iteration_s) for p in estimate(plan, costs, self.testbed.cluster).phases)
        events = _Events(machine, self.testbed.events, dilation, self.links)
        try:
            reports = machine.fleet.run(
                jobs,
                STALL_S + STALL_FACTOR * iteration * dilation,
                events.begun,
                events.happen,
                recovers=rescue,
                **({} if journal is None else {"saved": journal.commit}),
            )
        except Lost as lost:
            self._explain(machine, lost, plan, costs)
            raise
        finally:
            events.undo()
        about = self._about(reports)
        if recomputed := {report.device: report.recomputed for report in reports if report.recomputed}:
            about["recomputed_cache_entries"] = recomputed
        if rescue is not None:
            rescue.check()
            plan, whole = rescue.last.plan, rescue.whole(whole)
        found = replace(
            execution(plan, reports, workload.training, dilation),
            emulation=about,
            resumed_after_epoch=None if committed is None else committed.epochs,
        )
        if rescue is not None and rescue.last.plan is not rescue.plan:
            found = replace(
                found,
                recoveries=rescue.recoveries(reports, dilation),
                whole_s=rescue.whole_s(reports, dilation),
            )
        if evaluate or keep_trained:
            parameters = trained_parameters(workload, self.folder, plan.devices)
            if keep_trained:
                found = replace(found, trained=parameters)
            if evaluate:
                after = {**parameters, **trained_buffers(workload, self.folder, plan.devices)}
                tuned = evaluation.whole(workload, self.folder / WEIGHTS, after)
                found = replace(found, metric=evaluation.evaluate(workload, tuned, data_dir))
        if not verify:
            return found
        if not workload.training:
            given = answers(self.folder, self.generation, plan.devices)
            model = evaluation.whole(workload, self.folder / WEIGHTS, {})
            return replace(found, max_rel_error=evaluation.max_rel_error(workload, model, dataset, given))
        wanted = reference.train(whole, workload, dataset)
        adaptive = workload.optimizer == "adamw"
        errors = [
            reference.max_rel_error(
                trained(self.folder, device), wanted.state(), adaptive, trained_pieces(self.folder, device)
            )
            for device in plan.devices
        ]
        return replace(found, max_rel_error=max(errors))

    def _rescue(
        self,
        machine: Machine,
        plan: Plan,
        costs: Costs,
        make: Callable[[Plan, Sequence[Fault], Mapping[str, float]], Sequence[Job]],
        faults: Sequence[Fault],
        replan: Replan | None,
        began: int,
    ) -> Rescue | None:
        """What leads the run on where devices change; None where the plan takes no snapshots."""
        if replan is None or not any(phase.commits for phase in plan.phases):
            return None
        if not self.shaped and any(fault.kind in (CUT, SLOW) for fault in faults):
            raise OrreryError(
                f"On {self.testbed.name} devices have neither links nor a speed of their own, so that none can be cut "
                "off or become slow. Choose a testbed that is shaped, or mode simulated."
            )

        def jobs(
            plan: Plan,
            agreed: Agreed | None,
            restore: Mapping[str, Sequence[str]],
            left: Sequence[Fault],
            slowness: Mapping[str, float],
        ) -> list[Job]:
            losses = () if agreed is None else agreed.losses
            return [
                replace(
                    job,
                    done=asdict(Progress(trained=len(losses))),
                    recovers=True,
                    follows=True,
                    losses=losses if number == 0 else [0.0] * len(losses),
                    restore=tuple(restore.get(job.device, ())),
                )
                for number, job in enumerate(make(plan, left, slowness))
            ]

        def expected(plan: Plan, cluster: Cluster) -> list[dict[str, float]]:
            phases = own_seconds(plan, costs, cluster)
            return [{device: sum(seconds.values()) for device, seconds in phase.items()} for phase in phases]

        def slow(device: str, factor: float) -> None:
            if self.cores is not None:
                machine.order("cpu", device, quota=quota_for(self.cores.shares[device] / factor))

        def prepare(device: str) -> None:
            if device in machine.fleet.gone:
                self._restart(machine, device)
                slow(device, 1.0)

        return Rescue(
            plan,
            replan,
            faults,
            Membership(self.testbed.cluster, joining(faults)),
            jobs,
            cut=lambda device: machine.order("link", device, up=False),
            slow=slow,
            fence=machine.kill,
            prepare=prepare,
            expected=expected if self.shaped else None,
            began=began,
        )

    def close(self) -> None:
        if self.machine is not None:
            self.machine.close()
            self.machine = None

    def _prepare(self, workload: Workload, data_dir: Path | None) -> Dataset:
        """The files that workers read: the model's weights, each takes its own, and the samples."""
        if self.dataset is None or self.prepared != (workload, data_dir):
            self.prepared = None
            self.dataset = datasets.load(workload, data_dir)
            check_samples(workload, self.dataset)
            shards.write(workload, self.folder / WEIGHTS)
            samples.save(self.dataset, self.folder / SAMPLES)
            self.prepared = workload, data_dir
        return self.dataset

    def _committed(self, journal: Journal) -> Committed | None:
        """Where the run can go on, if what it began with is still the same."""
        journal.add({"weights": file_digest(self.folder / WEIGHTS), "samples": file_digest(self.folder / SAMPLES)})
        return journal.committed()

    def _kept(self, plan: Plan, workload: Workload, cache_dir: Path | None, journal: Journal | None) -> dict[str, Any]:
        """What a job says of files that outlive it."""
        lists = (actions for phase in plan.phases for actions in phase.actions.values())
        stores = any(isinstance(action, Load | Store) for actions in lists for action in actions)
        cache = cache_dir or (None if journal is None else journal.cache)
        return {
            "identity": identity(workload, self.folder / WEIGHTS) if stores else {},
            "cache": None if cache is None else str(cache.absolute()),
            "state": None if journal is None else str(journal.folder.absolute()),
        }

    def _machine(self) -> Machine:
        """The processes, on their way up; new ones for those that were lost in the last run."""
        if self.machine is not None and self.machine.broken:
            self.close()
            self.setting = self.cores = self.links = None
            self.oom_kills.clear()
        if self.machine is not None:
            for device in sorted(self.machine.fleet.gone):
                self._restart(self.machine, device)
        if self.machine is None:
            limited = self.quota or bool(self.testbed.own_memory)
            self.machine = Machine(
                self.testbed.cluster.names,
                self.shaped,
                limited,
                [self.folder, self.lock],
                self.testbed.heartbeat_timeout_s,
            )
        return self.machine

    def _restart(self, machine: Machine, device: str) -> None:
        """Another supervisor in the place of one that is gone, with a link as it was."""
        machine.restart(device)
        if self.links is not None and self.setting is not None:
            latency_s = self._added_latency_s(self.setting) if machine.has_netem else 0.0
            calibration.shape(machine, {device: self.links.nominal_mbit_per_s[device]}, latency_s)

    def _decide(self, workload: Workload, costs: Costs) -> Setting | None:
        """What is asked of this machine; None on loopback. Raises OrreryError where it is too much."""
        cluster = self.testbed.cluster
        if not self.shaped:
            return None
        if any(device.measured is None for device in cluster.devices):
            costs = on_this_machine(workload, costs, [PROFILED_ROWS])
        rate = costs.core_flops_per_s[LOCAL]
        headroom = PACED_HEADROOM if self.paced else 1.0
        return decide(cluster, self.testbed.own_memory, speeds(cluster, costs, PROFILED_ROWS), rate, headroom)

    def _pace(self, plan: Plan, costs: Costs, dilation: float) -> dict[str, list[dict[str, float]]]:
        """Per device and phase the seconds of each node that it does by itself, here; empty where nothing is paced."""
        if not self.paced:
            return {}
        phases = own_seconds(plan, costs, self.testbed.cluster)
        return {
            device: [{str(node): s * dilation for node, s in phase[device].items()} for phase in phases]
            for device in plan.devices
        }

    def _set(self, machine: Machine, setting: Setting | None) -> Setting | None:
        """Shape and limit, then measure what that gives. On loopback only memory may be limited.

        Where cores have quotas they are measured before every run, for this machine's may have become faster or slower.
        """
        if setting is None:
            cluster = self.testbed.cluster
            for device in self.testbed.own_memory:
                machine.order("memory", device, limit_bytes=cluster.device(device).memory_bytes + PROCESS_BYTES)
            return None
        if self.quota:
            self.cores = calibration.cores(machine, setting, self.cores)
        if self.setting is None or self.setting.mbit_per_s != setting.mbit_per_s:
            self.links = calibration.links(machine, setting)
            if machine.has_netem:
                calibration.shape(machine, self.links.nominal_mbit_per_s, self._added_latency_s(setting))
        for device, limit in setting.memory_bytes.items():
            if limit is not None:
                machine.order("memory", device, limit_bytes=limit + PROCESS_BYTES)
        self.setting = setting
        return setting

    def _added_latency_s(self, setting: Setting) -> float:
        """What is missing of the testbed's latency: a message has a way to go here, too."""
        assert self.links is not None
        return max(0.0, setting.latency_s - self.links.hop_s)

    def _jobs(
        self,
        machine: Machine,
        setting: Setting | None,
        workload: Workload,
        costs: Costs,
        save: bool,
        plan: Plan,
        faults: Sequence[Fault],
        slowness: Mapping[str, float],
    ) -> list[Job]:
        """Those of a new generation, one per device of the plan, with what is to happen to it, and how slow it is."""
        self.generation, self.secret = machine.fleet.new_generation()
        text, pace = to_json(plan), self._pace(plan, costs, setting.dilation if setting else 1.0)
        inside = [fault for fault in faults if fault.kind not in (LEAVE, JOIN)]
        return [
            replace(
                self._job(machine, setting, text, workload, device, save, pace.get(device, ())),
                faults=tuple(asdict(fault) for fault in inside if fault.device == device),
                slowness=slowness.get(device, 1.0),
            )
            for device in plan.devices
        ]

    def _job(
        self,
        machine: Machine,
        setting: Setting | None,
        plan: str,
        workload: Workload,
        device: str,
        save: bool,
        pace: Sequence[Mapping[str, float]] = (),
    ) -> Job:
        rank = self.testbed.cluster.names.index(device)
        return Job(
            device=device,
            plan=plan,
            workload=asdict(workload),
            folder=str(self.folder),
            generation=self.generation,
            secret=self.secret,
            host=namespaces.address(rank) if self.shaped else "127.0.0.1",
            latency_s=0.0 if setting is None or machine.has_netem else self._added_latency_s(setting),
            send_buffer_bytes=setting.send_buffer_bytes(device) if setting else None,
            enter=machine.entrances[device].process,
            enter_computing=machine.entrances[device].computing,
            pace=pace,
            save=save,
        )

    def _explain(self, machine: Machine, lost: Lost, plan: Plan, costs: Costs) -> None:
        """A worker that the kernel killed for its memory is no failure but an out-of-memory row."""
        if lost.exit_code != -signal.SIGKILL or lost.device not in self.testbed.own_memory or machine.broken:
            return
        kills = machine.order("oom-kills", lost.device)["oom_kills"]
        if kills > self.oom_kills.get(lost.device, 0):
            self.oom_kills[lost.device] = kills
            limit = self.testbed.cluster.device(lost.device).memory_bytes
            needed = estimate(plan, costs, self.testbed.cluster).peak_bytes[lost.device]
            raise OutOfMemory(lost.device, needed, limit, "the kernel ended its worker at the limit") from lost

    def _about(self, reports: Sequence[DeviceReport]) -> dict[str, object]:
        """What the testbed measured of itself, for the record."""
        if self.setting is None or self.links is None or self.machine is None:
            return {"shaped": False}
        links = {
            device: {"nominal_mbit_per_s": nominal, "measured_mbit_per_s": self.links.mbit_per_s.get(device)}
            for device, nominal in self.links.nominal_mbit_per_s.items()
        }
        return {
            "shaped": True,
            "computing": self.testbed.computing,
            "latency_by": "netem" if self.machine.has_netem else "transport",
            "message_s": self.links.hop_s,
            "core_flops_per_s": self.setting.core_flops_per_s,
            "devices": {device: about | links[device] for device, about in self._computing(self.setting, reports)},
        }

    def _computing(self, setting: Setting, reports: Sequence[DeviceReport]) -> Iterator[tuple[str, dict[str, object]]]:
        """Of every device: the share of a core that it plays, and how near it came to that."""
        late = {report.device: report.late_s / report.busy_s[COMPUTE] for report in reports if report.busy_s[COMPUTE]}
        for device, share in setting.shares.items():
            if self.cores is None:
                yield device, {"cpu_share": share, "late_share": late.get(device, 0.0)}
            else:
                measured = self.cores.flops_per_s[device] / setting.core_flops_per_s
                quota = self.cores.quotas[device]
                yield device, {"cpu_share": share, "measured_cpu_share": measured, "quota_us_period_us": quota}


class _Events:
    """What happens to links during a run, at the testbed's times."""

    def __init__(self, machine: Machine, events: Sequence[Event], dilation: float, links: Links | None) -> None:
        self.machine, self.dilation, self.links = machine, dilation, links
        self.left = list(events) if links is not None else []
        self.happened: list[Event] = []
        self.origin = 0.0

    def begun(self, origin: float) -> None:
        self.origin = origin

    def happen(self) -> None:
        """Called now and then: does what is due."""
        while self.left and time.perf_counter() >= self.origin + self.left[0].at_s * self.dilation:
            event = self.left.pop(0)
            self.happened.append(event)
            if event.link is not None:
                self.machine.order("link", event.device, up=event.link == "up")
            else:
                assert event.mbit_per_s is not None
                self.machine.order("rate", event.device, mbit_per_s=event.mbit_per_s / self.dilation)

    def undo(self) -> None:
        """Links are again what they were."""
        for event in self.happened:
            if not self.machine.broken and event.device not in self.machine.fleet.gone:
                assert self.links is not None
                self.machine.order("link", event.device, up=True)
                self.machine.order("rate", event.device, mbit_per_s=self.links.nominal_mbit_per_s[event.device])
