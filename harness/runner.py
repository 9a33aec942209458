"""One run from question to record, and a sweep of them. Knows no method, testbed or mode by name."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from harness import batteries, datasets, measure, meters, models, profile, provenance, registry, store, techniques
from harness.cluster import Cluster
from harness.cores import on_all_cores
from harness.costs import Costs
from harness.errors import BatteryEmpty, Broken, OrreryError, OutOfMemory, Unsupported
from harness.experiment import COMPUTED, ON_THIS_MACHINE, Request, planned, reads_images
from harness.meters.meter import Meter
from harness.plain import plain
from harness.plan import Plan, Step, serial
from harness.plan.graph import InvalidPlan
from harness.plan.validate import validate
from harness.records import SCHEMA_VERSION, AssumedConstant, Provenance, Record
from harness.recovery import Change, Resumed
from harness.registry import Testbed
from harness.resume import Journal
from harness.trace import Trace
from harness.trace_export import write_chrome_trace
from harness.workload import OPTIMIZER_STATE_COPIES, Workload


@dataclass(frozen=True)
class Outcome:
    """One request of a sweep, its record, and whether the record was there before."""

    request: Request
    record: Record
    skipped: bool


#: The meter that is found on this machine, or none.
FOUND_HERE = meters.Choice()


def sweep(
    requests: Sequence[Request],
    out: Path,
    force: bool = False,
    resume: bool = False,
    meter: meters.Choice = FOUND_HERE,
) -> Iterator[Outcome]:
    """Run what has not been run. Each record is on disk, whole, as soon as its last repeat has ended.

    With `resume` what really runs keeps its state after every epoch, and goes on where it was killed before.

    Runs on one testbed in one mode follow each other, and those of one workload take turns with their repeats.
    Simulated ones are done on all cores at once, and come in the same order; only the others are metered.
    Input that can't be run raises `OrreryError` where it was asked for alone; among others it is a row.
    """
    if resume:
        _check_resumable(requests, force)
    store.prepare(out, {request.config_hash for request in requests} if force else ())
    alone = len(requests) == 1
    for computed, groups in itertools.groupby(_groups(requests), lambda group: group[0].mode == COMPUTED):
        if computed:
            yield from _computed(list(itertools.chain.from_iterable(groups)), out, force, alone)
        else:
            with meters.opened(meter) as opened:
                yield from _in_turns(groups, out, force, resume, alone, opened)


def _computed(requests: Sequence[Request], out: Path, force: bool, alone: bool) -> Iterator[Outcome]:
    """Simulated runs disturb each other in nothing: they are done on all cores at once."""
    stored = [None if force else store.finished(out, request.config_hash) for request in requests]
    missing = [request for request, record in zip(requests, stored, strict=True) if record is None]
    # Here, and not in each process: what is measured on this machine must not be measured by all at once.
    for request in {(r.workload, _tables(r.testbed)): r for r in missing}.values() if len(missing) > 1 else ():
        with contextlib.suppress(Exception):  # the run says what is wrong
            profile_of(request.workload, request.testbed)
    with on_all_cores(functools.partial(_answered, alone=alone), missing) as records:
        for request, record in zip(requests, stored, strict=True):
            fresh = record is None
            if record is None:
                record = next(records)
                store.save(out, record)
            yield Outcome(request, record, skipped=not fresh)


def _answered(request: Request, alone: bool, meter: Meter | None = None) -> Record:
    """The record of a run that is over at once. Input that can't be run raises `OrreryError` where it is alone."""
    series = _Series(request, meter=meter)
    try:
        with Testbeds() as testbeds:
            while not series.over:
                series.run(testbeds)
    except OrreryError as error:
        if alone:
            raise
        series.end("unsupported", str(error))
    return series.record()


def _in_turns(
    groups: Iterable[list[Request]], out: Path, force: bool, resume: bool, alone: bool, meter: Meter
) -> Iterator[Outcome]:
    """Runs that take time, one by one: those of a group take turns with their repeats."""
    with Testbeds() as testbeds:
        for group in groups:
            left = [_Series(request, _journal(request, out) if resume else None, meter) for request in group]
            while left:
                for series in left:
                    request = series.request
                    again = force or series.runs or _lacks_adapter(request)
                    stored = None if again else store.finished(out, request.config_hash)
                    if stored is not None:
                        series.forget()
                        yield Outcome(request, stored, skipped=True)
                        continue
                    try:
                        series.run(testbeds)
                    except OrreryError as error:
                        if alone:
                            raise
                        series.end("unsupported", str(error))
                    if series.over:
                        yield Outcome(request, _saved(out, series), skipped=False)
                left = [series for series in left if not series.over]


