"""Our numbers beside the papers': what was run against their measurements, what was counted against their analyses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

from harness import datasets, profile, runner
from harness.cluster import Device
from harness.costs import BACKWARD, DIRECTIONS, FORWARD, Costs
from harness.records import DeviceMemory, PhaseRecord, Record
from harness.registry import load_testbed
from harness.simulator import estimate
from harness.techniques import chosen
from harness.workload import Workload
from results import again
from results.papers import CLAIMS, OOM, Cell, Paper, same
from results.settings import Setting

GIB = 2**30
TERA = 1e12
COUNTED_BYTES = "counted bytes"
#: Of memory, as papers show it in a bar.
KINDS = ("weights", "activations", "gradients")
NO_LIMIT = 2**62


@dataclass(frozen=True)
class Comparison:
    """A paper's cell and our value for it, in the cell's unit; `OOM` where it did not fit, None where we have none.

    `how`: the method of a run, or how it was counted. `fitted`: a constant was fitted to the cell, so that agreement
    proves nothing. `alike`: whether it is as the paper had it, as far as one knows; one that is not is shown only.
    `run` is what it was taken from, if from a run.
    """

    cell: Cell
    ours: float | str | None
    how: str
    fitted: bool = False
    alike: bool = True
    run: Record | None = None

    @property
    def difference(self) -> float | None:
        """(ours - paper's) / paper's, where both are numbers."""
        theirs = self.cell.number
        return self.ours / theirs - 1 if theirs and isinstance(self.ours, float) else None

    @property
    def error(self) -> float | None:
        """The difference, where it says something about us: not of fitted cells, nor of another way to run."""
        return self.difference if self.alike and not self.fitted else None

    @property
    def verdict(self) -> str:
        """What a reader sees in the error column."""
        if self.ours is None:
            return "not run"
        if not self.cell.value:
            return "prediction"
        if self.difference is not None:
            text = f"{self.difference:+.1%}"
        else:
            text = "agrees" if self.ours == self.cell.value else "contradicts"
        if not self.alike:
            return f"({text}) run otherwise"
        return f"({text}) fitted" if self.fitted else text


def mean_error(comparisons: Iterable[Comparison]) -> float | None:
    """Mean of the absolute errors."""
    errors = [abs(c.error) for c in comparisons if c.error is not None]
    return fmean(errors) if errors else None


def compare(setting: Setting) -> dict[str, list[Comparison]]:
    """By artefact of the setting's paper: every cell that this setting has a number for."""
    paper = setting.paper
    if paper is None:
        return {}
    fitted = {cell for r in setting.records for constant in r.provenance.assumptions for cell in constant.cells}
    found: dict[str, list[Comparison]] = {}
    for comparison in (*_runs(paper, setting), *_counts(paper, setting)):
        marked = replace(comparison, fitted=paper.fitted(comparison.cell, fitted))
        found.setdefault(comparison.cell.artefact, []).append(marked)
    return found


def _runs(paper: Paper, setting: Setting) -> Iterator[Comparison]:
    """What whole runs are compared by. A paper's Standalone has one device, ours is one device of the testbed."""
    for cell in (*paper.cells, *paper.predicted):
        if cell.metric not in RUNS.get(cell.artefact, ()):
            continue
        for record in setting.records:
            names = ((cell.model, record.model), (paper.method(cell), record.method))
            if (
                all(same(*pair) for pair in names)
                and (not cell.dataset or same(cell.dataset, record.dataset))
                and paper.technique(cell) == record.technique
                and _as_in_papers(record)
                and cell.devices in ("", "1", str(record.num_devices))
                and record.steps is None
                and cell.epochs in ("", str(record.epochs))
                and record.batch_size == paper.batch_size(cell, record.num_devices)
                and caches(record) == paper.caches(cell)
            ):
                ours = RUNS[cell.artefact][cell.metric](record, paper)
                how = setting.label(record)
                if record.status == "oom" and isinstance(ours, float):
                    how += ", if it fitted"
                alike = paper.ran_so(cell, record.method, record.method_options)
                yield Comparison(cell, ours, how, alike=alike, run=record)


def qualities(paper: Paper, runs: Iterable[Sequence[Record]]) -> list[Comparison]:
    """Of each training with several seeds the mean, beside the paper's cell for the same model, data and epochs.

    On whichever testbed: it does not matter to what is learnt. Trainings on a part of the data set have no cell.
    """
    return [
        Comparison(cell, fmean(r.metric for r in records if r.metric is not None), _seeds(records))
        for records in runs
        for cell in paper.cells
        if cell.is_quality and _same_training(paper, cell, records[0])
    ]


def _same_training(paper: Paper, cell: Cell, record: Record) -> bool:
    return (
        same(cell.model, record.model)
        and same(cell.dataset, record.dataset)
        and paper.technique(cell) == record.technique
        and record.num_samples == datasets.spec(record.dataset).num_samples
        and (record.steps, cell.epochs) == (None, str(record.epochs))
    )


def _seeds(records: Sequence[Record]) -> str:
    cached = ", cached" if caches(records[0]) else ""
    return f"{records[0].method}{cached}, mean of {len(records)} seed{'s'[: len(records) != 1]}"


def caches(record: Record) -> bool:
    """Whether epochs after the first read what the backbone makes from a cache."""
    return record.epochs > 1 and bool(record.method_options.get("cache"))


def _as_in_papers(record: Record) -> bool:
    """Whether the technique is what the papers measured: with other options it answers none of their cells."""
    return chosen(record.technique, record.technique_options) is None


Value = Callable[[Record, Paper], float | str | None]


def _or_oom(value: Value) -> Value:
    return lambda record, paper: OOM if record.status == "oom" else value(record, paper)


def _phases(record: Record, names: Iterable[str]) -> list[PhaseRecord]:
    return [phase for phase in record.phases or () if phase.name in names]


def _hours(record: Record, paper: Paper) -> float | None:
    return None if record.total_time_s is None else record.total_time_s / 3600


def _throughput(record: Record, paper: Paper) -> float | None:
    return record.throughput_samples_per_s


def _computing_s(record: Record, paper: Paper) -> float | None:
    """Device time per sample, summed over devices; where activations are cached, of the epochs that read them."""
    if not caches(record):
        return record.device_time_per_sample_s
    seconds = [phase.computing_s for phase in _phases(record, paper.phases["cached"])]
    total = sum(each for each in seconds if each is not None)
    return total / record.num_samples / (record.epochs - 1) if seconds and None not in seconds else None


def _weights_gib(record: Record, paper: Paper) -> float | None:
    """Of the worst device; of a run that does not fit, as it would be planned if memory were no matter."""
    if record.status == "oom":
        return _weights_without_limit_gib(record)
    memory = record.memory
    return None if memory is None else max(device.weights_bytes for device in memory.values()) / GIB


def _weights_without_limit_gib(record: Record) -> float | None:
    asked = again.request(record)
    if asked is None:
        return None
    testbed = asked.testbed
    devices = tuple(replace(device, memory_bytes=NO_LIMIT) for device in testbed.cluster.devices)
    cluster = replace(testbed.cluster, devices=devices)
    costs = runner.profile_of(asked.workload, testbed)
    plan = asked.method.plan(asked.workload, costs, cluster, asked.options)
    return max(kinds["weights"] for kinds in estimate(plan, costs, cluster).memory_bytes.values()) / GIB


def _kind_gib(kind: str) -> Value:
    return lambda record, paper: None if (held := _held_gib(record, paper)) is None else held[kind]


def _held_gib(record: Record, paper: Paper) -> dict[str, float] | None:
    """The most of each kind on the device where they add up to most, and that sum; as of `_computing_s`."""
    moments = [record.memory]
    if caches(record):
        moments = [phase.memory for phase in _phases(record, paper.phases["cached"])]
    devices: dict[str, dict[str, float]] = {}
    for memory in moments:
        for name, device in (memory or {}).items():
            kinds = devices.setdefault(name, dict.fromkeys((f"{kind}_gib" for kind in KINDS), 0.0))
            for kind, nbytes in _kinds(device).items():
                kinds[f"{kind}_gib"] = max(kinds[f"{kind}_gib"], nbytes / GIB)
    worst = max(devices.values(), key=lambda kinds: sum(kinds.values()), default=None)
    return None if worst is None else {**worst, "memory_gib": sum(worst.values())}


def _kinds(device: DeviceMemory) -> dict[str, int]:
    """As the paper has them: activations are all that is neither weights nor their gradients."""
    others = device.optimizer_bytes + device.activations_bytes + device.buffers_bytes + device.cache_bytes
    return dict(zip(KINDS, (device.weights_bytes, others, device.gradients_bytes), strict=True))


def _grouping(record: Record, paper: Paper) -> str | None:
    grouping = None if record.plan is None else record.plan.get("grouping")
    return grouping_text(grouping) if isinstance(grouping, list) else None


def grouping_text(grouping: Iterable[object]) -> str:
    """Devices per stage as the paper writes them: [2-2]."""
    return "[" + "-".join(map(str, grouping)) + "]"


def _redistribution_pct(record: Record, paper: Paper) -> float | None:
    """Share of the whole run that handing out weights and cached activations takes."""
    if record.total_time_s is None:
        return None
    moving = sum(phase.time_s for phase in _phases(record, paper.phases["redistribution"]))
    return 100 * moving / record.total_time_s


#: What is taken from whole runs: artefact, metric, our value.
RUNS: dict[str, dict[str, Value]] = {
    "table2": {"training_time_h": _or_oom(_hours)},
    "fig8a": {"time_per_sample_s": _or_oom(_computing_s)},
    "fig8b": {f"{kind}_gib": _or_oom(_kind_gib(f"{kind}_gib")) for kind in (*KINDS, "memory")},
    "fig9a": {"throughput_samples_per_s": _or_oom(_throughput)},
    "fig9b": {"weights_gib": _weights_gib},
    "fig10": {"grouping": _or_oom(_grouping)},
    "fig11": {"training_time_h": _or_oom(_hours)},
    CLAIMS: {"redistribution_share_pct": _or_oom(_redistribution_pct)},
}


def _counts(paper: Paper, setting: Setting) -> Iterator[Comparison]:
    """What follows from the model alone, or from the model and one device of the testbed; inference beside full."""
    if any(getattr(setting.first, field) != value for field, value in paper.analysed.items()):
        return
    (device, *_) = load_testbed(setting.first.testbed).cluster.devices
    workloads = {record.model: again.workload(record) for record in setting.records if _as_in_papers(record)}
    for cell in (*paper.cells, *paper.predicted):
        for model, workload in workloads.items():
            technique = paper.technique(cell)
            asked = workload.technique
            if same(cell.model, model) and (technique == asked or (technique, asked) == ("inference", "full")):
                costs = _costs(replace(workload, technique=technique), device.accelerator)
                costs = costs.cached if paper.cached.get(cell.technique) else costs
                counted = _count(cell, costs, workload.batch_size, device)
                if counted is not None:
                    yield Comparison(cell, *counted)


@cache
def _costs(workload: Workload, accelerator: str) -> Costs:
    """Read once for all cells of a report."""
    return profile.count(workload, accelerator)


def _count(cell: Cell, costs: Costs, rows: int, device: Device) -> tuple[float, str] | None:
    """Our value for a cell that can be counted, and how."""
    everything = (0, len(costs.units))
    match cell.artefact, cell.metric:
        case "fig3", "tflop_forward":
            return costs.work(*everything, FORWARD).flops(rows) / TERA, "counted operations"
        case "fig3", "tflop_backward":
            return costs.work(*everything, BACKWARD).flops(rows) / TERA, "counted operations"
        case "fig3", "tflop_total":
            return sum(costs.work(*everything, d).flops(rows) for d in DIRECTIONS) / TERA, "counted operations"
        case "table1", "weights_gib" | "gradients_gib" | "activations_gib" | "memory_gib":
            kinds = _memory_gib(costs, rows)
            kinds["memory_gib"] = sum(kinds.values())
            return kinds[cell.metric], COUNTED_BYTES
        case "fig8a", "forward_time_per_sample_s":
            return costs.seconds(device, *everything, FORWARD, rows) / rows, f"one {device.profile}"
        case "fig8a", "backward_time_per_sample_s":
            return costs.seconds(device, *everything, BACKWARD, rows) / rows, f"one {device.profile}"
    return None


def _memory_gib(costs: Costs, rows: int) -> dict[str, float]:
    """Weights, gradients and what is kept for the backward pass of one batch, in GiB."""
    return {
        "weights_gib": sum(p.bytes for p in costs.parameters.values()) / GIB,
        "gradients_gib": sum(p.bytes for p in costs.parameters.values() if p.trainable) / GIB,
        "activations_gib": costs.saved(0, len(costs.units)).at(rows) / GIB,
    }
