"""What is claimed of systems whose cells nobody knows, beside the most of ours, from records made by hand."""

from __future__ import annotations

import csv
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib.resources import files

import pytest

from harness.records import Record
from results import papers, reproduce, system_claims
from results.system_claims import SYSTEMS, load, table, tables


def test_claims_stand_beside_the_most_of_ours(made: Callable[..., Record]) -> None:
    def on(testbed: str, method: str, seconds: float, **changed: object) -> Record:
        return made(2, 284, seconds, method, testbed=testbed, **changed)

    records = [
        on("galaxy-d", "galaxy", 10.0),
        on("galaxy-d", "megatron", 13.0),
        on("galaxy-e", "galaxy", 10.0),
        on("galaxy-e", "megatron", 24.0),
        on("galaxy-e", "megatron", 99.0, method_options={"shares": "speed"}),
        on("galaxy-a", "galaxy", 10.0),
        on("galaxy-a", "sequence-parallel", 26.0),
        on("galaxy-b", "megatron", 99.0),
    ]
    table = system_claims.table("galaxy", records)
    assert table is not None
    by_words = {row["claim"]: row for row in table.frame.to_dict("records")}
    most = by_words["end-to-end latency lower than the state of the art by up to"]
    assert (most["ours"], most["from"]) == ("2.6 x", "sequence-parallel, gpt2-large on galaxy-a")
    assert most["is"] == "reached"
    hetero = by_words["the same on Jetson Nano, from and to"]
    assert (hetero["ours"], hetero["is"]) == ("1.3 to 2.4 x", "not reached")
    assert system_claims.table("galaxy", [on("galaxy-e", "megatron", 24.0)]) is None


def test_claims_of_scaling_stand_beside_the_same_links(made: Callable[..., Record]) -> None:
    quick = [
        made(1, 71, 10.0, testbed="galaxy-m-1@1000mbit@16gib"),
        made(4, 284, 10.1, testbed="galaxy-m-4@1000mbit@16gib"),
    ]
    usual = [made(1, 71, 10.0), made(4, 284, 12.5)]
    for records in (quick + usual, usual + quick):
        table = system_claims.table("galaxy", records)
        assert table is not None
        assert list(table.frame["ours"]) == ["80 %"]
        assert list(table.frame["from"]) == ["71 tokens per device, galaxy-m-4@16gib"]
    assert system_claims.table("galaxy", quick) is None


@pytest.fixture
def trained(record: Callable[..., Record]) -> Callable[..., Record]:
    """A simulated run of training on one of this project's testbeds."""

    def make(method: str, seconds: float, sent: int | None = None, **changed: object) -> Record:
        options = load("asteroid")["options"].get(method, {})
        asked = {"testbed": "mix-2nano-2tx2-1nx@145us", "time_per_sample_s": seconds, "comm_bytes": sent}
        return record(**{**asked, "method": method, "method_options": options, **changed})

    return make


def claimed(records: list[Record]) -> dict[str, tuple[str, str, str]]:
    found = table("asteroid", records)
    return (
        {}
        if found is None
        else {row["claim"]: (row["ours"], row["is"], row["from"]) for row in found.frame.to_dict("records")}
    )


def test_asteroids_claims_are_of_time_and_bytes(trained: Callable[..., Record]) -> None:
    records = [
        trained("asteroid", 2.0, 100),
        trained("eddl", 30.0, 270),
        trained("gpipe", 3.0, 500),
        trained("asteroid", 1.0, 100, testbed="nano-4@145us"),
        trained("eddl", 4.0, 150, testbed="nano-4@145us"),
    ]
    found = claimed(records)
    conventional = found.pop("faster than conventional parallelism, data or pipeline parallelism alone, by up to")
    assert conventional == ("15 x", "reached", "eddl, bert-tiny on mix-2nano-2tx2-1nx@145us")
    fewer = found.pop("fewer bytes than data parallelism, from and to")
    assert fewer[:2] == ("1.5 to 2.7 x", "reached")
    assert found == {}, "nobody ran a hybrid baseline, or one device alone"


