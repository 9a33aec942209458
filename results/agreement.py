"""How well the simulator foretells what really happens: the runs that were both simulated and emulated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import pandas as pd

from harness.records import Record
from results.settings import Setting, settings
from results.tables import Table, percent, significant

#: Emulated times of two methods that differ by less are a tie: either order of them is right.
TIE = 0.05
#: A part of the run, computing or the network, that takes a share within these is neither all nor nothing.
MATTERS = (0.25, 0.75)
LATE, LATEST = "late", "latest"


@dataclass(frozen=True)
class Pair:
    """One question with the answers of both modes. `label` is the method, with options where they differ."""

    setting: Setting
    label: str
    emulated: Record
    simulated: Record

    @property
    def ok(self) -> bool:
        """Whether both have the time of the whole run: one that was killed and went on has none."""
        return self.emulated.status == self.simulated.status == "ok" and self.emulated.resumed_after_epoch is None

    @property
    def shaped(self) -> bool:
        """Whether cores and links were those of the testbed, not what this machine happened to give."""
        return bool(self.emulated.emulation and self.emulated.emulation.get("shaped"))

    @property
    def emulated_s(self) -> float:
        """Seconds per iteration, as of `simulated_s`."""
        return _per_iteration(self.emulated, self.emulated.total_time_s)

    @property
    def simulated_s(self) -> float:
        return _per_iteration(self.simulated, self.simulated.total_time_s)

    @property
    def error(self) -> float:
        return self.simulated_s / self.emulated_s - 1

    @property
    def error_without_overlap(self) -> float:
        """The error of a closed form in which the busiest device computes, and then the busiest network queue works."""
        busy = (self.simulated.compute_time_s or 0.0) + (self.simulated.comm_time_s or 0.0)
        return _per_iteration(self.simulated, busy) / self.emulated_s - 1

    @property
    def shares(self) -> tuple[float, float]:
        """Of the emulated run: in which the busiest device computes, and in which the busiest link must be busy.

        The link's from its bytes, which are the same in both modes: a sender sees but its socket's buffer fill.
        """
        total = self.emulated.total_time_s
        assert total is not None
        return (self.emulated.compute_time_s or 0.0) / total, (self.simulated.comm_time_s or 0.0) / total


def _per_iteration(record: Record, seconds: float | None) -> float:
    assert seconds is not None, "asked only of runs that are ok"
    return seconds / _iterations(record)


def _iterations(record: Record) -> int:
    return record.steps or record.epochs * -(-record.num_samples // record.batch_size)


def pairs(asked: Iterable[Setting]) -> list[Pair]:
    """Every question on several devices that both modes have answered, with a result or out of memory."""
    found = []
    for setting in asked:
        questions: dict[tuple[str, str], dict[str, Record]] = {}
        # Of several answers in one mode that of the most repeats counts.
        for record in sorted(setting.records, key=lambda r: r.repeats):
            if record.num_devices > 1 and record.status in ("ok", "oom"):
                questions.setdefault((record.model, setting.label(record)), {})[record.mode] = record
        places = {record.provenance.config_hash: place for place, record in enumerate(setting.records)}
        here = [
            Pair(setting, label, answers["emulated"], answers["simulated"])
            for (_, label), answers in questions.items()
            if answers.keys() >= {"emulated", "simulated"}
        ]
        found += sorted(here, key=lambda pair: places[pair.emulated.provenance.config_hash])
    return found


def text(records: Sequence[Record]) -> str:
    """The tables for a terminal; empty where nothing was both simulated and emulated."""
    found = pairs(settings(records))
    if not any(pair.ok for pair in found):
        return ""
    return "\n\n".join(table.text() for table in (cells(found), summary(found)))


def cells(found: Sequence[Pair]) -> Table:
    """A row per question: seconds per iteration of both modes, and how far off simulator and closed form are."""
    rows = []
    for pair in (pair for pair in found if pair.ok):
        record = pair.emulated
        computing, network = pair.shares
        rows.append(
            {
                "testbed": record.testbed,
                "model": record.model,
                "technique": record.technique,
                "data set": record.dataset,
                "batch": record.batch_size,
                "iterations": _iterations(record),
                "method": pair.label,
                "emulated, s": pair.emulated_s,
                "simulated, s": pair.simulated_s,
                "error": pair.error,
                "compute, then communicate: error": pair.error_without_overlap,
                "computing": computing,
                "network": network,
                "max_rel_error": record.max_rel_error,
            }
        )
    frame = pd.DataFrame(rows)
    same = [column for column in ("technique", "data set", "iterations") if frame[column].nunique() == 1]
    frame = frame.drop(columns=same if frame["max_rel_error"].notna().any() else [*same, "max_rel_error"])
    formats = {
        **dict.fromkeys(("emulated, s", "simulated, s"), significant),
        **dict.fromkeys(("error", "compute, then communicate: error"), "{:+.1%}".format),
        **dict.fromkeys(("computing", "network"), percent),
        **dict.fromkeys(("batch", "iterations"), "{:.0f}".format),
        "max_rel_error": "{:.1e}".format,
    }
    notes = [
        "Seconds are of one iteration. Error: simulated / emulated - 1.",
        "Compute, then communicate: the closed form that adds the simulator's computing of the busiest device and "
        "traffic of the busiest network queue, as if nothing overlapped and nobody waited.",
        "Computing, network: share of the emulated run in which the busiest device computes, and in which the busiest "
        "link must be busy, from its bytes and its rate.",
    ]
    if "max_rel_error" in frame:
        notes.append("max_rel_error: of what the emulated run trained, from the same training on one device.")
    return Table(
        "agreement",
        "Simulated beside emulated, per iteration",
        frame,
        formats,
        heads=list(frame.columns).index("method") + 1,
        notes=tuple(notes),
    )


def summary(found: Sequence[Pair]) -> Table:
    """Median and worst error of simulator and closed form; in the notes what else the two modes agree on."""
    ok = [pair for pair in found if pair.ok]
    rows = []
    for kind, shaped in (("shaped", True), ("unshaped", False)):
        errors = {
            "the simulator": [abs(pair.error) for pair in ok if pair.shaped == shaped],
            "compute, then communicate": [abs(pair.error_without_overlap) for pair in ok if pair.shaped == shaped],
        }
        rows += [
            {
                "foretold by": name,
                "testbeds": kind,
                "cells": len(values),
                "median error": median(values),
                "worst error": max(values),
            }
            for name, values in errors.items()
            if values
        ]
    alike, groups = ranked_alike(ok)
    low, high = MATTERS
    both = sum(all(low <= share <= high for share in pair.shares) for pair in ok)
    notes = [
        "Errors are absolute, over the cells of the table above.",
        f"Computing and the network each take {low:.0%} to {high:.0%} of the time in {both} of {len(ok)} cells.",
    ]
    if groups:
        notes.append(
            f"The methods rank alike in {alike} of {groups} groups of one testbed, workload and model; emulated times "
            f"less than {TIE:.0%} apart are a tie, which agrees with either order."
        )
    notes += _out_of_memory(found)
    if not all(pair.shaped for pair in ok):
        notes.append(
            "Unshaped: the processes take of this machine what they get, and disturb each other; such a run is for the "
            "mathematics, and its time for comparison only."
        )
    formats = {"cells": "{:.0f}".format, "median error": percent, "worst error": percent}
    return Table("agreement-summary", "How far off", pd.DataFrame(rows), formats, heads=2, notes=tuple(notes))


def ranked_alike(found: Sequence[Pair]) -> tuple[int, int]:
    """Groups of one setting and model in which both modes put the methods in one order, and all such groups."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in found:
        groups.setdefault((pair.setting.name, pair.emulated.model), []).append(pair)
    several = [group for group in groups.values() if len(group) > 1]
    return sum(all(_same_order(a, b) for a, b in combinations(group, 2)) for group in several), len(several)