def _groups(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """The requests of each workload on each testbed in each mode, by where they are first asked for."""
    places: list[tuple[str, Testbed]] = []
    groups: dict[tuple[int, Workload], list[Request]] = {}
    for request in requests:
        place = (request.mode, request.testbed)
        if place not in places:
            places.append(place)
        groups.setdefault((places.index(place), request.workload), []).append(request)
    for _, group in sorted(groups.items(), key=lambda item: item[0][0]):
        yield group


def _saved(out: Path, series: _Series) -> Record:
    """The record, written; before it the trace of what really happened."""
    record = series.record()
    if series.execution is not None:
        write_chrome_trace(series.execution.trace, store.trace_path(out, record.provenance.config_hash))
    store.save(out, record)
    if record.status in store.FINISHED:
        series.forget()
    return record


def _lacks_adapter(request: Request) -> bool:
    """Whether the file that is asked for is not there, or is another run's: then a stored record is not enough."""
    path = request.save_adapter
    return path is not None and not (path.is_file() and _adapters().read(path)[0]["config_hash"] == request.config_hash)


def _adapters() -> ModuleType:
    """Imports torch, which most runs can do without."""
    from harness import adapters

    return adapters


def _check_resumable(requests: Sequence[Request], force: bool) -> None:
    """Refuse what contradicts --resume. Simulated runs are over in no time: they have no state, and don't mind."""
    if force:
        raise OrreryError("--force begins anew and --resume goes on. Give one of them.")
    for request in requests:
        if request.repeats > 1:
            raise OrreryError(
                f"--resume goes on with one run, and {request} asks for {request.repeats} repeats, whose times are "
                "compared. Leave one of them out."
            )
        if request.mode != COMPUTED and not request.workload.training:
            raise OrreryError(f"--resume goes on after an epoch of training, and {request} trains nothing.")


def _journal(request: Request, out: Path) -> Journal:
    """Where the state of a run is kept."""
    folder = store.state_path(out, request.config_hash)
    return Journal(folder, {"config_hash": request.config_hash, "code_digest": provenance.code_digest()})


class Testbeds(contextlib.ExitStack):
    """One testbed at a time, open from its first run until another one is wanted: opening a real one takes seconds."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    def __init__(self) -> None:
        super().__init__()
        self._open: tuple[object, Callable[..., Any]] | None = None

    def execute(self, request: Request) -> Callable[..., Any]:
        """What runs plans on the request's testbed in its mode."""
        key = (request.mode, request.testbed)
        if self._open is None or self._open[0] != key:
            self._open = None
            self.close()
            self._open = key, self.enter_context(registry.load_mode(request.mode).opened(request.testbed))
        return self._open[1]


def _check_faults(request: Request, plan: Plan) -> None:
    """Refuse faults that nothing is known to be done about."""
    method = request.method
    if not request.faults:
        return
    if method.replan is None:
        raise OrreryError(
            f"{method.name} does not plan again where devices change, so that nothing is known to be done about "
            f"{str(request.faults[0])!r}."
        )
    if not any(phase.commits for phase in plan.phases):
        raise OrreryError(
            f"The plan of {method.name} takes no snapshots to go on from after {str(request.faults[0])!r}. "
            f"Set {method.name}.replication_period to a number of rounds."
        )


def _replan(request: Request, costs: Costs) -> Callable[[Cluster, Change], Resumed | None] | None:
    """What the method does where the devices are not any more what they were, if anything."""
    replan = request.method.replan
    if replan is None:
        return None
    return lambda cluster, change: replan(request.workload, costs, cluster, request.options, change)


def run(request: Request, meter: meters.Choice = FOUND_HERE) -> Record:
    """Profile, plan, validate, execute, measure. What does not fit, is not supported or breaks is a row with a reason.

    Raises `OrreryError` for input that the user can mend.
    """
    if request.mode == COMPUTED:
        return _answered(request, alone=True)
    with meters.opened(meter) as opened:
        return _answered(request, alone=True, meter=opened)


class _Series:
    """The repeats of one run, and what is known of its record: a series that ends early has what there was."""

    def __init__(self, request: Request, journal: Journal | None = None, meter: Meter | None = None) -> None:
        self.request, self.journal = request, journal
        self.meter = meter if request.mode == ON_THIS_MACHINE else None
        self.over = False
        self.runs: list[dict[str, Any]] = []
        self.execution: Any = None
        self._found: dict[str, Any] = {}
        self._planned: tuple[Costs, Plan] | None = None

    def run(self, testbeds: Testbeds) -> None:
        """Run once more: the first time that includes planning, the last time what all repeats say together."""
        try:
            self._run(testbeds)
            if len(self.runs) == self.request.repeats:
                self._finish()
        except OutOfMemory as error:
            self._found.setdefault("peak_memory_bytes", error.needed_bytes)
            self.end("oom", str(error))
        except BatteryEmpty as error:
            self.end("failed", str(error))
        except Unsupported as error:
            self.end("unsupported", str(error))
        except OrreryError:
            raise
        except Broken as error:
            self.end("failed", f"{error}{self._kept()}", traceback.format_exc())
        except Exception as error:
            self.end("failed", f"{type(error).__name__}: {error}", traceback.format_exc())

    def _run(self, testbeds: Testbeds) -> None:
        request, found = self.request, self._found
        if request.mode not in request.testbed.modes:
            raise Unsupported(
                f"the testbed {request.testbed.name} does not run in mode {request.mode}, "
                f"only in: {', '.join(request.testbed.modes)}"
            )
        if self._planned is None:
            self._planned = self._plan()
        costs, plan = self._planned
        _check_faults(request, plan)
        execute = testbeds.execute(request)
        first = not self.runs  # repeats train the same: to verify or evaluate one is to do it with all
        how = {
            "data_dir": request.data_dir,
            "verify": request.verify and first,
            "evaluate": request.evaluate and first,
            "cache_dir": request.cache_dir,
            "keep_trained": request.save_adapter is not None and first,
            "faults": request.faults,
            "replan": _replan(request, costs),
        }
        executing = functools.partial(execute, plan, request.workload, costs, **how, journal=self.journal)
        execution, host_energy = self._metered(executing)
        self.execution = execution
        found.update(measure.memory(execution.trace), dilation=execution.dilation, emulation=plain(execution.emulation))
        if first:
            found.update(max_rel_error=execution.max_rel_error, metric=execution.metric)
        _must_fit(execution.trace, request)
        _must_last(execution.trace, plan, request)
        found.update(resumed_after_epoch=execution.resumed_after_epoch)
        seen = execution.trace, request.workload, request.testbed.cluster
        measured = measure.measure(*seen, execution.resumed_after_epoch or 0)
        measured["host_energy"] = host_energy
        if execution.whole_s is not None:
            measured |= measure.recovered(execution.whole_s, execution.recoveries, request.workload)
            found.update(peak_memory_bytes=None, memory=None)
        self.runs.append(measured)
        if request.save_adapter is not None and first:
            _adapters().save(request.save_adapter, request.workload, execution.trained, request.config_hash)

    def _metered(self, executing: Callable[[], Any]) -> tuple[Any, dict[str, Any] | None]:
        """What executing gives, and what the machine drew meanwhile, where it has a meter."""
        if self.meter is None:
            return executing(), None
        self.meter.begin()
        try:
            execution = executing()
        finally:
            measured = self.meter.end()
        return execution, dataclasses.asdict(measured)

    def _plan(self) -> tuple[Costs, Plan]:
        """The method's plan; of a run that goes on the very plan that it began with."""
        if self.journal is None:
            return make_plan(self.request, self._found)
        if self.journal.committed() is not None:
            method = dataclasses.replace(planned(self.journal.plan), name=self.request.method.name)
            return make_plan(dataclasses.replace(self.request, method=method), self._found)
        costs, plan = make_plan(self.request, self._found)
        self.journal.keep_plan(serial.to_json(plan))
        return costs, plan

    def _finish(self) -> None:
        last = self.execution
        self._found.update(measure.repeated(self.runs))
        if last.losses:
            self._found.update(losses=list(last.losses), loss=last.losses[-1])
        self.end("ok")

    def _kept(self) -> str:
        """What is left of a run that has failed."""
        committed = None if self.journal is None else self.journal.committed()
        if self.journal is None or committed is None:
            return ""
        return f" What was trained up to epoch {committed.epochs} is in {self.journal.folder}: run again with --resume."

    def forget(self) -> None:
        """The run is in the results: it needs no state any more."""
        self.over = True
        if self.journal is not None:
            self.journal.remove()

    def end(self, status: str, reason: str | None = None, stack: str | None = None) -> None:
        self._found.update(status=status, reason=reason, traceback=stack)
        self.over = True

    def record(self) -> Record:
        """The record of a series that is over."""
        try:
            return _record(self.request, self._found)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}" for e in error.errors()[:3]
            )
            reason = f"What was measured makes no record: {wrong}"
            return _record(self.request, {"status": "failed", "reason": reason})


