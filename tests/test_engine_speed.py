"""Our engine beside torch's own, on the same devices: namespaces, shaped links, shares of a core.

Ours and theirs take turns, round by round; the tables show medians over all iterations. Devices are shaped, which
needs rights: run as root. Run by `nox -s bench`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest

from baselines import eddl, megatron, pipedream_1f1b, sequence_parallel
from harness.cluster import Device
from harness.costs import FORWARD, Costs
from harness.engine import Execution
from harness.plan import Collective, Plan
from harness.runner import profile_of
from harness.simulator import simulate
from harness.workload import Workload
from systems import galaxy
from testbeds import emulated, library
from testbeds.emulation import calibration, cgroups, leftovers
from testbeds.emulation.machine import Machine
from testbeds.emulation.setting import TCP_SHARE
from testbeds.library import Testbed
from tests.opponents import ours
from tests.opponents.crew import Crew, crew
from tests.opponents.rank import Task, batches_of

pytestmark = pytest.mark.benchmark

needs_rights = pytest.mark.skipif(not cgroups.available().cpu, reason="control groups and namespaces need rights")

ROUNDS, RING_ROUNDS = 7, 5
DEVICES = tuple(f"device{i}" for i in range(4))
TRAINED = Workload("bert-tiny", "synthetic", num_samples=160, batch_size=16, steps=10, seq_len=64, dropout=0.0)
MICRO_BATCHES = 4
SERVED = Workload(
    "distilbert", "synthetic", num_samples=2, batch_size=1, technique="inference", seq_len=284, num_labels=2
)
SERVED_ROUNDS = 3
#: 4 MB of float32.
NUMEL = 2**20
#: Mbit/s of every device's link -> iterations in a round. None: not shaped.
RATES: dict[float | None, int] = {None: 20, 1000.0: 20, 125.0: 4, 25.0: 1}
STEPS = {"all-reduce": 2 * (len(DEVICES) - 1), "reduce-scatter": len(DEVICES) - 1, "all-gather": len(DEVICES) - 1}
#: Plans of tiny actions, and of how many.
TINY: dict[str, tuple[Callable[[Sequence[str], int, int], Plan], int, int]] = {
    "a pass, one device": (ours.passes, 1, 2000),
    "a transfer, one way": (ours.one_way, 2, 1000),
    "a transfer that is waited for": (ours.back_and_forth, 2, 300),
    "a transfer with its sum": (ours.sums, 2, 400),
}
TINY_REPEATS = 6


@needs_rights
def test_training_beside_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """1F1B with the same cuts beside `Schedule1F1B`; `eddl` beside DDP, and beside gloo without DDP's overlap."""
    monkeypatch.setattr(calibration, "TOLERANCE", 0.5)  # all sides have the same share of a core, whatever it is
    bed = library.load("emu-4-50mbit-quota")
    bed = replace(bed, cluster=replace(bed.cluster, latency_s=0.0))  # which our transport would add, and gloo not
    costs = profile_of(TRAINED, bed)
    size = TRAINED.batch_size // MICRO_BATCHES
    pipeline = pipedream_1f1b.plan(TRAINED, costs, bed.cluster, {"micro_batch_size": size})
    replicas = eddl.plan(TRAINED, costs, bed.cluster, {**eddl.OPTIONS, "micro_batch_size": TRAINED.batch_size})
    fields = {"workload": asdict(TRAINED), "batches": batches_of(TRAINED)}
    sides: dict[str, dict[str, Plan | Task]] = {
        "1F1B": {
            "ours": pipeline,
            "Schedule1F1B": Task("1f1b", num_micro_batches=MICRO_BATCHES, cuts=cuts(pipeline, costs), **fields),
        },
        "data parallel": {
            "ours": replicas,
            "ours, 4 tiles": tiled(replicas, 4),
            "DDP": Task("ddp", **fields),
            "gloo after the backward pass": Task("late-all-reduce", **fields),
        },
    }
    seconds: dict[tuple[str, str], list[float]] = {(row, side): [] for row in sides for side in sides[row]}
    with on_both(bed, pipeline, TRAINED, costs) as (execute, opponents):
        for _ in range(ROUNDS):
            for row, side in seconds:
                work = sides[row][side]
                if isinstance(work, Plan):
                    seconds[row, side] += iterations(execute(work, TRAINED, costs))
                else:
                    seconds[row, side] += opponents.seconds(work, TRAINED.steps)
    found = {key: statistics.median(lengths) for key, lengths in seconds.items()}
    with capsys.disabled():
        print("\n\n| training | side | s per iteration |\n|---|---|---|")
        for (row, side), length in found.items():
            print(f"| {row} | {side} | {length:.4f} |")
    assert found["1F1B", "ours"] < found["1F1B", "Schedule1F1B"]
    assert found["data parallel", "ours"] < 1.1 * found["data parallel", "DDP"]