def _same_order(a: Pair, b: Pair) -> bool:
    faster, slower = sorted((a, b), key=lambda pair: pair.emulated_s)
    return slower.emulated_s / faster.emulated_s - 1 < TIE or faster.simulated_s <= slower.simulated_s


def _out_of_memory(found: Sequence[Pair]) -> Iterator[str]:
    verdicts = [(pair.emulated.status == "oom", pair.simulated.status == "oom") for pair in found]
    either = sum(emulated or simulated for emulated, simulated in verdicts)
    if either:
        yield f"Of {either} cells that ran out of memory in either mode, {verdicts.count((True, True))} did in both."


def measured(found: Sequence[Pair]) -> Iterator[Table]:
    """What each shaped testbed measured of itself, every time it was set up."""
    by_testbed: dict[str, dict[str, dict[str, object]]] = {}
    for pair in found:
        about = pair.emulated.emulation
        if about and pair.shaped:
            by_testbed.setdefault(pair.emulated.testbed, {})[json.dumps(about, sort_keys=True)] = dict(about)
    for testbed, measurements in by_testbed.items():
        yield _of_itself(testbed, list(measurements.values()))


def _kept(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """How near a device came to the share that it was asked for: paced, or by a quota."""
    if "late_share" in found[0]:
        late = [device["late_share"] for device in found]
        return {LATE: median(late), LATEST: max(late)}
    shares = [device["measured_cpu_share"] for device in found]
    return {"share measured": median(shares), "least": min(shares), "most": max(shares)}


def _of_itself(testbed: str, measurements: Sequence[dict[str, object]]) -> Table:
    by_device: dict[str, list[dict[str, float]]] = {}
    for about in measurements:
        devices = about["devices"]
        assert isinstance(devices, dict)
        for name, device in devices.items():
            by_device.setdefault(name, []).append(device)
    rows = []
    for name, found in by_device.items():
        rows.append(
            {
                "device": name,
                "share of a core asked": found[0]["cpu_share"],
                **_kept(found),
                "link set to, Mbit/s": median(device["nominal_mbit_per_s"] for device in found),
                "TCP measured, Mbit/s": median(device["measured_mbit_per_s"] for device in found),
            }
        )
    frame = pd.DataFrame(rows)
    notes = [
        f"Medians of {len(measurements)} measurements, each of all devices at once. A core is one as it was when the "
        "units of the workload were measured. TCP gets less than its link is set to: headers take their part.",
    ]
    formats = dict.fromkeys(frame.columns.drop("device"), significant)
    if LATE in frame:
        notes.append("Late: by how much actions took longer than those of the device, as a share of its computing.")
        formats |= dict.fromkeys((LATE, LATEST), percent)
    return Table(
        f"{testbed}-measured", f"What {testbed} measured of itself before its runs", frame, formats, notes=tuple(notes)
    )