def make_plan(request: Request, found: dict[str, Any] | None = None) -> tuple[Costs, Plan]:
    """Costs of the workload and the method's plan for it, validated. Record fields about it go to `found`."""
    costs = costs_of(request)
    return costs, checked_plan(request, costs, found)


def costs_of(request: Request) -> Costs:
    """The costs of the request's workload. Raises Unsupported where model and data don't go together."""
    _shapes_match(request.workload)
    return profile_of(request.workload, request.testbed)


def checked_plan(request: Request, costs: Costs, found: dict[str, Any] | None = None) -> Plan:
    """The method's plan for the workload that costs so much, validated. Record fields about it go to `found`."""
    began = time.perf_counter()
    plan = _planned(request, costs)
    seconds = time.perf_counter() - began
    try:
        _must_fit_the_question(plan, costs, request)
        validate(plan, costs)
        cached = plan.phases[0].cached
        about = {
            "planning_time_s": seconds,
            "plan": plain(dict(plan.summary)),
            "micro_batch_size": max(max(p.micro_batches) for p in plan.phases if p.shards and p.cached == cached),
        }
    except InvalidPlan as error:
        raise OrreryError(f"The plan of {request.method.name} is not valid: {error}.") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Broken(
            f"The plan of {request.method.name} is too malformed to be checked: {type(error).__name__}: {error}."
        ) from error
    if found is not None:
        found.update(about)
    return plan