def test_only_runs_that_stand_for_the_papers_count(trained: Callable[..., Record]) -> None:
    """The planner as in the paper, shares by speed, on boards whose kernels take time to launch, simulated."""
    ours, base = trained("asteroid", 1.0), trained("gpipe", 3.0)
    assert len(claimed([ours, base])) == 1
    assert claimed([trained("asteroid", 1.0, method_options={"planner": "exact"}), base]) == {}
    assert claimed([trained("asteroid", 1.0, method_options={"stages": 1}), base]) == {}
    assert claimed([ours, trained("eddl", 3.0, method_options={"shares": "equal"})]) == {}
    assert claimed([ours, trained("gpipe", 3.0, batch_size=8)]) == {}
    assert claimed([ours, trained("gpipe", 3.0, mode="emulated")]) == {}
    plain = {"testbed": "mix-2nano-2tx2-1nx"}
    assert claimed([trained("asteroid", 1.0, **plain), trained("gpipe", 3.0, **plain)]) == {}


def test_one_device_is_the_fastest_or_a_nano(trained: Callable[..., Record]) -> None:
    alone = [trained("standalone", t, method_options={"device": d}) for d, t in (("fastest", 3.5), ("device0", 9.0))]
    found = claimed([trained("asteroid", 1.0), *alone])
    assert {words: ours[:2] for words, ours in found.items()} == {
        "faster than one device, from and to: the fastest of the testbed": ("3.5 to 3.5 x", "not reached"),
        "the same: one Jetson Nano": ("9 to 9 x", "reached"),
    }


def test_recovery_is_compared_failure_by_failure(trained: Callable[..., Record]) -> None:
    def recovered(device: int, seconds: float, **options: str) -> Record:
        took = {"replan_s": None, "regroup_s": seconds, "transfer_s": 0.0, "replay_s": 0.0, "first_step_s": 0.0}
        rates = {"throughput_before_samples_per_s": None, "throughput_after_samples_per_s": None}
        where = {"device": f"device{device}", "in_round": 4, "back_to_round": 4, "detect_s": 0.1, "moved_bytes": 0}
        fault = f"crash device{device} at step 4"
        recovery = {"fault": fault, **where, **took, **rates}
        return trained("asteroid", 1.0, inject=fault, recovery=[recovery], method_options=options)

    light = [recovered(device, 1.0, recovery="lightweight") for device in range(2)]
    heavy = [recovered(0, 3.0, recovery="heavy", collector="first"), recovered(1, 16.0, recovery="heavy")]
    assert claimed(light) == {}
    ((ours, reached, where),) = claimed([*light, *heavy]).values()
    assert (ours, reached) == ("16 x", "reached")
    assert where == "crash device1 at step 4, heavy, 0 rounds replayed, bert-tiny on mix-2nano-2tx2-1nx@145us"
    assert claimed([*light, heavy[0]])  # and no other claim has runs with failures for its own


def test_every_system_has_its_own_table(made: Callable[..., Record], trained: Callable[..., Record]) -> None:
    records = [made(2, 284, 1.0, testbed="galaxy-a"), made(2, 284, 2.0, "megatron", testbed="galaxy-a")]
    records += [trained("asteroid", 1.0), trained("gpipe", 3.0)]
    assert [title for title, _ in tables(records)] == ["Galaxy", "Asteroid"]
    assert [title for title, _ in tables(records[2:])] == ["Asteroid"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_testbeds_and_methods_of_claims_are_run(system: str) -> None:
    """Each claim has a testbed among the system's experiments, but for baselines that are still to come."""
    asked = {(r.method.name, r.testbed.name) for r in reproduce.requests([system])}
    for claim in load(system)["claim"]:
        if "methods" in claim and {*claim["methods"]} & {method for method, _ in asked}:
            on = [testbed for method, testbed in asked if method in claim["methods"]]
            assert any(fnmatchcase(testbed, name) for testbed in on for name in claim["testbeds"])


def test_asteroids_claims_are_those_of_the_facts() -> None:
    """Values and confidence of `asteroid.csv`, which is no paper's table of cells."""
    with files("results").joinpath("reference").joinpath("asteroid.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["artefact"] == "claim"]
    known = {(float(row["value"]), row["provenance"]) for row in rows if row["unit"] == "x"}
    for claim in load("asteroid")["claim"]:
        assert {(value, claim["confidence"]) for value in claim["value"]} <= known
    assert "asteroid" not in papers.names()
