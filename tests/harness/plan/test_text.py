"""Plans as text: the notation of every action, and lists that say what they leave out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.plan import (
    Action,
    Collective,
    Combine,
    Commit,
    Compute,
    Free,
    Load,
    Phase,
    Plan,
    Recv,
    Send,
    Shard,
    Step,
    Store,
    Tensor,
    Value,
)
from harness.plan.text import describe, notation

TENSORS = {
    "hidden@12": Tensor("activations", 128, 768, 4, per_row=True),
    "weights@0:12": Tensor("weights", 1, 1024, 4),
    "gradients@0:12": Tensor("gradients", 1, 1024, 4),
}
HIDDEN = Value("hidden@12", 3, (0, 4))
WEIGHTS, GRADIENTS = Value("weights@0:12"), Value("gradients@0:12")
FORWARD = Compute((0, 12), "forward", 3, (0, 4), (WEIGHTS,), writes=(HIDDEN,))


def plan_of(actions: tuple[Action, ...], num_devices: int = 1) -> Plan:
    names = [f"device{i}" for i in range(num_devices)]
    phase = Phase(
        name="train",
        micro_batches=(4, 4, 4, 2),
        shards={name: Shard((0, 12), ((0, 4), (0, 4), (0, 4), (0, 2))) for name in names},
        actions=dict.fromkeys(names, actions),
        live=dict.fromkeys(names, (WEIGHTS,)),
        repeat=229,
    )
    return Plan("gpipe", 12, TENSORS, (phase,), {"cuts": [0, 12]})


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (FORWARD, "F3[0:12] r0:4"),
        (replace(FORWARD, direction="backward", weights=(WEIGHTS._replace(version=2),)), "B3[0:12] r0:4 weights v2"),
        (Send(HIDDEN, "device1"), "send hidden@12#3[r0:4] 1.5 MiB -> device1"),
        (Recv(HIDDEN, "device0"), "recv hidden@12#3[r0:4] 1.5 MiB <- device0"),
        (
            Collective("all-reduce", GRADIENTS, GRADIENTS._replace(version=1), ("device0", "device1", "device2")),
            "all-reduce gradients@0:12 4 KiB (device0, device1, device2)",
        ),
        (
            Collective("reduce-scatter", GRADIENTS, GRADIENTS._replace(width=(0, 600)), ("d0", "d1"), (600, 424), 3),
            "reduce-scatter gradients@0:12 4 KiB -> gradients@0:12[w0:600] (d0, d1) shares 600, 424 in 3 tiles",
        ),
        (Step((0, 12), (GRADIENTS,), (WEIGHTS,), (WEIGHTS._replace(version=1),)), "step weights@0:12.v1"),
        (
            Step((0, 12), (GRADIENTS,), (WEIGHTS,), (WEIGHTS._replace(version=1),), Value("norm", version=1)),
            "step weights@0:12.v1 clipped by norm.v1",
        ),
        (Combine("square-sum", (GRADIENTS,), Value("norm")), "square-sum gradients@0:12 -> norm"),
        (Combine("sum", (), GRADIENTS), "sum of nothing -> gradients@0:12"),
        (Combine("concat", (HIDDEN, HIDDEN), HIDDEN, True), f"concat {HIDDEN} + {HIDDEN} -> {HIDDEN} in place"),
        (Load(WEIGHTS), "load weights@0:12 4 KiB"),
        (Store(GRADIENTS), "store gradients@0:12 4 KiB"),
        (Free((HIDDEN,)), "free hidden@12#3[r0:4]"),
        (Free((GRADIENTS,) * 6), "free gradients@0:12, gradients@0:12, gradients@0:12, gradients@0:12 and 2 more"),
        (Commit(), "commit"),
    ],
)  # fmt: skip
def test_notation(action: Action, text: str) -> None:
    assert notation(plan_of((action,)), action) == text


def test_a_whole_plan() -> None:
    assert describe(plan_of((FORWARD, Send(HIDDEN, "device1"), Free((HIDDEN,))))).splitlines() == [
        "gpipe: 1 device, 12 units, 1 phase",
        "  cuts: [0, 12]",
        "",
        "phase 1 'train', 229 times",
        "  training, batch of 14 rows in micro-batches of 3 x 4, 1 x 2",
        "  device0  units 0:12, 3 x 4, 1 x 2 rows per micro-batch, 4 KiB from iteration to iteration",
        "  device0: 3 actions",
        "    compute F3[0:12] r0:4",
        "    nic-out send hidden@12#3[r0:4] 1.5 MiB -> device1",
        "    -       free hidden@12#3[r0:4]",
    ]


@pytest.mark.parametrize(("num_actions", "max_actions"), [(30, 30), (31, 30), (1000, 30), (5, 1), (2, 2), (7, 0)])
def test_shown_and_left_out_actions_add_up(num_actions: int, max_actions: int) -> None:
    actions = tuple(replace(FORWARD, micro_batch=i) for i in range(num_actions))
    lines = describe(plan_of(actions), max_actions).splitlines()
    shown = [line.split()[1] for line in lines if line.startswith("    compute")]
    left_out = sum(int(line.split()[1]) for line in lines if "actions left out" in line)
    assert len(shown) == min(num_actions, max_actions)
    assert len(shown) + left_out == num_actions
    head = max_actions - max_actions // 3
    order = list(range(num_actions)) if not left_out else [*range(head), *range(num_actions)[head + left_out :]]
    assert shown == [f"F{i}[0:12]" for i in order]


def test_devices_left_out_are_counted() -> None:
    text = describe(plan_of((FORWARD,), num_devices=1000))
    assert text.count("from iteration to iteration") == text.count(": 1 action\n") == 16
    assert "... 984 more devices" in text
    assert "... the actions of 984 more devices" in text


def test_actions_that_were_shown_are_referred_to() -> None:
    plan = plan_of((FORWARD,))
    (train,) = plan.phases
    last = replace(train, name="last batch", actions={"device0": (Commit(),)}, repeat=1)
    lines = describe(replace(plan, phases=(train, last, train, replace(train, repeat=2)))).splitlines()
    assert [line for line in lines if line.startswith("phase")] == [
        "phase 1 'train', 229 times",
        "phase 2 'last batch', 1 time",
        "phase 3 'train', 229 times",
        "phase 4 'train', 2 times",
    ]
    assert lines.count("  the actions of phase 1") == 2
    assert sum("F3" in line for line in lines) == 1