def _planned(request: Request, costs: Costs) -> Plan:
    """What the method answers. Its code may be anybody's: it gets copies, and standard output is not for it."""
    method, cluster = request.method, request.beginning
    try:
        with contextlib.redirect_stdout(sys.stderr):
            plan: object = method.plan(request.workload, costs, cluster, copy.deepcopy(dict(request.options)))
    except (OrreryError, OutOfMemory, Unsupported):
        raise
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise Broken(
            f"The method {method.name} broke while planning: {type(error).__name__}: {error} "
            f"({place.filename}, line {place.lineno}). Mend the method, or run another one."
        ) from error
    if not isinstance(plan, Plan):
        raise OrreryError(
            f"The method {method.name} gave {plan!r:.100} as its plan. Its function `plan` must return a "
            "harness.plan.Plan."
        )
    return plan


def profile_of(workload: Workload, testbed: Testbed) -> Costs:
    """The workload's costs; with this machine's own times, measured now or before, where the testbed is this machine.

    Times depend on shapes, not on words: what is timed is the synthetic data set in the workload's shape. Image models
    start at two rows, because batch norm can't train on one value per channel.
    """
    accelerator, measured = _tables(testbed)
    costs = _counted(workload, accelerator)
    if not measured:
        return costs
    from harness.profile.measure import on_this_machine

    size = workload.batch_size
    smallest = 1 if workload.image_size is None else 2
    rows = sorted({size, *(2**power for power in range(size.bit_length()) if smallest <= 2**power < size)})
    return on_this_machine(workload, costs, rows)


def _tables(testbed: Testbed) -> tuple[str, bool]:
    """For which accelerator units are counted, a CPU's masks being the larger ones; and whether they are timed here."""
    devices = testbed.cluster.devices
    alike = all(device.accelerator == "gpu" for device in devices)
    return "gpu" if alike else "cpu", any(device.measured is not None for device in devices)


#: What a sweep asks again on every testbed, and with it what was derived from it.
_counted = functools.lru_cache(maxsize=64)(profile.count)


def _must_fit_the_question(plan: Plan, costs: Costs, request: Request) -> None:
    """A plan from a file may have been made for another model, testbed or amount of data."""
    cluster, workload = request.testbed.cluster, request.workload
    strangers = [device for device in plan.devices if device not in cluster.names]
    samples = sum(phase.batch_size * phase.repeat for phase in plan.phases if phase.shards and not phase.decoding)
    tokens = sum(phase.batch_size * phase.repeat for phase in plan.phases if phase.decoding)
    wanted_tokens = workload.total_samples * ((workload.new_tokens or 1) - 1)
    if strangers:
        found = f"uses {', '.join(strangers)}, and {cluster.name} has {', '.join(cluster.names)}"
    elif plan.num_units != len(costs.units):
        found = f"cuts a model of {plan.num_units} units, and {workload.model} has {len(costs.units)}"
    elif samples != workload.total_samples:
        found = f"processes {samples} samples, and the workload has {workload.total_samples}"
    elif tokens != wanted_tokens:
        found = f"makes {tokens} tokens after the first of each request, and the workload has {wanted_tokens}"
    elif plan.phases and plan.phases[0].cached and request.cache_dir is None:
        raise OrreryError(
            f"The plan of {request.method.name} begins with {plan.phases[0].name!r}, which reads from a cache, and no "
            "phase before it has filled one. Name the folder of a kept one with --cache-dir."
        )
    elif costs.training and _clips(plan) != (workload.clip_norm is not None):
        found = "clips gradients, and the workload does not" if _clips(plan) else "clips nothing, and the workload does"
    elif costs.training and (wanted := OPTIMIZER_STATE_COPIES[workload.optimizer]) != (held := _state_copies(plan)):
        kept = "times as many numbers as are trained in the optimizer's state"
        found = f"keeps {held:g} {kept}, and {workload.optimizer} keeps {wanted}"
    else:
        return
    raise OrreryError(f"The plan of {request.method.name} {found}. Plan again for this workload and testbed.")


