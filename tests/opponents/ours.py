"""Plans of rings alone, and of many tiny actions; and running them on devices of a machine, without a testbed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from harness import datasets, samples
from harness.engine import Execution, execution
from harness.fleet.job import SAMPLES, WEIGHTS, Job
from harness.models import shards
from harness.plan import Action, Collective, Combine, Free, Phase, Plan, Recv, Send, Shard, Tensor, Value
from harness.plan.collectives import share_ranges
from harness.plan.serial import to_json
from harness.workload import Workload
from testbeds.emulation import namespaces
from testbeds.emulation.machine import Machine

#: Devices hold no unit of it: a worker must have a model and samples.
NOTHING = Workload("bert-tiny", "synthetic", num_samples=1, batch_size=1, seq_len=8, dropout=0.0)
STALL_S = 60.0
X = Value("x")


def prepare(folder: Path) -> None:
    """What every worker reads."""
    shards.write(NOTHING, folder / WEIGHTS)
    samples.save(datasets.load(NOTHING), folder / SAMPLES)


def run(machine: Machine, plan: Plan, folder: Path, isolated: bool) -> Execution:
    """The plan on the machine's devices of the same names, without any limit of the processor.

    Sockets buffer as much as the kernel likes, as gloo's do.
    """
    generation, secret = machine.fleet.new_generation()
    text = to_json(plan)
    jobs = [
        Job(
            device,
            text,
            asdict(NOTHING),
            str(folder),
            generation,
            secret,
            host=namespaces.address(rank) if isolated else "127.0.0.1",
        )
        for rank, device in enumerate(plan.devices)
    ]
    return execution(plan, machine.fleet.run(jobs, STALL_S), training=True)


def ring(kind: str, devices: Sequence[str], numel: int, repeat: int, tiles: int = 1) -> Plan:
    """In each iteration every device makes zeros, its part or its share, and takes part in the collective."""
    actions = {}
    for rank, device in enumerate(devices):
        mine = share_ranges(Collective(kind, X, X, tuple(devices)), numel)[rank]
        value = X._replace(width=mine if kind == "all-gather" else None)
        result = X._replace(width=mine if kind == "reduce-scatter" else None, version=1)
        collective = Collective(kind, value, result, tuple(devices), tiles=tiles)
        stays = (value,) if kind == "all-gather" else ()
        actions[device] = [Combine("sum", (), value), collective, Free((*stays, result))]
    return plan(actions, numel, repeat)


def passes(devices: Sequence[str], count: int, repeat: int) -> Plan:
    """`count` numbers are made, one after the other, on every device."""
    made = [action for i in range(count) for action in (Combine("sum", (), tiny(i)), Free((tiny(i),)))]
    return plan(dict.fromkeys(devices, made), 1, repeat)


def one_way(devices: Sequence[str], count: int, repeat: int) -> Plan:
    """The first device sends `count` numbers to the second, as fast as it can."""
    first, second = devices
    values = [tiny(i) for i in range(count)]
    sent = [*(Combine("sum", (), v) for v in values), *(Send(v, second) for v in values), Free(tuple(values))]
    return plan({first: sent, second: [*(Recv(v, first) for v in values), Free(tuple(values))]}, 1, repeat)


def back_and_forth(devices: Sequence[str], count: int, repeat: int) -> Plan:
    """`count` round trips of a number, which each device copies before it sends it on."""
    first, second = devices
    actions: dict[str, list[Action]] = {first: [Combine("sum", (), tiny(0))], second: []}
    for i in range(2 * count):
        src, dst = devices[i % 2], devices[1 - i % 2]
        actions[src] += [Send(tiny(i), dst), Free((tiny(i),))]
        actions[dst] += [Recv(tiny(i), src), Combine("sum", (tiny(i),), tiny(i + 1)), Free((tiny(i),))]
    actions[first].append(Free((tiny(2 * count),)))
    return plan(actions, 1, repeat)


def sums(devices: Sequence[str], count: int, repeat: int) -> Plan:
    """`count` transfers in each direction, every other one with a sum: an all-reduce of a number in each tile."""
    return ring("all-reduce", devices, count, repeat, tiles=count // 2)


def tiny(number: int) -> Value:
    return X._replace(micro_batch=number)


def plan(actions: dict[str, Iterable[Action]], numel: int, repeat: int) -> Plan:
    phase = Phase(
        "speed",
        (1,),
        {device: Shard((0, 0), ((0, 1),)) for device in actions},
        {device: tuple(listed) for device, listed in actions.items()},
        live={},
        repeat=repeat,
    )
    return Plan("speed", 1, {"x": Tensor("buffers", 1, numel, 4)}, (phase,))
