"""From a record back to what was asked: the workload, and the whole request where it can be asked again."""

from __future__ import annotations

from harness.errors import OrreryError
from harness.experiment import KEYS, Request, expand, workload_of
from harness.records import Record
from harness.workload import Workload


def workload(record: Record) -> Workload:
    """The workload of the record. Raises OrreryError where its model or data set is not known here."""
    asked = {**_asked(record), "technique_options": record.technique_options}
    return workload_of(asked, f"the record {record.provenance.config_hash}")


def request(record: Record) -> Request | None:
    """The request that the record answers, or None where this installation would ask something else by it.

    A method or testbed may have come from a file, or have changed since: the hash of what is asked tells.
    """
    asked_of = {record.method: record.method_options, record.technique: record.technique_options}
    options = {
        owner: {name: value for name, value in chosen.items() if value is not None}
        for owner, chosen in asked_of.items()
    }
    tables = {
        "workload": _asked(record),
        "run": {"method": record.method, "testbed": record.testbed, "mode": record.mode, "repeats": record.repeats},
        "options": {owner: chosen for owner, chosen in options.items() if chosen},
    }
    try:
        (asked,) = expand(tables, f"the record {record.provenance.config_hash}")
    except OrreryError:
        return None
    return asked if asked.config_hash == record.provenance.config_hash else None


def _asked(record: Record) -> dict[str, object]:
    """The keys of an experiment's `[workload]` that the record holds."""
    known = record.model_dump(include=set(KEYS["workload"]), exclude_none=True)
    if record.steps is not None:
        del known["epochs"]
    return {**known, "seed": record.provenance.seed}