def _state_copies(plan: Plan) -> float:
    """How many numbers the plan keeps of the optimizer for each that is trained."""
    width = dict.fromkeys(("gradients", "optimizer"), 0)
    for tensor in plan.tensors.values():
        if tensor.kind in width:
            width[tensor.kind] += tensor.width
    return width["optimizer"] / max(width["gradients"], 1)


def _clips(plan: Plan) -> bool:
    """Whether an update of the plan reads a norm."""
    lists = (actions for phase in plan.phases for actions in phase.actions.values())
    return any(isinstance(action, Step) and action.norm is not None for actions in lists for action in actions)


def _shapes_match(workload: Workload) -> None:
    """A model that reads images has no use for text, nor the other way round."""
    nouns = {"image": "images", "text": "text"}
    wanted, other = ("image", "text") if reads_images(workload.model) else ("text", "image")
    if datasets.spec(workload.dataset).kind == other:
        raise Unsupported(f"{workload.model} reads {nouns[wanted]} and {workload.dataset} holds {nouns[other]}")
    superfluous = "seq_len" if wanted == "image" else "image_size"
    if getattr(workload, superfluous) is not None:
        raise Unsupported(f"{workload.model} reads {nouns[wanted]}, so {superfluous} has no meaning for it")
    if workload.decoder_seq_len != 1 and models.entry(workload.model).family not in models.ENCODER_DECODER:
        raise Unsupported(f"{workload.model} has no decoder of its own, so decoder_seq_len has no meaning for it")


def _must_fit(trace: Trace, request: Request) -> None:
    """The worst device of a run that needs more memory than there is."""
    devices = request.testbed.cluster.devices
    worst = max(devices, key=lambda device: trace.peak_bytes.get(device.name, 0) - device.memory_bytes)
    if trace.peak_bytes.get(worst.name, 0) > worst.memory_bytes:
        raise OutOfMemory(worst.name, trace.peak_bytes[worst.name], worst.memory_bytes, "at the peak of the run")


def _must_last(trace: Trace, plan: Plan, request: Request) -> None:
    """Of a simulated run the first device whose battery is empty before the end. What really runs draws real power."""
    cluster = request.testbed.cluster
    if request.mode != COMPUTED or all(device.battery_j is None for device in cluster.devices):
        return
    if request.faults:
        raise Unsupported(
            "no energy is modelled of a run whose devices change, so that nobody can tell whether batteries last"
        )
    empty = batteries.first_empty(trace, plan, cluster)
    if empty is not None:
        raise empty


def _record(request: Request, found: dict[str, Any]) -> Record:
    workload, testbed = request.workload, request.testbed
    asked = dataclasses.asdict(workload)
    commit, dirty = provenance.git_state()
    origin = Provenance(
        schema_version=SCHEMA_VERSION,
        package_version=provenance.package_version(),
        git_commit=commit,
        git_dirty=dirty,
        config_hash=request.config_hash,
        code_digest=provenance.code_digest(),
        seed=workload.seed,
        libraries=provenance.libraries(),
        host=provenance.host(),
        devices={device.name: device.profile for device in testbed.cluster.devices},
        assumptions=[
            AssumedConstant(owner=a.owner, key=a.key, **plain(dataclasses.asdict(a.constant)))
            for a in testbed.assumptions
        ],
        traceback=plain(found.pop("traceback", None)),
    )
    found["reason"] = plain(found.get("reason"))
    return Record(
        method=request.method.name,
        method_options=plain(dict(request.options)),
        technique_options=plain(techniques.all_options(workload.technique, workload.technique_options)),
        **{name: asked[name] for name in Record.model_fields if name in asked and name != "technique_options"},
        testbed=testbed.name,
        mode=request.mode,
        num_devices=len(testbed.cluster.devices),
        inject="; ".join(map(str, request.faults)) or None,
        provenance=origin,
        **found,
    )