@needs_rights
@pytest.mark.parametrize("mbit_per_s", [25, 50, 125])
def test_inference_beside_torch(mbit_per_s: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests of 284 tokens on devices as slow beside their links as boards without a GPU."""
    bed = library.load(f"emu-4-slow-50mbit@{mbit_per_s}mbit")
    bed = replace(bed, cluster=replace(bed.cluster, latency_s=0.0))  # which our transport would add, and gloo not
    costs = profile_of(SERVED, bed)
    layer = "distilbert.transformer.layer.*."
    fields = {
        "workload": asdict(SERVED),
        "batches": batches_of(SERVED),
        "columns": [f"{layer}{name}" for name in ("attention.q_lin", "attention.k_lin", "attention.v_lin", "ffn.lin1")],
        "rows": [f"{layer}{name}" for name in ("attention.out_lin", "ffn.lin2")],
        "share": bed.cluster.devices[0].share,
        "pace": paces(costs, bed.cluster.devices[0], len(bed.cluster.devices)),
    }
    alike = {"embeddings": "everywhere"}  # as torch's ranks have them

    def ours_of(method: ModuleType, **options: object) -> Plan:
        return method.plan(SERVED, costs, bed.cluster, {**method.OPTIONS, **alike, **options})

    sides: dict[str, Plan | Task] = {
        "galaxy": ours_of(galaxy),
        "galaxy, no overlap": ours_of(galaxy, overlap=False),
        "galaxy, 2 tiles": ours_of(galaxy, tiles=2),
        "megatron": ours_of(megatron),
        "megatron, 2 tiles": ours_of(megatron, tiles=2),
        "sequence-parallel": ours_of(sequence_parallel),
        "DTensor": Task("dtensor", **fields),
        "transformers": Task("transformers", **fields),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with on_both(bed, sides["galaxy"], SERVED, costs) as (execute, opponents):
        for _ in range(SERVED_ROUNDS):
            for side, work in sides.items():
                if isinstance(work, Plan):
                    seconds[side] += iterations(execute(work, SERVED, costs))
                else:
                    seconds[side] += opponents.seconds(work, SERVED.num_samples)
    found = {side: statistics.median(lengths) for side, lengths in seconds.items()}
    simulated = {
        side: simulate(work, costs, bed.cluster).phases[0].iteration_s[0]
        for side, work in sides.items()
        if isinstance(work, Plan)
    }
    with capsys.disabled():
        print(f"\n\n| {mbit_per_s} Mbit/s | s per request | simulated |\n|---|---|---|")
        for side, length in found.items():
            print(f"| {side} | {length:.3f} | {simulated.get(side, float('nan')):.3f} |")
    assert found["galaxy"] < found["DTensor"]


@needs_rights
def test_rings_beside_gloo(capsys: pytest.CaptureFixture[str]) -> None:
    """4 MB over four devices; the closed form is the bytes of a member over what TCP gets of its link."""
    found: dict[tuple[float | None, str], tuple[float, float, float, float | None]] = {}
    with leftovers.only_one() as lock, leftovers.folder() as folder:
        machine = Machine(DEVICES, isolated=True, limited=False, remove=[folder, lock])
        try:
            machine.ready()
            ours.prepare(folder)
            with crew(machine, folder, isolated=True) as opponents:
                for rate, repeat in RATES.items():
                    if rate is not None:
                        for device in DEVICES:
                            machine.order("shape", device, mbit_per_s=rate, latency_s=0.0)
                    for kind in STEPS:
                        found[rate, kind] = side_by_side(machine, folder, opponents, kind, repeat, rate)
        finally:
            machine.close()
    with capsys.disabled():
        print(
            "\n\n| Mbit/s | ring | ours, ms | 4 tiles, ms | gloo, ms | gloo/ours | closed form, ms | ours/closed form |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for (rate, kind), (one, four, gloo, limit) in found.items():
            closed = "- | -" if limit is None else f"{limit * 1e3:.1f} | {min(one, four) / limit:.3f}"
            times = f"{one * 1e3:.1f} | {four * 1e3:.1f} | {gloo * 1e3:.1f} | {gloo / min(one, four):.2f}"
            print(f"| {rate or 'not shaped'} | {kind} | {times} | {closed} |")
    for (rate, kind), (one, four, gloo, _) in found.items():
        if rate is not None and rate <= 125:
            assert min(one, four) < (0.6 if kind == "reduce-scatter" else 1.1) * gloo, (rate, kind)


def test_what_an_action_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plans of tiny actions on devices that nothing shapes; what is left is the engine's own time."""
    found = {}
    machine = Machine(DEVICES[:2], isolated=False, limited=False, remove=[])
    try:
        machine.ready()
        ours.prepare(tmp_path)
        for name, (make, num_devices, count) in TINY.items():
            plan = make(DEVICES[:num_devices], count, TINY_REPEATS)
            lengths = [s for _ in range(3) for s in iterations(ours.run(machine, plan, tmp_path, isolated=False))]
            found[name] = statistics.median(lengths) / count * 1e6
    finally:
        machine.close()
    with capsys.disabled():
        print("\n\n| what | us |\n|---|---|")
        for name, microseconds in found.items():
            print(f"| {name} | {microseconds:.0f} |")
    assert max(found.values()) < 1000


@contextmanager
def on_both(
    bed: Testbed, plan: Plan, workload: Workload, costs: Costs
) -> Iterator[tuple[Callable[..., Execution], Crew]]:
    """The testbed, brought up and shaped by a first run of ours, and torch's ranks on its devices."""
    with emulated.opened(bed) as execute:
        execute(plan, workload, costs)
        emulation = execute.__self__
        with crew(emulation.machine, emulation.folder, isolated=True) as opponents:
            yield execute, opponents


def paces(costs: Costs, device: Device, count: int) -> list[float]:
    """How long every unit takes on one of so many equal devices: a share of those that are cut, the whole of others."""
    shares = [1.0 if unit.cut is None else 1 / count for unit in costs.units]
    return [costs.seconds(device, i, i + 1, FORWARD, 1, share) for i, share in enumerate(shares)]


def cuts(plan: Plan, costs: Costs) -> list[tuple[int, str, list[int]]]:
    """Where the stages but the first begin, and the only tensor that each is handed."""
    found = []
    for device in plan.devices[1:]:
        first, _ = plan.phases[0].shards[device].units
        (name,) = costs.carried(first)
        found.append((first, name, [costs.tensors[name].tokens, costs.tensors[name].width]))
    return found


def tiled(plan: Plan, tiles: int) -> Plan:
    """The plan with its collectives in tiles."""
    phases = []
    for phase in plan.phases:
        actions = {
            device: tuple(replace(a, tiles=tiles) if isinstance(a, Collective) else a for a in listed)
            for device, listed in phase.actions.items()
        }
        phases.append(replace(phase, actions=actions))
    return replace(plan, phases=tuple(phases))


def side_by_side(
    machine: Machine, folder: Path, opponents: Crew, kind: str, repeat: int, rate: float | None
) -> tuple[float, float, float, float | None]:
    """Median seconds of our ring, of ours in 4 tiles and of gloo's, and the closed form."""
    seconds: dict[int, list[float]] = {1: [], 4: [], 0: []}
    for _ in range(RING_ROUNDS):
        for tiles in (1, 4):
            plan = ours.ring(kind, DEVICES, NUMEL, repeat, tiles)
            seconds[tiles] += iterations(ours.run(machine, plan, folder, isolated=True))
        seconds[0] += opponents.seconds(Task(kind, numel=NUMEL), repeat)
    one, four, gloo = (statistics.median(seconds[side]) for side in (1, 4, 0))
    share = 4 * NUMEL / len(DEVICES)
    return one, four, gloo, None if rate is None else STEPS[kind] * share / (rate * 1e6 / 8 * TCP_SHARE)


def iterations(execution: Execution) -> list[float]:
    return [seconds for phase in execution.trace.phases for seconds in phase.iteration_s]
