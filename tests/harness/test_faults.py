"""Faults as a person writes them, and the actions that they strike."""

from __future__ import annotations

import pytest

from harness.errors import OrreryError
from harness.faults import Fault, faults_of, joining, noticed
from harness.plan import Combine, Compute, Phase, Send, Shard, Step, Value

DEVICES = ("device0", "device1")
TRAIN = Phase("train", (1,), {"device0": Shard((0, 1), ((0, 1),))}, {"device0": ()}, {})
REPLICATE = Phase("replicate", (), {}, {"device0": ()}, {}, training=False)
FORWARD = Compute((0, 1), "forward", 0, (0, 1), ())
BACKWARD = Compute((0, 1), "backward", 0, (0, 1), ())
PIECE = Send(Value("gradients@0:1", version=-1), "device1")
UPDATE = Step((0, 1), (), (), ())


def test_what_is_written_is_read_and_printed_alike() -> None:
    texts = [
        "crash device1 at step 3",
        "hang device0 at step 0 during backward",
        "cut device1 at step 12 during update",
    ]
    texts += ["crash device0 at step 7 during all-reduce 2", "slow 2.5x device1 at step 4", "leave device0 at step 3"]
    texts.append("join device1 at step 2")
    for text in texts:
        (fault,) = faults_of(text, DEVICES)
        assert str(fault) == text
    assert faults_of("crash device1 at step 3; hang device0 at step 4", DEVICES) == (
        Fault("crash", "device1", 3),
        Fault("hang", "device0", 4),
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "can't be read"),
        ("crash", "can't be read"),
        ("explode device0 at step 1", "KIND is one of crash, hang, cut"),
        ("crash device0 at step -1", "can't be read"),
        ("crash device0 at step 1 during lunch", "MOMENT one of forward"),
        ("crash device7 at step 1", "the devices are device0, device1"),
        ("crash device0 at step 1; hang device0 at step 2", "the device is gone, and can only join"),
        ("leave device0 at step 1; slow 2x device0 at step 2", "the device is gone, and can only join"),
        ("slow 2x device0 at step 1; join device0 at step 2", "the device is there"),
        ("join device0 at step 1; join device1 at step 2", "no device is there in the beginning"),
        ("slow device0 at step 1", "slow FACTORx DEVICE"),
        ("crash 3x device0 at step 1", "can't be read"),
        ("slow 0.5x device0 at step 1", "makes a device faster"),
        ("leave device0 at step 1 during update", "can't be read"),
        ("crash device0 at step 1;", "can't be read"),
    ],
)
def test_what_is_no_fault_is_refused(text: str, reason: str) -> None:
    with pytest.raises(OrreryError, match=reason):
        faults_of(text, DEVICES)


def test_a_fault_strikes_the_actions_of_its_moment_in_its_round() -> None:
    struck = {
        None: {FORWARD, BACKWARD, PIECE, UPDATE},
        "forward": {FORWARD},
        "backward": {BACKWARD},
        "all-reduce": {PIECE},
        "update": {UPDATE},
        "replication": set(),
    }
    for during, actions in struck.items():
        fault = Fault("crash", "device0", 5, during)
        assert {a for a in (FORWARD, BACKWARD, PIECE, UPDATE) if fault.strikes(TRAIN, 5, a)} == actions
        assert not any(fault.strikes(TRAIN, 4, a) for a in (FORWARD, BACKWARD, PIECE, UPDATE))
    copied = Combine("slice", (Value("weights@0:1"),), Value("snapshot-0-0:weights@0:1"))
    assert Fault("crash", "device0", 5, "replication").strikes(REPLICATE, 5, copied)
    assert not Fault("crash", "device0", 5).strikes(REPLICATE, 5, copied), "a round is meant, unless it is said"


def test_a_device_joins_before_anything_else_happens_to_it() -> None:
    faults = faults_of("crash device1 at step 6; join device1 at step 2", DEVICES)
    assert joining(faults) == ("device1",)


def test_who_is_slow_is_told_by_what_the_others_take() -> None:
    expected = {"device0": 1.0, "device1": 2.0, "device2": 4.0}
    assert noticed({"device0": 3.0, "device1": 6.0, "device2": 12.0}, expected) == {}, "all alike"
    assert noticed({"device0": 1.0, "device1": 5.0, "device2": 4.4}, expected) == {"device1": pytest.approx(2.5 / 1.1)}
    assert noticed({"device0": 1.0, "device1": 6.0}, expected) == {"device1": 3.0}, "of two the faster one is right"
    assert noticed({"device0": 1.0, "device1": 1.0, "device2": 4.0}, expected) == {"device1": 0.5}, "or has become fast"
    assert noticed({"device0": 0.0}, {"device0": 0.0}) == {}
